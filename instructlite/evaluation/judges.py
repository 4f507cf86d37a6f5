"""Who says which answer is better: a reward adapter (a check on one reward model by another), or a language model that is asked.

Neither is a human verdict; both are judged themselves by how often they agree with people. A language model's verdict that does not
come, or cannot be read, is missing: it is never scored as a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.generating import pairwise
from ..data.generating.completer import Completions, Messages, Request
from ..data.generating.pairwise import Pair, Verdicts, verdict_in
from ..data.generating.templates import Prompts, read_prompts, transcript
from ..errors import InstructLiteError
from ..models.manifest import Adapter
from . import statistics

if TYPE_CHECKING:
    from ..models.roles import RoleModel
    from ..models.sampling import Progress
    from ..models.sampling import Sequence as Tokens


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
    model: RoleModel, judges: list[RewardJudge], sequences: list[Tokens], *, batch_size: int = 32, progress: Progress | None = None
) -> np.ndarray:
    """A score of each judge for each (prompt ids, answer ids), read at the answer's last token, as PPO reads its reward model."""
    from ..models.sampling import score  # an endpoint judges without torch

    scores = score(model, [judge.role for judge in judges], sequences, batch_size=batch_size, progress=progress).double().numpy()
    for judge, own in zip(judges, scores, strict=True):
        if not np.isfinite(own).all():
            raise InstructLiteError(f"{judge.adapter}: its scores are not finite; train the reward model again")
    return scores


Scale = Literal["pointwise", "likert"]
SCALES: dict[str, tuple[int, int]] = {"pointwise": (1, 10), "likert": (1, 7)}


@dataclass(frozen=True)
class Answered:
    """An answer to be rated. reference: what a person answered, for rating by it."""

    prompt: Messages
    answer: str
    reference: str | None = None


@dataclass(frozen=True)
class LanguageModelJudge:
    """A language model, behind an endpoint or in memory, asked by the prompts of data/generating/prompts/judge.yaml or of a file."""

    name: str
    completions: Completions
    prompts: Prompts = field(default_factory=lambda: read_prompts("judge"))
    max_tokens: int = 512

    @classmethod
    def of(cls, completions: Completions, prompts: str | Path | None = None, **options: Any) -> LanguageModelJudge:
        return cls(completions.model, completions, read_prompts("judge", prompts), **options)

    def compare(self, pairs: Sequence[Pair]) -> Verdicts:
        """Every pair in both orders; see pairwise.py."""
        return pairwise.compare(self.completions, self.prompts, pairs, max_tokens=self.max_tokens, label=f"judged by {self.name}")

    def rate(self, answers: Sequence[Answered], scale: Scale = "pointwise") -> np.ndarray:
        """A whole number of the scale for each answer, NaN where none came that is on it."""
        low, high = SCALES[scale]
        requests = [Request(self._question(item, scale), 0.0, self.max_tokens) for item in answers]
        said = [verdict_in(answer.text) for answer in self.completions.ask(requests, f"rated by {self.name}")]
        numbers = [float(text) if text and text.isdecimal() else np.nan for text in said]
        return np.array([number if low <= number <= high else np.nan for number in numbers])

    def _question(self, item: Answered, scale: Scale) -> Messages:
        values = {"conversation": transcript(item.prompt), "answer": item.answer}
        if item.reference is None:
            return self.prompts.message(scale, **values)
        return self.prompts.message(f"{scale}_reference", reference=item.reference, **values)

    def accuracy(self, comparisons: Sequence[Mapping], *, seed: int = 0) -> dict[str, Any]:
        """How often it prefers what people preferred, a tie counting half; with the interval, and what is wrong with the judge."""
        pairs = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in comparisons]
        found = preference(pairs, self.compare(pairs), seed=seed)
        longer = [(len(pair.a) > len(pair.b)) + 0.5 * (len(pair.a) == len(pair.b)) for pair in pairs]
        names = {"rate": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
        return {names.get(key, key): value for key, value in found.items()} | {"longer_wins": float(np.mean(longer))}


def preference(pairs: Sequence[Pair], verdicts: Verdicts, *, margin: float = 0.05, seed: int = 0) -> dict[str, Any]:
    """How often the pairs' `a` was preferred: plain and length-controlled rate with intervals over prompts, and warnings.

    margin: to either side; `prompts_needed` says how many prompts an interval of it takes.
    """
    known = zip(pairs, verdicts.outcomes, strict=True)
    outcomes = statistics.by_prompt((pair.prompt, np.nan if outcome is None else outcome) for pair, outcome in known)
    longer = statistics.by_prompt((pair.prompt, len(pair.a) - len(pair.b)) for pair in pairs)
    measured, warnings = verdicts.measured(), verdicts.warnings()
    if np.isnan(outcomes).all():
        empty = dict.fromkeys(
            ("rate", "low", "high", "length_controlled", "length_controlled_low", "length_controlled_high", "p_of_a_draw")
        )
        return {**empty, "prompts": 0, "prompts_needed": None, **measured, "warnings": [*warnings, "no pair has a verdict"]}
    rate = statistics.preference_rate(outcomes, seed=seed)
    controlled = statistics.length_controlled_rate(outcomes, longer, seed=seed)
    if rate.side_of(0.5) and controlled.side_of(0.5) != rate.side_of(0.5):
        warnings.append(
            f"length: {rate.value:.2f} are won, but {controlled.value:.2f} would be by answers of equal length, which is not clear of a "
            "draw: length may be all that was preferred"
        )
    needed = statistics.prompts_needed(outcomes, margin)
    test = statistics.paired_test(outcomes, np.where(np.isnan(outcomes), np.nan, 0.5), seed=seed)
    return {
        "rate": rate.value, "low": rate.low, "high": rate.high, "length_controlled": controlled.value,
        "length_controlled_low": controlled.low, "length_controlled_high": controlled.high,
        "prompts": int((~np.isnan(outcomes)).any(1).sum()), "p_of_a_draw": test,
        "prompts_needed": needed, **measured, "warnings": warnings,
    }  # fmt: skip
