"""The main loop beside a connection and a commit queue that are made up: how far it runs ahead of the commits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from accrual.outcomes import Counts
from accrual.settings import Settings
from accrual.stream import Checkpoint, Keys
from accrual.worker.pipeline import Pipeline

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


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_batches_are_in_flight_than_the_settings_say(limit: int) -> None:
    commits, intake = Commits(limit), Intake()
    pipeline = Pipeline(
        Settings(in_flight_batches=limit),
        cast(Any, None),
        Keys("p"),
        cast(Any, intake),
        cast(Any, None),
        1,
        cast(Any, commits),
        cast(Any, SimpleNamespace(are_due=False)),
        cast(Any, SimpleNamespace(decided=lambda _: None)),
    )
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(pipeline.run(None))
    assert commits.tail.batch == BATCHES
    assert commits.most == limit
