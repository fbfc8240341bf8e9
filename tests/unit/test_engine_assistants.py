"""The thread that decodes ahead of the decisions changes nothing but the time they take."""

from __future__ import annotations

import gc
import random
import threading
from typing import Any

import msgspec
import pytest

from accrual.engine import BatchHeader, Secret, StreamEntry
from accrual.engine.fast import FastEngine
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


def test_same_bytes_with_and_without() -> None:
    alone, assisted = open_fast(), open_fast()
    assisted.start_assistants()
    for number, entries in enumerate(replies(6), start=1):
        header = BatchHeader(number, bytes(32), (0, 0), 1)
        expected = alone.decide_entries(entries)
        reader = received(entries)
        actual = assisted.decide_reply(reader)
        assert actual.counts == expected.counts
        assert actual.rejected == expected.rejected
        assert actual.encode(header) == expected.encode(header)


def test_a_failure_of_the_thread_is_one_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    deciding, told = threading.get_ident(), threading.Event()

    def fail(value: bytes) -> Any:
        if threading.get_ident() != deciding:
            raise KeyError(value)
        return [(value, None)]

    def hear(raised: threading.ExceptHookArgs) -> None:
        heard.append(raised.exc_type)
        told.set()

    heard: list[Any] = []
    monkeypatch.setattr("accrual.engine.fast.split_json", fail)
    monkeypatch.setattr(threading, "excepthook", hear)
    # The one that decides may come first to all of the JSON; but it has other things to do, so not every time.
    orders = [StreamEntry(NOON_MS, number, ((b"e", compact(order(number))),)) for number in range(1, 1001)]
    entries = orders + [StreamEntry(NOON_MS + 1, number, ((b"j", b"[1]"),)) for number in range(1000)]
    for _ in range(100):
        engine = open_fast()
        engine.start_assistants()
        try:
            engine.decide_reply(received(entries))
        except RuntimeError:
            break
    else:
        pytest.fail("the thread never had a turn")
    assert told.wait(5)
    assert heard == [KeyError]
    with pytest.raises(ValueError, match="half-way"):
        engine.decide_reply(received(entries))


def test_the_threads_end_with_the_engine() -> None:
    before = set(threading.enumerate())
    engine = open_fast()
    engine.start_assistants()
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} == {"memory", "decoding"}
    del engine
    gc.collect()
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()
