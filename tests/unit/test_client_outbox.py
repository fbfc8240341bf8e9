"""The outbox: what makes a batch, what bounds it, and who is told when it fails. No server, no real clock."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from accrual.client.options import MAXIMUM_EVENT_BYTES, Options
from accrual.client.outbox import Batch, BriefLock, Outbox, Receipt, encode
from accrual.errors import DeliveryError, InvalidEvent
from accrual.events import Event, decode_compact, encode_compact, split_batch, validate

LARGEST: dict[str, Any] = {
    "id": "i" * 64,
    "kind": "k" * 32,
    "member": "m" * 64,
    "ts": 2**53 - 1,
    "amount": 10**12,
    "order": "o" * 64,
    "device": "d" * 64,
    "ip": "i" * 64,
    "phone": "p" * 64,
    "city": "c" * 32,
    "lines": [("x" * 32, 10**12 // 64)] * 64,
    "tags": ["t" * 32] * 8,
    "tier": "t" * 32,
    "card_until": 2**53 - 1,
    "immune_until": 2**53 - 1,
}


class Bench:
    """An outbox with a clock that stands still and calls that are counted."""

    def __init__(self, **options: Any) -> None:
        self.now = 100.0
        self.wakes = 0
        self.rooms = 0
        self.outbox = Outbox(Options(**options), self.wake, self.room, lambda: self.now)

    def wake(self) -> None:
        self.wakes += 1

    def room(self) -> None:
        self.rooms += 1

    def offer(self, size_bytes: int = 10) -> tuple[Batch, int]:
        placed = self.outbox.offer(bytes(size_bytes))
        assert placed is not None
        return placed

    def is_full(self, size_bytes: int = 10) -> bool:
        return self.outbox.offer(bytes(size_bytes)) is None


def counts(batches: list[Batch]) -> list[int]:
    return [len(batch.items) for batch in batches]


def test_a_batch_is_full_by_events() -> None:
    bench = Bench(batch_events=3)
    placed = [bench.offer() for _ in range(7)]
    assert [index for _, index in placed] == [0, 1, 2, 0, 1, 2, 0]
    assert counts(bench.outbox.take()) == [3, 3]
    assert bench.wakes == 5  # each batch once when it was opened, and once when it was full


def test_a_batch_is_full_by_bytes() -> None:
    bench = Bench(batch_bytes=MAXIMUM_EVENT_BYTES)
    for size_bytes in (4000, 96, 1, 4096, 50):
        bench.offer(size_bytes)
    assert [batch.size_bytes for batch in bench.outbox.take()] == [4096, 1, 4096]


def test_an_open_batch_lingers() -> None:
    bench = Bench(linger_ms=5)
    assert bench.outbox.due_in_s() is None
    bench.offer()
    assert bench.outbox.take() == []
    assert bench.outbox.due_in_s() == pytest.approx(0.005)
    bench.now += 0.004
    bench.offer()
    assert bench.outbox.due_in_s() == pytest.approx(0.001)
    bench.now += 0.001
    assert counts(bench.outbox.take()) == [2]


def test_a_sealed_or_closed_outbox_does_not_linger() -> None:
    for end in ("seal", "close"):
        bench = Bench()
        bench.offer()
        bench.outbox.seal() if end == "seal" else bench.outbox.close("closed")
        assert counts(bench.outbox.take()) == [1]


def test_a_round_trip_has_a_bound() -> None:
    bench = Bench(batch_events=1, in_flight=4)
    for _ in range(6):
        bench.offer()
    assert [len(bench.outbox.take()) for _ in range(3)] == [4, 2, 0]


def test_what_waits_has_a_bound_in_events() -> None:
    bench = Bench(waiting_events=3, batch_events=2)
    batches = [bench.offer()[0] for _ in range(3)]
    assert bench.is_full()
    bench.outbox.settle([batches[0]])
    assert bench.outbox.waiting_events == 1
    bench.offer()
    bench.offer()
    assert bench.is_full()


def test_what_waits_has_a_bound_in_bytes() -> None:
    bench = Bench(waiting_bytes=MAXIMUM_EVENT_BYTES)
    first, _ = bench.offer(4000)
    assert bench.is_full(97)
    bench.offer(96)
    assert bench.is_full(1)
    bench.outbox.settle([first])
    assert bench.outbox.waiting_bytes == 0
    bench.offer(MAXIMUM_EVENT_BYTES)


def test_a_batch_does_not_linger_for_company_that_finds_no_room() -> None:
    bench = Bench(waiting_events=2, batch_events=10, linger_ms=60_000)
    bench.offer()
    bench.offer()
    wakes = bench.wakes
    assert bench.outbox.take() == []
    assert bench.is_full()
    assert bench.is_full()
    assert bench.wakes == wakes + 1
    assert counts(bench.outbox.take()) == [2]


def test_settling_makes_room_and_calls_whoever_waits() -> None:
    bench = Bench()
    batch, _ = bench.offer()
    calls: list[str] = []
    batch.on_settled(lambda: calls.append("waited"))
    batch.on_settled(forgotten := lambda: calls.append("forgotten"))
    batch.forget(forgotten)
    batch.forget(forgotten)
    bench.outbox.settle([batch])
    batch.on_settled(lambda: calls.append("late"))
    assert calls == ["waited", "late"]
    assert (bench.rooms, bench.outbox.waiting_events, bench.outbox.waiting_bytes) == (1, 0, 0)


def test_a_closed_outbox_takes_nothing_more() -> None:
    bench = Bench()
    bench.outbox.close("first reason")
    bench.outbox.close("second reason")
    with pytest.raises(DeliveryError, match="first reason"):
        bench.outbox.offer(b"x")


def test_a_receipt_says_where() -> None:
    bench = Bench()
    batch, index = bench.offer()
    batch.stream_id = "17-0"
    bench.outbox.settle([batch])
    assert batch.receipt(index) == Receipt("17-0", 0)


def test_a_failure_that_nobody_looked_at_is_raised_once() -> None:
    bench = Bench(batch_events=3)
    placed = [bench.offer() for _ in range(6)]
    bench.outbox.settle([placed[0][0], placed[3][0]], "no luck")
    for batch, index in (placed[0], placed[0], placed[4]):
        with pytest.raises(DeliveryError, match="no luck"):
            batch.receipt(index)
    with pytest.raises(DeliveryError, match="4 events were not delivered: no luck"):
        bench.outbox.raise_unreported()
    bench.outbox.raise_unreported()
    with pytest.raises(DeliveryError):
        placed[1][0].receipt(1)
    bench.outbox.raise_unreported()


def test_failures_that_somebody_looked_at_are_not_raised_again() -> None:
    bench = Bench()
    batch, index = bench.offer()
    bench.outbox.settle([batch], "no luck")
    with pytest.raises(DeliveryError):
        batch.receipt(index)
    bench.outbox.raise_unreported()


@pytest.mark.parametrize("count", [2, 15, 16, 255, 256, 1024])
def test_many_events_are_one_batch_on_the_stream(count: int) -> None:
    bench = Bench(batch_events=1024)
    items = [encode({"id": f"e{number}", "kind": "checkin", "member": "m", "ts": 1}) for number in range(count)]
    for item in items:
        assert bench.outbox.offer(item)
    (batch,) = bench.outbox.seal()
    name, value = batch.fields()
    assert name == "b"
    assert split_batch(value) == items


def test_a_single_event_is_not_wrapped() -> None:
    bench = Bench()
    item = encode({"id": "e", "kind": "checkin", "member": "m", "ts": 1})
    bench.outbox.offer(item)
    (batch,) = bench.outbox.seal()
    assert batch.fields() == ("e", item)


def test_mappings_are_validated_and_events_are_not() -> None:
    fields = {"id": "e", "kind": "order_paid", "member": "m", "ts": 5, "amount": 3, "unknown": object()}
    assert decode_compact(encode(fields)) == validate(fields)
    assert encode(validate(fields)) == encode_compact(validate(fields))
    with pytest.raises(InvalidEvent, match="amount: missing"):
        encode({"id": "e", "kind": "order_paid", "member": "m", "ts": 5})
    assert encode(Event(id="e", kind="order_paid", member="m", ts=5))


@pytest.mark.parametrize(
    "event",
    [
        Event(id="\ud800", kind="k", member="m", ts=1),
        Event(id="i", kind="k", member="m", ts=2**70),
        Event(id=object(), kind="k", member="m", ts=1),  # type: ignore[arg-type]
        Event(id="i" * 5000, kind="k", member="m", ts=1),
        ["i", "k", "m", 1],
        None,
    ],
)
def test_what_cannot_be_an_event_is_refused(event: Any) -> None:
    with pytest.raises(InvalidEvent):
        encode(event)


def test_the_largest_event_fits() -> None:
    assert len(encode(LARGEST)) == 3657 <= MAXIMUM_EVENT_BYTES


def test_the_lock_lets_one_in_at_a_time() -> None:
    lock, inside, most = BriefLock(), 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(2000):
            with lock:
                inside += 1
                most = max(most, inside)
                inside -= 1

    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=enter) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual_s)
    assert (inside, most) == (0, 1)
