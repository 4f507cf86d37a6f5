"""Do votes change the policy? A voter who likes one property of answers votes, a round is run, and the property is counted again.

    python bench/vote_matters.py RUN [KEY=VALUE ...] [--votes 60] [--likes NAME] [--output DIRECTORY] [--json FILE]

RUN is a directory that `instructlite run` or `instructlite demo` wrote; it is copied to the output directory and not touched. The voter
sees what a person in the app would see, through the same store: answers in an order of his own, without names. Where some answers have
the property and others do not, the former are better; else he says that they tie. After so many votes that were no ties the round goes
on as `instructlite round` does. The share of answers with the property is then measured on held-out prompts, for SFT, the last policy and
the new one, in the same batches; differences come with 95 % intervals by bootstrap over prompts.
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import recording

from instructlite.data.records import read_records, write_records
from instructlite.evaluation import statistics
from instructlite.feedback.ballots import Ballot
from instructlite.feedback.queue import choose
from instructlite.feedback.store import Store
from instructlite.rounds import run_round
from instructlite.training.recipe import quiet_libraries, versions

PROPERTIES: dict[str, Callable[[str], bool]] = {
    "you": lambda text: bool(re.search(r"\byour?\b", text, re.IGNORECASE)),
    "question": lambda text: text.rstrip().endswith("?"),
    "exclamation": lambda text: text.rstrip().endswith("!"),
}
WORDS = {"you": "speaks to the reader (you, your)", "question": "ends in a question", "exclamation": "ends in an exclamation mark"}
# What 60 votes can be learnt from in minutes on two cores: few old comparisons, each vote twice, 8 rollouts, a short report.
SETTINGS = {
    "round.prompt_limit": 140, "round.answers": 6, "round.replay": 100, "round.vote_weight": 2, "ppo.training.max_steps": 64,
    "evaluation.samples": 4, "evaluation.greedy": "false",
}  # fmt: skip


def fresh_prompts(run: Path, characters: int) -> list[dict]:
    """Prompts of the run's comparisons that PPO has not trained on: to those its answers have grown alike, so that there is no choice."""
    known = {json.dumps(row["prompt"]) for row in read_records(str(run / "data" / "prompts.jsonl"))}
    prompts = [row["prompt"] for row in read_records(str(run / "data" / "reward.jsonl"))]
    short = {json.dumps(prompt): {"prompt": prompt} for prompt in prompts if sum(len(turn["content"]) for turn in prompt) <= characters}
    return [row for key, row in short.items() if key not in known]


def cast(run: Path, wanted: int, likes: Callable[[str], bool]) -> dict[str, int]:
    """Votes through the store, one showing after the other, until `wanted` of them are no ties."""
    store = Store(run, votes_per_minute=None)
    voter = store.voter(name="bench")
    votes = ties = answers = liked = 0
    while votes < wanted:
        item = choose(store.waiting(voter.key), voter.key, overlap=1)
        if item is None:
            break
        showing = store.show(item, voter.key)
        has = [likes(text) for text in showing.answers]
        answers, liked = answers + len(has), liked + sum(has)
        store.vote(showing.ticket, voter.key, Ballot(tuple(int(any(has) and not one) for one in has)))
        decided = 0 < sum(has) < len(has)
        votes, ties = votes + decided, ties + (not decided)
    store.close()
    if votes < wanted:
        raise SystemExit(f"only {votes} of the sets of answers differ in the property, {wanted} are wanted: more prompts or round.answers")
    return {"votes": votes, "ties": ties, "answers_shown": answers, "with_property": liked}


def shares(report: Path, likes: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Candidate -> share of its sampled answers with the property, for each held-out prompt."""
    found: dict[str, list[float]] = {}
    for line in map(json.loads, (report / "answers.jsonl").read_text(encoding="utf-8").splitlines()):
        by_candidate: dict[str, list[bool]] = {}
        for answer in line["answers"]:
            if answer["decoding"] == "sampled":
                by_candidate.setdefault(answer["candidate"], []).append(likes(answer["text"]))
        for name, has in by_candidate.items():
            found.setdefault(name, []).append(float(np.mean(has)))
    return {name: np.array(values) for name, values in found.items()}


def interval(values: np.ndarray) -> dict[str, float | None]:
    mean = statistics.mean(values, seed=0)
    return {"mean": mean.value, "low": mean.low, "high": mean.high}


def measured(source: Path, output: Path, overrides: list[str], wanted: int, name: str, characters: int) -> dict[str, Any]:
    """One round: settings, votes, shares and times."""
    likes, start, seconds = PROPERTIES[name], time.perf_counter(), {}

    def lap(step: str) -> None:
        seconds[step] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    if output.exists():
        raise SystemExit(f"{output}: exists; remove it, or name another place with --output")
    shutil.copytree(source, output, ignore=shutil.ignore_patterns("rounds", "votes.sqlite*", "*.partial", "lock", "owner.json"))
    write_records(output / "data" / "fresh_prompts.jsonl", fresh_prompts(output, characters))
    options = [
        f"round.prompts={output / 'data' / 'fresh_prompts.jsonl'}",
        *(f"{key}={value}" for key, value in SETTINGS.items()),
        *overrides,
    ]
    run_round(output, options, isolate=True, say=lambda line: print(line, flush=True))
    lap("answers")
    cast_votes = cast(output, wanted, likes)
    lap("votes")
    print(f"{cast_votes}", flush=True)
    count = cast_votes["votes"] + cast_votes["ties"]
    result = run_round(output, [*options, f"round.votes={count}"], isolate=True, say=lambda line: print(line, flush=True))
    lap("reward model, PPO and report")
    by_candidate = shares(result.directory / "report", likes)
    *others, new = by_candidate
    state = json.loads((result.directory / "round.json").read_text(encoding="utf-8"))
    return {
        "property": WORDS[name], "options": options, **cast_votes, "held_out_prompts": len(by_candidate[new]),
        "share": {candidate: interval(values) for candidate, values in by_candidate.items()},
        "difference": {f"{new} - {other}": interval(by_candidate[new] - by_candidate[other]) for other in others},
        "seconds": seconds, "round": {key: state[key] for key in ("parents", "votes", "adapters", "metrics")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run: recipe.yaml, data, sft, reward, ppo and perhaps judge")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options over the run's recipe and this program's settings")
    parser.add_argument("--votes", type=int, default=60, help="votes that are no ties (default: %(default)s)")
    parser.add_argument("--likes", choices=PROPERTIES, default="you", help="what the voter likes (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=300, help="longest prompt (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/vote-matters"), help="where the copy goes (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, shares and intervals")
    args = parser.parse_args()
    quiet_libraries()
    result = measured(args.run, args.output, args.overrides, args.votes, args.likes, args.characters)
    print(f"\n{result['property']}: share of the answers to {result['held_out_prompts']} held-out prompts")
    for name, row in {**result["share"], **result["difference"]}.items():
        print(f"  {name:16} {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
    print(f"seconds: {result['seconds']}")
    if args.json:
        recording.write(args.json, {**result, "versions": versions()})


if __name__ == "__main__":
    main()
