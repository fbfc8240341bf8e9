"""The main loop beside a connection and a commit queue that are made up: how far it runs ahead of the commits."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from accrual.outcomes import Counts
from accrual.rulebook import parse
from accrual.settings import Settings
from accrual.stream import Checkpoint, Keys
from accrual.worker.intake import BatchSize
from accrual.worker.pipeline import Pipeline
from workers import RULEBOOK

BATCHES = 20


class Reader:
    """Always full replies: as many entries as were asked for."""

    def __init__(self) -> None:
        self.entries = self.size = 0
        self.first = self.last = (0, 0)


class Intake:
    """Both the intake and its connection; every batch is of all entries that were asked for."""

    def __init__(self) -> None:
        self.reader = Reader()
        self.asked: list[int] = []

    async def connect(self) -> Intake:
        return self

    def read_after(self, _position: object, entries: int, _block_ms: int) -> int:
        return entries

    def send(self, pieces: list[int]) -> None:
        self.asked += pieces

    async def reply(self) -> str:
        assert len(self.asked) == 1, "one request is outstanding at a time"
        self.reader.entries = self.asked.pop()
        self.reader.last = (self.reader.last[0] + 1, 0)
        return "entries"

    def take(self, _connection: object) -> Reader:
        return self.reader

    def decide(self, _engine: object, reply: Reader) -> Any:
        entries = reply.entries
        counts = Counts(stream_entries=entries, events=entries, entries=entries)
        return SimpleNamespace(encode=lambda _: b"batch", rejected=[], through=reply.last, counts=counts)

    def close(self) -> None:
        pass


class Commits:
    """Takes ``limit`` batches; a batch lands only when somebody waits for room. Ends the loop after some batches."""

    def __init__(self, limit: int) -> None:
        self.tail = Checkpoint()
        self.most = self.waiting = 0
        self._limit = limit

    async def room(self) -> None:
        if self.waiting >= self._limit:
            self.waiting -= 1
            await asyncio.sleep(0)

    def append(self, commit: Any) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        self.tail = commit.after
        if self.tail.batch == BATCHES:
            raise asyncio.CancelledError


def pipeline_of(intake: Intake, commits: Commits, engine: object = None, **settings: Any) -> Pipeline:
    return Pipeline(
        Settings(**settings),
        cast(Any, None),
        Keys("p"),
        cast(Any, intake),
        cast(Any, engine),
        1,
        cast(Any, commits),
        cast(Any, SimpleNamespace(are_due=False)),
        cast(Any, SimpleNamespace(decided=lambda _: None)),
    )


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_batches_are_in_flight_than_the_settings_say(limit: int) -> None:
    commits, intake = Commits(limit), Intake()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(pipeline_of(intake, commits, in_flight_batches=limit).run(None))
    assert commits.tail.batch == BATCHES
    assert commits.most == limit


def while_the_loop_goes_on(loop: asyncio.AbstractEventLoop) -> None:
    """Return once the loop has done something else meanwhile, such as renewing the lease."""
    went_on = threading.Event()
    loop.call_soon_threadsafe(went_on.set)
    assert went_on.wait(10), "the loop stood still"


def test_the_loop_goes_on_while_many_dead_letters_are_explained() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()

        class BadIntake(Intake):
            def decide(self, engine: object, reply: Reader) -> Any:
                batch = super().decide(engine, reply)
                batch.counts.dead_letters, batch.counts.entries = batch.counts.events, 0
                return Explained(batch.through, batch.counts)

        class Explained:
            def __init__(self, through: Any, counts: Counts) -> None:
                self.through, self.counts = through, counts

            @property
            def rejected(self) -> list[Any]:
                while_the_loop_goes_on(loop)
                return []

            def encode(self, _: object) -> bytes:
                return b"batch"

        await pipeline_of(BadIntake(), Commits(4)).run(None)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


def test_the_loop_goes_on_while_a_rulebook_is_adopted() -> None:
    """To move ten million records takes seconds, and a lease lasts two."""
    rulebook, adopted = parse(RULEBOOK), []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def adopt(new: object) -> None:
            while_the_loop_goes_on(loop)
            adopted.append(new)

        commits, engine = Commits(4), SimpleNamespace(adopt=adopt, rulebook=rulebook)
        await pipeline_of(Intake(), commits, engine).adopt(rulebook)
        assert commits.tail.rulebook == rulebook.version

    asyncio.run(run())
    assert adopted == [rulebook]


def test_fewer_entries_are_asked_for_where_dead_letters_abound() -> None:
    size = BatchSize(Settings(batch_entries=4096, batch_events=4096))
    for _ in range(10):
        size.learn(cast(Any, SimpleNamespace(counts=Counts(size.entries, size.entries, size.entries, 0, 0))))
    assert size.entries == 4096
    size.learn(cast(Any, SimpleNamespace(counts=Counts(size.entries, size.entries, 0, 0, size.entries))))
    assert size.entries == 4096 // 16
