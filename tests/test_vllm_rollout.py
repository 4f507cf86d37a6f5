"""Rollouts by vLLM: against a stand-in that follows its types (vllm_standin.py), and, marked `gpu`, against vLLM itself."""

import importlib.util

import pytest
import torch
import vllm_standin
from test_ppo_trainer import config, roles, trainer_of
from torch.testing import assert_close

from instructlite.errors import InstructLiteError
from instructlite.models.sampling import Sampling, log_probs
from instructlite.training.ppo_config import PPOConfig
from instructlite.training.ppo_math import importance_weights
from instructlite.training.vllm_rollout import Server, VLLMSampler, served_rank, vllm_sampler

SAMPLING = Sampling(6)


def by_vllm(tmp_path, **changes) -> PPOConfig:
    return config(tmp_path, **({"rollout_engine": "vllm", "response_length": 6} | changes))


def prompts_of(model) -> list[list[int]]:
    return [model.base.encode_prompt(text) for text in ("why", "a b c", "tell me")]


def test_the_answers_are_the_policys_and_their_log_probabilities_too(tiny_base, tmp_path, monkeypatch):
    made = vllm_standin.install(monkeypatch)
    model = roles(tiny_base)
    sampler = vllm_sampler(model, by_vllm(tmp_path, seed=5), context=99)
    prompts = prompts_of(model)
    answers = sampler.sample(model, prompts, SAMPLING, model.base.stop_ids, seed=1)
    ours = log_probs(model, ["policy"], list(zip(prompts, answers.ids, strict=True)))[0]
    for logps, own in zip(answers.log_probs, ours, strict=True):
        assert_close(torch.tensor(logps), own, atol=1e-4, rtol=0)
    again = sampler.sample(model, prompts, SAMPLING, model.base.stop_ids, seed=1)
    assert again.ids == answers.ids != sampler.sample(model, prompts, SAMPLING, model.base.stop_ids, seed=2).ids
    llm = made[0]
    assert (llm.max_lora_rank, llm.max_model_len, llm.seed, llm.logprobs_mode) == (8, 99, 5, "processed_logprobs")


def test_every_cycle_has_the_adapter_as_it_is_then(tiny_base, tmp_path, monkeypatch):
    made = vllm_standin.install(monkeypatch)
    trainer = trainer_of(roles(tiny_base), by_vllm(tmp_path, max_steps=8, learning_rate=1e-2, num_ppo_epochs=1, num_mini_batches=2))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/score" in log]
    requests = made[0].requests
    assert len(requests) == len(logs) == 4
    assert len({request.lora_int_id for request in requests}) == len({request.lora_name for request in requests}) == 4
    for log in logs:  # an adapter of the cycle before would be far from the policy by now
        assert log["rollout/sampler_logp_gap"] < 1e-4
        assert log["rollout/importance_mean"] == pytest.approx(1, abs=1e-4)
        assert log["objective/kl"] == pytest.approx(0, abs=1e-4) or log is not logs[0]


def test_a_sampler_that_is_not_quite_the_policy_is_made_up_for_and_the_weights_are_capped(tiny_base, tmp_path, monkeypatch):
    vllm_standin.install(monkeypatch, skew=0.5)
    trainer = trainer_of(roles(tiny_base), by_vllm(tmp_path, vllm_importance_sampling_clip_max=1.05))
    batch = trainer._collect(trainer.train_dataset[:4], 0)
    ratio = torch.exp(batch.logps - batch.sampled_logps)
    assert ratio[batch.mask].max() > 1.05 > ratio[batch.mask].min()
    assert_close(batch.weights, torch.where(batch.mask, ratio.clamp(max=1.05), 1.0))
    assert 0 < trainer._metrics.means()["rollout/importance_capped_frac"] < 1
    assert torch.equal(batch.take(torch.tensor([2])).weights, batch.weights[2:3])


def test_the_weights_are_in_the_policys_loss_and_not_in_the_values(tiny_base, tmp_path, monkeypatch):
    vllm_standin.install(monkeypatch)
    model = roles(tiny_base)
    trainer = trainer_of(model, by_vllm(tmp_path, num_ppo_epochs=1, num_mini_batches=1, entropy_coef=0))
    batch = trainer._collect(trainer.train_dataset[:2], 0)

    def gradients(weights: torch.Tensor) -> dict[str, float]:
        model.zero_grad()
        batch.weights = weights
        trainer._micro, trainer._first_step, trainer._tokens = batch, True, batch.mask.sum()
        trainer.compute_loss(model, {}).backward()
        parts = {role: model.role_parameters(role) for role in ("policy", "value")}
        return {role: float(sum(p.grad.abs().sum() for p in parameters if p.grad is not None)) for role, parameters in parts.items()}

    one, none = gradients(torch.ones_like(batch.weights)), gradients(torch.zeros_like(batch.weights))
    assert one["policy"] > 0 == none["policy"]
    assert one["value"] == pytest.approx(none["value"])
    assert one["value"] > 0


def test_importance_weights_turn_an_average_over_the_sampler_into_one_over_the_policy():
    torch.manual_seed(0)
    policy, sampler, value = torch.randn(7).log_softmax(0), torch.randn(7).log_softmax(0), torch.randn(7)
    weights, capped = importance_weights(policy, sampler, torch.ones(7, dtype=torch.bool), cap=1e6)
    assert_close((sampler.exp() * weights * value).sum(), (policy.exp() * value).sum())
    assert not capped.any()


