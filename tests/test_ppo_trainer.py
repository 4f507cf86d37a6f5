"""PPOTrainer: invariances, exactness and learning (T-4 to T-6, T-8 to T-14, T-16, T-18, T-21, T-23, T-24 of the PPO design)."""

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from accelerate import skip_first_batches
from conftest import byte_tokenizer, tiny_config
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PrinterCallback
from trl.trainer.utils import RepeatSampler

from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.models.base import Base, load_base, lora_config
from instructlite.models.manifest import Adapter
from instructlite.models.roles import ResponseBatch, RoleModel
from instructlite.models.sampling import Sampling, bytes_per_answer, generate, log_probs
from instructlite.training import ppo_trainer, rollout
from instructlite.training.cycle import CycleSampler
from instructlite.training.ppo_config import PPOConfig
from instructlite.training.ppo_trainer import PPOTrainer
from instructlite.training.ptx import PtxLoss

PROMPTS = [{"prompt": word * n} for n, word in enumerate(["how ", "why not ", "a", "tell me ", "when ", "b c ", "is it ", "hm "] * 5, 1)]


def share_of_vowels(batch: rollout.Rollout) -> torch.Tensor:
    """A score that varies from response to response."""
    vowels = torch.isin(batch.responses, torch.tensor([69, 73, 77, 83, 89])) & batch.mask
    return vowels.sum(1) / batch.mask.sum(1) + 0.1 * batch.responses[:, 0] / 260


def config(tmp_path, **changes) -> PPOConfig:
    options = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=2,
        response_length=12, learning_rate=1e-3, kl_coef=0.05, max_steps=4, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, seed=3, lr_scheduler_type="constant",
    )  # fmt: skip
    return PPOConfig(**(options | changes))


def roles(base: Base, *, dropout: float = 0.0, seed: int = 0, top_layers: int | None = None, **changes) -> RoleModel:
    """An SFT adapter that is not zero, its copy as reference, a reward role with a head, a zero value head."""
    lora = lora_config(Lora(r=4, alpha=8, dropout=dropout, top_layers=top_layers), base.model, "CAUSAL_LM")
    for name, value in changes.items():
        setattr(lora, name, value)
    model = RoleModel.for_ppo(base, lora)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in [*model.role_parameters("policy"), *model.role_parameters("value")[:-2]]:
            parameter.normal_(std=0.1)
    model.copy_role("policy", "reference")
    model.copy_role("value", "reward")
    with torch.no_grad():
        model.heads["reward"].weight.normal_()
    return model


def trainer_of(model: RoleModel, args: PPOConfig, **options) -> PPOTrainer:
    trainer = PPOTrainer(model, args, train_dataset=options.pop("prompts", PROMPTS), **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


def collected(model: RoleModel, tmp_path, rows: int = 6, **changes) -> tuple[PPOTrainer, rollout.Rollout]:
    """A trainer with one rollout of `rows` responses of unequal lengths behind it."""
    trainer = trainer_of(model, config(tmp_path, per_device_train_batch_size=rows, num_mini_batches=1, num_ppo_epochs=1, **changes))
    batch = trainer._collect(trainer.train_dataset[:rows], 0)
    # Cut the responses to unequal lengths, so that means of means differ from the mean over tokens.
    lengths = torch.tensor([1, 12, 3, 7, 2, 9])[:rows, None]
    keep = torch.arange(batch.mask.shape[1])[None] < lengths
    batch.mask &= keep
    batch.attention_mask[:, -batch.mask.shape[1] :] *= keep
    for name in ("logps", "reference_logps", "values", "advantages", "returns", "entropy"):
        setattr(batch, name, getattr(batch, name) * batch.mask)
    batch.advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)) * batch.mask
    return trainer, batch


def padded(batch: rollout.Rollout, left: int, right: int) -> ResponseBatch:
    grow = lambda x, *sides: torch.nn.functional.pad(x, sides)  # noqa: E731
    return ResponseBatch(grow(batch.input_ids, left, right), grow(batch.attention_mask, left, right), grow(batch.mask, 0, right))


