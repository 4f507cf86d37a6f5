"""What a run keeps on disk while it is under way, so that kill -9, a power cut or a full disk never leave half of anything.

`<directory>.partial` is where a run lives until its adapter is whole, and from where an interrupted one goes on: the checkpoints
(`trainer/`) or the members of an ensemble, metrics.jsonl, the adapter in the making, and run.json with what the run is made
from and has measured so far. One process at a time. Every file and directory is written beside, synced and renamed; nothing
good is removed before what replaces it has its name. No torch here: `pipeline` writes its own files in the same way.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import InstructLiteError

RECORD = "run.json"
LOG = "metrics.jsonl"
CHECKPOINTS = "trainer"
MEMBERS = "members"
"""The finished members of an ensemble, each as it will stand in the whole."""
TRACKED = "tensorboard"
"""Event files of TensorBoard, which stand beside metrics.jsonl in the end."""
REPLACED = "replaced"
LOCK, OWNER = "lock", "owner.json"

# --- whole or not there at all ---------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Have the system write a file, or the entries of a directory, to the disk."""
    if os.name == "nt":
        return  # it opens no directory, and no file that is not to be written
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: a reader, or the next start, sees the old text or the new."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    os.replace(draft, path)


def publish(staged: Path, target: Path) -> None:
    """Give the finished directory `staged` its name. What bore it goes into `replaced` beside `staged`, to be cleared away."""
    for path in [*staged.rglob("*"), staged]:
        sync(path)
    replaced = staged.parent / REPLACED / target.name
    if target.exists():
        replaced.parent.mkdir(exist_ok=True)
        os.rename(target, replaced)
    try:
        os.rename(staged, target)
    except OSError:
        if replaced.exists():
            os.rename(replaced, target)
        raise
    sync(target.parent)


def restore(staging: Path, parent: Path) -> None:
    """Put back what a `publish` that was killed between its two renames had moved away; clear away the rest of that."""
    for replaced in (staging / REPLACED).glob("*"):
        if not (parent / replaced.name).exists():
            os.rename(replaced, parent / replaced.name)
    shutil.rmtree(staging / REPLACED, ignore_errors=True)


# --- the work directory -----------------------------------------------------------------------------------------------------


def is_main_process() -> bool:
    """By what accelerate and torchrun set: it is asked before any process group is there."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun) has started several of these processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def work_directory(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


@contextmanager
def working(target: Path) -> Iterator[Path]:
    """The work directory of `target`, locked. Afterwards it is gone, unless there is something in it to go on from."""
    work = work_directory(target)
    ours = {LOCK, OWNER, RECORD, LOG, CHECKPOINTS, MEMBERS, TRACKED, REPLACED, target.name}
    if work.exists() and any(path.name.removesuffix(".tmp") not in ours for path in work.iterdir()):
        raise InstructLiteError(f"{work}: exists and is no work directory of InstructLite; move it away or choose another directory")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with locked(work):
            restore(work, target.parent)
            shutil.rmtree(work / target.name, ignore_errors=True)  # of a run that was killed before it could do so itself
            try:
                yield work
            finally:
                if not has_saved(work):
                    forget(work)
                shutil.rmtree(work / target.name, ignore_errors=True)
                restore(work, target.parent)
    finally:
        with suppress(OSError):
            work.rmdir()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes out, by the system's own lock: that of a dead process is none. `owner.json` says who holds it."""
    lock, owner = FileLock(directory / LOCK), directory / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = read_json(owner)
        process = f"process {who.get('pid', '?')} on {who.get('host', '?')} (since {who.get('since', '?')})"
        raise InstructLiteError(f"{directory}: {process} is at work there; wait for it, stop it, or choose another directory") from None
    try:
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        owner.write_text(json.dumps(who) + "\n", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        (directory / LOCK).unlink(missing_ok=True)
        lock.release()


def has_saved(work: Path) -> bool:
    """Whether an interrupted run has left something to go on from, checkpoints or members of an ensemble."""
    return any((work / CHECKPOINTS).glob("checkpoint-*")) or any((work / MEMBERS).glob("*"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_record(work: Path, **content: Any) -> None:
    write_text(work / RECORD, json.dumps(content, indent=2) + "\n")


def forget(work: Path) -> None:
    """Remove what a run had come to."""
    for name in (CHECKPOINTS, MEMBERS, TRACKED):
        shutil.rmtree(work / name, ignore_errors=True)
    for name in (LOG, RECORD):
        (work / name).unlink(missing_ok=True)


def cut_log(log: Path, step: int) -> None:
    """Take the lines of later steps out of metrics.jsonl: they will be written again."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    write_text(log, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the process was killed while it wrote the line
        return float("inf")


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested options by dotted names, as JSON would give them back."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: json.loads(json.dumps(value))}
    return found


def refuse_differences(work: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InstructLiteError with a table of what is not as it was when the run was started."""
    absent = "-"
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name, absent) != now.get(name, absent)]
    if not names:
        return
    rows = [("option", "then", "now"), *((name, _short(then.get(name, absent)), _short(now.get(name, absent))) for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = "\n".join(f"  {name:{widths[0]}}  {before:{widths[1]}}  {after}" for name, before, after in rows)
    raise InstructLiteError(
        f"{work}: cannot be resumed, because it was started with other data or options:\n{table}\n"
        "Put them back, or start over without --resume (resume=False)"
    )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text  # a hash
