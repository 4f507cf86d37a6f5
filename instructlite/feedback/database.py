"""The votes file as SQLite: opened so that several processes can write it, and that what is committed is on the disk.

WAL with synchronous=FULL: a commit has reached the disk when it returns, also through a power cut. WAL needs memory that the
processes share, so a network file system is refused.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ..errors import InstructLiteError
from .migrations import migrate

NAME = "votes.sqlite"
BUSY_SECONDS = 5.0
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs"}
_REMEDIES = {
    "locked": "another process holds it; try again in a moment",
    "readonly": "make the file and its directory writable",
    "unable to open": "make the file and its directory writable",
    "full": "free some space on that disk, then try again",
    "malformed": "stop what uses it and restore it from a copy",
    "not a database": "name the file that the votes are in",
    "FOREIGN KEY": "it names something that is not in the file",
    "disk I/O": "see whether the disk is full or failing, then try again",
}


def votes_file(run_or_file: str | Path) -> Path:
    """The votes of a run directory, or the file itself."""
    path = Path(run_or_file)
    return path / NAME if path.is_dir() else path


class Database:
    """One connection, for all threads of one process; each process opens its own. Not to be carried through a fork.

    create: make the file where there is none, and where it is damaged move it aside and begin anew (`moved_aside` is then where
    it went). Otherwise both raise InstructLiteError.
    """

    def __init__(self, path: str | Path, *, create: bool = True):
        self.path = votes_file(path)
        self.moved_aside: Path | None = None
        self._lock = threading.RLock()
        if not create and not self.path.is_file():
            raise InstructLiteError(f"{self.path}: no votes there (name a run directory, or the file that the votes are in)")
        if kind := _network_file_system(self.path.absolute().parent):
            raise InstructLiteError(f"{self.path}: lies on a network file system ({kind}), where votes could be lost; name a local file")
        with self._told_apart(), self._alone():
            try:
                self._db = _connect(self.path)
            except sqlite3.DatabaseError as error:
                if not create or not _is_damage(error):
                    raise
                self.moved_aside = _move_aside(self.path)
                self._db = _connect(self.path)
            try:
                migrate(self._db, self.path)
            except BaseException:
                self._db.close()
                raise
        self._file = _identity(self.path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, on the disk when the block is left; inside another one, a part of it. An exception undoes it all."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            with self._told_apart():
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                finally:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
            if _identity(self.path) != self._file:
                raise InstructLiteError(f"{self.path}: was deleted or replaced while it was open, this is not saved (restart what uses it)")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """All that is read in the block is of one moment, whatever others write meanwhile."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            with self._told_apart():
                self._db.execute("BEGIN")
                try:
                    yield self._db
                finally:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """SQLite's errors as one line that says what to do."""
        try:
            yield
        except (sqlite3.Error, OSError, Timeout) as error:
            remedy = next((remedy for word, remedy in _REMEDIES.items() if word in str(error)), "see whether the file can be written")
            what = (error.strerror or error) if isinstance(error, OSError) else error
            raise InstructLiteError(f"{self.path}: {what} ({remedy}); nothing was saved") from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Opening is one process at a time: switching to WAL does not wait for others, and only one may move a damaged file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=30):
            yield


def _connect(path: Path) -> sqlite3.Connection:
    path.touch(0o600)  # it holds the voters' keys; SQLite gives its log the same mode
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(f"malformed: {found}")
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise sqlite3.OperationalError(f"this file system allows no write-ahead log (mode {mode})")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        db.close()
        raise
    return db


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return "malformed" in str(error) or "not a database" in str(error)


def _move_aside(path: Path) -> Path:
    """Give a damaged file another name, with the log that belongs to it: somebody may still save something of it."""
    target = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
    os.rename(path, target)
    for ending in ("-wal", "-shm"):
        log = path.with_name(path.name + ending)
        if log.exists():
            os.rename(log, target.with_name(target.name + ending))
    return target


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _network_file_system(directory: Path) -> str | None:
    """The kind of network file system that a directory is on, if it is on one."""
    best, kind = "", None
    for part in psutil.disk_partitions(all=True):
        inside = directory == Path(part.mountpoint) or Path(part.mountpoint) in directory.parents
        if inside and len(part.mountpoint) >= len(best):
            best, kind = part.mountpoint, part.fstype
    return kind if kind in _NETWORK else None
