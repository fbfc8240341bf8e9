"""Archived input, decided again and compared with the committed ledger: what a restart does, from the archive.

Batches, rulebooks and the slack of the ids are those that the ledger recorded, so what comes out must be what was
committed. Nothing is written, and no worker is disturbed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import cast

import msgspec
import redis.asyncio

from accrual.archive import Archive
from accrual.engine import Secret, StreamEntry
from accrual.errors import ArchiveError, UsageError
from accrual.settings import Settings
from accrual.stream import (
    START,
    Checkpoint,
    Keys,
    Ownership,
    ReadConnection,
    Reader,
    StreamId,
    StreamServer,
    stream_id_text,
)
from accrual.worker.intake import Intake
from accrual.worker.recovery import Recovery

__all__ = ["Replayed", "replay_archive"]

_stretch = msgspec.msgpack.Encoder().encode
_stretch_of = msgspec.msgpack.Decoder(tuple[StreamId, StreamId]).decode


class Replayed(msgspec.Struct, frozen=True):
    """What was decided again, batches ``first`` to ``last``, and the ``committed`` ones that there are."""

    first: int
    last: int
    events: int
    committed: int


async def replay_archive(archive: Archive, settings: Settings) -> Replayed:
    """Decide again what ``archive`` has of the committed batches: from the beginning, or from a snapshot of settings.

    Raises ``StateMismatch`` with the batch and the entry that come out in another way, ``ArchiveError`` where the
    archive lacks what comes first or cannot be believed, and what the ledger's own checks raise.
    """
    server, keys = StreamServer(settings.redis), Keys(settings.partition)
    client = server.async_client()
    try:
        secret = Secret(bytes.fromhex(settings.secret)) if settings.secret else None
        seen = await Ownership(client, keys, settings.lease_ms).look(secret)
        if seen is None:
            raise UsageError("the partition was never started, or with a secret that was not given here")
        intake = _ArchivedIntake(archive, server, keys, settings)
        return await _replay(client, intake, seen.secret, seen.checkpoint, settings)
    finally:
        await client.aclose()


async def _replay(
    client: redis.asyncio.Redis, intake: Intake, secret: Secret, committed: Checkpoint, settings: Settings
) -> Replayed:
    recovery = Recovery(client, Keys(settings.partition), intake, secret, settings)
    # The archive follows the stream at some distance.
    with suppress(_ArchiveEnds):
        await recovery.follow(committed)
    begun, at = recovery.begun, recovery.checkpoint
    return Replayed(begun.batch + 1, at.batch, at.events - begun.events, committed.batch)


class _ArchiveEnds(ArchiveError):
    """A batch has entries that the archive does not have yet."""


class _ArchivedIntake(Intake):
    """Brings what a recovery asks for from an archive, where another one asks the server."""

    def __init__(self, archive: Archive, server: StreamServer, keys: Keys, settings: Settings) -> None:
        super().__init__(server, keys, settings)
        self._archive = archive

    async def connect(self) -> ReadConnection:
        """Begin to read; what an earlier connection had brought is forgotten."""
        self.reader.abandon()
        return cast(ReadConnection, _ArchiveConnection(self._archive, self.reader))

    def read_range(self, after: StreamId, through: StreamId, entries: int | None = None) -> bytes:
        """Return what ``_ArchiveConnection`` takes for a command."""
        assert entries is None, "a recovery asks for whole batches"
        return _stretch((after, through))


class _ArchiveConnection:
    """Answers as a server would. Stretches are asked for in order."""

    def __init__(self, archive: Archive, reader: Reader) -> None:
        self._archive = archive
        self._reader = reader
        self._asked: deque[tuple[StreamId, StreamId]] = deque()
        self._entries: Iterator[StreamEntry] | None = None
        self._next: StreamEntry | None = None
        self._end = START

    def send(self, pieces: Sequence[bytes]) -> None:
        """Take note of the stretches that are asked for."""
        self._asked += map(_stretch_of, pieces)

    async def reply(self) -> str:
        """Let the reader have the next stretch."""
        if self._reader.kind is None:
            self._give(_answer(self._stretch(*self._asked.popleft())))
        kind = self._reader.kind
        assert kind is not None
        return kind

    def receive_into(self, reader: Reader) -> None:
        """Leave the reply to its reader; ``reader`` gets the next one."""
        self._reader.pass_on(reader)
        self._reader = reader

    def close(self) -> None:
        """Nothing is open."""

    def _stretch(self, after: StreamId, through: StreamId) -> list[StreamEntry]:
        if self._entries is None:
            self._end = self._archive.end()
            self._entries = self._archive.stretch(after, None)
            self._next = next(self._entries, None)
        if through > self._end:
            raise _ArchiveEnds(f"{self._archive.place}: ends before {stream_id_text(through)}")
        found = []
        while self._next is not None and self._next[:2] <= through:
            found.append(self._next)
            self._next = next(self._entries, None)
        return found

    def _give(self, data: memoryview) -> None:
        while data:
            place = self._reader.get_buffer(len(data))
            size = min(len(place), len(data))
            place[:size] = data[:size]
            self._reader.buffer_updated(size)
            data = data[size:]


def _answer(entries: Sequence[StreamEntry]) -> memoryview:
    """Return what a server answers to ``XRANGE``."""
    pieces = [b"*%d\r\n" % len(entries)]
    for ms, seq, fields in entries:
        pieces += (b"*2\r\n", _bulk(b"%d-%d" % (ms, seq)), b"*%d\r\n" % (2 * len(fields)), *_bulks(fields))
    return memoryview(b"".join(pieces))


def _bulks(fields: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    return (_bulk(part) for pair in fields for part in pair)


def _bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)
