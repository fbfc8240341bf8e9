"""The main loop: read, decide, commit.

The next entries are asked for before these are decided; and where many are waiting, one batch is decoded while the one
before is decided and another one encoded.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any, Final, cast

import redis
import redis.asyncio

from accrual.engine import Batch, BatchHeader, Engine
from accrual.errors import MemoryLimitReached, RulebookError, StreamError
from accrual.ledger import RulebookRecord, digest_of
from accrual.rulebook import Rulebook, parse
from accrual.settings import Settings
from accrual.stream import (
    Checkpoint,
    Commit,
    Keys,
    ReadConnection,
    Reader,
    Refused,
    StreamId,
    pending_text,
    refuse,
)
from accrual.worker.commits import CommitQueue
from accrual.worker.intake import SMALL_REPLY_BYTES, BatchSize, Intake
from accrual.worker.line import Line
from accrual.worker.memory import MemoryLimit
from accrual.worker.progress import Progress
from accrual.worker.snapshots import Snapshots
from accrual.worker.trouble import Trouble

__all__ = ["Pipeline"]

log = logging.getLogger("accrual.worker")

# To explain and encode more of them takes too long for the loop, which has a lease to renew.
INLINE_LETTERS: Final = 500


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
        self._limit = MemoryLimit(settings.memory_limit_bytes)
        self._delayed = b""
        self._trouble = Trouble("read connection", settings.backoff_limit_ms)
        self._line = Line()
        # What the last batch that was encoded will leave; the line's, while something is in it.
        self._ahead = commits.tail

    async def run(self, end: StreamId | None) -> None:
        """Read, decide and commit, up to ``end`` or for ever.

        It may be cancelled wherever it waits: what is not in ``commits`` by then is still in the stream. The engine is
        of no use afterwards, since it may have decided more than ``commits`` has.
        """
        try:
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
        finally:
            # What was decided is still to be committed.
            await self._line.emptied()
            self._line.close()

    async def _read(self, connection: ReadConnection, end: StreamId | None) -> None:
        await self._line.emptied()
        position = self._commits.tail.position
        asked = self._ask(connection, position, end)
        while True:
            await self._reply(connection)
            await self._adopt_pending()
            reply = self._intake.take(connection)
            entries, asked_next = reply.entries, 0
            if entries:
                position = reply.last
                # A full reply means that more is waiting: the server looks it up while this one is decided.
                if entries >= asked:
                    asked_next = self._ask(connection, position, end)
                    await asyncio.sleep(0)
                await self._commits.room()
                await self._memory(reply)
                await self._decide(reply)
            else:
                # A reply is kept for so many others only, and nobody else asks what became of the batches.
                await self._line.emptied()
            if self._snapshots.are_due:
                await self._line.emptied()
                self._snapshots.consider(self.engine, self._commits)
            if not asked_next:
                if end is not None and entries < asked:
                    return
                if 0 < entries < asked:
                    await asyncio.sleep(self._settings.linger_ms / 1000)
                asked_next = self._ask(connection, position, end)
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
        kind = await connection.reply()
        if kind == "error":
            raise Refused(reader.error)
        if kind == "status":
            raise StreamError(f"the server answers {reader.value!r} where entries were asked for")
        self._trouble.over()

    async def _memory(self, reply: Reader) -> None:
        """Go on where the state may grow by what the reply can need; otherwise the input waits."""
        if self._limit.leaves_room_beside(self.engine, reply, self._line.most_events):
            return
        await self._line.emptied()
        try:
            await self._limit.make_room(self.engine, reply)
        except MemoryLimitReached as error:
            await self._progress.stand_still(error)

    async def _decide(self, reply: Reader) -> None:
        """Decide a reply, or let the line do so, and send the batch off as soon as it is encoded."""
        self._line.settle()
        if not self._line.is_empty or reply.size >= SMALL_REPLY_BYTES:
            await self._line.room()
            engine = cast(Any, self.engine)
            batch = engine.decode_reply(reply)
            self._line.put(
                partial(engine.decide, batch),
                partial(self._finished, batch),
                partial(self._append, batch),
                self._limit.most_events(reply),
            )
            return
        batch = self._intake.decide(self.engine, reply)
        if batch.counts.dead_letters <= INLINE_LETTERS:
            self._append(batch, self._finished(batch))
        else:
            self._line.put(_nothing, partial(self._finished, batch), partial(self._append, batch), 0)
            await self._line.emptied()

    def _finished(self, batch: Batch) -> Commit:
        """Encode a batch behind the one that was encoded last, with all that takes long done."""
        before = self._ahead
        value = batch.encode(header_after(before))
        self._ahead = before.after_entries(digest_of(value), batch.through, batch.counts)
        commit = Commit(before, self._ahead, value, tuple(batch.rejected))
        _ = commit.encoded_letters
        return commit

    def _append(self, batch: Batch, commit: Commit) -> None:
        self._commits.append(commit)
        self._progress.decided(batch)
        self._size.learn(batch)

    async def _adopt_pending(self) -> None:
        """Adopt the rulebook that waits, between two batches; or refuse it with a reason, which changes nothing."""
        if not self.pending:
            return
        await self._line.emptied()
        self.pending = ""
        try:
            sha256, text = await pending_text(self._client, self._keys)
            if not sha256 or sha256 == self._commits.tail.rulebook_sha256.hex():
                return
            try:
                await self.adopt(self._acceptable(text))
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

    async def adopt(self, rulebook: Rulebook) -> None:
        """Decide by ``rulebook`` from the next event on; not yet, where there is no memory to move the records."""
        try:
            self._limit.check_adoption(self.engine, rulebook)
        except MemoryLimitReached as error:
            # It stays pending, or is given again at the next start, and the work goes on without it.
            if self._delayed != rulebook.digest:
                log.warning("%s", error)
                self._delayed = rulebook.digest
            return
        # To move millions of records takes longer than a lease may go without being renewed.
        await asyncio.to_thread(self.engine.adopt, rulebook)
        self.record()

    def record(self) -> None:
        """Write into the ledger which rulebook decides from here on."""
        rulebook, before = self.engine.rulebook, self._commits.tail
        value = RulebookRecord.of(header_after(before), rulebook, self._slack_days).encode()
        after = before.after_rulebook(digest_of(value), rulebook.version, rulebook.digest)
        self._commits.append(Commit(before, after, value, adopts=rulebook.digest))
        self._ahead = after
        log.info("adopted rulebook=%d name=%s batch=%d", rulebook.version, rulebook.name, after.batch)


def header_after(tail: Checkpoint) -> BatchHeader:
    """Return the header of the batch that comes after ``tail``."""
    return BatchHeader(tail.batch + 1, tail.digest, tail.position, tail.next_seq)


def _nothing() -> None:
    """Do what is left to decide of a batch that was decided."""