def learned_positions_base() -> Base:
    torch.manual_seed(0)
    options = dict(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(GPT2Config(**options)).requires_grad_(False)
    return Base(model, byte_tokenizer(), "gpt2-like", None, None, "", "none", "float32", 2, [2])


@pytest.mark.parametrize("kind", ["llama", "learned positions"])
def test_t4_extra_padding_changes_no_log_probability_or_value(kind, tiny_base, tmp_path):
    base = tiny_base if kind == "llama" else learned_positions_base()
    base.tokenizer.chat_template = tiny_base.tokenizer.chat_template
    base.tokenizer.pad_token = "<|endoftext|>"
    model = roles(base)
    _, batch = collected(model, tmp_path)
    with torch.no_grad():
        model.heads["value"].weight.normal_()
        plain, moved = model(response=padded(batch, 0, 0)), model(response=padded(batch, 4, 5))
    for name in ("logps", "values", "entropy"):
        assert_close(plain[name], moved[name], atol=1e-5, rtol=0)


def gradients_as(trainer: PPOTrainer, batch: rollout.Rollout, b: int, accumulation: int, mean_of_means: bool = False) -> torch.Tensor:
    """All gradients of one optimiser step done as `accumulation` micro-batches of b rows."""
    model = trainer.model
    model.train()
    model.zero_grad()
    trainer.rollout, trainer._first_step = batch, False
    for rows in torch.arange(b * accumulation).split(b):
        trainer._micro = batch.take(rows)
        trainer._tokens = trainer._micro.mask.sum() * accumulation if mean_of_means else batch.mask.sum()
        trainer.compute_loss(model, {}).backward()
    return torch.cat([p.grad.flatten() for role in ("policy", "value") for p in model.role_parameters(role)])


def test_t5_accumulation_does_not_change_the_gradient(tiny_base, tmp_path):
    trainer, batch = collected(roles(tiny_base), tmp_path)
    whole = gradients_as(trainer, batch, 6, 1)
    for b, accumulation in ((3, 2), (2, 3), (1, 6)):
        difference = (gradients_as(trainer, batch, b, accumulation) - whole).norm() / whole.norm()
        assert difference < 1e-5
        mutant = (gradients_as(trainer, batch, b, accumulation, mean_of_means=True) - whole).norm() / whole.norm()
        assert mutant > 0.02, "a mean of means must be seen by this test"


def test_t5_whole_training_does_not_depend_on_accumulation(tiny_base, tiny_path, tmp_path):
    weights = []
    for b, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
        options = dict(per_device_train_batch_size=b, gradient_accumulation_steps=accumulation, generation_batch_size=8)
        trainer_of(model, config(tmp_path, **options), reward_model=share_of_vowels).train()
        weights.append(torch.cat([p.flatten() for role in ("policy", "value") for p in model.role_parameters(role)]))
    assert (weights[0] - weights[1]).abs().max() < 1e-4 and (weights[0] - weights[2]).abs().max() < 1e-4


def test_t6_gradients_equal_those_of_separate_full_models(tiny_base, tiny_path, tmp_path):
    model = roles(tiny_base)
    trainer, batch = collected(model, tmp_path)
    with torch.no_grad():
        model.heads["value"].weight.normal_()
    gradients_as(trainer, batch, 6, 1)
    ours = {role: [p.grad.clone() for p in model.role_parameters(role)] for role in ("policy", "value")}
    args, mask, states = trainer.args, batch.mask, slice(batch.input_ids.shape[1] - batch.mask.shape[1] - 1, -1)
    for role in ("policy", "value"):
        # A model of its own with this role's weights as its only adapter, through transformers' plain forward.
        base = load_base(tiny_path, dtype="float32", chat_template="chatml")
        alone = RoleModel.load(base, {role: lora_config(Lora(r=4, alpha=8), base.model, "CAUSAL_LM")})
        alone.add_head("value")
        for mine, theirs in zip(alone.role_parameters(role), model.role_parameters(role), strict=True):
            mine.data.copy_(theirs.data)
        alone.heads.load_state_dict({k: v for k, v in model.heads.state_dict().items() if k.startswith("value")})
        alone.set_trainable([role])
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        out = alone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, output_hidden_states=True)
        if role == "policy":
            log_softmax = torch.log_softmax(out.logits[:, states], -1)
            logps = log_softmax.gather(-1, batch.responses[..., None])[..., 0]
            ratio = torch.exp(logps - batch.logps)
            clipped = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
            loss = (torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped) * mask).sum() / mask.sum()
        else:
            values = alone.heads["value"](out.hidden_states[-1][:, states])[..., 0]
            clipped = batch.values + (values - batch.values).clamp(-args.cliprange_value, args.cliprange_value)
            losses = torch.maximum((values - batch.returns) ** 2, (clipped - batch.returns) ** 2)
            loss = args.vf_coef * 0.5 * (losses * mask).sum() / mask.sum()
        loss.backward()
        for mine, theirs in zip(ours[role], alone.role_parameters(role), strict=True):
            assert_close(mine, theirs.grad, atol=1e-6, rtol=1e-5)
    frozen = [p for role in ("reference", "reward") for p in model.role_parameters(role)] + list(
        tiny_base.model.get_input_embeddings().parameters()
    )
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_t8_reference_reward_and_base_are_unchanged_by_ppo(quantization, tiny_path, tmp_path):
    base = load_base(tiny_path, dtype="float32", quantization=quantization, chat_template="chatml")
    model = roles(base)
    trainer = trainer_of(model, config(tmp_path, max_steps=8))
    trained = {id(p) for role in ("policy", "value") for p in model.role_parameters(role)}
    frozen = [p for p in model.parameters() if id(p) not in trained]
    before, policy = digest(frozen), digest(model.role_parameters("policy"))
    trainer.train()
    first = next(log for log in trainer.state.log_history if "objective/kl" in log)
    assert first["objective/kl"] == 0 and first["objective/kl_k3"] == 0
    last = [log for log in trainer.state.log_history if "objective/kl" in log][-1]
    assert last["objective/kl_k3"] > 0
    assert digest(frozen) == before and digest(model.role_parameters("policy")) != policy


