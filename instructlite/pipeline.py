"""Run a recipe file's stages in order: data, SFT, reward model, judge, PPO, what stands under `also`, report.

Stages talk through the run directory only. `stages.json` there remembers what each finished stage was made from (its
options, the data files, the adapters before it); a stage that would be made from the same again is skipped. One that was
interrupted is not in the file: it starts over, or goes on from its last checkpoint (`resume`). Nothing is printed here: lines
for the user go through `say`.

Started by a launcher as several processes, all of them train, and answer for the report. The main one alone prints and writes; the
others wait for its files between the stages.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config import STAGES, DataOptions, Loop, is_optional, kind_of
from .data.parts import parts_of, sources_of
from .data.records import data_hash, read_ptx, read_records, write_records
from .errors import BadRecords, InstructLiteError
from .models.manifest import NAME as MANIFEST
from .models.manifest import Adapter, is_adapter, sha256_file
from .training.interrupt import NAMES, Interrupted, Interruption
from .training.work import is_main_process, launched, locked, write_text

if TYPE_CHECKING:
    from .evaluation.report import Report

Say = Callable[[str], None]


@dataclass(frozen=True)
class StageRun:
    """What became of a stage. Seconds and peak memory are those of the run that made it, also where it was skipped now."""

    stage: str
    path: Path
    skipped: bool
    seconds: float
    peak_rss_mb: float | None = None
    """Most memory that the process had held by the end of the stage. None: this system does not tell."""
    peak_gpu_mb: float | None = None


@dataclass(frozen=True)
class LoopRun:
    """What `run_loop` did."""

    directory: Path
    stages: list[StageRun]
    report: "Report | None"
    """None where the report was skipped, or left out by `only`."""


def run_loop(
    loop: Loop,
    output_dir: str | os.PathLike,
    *,
    only: str | None = None,
    isolate: bool = False,
    resume: bool = False,
    say: Say = lambda line: None,
) -> LoopRun:
    """Run the loop into `output_dir`, skipping what is done.

    only: run this stage alone, again if it is done, on what the stages before it left there; one that may stand under `also` need not
    stand there. isolate: each stage in a
    process of its own, so that it starts with all of the memory (a script must then stand under `if __name__ == "__main__"`;
    not under a launcher, whose processes know each other).
    resume: let a stage that was interrupted go on from its last checkpoint (see `Recipe.run`). Raises InstructLiteError
    before anything is trained if a data file or a `training:` block has faults, and Interrupted after SIGTERM or Ctrl-C.
    """
    if only is not None and only not in STAGES:
        if not is_optional(only):
            raise InstructLiteError(f"--only {only}: no such stage; stages: {', '.join(dict.fromkeys([*STAGES, 'dpo', *loop.also]))}")
        loop = replace(loop, also={**loop.also, only: loop.also.get(only)})
    run = Path(output_dir)
    # Every section goes through its recipe, and its `training:` block through its config class, now, not when its stage begins,
    # minutes or hours from here.
    for stage in loop.trained:
        if only in (None, stage):
            options = loop.options(stage)
            recipe_class(stage)(**{**options, **stage_inputs(stage, loop, run)})
            recipe_class(stage).check_training(options.get("training", {}))
            if options.get("rewards"):
                from .training.rewards import check_functions

                check_functions(options["rewards"])
    run.mkdir(parents=True, exist_ok=True)
    main = is_main_process()
    with Interruption(f"run_loop(..., {str(output_dir)!r}, resume=True)") as interruption, locked(run) if main else nullcontext():
        if main:
            write_text(run / "recipe.yaml", yaml.safe_dump(loop.to_dict(), sort_keys=False, allow_unicode=True))
        call = partial(in_own_process, interruption=interruption) if isolate and not launched() else in_this_process
        return _run_stages(loop, run, only, resume, call, say if main else lambda line: None)


def _run_stages(loop: Loop, run: Path, only: str | None, resume: bool, call: "Call", say: Say) -> LoopRun:
    ledger = Ledger(run / "stages.json")
    done: list[StageRun] = []
    report = None
    # 1. Data: read and split again each time, which takes seconds and is how a changed file is noticed
    if only in (None, "data") or not (run / "data" / "data.json").is_file():
        with ledger.running("data", made_from="sources"):
            say(f"data: {prepare_data(loop.data, run / 'data', ptx_sources(loop))}")
        done.append(ledger.stage_run("data", run / "data", skipped=False))
    if launched():
        from .training.recipe import wait_for_all_processes

        wait_for_all_processes()
    # 2. SFT  3. Reward model  4. Judge  5. PPO, and other policies beside it
    for stage in loop.trained:
        if only in (None, stage):
            inputs = stage_inputs(stage, loop, run)
            done.append(
                train(stage, run / stage, inputs, loop.options(stage), ledger, call, again=only is not None, resume=resume, say=say)
            )
    # 6. Report
    if only in (None, "report"):
        stage_run, report = _report(loop, run, ledger, call, again=only is not None, say=say)
        done.append(stage_run)
    return LoopRun(run, done, report)


def ptx_sources(loop: Loop) -> dict[str, Any]:
    """For each PPO-ptx the name of its file, and where its texts come from."""
    return {ptx_file(stage): source for stage, source in loop.texts.items()}


def ptx_file(stage: str) -> str:
    return "ptx" if stage == "ppo" else f"{stage}-texts"


def prepare_data(options: DataOptions, directory: Path, ptx: Mapping[str, str | list[str]] | None = None) -> str:
    """Read, split and write the run's records as JSONL, with `data.json` (rows and hashes of each file); returns a summary.

    ptx: for each file where PPO-ptx has its texts from; "demonstrations" are those that SFT trains on.

    Of several processes each reads, so that faults stop them all, and the main one writes. Raises BadRecords with the faults of
    all sources together.
    """
    ptx = ptx or {}
    texts = {name: source for name, source in ptx.items() if source != "demonstrations"}
    rows = _read_all(sources_of(options), texts)
    parts = parts_of(options, rows, ptx)
    names = [*FILES, *ptx]
    if is_main_process():
        _write_data(options, directory, {name: parts[name] for name in names})
    return ", ".join(f"{len(parts[name])} {name.replace('_', ' ')}" for name in names)


FILES = ("demonstrations", "heldout_demonstrations", "reward", "judge", "heldout", "prompts", "heldout_prompts")


def _write_data(options: DataOptions, directory: Path, parts: dict[str, list[dict]]) -> None:
    (directory / "data.json").unlink(missing_ok=True)  # until all files are written: half of them are none
    for name, rows in parts.items():
        write_records(directory / f"{name}.jsonl", rows)
    counts = {name: {"rows": len(rows), "sha256": data_hash(rows)} for name, rows in parts.items()}
    (directory / "data.json").write_text(json.dumps({"options": asdict(options), "files": counts}, indent=2) + "\n", encoding="utf-8")


def _read_all(sources: Mapping[str, tuple[Any, str | None]], texts: Mapping[str, Any]) -> dict[str, list[dict]]:
    rows, problems = {}, []
    readers: dict[str, Callable[[], list[dict]]] = {name: partial(read_records, *source) for name, source in sources.items()}
    for name, read in (readers | {name: partial(read_ptx, source) for name, source in texts.items()}).items():
        try:
            rows[name] = read()
        except BadRecords as error:
            problems += error.problems
    if problems:
        raise BadRecords(problems)
    return rows


def recipe_class(stage: str) -> type:
    """The recipe that trains a stage. Loads torch."""
    from .training.dpo import DPORecipe
    from .training.ppo import PPORecipe
    from .training.reward import RewardRecipe
    from .training.sft import SFTRecipe

    return {"sft": SFTRecipe, "reward": RewardRecipe, "judge": RewardRecipe, "ppo": PPORecipe, "dpo": DPORecipe}[kind_of(stage)]


def stage_inputs(stage: str, loop: Loop, run: Path) -> dict[str, Any]:
    """What the loop wires into a stage: the directories of the adapters before it, and its data files."""
    data = run / "data"
    if stage == "sft":
        return {"model": loop.model, "data": data / "demonstrations.jsonl", "eval_data": data / "heldout_demonstrations.jsonl"}
    if kind_of(stage) == "ppo":
        section = loop.section(stage)
        texts = {} if section.get("ptx_data") is None else {"ptx_data": data / f"{ptx_file(stage)}.jsonl"}
        watch = {"watch_reward": run / "judge"} if section.get("watch_reward") == "judge" else {}
        return {"model": run / "sft", "reward": run / "reward", "data": data / "prompts.jsonl", **texts, **watch}
    if kind_of(stage) == "dpo":
        return {"model": run / "sft", "data": data / "reward.jsonl", "eval_data": data / "heldout.jsonl"}
    if stage == "report":
        adapters = {name: run / name for name in ("sft", "ppo", *loop.also, "judge", "reward")}
        return {
            **adapters,
            **{name: data / f"{name}.jsonl" for name in ("heldout_prompts", "heldout_demonstrations", "demonstrations", "heldout")},
        }
    return {
        "model": run / "sft",
        "data": data / f"{stage}.jsonl",
        "eval_data": data / "heldout.jsonl",
        "demonstrations": data / "demonstrations.jsonl",
    }


def train(
    stage: str,
    path: Path,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    ledger: "Ledger",
    call: "Call",
    *,
    again: bool = False,
    resume: bool,
    say: Say,
) -> StageRun:
    """Train a stage into `path`, unless it stands there, made from the same (again: also then)."""
    deciding = {**options, "lora": asdict(options["lora"])}
    if training := deciding.pop("training", None):  # who is told of it changes nothing
        training = {name: value for name, value in training.items() if name != "report_to"}
    deciding |= {"training": training} if training else {}
    made_from = made_of(stage, inputs, deciding)
    if not again and is_adapter(path) and ledger.has(stage, made_from):
        say(f"{stage}: kept from before, made from the same options and data ({path})")
        return ledger.stage_run(stage, path, skipped=True)
    say(f"{stage}: training")
    with ledger.running(stage, made_from) as peak:
        adapter, memory = call(_run_recipe, stage, {**options, **inputs}, path, resume)
        peak |= memory
    stage_run = ledger.stage_run(stage, path, skipped=False)
    say(f"{stage}: done in {stage_run.seconds:.0f} s{_came_of_it(stage, adapter.metrics)}")
    return stage_run


def _came_of_it(stage: str, metrics: Mapping[str, Any]) -> str:
    """The numbers of a stage that a person waits for."""
    if stage == "sft" and "eval_perplexity" in metrics:
        return f"; perplexity of held-out answers {metrics['eval_perplexity_before']:.2f} -> {metrics['eval_perplexity']:.2f}"
    if "eval_margin" in metrics:
        interval = f"[{metrics['eval_accuracy_low']:.2f}, {metrics['eval_accuracy_high']:.2f}]"
        pairs = f"{metrics['eval_pairs']} held-out pairs, mean margin {metrics['eval_margin']:.2f}"
        return f"; prefers the better answer in {metrics['eval_accuracy']:.2f} {interval} of {pairs}"
    if "eval_accuracy" in metrics:
        interval = f"[{metrics['eval_accuracy_low']:.2f}, {metrics['eval_accuracy_high']:.2f}]"
        longer, correlation = metrics["eval_longer_wins"], metrics["eval_length_correlation"]
        length = f"the longer answer wins in {longer:.2f}; margin and length correlate {correlation:.2f}"
        return f"; accuracy {metrics['eval_accuracy']:.2f} {interval} on {metrics['eval_pairs']} held-out pairs ({length})"
    if "last" in metrics:
        first, last = metrics["first"], metrics["last"]
        scores = f"{first['objective/score']:.2f} -> {last['objective/score']:.2f}"
        kl = round(last["objective/kl"], 1) + 0.0  # never -0.0
        return f"; score of the first rollout and of the last quarter {scores}, KL {kl} nats an answer"
    return ""


def _run_recipe(stage: str, options: dict[str, Any], path: Path, resume: bool) -> Adapter:
    return recipe_class(stage)(**options).run(path, resume=resume)


def _evaluate(run: Path, options: dict[str, Any]) -> "Report":
    from .evaluation.runs import evaluate_run

    return evaluate_run(run, **options)


def _report(loop: Loop, run: Path, ledger: "Ledger", call: "Call", *, again: bool, say: Say) -> tuple[StageRun, "Report | None"]:
    path, inputs = run / "report", stage_inputs("report", loop, run)
    made_from = made_of("report", inputs, asdict(loop.evaluation))
    if not again and (path / "report.json").is_file() and ledger.has("report", made_from):
        say(f"report: kept from before, made from the same options and adapters ({path})")
        return ledger.stage_run("report", path, skipped=True), None
    # The last one is what the report's first words are about.
    candidates = loop.evaluation.candidates or ["base", "sft", *loop.also, "ppo"]
    say(f"report: {', '.join(candidates)} answer the held-out prompts")
    with ledger.running("report", made_from) as peak:
        report, memory = call(_evaluate, run, asdict(loop.evaluation) | {"candidates": candidates})
        peak |= memory
    return ledger.stage_run("report", path, skipped=False), report


def made_of(stage: str, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """One hash of all that decides what a stage makes: options, content of data files, manifests of the adapters before it."""
    contents = {name: value for name, value in inputs.items() if not isinstance(value, Path)}
    for name, value in inputs.items():
        if name in contents:
            continue
        file = value if value.suffix == ".jsonl" else value / MANIFEST
        if not file.is_file():
            raise InstructLiteError(f"{stage} needs {value}, which is not there: run the stage that makes it first, or leave out --only")
        contents[name] = sha256_file(file)
    return hashlib.sha256(json.dumps({"inputs": contents, "options": options}, sort_keys=True).encode()).hexdigest()


Call = Callable[..., tuple[Any, dict[str, float]]]
"""Calls a function with arguments; gives its result, and the most memory its process has held."""


def in_this_process(function: Callable, *arguments: Any) -> tuple[Any, dict[str, float]]:
    from accelerate.utils.memory import clear_device_cache

    from .training.recipe import peak_memory

    result = function(*arguments)
    clear_device_cache(garbage_collection=True)  # trainers stand in circles, and would keep their base through the next stage
    return result, peak_memory()


def in_own_process(function: Callable, *arguments: Any, interruption: Interruption | None = None) -> tuple[Any, dict[str, float]]:
    """As `in_this_process`, but what the function held is the system's again afterwards: the allocator keeps much of it.

    Where there is a fork server the heavy libraries are imported once, in it. An InstructLiteError there is raised here;
    a signal here is passed on, and Interrupted raised when the process has ended.
    """
    own = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(own)
    context.set_forkserver_preload([f"instructlite.{name}" for name in ("training.ppo", "training.dpo", "evaluation.compare")])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    with interruption.passed_on_to(process) if interruption else nullcontext():
        process.start()
        sender.close()
        try:
            result, peak, error = receiver.recv()
        except EOFError:
            result, peak, error = None, {}, None
        process.join()
    if error is not None:
        raise InstructLiteError(error)
    if stopped := ENDED_BY.get(process.exitcode) or (interruption and interruption.received):
        raise Interrupted(stopped)
    if process.exitcode:
        raise InstructLiteError(f"the stage's process ended with exit code {process.exitcode}; what it printed last says why")
    return result, peak


ENDED_BY = {128 + number: number for number in NAMES} | {-number: number for number in NAMES}


def _answer(sender: Any, function: Callable, arguments: tuple) -> None:
    with Interruption(None):
        from .training.recipe import quiet_libraries

        quiet_libraries()
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        try:
            sender.send((*in_this_process(function, *arguments), None))
        except InstructLiteError as error:
            sender.send((None, {}, str(error)))


def _stop_with_parent() -> None:
    """A stage whose loop was killed saves and ends, too: nobody waits for it, and the loop that goes on needs its directory."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


class Ledger:
    """`stages.json`: for each finished stage what it was made from, how long that took and how much memory."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def has(self, stage: str, made_from: str) -> bool:
        return self.entries.get(stage, {}).get("made_from") == made_from

    def stage_run(self, stage: str, path: Path, *, skipped: bool) -> StageRun:
        entry = self.entries[stage]
        return StageRun(stage, path, skipped, entry["seconds"], entry.get("peak_rss_mb"), entry.get("peak_gpu_mb"))

    @contextmanager
    def running(self, stage: str, made_from: str) -> Iterator[dict[str, float]]:
        """Time the stage and write it down when it has finished; while it runs, and if it fails, it is not in the file.

        Yields a dict for the peak memory.
        """
        if self.entries.pop(stage, None):
            self._write()
        start = time.perf_counter()
        peak: dict[str, float] = {}
        yield peak
        self.entries[stage] = {"made_from": made_from, "seconds": round(time.perf_counter() - start, 1), **peak}
        self._write()

    def _write(self) -> None:
        if is_main_process():
            write_text(self.path, json.dumps(self.entries, indent=2) + "\n")
