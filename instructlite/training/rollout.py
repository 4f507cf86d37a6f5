"""One rollout: sample responses, score them by every role, and turn scores into advantages.

Prompts are padded on the left, responses on the right, to one width for the whole cycle: the same rows at the same width
give bit-equal log-probabilities in scoring and training (on a CPU). No (batch, length, vocabulary) tensor is ever kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.logprobs import token_log_probs
from ..models.roles import ResponseBatch, RoleModel
from ..models.sampling import Sampling, generate, left_pad
from .ppo_math import (
    Reduce,
    correlation,
    explained_variance,
    gae,
    importance_weights,
    kl_estimators,
    masked_mean,
    masked_variance,
    token_rewards,
    whiten,
)
from .rewards import Rewards


@dataclass
class Rollout:
    """Responses of one rollout batch. Grids are (batch, response length); `mask` is True up to the last valid token.

    lower: hidden states behind the shared lower layers (batch, prompt + response, hidden), or None. sampled_logps: of the
    sampler, where that is another program than the policy; weights: what the policy's loss of each token is multiplied by for
    it. role_scores: raw ones of each reward role, (batch,). raw_scores: of each source, (batch,) or (batch, length). scores:
    what came of them on PPO's scale, before penalties (batch,). reward_states: what the (first) reward head read (batch,
    hidden), and watch_scores: of the role `watch`; for health.py, then dropped. Reward functions get prompts and responses
    as TRL gives them.
    """

    rows: list[dict[str, Any]]
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    ended: Tensor
    lower: Tensor | None = None
    logps: Tensor | None = None
    sampled_logps: Tensor | None = None
    weights: Tensor | None = None
    reference_logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    reward_states: Tensor | None = None
    watch_scores: Tensor | None = None
    role_scores: dict[str, Tensor] = field(default_factory=dict)
    raw_scores: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    trainer_state: Any = None
    logged_metrics: dict[str, float] = field(default_factory=dict)
    """What reward functions gave to `log_metric`."""
    logged_columns: dict[str, list] = field(default_factory=dict)
    """What reward functions gave to `log_extra`; callbacks find it in `trainer.rollout`."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def responses(self) -> Tensor:
        """(batch, response length) token ids."""
        return self.input_ids[:, -self.mask.shape[1] :]

    # --- as reward functions see it: TRL's names and forms (trl 1.16, rloo_trainer.py, `_generate`, `_calculate_rewards`) ---

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @cached_property
    def prompts(self) -> list[Any]:
        """Messages or text, as in the data set; of rows with token ids only, their text."""
        return [row["prompt"] if "prompt" in row else self.decode(row["prompt_ids"]) for row in self.rows]

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        return [ids[mask].tolist() for ids, mask in zip(self.responses, self.mask, strict=True)]

    @cached_property
    def texts(self) -> list[str]:
        return [self.decode(ids) for ids in self.completion_ids]

    @property
    def completions(self) -> list[Any]:
        """Text, or one assistant message each where prompts are messages."""
        return self.texts if isinstance(self.prompts[0], str) else [[{"role": "assistant", "content": text}] for text in self.texts]

    @property
    def columns(self) -> dict[str, list]:
        """The other columns of the data set; None where a row lacks one."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        own = ("prompt", "completion", "completion_ids", "prompt_ids")
        return {name: [row.get(name) for row in self.rows] for name in names if name not in own}

    def log_metric(self, name: str, value: float) -> None:
        self.logged_metrics[name] = float(value)

    def log_extra(self, column: str, values: list) -> None:
        self.logged_columns.setdefault(column, []).extend(values)

    # --- parts of it ----------------------------------------------------------------------------------------------------

    def take(self, rows: Tensor) -> Rollout:
        """The rollout of some rows, at the same width; without what only scoring needs."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        tensors = {name: value[rows.to(value.device)] for name, value in values.items() if isinstance(value, Tensor)}
        return Rollout(rows=[self.rows[i] for i in rows.tolist()] if self.rows else [], **tensors)

    def batch(self, temperature: float, chunk: int, entropy_grad: bool = False) -> ResponseBatch:
        return ResponseBatch(
            self.input_ids, self.attention_mask, self.mask, self.lower, temperature=temperature, chunk=chunk, entropy_grad=entropy_grad
        )