@pytest.mark.slow
def test_t8_a_cycle_on_the_embedded_model_in_nf4_leaves_its_bytes(tmp_path):
    model = roles(load_base("smollm2-135m", quantization="nf4", chat_template="chatml"), top_layers=10)
    trained = {id(p) for role in ("policy", "value") for p in model.role_parameters(role)}
    frozen = [p for p in model.parameters() if id(p) not in trained]
    assert sum(p.dtype == torch.uint8 for p in frozen) == 7 * 30
    before, policy = digest(frozen), digest(model.role_parameters("policy"))
    trainer = trainer_of(model, config(tmp_path, max_steps=4, padding_free=True))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert logs[0]["objective/kl"] == 0 and logs[0]["rollout/logp_mismatch_mean"] < 0.05
    assert digest(frozen) == before and digest(model.role_parameters("policy")) != policy


def test_t8_the_reference_is_the_sft_adapter_and_not_the_base(tiny_base, tmp_path):
    model = roles(tiny_base)
    trainer, batch = collected(model, tmp_path)
    with torch.no_grad(), model.active(None):
        base_only = model.hidden(batch.input_ids, batch.attention_mask)
    with torch.no_grad(), model.active("reference"):
        assert (model.hidden(batch.input_ids, batch.attention_mask) - base_only).abs().max() > 0.1


def test_t8_a_reference_that_is_not_the_start_of_the_policy_is_refused(tiny_base, tmp_path):
    model = roles(tiny_base)
    with torch.no_grad():
        model.role_parameters("reference")[0].add_(0.1)
    with pytest.raises(InstructLiteError, match="weights of the policy differ from those of the reference"):
        trainer_of(model, config(tmp_path)).train()


def test_t8b_an_sft_adapter_with_a_head_of_its_own(tiny_base, tmp_path):
    """modules_to_save=["lm_head"]: KL is exactly 0 before the first update, and the policy's head is trained, no other."""
    model = roles(tiny_base, modules_to_save=["lm_head"])
    head = model.base.model.get_output_embeddings()
    base, start = head.original_module.weight.clone(), head.modules_to_save["policy"].weight.clone()
    trainer = trainer_of(model, config(tmp_path), reward_model=share_of_vowels)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert logs[0]["objective/kl"] == 0
    assert torch.equal(head.original_module.weight, base)
    assert torch.equal(head.modules_to_save["reference"].weight, start) and not torch.equal(head.modules_to_save["policy"].weight, start)


@pytest.mark.parametrize("top_layers", [None, 2])
def test_t9_gradient_checkpointing_changes_nothing(top_layers, tiny_path, tmp_path):
    results = {}
    for kind in ("off", "on", "mutant"):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"), top_layers=top_layers)
        trainer, batch = collected(model, tmp_path, gradient_checkpointing=kind == "on")
        if kind == "mutant":
            model.base.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        with torch.no_grad():
            model.heads["value"].weight.fill_(0.3)
        gradients_as(trainer, batch, 6, 1)
        grads = {role: torch.cat([p.grad.flatten() for p in model.role_parameters(role)]) for role in ("policy", "value")}
        model.train()
        answers = generate(model, [[1, 70, 80]] * 2, "policy", Sampling(max_new_tokens=10, temperature=0))
        results[kind] = grads, answers
    (off, greedy_off), (on, greedy_on), (mutant, _) = results["off"], results["on"], results["mutant"]
    assert torch.equal(off["policy"], on["policy"]) and torch.equal(off["value"], on["value"])
    assert greedy_off == greedy_on, "generation in train mode with checkpointing on loses its cache"
    assert (mutant["value"] - off["value"]).norm() / off["value"].norm() > 0.1, (
        "without its context the value gradient must be seen as wrong"
    )


