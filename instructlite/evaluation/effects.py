"""Which differences between the headline's two candidates are clear of chance: the verdict and the advice say no more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .formatting import Row, ends, find, plain, side
from .how import measure_name

if TYPE_CHECKING:
    from .report import Report


@dataclass(frozen=True)
class Effect:
    """A measure on which a is clearly better or worse than b."""

    name: str
    a: str
    b: str
    better: bool


def effects(report: Report) -> list[Effect]:
    """Side effects and benchmarks of the headline's pair that are clear of chance (see HOW), the worse ones first."""
    if report.headline is None:
        return []
    found = [*_clear(report.side_effects, report.headline, _apart), *_clear(report.benchmarks, report.headline, _beyond_two_errors)]
    return sorted(found, key=lambda effect: effect.better)


def _clear(rows: list[Row], headline: list[str], compare: Callable[[Row, Row], int]) -> Iterable[Effect]:
    a_name, b_name = headline
    keys = ("set", "category", "measure", "decoding", "task", "metric")
    for a in rows:
        if a["candidate"] != a_name or a.get("category"):
            continue
        b = find(rows, candidate=b_name, **{key: a.get(key) for key in keys})
        if b is not None and (direction := compare(a, b)):
            place = f" on {a['set']}" if "set" in a else f" ({a['metric']})"
            greedy = ", greedy" if a.get("decoding") == "greedy" else ""
            label = measure_name(a["measure"]) if "measure" in a else a["task"]
            yield Effect(f"{label}{place}{greedy}", plain(a["value"], b["value"]), plain(b["value"]), direction > 0)


def _apart(a: Row, b: Row) -> int:
    """1 where a is better, -1 worse, and the intervals do not touch."""
    sign = {"higher": 1, "lower": -1}.get(a.get("better") or "", 0)
    ours, theirs = ends(a, "value"), ends(b, "value")
    return 0 if not (ours and theirs) else sign * ((ours[0] > theirs[1]) - (ours[1] < theirs[0]))


def _beyond_two_errors(a: Row, b: Row) -> int:
    errors = (a.get("standard_error"), b.get("standard_error"))
    if None in (*errors, a.get("value"), b.get("value")):
        return 0
    limit, difference = 2 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5, a["value"] - b["value"]
    higher = 1 if (a.get("better") or "higher") == "higher" else -1
    return higher * ((difference > limit) - (difference < -limit))


def sides_by_judge(report: Report) -> dict[str, int | None]:
    """Where the headline's win rate on sampled answers lies, by judge."""
    rows = ((judge["name"], report.headline_row("sampled", judge["name"])) for judge in report.judges)
    return {name: side(row) for name, row in rows if row is not None}
