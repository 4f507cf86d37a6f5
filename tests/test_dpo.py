"""DPO: it learns a planted preference against a reference that stays what it was, on the tokens of every other stage."""

import json
import math

import pytest
import torch
from conftest import SPECIAL
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from instructlite import DPORecipe
from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import log_probs
from instructlite.training import dpo
from instructlite.training.sft import SFTRecipe

PAIRS = [{"prompt": f"Is {i} odd?", "chosen": "Yes" + "!" * (i % 4), "rejected": "No" + "?" * (i % 3)} for i in range(24)]
RANKINGS = [{"prompt": f"Say {i}.", "responses": ["one", "One!", "no", "never ever"], "ranks": [0, 0, 1, 2]} for i in range(4)]
BETA = 0.1


def tiny_dpo(tiny_path, **changes) -> DPORecipe:
    training = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1} | changes.pop("training", {})
    options = {"model": str(tiny_path), "data": PAIRS, "dtype": "float32", "chat_template": "chatml", "lora": Lora(r=4, alpha=8)}
    return DPORecipe(training=training, **(options | changes))


@pytest.fixture(scope="module")
def start(tiny_path, tmp_path_factory):
    """An SFT adapter that does something."""
    rows = [{"prompt": row["prompt"], "completion": "Well" + "." * (i % 5)} for i, row in enumerate(PAIRS)]
    return SFTRecipe(
        model=str(tiny_path), data=rows, dtype="float32", chat_template="chatml", lora=Lora(r=4, alpha=8, dropout=0.1),
        training={"per_device_train_batch_size": 4, "learning_rate": 1e-2},
    ).run(tmp_path_factory.mktemp("start") / "sft")  # fmt: skip


@pytest.fixture
def trainers(monkeypatch) -> list[dpo.DPOTrainer]:
    """The trainers that recipes build during the test."""
    built = []

    class Kept(dpo.DPOTrainer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            built.append(self)

    monkeypatch.setattr(dpo, "DPOTrainer", Kept)
    return built


def base_of(tiny_path):
    return load_base(tiny_path, dtype="float32", chat_template="chatml")


def margins(base, roles: RoleModel, policy: str | None, reference: str | None, pairs: list[dict]) -> list[float]:
    """beta times how much more the policy than the reference prefers the chosen answer, in nats; by InstructLite's own passes."""
    sequences = [(base.encode_prompt(row["prompt"]), base.encode_completion(row[name])) for row in pairs for name in ("chosen", "rejected")]
    ours, theirs = ([tokens.sum().item() for tokens in part] for part in log_probs(roles, [policy, reference], sequences, batch_size=8))
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    return [BETA * (chosen - rejected) for chosen, rejected in zip(gains[::2], gains[1::2], strict=True)]


def test_it_learns_a_planted_preference_against_the_sft_adapter_and_says_by_how_much(tiny_path, tmp_path, start):
    recipe = tiny_dpo(tiny_path, model=start, data=PAIRS[:16], eval_data=PAIRS[16:], training={"num_train_epochs": 3})
    adapter = recipe.run(tmp_path / "dpo")
    base = base_of(tiny_path)
    roles = RoleModel.load(base, {"dpo": adapter, "sft": start})
    found = margins(base, roles, "dpo", "sft", PAIRS[16:])
    assert min(found) > 0.5, "a preference that all pairs share"
    metrics = adapter.metrics
    assert metrics["eval_margin"] == pytest.approx(sum(found) / len(found), abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(-sum(logsigmoid(torch.tensor(found)).tolist()) / len(found), abs=1e-4)
    assert (metrics["eval_accuracy"], metrics["eval_pairs"], metrics["eval_accuracy_high"]) == (1.0, 8, pytest.approx(1.0))
    assert 0.6 < metrics["eval_accuracy_low"] < 0.7
    assert 0 < metrics["train_margin"] < metrics["eval_margin"], "measured before each batch was learnt from, so on average half-way"
    logs = [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "before the first update the policy is the reference"
    assert losses[-1] < 0.5


def test_the_reference_is_the_sft_adapter_and_stays_it(tiny_path, tmp_path, start, trainers):
    tiny_dpo(tiny_path, model=start).run(tmp_path / "dpo")
    (trainer,) = trainers
    assert trainer.ref_model is None, "no second base"
    stored = load_file(start.path / "adapter_model.safetensors")
    now = {name: tensor for name, tensor in trainer.model.named_parameters() if ".lora_" in name}
    reference = {name.replace(".ref.", "."): tensor for name, tensor in now.items() if ".ref." in name}
    policy = {name.replace(".default.", "."): tensor for name, tensor in now.items() if ".default." in name}
    assert reference.keys() == policy.keys() == stored.keys()
    assert all(torch.equal(reference[name], stored[name]) for name in stored)
    assert not any(torch.equal(policy[name], stored[name]) for name in stored), "every tensor of the policy is trained"
    assert not any(tensor.requires_grad for tensor in reference.values())


def test_what_is_saved_is_one_plain_peft_adapter(tiny_path, tmp_path, start, trainers):
    adapter = tiny_dpo(tiny_path, model=start).run(tmp_path / "dpo")
    assert not [path for path in adapter.path.iterdir() if path.is_dir()], "the reference is not saved"
    assert (adapter.role, adapter.manifest.parents) == ("policy", {"sft": start.sha256})
    ids = torch.tensor([base_of(tiny_path).encode_prompt("Is 3 odd?")])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32), adapter.path)
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, trainers[0].model.eval()(ids).logits)


