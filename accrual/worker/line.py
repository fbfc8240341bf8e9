"""Batches on their way through three threads: one is decoded while another is decided and a third encoded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

__all__ = ["Line"]

# With the one that is decoded these are as many as the engine keeps.
BATCHES_UNDER_WAY: Final = 2

Finished = TypeVar("Finished")


class Line:
    """What was decoded is decided in a thread of its own, and then finished in another one, all in order.

    Once something has failed, nothing that came after it is finished: it fails with the same exception.
    """

    def __init__(self) -> None:
        self._deciding = ThreadPoolExecutor(1, "deciding")
        self._finishing = ThreadPoolExecutor(1, "finishing")
        self._under_way: deque[asyncio.Task[None]] = deque()
        self._most_events: deque[int] = deque(maxlen=BATCHES_UNDER_WAY)
        self._failure: BaseException | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        return not self._under_way

    @property
    def most_events(self) -> int:
        """The most events that are under way."""
        return 0 if self.is_empty else sum(self._most_events)

    def put(
        self,
        decide: Callable[[], None],
        finish: Callable[[], Finished],
        then: Callable[[Finished], None],
        most_events: int,
    ) -> None:
        """Let other threads ``decide`` and ``finish`` a batch, and this one do what is to be done ``then``."""
        self._most_events.append(most_events)
        finished = self._finishing.submit(self._finish, self._deciding.submit(decide), finish)
        self._under_way.append(asyncio.get_running_loop().create_task(_land(finished, then)))

    def settle(self) -> None:
        """Forget what has been finished. Raises what has failed."""
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()

    async def room(self) -> None:
        """Wait until another batch may be decoded. Raises what has failed."""
        while len(self._under_way) >= BATCHES_UNDER_WAY:
            # Who waits here may be cancelled; what is under way goes on.
            await asyncio.wait([self._under_way[0]])
            self.settle()

    async def emptied(self) -> None:
        """Wait until nothing is under way, whatever became of it. Raises what has failed."""
        if not self._under_way:
            return
        await asyncio.wait(self._under_way)
        failures = [task.exception() for task in self._under_way]
        self._under_way.clear()
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Let the threads end."""
        self._deciding.shutdown(wait=False)
        self._finishing.shutdown(wait=False)

    def _finish(self, decided: Future[None], finish: Callable[[], Finished]) -> Finished:
        failure = decided.exception()
        if self._failure is not None:
            raise self._failure
        try:
            if failure is not None:
                raise failure
            return finish()
        except BaseException as failure:
            self._failure = failure
            raise


async def _land(finished: Future[Finished], then: Callable[[Finished], None]) -> None:
    then(await asyncio.wrap_future(finished))
