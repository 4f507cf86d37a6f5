"""A stream of the engine for a page: without holding a thread of Gradio's while it waits, at a pace that browsers like, and stoppable."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, sleep, to_thread

from ...errors import InstructLiteError
from ...models.streaming import Snapshot, Stream
from .guard import Bucket

SECONDS_BETWEEN = 0.1
REQUESTS_PER_MINUTE = 40  # of one address or login
WAITING_THREADS = 256


class Streams:
    """What is being written, by the page that asked for it."""

    def __init__(self):
        self._running: dict[str, Stream] = {}
        self._bucket = Bucket(REQUESTS_PER_MINUTE)
        self._threads: CapacityLimiter | None = None

    def admit(self, who: str) -> None:
        """Raises InstructLiteError for somebody who has asked too often."""
        if not self._bucket.take(who):
            raise InstructLiteError("that was a lot within a minute; wait a moment, then ask again")

    def stop(self, page: str) -> None:
        """End what this page is waiting for, with what is there of it."""
        if stream := self._running.get(page):
            stream.cancel()

    @asynccontextmanager
    async def snapshots(self, page: str, stream: Stream) -> AsyncIterator[AsyncIterator[Snapshot]]:
        """Snapshots up to the last one. Leaving early, as when the browser has gone, ends the generation."""
        self.stop(page)
        self._running[page] = stream
        try:
            yield self._paced(stream)
        finally:
            stream.cancel()
            if self._running.get(page) is stream:
                del self._running[page]

    async def _paced(self, stream: Stream) -> AsyncIterator[Snapshot]:
        self._threads = self._threads or CapacityLimiter(WAITING_THREADS)
        following = iter(stream)
        while True:
            asked = time.monotonic()
            snapshot = await to_thread.run_sync(next, following, None, limiter=self._threads)
            if snapshot is None:
                return
            yield snapshot
            if not all(snapshot.done):
                await sleep(max(0.0, SECONDS_BETWEEN - (time.monotonic() - asked)))
