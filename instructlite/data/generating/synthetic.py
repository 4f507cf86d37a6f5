"""Data that a model writes: what the methods share, and `generate`, which runs one of them and writes its files.

Every method is a function of rows, seed and answers. As the answers are kept (completer.py), a run that was killed is run again: it
passes over what was answered, and asks for the rest.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InstructLiteError
from ..records import Source, read_records, write_records
from ..schema import Kind
from .completer import Answer, Budget, Completer, Completions, Messages, Request, Usage
from .templates import Prompts, read_prompts

CACHE = "answers.sqlite"
REPORT = "report.json"
# Method -> the module that holds it as a function of the same name, and its file of prompts (None: it asks nothing of its own).
METHODS = {
    "self-instruct": ("self_instruct", "self_instruct"),
    "evol-instruct": ("evol_instruct", "evol_instruct"),
    "constitutional": ("constitutional", "constitutional"),
    "ai-preferences": ("preferences", "judge"),
    "rejection-sampling": ("rejection", None),
}


@dataclass
class Generated:
    """What came of it: rows of one kind, what was left out with its reason, and what was measured on the way."""

    method: str
    kind: Kind
    rows: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    ties: list[dict] = field(default_factory=list)
    """Rankings of answers that were found equally good; nothing can be learned from them, but they are no losses."""
    measured: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a reader must know before using the rows."""
    usage: Usage | None = None

    def reject(self, reason: str, **what: Any) -> None:
        self.rejected.append({"reason": reason, **what})

    def report(self) -> dict[str, Any]:
        reasons = Counter(row["reason"] for row in self.rejected)
        return {
            "method": self.method,
            "kind": self.kind,
            "rows": len(self.rows),
            "ties": len(self.ties),
            "rejected": dict(reasons.most_common()),
            **self.measured,
            "notes": self.notes,
            "usage": asdict(self.usage) if self.usage else None,
        }

    def __str__(self) -> str:
        reasons = Counter(row["reason"] for row in self.rejected).most_common(8)
        lines = [f"{self.method}: {len(self.rows):,} {self.kind}" + (f", {len(self.ties):,} ties" if self.ties else "")]
        lines += [f"left out: {count:,} {reason}" for reason, count in reasons]
        lines += [f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in self.measured.items()]
        return "\n".join([*lines, str(self.usage), *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Asking:
    """What every method is given: whom to ask, with which prompts, how, and the seed of all chance."""

    method: str
    completions: Completions
    prompts: Prompts | None
    seed: int = 0
    temperature: float = 1.0
    """Of what is written; judgements are asked at 0."""
    max_tokens: int = 512

    def ask(self, messages: Sequence[Messages], label: str, *, temperature: float | None = None, draw: int = 0) -> list[Answer]:
        """One answer to each. draw: another number gives another answer to the same messages."""
        heat = self.temperature if temperature is None else temperature
        requests = [Request(message, heat, self.max_tokens, self.seed + 1_000_003 * draw) for message in messages]
        return self.completions.ask(requests, f"{self.method}: {label}")

    def draws(self, result: Generated, prompts: Sequence[Messages], number: int) -> list[list[Answer]]:
        """So many answers to each prompt, less those that cannot be a row's text: they are rejected in `result`."""
        drawn: list[list[Answer]] = [[] for _ in prompts]
        for draw in range(number):
            for i, answer in enumerate(self.ask(prompts, f"answers {draw + 1} of {number}", draw=draw)):
                if reason := fault_of(answer):
                    result.reject(reason, prompt=prompts[i], draw=draw + 1)
                else:
                    drawn[i].append(answer)
        return drawn

    def provenance(self, created: str, **more: Any) -> dict[str, Any]:
        """How a row came about. created: the time of its answer, so that going on later gives the same rows."""
        return {
            "method": self.method,
            "model": self.completions.model,
            "prompt_sha256": self.prompts.sha256 if self.prompts else None,
            "seed": self.seed,
            "created": created,
            **more,
        }


def generate(
    method: str,
    data: Source,
    completer: Completer,
    output: str | Path,
    *,
    prompts: str | Path | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    max_tokens: int = 512,
    **options: Any,
) -> Generated:
    """Run a method (see METHODS) on the rows of `data` and write `output`: KIND.jsonl, ties.jsonl, rejected.jsonl, report.json.

    prompts: a file in place of the method's own. options: the method's own, see its function. Kept answers are in
    `output`/answers.sqlite: the same call again goes on where the last one was stopped.

    Raises InstructLiteError; nothing that was answered is lost.
    """
    if method not in METHODS:
        raise InstructLiteError(f"'{method}' is no method: choose {', '.join(METHODS)}")
    module, prompt_file = METHODS[method]
    if prompts is not None and prompt_file is None:
        raise InstructLiteError(f"--prompts: {method} has no prompts of its own")
    output = Path(output)
    rows = read_records(data)
    if other := next((row for row in rows if "prompt" not in row), None):
        raise InstructLiteError(f"{method} needs rows with a prompt; one has the keys {', '.join(other)}")
    own = read_prompts(prompt_file, prompts) if prompt_file else None
    run: Callable[..., Generated] = getattr(importlib.import_module(f".{module}", __package__), method.replace("-", "_"))
    _check_options(method, run, options)
    completions = Completions(completer, output / CACHE, budget)
    result = run(Asking(method, completions, own, seed, temperature, max_tokens), rows, **options)
    result.usage = completions.usage
    if completions.usage.unasked:
        result.notes.append(f"the budget is spent, {completions.usage.unasked:,} requests were not asked: raise it and run the same again")
    save(result, output)
    return result


def _check_options(method: str, run: Callable[..., Generated], given: dict[str, Any]) -> None:
    known = {name: p.default for name, p in inspect.signature(run).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name, value in given.items():
        if name not in known:
            raise InstructLiteError(f"'{name}' is no option of {method}: {', '.join(known)}")
        expected = (int, float) if isinstance(known[name], float) else type(known[name])
        if known[name] is not None and (not isinstance(value, expected) or isinstance(value, bool) != isinstance(known[name], bool)):
            raise InstructLiteError(f"{name}={value!r}: {method} expects a value such as {known[name]}")
        if isinstance(known[name], int) and value is not False and value < 1:
            raise InstructLiteError(f"{name}={value}: must be at least 1")


def save(result: Generated, output: Path) -> None:
    """Each file in one piece; a file of an earlier run goes where there are no such rows any more."""
    for name, rows in ((result.kind, result.rows), ("ties", result.ties), ("rejected", result.rejected)):
        path = output / f"{name}.jsonl"
        if rows:
            write_records(draft := path.with_suffix(".tmp"), rows)
            os.replace(draft, path)
        else:
            path.unlink(missing_ok=True)
    draft = output / f"{REPORT}.tmp"
    draft.write_text(json.dumps(result.report(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, output / REPORT)


def instruction_of(row: dict) -> str | None:
    """The instruction of a row with a single turn; None where the prompt is a longer conversation."""
    return row["prompt"][0]["content"] if len(row["prompt"]) == 1 else None


def different_prompts(rows: Sequence[dict]) -> list[Messages]:
    """Each prompt once, in order."""
    return list({json.dumps(row["prompt"], ensure_ascii=False): row["prompt"] for row in rows}.values())


def fault_of(answer: Answer) -> str | None:
    """Why an answer cannot be a row's text: it is missing or cut off. None: it can."""
    if answer.text is None:
        return f"no answer ({answer.fault})"
    return "answer cut off at max_tokens" if answer.truncated else None


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
