"""SFT, reward model, DPO and evaluation in two processes (gloo, CPU) give what one process gives with the same global batch."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from processes import in_two_processes
from safetensors.torch import load_file
from test_compare import DEMONSTRATIONS, PROMPTS, make_adapter
from torch.distributed.tensor import DTensor

from instructlite import evaluate
from instructlite.config import Lora, recipe_path
from instructlite.data.records import write_records
from instructlite.errors import InstructLiteError
from instructlite.evaluation import kept, workers
from instructlite.models.base import load_base
from instructlite.models.manifest import Adapter
from instructlite.training import sft, shares
from instructlite.training.checkpoints import newest_verified, step_of
from instructlite.training.dpo import DPORecipe
from instructlite.training.reward import RewardRecipe
from instructlite.training.sft import SFTRecipe
from instructlite.training.shares import Filled, Shares, dealt

ROWS = [{"prompt": f"What is {i} + 1?" + "?" * (i % 4), "completion": f"It is {i + 1}." + "!" * (i % 7)} for i in range(40)]
PAIRS = [{"prompt": f"Is {i} odd?", "chosen": "Yes" + "!" * (i % 4), "rejected": "No" + "?" * (i % 5)} for i in range(40)]
RANKINGS = [
    {"prompt": f"Say {i}.", "responses": ["one", "One!", "no" * (1 + i % 3), "never ever"], "ranks": [0, 0, 1, 2]} for i in range(40)
]
# 21 = 8 + 8 + 5: the last batch is odd. 17 = 8 + 8 + 1: in it the second process has nothing but a row that teaches nothing.
DATA = {
    "sft": (SFTRecipe, {"data": ROWS[:21], "eval_data": ROWS[21:40]}),
    "sft_of_one": (SFTRecipe, {"data": ROWS[:17], "eval_data": ROWS[21:22]}),
    "comparisons": (RewardRecipe, {"data": PAIRS[:17], "eval_data": PAIRS[21:34], "demonstrations": ROWS[:11]}),
    "rankings": (RewardRecipe, {"data": [*RANKINGS[:11], *PAIRS[:10]], "eval_data": [*RANKINGS[30:34], *PAIRS[21:30]]}),
    "dpo": (DPORecipe, {"data": PAIRS[:21], "eval_data": PAIRS[21:34]}),
    "dpo_of_one": (DPORecipe, {"data": PAIRS[:17], "eval_data": PAIRS[21:22]}),
}
SHAPES = {"two": {"per_device_train_batch_size": 4}, "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}}


def recipe_of(name: str, base: str, dropout: float = 0.0, **training):
    kind, options = DATA[name]
    training = {
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "per_device_eval_batch_size": 3,
        "adam_epsilon": 1e-6,
    } | training
    if kind is RewardRecipe:
        training["learning_rate"] = 3e-3
    lora = Lora(r=4, alpha=8, dropout=dropout)
    return kind(model=base, dtype="float32", chat_template="chatml", lora=lora, training=training, **options)


def trained(base: str, out: str, processes: int) -> dict:
    """Weights and metrics of all recipes."""
    torch.set_num_threads(1)
    found = {}
    for name in DATA:
        for shape, batch in SHAPES.items() if processes > 1 else [("one", {"per_device_train_batch_size": 8})]:
            adapter = recipe_of(name, base, **batch).run(f"{out}/{name}-{shape}")
            found[name, shape] = load_file(adapter.path / "adapter_model.safetensors"), adapter.metrics
    return found


@pytest.fixture(scope="module")
def one(tiny_path, tmp_path_factory):
    return trained(str(tiny_path), str(tmp_path_factory.mktemp("one")), 1)


@pytest.fixture(scope="module")
def two(tiny_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return in_two_processes(trained, tiny_path, out), out


def test_an_order_is_dealt_row_by_row_and_what_is_missing_teaches_nothing(monkeypatch):
    monkeypatch.setattr(shares, "broadcast_object_list", lambda state: None)
    batches = [list(Shares(range(10, 19), 2, rank, 2)) for rank in range(2)]
    assert batches == [[[10, 12], [14, 16], [18]], [[11, 13], [15, 17], [-19]]]
    assert [len(Shares(range(9), 2, rank, 2, drop_last=True)) for rank in range(2)] == [2, 2]
    assert [Filled("abcdefghi", str.upper)[number] for number in (8, -9)] == ["i", "I"]


def test_held_out_rows_are_dealt_as_long_as_all_get_as_many():
    assert [dealt(range(9), 2, rank, 2) for rank in range(2)] == [
        [([0, 1], True), ([4, 5], True), ([8], False)],
        [([2, 3], True), ([6, 7], True), ([8], False)],
    ]
    assert dealt(range(3), 2, 0, 1) == [([0, 1], False), ([2], False)]


OWN = ("train_seconds", "train_tokens_per_second")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DATA)
def test_two_processes_learn_what_one_with_the_same_global_batch_learns(name, shape, one, two):
    (first, second), _ = two
    (weights, metrics), (ours, measured) = one[name, "one"], first[name, shape]
    assert weights.keys() == ours.keys()
    assert max((weights[key] - ours[key]).abs().max().item() for key in weights) < 1e-4
    # Of what is measured on each batch before it is learnt from, the log has the mean over micro-batches, whatever their size.
    uneven = {"train_accuracy", "train_margin"} if shape == "accumulated" else set()
    for key in metrics.keys() - uneven - {*OWN}:
        assert measured[key] == pytest.approx(metrics[key], abs=1e-4), key
    assert second[name, shape][1] == measured


# --- evaluation ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_path, tmp_path_factory) -> Path:
    out, base = tmp_path_factory.mktemp("adapters"), load_base(tiny_path, dtype="float32", chat_template="chatml")
    for seed, name in enumerate(("sft", "ppo", "judge", "chooser")):
        make_adapter(base, out / name, seed, reward=name in ("judge", "chooser"))
    return out


def compared(base: str, out: str, processes: int, adapters: str, directory: str, broken: bool = False) -> dict:
    torch.set_num_threads(1)
    asked, original = [], kept.computed

    def computed(model, what, rows, *options):
        asked.append((what, len(rows)))
        if broken and what == "scores" and os.environ["RANK"] == "1":
            raise RuntimeError("no memory is left")
        return original(model, what, rows, *options)

    workers.computed = kept.computed = computed
    try:
        report = evaluate(
            ["base", f"{adapters}/sft", "best-of-2", f"{adapters}/ppo"], PROMPTS, f"{adapters}/judge", reward=f"{adapters}/chooser",
            heldout_demonstrations=DEMONSTRATIONS, max_new_tokens=8, batch_size=3, output_dir=f"{out}/{directory}",
        )  # fmt: skip
    except InstructLiteError as error:
        return {"said": str(error)}
    finally:
        workers.computed = kept.computed = original
    return {"report": asdict(report), "asked": asked}


def test_an_evaluation_is_shared_out_and_its_report_is_that_of_one_process(tiny_path, tmp_path, adapters):
    one = compared(str(tiny_path), str(tmp_path), 1, str(adapters), "one")
    first, second = in_two_processes(compared, tiny_path, tmp_path, str(adapters), "two")
    assert first["report"] == second["report"]
    one["report"].pop("seconds"), first["report"].pop("seconds")
    assert first["report"] == one["report"]
    saved = [json.loads((tmp_path / name / "report.json").read_text()) | {"seconds": None} for name in ("one", "two")]
    assert saved[0] == saved[1]
    rows = [sum(count for _, count in found["asked"]) for found in (one, first, second)]
    assert rows[1] + rows[2] == rows[0] and min(rows[1:]) > 0.4 * rows[0]


def test_what_breaks_in_one_process_stops_an_evaluation_in_all(tiny_path, tmp_path, adapters):
    first, second = in_two_processes(compared, tiny_path, tmp_path, str(adapters), "broken", True)
    assert first["said"] == "process 1: no memory is left"
    assert second["said"] == "the main process has stopped: process 1: no memory is left"


# --- a process that is killed -------------------------------------------------------------------------------------------


def saved_often(base: str) -> SFTRecipe:
    """With dropout: each process has a random state of its own, which a checkpoint has to hold."""
    return recipe_of("sft", base, 0.1, per_device_train_batch_size=4, save_steps=1, num_train_epochs=3)


def whole(base: str, out: str, processes: int, resume: bool = False) -> str:
    torch.set_num_threads(1)
    return saved_often(base).run(f"{out}/sft", resume=resume).sha256


def killed_in(base: str, out: str, processes: int, step: int) -> str:
    """What the first process says when the second one is killed."""
    torch.set_num_threads(1)
    original = sft.SFTTrainer.training_step

    def training_step(trainer, *arguments, **options):
        if trainer.state.global_step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer, *arguments, **options)

    sft.SFTTrainer.training_step = training_step
    with pytest.raises(InstructLiteError) as error:
        saved_often(base).run(f"{out}/sft")
    return str(error.value)


@pytest.mark.parametrize("step", [2, 4])  # in the middle of an epoch, and in another one than the first
def test_a_killed_process_is_named_by_the_others_and_the_run_goes_on_to_the_same_weights(step, tiny_path, tmp_path):
    (tmp_path / "whole").mkdir()
    expected = in_two_processes(whole, tiny_path, tmp_path / "whole")
    (said,) = in_two_processes(killed_in, tiny_path, tmp_path, step, killed=True)
    assert re.match(r"process 1 of 2 \(pid \d+\) (is gone: it was killed \(kill -9|was killed by SIGKILL)", said), said
    assert "go on with --resume (resume=True)" in said
    assert step_of(newest_verified(tmp_path / "sft.partial" / "trainer", pytest.fail)) == step
    assert in_two_processes(whole, tiny_path, tmp_path, True) == expected
    assert json.loads((tmp_path / "sft" / "run.json").read_text())["resumed_after_step"] == step


RECIPE = """\
model: {base}
dtype: float32
chat_template: chatml
lora: {{r: 4, alpha: 8}}
data: {{demonstrations: {out}/d.jsonl, comparisons: {out}/c.jsonl, judge: 8, heldout: 8}}
sft: {{training: {{max_steps: 300, per_device_train_batch_size: 2, gradient_checkpointing: false, save_steps: 1}}}}
"""


def launched(out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "instructlite", "run"]
    command += [str(out / "recipe.yaml"), "--only", "sft", *arguments]
    env, here = os.environ | {"OMP_NUM_THREADS": "1"}, Path(__file__).parent.parent
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here, env=env)


@pytest.mark.slow
def test_of_a_launcher_all_processes_end_with_the_rank_and_the_cause_and_resume_goes_on(tiny_path, tmp_path):
    write_records(tmp_path / "d.jsonl", ROWS)
    write_records(tmp_path / "c.jsonl", PAIRS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=tiny_path, out=tmp_path))
    hashes = {}
    for name in ("killed", "whole"):
        run = ("--output", str(tmp_path / name))
        if name == "killed":
            process, said = launched(tmp_path, *run), []
            for line in process.stderr:
                said.append(line)
                if "sft: training" in line:
                    workers = psutil.Process(process.pid).children()
                    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
                    break
            said += process.stderr.readlines()
            assert process.wait(60) == 1
            assert not [worker for worker in workers if worker.is_running()]
            ours = [line for line in said if line.startswith("instructlite: process 1 of 2")]
            assert len(ours) == 1 and "was killed" in ours[0] and "--resume" in ours[0], said
            assert any("SIGKILL" in line for line in said)
            run += ("--resume",)
        process = launched(tmp_path, *run)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert ("going on after step" in err) == (name == "killed")
        hashes[name] = Adapter.load(tmp_path / name / "sft").sha256
    assert hashes["killed"] == hashes["whole"]


# --- FSDP ---------------------------------------------------------------------------------------------------------------


def sharded(base: str, out: str, processes: int, name: str) -> dict:
    """accelerate has FSDP on GPUs only: its state is told that these two processes are such."""
    torch.set_num_threads(1)
    original = AcceleratorState.__init__

    def init(state, *arguments, fsdp_plugin=None, **options):
        original(state, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    built, get = [], DTensor.full_tensor
    DTensor.full_tensor = lambda tensor, **options: (built.append(tensor.to_local().numel()), get(tensor, **options))[1]
    recipe = recipe_of(name, base, per_device_train_batch_size=4, fsdp=True, fsdp_config={"version": 2, "reshard_after_forward": True})
    adapter = recipe.run(f"{out}/{name}")
    AcceleratorState.__init__, DTensor.full_tensor = original, get
    return {"weights": load_file(adapter.path / "adapter_model.safetensors"), "metrics": adapter.metrics, "local": sum(built)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "comparisons", "rankings", "dpo"])
def test_fsdp_learns_what_one_process_learns(name, one, tiny_path, tmp_path):
    weights, metrics = one[name, "one"]
    first, second = in_two_processes(sharded, tiny_path, tmp_path, name)
    assert weights.keys() == first["weights"].keys()
    assert max((weights[key] - first["weights"][key]).abs().max().item() for key in weights) < 1e-4
    for key in metrics.keys() - {*OWN}:
        assert first["metrics"][key] == pytest.approx(metrics[key], abs=1e-4), key
    assert 0 < first["local"] < sum(value.numel() for value in weights.values()), "no process holds all of the adapter"


# --- launchers' configurations ------------------------------------------------------------------------------------------

CONFIGURATIONS = sorted((Path(__file__).parent.parent / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations_that_are_shipped(path):
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "fsdp_qlora": "FSDP"}[path.stem]
    assert (config.distributed_type, config.num_machines, config.use_cpu) == (kind, 1, False)
    assert recipe_path(f"accelerate/{path.stem}") == path
    options = {f"--{name}" for name in (config.fsdp_config or {}) | (config.deepspeed_config or {})}
    assert options <= {name for action in launch_command_parser()._actions for name in action.option_strings}
    assert all(f"--{name}" in path.read_text() for name in ("config_file", "num_processes"))