def test_no_weights_are_made_where_none_are_wanted(tiny_base, tmp_path, monkeypatch):
    vllm_standin.install(monkeypatch, skew=0.5)
    trainer = trainer_of(roles(tiny_base), by_vllm(tmp_path, vllm_importance_sampling_clip_max=None))
    assert trainer._collect(trainer.train_dataset[:4], 0).weights is None
    assert trainer._metrics.means()["rollout/sampler_logp_gap"] > 0.01


def test_a_server_answers_as_the_colocated_one_does(tiny_base, tiny_path, tmp_path, monkeypatch):
    vllm_standin.install(monkeypatch)
    model = roles(tiny_base)
    here = vllm_sampler(model, by_vllm(tmp_path), context=99).sample(model, prompts_of(model), SAMPLING, model.base.stop_ids, seed=1)
    with vllm_standin.serving(str(tiny_path), key="sesame") as (url, asked, loaded):
        monkeypatch.setenv("VLLM_API_KEY", "sesame")
        sampler = vllm_sampler(model, by_vllm(tmp_path, vllm_mode="server", vllm_server_base_url=f"{url}/v1"), context=99)
        there = sampler.sample(model, prompts_of(model), SAMPLING, model.base.stop_ids, seed=1)
    assert there == here
    assert asked == ["load_lora_adapter", *["completions"] * 3, "unload_lora_adapter"]
    assert not loaded


def test_a_server_that_fails_is_said_in_one_line_and_what_was_trained_is_saved(tiny_base, tiny_path, tmp_path):
    model = roles(tiny_base)
    with vllm_standin.serving(str(tiny_path), key="sesame") as (url, _, _), pytest.raises(InstructLiteError, match="401"):
        VLLMSampler(Server(url, "wrong")).sample(model, prompts_of(model), SAMPLING, [2], seed=1)
    with pytest.raises(InstructLiteError, match="no vLLM server is to be reached"):
        VLLMSampler(Server(url)).sample(model, prompts_of(model), SAMPLING, [2], seed=1)
    with vllm_standin.serving(str(tiny_path)) as (url, _, _):
        args = by_vllm(tmp_path, vllm_mode="server", vllm_server_base_url=url, max_steps=8)
        trainer = trainer_of(model, args)
        engine, calls = trainer._options.sampler.engine, []

        def once(*given):  # the first rollout, and then none
            engine.url = engine.url if not calls else "http://127.0.0.1:9"
            calls.append(given)
            return Server.complete(engine, *given)

        engine.complete = once
        with pytest.raises(InstructLiteError, match="step 4: .*The state before it is saved: checkpoint-4"):
            trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_colocated_engine_sleeps_between_rollouts(tiny_base, tmp_path, monkeypatch):
    made = vllm_standin.install(monkeypatch)
    trainer = trainer_of(roles(tiny_base), by_vllm(tmp_path, vllm_enable_sleep_mode=True))
    assert made[0].slept
    trainer._collect(trainer.train_dataset[:4], 0)
    assert made[0].slept


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_line_says_how_to_get_it_before_anything_is_trained(tmp_path):
    with pytest.raises(InstructLiteError, match=r"pip install 'instructlite\[vllm\]'"):
        by_vllm(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rollout_engine": "vlm"}, "choose hf or vllm"),
        ({"vllm_mode": "server"}, "vllm_server_base_url"),
        ({"vllm_importance_sampling_clip_max": 0.5}, "at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, match, tmp_path, monkeypatch):
    vllm_standin.install(monkeypatch)
    with pytest.raises(InstructLiteError, match=match):
        by_vllm(tmp_path, **changes)


def test_adapters_that_vllm_does_not_serve_are_refused(tiny_base, tmp_path, monkeypatch):
    model = roles(tiny_base)
    assert served_rank(model) == 8
    model.peft_config["policy"].r = 513
    with pytest.raises(InstructLiteError, match="larger than vLLM serves"):
        served_rank(model)
    model.peft_config["policy"].modules_to_save = ["lm_head"]
    with pytest.raises(InstructLiteError, match="modules_to_save"):
        served_rank(model)


@pytest.mark.gpu
def test_vllm_itself_samples_from_the_policy(tiny_base, tmp_path):
    pytest.importorskip("vllm")
    model = roles(tiny_base)
    sampler = vllm_sampler(model, by_vllm(tmp_path, vllm_gpu_memory_utilization=0.2, vllm_options={"enforce_eager": True}), context=128)
    prompts = prompts_of(model)
    first = sampler.sample(model, prompts, SAMPLING, model.base.stop_ids, seed=1)
    with torch.no_grad():
        for parameter in model.role_parameters("policy"):
            parameter.mul_(2)
    second = sampler.sample(model, prompts, SAMPLING, model.base.stop_ids, seed=1)
    ours = log_probs(model, ["policy"], list(zip(prompts, second.ids, strict=True)))[0]
    for logps, own in zip(second.log_probs, ours, strict=True):
        assert_close(torch.tensor(logps), own, atol=2e-2, rtol=0)
    assert second != first
