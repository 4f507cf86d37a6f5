"""The formulas of InstructGPT's second and third stage as pure tensor functions.

Everything lives on the response grid (batch, length): column t is response token t, `mask` is True up to and including
the last valid token. Papers: PPO (Schulman 2017, arXiv:1707.06347), GAE (1506.02438), RL from preferences with a KL
penalty (Ziegler 2019, 1909.08593; Stiennon 2020, 2009.01325), InstructGPT (Ouyang 2022, 2203.02155).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes; the identity on one


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -beta kl_t + [t = last] score, (batch, length): InstructGPT's eq. 2, per token.

    The score sits ON the last valid token (the action that ended the response); V after it is 0.
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, score[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, backwards over the response: advantages and returns, fp32 (batch, length).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where what follows the last valid token
    counts 0 by the mask, so that nothing in the padding can reach a real token. Returns are A + V.
    """
    mask = mask.float()
    rewards, values = torch.where(mask.bool(), rewards, 0.0).float(), torch.where(mask.bool(), values, 0.0).float()
    advantages = torch.zeros_like(values)
    following = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        next_mask = mask[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_mask * next_value - values[:, t]
        following = delta + gamma * lam * next_mask * following
        advantages[:, t] = following
    advantages = advantages * mask
    return advantages, (advantages + values) * mask


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = lambda t: t) -> Tensor:
    """Mean over the True positions of all processes; 0 if there are none."""
    total, count = reduce(torch.stack([torch.where(mask, x, 0).double().sum(), mask.double().sum()]))
    return (total / count.clamp(min=1)).float()


def masked_variance(x: Tensor, mask: Tensor, reduce: Reduce = lambda t: t) -> Tensor:
    """Population variance, in two passes: E[x^2] - E[x]^2 loses its digits where the mean is large."""
    return masked_mean((x - masked_mean(x, mask, reduce)) ** 2, mask, reduce)


def correlation(x: Tensor, y: Tensor, mask: Tensor, reduce: Reduce = lambda t: t) -> Tensor:
    """Pearson's, over the True positions of all processes; 0 where x or y is constant."""
    dx, dy = x - masked_mean(x, mask, reduce), y - masked_mean(y, mask, reduce)
    spread = (masked_mean(dx**2, mask, reduce) * masked_mean(dy**2, mask, reduce)).sqrt()
    return masked_mean(dx * dy, mask, reduce) / spread if spread > 1e-12 else torch.zeros_like(spread)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Reduce = lambda t: t) -> Tensor:
    """(x - mean) / std over all valid tokens of the rollout batch on all processes; without `shift_mean` only / std.

    If x is constant there is nothing to learn from: the result is then 0 (or x itself without the shift).
    """
    mean, variance = masked_mean(x, mask, reduce), masked_variance(x, mask, reduce)
    if variance < 1e-16:
        return torch.zeros_like(x) if shift_mean else x * mask
    scaled = (x - mean if shift_mean else x) * torch.rsqrt(variance + 1e-8)
    return scaled * mask


def kl_estimators(log_probs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """k1 = d and k3 = exp(-d) - 1 + d with d = log pi - log ref (Schulman, "Approximating KL divergence", 2020).

    Both are unbiased for KL(pi || ref) under samples of pi; k1 can be negative, k3 cannot.
    """
    d = log_probs - reference
    clamped = d.clamp(-20, 20)
    return d, torch.expm1(-clamped) + clamped


def policy_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (eq. 7) per token, to be minimised, and where the clip changed it (bool)."""
    ratio = torch.exp((log_probs - old).clamp(-20, 20))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def importance_weights(log_probs: Tensor, sampled: Tensor, mask: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """min(pi / mu, cap) per token, 1 outside the mask, and where the cap bound (bool).

    pi: the policy that is trained; mu: what the tokens were drawn from, the same weights in another program (other kernels,
    rounding or quantization). Truncated importance sampling (Ionides 2008), token by token as in Yao et al. 2025, "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training", and in TRL's vllm_importance_sampling_mode="token_truncate".
    """
    ratio = torch.exp((log_probs - sampled).clamp(-20, 20))
    return torch.where(mask, ratio.clamp(max=cap), 1.0), mask & (ratio > cap)


def value_losses(values: Tensor, old: Tensor, returns: Tensor, cliprange: float | None) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (V_clipped - R)^2) per token and where the clip bound. None means no clipping."""
    plain = (values - returns) ** 2
    if cliprange is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (values.clamp(old - cliprange, old + cliprange) - returns) ** 2  # where nothing is clipped, exactly the plain one
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int, initial: float) -> float:
    """Ziegler 2019, section 2.2: beta (1 + e n / horizon) with e = clip(kl / target - 1, +-0.2).

    kl and target in nats a sequence, n episodes of the cycle over all processes; kept within a factor 100 of the start.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return min(max(kl_coef * (1 + error * episodes / horizon), initial / 100), initial * 100)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = lambda t: t) -> Tensor:
    """1 - Var(R - V) / Var(R) over valid tokens; 0 says the critic is no better than a constant."""
    return 1 - masked_variance(returns - values, mask, reduce) / masked_variance(returns, mask, reduce).clamp(min=1e-12)


def ordered(groups: Tensor, ranks: Tensor) -> Tensor:
    """(answers, answers): whether the row's answer is better than the column's, to the same prompt. NaN has no rank."""
    return (groups[:, None] == groups) & (ranks[:, None] < ranks)


def ranking_loss(
    scores: Tensor, groups: Tensor, ranks: Tensor, center_coefficient: float = 0.0, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """InstructGPT's reward loss (eq. 1) and the share of pairs ordered rightly.

    scores, groups, ranks: (answers,); answers of one prompt share a group number, a lower rank is better, ties make no
    pair. Per group -1/n_pairs * sum log sigmoid(s_better - s_worse), then the mean over groups that have a pair: every
    prompt counts once, however many answers it has. center_coefficient adds the mean of (s_better + s_worse)^2 in the
    same weighting (Eisenstein 2023, arXiv:2312.09244). known: (answers,), a bias that is added to the scores in the first term
    only, so that they need not learn it.
    """
    better, worse = ordered(groups, ranks).nonzero(as_tuple=True)
    if len(better) == 0:
        return scores.sum() * 0, scores.new_zeros(())
    _, group_of, pairs = torch.unique(groups[better], return_inverse=True, return_counts=True)
    weight = 1 / (pairs[group_of] * len(pairs))
    margin = scores[better] - scores[worse]
    explained = 0.0 if known is None else known[better] - known[worse]
    loss = -(weight * logsigmoid(margin + explained)).sum()
    if center_coefficient:
        loss = loss + center_coefficient * (weight * (scores[better] + scores[worse]) ** 2).sum()
    return loss, (margin > 0).float().mean()
