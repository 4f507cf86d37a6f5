"""Recipe: what the training stages share: seed, staging, run.json, progress, and the stop before a poisoned update.

A run is written beside its output directory and renamed into place when it is complete, so what stands under the name is
always a whole adapter: the old one or the new one. Nothing of the Trainer's own (optimizer, training_args.bin, which
would carry a Hub token) gets into it. Not here: resuming an interrupted run.
"""

import difflib
import importlib.metadata
import json
import math
import platform
import secrets
import shutil
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from .. import __version__
from ..config import Lora
from ..data.records import data_hash, read_records
from ..errors import InstructLiteError
from ..models.base import Base
from ..models.manifest import NAME as MANIFEST
from ..models.manifest import Adapter, is_adapter, write_manifest

Advance = Callable[..., None]

REFUSED = {
    "output_dir": "give the directory to run()",
    "hub_token": "set the environment variable HF_TOKEN instead (TrainingArguments would be written to disk with the token)",
    "push_to_hub": "push the finished directory instead",
}


@dataclass
class Run:
    """A run in progress. `Recipe.train` writes the adapter into `directory` and what run.json shall say into `metrics`."""

    recipe: str
    directory: Path
    """Becomes the output directory."""
    scratch: Path
    """For the Trainer's own files; gone after the run."""
    config: dict[str, Any]
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def records(self, name: str, source: Any, kind: str | None = None) -> list[dict]:
        """Read records and note their number and hash in run.json under `name`."""
        rows = read_records(source, kind)
        self.data[name] = {"rows": len(rows), "sha256": data_hash(rows)}
        return rows

    def note(self, text: str) -> None:
        """A line for the user that stops nothing."""
        _console().print(f"{self.recipe}: {text}")

    def watch(self, trainer: Trainer) -> None:
        """Report progress, write metrics.jsonl, stop on non-finite gradients."""
        trainer.remove_callback(PrinterCallback)  # what Trainer puts in place of its progress bar
        trainer.add_callback(Watch(self))


