"""The tables of a report as rows of text, for Markdown, the HTML page and the terminal alike. What is not known leaves no column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .curves import SHOWN, sparkline
from .formatting import UNKNOWN, Row, bracket, ends, find, number, plain
from .how import measure_name

if TYPE_CHECKING:
    from .report import Report

MANY = 24  # rows of win rates; of more, those of pairs that the report is not about stand apart
KINDS = {"few-shot": "base, with examples in the prompt", "context": "base, with context in the prompt", "merged": "merged model"}
STAGES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
INSTRUCTGPT = (("toxicity",), ("truthfulness",), ("hallucination_judged", "hallucination"), ("customer_assistant",))
"""Its measures; where there are several, the first that was taken."""
SETS = {"toxicity": "red-team", "hallucination_judged": "closed-domain", "hallucination": "closed-domain"}
"""The prompts that a measure is about, where it was taken on them."""


@dataclass(frozen=True)
class Table:
    caption: str
    header: list[str]
    rows: list[list[str]]
    words: int = 1
    """So many columns from the left are text, the others numbers."""
    folded: bool = False
    """A page shows it when asked."""


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, folded: bool = False) -> Table | None:
    """None without rows; columns in which nothing is known are left out."""
    rows = [list(row) for row in rows]
    if not rows:
        return None
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("", UNKNOWN) for row in rows)]
    texts = [[row[i] for i in kept] for row in rows]
    return Table(caption, [header[i] for i in kept], texts, sum(i < words for i in kept), folded)


def _some(*tables: Table | None) -> list[Table]:
    return [table for table in tables if table is not None]


def decoding_name(report: Report, name: str | None) -> str:
    return f"T = {report.settings['temperature']:g}" if name == "sampled" else name or ""


def decodings_of(report: Report, row: Row) -> str:
    """a's decoding, and b's where it is another one."""
    a, b = row["decoding"], row.get("b_decoding")
    return decoding_name(report, a) + (f", b {decoding_name(report, b)}" if b not in (None, a) else "")


# --- who wins ---------------------------------------------------------------------------------------------------------


def win_tables(report: Report) -> list[Table]:
    """All in one if they are few; else those against the candidate that the headline's is compared with, and the other pairs."""
    rows, caption = report.win_rates, "Win rates, with 95 % intervals"
    if len(rows) <= MANY or report.headline is None:
        return _some(_wins(report, caption, rows))
    other = report.headline[1]
    near = [row for row in rows if other in (row["a"], row["b"])]
    far = [row for row in rows if other not in (row["a"], row["b"])]
    return _some(_wins(report, f"Win rates of pairs with {other}, with 95 % intervals", near), _wins(report, "The other pairs", far, True))


def _wins(report: Report, caption: str, rows: list[Row], folded: bool = False) -> Table | None:
    header = [
        "a", "against b", "decoding", "judge", "win rate of a", "length-controlled", "reward, a less b", "p of a draw", "prompts needed",
    ]  # fmt: skip
    texts = [
        [
            row["a"], row["b"], decodings_of(report, row), row["judge"], bracket(row, "rate"), bracket(row, "length_controlled"),
            bracket(row, "gain", sign="+"), number(row.get("p_of_a_draw"), 4), _needed(row),
        ]
        for row in rows
    ]  # fmt: skip
    return _table(caption, header, texts, words=4, folded=folded)


def _needed(row: Row) -> str:
    """Only where there are fewer."""
    needed = row.get("prompts_needed")
    return f"{needed:,}" if needed and needed > row["prompts"] else UNKNOWN


def candidate_table(report: Report) -> Table | None:
    header = ["candidate", "what", "mean reward", f"KL to {report.reference}" if report.reference else "KL"]
    rows = [
        [
            row["name"], what(row), bracket(row, "mean_reward"), _kl(row),
            *(number(row.get(name), 2) for name in ("perplexity", "length", "ended")),
        ]
        for row in report.candidates
    ]  # fmt: skip
    leading = f"Mean reward by {report.judges[0]['name']}; " if report.judges else ""
    return _table(f"{leading}sampled answers", [*header, "perplexity", "length", "ended"], rows, words=2)


def what(row: Row) -> str:
    """In words, what kind of candidate it is; empty where the name says it."""
    if row.get("kind") == "best-of-n":
        return f"best of {row.get('n') or 'n'}{' of ' + row['of'] if row.get('of') else ''} by the reward model"
    return KINDS.get(row.get("kind") or "", STAGES.get(row.get("stage") or "", ""))


