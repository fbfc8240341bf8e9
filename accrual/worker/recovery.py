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
from typing import Any, Final

import redis
import redis.asyncio

from accrual.engine import BatchHeader, Engine, Secret, open_engine
from accrual.errors import LedgerError, RulebookError, StateMismatch, StreamError, StreamTrimmed
from accrual.ledger import Chain, EntriesBatch, Header, Link, RulebookRecord, decode, entry_line
from accrual.rulebook import Rulebook, parse
from accrual.settings import Settings
from accrual.stream import Checkpoint, Keys, ReadConnection, Refused, StreamId, stream_id_text
from accrual.worker.intake import Intake
from accrual.worker.snapshots import resume
from accrual.worker.trouble import Trouble

__all__ = ["Recovery"]

log = logging.getLogger("accrual.worker")

PAGE_BATCHES: Final = 8
REPORT_INTERVAL_S: Final = 10.0


class Recovery:
    """Rebuilds the engine of a partition, batch by batch.

    ``checkpoint`` is what the replayed batches add up to, and in the end the server's; ``slack_days`` is how the
    partition's engine was opened at its start.
    """

    def __init__(
        self, client: redis.asyncio.Redis, keys: Keys, intake: Intake, secret: Secret, settings: Settings
    ) -> None:
        self.checkpoint = Checkpoint()
        self.slack_days = 0
        self._client = client
        self._keys = keys
        self._intake = intake
        self._secret = secret
        self._settings = settings
        self._trouble = Trouble("recovery", settings.backoff_limit_ms)
        self._engine: Engine | None = None
        self._link = Link()
        self._zone_rules = ""
        self._looked_for_snapshots = False
        self._replayed = 0

    async def run(self, committed: Checkpoint) -> Engine:
        """Return the engine as it was after the batch of the ``committed`` checkpoint.

        Raises ``StateMismatch`` where a batch comes out differently or the chain does not end there, ``LedgerError``
        where it is broken, ``StreamTrimmed`` where events are missing.
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
        self.checkpoint = of
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
                self._adopt(value, header)
            else:
                await self._held(connection, header)
                self._ask(connection, next(asked, None))
                await asyncio.sleep(0)
                self._decide_again(value, header)
                self._intake.reader.clear()
            self._link = header.link
            self._replayed += 1

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

    def _adopt(self, value: bytes, header: Header) -> None:
        record = decode(value)
        assert isinstance(record, RulebookRecord)
        rulebook = _recorded(record)
        if self._engine is None:
            self._engine = open_engine(self._settings.engine, rulebook, self._secret, record.slack_days, assisted=True)
            self.slack_days = record.slack_days
        else:
            self._engine.adopt(rulebook)
        self._zone_rules = record.zone_rules
        self.checkpoint = self.checkpoint.after_rulebook(header.digest, record.version, record.sha256)

    def _decide_again(self, value: bytes, header: Header) -> None:
        assert self._engine is not None
        batch = self._intake.decide(self._engine)
        again = batch.encode(BatchHeader(header.batch, header.previous, header.after, header.first_seq))
        if again != value:
            raise StateMismatch(_difference(value, again))
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
