"""Kill -9 the whole loop at random moments, let it go on with resume, and compare every final adapter with the uninterrupted run's.

    python bench/kill.py [--kills 50] [--seed 0] [--json FILE]

The loop is what `instructlite run tiny.yaml --resume` runs (data, SFT, an ensemble of two reward models, judge, PPO, report) on the
35k-parameter model of the tests, with dropout, accumulation and a checkpoint after every step, so that a large part of the time is
saving. Each kill has a run of its own: SIGKILL to its whole process group at a moment that is uniform over the time the uninterrupted
run took, then a start with resume that is left to finish. `equal` counts the kills after which all five adapters have the sha256 of the
uninterrupted run and nothing is left over; a run that was done before its moment came is not counted and made again.

Every start is a process of its own, forked from this one, which has imported everything and run nothing; all stages run in that one
process, so that the signal hits whatever is going on.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # bit for bit holds for one number of threads; and a process with threads should not fork
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import recording  # noqa: E402

RECIPE = """\
model: {base}
dtype: float32
chat_template: chatml
seed: 1
lora: {{r: 4, alpha: 8, top_layers: 2}}
data: {{demonstrations: {demonstrations}, comparisons: {comparisons}, judge: 12, heldout: 8}}
sft: {{lora: {{dropout: 0.1}}, training: {{max_steps: 6, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, {common}}}}}
reward: {{ensemble: 2, training: {{max_steps: 4, per_device_train_batch_size: 2, {common}}}}}
ppo:
  training:
    {{per_device_train_batch_size: 2, num_mini_batches: 2, num_ppo_epochs: 2, max_steps: 8, response_length: 6, kl_controller: adaptive,
      {common}}}
evaluation: {{prompts: 3, samples: 1, max_new_tokens: 4, greedy: false}}
"""
COMMON = "learning_rate: 1e-2, save_steps: 1, logging_steps: 3, gradient_checkpointing: false"


def prepare(directory: Path) -> Path:
    """Base, data and recipe. In a process of its own, so that the one which forks has never computed anything."""
    import torch
    from conftest import byte_tokenizer, tiny_config
    from transformers import LlamaForCausalLM

    base = directory / "base"
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    model.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    rows = {
        "demonstrations": [{"prompt": f"question {i}", "completion": "answer" + "!" * (i % 5)} for i in range(24)],
        "comparisons": [{"prompt": f"ask {i}", "chosen": "good" * (1 + i % 3), "rejected": "bad" * (1 + i % 2)} for i in range(40)],
    }
    for name, content in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    recipe = directory / "tiny.yaml"
    files = {name: directory / f"{name}.jsonl" for name in rows}
    recipe.write_text(RECIPE.format(base=base, common=COMMON, **files), encoding="utf-8")
    return recipe


def run_to(recipe: Path, directory: Path, log: Path) -> None:
    """What a forked process does, with its output in a file."""
    from instructlite.config import load_loop
    from instructlite.pipeline import run_loop
    from instructlite.training.recipe import quiet_libraries

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    quiet_libraries()
    run_loop(load_loop(recipe), directory, resume=True, say=lambda line: print(line, flush=True))


def start(recipe: Path, directory: Path, log: Path, kill_after: float | None = None) -> bool:
    """Start or go on, and kill -9 after so many seconds (None: never). Whether it was killed before it finished."""
    log.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run_to, args=(recipe, directory, log))
    process.start()
    os.setpgid(process.pid, process.pid)  # not this process's group, which is not to be killed
    process.join(kill_after)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode > 0:
        raise SystemExit(f"the loop failed with code {process.exitcode}:\n{log.read_text()[-4000:]}")
    return process.exitcode < 0


def hit(run: Path, log: Path) -> dict[str, Any]:
    """What a killed run was doing, by its last words and by what it has left."""
    said = re.findall(r"^(data|sft|reward|judge|ppo|report): ", log.read_text(encoding="utf-8") if log.exists() else "", re.MULTILINE)
    return {"stage": said[-1] if said else "start", "while_saving": any(run.rglob("trainer/.staging"))}


def adapters(run: Path) -> dict[str, str]:
    from instructlite.models.manifest import sha256_file

    files = sorted(run.rglob("adapter_model.safetensors"))
    return {str(file.parent.relative_to(run)): sha256_file(file) for file in files}


def killed_runs(recipe: Path, directory: Path, kills: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The uninterrupted run, and one entry for each run that was killed."""
    chance, log, run = random.Random(seed), directory / "log", directory / "run"
    clock = time.perf_counter()
    start(recipe, directory / "whole", log)
    whole = {"seconds": round(time.perf_counter() - clock, 2), "adapters": adapters(directory / "whole")}
    print(f"uninterrupted: {whole['seconds']} s, {len(whole['adapters'])} adapters", flush=True)
    runs: list[dict[str, Any]] = []
    while len(runs) < kills:
        moment = round(chance.uniform(0, whole["seconds"]), 3)
        if start(recipe, run, log, kill_after=moment):
            entry = {"after_s": moment, **hit(run, log)}
            start(recipe, run, log)
            rest = [path.name for path in run.glob("*.partial")]
            runs.append({**entry, "equal": adapters(run) == whole["adapters"] and not rest, "left_over": rest})
            print("  ".join(f"{name} {value}" for name, value in [("kill", len(runs)), *runs[-1].items()]), flush=True)
        shutil.rmtree(run, ignore_errors=True)
    return whole, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, with a line for every kill")
    args = parser.parse_args()
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        preparing = multiprocessing.get_context("spawn").Process(target=prepare, args=(directory,))
        preparing.start()
        # What `instructlite run` imports while it runs.
        import transformers.models.llama.modeling_llama  # noqa: F401

        import instructlite.evaluation.compare
        import instructlite.pipeline
        import instructlite.training.ppo
        import instructlite.training.reward  # noqa: F401

        preparing.join()
        whole, runs = killed_runs(directory / "tiny.yaml", directory, args.kills, args.seed)
    results = {
        "kills": len(runs),
        "equal": sum(run["equal"] for run in runs),
        "stages_hit": dict(Counter(run["stage"] for run in runs)),
        "killed_while_saving": sum(run["while_saving"] for run in runs),
        "seconds": round(time.perf_counter() - clock, 1),
    }
    print(json.dumps(results, indent=2))
    if args.json:
        versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")}
        recording.write(args.json, results | {"versions": versions, "seed": args.seed, "uninterrupted": whole, "table": runs})
    sys.exit(results["equal"] != results["kills"])


if __name__ == "__main__":
    main()
