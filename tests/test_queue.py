"""The next item: what a vote on it tells, who has voted already, and nothing but the rows, the voter and the seed."""

import math
from collections import Counter

import pytest

from instructlite.feedback.queue import Waiting, choose, gain, votes_wanted

CLOSE, CLEAR = ((0.1, 0.0), (0.0, 0.1)), ((4.0, 0.0), (5.0, 0.0))
DIVIDED = ((3.0, 0.0), (0.0, 3.0))


def served(rows: list[Waiting], voter: str = "ann", **options) -> list[int]:
    """The items of a voter, one after the other."""
    found = []
    while (item := choose(rows, voter, **options)) is not None:
        found.append(item)
        rows = [row for row in rows if row.item != item]
    return found


def test_an_undecided_reward_model_and_a_divided_ensemble_ask_first():
    rows = [Waiting(1, 0, scores=CLEAR), Waiting(2, 0, scores=CLOSE), Waiting(3, 0, scores=DIVIDED)]
    assert served(rows, strategy="disagreement") == [3, 1, 2]
    assert served(rows, strategy="margin")[-1] == 1
    assert served(rows) == [3, 2, 1]


def test_gains_are_those_worked_out_by_hand():
    p = 1 / (1 + math.exp(-3))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    divided = Waiting(1, 0, scores=DIVIDED)
    assert gain(divided, "margin") == pytest.approx(math.log(2))
    assert gain(divided, "disagreement") == pytest.approx(math.log(2) - entropy)
    assert gain(divided) == pytest.approx(2 * math.log(2) - entropy)
    assert gain(Waiting(1, 0, scores=((3.0, 0.0),)), "disagreement") == 0
    assert gain(Waiting(1, 0)) == gain(divided, "votes") == math.log(2)
    assert gain(Waiting(1, 0, scores=((900.0, -900.0),))) == pytest.approx(0, abs=1e-12)


def test_of_k_answers_the_mean_over_pairs_counts():
    three = Waiting(1, 0, scores=((0.0, 0.0, 50.0),))
    assert gain(three, "margin") == pytest.approx(math.log(2) / 3)


def test_the_least_voted_comes_first_where_all_else_is_equal():
    taken = {item: item * 7 % 10 for item in range(10)}
    found = served([Waiting(item, votes) for item, votes in taken.items()], strategy="votes", overlap=10, overlap_share=1.0)
    assert [taken[item] for item in found] == list(range(10))


def test_nobody_is_asked_when_enough_have_voted():
    assert choose([Waiting(1, 1)], "ann", overlap=3, overlap_share=0.0) is None
    assert choose([Waiting(1, 3)], "ann", overlap=3, overlap_share=1.0) is None
    assert choose([Waiting(1, 2)], "ann", overlap=3, overlap_share=1.0) == 1
    assert choose([], "ann") is None


def test_a_share_of_the_items_is_voted_on_by_several():
    wanted = Counter(votes_wanted(item, overlap=3, overlap_share=0.2) for item in range(2000))
    assert set(wanted) == {1, 3}
    assert 0.17 < wanted[3] / 2000 < 0.23
    assert [votes_wanted(item, 3, 0.2, seed=1) for item in range(50)] != [votes_wanted(item, 3, 0.2, seed=2) for item in range(50)]


def test_gold_items_come_at_the_share_asked_for_and_only_as_such():
    rows = [Waiting(item, 0, gold=item >= 200) for item in range(300)]
    found = served(rows, gold_share=0.2)[:200]
    assert 0.14 < sum(item >= 200 for item in found) / 200 < 0.27
    assert all(item < 200 for item in served(rows, gold_share=0.0))
    assert choose([Waiting(1, 0, gold=True)], "ann", gold_share=0.0) is None


def test_the_same_rows_voter_and_seed_choose_the_same_and_others_differ():
    rows = [Waiting(item, 0) for item in range(50)]
    assert served(rows) == served(list(reversed(rows))) == served(rows, seed=0)
    assert served(rows) != served(rows, voter="bob")
    assert served(rows) != served(rows, seed=1)
