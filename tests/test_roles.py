"""Adapters and heads of one base: switching, mixed batches, shared lower layers, saving (T-7, T-8b, T-10)."""

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.models.base import Base, load_base, lora_config
from instructlite.models.manifest import Adapter
from instructlite.models.roles import SLICEABLE, RoleModel

ROLES = ("policy", "reference", "value", "reward")


def randomised(model: RoleModel, seed: int = 0) -> RoleModel:
    """Fresh LoRA computes nothing (B = 0); here every role gets weights of its own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for role in model.roles:
            for parameter in model.role_parameters(role):
                parameter.normal_(std=0.2)
    return model


def four_roles(base: Base, lora: Lora, **changes) -> RoleModel:
    config = lora_config(lora, base.model, "CAUSAL_LM")
    for name, value in changes.items():
        setattr(config, name, value)
    model = RoleModel.for_ppo(base, config)
    model.copy_role("policy", "reference")
    model.copy_role("policy", "reward")
    model.add_head("reward")
    return randomised(model)


def rows(n: int = 4, length: int = 9, left: int = 0, right: int = 0):
    ids = torch.randint(4, 260, (n, length), generator=torch.Generator().manual_seed(1))
    pad = lambda width: torch.zeros(n, width, dtype=torch.long)  # noqa: E731
    attention = torch.cat([pad(left), torch.ones_like(ids), pad(right)], 1)
    return torch.cat([pad(left), ids, pad(right)], 1), attention


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@torch.no_grad()
def test_t7_a_mixed_batch_equals_one_pass_per_role(tiny_path, tiny_lora, quantization):
    base = load_base(tiny_path, dtype="float32", quantization=quantization, chat_template="chatml")
    model = four_roles(base, tiny_lora)
    for parameter in (parameter for role in ROLES for parameter in model.role_parameters(role)):
        parameter /= 10  # the size that training leaves; from ten times as much, rounding alone makes 1e-5
    ids, attention = rows()
    separate = []
    for role in (*ROLES, None):
        with model.active(role):
            separate.append(model.hidden(ids, attention))
    with model.mixed([role for role in (*ROLES, None) for _ in ids]):
        mixed = model.hidden(ids.repeat(5, 1), attention.repeat(5, 1))
    assert_close(mixed, torch.cat(separate), atol=1e-6, rtol=0)
    assert (separate[0] - separate[1]).abs().max() > 0.1, "the roles must differ for this to say anything"


@torch.no_grad()
def test_padding_on_either_side_moves_no_hidden_state(tiny_base, tiny_lora):
    model = four_roles(tiny_base, tiny_lora)
    with model.active("policy"):
        plain = model.hidden(*rows())
        padded = model.hidden(*rows(left=4, right=5))[:, 4:-5]
    assert_close(plain, padded, atol=1e-5, rtol=0)


@torch.no_grad()
def test_t8b_modules_to_save_are_switched_with_their_role(tiny_base, tiny_lora):
    model = four_roles(tiny_base, tiny_lora)
    own_head = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model.add_adapter("chat", own_head)
    model._find_layers()
    head = model.base.model.get_output_embeddings()
    head.modules_to_save["chat"].weight.normal_()
    hidden = torch.randn(3, 32)
    with model.active("chat"):
        chat = model.logits(hidden)
    with model.active("policy"):
        policy = model.logits(hidden)
    with model.active(None):
        plain = model.logits(hidden)
    assert torch.equal(policy, plain), "a role without a head of its own must compute the original one"
    assert (chat - plain).abs().max() > 1
    # The mutant: switching only the tuner layers leaves the wrong head in place.
    model._switchable = [m for m in model._switchable if isinstance(m, BaseTunerLayer)]
    with model.active("chat"):
        assert (model.logits(hidden) - chat).abs().max() > 1


def test_t10_switching_never_changes_what_is_trainable(tiny_base, tiny_lora):
    model = four_roles(tiny_base, tiny_lora)
    model.set_trainable(["policy", "value"])

    def trainable():
        return {role: {p.requires_grad for p in model.role_parameters(role)} for role in ROLES}

    expected = {"policy": {True}, "value": {True}, "reference": {False}, "reward": {False}}
    assert trainable() == expected
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n and "heads" not in n)
    for role in (*ROLES, None):
        with pytest.raises(RuntimeError), model.active(role):
            raise RuntimeError
    with torch.no_grad(), model.mixed(["value", "policy"]):
        model.hidden(*rows(2))
    assert trainable() == expected
    with model.active("value"):
        model.hidden(*rows()).sum().backward()
    assert all(p.grad is not None for p in model.role_parameters("value")[:-2])
    assert all(p.grad is None for role in ("policy", "reference", "reward") for p in model.role_parameters(role))


def test_an_unknown_role_is_named(tiny_base, tiny_lora):
    model = four_roles(tiny_base, tiny_lora)
    for computing in (model.active("judge"), model.mixed([None, "policy", "judge"])):
        with pytest.raises(KeyError, match="judge"), computing:
            pass


def test_adapters_mix_in_eval_mode_only(tiny_base, tiny_lora):
    model = four_roles(tiny_base, tiny_lora).train()
    with pytest.raises(ValueError, match="eval mode"), model.mixed([None, "policy"]):
        pass


@pytest.mark.parametrize("architecture", sorted(SLICEABLE))
@torch.no_grad()
def test_shared_lower_layers_equal_the_whole_model(architecture, tmp_path):
    base = small(architecture, tmp_path)
    model = four_roles(base, Lora(r=4, alpha=8, top_layers=2))
    ids, attention = rows(left=3, right=2)
    assert model.shared_layers == 2
    lower = model.lower_hidden(ids, attention)
    for role in (*ROLES, None):
        with model.active(role):
            assert torch.equal(model.hidden(ids, attention), model.hidden(ids, attention, lower)), role
    assert len(model.backbone.layers) == 4


def small(architecture: str, path: Path) -> Base:
    config = AutoConfig.for_model(
        architecture, vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return load_base(path, dtype="float32", chat_template="chatml")


@pytest.mark.parametrize("architecture", sorted(SLICEABLE))
def test_without_padding_states_and_gradients_are_the_same(architecture, tmp_path):
    base = small(architecture, tmp_path)
    model = four_roles(base, Lora(r=4, alpha=8, top_layers=2))
    model.set_trainable(["policy"])
    ids, attention = rows(left=3, right=2)
    attention[1, :5], attention[2, -5:] = 0, 0
    results = []
    for packed in (False, True):
        model.padding_free = packed
        model.zero_grad()
        with model.active("policy"):
            states = model.hidden(ids, attention, model.lower_hidden(ids, attention))
        (states * attention[..., None]).square().sum().backward()
        grads = [p.grad for p in model.role_parameters("policy") if p.grad is not None]
        results.append([states.detach() * attention[..., None], *grads])
    assert len(results[0]) > 1
    for padded, packed in zip(*results, strict=True):
        assert_close(padded, packed, rtol=1e-3, atol=1e-4)
    assert not packed_row_sees_another(model)


def packed_row_sees_another(model: RoleModel) -> bool:
    """Whether another first row changes the states of the second."""
    ids, attention = rows(n=2, left=1)
    other = torch.cat([ids[:1].roll(1, 1) * attention[:1], ids[1:]])
    with torch.no_grad(), model.active("policy"):
        return not torch.equal(model.hidden(ids, attention)[1], model.hidden(other, attention)[1])


def test_adapters_on_all_layers_share_nothing(tiny_base, tiny_lora):
    model = four_roles(tiny_base, tiny_lora)
    assert model.shared_layers == 0 and model.lower_hidden(*rows()) is None


def test_a_saved_role_is_a_plain_peft_adapter_with_the_same_logits(tiny_base, tiny_path, tiny_lora, tmp_path):
    model = four_roles(tiny_base, tiny_lora)
    model.save_role("policy", tmp_path / "policy")
    ids, attention = rows()
    with torch.no_grad(), model.active("policy"):
        ours = model.logits(model.hidden(ids, attention))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32), str(tmp_path / "policy"))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids, attention_mask=attention).logits, ours)
    again = RoleModel.load(load_base(tiny_path, dtype="float32", chat_template="chatml"), {"sft": Adapter.load(tmp_path / "policy")})
    with torch.no_grad(), again.active("sft"):
        assert torch.equal(again.logits(again.hidden(ids, attention)), ours)


@pytest.fixture
def saved(tiny_base, tiny_lora, tmp_path) -> Adapter:
    four_roles(tiny_base, tiny_lora).save_role("policy", tmp_path / "policy")
    return Adapter.load(tmp_path / "policy")


def test_a_role_with_a_head_is_not_written_without_it(tiny_base, tiny_lora, tmp_path):
    with pytest.raises(InstructLiteError, match="reward has a scalar head"):
        four_roles(tiny_base, tiny_lora).save_role("reward", tmp_path / "reward")
    assert not (tmp_path / "reward").exists()


def test_a_flipped_byte_is_refused(saved, tiny_path):
    file = saved.path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InstructLiteError, match="damaged or changed"):
        RoleModel.load(load_base(tiny_path, dtype="float32", chat_template="chatml"), {"policy": saved})


def test_a_base_of_the_same_shape_with_other_weights_is_refused(saved, tiny_path, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_path)
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(InstructLiteError, match="another base"):
        RoleModel.load(load_base(tmp_path / "other", dtype="float32", chat_template="chatml"), {"policy": saved})


def test_another_chat_template_is_refused(saved, tiny_path):
    with pytest.raises(InstructLiteError, match="another chat template"):
        RoleModel.load(load_base(tiny_path, dtype="float32", chat_template="plain"), {"policy": saved})


def test_the_manifest_is_readable_and_of_this_format(saved):
    content = json.loads((saved.path / "instructlite.json").read_text())
    assert content["role"] == "policy" and content["format"] == 1 and "adapter_model.safetensors" in content["files"]
    (saved.path / "instructlite.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(InstructLiteError, match="format 2"):
        Adapter.load(saved.path)
