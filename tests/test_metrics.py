"""Perplexity, KL, distinct-n and repetition against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

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
