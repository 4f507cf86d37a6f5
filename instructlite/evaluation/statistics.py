"""Means, win rates, proportions, strengths and agreement with 95 % intervals; paired tests; how many prompts a margin takes.

Answers to one prompt are alike, so intervals are over prompts: the bootstrap (Efron 1979) draws whole prompts with all their
answers, never single answers. What it cannot see is how another training run would have turned out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import require

stats = require("scipy.stats", "eval")
special = require("scipy.special", "eval")

RESAMPLES = 10_000
LOGISTIC_RESAMPLES, STRENGTH_RESAMPLES, AGREEMENT_RESAMPLES = 1_000, 2_000, 500  # each is a fit
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


def preference_rate(outcomes: np.ndarray, *, seed: int = 0) -> Interval:
    """Share of pairs won, from outcomes (prompts, pairs) of 1, 0.5 and 0, NaN where a verdict is missing: left out, no loss.

    Each prompt with a verdict counts the same. Raises ValueError if there is none at all.
    """
    per_prompt = _means_of_known(outcomes)
    if not len(per_prompt):
        raise ValueError("no outcome is known")
    if per_prompt.mean() in (0.0, 1.0):
        return proportion(int(per_prompt.sum()), len(per_prompt))
    return mean(per_prompt, seed=seed)


def length_controlled_rate(outcomes: np.ndarray, longer: np.ndarray, *, seed: int = 0) -> Interval:
    """The win rate there would be between answers of equal length (AlpacaEval 2: Dubois et al. 2024), outcomes as above.

    longer: (prompts, pairs), by how many characters the first answer is the longer one. The model of the paper for two
    candidates, logit P(win) = theta + phi tanh(longer / its standard deviation); the rate is that at longer = 0. The paper's
    difficulty of each prompt is left out: it takes many candidates to estimate. A weak ridge penalty keeps both finite.
    Where one side is longer nearly always, the rate is an extrapolation, and its interval wide.
    """
    prompt, pair = np.nonzero(~np.isnan(outcomes))
    if not len(prompt):
        raise ValueError("no outcome is known")
    won, difference = outcomes[prompt, pair], np.asarray(longer, dtype=float)[prompt, pair]
    design = np.stack([np.ones(len(won)), np.tanh(difference / (difference.std() or 1.0))], 1)
    draw = np.random.default_rng(seed)
    known, cluster = np.unique(prompt, return_inverse=True)
    # Every prompt counts the same, as in the plain rate, whatever number of its pairs has a verdict.
    share = 1 / np.bincount(cluster)[cluster]
    weights = draw.multinomial(len(known), np.full(len(known), 1 / len(known)), size=LOGISTIC_RESAMPLES)[:, cluster] * share
    value = float(special.expit(_logistic(design, won, share[None])[0, 0]))
    if len(known) < 2:
        return Interval(value)
    parts = np.array_split(weights, 1 + weights.size // 2_000_000)  # what is in memory together
    drawn = np.concatenate([_logistic(design, won, part)[:, 0] for part in parts])
    low, high = np.quantile(special.expit(drawn), [_tail(len(known)), 1 - _tail(len(known))])
    return Interval(value, float(low), float(high))


def bradley_terry(
    first: np.ndarray, second: np.ndarray, outcomes: np.ndarray, prompts: np.ndarray, candidates: int, *, prior: float = 0.5, seed: int = 0
) -> list[Interval]:
    """Strength of each candidate in log-odds, 0 on average: P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley & Terry 1952).

    One entry of the arrays a comparison: the candidates' numbers, 1, 0.5 or 0 for the first, and the prompt (resampled whole).
    NaN outcomes are left out. prior: wins added both ways to each pair that met, so that who won everything has a finite
    strength. Fitted by Hunter's (2004) MM iterations. Candidates that no comparisons connect cannot be compared: ValueError.
    """
    known = ~np.isnan(outcomes)
    first, second, won = first[known], second[known], outcomes[known]
    names, cluster = np.unique(prompts[known], return_inverse=True)
    met = np.zeros((candidates, candidates))
    np.add.at(met, (first, second), 1)
    if require("scipy.sparse.csgraph", "eval").connected_components(met, directed=False)[0] > 1:
        raise ValueError("not every candidate was compared with the others, directly or by way of them")
    wins = np.zeros((len(names), candidates, candidates))
    np.add.at(wins, (cluster, first, second), won)
    np.add.at(wins, (cluster, second, first), 1 - won)
    added = prior * ((met + met.T) > 0)
    value = _strengths(wins.sum(0)[None] + added)[0]
    if len(names) < 2:
        return [Interval(float(strength)) for strength in value]
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=STRENGTH_RESAMPLES)
    drawn = _strengths(np.tensordot(counts, wins, 1) + added)
    ends = np.quantile(drawn, [_tail(len(names)), 1 - _tail(len(names))], axis=0)
    return [Interval(*map(float, row)) for row in zip(value, *ends, strict=True)]


def agreement(ratings: np.ndarray, *, level: str = "ordinal", clusters: np.ndarray | None = None, seed: int = 0) -> Interval | None:
    """Krippendorff's alpha between raters (rows) over items (columns), NaN where one said nothing; items are resampled.

    1 is full agreement, 0 what chance gives, below 0 worse. level: nominal, ordinal, interval. clusters: the prompt of each item,
    resampled whole. None where all ratings are alike or no item has two: there is nothing to disagree about.
    """
    library = require("krippendorff", "eval")
    ratings = np.asarray(ratings, dtype=float)
    several = (~np.isnan(ratings)).sum(0) > 1
    ratings = ratings[:, several]
    _, cluster = np.unique(np.arange(len(several))[several] if clusters is None else np.asarray(clusters)[several], return_inverse=True)
    values = np.unique(ratings[~np.isnan(ratings)])
    if len(values) < 2:
        return None

    def alpha(columns: np.ndarray) -> float:
        """NaN for a resample in which all ratings are alike."""
        found = ratings[:, columns]
        several = len(np.unique(found[~np.isnan(found)])) > 1
        return library.alpha(found, value_domain=values, level_of_measurement=level) if several else np.nan

    items = [np.flatnonzero(cluster == number) for number in range(cluster.max() + 1)]
    draw = np.random.default_rng(seed)
    resamples = draw.integers(len(items), size=(AGREEMENT_RESAMPLES, len(items)))
    drawn = [alpha(np.concatenate([items[i] for i in chosen])) for chosen in resamples]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if len(items) > 1 else (None, None)
    return Interval(float(alpha(np.arange(ratings.shape[1]))), *(None if end is None else float(end) for end in (low, high)))


def paired_test(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p of equal means of a and b, (prompts,) or (prompts, answers) to the same prompts: signs of the differences permuted.

    Exact up to 13 prompts. A prompt with a NaN on either side is left out.
    """
    difference = _prompt_means(a) - _prompt_means(b)
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2 or not difference.any():
        return 1.0
    result = stats.permutation_test(
        (difference,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=RESAMPLES - 1,
        batch=_AT_ONCE, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def prompts_needed(values: np.ndarray, margin: float) -> int:
    """How many prompts like these make the 95 % interval of the mean reach `margin` to either side (NaN left out)."""
    per_prompt = _means_of_known(values)
    spread = per_prompt.std(ddof=1) if len(per_prompt) > 1 else 0.5  # of one prompt nothing is known: a coin's
    return max(2, int(np.ceil((stats.norm.ppf(0.975) * spread / margin) ** 2)))


def share_of_gain(start: np.ndarray, part: np.ndarray, end: np.ndarray, *, seed: int = 0) -> Interval:
    """(part - start) / (end - start) of the means: how much of the way from `start` to `end` is `part`.

    Each (prompts, answers), the same prompts in all three. Only meaningful where end - start is clear of 0.
    """

    def share(s: np.ndarray, p: np.ndarray, e: np.ndarray, axis: int = -1) -> np.ndarray:
        return (p.mean(axis) - s.mean(axis)) / (e.mean(axis) - s.mean(axis))

    return _bootstrap(tuple(np.asarray(x, dtype=float).mean(1) for x in (start, part, end)), share, seed)


def ratio(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> Interval:
    """Sum over sum, each (prompts,): per token, say, of answers of unlike length. Prompts with nothing below the line are left out.

    Raises ValueError if nothing is left.
    """
    above, below = (np.asarray(x, dtype=float)[np.asarray(denominators) > 0] for x in (numerators, denominators))
    if not len(below):
        raise ValueError("the denominators are all 0")
    return _bootstrap((above, below), lambda a, b, axis=-1: a.sum(axis) / b.sum(axis), seed)


def jackknife(value: float, without: np.ndarray) -> Interval:
    """An estimate with its interval from the estimates (prompts,) without each prompt in turn (Tukey 1958).

    For numbers that resampling would change by itself, such as how many words are different: a prompt drawn twice adds none.
    """
    n = len(without)
    if n < 2:
        return Interval(value)
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return Interval(value, *(float(value + sign * stats.t.ppf(0.975, n - 1) * error) for sign in (-1, 1)))


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
    ends = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, batch=_AT_ONCE, vectorized=True, paired=len(samples) > 1,
        confidence_level=1 - 2 * _tail(n), method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(value, float(ends.low), float(ends.high))


def _tail(n: int) -> float:
    """What a percentile interval leaves out at each end.

    Plain percentiles are too narrow for few prompts (10 of them: 91 % instead of 95 %). Hesterberg's (2015) expanded
    percentiles put back the n / (n - 1) of the variance and Student's t.
    """
    return float(stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)))


def by_prompt(values: Iterable[tuple[Any, float]]) -> np.ndarray:
    """(prompts, values) from pairs of a prompt and a value, NaN where a prompt has fewer."""
    rows: dict[str, list[float]] = {}
    for prompt, value in values:
        rows.setdefault(repr(prompt), []).append(value)
    grid = np.full((len(rows), max(map(len, rows.values()), default=0)), np.nan)
    for number, row in enumerate(rows.values()):
        grid[number, : len(row)] = row
    return grid


def _prompt_means(values: np.ndarray) -> np.ndarray:
    """Mean of what is known of each prompt, NaN where that is nothing."""
    values = np.asarray(values, dtype=float).reshape(len(values), -1)
    known = (~np.isnan(values)).sum(1)
    return np.divide(np.nansum(values, 1), known, out=np.full(len(values), np.nan), where=known > 0)


def _means_of_known(values: np.ndarray) -> np.ndarray:
    means = _prompt_means(values)
    return means[~np.isnan(means)]


def _logistic(design: np.ndarray, won: np.ndarray, weights: np.ndarray, ridge: float = 0.1) -> np.ndarray:
    """Logistic regression of `won` in [0, 1] on (rows, features), once for each row of weights: coefficients (fits, features)."""
    features = design.shape[1]
    penalty = ridge * np.eye(features)
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    coefficients = np.zeros((len(weights), features))
    for _ in range(50):
        expected = special.expit(coefficients @ design.T)
        gradient = (weights * (won - expected)) @ design - coefficients @ penalty
        curvature = ((weights * expected * (1 - expected)) @ products).reshape(-1, features, features) + penalty
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        coefficients += np.clip(step, -2, 2)  # far from the solution Newton's steps overshoot
        if np.abs(step).max() < 1e-6:
            break
    return coefficients


def _strengths(wins: np.ndarray) -> np.ndarray:
    """(fits, candidates) from wins (fits, candidates, candidates)."""
    games, total = wins + wins.swapaxes(1, 2), wins.sum(2)
    strength = np.ones_like(total)
    for _ in range(1000):
        new = total / (games / (strength[:, :, None] + strength[:, None, :])).sum(2)
        new = np.maximum(new / np.exp(np.log(np.maximum(new, 1e-12)).mean(1, keepdims=True)), 1e-12)
        done = np.abs(np.log(new / strength)).max() < 1e-7
        strength = new
        if done:
            break
    return np.log(strength) - np.log(strength).mean(1, keepdims=True)
