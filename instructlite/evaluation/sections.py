"""What a report shows, in order, whatever it is written as: sections of paragraphs, lists and tables, and sample answers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import tables
from .advice import advice
from .effects import effects
from .formatting import CUT, Row, between, find, number, printable, shorten
from .how import HOW, MEASURES

if TYPE_CHECKING:
    from .report import Report

Part = str | list[str] | tables.Table


@dataclass(frozen=True)
class Section:
    name: str
    """The plots of a page are hung by it; "training", "training-2", ... are those of the training's rows."""
    title: str
    parts: list[Part] = field(default_factory=list)
    """Paragraphs, bullet lists and tables."""


@dataclass(frozen=True)
class Answer:
    candidate: str
    text: str
    score: str
    """Empty where the judge gave none."""
    cut: bool


@dataclass(frozen=True)
class Sample:
    title: str
    why: str
    turns: list[tuple[str, str]]
    """(role, text)."""
    answers: list[Answer]


def sections(report: Report) -> Iterator[Section]:
    """All but samples, how and what was run, which stand last; none without content."""
    advised = [said[0].upper() + said[1:] for said in advice(report)]
    found = [
        Section("next", "What to do next", [advised] if advised else []),
        Section("wins", "Win rates", [*tables.win_tables(report), *_warnings(_headlines(report))]),
        Section("candidates", "Candidates", _known(tables.candidate_table(report))),
        Section("strengths", "Strengths", [*tables.strength_tables(report)]),
        Section("decodings", "Sampled and greedy", _known(tables.text_table(report))),
        Section("judges", "Judges", [*tables.judge_tables(report), *_agreement(report), *_warnings(report.judges)]),
        Section("effects", "Tax and side effects", [*_clear(report), *tables.side_effect_tables(report)]),
        Section("benchmarks", "Benchmarks", [*tables.benchmark_tables(report)]),
        Section("distance", "Reward against KL", [*tables.distance_tables(report)]),
        *_trainings(report),
        Section("costs", "Time and memory", [*tables.cost_tables(report)]),
    ]
    return (section for section in found if section.parts)


def evidence(report: Report) -> Iterator[Part]:
    """What a model card quotes: the tables behind the verdict, and the course of training with its warnings."""
    yield from [*tables.win_tables(report)[:1], *_known(tables.candidate_table(report)), *tables.strength_tables(report)]
    yield from tables.side_effect_tables(report)[:1]
    for section in _trainings(report):
        yield from section.parts


def _known(table: tables.Table | None) -> list[Part]:
    return [] if table is None else [table]


def _warnings(rows: Iterable[Row]) -> list[Part]:
    said = list(dict.fromkeys(f"{_about(row)}: {text}" for row in rows for text in row.get("warnings") or ()))
    return [said] if said else []


def _headlines(report: Report) -> list[Row]:
    """The win rates that the first words are about; the warnings of the others stand in report.json."""
    return [row for row in report.win_rates if [row["a"], row["b"]] == report.headline]


def _clear(report: Report) -> list[Part]:
    """The effects that are clear of chance, in words."""
    if not report.side_effects or not (found := effects(report)):
        return []
    a, b = report.headline
    said = [f"{effect.name}: {effect.b} for {b}, {effect.a} for {a}, {'better' if effect.better else 'worse'}" for effect in found]
    return ["Clear of chance are:", said]


def _about(row: Row) -> str:
    return row["name"] if "name" in row else f"{row['a']} against {row['b']}, {row['decoding']}, by {row['judge']}"


def _agreement(report: Report) -> list[Part]:
    if not report.agreement:
        return []
    names = ", ".join(report.agreement["judges"])
    return [f"Krippendorff's alpha between {names}: {between(report.agreement, 'alpha', 2)}; 1 is full agreement, 0 what chance gives."]


def _trainings(report: Report) -> Iterator[Section]:
    for position, row in enumerate(report.training, 1):
        warned = ["The health checks warned:", list(row["health"].values())]
        said: list[Part] = warned if row["health"] else ["No health check had anything to say."]
        table = _known(tables.training_table(row))
        yield Section(f"training-{position}", f"The training of {row['candidate']}", [*table, *said])


def samples(report: Report) -> Iterator[Sample]:
    """The prompts that were picked with the sampled answers of all candidates; none where the answers are not in memory."""
    for row in report.samples if report.answers else ():
        entry = report.answers[row["prompt"]]
        lost = row["why"] == "loss" and report.headline
        why = f"one of the worst losses of {' against '.join(report.headline)}" if lost else "not picked: it comes first in the data"
        shown = (find(entry["answers"], candidate=c["name"], decoding="sampled", sample=row["sample"]) for c in report.candidates)
        turns = [(printable(turn["role"]), shorten(printable(turn["content"]))) for turn in entry["prompt"]]
        yield Sample(f"Prompt {row['prompt'] + 1}", why, turns, [_answer(report, answer) for answer in shown if answer])


def _answer(report: Report, answer: Row) -> Answer:
    judge = report.judges[0]["name"] if report.judges else None
    score = (answer.get("scores") or {}).get(judge)
    cut = not answer.get("ended", True)
    return Answer(
        answer["candidate"],
        shorten(printable(answer["text"])) + (CUT if cut else ""),
        "" if score is None else f"{judge}: {number(score, 2)}",
        cut,
    )


def how(report: Report) -> list[tuple[str, str]]:
    """(term, how it was computed) of what the report has."""
    rows = [*report.win_rates, *report.judges]
    known = [(term, text) for term, part, text in HOW if part is None or getattr(report, part, None) or _in(rows, part)]
    measured = {row["measure"] for row in report.side_effects}
    return known + [(name.capitalize() if name.islower() else name, text) for key, (name, text) in MEASURES.items() if key in measured]


def _in(rows: list[Row], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def provenance(report: Report) -> list[Part]:
    settings = "; ".join(f"{name}: {value}" for name, value in {**report.base, **report.settings}.items() if value is not None)
    seconds = "; ".join(f"{name}: {value:.1f}" for name, value in report.seconds.items())
    return [*_known(tables.provenance_table(report)), settings, *([f"Seconds: {seconds}"] if seconds else [])]
