"""What the training stages share: staging, run.json, options, progress, and the stop on a non-finite gradient."""

import json
import re

import pytest
import torch
from trl import RewardConfig, SFTConfig

from instructlite.config import Lora, SFTOptions
from instructlite.errors import InstructLiteError
from instructlite.models.manifest import Adapter, write_manifest
from instructlite.training import sft
from instructlite.training.recipe import Recipe, progress, trainer_config
from instructlite.training.sft import SFTRecipe

ROWS = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(16)]
FILES = {
    "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "instructlite.json", "run.json", "metrics.jsonl",
}  # fmt: skip


def tiny_sft(tiny_path, **changes) -> SFTRecipe:
    training = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1} | changes.pop("training", {})
    options = {"data": ROWS, "dtype": "float32", "chat_template": "chatml", "lora": Lora(r=4, alpha=8)}
    return SFTRecipe(model=str(tiny_path), training=training, **(options | changes))


class Writes(Recipe, SFTOptions):
    """A recipe that trains nothing, so that only the frame is tested."""

    name = "writes"
    config_class = SFTConfig
    base = None

    def train(self, run):
        run.records("demonstrations", self.data, "demonstrations")
        (run.directory / "adapter_model.safetensors").write_text(str(self.seed))
        write_manifest(run.directory, role="policy", base=self.base)
        if self.seed == 13:
            raise RuntimeError("the disk is full")
        run.metrics["luck"] = self.seed


def test_a_run_writes_the_adapter_and_its_record_and_nothing_else(tiny_path, tmp_path):
    adapter = tiny_sft(tiny_path).run(tmp_path / "new" / "sft")
    assert {path.name for path in adapter.path.iterdir()} == FILES
    assert [path.name for path in adapter.path.parent.iterdir()] == ["sft"]
    run = json.loads((adapter.path / "run.json").read_text())
    assert run["recipe"] == "sft"
    assert run["config"]["lora"]["r"] == 4
    assert run["config"]["data"] == "16 rows", "rows given in memory are counted, not copied"
    assert run["config"]["training"]["learning_rate"] == 1e-2
    assert run["data"]["demonstrations"]["rows"] == 16
    assert len(run["data"]["demonstrations"]["sha256"]) == 64
    assert run["versions"].keys() >= {"instructlite", "torch", "trl", "transformers", "peft", "python"}
    assert run["metrics"]["steps"] == 12
    assert run["started"] <= run["finished"]
    assert run["peak_rss_mb"] > 100
    assert adapter.metrics == run["metrics"]
    lines = [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


def test_the_same_seed_trains_the_same_adapter_and_another_seed_another(tiny_path, tmp_path):
    first, again, other = (tiny_sft(tiny_path, seed=seed).run(tmp_path / str(i)) for i, seed in enumerate((1, 1, 2)))
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_an_old_adapter_gives_way_only_to_a_complete_new_one(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(Writes, "base", tiny_base)
    Writes(model="tiny", data=ROWS, seed=1).run(tmp_path / "x")
    with pytest.raises(RuntimeError, match="disk is full"):
        Writes(model="tiny", data=ROWS, seed=13).run(tmp_path / "x")
    assert (tmp_path / "x" / "adapter_model.safetensors").read_text() == "1"
    assert Adapter.load(tmp_path / "x").metrics == {"luck": 1}
    assert Writes(model="tiny", data=ROWS, seed=2).run(tmp_path / "x").metrics == {"luck": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_directory_that_is_no_adapter_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InstructLiteError, match="no adapter"):
        Writes(model="tiny", data=ROWS).run(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lerning_rate": 1e-3}, "SFTConfig has no such option; did you mean learning_rate"),
        ({"hub_token": "hf_secret"}, "HF_TOKEN"),
        ({"output_dir": "elsewhere"}, r"run\(\)"),
        ({"lr_scheduler_type": "linera"}, "SFTConfig refuses it"),
    ],
)
def test_a_training_option_that_cannot_be_is_one_line(training, message):
    with pytest.raises(InstructLiteError, match=message) as caught:
        SFTRecipe.check_training(training)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_training_options_win_over_our_defaults():
    config = trainer_config(
        RewardConfig, {"save_strategy": "steps", "seed": 5}, output_dir="unused", use_cpu=True, save_strategy="no", seed=1
    )
    assert (config.save_strategy, config.seed) == ("steps", 5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update(tiny_path, tmp_path, monkeypatch, where):
    before = []

    class Poisoned(sft.SFTTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            if self.state.global_step == 2:
                parameters = [p for p in model.parameters() if p.requires_grad]
                before.extend([(p, p.detach().clone()) for p in parameters])
                if where == "loss":
                    return loss * float("nan")
                parameters[0].register_hook(lambda gradient: gradient * float("inf"))
            return loss

    monkeypatch.setattr(sft, "SFTTrainer", Poisoned)
    with pytest.raises(
        InstructLiteError, match=r"step 3: the gradient is not finite \(learning rate 0.00\d+, last logged loss \d"
    ) as caught:
        tiny_sft(tiny_path).run(tmp_path / "sft")
    assert "\n" not in str(caught.value)
    assert before
    assert all(torch.equal(now, then) for now, then in before), "the weights are those of before the step"
    assert not list(tmp_path.iterdir())


def test_the_best_checkpoint_on_held_out_data_can_be_kept(tiny_path, tmp_path):
    early = {
        "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "num_train_epochs": 5,
    }  # fmt: skip
    unlike = [{"prompt": "What is 3 + 1?", "completion": "~" * 8}]
    adapter = tiny_sft(tiny_path, eval_data=unlike, training=early).run(tmp_path / "sft")
    seen = [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in seen if "eval_loss" in line]
    assert losses[-1] > min(losses) + 0.5, "training is meant to make the held-out loss worse"
    assert adapter.metrics["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert {path.name for path in adapter.path.iterdir()} == FILES


def test_progress_without_a_terminal_is_a_few_plain_lines(capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("instructlite.training.recipe.time.perf_counter", lambda: next(clock))
    with progress("sft: training", 40) as advance:
        for _ in range(40):
            advance(note="loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "sft: training 4/40, loss 1.0, 0:36 left"
    assert lines[-1] == "sft: training 40/40, loss 1.0, took 0:40"


def test_a_training_prints_our_progress_and_nothing_of_the_libraries(tiny_path, tmp_path, capfd):
    tiny_sft(tiny_path, eval_data=ROWS[:4]).run(tmp_path / "sft")
    out, err = capfd.readouterr()
    assert out == ""
    foreign = [line for line in err.splitlines() if line and not re.match("sft: |\\r?Loading weights", line)]
    assert not foreign
