"""What an evaluation found: first in plain words, computed from the numbers and saying no more than their intervals, then in tables.

As Markdown, JSON and terminal text. Text of prompts and models is shown as text: nothing in it becomes markup.
"""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..data.records import write_records
from ..errors import InstructLiteError
from .curves import SHOWN, sparkline

Row = dict[str, Any]
SHOWN_CHARACTERS = 1200  # of a prompt or an answer; answers.jsonl has the rest
CUT = " […]"

HOW = """
- **Win rate**: every answer of a against every answer of b to the same prompt; the one that the judge scores higher wins, a tie counts
  one half; mean over prompts.
- **Mean reward**: the judge's raw score, mean over answers and prompts. It has no unit: compare it within one judge only.
- **Intervals**: 95 %, bootstrap with 10,000 resamples of whole prompts, since answers to one prompt are alike (percentiles, expanded for
  few prompts: Hesterberg 2015); Wilson's where every comparison is won or lost. They say how far another draw of prompts would move the
  number, not another training run.
- **Judge**: its score is read at the last token of the answer, as PPO reads its reward model.
- **KL**: sum over an answer's tokens of log pi - log pi_reference, in nats, at the sampling temperature, mean over the candidate's own
  sampled answers ± standard error over prompts.
- **Perplexity**: exp of the mean negative log-probability per token of people's held-out answers, the token that ends the answer included.
- **Length**: tokens with the one that ends the answer. **Ended**: share of answers that came to an end before the limit.
- **Distinct-2**: different token pairs as a share of all, over all answers of a candidate. **Repeated trigrams**: share of token triples
  that stood before in the same answer.
- **Greedy** takes the likeliest token each time: a policy whose distribution is only sharper gains when sampled, not then. In half
  precision, nearly tied tokens can fall differently on another machine or with another batch size.
- **The course of training**: means over the answers of each rollout, none of them held out; each bar is one rollout, or in a long run
  the mean of neighbouring ones, from the least (▁) to the greatest (█) of its row. First and last are the numbers of the outermost bars.
- **Share of the gain by greedy decoding**: (b greedy - b sampled) / (a sampled - b sampled), in mean reward.
""".strip()


FORMAT = 2


