"""Benchmarks through EleutherAI's lm-eval, with the adapters of one base in memory: no adapter is loaded or merged for it.

Tasks by their names (mmlu, hellaswag, humaneval …) take their data from the Hub; those of a directory of YAML files, and the shipped
"truthfulqa_small_mc1", need no network. The numbers are lm-eval's own, computed with its own prompts; nothing is sent anywhere.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..config import BaseOptions
from ..errors import InstructLiteError, require
from ..models.base import base_of
from ..models.manifest import Adapter
from ..models.roles import RoleModel
from .prompt_sets import SHIPPED
from .report import Report

Row = dict[str, Any]
TASKS = SHIPPED / "tasks"


def benchmark(
    candidates: Sequence[str | Path | Adapter],
    tasks: Sequence[str],
    *,
    task_directory: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    chat_template: bool = False,
    run_code: bool = False,
    batch_size: int = 16,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Rows {candidate, task, metric, better, value, standard_error, n, how} for every candidate and task.

    candidates: policy adapters of one base, and "base". task_directory: YAML files of one's own tasks, found before lm-eval's.
    limit: the first so many examples of each task. few_shot: examples in the prompt (None: the task's own number).
    run_code: allow tasks that run what the model writes (humaneval, mbpp) on this machine, without any sandbox. done: called with
    the rows of each candidate as they come.

    Raises InstructLiteError for tasks that are not known, that run code without leave, or whose data cannot be had.
    """
    lm_eval = require("lm_eval", "bench")
    manager, wanted = _tasks(tasks, task_directory)
    adapters = {f"candidate{i}": one for i, one in enumerate(candidates) if one != "base"}
    loaded = {role: Adapter.load(one) for role, one in adapters.items()}
    for adapter in loaded.values():
        if adapter.role != "policy":
            raise InstructLiteError(f"{adapter}: a {adapter.role} adapter cannot answer; pass adapters of SFT, DPO or PPO")
    model = _load(loaded)
    options = {
        "tasks": wanted, "task_manager": manager, "limit": limit, "num_fewshot": few_shot, "apply_chat_template": chat_template,
        "confirm_run_unsafe_code": run_code, "log_samples": False, "bootstrap_iters": 1000,
    }  # fmt: skip
    how = ", ".join(
        [f"lm-eval {lm_eval.__version__}", *([f"{few_shot}-shot"] if few_shot is not None else []), *(["chat template"] * chat_template)]
        + ([f"first {limit}"] if limit else [])
    )
    rows = []
    for number, one in enumerate(candidates):
        role = f"candidate{number}" if one != "base" else None
        found = _rows(loaded[role].name if role else "base", _evaluate(model, role, batch_size, run_code, options), how)
        done(found)
        rows += found
    return rows


def _load(adapters: Mapping[str, Adapter]) -> RoleModel:
    if not adapters:
        raise InstructLiteError("benchmark: name an adapter; for a base alone call lm-eval itself (lm_eval --model hf)")
    return RoleModel.load(base_of(next(iter(adapters.values())), BaseOptions()), adapters)


def _evaluate(model: RoleModel, role: str | None, batch_size: int, run_code: bool, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """lm-eval's results with the adapter of `role`, as they come from `simple_evaluate`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with model.active(role), _quiet(), _code_allowed(run_code):
        lm = HFLM(pretrained=model.base.model, tokenizer=model.base.tokenizer, batch_size=batch_size)
        try:
            return simple_evaluate(lm, **options)
        except OSError as error:
            raise InstructLiteError(
                f"benchmark: a task's data cannot be had ({str(error).splitlines()[0]}); where the Hub is out of reach, use local tasks "
                "(truthfulqa_small_mc1, --task-directory)"
            ) from error
        except ValueError as error:
            if "unsafe" not in str(error).lower():
                raise
            raise InstructLiteError(
                "benchmark: a task runs code that the model wrote, on this machine and without a sandbox; allow it with --run-code "
                "(run_code=True)"
            ) from error


def _rows(candidate: str, results: Mapping[str, Any], how: str) -> list[Row]:
    rows = []
    for task, measured in {**results["results"], **results.get("groups", {})}.items():
        for key, value in measured.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = measured.get(f"{metric}_stderr,{rule}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
            rows.append({
                "candidate": candidate, "task": task, "metric": metric if rule == "none" else f"{metric}, {rule}",
                "better": {True: "higher", False: "lower"}.get(higher), "value": float(value),
                "standard_error": float(error) if isinstance(error, (int, float)) else None,
                "n": _examples(results, task), "how": how,
            })  # fmt: skip
    return rows


def _examples(results: Mapping[str, Any], task: str) -> int | None:
    """Of a group the sum over its tasks."""
    counts = results["n-samples"]
    if task in counts:
        return counts[task]["effective"]
    return sum(filter(None, (_examples(results, part) for part in results.get("group_subtasks", {}).get(task, ())))) or None


def _tasks(names: Sequence[str], directory: str | Path | None) -> tuple[Any, list[Any]]:
    """lm-eval's task manager, and the tasks as it takes them: names, and the shipped ones as configurations.

    lm-eval's own 14,000 tasks are only looked through (seconds) where a name is none of the local ones.
    """
    if directory is not None and not Path(directory).is_dir():
        raise InstructLiteError(f"{directory}: no directory with task files (YAML)")
    if not names:
        raise InstructLiteError(f"benchmark: name the tasks, such as {', '.join(shipped_tasks())} or mmlu")
    own, local = shipped_tasks(), _manager(False, directory)
    manager = local if set(names) <= {*own, *local.all_tasks} else _manager(True, directory)
    if unknown := set(names) - {*own, *manager.all_tasks}:
        here = ", ".join(sorted([*own, *local.all_tasks]))
        raise InstructLiteError(f"benchmark: no task {min(unknown)}; local ones: {here}; for lm-eval's: lm_eval ls tasks")
    return manager, [own.get(name, name) for name in names]


def _manager(defaults: bool, directory: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults, include_path=None if directory is None else str(directory))


def shipped_tasks() -> dict[str, dict[str, Any]]:
    """The task files that come with the package, with their data found wherever it is installed."""
    tasks = {}
    for path in sorted(TASKS.glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {split: str(SHIPPED / name) for split, name in files.items()}
        tasks[config["task"]] = config
    return tasks


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's notes about what it was given (its progress bars stay), and without a word to the Hub of files that are here.

    datasets tells it of each load, "json" and a local file included (datasets 5.2, load.py: increase_load_count).
    """
    from datasets import config

    logger = logging.getLogger("lm_eval")
    before = logger.level, config.HF_UPDATE_DOWNLOAD_COUNTS
    logger.setLevel(logging.ERROR)
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        config.HF_UPDATE_DOWNLOAD_COUNTS = before[1]


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """What the `code_eval` metric asks for, besides lm-eval's own question."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]


def add_to_report(directory: str | Path, rows: Sequence[Row]) -> None:
    """Put rows into a report's files, in place of earlier ones about the same."""
    report, answers = Report.load(directory), Path(directory) / "answers.jsonl"
    if not answers.is_file():
        raise InstructLiteError(f"{answers}: is missing, and the report is written with it; run instructlite evaluate first")
    report.answers = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    about = {_about(row) for row in rows}
    report.benchmarks = [*(row for row in report.benchmarks if _about(row) not in about), *rows]
    report.save(directory)


def _about(row: Row) -> tuple:
    return row["candidate"], row["task"], row["metric"]