def _kl(row: Row) -> str:
    if row.get("kl") is None and row.get("analytic_kl") is not None:
        return f"≤ {number(row['analytic_kl'], 2)}" + (f" to {row['of']}" if row.get("of") else "")
    error = row.get("kl_standard_error")
    return number(row.get("kl"), 2) + (f" ± {number(error, 2)}" if error else "")


def strength_tables(report: Report) -> list[Table]:
    rows = [
        [row["candidate"], decoding_name(report, row.get("decoding")), row["judge"], bracket(row, "strength", 2, sign="+")]
        for row in report.strengths or ()
    ]
    header = ["candidate", "decoding", "judge", "strength, log-odds"]
    return _some(_table("Bradley-Terry strengths over all candidates, strongest first", header, rows, words=3))


def text_table(report: Report) -> Table | None:
    header = ["candidate", "decoding", *(f"mean reward by {judge['name']}" for judge in report.judges)]
    rows = []
    for text in report.texts:
        key = {"candidate": text["candidate"], "decoding": text["decoding"]}
        rewards = [bracket(find(report.rewards, judge=judge["name"], **key), "mean_reward") for judge in report.judges]
        shape = [number(text.get("length"), 1), *(number(text.get(name), 3) for name in ("ended", "distinct_2", "repeated_trigrams"))]
        rows.append([text["candidate"], decoding_name(report, text["decoding"]), *rewards, *shape])
    return _table("Every decoding", [*header, "length", "ended", "distinct-2", "repeated trigrams"], rows, words=2)


# --- the judges -------------------------------------------------------------------------------------------------------


def judge_tables(report: Report) -> list[Table]:
    header = [
        "judge", "kind", "trained these candidates", "accuracy on held-out pairs", "of preferring the longer answer", "position bias",
        "same in both orders", "missing verdicts",
    ]  # fmt: skip
    rows = [
        [
            row["name"], row.get("kind") or "", ", ".join(row.get("trained") or ()) or "none", bracket(row, "accuracy"),
            number(row.get("longer_wins"), 3), bracket(row, "position_bias", sign="+"), number(row.get("same_in_both_orders"), 3),
            plain(row.get("missing")),
        ]
        for row in report.judges
    ]  # fmt: skip
    ratings = [
        [row["candidate"], decoding_name(report, row.get("decoding")), row["judge"], row["scale"].replace("_", ", with "),
         bracket(row, "rating", 2), plain(row.get("missing"))]
        for row in report.ratings
    ]  # fmt: skip
    rated = ["candidate", "decoding", "judge", "scale", "rating", "missing"]
    return _some(_table("The judges, and how often they agree with people", header, rows, 3), _table("Ratings", rated, ratings, 4))


# --- what it cost -----------------------------------------------------------------------------------------------------


def side_effect_tables(report: Report) -> list[Table]:
    """InstructGPT's table first, then one for each set of prompts, then one by use case; long ones are folded."""
    known = [row for row in report.side_effects if row.get("value") is not None]
    overall, cases = [row for row in known if not row.get("category")], [row for row in known if row.get("category")]
    sets = [
        _measures(report, f"On {name}", [row for row in overall if row["set"] == name])
        for name in dict.fromkeys(row["set"] for row in overall)
    ]
    long = sum(len(table.rows) for table in sets) > MANY
    by_case = _measures(report, "By use case", cases)
    return _some(_instructgpt(report, overall), *(replace(table, folded=long) for table in sets), by_case and replace(by_case, folded=True))


def _instructgpt(report: Report, rows: list[Row]) -> Table | None:
    """In the shape of table 1 and figure 4 of the InstructGPT paper (Ouyang et al. 2022): a row for each measure."""
    names, texts = [row["name"] for row in report.candidates], []
    for measures in INSTRUCTGPT:
        found = next((own for measure in measures if (own := [row for row in rows if row["measure"] == measure])), [])
        found.sort(key=lambda row: (row["set"] != SETS.get(row["measure"]), row.get("decoding") == "greedy"))
        if found:
            first = found[0]
            same = [row for row in found if (row["set"], row.get("decoding")) == (first["set"], first.get("decoding"))]
            label = f"{measure_name(first['measure'])}{_direction(first)}"
            texts.append([label, first["set"], *(_measured(find(same, candidate=name)) for name in names)])
    return _table("As InstructGPT was reported", ["measure", "prompts", *names], texts, words=2) if len(texts) > 1 else None


