"""How far a long step is, on stderr: a bar on a terminal, plain lines elsewhere. It loads nothing heavy, so that every room can use it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]


def console() -> Console:
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show on stderr how far a long step is and how long it will take: a bar on a terminal, else a line every 10 % or so.

    done: what was there before. Yields advance(count=1, note="").
    """
    shown_on = console()
    if os.environ.get("RANK", "0") != "0":
        yield lambda count=1, note="": None
        return
    if shown_on.is_terminal:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn(), TextColumn("{task.fields[note]}")]  # fmt: skip
        with Progress(*columns, console=shown_on) as bar:
            task = bar.add_task(label, total=total, completed=done, note="")
            yield lambda count=1, note="": bar.update(task, advance=count, note=note)
        return
    start = shown_at = time.perf_counter()
    first, shown = done, 10 * done // max(1, total)

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, shown, shown_at
        done, now = done + count, time.perf_counter()
        if done < total and (10 * done // total <= shown or now - shown_at < 1):
            return
        shown, shown_at, seconds = 10 * done // total, now, now - start
        left = f"took {_clock(seconds)}" if done >= total else f"{_clock(seconds / (done - first) * (total - done))} left"
        shown_on.print(", ".join(filter(None, [f"{label} {done}/{total}", note, left])))

    yield advance


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
