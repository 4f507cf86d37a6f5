"""Which rows train which stage: the records of a recipe, split so that no prompt is in two parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..config import DataOptions
from ..errors import InstructLiteError
from .records import as_groups, characters, opening, split_by_prompt

EVALUATED = ("context", "reference", "category")
"""Columns of held-out comparisons: what the candidate "context" is shown, what judges may compare with, and the use case."""


def sources_of(options: DataOptions) -> dict[str, tuple[Any, str | None]]:
    """By name where records come from, and their kind; only what is given."""
    sources: dict[str, tuple[Any, str | None]] = {
        "demonstrations": (options.demonstrations, "demonstrations"),
        "comparisons": (options.comparisons, "comparisons"),
        "rankings": (options.rankings, "rankings"),
        "prompts": (options.prompts, "prompts"),
        "heldout_demonstrations": (_file(options.heldout_demonstrations), "demonstrations"),
        "judge": (_file(options.judge), None),
        "heldout": (_file(options.heldout), None),
    }
    return {name: source for name, source in sources.items() if source[0] is not None}


def parts_of(options: DataOptions, rows: Mapping[str, list[dict]], ptx: Mapping[str, Any]) -> dict[str, list[dict]]:
    """The rows of each of the pipeline's files from those of the sources. ptx: where the texts of each PPO-ptx come from."""
    heldout_demonstrations = {"heldout_demonstrations": options.heldout_demonstrations}
    sft = _split(rows["demonstrations"], "demonstrations", options.demonstration_limit, heldout_demonstrations, options.seed)
    # One file holds one kind of record; a comparison is a ranking of two.
    preferences = as_groups([*rows["comparisons"], *rows["rankings"]]) if "rankings" in rows else rows["comparisons"]
    short, long = by_answer_length(preferences, options.answer_characters)
    compared = _split(short, "reward", options.comparison_limit, {"judge": options.judge, "heldout": options.heldout}, options.seed)
    if "judge" in compared:
        seen = {opening(row) for name in ("reward", "heldout") for row in compared[name]}
        compared["judge"] += [row for row in long if opening(row) not in seen]
    parts = {**rows, **sft, **compared}
    # Of a file of prompts the other columns are kept: reward functions get them.
    prompts = _prompts(rows.get("prompts", parts["reward"]), options.prompt_characters, columns="prompts" in rows)
    parts["prompts"] = prompts[: options.prompt_limit]
    parts["heldout_prompts"] = _prompts(parts["heldout"], options.prompt_characters)
    for name in ("prompts", "heldout_prompts"):
        if not parts[name]:
            raise InstructLiteError(f"data.prompt_characters={options.prompt_characters} leaves no {name}; raise it")
    return parts | {name: parts["demonstrations"] for name, source in ptx.items() if source == "demonstrations"}


def _file(part: int | float | str) -> str | None:
    return part if isinstance(part, str) else None


def _split(records: list[dict], rest: str, limit: int | None, parts: Mapping[str, int | float | str], seed: int) -> dict[str, list[dict]]:
    """The parts that are numbers or fractions, and what is left, at most `limit` rows of it, under the name `rest`."""
    own = {name: part for name, part in parts.items() if not isinstance(part, str)}
    sizes = {name: part if isinstance(part, int) else round(part * len(records)) for name, part in own.items()}
    left = len(records) - sum(sizes.values())
    if left < 1:
        asked = " + ".join(f"data.{name}={parts[name]}" for name in sizes)
        raise InstructLiteError(f"{asked} takes all {len(records)} rows: nothing is left for training; hold out fewer, or bring more rows")
    return split_by_prompt(records, {**sizes, rest: min(left, limit or left)}, seed)


def by_answer_length(records: list[dict], most: int | None) -> tuple[list[dict], list[dict]]:
    """Those whose answers are all short enough, and the others."""
    longest = [max(map(len, group["responses"])) for group in as_groups(records)]
    parts: tuple[list[dict], list[dict]] = ([], [])
    for record, length in zip(records, longest, strict=True):
        parts[most is not None and length > most].append(record)
    return parts


def _prompts(records: list[dict], longest: int | None, columns: bool = False) -> list[dict]:
    """The different conversations of the records, in order, but for those of more than `longest` characters; with all of their
    other columns, or with those that evaluation knows."""
    rows = {
        json.dumps(row["prompt"]): {name: value for name, value in row.items() if columns or name in ("prompt", *EVALUATED)}
        for row in records
    }.values()
    return [row for row in rows if longest is None or characters(row["prompt"]) <= longest]
