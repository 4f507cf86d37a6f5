"""One evaluation by several processes: the main one does it, and the others do their part of what models answer and score.

So nobody but the main process decides anything, asks a language model, or writes. Rows are dealt in batches that are those of one
process, so that the numbers are its numbers to the last bit where the machines are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from ..errors import InstructLiteError
from ..models.roles import RoleModel
from ..models.sampling import Sampling, generate, log_probs, score
from ..training.work import launched

Rows = Sequence[tuple]
MODELS = Callable[[str | None], RoleModel]
"""Gives a merged candidate's model by its name, or (None) the base with all adapters."""


def computed(model: RoleModel, what: str, rows: Rows, batch_size: int, options: dict[str, Any]) -> list:
    """A value for each row. Of (prompt, role, seed) the "answers"; of (prompt, answer) the "scores" or "log_probs", one for each role."""
    if what == "answers":
        prompts, roles, seeds = (list(column) for column in zip(*rows, strict=True))
        sampling = Sampling(**options)
        return generate(model, [list(ids) for ids in prompts], roles, sampling, seed=seeds, batch_size=batch_size)
    sequences = [(list(prompt), list(answer)) for prompt, answer in rows]
    if what == "scores":
        return score(model, options["roles"], sequences, batch_size=batch_size).T.tolist()
    by_role = log_probs(model, options["roles"], sequences, temperature=options["temperature"], batch_size=batch_size)
    return [[own.tolist() for own in each] for each in zip(*by_role, strict=True)]


class Workers:
    """All processes of a launcher, each with the same models. The main one calls `compute`, the others `serve`."""

    def __init__(self) -> None:
        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.processes = state.process_index, state.num_processes
        # A group of its own: gloo needs no GPU for what is no tensor, and nobody loses patience while a language model judges.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    @classmethod
    def of_this_launch(cls) -> Workers | None:
        return cls() if launched() else None

    def compute(self, merged: str | None, models: MODELS, what: str, rows: Rows, batch_size: int, options: dict[str, Any]) -> list:
        """On the main process: as `computed`, each process computing whole batches of the rows."""
        size = -(-len(rows) // (batch_size * self.processes)) * batch_size
        parts = [rows[start * size : (start + 1) * size] for start in range(self.processes)]
        self._tell((merged, what, parts, batch_size, options))
        found: list[Any] = [None] * self.processes
        dist.gather_object(self._own(models, merged, what, parts, batch_size, options), found, dst=0, group=self.group)
        for number, part in enumerate(found):
            if isinstance(part, str):
                raise InstructLiteError(f"process {number}: {part}" if number else part)
        return [value for part in found for value in part]

    def serve(self, models: MODELS) -> Any:
        """On the others: compute until the main process has the result, which is returned; raises InstructLiteError if it gets none."""
        while True:
            task = [None]
            dist.broadcast_object_list(task, src=0, group=self.group)
            if len(task[0]) == 2:
                result, stopped = task[0]
                if stopped:
                    raise InstructLiteError(f"the main process has stopped: {stopped}")
                return result
            dist.gather_object(self._own(models, *task[0]), dst=0, group=self.group)

    def lead(self, make: Callable[[], Any]) -> Any:
        """On the main process: what `make` gives, which the others get, too; or they hear why there is nothing."""
        result = None
        try:
            result = make()
        finally:
            error = sys.exc_info()[1]
            with suppress(RuntimeError) if error else nullcontext():  # there may be nobody left to be told
                self._tell((result, "" if error is None else str(error).partition("\n")[0] or type(error).__name__))
        return result

    def _tell(self, task: tuple) -> None:
        dist.broadcast_object_list([task], src=0, group=self.group)

    def _own(self, models: MODELS, merged: str | None, what: str, parts: list[Rows], batch_size: int, options: dict[str, Any]) -> Any:
        """This process's part, or in words what went wrong."""
        part = parts[self.rank]
        try:
            return computed(models(merged), what, part, batch_size, options) if part else []
        except (InstructLiteError, RuntimeError) as error:  # the others wait for an answer
            return str(error)
