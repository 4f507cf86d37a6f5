"""From the raw scores of several sources to the one score PPO maximises: normalise, combine ensembles, weigh, clip.

Each source is brought to its own scale first. Without that, the minimum of an ensemble would be the member with the
lowest offset, and a weight would mean little between scores of different spread.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name

from ..errors import InstructLiteError
from ..models.manifest import Adapter, is_adapter, member_names
from .ppo_math import Reduce, masked_mean, masked_variance
from .reward_sources import AdapterReward, FunctionReward, RewardSource, load_function, source_of, wait_for_all

if TYPE_CHECKING:
    from .rollout import Rollout

Combine = Literal["mean", "min", "mean_minus_std"]
TAKEN = ("policy", "reference", "value", "ema", "watch")  # roles of PPO


@dataclass
class ScoreScale:
    """score -> (score - mean) / std, by statistics over the responses of all processes.

    Fixed for the whole run (given, or those of the first rollout), or running: those of all rollouts so far. Unfitted it
    changes nothing. `count` and `m2` (the sum of squared deviations) let a running scale go on, also after a resume.
    """

    mean: float | None = None
    std: float | None = None
    running: bool = False
    count: float = 0.0
    m2: float = 0.0

    def update(self, scores: Tensor, reduce: Reduce) -> None:
        """Take in a training rollout's scores (batch,); NaN are left out. A fixed scale that is fitted stays as it is."""
        if self.mean is not None and not self.running:
            return
        known = scores[~scores.isnan()].double()
        count, total = reduce(torch.stack([torch.ones_like(known).sum(), known.sum()])).tolist()
        mean = total / max(count, 1)
        m2 = reduce(((known - mean) ** 2).sum()).item()
        if count == 0:
            return
        # Chan, Golub and LeVeque 1979: two sets of numbers merged by count, mean and squared deviations
        before = self.mean or 0.0
        everything = self.count + count
        self.m2 += m2 + (mean - before) ** 2 * self.count * count / everything
        self.mean = before + (mean - before) * count / everything
        self.count = everything
        std = (self.m2 / everything) ** 0.5
        # Constant scores carry no information (what is left of them is rounding); their scale is left alone.
        self.std = std if std > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    @property
    def fitted(self) -> bool:
        return self.mean is not None

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std if self.fitted else scores

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores inside a response (batch, length) -> scaled (batch, length), and what the last token gets for the mean (batch,)."""
        mean, std = (self.mean, self.std) if self.fitted else (0.0, 1.0)
        return tokens / std, torch.full((len(tokens),), -mean / std, device=tokens.device)

    @torch.no_grad()
    def apply_to_head(self, head: nn.Linear, weight: float = 1.0) -> None:
        """Make the head give weight x the scaled score."""
        head.weight.mul_(weight / self.std)
        head.bias.sub_(self.mean).mul_(weight / self.std)


@dataclass
class Objective:
    """What is wanted of a response: one source, or an ensemble of them, and its weight."""

    name: str
    members: list[RewardSource]
    weight: float = 1.0
    combine: Combine = "mean"
    std_weight: float = 0.5
    scales: list[ScoreScale] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Names of the members' raw scores."""
        return member_names(self.name, len(self.members))


@dataclass
class Scored:
    """A rollout's scores on PPO's scale. `total` (batch,) = `last` + the sum of `tokens`; NaN-free.

    last: (batch,), for the last valid token; tokens: (batch, length) for rewards inside the response, or None.
    judged: False where every source had nothing to say: nothing is to be learned from these.
    """

    total: Tensor
    last: Tensor
    tokens: Tensor | None
    judged: Tensor
    clipped: Tensor
    metrics: dict[str, float]


