"""One rollout: sample responses, score them by every role, and turn scores into advantages.

Prompts are padded on the left, responses on the right, to one width for the whole cycle: the same rows at the same width
give bit-equal log-probabilities in scoring and training (on a CPU). No (batch, length, vocabulary) tensor is ever kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..models.logprobs import token_log_probs
from ..models.roles import ResponseBatch, RoleModel
from ..models.sampling import Sampling, generate, left_pad
from .ppo_math import Reduce, explained_variance, gae, kl_estimators, masked_mean, masked_variance, token_rewards, whiten
from .reward_sources import RewardSource, ScoreScale


@dataclass
class Rollout:
    """Responses of one rollout batch. Grids are (batch, response length); `mask` is True up to the last valid token.

    lower: hidden states behind the shared lower layers (batch, prompt + response, hidden), or None. `scores` are raw.
    """

    rows: list[dict[str, Any]]
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    ended: Tensor
    lower: Tensor | None = None
    logps: Tensor | None = None
    reference_logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def responses(self) -> Tensor:
        """(batch, response length) token ids."""
        return self.input_ids[:, -self.mask.shape[1] :]

    def take(self, rows: Tensor) -> Rollout:
        """The rollout of some rows, at the same width."""
        picked = {}
        for field in fields(self):
            value = getattr(self, field.name)
            picked[field.name] = value[rows.to(value.device)] if isinstance(value, Tensor) else value
        picked["rows"] = [self.rows[i] for i in rows.tolist()] if self.rows else []
        return Rollout(**picked)

    def batch(self, temperature: float, chunk: int, entropy_grad: bool = False) -> ResponseBatch:
        return ResponseBatch(
            self.input_ids, self.attention_mask, self.mask, self.lower, temperature=temperature, chunk=chunk, entropy_grad=entropy_grad
        )


@dataclass
class RolloutOptions:
    """What `collect` needs to know of PPOConfig, with the stop tokens resolved."""

    sampling: Sampling
    stop_ids: list[int]
    generation_batch_size: int
    scoring_batch_size: int
    logp_chunk_size: int
    share_lower_layers: bool


def collect(
    model: RoleModel, rows: list[dict[str, Any]], reward: RewardSource | str, options: RolloutOptions, *, seed: int
) -> tuple[Rollout, dict[str, float]]:
    """Sample one response a prompt and score it by policy, reference, value and reward.

    rows: data set rows with `prompt_ids`. reward: a role with a head, or a source of scores. Returns the rollout (no
    advantages yet) and seconds per phase. The model's train/eval mode and the caller's random state are restored.
    """
    # 1. Sample
    start = time.perf_counter()
    prompts = [row["prompt_ids"] for row in rows]
    responses = generate(
        model, prompts, "policy", options.sampling, stop_ids=options.stop_ids, seed=seed, batch_size=options.generation_batch_size
    )
    rollout = _grid(model, rows, prompts, responses, options.stop_ids)
    sampled = time.perf_counter()

    # 2. Score by every role
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _score_by_roles(model, rollout, reward, options)
    finally:
        model.train(training)
    seconds = {"rollout/time_generate": sampled - start, "rollout/time_score": time.perf_counter() - sampled}
    return rollout, seconds


def _grid(
    model: RoleModel, rows: list[dict[str, Any]], prompts: list[list[int]], responses: list[list[int]], stop_ids: list[int]
) -> Rollout:
    ids, attention = left_pad(prompts, model.base.pad_id, model.device)
    width = max(map(len, responses))
    answer = torch.full((len(rows), width), model.base.pad_id)
    lengths = torch.tensor([len(response) for response in responses])
    for i, response in enumerate(responses):
        answer[i, : len(response)] = torch.tensor(response)
    mask = torch.arange(width)[None] < lengths[:, None]  # from generation, never from `ids != pad`
    ended = torch.tensor([response[-1] in stop_ids for response in responses])
    device = model.device
    return Rollout(
        rows=rows,
        input_ids=torch.cat([ids, answer.to(device)], 1),
        attention_mask=torch.cat([attention, mask.to(device, attention.dtype)], 1),
        mask=mask.to(device),
        ended=ended.to(device),
    )


def _score_by_roles(model: RoleModel, rollout: Rollout, reward: RewardSource | str, options: RolloutOptions) -> None:
    grid = torch.zeros(rollout.mask.shape, device=model.device)
    rollout.logps, rollout.reference_logps, rollout.entropy, rollout.values = (grid.clone() for _ in range(4))
    scores = torch.zeros(len(rollout), device=model.device)
    lower = []
    for part, low in _parts(model, rollout, options):
        micro = rollout.take(part)
        micro.lower = low
        lower.append(low)
        states = slice(micro.input_ids.shape[1] - micro.mask.shape[1] - 1, -1)
        # The reference is a role of its own, or the base alone where there was no SFT adapter.
        roles: list[str | None] = ["policy", "reference" if "reference" in model.roles else None, "value"]
        for role in [*roles, reward] if isinstance(reward, str) else roles:
            with model.precision(), model.active(role):
                hidden = model.hidden(micro.input_ids, micro.attention_mask, low)
                if role in ("policy", "reference", None):
                    logps, entropy = token_log_probs(
                        model.logits, hidden[:, states][micro.mask], micro.responses[micro.mask],
                        temperature=options.sampling.temperature, chunk=options.logp_chunk_size,
                    )  # fmt: skip
            if role == "policy":
                rollout.logps[part] = _spread(logps, micro.mask)
                rollout.entropy[part] = _spread(entropy, micro.mask)
            elif role in ("reference", None):
                rollout.reference_logps[part] = _spread(logps, micro.mask)
            elif role == "value":
                rollout.values[part] = model.scores("value", hidden[:, states]) * micro.mask
            else:
                last = states.start + micro.mask.sum(1)  # the column of the last valid token
                scores[part] = model.scores(role, hidden[torch.arange(len(last)), last])
    rollout.lower = torch.cat(lower) if lower[0] is not None else None
    rollout.scores = scores if isinstance(reward, str) else reward(rollout).to(model.device, torch.float32)


def _parts(model: RoleModel, rollout: Rollout, options: RolloutOptions) -> Iterator[tuple[Tensor, Tensor | None]]:
    for part in torch.arange(len(rollout)).split(options.scoring_batch_size):
        with model.precision():
            share = options.share_lower_layers
            yield part, model.lower_hidden(rollout.input_ids[part], rollout.attention_mask[part]) if share else None


def _spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Flat values of the valid tokens back onto the grid, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def assign_advantages(
    rollout: Rollout,
    scale: ScoreScale,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    missing_eos_penalty: float | None,
    whiten_rewards: bool,
    reduce: Reduce,
) -> dict[str, float]:
    """Rewards, advantages (whitened over all processes) and returns; fills the rollout, gives TRL's metrics."""
    mask = rollout.mask
    scaled, clipped = scale(rollout.scores)
    score = scaled - (missing_eos_penalty or 0.0) * ~rollout.ended
    k1, k3 = kl_estimators(rollout.logps, rollout.reference_logps)
    rewards = token_rewards(score, k1, mask, kl_coef)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, reduce=reduce)
    advantages, rollout.returns = gae(rewards, rollout.values, mask, gamma, lam)
    rollout.advantages = whiten(advantages, mask, reduce=reduce)

    each = torch.ones_like(score, dtype=torch.bool)
    per_episode = {
        "objective/score": score,
        "objective/score_clipped_frac": clipped.float(),
        "objective/rlhf_reward": (rewards * mask).sum(1),
        "objective/kl": (k1 * mask).sum(1),
        "objective/non_score_reward": -kl_coef * (k1 * mask).sum(1),
        "rewards/reward/mean": rollout.scores,
        "rollout/length_mean": mask.sum(1).float(),
        "rollout/eos_missing_frac": (~rollout.ended).float(),
    }
    per_token = {
        "objective/kl_k3": k3,
        "objective/entropy": rollout.entropy,
        "value/mean": rollout.values,
        "value/return_mean": rollout.returns,
    }
    metrics = {name: masked_mean(x, each, reduce) for name, x in per_episode.items()}
    metrics |= {name: masked_mean(x, mask, reduce) for name, x in per_token.items()}
    metrics |= {
        "objective/score_std": masked_variance(score, each, reduce).sqrt(),
        "rewards/reward/std": masked_variance(rollout.scores, each, reduce).sqrt(),
        "value/explained_variance": explained_variance(rollout.values, rollout.returns, mask, reduce),
        "objective/advantage_std_raw": masked_variance(advantages, mask, reduce).sqrt(),
        "rollout/padding_fraction": 1 - masked_mean(mask.float(), torch.ones_like(mask), reduce),
    }
    return {name: value.item() for name, value in metrics.items()} | {
        "objective/kl_coef": kl_coef,
        "rollout/length_max": float(mask.shape[1]),
    }
