"""From the events stream to decided batches: what is asked of the server, and who decides what it answers."""

from __future__ import annotations

from typing import Any, Final, cast

from accrual.engine import Batch, Engine
from accrual.settings import Settings
from accrual.stream import (
    Keys,
    PlainReplyReader,
    ReadConnection,
    Reader,
    StreamId,
    StreamServer,
    command,
    open_reader,
    stream_id_text,
)

__all__ = ["SMALL_REPLY_BYTES", "BatchSize", "Intake"]

FIRST_BATCH_ENTRIES: Final = 512
PLAIN_BATCH_ENTRIES: Final = 512
# To hand the events of a smaller reply to other threads takes as long as to decide them.
SMALL_REPLY_BYTES: Final = 128 * 1024
# One reply is received while others are decoded, decided and encoded.
READERS: Final = 4
# What a dead letter takes of the server, in events of a batch.
LETTER_EVENTS: Final = 15


class Intake:
    """The read connection of a worker, its commands, and the way from a reply to a batch.

    A reply is decided where it was received: no event of it becomes an object, unless the engine is the plain one.
    ``reader`` is the one that receives.
    """

    def __init__(self, server: StreamServer, keys: Keys, settings: Settings) -> None:
        self._readers = [open_reader(settings.engine) for _ in range(READERS)]
        self.reader = self._readers[0]
        self._server = server
        self._keys = keys
        # The server holds a read that finds nothing.
        self._patience_s = (settings.block_ms + settings.reply_timeout_ms) / 1000

    async def connect(self) -> ReadConnection:
        """Open the connection; what an earlier one had brought is forgotten."""
        self.reader.abandon()
        return await self._server.connect(lambda: ReadConnection(self.reader, self._patience_s))

    def take(self, connection: ReadConnection) -> Reader:
        """Return the reader with the reply at hand, which is kept until ``READERS`` more have been taken."""
        taken = self.reader
        self.reader = self._readers[(self._readers.index(taken) + 1) % READERS]
        connection.receive_into(self.reader)
        return taken

    def read_after(self, position: StreamId, entries: int, block_ms: int) -> bytes:
        """Return the command that waits up to ``block_ms`` for entries after ``position``."""
        return command(
            *("XREAD", "COUNT", entries, "BLOCK", block_ms, "STREAMS", self._keys.events, stream_id_text(position))
        )

    def read_range(self, after: StreamId, through: StreamId, entries: int | None = None) -> bytes:
        """Return the command for the entries after ``after`` up to and including ``through``."""
        limit = () if entries is None else ("COUNT", entries)
        return command("XRANGE", self._keys.events, f"({stream_id_text(after)}", stream_id_text(through), *limit)

    def decide(self, engine: Engine, reply: Reader) -> Batch:
        """Decide a reply that was taken."""
        if isinstance(reply, PlainReplyReader):
            return engine.decide_entries(reply.rows)
        return cast(Batch, cast(Any, engine).decide_reply(reply))


class BatchSize:
    """How many stream entries to ask for: as many as the settings allow, fewer where an entry holds many events.

    A dead letter counts for many events, because each is an entry on the server, which does nothing else meanwhile. It
    starts small and doubles, because nothing is known of the entries before the first of them were read.
    """

    def __init__(self, settings: Settings) -> None:
        # The plain engine is some hundred times slower, and between two batches the worker must renew its lease.
        plain = settings.engine == "reference"
        self._limit = min(settings.batch_entries, PLAIN_BATCH_ENTRIES if plain else settings.batch_entries)
        self._events = settings.batch_events
        self.entries = min(FIRST_BATCH_ENTRIES, self._limit)

    def learn(self, batch: Batch) -> None:
        """Adapt to what ``batch`` had."""
        counts = batch.counts
        weight = counts.events + LETTER_EVENTS * counts.dead_letters
        target = self._events * counts.stream_entries // max(1, weight)
        self.entries = max(1, min(self._limit, 2 * self.entries, target))
