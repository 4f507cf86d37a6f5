"""SIGTERM and Ctrl-C while something long runs: training finishes its step and saves, then the process ends with the right code."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any

from .work import is_main_process

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SAME = 1.0  # seconds: within them a second signal is the first one by another way (from the terminal and from the parent process)


class Interrupted(SystemExit):
    """A run was stopped from outside. Not caught, it ends Python with code 143 (SIGTERM) or 130 (Ctrl-C) and no traceback.

    step: the training step that is saved; None if none was being trained.
    """

    def __init__(self, number: int, step: int | None = None):
        super().__init__(128 + number)
        self.signal, self.step = NAMES[signal.Signals(number)], step


class Interruption:
    """While this context lasts, SIGTERM and Ctrl-C raise Interrupted: at once, or after `finishing_steps` at the end of a step.

    The second one always raises at once. Signals that the process ignores stay ignored; in another thread than the main
    one, which is the only one to get signals, nothing is installed. The outermost of nested contexts says on stderr
    how to go on (None: it says nothing).
    """

    def __init__(self, go_on_with: str | None):
        self.go_on_with = go_on_with
        self.received: int | None = None
        """The signal that was not answered at once: whoever trains, or waits for a process that does, answers it."""
        self._at = 0.0
        self._finishing = False
        self._process: BaseProcess | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not installed from Python
        inside = any(isinstance(getattr(handler, "__self__", None), Interruption) for handler in before.values())
        if isinstance(error, Interrupted) and not inside and self.go_on_with is not None and is_main_process():
            sys.stderr.write(f"go on with: {self.go_on_with}\n")

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """A first signal only sets `received`; whoever trains looks at it after each step."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False
        if self.received is not None:  # it came after the last step
            raise Interrupted(self.received)

    @contextmanager
    def passed_on_to(self, process: BaseProcess) -> Iterator[None]:
        """Signals go to a process that does the work, and does with them what is said above; here is only waited for it."""
        self._process = process
        try:
            yield
        finally:
            self._process = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._process is not None and self._process.pid is not None:
            self.received = number
            if self._process.exitcode is None:
                os.kill(self._process.pid, number)
            return
        if self.received is not None and time.monotonic() - self._at < SAME:
            return
        if self.received is not None or not self._finishing:
            raise Interrupted(number)
        self.received, self._at = number, time.monotonic()
        # Not through a buffered stream: the handler may have interrupted a write to it.
        os.write(2, f"\n{NAMES[signal.Signals(number)]}: finishing this step and saving; once more stops at once\n".encode())
