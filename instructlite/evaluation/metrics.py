"""Numbers about answers that need no judge: perplexity, KL to the reference, how varied and how repetitive the words are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Ids = Sequence[int]


def perplexity(log_probs: Sequence[Tensor]) -> float:
    """exp of minus the mean log-probability over all tokens of all answers: long answers weigh more than short ones.

    log_probs: per answer, one per token, in nats.
    """
    tokens = sum(map(len, log_probs))
    surprise = -sum(float(answer.double().sum()) for answer in log_probs) / tokens
    return math.exp(surprise) if surprise < 700 else math.inf


def kl_per_answer(policy: Sequence[Tensor], reference: Sequence[Tensor]) -> np.ndarray:
    """Single-sample estimates of KL(policy || reference) for whole answers, in nats: sum over tokens of log pi - log pi_ref.

    policy, reference: log-probabilities of the same answers, drawn from the policy. The mean is unbiased; a single one may
    be negative.
    """
    return np.array([float((p.double() - r.double()).sum()) for p, r in zip(policy, reference, strict=True)])


def distinct(answers: Sequence[Ids], n: int = 2) -> float | None:
    """Different n-grams of all answers together, as a share of all n-grams (Li et al. 2016); None if there are none.

    It falls with the amount of text: compare it between equally many answers only.
    """
    grams = [gram for answer in answers for gram in _ngrams(answer, n)]
    return len(set(grams)) / len(grams) if grams else None


def repeated(answers: Sequence[Ids], n: int = 3) -> float | None:
    """The share of n-grams that have stood before in the same answer: what a degenerate policy drives up."""
    grams = [_ngrams(answer, n) for answer in answers]
    total = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / total if total else None


def _ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
