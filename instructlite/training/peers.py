"""Which of several processes is gone, and why: those that are left only hear that a connection was closed, or wait for it for half an hour.

Looked at are the processes of this machine. Those of others are known to be gone by their own launcher only.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType

import psutil
from accelerate import PartialState
from accelerate.utils import gather_object

from ..errors import InstructLiteError

EVERY = 1.0  # seconds between two looks
PATIENCE = 20.0  # seconds that are left to this process to notice by itself that it cannot go on
LOOKING = 3.0  # seconds: a process closes its connections a moment before it is gone


class Peers:
    """While this context lasts, and once they are `met`, the death of another process ends this one with a line that names it."""

    def __init__(self, again: str = "what was saved is whole: go on with --resume (resume=True)") -> None:
        """again: what the line ends with."""
        self.again = again
        self.processes: dict[int, psutil.Process] = {}
        self._count = 1
        self._over, self._said = threading.Event(), threading.Lock()

    def meet(self) -> None:
        """To be called on all processes."""
        state = PartialState()
        self._count = state.num_processes
        if self._count == 1 or self.processes:
            return
        for rank, host, pid in gather_object([(state.process_index, socket.gethostname(), os.getpid())]):
            if host == socket.gethostname() and pid != os.getpid():
                self.processes[rank] = psutil.Process(pid)
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if error is None or isinstance(error, InstructLiteError) or not self.processes:
            return
        until = time.monotonic() + (LOOKING if isinstance(error, RuntimeError) else 0)
        while (gone := self.gone()) is None and time.monotonic() < until:
            time.sleep(0.01)
        if gone is not None and self._said.acquire(blocking=False):
            raise InstructLiteError(gone) from error

    def gone(self) -> str | None:
        """What has become of the first process that is no more; None: all are there."""
        for rank, process in self.processes.items():
            how = _end_of(process)
            if how is not None:
                return f"process {rank} of {self._count} (pid {process.pid}) {how}, so the others cannot go on; {self.again}"
        return None

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            if (gone := self.gone()) is None:
                continue
            # Who waits for a GPU hears of nothing, not even of signals.
            if not self._over.wait(PATIENCE) and self._said.acquire(blocking=False):
                os.write(2, f"instructlite (process {os.environ.get('RANK', 0)}): {gone}\n".encode())
                os._exit(1)
            return


def _end_of(process: psutil.Process) -> str | None:
    """How a process has ended; None: it runs."""
    with suppress(psutil.NoSuchProcess):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return None
    code = _exit_code(process.pid)
    if code is None:
        return "is gone: it was killed (kill -9, or memory ran out) or has failed, and has said why"
    if code & 0x7F:
        name = signal.Signals(code & 0x7F).name
        return f"was killed by {name}" + (" (kill -9; the system does it where memory runs out)" if name == "SIGKILL" else "")
    return f"has ended with exit code {code >> 8}, and has said why"


def _exit_code(pid: int) -> int | None:
    """Of a process that nobody has waited for yet; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(" ")[2])
    except (OSError, ValueError):
        return None
