"""The sender: carries batches from the outbox to the stream until they are taken or their time is up."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import ReadOnlyError, RedisError

from accrual.client.link import Command, Link, Refusal, Server, may_pass
from accrual.client.options import Options
from accrual.client.outbox import Batch, Outbox
from accrual.errors import DeliveryError
from accrual.stream.keys import Keys

__all__ = ["Sender", "settled"]

# An event loop's timers may be a millisecond early; what is left of a batch's time then is no use for an attempt.
TIMER_GRAIN_S: Final = 0.002

_log = logging.getLogger("accrual.client")


class Sender:
    """Sends what its outbox holds, several stream entries in one round trip, while the next ones collect.

    It lives in one event loop. ``wake`` is what the outbox calls, ``Sender.wake`` or what leads to it;
    ``room`` is called after batches were settled.
    """

    def __init__(
        self,
        server: Server,
        partition: str,
        options: Options,
        *,
        room: Callable[[], object],
        wake: Callable[[], object],
    ) -> None:
        self.key = Keys(partition).events
        self.outbox = Outbox(options, wake, room)
        self._options = options
        self._link = Link(server)
        confirm_ms = 0 if options.confirm == "memory" else options.confirm_timeout_ms
        self._patience_s = (options.reply_timeout_ms + confirm_ms) / 1000
        self._trouble = ""
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Look at the outbox again; the first call starts the work in the running event loop."""
        self._news.set()
        if self._task is None and self.outbox.waiting_events:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"send to {self.key}")

    async def flush(self, timeout_s: float | None) -> None:
        """Wait until all that was accepted is settled; ``DeliveryError`` for what failed or still waits."""
        batches = self.outbox.seal()
        try:
            async with asyncio.timeout(timeout_s):
                for batch in batches:
                    await settled(batch)
        except TimeoutError:
            count = self.outbox.waiting_events
            raise DeliveryError(f"{count} events are still waiting after {timeout_s} s") from None
        self.outbox.raise_unreported()

    async def close(self, timeout_s: float | None) -> None:
        """Deliver what waits, for ``timeout_s`` at most; ``DeliveryError`` says how many failed."""
        self.outbox.close("the producer is closed")
        # Another thread's event may have been accepted while its call to wake the sender is still on its way.
        self.wake()
        try:
            if self._task is not None:
                await asyncio.wait({self._task}, timeout=timeout_s)
        finally:
            await self._end()
        self.outbox.raise_unreported()

    async def _end(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._link.close()

    async def _run(self) -> None:
        try:
            while True:
                self._news.clear()
                batches = self.outbox.take()
                if batches:
                    await self._deliver(batches)
                elif self.outbox.closed is not None:
                    return
                else:
                    await self._wait_for_news()
        except Exception:  # noqa: BLE001 - told to everyone who waits, by the clause below
            _log.exception("%s: the producer stopped", self.key)
        finally:
            # Whatever ends this task, a cancelled event loop too, must not leave an event waiting for ever.
            self.outbox.close("the producer has stopped")
            self._fail(self.outbox.seal(), "the producer stopped before the stream server had taken it")

    async def _wait_for_news(self) -> None:
        try:
            async with asyncio.timeout(self.outbox.due_in_s()):
                await self._news.wait()
        except TimeoutError:
            pass

    async def _deliver(self, batches: list[Batch]) -> None:
        """Try until all ``batches`` are settled; what the server refused goes before anything later."""
        attempt = 0
        while batches := self._unexpired(batches):
            self._trouble = await self._attempt(batches)
            if not self._trouble:
                return
            batches = [batch for batch in batches if not batch.settled]
            if batches and attempt == 0:
                _log.warning("%s: %s; trying again", self.key, self._trouble)
            # A lasting refusal is not tried again, but the next batches should not run into it at full speed.
            await asyncio.sleep(min(self._pause_s(attempt), self._left_s(batches)))
            attempt += 1

    async def _attempt(self, batches: list[Batch]) -> str:
        """Write and confirm ``batches``, settling those that are done; return what went wrong, or nothing."""
        left_s = self._left_s(batches)
        session = self._link.session
        unwritten = [batch for batch in batches if batch.session != session]
        commands: list[Command] = [("XADD", self.key, "*", *batch.fields()) for batch in unwritten]
        confirm = self._confirm_command()
        if confirm is not None:
            commands.append(confirm)
        try:
            replies = await self._link.exchange(commands, min(self._patience_s, left_s))
        except (RedisError, OSError) as error:
            if isinstance(error, TimeoutError) and left_s < self._patience_s and self._trouble:
                # Cut short by the end of its batches' time, this attempt says less than the one before.
                return self._trouble
            return self._refused(batches, error)
        trouble = ""
        for batch, reply in zip(unwritten, replies, strict=False):
            if isinstance(reply, Refusal):
                trouble = self._refused([batch], reply)
                if isinstance(reply, ReadOnlyError):
                    # The server has become a replica: a new connection may lead to its successor.
                    await self._link.drop()
            else:
                batch.session = session
                batch.stream_id = reply.decode()
        written = [batch for batch in batches if batch.session == session]
        if confirm is not None and not self._confirms(replies[-1]):
            return await self._unconfirmed(written, replies[-1])
        self.outbox.settle(written)
        return trouble

    def _refused(self, batches: list[Batch], error: Exception, what: str = "refused") -> str:
        """Return in words why ``batches`` were not taken; where no further attempt can help, fail them."""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if not may_pass(error):
            self._fail(batches, f"the stream server {what}: {reason}")
        return reason

    def _confirm_command(self) -> Command | None:
        options = self._options
        if options.confirm == "replicas":
            return ("WAIT", options.replicas, options.confirm_timeout_ms)
        if options.confirm == "fsync":
            return ("WAITAOF", 1, 0, options.confirm_timeout_ms)
        return None

    def _confirms(self, reply: Any) -> bool:
        if isinstance(reply, Refusal):
            return False
        return bool(reply >= self._options.replicas if self._options.confirm == "replicas" else reply[0] >= 1)

    async def _unconfirmed(self, written: list[Batch], reply: Any) -> str:
        """Return in words why ``written`` batches are not confirmed; only that will be asked again."""
        if isinstance(reply, Refusal):
            # A server that has become a replica may lose what it had: only its successor's word counts now.
            await self._link.drop()
            return self._refused(written, reply, f"took it but cannot confirm it by {self._options.confirm}")
        return f"no confirmation by {self._options.confirm} within {self._options.confirm_timeout_ms} ms"

    def _unexpired(self, batches: list[Batch]) -> list[Batch]:
        """Fail the batches whose time is up; return the others."""
        now = time.monotonic() + TIMER_GRAIN_S
        expired = [batch for batch in batches if batch.deadline <= now]
        if expired:
            reason = f"the stream server did not take it within {self._options.delivery_timeout_ms} ms"
            self._fail(expired, f"{reason}: {self._trouble}" if self._trouble else reason)
        return [batch for batch in batches if batch.deadline > now]

    def _fail(self, batches: list[Batch], reason: str) -> None:
        count = sum(len(batch.items) for batch in batches)
        if count:
            _log.error("%s: %d events failed: %s", self.key, count, reason)
        self.outbox.settle(batches, reason)

    def _left_s(self, batches: list[Batch]) -> float:
        earliest = min((batch.deadline for batch in batches), default=math.inf)
        return max(0.0, earliest - time.monotonic())

    def _pause_s(self, attempt: int) -> float:
        """Return the pause after failed attempt number ``attempt``, from 0."""
        options = self._options
        longest_ms = min(options.backoff_limit_ms, options.backoff_ms << min(attempt, 20))
        # Many producers lose the same server at once, and must not come back all at once.
        return longest_ms / 1000 * random.uniform(0.5, 1.0)  # noqa: S311 - no one gains by guessing it


async def settled(batch: Batch) -> None:
    """Wait, in the event loop that settles it, until ``batch`` is settled."""
    if batch.settled:
        return
    future = asyncio.get_running_loop().create_future()

    def finish() -> None:
        if not future.done():
            future.set_result(None)

    batch.on_settled(finish)
    try:
        await future
    finally:
        batch.forget(finish)
