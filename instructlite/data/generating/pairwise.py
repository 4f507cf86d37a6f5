"""Which of two answers a model prefers, asked in both orders: for AI preferences and for the judges of evaluation.

A model that judges leans to one of the places. So an answer wins only where it is preferred from both places; all else is a tie,
and how often the place alone decided is measured and reported (Zheng et al. 2023).
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

from .completer import Answer, Completions, Messages, Request
from .templates import Prompts, transcript

_BRACKETS = re.compile(r"\[\[\s*([^\[\]]{1,12}?)\s*\]\]")
_BARE = re.compile(r"\W*(?:(?:final )?verdict|answer|rating|score)?\W*([A-C]|tie|\d+)\W*", re.IGNORECASE)
_PREFERENCES = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. reference: what a person answered, for judging by it."""

    prompt: Messages
    a: str
    b: str
    reference: str | None = None


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of pairs, in both orders: 1 for the answer in the first place, 0 for the second, 0.5 a tie, None missing.

    same: pairs of one text twice, which are ties without asking.
    """

    first_order: list[float | None]
    """a in the first place."""
    second_order: list[float | None]
    """b in the first place."""
    same: list[bool]
    created: list[str]
    """When the later of the two verdicts came."""

    @property
    def outcomes(self) -> list[float | None]:
        """For `a`: 1 preferred from both places, 0 the other was, 0.5 neither; None where a verdict is missing."""
        return [
            None if x is None or y is None else 1.0 if (x, y) == (1, 0) else 0.0 if (x, y) == (0, 1) else 0.5
            for x, y in zip(self.first_order, self.second_order, strict=True)
        ]

    def part(self, rows: Iterable[int]) -> "Verdicts":
        """Those on some of the pairs."""
        numbers = list(rows)
        return Verdicts(*([getattr(self, part.name)[i] for i in numbers] for part in fields(self)))

    @classmethod
    def together(cls, parts: Iterable["Verdicts"]) -> "Verdicts":
        listed = list(parts)
        return cls(*([value for part in listed for value in getattr(part, column.name)] for column in fields(cls)))

    def measured(self) -> dict[str, Any]:
        """Counts over the pairs that were judged in both orders.

        always_first, always_second: the place won in both orders, so it decided, not the answer. position_bias: their
        difference as a share of the pairs, 0 for a fair judge, 1 for one that always takes the first place.
        """
        both = [
            (x, y) for x, y, same in zip(self.first_order, self.second_order, self.same, strict=True) if None not in (x, y) and not same
        ]
        first, second = both.count((1, 1)), both.count((0, 0))
        consistent = sum(x == 1 - y for x, y in both)
        return {
            "pairs": len(self.same),
            "missing": sum(outcome is None for outcome in self.outcomes),
            "same_text": sum(self.same),
            "judged": len(both),
            "ties": sum(outcome == 0.5 for outcome in self.outcomes) - sum(self.same),
            "consistent": consistent / len(both) if both else None,
            "always_first": first,
            "always_second": second,
            "position_bias": (first - second) / len(both) if both else None,
        }

    def warnings(self) -> list[str]:
        found = self.measured()
        first, second = found["always_first"], found["always_second"]
        said = []
        if sign_test(first, second) < 0.05:
            place, count = ("first", first) if first > second else ("second", second)
            said.append(
                f"position bias: in {count} of {found['judged']} pairs the judge took whichever answer stood {place} (the other place "
                f"in {min(first, second)}); such pairs count as ties, so its verdicts say little: use another judge or prompt"
            )
        if found["pairs"] and found["missing"] > 0.1 * found["pairs"]:
            said.append(f"{found['missing']} of {found['pairs']} pairs have no verdict and are left out: the rest may not be typical")
        return said


def sign_test(a: int, b: int) -> float:
    """Two-sided p of a split as uneven as a : b if both were equally likely; exact up to 1,000."""
    n, low = a + b, min(a, b)
    if n > 1000:
        return min(1.0, 2 * NormalDist(n / 2, n**0.5 / 2).cdf(low + 0.5))
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n)


def verdict_in(text: str | None) -> str | None:
    """What stands in double brackets, or alone; None where it is nothing, or several different things."""
    said = {found.upper() for found in _BRACKETS.findall(text or "")}
    if not said and (alone := _BARE.fullmatch(text or "")):
        said = {alone[1].upper()}
    return said.pop() if len(said) == 1 else None


def compare(
    completions: Completions, prompts: Prompts, pairs: Sequence[Pair], *, max_tokens: int = 512, label: str = "judging pairs"
) -> Verdicts:
    """Ask for every pair twice, once in each order, at temperature 0."""
    same = [pair.a.split() == pair.b.split() for pair in pairs]
    asked = [pair for pair, alike in zip(pairs, same, strict=True) if not alike]
    orders = ([(pair, pair.a, pair.b) for pair in asked], [(pair, pair.b, pair.a) for pair in asked])
    requests = [Request(_question(prompts, *order), 0.0, max_tokens) for order in itertools.chain(*orders)]
    answers = completions.ask(requests, label)
    both = zip(answers[: len(asked)], answers[len(asked) :], strict=True)
    found = [("", 0.5, 0.5) if alike else _read(*next(both)) for alike in same]
    created, first, second = map(list, zip(*found, strict=True)) if found else ([], [], [])
    return Verdicts(first, second, same, created)


def _read(first: Answer, second: Answer) -> tuple[str, float | None, float | None]:
    verdicts = (_PREFERENCES.get(verdict_in(answer.text) or "") for answer in (first, second))
    return max(first.created, second.created), *verdicts


def _question(prompts: Prompts, pair: Pair, first: str, second: str) -> Messages:
    values = {"conversation": transcript(pair.prompt), "a": first, "b": second}
    if pair.reference is None:
        return prompts.message("pairwise", **values)
    return prompts.message("pairwise_reference", reference=pair.reference, **values)
