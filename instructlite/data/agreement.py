"""How far labellers agree on the same pair: by annotator, and by group if a column names one.

InstructGPT's labellers agreed with each other in 73 % of pairs (Ouyang et al. 2022). Krippendorff's alpha takes chance out of that:
1 is full agreement, 0 what coins would give.
"""

import importlib.util

import numpy as np


def agreement(pairs: np.ndarray, votes: np.ndarray, raters: np.ndarray, names: list[str]) -> list[dict]:
    """For each rater: rows, rows on a pair that others judged too, and the share of these others who voted the same way.

    pairs: key of each vote's pair. votes: 0 or 1. raters: index into names.
    """
    _, unit = np.unique(pairs, return_inverse=True)
    units = unit.max(initial=-1) + 1
    total = np.stack([np.bincount(unit, votes == side, units) for side in (0, 1)], axis=1)
    found = []
    for number, name in enumerate(names):
        mine = np.flatnonzero(raters == number)
        own = np.stack([np.bincount(unit[mine], votes[mine] == side, units) for side in (0, 1)], axis=1)[unit[mine]]
        others = total[unit[mine]] - own
        asked = others.sum(axis=1)
        same = others[np.arange(len(mine)), votes[mine]]
        shared = asked > 0
        rate = float((same[shared] / asked[shared]).mean()) if shared.any() else None
        found.append({"name": name, "rows": len(mine), "shared": int(shared.sum()), "agreement": rate})
    return sorted(found, key=lambda row: -row["rows"])


def alpha(pairs: np.ndarray, votes: np.ndarray) -> float | None:
    """Krippendorff's alpha over the pairs that have two votes or more. None: there are none, all votes go one way (alpha is not defined
    then), or krippendorff is not installed."""
    _, unit = np.unique(pairs, return_inverse=True)
    units = unit.max(initial=-1) + 1
    counts = np.stack([np.bincount(unit, votes == side, units) for side in (0, 1)], axis=1)
    counts = counts[counts.sum(axis=1) > 1].astype(int)
    if not len(counts) or (counts.sum(axis=0) == 0).any() or not importlib.util.find_spec("krippendorff"):
        return None
    import krippendorff

    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))
