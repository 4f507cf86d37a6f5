"""Seconds and peak memory of the phases of a PPO cycle, taken from outside: nothing in the package is changed for it.

Memory is what torch has allocated on a GPU, else the resident set of the process (Linux only: the kernel's high-water mark, set back
at every change of phase). Resident memory includes what earlier phases gave back to the allocator and it kept.
"""

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PrinterCallback, TrainerCallback

from instructlite.training import rollout
from instructlite.training.ppo_trainer import PPOTrainer

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Phases:
    """The time since `start()` split into phases. One inside another interrupts it; what no phase covers is `rest`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_mb: dict[str, float] = {}
        self.running, self.failed_in = ["rest"], None
        _forget_peak()
        self.since = time.perf_counter()

    def stop(self) -> dict[str, dict[str, float]]:
        """Seconds and peak memory of each phase since `start()`."""
        self._note()
        return {"seconds": dict(self.seconds), "peak_mb": dict(self.peak_mb)}

    def enter(self, name: str) -> None:
        self._note()
        self.running.append(name)

    def leave(self) -> None:
        self._note()
        self.running.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        except torch.OutOfMemoryError:
            self.failed_in = self.failed_in or name  # the innermost
            raise
        finally:
            self.leave()

    def timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return wrapper

    def _note(self) -> None:
        """Time and peak since the last change go to the phase that ran."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        name = self.running[-1]
        self.seconds[name] += time.perf_counter() - self.since
        if (peak := _peak_mb()) is not None:
            self.peak_mb[name] = max(peak, self.peak_mb.get(name, 0.0))
        _forget_peak()
        self.since = time.perf_counter()


def _peak_mb() -> float | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) * 1024 / 1e6 if os.access(CLEAR_REFS, os.W_OK) else None


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5")


@contextmanager
def phases_of(trainer: PPOTrainer, phases: Phases) -> Iterator[None]:
    """Note the phases of the trainer's cycles: generate, score: ROLE, forward: ROLE, backward, optimiser.

    "forward: policy" includes the gradient of the log-probabilities by their hidden states, which is made there (logprobs.py).
    """
    model, switch = trainer.unwrapped, trainer.unwrapped.active

    @contextmanager
    def active(role: str | None) -> Iterator[None]:
        kind = "forward" if torch.is_grad_enabled() else "score"
        # Generation, and checkpointed layers that are computed again in the backward pass, are phases of their own.
        alone = phases.running == ["rest"]
        with phases.phase(f"{kind}: {role or 'reference'}") if alone else nullcontext(), switch(role):
            yield

    functions = [
        (rollout, "generate", "generate"), (model, "lower_hidden", "score: lower layers"), (trainer.accelerator, "backward", "backward"),
        (trainer, "_clip_grad_norm", "optimiser"),
    ]  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_OptimiserStep(phases))
    with ExitStack() as patches:
        for owner, name, phase in functions:
            patches.enter_context(patch.object(owner, name, phases.timed(phase, getattr(owner, name))))
        patches.enter_context(patch.object(model, "active", active))
        patches.enter_context(patch.object(trainer.health, "say", lambda text: None))  # that no response ends is on purpose here
        yield


class _OptimiserStep(TrainerCallback):
    def __init__(self, phases: Phases):
        self.phases = phases

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.enter("optimiser")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.leave()