def test_t10_what_is_trainable_survives_rollout_evaluation_saving_and_errors(tiny_base, tmp_path):
    model = roles(tiny_base)
    trainer = trainer_of(model, config(tmp_path), eval_dataset=PROMPTS[:3])

    def audit():
        for role, expected in {"policy": True, "value": True, "reference": False, "reward": False}.items():
            assert all(p.requires_grad is expected for p in model.role_parameters(role)), role
        assert sum(p.requires_grad for p in model.parameters()) == sum(len(model.role_parameters(r)) for r in ("policy", "value"))

    audit()
    trainer.train()
    audit()
    trainer.evaluate()
    audit()
    trainer.save_model(str(tmp_path / "saved"))
    audit()
    assert Adapter.load(tmp_path / "saved").role == "policy"
    assert all(log["value/grad_norm"] > 0 for log in trainer.state.log_history if "value/grad_norm" in log)


def test_t10_a_frozen_value_adapter_is_named(tiny_base, tmp_path):
    model = roles(tiny_base)
    trainer = trainer_of(model, config(tmp_path))
    model.set_requires_grad(["value"], False)
    model.heads["value"].requires_grad_(False)
    with pytest.raises(InstructLiteError, match="value adapter gets no gradient"):
        trainer.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_t11_the_ratio_is_exactly_1_in_the_first_step_of_every_cycle(checkpointing, tiny_path, tmp_path):
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    model = roles(base, dropout=0.1, top_layers=2)
    trainer = trainer_of(model, config(tmp_path, max_steps=12, temperature=0.7, gradient_checkpointing=checkpointing))
    trainer.train()
    cycles = [log for log in trainer.state.log_history if "rollout/logp_mismatch" in log]
    assert len(cycles) == 3
    for log in cycles:
        assert log["policy/ratio_max"] == 1 and log["policy/clip_frac"] == 0 and log["policy/approx_kl"] == 0
        # Not by construction: the recomputed log-probabilities against those stored by the rollout.
        assert log["rollout/logp_mismatch"] == 0
    later = [log for log in trainer.state.log_history if "policy/ratio_max" in log and "rollout/logp_mismatch" not in log]
    assert any(log["policy/ratio_max"] != 1 for log in later)


@pytest.mark.parametrize("top_layers", [None, 2])
def test_training_without_padding_is_the_same_to_rounding(top_layers, tiny_path, tmp_path):
    results = []
    for packed in (False, True):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"), top_layers=top_layers)
        trainer = trainer_of(model, config(tmp_path, padding_free=packed, per_device_train_batch_size=4), reward_model=share_of_vowels)
        trainer.train()
        results.append([trainer.rollout.logps, trainer.rollout.values, *model.role_parameters("policy"), *model.role_parameters("value")])
    assert model.padding_free and not trainer.rollout.attention_mask.all()
    for padded, packed in zip(*results, strict=True):
        assert_close(padded, packed, rtol=1e-3, atol=1e-4)


def test_padding_free_is_refused_where_it_is_not_proven(tmp_path):
    with pytest.raises(InstructLiteError, match="not proven for gpt2"):
        trainer_of(roles(learned_positions_base()), config(tmp_path, padding_free=True), prompts=[{"input_ids": [5, 6]}] * 4)


def test_sampling_settings_of_the_base_do_not_reach_the_rollout(tiny_base, tmp_path):
    """A model whose own file asks for top_k=1 is sampled without it: prompts repeated 8 times get different answers."""
    tiny_base.model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=1.5)
    answers = generate(roles(tiny_base), [[1, 70, 80]] * 8, "policy", Sampling(max_new_tokens=10))
    assert len({tuple(a) for a in answers}) > 4
    assert tiny_base.model.generation_config.top_k == 1, "the base's own settings are put back"


# --- T-13 and T-14: the order of prompts and the arithmetic of steps ------------------------------------------------------


def epoch_of(sampler, epoch: int, batch: int, skip: int = 0) -> list[list[int]]:
    loader = DataLoader(range(19), batch_size=batch, sampler=sampler)
    if skip:
        loader = skip_first_batches(loader, skip)
    sampler.set_epoch(epoch)
    return [rows.tolist() for rows in loader]


