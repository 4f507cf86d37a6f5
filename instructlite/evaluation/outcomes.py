"""From who won which comparison to numbers: win rates with intervals, strengths of all candidates, agreement of judges.

An outcome is 1 where the first answer won, 0 where the second did, 0.5 for a tie, and NaN where no verdict came: left out, no loss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import statistics

MARGIN = 0.05
"""How far an interval may reach to either side before the report says how many prompts it would take."""


MOST_PAIRS = 25
"""Of a prompt, that length is controlled on: each resample is a fit, and pairs of the same answers add little."""


@dataclass(frozen=True)
class Contest:
    """Answers of two candidates to the same prompts. Each array is (prompts, pairs): outcomes for a, and by how many characters a's
    answer is the longer one."""

    a: str
    b: str
    outcomes: np.ndarray
    longer: np.ndarray
    prompts: tuple[int, ...]
    """Numbers of the prompts."""


def rate(outcomes: np.ndarray, longer: np.ndarray, *, margin: float = MARGIN, seed: int = 0) -> dict[str, Any]:
    """How often a won: plain and length-controlled rate with intervals over prompts, p of a draw, and warnings.

    margin: to either side; `prompts_needed` says how many prompts an interval of it takes. All None where no verdict came.
    """
    if np.isnan(outcomes).all():
        names = ("rate", "low", "high", "length_controlled", "length_controlled_low", "length_controlled_high", "p_of_a_draw")
        return {**dict.fromkeys(names), "prompts": 0, "prompts_needed": None, "warnings": ["no pair has a verdict"]}
    plain = statistics.preference_rate(outcomes, seed=seed)
    whole = outcomes.shape[1] <= MOST_PAIRS or np.isnan(outcomes).any()
    some = slice(None) if whole else np.linspace(0, outcomes.shape[1] - 1, MOST_PAIRS).astype(int)
    controlled = statistics.length_controlled_rate(outcomes[:, some], longer[:, some], seed=seed)
    needed = statistics.prompts_needed(outcomes, margin)
    warnings = []
    if plain.side_of(0.5) and controlled.side_of(0.5) != plain.side_of(0.5):
        warnings.append(
            f"length: {plain.value:.2f} are won, but {controlled.value:.2f} would be by answers of equal length, which is not clear of a "
            "draw: length may be all that was preferred"
        )
    return {
        "rate": plain.value, "low": plain.low, "high": plain.high,
        "length_controlled": controlled.value, "length_controlled_low": controlled.low, "length_controlled_high": controlled.high,
        "prompts": int((~np.isnan(outcomes)).any(1).sum()),
        "p_of_a_draw": statistics.paired_test(outcomes, np.where(np.isnan(outcomes), np.nan, 0.5), seed=seed),
        "prompts_needed": needed, "warnings": warnings + too_wide(plain, needed, margin),
    }  # fmt: skip


def too_wide(found: statistics.Interval, needed: int, margin: float = MARGIN) -> list[str]:
    """What to say of a win rate that decides nothing because there are too few prompts."""
    if found.low is None:
        return [f"one prompt gives no interval; about {needed} would give one of {margin:g} to either side"]
    if found.side_of(0.5) or max(found.high - found.value, found.value - found.low) <= margin:
        return []
    return [
        f"the interval {found.low:.2f} to {found.high:.2f} holds 0.5 and is wide: about {needed} prompts would bring it to {margin:g} to "
        "either side"
    ]


def strengths(contests: Sequence[Contest], *, seed: int = 0) -> list[dict[str, Any]]:
    """Bradley & Terry's log-odds of all candidates, the strongest first; empty where the verdicts that came do not connect them."""
    names = list(dict.fromkeys(name for contest in contests for name in (contest.a, contest.b)))
    if not names:
        return []
    parts = [(names.index(c.a), names.index(c.b), np.repeat(c.prompts, c.outcomes.shape[1]), c.outcomes.ravel()) for c in contests]
    first, second = (np.concatenate([np.full(len(part[3]), part[side]) for part in parts]) for side in (0, 1))
    prompts, won = (np.concatenate([part[place] for part in parts]) for place in (2, 3))
    try:
        found = statistics.bradley_terry(first, second, won, prompts, len(names), seed=seed)
    except ValueError:
        return []
    rows = [{"candidate": name, "strength": s.value, "low": s.low, "high": s.high} for name, s in zip(names, found, strict=True)]
    return sorted(rows, key=lambda row: -row["strength"])


def agreement(judges: Sequence[str], outcomes: Sequence[np.ndarray], prompts: np.ndarray, *, seed: int = 0) -> dict[str, Any] | None:
    """Krippendorff's alpha between judges over the comparisons that they all were shown (one array each), prompts resampled.

    None for fewer than two judges, where there is nothing to disagree about, and without the package.
    """
    if len(judges) < 2 or not importlib.util.find_spec("krippendorff"):
        return None
    alpha = statistics.agreement(np.stack(outcomes), clusters=prompts, seed=seed)
    return alpha and {"judges": list(judges), "alpha": alpha.value, "alpha_low": alpha.low, "alpha_high": alpha.high}
