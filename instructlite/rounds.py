"""A round: answers of the current policy are put up for voting, and what is said of them teaches the next policy.

Answers -> votes -> reward model -> PPO -> report, into `RUN/rounds/01`, `02` … Each step is kept once it is done, so that whoever was
killed anywhere, or waits for people, calls the same again. `round.json` says what the round was made from, which votes it used and what
came of it.

The reward model goes on from the last one, on the old comparisons and the new votes. PPO goes on from the last policy, held to the SFT
adapter as before: what it strives for, SFT times exp(score / kl_coef), then depends on the newest reward model only. Held to the last
policy, that would be last policy times exp(score / kl_coef): what earlier reward models said, mistakes and all, would count once more
each round, and the distance to SFT would have no bound. The value function starts anew (`ppo.value_from`): PPO saves none.
"""

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config import Loop, load_loop
from .data.formats import rows
from .data.records import as_groups, data_hash, opening, read_records, write_records
from .errors import BadRecords, InstructLiteError
from .feedback.ballots import Vote
from .feedback.exchange import Exported, export, import_votes
from .feedback.store import Store
from .models.manifest import Adapter, is_adapter
from .pipeline import Ledger, Say, in_own_process, in_this_process, made_of, recipe_class, stage_inputs, train
from .progress import progress
from .training.interrupt import Interruption
from .training.work import has_saved, launched, locked, read_json, work_directory, write_text

if TYPE_CHECKING:
    from .evaluation.report import Report

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Judge:
    """Who votes in place of people: a reward adapter's directory, "module:function", or a language model's name at an endpoint."""

    who: str
    base_url: str | None = None
    key_env: str | None = None


@dataclass(frozen=True)
class RoundRun:
    """What `run_round` did. Without a report it waits: there are `votes` new votes of the `wanted`."""

    directory: Path
    number: int
    votes: int
    wanted: int
    report: "Report | None" = None


def run_round(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    votes: str | Path | None = None,
    judge: Judge | None = None,
    wait: bool = False,
    isolate: bool = False,
    say: Say = lambda line: None,
) -> RoundRun:
    """Go on with the round of `run` that is not finished, or begin the next.

    overrides: key=value over the run's recipe (`round.answers=2`, `ppo.training.max_steps=24`), kept for the round. votes: a JSONL file of
    votes that were cast elsewhere; with it, or with a judge, the round goes on however many votes there are. wait: for people, in place of
    returning. Raises InstructLiteError before anything is drawn for bad options, prompts that are held out, and a run without its adapters.
    """
    if launched():
        raise InstructLiteError("a round is made by one process: start it without accelerate launch or torchrun")
    again = f"run_round({str(run)!r})"
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise InstructLiteError(f"{run}: no run there (recipe.yaml is missing); make one first: instructlite run RECIPE --output {run}")
    with Interruption(again) as interruption, locked(run):
        call = partial(in_own_process, interruption=interruption) if isolate else in_this_process
        current = Round.current(run, overrides, call, say)
        current.begin()
        current.put_up()
        count = current.collect(votes, judge, wait)
        if count is not None:
            return RoundRun(current.directory, current.number, count, current.wanted)
        current.learn()
        report = current.report()
        used = current.state["votes"]["used"]
    return RoundRun(current.directory, current.number, used, current.wanted, report)


