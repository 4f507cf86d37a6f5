"""Means, win rates and proportions with 95 % intervals.

Answers to one prompt are alike, so intervals are over prompts: the bootstrap (Efron 1979) draws whole prompts with all their
answers, never single answers. What it cannot see is how another training run would have turned out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import require

stats = require("scipy.stats", "eval")

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples in memory together


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval; the ends are None where there are too few prompts for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def side_of(self, reference: float) -> int:
        """1 if the whole interval lies above `reference`, -1 if below, 0 if the interval holds it or there is none."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > reference) - (self.high < reference)


def mean(values: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean of (prompts,) or (prompts, answers), each prompt counting the same; percentile bootstrap over prompts."""
    per_prompt = np.asarray(values, dtype=float).reshape(len(values), -1).mean(1)
    return _bootstrap((per_prompt,), np.mean, seed)


def win_rate(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> Interval:
    """How often an answer of `a` outscores one of `b` to the same prompt: all cross pairs of a prompt, ties count one half.

    a, b: scores (prompts, answers). Where `a` wins or loses every single pair, resampling knows no spread; the interval is
    then Wilson's for that many prompts out of as many.
    """
    a, b = np.asarray(a)[:, :, None], np.asarray(b)[:, None, :]
    per_prompt = ((a > b) + 0.5 * (a == b)).mean((1, 2))
    rate = per_prompt.mean()
    if rate in (0.0, 1.0):
        return proportion(int(per_prompt.sum()), len(per_prompt))
    return mean(per_prompt, seed=seed)


def share_of_gain(start: np.ndarray, part: np.ndarray, end: np.ndarray, *, seed: int = 0) -> Interval:
    """(part - start) / (end - start) of the means: how much of the way from `start` to `end` is `part`.

    Each (prompts, answers), the same prompts in all three. Only meaningful where end - start is clear of 0.
    """

    def share(s: np.ndarray, p: np.ndarray, e: np.ndarray, axis: int = -1) -> np.ndarray:
        return (p.mean(axis) - s.mean(axis)) / (e.mean(axis) - s.mean(axis))

    return _bootstrap(tuple(np.asarray(x, dtype=float).mean(1) for x in (start, part, end)), share, seed)


def proportion(successes: int, trials: int) -> Interval:
    """A share of independent trials with Wilson's (1927) score interval."""
    ends = stats.binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(successes / trials, float(ends.low), float(ends.high))


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of (prompts, answers), from the spread between prompts; None for a single prompt."""
    per_prompt = np.asarray(values, dtype=float).reshape(len(values), -1).mean(1)
    return float(per_prompt.std(ddof=1) / np.sqrt(len(per_prompt))) if len(per_prompt) > 1 else None


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int) -> Interval:
    value, n = float(statistic(*samples, axis=-1)), len(samples[0])
    if n < 2:
        return Interval(value)
    # Plain percentiles are too narrow for few prompts (10 of them: 91 % instead of 95 %). Hesterberg's (2015) expanded
    # percentiles put back the n / (n - 1) of the variance and Student's t.
    confidence = 1 - 2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    ends = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, batch=_AT_ONCE, vectorized=True, paired=len(samples) > 1,
        confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(value, float(ends.low), float(ends.high))
