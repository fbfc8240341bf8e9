"""What the state of the compiled engine takes, and the most by which it can grow: a promise that a limit relies on."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from accrual.engine import ReferenceEngine, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.events import encode_compact, validate
from accrual.rulebook import Rulebook, parse
from accrual.stream import PlainReplyReader
from fastpath.resp import ReplyReader
from replies import reply_of
from workers import NOON_MS, RULEBOOK, SECRET, order

DAY_MS = 86_400_000
PER_KEY = """
[[limit]]
id = "{key}-points"
key = "{key}"
measure = "points"
window = "day"
max = 300
action = "clamp"
"""
ALL_KEYS = RULEBOOK + "".join(PER_KEY.format(key=key) for key in ("device", "ip", "phone"))
PER_DAY = 4000
MORE = """
[[limit]]
id = "{key}-hour-{version}"
key = "{key}"
measure = "points"
window = "1h"
max = 300
action = "hold"
"""


def with_more(version: int, *keys: str) -> Rulebook:
    """Return a rulebook under which the records of ``keys`` are larger."""
    text = ALL_KEYS.replace("version = 1", f"version = {version}")
    return parse(text + "".join(MORE.format(key=key, version=version) for key in keys))


def strangers(day: int, number: int, count: int, rng: random.Random) -> StreamEntry:
    """Return one entry of events that have nothing in common with others: every table gets a record of each."""
    ms = NOON_MS + day * DAY_MS + number
    events = []
    for _ in range(count):
        name = f"{rng.getrandbits(64):016x}"
        member = f"member-{name}" if rng.random() < 0.5 else name[:12]
        events.append(order(0, id=name, member=member, ts=ms, device=name, ip=name, phone=name))
    packed = [msgspec.Raw(encode_compact(validate(event))) for event in events]
    return StreamEntry(ms, 0, ((b"b", msgspec.msgpack.encode(packed)),))


def received(entries: Sequence[StreamEntry]) -> ReplyReader:
    reader = ReplyReader()
    assert reader.feed(reply_of(entries))
    return reader


@pytest.mark.parametrize("segment_shift", [4, 16])
def test_the_state_never_grows_by_more_than_was_promised(segment_shift: int) -> None:
    rng = random.Random(segment_shift)
    rulebook = parse(ALL_KEYS)
    engine, reference = FastEngine(rulebook, SECRET, 1, segment_shift), ReferenceEngine(rulebook, SECRET, 1)
    image = None
    for number in range(60 if segment_shift == 16 else 30):
        if image is None and number % 7 == 3:
            before, promised = engine.memory_bytes, engine.headroom_bytes(0, imaging=True)
            image = engine.image()
            assert before < engine.memory_bytes <= before + promised
        elif image is not None and number % 7 == 6:
            image.close()
            image.discard()
            image = None
        entries = [
            strangers(number // 6, number * 100 + place, 64, rng)
            for place in range(rng.randrange(1, 12 if segment_shift == 16 else 5))
        ]
        reader = received(entries)
        before, promised = engine.memory_bytes, engine.headroom_bytes(reader.most_events)
        batch = engine.decide_reply(reader)
        assert batch.counts.events == reader.most_events == 64 * len(entries)
        assert engine.memory_bytes - before <= promised
        # What was dropped now and then changes no decision.
        if number % 10 == 9:
            engine.reclaim(rulebook.calendar.day(NOON_MS + number // 6 * DAY_MS))
            image = None
        if segment_shift == 4:
            assert list(batch.decisions()) == list(reference.decide_entries(entries).decisions())


def test_the_same_decisions_take_the_same_memory_whatever_was_brought_in_ahead() -> None:
    """A restart repeats a run under the same limit: what a thread has done by then must not matter."""
    alone, assisted = FastEngine(parse(ALL_KEYS), SECRET, 1), FastEngine(parse(ALL_KEYS), SECRET, 1)
    assisted.start_assistant()
    rng = random.Random(5)
    for number in range(20):
        entries = [strangers(0, number * 100 + place, 64, rng) for place in range(8)]
        for engine in (alone, assisted):
            engine.decide_entries(entries)
        assisted.prepare()
        assert alone.memory_bytes == assisted.memory_bytes
        assert alone.headroom_bytes(1000) == assisted.headroom_bytes(1000)


def day_of_regulars(day: int) -> list[StreamEntry]:
    """Return a day's orders at a constant rate, of the same members each day, a tenth of them with a new device."""
    entries = []
    for first in range(day * PER_DAY, (day + 1) * PER_DAY, 100):
        ms = NOON_MS + first * DAY_MS // PER_DAY
        events = []
        for number in range(first, first + 100):
            key = str(number if number % 10 == 0 else number % 700)
            ts = ms - DAY_MS if number % 20 == 5 else ms
            events.append([str(number), "order_paid", str(number % 500), ts, 100, None, key, key, key])
        entries.append(StreamEntry(ms, 0, ((b"b", msgspec.msgpack.encode(events)),)))
    return entries


