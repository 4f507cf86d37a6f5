"""How far the answers of a policy lie from known ones in the eyes of the reward model: the latent signal of reward hacking.

Answers that exploit a reward model are outliers in its latent space: the share beyond the 99 % quantile of the Mahalanobis
distance from the SFT policy's answers is the "Mahalanobis outlier probability" of Miao 2025 ("Information-Theoretic Reward
Modeling for Stable RLHF"). Theirs is the latent of an information bottleneck; here it is what any reward head reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DIMENSIONS = 32


@dataclass
class KnownStates:
    """Mean and main directions (PCA) of what the reward head read (its input at the last token) for known answers.

    Those of the first rollout, which the reference policy gave: they exist for every reward adapter, whoever trained it, and
    come from the prompts and the decoding of the run itself, so that the policy starts with 1 % of outliers. The reward
    model's own training answers were written by others: from those, the first rollout is already far.
    mean: (hidden,); directions: (hidden, dims), each divided by its standard deviation; count: answers fitted on.
    """

    mean: Tensor
    directions: Tensor
    count: int

    @classmethod
    def fit(cls, states: Tensor) -> KnownStates | None:
        """states: (answers, hidden). Four answers or more for each direction; None if that is none, or if they do not vary."""
        states = states.double()
        mean = states.mean(0)
        _, singular, directions = torch.linalg.svd(states - mean, full_matrices=False)
        kept = min(DIMENSIONS, len(states) // 4, int((singular > 1e-6 * mean.norm()).sum()))
        if kept == 0:
            return None
        deviations = singular[:kept] / math.sqrt(len(states) - 1)
        return cls(mean, directions[:kept].T / deviations, len(states))

    def distances(self, states: Tensor) -> Tensor:
        """Squared Mahalanobis distance by direction, (answers,): around 1 for answers like those fitted on."""
        return ((states.double() - self.mean) @ self.directions).square().mean(1)

    @property
    def limit(self) -> float:
        """What 99 % of new answers stay below, were all from one normal distribution.

        Hotelling's T-squared: chi-square, which ignores that mean and directions were estimated, would call 10 % of the
        answers outliers after a first rollout of 32. F's quantile is Paulson's approximation (1942).
        """
        n, k = self.count, self.directions.shape[1]
        z, a, b = NormalDist().inv_cdf(0.99), 2 / (9 * k), 2 / (9 * (n - k))
        p, q, r = (1 - b) ** 2 - z * z * b, (1 - a) * (1 - b), (1 - a) ** 2 - z * z * a
        quantile = ((q + math.sqrt(q * q - p * r)) / p) ** 3
        return quantile * (n + 1) * (n - 1) / (n * (n - k))

    def save(self, path: Path) -> None:
        stored = {"mean": self.mean, "directions": self.directions, "count": torch.tensor(self.count)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in stored.items()}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> KnownStates:
        stored = load_file(path)
        return cls(stored["mean"].to(device), stored["directions"].to(device), int(stored["count"]))