class Rewards:
    """All objectives of a run, weighed and added up. `adapters` are the roles that a RoleModel must have for them."""

    def __init__(self, objectives: list[Objective]):
        if not objectives:
            raise InstructLiteError("reward: there is none; give a reward adapter, a function or another source")
        names = [key for objective in objectives for key in {objective.name, *objective.keys}]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InstructLiteError(f"reward: two sources are named {', '.join(twice)}; name them: {{name: source, ...}}")
        self.objectives, self.clip = objectives, None

    @property
    def sources(self) -> Iterator[tuple[str, RewardSource, ScoreScale]]:
        for objective in self.objectives:
            yield from zip(objective.keys, objective.members, objective.scales, strict=True)

    @property
    def _members(self) -> list[RewardSource]:
        return [member for objective in self.objectives for member in objective.members]

    @property
    def roles(self) -> list[str]:
        """Reward roles to be scored inside the rollout."""
        return [member.name for member in self._members if isinstance(member, AdapterReward)]

    @property
    def adapters(self) -> dict[str, Adapter]:
        return {member.name: member.adapter for member in self._members if isinstance(member, AdapterReward) and member.adapter}

    def prepare(self, normalization: str, clip: float | None) -> None:
        """Fresh scales; see PPOConfig's score_normalization and score_clip."""
        self.clip = clip
        for objective in self.objectives:
            objective.scales = [_scale(member, normalization) for member in objective.members]

    @property
    def fitted(self) -> bool:
        return all(scale.fitted for _, _, scale in self.sources)

    def value_start(self, normalization: str) -> str | None:
        """The reward role whose adapter and head a value function may start from, or None.

        The score must be the role's own up to one fixed affine map. For a mean of adapters the first of them stands.
        """
        first = self.objectives[0]
        affine = first.combine == "mean" or len(first.members) == 1
        alone = len(self.objectives) == 1 and len(self.roles) == len(first.members)
        return self.roles[0] if affine and alone and normalization != "running" else None

    def score(self, rollout: Rollout) -> None:
        """Fill `rollout.raw_scores`; adapters have been scored with the other roles. Raises InstructLiteError if one is not finite."""
        found = {key: member.score(rollout) for key, member, _ in self.sources}
        waiting = {key: score for key, score in found.items() if inspect.isawaitable(score)}
        found |= dict(zip(waiting, wait_for_all(list(waiting.values())), strict=True))
        for key, source, _ in self.sources:
            raw = found[key].to(rollout.mask.device, torch.float32)
            if raw.shape not in (rollout.mask.shape, (len(rollout),)):
                raise InstructLiteError(
                    f"reward source {key} gave scores of shape {tuple(raw.shape)} for {len(rollout)} responses; "
                    "(batch,) or (batch, length) are right"
                )
            raw = raw if raw.dim() == 1 else raw.masked_fill(~rollout.mask, 0.0)
            broken = ~raw.isfinite() if raw.dim() == 1 else ~raw.isfinite().all(1)
            if broken.any() and not isinstance(source, FunctionReward):  # those have said None, see there
                example = rollout.texts[int(broken.nonzero()[0])]
                raise InstructLiteError(
                    f"reward source {key}: {int(broken.sum())} of {len(rollout)} scores are not finite, first of {example!r}; nothing was "
                    "updated. Check the reward"
                )
            rollout.raw_scores[key] = raw
        _warn_of_unjudged(rollout)

    def update(self, rollout: Rollout, reduce: Reduce) -> None:
        """Let the scales see a training rollout."""
        for key, _, scale in self.sources:
            scale.update(_totals(rollout.raw_scores[key]), reduce)

    def combine(self, rollout: Rollout, reduce: Reduce) -> Scored:
        """Scale, combine, weigh, add up and clip; sets `rollout.scores` to the total. Logs each source before its weight."""
        mask, metrics, spreads = rollout.mask, dict(rollout.logged_metrics), []
        total, judged = torch.zeros(len(rollout), device=mask.device), torch.zeros(len(rollout), dtype=torch.bool, device=mask.device)
        last, tokens = total.clone(), None
        for objective in self.objectives:
            raws = [rollout.raw_scores[key] for key in objective.keys]
            if len(raws) == 1:
                (raw,), (scale,) = raws, objective.scales
                score, inside = scale(_totals(raw)), None
                shown = {objective.name: _totals(raw)}
                at_end = score
                if raw.dim() == 2:
                    inside, at_end = scale.split(raw.nan_to_num(0.0))
            else:
                each = torch.stack([scale(_totals(raw)) for scale, raw in zip(objective.scales, raws, strict=True)])
                score, inside = combine_scores(each, objective.combine, objective.std_weight), None
                at_end = score
                shown = {objective.name: score} | dict(zip(objective.keys, raws, strict=True))
                spreads.append(each.std(0, unbiased=False))
            known = ~score.isnan()
            judged |= known
            total += objective.weight * torch.where(known, score, 0.0)
            last += objective.weight * torch.where(known, at_end, 0.0)
            if inside is not None:
                tokens = objective.weight * inside + (0.0 if tokens is None else tokens)
            for name, values in shown.items():
                known = ~values.isnan()
                metrics[f"rewards/{name}/mean"] = masked_mean(values, known, reduce).item()
                metrics[f"rewards/{name}/std"] = masked_variance(values, known, reduce).sqrt().item()
        if spreads:
            every = torch.ones_like(judged)
            metrics["reward/ensemble_std"] = sum(masked_mean(spread, every, reduce).item() for spread in spreads) / len(spreads)
        # Before the first cycle there is no scale yet, and a bound in its units means nothing.
        bound = torch.inf if self.clip is None or not self.fitted else self.clip
        clipped = total.abs() > bound
        rollout.scores = total.clamp(-bound, bound)
        return Scored(rollout.scores, last + (rollout.scores - total), tokens, judged, clipped, metrics)

    def describe(self) -> dict[str, str]:
        """What must not change between a checkpoint and its resume."""
        return {o.name: f"{o.weight:g} x {o.combine if len(o.members) > 1 else 'one'} of {len(o.members)}" for o in self.objectives}

    def state(self) -> dict[str, dict[str, Any]]:
        return {key: asdict(scale) for key, _, scale in self.sources}

    def restore(self, state: dict[str, dict[str, Any]]) -> None:
        for key, _, scale in self.sources:
            for name, value in state[key].items():
                setattr(scale, name, value)


