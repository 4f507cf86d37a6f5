"""Which item a voter is shown next: the one whose vote tells most, given what reward models think and who has voted.

Pure functions over rows; the same rows, voter and seed give the same choice.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Strategy = Literal["active", "disagreement", "margin", "votes"]


@dataclass(frozen=True)
class Waiting:
    """An item that a voter has not voted on."""

    item: int
    taken: int
    """Votes cast by others, and others who have it before them now."""
    gold: bool = False
    scores: tuple[tuple[float, ...], ...] = ()
    """Of each reward model a score for each answer: (judges, answers). Their differences are log-odds, as Bradley-Terry trains them."""


def choose(
    waiting: Sequence[Waiting],
    voter: str,
    *,
    strategy: Strategy = "active",
    overlap: int = 2,
    overlap_share: float = 0.2,
    gold_share: float = 0.05,
    seed: int = 0,
) -> int | None:
    """The next item of a voter; None: nothing is left for him.

    strategy: "disagreement" of the reward models' ensemble, "margin" near 0, least "votes", or "active", both of the first. A share
    of the items, drawn by chance, is voted on by `overlap` people, so that their agreement can be measured, the rest by one.
    gold_share: how often a voter gets an item whose answer is known, for as long as there are some; which ones, he cannot tell.
    """
    gold = [row for row in waiting if row.gold]
    if gold and _chance("gold", seed, voter, len(waiting)) < gold_share:
        return min(gold, key=lambda row: _chance("item", seed, voter, row.item)).item
    wanted = [row for row in waiting if not row.gold and row.taken < votes_wanted(row.item, overlap, overlap_share, seed)]
    if not wanted:
        return None
    return max(wanted, key=lambda row: (gain(row, strategy) / (1 + row.taken), _chance("item", seed, voter, row.item))).item


def votes_wanted(item: int, overlap: int, overlap_share: float, seed: int = 0) -> int:
    return overlap if _chance("overlap", seed, item) < overlap_share else 1


def gain(row: Waiting, strategy: Strategy = "active") -> float:
    """How much a vote on it tells, in nats, mean over its pairs; without any score as much as a coin."""
    if strategy == "votes" or not row.scores:
        return math.log(2)
    pairs = list(combinations(range(len(row.scores[0])), 2))
    return sum(_pair_gain([by[a] - by[b] for by in row.scores], strategy) for a, b in pairs) / len(pairs)


def _pair_gain(margins: list[float], strategy: Strategy) -> float:
    """Entropy of the ensemble's mean probability, largest where the margin is near 0; disagreement is that less the members' own
    entropy: what a vote can settle (BALD, Houlsby et al. 2011). "active" is the sum of both."""
    chances = [1 / (1 + math.exp(-max(-50.0, min(50.0, margin)))) for margin in margins]
    entropy = _entropy(sum(chances) / len(chances))
    disagreement = max(0.0, entropy - sum(map(_entropy, chances)) / len(chances))
    return {"margin": entropy, "disagreement": disagreement, "active": entropy + disagreement}[strategy]


def _entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _chance(*of: object) -> float:
    """A number from 0 to 1 that is drawn once and for all. A hash: seeding a generator for each of 10,000 items takes seconds."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=8).digest(), "big") / 2**64
