"""What a worker says of itself while nothing goes on."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable

import pytest

from accrual.errors import MemoryLimitReached
from accrual.worker import progress
from accrual.worker.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stand_still(shown: Progress, caplog: pytest.LogCaptureFixture, said_so: Callable[[], int]) -> None:
    """Let the memory limit be reached, until that was said twice."""

    async def run() -> None:
        tasks = [
            asyncio.ensure_future(shown.show()),
            asyncio.ensure_future(shown.stand_still(MemoryLimitReached("memory limit reached: by a test"))),
        ]
        async with asyncio.timeout(20):
            while said_so() < 2:  # noqa: ASYNC110 - what is said sets no event
                await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()

    with caplog.at_level(logging.INFO, "accrual.worker"):
        asyncio.run(run())
    assert caplog.text.count("memory limit reached: by a test") == 1


def test_the_log_says_at_every_interval_that_the_memory_limit_is_reached(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.02)
    stand_still(Progress(None), caplog, lambda: caplog.text.count("trouble='MEMORY LIMIT REACHED, no input is taken'"))


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_live_progress_says_it_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    monkeypatch.setattr(progress, "LIVE_INTERVAL_S", 0.02)
    live = stream()
    stand_still(Progress(live), caplog, lambda: live.getvalue().count("MEMORY LIMIT REACHED, no input is taken"))
    assert "recovering" not in live.getvalue()
