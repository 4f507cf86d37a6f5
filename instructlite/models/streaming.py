"""The answers of one request as they grow: what the engine's thread writes, and others read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import InstructLiteError
from .base import Base
from .lockstep import Row


@dataclass(frozen=True)
class Snapshot:
    """A request at one moment; lists have one entry a pane, in the order asked for."""

    position: int
    """How many requests are ahead in the queue; 0 also while it is being answered."""
    waiting: bool
    texts: list[str]
    finish: list[str | None]
    """"stop" (the model ended its answer), "length" (max_new_tokens), "cancelled", or None while it goes on."""
    tokens: list[int]
    tokens_per_second: list[float]

    @property
    def done(self) -> list[bool]:
        return [finish is not None for finish in self.finish]


class Stream:
    """The answers to one request: iterate for snapshots, or wait for the last one by `result()`.

    A slow reader gets fewer snapshots, never old ones. Leaving the loop before its end cancels the request.
    """

    def __init__(self, rows: list[Row], base: Base, tokenizing: threading.Lock):
        self.rows = rows
        self.cancelled = False
        self._base, self._tokenizing = base, tokenizing
        self._changed = threading.Condition()
        self._version = 0
        self._position = 0
        self._started: float | None = None
        self._lengths = [0] * len(rows)
        self._seconds = [0.0] * len(rows)
        self._finish: list[str | None] = [None] * len(rows)
        self._error: InstructLiteError | None = None

    def __iter__(self) -> Iterator[Snapshot]:
        seen, over = -1, False
        try:
            while not over:
                with self._changed:
                    self._changed.wait_for(lambda known=seen: self._version != known)
                    seen, over = self._version, self.over
                    if self._error:
                        raise self._error
                yield self.snapshot()
        finally:
            self.cancel()

    def result(self) -> Snapshot:
        """The finished answers; raises InstructLiteError if they broke off."""
        return deque(self, maxlen=1).pop()

    def cancel(self) -> None:
        """The answers end as they are, at the next token. Nothing happens to finished ones."""
        self.cancelled = True

    @property
    def over(self) -> bool:
        return self._error is not None or None not in self._finish

    def snapshot(self) -> Snapshot:
        """Where it stands; needs no waiting."""
        with self._changed:
            lengths, finish, seconds = list(self._lengths), list(self._finish), list(self._seconds)
            position, waiting = self._position, self._started is None and not self.over
        texts = [self._text(row.ids[:n], end) for row, n, end in zip(self.rows, lengths, finish, strict=True)]
        speeds = [n / took if took else 0.0 for n, took in zip(lengths, seconds, strict=True)]
        return Snapshot(position, waiting, texts, finish, lengths, speeds)

    def _text(self, ids: list[int], end: str | None) -> str:
        with self._tokenizing:
            text = self._base.decode(ids)
        return text if end else text.rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character whose last are to come

    # --- called by the engine -----------------------------------------------------------------------------------------------

    def queued(self, position: int) -> None:
        with self._changed:
            if position != self._position or not self._version:
                self._position = position
                self._notify()

    def start(self) -> None:
        self._position, self._started = 0, time.perf_counter()

    def advance(self) -> None:
        """Show what the rows have now, all at once: no answer is ahead of another."""
        now = time.perf_counter()
        with self._changed:
            for i, row in enumerate(self.rows):
                if self._finish[i] is None:
                    self._lengths[i], self._finish[i] = len(row.ids), row.finish
                    self._seconds[i] = now - (self._started or now)
            self._notify()

    def end(self, error: InstructLiteError | None = None) -> None:
        """Over, for another reason than that the answers are finished."""
        with self._changed:
            self._error = error
            self._finish = [finish or "cancelled" for finish in self._finish]
            self._notify()

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()
