"""The alignment tax and what PPO-ptx gives back: PPO twice from one run's SFT and reward adapters, without ptx and with it.

    python bench/ptx_tax.py RUN [KEY=VALUE ...] [--ptx-coef 0.1] [--every 2] [--output DIRECTORY] [--json FILE]

RUN is a directory that `instructlite run` or `instructlite demo` wrote; options over its recipe are given as there
(ppo.training.max_steps=48). Both trainings have the same seed, prompts, rewards and options; only `ptx_coef` differs. Every second
passage of the starter prose (source by source) is what ptx sees, the others are held out: the policy's perplexity on those is measured
before the first update and after every few cycles. `rise_ratio` is the rise with ptx over the rise without it.
"""

import argparse
import math
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import recording
from transformers import TrainerCallback

from instructlite.config import Loop, load_loop
from instructlite.data.records import data_hash, read_records
from instructlite.models.sampling import log_probs
from instructlite.pipeline import stage_inputs
from instructlite.training.ppo import PTX_COEF, PPORecipe
from instructlite.training.ppo_trainer import PPOTrainer
from instructlite.training.recipe import Run, quiet_libraries, versions

SHOWN = {"score": "objective/score", "kl": "objective/kl", "ptx_loss": "ptx/loss"}
MAX_TOKENS = 256  # of a held-out passage


class Perplexity(TrainerCallback):
    """Measures the policy on held-out passages, before the first update and at the end of every few cycles."""

    def __init__(self, trainer: PPOTrainer, texts: list[str], every: int):
        self.trainer, self.every = trainer, every
        tokenizer = trainer.unwrapped.base.tokenizer
        passages = [tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS] for text in texts]
        self.sequences = [(ids[:1], ids[1:]) for ids in passages]
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cycles, rest = divmod(state.global_step, args.steps_per_cycle)
        if rest == 0 and (cycles % self.every == 0 or state.global_step == state.max_steps):
            self.measure(cycles)

    def measure(self, cycles: int) -> None:
        size = self.trainer.args.per_device_train_batch_size
        nats = [
            -token for row in log_probs(self.trainer.unwrapped, ["policy"], self.sequences, batch_size=size)[0] for token in row.tolist()
        ]
        self.curve.append({"cycle": cycles, "perplexity": math.exp(math.fsum(nats) / len(nats))})
        print(f"  cycle {cycles}: perplexity of held-out prose {self.curve[-1]['perplexity']:.3f}", flush=True)


class Measured(PPORecipe):
    """PPORecipe with the callback above."""

    texts: list[str] = []  # noqa: RUF012
    every = 1

    def train(self, run: Run) -> None:
        watch = run.watch

        def watch_and_measure(trainer: PPOTrainer) -> None:
            watch(trainer)
            self.trainer, self.perplexity = trainer, Perplexity(trainer, self.texts, self.every)
            trainer.add_callback(self.perplexity)

        run.watch = watch_and_measure
        super().train(run)


def halves(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Every second passage of each source, and the others."""
    sources = [list(group) for _, group in groupby(sorted(rows, key=lambda row: row["source"]), key=lambda row: row["source"])]
    return [row for group in sources for row in group[::2]], [row for group in sources for row in group[1::2]]


def trained(loop: Loop, run: Path, directory: Path, seen: list[dict], held_out: list[dict], coef: float, every: int) -> dict[str, Any]:
    """One PPO training: its curves."""
    options = {**loop.options("ppo"), **stage_inputs("ppo", loop, run), "ptx_data": seen if coef else None, "ptx_coef": coef or None}
    recipe = Measured(**options)
    recipe.texts, recipe.every = [row["text"] for row in held_out], every
    start = time.perf_counter()
    adapter = recipe.run(directory)
    logs = [log for log in recipe.trainer.state.log_history if SHOWN["score"] in log]
    rollouts = {name: [log[key] for log in logs if key in log] for name, key in SHOWN.items()}
    curve = recipe.perplexity.curve
    first, last = curve[0]["perplexity"], curve[-1]["perplexity"]
    return {
        "ptx_coef": coef, "perplexity": curve, "perplexity_before": first, "perplexity_after": last, "rise": last - first, **rollouts,
        "first": adapter.metrics["first"], "last": adapter.metrics["last"], "adapter_sha256": adapter.sha256,
        "episodes": adapter.metrics["episodes"], "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def print_table(sides: list[dict[str, Any]]) -> None:
    print(f"\n{'ptx_coef':>8}{'perplexity':>20}{'rise':>8}{'score, last quarter':>21}{'KL':>7}{'seconds':>9}")
    for side in sides:
        moved = f"{side['perplexity_before']:.2f} -> {side['perplexity_after']:.2f}"
        score, kl = side["last"]["objective/score"], side["last"]["objective/kl"]
        print(f"{side['ptx_coef']:8g}{moved:>20}{side['rise']:8.2f}{score:21.3f}{kl:7.2f}{side['seconds']:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory with recipe.yaml, data, sft and reward")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options over the run's recipe")
    parser.add_argument("--ptx-coef", type=float, default=PTX_COEF, help="of the second training (default: %(default)s)")
    parser.add_argument("--every", type=int, default=2, help="cycles between two measurements (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the two adapters go (default: RUN/ptx-tax)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, both curves and the ratio")
    args = parser.parse_args()
    if args.ptx_coef <= 0 or args.every < 1:
        parser.error("--ptx-coef must be above 0 and --every at least 1")
    quiet_libraries()
    loop, output = load_loop(args.run / "recipe.yaml", args.overrides), args.output or args.run / "ptx-tax"
    seen, held_out = halves(read_records("starter", "texts"))
    sides = []
    for coef in (0.0, args.ptx_coef):
        print(f"ptx_coef {coef:g}", flush=True)
        sides.append(trained(loop, args.run, output / f"ptx-{coef:g}", seen, held_out, coef, args.every))
    print_table(sides)
    plain, ptx = sides
    summary = {
        "rise_ratio": ptx["rise"] / plain["rise"] if plain["rise"] > 0 else None,  # without a rise there is nothing to halve
        "score_difference": ptx["last"]["objective/score"] - plain["last"]["objective/score"],
    }
    print(f"\nrise with ptx / without: {summary['rise_ratio']}; score with ptx - without: {summary['score_difference']:+.3f}")
    if args.json:
        about = {
            "versions": versions(), "model": loop.model, "recipe": loop.to_dict(),
            "prose": {"ptx": len(seen), "held_out": len(held_out), "held_out_sha256": data_hash(held_out), "max_tokens": MAX_TOKENS},
        }  # fmt: skip
        recording.write(args.json, {**summary, "without": plain, "with": ptx, **about})


if __name__ == "__main__":
    main()
