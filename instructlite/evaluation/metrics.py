"""Numbers about answers that need no judge: perplexity, KL to the reference, how varied and how repetitive the words are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from . import statistics
from .statistics import Interval

Ids = Sequence[int]


def perplexity(log_probs: Sequence[Tensor]) -> float:
    """exp of minus the mean log-probability over all tokens of all answers: long answers weigh more than short ones.

    log_probs: per answer, one per token, in nats.
    """
    tokens = sum(map(len, log_probs))
    surprise = -sum(float(answer.double().sum()) for answer in log_probs) / tokens
    return math.exp(surprise) if surprise < 700 else math.inf


def perplexity_interval(log_probs: Sequence[Tensor], *, seed: int = 0) -> Interval:
    """The perplexity, with its interval over the answers."""
    surprise = statistics.ratio(np.array([-float(own.double().sum()) for own in log_probs]), np.array(list(map(len, log_probs))), seed=seed)
    ends = (None if end is None else math.exp(end) if end < 700 else math.inf for end in (surprise.low, surprise.high))
    return Interval(perplexity(log_probs), *ends)


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


def distinct_interval(answers: Sequence[Sequence[Ids]], n: int = 2) -> Interval | None:
    """`distinct` over all answers to all prompts, with its interval over prompts; an entry is a prompt's answers."""
    value = distinct([answer for own in answers for answer in own], n)
    if value is None:
        return None
    per_prompt = [Counter(gram for answer in own for gram in _ngrams(answer, n)) for own in answers]
    counts = sum(per_prompt, Counter())
    total, different = counts.total(), len(counts)
    without = [
        (different - sum(counts[gram] == times for gram, times in own.items())) / (total - own.total())
        for own in per_prompt
        if own.total() < total
    ]
    return statistics.jackknife(value, np.array(without))


def repeated_interval(answers: Sequence[Sequence[Ids]], n: int = 3, *, seed: int = 0) -> Interval | None:
    """`repeated`, with its interval over prompts; an entry is a prompt's answers."""
    grams = [[_ngrams(answer, n) for answer in own] for own in answers]
    total = np.array([sum(map(len, own)) for own in grams])
    new = np.array([sum(len(set(answer)) for answer in own) for own in grams])
    return statistics.ratio(total - new, total, seed=seed) if total.any() else None


def repeated(answers: Sequence[Ids], n: int = 3) -> float | None:
    """The share of n-grams that have stood before in the same answer: what a degenerate policy drives up."""
    grams = [_ngrams(answer, n) for answer in answers]
    total = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / total if total else None


def _ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
