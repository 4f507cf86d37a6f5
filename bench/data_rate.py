"""How fast and in how much memory data are checked and prepared, and how that grows.

    python bench/data_rate.py [--rows 10000 100000 1000000] [--json bench/results/data_rate.json]

Generates comparisons of about 1 KB (words drawn by Zipf's law; one row in a hundred nearly repeats an earlier one, one copies it, one
has personal data), then runs `data check` and `data prepare` on the file, each in a process of its own, and prints rows/s, peak memory
and the growth from each size to the next: time per row would stay equal if the work were linear.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from itertools import accumulate, pairwise
from pathlib import Path

import recording

WORDS = 40_000  # different words, as in a large newspaper


def generate(path: Path, rows: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(WORDS)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))

    def text(length: int) -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=length))

    recent: list[dict] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {"prompt": text(30), "chosen": text(75), "rejected": text(75), "annotator": f"a{number % 40}"}
            kind = rng.randrange(100)
            if recent and kind in (0, 1):
                row = dict(rng.choice(recent))
                if kind == 0:
                    row["chosen"] += f" {rng.choice(words)}"
            elif kind == 2:
                row["rejected"] += f" write to user{number}@mail.org"
            elif len(recent) < 1000:
                recent.append(row)
            file.write(json.dumps(row) + "\n")


def check(path: Path, work: Path) -> int:
    from instructlite.data.check import Options, check_files

    return sum(report.rows_in for report in check_files([str(path)], Options()))


def prepare(path: Path, work: Path) -> int:
    from instructlite.data.preparing.prepare import prepare

    report = prepare([path], work / "out")
    assert report.rows_in == report.kept + report.rejected
    return report.rows_in


def measure(task: str, path: Path, work: Path) -> dict[str, float]:
    """Seconds and peak memory of one run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(task, path, work, send))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        sys.exit(f"data_rate: {task} ended without a result (exit code {process.exitcode})")
    process.join()
    return result


def _run(task: str, path: Path, work: Path, send: "multiprocessing.connection.Connection") -> None:
    start, processor = time.perf_counter(), time.process_time()
    rows = {"check": check, "prepare": prepare}[task](path, work)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    figures = {"rows": rows, "seconds": round(seconds, 2), "processor_seconds": round(processor, 2), "peak_mb": round(peak)}
    send.send(figures | {"rows_per_s": round(rows / seconds), "processor_us_per_row": round(1e6 * processor / rows, 1)})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--work", type=Path, help="where the generated files go (about 3 GB for a million rows)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    results: dict[str, list[dict]] = {"check": [], "prepare": []}
    with tempfile.TemporaryDirectory(dir=args.work) as directory:
        for rows in args.rows:
            path = Path(directory) / "comparisons.jsonl"
            generate(path, rows)
            size = os.path.getsize(path) / 1e6
            for task, measured in results.items():
                figures = measure(task, path, Path(directory)) | {"file_mb": round(size)}
                measured.append(figures)
                print(
                    f"{task:8} {rows:>9,} rows ({size:,.0f} MB)  {figures['seconds']:>8,.1f} s  {figures['rows_per_s']:>7,} rows/s"
                    f"  {figures['processor_us_per_row']:>6} µs of processor a row  peak {figures['peak_mb']:,} MB",
                    flush=True,
                )
    for task, measured in results.items():
        for smaller, larger in pairwise(measured):
            times = larger["rows"] / smaller["rows"]
            time_ratio = larger["processor_seconds"] / smaller["processor_seconds"]
            memory = (larger["peak_mb"] - smaller["peak_mb"]) * 2**20 / (larger["rows"] - smaller["rows"])
            print(f"{task:8} {times:g} times the rows: {time_ratio:.2f} times the processor time, {memory:,.0f} bytes a further row")
    if args.json:
        recording.write(args.json, {"settings": {"rows": args.rows}, **results})


if __name__ == "__main__":
    main()
