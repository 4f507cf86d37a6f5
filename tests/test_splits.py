"""The split by prompt cluster, and the agreement of labellers."""

import numpy as np
import pytest

from instructlite.data.agreement import agreement, alpha
from instructlite.data.preparing.splits import PARTS, assign_parts

SHARES = {"heldout": 0.1, "judge": 0.2, "ppo": 0.3}


def parts_of(clusters: np.ndarray, preference: np.ndarray, seed: int = 0, prompts: np.ndarray | None = None) -> np.ndarray:
    prompts = (clusters * 7919 + 1).astype(np.uint64) if prompts is None else prompts
    return assign_parts(clusters, prompts, preference, np.ones(len(clusters), bool), SHARES, seed)


def test_no_cluster_is_in_two_parts_and_the_shares_are_met():
    rng = np.random.default_rng(0)
    clusters, preference = rng.integers(0, 800, 4000), rng.random(4000) < 0.5
    part = parts_of(clusters, preference)
    assert all(len(set(part[clusters == cluster])) == 1 for cluster in set(clusters))
    for name, share in SHARES.items():
        rows = (part == PARTS.index(name)) & preference
        assert rows.sum() / preference.sum() == pytest.approx(share, abs=0.01)


def test_rows_without_preferences_are_trained_on_or_held_out():
    part = parts_of(np.arange(1000), np.zeros(1000, bool))
    assert {PARTS[number]: int((part == number).sum()) for number in set(part.tolist())} == {"train": 900, "heldout": 100}


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does():
    clusters = np.arange(500)
    prompts = np.random.default_rng(1).integers(0, 2**62, 500).astype(np.uint64)
    part = parts_of(clusters, np.ones(500, bool), prompts=prompts)
    turned = parts_of(clusters, np.ones(500, bool), prompts=prompts[::-1].copy())
    assert (part == turned[::-1]).all()
    assert (part != parts_of(clusters, np.ones(500, bool), seed=1, prompts=prompts)).any()


def test_a_cluster_too_large_for_a_part_is_passed_over():
    clusters = np.array([0] * 80 + list(range(1, 21)))
    for seed in range(20):  # in some of them the large one comes first
        part = parts_of(clusters, np.zeros(100, bool), seed)
        assert (part == PARTS.index("heldout")).sum() == 10
        assert PARTS[part[0]] == "train"


def test_agreement_is_with_the_others_on_the_same_pair():
    pairs, votes, raters = np.array([1, 1, 1, 2, 2, 3]), np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 2, 0, 1, 0])
    told = {row["name"]: row for row in agreement(pairs, votes, raters, ["ann", "bob", "cy"])}
    assert told["ann"] == {"name": "ann", "rows": 3, "shared": 2, "agreement": pytest.approx(0.75)}
    assert told["cy"]["agreement"] == 0
    alone = agreement(np.array([1]), np.array([0]), np.array([0]), ["ann"])
    assert alone[0]["agreement"] is None


def test_alpha_is_krippendorffs():
    krippendorff = pytest.importorskip("krippendorff")
    data = np.array([[0, 1, 1, 0, np.nan, 1], [0, 1, 0, 0, 1, np.nan], [1, 1, 0, 0, 1, np.nan]])
    unit, vote = zip(*[(u, int(v)) for row in data for u, v in enumerate(row) if not np.isnan(v)], strict=True)
    assert alpha(np.array(unit), np.array(vote)) == pytest.approx(krippendorff.alpha(data, level_of_measurement="nominal"))
    assert alpha(np.array([1, 2]), np.array([0, 1])) is None
