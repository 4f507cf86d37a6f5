"""Peak memory, or time, as `instructlite plan` has it, beside what was measured: every stage of finished runs, and the PPO of
ppo_vs_trl.json or ppo_gpu.json.

    python bench/plan_vs_measured.py [RUN ...] [--gpu | --time] [--json FILE]
    instructlite run smollm2-135m --output runs/planned && python bench/plan_vs_measured.py runs/planned

A run's stages.json has the peak of each stage, measured in a process of its own: resident memory, or with --gpu what torch allocated. The
plan is made anew from the run's recipe.yaml and the data files it names; nothing is run here. What a plan of resident memory adds to the
tensors is in planning/devices.py: imports, what the allocator keeps, compiled kernels. Those numbers were fitted to runs of the 135M model
on one machine, most of those recorded in results/plan_vs_measured.json: there the errors are those of a fit; elsewhere, of a prediction.

--time: seconds in place of memory, with the speed that `instructlite plan RECIPE --calibrate` has measured on the machine of the runs.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import recording

from instructlite.config import load_loop
from instructlite.errors import InstructLiteError
from instructlite.models import memory
from instructlite.models.memory import PPOCycle
from instructlite.planning.bases import shapes_of
from instructlite.planning.devices import Device, this_device
from instructlite.planning.plan import plan
from instructlite.planning.stages import StagePlan

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT_LENGTH = 22  # tokens of the prompts of ppo_vs_trl.py, in ChatML
SHAPES = 8  # all answers of that bench have one length: a few batch shapes


def of_run(run: Path, gpu: bool) -> Iterator[dict[str, Any]]:
    measured = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    field = "peak_gpu_mb" if gpu else "peak_rss_mb"
    for stage in plan(load_loop(run / "recipe.yaml"), Device(gpu, float("inf"))).stages:
        if field in measured.get(stage.stage, {}):
            largest = max(stage.phases.values())
            planned = stage.persistent + largest if gpu else stage.peak  # torch counts its tensors, not its context
            yield row(f"{run.name} {stage.stage}", planned, measured[stage.stage][field] * 2**20)


def times_of(run: Path) -> Iterator[dict[str, Any]]:
    measured = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    planned = plan(load_loop(run / "recipe.yaml"), this_device(), here=True)
    if planned.speed is None:
        raise InstructLiteError(f"{run}: no speed for its recipe here; instructlite plan {run / 'recipe.yaml'} --calibrate measures it")
    for stage, duration in planned.durations.items():
        if stage in measured and duration.known:
            seconds = measured[stage]["seconds"]
            ratio = round(duration.seconds / seconds, 3)
            yield {"case": f"{run.name} {stage}", "planned_s": round(duration.seconds, 1), "measured_s": seconds, "ratio": ratio}


def of_ppo_vs_trl() -> Iterator[dict[str, Any]]:
    """Policy, reference, value and reward of rank 16 in bf16, 16 answers of 64 tokens, in micro-batches."""
    recorded = json.loads((RESULTS / "ppo_vs_trl.json").read_text(encoding="utf-8"))
    settings, shapes = recorded["settings"], shapes_of(recorded["settings"]["model"])
    for side, top_layers in settings["top_layers"].items():
        adapter = memory.adapter_parameters(shapes, settings["lora_r"], top_layers=top_layers)
        micro_batch, layers = settings["micro_batch"], shapes.num_hidden_layers
        cycle = PPOCycle(
            shapes=shapes, size=2, rank=settings["lora_r"], shared_layers=layers - (top_layers or layers),
            prompt=PROMPT_LENGTH, response=settings["response_length"], rollout=settings["batch"], generated_at_once=settings["batch"],
            micro_batch=micro_batch[side] if isinstance(micro_batch, dict) else micro_batch, chunk=256, checkpointing=False,
        )  # fmt: skip
        parts = {"base": memory.weights(shapes, "none", 2), "adapters": 16 * adapter, "trained": memory.trained(2 * adapter)}
        stage = StagePlan(side, parts, cycle.phases(), 0.0, Device(False, float("inf")), SHAPES)
        yield row(f"ppo_vs_trl {side}", stage.peak, recorded[side]["ours"]["peak_rss_mb"] * 1e6)


def of_ppo_gpu(file: Path) -> Iterator[dict[str, Any]]:
    """What ppo_gpu.py recorded, if it did: Llama-3.1-8B's shapes, checkpointed, in 4 bits and in bf16."""
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    shapes = shapes_of("meta-llama/Llama-3.1-8B-Instruct")
    for name, quantization in (("nf4", "nf4"), ("bf16", "none")):
        if "peak_mb" not in recorded.get(name, {}):
            continue
        settings, rank = recorded["settings"], recorded["lora_r"]
        cycle = PPOCycle(
            shapes=shapes, size=2, rank=rank, shared_layers=0, prompt=recorded["prompt_length"], response=settings["response_length"],
            rollout=settings["batch"], generated_at_once=settings["batch"], micro_batch=settings["per_device_train_batch_size"], chunk=256,
            checkpointing=True, quantization=quantization,
        )  # fmt: skip
        adapter = memory.adapter_parameters(shapes, rank)
        persistent = memory.weights(shapes, quantization, 2) + 4 * memory.FULL * adapter + memory.trained(2 * adapter)
        measured = max(peak for phase, peak in recorded[name]["peak_mb"].items() if phase != "load")
        yield row(f"ppo_gpu {name}", persistent + max(cycle.phases().values()), measured * 1e6)


def row(name: str, planned: float, measured: float) -> dict[str, Any]:
    return {
        "case": name,
        "planned_gb": round(planned / 1e9, 3),
        "measured_gb": round(measured / 1e9, 3),
        "ratio": round(planned / measured, 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories with recipe.yaml and stages.json")
    parser.add_argument("--gpu", action="store_true", help="compare what torch allocated on the GPU")
    parser.add_argument("--time", action="store_true", help="compare seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table")
    args = parser.parse_args(arguments)
    if args.time:
        rows, unit = [found for run in args.runs for found in times_of(run)], "s"
    else:
        recorded = of_ppo_gpu(RESULTS / "ppo_gpu.json") if args.gpu else of_ppo_vs_trl()
        rows, unit = [*(found for run in args.runs for found in of_run(run, args.gpu)), *recorded], "gb"
    print(f"{'':32}{'planned':>12}{'measured':>13}{'ratio':>8}  ({'GB' if unit == 'gb' else unit})")
    for found in rows:
        print(f"{found['case']:32}{found[f'planned_{unit}']:12.2f}{found[f'measured_{unit}']:13.2f}{found['ratio']:8.2f}")
    worst = max((abs(found["ratio"] - 1) for found in rows), default=0.0)
    print(f"largest error {100 * worst:.0f} % of {len(rows)} cases")
    if args.json:
        recording.write(args.json, {"cases": rows, "largest_error": round(worst, 3)})


if __name__ == "__main__":
    main()
