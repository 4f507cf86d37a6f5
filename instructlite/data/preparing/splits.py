"""Which part of the data a prompt cluster goes to, so that nothing of a prompt, nor of one like it, is in two parts.

Clusters with preferences are parted into held-out, judge, ppo and reward; clusters without them into held-out and train. The prompts
that PPO gets are those of ppo and train; so the reward model, its judge and PPO share no prompt, and none of them has a held-out one.
"""

from collections.abc import Mapping

import numpy as np

PARTS = ("train", "heldout", "judge", "ppo", "reward")


def assign_parts(
    clusters: np.ndarray, prompts: np.ndarray, preference: np.ndarray, kept: np.ndarray, shares: Mapping[str, float], seed: int
) -> np.ndarray:
    """The part of each row, as an index into PARTS.

    clusters, prompts: cluster and prompt key of each row. preference: rows that are comparisons or rankings. shares: of the rows, for
    heldout, judge and ppo. Which cluster goes where depends on its prompts and the seed, not on the order of the rows.
    """
    order_keys = mixed(prompts, seed)
    part = np.zeros(len(clusters), np.uint8)
    rows = np.flatnonzero(kept)
    if not len(rows):
        return part
    names, member = np.unique(clusters[rows], return_inverse=True)
    lowest = np.full(len(names), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, member, order_keys[rows])
    preferring = np.bincount(member, preference[rows]) > 0
    of_cluster = np.zeros(len(names), np.uint8)
    for chosen, wanted, rest in ((preferring, ("heldout", "judge", "ppo"), "reward"), (~preferring, ("heldout",), "train")):
        weights = np.bincount(member, preference[rows] if rest == "reward" else None, len(names))
        ranked = np.flatnonzero(chosen)
        ranked = ranked[np.argsort(lowest[ranked], kind="stable")]
        of_cluster[ranked] = PARTS.index(rest)
        total = weights[ranked].sum()
        for name in wanted:
            taken = _take(weights[ranked], round(shares.get(name, 0) * total))
            of_cluster[ranked[taken]] = PARTS.index(name)
            ranked = np.delete(ranked, taken)
    part[rows] = of_cluster[member]
    return part


def _take(weights: np.ndarray, wanted: int) -> list[int]:
    """Clusters, in order, until as many rows are taken as wanted. One too large for what is still wanted is passed over."""
    taken: list[int] = []
    for index, weight in enumerate(weights.tolist()):
        if wanted <= 0:
            break
        if weight <= wanted:
            taken.append(index)
            wanted -= weight
    return taken


def mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """The keys in an order that the seed decides (splitmix64)."""
    mixed = keys ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
