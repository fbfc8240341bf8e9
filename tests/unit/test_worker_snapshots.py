"""Snapshots that find no memory: the work goes on, and a later one is taken."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest

from accrual.engine import Secret
from accrual.engine.fast import EngineImage, FastEngine
from accrual.ledger import digest_of
from accrual.rulebook import parse
from accrual.settings import Settings
from accrual.snapshots import SnapshotDirectory
from accrual.stream import Checkpoint
from accrual.worker.commits import CommitQueue
from accrual.worker.snapshots import Snapshots, resume
from workers import RULEBOOK, SECRET


class Image:
    """An image for whose first piece there is no memory."""

    def __init__(self, image: EngineImage) -> None:
        self._image = image
        self.description = image.description

    def write(self, _sink: Callable[[memoryview], object]) -> bool:
        raise MemoryError

    def close(self) -> None:
        self._image.close()

    def discard(self) -> None:
        self._image.discard()


class Engine(FastEngine):
    """An engine that finds no memory to begin its first image, nor to write its second."""

    def __init__(self) -> None:
        super().__init__(parse(RULEBOOK), SECRET, 1, 3)
        self._images = 0

    def image(self) -> EngineImage:
        self._images += 1
        if self._images == 1:
            raise MemoryError("there is no memory to take an image of the state")
        image = super().image()
        return image if self._images > 2 else cast(EngineImage, Image(image))


class Commits:
    """Commits whose last batch is ``batch``, which has landed, or is about to."""

    nonce = "me"

    def __init__(self, batch: int) -> None:
        self.tail = self.landed = Checkpoint(batch=batch, digest=digest_of(value_of(batch)))

    async def reached(self, _batch: int) -> None:
        pass


def value_of(batch: int) -> bytes:
    return b"batch %d" % batch


class Server:
    """A server that has every batch."""

    async def xrange(self, _key: str, first: str, _last: str) -> Any:
        number = int(first.partition("-")[0])
        return [(first.encode(), {b"batch": value_of(number)})]


def test_a_snapshot_for_which_there_is_no_memory_is_given_up_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(partition="p", snapshots=str(tmp_path), snapshot_interval_s=0)
    engine = Engine()

    async def run() -> None:
        snapshots = Snapshots(settings, Secret(bytes(16)), 1, cast(Any, Server()))
        for batch in (1, 2, 3):
            snapshots.consider(engine, cast(CommitQueue, Commits(batch)))
            await snapshots.finished()

    with caplog.at_level(logging.INFO, "accrual.worker"):
        asyncio.run(run())
    messages = [record.message.partition(" bytes=")[0] for record in caplog.records]
    assert messages == [
        "snapshot batch=1 failed: there is no memory to take an image of the state",
        "snapshot batch=2 failed: there is no memory for it",
        "snapshot batch=3",
    ]
    assert [header.checkpoint.batch for header in SnapshotDirectory(tmp_path, "p").headers()] == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["p-000000000003.snapshot"]

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    caplog.clear()
    committed = Checkpoint(batch=3)
    with patch("accrual.worker.snapshots.open_engine", no_memory):
        assert asyncio.run(resume(cast(Any, Server()), settings, Secret(bytes(16)), committed)) is None
    path = tmp_path / "p-000000000003.snapshot"
    assert [record.message for record in caplog.records] == [
        f"snapshot refused: {path}: there is no memory for its state"
    ]
