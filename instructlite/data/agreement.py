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


def alpha(units: np.ndarray, values: np.ndarray, level: str = "nominal") -> float | None:
    """Krippendorff's alpha over the units that have two values or more. None: there are none, their values are all alike (alpha is not
    defined then), or krippendorff is not installed.

    units: key of what each value was given to. level: nominal for votes, interval for scores.
    """
    _, unit = np.unique(units, return_inverse=True)
    domain, place = np.unique(values, return_inverse=True)
    shape = (unit.max(initial=-1) + 1, len(domain))
    counts = np.bincount(unit * len(domain) + place, minlength=shape[0] * shape[1]).reshape(shape)
    counts = counts[counts.sum(axis=1) > 1]
    if (counts.sum(axis=0) > 0).sum() < 2 or not importlib.util.find_spec("krippendorff"):
        return None
    import krippendorff

    return float(krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement=level))