class Round:
    """One round under way. `state` is its round.json."""

    def __init__(self, run: Path, number: int, overrides: Iterable[str], call: Callable, say: Say):
        self.run, self.number, self.call, self.say = run, number, call, say
        self.directory = run / "rounds" / f"{number:02d}"
        self.data = self.directory / "data"
        self.state: dict[str, Any] = read_json(self.directory / "round.json")
        own = self.directory / "recipe.yaml"
        self.loop: Loop = load_loop(own if own.is_file() else run / "recipe.yaml", overrides)
        self.options = self.loop.round
        before = run / "rounds" / f"{number - 1:02d}"
        self.last = "ppo" if number == 1 else f"round-{number - 1}"
        self.policy, self.reward = (before / "ppo", before / "reward") if number > 1 else (run / "ppo", run / "reward")
        if number == 1 and not is_adapter(self.policy):
            self.policy, self.last = run / "sft", "sft"
        self.ledger = Ledger(self.directory / "stages.json")

    @classmethod
    def current(cls, run: Path, overrides: Iterable[str], call: Callable, say: Say) -> "Round":
        number = 1
        while read_json(run / "rounds" / f"{number:02d}" / "round.json").get("finished"):
            number += 1
        return cls(run, number, overrides, call, say)

    # --- 1. What the round is made from -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Check everything that can be; a round that goes on must be made from what it was begun with."""
        parents = {"policy": self.policy, "reward": self.reward, "sft": self.run / "sft"}
        for role, path in parents.items():
            if not is_adapter(path):
                raise InstructLiteError(f"{path}: no {role} adapter there; finish the run first: instructlite run {self.run}/recipe.yaml")
        for stage in ("reward", "ppo"):
            recipe_class(stage)(**{**self.loop.options(stage), **stage_inputs(stage, self.loop, self.run)})
            recipe_class(stage).check_training(self.loop.options(stage).get("training", {}))
        prompts = self._prompts()
        made_from = {
            "parents": {
                role: {"path": str(path.relative_to(self.run)), "sha256": Adapter.load(path).sha256} for role, path in parents.items()
            },
            "prompts": {"rows": len(prompts), "sha256": data_hash(prompts)},
            "drawing": self._drawing() | {"prompt_limit": self.options.prompt_limit},
        }
        if self.state:
            self._refuse_differences(made_from)
        else:
            self.data.mkdir(parents=True, exist_ok=True)
            write_records(self.data / "prompts.jsonl", prompts)
            limit = self.options.prompt_limit or len(prompts)
            asked = random.Random(self.seed).sample(prompts, min(limit, len(prompts)))
            write_records(self.data / "asked.jsonl", asked)
            self._note(round=self.number, started=_now(), **made_from)
            self.say(f"round {self.number}: from {made_from['parents']['policy']['path']}, into {self.directory}")
        write_text(self.directory / "recipe.yaml", yaml.safe_dump(self.loop.to_dict(), sort_keys=False, allow_unicode=True))

    @property
    def seed(self) -> int:
        return self.loop.seed + self.number

    def _drawing(self) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in ("answers", "max_new_tokens", "temperature", "batch_size")}
        return options | {"seed": self.seed}

    def _prompts(self) -> list[dict]:
        """The different prompts, none of them held out. Raises BadRecords with the lines of those that are."""
        source = self.options.prompts or str(self.run / "data" / "prompts.jsonl")
        records = read_records(source, "prompts")
        held_out = self._held_out()
        if any(opening(record) in held_out for record in records):
            files = [source] if isinstance(source, str) else source
            found = [row for file in files for row in rows(file, "prompts")]
            why = "is a held-out prompt: the report could not be trusted (take it out)"
            raise BadRecords([f"{row.file}:{row.line}: {why}" for row in found if opening(row.record) in held_out])
        return list({json.dumps(record["prompt"]): record for record in records}.values())

    def _held_out(self) -> set[str]:
        return {opening(record) for record in read_records(str(self.run / "data" / "heldout.jsonl"))}

    def _refuse_differences(self, now: dict[str, Any]) -> None:
        different = [name for name in now if json.loads(json.dumps(now[name])) != self.state[name]]
        if different:
            raise InstructLiteError(
                f"{self.directory}: was begun with other {' and '.join(different)}, and its answers are up for voting; put them back, or "
                "remove the directory to begin the round anew"
            )

    # --- 2. Answers ---------------------------------------------------------------------------------------------------------

    def put_up(self) -> None:
        """Draw answers and put them into the store, best done by whoever can wait for a model."""
        if "items" in self.state:
            return
        from .feedback.drawing import Drawing, draw_answers, put_up

        drawing = Drawing(**self._drawing())
        self.say(f"answers: {self.options.answers} to each prompt, by {self.last}")
        path = self.data / "answers.jsonl"
        too_long, _ = self.call(draw_answers, path, self.data / "asked.jsonl", self.policy, self.reward, drawing)
        store = Store(self.run)
        items = put_up(store, path, self.policy, self.last, drawing)
        store.close()
        self._note(items=items, too_long=too_long)
        self.say(f"answers: {len(items)} sets to vote on; {too_long} prompts were too long")

    # --- 3. Votes -----------------------------------------------------------------------------------------------------------

    @property
    def wanted(self) -> int:
        return self.options.votes or len(self.state["items"])

    def collect(self, file: str | Path | None, judge: Judge | None, wait: bool) -> int | None:
        """Take in votes and export them; the number of new votes where there are not enough yet, else None."""
        if "votes" in self.state:
            if file or judge:
                self.say("votes: this round has its votes already; new ones count for the next")
            return None
        store = Store(self.run)
        try:
            if file:
                self.say(f"votes: {import_votes(store, file)}")
            if judge:
                (cast, silent), _ = self.call(cast_by, self.run, self.state["items"], judge)
                self.say(f"votes: {cast} by {judge.who}" + (f", which said nothing of {silent}" if silent else ""))
            new = self._new_votes(store)
            if wait and not (file or judge):
                new = self._wait(store, new)
        finally:
            store.close()
        if not new or (len(new) < self.wanted and not (file or judge)):
            return len(new)
        self._export(new)
        return None

    def _wait(self, store: Store, new: list[Vote]) -> list[Vote]:
        if len(new) < self.wanted:
            self.say(f"votes: waiting for {self.wanted}; to vote: instructlite app {self.run}")
        with progress("round: votes", self.wanted, len(new)) as advance:
            while len(new) < self.wanted:
                time.sleep(POLL_SECONDS)
                before, new = len(new), self._new_votes(store)
                advance(len(new) - before)
        return new

    def _new_votes(self, store: Store) -> list[Vote]:
        """Votes that no earlier round has used, but for items that measure voters."""
        used = {tuple(pair) for number in range(1, self.number) for pair in _read(self._round_data(number) / "used.json")}
        return [vote for vote in store.votes() if (vote.item, vote.voter) not in used and not vote.gold]

    def _round_data(self, number: int) -> Path:
        return self.run / "rounds" / f"{number:02d}" / "data"

    def _export(self, new: list[Vote]) -> None:
        """The votes as rankings, and with old comparisons as what the reward model learns from."""
        held_out = self._held_out()
        kept = [vote for vote in new if opening({"prompt": vote.prompt}) not in held_out]
        result = export(kept, "rankings")
        rankings = [group for group in as_groups(result.records) if len(set(group["ranks"])) > 1]
        ties = len(result.records) - len(rankings)
        if not rankings:
            raise InstructLiteError(f"{self.run}: nothing can be learnt from these {len(new)} votes: {ties} ties; {result}")
        old = as_groups(read_records(str(self.run / "data" / "reward.jsonl")))
        for number in range(1, self.number):
            old += as_groups(read_records(str(self._round_data(number) / "votes.jsonl")))
        replay = len(old) if self.options.replay is None else min(self.options.replay, len(old))
        seen_again = random.Random(self.seed).sample(old, replay)
        write_records(self.data / "votes.jsonl", rankings)
        write_records(self.data / "reward.jsonl", [*rankings * self.options.vote_weight, *seen_again])
        write_text(self.data / "used.json", json.dumps([[vote.item, vote.voter] for vote in new]) + "\n")
        self._note(votes=_about(new, kept, result, ties, rankings) | {"old_comparisons": replay, **agreement(kept)})
        votes = self.state["votes"]
        self.say(f"votes: {votes['used']} of {len(new)} give {len(rankings)} rankings; {replay} old comparisons beside them")
        if votes["reward_agreement"] is not None:
            self.say(f"votes: the last reward model agreed with {votes['reward_agreement']:.2f} of {votes['reward_pairs']} pairs")

    # --- 4. Reward model, 5. PPO --------------------------------------------------------------------------------------------

    def learn(self) -> None:
        """A stage that was interrupted goes on from its checkpoint."""
        options = {
            stage: self.loop.options(stage) | {"seed": self.loop.options(stage)["seed"] + self.number} for stage in ("reward", "ppo")
        }
        # People have judged the policy's own answers; and the adapter that is gone on from could give none.
        options["reward"]["policy_samples"] = 0.0
        wired = {stage: stage_inputs(stage, self.loop, self.run) for stage in options}
        wired["reward"] |= {"model": self.reward, "data": self.data / "reward.jsonl"}
        reference = {"reference": self.run / "sft"} if self.options.reference == "sft" and self.last != "sft" else {}
        wired["ppo"] |= {"model": self.policy, **reference, "reward": self.directory / "reward", "data": self.data / "prompts.jsonl"}
        for stage in options:
            path = self.directory / stage
            begun = has_saved(work_directory(path)) or is_adapter(path)  # killed before or after its last rename
            train(stage, path, wired[stage], options[stage], self.ledger, self.call, resume=begun, say=self.say)
            made = {stage: {"sha256": Adapter.load(path).sha256}}
            self._note(
                adapters=self.state.get("adapters", {}) | made, metrics=self.state.get("metrics", {}) | {stage: Adapter.load(path).metrics}
            )

    # --- 6. Report ----------------------------------------------------------------------------------------------------------

    def report(self) -> "Report":
        """The new policy beside the last one and SFT on held-out prompts; then the round is finished."""
        name, judge = f"round-{self.number}", self.run / "judge"
        candidates = {"sft": self.run / "sft", self.last: self.policy, name: self.directory / "ppo"}
        judges = ({"judge": judge} if is_adapter(judge) else {}) | {"reward": self.directory / "reward"}
        inputs = {"data": self.run / "data" / "heldout_prompts.jsonl"}
        options = {name: value for name, value in asdict(self.loop.evaluation).items() if name != "candidates"}
        made_from = made_of("report", {**inputs, **candidates, **judges}, options)
        self.say(f"report: {', '.join(candidates)} answer the held-out prompts")
        with self.ledger.running("report", made_from) as peak:
            report, memory = self.call(_evaluate, candidates, judges, self.directory / "report", {**inputs, **options})
            peak |= memory
        wins = [row for row in report.to_dict()["win_rates"] if row["a"] == name]
        self._note(metrics=self.state["metrics"] | {"win_rates": wins}, finished=_now())
        for row in wins:
            if row["decoding"] == "sampled" and "b_decoding" not in row:
                interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
                self.say(f"report: {name} wins {row['rate']:.2f} {interval} against {row['b']}, by {row['judge']}")
        return report

    def _note(self, **content: Any) -> None:
        self.state |= json.loads(json.dumps(content))
        write_text(self.directory / "round.json", json.dumps(self.state, indent=2, ensure_ascii=False) + "\n")


