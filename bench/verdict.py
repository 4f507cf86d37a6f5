"""Was PPO worth it? The base, few-shot prompting, SFT, DPO, best-of-n, PPO and PPO-ptx on the same data, in one table with intervals.

    python bench/verdict.py RECIPE [KEY=VALUE ...] [--output RUN] [--json FILE]

Runs the recipe with what stands in COMPARED over it: DPO and PPO-ptx beside PPO from the same SFT and reward adapters, few-shot prompting
and best-of-n beside the policies. As with `instructlite run`, finished stages in RUN that would be made from the same are kept (a finished
demo: --output runs/demo), and an interrupted one goes on where it stopped. The judge scores PPO-ptx as it trains (with
ppo.watch_reward=judge plain PPO, too, which is then trained anew): the over-optimisation curve, reward against KL. Recorded are the
report's numbers without its texts, and what each stage took.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import recording

from instructlite.config import load_loop
from instructlite.pipeline import LoopRun, run_loop
from instructlite.training.recipe import quiet_libraries, versions

COMPARED = (
    "also.dpo=",
    "also.ppo-ptx.ptx_data=starter",
    "also.ppo-ptx.watch_reward=judge",
    "evaluation.candidates=[base, 'few-shot:4', sft, best-of-4, dpo, ppo-ptx, ppo]",
)
MEASURED = ("mean_reward", "mean_reward_low", "mean_reward_high", "kl", "perplexity", "length", "ended")
TEXTS = ("answers", "samples")  # of report.json: the run directory has them


def against(report: dict[str, Any], candidate: str, other: str, judge: str, decoding: str) -> dict[str, float] | None:
    """Win rate of a candidate with its interval, whichever way round the report has the pair; None if it has not."""
    for row in report["win_rates"]:
        if (row["judge"], row["decoding"], row.get("b_decoding", decoding)) != (judge, decoding, decoding):
            continue
        if (row["a"], row["b"]) == (candidate, other):
            return {name: row[name] for name in ("rate", "low", "high")}
        if (row["b"], row["a"]) == (candidate, other):
            return {"rate": 1 - row["rate"], "low": 1 - row["high"], "high": 1 - row["low"]}
    return None


def verdict(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a candidate: against SFT by the judge that no policy was trained on, what it costs elsewhere, and how it compares with PPO."""
    judge, decodings = report["judges"][0]["name"], list(dict.fromkeys(row["decoding"] for row in report["win_rates"]))
    rows = []
    for candidate in report["candidates"]:
        row = {"candidate": candidate["name"]}
        for decoding, other in product(decodings, ("sft", "ppo")):
            row[f"{decoding} against {other}"] = against(report, candidate["name"], other, judge, decoding)
        rows.append(row | {name: candidate.get(name) for name in MEASURED})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = [name for name in rows[0] if " against " in name]
    print(f"\n{'candidate':<12}" + "".join(f"{name:>22}" for name in columns) + f"{'KL':>8}{'perplexity':>12}{'tokens':>8}{'ended':>7}")
    for row in rows:
        rates = (row[name] for name in columns)
        shown = [f"{rate['rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" if rate else "-" for rate in rates]
        numbers = [(row["kl"], 8, 2), (row["perplexity"], 12, 2), (row["length"], 8, 1), (row["ended"], 7, 2)]
        rest = "".join(f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}" for value, width, digits in numbers)
        print(f"{row['candidate']:<12}" + "".join(f"{text:>22}" for text in shown) + rest)


def record(path: Path, run: LoopRun, recipe: dict[str, Any], report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    stages = [
        {"stage": stage.stage, "seconds": stage.seconds, "peak_rss_mb": stage.peak_rss_mb, "kept_from_before": stage.skipped}
        for stage in run.stages
    ]
    numbers = {name: value for name, value in report.items() if name not in TEXTS}
    recording.write(path, {"verdict": rows, "stages": stages, "report": numbers, "versions": versions(), "recipe": recipe})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options over the recipe")
    parser.add_argument("--output", type=Path, default=Path("runs/verdict"), metavar="RUN", help="the run directory (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdict, the report's numbers and what each stage took")
    args = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    loop = load_loop(args.recipe, [*COMPARED, *args.overrides])
    run = run_loop(loop, args.output, isolate=True, resume=True, say=lambda line: print(line, flush=True))
    report = json.loads((args.output / "report" / "report.json").read_text(encoding="utf-8"))
    rows = verdict(report)
    print_table(rows)
    print(f"\n{args.output / 'report' / 'report.html'} has the rest.")
    if args.json:
        record(args.json, run, loop.to_dict(), report, rows)


if __name__ == "__main__":
    main()
