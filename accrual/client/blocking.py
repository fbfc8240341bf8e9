"""The producer for programs without an event loop: the same sender, in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Self

import uvloop

from accrual.client.link import Server
from accrual.client.options import Options
from accrual.client.outbox import Batch, Receipt, encode
from accrual.client.sender import Sender
from accrual.errors import DeliveryError, UsageError
from accrual.events import Event

__all__ = ["Delivery", "Producer"]


class Delivery:
    """What became of one event, for any thread to ask."""

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch = batch
        self._index = index

    def done(self) -> bool:
        """Whether the event has been taken, or has failed."""
        return self._batch.settled

    def result(self, timeout_s: float | None = None) -> Receipt:
        """Return the receipt or raise its ``DeliveryError``; ``TimeoutError`` if there is neither in time."""
        if not _wait_until_settled(self._batch, timeout_s):
            raise TimeoutError(f"the stream server has not taken the event within {timeout_s} s")
        return self._batch.receipt(self._index)

    def future(self) -> Future[Receipt]:
        """Return a future of the receipt, for callbacks, ``concurrent.futures.wait`` and the like.

        Few callers need one, and the batch that events share is much cheaper than a future for each of them.
        Its callbacks run in the producer's own thread: they must not wait, and so not send.
        """
        future: Future[Receipt] = Future()
        future.set_running_or_notify_cancel()

        def finish() -> None:
            try:
                receipt = self._batch.receipt(self._index)
            except DeliveryError as error:
                future.set_exception(error)
            else:
                future.set_result(receipt)

        self._batch.on_settled(finish)
        return future


class Producer:
    """Sends events to the stream of one partition, from any number of threads.

    ::

        with Producer("redis://localhost:6379", partition="shanghai") as producer:
            event = {"id": "o-1", "kind": "order_paid", "member": "m-1", "ts": 1794700000000, "amount": 990}
            delivery = producer.send(event)
            receipt = delivery.result()     # now, later or never: flush() and close() tell what failed

    What ``AsyncProducer`` says of events and arguments holds here; a ``Redis`` given must not be in use in
    another event loop, so a function that makes one is better. The events of one thread keep their order. A
    producer that is still open when the program ends is closed then. It does not survive a ``fork``: make one
    in each process (the child's copy refuses to send, and leaves what waits to its parent).
    """

    def __init__(self, server: Server, partition: str, options: Options | None = None) -> None:
        self._room = threading.Condition()
        self._sender = Sender(server, partition, options or Options(), room=self._notify_room, wake=self._wake_soon)
        self._outbox = self._sender.outbox
        self._process_id = os.getpid()
        self._closing = threading.Lock()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="accrual-producer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def waiting_events(self) -> int:
        """How many events were accepted and are not settled yet."""
        return self._outbox.waiting_events

    def send(self, event: Event | Mapping[str, Any], timeout_s: float | None = None) -> Delivery:
        """Accept ``event``, once there is room for it, and return what to ask for its receipt.

        Raises ``InvalidEvent`` for a mapping that breaks SPEC section 1, ``DeliveryError`` where there is no
        room within ``timeout_s`` or the producer is closed, and ``UsageError`` in a forked child.
        """
        if os.getpid() != self._process_id:
            raise UsageError("this producer belongs to the parent process: make one after the fork")
        item = encode(event)
        return Delivery(*(self._outbox.offer(item) or self._wait_for_room(item, timeout_s)))

    def deliver(self, event: Event | Mapping[str, Any], timeout_s: float | None = None) -> Receipt:
        """``send`` the event and wait for its receipt. Raises ``DeliveryError`` if it failed."""
        return self.send(event, timeout_s).result()

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until every event accepted so far has been taken or has failed.

        Raises ``DeliveryError`` if any failed whose result no one has asked for, or if some still wait after
        ``timeout_s``; those are tried further.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        for batch in self._outbox.seal():
            left_s = None if timeout_s is None else max(0.0, deadline - time.monotonic())
            if not _wait_until_settled(batch, left_s):
                raise DeliveryError(f"{self.waiting_events} events are still waiting after {timeout_s} s")
        self._outbox.raise_unreported()

    def close(self, timeout_s: float | None = None) -> None:
        """Deliver what has been accepted, for ``timeout_s`` at most, and end the thread.

        What could not be delivered fails, and unless someone has asked for it, ``DeliveryError`` says how
        many.
        """
        if os.getpid() != self._process_id:
            return
        with self._closing:
            if self._loop.is_closed():
                return
            atexit.unregister(self.close)
            closing = asyncio.run_coroutine_threadsafe(self._sender.close(timeout_s), self._loop)
            try:
                closing.result()
            finally:
                if not closing.done():
                    # Interrupted, by Ctrl-C say: give up what waits, so that no thread waits for it for ever.
                    with contextlib.suppress(DeliveryError):
                        asyncio.run_coroutine_threadsafe(self._sender.close(0.0), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except DeliveryError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _wake_soon(self) -> None:
        # Once the loop is closed everything is settled, also what a racing thread wakes the sender for.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._sender.wake)

    def _notify_room(self) -> None:
        with self._room:
            self._room.notify_all()

    def _wait_for_room(self, item: bytes, timeout_s: float | None) -> tuple[Batch, int]:
        with self._room:
            placed = self._room.wait_for(lambda: self._outbox.offer(item), timeout_s)
        if placed is None:
            raise DeliveryError(f"no room within {timeout_s} s: {self.waiting_events} events are waiting")
        return placed


def _wait_until_settled(batch: Batch, timeout_s: float | None) -> bool:
    if batch.settled:
        return True
    settled = threading.Event()
    batch.on_settled(settled.set)
    if settled.wait(timeout_s):
        return True
    batch.forget(settled.set)
    return False
