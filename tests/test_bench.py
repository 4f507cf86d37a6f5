"""The bench programs run end to end on a tiny model, and measure what they say."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_compare import make_adapter
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # programs, not a package: they find each other as scripts do

import data_rate
import panes
import phases as phases_module
import ppo_gpu
import ppo_profile
import verdict
from phases import CLEAR_REFS, Phases

from instructlite.data.containers import STARTER
from instructlite.data.records import write_records
from instructlite.pipeline import run_loop
from instructlite.training import rollout

SCORES = [f"score: {role}" for role in ppo_profile.ROLES]
STEP = {"generate", *SCORES, "forward: policy", "forward: value", "backward"}


def test_a_phase_inside_another_interrupts_it(monkeypatch):
    clock = iter(range(100))  # a second passes between any two looks
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(phases_module, "_peak_mb", lambda: None)
    phases = Phases()
    with phases.phase("outer"):
        with phases.phase("inner"):
            pass
        with phases.phase("inner"):
            pass
    measured = phases.stop()
    assert measured == {"seconds": {"rest": 2.0, "outer": 3.0, "inner": 2.0}, "peak_mb": {}}
    assert phases.running == ["rest"]


@pytest.mark.skipif(not CLEAR_REFS.exists() or torch.cuda.is_available(), reason="resident memory is measured on Linux without a GPU")
def test_a_peak_belongs_to_its_phase_only():
    phases = Phases()
    with phases.phase("large"):
        torch.ones(50_000_000)  # 200 MB, given back to the system at once
    with phases.phase("small"):
        pass
    peak = phases.stop()["peak_mb"]
    assert 150 < peak["large"] - peak["small"] < 250


@pytest.mark.parametrize("top_layers", [None, 2])
def test_the_floor_does_the_work_of_our_step(top_layers, tiny_path, monkeypatch):
    seen, run = [], ppo_profile.Floor.run
    monkeypatch.setattr(ppo_profile.Floor, "run", lambda floor, *args: (seen.append((floor, args[0])), run(floor, *args)))
    generate = rollout.generate
    result = ppo_profile.profile(str(tiny_path), top_layers, 16, 1)
    assert rollout.generate is generate  # nothing stays patched

    ours, floor = result["rounds"][0]["ours"]["seconds"], result["rounds"][0]["floor"]["seconds"]
    lower = {"score: lower layers"} if top_layers else set()
    assert set(ours) == {*STEP, *lower, "optimiser", "rest"}
    assert set(floor) == {*STEP, *lower, "rest"}
    assert min(*ours.values(), *floor.values()) > 0
    assert result["floor_ratio"] == pytest.approx(sum(ours.values()) / sum(floor.values()), abs=1e-4)

    # The reference, whose adapter stays at zero, gives the same log-probabilities through both.
    floor, batch = seen[0]
    assert len(batch) == 16 and batch.mask.shape[1] == 64 and batch.mask.all()
    with torch.no_grad():
        below = floor.lower(batch.input_ids, use_cache=False).last_hidden_state if top_layers else None
        log_probs = floor._output("reference", batch.input_ids, below, 64)
    assert_close(log_probs.view(16, 64), batch.reference_logps, atol=0.1, rtol=0)
    assert batch.reference_logps.std() > 1  # so that 0.1 says something


def test_ppo_profile_prints_and_records(tiny_path, tmp_path, capsys):
    ppo_profile.main(
        ["--model", str(tiny_path), "--layers", "top1", "--micro-batch", "16", "--rounds", "1", "--json", str(tmp_path / "p.json")]
    )
    result = json.loads((tmp_path / "p.json").read_text())
    assert f"{result['floor_ratio']:.2f}" in capsys.readouterr().out.splitlines()[-1]
    assert {"date", "machine", "versions", "settings", "phases", "rounds"} <= set(result)
    assert result["settings"]["top_layers"] == 1


TINY = ["--config", "tiny", "--batch", "4", "--micro-batch", "2", "--response-length", "6", "--updates", "2"]


def test_ppo_gpu_runs_on_the_tiny_config(tmp_path, capsys, monkeypatch):
    outer, enter = set(), Phases.enter
    monkeypatch.setattr(Phases, "enter", lambda phases, name: (outer.add(phases.running[-1]), enter(phases, name)))
    ppo_gpu.main([*TINY, "--quantization", "none", "--json", str(tmp_path / "g.json")])
    result = json.loads((tmp_path / "g.json").read_text())
    assert set(result["bf16"]["seconds"]) >= {*STEP, "load", "optimiser"}
    assert result["bf16"]["tokens_per_s"] == pytest.approx(4 * 6 / result["bf16"]["seconds"]["generate"], rel=0.05)
    assert len(result["bf16"]["cycles"]) == 2
    assert outer == {"rest"}  # what checkpointing computes again in the backward pass is part of that, and no forward pass
    assert result["settings"]["gradient_checkpointing"] and result["settings"]["response_length"] == 6
    assert "generated tokens/s" in capsys.readouterr().out


def test_ppo_gpu_says_what_does_not_fit(tmp_path, capsys, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Accelerator, "backward", too_large)
    ppo_gpu.main([*TINY, "--quantization", "none", "--json", str(tmp_path / "g.json")])
    assert "does not fit: CUDA out of memory (in: backward)" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "g.json").read_text())["bf16"]
    assert recorded["out_of_memory"] == "CUDA out of memory"
    assert set(recorded["cycles"][0]["seconds"]) >= {"generate", "backward"}


@pytest.mark.parametrize(
    "arguments, said", [(["--layers", "top9"], "this model has 3 layers"), (["--model", "no/such"], "no/such: neither")]
)
def test_ppo_profile_says_in_one_line_what_is_wrong(arguments, said, tiny_path):
    with pytest.raises(SystemExit, match=said):
        ppo_profile.main(["--model", str(tiny_path), *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would run")
def test_ppo_gpu_needs_a_gpu_for_the_real_shapes(capsys):
    with pytest.raises(SystemExit):
        ppo_gpu.main([])
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_ppo_gpu_compares_nf4_with_bf16(tmp_path, capsys):
    ppo_gpu.main([*TINY, "--json", str(tmp_path / "g.json")])
    result = json.loads((tmp_path / "g.json").read_text())
    assert 0.3 < result["weights_ratio"] < 0.8  # the embeddings and the head stay in bf16
    assert result["speed_ratio"] == pytest.approx(result["bf16"]["seconds_per_cycle"] / result["nf4"]["seconds_per_cycle"], rel=0.05)
    assert "nf4 / bf16: weights" in capsys.readouterr().out


def test_data_rate_measures_check_and_prepare_in_their_own_processes(tmp_path, capsys):
    pytest.importorskip("rensa")
    data_rate.main(["--rows", "150", "300", "--work", str(tmp_path), "--json", str(tmp_path / "d.json")])
    result = json.loads((tmp_path / "d.json").read_text())
    for task in ("check", "prepare"):
        assert [row["rows"] for row in result[task]] == [150, 300]
        assert all(row["peak_mb"] > 10 and row["seconds"] > 0 for row in result[task])
    assert "2 times the rows" in capsys.readouterr().out
    data_rate.generate(tmp_path / "c.jsonl", 50)
    assert 700 < (tmp_path / "c.jsonl").stat().st_size / 50 < 1500  # bytes a row


def test_the_classifier_of_use_cases_is_trained_and_measured():
    pytest.importorskip("sklearn")
    import mixture_model

    features, labels, prompts = mixture_model.labelled([STARTER / "demonstrations.jsonl"])
    assert set(labels) == {"open_qa", "brainstorming"}  # the others are too rare there to be learnt
    result = mixture_model.measure(mixture_model.fit(features, labels, 1.0), features, labels)
    assert result["rows"] == len(prompts) == 130 and result["accuracy"] > 0.9


TINY_RECIPE = """\
model: {model}
dtype: float32
chat_template: chatml
lora: {{r: 4, alpha: 8, top_layers: 1}}
data: {{demonstrations: {folder}/d.jsonl, comparisons: {folder}/c.jsonl, judge: 8, heldout: 8, comparison_limit: 16}}
sft: {{training: {{max_steps: 1, gradient_checkpointing: false}}}}
reward: {{training: {{max_steps: 1, gradient_checkpointing: false}}}}
dpo: {{training: {{max_steps: 1, gradient_checkpointing: false}}}}
ppo: {{training: {{per_device_train_batch_size: 2, num_mini_batches: 2, num_ppo_epochs: 1, max_steps: 4, response_length: 4}}}}
evaluation: {{prompts: 3, samples: 1, max_new_tokens: 4}}
"""


def test_the_verdict_trains_all_policies_and_records_one_table(tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "run_loop", lambda *given, **options: run_loop(*given, **(options | {"isolate": False})))
    write_records(tmp_path / "d.jsonl", [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)])
    write_records(tmp_path / "c.jsonl", [{"prompt": f"ask {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)])
    recipe, run, file = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "verdict.json"
    recipe.write_text(TINY_RECIPE.format(model=tiny_path, folder=tmp_path))
    verdict.main([str(recipe), "--output", str(run), "--json", str(file), "evaluation.samples=2"])
    recorded = json.loads(file.read_text())
    names = ["base", "few-shot:4", "sft", "best-of-4", "dpo", "ppo-ptx", "ppo"]
    assert [row["candidate"] for row in recorded["verdict"]] == names
    rows = {row["candidate"]: row for row in recorded["verdict"]}
    for name in set(names) - {"sft"}:
        rate = rows[name]["sampled against sft"]
        assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
        greedy = rows[name]["greedy against ppo"]
        assert greedy is None if name in ("ppo", "best-of-4") else 0 <= greedy["low"] <= greedy["rate"] <= greedy["high"] <= 1
    assert rows["sft"]["sampled against sft"] is None
    forth, back = rows["ppo"]["sampled against sft"], rows["sft"]["sampled against ppo"]
    assert forth["rate"] == pytest.approx(1 - back["rate"]) and forth["low"] == pytest.approx(1 - back["high"])
    assert {"date", "machine", "versions", "recipe", "report"} <= set(recorded) and "answers" not in recorded["report"]
    assert recorded["report"]["settings"]["samples"] == 2
    (watched,) = [row for row in recorded["report"]["training"] if row["candidate"] == "ppo-ptx"]
    assert {"objective/kl", "objective/score", "watch/score"} <= set(watched["curves"])
    assert [stage["stage"] for stage in recorded["stages"]][4:] == ["ppo", "dpo", "ppo-ptx", "report"]
    assert "best-of-4" in capsys.readouterr().out


def test_panes_are_compared_on_the_same_work(tiny_base, tmp_path, monkeypatch, capsys):
    for name, seed in (("sft", 1), ("ppo", 2)):
        make_adapter(tiny_base, tmp_path / name, seed)
    write_records(tmp_path / "data" / "heldout_prompts.jsonl", [{"prompt": f"say {n}"} for n in range(3)])
    recorded = tmp_path / "panes.json"
    options = ["--prompts", "2", "--new-tokens", "5", "--rounds", "2", "--dtype", "float32", "--json", str(recorded)]
    monkeypatch.setattr(sys, "argv", ["panes.py", str(tmp_path), *options])
    panes.main()
    result = json.loads(recorded.read_text())
    assert {name: len(times) for name, times in result["seconds"].items()} == {"three": 2, "base": 2, "sft": 2, "ppo": 2}
    assert result["ratio"] > 0 and "10 tokens a pane" in capsys.readouterr().out