def combine_scores(scores: Tensor, how: Combine, std_weight: float) -> Tensor:
    """Normalised scores of an ensemble (members, batch) -> (batch,).

    "min" and "mean_minus_std" are the conservative choices of Coste et al. 2023 (arXiv:2310.02743): where the members
    disagree, the reward model is outside of what it was trained on.
    """
    if how == "min":
        return scores.amin(0)
    mean = scores.mean(0)
    return mean if how == "mean" else mean - std_weight * scores.std(0, unbiased=False)


def rewards_of(
    given: Any,
    *,
    extra: Any = None,
    weights: Mapping[str, float] | list[float] | None = None,
    combine: Combine = "mean",
    std_weight: float = 0.5,
    roles: Mapping[str, Adapter | None] | None = None,
) -> Rewards:
    """Rewards from what a user may give.

    given: a reward adapter (its directory; one that RewardRecipe wrote with `ensemble` is an ensemble), the name of a role
    in `roles`, a function, "module:function", "hf:MODEL", {"model": MODEL, ...}, a source; several of them in a list; or
    {name: one of them, or a list as an ensemble}. extra: more of them. weights: by name, or in order; 1 if not given.
    combine and std_weight: of ensembles. roles: those of a RoleModel, with the adapters they were read from.
    """
    if isinstance(given, Rewards):
        return given
    named = [*_named(given, alone=extra is None), *(_named(extra, alone=False) if extra is not None else [])]
    objectives = []
    for name, one in named:
        name, members = _members_of(name, one, roles or {})
        if any(isinstance(member, AdapterReward) for member in members) and (name in TAKEN or not re.fullmatch(r"[\w-]+", name)):
            raise InstructLiteError(f"reward source '{name}': its name may have letters, digits, - and _, and not be {', '.join(TAKEN)}")
        objectives.append(Objective(name, members, combine=combine, std_weight=std_weight))
    rewards = Rewards(objectives)
    _weigh(rewards, weights)
    return rewards