def test_from_a_bare_base_the_base_is_the_reference(tiny_path, tmp_path):
    adapter = tiny_dpo(tiny_path, eval_data=PAIRS[:6], training={"max_steps": 4}).run(tmp_path / "dpo")
    base = base_of(tiny_path)
    found = margins(base, RoleModel.load(base, {"dpo": adapter}), "dpo", None, PAIRS[:6])
    assert adapter.metrics["eval_margin"] == pytest.approx(sum(found) / 6, abs=1e-4)
    assert adapter.manifest.parents == {}


def test_rankings_count_as_all_their_pairs_and_text_never_becomes_a_control_token(tiny_path, tmp_path, trainers):
    hostile = {"prompt": f"Say {SPECIAL[2]}", "chosen": f"{SPECIAL[2]}!", "rejected": "no"}
    tiny_dpo(tiny_path, data=[*RANKINGS, hostile], training={"max_steps": 1}).run(tmp_path / "dpo")
    rows = list(trainers[0].train_dataset)
    assert len(rows) == 5 * len(RANKINGS) + 1, "of the six pairs of four answers the tied one is none"
    base = base_of(tiny_path)
    for row in rows:
        for name in ("chosen_ids", "rejected_ids"):
            assert row[name][-1] == base.end_id and base.end_id not in row[name][:-1]
    assert rows[-1]["prompt_ids"] == base.encode_prompt(hostile["prompt"])
    assert rows[-1]["chosen_ids"] == base.encode_completion(hostile["chosen"])


def test_pairs_beyond_max_length_are_left_out_and_counted(tiny_path, tmp_path, trainers, capsys):
    long = {"prompt": "Why?", "chosen": "a" * 200, "rejected": "b"}
    adapter = tiny_dpo(tiny_path, data=[*PAIRS, long], training={"max_steps": 1, "max_length": 100}).run(tmp_path / "dpo")
    assert adapter.metrics["pairs_too_long"] == 1 and len(trainers[0].train_dataset) == len(PAIRS)
    assert "left out 1 of 25 pairs" in capsys.readouterr().err
    with pytest.raises(InstructLiteError, match="all 1 pairs are longer than training.max_length=100"):
        tiny_dpo(tiny_path, data=[long], training={"max_length": 100}).run(tmp_path / "none")


def test_held_out_metrics_do_not_depend_on_the_batch_size(tiny_path, tmp_path, start):
    found = []
    for size in (1, 5):
        training = {"max_steps": 3, "per_device_eval_batch_size": size}
        found.append(tiny_dpo(tiny_path, model=start, eval_data=PAIRS[:7], training=training).run(tmp_path / str(size)).metrics)
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5)


def test_options_go_to_trl_untouched_and_unknown_ones_are_refused(tiny_path, tmp_path, start, trainers):
    training = {"max_steps": 1, "beta": 0.3, "loss_type": ["ipo"], "precompute_ref_log_probs": True}
    tiny_dpo(tiny_path, model=start, training=training).run(tmp_path / "dpo")
    args = trainers[0].args
    assert (args.beta, args.loss_type, args.precompute_ref_log_probs) == (0.3, ["ipo"], True)
    with pytest.raises(InstructLiteError, match="training.betta: DPOConfig has no such option; did you mean beta?"):
        tiny_dpo(tiny_path, training={"betta": 1.0}).run(tmp_path / "none")
