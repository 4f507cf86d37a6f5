"""How numbers, intervals and other people's text are written in a report, whatever it is written as."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
SHOWN_CHARACTERS = 1200  # of a prompt or an answer; answers.jsonl has the rest
CUT = " […]"
UNKNOWN = "–"


def printable(text: str) -> str:
    """Control characters (terminal escapes, reversed writing direction) become visible."""
    return "".join(c if c.isprintable() or c in "\n\t\u00a0" else "\ufffd" for c in text.replace("\r\n", "\n"))


def shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + CUT


def number(value: float | None, digits: int, sign: str = "") -> str:
    """sign: "+" writes that of numbers above 0, too."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def plain(value: float | None, like: float | None = None) -> str:
    """A number of any size, with the decimals that it, or `like`, needs to show three digits."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    size = abs(value if like is None else like)
    whole = isinstance(value, int) or size >= 1000
    places = 0 if whole else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 or not size else 4
    return f"{value:,.{places}f}"


def ends(row: Row, name: str) -> tuple[float, float] | None:
    """The interval of `name`; None where it has none. A win rate's and a strength's ends are plainly called low and high."""
    low, high = (row.get(f"{name}_{end}", row.get(end) if name in ("rate", "strength") else None) for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def between(row: Row, name: str, digits: int = 3, sign: str = "") -> str:
    """For a sentence."""
    found = ends(row, name)
    interval = f" (95 % interval {number(found[0], digits, sign)} to {number(found[1], digits, sign)})" if found else ""
    return number(row.get(name), digits, sign) + interval


def bracket(row: Row | None, name: str, digits: int = 3, sign: str = "") -> str:
    """For a table."""
    if row is None:
        return UNKNOWN
    found = ends(row, name)
    interval = f" [{number(found[0], digits, sign)}, {number(found[1], digits, sign)}]" if found else ""
    return number(row.get(name), digits, sign) + interval


def side(row: Row, name: str = "rate", middle: float = 0.5) -> int | None:
    """Where the interval lies: 1 above the middle, -1 below, 0 around it; None without an interval."""
    found = ends(row, name)
    return None if found is None else (found[0] > middle) - (found[1] < middle)


def find(rows: Iterable[Row] | None, **keys: Any) -> Row | None:
    """The first row with these values; what a row does not say counts as None."""
    return next((row for row in rows or () if all(row.get(name) == value for name, value in keys.items())), None)


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = list(words) or [""]
    return f"{', '.join(first)} and {last}" if first else last
