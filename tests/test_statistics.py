"""Intervals hold the truth as often as they say, also where answers to one prompt are alike."""

import numpy as np
import pytest
from scipy.stats import norm

from instructlite.evaluation import statistics
from instructlite.evaluation.statistics import (
    Interval,
    agreement,
    bradley_terry,
    length_controlled_rate,
    mean,
    paired_test,
    preference_rate,
    prompts_needed,
    proportion,
    share_of_gain,
    standard_error,
    win_rate,
)

PROMPTS, ANSWERS, TRIALS = 40, 4, 1000


@pytest.fixture
def quick(monkeypatch):
    """A thousand experiments with fewer resamples each: the ends get a little noisier, their mean does not move."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    monkeypatch.setattr(statistics, "LOGISTIC_RESAMPLES", 200)
    monkeypatch.setattr(statistics, "STRENGTH_RESAMPLES", 200)


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_intervals_of_a_mean_cover_the_truth_when_answers_to_one_prompt_are_alike(quick):
    draw = np.random.default_rng(0)
    runs = [draw.normal(size=(PROMPTS, 1)) + 0.5 * draw.normal(size=(PROMPTS, ANSWERS)) for _ in range(TRIALS)]
    assert 0.93 <= coverage([mean(run) for run in runs], 0) <= 0.97
    # The mistake this guards against: counting each answer as a prompt of its own makes intervals half as wide as they are.
    assert coverage([mean(run.reshape(-1, 1)) for run in runs[:200]], 0) < 0.8


def test_intervals_of_a_win_rate_cover_the_truth(quick):
    draw = np.random.default_rng(1)
    better, between, within = 0.6, 0.7, 1.0  # a's mean advantage, its spread over prompts, the spread of one answer's score
    truth = norm.cdf(better / np.sqrt(between**2 + 2 * within**2))
    intervals = []
    for _ in range(TRIALS):
        a, b = draw.normal(size=(PROMPTS, 1)) + within * draw.normal(size=(2, PROMPTS, 2))  # a prompt's own level cancels
        intervals.append(win_rate(a + better + between * draw.normal(size=(PROMPTS, 1)), b))
    assert 0.93 <= coverage(intervals, truth) <= 0.97


def test_intervals_of_verdicts_cover_the_truth_when_pairs_of_one_prompt_are_alike_and_some_are_missing(quick):
    draw = np.random.default_rng(6)
    intervals = []
    for _ in range(TRIALS):
        chance = draw.beta(1.8, 1.2, size=(PROMPTS, 1))  # a prompt's own, 0.6 on average
        outcomes = (draw.random((PROMPTS, 3)) < chance).astype(float)
        outcomes[draw.random((PROMPTS, 3)) < 0.2] = np.nan
        intervals.append(preference_rate(outcomes))
    assert 0.93 <= coverage(intervals, 0.6) <= 0.97


def test_intervals_of_a_proportion_cover_the_truth():
    draw = np.random.default_rng(7)
    assert 0.93 <= coverage([proportion(int(draw.binomial(50, 0.7)), 50) for _ in range(TRIALS)], 0.7) <= 0.97


def test_intervals_of_the_length_controlled_rate_cover_the_truth(quick):
    draw = np.random.default_rng(8)
    theta, phi, intervals = 0.5, 1.2, []
    for _ in range(TRIALS):
        longer = draw.normal(0.5, 1, size=(80, 1))
        chance = 1 / (1 + np.exp(-theta - phi * np.tanh(longer / longer.std())))
        intervals.append(length_controlled_rate((draw.random((80, 1)) < chance).astype(float), longer))
    assert 0.93 <= coverage(intervals, 1 / (1 + np.exp(-theta))) <= 0.97


def test_intervals_of_strengths_cover_the_truth(quick):
    draw = np.random.default_rng(9)
    truth = np.array([0.6, 0.0, -0.6])
    first, second = (np.tile(column, PROMPTS) for column in ([0, 0, 1], [1, 2, 2]))
    prompts = np.repeat(np.arange(PROMPTS), 3)
    found = []
    for _ in range(TRIALS):
        outcomes = draw.random(len(first)) < 1 / (1 + np.exp(truth[second] - truth[first]))
        found.append(bradley_terry(first, second, outcomes.astype(float), prompts, 3))
    for candidate in range(3):
        assert 0.93 <= coverage([strengths[candidate] for strengths in found], truth[candidate]) <= 0.97


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


def test_missing_verdicts_are_left_out_and_no_losses():
    outcomes = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan], [0.5, 0.5]])
    assert preference_rate(outcomes).value == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert preference_rate(np.array([[1.0], [np.nan], [1.0]])) == proportion(2, 2)
    with pytest.raises(ValueError, match="no outcome is known"):
        preference_rate(np.full((3, 2), np.nan))


def test_without_length_the_length_controlled_rate_is_the_plain_one():
    outcomes = np.array([[1.0], [1.0], [0.0], [0.5]] * 30)
    assert length_controlled_rate(outcomes, np.zeros_like(outcomes)).value == pytest.approx(preference_rate(outcomes).value, abs=1e-3)


def test_two_candidates_have_the_log_odds_of_their_wins_and_published_strengths_are_found():
    wins = {(0, 1): 7, (1, 0): 3}
    first, second = (np.repeat([pair[i] for pair in wins], list(wins.values())) for i in (0, 1))
    ones, prompts = np.ones(10), np.arange(10)
    strengths = bradley_terry(first, second, ones, prompts, 2, prior=0)
    assert strengths[0].value - strengths[1].value == pytest.approx(np.log(7 / 3), abs=1e-5)
    # Agresti, Categorical Data Analysis (table 10.10): 42 games of seven baseball teams in 1987; Milwaukee's odds against Boston
    # by the fitted model are exp(1.58 - 1.11).
    table = np.array([
        [0, 7, 9, 7, 7, 9, 11], [6, 0, 7, 5, 11, 9, 9], [4, 6, 0, 7, 7, 8, 12], [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12], [4, 4, 5, 6, 6, 0, 6], [2, 4, 1, 3, 1, 7, 0],
    ])  # fmt: skip
    first, second = (np.repeat(side.ravel(), table.ravel()) for side in np.indices(table.shape))
    found = bradley_terry(first, second, np.ones(table.sum()), np.arange(table.sum()), 7, prior=0)
    above_baltimore = [strength.value - found[-1].value for strength in found]
    assert above_baltimore == pytest.approx([1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0.0], abs=2e-3)


def test_who_won_everything_has_a_finite_strength_and_strangers_are_refused():
    first, second, ones, prompts = np.zeros(10, int), np.ones(10, int), np.ones(10), np.arange(10)
    strengths = bradley_terry(first, second, ones, prompts, 2)
    assert strengths[0].value == pytest.approx(np.log(10.5 / 0.5) / 2, abs=1e-4)
    with pytest.raises(ValueError, match="not every candidate was compared"):
        bradley_terry(first, second, ones, prompts, 3)


def test_krippendorffs_alpha_is_the_published_one():
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: nominal 0.743, ordinal 0.815, interval 0.849.
    nan = np.nan
    ratings = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ])  # fmt: skip
    for level, published in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        found = agreement(ratings, level=level)
        assert found.value == pytest.approx(published, abs=1e-3)
        assert found.low < published < found.high
    assert agreement(np.ones((2, 5))) is None


def test_paired_tests_find_what_unpaired_ones_would_not():
    draw = np.random.default_rng(10)
    level = 5 * draw.normal(size=(30, 1))
    a, b = level + 0.5 + 0.3 * draw.normal(size=(30, 2)), level + 0.3 * draw.normal(size=(30, 2))
    assert paired_test(a, b) < 0.001
    assert paired_test(b, level) > 0.05
    assert paired_test(np.array([1.0, 2, 3]), np.zeros(3)) == pytest.approx(2 / 8)  # exact: both of all eight sign patterns
    assert paired_test(np.array([1.0, np.nan]), np.zeros(2)) == 1.0
    assert paired_test(a, a) == 1.0


def test_as_many_prompts_as_it_says_reach_the_margin():
    draw = np.random.default_rng(11)
    pilot = draw.normal(size=(400, 1))
    needed = prompts_needed(pilot, 0.1)
    found = mean(draw.normal(size=(needed, 1)))
    assert (found.high - found.low) / 2 == pytest.approx(0.1, rel=0.15)
    assert prompts_needed(np.array([[1.0]]), 0.05) == 385  # nothing known: a coin's


def test_a_ratio_is_sum_over_sum_and_equal_shares_leave_no_doubt():
    found = statistics.ratio(np.array([1.0, 4.0]), np.array([2.0, 2.0]))
    assert found.value == 5 / 4 and (found.low, found.high) == (0.5, 2.0)  # of two prompts, either twice
    same = statistics.ratio(np.array([1.0, 3.0, 0.0]), np.array([2.0, 6.0, 0.0]))
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="all 0"):
        statistics.ratio(np.zeros(2), np.zeros(2))


def test_ratio_intervals_contain_the_truth_19_times_in_20():
    draw, truth, held = np.random.default_rng(0), 0.3, 0
    for number in range(200):
        tokens = draw.integers(5, 60, size=40)
        share = draw.beta(3, 7, size=40)  # prompts differ: mean 0.3
        found = statistics.ratio(draw.binomial(tokens, share), tokens, seed=number)
        held += found.low <= truth <= found.high
    assert 182 <= held <= 197


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    found = statistics.jackknife(values.mean(), (values.sum() - values) / 3)
    half = statistics.stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert (found.value, found.low, found.high) == pytest.approx((4, 4 - half, 4 + half))
    assert statistics.jackknife(1.0, np.array([1.0])).low is None
