"""From the ledger back to a living engine. A restart and the recovery from a crash are this one path.

It starts from the newest snapshot, or from the beginning where there is none. The committed ledger is the authority:
every batch behind that is decided again from the events stream, under the rulebook that the ledger recorded, and must
come out byte for byte as it was committed.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from functools import partial
from typing import Any, Final, cast

import redis
import redis.asyncio

from accrual.engine import Batch, BatchHeader, Engine, Secret, open_engine
from accrual.errors import LedgerError, RulebookError, StateMismatch, StreamError, StreamTrimmed
from accrual.ledger import Chain, EntriesBatch, Header, Link, RulebookRecord, decode, entry_line
from accrual.rulebook import Rulebook, parse
from accrual.settings import Settings
from accrual.stream import Checkpoint, Keys, ReadConnection, Reader, Refused, StreamId, stream_id_text
from accrual.worker.intake import SMALL_REPLY_BYTES, Intake
from accrual.worker.line import Line
from accrual.worker.memory import MemoryLimit
from accrual.worker.snapshots import resume
from accrual.worker.trouble import Trouble

__all__ = ["Recovery"]

log = logging.getLogger("accrual.worker")

PAGE_BATCHES: Final = 8
REPORT_INTERVAL_S: Final = 10.0


class Recovery:
    """Rebuilds the engine of a partition, batch by batch.

    ``checkpoint`` is what the replayed batches add up to, and in the end the server's; ``begun`` is that of the
    snapshot it started from, if there was one; ``slack_days`` is how the partition's engine was opened at its start.
    """

    def __init__(
        self, client: redis.asyncio.Redis, keys: Keys, intake: Intake, secret: Secret, settings: Settings
    ) -> None:
        self.begun = self.checkpoint = Checkpoint()
        self.slack_days = 0
        self._client = client
        self._keys = keys
        self._intake = intake
        self._secret = secret
        self._settings = settings
        self._limit = MemoryLimit(settings.memory_limit_bytes)
        self._trouble = Trouble("recovery", settings.backoff_limit_ms)
        self._engine: Engine | None = None
        self._link = Link()
        self._zone_rules = ""
        self._looked_for_snapshots = False
        self._line = Line()
        self._replayed = 0

    async def run(self, committed: Checkpoint) -> Engine:
        """Return the engine as it was after the batch of the ``committed`` checkpoint.

        Raises ``StateMismatch`` where a batch comes out differently or the chain does not end there, ``LedgerError``
        where it is broken, ``StreamTrimmed`` where events are missing, ``MemoryLimitReached`` where it has no room.
        """
        started_s, replayed = time.monotonic(), self._replayed
        await self.follow(committed)
        if self.checkpoint != committed or self._engine is None:
            raise StateMismatch(f"the ledger adds up to {self.checkpoint}, but the checkpoint says {committed}")
        if self._zone_rules != (installed := importlib.metadata.version("tzdata")):
            log.warning("zone rules: the ledger was decided with tzdata %s, here is %s", self._zone_rules, installed)
        log.info(
            "recovered batches=%d events=%d rulebook=%d replayed=%d seconds=%.2f",
            *(committed.batch, committed.events, committed.rulebook, self._replayed - replayed),
            time.monotonic() - started_s,
        )
        self._line.close()
        return self._engine

    def leads_to(self, committed: Checkpoint) -> bool:
        """Tell whether ``committed`` may lie ahead: a server that has lost commits is behind, or went elsewhere."""
        return self.checkpoint.batch < committed.batch or self.checkpoint == committed

    async def follow(self, committed: Checkpoint) -> None:
        """Go on to the ``committed`` checkpoint; a standby does so again and again. Raises as ``run`` does."""
        reporter = _Reporter(committed)
        while self.checkpoint.batch < committed.batch:
            try:
                await self._resume(committed)
                connection = await self._intake.connect()
                page = self._page(self.checkpoint.batch, committed.batch)
                try:
                    while self.checkpoint.batch < committed.batch:
                        values = await page
                        page = self._page(self.checkpoint.batch + len(values), committed.batch)
                        await self._replay(connection, values)
                        self._trouble.over()
                        reporter.report(self.checkpoint)
                finally:
                    connection.close()
                    page.cancel()
                    # Whatever became of it, somebody must have asked.
                    await asyncio.gather(page, return_exceptions=True)
                    await self._line.emptied()
            except (OSError, Refused, redis.RedisError) as error:
                await asyncio.sleep(self._trouble.pause_s(error))

    async def _resume(self, committed: Checkpoint) -> None:
        """Start from the newest snapshot that can be believed, if there is one."""
        if self._looked_for_snapshots:
            return
        resumed = await resume(self._client, self._settings, self._secret, committed)
        self._looked_for_snapshots = True
        if resumed is None:
            return
        header = resumed.header
        of = header.checkpoint
        self._engine, self.slack_days, self._zone_rules = resumed.engine, header.slack_days, header.zone_rules
        self.begun = self.checkpoint = of
        self._link = Link(of.batch, of.digest, of.position, of.next_seq, of.rulebook)

    async def _replay(self, connection: ReadConnection, values: list[bytes]) -> None:
        """Replay the next few batches. While one is decided, the server looks up the events of the next."""
        chain = Chain(self._link)
        headers = [chain.feed_header(value) for value in values]
        stretches = [(header.after, header.through) for header in headers if header.type == "entries"]
        asked = iter(stretches)
        self._ask(connection, next(asked, None))
        for value, header in zip(values, headers, strict=True):
            if header.type == "rulebook":
                await self._line.emptied()
                await self._adopt(value, header)
            else:
                await self._held(connection, header)
                reply = self._intake.take(connection)
                self._ask(connection, next(asked, None))
                await asyncio.sleep(0)
                await self._decide_again(reply, value, header)
            self._link = header.link
            self._replayed += 1
        await self._line.emptied()

    def _page(self, after: int, last: int) -> asyncio.Task[list[bytes]]:
        """Begin to read the next few batches behind batch ``after``."""
        return asyncio.get_running_loop().create_task(self._values(after + 1, last))

    async def _values(self, first: int, last: int) -> list[bytes]:
        if first > last:
            return []
        page: Any = await self._client.xrange(self._keys.ledger, f"{first}-0", f"{last}-0", PAGE_BATCHES)
        if not page:
            raise LedgerError(f"the ledger ends at batch {first - 1}, but the checkpoint is at batch {last}")
        return [fields.get(b"batch", b"") for _, fields in page]

    def _ask(self, connection: ReadConnection, stretch: tuple[StreamId, StreamId] | None) -> None:
        if stretch is not None:
            connection.send([self._intake.read_range(*stretch)])

    async def _held(self, connection: ReadConnection, header: Header) -> None:
        """Wait until the reader holds the events of a batch, all of them."""
        kind, reader = await connection.reply(), self._intake.reader
        if kind == "error":
            raise Refused(reader.error)
        if kind not in ("entries", "nothing"):
            raise StreamError(f"the server answers {kind} where entries were asked for")
        if reader.entries != header.counts.stream_entries:
            after, through = stream_id_text(header.after), stream_id_text(header.through)
            raise StreamTrimmed(
                f"batch {header.batch} consumed {header.counts.stream_entries} entries of the events stream after "
                f"{after} through {through}, and {reader.entries} of them are still there: a restart replays what "
                "came after the snapshot that it starts from, or all of the stream where there is none"
            )

    async def _adopt(self, value: bytes, header: Header) -> None:
        record = decode(value)
        assert isinstance(record, RulebookRecord)
        rulebook = _recorded(record)
        if self._engine is None:
            self._engine = open_engine(self._settings.engine, rulebook, self._secret, record.slack_days, assisted=True)
            self.slack_days = record.slack_days
        else:
            self._limit.check_adoption(self._engine, rulebook)
            await asyncio.to_thread(self._engine.adopt, rulebook)
        self._zone_rules = record.zone_rules
        self.checkpoint = self.checkpoint.after_rulebook(header.digest, record.version, record.sha256)

    async def _decide_again(self, reply: Reader, value: bytes, header: Header) -> None:
        """Decide a batch again, and let the line do so and compare it with the committed one where that pays."""
        engine = cast(Any, self._engine)
        if not self._limit.leaves_room_beside(engine, reply, self._line.most_events):
            await self._line.emptied()
            await self._limit.make_room(engine, reply)
        if reply.size < SMALL_REPLY_BYTES:
            await self._line.emptied()
            _compare(self._intake.decide(engine, reply), value, header)
        else:
            await self._line.room()
            batch = engine.decode_reply(reply)
            self._line.put(
                partial(engine.decide, batch),
                partial(_compare, batch, value, header),
                _nothing,
                self._limit.most_events(reply),
            )
        self.checkpoint = self.checkpoint.after_entries(header.digest, header.through, header.counts)


class _Reporter:
    """Says now and then how far a long recovery has come."""

    def __init__(self, committed: Checkpoint) -> None:
        self._committed = committed
        self._reported_s = time.monotonic()

    def report(self, checkpoint: Checkpoint) -> None:
        if time.monotonic() - self._reported_s >= REPORT_INTERVAL_S:
            self._reported_s = time.monotonic()
            log.info(
                "recovering batch=%d of=%d events=%d of=%d",
                *(checkpoint.batch, self._committed.batch, checkpoint.events, self._committed.events),
            )


def _recorded(record: RulebookRecord) -> Rulebook:
    try:
        return parse(record.text, f"the rulebook of batch {record.batch}")
    except RulebookError as error:
        raise StateMismatch(f"batch {record.batch}: its rulebook is refused here: {error.findings[0]}") from None


def _nothing(_: None) -> None:
    """Do what is left to do for a batch that was compared."""


def _compare(batch: Batch, value: bytes, header: Header) -> None:
    """Raise ``StateMismatch`` where a batch that was decided again is not the committed one."""
    again = batch.encode(BatchHeader(header.batch, header.previous, header.after, header.first_seq))
    if again != value:
        raise StateMismatch(_difference(value, again))


def _difference(committed: bytes, again: bytes) -> str:
    """Return where a batch that was decided again differs from the committed one."""
    first, second = decode(committed), decode(again)
    assert isinstance(first, EntriesBatch)
    assert isinstance(second, EntriesBatch)
    if first.header.counts != second.header.counts:
        return (
            f"batch {first.batch}: was committed with {first.header.counts}, decided again with {second.header.counts}"
        )
    for one, other in zip(first.rows(), second.rows(), strict=True):
        if one != other:
            seq, position, _ = one
            return (
                f"batch {first.batch}, entry {seq} (stream {position.stream_id}, index {position.index}): was "
                f"committed as {entry_line(*one).decode()}, decided again as {entry_line(*other).decode()}"
            )
    return f"batch {first.batch}: was committed with the same entries, but other names or columns"
