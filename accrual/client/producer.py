"""The asyncio producer."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping
from typing import Any, Self

from accrual.client.link import Server
from accrual.client.options import Options
from accrual.client.outbox import Batch, Receipt, encode
from accrual.client.sender import Sender, settled
from accrual.errors import DeliveryError
from accrual.events import Event

__all__ = ["AsyncDelivery", "AsyncProducer"]


class AsyncDelivery:
    """What became of one event: ``await`` it, more than once if you like, for its ``Receipt``."""

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch = batch
        self._index = index

    def done(self) -> bool:
        """Whether the event has been taken, or has failed."""
        return self._batch.settled

    def __await__(self) -> Generator[Any, None, Receipt]:
        if not self._batch.settled:
            yield from settled(self._batch).__await__()
        return self._batch.receipt(self._index)


class AsyncProducer:
    """Sends events to the stream of one partition.

    ::

        async with AsyncProducer("redis://localhost:6379", partition="shanghai") as producer:
            event = {"id": "o-1", "kind": "order_paid", "member": "m-1", "ts": 1794700000000, "amount": 990}
            delivery = await producer.send(event)
            receipt = await delivery        # now, later or never: flush() and close() tell what failed

    Events of one producer reach the stream in the order in which they were sent; docs/PROTOCOL.md says what
    retries may do to that. Sending an event again, with the same id and content, is always safe: it is
    decided once. A ``DeliveryError`` says that the server did not confirm an event, not that the stream does
    not have it.

    Args:
        server: A URL (``redis://``, ``rediss://``, ``unix://``, ``sentinel://``), a ``redis.asyncio.Redis``,
            or a function that returns one. The producer makes a connection of its own from it.
        partition: Whose stream it is.
        options: Everything else; see ``Options``.

    Raises ``UsageError`` for a partition name or a URL that cannot be. Not for several event loops, and not
    to be carried over a ``fork``.
    """

    def __init__(self, server: Server, partition: str, options: Options | None = None) -> None:
        self._room = asyncio.Event()
        self._queue = asyncio.Lock()
        self._news = False
        self._sender = Sender(server, partition, options or Options(), room=self._room.set, wake=self._wake)
        self._outbox = self._sender.outbox

    @property
    def waiting_events(self) -> int:
        """How many events were accepted and are not settled yet."""
        return self._outbox.waiting_events

    async def send(self, event: Event | Mapping[str, Any], timeout_s: float | None = None) -> AsyncDelivery:
        """Accept ``event``, once there is room for it, and return what to await for its receipt.

        Raises ``InvalidEvent`` for a mapping that breaks SPEC section 1, and ``DeliveryError`` where there is
        no room within ``timeout_s`` or the producer is closed. Where ``send`` did not return, nothing was
        accepted.
        """
        item = encode(event)
        placed = None if self._news or self._queue.locked() else self._outbox.offer(item)
        return AsyncDelivery(*(placed or await self._place_in_turn(item, timeout_s)))

    async def deliver(self, event: Event | Mapping[str, Any], timeout_s: float | None = None) -> Receipt:
        """``send`` the event and wait for its receipt. Raises ``DeliveryError`` if it failed."""
        return await (await self.send(event, timeout_s))

    async def flush(self, timeout_s: float | None = None) -> None:
        """Wait until every event accepted so far has been taken or has failed.

        Raises ``DeliveryError`` if any failed whose delivery no one has awaited, or if some still wait after
        ``timeout_s``; those are tried further.
        """
        await self._sender.flush(timeout_s)

    async def close(self, timeout_s: float | None = None) -> None:
        """Deliver what has been accepted, for ``timeout_s`` at most, and let go of the connection.

        What could not be delivered fails, and unless someone has awaited it ``DeliveryError`` says how many.
        """
        await self._sender.close(timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            await self.close()
        except DeliveryError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _wake(self) -> None:
        self._news = True
        self._sender.wake()

    async def _place_in_turn(self, item: bytes, timeout_s: float | None) -> tuple[Batch, int]:
        """Wait for room. One waits for it and the others for their turn, so that events keep their order."""
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._queue.acquire()
            try:
                return await self._place(item, deadline)
            finally:
                self._queue.release()
        except TimeoutError:
            waiting = self.waiting_events
            raise DeliveryError(f"no room within {timeout_s} s: {waiting} events are waiting") from None

    async def _place(self, item: bytes, deadline: float | None) -> tuple[Batch, int]:
        if self._news:
            # A caller who never waits would otherwise keep the sender, and everyone else, from running.
            self._news = False
            await asyncio.sleep(0)
        async with asyncio.timeout_at(deadline):
            while (placed := self._outbox.offer(item)) is None:
                self._room.clear()
                await self._room.wait()
            return placed
