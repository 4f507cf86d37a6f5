"""Do votes change the policy? A voter who likes one property of answers votes, a round is run, and the property is counted again.

    python bench/vote_matters.py RUN [KEY=VALUE ...] [--votes 60] [--likes NAME] [--control] [--output DIRECTORY] [--json FILE]

RUN is a directory that `instructlite run` or `instructlite demo` wrote; it is copied to the output directory and not touched. What was
interrupted goes on with the same command. The voter
sees what a person in the app would see, through the same store: answers in an order of his own, without names. Where some answers have
the property and others do not, the former are better; else he says that they tie. After so many votes that were no ties the round goes
on as `instructlite round` does. The share of answers with the property is then measured on held-out prompts, for SFT, the last policy and
the new one, in the same batches; differences come with 95 % intervals by bootstrap over prompts. More PPO moves a policy whatever people
said: `--control` runs a second round from the same answers, with as many votes by tossing coins.

Of the properties, "you" stands in about half of the demo's answers, so that most sets differ in it. An exclamation mark at the end does in
2 % of them (2026-11-21): 140 sets then hold 17 to vote on.
"""

import argparse
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import recording

from instructlite.data.records import characters, read_records, write_records
from instructlite.evaluation import statistics
from instructlite.feedback.ballots import Ballot
from instructlite.feedback.queue import choose
from instructlite.feedback.store import Store
from instructlite.models.manifest import NAME
from instructlite.rounds import run_round
from instructlite.training.recipe import quiet_libraries, versions

PROPERTIES: dict[str, Callable[[str], bool]] = {
    "you": lambda text: bool(re.search(r"\byour?\b", text, re.IGNORECASE)),
    "question": lambda text: text.rstrip().endswith("?"),
    "exclamation": lambda text: text.rstrip().endswith("!"),
}
WORDS = {"you": "speaks to the reader (you, your)", "question": "ends in a question", "exclamation": "ends in an exclamation mark"}
# What 60 votes can be learnt from in minutes on two cores: few old comparisons, each vote four times, 12 rollouts, a short report.
SETTINGS = {
    "round.prompt_limit": 140, "round.answers": 6, "round.replay": 40, "round.vote_weight": 4, "ppo.training.max_steps": 96,
    "evaluation.samples": 4, "evaluation.greedy": "false",
}  # fmt: skip


def fresh_prompts(run: Path, longest: int) -> list[dict]:
    """Prompts of the run's comparisons that PPO has not trained on: to those its answers have grown alike, so that there is no choice."""
    known = {json.dumps(row["prompt"]) for row in read_records(str(run / "data" / "prompts.jsonl"))}
    prompts = [row["prompt"] for row in read_records(str(run / "data" / "reward.jsonl"))]
    short = {json.dumps(prompt): {"prompt": prompt} for prompt in prompts if characters(prompt) <= longest}
    return [row for key, row in short.items() if key not in known]


def cast(run: Path, wanted: int, likes: Callable[[str], bool]) -> dict[str, int]:
    """Votes through the store, one showing after the other, until `wanted` of them are no ties."""
    store = Store(run, votes_per_minute=None)
    voter = store.voter(name="bench")
    while (counts := counted(store))["votes"] < wanted:
        item = choose(store.waiting(voter.key), voter.key, overlap=1)
        if item is None:
            raise SystemExit(
                f"only {counts['votes']} sets of answers differ in the property, {wanted} are wanted: raise round.prompt_limit"
            )
        showing = store.show(item, voter.key)
        has = [likes(text) for text in showing.answers]
        store.vote(showing.ticket, voter.key, Ballot(tuple(int(any(has) and not one) for one in has)))
    store.close()
    return counts


def counted(store: Store) -> dict[str, int]:
    """From the ballots: the best answers of a decided vote are those with the property."""
    votes = [[answer.rank for answer in vote.answers] for vote in store.votes()]
    decided = [ranks for ranks in votes if len(set(ranks)) > 1]
    return {
        "votes": len(decided), "ties": len(votes) - len(decided),
        "answers_in_votes": sum(map(len, decided)), "preferred": sum(ranks.count(0) for ranks in decided),
    }  # fmt: skip