@dataclass
class Report:
    """The result of `evaluate`. `print` it for the tables, `save` it for report.md and report.json.

    Rows are plain dictionaries; an interval of `x` is `x`, `x_low`, `x_high`, and None is "not known". Sampled answers come
    before greedy ones, the first judge before the others.
    """

    base: Row
    """id, revision, fingerprint, quantization, dtype."""
    settings: Row
    reference: str | None
    """The candidate that KL is measured from."""
    headline: list[str] | None
    """[a, b]: the pair that the first words are about."""
    candidates: list[Row]
    """name, base, adapter (sha256; None: none), kind ("base", "few-shot", "context", "adapter", "best-of-n", "merged"), n and analytic_kl
    (of best-of-n), stage ("sft", "dpo", "ppo"), mean_reward…, kl, kl_standard_error, perplexity, and the sampled `texts`."""
    judges: list[Row]
    """name, kind ("reward", "ensemble", "language model", "people"), adapter, accuracy… on held-out pairs and that of preferring the
    longer answer (`longer_wins`), names of the candidates it `trained`, and of those that another reward model did (`not_trained`).
    Of language models also position_bias…, same_in_both_orders, missing, warnings."""
    win_rates: list[Row]
    """a, b, judge, decoding (b_decoding, where b's is another), rate, low, high, prompts, gain… (mean reward of a less that of b),
    length_controlled…, p_of_a_draw, prompts_needed, warnings."""
    rewards: list[Row]
    """candidate, judge, decoding, mean_reward…"""
    texts: list[Row]
    """candidate, decoding, length, ended, distinct_2, repeated_trigrams."""
    sharpening: Row | None
    """share… of a's gain over b at the sampling temperature that b reaches by greedy decoding alone."""
    samples: list[Row]
    """prompt and sample (numbers), why ("loss" or "first"): the answers that the pages show."""
    seconds: dict[str, float]
    """By phase."""
    training: list[Row]
    """Of candidates that PPO trained: candidate, cycles, curves by metric, and the health checks' warnings."""
    answers: list[Row]
    """Each prompt with all answers and their scores: answers.jsonl."""
    strengths: list[Row] | None = None
    """judge, decoding, candidate, strength, low, high: Bradley-Terry log-odds, strongest first; None where not all are connected."""
    agreement: Row | None = None
    """judges (names), alpha…: Krippendorff's."""
    ratings: list[Row] = field(default_factory=list)
    """candidate, judge, scale ("pointwise", "likert", "…_reference"), decoding, rating…, missing."""
    side_effects: list[Row] = field(default_factory=list)
    """candidate, decoding, set (of prompts), category (a use case, None: all), measure, unit, better ("higher", "lower", None),
    value…, n."""
    benchmarks: list[Row] = field(default_factory=list)
    """candidate, task, metric, value, standard_error, n, how."""
    costs: list[Row] = field(default_factory=list)
    """candidate, stage, seconds, peak_rss_mb, tokens."""

    def to_dict(self) -> Row:
        """What report.json holds: everything but the answers; numbers that are not finite are None."""
        return {"format": FORMAT} | {f.name: _finite(getattr(self, f.name)) for f in fields(self) if f.name != "answers"}

    def save(self, directory: str | Path) -> None:
        """Write report.md, report.json and answers.jsonl (all answers with their scores, a prompt a line)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_records(directory / "answers.jsonl", self.answers)
        (directory / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        content = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (directory / "report.json").write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read report.json, or the directory it is in; without the answers, which it has not."""
        path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InstructLiteError(f"{path}: not a report ({error}); instructlite evaluate writes one") from error
        names = {f.name for f in fields(cls)} - {"answers"}
        optional = {f.name for f in fields(cls) if not (f.default is MISSING and f.default_factory is MISSING)}
        known = isinstance(content, dict) and content.pop("format", None) in (1, FORMAT) and names - optional <= set(content) <= names
        if not known:
            raise InstructLiteError(f"{path}: not a report of this version; write it anew with instructlite evaluate")
        return cls(**content, answers=[])

    # --- in plain words ---------------------------------------------------------------------------------------------

    def verdict(self) -> str:
        """Two paragraphs of plain text: what improved, by how much and how sure; then who says so, and what it cost."""
        if self.headline is None:
            row = self.candidates[0]
            return f"On {self._prompts()}, {row['name']}'s mean reward by {self.judges[0]['name']} is {_between(row, 'mean_reward')}."
        first = " ".join([*self._sampled_words(), *self._greedy_words(), *self._sharpening_words()])
        return first + "\n\n" + " ".join([*self._judge_words(), *self._distance_words()])

    def _sampled_words(self) -> Iterable[str]:
        (a, b), row, temperature = self.headline, self._headline_row("sampled"), self.settings["temperature"]
        trained = ", the distribution that was trained" if temperature == 1 else ""
        yield (
            f"On {self._prompts()}, sampled at temperature {temperature:g}{trained}, {a} wins {_between(row, 'rate')} of the "
            f"comparisons with {b}; 0.5 would be a draw."
        )
        yield {
            1: f"The interval is clear of 0.5: when sampled so, {a}'s answers score better than {b}'s.",
            -1: f"The interval lies below 0.5: when sampled so, {a}'s answers score worse than {b}'s.",
            0: "The interval holds 0.5: these prompts show no difference between the two.",
            None: "That is too few prompts for an interval: nothing follows from it.",
        }[_side(row)]
        yield f"The difference in mean reward is {_between(row, 'gain', sign='+')}."

    def _greedy_words(self) -> Iterable[str]:
        a, row = self.headline[0], self._headline_row("greedy")
        if row is None:
            return
        meaning = {
            1: "clear of 0.5",
            -1: f"below 0.5, so {a} does worse then",
            0: "which holds 0.5, so no difference is shown then",
            None: "without an interval",
        }[_side(row)]
        yield f"Decoded greedily, {a} wins {_between(row, 'rate')}, {meaning}."

    def _sharpening_words(self) -> Iterable[str]:
        if self.sharpening is None:
            if self._headline_row("greedy") is None and _side(self._headline_row("sampled")) == 1:
                yield "Greedy answers were not compared, so how much of this is only a sharper distribution is not known."
            return
        share, low, high = (self.sharpening[name] for name in ("share", "share_low", "share_high"))
        meaning = {
            (False, False): "that much a sharper distribution alone can give, but not all of it",
            (False, True): "a sharper distribution alone may explain all of it",
            (True, False): "a sharper distribution alone does not explain it",
            (True, True): "too wide an interval to say how much a sharper distribution alone explains",
        }[low <= 0, high >= 1]
        interval = f"{100 * share:.0f} % (95 % interval {100 * low:.0f} % to {100 * high:.0f} %)"
        yield f"Of that difference, {self.headline[1]} reaches {interval} untrained, just by greedy decoding: {meaning}."

    def _judge_words(self) -> Iterable[str]:
        a = self.headline[0]
        for number, judge in enumerate(self.judges):
            name = judge["name"]
            relation = ""
            if a in judge["trained"]:
                relation = f", the reward model that {a} was trained on (no independent evidence)"
            elif a in judge["not_trained"]:
                relation = f", a reward model that {a} was not trained on"
            if number == 0:
                yield f"The judge is {name}{relation}; no person was asked."
                yield from _accuracy_words(judge)
            else:
                row = self._headline_row("sampled", name)
                yield f"By {name}{relation}, {a} wins {_between(row, 'rate')} when sampled."

    def _distance_words(self) -> Iterable[str]:
        row = _find(self.candidates, name=self.headline[0])
        if row["kl"] is not None and row["name"] != self.reference:
            yield f"{row['name']} is {_number(row['kl'], 1)} nats an answer away from {self.reference} (KL)."
        if row["perplexity"] is not None:
            each = ", ".join(f"{other['name']} {_number(other['perplexity'], 2)}" for other in self.candidates)
            yield f"Perplexity of people's held-out answers: {each}."

    def _prompts(self) -> str:
        prompts, samples = self.settings["prompts"], self.settings["samples"]
        return f"{prompts} held-out prompt{'s' * (prompts > 1)} with {samples} answer{'s' * (samples > 1)} each"

    def _headline_row(self, decoding: str, judge: str | None = None) -> Row | None:
        a, b = self.headline
        return _find(self.win_rates, a=a, b=b, decoding=decoding, judge=judge or self.judges[0]["name"])

    # --- tables -----------------------------------------------------------------------------------------------------

    def _decoding(self, name: str) -> str:
        return f"T = {self.settings['temperature']:g}" if name == "sampled" else name

    def win_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text."""
        rows = [
            [row["a"], row["b"], self._decoding(row["decoding"]), row["judge"], _bracket(row, "rate"), _bracket(row, "gain", sign="+")]
            for row in self.win_rates
        ]
        return ["a", "against b", "decoding", "judge", "win rate of a", "reward, a less b"], rows

    def candidate_table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [row["name"], _bracket(row, "mean_reward"), _kl(row), *(_number(row[name], 2) for name in ("perplexity", "length", "ended"))]
            for row in self.candidates
        ]
        return ["candidate", "mean reward", f"KL to {self.reference}" if self.reference else "KL", "perplexity", "length", "ended"], rows

    def text_table(self) -> tuple[list[str], list[list[str]]]:
        header = ["candidate", "decoding", *(f"mean reward by {judge['name']}" for judge in self.judges)]
        rows = []
        for text in self.texts:
            key = {"candidate": text["candidate"], "decoding": text["decoding"]}
            rewards = [_find(self.rewards, judge=judge["name"], **key) for judge in self.judges]
            shape = [_number(text["length"], 1), *(_number(text[name], 3) for name in ("ended", "distinct_2", "repeated_trigrams"))]
            numbers = [_bracket(row, "mean_reward") if row else "–" for row in rewards]
            rows.append([text["candidate"], self._decoding(text["decoding"]), *numbers, *shape])
        return [*header, "length", "ended", "distinct-2", "repeated trigrams"], rows

    def __str__(self) -> str:
        heading = f"{self._prompts()}, judged by {self.judges[0]['name']}; in brackets 95 % intervals"
        words = [textwrap.fill(_printable(paragraph), 110, break_long_words=False) for paragraph in self.verdict().split("\n\n")]
        return "\n\n".join([_printable(heading), _plain_table(*self.win_table()), _plain_table(*self.candidate_table()), *words])

    # --- Markdown ---------------------------------------------------------------------------------------------------

    def to_markdown(self) -> str:
        """The whole report: verdict, tables, sample answers, how each number was computed, what was run."""
        names = [row["name"] for row in self.candidates]
        accuracies = [
            [judge["name"], _bracket(judge, "accuracy"), _number(judge["longer_wins"], 3), ", ".join(judge["trained"]) or "none"]
            for judge in self.judges
        ]
        parts = [
            f"# {escape(', '.join(names))} on held-out prompts",
            *map(escape, self.verdict().split("\n\n")),
            "## Win rates",
            markdown_table(*self.win_table()),
            "## Candidates",
            markdown_table(*self.candidate_table()),
            "Every decoding:",
            markdown_table(*self.text_table()),
            "## Judges",
            markdown_table(
                ["judge", "accuracy on held-out pairs", "of preferring the longer answer", "trained these candidates"], accuracies
            ),
            *itertools.chain(*map(training_section, self.training)),
            "## Sample answers",
            *(self._sample(row) for row in self.samples),
            "## How each number was computed",
            HOW,
            "## What was run",
            self._provenance(),
        ]
        return "\n\n".join(parts) + "\n"

    def _sample(self, row: Row) -> str:
        judge, entry = self.judges[0]["name"], self.answers[row["prompt"]]
        why = (
            f"one of the worst losses of {' against '.join(self.headline)}"
            if row["why"] == "loss"
            else "not picked: it comes first in the data"
        )
        prompt = "<br>".join(f"*{turn['role']}:* {escape(_shorten(turn['content']))}" for turn in entry["prompt"])
        shown = [_find(entry["answers"], candidate=c["name"], decoding="sampled", sample=row["sample"]) for c in self.candidates]
        header = [f"{answer['candidate']} ({judge}: {_number(answer['scores'][judge], 2)})" for answer in shown]
        texts = [_shorten(answer["text"]) + ("" if answer["ended"] else CUT) for answer in shown]
        return f"**Prompt {row['prompt'] + 1}**, {escape(why)}\n\n{prompt}\n\n{markdown_table(header, [texts])}"

    def _provenance(self) -> str:
        rows = [["base", self.base["id"], self.base["fingerprint"]]]
        rows += [["candidate", row["name"], row["adapter"]] for row in self.candidates if row["adapter"]]
        rows += [["judge", row["name"], row["adapter"] or ""] for row in self.judges]
        settings = "; ".join(f"{name}: {value}" for name, value in {**self.base, **self.settings}.items() if value is not None)
        seconds = "; ".join(f"{name}: {value:.1f}" for name, value in self.seconds.items())
        return f"{markdown_table(['', 'name', 'sha256'], rows)}\n\n{escape(settings)}\n\nSeconds: {escape(seconds)}"


def training_section(row: Row) -> Iterable[str]:
    """Markdown: a heading, the curves, the warnings."""
    yield f"## The training of {escape(row['candidate'])}"
    rows = [[SHOWN[name], _number(curve[0], 3), _number(curve[-1], 3), sparkline(curve)] for name, curve in row["curves"].items()]
    yield markdown_table([f"over {row['cycles']} rollouts", "first", "last", "course"], rows)
    yield "\n".join(f"- {escape(text)}" for text in row["health"].values()) or "No health check had anything to say."


def escape(text: str) -> str:
    """Text as Markdown that shows it and does nothing else: no HTML, no markup, no line of its own."""
    text = html.escape(_printable(text), quote=False)
    # Intervals are left alone, so that the tables can be read as they are.
    text = re.sub(r"(\[[-+.\d]+, [-+.\d]+\](?![(\[:]))|([\\`*_{}\[\]#|~$])", lambda found: found[1] or "\\" + found[2], text)
    return text.strip().replace("\n", "<br>")


def _printable(text: str) -> str:
    """Control characters (terminal escapes, reversed writing direction) become visible."""
    return "".join(c if c.isprintable() or c in "\n\t\u00a0" else "\ufffd" for c in text.replace("\r\n", "\n"))


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + CUT


def _accuracy_words(judge: Row) -> Iterable[str]:
    if judge["accuracy"] is not None:
        low = judge["accuracy_low"]
        weak = ", which is not shown to be better than chance" if low is not None and low <= 0.5 else ""
        yield f"It agrees with people on {_between(judge, 'accuracy')} of held-out pairs{weak}."


def _side(row: Row) -> int | None:
    """Where the interval of a win rate lies: 1 above 0.5, -1 below, 0 around it; None without an interval."""
    return None if row["low"] is None else (row["low"] > 0.5) - (row["high"] < 0.5)


def _find(rows: Iterable[Row], **keys: Any) -> Row | None:
    return next((row for row in rows if all(row[name] == value for name, value in keys.items())), None)


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def _ends(row: Row, name: str, sign: str) -> list[str]:
    """The ends of an interval as text; none where it has none. A win rate's are plainly called low and high."""
    low, high = (row[end] if name == "rate" else row[f"{name}_{end}"] for end in ("low", "high"))
    return [] if low is None or high is None else [_number(low, 3, sign), _number(high, 3, sign)]


def _between(row: Row, name: str, sign: str = "") -> str:
    ends = _ends(row, name, sign)
    return _number(row[name], 3, sign) + (f" (95 % interval {ends[0]} to {ends[1]})" if ends else "")


def _bracket(row: Row, name: str, sign: str = "") -> str:
    ends = _ends(row, name, sign)
    return _number(row[name], 3, sign) + (f" [{ends[0]}, {ends[1]}]" if ends else "")


def _kl(row: Row) -> str:
    error = row["kl_standard_error"]
    return _number(row["kl"], 2) + ("" if not error else f" ± {_number(error, 2)}")


def _plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = Table(*map(_printable, header), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(_printable, row))
    text = io.StringIO()
    Console(file=text, width=240, markup=False, highlight=False, emoji=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *rest = ("| " + " | ".join(map(escape, line)) + " |" for line in (header, *rows))
    return "\n".join([first, "|" + " --- |" * len(header), *rest])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
