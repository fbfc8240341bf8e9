"""The main loop: read, decide, commit. The next entries are asked for before these are decided."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import redis
import redis.asyncio

from accrual.engine import BatchHeader, Engine
from accrual.errors import RulebookError, StreamError
from accrual.ledger import RulebookRecord, digest_of
from accrual.rulebook import Rulebook, parse
from accrual.settings import Settings
from accrual.stream import Commit, Keys, ReadConnection, Refused, StreamId, pending_text, refuse
from accrual.worker.commits import CommitQueue
from accrual.worker.intake import BatchSize, Intake
from accrual.worker.progress import Progress
from accrual.worker.snapshots import Snapshots
from accrual.worker.trouble import Trouble

__all__ = ["Pipeline"]

log = logging.getLogger("accrual.worker")

# How much longer than the server holds a read its answer may take, before the connection is given up.
REPLY_TIMEOUT_S: Final = 10.0
# To hand a smaller batch to another thread takes longer than to digest it.
INLINE_DIGEST_BYTES: Final = 128 * 1024


class Pipeline:
    """The way of the events of one partition through ``engine`` into ``commits``.

    ``pending`` is the SHA-256 (hex) of a rulebook that waits to be adopted, or empty. ``slack_days`` is how the engine
    was opened, which the ledger records with every rulebook.
    """

    def __init__(
        self,
        settings: Settings,
        client: redis.asyncio.Redis,
        keys: Keys,
        intake: Intake,
        engine: Engine,
        slack_days: int,
        commits: CommitQueue,
        snapshots: Snapshots,
        progress: Progress,
    ) -> None:
        self.pending = ""
        self.engine = engine
        self._settings = settings
        self._client = client
        self._keys = keys
        self._intake = intake
        self._slack_days = slack_days
        self._commits = commits
        self._snapshots = snapshots
        self._progress = progress
        self._size = BatchSize(settings)
        self._trouble = Trouble("read connection", settings.backoff_limit_ms)

    async def run(self, end: StreamId | None) -> None:
        """Read, decide and commit, up to ``end`` or for ever.

        It may be cancelled wherever it waits: what is not in ``commits`` by then is still in the stream. The engine is
        of no use afterwards, since it may have decided more than ``commits`` has.
        """
        while True:
            try:
                connection = await self._intake.connect()
                try:
                    await self._read(connection, end)
                    return
                finally:
                    connection.close()
            except (OSError, Refused) as error:
                await asyncio.sleep(self._trouble.pause_s(error))

    async def _read(self, connection: ReadConnection, end: StreamId | None) -> None:
        reader, commits = self._intake.reader, self._commits
        asked = self._ask(connection, commits.tail.position, end)
        while True:
            await self._reply(connection)
            await self._adopt_pending()
            entries, asked_next = reader.entries, 0
            if entries:
                # A full reply means that more is waiting: the server looks it up while this one is decided.
                if entries >= asked:
                    asked_next = self._ask(connection, reader.last, end)
                    await asyncio.sleep(0)
                await commits.room()
                await self._memory()
                await self._decide()
            reader.clear()
            self._snapshots.consider(self.engine, commits)
            if not asked_next:
                if end is not None and entries < asked:
                    return
                if 0 < entries < asked:
                    await asyncio.sleep(self._settings.linger_ms / 1000)
                asked_next = self._ask(connection, commits.tail.position, end)
            asked = asked_next

    def _ask(self, connection: ReadConnection, position: StreamId, end: StreamId | None) -> int:
        """Ask for what comes after ``position``; return how many entries at the most."""
        entries = self._size.entries
        if end is None:
            connection.send([self._intake.read_after(position, entries, self._settings.block_ms)])
        else:
            connection.send([self._intake.read_range(position, end, entries)])
        return entries

    async def _reply(self, connection: ReadConnection) -> None:
        """Wait until the reader holds a reply with entries, or without."""
        reader = self._intake.reader
        async with asyncio.timeout(self._settings.block_ms / 1000 + REPLY_TIMEOUT_S):
            kind = await connection.reply()
        if kind == "error":
            raise Refused(reader.error)
        if kind == "status":
            raise StreamError(f"the server answers {reader.value!r} where entries were asked for")
        self._trouble.over()

    async def _memory(self) -> None:
        """Wait until the state may grow by what the reply at hand can need.

        Nothing that a limit still counts is ever given up for room: the input waits on the stream instead.
        """
        limit = self._settings.memory_limit_bytes
        if not limit or self._fits(limit):
            return
        ms = self._intake.reader.first[0]
        self.engine.reclaim(self.engine.rulebook.calendar.day(ms))
        if self._fits(limit):
            return
        log.error(
            "memory limit reached: memory_bytes=%d limit_bytes=%d: no more input is taken; give it more "
            "(memory_limit_bytes) and start again",
            *(self.engine.memory_bytes, limit),
        )
        self._progress.trouble = "MEMORY LIMIT REACHED, no input is taken"
        # Nothing but a restart with another limit, or the end, ends this; heartbeats and commits go on meanwhile.
        await asyncio.Event().wait()

    def _fits(self, limit_bytes: int) -> bool:
        events = max(self._settings.batch_events, self._intake.reader.entries)
        return self.engine.memory_bytes + self.engine.headroom_bytes(events) <= limit_bytes

    async def _decide(self) -> None:
        """Decide the reply at hand and send the batch off."""
        before = self._commits.tail
        batch = self._intake.decide(self.engine)
        value, rejected = batch.encode(self._header()), tuple(batch.rejected)
        # From here on the reader may take in the next reply, which it does while another thread digests this batch.
        digest = await asyncio.to_thread(digest_of, value) if len(value) > INLINE_DIGEST_BYTES else digest_of(value)
        after = before.after_entries(digest, batch.through, batch.counts)
        self._commits.append(Commit(before, after, value, rejected))
        self._progress.decided(batch)
        self._size.learn(batch)

    def _header(self) -> BatchHeader:
        tail = self._commits.tail
        return BatchHeader(tail.batch + 1, tail.digest, tail.position, tail.next_seq)

    async def _adopt_pending(self) -> None:
        """Adopt the rulebook that waits, between two batches; or refuse it with a reason, which changes nothing."""
        if not self.pending:
            return
        self.pending = ""
        try:
            sha256, text = await pending_text(self._client, self._keys)
            if not sha256 or sha256 == self._commits.tail.rulebook_sha256.hex():
                return
            try:
                self.adopt(self._acceptable(text))
            except RulebookError as error:
                log.warning("rulebook refused: %s", "; ".join(error.findings))
                await refuse(self._client, self._keys, self._commits.nonce, sha256, "\n".join(error.findings))
        except (OSError, redis.RedisError) as error:
            # The next heartbeat finds it again.
            log.warning("the pending rulebook cannot be read: %s", error)

    def _acceptable(self, text: str) -> Rulebook:
        rulebook = parse(text)
        in_force = self.engine.rulebook.version
        if rulebook.version <= in_force:
            raise RulebookError([f"version {rulebook.version} is not above {in_force}, which is in force"])
        return rulebook

    def adopt(self, rulebook: Rulebook) -> None:
        """Decide by ``rulebook`` from the next event on."""
        self.engine.adopt(rulebook)
        self.record()

    def record(self) -> None:
        """Write into the ledger which rulebook decides from here on."""
        rulebook, before = self.engine.rulebook, self._commits.tail
        value = RulebookRecord.of(self._header(), rulebook, self._slack_days).encode()
        after = before.after_rulebook(digest_of(value), rulebook.version, rulebook.digest)
        self._commits.append(Commit(before, after, value, adopts=rulebook.digest))
        log.info("adopted rulebook=%d name=%s batch=%d", rulebook.version, rulebook.name, after.batch)
