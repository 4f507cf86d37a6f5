"""Recipe: what the training stages share: seed, staging, run.json, progress, and the stop before a poisoned update.

A run is written beside its output directory, in `<directory>.partial`, and renamed into place when it is complete, so what
stands under the name is always a whole adapter: the old one or the new one. Nothing of the Trainer's own (optimizer,
training_args.bin, which would carry a Hub token) gets into it. An interrupted run leaves its checkpoints in the work directory.
"""

import difflib
import importlib.metadata
import json
import math
import platform
import shutil
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from .. import __version__
from ..config import Lora
from ..data.records import data_hash, read_records
from ..errors import InstructLiteError
from ..models.base import Base
from ..models.manifest import NAME as MANIFEST
from ..models.manifest import Adapter, is_adapter, write_manifest
from ..progress import Advance, console, progress
from .checkpoints import Checkpointing, bytes_of_a_checkpoint, full_disk_explained, newest_verified, step_of, sweep
from .interrupt import Interrupted, Interruption
from .peers import Peers
from .work import (
    CHECKPOINTS,
    LOG,
    MEMBERS,
    RECORD,
    TRACKED,
    cut_log,
    flat,
    forget,
    is_main_process,
    launched,
    publish,
    read_json,
    refuse_differences,
    work_directory,
    working,
    write_record,
    write_text,
)

REFUSED = {
    "output_dir": "give the directory to run()",
    "hub_token": "set the environment variable HF_TOKEN instead (TrainingArguments would be written to disk with the token)",
    "push_to_hub": "push the finished directory instead",
}
# A resumed run may differ in these: they decide what is shown and stored, not what is learnt.
HARMLESS = {
    "disable_tqdm", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "project", "report_to",
    "run_name", "save_steps", "save_strategy", "save_total_limit",
}  # fmt: skip
# Compared by what they hold, not by where that is.
SOURCES = {"model", "reference", "reward", "data", "eval_data", "demonstrations", "ptx_data"}
TRACKERS = {"trackio": "'instructlite[track]'", "tensorboard": "'instructlite[track]'", "wandb": "wandb"}
SAVING_SHARE = 0.01  # where the user has not said when to save: a kill costs about a hundred times what a save takes