@pytest.mark.parametrize(("reclaims", "settled_day"), [(True, 5), (False, 15)])
def test_an_event_costs_the_same_however_long_the_stream_is(reclaims: bool, settled_day: int) -> None:
    """What is dropped makes room for what comes, whether a memory limit asks for it or a segment that is full.

    Such a segment is split unless a quarter of it has expired, so without a limit the tables take longer to settle, and
    are a little larger then.
    """
    engine, days = FastEngine(parse(ALL_KEYS), SECRET, 1, 10), []
    for day in range(30):
        if reclaims:
            engine.reclaim(engine.rulebook.calendar.day(NOON_MS + day * DAY_MS))
        batch = engine.decide_reply(received(day_of_regulars(day)))
        assert batch.counts.events == PER_DAY
        days.append((engine.memory_bytes, engine.sizes, engine.lines_searched))
    memory_bytes, sizes, lines = days[settled_day]
    assert sizes["ids"] > 3 * PER_DAY
    assert sizes["members"] == 500
    for later_bytes, later_sizes, later_lines in days[-5:]:
        assert later_bytes < 1.03 * memory_bytes
        assert sum(later_sizes.values()) < (1.01 if reclaims else 1.1) * sum(sizes.values())
        # A search for a key takes a line, and hardly ever a second one.
        for table in ("ids", "members", "devices", "ips", "phones"):
            assert later_lines[table] <= 1.03 * later_sizes[table]
        assert sum(later_lines.values()) / sum(later_sizes.values()) < 1.01 * sum(lines.values()) / sum(sizes.values())


def test_an_image_that_takes_memory_gives_it_back() -> None:
    rng = random.Random(3)
    engine = FastEngine(parse(ALL_KEYS), SECRET, 1, 5)
    entries = [strangers(0, number, 64, rng) for number in range(40)]
    engine.decide_entries(entries)
    before = engine.memory_bytes
    image = engine.image()
    begun = engine.memory_bytes
    again = [StreamEntry(NOON_MS + 1000, 0, ((b"e", encode_compact(validate(order(1)))),))]
    engine.decide_entries(again)
    image.close()
    assert engine.memory_bytes >= begun > before
    image.discard()
    assert before <= engine.memory_bytes < begun
    # To drop what has expired would mean to save it first, so an image ends where memory is short.
    image = engine.image()
    engine.reclaim(engine.rulebook.calendar.day(NOON_MS + 10 * DAY_MS))
    assert engine.sizes["devices"] == 0
    assert not image.write(lambda _: None)
    assert engine.memory_bytes < begun


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [
        (b"e", b"\x00" * 90, 1),
        (b"e", b"", 1),
        (b"x", b"\x9f" * 90, 1),
        (b"b", b"\x95" + b"\x94" * 80, 5),
        (b"b", b"\x95" + b"\xc0" * 15, 2),
        (b"b", b"\xdc\x01\x02" + b"\x94" * 8000, 258),
        (b"b", b"\xdd\x00\x01\x00\x00" + b"\xc0" * 65536, 65541 // 8),
        (b"b", b"\xdd\xff\xff\xff\xff", 1),
        (b"b", b"\xc1", 1),
        (b"j", b'{"id":"a","kind":"b","member":"c","ts":1}', 2),
        (b"j", b"[" + b",".join([b'{"id":"a","kind":"b","member":"c","ts":1}'] * 50) + b"]", 53),
    ],
)
def test_how_many_events_entries_can_hold(name: bytes, value: bytes, most: int) -> None:
    entry = StreamEntry(NOON_MS, 1, ((name, value),))
    assert received([entry]).most_events == most
    assert received([entry] * 3).most_events == 3 * most
    assert ReplyReader().most_events == PlainReplyReader().most_events == 0


