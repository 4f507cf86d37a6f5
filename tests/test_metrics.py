"""Perplexity, KL, distinct-n and repetition against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from instructlite.evaluation import metrics
from instructlite.evaluation.metrics import distinct, kl_per_answer, perplexity, repeated


def test_the_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert perplexity([torch.full((n,), math.log(1 / 260)) for n in (1, 7, 30)]) == pytest.approx(260, rel=1e-5)


def test_perplexity_weighs_tokens_not_answers():
    answers = [torch.tensor([math.log(0.5)] * 3), torch.tensor([math.log(0.125)])]
    assert perplexity(answers) == pytest.approx(2 ** ((3 * 1 + 3) / 4))


def test_a_hopeless_model_has_infinite_perplexity_and_no_overflow():
    assert perplexity([torch.tensor([-1e4])]) == math.inf


def test_kl_is_summed_over_the_tokens_of_each_answer():
    policy = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    reference = [torch.tensor([-1.5, -2.5]), torch.tensor([-0.25])]
    assert kl_per_answer(policy, reference).tolist() == [1.0, -0.25]
    assert kl_per_answer(policy, policy).tolist() == [0.0, 0.0]


def test_kl_estimates_average_to_the_exact_kl():
    torch.manual_seed(0)
    p, q = torch.randn(2, 6).double().log_softmax(-1)
    tokens = torch.multinomial(p.exp(), 40_000, replacement=True)
    estimates = kl_per_answer([p[token, None] for token in tokens], [q[token, None] for token in tokens])
    exact = float((p.exp() * (p - q)).sum())
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / np.sqrt(len(estimates))
    assert exact > 0.2


def test_distinct_counts_pairs_over_all_answers():
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4  # 12 23 12 24
    assert distinct([[1, 2, 3]], 2) == 1
    assert distinct([[1], []], 2) is None


def test_repeated_counts_within_an_answer_only():
    assert repeated([[1, 2, 3], [1, 2, 3]], 3) == 0
    assert repeated([[7] * 8, [1, 2, 3, 4]], 3) == pytest.approx(5 / 8)  # 6 triples of which 1 is new; 2 new ones
    assert repeated([[1, 2]], 3) is None


def test_the_interval_of_the_perplexity_holds_it_and_equal_answers_leave_no_doubt():
    answers = [torch.full((n,), -surprise) for n, surprise in ((3, 1.0), (5, 2.0), (2, 0.5), (9, 1.5))]
    found = metrics.perplexity_interval(answers)
    assert found.value == pytest.approx(perplexity(answers)) and found.low < found.value < found.high
    same = metrics.perplexity_interval([torch.full((n,), -1.0) for n in (3, 5, 2)])
    assert (same.low, same.value, same.high) == pytest.approx((math.e,) * 3)


def test_the_interval_of_distinct_is_the_jackknifes_over_prompts():
    prompts = [[[1, 2, 3]], [[1, 2, 4]], [[7, 8, 9], [7, 8]]]  # pairs: 12 23 | 12 24 | 78 89 78
    without = [distinct([answer for other in prompts if other is not own for answer in other], 2) for own in prompts]
    assert without == [4 / 5, 4 / 5, 3 / 4]
    found = metrics.distinct_interval(prompts, 2)
    assert found == metrics.statistics.jackknife(5 / 7, np.array(without)) and found.low < found.value < found.high
    assert metrics.distinct_interval([[[1]], [[]]], 2) is None


def test_repeated_is_resampled_by_prompt():
    prompts = [[[7] * 8], [[1, 2, 3, 4]]]
    found = metrics.repeated_interval(prompts, 3)
    assert found.value == pytest.approx(repeated([[7] * 8, [1, 2, 3, 4]], 3)) and (found.low, found.high) == pytest.approx((0, 5 / 6))
    assert metrics.repeated_interval([[[1, 2]]], 3) is None
