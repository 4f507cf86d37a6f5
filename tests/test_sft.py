"""SFT: the loss is that of the completion with its end token, and what is saved is a plain PEFT adapter."""

import math

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base
from instructlite.models.roles import RoleModel
from instructlite.training import sft
from instructlite.training.sft import SFTRecipe

ROWS = [{"prompt": f"What is {i} + 1?", "completion": f"It is {i + 1}." + "!" * (i % 5)} for i in range(16)]


def tiny_sft(tiny_path, **changes) -> SFTRecipe:
    training = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1} | changes.pop("training", {})
    options = {"model": str(tiny_path), "data": ROWS, "dtype": "float32", "chat_template": "chatml", "lora": Lora(r=4, alpha=8)}
    return SFTRecipe(training=training, **(options | changes))


@pytest.fixture
def trainers(monkeypatch) -> list[sft.SFTTrainer]:
    """The trainers that recipes build during the test."""
    built = []

    class Kept(sft.SFTTrainer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            built.append(self)

    monkeypatch.setattr(sft, "SFTTrainer", Kept)
    return built


def test_the_loss_is_on_the_completion_with_its_end_token_and_never_on_padding(tiny_path, tmp_path, trainers):
    tiny_sft(tiny_path, training={"max_steps": 1}).run(tmp_path / "sft")
    (trainer,) = trainers
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1, "the batch must be padded for this to say anything"
    for i, row in enumerate(ROWS):
        prompt, answer = base.encode_prompt(row["prompt"]), base.encode_completion(row["completion"])
        length = len(prompt) + len(answer)
        assert answer[-1] == base.end_id != base.pad_id
        assert batch["input_ids"][i, :length].tolist() == prompt + answer
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        learnt = [-100] * len(prompt) + answer
        assert batch["labels"][i].tolist() == learnt + [-100] * (batch["input_ids"].shape[1] - length)


def test_held_out_loss_is_the_mean_over_completion_tokens(tiny_path, tmp_path):
    adapter = tiny_sft(tiny_path, eval_data=ROWS[:7], training={"per_device_eval_batch_size": 3}).run(tmp_path / "sft")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    for suffix in ("_before", ""):
        model = PeftModel.from_pretrained(base.model, adapter.path) if suffix == "" else base.model
        losses = []
        for row in ROWS[:7]:
            prompt, answer = base.encode_prompt(row["prompt"]), base.encode_completion(row["completion"])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            losses += cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
        mean = sum(losses) / len(losses)
        assert adapter.metrics[f"eval_loss{suffix}"] == pytest.approx(mean, abs=1e-5)
        assert adapter.metrics[f"eval_perplexity{suffix}"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert adapter.metrics["eval_loss"] < adapter.metrics["eval_loss_before"] - 1


def test_only_completion_tokens_are_projected_onto_the_vocabulary(tiny_path, tmp_path, monkeypatch):
    function, projected = sft.trl.trainer.utils._ChunkedLogProbFunction, []
    apply = function.apply
    monkeypatch.setattr(function, "apply", lambda hidden, *rest: (projected.append(len(hidden)), apply(hidden, *rest))[1])
    tiny_sft(tiny_path, eval_data=ROWS, training={"max_steps": 1, "per_device_eval_batch_size": 16}).run(tmp_path / "sft")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    assert projected[0] == sum(len(base.encode_completion(row["completion"])) for row in ROWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_peft_and_the_role_model_compute_what_was_trained_to_the_last_bit(tiny_path, tmp_path, trainers, dtype):
    adapter = tiny_sft(tiny_path, dtype=dtype).run(tmp_path / "sft")
    trained = trainers[0].model.eval()
    ids = torch.tensor([load_base(tiny_path, chat_template="chatml").encode_prompt("What is 3 + 1?")])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path, dtype=getattr(torch, dtype)), adapter.path)
    roles = RoleModel.load(load_base(tiny_path, dtype=dtype, chat_template="chatml"), {"sft": adapter})
    with torch.no_grad():
        expected = trained(ids).logits
        assert torch.equal(plain(ids).logits, expected)
        with roles.active("sft"):
            assert torch.equal(roles(ids).logits, expected)
        with trained.disable_adapter():
            assert (trained(ids).logits - expected).abs().max() > 0.1, "the adapter must do something for this to say anything"


def test_the_directory_names_its_base_and_carries_the_tokenizer(tiny_path, tmp_path):
    adapter = tiny_sft(tiny_path, revision="v1").run(tmp_path / "sft")
    config = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapter.path).peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == (str(tiny_path), "v1")
    assert '"inference_mode": true' in (adapter.path / "adapter_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(adapter.path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert "<|im_start|>" in tokenizer.chat_template
    assert adapter.role == "policy"
    assert adapter.manifest.parents == {}


def test_an_adapter_is_trained_further(tiny_path, tmp_path):
    first = tiny_sft(tiny_path, eval_data=ROWS[:8]).run(tmp_path / "first")
    second = tiny_sft(tiny_path, model=first, eval_data=ROWS[:8], chat_template=None, lora=Lora(r=64)).run(tmp_path / "second")
    assert second.metrics["eval_loss_before"] == pytest.approx(first.metrics["eval_loss"], abs=1e-6)
    assert second.metrics["eval_loss"] < first.metrics["eval_loss"] - 0.01
    assert second.manifest.parents == {"sft": first.sha256}
    assert (second.path / "adapter_config.json").read_text().count('"r": 4') == 1, "its own LoRA, not that of the options"


def test_rows_beyond_max_length_are_left_out_and_counted_never_cut(tiny_path, tmp_path, trainers, capsys):
    long = {"prompt": "Tell me more.", "completion": "more " * 60}
    adapter = tiny_sft(tiny_path, data=[*ROWS, long], training={"max_length": 100}).run(tmp_path / "sft")
    assert adapter.metrics["rows_too_long"] == 1
    assert len(trainers[0].train_dataset) == 16
    assert "left out 1 of 17 rows: longer than training.max_length=100" in capsys.readouterr().err


def test_when_all_rows_are_too_long_one_line_says_how_long_they_are(tiny_path, tmp_path):
    with pytest.raises(InstructLiteError, match=r"all 16 rows .*training\.max_length=10 tokens \(95 % of them have at most \d\d\)"):
        tiny_sft(tiny_path, training={"max_length": 10}).run(tmp_path / "sft")


def test_packing_learns_too(tiny_path, tmp_path):
    packed = {"packing": True, "max_length": 128, "eval_packing": False, "num_train_epochs": 8}
    adapter = tiny_sft(tiny_path, eval_data=ROWS[:8], training=packed).run(tmp_path / "sft")
    assert adapter.metrics["eval_loss"] < adapter.metrics["eval_loss_before"] - 0.5


def test_a_quantized_base_keeps_its_bytes_and_the_adapter_its_precision(tiny_path, tmp_path, trainers):
    pytest.importorskip("bitsandbytes")
    adapter = tiny_sft(tiny_path, quantization="nf4", eval_data=ROWS[:8]).run(tmp_path / "sft")
    model = trainers[0].model
    fresh = dict(load_base(tiny_path, quantization="nf4", dtype="float32", chat_template="chatml").model.named_parameters())
    frozen = {name: p for name, p in model.base_model.model.named_parameters() if not p.requires_grad}
    assert any(p.dtype == torch.uint8 for p in frozen.values())
    for name, parameter in frozen.items():
        assert torch.equal(parameter, fresh[name.replace(".base_layer", "")]), name
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in trained)
    assert adapter.metrics["eval_loss"] < adapter.metrics["eval_loss_before"] - 1


def test_a_reward_adapter_is_no_start_for_sft(tiny_path, tmp_path):
    adapter = tiny_sft(tiny_path, training={"max_steps": 1}).run(tmp_path / "sft")
    manifest = adapter.path / "instructlite.json"
    manifest.write_text(manifest.read_text().replace('"role": "policy"', '"role": "reward"'))
    with pytest.raises(InstructLiteError, match="a reward adapter; this stage starts from a policy adapter"):
        tiny_sft(tiny_path, model=adapter.path).run(tmp_path / "again")
