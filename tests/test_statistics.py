"""Intervals hold the truth as often as they say, also where answers to one prompt are alike."""

import numpy as np
import pytest
from scipy.stats import norm

from instructlite.evaluation.statistics import Interval, mean, proportion, share_of_gain, standard_error, win_rate

PROMPTS, ANSWERS, TRIALS = 40, 4, 300


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_intervals_of_a_mean_cover_the_truth_when_answers_to_one_prompt_are_alike():
    draw = np.random.default_rng(0)
    runs = [draw.normal(size=(PROMPTS, 1)) + 0.5 * draw.normal(size=(PROMPTS, ANSWERS)) for _ in range(TRIALS)]
    assert 0.91 <= coverage([mean(run) for run in runs], 0) <= 0.975
    # The mistake this guards against: counting each answer as a prompt of its own makes intervals half as wide as they are.
    assert coverage([mean(run.reshape(-1, 1)) for run in runs], 0) < 0.8


def test_intervals_of_a_win_rate_cover_the_truth():
    draw = np.random.default_rng(1)
    better, between, within = 0.6, 0.7, 1.0  # a's mean advantage, its spread over prompts, the spread of one answer's score
    truth = norm.cdf(better / np.sqrt(between**2 + 2 * within**2))
    intervals = []
    for _ in range(TRIALS):
        a, b = draw.normal(size=(PROMPTS, 1)) + within * draw.normal(size=(2, PROMPTS, 2))  # a prompt's own level cancels
        intervals.append(win_rate(a + better + between * draw.normal(size=(PROMPTS, 1)), b))
    assert 0.91 <= coverage(intervals, truth) <= 0.975


def test_a_win_rate_counts_all_cross_pairs_and_half_of_the_ties():
    a, b = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    # prompt 1: 2>1, 2>0, 0<1, 0=0 -> 2.5 of 4; prompt 2: 1=1, 1>0, twice -> 3 of 4
    assert win_rate(a, b).value == pytest.approx((2.5 / 4 + 3 / 4) / 2)


def test_numbers_of_answers_may_differ():
    assert win_rate(np.array([[2.0, 0.0, 2.0], [0, 0, 0]]), np.array([[1.0], [1.0]])).value == pytest.approx(1 / 3)


def test_a_against_b_mirrors_b_against_a():
    draw = np.random.default_rng(2)
    a, b = draw.normal(size=(2, 30, 3))
    there, back = win_rate(a, b), win_rate(b, a)
    assert (back.value, back.low, back.high) == pytest.approx((1 - there.value, 1 - there.high, 1 - there.low))


def test_the_same_seed_gives_the_same_interval_and_another_nearly_the_same():
    values = np.random.default_rng(3).normal(size=(50, 2))
    assert mean(values, seed=1) == mean(values, seed=1) != mean(values, seed=2)
    assert mean(values, seed=1).low == pytest.approx(mean(values, seed=2).low, abs=0.02)


def test_identical_scores_are_an_exact_draw():
    scores = np.random.default_rng(4).normal(size=(20, 1))
    assert win_rate(scores, scores) == Interval(0.5, 0.5, 0.5)


def test_winning_everything_is_not_certain_to_go_on():
    ones = np.ones((10, 2))
    assert win_rate(ones, ones - 1) == proportion(10, 10)
    assert win_rate(ones - 1, ones) == proportion(0, 10)
    assert win_rate(ones, ones - 1).low == pytest.approx(0.7225, abs=1e-4)


def test_wilson_intervals_are_the_published_ones():
    assert (proportion(5, 10).low, proportion(5, 10).high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    # Newcombe 1998, table I: 81 of 263
    assert (proportion(81, 263).low, proportion(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_one_prompt_gives_no_interval():
    assert mean(np.array([[1.0, 3.0]])) == Interval(2.0)
    assert mean(np.array([[1.0, 3.0]])).side_of(0) == 0
    assert standard_error(np.array([[1.0, 3.0]])) is None


def test_an_interval_says_on_which_side_it_lies():
    assert [Interval(0.6, 0.51, 0.7).side_of(0.5), Interval(0.6, 0.5, 0.7).side_of(0.5), Interval(0.4, 0.3, 0.49).side_of(0.5)] == [
        1,
        0,
        -1,
    ]


def test_the_share_of_a_gain_is_that_of_the_means_with_prompts_kept_together():
    draw = np.random.default_rng(5)
    start = draw.normal(size=(40, 2))
    end, part = start + 1.0, start + 0.75
    share = share_of_gain(start, part, end)
    # Prompt for prompt the share is 0.75; resampling the three apart would spread it.
    assert (share.value, share.low, share.high) == pytest.approx((0.75, 0.75, 0.75))


def test_the_standard_error_is_that_of_prompt_means():
    values = np.array([[0.0, 2.0], [3.0, 5.0], [1.0, 1.0]])
    assert standard_error(values) == pytest.approx(np.std([1, 4, 1], ddof=1) / np.sqrt(3))
