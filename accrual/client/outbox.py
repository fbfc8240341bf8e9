"""Events on their way out: collected into batches, bounded, settled together. No I/O; thread-safe."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from accrual.client.options import MAXIMUM_EVENT_BYTES, Options
from accrual.errors import DeliveryError, InvalidEvent
from accrual.events import Event, encode_compact, validate

__all__ = ["Batch", "Outbox", "Receipt", "encode"]

_NOT_WRITTEN: Final = 0


class Receipt(msgspec.Struct, frozen=True):
    """Where an event is on the stream: the ID of its entry, and its index within that entry's batch."""

    stream_id: str
    index: int


def encode(event: Event | Mapping[str, Any]) -> bytes:
    """Return the compact form of ``event``.

    A mapping is validated. An ``Event`` is taken as valid, as its type says: one that is not becomes a dead
    letter. Raises ``InvalidEvent``.
    """
    if type(event) is not Event:
        if not isinstance(event, Mapping):
            raise InvalidEvent(f"an event must be an Event or a mapping, not {type(event).__name__}")
        event = validate(event)
    try:
        item = encode_compact(event)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidEvent(f"does not encode: {error}") from None
    if len(item) > MAXIMUM_EVENT_BYTES:
        raise InvalidEvent(f"has {len(item)} bytes, more than any valid event")
    return item