def _measures(report: Report, caption: str, rows: list[Row]) -> Table | None:
    """A row for each measure and decoding, a column for each candidate."""
    names = [row["name"] for row in report.candidates]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row.get("category"), row["measure"], row.get("decoding")), []).append(row)
    single, by_case = len({decoding for *_, decoding in groups}) == 1, any(category for _, category, *_ in groups)
    texts = []
    for (prompts, category, measure, decoding), found in groups.items():
        unit = f", {found[0]['unit']}" if found[0].get("unit") else ""
        cells = [_measured(find(found, candidate=name)) for name in names]
        count = plain(max((row["n"] for row in found if row.get("n")), default=None))
        way = "" if single else decoding_name(report, decoding)
        label = f"{measure_name(measure)}{unit}{_direction(found[0])}"
        texts.append([label, prompts if by_case else "", category or "", way, *cells, count])
    header = ["measure", "prompts", "use case", "decoding", *names, "n"]
    return _table(f"{caption}: ↓ lower is better, ↑ higher", header, texts, words=4)


def _direction(row: Row) -> str:
    return {"higher": " ↑", "lower": " ↓"}.get(row.get("better") or "", "")


def _measured(row: Row | None) -> str:
    if row is None or row.get("value") is None:
        return UNKNOWN
    found = ends(row, "value")
    value = row["value"]
    return plain(value) + (f" [{plain(found[0], value)}, {plain(found[1], value)}]" if found else "")


def benchmark_tables(report: Report) -> list[Table]:
    names = [row["name"] for row in report.candidates]
    texts = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in report.benchmarks):
        found = [row for row in report.benchmarks if (row["task"], row["metric"]) == (task, metric)]
        cells = [_benchmarked(find(found, candidate=name)) for name in names]
        texts.append([task, metric, *cells, plain(found[0].get("n")), found[0].get("how") or ""])
    return _some(_table("Benchmarks, ± one standard error", ["task", "metric", *names, "n", "how"], texts, words=2))


def _benchmarked(row: Row | None) -> str:
    if row is None:
        return UNKNOWN
    error = row.get("standard_error")
    return number(row.get("value"), 3) + (f" ± {number(error, 3)}" if error else "")


def cost_tables(report: Report) -> list[Table]:
    rows = [
        [row["candidate"], row.get("stage") or "", plain(row.get("seconds")), plain(row.get("peak_rss_mb")), plain(row.get("tokens"))]
        for row in report.costs
    ]
    return _some(_table("What it took to make", ["candidate", "stage", "seconds", "peak memory, MB", "tokens"], rows, words=2))


# --- training ---------------------------------------------------------------------------------------------------------


def distances(report: Report) -> list[tuple[Row, float]]:
    """Candidates with their KL to the reference in nats: measured, or the analytic bound of its best-of-n."""
    known = ((row, row.get("kl"), row.get("analytic_kl")) for row in report.candidates)
    own = ((row, bound if kl is None and row.get("of", report.reference) == report.reference else kl) for row, kl, bound in known)
    return [(row, kl) for row, kl in own if kl is not None]


def gain_over_reference(report: Report, candidate: str, judge: str) -> Row | None:
    """The win rate row of sampled answers against the reference's, with its gain; None where it was not compared so."""
    keys = {"a": candidate, "b": report.reference, "judge": judge, "decoding": "sampled"}
    return next((row for row in report.win_rates if row.get("b_decoding") in (None, "sampled") and row.get("gain") is not None
                 and all(row[name] == value for name, value in keys.items())), None)  # fmt: skip


def distance_tables(report: Report) -> list[Table]:
    rows = [
        [
            row["name"],
            _kl(row),
            *(bracket(gain_over_reference(report, row["name"], judge["name"]), "gain", sign="+") for judge in report.judges),
        ]
        for row, _ in sorted(distances(report), key=lambda found: found[1])
        if row["name"] != report.reference
    ]
    header = ["candidate", f"KL to {report.reference}, nats", *(f"gain in reward by {judge['name']}" for judge in report.judges)]
    return _some(_table(f"Reward over that of {report.reference}, against the distance from it", header, rows))


def training_table(row: Row) -> Table | None:
    rows = [[SHOWN[name], number(curve[0], 3), number(curve[-1], 3), sparkline(curve)] for name, curve in row["curves"].items()]
    return _table(f"{row['candidate']} over {row['cycles']} rollouts", ["", "first", "last", "course"], rows)


def provenance_table(report: Report) -> Table | None:
    rows = [["base", report.base["id"], report.base["fingerprint"]]]
    rows += [["candidate", row["name"], row["adapter"]] for row in report.candidates if row.get("adapter")]
    rows += [["judge", row["name"], row.get("adapter") or ""] for row in report.judges]
    return _table("Base, candidates and judges", ["what", "name", "sha256"], rows, words=3)
