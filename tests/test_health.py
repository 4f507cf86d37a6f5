"""T-25: every fault of a PPO run is noticed within two cycles, and its cause named; and a healthy run is left in peace.

Two cycles are 8 steps here; checks that wait for 20 cycles by definition are shown the metrics of so many.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from test_ppo import COMPARISONS, PPO, loop
from test_ppo import PROMPTS as WORDS
from test_ppo_trainer import all_state, config, digest, roles, share_of_vowels, trainer_of
from torch.testing import assert_close
from transformers import TrainerCallback

from instructlite import PPORecipe, RewardRecipe, evaluate
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base
from instructlite.models.manifest import Adapter, Manifest
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import Sampling
from instructlite.training import ppo_trainer, preflight, rollout
from instructlite.training.health import CHECKS
from instructlite.training.outliers import FEWEST, KnownStates
from instructlite.training.ppo_math import correlation
from instructlite.training.ppo_trainer import PPOTrainer

STOPS = [2, *range(4, 60)]  # a fifth of the vocabulary, so that the tiny model's answers end by themselves
TIMES = ("time", "per_s", "runtime", "epoch")


def length(batch: rollout.Rollout) -> torch.Tensor:
    return batch.mask.sum(1).float()


def trainer_for(tiny_path: Path, tmp_path: Path, *, model: RoleModel | None = None, reward=share_of_vowels, **changes) -> PPOTrainer:
    """Two cycles of 4 steps on 16 answers; what it says is kept in `heard`."""
    model = model or roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
    options = dict(per_device_train_batch_size=8, max_steps=8, stop_token_ids=STOPS, response_length=24)
    trainer = trainer_of(model, config(tmp_path, **(options | changes)), reward_model=reward)
    trainer.heard = []
    trainer.health.say = trainer.heard.append
    return trainer


def run(*args, **changes) -> PPOTrainer:
    trainer = trainer_for(*args, **changes)
    trainer.train()
    return trainer


def flagged(trainer: PPOTrainer, name: str) -> list[int]:
    """Steps whose log has the flag."""
    return [log["step"] for log in trainer.state.log_history if log.get(f"health/{name}") == 1]


def of_cycles(trainer: PPOTrainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def looked_at(tiny_path: Path, tmp_path: Path, rows: list[dict], **changes) -> PPOTrainer:
    """A trainer that has not trained, but whose health has seen these rows."""
    trainer = trainer_for(tiny_path, tmp_path, **changes)
    for cycle, row in enumerate(rows):
        trainer.health.look(cycle, row)
    return trainer


@pytest.mark.parametrize("reward", [share_of_vowels, "reward"])
def test_a_healthy_run_is_not_warned(reward, tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, reward=reward, max_steps=12, temperature=0.9)
    assert trainer.heard == []
    assert not [name for log in trainer.state.log_history for name in log if name.startswith("health/")]
    assert of_cycles(trainer, "rollout/unique_frac") == [1.0] * 3
    assert all(abs(corr) < 0.8 for corr in of_cycles(trainer, "rollout/score_length_corr"))


# The first ten cycles of the demo on the 135M model, as recorded: 32 answers a cycle, 8 steps.
RECORDED = {
    "objective/kl": [0.0, 0.965, 0.658, 1.884, 2.428, 2.469, 2.83, 2.89, 3.055, 3.274],
    "objective/kl_k3": [0.0, 0.04, 0.03, 0.09, 0.12, 0.13, 0.15, 0.15, 0.19, 0.22],
    "objective/entropy": [3.228, 2.491, 2.952, 3.048, 3.076, 2.553, 2.806, 2.353, 2.028, 2.118],
    "policy/clip_frac": [0.239, 0.143, 0.146, 0.123, 0.181, 0.165, 0.126, 0.14, 0.148, 0.181],
    "policy/approx_kl": [0.195, 0.027, 0.02, 0.373, 0.062, 0.034, 0.03, 0.034, 0.064, 0.05],
    "value/explained_variance": [0.0, -0.002, 0.046, 0.084, 0.213, 0.0, 0.163, 0.411, 0.61, 0.445],
    "value/clip_frac": [0.133, 0.106, 0.16, 0.209, 0.146, 0.177, 0.132, 0.27, 0.157, 0.173],
    "rollout/eos_missing_frac": [0.188, 0.156, 0.125, 0.094, 0.062, 0.062, 0.031, 0.031, 0.0, 0.062],
    "rollout/length_mean": [25.188, 23.344, 22.469, 21.812, 19.0, 18.719, 17.844, 19.188, 15.844, 14.812],
}


def test_a_recorded_run_that_went_well_is_not_warned(tiny_path, tmp_path):
    rows = [{name: values[cycle] for name, values in RECORDED.items()} for cycle in range(10)]
    assert looked_at(tiny_path, tmp_path, rows).heard == []


def test_every_check_says_where_it_shows_why_and_what_to_do_and_has_its_mutant_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    for check in CHECKS:
        assert check.reads and check.cause and check.remedy
        assert f'"{check.name}"' in tests, check.name


# --- T-25 ----------------------------------------------------------------------------------------------------------------


def test_t25_a_sampling_with_top_k_is_said(tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, top_k=5, max_steps=4, stop_token_ids=None)
    assert "KL and ratios are biased" in trainer.health.said["sampling_filter"]
    assert flagged(trainer, "sampling_filter") == [1]
    assert flagged(trainer, "sampling_mismatch") == [1]


@pytest.mark.parametrize("mutant", [dict(top_k=5), dict(top_p=0.5), dict(temperature=0.5)])
def test_t25_a_sampling_otherwise_than_scored_is_seen_in_the_first_rollout(mutant, tiny_path, tmp_path, monkeypatch):
    honest = rollout.generate
    monkeypatch.setattr(
        rollout, "generate", lambda m, p, r, s, **k: honest(m, p, r, Sampling(**({"max_new_tokens": 24, "temperature": 1.0} | mutant)), **k)
    )
    trainer = run(tiny_path, tmp_path, max_steps=1, stop_token_ids=None)
    assert flagged(trainer, "sampling_mismatch") == [1]
    assert "top_k, top_p, another temperature" in trainer.heard[0]


def test_t25_a_answers_of_another_adapter_have_a_negative_kl(tiny_path, tmp_path, monkeypatch):
    honest = rollout.generate
    monkeypatch.setattr(rollout, "generate", lambda m, p, role, s, **k: honest(m, p, "reference", s, **k))
    trainer = run(tiny_path, tmp_path, learning_rate=1e-2)
    assert flagged(trainer, "negative_kl") == [5]
    assert "sampled and scored distributions differ" in trainer.health.said["negative_kl"]


def test_t25_b_another_reference_is_refused_before_the_first_rollout(tiny_path, tmp_path, monkeypatch):
    model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
    with torch.no_grad():
        model.role_parameters("reference")[-1].add_(1e-6)
    monkeypatch.setattr(rollout, "generate", None)
    with pytest.raises(InstructLiteError, match="policy differ from those of the reference: .* copies the SFT adapter into both"):
        run(tiny_path, tmp_path, model=model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_t25_b_the_base_as_reference_is_refused_before_the_first_update(dtype, tiny_path, tmp_path):
    model = roles(load_base(tiny_path, dtype=dtype, chat_template="chatml"))
    model.delete_adapter("reference")
    before = digest(model.role_parameters("policy"))
    with pytest.raises(InstructLiteError, match="before the first update the policy differs from the reference .*base alone"):
        run(tiny_path, tmp_path, model=model)
    assert digest(model.role_parameters("policy")) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_is_exactly_0_before_the_first_update(dtype, tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, model=roles(load_base(tiny_path, dtype=dtype, chat_template="chatml")), max_steps=1)
    assert of_cycles(trainer, "objective/kl") == of_cycles(trainer, "objective/kl_k3") == [0.0]


def test_t25_a_tokenizer_that_sft_did_not_see_is_refused(tiny_path, tmp_path):
    model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
    other = copy.deepcopy(model.base.tokenizer)
    other.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InstructLiteError, match="processing_class has another chat template .* leave processing_class out"):
        trainer_of(model, config(tmp_path), processing_class=other)
    other.chat_template = model.base.tokenizer.chat_template
    other.add_tokens("<new>")
    with pytest.raises(InstructLiteError, match="another vocabulary"):
        trainer_of(model, config(tmp_path), processing_class=other)


def test_t25_c_a_frozen_value_adapter_is_refused_before_the_first_rollout(tiny_path, tmp_path, monkeypatch):
    trainer = trainer_for(tiny_path, tmp_path)
    trainer.model.set_requires_grad(["value"], False)
    monkeypatch.setattr(rollout, "generate", None)
    with pytest.raises(InstructLiteError, match="the value adapter gets no gradient: 42 of its 44 tensors are frozen"):
        trainer.train()


def test_t25_c_a_value_adapter_that_set_adapter_freezes_on_the_way_is_named(tiny_path, tmp_path):
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.set_requires_grad(["value"], False)
            model.heads["value"].requires_grad_(False)

    trainer = trainer_for(tiny_path, tmp_path)
    trainer.add_callback(Meddler())
    with pytest.raises(InstructLiteError, match="value adapter gets no gradient"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_t25_anything_else_that_would_be_trained_is_refused(tiny_path, tmp_path):
    trainer = trainer_for(tiny_path, tmp_path)
    trainer.model.set_requires_grad(["reference"], True)
    with pytest.raises(InstructLiteError, match="tensors besides policy and value would be trained, .*reference"):
        trainer.train()


@pytest.mark.parametrize("normalization", ["first_rollout", "running"])
def test_t25_d_a_nan_reward_stops_and_saves_what_was_learnt_before(normalization, tiny_path, tmp_path):
    def start(broken_call: int) -> PPOTrainer:
        calls = []

        def vowels(batch):
            calls.append(1)
            return share_of_vowels(batch) * (float("nan") if len(calls) == broken_call else 1)

        options = dict(score_normalization=normalization, kl_controller="adaptive", target=0.1, horizon=20)
        return trainer_for(tiny_path, tmp_path, reward=vowels, **options)

    with pytest.raises(InstructLiteError, match=r"step 4: .*16 of 16 scores are not finite.*checkpoint-4"):
        start(broken_call=2).train()
    mended, whole = start(broken_call=0), start(broken_call=0)
    mended.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole.train()
    assert all_state(mended) == all_state(whole)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_t25_d_a_gradient_that_is_not_finite_stops_before_the_update(accumulation, tiny_path, tmp_path, monkeypatch):
    honest, calls = ppo_trainer.policy_losses, []

    def breaks_in_the_second_cycle(new, old, advantages, cliprange):
        calls.append(1)
        loss, clipped = honest(new, old, advantages, cliprange)
        # worth 0, but with an infinite slope
        return (loss + (new - new.detach()).abs().sqrt() if len(calls) == 4 * accumulation + 1 else loss), clipped

    monkeypatch.setattr(ppo_trainer, "policy_losses", breaks_in_the_second_cycle)
    options = dict(gradient_accumulation_steps=accumulation, kl_controller="adaptive", target=0.1, horizon=20)
    trainer = trainer_for(tiny_path, tmp_path, **options)
    with pytest.raises(InstructLiteError, match="step 4: the gradient of the policy is not finite"):
        trainer.train()
    monkeypatch.setattr(ppo_trainer, "policy_losses", honest)
    resumed, whole = trainer_for(tiny_path, tmp_path, **options), trainer_for(tiny_path, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole.train()
    assert all_state(resumed) == all_state(whole), "the adaptive coefficient must not have moved twice"


def test_t25_e_a_thousandfold_learning_rate_is_said(tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, learning_rate=1.0, stop_token_ids=None, response_length=48)
    assert flagged(trainer, "kl_blow_up") == [5] and flagged(trainer, "update_too_big") == [8]
    assert "lower learning_rate" in trainer.health.said["kl_blow_up"]


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_t25_f_a_constant_reward_is_said_and_moves_nothing(kl_coef, tiny_path, tmp_path):
    model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
    before = digest(model.role_parameters("policy"))
    trainer = run(tiny_path, tmp_path, model=model, reward=lambda batch: torch.full((len(batch),), 3.7), kl_coef=kl_coef)
    assert flagged(trainer, "reward_constant") == [1, 5] and len(trainer.heard) == 1
    # KL is 0 and stays so: there is no other term left
    assert digest(model.role_parameters("policy")) == before
    assert all(torch.tensor(value).isfinite() for log in trainer.state.log_history for value in log.values())


# --- the other checks --------------------------------------------------------------------------------------------------


def test_t25_a_reward_that_stays_constant_ends_the_run(tiny_path, tmp_path):
    row = {"objective/score_std": 0.0}
    trainer = looked_at(tiny_path, tmp_path, [row] * 19)
    with pytest.raises(InstructLiteError, match='"?reward_constant_stop'):
        trainer.health.look(19, row)
    assert (
        looked_at(tiny_path, tmp_path, [*[row] * 19, {"objective/score_std": 0.1}, *[row] * 19]).health.streaks["reward_constant_stop"]
        == 19
    )


def test_t25_a_policy_that_falls_silent_is_said(tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, entropy_coef=-20.0, learning_rate=5e-3)
    assert flagged(trainer, "entropy_collapse") == [5], "the first log of the second cycle"


def test_t25_a_policy_that_falls_apart_is_said(tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, temperature=0.5, entropy_coef=20.0, learning_rate=5e-3, num_ppo_epochs=4, max_steps=9)
    assert flagged(trainer, "entropy_explosion") == [9], "the first log of the second cycle"


def test_t25_a_reward_for_length_is_said(tiny_path, tmp_path):
    stops = STOPS[:27]  # fewer, so that there is length to gain
    options = dict(learning_rate=5e-2, lam=1.0, cliprange=0.5, num_ppo_epochs=4, per_device_train_batch_size=10, max_steps=17)
    trainer = run(tiny_path, tmp_path, reward=length, stop_token_ids=stops, seed=6, num_mini_batches=4, kl_coef=0.0, **options)
    assert of_cycles(trainer, "rollout/score_length_corr")[0] == pytest.approx(1, abs=1e-5)
    assert flagged(trainer, "length_hacking") == [17], "the first log of the second cycle"
    assert "missing_eos_penalty" in trainer.health.said["length_hacking"]


def test_t25_answers_that_do_not_end_are_said(tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, stop_token_ids=None, max_steps=4)
    assert flagged(trainer, "eos_missing") == [1]


def test_t25_stop_tokens_without_the_one_that_ends_a_turn_are_said(tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, stop_token_ids=STOPS[1:], max_steps=1)
    assert "stop_token_ids lacks 2 (<|im_end|>)" in trainer.health.said["stop_tokens"] and flagged(trainer, "stop_tokens") == [1]


def test_t25_a_value_clip_far_below_the_scores_is_said(tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, cliprange_value=1e-4, reward=lambda batch: 10 + length(batch), score_normalization="none")
    assert flagged(trainer, "value_clipped") == [8]


def test_t25_log_probabilities_that_change_between_rollout_and_training_are_said(tiny_path, tmp_path):
    """The mutant: dropout comes back after the trainer has switched it off."""
    trainer = trainer_for(tiny_path, tmp_path, model=roles(load_base(tiny_path, dtype="float32", chat_template="chatml"), dropout=0.1))
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trainer.train()
    assert flagged(trainer, "off_policy") == [4, 8]


def test_t25_a_critic_and_updates_that_do_nothing_are_said_after_20_cycles(tiny_path, tmp_path):
    rows = [{"value/explained_variance": -0.1, "policy/clip_frac": 0.0, "policy/approx_kl": 0.0}] * 20
    assert not looked_at(tiny_path, tmp_path, rows[:19]).heard
    assert set(looked_at(tiny_path, tmp_path, rows).health.said) == {"critic_useless", "update_too_small"}


def test_t25_an_ensemble_that_no_longer_agrees_is_said(tiny_path, tmp_path):
    assert not looked_at(tiny_path, tmp_path, [{"reward/ensemble_std": std} for std in (0.001, 0.09)]).heard, "rounding"
    trainer = looked_at(tiny_path, tmp_path, [{"reward/ensemble_std": std} for std in (0.3, 0.5, 0.7)])
    assert list(trainer.health.said) == ["ensemble_disagreement"] and "0.7 (first 0.3)" in trainer.heard[0]


def test_the_first_cycles_clipping_and_one_odd_cycle_are_no_fault(tiny_path, tmp_path):
    big, small = ({"policy/clip_frac": clipped, "policy/approx_kl": 0.15} for clipped in (0.4, 0.1))
    small["policy/approx_kl"] = 0.01
    assert not looked_at(tiny_path, tmp_path, [big, big, small, big]).heard
    assert looked_at(tiny_path, tmp_path, [big, big, big]).heard


def test_t25_too_little_memory_is_said(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_available", lambda device: 1e3)
    trainer = run(tiny_path, tmp_path, max_steps=1)
    assert flagged(trainer, "memory") == [1] and "lower per_device_train_batch_size" in trainer.health.said["memory"]


def test_the_estimate_of_memory_grows_with_what_is_held(tiny_path, tmp_path):
    needed = lambda **changes: preflight.memory_needed(trainer_for(tiny_path, tmp_path, **changes))  # noqa: E731
    assert needed(response_length=200) > needed(response_length=100) > needed(gradient_checkpointing=True, response_length=100)
    assert needed(generation_batch_size=10_000) > 2 * needed()


def reward_with(tmp_path: Path, metrics: dict) -> Adapter:
    (tmp_path / "run.json").write_text(json.dumps({"metrics": metrics}), encoding="utf-8")
    return Adapter(tmp_path, Manifest("reward", "tiny", None, "", "none", "float32", "", ""))


@pytest.mark.parametrize(
    ("metrics", "name"),
    [({"eval_accuracy": 0.6, "eval_accuracy_low": 0.48, "eval_pairs": 40}, "reward_at_chance"), ({}, "reward_unmeasured")],
)
def test_t25_a_reward_model_that_may_be_at_chance_is_said(metrics, name, tiny_path, tmp_path):
    trainer = trainer_for(tiny_path, tmp_path, max_steps=1)
    trainer.model.sources["reward"] = reward_with(tmp_path, metrics)
    trainer.train()
    assert list(trainer.health.said) == [name] and str(tmp_path) in trainer.heard[0]


def test_a_reward_model_above_chance_is_not_mentioned(tiny_path, tmp_path):
    trainer = trainer_for(tiny_path, tmp_path, max_steps=1)
    trainer.model.sources["reward"] = reward_with(tmp_path, {"eval_accuracy": 0.6, "eval_accuracy_low": 0.52, "eval_pairs": 400})
    trainer.train()
    assert not trainer.heard


# --- stops ---------------------------------------------------------------------------------------------------------------


def test_t25_kl_stop_saves_and_the_run_can_go_on_from_there(tiny_path, tmp_path):
    options = dict(learning_rate=1e-2, max_steps=12, kl_controller="adaptive", target=1.0, horizon=20, score_normalization="running")
    with pytest.raises(InstructLiteError, match=r"step 4: kl_stop in cycle 1: objective/kl .*checkpoint-4"):
        run(tiny_path, tmp_path, kl_stop=1e-3, **options)
    resumed, whole = trainer_for(tiny_path, tmp_path, **options), trainer_for(tiny_path, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole.train()
    assert all_state(resumed) == all_state(whole)


@pytest.mark.parametrize("changes", [{"kl_stop": 0.0}, {"watch_outlier_stop": 1.0}, {"watch_outlier_stop": 5.0}])
def test_limits_that_mean_nothing_are_refused(changes, tmp_path):
    with pytest.raises(InstructLiteError, match=next(iter(changes))):
        config(tmp_path, **changes)


# --- the watch for reward hacking ---------------------------------------------------------------------------------------


def with_watch(tiny_path: Path, sign: float) -> RoleModel:
    """A held-out reward model that thinks what the other does, or its opposite."""
    model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
    model.copy_role("reward", "watch")
    with torch.no_grad():
        model.heads["watch"].weight.mul_(sign)
    return model


@pytest.mark.parametrize(("sign", "steps"), [(-1, [5]), (1, [])])
def test_t25_a_held_out_reward_model_that_disagrees_is_said(sign, steps, tiny_path, tmp_path, monkeypatch):
    """The mutant: from the second cycle on all answers are one that the reward likes, and the held-out reward model or its opposite not."""
    honest, calls = rollout.generate, []

    def generate(*args, **options):
        calls.append(1)
        ending = [10] * 60 + [2] if len(calls) == 1 else [200] * 61
        return [answer[:4] + ending for answer in honest(*args, **options)]

    monkeypatch.setattr(rollout, "generate", generate)
    reward = lambda batch: share_of_vowels(batch) + (~batch.ended).float()  # noqa: E731
    trainer = run(tiny_path, tmp_path, model=with_watch(tiny_path, sign), reward=reward, max_steps=5)
    assert flagged(trainer, "watch_disagrees") == steps
    if steps:
        assert "the policy exploits the reward; take an earlier checkpoint" in trainer.health.said["watch_disagrees"]


def test_watching_changes_no_weight(tiny_path, tmp_path):
    plain = run(tiny_path, tmp_path, reward="reward")
    watched = run(tiny_path, tmp_path, model=with_watch(tiny_path, -1), reward="reward")
    for role in ("policy", "value"):
        assert digest(plain.model.role_parameters(role)) == digest(watched.model.role_parameters(role))
    assert plain.rollout.reward_states is None and watched.rollout.watch_scores is None, "nothing of it is kept for the cycle"


@pytest.fixture
def answers_elsewhere(monkeypatch):
    """From the second cycle on the reward head reads what it never read before."""
    honest, calls = ppo_trainer.collect, []

    def collect(*args, **options):
        calls.append(1)
        batch, seconds = honest(*args, **options)
        if len(calls) > 1:
            batch.reward_states += 3 * torch.randn(batch.reward_states.shape[1], generator=torch.Generator().manual_seed(0))
        return batch, seconds

    monkeypatch.setattr(ppo_trainer, "collect", collect)


def test_t25_answers_unlike_the_first_ones_are_said(answers_elsewhere, tiny_path, tmp_path):
    trainer = run(tiny_path, tmp_path, reward="reward", max_steps=5)
    assert of_cycles(trainer, "watch/outlier_frac")[0] > 0.9 and flagged(trainer, "outliers") == [5]


def test_t25_too_many_outliers_end_the_run_where_that_is_wanted(answers_elsewhere, tiny_path, tmp_path):
    with pytest.raises(
        InstructLiteError, match=r"step 4: watch_outlier_stop in cycle 1: watch/outlier_frac .*exploits the reward.*checkpoint-4"
    ):
        run(tiny_path, tmp_path, reward="reward", watch_outlier_stop=0.5)
    assert (tmp_path / "checkpoint-4" / "reward_states.safetensors").is_file()


def correlated(n: int, seed: int) -> torch.Tensor:
    """Of 48 hidden units, with one direction that is a hundred times wider than the others, as in real models."""
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    mixing[0] *= 100
    return torch.randn(n, 48, generator=torch.Generator().manual_seed(seed)) @ mixing + 5


@pytest.mark.parametrize(("count", "expected"), [(16, 1 / 17), (32, 1 / 33), (64, 1 / 65), (256, 2 / 257)])
def test_as_many_new_answers_of_the_same_kind_are_outliers_as_expected(count, expected):
    new = correlated(2000, 1)
    fitted = [KnownStates.fit(correlated(count, 100 + i)) for i in range(60)]
    assert all(known.expected.item() == pytest.approx(expected) for known in fitted)
    share = sum((known.distances(new) > 1).double().mean() for known in fitted).item() / 60
    assert expected / 2 < share < 2 * expected


def test_the_limit_is_the_farthest_answers_distance_from_the_others():
    """Against fits that leave out one answer each."""
    states = correlated(20, 3).double()
    known, distances = KnownStates.fit(states), []
    for i in range(20):
        others = torch.cat([states[:i], states[i + 1 :]])
        away, around = states[i] - others.mean(0), others - others.mean(0)
        distances.append(away @ torch.linalg.solve(around.T @ around + known.ridge * torch.eye(48), away))
    assert_close(known.limit, max(distances))


def test_shifted_answers_are_outliers():
    known = KnownStates.fit(correlated(128, 2))
    assert (known.distances(correlated(200, 3) + 40) > 1).double().mean() > 0.9
    assert 0.2 < known.distances(correlated(2000, 4)).mean() < 0.9


def test_states_that_do_not_vary_are_no_reference():
    assert KnownStates.fit(torch.ones(64, 48)) is None and KnownStates.fit(correlated(FEWEST - 1, 0)) is None


def test_correlation_over_valid_positions():
    x, y = torch.tensor([1.0, 2, 3, 99]), torch.tensor([2.0, 4, 7, -99])
    mask = torch.tensor([True, True, True, False])
    assert_close(correlation(x, y, mask), torch.corrcoef(torch.stack([x[:3], y[:3]]))[0, 1])
    assert correlation(torch.ones(4), y, mask) == 0


# --- resuming ------------------------------------------------------------------------------------------------------------


def test_t12_health_and_its_log_go_on_as_if_never_interrupted(tiny_path, tmp_path):
    def start(**changes):
        options = dict(max_steps=12, learning_rate=2e-2, gradient_accumulation_steps=2, per_device_train_batch_size=4)
        return trainer_for(tiny_path, tmp_path, model=with_watch(tiny_path, -1), reward="reward", **(options | changes))

    untimed = lambda trainer: [{k: v for k, v in log.items() if not any(t in k for t in TIMES)} for log in trainer.state.log_history]  # noqa: E731
    whole = start(save_strategy="steps", save_steps=1)
    whole.train()
    assert flagged(whole, "update_too_big"), "there must be something to remember"
    for k in (1, 4, 6, 11):
        resumed = start()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{k}"))
        assert untimed(resumed)[:-1] == untimed(whole)[:-1], f"resumed after step {k}"
        assert resumed.health.said == whole.health.said and resumed.health.state() == whole.health.state()


# --- through the recipe --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_path, tmp_path_factory) -> dict[str, Adapter]:
    return loop(tiny_path, tmp_path_factory.mktemp("loop"))


def test_the_recipe_says_warnings_and_leaves_them_in_run_json(adapters, capsys, tmp_path):
    ppo = PPORecipe(model=adapters["sft"], reward=adapters["reward"], data=WORDS, training=PPO).run(tmp_path / "ppo")
    said = ppo.metrics["health"]
    assert {"eos_missing", "reward_at_chance"} <= set(said)
    assert f"ppo: {said['eos_missing']}" in capsys.readouterr().err
    logged = [json.loads(line) for line in (ppo.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert logged[0]["health/eos_missing"] == 1


def test_the_recipe_watches_a_held_out_reward_model_and_the_report_shows_its_course(adapters, tmp_path):
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    other = RewardRecipe(model=adapters["sft"], data=COMPARISONS[4:], seed=7, training=training).run(tmp_path / "other")
    options = dict(model=adapters["sft"], reward=adapters["reward"], data=WORDS * 2, training=PPO | {"per_device_train_batch_size": 8})
    ppo = PPORecipe(watch_reward=other, **options).run(tmp_path / "ppo")
    logged = [json.loads(line) for line in (ppo.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "watch/score" in logged[0] and "watch/outlier_frac" not in logged[0] and "watch/outlier_frac" in logged[4]
    plain = PPORecipe(**options).run(tmp_path / "plain")
    assert plain.sha256 == ppo.sha256
    report = evaluate([adapters["sft"], ppo], data=WORDS, judge=other, samples=1, max_new_tokens=4, greedy=False)
    (course,) = report.training
    assert course["candidate"] == "ppo" and course["cycles"] == 2 and course["health"] == ppo.metrics["health"]
    assert course["curves"]["watch/score"] == [log["watch/score"] for log in logged if "watch/score" in log]


@pytest.mark.parametrize(("which", "why"), [("reward", "it is what the role reward is"), ("sft", "a policy adapter")])
def test_watching_the_reward_model_itself_or_no_reward_model_is_refused(which, why, adapters, tmp_path):
    with pytest.raises(InstructLiteError, match=why):
        PPORecipe(model=adapters["sft"], reward=adapters["reward"], watch_reward=adapters[which], data=WORDS, training=PPO).run(
            tmp_path / "ppo"
        )
