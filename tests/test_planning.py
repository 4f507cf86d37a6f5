"""The plan's arithmetic against real modules, autograd and recorded peaks; what it advises makes things fit; it loads no torch."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from instructlite.cli import app
from instructlite.config import Loop, load_loop, recipes
from instructlite.data.records import write_records
from instructlite.errors import InstructLiteError
from instructlite.models import memory
from instructlite.models.memory import PPOCycle, Shapes
from instructlite.planning import plan as planning
from instructlite.planning.bases import BASES, shapes_of
from instructlite.planning.devices import CARDS, Device, card
from instructlite.planning.lengths import Lengths, lengths_of
from instructlite.planning.plan import Plan, notices, plan
from instructlite.planning.stages import StagePlan

BENCH = Path(__file__).parent.parent / "bench"
LONG = Lengths(demonstration=600, completion=400, compared=700, judged=700, prompt=300)
SMALL = dict(hidden_size=192, intermediate_size=512, num_attention_heads=6, num_key_value_heads=2, vocab_size=512)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345), ("Qwen/Qwen3-0.6B", 0.596), ("meta-llama/Llama-3.2-1B-Instruct", 1.236),
     ("meta-llama/Llama-3.2-3B-Instruct", 3.213), ("mistralai/Mistral-7B-Instruct-v0.3", 7.248),
     ("meta-llama/Llama-3.1-8B-Instruct", 8.030),
     ("Qwen/Qwen3-8B", 8.191), ("Qwen/Qwen3-32B", 32.76), ("meta-llama/Llama-3.1-70B-Instruct", 70.55)],
)  # fmt: skip
def test_the_known_shapes_have_as_many_parameters_as_the_models(name, billions):
    assert BASES[name].parameters / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_modules(tied):
    config = tiny_config(tie_word_embeddings=tied)
    model, shapes = LlamaForCausalLM(config), Shapes.of(config)
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    assert memory.weights(shapes, "none", 4) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert Shapes.of(config.to_dict()) == shapes
    for targets, top_layers in (("all-linear", None), (["q_proj", "down_proj"], 2)):
        kept = None if top_layers is None else list(range(3 - top_layers, 3))
        lora = LoraConfig(r=4, target_modules=targets, layers_to_transform=kept, task_type="CAUSAL_LM")
        adapted = get_peft_model(LlamaForCausalLM(config), lora)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert memory.adapter_parameters(shapes, 4, targets, top_layers) == trainable


def saved_for_backward(layers: int, computes: str, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of 4 padded rows of 128 tokens, parameters aside."""
    config = tiny_config(num_hidden_layers=layers, head_dim=32, **SMALL)
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = computes != "lean"
    kept: dict[int, torch.Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, attention = torch.randint(0, 512, (4, 128)), torch.ones(4, 128, dtype=torch.long)
    attention[0, :40] = 0
    autocast = torch.autocast("cpu", dtype=dtype) if computes != "cast" and dtype != torch.float32 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.base_model.model.model(input_ids=ids, attention_mask=attention, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("computes", "dtype"), [("lean", torch.bfloat16), ("cast", torch.bfloat16), ("autocast", torch.bfloat16), ("cast", torch.float32)]
)
def test_what_a_layer_keeps_is_what_autograd_keeps(computes, dtype):
    of_two_layers = saved_for_backward(3, computes, dtype) - saved_for_backward(1, computes, dtype)
    shapes = Shapes.of(tiny_config(head_dim=32, **SMALL))
    planned = 2 * 4 * 128 * memory.saved_by_a_layer(shapes, dtype.itemsize, 8, computes)
    assert planned == pytest.approx(of_two_layers, rel=0.1)


def test_the_recorded_peaks_are_planned_within_15_percent(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import plan_vs_measured

    cases = list(plan_vs_measured.of_ppo_vs_trl())
    assert len(cases) == 2
    for case in cases:
        assert case["planned_gb"] == pytest.approx(case["measured_gb"], rel=0.15), case
    recorded = json.loads((BENCH / "results" / "plan_vs_measured.json").read_text())
    assert len(recorded["cases"]) > 20 and recorded["largest_error"] <= 0.15


def test_the_bench_compares_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import plan_vs_measured

    (tmp_path / "recipe.yaml").write_text(recipes()["smollm2-135m"].read_text())
    (tmp_path / "stages.json").write_text(
        json.dumps({"sft": {"peak_rss_mb": 1900.0}, "ppo": {"peak_rss_mb": 2400.0, "peak_gpu_mb": 1500.0}})
    )
    plan_vs_measured.main([str(tmp_path), "--json", str(tmp_path / "out.json")])
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["measured_gb"] for case in cases[:2]] == [1.992, 2.517] and "largest error" in capsys.readouterr().out
    assert len(list(plan_vs_measured.of_run(tmp_path, gpu=True))) == 1


def test_the_bench_compares_what_was_recorded_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import plan_vs_measured

    settings = {"response_length": 512, "batch": 16, "per_device_train_batch_size": 4}
    recorded = {
        "settings": settings,
        "lora_r": 16,
        "prompt_length": 64,
        "nf4": {"peak_mb": {"load": 9e9, "generate": 9000, "backward": 10_000}},
    }
    (tmp_path / "ppo_gpu.json").write_text(json.dumps(recorded | {"bf16": {"out_of_memory": "…"}}))
    (case,) = plan_vs_measured.of_ppo_gpu(tmp_path / "ppo_gpu.json")
    assert case["measured_gb"] == 10 and 7 < case["planned_gb"] < 16
    assert list(plan_vs_measured.of_ppo_gpu(tmp_path / "none.json")) == []


def cycle(**changes) -> dict[str, int]:
    sizes = dict(shapes=BASES["meta-llama/Llama-3.1-8B-Instruct"], size=2, rank=16, shared_layers=0, prompt=256, response=256, rollout=64,
                 generated_at_once=64, micro_batch=4, chunk=256, checkpointing=False)  # fmt: skip
    return PPOCycle(**(sizes | changes)).phases()


def test_each_phase_of_a_cycle_grows_with_what_it_holds():
    assert cycle(generated_at_once=16)["generate"] == cycle()["generate"] / 4
    assert cycle(checkpointing=True)["train"] < cycle()["train"] / 4
    assert cycle(shared_layers=16)["train"] < 0.6 * cycle()["train"]
    assert cycle(quantization="nf4")["train"] - cycle()["train"] == 2 * 4096 * 14_336  # the largest layer, unpacked
    assert cycle(checkpointing=True, chunk=64)["train"] <= cycle(checkpointing=True)["train"]


def test_the_keys_and_values_are_counted_as_the_cache_holds_them():
    shapes = BASES["meta-llama/Llama-3.1-8B-Instruct"]
    assert memory.cache(shapes, 2, 1) == 131_072  # 128 kB a token in bf16: 32 layers x 8 heads x 128 x 2 x 2 bytes


# --- what a recipe asks for -------------------------------------------------------------------------------------------------


def loop(**changes) -> Loop:
    return replace(load_loop("llama3.1-8b", complete=False), **changes)


def stage(name: str, planned: Plan) -> StagePlan:
    return next(stage for stage in planned.stages if stage.stage == name)


def test_quantized_weights_and_checkpointing_and_shorter_rows_take_less():
    gpu = card("24GB")
    nf4, bf16 = plan(loop(), gpu, lengths=LONG), plan(loop(quantization="none"), gpu, lengths=LONG)
    assert 0.3 < nf4.stages[0].parts["base"] / bf16.stages[0].parts["base"] < 0.4
    assert nf4.peak < bf16.peak and not bf16.fits
    plain = loop(sft={"training": {"per_device_train_batch_size": 2, "gradient_checkpointing": False}})
    assert stage("sft", plan(plain, gpu, lengths=LONG)).peak > 1.5 * stage("sft", nf4).peak
    short = replace(LONG, compared=100)
    assert stage("reward", plan(loop(), gpu, lengths=short)).peak < stage("reward", nf4).peak


def test_policies_beside_ppo_are_planned_with_their_own_options():
    planned = plan(loop(also={"dpo": None, "ppo-long": {"training": {"response_length": 2048}}}), card("24GB"), lengths=LONG)
    assert [stage.stage for stage in planned.stages] == ["sft", "reward", "judge", "ppo", "dpo", "ppo-long", "report"]
    adapter = 4 * memory.adapter_parameters(shapes_of(loop().model), 16)
    plain = plan(loop(), card("24GB"), lengths=LONG)
    assert stage("dpo", planned).parts["adapters"] - stage("reward", planned).parts["adapters"] == adapter, "the reference"
    assert stage("ppo-long", planned).peak > stage("ppo", planned).peak == stage("ppo", plain).peak
    assert stage("report", planned).parts["adapters"] - stage("report", plain).parts["adapters"] == 2 * adapter


def test_what_makes_a_policy_beside_ppo_fit_is_written_where_it_stands():
    also = {"dpo": {"training": {"per_device_train_batch_size": 32}}, "ppo-big": {"training": {"per_device_train_batch_size": 32}}}
    changes = plan(loop(also=also), card("14GB"), lengths=LONG).changes
    for name in also:
        assert changes[name] and all(change.startswith(f"also.{name}.training.") for change in changes[name])


def test_more_roles_take_their_adapters():
    adapter = 4 * memory.adapter_parameters(shapes_of(loop().model), 16)
    plain = stage("ppo", plan(loop(), card("24GB"), lengths=LONG))
    more = loop(reward={"ensemble": 3}, ppo=loop().ppo | {"watch_reward": "judge"})
    assert stage("ppo", plan(more, card("24GB"), lengths=LONG)).parts["adapters"] - plain.parts["adapters"] == 3 * adapter
    assert stage("ppo", plan(loop(), card("24GB", 2), lengths=LONG)).parts["gradients, Adam"] > plain.parts["gradients, Adam"]


@pytest.mark.parametrize(("name", "size"), [("llama3.1-8b", "10GB"), ("llama3.2-3b", "12GB"), ("qwen3-0.6b", "6GB")])
def test_what_it_advises_makes_it_fit(name, size):
    planned = plan(load_loop(name, complete=False), card(size), lengths=LONG)
    assert planned.changes
    for bad, changes in planned.changes.items():
        assert changes
        assert stage(bad, plan(load_loop(name, changes, complete=False), card(size), lengths=LONG)).fits
        assert (
            changes[:-1] == []
            or not stage(bad, plan(load_loop(name, changes[:1], complete=False), card(size), lengths=LONG)).fits
            or len(changes) == 1
        )


def test_a_smaller_micro_batch_keeps_the_batch_and_nothing_is_advised_for_nothing():
    changes = plan(loop(), card("10GB"), lengths=LONG).changes["ppo"]
    given = dict(line.split("=") for line in changes)
    assert int(given["ppo.training.per_device_train_batch_size"]) * int(given["ppo.training.gradient_accumulation_steps"]) == 16
    for left_out in given:
        fewer = [f"{key}={value}" for key, value in given.items() if key != left_out and "accumulation" not in key]
        assert (
            not stage("ppo", plan(load_loop("llama3.1-8b", fewer, complete=False), card("10GB"), lengths=LONG)).fits or "accum" in left_out
        )


def test_what_does_not_help_is_not_advised():
    assert plan(loop(), card("8.5GB"), lengths=LONG).changes["sft"] == ["sft.training.max_length=256"]  # and no smaller micro-batch


def test_where_nothing_helps_it_says_so():
    assert plan(loop(), card("4GB"), lengths=LONG).changes["ppo"] == []


def test_the_lengths_come_from_the_data_and_end_at_the_limits(tmp_path):
    rows = [{"prompt": "x" * 400, "completion": "y" * 80}, {"prompt": "x", "completion": "y"}]
    write_records(tmp_path / "d.jsonl", rows)
    write_records(
        tmp_path / "c.jsonl",
        [{"prompt": "p" * 40, "chosen": "a" * 4000, "rejected": "b"}, {"prompt": "q" * 80, "chosen": "a", "rejected": "b"}],
    )
    data = replace(loop().data, demonstrations=str(tmp_path / "d.jsonl"), comparisons=str(tmp_path / "c.jsonl"), answer_characters=100)
    found = lengths_of(loop(data=data))
    assert found.demonstration == 100 + 10 + 21 and found.completion == 21
    assert found.judged > 1000 > 40 > found.compared > 20 and found.prompt == 30
    known, unknown = (plan(loop(), card("80GB"), lengths=lengths) for lengths in (found, Lengths()))
    assert stage("sft", known).phases["train"] < stage("sft", unknown).phases["train"]
    assert lengths_of(loop()).demonstration is None  # the recipe's ???


def test_a_config_of_the_users_own_is_read(tiny_path, tmp_path):
    assert shapes_of(str(tiny_path)) == Shapes.of(tiny_config())
    with pytest.raises(
        InstructLiteError, match=r"me/unknown: its config.json is neither here nor to be had from the Hub; known without: Hugging"
    ):
        shapes_of("me/unknown")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    with pytest.raises(InstructLiteError, match="not the config of a decoder"):
        shapes_of(str(tmp_path))


def test_a_run_that_will_not_fit_is_warned_about(monkeypatch):
    monkeypatch.setattr(planning, "this_device", lambda gpus=1: Device(True, 12e9))
    lines = notices(loop())
    assert any(line.startswith("memory: ppo will need about") and "ppo.training." in line for line in lines)
    assert notices(loop(model="me/unknown")) == []


# --- the command ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_planned_at_once_and_without_torch(name):
    code = f"""
import resource, sys
from instructlite.cli import main
try: main(["plan", {name!r}, "--gpu", "80GB", "--bases"])
except SystemExit as end: assert not end.code
assert not {{"torch", "transformers", "trl", "datasets"}} & set(sys.modules), "loaded torch"
assert resource.getrusage(resource.RUSAGE_SELF).ru_utime < 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout and "meta-llama/Llama-3.1-70B-Instruct" in done.stdout


@pytest.mark.parametrize("name", recipes())
def test_headers_and_table_of_the_recipes_say_what_is_planned(name):
    """Where the tokenizer is here, rows are counted by it and not by their characters: hence the tolerance."""
    planned = plan(load_loop(name, complete=False), card("80GB"))
    header = re.search(r"^# Planned peaks on a GPU.* --gpu (\d+)GB\): (.*)\.$", recipes()[name].read_text(encoding="utf-8"), re.MULTILINE)
    said = {stage: float(peak) for stage, peak in (part.split() for part in header[2].split(", "))}
    assert said == pytest.approx({stage.stage: stage.peak / 1e9 for stage in planned.stages}, rel=0.1)
    assert int(header[1]) in CARDS
    assert planned.peak <= int(header[1]) * 1e9
    table = (recipes()[name].parent / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |")).split(" | ")
    assert float(row[2].removesuffix(" B")) == pytest.approx(shapes_of(planned.loop.model).parameters / 1e9, rel=0.05)
    assert [float(row[5]), float(row[6]), row[7]] == [max(said["sft"], said["reward"], said["judge"]), said["ppo"], f"{header[1]} GB"]


def test_the_command_says_what_to_change_and_fails_where_it_does_not_fit():
    shown = CliRunner().invoke(app, ["plan", "llama3.1-8b", "--gpu", "12GB"])
    assert shown.exit_code == 1 and "does not fit" in shown.output and "ppo would fit with: ppo.training." in shown.output
    assert CliRunner().invoke(app, ["plan", "llama3.1-8b", "--gpu", "80GB"]).exit_code == 0


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24", 24e9), ("40GiB", 40 * 2**30), ("7.5 GB", 7.5e9)])
def test_sizes_of_cards(text, size):
    assert card(text).bytes == size


def test_a_size_that_is_none_is_refused():
    with pytest.raises(InstructLiteError, match="--gpu big"):
        card("big")