@dataclass
class Answers:
    """Token ids up to and including the stop token; log_probs: what each token had for the sampler, None where that is the policy."""

    ids: list[list[int]]
    log_probs: list[list[float]] | None = None


class Sampler(Protocol):
    """Whoever writes the answers of the role `policy`; the same seed gives the same answers for the same prompts."""

    def sample(self, model: RoleModel, prompts: list[list[int]], sampling: Sampling, stop_ids: list[int], seed: int) -> Answers: ...


@dataclass
class HFSampler:
    """The model in memory itself, by transformers."""

    batch_size: int

    def sample(self, model: RoleModel, prompts: list[list[int]], sampling: Sampling, stop_ids: list[int], seed: int) -> Answers:
        return Answers(generate(model, prompts, "policy", sampling, stop_ids=stop_ids, seed=seed, batch_size=self.batch_size))


@dataclass
class RolloutOptions:
    """What `collect` needs to know of PPOConfig, with the stop tokens resolved."""

    sampling: Sampling
    stop_ids: list[int]
    sampler: Sampler
    scoring_batch_size: int
    logp_chunk_size: int
    share_lower_layers: bool


def collect(
    model: RoleModel, rows: list[dict[str, Any]], rewards: Rewards, options: RolloutOptions, *, seed: int, trainer_state: Any = None
) -> tuple[Rollout, dict[str, float]]:
    """Sample one response a prompt and score it by policy, reference, value and the sources of reward.

    rows: data set rows with `prompt_ids`. trainer_state: for reward functions. Returns the rollout (raw scores, no
    advantages yet) and seconds per phase. The model's train/eval mode and the caller's random state are restored.
    """
    # 1. Sample
    start = time.perf_counter()
    prompts = [row["prompt_ids"] for row in rows]
    answers = options.sampler.sample(model, prompts, options.sampling, options.stop_ids, seed)
    rollout = _grid(model, rows, prompts, answers.ids, options.stop_ids)
    if answers.log_probs is not None:
        flat = torch.tensor([value for row in answers.log_probs for value in row], device=model.device)
        rollout.sampled_logps = _spread(flat, rollout.mask)
    rollout.tokenizer, rollout.trainer_state = model.base.tokenizer, trainer_state
    sampled = time.perf_counter()

    # 2. Score by every role and source
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _score_by_roles(model, rollout, rewards.roles, options)
            rewards.score(rollout)
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


