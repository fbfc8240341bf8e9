"""Batches on their way to the server: decided, encoded, in order, until the server has said that they landed.

Several are in flight at once; each names its predecessor, so none can land out of order. What the server refuses stays
here and is sent again, from the first that has not landed. After a lost connection the checkpoint tells which have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import NamedTuple, NoReturn

from accrual.errors import StateMismatch
from accrual.settings import Settings
from accrual.stream import (
    COMMIT,
    Answer,
    Checkpoint,
    CommandConnection,
    Commit,
    Keys,
    Refused,
    StreamServer,
    lost_to,
)
from accrual.worker.progress import Progress
from accrual.worker.trouble import Trouble

__all__ = ["CommitQueue"]

log = logging.getLogger("accrual.worker")


class Waiting(NamedTuple):
    """A batch that has not landed, and when it was decided (seconds of the monotonic clock)."""

    commit: Commit
    since_s: float


class CommitQueue:
    """The batches of one worker between decision and landing.

    ``landed`` is the last checkpoint that the server has acknowledged, ``tail`` the one that the last batch appended
    will leave; ``nonce`` is the owner's. ``run`` must be running for anything to land.
    """

    def __init__(
        self,
        server: StreamServer,
        keys: Keys,
        nonce: str,
        checkpoint: Checkpoint,
        settings: Settings,
        progress: Progress,
    ) -> None:
        self.landed = checkpoint
        self.tail = checkpoint
        self.nonce = nonce
        self._server = server
        self._keys = keys
        self._limit_batches = settings.in_flight_batches
        self._limit_bytes = settings.in_flight_bytes
        self._patience_s = settings.reply_timeout_ms / 1000
        self._progress = progress
        self._away = Trouble("commit connection", settings.backoff_limit_ms)
        self._refused = Trouble("commit", settings.backoff_limit_ms)
        self._queue: deque[Waiting] = deque()
        self._bytes = 0
        self._connection: CommandConnection | None = None
        # How many at the head of the queue were sent on this connection; the numbers of those whose answer is to come.
        self._sent = 0
        self._unanswered: deque[int] = deque()
        # After a refusal only the first batch is sent until it lands; the others would be refused with it.
        self._probing = False
        self._moved = asyncio.Event()

    def append(self, commit: Commit) -> None:
        """Take a batch whose ``before`` is ``tail``, and send it."""
        self._queue.append(Waiting(commit, time.monotonic()))
        self._bytes += commit.size_bytes
        self.tail = commit.after
        self._send()

    async def room(self) -> None:
        """Wait until another batch may be decided."""
        while len(self._queue) >= self._limit_batches or self._bytes >= self._limit_bytes:
            await self._next_move()

    async def settled(self) -> None:
        """Wait until every batch has landed."""
        while self._queue:
            await self._next_move()

    async def reached(self, batch: int) -> None:
        """Wait until ``batch`` has landed."""
        while self.landed.batch < batch:
            await self._next_move()

    @property
    def waiting(self) -> int:
        """How many batches have not landed yet."""
        return len(self._queue)

    async def run(self) -> NoReturn:
        """Keep a connection and land what is appended. Raises what cannot be mended."""
        while True:
            try:
                connection = await self._server.connect(lambda: CommandConnection(self._patience_s))
                try:
                    await self._resume(connection)
                    self._away.over()
                    await self._serve(connection)
                finally:
                    self._connection = None
                    connection.close()
            except (OSError, Refused) as error:
                await asyncio.sleep(self._away.pause_s(error))

    async def _next_move(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    async def _resume(self, connection: CommandConnection) -> None:
        """Find out what has landed, and send the rest."""
        await connection.call("SCRIPT", "LOAD", COMMIT.text)
        values = await connection.call("HGETALL", self._keys.checkpoint)
        fields = dict(zip(values[::2], values[1::2], strict=True))
        if fields and fields.get(b"owner") != self.nonce.encode():
            raise lost_to(fields.get(b"owner_name", b""))
        self._settle(Checkpoint.from_hash(fields))
        self._connection = connection
        self._sent = 0
        self._unanswered.clear()
        self._send()

    async def _serve(self, connection: CommandConnection) -> NoReturn:
        """Read the answers in order, for as long as the connection lasts."""
        refusal: Refused | None = None
        while True:
            if not self._unanswered:
                if refusal is not None:
                    await self._after_refusal(connection, refusal)
                    refusal = None
                self._send()
            try:
                # What is appended is sent at once; so there is an answer to wait for, or a lost connection to notice.
                reply = await connection.reply()
            except Refused as error:
                # Those behind it find the checkpoint elsewhere; the first refusal is the one to act on.
                refusal = refusal or error
                self._probing = True
                self._unanswered.popleft()
            else:
                self._answered(Answer.of(reply), refusal)

    def _send(self) -> None:
        """Send what was not sent yet, as far as it makes sense now."""
        if self._connection is None or (self._probing and self._unanswered):
            return
        limit = 1 if self._probing else len(self._queue)
        while self._sent < limit and self._sent < len(self._queue):
            try:
                self._connection.send(self._queue[self._sent].commit.command(self._keys, self.nonce))
            except ConnectionError:
                # Whoever waits for the answers hears of it too, and mends it.
                return
            self._unanswered.append(self._queue[self._sent].commit.after.batch)
            self._sent += 1

    def _answered(self, answer: Answer, refusal: Refused | None) -> None:
        """Act on the answer to the oldest unanswered batch; ``refusal`` is that of one before it, if there was one."""
        batch = self._unanswered.popleft()
        self._progress.stream_size(answer.added, answer.removed)
        if answer.committed:
            self._probing = False
            self._refused.over()
        self._settle(Checkpoint(batch=answer.batch, digest=answer.digest))
        if refusal is None and self.landed.batch < batch:
            raise StateMismatch(f"the server's checkpoint does not agree with its own batch {answer.batch}")

    async def _after_refusal(self, connection: CommandConnection, refusal: Refused) -> None:
        """Wait before the refused batches are sent again, or give up where that would not help."""
        self._sent = 0
        if refusal.code == "NOSCRIPT":
            await connection.call("SCRIPT", "LOAD", COMMIT.text)
            return
        # Nothing is sent meanwhile.
        self._connection = None
        await asyncio.sleep(self._refused.pause_s(refusal))
        self._connection = connection
        if refusal.code == "READONLY":
            # The server is a replica now; the next connection may find the new master.
            raise ConnectionError(str(refusal))

    def _settle(self, checkpoint: Checkpoint) -> None:
        """Take off the queue what the server's ``checkpoint`` (of which batch and digest count) says has landed."""
        place = self.landed.batch
        if checkpoint.batch < place:
            raise StateMismatch(
                f"the server is at batch {checkpoint.batch}, but it had acknowledged batch {place}: it has lost "
                "commits (a failover, or a restart from an older file); start again to continue from what it still has"
            )
        while self._queue and self._queue[0].commit.after.batch <= checkpoint.batch:
            self._land(self._queue.popleft())
        if self.landed.batch != checkpoint.batch or self.landed.digest != checkpoint.digest:
            raise StateMismatch(f"the server's batch {checkpoint.batch} is not the one that this worker decided")

    def _land(self, waiting: Waiting) -> None:
        self.landed = waiting.commit.after
        self._bytes -= waiting.commit.size_bytes
        self._sent = max(0, self._sent - 1)
        self._progress.landed(waiting.commit, time.monotonic() - waiting.since_s)
        self._moved.set()
