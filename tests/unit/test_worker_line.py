"""The threads behind the main loop: all in order, nothing behind a failure, nothing lost by who stops waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from accrual.worker.line import BATCHES_UNDER_WAY, Line

BATCHES = 50


def test_batches_are_decided_finished_and_committed_in_order() -> None:
    decided: list[int] = []
    finished: list[int] = []
    committed: list[int] = []

    async def run() -> None:
        line = Line()
        for number in range(BATCHES):
            await line.room()
            line.put(adding(decided, number), numbered(finished, number), committed.append, 1)
        await line.emptied()
        assert line.is_empty
        line.close()

    asyncio.run(run())
    assert decided == finished == committed == list(range(BATCHES))


def adding(numbers: list[int], number: int) -> Callable[[], None]:
    return lambda: numbers.append(number)


def waiting_for(event: threading.Event) -> None:
    event.wait()


def numbered(numbers: list[int], number: int) -> Callable[[], int]:
    def add() -> int:
        numbers.append(number)
        return number

    return add


def test_no_more_are_under_way_than_the_engine_keeps() -> None:
    async def run() -> None:
        line, free = Line(), threading.Event()
        for _ in range(BATCHES_UNDER_WAY):
            await line.room()
            line.put(lambda: None, free.wait, lambda _: None, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(line.room(), 0.05)
        free.set()
        await line.room()
        await line.emptied()
        line.close()

    asyncio.run(run())


@pytest.mark.parametrize("step", ["decide", "finish"])
def test_nothing_behind_a_failure_is_committed(step: str) -> None:
    committed: list[str] = []

    def fail() -> None:
        raise MemoryError(step)

    async def run() -> None:
        line = Line()
        line.put(
            fail if step == "decide" else lambda: None,
            fail if step == "finish" else lambda: None,
            lambda _: committed.append("failed"),
            1,
        )
        line.put(lambda: None, lambda: None, lambda _: committed.append("behind"), 1)
        with pytest.raises(MemoryError, match=step):
            await line.emptied()
        assert line.is_empty
        line.put(lambda: None, lambda: None, lambda _: committed.append("later"), 1)
        with pytest.raises(MemoryError, match=step):
            await line.emptied()
        line.close()

    asyncio.run(run())
    assert committed == []


def test_who_stops_waiting_loses_nothing() -> None:
    committed: list[int] = []

    async def run() -> None:
        line, free = Line(), threading.Event()
        line.put(lambda: waiting_for(free), lambda: 1, committed.append, 1)
        waiting = asyncio.create_task(line.emptied())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        free.set()
        await line.emptied()
        line.close()

    asyncio.run(run())
    assert committed == [1]


def test_what_is_done_is_forgotten_without_waiting() -> None:
    async def run() -> None:
        line, done = Line(), asyncio.Event()
        line.put(lambda: None, lambda: None, lambda _: done.set(), 7)
        assert line.most_events == 7
        await done.wait()
        await asyncio.sleep(0)
        line.settle()
        assert line.is_empty
        assert line.most_events == 0
        line.close()

    asyncio.run(run())