def test_the_smallest_events_are_as_small_as_is_counted_on() -> None:
    smallest = msgspec.msgpack.encode([["a", "b", "c", 1]] * 10)
    assert received([StreamEntry(NOON_MS, 1, ((b"b", smallest),))]).most_events == 10
    text = msgspec.json.encode([{"id": "a", "kind": "b", "member": "c", "ts": 1}] * 10)
    assert received([StreamEntry(NOON_MS, 1, ((b"j", text),))]).most_events >= 10


def test_what_an_adoption_takes_is_known_before() -> None:
    rng = random.Random(2)
    engine = FastEngine(parse(ALL_KEYS), SECRET, 1, 5)
    engine.decide_entries([strangers(0, number, 64, rng) for number in range(40)])
    assert engine.adoption_bytes(parse(ALL_KEYS.replace("version = 1", "version = 2"))) == 0
    larger = with_more(2, "device")
    before, more = engine.memory_bytes, engine.adoption_bytes(larger)
    engine.adopt(larger)
    # Old and new records are there at once for a moment, and the new ones are larger.
    grown = engine.memory_bytes - before
    assert 0 < grown < more
    assert more - grown > 64 * 40 * 24
    assert ReferenceEngine(larger).adoption_bytes(larger) == 0


def test_others_go_on_while_records_move_or_are_dropped() -> None:
    """A lease must be renewed meanwhile, so neither may hold what the interpreter has only one of."""
    engine = FastEngine(parse(ALL_KEYS), SECRET, 1)
    moved, dropped = [], []
    for attempt in range(3):
        decide_one_of_each(engine, attempt, 1 << 16)
        larger = with_more(attempt + 2, "member", "device", "ip")
        moved.append(longest_silence(threading.Thread(target=engine.adopt, args=(larger,))))
        day = engine.rulebook.calendar.day(NOON_MS + (10 * attempt + 10) * DAY_MS)
        dropped.append(longest_silence(threading.Thread(target=engine.reclaim, args=(day,))))
        assert engine.sizes["ids"] == engine.sizes["devices"] == 0
    # On a busy machine one of them may have to wait for a processor, but not all.
    assert min(moved) < 0.5
    assert min(dropped) < 0.5


def decide_one_of_each(engine: FastEngine, attempt: int, count: int) -> None:
    """Decide so many events of as many members, devices and addresses."""
    ms = NOON_MS + 10 * attempt * DAY_MS
    events = [
        [f"{attempt}-{n:x}", "order_paid", f"{n:x}", ms, 100, None, f"{n:x}", f"{n:x}", f"{n:x}"] for n in range(count)
    ]
    engine.decide_entries(
        [StreamEntry(ms, n, ((b"b", msgspec.msgpack.encode(events[n : n + 4096])),)) for n in range(0, count, 4096)]
    )
    assert engine.sizes["ids"] == engine.sizes["devices"] == count


def longest_silence(work: threading.Thread) -> float:
    """Return for which part of the time of ``work``, at a time, this thread could not go on."""
    started_s = seen_s = time.perf_counter()
    longest_s = 0.0
    work.start()
    while work.is_alive():
        now_s = time.perf_counter()
        longest_s = max(longest_s, now_s - seen_s)
        seen_s = now_s
    return longest_s / (time.perf_counter() - started_s)


def advised_kib() -> int:
    """Return the resident memory, in KiB, for which this process has asked for huge pages."""
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"))
    return sum(
        int(re.findall(r"(?m)^Rss: +(\d+) kB", mapping)[0])
        for mapping in mappings
        if re.search(r"(?m)^VmFlags:.* hg\b", mapping)
    )


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no transparent huge pages"
)
def test_tables_lie_where_the_system_may_grant_huge_pages() -> None:
    before = advised_kib()
    engine = FastEngine(parse(ALL_KEYS), SECRET, 1)
    engine.decide_entries([strangers(0, 0, PER_DAY, random.Random(1))])
    # A record of any table takes a cache line and more.
    assert advised_kib() - before >= sum(size * 64 for size in engine.sizes.values()) // 1024