def test_t13_every_prompt_once_per_epoch_in_another_order():
    sampler = CycleSampler(19, batch=4, repeats=3, seed=0)
    first, second = epoch_of(sampler, 0, 4), epoch_of(sampler, 1, 4)
    assert len(first) == 12 and first[0] == first[1] == first[2] != first[3]
    seen = [prompt for rows in first[::3] for prompt in rows]
    assert len(seen) == len(set(seen)) == 16
    assert first != second


def test_t13_resuming_in_epoch_2_sees_the_same_prompts():
    whole = epoch_of(CycleSampler(19, batch=4, repeats=3, seed=0), 1, 4)
    assert epoch_of(CycleSampler(19, batch=4, repeats=3, seed=0), 1, 4, skip=5) == whole[5:]
    # The mutant: TRL's sampler owns a generator and knows no epoch, so after a resume it replays the first one.
    repeat = lambda: RepeatSampler(range(19), mini_repeat_count=1, batch_size=4, repeat_count=3, shuffle=True, seed=0)  # noqa: E731
    straight = repeat()
    list(straight)
    assert list(straight) != list(repeat())


def test_t13_two_ranks_get_disjoint_prompts():
    sampler = CycleSampler(19, batch=8, repeats=1, seed=0)  # 4 a rank
    batches = epoch_of(sampler, 0, 4)
    ranks = batches[0::2], batches[1::2]  # what accelerate's BatchSamplerShard deals out
    assert not set(sum(ranks[0], [])) & set(sum(ranks[1], []))


