"""Checkpoints that survive a kill at any moment, and training that goes on from them bit for bit.

`transformers.Trainer` writes straight into `checkpoint-N` and resumes from the highest number, whole or not. Here a checkpoint
is staged beside, gets a `manifest.json` with the sha256 of every file, and then its name; only one that verifies is resumed
from. Left out: FSDP and DeepSpeed, whose checkpoints are made elsewhere.
"""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import InstructLiteError
from ..models.manifest import sha256_file
from .interrupt import Interrupted, Interruption
from .work import publish, restore, write_text

FORMAT = 1
NAME = "manifest.json"
STAGING = ".staging"

logger = logging.get_logger(__name__)


# --- directories ----------------------------------------------------------------------------------------------------------


def newest_verified(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint of the latest step whose every file is as it was written; what is passed over is said in a line each.

    The step is that of the manifest: directory times mean nothing after a copy or under a clock that was set back.
    """
    for checkpoint in reversed(checkpoints(directory)):
        why = fault(checkpoint)
        if why is None:
            return checkpoint
        say(f"{checkpoint} is passed over: {why}")
    return None


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints by step; first those without a readable manifest."""
    return sorted(directory.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was made; -1 if its manifest does not say."""
    step = _manifest(checkpoint).get("step")
    return step if isinstance(step, int) else -1


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None if it is whole."""
    if not (checkpoint / NAME).is_file():
        return f"{NAME} is missing, so its saving was interrupted or something else wrote it"
    manifest = _manifest(checkpoint)
    if manifest.get("format") != FORMAT:
        return f"{NAME} is damaged" if "format" not in manifest else f"its format is {manifest['format']}, this version reads {FORMAT}"
    for name, sha256 in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256_file(file) != sha256["sha256"]:
            return f"{name} is damaged ({file.stat().st_size} of {sha256['bytes']} bytes, another sha256)"
    return None


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        content = json.loads((checkpoint / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def seal(staged: Path, step: int) -> None:
    """Write the manifest of a checkpoint whose other files are complete."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    entries = {path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}
    (staged / NAME).write_text(json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=2) + "\n", encoding="utf-8")


def rotate(directory: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the checkpoints of the earliest steps until `limit` are left (None or 0: none is removed), but none of `keep`."""
    found = checkpoints(directory)
    excess = len(found) - limit if limit else 0
    for checkpoint in [path for path in found if path not in keep][: max(0, excess)]:
        # By its name first: half removed, it would be taken for a damaged one.
        os.rename(checkpoint, directory / STAGING / f"old-{checkpoint.name}")


def sweep(directory: Path) -> None:
    """Clear away what a save that was killed has left, and put back a checkpoint that it was about to replace."""
    restore(directory / STAGING, directory)
    shutil.rmtree(directory / STAGING, ignore_errors=True)


@contextmanager
def full_disk_explained(directory: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turn the errors of a full disk, of which every library has its own, into one line with what is needed and free.

    directory: that of the checkpoints. needed: bytes of what is written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        written = _bytes(directory / STAGING)  # cleared away by now or soon, so free again
        free = shutil.disk_usage(directory if directory.exists() else directory.parent).free + written
        enough = max(needed(), written)
        if not _is_full_disk(error, free < enough):
            raise
        last = next((path.name for path in reversed(checkpoints(directory)) if fault(path) is None), None)
        raise InstructLiteError(
            f"{directory}: the disk is full: about {enough:,} bytes are needed and {free:,} are free; "
            f"{f'{last} is whole' if last else 'nothing was saved before'}. Make room, then go on with --resume (resume=True)"
        ) from error


def _is_full_disk(error: Exception, short: bool) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors gives the system's words; torch's own writer only notices that its file is not as long as it should be.
    return "No space left" in str(error) or "os error 122" in str(error) or ("inline_container" in str(error) and short)


def bytes_of_a_checkpoint(directory: Path, otherwise: int) -> int:
    """As many as the largest one there has; `otherwise`, where there is none."""
    return max(map(_bytes, checkpoints(directory)), default=otherwise)


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# --- the trainer ----------------------------------------------------------------------------------------------------------


class Checkpointing:
    """Mixin before a `transformers.Trainer`: its checkpoints are published whole, and resuming is exact in the log too.

    Relies on transformers 5.23: `_save_checkpoint` asks `_get_output_dir` where to write and does so on every process;
    `_maybe_log_save_evaluate` runs after every step and epoch; `_run_epoch` makes the iterator over the data and is called
    with keywords; `_inner_training_loop` resets the running loss before `on_train_begin`.
    """

    interruption: Interruption | None = None
    """Looked at after each step; once it has received a signal, the step is saved and Interrupted raised."""
    saving_share: float | None = None
    """Due saves are left out while saving takes more than this share of the time. None: all are made."""
    _metrics: dict[str, Any] = {}  # noqa: RUF012  (TRL's trainers and PPOTrainer have their own: values since the last log)
    _total_train_tokens: float = 0
    _staging: Path | None = None
    _resumed: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_RestoreAtBegin(self))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; True resumes from the newest checkpoint that verifies. A damaged one that is named is refused."""
        directory = Path(self.args.output_dir)
        if self.is_world_process_zero():
            sweep(directory)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_verified(directory, logger.warning)
            if resume_from_checkpoint is None:
                raise InstructLiteError(f"{directory}: no whole checkpoint to go on from")
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed is not None:
            self._check(self._resumed)
        with self.interruption.finishing_steps() if self.interruption else nullcontext():
            return super().train(str(self._resumed) if self._resumed else None, *args, **kwargs)

    def _check(self, checkpoint: Path) -> None:
        if why := fault(checkpoint):
            raise InstructLiteError(f"{checkpoint}: {why}; go on from another one")
        if not (checkpoint / self._running_name).is_file():
            raise InstructLiteError(
                f"{checkpoint}: {self._running_name} is missing: it was saved by fewer processes, or with save_only_model, "
                "so training cannot go on from it"
            )

    # --- saving ---

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        start = time.perf_counter()
        directory = Path(self.args.output_dir)
        self._staging = directory / STAGING
        try:
            with full_disk_explained(directory, self._needed):
                super()._save_checkpoint(model, trial)
                self._publish(directory)
        finally:
            self._staging = None
            if self.is_world_process_zero():
                sweep(directory)
        self.accelerator.wait_for_everyone()  # the next one is staged at the same place
        self._last_saving = time.perf_counter() - start
        self._saving += self._last_saving

    def _publish(self, directory: Path) -> None:
        name = f"checkpoint-{self.state.global_step}"
        staged, best = directory / STAGING / name, self.state.best_model_checkpoint
        if best is not None and Path(best).parent == directory / STAGING:
            self.state.best_model_checkpoint = best = str(directory / Path(best).name)
        self.accelerator.wait_for_everyone()  # all have written what is theirs
        if self.is_world_process_zero():
            self.state.save_to_json(str(staged / "trainer_state.json"))
            (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, with the Hub token if there is one
            seal(staged, self.state.global_step)
            publish(staged, directory / name)
            rotate(directory, self.args.save_total_limit, {directory / name, *([Path(best)] if best else [])})

    def _needed(self) -> int:
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return bytes_of_a_checkpoint(Path(self.args.output_dir), otherwise=3 * trained)  # weights and Adam's two moments

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        stopping = self.interruption is not None and self._on_any(self.interruption.received is not None)
        if stopping:
            self.control.should_save = True
        elif self.control.should_save and self.saving_share is not None and self._on_any(self._saving_is_dear()):
            self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stopping:
            raise Interrupted(self.interruption.received or signal.SIGTERM, self.state.global_step)  # or: another process got it

    def _saving_is_dear(self) -> bool:
        return self._saving + self._last_saving > self.saving_share * (time.perf_counter() - self._begun)

    def _on_any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum").item() > 0

    # --- what is exact beyond Trainer's own ---

    @property
    def _running_name(self) -> str:
        return f"running_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        running = {
            "loss_since_log": self._tr_loss.item(),
            "loss_before": self._total_loss_scalar,
            "last_log": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": self._metrics,
            "seconds": self._seconds_before + time.perf_counter() - self._begun,
            "epoch_rng": self._epoch_rng.numpy().tobytes().hex(),
        }
        write_text(Path(output_dir) / self._running_name, json.dumps(running, default=float) + "\n")

    def begin(self) -> None:
        """Called when Trainer has reset its running sums: put those of the checkpoint in their place."""
        self._begun, self._seconds_before, self._saving, self._last_saving = time.perf_counter(), 0.0, 0.0, SAVING_SECONDS
        if self._resumed is None:
            return
        running = json.loads((self._resumed / self._running_name).read_text(encoding="utf-8"))
        self._tr_loss = torch.tensor(running["loss_since_log"], device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = running["loss_before"], running["last_log"]
        self._initial_global_step = 0  # train_loss is the mean over all steps, not over those since the resume
        self._total_train_tokens, self._seconds_before = running["tokens"], running["seconds"]
        _fill(self._metrics, running["metrics"])
        if self.state.best_global_step:  # by its step: the directory may have been moved since
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if why := fault(best):
                raise InstructLiteError(f"{best}: the best checkpoint so far: {why}; start over, without --resume (resume=False)")
            self.state.best_model_checkpoint = str(best)

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Trainer looks at max_steps only after a step; resumed from its last checkpoint, it would do one too many.
            self.control.should_training_stop = True
            return
        if self._resumed is not None and arguments["epoch"] == arguments["epochs_trained"]:
            # Samplers such as LengthGroupedSampler draw an epoch's order from torch's generator: it must stand where it did.
            if arguments["steps_trained_in_current_epoch"] > 0:
                running = json.loads((self._resumed / self._running_name).read_text(encoding="utf-8"))
                torch.set_rng_state(torch.frombuffer(bytearray.fromhex(running["epoch_rng"]), dtype=torch.uint8))
            else:
                self._load_rng_state(str(self._resumed))
        self._epoch_rng = torch.get_rng_state()
        super()._run_epoch(**arguments)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


SAVING_SECONDS = 0.05  # what the first save is taken to cost: in the first seconds there is too little to lose


def _fill(metrics: dict[str, Any], stored: dict[str, Any]) -> None:
    for name, value in stored.items():
        if isinstance(value, dict):
            _fill(metrics[name], value)
        else:
            metrics[name] = value


class _RestoreAtBegin(TrainerCallback):
    def __init__(self, trainer: Checkpointing):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()
