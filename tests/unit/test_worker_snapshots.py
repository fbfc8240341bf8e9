"""Snapshots that find no memory, and copies that are of another ledger than they should be."""

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
from accrual.stream import Checkpoint, StreamId, Trimmed
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
    """Commits whose last batch is ``batch`` of ``ledger``, which has landed, or is about to."""

    nonce = "me"

    def __init__(self, batch: int, ledger: str = "ledger") -> None:
        self.tail = self.landed = checkpoint_of(batch, ledger)

    async def reached(self, _batch: int) -> None:
        pass


def value_of(batch: int, ledger: str) -> bytes:
    return f"batch {batch} of {ledger}".encode()


def checkpoint_of(batch: int, ledger: str = "ledger") -> Checkpoint:
    return Checkpoint(batch=batch, digest=digest_of(value_of(batch, ledger)), position=(batch, 0))


class Server:
    """A server that has every batch of ``ledger``."""

    def __init__(self, ledger: str = "ledger") -> None:
        self._ledger = ledger

    async def xrange(self, _key: str, first: str, _last: str) -> Any:
        number = int(first.partition("-")[0])
        return [(first.encode(), {b"batch": value_of(number, self._ledger)})]


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


class Machines:
    """Machines that copy their snapshots to one store, of which each keeps two."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trimmed: list[int] = []

    def settings(self, machine: str) -> Settings:
        return Settings(
            partition="p",
            snapshots=str(self.directory / machine),
            snapshot_interval_s=0,
            snapshots_kept=2,
            snapshot_store=str(self.directory / "store"),
            trim_input=True,
        )

    def take(self, machine: str, *batches: int, ledger: str = "ledger") -> None:
        """Let a machine take a snapshot behind each of ``batches``."""
        engine = FastEngine(parse(RULEBOOK), SECRET, 1, 3)

        async def trim(_client: object, _keys: object, _nonce: str, before: StreamId, *, archived: bool) -> Trimmed:
            assert not archived
            self.trimmed.append(before[0])
            return Trimmed(0, before)

        async def run() -> None:
            snapshots = Snapshots(self.settings(machine), SECRET, 1, cast(Any, Server(ledger)))
            for batch in batches:
                snapshots.consider(engine, cast(CommitQueue, Commits(batch, ledger)))
                await snapshots.finished()

        with patch("accrual.worker.snapshots.trim_events", trim):
            asyncio.run(run())

    def resume(self, machine: str, committed: int) -> int | None:
        """Return the batch of the snapshot that a machine goes on from."""
        found = asyncio.run(resume(cast(Any, Server()), self.settings(machine), SECRET, checkpoint_of(committed)))
        return found.header.checkpoint.batch if found is not None else None

    def path(self, batch: int) -> Path:
        return self.directory / "store" / "snapshots-p" / f"{batch:012d}.snapshot"

    @property
    def copied(self) -> list[int]:
        return sorted(int(path.stem) for path in self.path(0).parent.iterdir())


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


def test_copies_that_the_ledger_does_not_have_push_out_no_other(machines: Machines) -> None:
    machines.take("of another ledger", 4, 100, ledger="another")
    machines.take("one", 1, 2)
    assert machines.copied == [1, 2, 4, 100]
    # Between the second and the fifth there are none of this ledger. The first is one too many now.
    machines.take("two", 5)
    assert machines.copied == [2, 4, 5, 100]
    # What lies before the oldest one kept goes, whatever it is.
    machines.take("two", 6)
    assert machines.copied == [5, 6, 100]


def test_copies_that_are_no_snapshots_push_out_no_other(machines: Machines) -> None:
    machines.take("one", 1, 2)
    for batch, data in ((3, b""), (4, b"ACCRSNAP"), (5, machines.path(1).read_bytes()[:100])):
        machines.path(batch).write_bytes(data)
    machines.take("two", 6)
    assert machines.copied == [2, 3, 4, 5, 6]
    machines.take("two", 7)
    assert machines.copied == [6, 7]


def test_input_is_trimmed_behind_the_oldest_of_the_directory_and_of_the_store(machines: Machines) -> None:
    machines.take("one", 1, 2, 3)
    assert machines.trimmed == [1, 2]
    # Another machine has fewer than it keeps.
    machines.take("two", 4)
    assert machines.trimmed == [1, 2]
    machines.take("two", 6)
    assert machines.trimmed == [1, 2, 4]
    # The store has lost what it had: somebody who begins from it may need what comes behind its only copy.
    machines.path(4).unlink()
    machines.path(6).unlink()
    machines.take("two", 7)
    assert machines.trimmed == [1, 2, 4]
    machines.take("two", 8)
    assert machines.trimmed == [1, 2, 4, 7]


def test_a_copy_of_another_ledger_is_not_fetched(machines: Machines, caplog: pytest.LogCaptureFixture) -> None:
    machines.take("one", 1, 2)
    machines.take("of another ledger", 3, ledger="another")
    assert machines.resume("two", 3) == 2
    refused = f"{machines.directory}/two/p-000000000003.snapshot: its copy was not fetched: "
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"snapshot refused: {refused}the ledger has another batch 3: it is of another stream"
    ]
    assert [path.name for path in (machines.directory / "two").iterdir()] == ["p-000000000002.snapshot"]


def test_a_file_of_another_ledger_gives_way_to_a_copy_of_this_one(machines: Machines) -> None:
    machines.take("two", 2, ledger="another")
    machines.take("one", 1, 2)
    assert machines.resume("two", 2) == 2
