"""What to change where a stage does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..config import Loop, kind_of, merge
from ..models.memory import Shapes
from .devices import Device
from .lengths import Lengths
from .stages import DEFAULTS, TRAINING, stage_plan

Change = dict[str, Any]
"""Options that go together, by their keys."""


def changes_of(stage: str, loop: Loop, device: Device, shapes: Shapes, lengths: Lengths) -> list[str]:
    """Options, as they are written behind `instructlite run RECIPE`, that make the stage fit: no more of them than it takes."""

    def fits(changes: Iterable[Change]) -> bool:
        changed = {key: value for change in changes for key, value in change.items()}
        return stage_plan(stage, _with(loop, changed), device, shapes, lengths).fits

    made: dict[tuple[str, ...], Change] = {}
    for change in _remedies(stage, loop):
        made[tuple(change)] = change  # a smaller value in place of the larger one before
        if fits(made.values()):
            break
    else:
        return []
    for keys in list(made):
        rest = [change for other, change in made.items() if other != keys]
        if fits(rest):
            del made[keys]
    return [f"{key}={_text(value)}" for change in made.values() for key, value in change.items()]


def _remedies(stage: str, loop: Loop) -> Iterator[Change]:
    """From what costs least to what changes the result."""
    coarser = [{"quantization": "nf4"}] if loop.quantization != "nf4" else []
    if stage == "report":
        yield from ({"evaluation.batch_size": rows} for rows in _halves(loop.evaluation.batch_size))
        yield from coarser
        return
    kind = kind_of(stage)
    training = TRAINING | DEFAULTS[kind] | loop.options(stage).get("training", {})
    at = f"also.{stage}.training." if stage in loop.also else f"{stage}.training."
    batch, accumulation = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    if kind == "ppo":
        at_once = training.get("generation_batch_size") or batch * accumulation * training["num_mini_batches"]
        yield from ({f"{at}generation_batch_size": rows} for rows in _halves(at_once, least=4))
    if not training["gradient_checkpointing"]:
        yield {f"{at}gradient_checkpointing": True}
    for rows in _halves(batch):
        if batch % rows == 0:  # the same batch in more parts
            yield {f"{at}per_device_train_batch_size": rows, f"{at}gradient_accumulation_steps": accumulation * batch // rows}
    if kind == "ppo":
        yield {f"{at}logp_chunk_size": 64}
    yield from coarser
    length = "response_length" if kind == "ppo" else "max_length"
    yield from ({f"{at}{length}": tokens} for tokens in _halves(training[length], least=64))


def _halves(number: int, least: int = 1) -> Iterable[int]:
    while number // 2 >= least:
        number //= 2
        yield number


def _with(loop: Loop, changed: Mapping[str, Any]) -> Loop:
    for key, value in changed.items():
        section, _, rest = key.partition(".")
        for part in reversed(rest.split(".") if rest else []):
            value = {part: value}
        if section == "evaluation":
            loop = replace(loop, evaluation=replace(loop.evaluation, **value))
        else:
            loop = replace(loop, **{section: merge(getattr(loop, section), value) if rest else value})
    return loop


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