def shares(report: Path, likes: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Candidate -> share of its sampled answers with the property, for each held-out prompt."""
    found: dict[str, list[float]] = {}
    for line in map(json.loads, (report / "answers.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")):
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


def copied(source: Path, target: Path, *left_out: str) -> Path:
    """Whole or not there; one that is there is gone on with."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*left_out))
        partial.rename(target)
    if any((target / policy / NAME).read_bytes() != (source / policy / NAME).read_bytes() for policy in ("sft", "ppo")):
        raise SystemExit(f"{target}: a copy of another run; remove it, or name another place with --output")
    return target


def state_of(run: Path) -> dict[str, Any]:
    file = run / "rounds" / "01" / "round.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def prepared(source: Path, run: Path, overrides: list[str], longest: int) -> Path:
    """A copy of the run whose round has its answers up for voting."""
    copied(source, run, "rounds", "votes.sqlite*", "*.partial", "lock", "owner.json")
    write_records(run / "data" / "fresh_prompts.jsonl", fresh_prompts(run, longest))
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    run_round(run, [f"round.prompts={run / 'data' / 'fresh_prompts.jsonl'}", *settings, *overrides], isolate=True, say=say)
    return run


def learnt(run: Path, votes: dict[str, int], likes: Callable[[str], bool]) -> dict[str, Any]:
    """The rest of the round, and the shares on held-out prompts; the new policy is the last of them."""
    if not state_of(run).get("finished"):
        run_round(run, [f"round.votes={votes['votes'] + votes['ties']}"], isolate=True, say=say)
    by_candidate = shares(run / "rounds" / "01" / "report", likes)
    *others, new = by_candidate
    state = state_of(run)
    metrics = state["metrics"] | {"ppo": {key: state["metrics"]["ppo"][key] for key in ("first", "last", "steps", "episodes")}}
    return {
        **votes, "held_out_prompts": len(by_candidate[new]),
        "share": {candidate: interval(values) for candidate, values in by_candidate.items()},
        "difference": {f"{new} - {other}": interval(by_candidate[new] - by_candidate[other]) for other in others},
        "round": {"parents": state["parents"], "votes": state["votes"], "adapters": state["adapters"], "metrics": metrics},
        "by_prompt": by_candidate[new].tolist(),
    }  # fmt: skip


def measured(source: Path, output: Path, overrides: list[str], wanted: int, name: str, longest: int, control: bool) -> dict[str, Any]:
    """A round by the votes of who likes the property; with `control` also one, from the same answers, by the votes of who tosses coins."""
    likes, coin = PROPERTIES[name], random.Random(0)
    answers = prepared(source, output / "answers", overrides, longest)
    result: dict[str, Any] = {"property": WORDS[name], "settings": {**SETTINGS, **dict(one.split("=", 1) for one in overrides)}}
    voters: dict[str, Callable[[str], bool]] = {"likes": likes} | ({"coin": lambda text: coin.random() < 0.5} if control else {})
    for voter, prefers in voters.items():
        run = copied(answers, output / voter)
        votes = cast(run, wanted, prefers)
        say(f"voter '{voter}': {votes}")
        result[voter] = learnt(run, votes, likes)
    if control:
        ours, theirs = (np.array(result[voter]["by_prompt"]) for voter in voters)
        result["difference_to_coin"] = interval(ours - theirs)
    return result


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run: recipe.yaml, data, sft, reward, ppo and perhaps judge")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options over the run's recipe and this program's settings")
    parser.add_argument("--votes", type=int, default=60, help="votes that are no ties (default: %(default)s)")
    parser.add_argument("--likes", choices=PROPERTIES, default="you", help="what the voter likes (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=300, help="longest prompt (default: %(default)s)")
    parser.add_argument("--control", action="store_true", help="also a round by the votes of a voter who tosses coins")
    parser.add_argument("--output", type=Path, default=Path("runs/vote-matters"), help="where the copies go (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, shares and intervals")
    args = parser.parse_args()
    quiet_libraries()
    result = measured(args.run, args.output, args.overrides, args.votes, args.likes, args.characters, args.control)
    print(f"\n{result['property']}: share of the answers to {result['likes']['held_out_prompts']} held-out prompts")
    rows = {**result["likes"]["share"], **result["likes"]["difference"]}
    if args.control:
        *_, coin = result["coin"]["share"]
        rows |= {f"{coin}, coins": result["coin"]["share"][coin], "to that by coins": result["difference_to_coin"]}
    for name, row in rows.items():
        print(f"  {name:18} {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
    if args.json:
        recording.write(args.json, {**result, "versions": versions()})


if __name__ == "__main__":
    main()
