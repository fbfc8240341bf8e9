"""Tasks that live and end together: one in the foreground, others that it cannot do without; and work in threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["Tasks", "in_thread"]

ResultT = TypeVar("ResultT")


async def in_thread(function: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Call ``function`` in a thread of its own, for whose end no end of the process waits.

    A pool's thread would hold the process up for as long as a disk or a store is silent.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultT] = loop.create_future()

    def tell(settle: Callable[[Any], None], value: object) -> None:
        if not future.done():
            settle(value)

    def call() -> None:
        answer: tuple[Callable[[Any], None], object]
        try:
            answer = (future.set_result, function(*arguments))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            answer = (future.set_exception, error)
        # Nobody may be there any more to hear it.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, *answer)

    threading.Thread(target=call, daemon=True, name=getattr(function, "__name__", "work")).start()
    return await future


class Tasks:
    """A foreground task that ends early when ``stop`` is called, and fails when a background task does."""

    def __init__(self) -> None:
        self.stopping = False
        self._foreground: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._failure: BaseException | None = None
        self._cut_short = False

    def in_background(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Start a task that runs for as long as everything else, or fails and takes everything with it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background_ended)

    async def in_foreground(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Await ``coroutine`` until ``stop`` is called. Raises what it raises, or what a background task did."""
        self._cut_short = False
        self._foreground = asyncio.get_running_loop().create_task(coroutine)
        if self._failure is not None:
            self._foreground.cancel()
        try:
            await self._foreground
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            if not self._cut_short:
                raise
        finally:
            self._foreground = None

    def stop(self) -> None:
        """End the foreground task at the next point where it waits."""
        self.stopping = True
        if self._foreground is not None:
            self._cut_short = True
            self._foreground.cancel()

    async def end(self) -> None:
        """End what runs in the background."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def _background_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and self._failure is None:
            self._failure = task.exception()
            if self._foreground is not None:
                self._foreground.cancel()
