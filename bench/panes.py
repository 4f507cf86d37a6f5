"""What it costs to show several panes at once: all in one batch against each of them alone, on the same prompts.

    python bench/panes.py RUN [--prompts 4] [--new-tokens 64] [--rounds 3] [--json FILE]

RUN is a directory that `instructlite run` or `instructlite demo` wrote. Base, first and last policy adapter answer held-out prompts of
the run by the app's own engine: one request at a time, greedily, so many tokens each (stop tokens are switched off). In each round all
three answer in one batch, and each of them alone; the order changes from round to round, and the first is not counted.
`ratio` is the median over the rounds of: seconds of three panes / mean of the seconds of one pane (base, first and last adapter);
`ratio_to_adapter` the same against the pane of the last adapter alone, which does more than the base.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import recording
import torch

from instructlite.config import BaseOptions
from instructlite.data.records import read_records
from instructlite.models.engine import Engine, Limits
from instructlite.models.sampling import Sampling
from instructlite.training.recipe import quiet_libraries, versions


def seconds(engine: Engine, prompts: list[list[dict]], panes: list[str], new_tokens: int) -> float:
    start = time.perf_counter()
    for prompt in prompts:
        snapshot = engine.submit(prompt, panes, Sampling(new_tokens, temperature=0)).result()
        assert snapshot.tokens == [new_tokens] * len(panes)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory with two policy adapters or more")
    parser.add_argument("--prompts", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="of the base (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write times and ratios")
    args = parser.parse_args()
    quiet_libraries()
    rows = read_records(args.run / "data" / "heldout_prompts.jsonl", "prompts")
    prompts = [row["prompt"] for row in rows[: args.prompts]]
    with Engine.load(args.run, BaseOptions(dtype=args.dtype), limits=Limits(new_tokens=args.new_tokens)) as engine:
        engine.model.base.stop_ids = []
        names = [pane.name for pane in engine.panes]
        three = [names[0], names[1], names[-1]]
        sides = {"three": three} | {name: [name] for name in three}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, panes in list(sides.items())[:: -1 if number % 2 else 1]:
                took = seconds(engine, prompts, panes, args.new_tokens)
                if number:
                    times[name].append(took)
        dtype = engine.model.base.dtype
    alone = [statistics.fmean(round_) for round_ in zip(*(times[name] for name in three), strict=True)]
    ratio = statistics.median(t / one for t, one in zip(times["three"], alone, strict=True))
    to_adapter = statistics.median(t / one for t, one in zip(times["three"], times[three[-1]], strict=True))
    tokens = len(prompts) * args.new_tokens
    for name, took in times.items():
        each = tokens / statistics.median(took)
        print(f"{name:>12}: {statistics.median(took):6.2f} s for {tokens} tokens a pane, {each:5.1f} tokens/s a pane")
    print(f"three panes / one: {ratio:.2f} (against the mean of the three), {to_adapter:.2f} (against {three[-1]})")
    if args.json:
        about = {"panes": three, "prompts": len(prompts), "new_tokens": args.new_tokens, "dtype": dtype, "threads": torch.get_num_threads()}
        load = {"load_average": os.getloadavg()[0]}
        recording.write(
            args.json, {"ratio": ratio, "ratio_to_adapter": to_adapter, "seconds": times, **about, **load, "versions": versions()}
        )


if __name__ == "__main__":
    main()