@dataclass
class Run:
    """A run in progress. `Recipe.train` writes the adapter into `directory` and what run.json shall say into `metrics`."""

    recipe: str
    directory: Path
    """Becomes the output directory."""
    scratch: Path
    """The work directory, gone after the run: for the Trainer's own files, and what an interrupted run is resumed from."""
    config: dict[str, Any]
    target: Path = Path()
    """The output directory."""
    resume: bool = False
    interruption: Interruption | None = None
    peers: Peers = field(default_factory=Peers)
    shown: ExitStack = field(default_factory=ExitStack)
    """Closed at the end of the run, whatever that is."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)
    """All that decides what the adapter becomes: hashes of data, base and parents, options."""
    resumed_after_step: int | None = None
    saving_share: float | None = None

    def records(self, name: str, source: Any, kind: str | None = None) -> list[dict]:
        """Read records and note their number and hash in run.json under `name`."""
        rows = read_records(source, kind)
        self.data[name] = {"rows": len(rows), "sha256": data_hash(rows)}
        return rows

    def note(self, text: str) -> None:
        """A line for the user that stops nothing."""
        if is_main_process():
            console().print(f"{self.recipe}: {text}")

    def watch(self, trainer: Checkpointing) -> None:
        """Report progress, write metrics.jsonl, stop on non-finite gradients and after signals."""
        trainer.remove_callback(PrinterCallback)  # what Trainer puts in place of its progress bar
        trainer.add_callback(Watch(self))
        for tracker in trainer.callback_handler.callbacks:
            if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
                tracker.logging_dir = str(self.scratch / TRACKED)  # not among the checkpoints, which go
        trainer.interruption, trainer.saving_share = self.interruption, self.saving_share

    def begin(self, base: Base, args: TrainingArguments, parents: dict[str, str]) -> Path | None:
        """Settle what the adapter is made from, once that is known; gives the checkpoint to go on from, or None.

        parents: sha256 of adapters by role. Raises AlreadyMade if the output directory holds just this, and
        InstructLiteError with a table if an interrupted run was made from something else.
        """
        self.made_from = flat({
            "recipe": self.recipe,
            "base": {"weights": base.fingerprint, "tokenizer": base.tokenizer_sha256, "template": base.template_sha256,
                     "quantization": base.quantization, "dtype": base.dtype},
            "parents": parents,
            "data": {name: source["sha256"] for name, source in self.data.items()},
            **{name: value for name, value in self.config.items() if name not in {*SOURCES, "training"}},
            "training": {name: value for name, value in self.config["training"].items() if name not in HARMLESS},
            "processes": args.world_size,
        })  # fmt: skip
        self.peers.meet()
        # The main process looks, all others do as it says.
        answer = [self._settle(Path(args.output_dir)) if is_main_process() else None]
        if args.world_size > 1:
            broadcast_object_list(answer)
        finished, checkpoint, self.metrics = answer[0]
        if finished:
            raise AlreadyMade
        self.resumed_after_step = step_of(checkpoint) if checkpoint else None
        return checkpoint

    def _settle(self, trainer: Path) -> tuple[bool, Path | None, dict[str, Any]]:
        before = read_json(self.scratch / RECORD)
        if self.resume and read_json(self.target / RECORD).get("made_from") == self.made_from:
            return True, None, {}
        sweep(trainer)
        checkpoint = newest_verified(trainer, self.note if self.resume else lambda line: None)
        if self.resume and (checkpoint or (self.scratch / MEMBERS).exists()):  # an ensemble was begun there
            refuse_differences(self.scratch, before.get("made_from", {}), self.made_from)
        if self.resume and checkpoint:
            self.note(f"going on after step {step_of(checkpoint)}")
            if changed := [name for name, version in versions().items() if before["versions"].get(name) != version]:
                self.note(f"other versions of {', '.join(changed)} than when it was started: the result may differ in the last digits")
            cut_log(self.scratch / LOG, step_of(checkpoint))
            return False, checkpoint, self.metrics | before["metrics"]
        if checkpoint:
            self.note(f"starting over; --resume (resume=True) would have gone on after step {step_of(checkpoint)}")
        elif self.resume:
            self.note("no checkpoint to go on from: starting from the beginning")
        forget(self.scratch)
        self.keep_metrics()
        return False, None, self.metrics

    def keep_metrics(self) -> None:
        """What has been measured so far is not measured again after a resume."""
        if is_main_process():
            write_record(self.scratch, made_from=self.made_from, metrics=self.metrics, versions=versions())


def wait_for_all_processes() -> None:
    if launched():
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


class AlreadyMade(Exception):
    """A resumed run finds that its output directory is finished, and made from the same."""


class Recipe(ABC):
    """One training stage. A subclass is also one of the option dataclasses of `config`, and these are its arguments."""

    name: ClassVar[str]
    config_class: ClassVar[type[TrainingArguments]]
    """What stands under `training` goes to it."""

    @abstractmethod
    def train(self, run: Run) -> None:
        """Train and write adapter, tokenizer and manifest into `run.directory`."""

    def run(self, output_dir: str | Path, resume: bool = False) -> Adapter:
        """Train, and return the adapter that then stands in `output_dir`.

        resume: go on from the newest whole checkpoint of a run that was interrupted; where there is none, start from the
        beginning; where `output_dir` is finished and made from the same, return that. A resumed run gives what the
        uninterrupted one would have given, bit for bit on one device, and is refused if its data, base, parents, seed or
        options are not those it was started with.

        An adapter that is there already is replaced once the new one is complete. Raises InstructLiteError for bad data
        or options, and if the loss or a gradient is not finite; the directory is then as it was. SIGTERM and Ctrl-C let a
        training step finish, save, and raise Interrupted, a SystemExit.
        """
        target = Path(output_dir).absolute()
        check_target(target)
        with (
            Interruption(f"{type(self).__name__}(...).run({str(output_dir)!r}, resume=True)") as interruption,
            ExitStack() as shown,
            Peers() as peers,
        ):
            if is_main_process():
                scratch = shown.enter_context(working(target))
                directory = scratch / target.name
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
            else:  # the main process alone writes what is kept
                scratch = work_directory(target)
                directory = Path(shown.enter_context(tempfile.TemporaryDirectory()))
            shows = shown.enter_context(ExitStack())
            run = Run(self.name, directory, scratch, self.resolved(), target, resume, interruption, peers, shows)
            try:
                self._run(run)
            except AlreadyMade:
                run.note(f"kept {output_dir}: it is finished, and made from the same")
            except Interrupted as stop:
                saved = "" if stop.step is None else f" after step {stop.step}, which is saved in {scratch}"
                run.note(f"stopped by {stop.signal}{saved}")
                raise
            if is_main_process():
                forget(scratch)
        wait_for_all_processes()
        return Adapter.load(output_dir)

    def _run(self, run: Run) -> None:
        started, clock = _now(), time.perf_counter()
        set_seed(self.seed)
        trainer = run.scratch / CHECKPOINTS
        with _without_trl_deprecations(), full_disk_explained(trainer, lambda: bytes_of_a_checkpoint(trainer, otherwise=0)):
            self.train(run)
            if not is_main_process():
                return
            if (run.scratch / LOG).exists():
                shutil.copyfile(run.scratch / LOG, run.directory / LOG)
            if (run.scratch / TRACKED).exists():
                shutil.copytree(run.scratch / TRACKED, run.directory / TRACKED)
            summary = {
                "recipe": self.name, "config": run.config, "versions": versions(), "data": run.data, "metrics": run.metrics,
                "started": started, "finished": _now(), "seconds": round(time.perf_counter() - clock, 1), **peak_memory(),
                "resumed_after_step": run.resumed_after_step, "made_from": run.made_from,
            }  # fmt: skip
            write_text(run.directory / RECORD, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            publish(run.directory, run.target)

    def resolved(self) -> dict[str, Any]:
        """The options as JSON: paths for adapters and files, a count for rows given in memory."""
        return {option.name: _plain(getattr(self, option.name)) for option in fields(self)}

    @classmethod
    def check_training(cls, training: dict[str, Any]) -> None:
        """Raise InstructLiteError if `training` has an option or a value that the stage's config class does not take."""
        # On the device of the training: the first config that is made decides how several processes will talk to each other.
        trainer_config(cls.config_class, training, output_dir="unused", use_cpu=not torch.cuda.is_available(), bf16=False)

    def trainer_config(self, run: Run, base: Base, **defaults: Any) -> TrainingArguments:
        """The stage's config: our defaults, over them the recipe's own (`defaults`), over them the user's `training`."""
        cuda = base.device.type == "cuda"
        ours = {
            "output_dir": str(run.scratch / CHECKPOINTS),
            "seed": self.seed,
            # Due after every step, but left out while saving takes more than SAVING_SHARE of the time.
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "report_to": "none",
            "disable_tqdm": True,
            # True (Trainer's default) logs a NaN loss as the mean of the losses before it.
            "logging_nan_inf_filter": False,
            # Batches of similar length: on short texts a third to a half of a random batch is padding.
            "train_sampling_strategy": "group_by_length",
            "use_cpu": not cuda,
            # Every trained tensor is in every forward pass; to look for others costs time.
            "ddp_find_unused_parameters": False,
            # On a CPU autocast was measured as no faster, and without it the numbers are those of plain PEFT.
            "bf16": cuda and base.dtype == "bfloat16" and not self.training.get("fp16"),
        }
        if self.training.get("report_to") not in (None, "none", []):  # a run that is resumed goes on under its name
            ours |= {"project": "instructlite", "run_name": f"{run.target.parent.name}/{run.target.name}"}
        theirs = any(option.startswith("save_") for option in self.training) or self.training.get("load_best_model_at_end")
        run.saving_share = None if theirs else SAVING_SHARE
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
    reported = training.get("report_to") or []
    for tracker in [reported] if isinstance(reported, str) else reported:
        if tracker in TRACKERS and find_spec(tracker) is None:
            raise InstructLiteError(f"training.report_to={tracker}: it is not installed: pip install {TRACKERS[tracker]}")
    try:
        with _without_trl_deprecations():
            return config_class(**(defaults | training))
    except (TypeError, ValueError, ImportError) as error:
        raise InstructLiteError(f"training: {config_class.__name__} refuses it: {' '.join(str(error).split())}") from error