def _score_by_roles(model: RoleModel, rollout: Rollout, reward_roles: list[str], options: RolloutOptions) -> None:
    grid = torch.zeros(rollout.mask.shape, device=model.device)
    rollout.logps, rollout.reference_logps, rollout.entropy, rollout.values = (grid.clone() for _ in range(4))
    scored = [*reward_roles, *(["watch"] if "watch" in model.roles else [])]
    rollout.role_scores = {role: torch.zeros(len(rollout), device=model.device) for role in scored}
    lower, states_of_reward = [], []
    for part, low in _parts(model, rollout, options):
        micro = rollout.take(part)
        micro.lower = low
        lower.append(low)
        states = slice(micro.input_ids.shape[1] - micro.mask.shape[1] - 1, -1)
        # The reference is a role of its own, or the base alone where there was no SFT adapter.
        roles: list[str | None] = ["policy", "reference" if "reference" in model.roles else None, "value"]
        for role in [*roles, *scored]:
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
                ending = hidden[torch.arange(len(last)), last]
                rollout.role_scores[role][part] = model.scores(role, ending)
                if reward_roles and role == reward_roles[0]:
                    states_of_reward.append(ending.float())
    rollout.lower = torch.cat(lower) if lower[0] is not None else None
    rollout.reward_states = torch.cat(states_of_reward) if states_of_reward else None
    rollout.watch_scores = rollout.role_scores.pop("watch", None)


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
    rewards: Rewards,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    missing_eos_penalty: float | None,
    whiten_rewards: bool,
    importance_cap: float | None = None,
    reduce: Reduce,
    gather: Callable[[list], list] = lambda rows: rows,
) -> dict[str, float]:
    """Rewards, advantages (whitened over all processes) and returns; fills the rollout, gives TRL's metrics.

    importance_cap: of the weights that make up for a sampler that is not quite the policy; None: none are made.
    reduce, gather: the sum of a tensor, and the items of a list, over all processes.
    """
    mask = rollout.mask
    scored = rewards.combine(rollout, reduce)
    penalty = (missing_eos_penalty or 0.0) * ~rollout.ended
    k1, k3 = kl_estimators(rollout.logps, rollout.reference_logps)
    per_token = token_rewards(scored.last - penalty, k1, mask, kl_coef)
    if scored.tokens is not None:
        per_token = per_token + scored.tokens
    # A response that no source judged teaches nothing: advantage 0, and as return what the critic says already.
    learned = mask & scored.judged[:, None]
    if whiten_rewards:
        per_token = whiten(per_token, learned, shift_mean=False, reduce=reduce)
    advantages, returns = gae(per_token, rollout.values, mask, gamma, lam)
    rollout.returns = torch.where(learned, returns, rollout.values)
    rollout.advantages = whiten(advantages, learned, reduce=reduce)

    score, each = scored.total - penalty, torch.ones_like(scored.judged)
    per_judged = {
        "objective/score": score,
        "objective/score_clipped_frac": scored.clipped.float(),
        "objective/rlhf_reward": (per_token * mask).sum(1),
    }
    per_episode = {
        "objective/kl": (k1 * mask).sum(1),
        "objective/non_score_reward": -kl_coef * (k1 * mask).sum(1),
        "rollout/length_mean": mask.sum(1).float(),
        "rollout/eos_missing_frac": (~rollout.ended).float(),
    }
    of_tokens = {
        "objective/kl_k3": k3,
        "objective/entropy": rollout.entropy,
        "value/mean": rollout.values,
        "value/return_mean": rollout.returns,
        # 0 on average if the tokens were drawn from the distribution that is scored: E[-log pi] is its entropy.
        "rollout/surprisal_gap": -rollout.logps - rollout.entropy,
    }
    metrics = {name: masked_mean(x, scored.judged, reduce) for name, x in per_judged.items()}
    metrics |= {name: masked_mean(x, each, reduce) for name, x in per_episode.items()}
    metrics |= {name: masked_mean(x, mask, reduce) for name, x in of_tokens.items()}
    gap = of_tokens["rollout/surprisal_gap"]
    # Where no rare token was drawn the spread of the gap is too small; for a rare one it is at least the entropy.
    spread = torch.maximum(masked_variance(gap, mask, reduce), metrics["objective/entropy"])
    answers = gather([hash(tuple(row[valid].tolist())) for row, valid in zip(rollout.responses, mask, strict=True)])
    metrics |= {
        "rollout/surprisal_gap_z": metrics["rollout/surprisal_gap"] * (reduce(mask.sum()) / spread.clamp(min=1e-12)).sqrt(),
        "rollout/score_length_corr": correlation(rollout.scores, mask.sum(1).float(), scored.judged, reduce),
        "objective/score_std": masked_variance(score, scored.judged, reduce).sqrt(),
        "value/explained_variance": explained_variance(rollout.values, rollout.returns, mask, reduce),
        "objective/advantage_std_raw": masked_variance(advantages, learned, reduce).sqrt(),
        "rollout/padding_fraction": 1 - masked_mean(mask.float(), torch.ones_like(mask), reduce),
    }
    metrics |= _weigh(rollout, importance_cap, reduce)
    return (
        {name: value.item() for name, value in metrics.items()}
        | scored.metrics
        | {
            "objective/kl_coef": kl_coef,
            "rollout/unique_frac": len(set(answers)) / len(answers),
            "rollout/length_max": float(mask.shape[1]),
        }
    )


def _weigh(rollout: Rollout, cap: float | None, reduce: Reduce) -> dict[str, Tensor]:
    """Fill the weights of a rollout that another program sampled, and say how far that was from the policy."""
    if rollout.sampled_logps is None:
        return {}
    gap = torch.where(rollout.mask, rollout.logps - rollout.sampled_logps, 0)
    metrics = {"rollout/sampler_logp_gap": masked_mean(gap.abs(), rollout.mask, reduce)}
    if cap is None:
        return metrics
    rollout.weights, capped = importance_weights(rollout.logps, rollout.sampled_logps, rollout.mask, cap)
    return metrics | {
        "rollout/importance_mean": masked_mean(rollout.weights, rollout.mask, reduce),
        "rollout/importance_capped_frac": masked_mean(capped.float(), rollout.mask, reduce),
    }