def check_functions(given: Any) -> None:
    """Import the functions that a recipe names, so that a misspelt one is found before hours of training."""
    for _, one in _named(given, alone=False):
        if isinstance(one, str) and not one.startswith("hf:") and not is_adapter(one):
            load_function(one)


def in_words(given: Any) -> Any:
    """What `rewards_of` takes, as JSON: functions as module:function, other objects by their names."""
    if isinstance(given, Mapping):
        return {name: in_words(one) for name, one in given.items()}
    if isinstance(given, (list, tuple)):
        return [in_words(one) for one in given]
    if isinstance(given, (Adapter, Path)):
        return str(given)
    if given is None or isinstance(given, (str, int, float)):
        return given
    return given.name if isinstance(given, RewardSource) else f"{given.__module__}:{get_callable_name(given)}"


def _named(given: Any, alone: bool) -> list[tuple[str | None, Any]]:
    """(name or None, source) pairs. A reward adapter that is the only source is called "reward"."""
    if isinstance(given, Mapping) and "model" not in given:
        return list(given.items())
    if isinstance(given, (list, tuple)):
        return [(None, one) for one in given]
    return [("reward" if alone and is_adapter(given) else None, given)]


def _members_of(name: str | None, given: Any, roles: Mapping[str, Adapter | None]) -> tuple[str, list[RewardSource]]:
    """The name of an objective and its sources: one, or the members of an ensemble."""
    parts = []
    for one in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(one, str) and (one in roles or (roles and one.isidentifier() and not is_adapter(one))):
            parts.append(AdapterReward(one, roles.get(one)))
        elif is_adapter(one) or isinstance(one, Path):
            parts += Adapter.load(one).members
        else:
            parts.append(source_of(one, name))
    if name is None:
        first = parts[0]
        name = re.sub(r"[^\w-]", "-", first.path.absolute().name) if isinstance(first, Adapter) else first.name
    keys = member_names(name, len(parts))
    return name, [AdapterReward(key, part) if isinstance(part, Adapter) else part for key, part in zip(keys, parts, strict=True)]


def _weigh(rewards: Rewards, weights: Mapping[str, float] | list[float] | None) -> None:
    objectives = {objective.name: objective for objective in rewards.objectives}
    if isinstance(weights, (list, tuple)):
        if len(weights) != len(objectives):
            raise InstructLiteError(f"reward_weights: {len(weights)} weights for {len(objectives)} sources ({', '.join(objectives)})")
        weights = dict(zip(objectives, weights, strict=True))
    for name, weight in (weights or {}).items():
        if name not in objectives:
            raise InstructLiteError(f"reward_weights: there is no source {name}; there are {', '.join(objectives)}")
        objectives[name].weight = float(weight)


def _scale(source: RewardSource, normalization: str) -> ScoreScale:
    if normalization == "none":
        return ScoreScale(0.0, 1.0)
    if normalization == "reward_model":
        statistics = source.statistics if isinstance(source, AdapterReward) else None
        if statistics is None:
            raise InstructLiteError(f"score_normalization=reward_model: {source.name} has no score_mean and score_std; use first_rollout")
        return ScoreScale(*statistics)
    return ScoreScale(running=normalization == "running")


def _totals(raw: Tensor) -> Tensor:
    return raw if raw.dim() == 1 else raw.sum(1)


def _warn_of_unjudged(rollout: Rollout) -> None:
    silent = torch.stack([_totals(raw).isnan() for raw in rollout.raw_scores.values()]).all(0).nonzero()[:, 0].tolist()
    if silent:
        row = {name: values[silent[0]] for name, values in rollout.columns.items()}
        shown = {"prompt": rollout.prompts[silent[0]], "completion": rollout.completions[silent[0]]} | row
        warnings.warn(
            f"every reward source returned None for {len(silent)} of {len(rollout)} responses, from which nothing is learned; the first: "
            f"{shown}",
            stacklevel=2,
        )