class Watch(TrainerCallback):
    """Progress and time left, a line of metrics.jsonl for each log, and no update with a gradient that is not finite."""

    def __init__(self, run: Run):
        self.run = run
        self.shown = run.shown
        self.advance: Advance = lambda count=1, note="": None
        self.loss: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        label = f"{self.run.recipe}: training"
        self.advance = self.shown.enter_context(progress(label, state.max_steps, done=state.global_step))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(note="" if self.loss is None else f"loss {self.loss:.3f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown.close()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in logs.items()}
        if state.is_world_process_zero:
            with (self.run.scratch / LOG).open("a", encoding="utf-8") as file:
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
            f"{self.run.recipe}, {what} ({rate}last logged loss {last}): stopped before the update, no adapter was written; "
            "lower training.learning_rate, set dtype to float32, or look for extreme rows in the data"
        )


def save_adapter(
    model: PeftModel, base: Base, directory: Path, *, role: str, score_bias: float | None = None, parents: dict[str, str] | None = None
) -> None:
    """Write a trained PeftModel as PEFT does, with the tokenizer and the manifest; of a sharded one on all processes."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = str(base.path), base.revision
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {name: parameter.full_tensor() for name, parameter in trained.items() if isinstance(parameter, DTensor)}  # FSDP's
    # DPO's has its reference, too.
    model.save_pretrained(directory, selected_adapters=["default"], save_embedding_layers=False, state_dict=whole or None)
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


def training_metrics(trainer: Trainer) -> dict[str, float]:
    """Steps, mean loss, seconds and tokens per second of a finished TRL training; of all of it, if it was resumed."""
    logs = trainer.state.log_history
    tokens = next((log["num_tokens"] for log in reversed(logs) if "num_tokens" in log), 0)
    total = logs[-1]
    seconds = total["train_runtime"]
    return {
        "steps": trainer.state.global_step,
        "train_loss": total["train_loss"],
        "train_seconds": round(seconds, 1),
        "train_tokens_per_second": round(tokens / seconds, 1),
    }


def parent_of(model: Any, *, roles: tuple[str, ...] = ("policy",)) -> Adapter | None:
    """The adapter that `model` is, or None for a base; refuses one of another role."""
    if not is_adapter(model):
        return None
    adapter = Adapter.load(model)
    if adapter.role not in roles:
        wanted = " or ".join(roles)
        raise InstructLiteError(f"model={adapter}: a {adapter.role} adapter; this stage starts from a {wanted} adapter or a base model")
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


def _plain(value: Any) -> Any:
    if isinstance(value, Lora):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        rows = sum(isinstance(item, dict) for item in value)
        return f"{rows} rows" if rows else [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
