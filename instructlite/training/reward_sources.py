"""Where PPO's score comes from: anything that maps finished responses to one number each.

A source sees the rollout with hidden states already computed for its role, or nothing but the tokens; what it returns is
raw, and `ScoreScale` brings it to the scale that clip ranges and KL coefficients are meant for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .ppo_math import Reduce, masked_mean, masked_variance

if TYPE_CHECKING:
    from .rollout import Rollout

RewardSource = Callable[["Rollout"], Tensor]
"""A rollout (prompts, responses, masks, the rows of the data set) -> raw scores, fp32 (batch,)."""


@dataclass
class ScoreScale:
    """score -> (score - mean) / std, clipped to +-clip: one affine map for the whole run.

    With mean and std None they are those of the first rollout (over all processes) and stay fixed from then on. The
    value head, when it starts as a copy of the reward head, must get the same map (`apply_to_head`).
    """

    mean: float | None
    std: float | None
    clip: float | None
    fitted: bool = field(init=False)

    def __post_init__(self) -> None:
        self.fitted = self.mean is not None

    def fit(self, scores: Tensor, reduce: Reduce) -> None:
        everything = torch.ones_like(scores, dtype=torch.bool)
        self.mean = masked_mean(scores, everything, reduce).item()
        # Constant scores carry no information; their scale is left alone.
        self.std = masked_variance(scores, everything, reduce).sqrt().item() or 1.0
        self.fitted = True

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled scores, and which of them were clipped (bool)."""
        scaled = (scores - self.mean) / self.std
        if self.clip is None:
            return scaled, torch.zeros_like(scaled, dtype=torch.bool)
        return scaled.clamp(-self.clip, self.clip), scaled.abs() > self.clip

    def restore(self, mean: float | None, std: float | None) -> None:
        self.mean, self.std, self.fitted = mean, std, mean is not None

    @torch.no_grad()
    def apply_to_head(self, head: nn.Linear) -> None:
        head.weight.div_(self.std)
        head.bias.sub_(self.mean).div_(self.std)
