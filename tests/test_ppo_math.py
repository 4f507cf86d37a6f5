"""Known values and invariances of the formulas (T-1, T-2, T-3 of the PPO design, and whitening)."""

import pytest
import torch
from torch.testing import assert_close

from instructlite.training.ppo_math import (
    adapted_kl_coef,
    explained_variance,
    gae,
    kl_estimators,
    masked_mean,
    policy_losses,
    token_rewards,
    value_losses,
    whiten,
)

V, R = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[-0.1, -0.2, 1.0]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_t1_gae_by_hand():
    advantages, returns = gae(R, V, ALL, gamma=1.0, lam=0.95)
    assert_close(advantages, torch.tensor([[0.14675, 0.365, 0.7]]), atol=1e-6, rtol=0)
    assert_close(returns, torch.tensor([[0.64675, 0.765, 1.0]]), atol=1e-6, rtol=0)
    assert_close(gae(R, V, ALL, gamma=0.9, lam=0.8)[0], torch.tensor([[-0.11472, 0.174, 0.7]]), atol=1e-6, rtol=0)


def test_t1_gae_limits():
    assert_close(gae(R, V, ALL, 1.0, 0.0)[0], torch.tensor([[-0.2, -0.3, 0.7]]))  # lambda 0: delta
    assert_close(gae(R, V, ALL, 1.0, 1.0)[0], torch.tensor([[0.7, 0.8, 1.0]]) - V)  # lambda 1: reward to go - V
    assert_close(gae(R[:, :1], V[:, :1], ALL[:, :1], 1.0, 0.95)[0], R[:, :1] - V[:, :1])  # one token: r - V


@pytest.mark.parametrize("length", [1, 3, 5])
def test_t2_the_score_sits_on_the_last_valid_token_once(length):
    mask = torch.arange(5)[None] < length
    kl = torch.randn(1, 5, generator=torch.Generator().manual_seed(length))
    rewards = token_rewards(torch.tensor([2.5]), kl, mask, kl_coef=0.1)
    with_kl_back = rewards + 0.1 * kl * mask
    assert_close(with_kl_back[0, length - 1].item(), 2.5)
    assert_close((with_kl_back.sum()).item(), 2.5)
    assert (rewards[0, length:] == 0).all()


def test_t3_what_stands_in_the_padding_changes_nothing():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(6)[None] < torch.tensor([[2], [6], [1]])
    clean = [torch.randn(3, 6, generator=g) for _ in range(4)]
    dirty = [torch.where(mask, x, 1e6) for x in clean]

    def everything(rewards, values, logps, old):
        rewards = rewards.clone().requires_grad_()
        advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
        white = whiten(advantages, mask)
        logps = logps.clone().requires_grad_()
        loss = policy_losses(logps[mask], old[mask], white[mask].detach(), 0.2)[0].sum()
        loss = loss + value_losses(values[mask], values[mask] + 0.1, returns[mask], 0.2)[0].sum()
        loss.backward()
        return advantages.detach(), returns.detach() * mask, white.detach(), loss.detach(), logps.grad

    for a, b in zip(everything(*clean), everything(*dirty), strict=True):
        assert torch.equal(a, b)


def test_whitened_advantages_have_mean_0_and_variance_1_over_valid_tokens():
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(64, 32, generator=g) < 0.6
    x = 1000 + 3 * torch.randn(64, 32, generator=g)
    white = whiten(x, mask)
    assert abs(white[mask].mean()) < 1e-4 and abs(white[mask].std(correction=0) - 1) < 1e-4
    assert (white[~mask] == 0).all()


def test_whitening_constant_values_gives_zeros_and_no_nan():
    assert (whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)) == 0).all()


def test_k3_is_never_negative_and_both_estimators_agree_in_the_mean():
    g = torch.Generator().manual_seed(2)
    p, q = (torch.log_softmax(torch.randn(20, generator=g), -1) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    samples = torch.multinomial(p.exp(), 200_000, replacement=True, generator=g)
    k1, k3 = kl_estimators(p[samples], q[samples])
    assert (k3 >= 0).all() and (k1 < 0).any()
    assert_close(k1.mean(), exact, atol=0.02, rtol=0)
    assert_close(k3.mean(), exact, atol=0.02, rtol=0)


def test_the_policy_loss_stops_pushing_outside_the_clip_range():
    old = torch.zeros(4)
    logps = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5])).requires_grad_()
    loss, clipped = policy_losses(logps, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2)
    loss.sum().backward()
    assert clipped.tolist() == [True, False, False, True]
    assert (logps.grad[clipped] == 0).all() and (logps.grad[~clipped] != 0).all()
    assert_close(loss.detach(), torch.tensor([-1.2, -0.5, 1.5, 0.8]))


def test_the_value_loss_takes_the_worse_of_clipped_and_plain():
    loss, clipped = value_losses(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    assert_close(loss, torch.tensor([0.5 * 0.8**2]))
    assert clipped.item()
    assert value_losses(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), None)[0].item() == 0


def test_explained_variance_of_a_constant_critic_is_0_and_of_a_perfect_one_1():
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    assert_close(explained_variance(torch.zeros(1, 3), returns, ALL).item(), 0.0)
    assert_close(explained_variance(returns, returns, ALL).item(), 1.0)


def test_masked_mean_adds_up_over_processes():
    """Two processes with unequal numbers of tokens get the mean over all tokens, not the mean of their means."""
    x, mask = torch.tensor([[1.0, 2.0, 3.0]]), ALL
    other = torch.tensor([10.0, 1.0], dtype=torch.float64)  # what the other process contributes: sum 10 over 1 token
    assert masked_mean(x, mask, lambda mine: mine + other).item() == 4.0


def test_t21_the_kl_coefficient_follows_zieglers_controller():
    adapt = lambda kl, beta=0.1: adapted_kl_coef(beta, kl, target=6.0, horizon=10_000, episodes=64, initial=0.1)  # noqa: E731
    assert adapt(12.0) == 0.1 * (1 + 0.2 * 64 / 10_000)
    assert adapt(3.0) == 0.1 * (1 - 0.2 * 64 / 10_000)
    assert adapt(6.0) == 0.1
    assert adapt(6.6) == 0.1 * (1 + (6.6 / 6 - 1) * 64 / 10_000)
    assert adapt(1e9, beta=10.0) == 10.0 and adapt(0.0, beta=0.001) == 0.001