class Recipe(ABC):
    """One training stage. A subclass is also one of the option dataclasses of `config`, and these are its arguments."""

    name: ClassVar[str]
    config_class: ClassVar[type[TrainingArguments]]
    """What stands under `training` goes to it."""

    @abstractmethod
    def train(self, run: Run) -> None:
        """Train and write adapter, tokenizer and manifest into `run.directory`."""

    def run(self, output_dir: str | Path) -> Adapter:
        """Train, and return the adapter that then stands in `output_dir`.

        An adapter that is there already is replaced once the new one is complete. Raises InstructLiteError for bad data
        or options, and if the loss or a gradient is not finite; the directory is then as it was.
        """
        target = Path(output_dir).absolute()
        check_target(target)
        started, clock = _now(), time.perf_counter()
        scratch = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        directory = scratch / target.name
        directory.mkdir(parents=True)
        run = Run(self.name, directory, scratch, self.resolved())
        set_seed(self.seed)
        try:
            with _without_trl_deprecations():
                self.train(run)
            if (scratch / "metrics.jsonl").exists():
                (scratch / "metrics.jsonl").rename(directory / "metrics.jsonl")
            summary = {
                "recipe": self.name, "config": run.config, "versions": versions(), "data": run.data, "metrics": run.metrics,
                "started": started, "finished": _now(), "seconds": round(time.perf_counter() - clock, 1), **peak_memory(),
            }  # fmt: skip
            (directory / "run.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            publish(directory, target, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return Adapter.load(output_dir)

    def resolved(self) -> dict[str, Any]:
        """The options as JSON: paths for adapters and files, a count for rows given in memory."""
        return {option.name: _plain(getattr(self, option.name)) for option in fields(self)}

    @classmethod
    def check_training(cls, training: dict[str, Any]) -> None:
        """Raise InstructLiteError if `training` has an option or a value that the stage's config class does not take."""
        trainer_config(cls.config_class, training, output_dir="unused", use_cpu=True, bf16=False)

    def trainer_config(self, run: Run, base: Base, **defaults: Any) -> TrainingArguments:
        """The stage's config: our defaults, over them the recipe's own (`defaults`), over them the user's `training`."""
        cuda = base.device.type == "cuda"
        ours = {
            "output_dir": str(run.scratch / "trainer"),
            "seed": self.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            # True (Trainer's default) logs a NaN loss as the mean of the losses before it.
            "logging_nan_inf_filter": False,
            # Batches of similar length: on short texts a third to a half of a random batch is padding.
            "train_sampling_strategy": "group_by_length",
            "use_cpu": not cuda,
            # On a CPU autocast was measured as no faster, and without it the numbers are those of plain PEFT.
            "bf16": cuda and base.dtype == "bfloat16" and not self.training.get("fp16"),
        }
        config = trainer_config(self.config_class, self.training, **(ours | defaults))
        run.config["training"] = {key: _plain(value) for key, value in (ours | defaults | self.training).items() if key != "output_dir"}
        return config


def trainer_config(config_class: type[TrainingArguments], training: dict[str, Any], **defaults: Any) -> TrainingArguments:
    """`config_class` from our defaults and the user's options over them; what it does not take is refused in one line."""
    for option, remedy in REFUSED.items():
        if option in training:
            raise InstructLiteError(f"training.{option}: {remedy}")
    known = {option.name for option in fields(config_class) if option.init}
    for option in training:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InstructLiteError(f"training.{option}: {config_class.__name__} has no such option{hint}")
    try:
        with _without_trl_deprecations():
            return config_class(**(defaults | training))
    except (TypeError, ValueError, ImportError) as error:
        raise InstructLiteError(f"training: {config_class.__name__} refuses it: {' '.join(str(error).split())}") from error


class Watch(TrainerCallback):
    """Progress and time left, a line of metrics.jsonl for each log, and no update with a gradient that is not finite."""

    def __init__(self, run: Run):
        self.run = run
        self.shown = ExitStack()
        self.advance: Advance = lambda count=1, note="": None
        self.loss: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance = self.shown.enter_context(progress(f"{self.run.recipe}: training", state.max_steps))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(note="" if self.loss is None else f"loss {self.loss:.3f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown.close()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in logs.items()}
        with (self.run.scratch / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | finite) + "\n")
        if "loss" in logs and finite["loss"] is None:
            self._stop(f"step {state.global_step}: the loss is {logs['loss']}", logs.get("learning_rate"))
        self.loss = logs.get("loss", self.loss)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            return  # its gradient scaler meets infinities as a matter of course, and skips those steps itself
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            rate = kwargs["optimizer"].param_groups[0]["lr"]
            self._stop(f"step {state.global_step + 1}: the gradient is not finite", rate)

    def _stop(self, what: str, learning_rate: float | None) -> None:
        self.shown.close()
        rate = "" if learning_rate is None else f"learning rate {learning_rate:.3g}, "
        last = "none" if self.loss is None else f"{self.loss:.4g}"
        raise InstructLiteError(
            f"{self.run.recipe}, {what} ({rate}last logged loss {last}): stopped before the update, nothing was written; "
            "lower training.learning_rate, set dtype to float32, or look for extreme rows in the data"
        )


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Show on stderr how far a long step is and how long it will take: a bar on a terminal, else a line every 10 % or so.

    Yields advance(count=1, note="").
    """
    console = _console()
    if console.is_terminal:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn(), TextColumn("{task.fields[note]}")]  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, note="")
            yield lambda count=1, note="": bar.update(task, advance=count, note=note)
        return
    start = shown_at = time.perf_counter()
    done = shown = 0

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, shown, shown_at
        done, now = done + count, time.perf_counter()
        if done < total and (10 * done // total <= shown or now - shown_at < 1):
            return
        shown, shown_at, seconds = 10 * done // total, now, now - start
        left = f"took {_clock(seconds)}" if done >= total else f"{_clock(seconds / done * (total - done))} left"
        console.print(", ".join(filter(None, [f"{label} {done}/{total}", note, left])))

    yield advance


def save_adapter(
    model: PeftModel, base: Base, directory: Path, *, role: str, score_bias: float | None = None, parents: dict[str, str] | None = None
) -> None:
    """Write a trained PeftModel as PEFT does, with the tokenizer and the manifest."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = str(base.path), base.revision
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()  # PEFT's empty card; it would name a path of this machine
    base.tokenizer.save_pretrained(directory)
    write_manifest(directory, role=role, base=base, score_bias=score_bias, parents=parents)


@contextmanager
def full_precision(model: PeftModel) -> Iterator[None]:
    """Keep the adapter in fp32 while a TRL trainer is built around a quantized base.

    TRL casts it to bfloat16 (sft_trainer.py and reward_trainer.py, `if _is_quantized_model`), whose 8 bits swallow most
    of Adam's small steps.
    """
    kept = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def quiet_libraries() -> None:
    """One voice on the terminal: ours. The libraries' progress bars and advice would stand between our lines."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\b")  # from one library to another


@contextmanager
def without_dataset_bars() -> Iterator[None]:
    """TRL maps each data set several times, with a progress bar each."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _without_trl_deprecations() -> Iterator[None]:
    """TRL 1.16 uses an option under the name that transformers 5.23 has deprecated; the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def training_metrics(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Steps, mean loss, seconds and tokens per second of a finished TRL training."""
    logs = trainer.state.log_history
    tokens = next((log["num_tokens"] for log in reversed(logs) if "num_tokens" in log), 0)
    loss = next(log["train_loss"] for log in reversed(logs) if "train_loss" in log)
    return {
        "steps": trainer.state.global_step,
        "train_loss": loss,
        "train_seconds": round(seconds, 1),
        "train_tokens_per_second": round(tokens / seconds, 1),
    }


def parent_of(model: Any, role: str = "policy") -> Adapter | None:
    """The adapter that `model` is, or None for a base; refuses one of another role."""
    if not is_adapter(model):
        return None
    adapter = Adapter.load(model)
    if adapter.role != role:
        raise InstructLiteError(f"model={adapter}: a {adapter.role} adapter; this stage starts from a {role} adapter or a base model")
    return adapter


def versions() -> dict[str, str]:
    found = {"instructlite": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> dict[str, float]:
    """Most memory that this process has held so far, and on a GPU the most that torch has; in MB."""
    peak = {}
    if sys.platform != "win32":
        import resource  # not on Windows

        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if torch.cuda.is_available():
        peak["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def check_target(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise InstructLiteError(f"{target}: exists and is no adapter that InstructLite wrote; choose another directory")


def publish(directory: Path, target: Path, scratch: Path) -> None:
    replaced = scratch / "replaced"
    if target.exists():
        target.rename(replaced)
    try:
        directory.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, Lora):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        rows = sum(isinstance(item, dict) for item in value)
        return f"{rows} rows" if rows else [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _console() -> Console:
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
