"""Replies are kept for as long as their events are decided, however many empty ones come meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from accrual.engine import Secret, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.rulebook import parse
from accrual.settings import Settings
from accrual.stream import Checkpoint, Keys, ReadConnection
from accrual.worker.intake import Intake
from accrual.worker.pipeline import Pipeline
from replies import MemoryConnection, reply_of
from workers import NOON_MS, RULEBOOK, compact, order

MANY = 60_000
NIL = b"*-1\r\n"


def entry_of(first: int, count: int) -> StreamEntry:
    events = [msgspec.Raw(compact(order(number))) for number in range(first, first + count)]
    return StreamEntry(NOON_MS + first, 1, ((b"b", msgspec.msgpack.encode(events)),))


FIRST = reply_of([entry_of(0, MANY)])
SECOND = reply_of([entry_of(MANY + index * 64, 64) for index in range(64)])


class Connection(MemoryConnection):
    """Gives the replies that there are, taking them out, and then none any more."""

    def send(self, pieces: Sequence[bytes]) -> None:
        """Take note of nothing."""

    async def reply(self) -> str:
        await asyncio.sleep(0.001)
        if not self._replies:
            raise asyncio.CancelledError
        return await super().reply()


class Commits:
    """Takes every batch."""

    def __init__(self) -> None:
        self.tail = Checkpoint()
        self.values: list[bytes] = []

    async def room(self) -> None:
        pass

    def append(self, commit: Any) -> None:
        self.tail = commit.after
        self.values.append(commit.value)


def pipeline_of(replies: deque[bytes], commits: Commits, engine: FastEngine) -> Pipeline:
    settings = Settings(block_ms=1, batch_events=1 << 20, linger_ms=0)

    class LocalIntake(Intake):
        async def connect(self) -> ReadConnection:
            self.reader.abandon()
            return cast(ReadConnection, Connection(self.reader, replies))

    return Pipeline(
        settings,
        cast(Any, None),
        Keys("p"),
        LocalIntake(cast(Any, None), Keys("p"), settings),
        engine,
        1,
        cast(Any, commits),
        cast(Any, SimpleNamespace(are_due=False)),
        cast(Any, SimpleNamespace(decided=lambda _: None)),
    )


def open_fast() -> FastEngine:
    return FastEngine(parse(RULEBOOK), Secret(bytes(16)))


def values_of(replies: list[bytes]) -> list[bytes]:
    commits = Commits()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(pipeline_of(deque(replies), commits, open_fast()).run(None))
    return commits.values


def test_empty_replies_take_nothing_from_a_batch_under_way() -> None:
    expected = values_of([FIRST, SECOND])
    assert len(expected) == 2
    for empty in (1, 3, 4, 7):
        assert values_of([FIRST, *[NIL] * empty, SECOND]) == expected


def test_a_failure_is_noticed_though_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("planted")

    engine = open_fast()
    monkeypatch.setattr(engine, "decide", fail)
    replies = deque([FIRST, *[NIL] * 20])
    with pytest.raises(MemoryError, match="planted"):
        asyncio.run(pipeline_of(replies, Commits(), engine).run(None))
    assert replies, "nobody asked before the end"