def cast_by(run: Path, items: list[int], judge: Judge) -> tuple[int, int]:
    """The judge's votes on the items; see `cast_votes`."""
    from .feedback.voting import by_function, by_language_model, by_score, cast_votes

    if judge.base_url is not None:
        from .data.generating.completer import Completions, Endpoint
        from .evaluation.judges import LanguageModelJudge

        endpoint = Endpoint(judge.who, None if judge.base_url == "openai" else judge.base_url, key_env=judge.key_env)
        ranking = by_language_model(LanguageModelJudge.of(Completions(endpoint, run / "judged.sqlite")))
    elif is_adapter(judge.who):
        from .models.completer import load_scorer

        ranking = by_score(load_scorer(judge.who))
    elif ":" in judge.who:
        ranking = by_function(judge.who)
    else:
        raise InstructLiteError(
            f"--judge {judge.who}: no reward adapter there; give one, module:function, or a language model's name with --base-url"
        )
    # Unlike a person's, the rate of its votes says nothing.
    store = Store(run, votes_per_minute=None)
    try:
        return cast_votes(store, f"judge {Path(judge.who).name}", items, ranking)
    finally:
        store.close()


def agreement(votes: list[Vote]) -> dict[str, Any]:
    """How many pairs the reward models' mean score at the time of the vote orders as the voter did; ties of the voter are none."""
    right = pairs = 0
    for vote in votes:
        for a in vote.answers:
            for b in vote.answers:
                ranked = None not in (a.rank, b.rank) and a.rank < b.rank
                if ranked and a.scores and a.scores.keys() == b.scores.keys():
                    margin = sum(a.scores.values()) - sum(b.scores.values())
                    right, pairs = right + (margin > 0) + 0.5 * (margin == 0), pairs + 1
    return {"reward_agreement": right / pairs if pairs else None, "reward_pairs": pairs}


def _about(new: list[Vote], kept: list[Vote], result: Exported, ties: int, rankings: list[dict]) -> dict[str, Any]:
    left_out = dict(result.left_out) | {"a held-out prompt": len(new) - len(kept), "a tie of all answers": ties}
    return {
        "new": len(new), "voters": len({vote.voter for vote in new}), "used": result.used - ties,
        "left_out": {reason: count for reason, count in left_out.items() if count}, "rankings": len(rankings),
        "sha256": data_hash(rankings),
    }  # fmt: skip


def _evaluate(candidates: dict[str, Path], judges: dict[str, Path], directory: Path, options: dict[str, Any]) -> "Report":
    from .evaluation.compare import evaluate

    return evaluate(candidates, judge=judges, output_dir=directory, **options)


def _read(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