class Batch:
    """The events of one stream entry, and what became of them. Its events share it: it is their future.

    ``session`` says on which of the link's connections it was last written, ``stream_id`` where it is.
    """

    __slots__ = (
        "_callbacks",
        "_outbox",
        "_reported",
        "count",
        "deadline",
        "due",
        "epoch",
        "error",
        "items",
        "session",
        "settled",
        "size_bytes",
        "stream_id",
    )

    def __init__(self, outbox: Outbox, due: float, deadline: float) -> None:
        self.items: list[bytes] = []
        self.size_bytes = 0
        self.count = 0
        self.due = due
        self.deadline = deadline
        self.session = _NOT_WRITTEN
        self.stream_id = ""
        self.error: str | None = None
        self.settled = False
        self.epoch = 0
        self._outbox = outbox
        self._reported: set[int] = set()
        self._callbacks: list[Callable[[], object]] = []

    def fields(self) -> tuple[str, bytes]:
        """Return the field of the stream entry: its name and value (SPEC section 7)."""
        if len(self.items) == 1:
            return "e", self.items[0]
        count = len(self.items)
        header = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
        return "b", b"".join((header, *self.items))

    def on_settled(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` once the batch is settled, in the thread that settles it, or else now."""
        with self._outbox.lock:
            if not self.settled:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], object]) -> None:
        """Take back what was asked of ``on_settled``, if it has not happened yet."""
        with self._outbox.lock, contextlib.suppress(ValueError):
            self._callbacks.remove(callback)

    def settle(self) -> list[Callable[[], object]]:
        """Mark the batch as settled and return what is to be called now. The lock is held."""
        self.settled = True
        self.count = len(self.items)
        self.items = []
        callbacks, self._callbacks = self._callbacks, []
        return callbacks

    def receipt(self, index: int) -> Receipt:
        """Return the receipt of the event at ``index`` of a settled batch, or raise its ``DeliveryError``."""
        if self.error is not None:
            with self._outbox.lock:
                if index not in self._reported:
                    self._reported.add(index)
                    self._outbox.told(self)
            raise DeliveryError(self.error)
        return Receipt(self.stream_id, index)


class BriefLock:
    """A lock for a microsecond's work: a thread that finds it taken steps back instead of queueing for it.

    A queue would make a convoy. The next in line is given the lock while it still waits for the interpreter,
    so everyone else finds it taken, and every event costs a change of threads: a quarter of the rate is left.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        lock = threading.Lock()
        self._acquire = lock.acquire
        self._release = lock.release

    def __enter__(self) -> None:
        while not self._acquire(blocking=False):
            time.sleep(0)

    def __exit__(self, *_: object) -> None:
        self._release()


class Outbox:
    """Batches from their first event to their settlement, oldest first.

    ``wake`` is called when the sender has a reason to look: a batch was opened, or filled. ``room`` is called
    after batches were settled, because there may be room again. Both are called without the lock, in whatever
    thread uses the outbox.
    """

    def __init__(
        self,
        options: Options,
        wake: Callable[[], object],
        room: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self.waiting_events = 0
        self.waiting_bytes = 0
        self.closed: str | None = None
        self._wake = wake
        self._room = room
        self._clock = clock
        self.lock = BriefLock()
        self._open: Batch | None = None
        self._full: deque[Batch] = deque()
        self._unsettled: dict[Batch, None] = {}
        self._news = False
        self._cramped = False
        self._unreported_events = 0
        self._last_error = ""
        self._epoch = 0

    def offer(self, item: bytes) -> tuple[Batch, int] | None:
        """Take in an encoded event: return its batch and its index there, or ``None`` where there is no room.

        Raises ``DeliveryError`` if the outbox is closed.
        """
        with self.lock:
            if self.closed is not None:
                raise DeliveryError(self.closed)
            placed = self._place(item) if self._has_room_for(item) else None
            news = (placed is None and not self._cramped) or self._news
            self._cramped = placed is None
            self._news = False
        if news:
            self._wake()
        return placed

    def take(self) -> list[Batch]:
        """Return the batches of the next round trip, oldest first: full ones, then the open one if due."""
        with self.lock:
            if self._open is not None and self._is_due(self._open):
                self._seal()
            count = min(len(self._full), self.options.in_flight)
            return [self._full.popleft() for _ in range(count)]

    def due_in_s(self) -> float | None:
        """Return how long the open batch may still wait for company; ``None`` where there is none."""
        batch = self._open
        return None if batch is None else max(0.0, batch.due - self._clock())

    def seal(self) -> list[Batch]:
        """Make the open batch wait no longer for company; return all that is unsettled."""
        with self.lock:
            self._seal()
            batches = list(self._unsettled)
        self._wake()
        return batches

    def settle(self, batches: Iterable[Batch], error: str | None = None) -> None:
        """Settle ``batches``: taken by the server, or failed for the reason that ``error`` gives."""
        callbacks: list[Callable[[], object]] = []
        with self.lock:
            for batch in batches:
                batch.error = error
                callbacks += batch.settle()
                self.waiting_events -= batch.count
                self.waiting_bytes -= batch.size_bytes
                del self._unsettled[batch]
                if error is not None:
                    batch.epoch = self._epoch
                    self._unreported_events += batch.count
                    self._last_error = error
        for callback in callbacks:
            callback()
        self._room()

    def close(self, reason: str) -> None:
        """Take in nothing more; what is there stays to be delivered."""
        with self.lock:
            if self.closed is None:
                self.closed = reason
        self._wake()
        self._room()

    def told(self, batch: Batch) -> None:
        """Note that someone has been told of the failure of one event of ``batch``. The lock is held."""
        if batch.epoch == self._epoch:
            self._unreported_events -= 1

    def raise_unreported(self) -> None:
        """Raise ``DeliveryError`` if events have failed that no one has been told of; now someone has."""
        with self.lock:
            count, self._unreported_events = self._unreported_events, 0
            self._epoch += 1
        if count:
            raise DeliveryError(f"{count} events were not delivered: {self._last_error}")

    def _has_room_for(self, item: bytes) -> bool:
        options = self.options
        return self.waiting_events < options.waiting_events and self.waiting_bytes + len(item) <= options.waiting_bytes

    def _place(self, item: bytes) -> tuple[Batch, int]:
        batch = self._open
        if batch is not None and batch.size_bytes + len(item) > self.options.batch_bytes:
            self._seal()
            batch = None
        if batch is None:
            batch = self._open_batch()
            self._news = True
        index = len(batch.items)
        batch.items.append(item)
        batch.size_bytes += len(item)
        self.waiting_events += 1
        self.waiting_bytes += len(item)
        if index + 1 == self.options.batch_events:
            self._seal()
            self._news = True
        return batch, index

    def _is_due(self, batch: Batch) -> bool:
        # Company that there is no room for is not worth waiting for.
        pointless = self.closed is not None or (self._cramped and not self._full)
        return pointless or batch.due <= self._clock()

    def _open_batch(self) -> Batch:
        now = self._clock()
        due = now + self.options.linger_ms / 1000
        batch = Batch(self, due, now + self.options.delivery_timeout_ms / 1000)
        self._open = batch
        self._unsettled[batch] = None
        return batch

    def _seal(self) -> None:
        if self._open is not None:
            self._full.append(self._open)
            self._open = None
