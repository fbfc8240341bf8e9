"""Threads that decode, decide and encode side by side change nothing but the time it takes."""

from __future__ import annotations

import gc
import random
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from accrual.engine import BatchHeader, Secret, StreamEntry
from accrual.engine.fast import KEPT_BATCHES, FastBatch, FastEngine
from accrual.events import encode_compact, validate
from accrual.rulebook import parse
from fastpath.resp import ReplyReader
from replies import reply_of
from workers import NOON_MS, RULEBOOK, compact, order

SECRET = Secret(bytes(16))
ENTRIES = 2000
POISON = b"\xc1"


def entry(number: int, rng: random.Random) -> StreamEntry:
    """Return an entry of any encoding, good, repeated, or bad."""
    events = [order(rng.randrange(1, 3 * ENTRIES)) for _ in range(rng.choice([1, 1, 1, 7]))]
    compact = [encode_compact(validate(event)) for event in events]
    fields = rng.choice(
        [
            (b"e", compact[0]),
            (b"b", msgspec.msgpack.encode([msgspec.Raw(item) for item in compact])),
            (b"b", b"\x93" + compact[0] + POISON),
            (b"j", msgspec.json.encode(events)),
            (b"j", b"[1, {"),
            (b"e", POISON),
        ]
    )
    return StreamEntry(NOON_MS + number, number, (fields,))


def replies(count: int) -> list[list[StreamEntry]]:
    rng = random.Random(7)
    return [[entry(batch * ENTRIES + number, rng) for number in range(ENTRIES)] for batch in range(count)]


def open_fast() -> FastEngine:
    return FastEngine(parse(RULEBOOK), SECRET)


def received(entries: list[StreamEntry]) -> ReplyReader:
    reader = ReplyReader()
    assert reader.feed(reply_of(entries))
    return reader


def header(number: int) -> BatchHeader:
    return BatchHeader(number, bytes(32), (0, 0), 1)


def test_same_bytes_in_one_thread_and_in_three() -> None:
    alone, shared = open_fast(), open_fast()
    shared.start_assistant()
    expected = []
    for number, entries in enumerate(replies(8), start=1):
        batch = alone.decide_reply(received(entries))
        expected.append((batch.counts, batch.outcomes, batch.rejected, batch.encode(header(number))))
    actual: list[Any] = []
    with ThreadPoolExecutor(1) as deciding, ThreadPoolExecutor(1) as encoding:

        def finish(number: int, batch: FastBatch, decided: Future[None]) -> None:
            decided.result()
            actual.append((batch.counts, batch.outcomes, batch.rejected, batch.encode(header(number))))

        under_way: deque[Future[None]] = deque()
        for number, entries in enumerate(replies(8), start=1):
            if len(under_way) == KEPT_BATCHES - 1:
                under_way.popleft().result()
            batch = shared.decode_reply(received(entries))
            under_way.append(encoding.submit(finish, number, batch, deciding.submit(shared.decide, batch)))
        for future in under_way:
            future.result()
    assert actual == expected


def test_a_batch_is_gone_when_its_memory_is_used_again() -> None:
    engine = open_fast()
    entries = replies(1)[0]
    first = engine.decide_reply(received(entries))
    engine.decide_reply(received(entries))
    with pytest.raises(RuntimeError, match="gone on"):
        first.encode(header(1))
    decoded = [engine.decode_reply(received(entries)) for _ in range(KEPT_BATCHES + 1)]
    with pytest.raises(RuntimeError, match="gone on"):
        engine.decide(decoded[0])
    engine.decide(decoded[1])


def test_a_failure_half_way_leaves_an_engine_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise KeyError("multiplier")

    monkeypatch.setattr("accrual.engine.fast.combined_multiplier", fail)
    engine = open_fast()
    entries = [StreamEntry(NOON_MS, 1, ((b"e", compact(order(1))),))]
    with pytest.raises(KeyError):
        engine.decide_reply(received(entries))
    with pytest.raises(ValueError, match="half-way"):
        engine.decide_reply(received(entries))


def test_the_thread_ends_with_the_engine() -> None:
    before = set(threading.enumerate())
    engine = open_fast()
    engine.start_assistant()
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} == {"memory"}
    del engine
    gc.collect()
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()
