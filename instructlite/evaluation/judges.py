"""Who says which answer is better. Here: a reward adapter, which is a check on one reward model by another, not a human verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InstructLiteError
from ..models.manifest import Adapter
from ..models.roles import RoleModel
from ..models.sampling import Progress, Sequence, score


@dataclass(frozen=True)
class RewardJudge:
    """A reward adapter under the name it has in the report; `role` is the one it is loaded as."""

    name: str
    adapter: Adapter
    role: str

    def __post_init__(self) -> None:
        if self.adapter.role != "reward":
            raise InstructLiteError(f"{self.adapter}: a {self.adapter.role} adapter cannot judge; pass one that RewardRecipe wrote")

    def to_dict(self, candidates: Mapping[str, Adapter]) -> dict[str, Any]:
        """Its row in the report: its own accuracy, and which candidates it trained, as far as their manifests say."""
        trained_by = {name: candidate.manifest.parents.get("reward") for name, candidate in candidates.items()}
        found = self.adapter.metrics
        return {
            "name": self.name,
            "adapter": self.adapter.sha256,
            **{name: found.get(f"eval_{name}") for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs", "longer_wins")},
            "trained": [name for name, reward in trained_by.items() if reward == self.adapter.sha256],
            "not_trained": [name for name, reward in trained_by.items() if reward not in (None, self.adapter.sha256)],
        }


def reward_scores(
    model: RoleModel, judges: list[RewardJudge], sequences: list[Sequence], *, batch_size: int = 32, progress: Progress | None = None
) -> np.ndarray:
    """A score of each judge for each (prompt ids, answer ids), read at the answer's last token, as PPO reads its reward model."""
    scores = score(model, [judge.role for judge in judges], sequences, batch_size=batch_size, progress=progress).double().numpy()
    for judge, own in zip(judges, scores, strict=True):
        if not np.isfinite(own).all():
            raise InstructLiteError(f"{judge.adapter}: its scores are not finite; train the reward model again")
    return scores
