"""Adapters of any shape in one batch: what PEFT computes by `adapter_names`, or for each alone, and nothing left behind."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from instructlite.models.base import load_base
from instructlite.models.lockstep import Lockstep, Row
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import Sampling, generate

GREEDY = Sampling(max_new_tokens=12, temperature=0)
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "policy": {"r": 4, "lora_alpha": 8, "target_modules": EVERYWHERE},
    "second": {"r": 2, "lora_alpha": 9, "use_rslora": True, "target_modules": EVERYWHERE, "layers_to_transform": [1, 2]},
    "third": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 5}},
}
ROLES = ["third", None, "policy", "second", "policy", "third"]


def unlike(base, **changes):
    """A model with the adapters of SHAPES, each with weights of its own; changes: of the second one's config."""
    torch.manual_seed(0)
    shapes = SHAPES | {"second": SHAPES["second"] | changes}
    model = RoleModel.load(base, {name: LoraConfig(task_type="CAUSAL_LM", **shape) for name, shape in shapes.items()})
    with torch.no_grad():
        for name in SHAPES:
            for parameter in model.role_parameters(name):
                parameter += torch.randn_like(parameter) * 0.2
    return model


def rows():
    ids = torch.randint(4, 260, (len(ROLES), 9), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    attention[0, :4] = attention[3, :2] = 0
    return {"input_ids": ids, "attention_mask": attention}


def each_alone(model):
    logits = []
    for i, role in enumerate(ROLES):
        with model.active(role):
            logits.append(model(**{name: value[i : i + 1] for name, value in rows().items()}).logits)
    return torch.cat(logits)


def mixed(model):
    with model.mixed(ROLES):
        return model(**rows()).logits


def state(model):
    return [(m._active_adapter, m._disable_adapters, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model._switchable]


def named():
    return [role or "__base__" for role in ROLES]


@torch.no_grad()
def test_a_layer_is_that_of_peft(tiny_base):
    model = unlike(tiny_base)
    layers = model.base.model.model.layers[1].double()
    for layer, shape in ((layers.self_attn.q_proj, (6, 7, 32)), (layers.mlp.down_proj, (6, 64)), (layers.self_attn.v_proj, (6, 1, 32))):
        states = torch.randn(shape, dtype=torch.float64)
        with model.mixed(ROLES):
            together = layer(states)
        assert_close(together, layer(states, adapter_names=named()), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@torch.no_grad()
def test_a_mixed_batch_is_that_of_peft(quantization, tiny_path):
    base = load_base(tiny_path, dtype="float32", quantization=quantization, chat_template="chatml")
    model = unlike(base, target_modules=[*EVERYWHERE, "lm_head"], layers_to_transform=None)
    expected = model(**rows(), adapter_names=named()).logits
    assert_close(mixed(model), expected, atol=1e-5, rtol=1e-5)
    assert all((expected[i] - expected[j]).abs().max() > 0.5 for i in range(6) for j in range(i))


@torch.no_grad()
def test_in_bfloat16_a_row_is_rounded_as_alone(tiny_path):
    """PEFT's mixed batches round the adapters' part before they add it."""
    model = unlike(load_base(tiny_path, dtype="bfloat16", chat_template="chatml"))
    alone = each_alone(model).float()
    peft = model(**rows(), adapter_names=named()).logits.float()
    assert (mixed(model).float() - alone).abs().max() < (peft - alone).abs().max()


OTHERWISE = {
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "embeddings of its own": {"modules_to_save": ["embed_tokens"]},
    "biases": {"lora_bias": True},
    "embeddings with LoRA": {"target_modules": [*EVERYWHERE, "embed_tokens"], "layers_to_transform": None},
}


@pytest.mark.parametrize("otherwise", OTHERWISE)
@torch.no_grad()
def test_what_is_left_to_peft_is_in_the_same_batch(otherwise, tiny_base):
    model = unlike(tiny_base, **OTHERWISE[otherwise])
    before, expected = state(model), each_alone(model)
    assert_close(mixed(model), expected, atol=1e-5, rtol=1e-5)
    assert state(model) == before
    assert_close(each_alone(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "unmixable", [{"target_modules": ["q_proj"], "use_dora": True}, {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}]
)
@torch.no_grad()
def test_what_peft_does_not_mix_is_refused(unmixable, tiny_base):
    model = RoleModel.load(tiny_base, {"policy": LoraConfig(r=4, task_type="CAUSAL_LM", **unmixable)})
    with model.mixed(["policy", None] * 3), pytest.raises(ValueError, match="adapter"):
        model(**rows())


@torch.no_grad()
def test_nothing_is_left_behind_by_an_error(tiny_base):
    model = unlike(tiny_base, modules_to_save=["lm_head"])
    before = state(model)
    with pytest.raises(ZeroDivisionError), model.mixed(ROLES):
        assert state(model) != before
        raise ZeroDivisionError
    assert state(model) == before


@pytest.mark.parametrize("container", ["lora_A", "lora_B"])
@pytest.mark.parametrize("number", [torch.inf, torch.nan, 1e38])
@torch.no_grad()
def test_weights_that_are_no_numbers_spoil_no_other_row(container, number, tiny_base):
    model = unlike(tiny_base)
    expected, broken = mixed(model), torch.tensor([role == "policy" for role in ROLES])
    for module in model._switchable:
        getattr(module, container)["policy"].weight.fill_(number)
    logits = mixed(model)
    assert number == 1e38 or not logits[broken].isfinite().any()
    assert_close(logits[~broken], expected[~broken], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_that_no_adapter_is_named_for_are_refused(tiny_base):
    model = unlike(tiny_base)
    with model.mixed(ROLES), pytest.raises(ValueError, match="1 rows, but adapters for 6"):
        model(**{name: value[:1] for name, value in rows().items()})


@pytest.mark.parametrize("changes", [{}, OTHERWISE["a head of its own"]])
def test_answers_of_a_mixed_batch_are_those_of_each_alone(changes, tiny_base):
    model, prompts = unlike(tiny_base, **changes), [[1, 70, 80, 90 + n] for n in range(len(ROLES))]
    alone = [generate(model, [prompt], role, GREEDY, stop_ids=[-1])[0] for prompt, role in zip(prompts, ROLES, strict=True)]
    assert generate(model, prompts, ROLES, GREEDY, stop_ids=[-1]) == alone
    answers = [Row(prompt, role, GREEDY, 0) for prompt, role in zip(prompts, ROLES, strict=True)]
    lockstep = Lockstep(model)
    for joining in (answers[:2], answers[2:3], answers[3:]):  # adapters come that were in no batch before
        lockstep.join(lockstep.prefill(joining))
        lockstep.step()
    while lockstep.rows:
        lockstep.step()
        lockstep.keep([row for row in lockstep.rows if len(row.ids) < 12])
    assert [row.ids for row in answers] == alone and len(set(map(tuple, alone))) == len(ROLES)
