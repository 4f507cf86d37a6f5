"""One reward adapter against an ensemble of them: what a PPO step costs, and how far the optimised score runs ahead of a held-out one.

    python bench/ensemble.py RUN [KEY=VALUE ...] [--members 3] [--combine min] [--output DIRECTORY] [--json FILE]

RUN is a directory that `instructlite run` or `instructlite demo` wrote; options over its recipe are given as there. An ensemble is
trained on the run's reward data (member 0 comes out as the run's own reward adapter), then PPO twice from the run's SFT adapter, with
the same seed, prompts and options: against the run's reward adapter, and against all members combined. The run's judge is scored along as
the held-out reward, and never optimised. Scores are in standard deviations of the first rollout's. A gain is the mean over the last
pass through the prompts less that over the first; `overshoot` is the gain of the optimised score less that of the held-out one.
`step_ratio` is the median time of a cycle (rollout and updates) with the ensemble over that with one.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import recording

from instructlite.config import Loop, load_loop
from instructlite.models.manifest import Adapter
from instructlite.pipeline import stage_inputs
from instructlite.training.ppo import PPORecipe
from instructlite.training.recipe import LOG, quiet_libraries, versions
from instructlite.training.reward import RewardRecipe


def ensemble(loop: Loop, run: Path, directory: Path, members: int) -> Adapter:
    options = {**loop.options("reward"), **stage_inputs("reward", loop, run), "ensemble": members}
    return RewardRecipe(**options).run(directory, resume=True)


def trained(loop: Loop, run: Path, directory: Path, reward: Path, combine: str) -> dict[str, Any]:
    """One PPO training: its curves, gains and times."""
    options = {**loop.options("ppo"), **stage_inputs("ppo", loop, run), "reward": reward, "reward_combine": combine}
    start = time.perf_counter()
    adapter = PPORecipe(**options, watch_reward=run / "judge").run(directory)
    cycles = [log for log in map(json.loads, (directory / LOG).read_text(encoding="utf-8").splitlines()) if "objective/score" in log]
    own, held_out = [log["objective/score"] for log in cycles], [log["watch/score"] for log in cycles]
    scale = cycles[0]["watch/score_std"]
    training = json.loads((adapter.path / "run.json").read_text(encoding="utf-8"))["config"]["training"]
    episodes = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1) * training["num_mini_batches"]
    prompts = sum(1 for _ in (run / "data" / "prompts.jsonl").open(encoding="utf-8"))
    a_pass = max(1, prompts // episodes)
    gain = lambda values: statistics.fmean(values[-a_pass:]) - statistics.fmean(values[:a_pass])  # noqa: E731
    steps = training["num_mini_batches"] * training.get("num_ppo_epochs", 4)
    seconds = [log["rollout/time_generate"] + log["rollout/time_score"] + steps * log["rollout/time_train"] for log in cycles]
    return {
        "combine": combine, "score": own, "held_out": held_out, "kl": [log["objective/kl"] for log in cycles],
        "score_gain": gain(own), "held_out_gain": gain(held_out) / scale, "overshoot": gain(own) - gain(held_out) / scale,
        "seconds_per_cycle": statistics.median(seconds), "score_seconds": statistics.median(log["rollout/time_score"] for log in cycles),
        "tokens": [log["rollout/length_mean"] for log in cycles], "seconds": round(time.perf_counter() - start, 1),
        "adapter_sha256": adapter.sha256,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory with recipe.yaml, data, sft and judge")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options over the run's recipe")
    parser.add_argument("--members", type=int, default=3, help="of the ensemble (default: %(default)s)")
    parser.add_argument("--combine", default="min", choices=("mean", "min", "mean_minus_std"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="where the adapters go (default: RUN/ensemble)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, curves and ratios")
    args = parser.parse_args()
    quiet_libraries()
    loop, output = load_loop(args.run / "recipe.yaml", args.overrides), args.output or args.run / "ensemble"
    members = ensemble(loop, args.run, output / "reward", args.members)
    sides = [
        trained(loop, args.run, output / "ppo-one", args.run / "reward", "mean"),
        trained(loop, args.run, output / f"ppo-{args.combine}", members.path, args.combine),
    ]
    for name, side in zip(("one", args.combine), sides, strict=True):
        gains = ", ".join(f"{key} {side[key]:+.3f}" for key in ("score_gain", "held_out_gain", "overshoot"))
        took = f"{side['seconds_per_cycle']:.1f} s a cycle ({side['score_seconds']:.1f} s of it scoring)"
        print(f"{name:>15}: {gains}, KL {side['kl'][-1]:.1f}, {took}")
    summary = {"step_ratio": sides[1]["seconds_per_cycle"] / sides[0]["seconds_per_cycle"], "members": args.members}
    summary["accuracies"] = [member.metrics.get("eval_accuracy") for member in members.members]
    print(f"step with {args.members} / with one: {summary['step_ratio']:.2f}")
    if args.json:
        about = {"versions": versions(), "recipe": loop.to_dict()}
        recording.write(args.json, {**summary, "one": sides[0], "ensemble": sides[1], **about})


if __name__ == "__main__":
    main()