def test_t14_steps_are_optimiser_steps(tiny_base, tmp_path, monkeypatch):
    calls = []
    original = rollout.generate
    monkeypatch.setattr(rollout, "generate", lambda *a, **k: calls.append(1) or original(*a, **k))
    args = config(
        tmp_path, gradient_accumulation_steps=2, num_mini_batches=4, num_ppo_epochs=3, max_steps=-1, num_train_epochs=1, logging_steps=1,
        response_length=4, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer = trainer_of(roles(tiny_base), args, reward_model=share_of_vowels)
    assert args.rollout_batch_size == 16 and args.steps_per_cycle == 12
    trainer.train()
    assert trainer.state.global_step == 24 and len(calls) == 2
    assert trainer.lr_scheduler.last_epoch == 24
    assert sum("loss" in log for log in trainer.state.log_history) == 24
    assert sum("objective/score" in log for log in trainer.state.log_history) == 2


def test_t14_total_episodes_become_whole_cycles(tiny_base, tmp_path):
    trainer = trainer_of(roles(tiny_base), config(tmp_path, total_episodes=9))  # 4 episodes and 4 steps a cycle
    assert trainer.args.max_steps == 12


def test_too_few_prompts_are_explained_with_the_arithmetic(tiny_base, tmp_path):
    with pytest.raises(InstructLiteError, match="3 prompts do not fill one rollout batch of 4"):
        trainer_of(roles(tiny_base), config(tmp_path), prompts=PROMPTS[:3])


def test_long_prompts_are_left_out_and_counted(tiny_base, tmp_path):
    trainer = trainer_of(roles(tiny_base), config(tmp_path, max_prompt_length=80))
    assert 0 < trainer.prompts_left_out < len(PROMPTS)
    assert len(trainer.train_dataset) == len(PROMPTS) - trainer.prompts_left_out
    assert all(len(row["prompt_ids"]) <= 80 for row in trainer.train_dataset)


def test_t16_a_thousandfold_value_loss_moves_the_policy_not_at_all(tiny_path, tmp_path):
    policies, values = [], []
    for vf_coef in (0.1, 100.0):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
        args = config(tmp_path, vf_coef=vf_coef, max_grad_norm=0.1, max_steps=1)
        trainer_of(model, args, reward_model=share_of_vowels).train()
        policies.append(digest(model.role_parameters("policy")))
        values.append(digest(model.role_parameters("value")))
    assert policies[0] == policies[1] and values[0] != values[1]


def test_a_nan_score_stops_before_anything_is_updated(tiny_base, tmp_path):
    model = roles(tiny_base)
    before = digest(model.role_parameters("policy"))
    broken = lambda batch: torch.full((len(batch),), float("nan"))  # noqa: E731
    with pytest.raises(InstructLiteError, match="4 of 4 scores are not finite"):
        trainer_of(model, config(tmp_path), reward_model=broken).train()
    assert digest(model.role_parameters("policy")) == before


def test_the_missing_eos_penalty_is_taken_from_responses_that_did_not_stop(tiny_base, tmp_path):
    constant = lambda batch: torch.zeros(len(batch))  # noqa: E731
    trainer = trainer_of(
        roles(tiny_base), config(tmp_path, missing_eos_penalty=1.5, score_normalization="none", max_steps=1), reward_model=constant
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert_close(log["objective/score"], -1.5 * log["rollout/eos_missing_frac"])


def test_as_many_prompts_are_answered_at_once_as_fit_the_memory(tiny_base, tmp_path, monkeypatch):
    model, sizes = roles(tiny_base), []
    of_model = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: sizes.append(len(inputs["input_ids"])) or of_model(**inputs))
    whole = trainer_of(model, config(tmp_path, per_device_train_batch_size=4))
    longest = max(len(row["prompt_ids"]) for row in whole.train_dataset) + 12
    memory = 3.5 * bytes_per_answer(model, longest) / 1e9
    trainer = trainer_of(model, config(tmp_path, per_device_train_batch_size=4, generation_memory=memory))
    trainer._collect(trainer.train_dataset[:8], 0)
    assert sizes == [3, 3, 2]
    assert trainer_of(model, config(tmp_path, generation_memory=1.0)).generation_batch_size == 4, "not more than a rollout has"
    with pytest.raises(InstructLiteError, match=r"one answer of \d+ tokens takes .* GB; raise it"):
        trainer_of(model, config(tmp_path, generation_memory=memory / 10))


def test_keys_values_and_logits_are_what_an_answer_takes(tiny_base):
    """Keys and values against those that the model makes."""
    model = roles(tiny_base)
    cache = tiny_base.model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert bytes_per_answer(model, 30) - bytes_per_answer(model, 20) == held


def test_t18_evaluating_and_logging_between_steps_changes_no_weight(tiny_path, tmp_path):
    results = []
    for strategy in ("no", "steps"):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
        often = strategy == "steps"
        args = config(tmp_path, eval_strategy=strategy, eval_steps=1, eval_on_start=often, logging_steps=1 if often else 3)
        trainer = trainer_of(model, args, eval_dataset=PROMPTS[:5], reward_model=share_of_vowels)
        trainer.train()
        results.append(digest(model.role_parameters("policy") + model.role_parameters("value")))
    assert results[0] == results[1]
    assert any("eval_objective/score" in log for log in trainer.state.log_history)


def test_a_value_head_from_the_reward_model_follows_the_score_to_its_scale(tiny_base, tmp_path):
    """InstructGPT's start: V at the last token is the score itself, on the scale of the scaled score."""
    model = roles(tiny_base)
    model.heads["value"].load_state_dict(model.heads["reward"].state_dict())
    trainer = trainer_of(
        model, config(tmp_path, missing_eos_penalty=None, score_clip=None, per_device_train_batch_size=4, num_mini_batches=1)
    )
    batch = trainer._collect(trainer.train_dataset[:4], 0)
    states = slice(batch.input_ids.shape[1] - batch.mask.shape[1], None)
    with torch.no_grad(), model.active("value"):
        v = model.scores("value", model.hidden(batch.input_ids, batch.attention_mask)[:, states])
    at_last = v.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert_close(at_last, batch.scores, atol=1e-4, rtol=0)


# --- T-23: it learns ---------------------------------------------------------------------------------------------------


def bandit(seed: int, tmp_path, kl_coef: float = 0.02, source: Callable | None = None) -> tuple[float, float, dict]:
    """20 cycles of 64 random prompts; the score is the share of response tokens in 3..15. First and last mean scores."""
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(tiny_config(vocab_size=32, num_hidden_layers=1)).requires_grad_(False)
    with torch.no_grad():
        llama.lm_head.weight.mul_(12)
    base = Base(llama, byte_tokenizer(), "bandit", None, None, "", "none", "float32", 2, [31])
    model = RoleModel.for_ppo(base, lora_config(Lora(r=8, alpha=16), llama, "CAUSAL_LM"))
    g = torch.Generator().manual_seed(seed)
    prompts = [{"input_ids": torch.randint(3, 31, (4,), generator=g).tolist()} for _ in range(64 * 20)]
    history = []

    def share(batch: rollout.Rollout) -> torch.Tensor:
        good = (batch.responses >= 3) & (batch.responses <= 15) & batch.mask
        history.append((good.sum(1) / batch.mask.sum(1)).mean().item())
        return good.sum(1) / batch.mask.sum(1)

    args = config(
        tmp_path, per_device_train_batch_size=32, num_mini_batches=2, num_ppo_epochs=4, response_length=8, kl_coef=kl_coef,
        learning_rate=1e-2, max_steps=-1, num_train_epochs=1, seed=seed, max_grad_norm=1.0, score_normalization="none",
    )  # fmt: skip
    trainer = trainer_of(model, args, prompts=prompts, reward_model=source or share)
    trainer.train()
    return history[0], sum(history[-3:]) / 3, [log for log in trainer.state.log_history if "objective/kl" in log][-1]


def test_t23_the_bandit_is_learned_on_every_seed(tmp_path):
    runs = [bandit(seed, tmp_path) for seed in range(3)]
    assert all(start <= 0.5 and end >= 0.75 for start, end, _ in runs)
    assert sum(end for _, end, _ in runs) / 3 >= 0.80


def test_t23_a_large_kl_coefficient_holds_the_policy_to_the_reference(tmp_path):
    _, end, log = bandit(0, tmp_path, kl_coef=1.0)
    assert log["objective/kl"] < 2 and end < 0.6


def mean_over_seeds(tmp_path) -> float:
    return sum(bandit(seed, tmp_path)[1] for seed in range(3)) / 3


def test_t23_mutant_flipped_advantage_does_not_learn(tmp_path, monkeypatch):
    original = ppo_trainer.policy_losses
    monkeypatch.setattr(ppo_trainer, "policy_losses", lambda new, old, a, c: original(new, old, -a, c))
    assert mean_over_seeds(tmp_path) < 0.70


def test_t23_mutant_score_on_the_first_token_does_not_learn(tmp_path, monkeypatch):
    def first_token(score, kl, mask, kl_coef):
        rewards = -kl_coef * kl * mask
        rewards[:, 0] += score
        return rewards

    monkeypatch.setattr(rollout, "token_rewards", first_token)
    assert mean_over_seeds(tmp_path) < 0.70


def test_t23_mutant_value_that_sees_its_own_action_learns_less(tmp_path, monkeypatch):
    original = RoleModel.scores

    def one_column_late(self, role, hidden):
        values = original(self, role, hidden)
        if role == "value" and values.dim() == 2:
            return torch.cat([values[:, 1:], values[:, -1:]], 1)
        return values

    monkeypatch.setattr(RoleModel, "scores", one_column_late)
    assert mean_over_seeds(tmp_path) < 0.80


# --- T-12: exact resume, T-21: the KL controller, T-24: ptx, and the options around them ----------------------------------

PTX = [{"text": chr(97 + n % 7) * 20} for n in range(16)]
EVERYTHING = dict(
    gradient_accumulation_steps=2, kl_controller="adaptive", target=0.5, horizon=20, ptx_coef=0.1, ema_decay=0.9, max_steps=12,
    save_strategy="steps", save_steps=1, response_length=6, learning_rate=3e-3, lr_scheduler_type="linear",
)  # fmt: skip


def all_state(trainer: PPOTrainer) -> str:
    roles = [p for role in trainer.model.roles for p in trainer.model.role_parameters(role)]
    moments = [x for group in trainer.optimizer.state_dict()["state"].values() for x in group.values()]
    return digest([*roles, *moments, torch.tensor([trainer.kl_coef, trainer.scale.mean, trainer.scale.std], dtype=torch.float64)])


def losses(trainer: PPOTrainer) -> list[tuple]:
    return [(log["loss"], log.get("objective/score"), log.get("objective/kl_coef")) for log in trainer.state.log_history if "loss" in log]


def test_t12_resuming_after_any_step_is_the_uninterrupted_run(tiny_path, tmp_path):
    def start(output, **changes):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
        # 40 prompts, 8 a cycle of 4 steps: steps 1 to 12 end in the middle of a cycle and at its end
        return trainer_of(model, config(output, **(EVERYTHING | changes)), ptx_dataset=PTX)

    whole = start(tmp_path / "whole")
    whole.train()
    expected, history = all_state(whole), losses(whole)
    assert whole.kl_coef != whole.args.kl_coef
    for k in range(1, 12):
        torch.manual_seed(1000 + k)  # whatever the process did before must not matter
        resumed = start(tmp_path / "resumed", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{k}"))
        assert all_state(resumed) == expected, f"resumed after step {k}"
        assert losses(resumed) == history


def test_t12_resuming_in_the_second_epoch_sees_the_same_prompts(tiny_path, tmp_path):
    def start(**changes):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
        return trainer_of(model, config(tmp_path / "out", max_steps=12, **changes), prompts=PROMPTS[:9], reward_model=share_of_vowels)

    whole = start(save_strategy="steps", save_steps=1)  # 2 cycles of 4 prompts an epoch
    whole.train()
    for k in (9, 10):
        resumed = start()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{k}"))
        assert all_state(resumed) == all_state(whole)


@pytest.mark.parametrize(
    ("changes", "named"), [({"seed": 4}, "seed: 3 then, 4 now"), ({"num_mini_batches": 4}, "num_mini_batches: 2 then, 4 now")]
)
def test_resuming_with_other_settings_is_refused_with_the_difference(tiny_path, tmp_path, changes, named):
    start = lambda **c: trainer_of(roles(load_base(tiny_path, dtype="float32", chat_template="chatml")), config(tmp_path, **c))  # noqa: E731
    start(save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(InstructLiteError, match=named):
        start(**changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_resuming_with_another_reward_model_is_refused(tiny_path, tmp_path):
    start = lambda seed: trainer_of(  # noqa: E731
        roles(load_base(tiny_path, dtype="float32", chat_template="chatml"), seed=seed),
        config(tmp_path, save_strategy="steps", save_steps=4),
    )
    start(0).train()
    with pytest.raises(InstructLiteError, match="weights of reward"):
        start(1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_is_a_plain_adapter_of_the_policy(tiny_path, tmp_path):
    trainer = trainer_of(
        roles(load_base(tiny_path, dtype="float32", chat_template="chatml")), config(tmp_path, save_strategy="steps", save_steps=4)
    )
    trainer.train()
    stored = Adapter.load(tmp_path / "checkpoint-4")
    loaded = RoleModel.load(load_base(tiny_path, dtype="float32", chat_template="chatml"), {"policy": stored})
    assert digest(loaded.role_parameters("policy")) == digest(trainer.model.role_parameters("policy"))
    assert not (stored.path / "training_args.bin").exists()


def test_t24_ptx_keeps_the_likelihood_of_its_texts(tiny_path, tmp_path):
    likelihoods, scores = [], []
    for coefficient in (0.0, 1.0):
        model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
        args = config(tmp_path, ptx_coef=coefficient, learning_rate=1e-2, max_steps=40, kl_coef=0.0)
        trainer = trainer_of(model, args, ptx_dataset=PTX if coefficient else None, reward_model=share_of_vowels)
        trainer.train()
        ids = [model.base.tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in PTX]
        likelihoods.append(torch.cat(log_probs(model, ["policy"], [(row[:1], row[1:]) for row in ids])[0]).mean())
        scores.append([log["objective/score"] for log in trainer.state.log_history if "objective/score" in log])
    assert likelihoods[1] - likelihoods[0] > 2.0
    assert all(math.isfinite(score) for run in scores for score in run)


def test_ptx_gradients_do_not_depend_on_accumulation(tiny_path, tmp_path):
    grads = []
    for b, accumulation in ((4, 1), (2, 2)):
        base = load_base(tiny_path, dtype="float32", chat_template="chatml")
        model = roles(base)
        args = config(tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=accumulation, ptx_coef=1.0)
        model.set_trainable(["policy"])
        rows = [{"text": "x" * (3 + 4 * n)} for n in range(8)] + [{"prompt": "hi", "completion": "there"}]
        ptx = PtxLoss(base, rows, args)
        for micro in range(accumulation):
            ptx(model, accumulation + micro)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.role_parameters("policy")]))
    assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


def test_ptx_without_data_is_refused(tiny_base, tmp_path):
    with pytest.raises(InstructLiteError, match="PPO-ptx needs ptx_dataset"):
        trainer_of(roles(tiny_base), config(tmp_path, ptx_coef=0.1))


def test_target_kl_skips_the_rest_of_the_cycle(tiny_path, tmp_path):
    model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"))
    trainer = trainer_of(model, config(tmp_path, target_kl=1e-6, learning_rate=1e-2, max_steps=8), reward_model=share_of_vowels)
    norms = []
    original = trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda m: norms.append(float(original(m))) or torch.tensor(norms[-1])
    trainer.train()
    # The first step of a cycle has ratio 1 by construction; the second is too far, the other two are skipped.
    assert [norm > 0 for norm in norms] == [True, True, False, False] * 2
    assert trainer.state.global_step == 8


def test_the_moving_average_follows_the_policy_slowly(tiny_base, tmp_path):
    model = roles(tiny_base)
    start = torch.cat([p.flatten().clone() for p in model.role_parameters("policy")])
    trainer_of(model, config(tmp_path, ema_decay=0.9, max_steps=1), reward_model=share_of_vowels).train()
    policy, average = (torch.cat([p.flatten() for p in model.role_parameters(role)]) for role in ("policy", "ema"))
    assert_close(average - start, 0.1 * (policy - start), atol=1e-6, rtol=1e-3)
