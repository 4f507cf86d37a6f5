"""How far the answers of a policy lie from known ones in the eyes of the reward model: the latent signal of reward hacking.

Answers that exploit a reward model are outliers in its latent space: the share of answers whose Mahalanobis distance from
those of the SFT policy is beyond the 99 % quantile is the "Mahalanobis outlier probability" of Miao 2025
("Information-Theoretic Reward Modeling for Stable RLHF"). Theirs is the latent of an information bottleneck; here it is
what any reward head reads. What is left out: a normal distribution to take the quantile from (see KnownStates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FEWEST, MOST = 16, 256  # answers to fit on


@dataclass
class KnownStates:
    """What the reward head read (its input at the last token) for known answers, and how far another one may lie from it.

    Known are the answers of the first rollout, which the reference policy gave: they exist for every reward adapter, whoever
    trained it, and come from the prompts and the decoding of the run itself. The reward model's own training answers were
    written by others: from those, the first rollout is already far.

    There are fewer answers than hidden units, so their covariance has a ridge (the median of its eigenvalues), and the
    distances of the very answers that were fitted are too small. Hence the limit: the 99 % quantile of how far each of them
    lies from all the others, which assumes no distribution. Fewer than 99 answers have no such quantile; the farthest is the
    limit then, and new answers of the same kind lie beyond it with probability `expected` (16 answers: 6 %; 32: 3 %).

    mean: (hidden,); directions: (hidden, answers - 1); ridge, limit, expected: scalars. All in fp64.
    """

    mean: Tensor
    directions: Tensor
    ridge: Tensor
    limit: Tensor
    expected: Tensor

    @classmethod
    def fit(cls, states: Tensor) -> KnownStates | None:
        """states: (answers, hidden), of which the first 256 serve. None if there are fewer than 16, or if they do not vary."""
        states = states[:MOST].double()
        n, mean = len(states), states.mean(0)
        _, singular, directions = torch.linalg.svd(states - mean, full_matrices=False)
        kept = singular > 1e-6 * mean.norm()
        if n < FEWEST or not kept.any():
            return None
        ridge = singular[kept].square().median()
        shrunk = singular[kept].square() / (singular[kept].square() + ridge)
        rank = min(n, math.ceil(0.99 * (n + 1)))
        known = cls(mean, directions[kept].T * shrunk.sqrt(), ridge, torch.ones_like(ridge), ridge.new_tensor((n + 1 - rank) / (n + 1)))
        # The distance of an answer from the others, had they been fitted without it: Sherman and Morrison's formula (1950),
        # for mean and scatter lose one answer each. The ridge stays.
        inside, without = known.distances(states), n / (n - 1)
        known.limit = (without**2 * inside / (1 - without * inside)).sort().values[rank - 1]
        return known

    def distances(self, states: Tensor) -> Tensor:
        """Squared Mahalanobis distances (answers,) by scatter + ridge, in units of the limit: outliers are beyond 1."""
        away = states.double() - self.mean
        # Woodbury: the inverse of scatter + ridge, without a (hidden, hidden) matrix
        return (away.square().sum(1) - (away @ self.directions).square().sum(1)) / self.ridge / self.limit

    def save(self, path: Path) -> None:
        save_file({name: value.contiguous().cpu() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> KnownStates:
        return cls(**{name: tensor.to(device) for name, tensor in load_file(path).items()})
