"""Images of the engine's state: one at a time, given up where the records move, refused where they do not fit."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest

from accrual.engine import Secret, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.errors import SnapshotError, StateMismatch
from accrual.events import Event, encode_compact
from accrual.rulebook import parse

SECRET = Secret(bytes(range(16)))
NOON_MS = 1_794_715_200_000
RULEBOOK = """
[programme]
name = "image"
version = 1
timezone = "Asia/Shanghai"

[[earn]]
kind = "checkin"
points = 5
streak_days = 2
streak_bonus = 7

[[limit]]
id = "device-day"
key = "device"
measure = "events"
window = "day"
max = 3
action = "hold"
"""
MORE = """
[[limit]]
id = "device-minute"
key = "device"
measure = "events"
window = "60s"
max = 3
action = "hold"
"""


def entries(first: int, count: int) -> list[StreamEntry]:
    events = [
        Event(f"e{number}", "checkin", f"member-with-a-long-name-{number % 50}", NOON_MS, device=f"d{number % 30}")
        for number in range(first, first + count)
    ]
    return [
        StreamEntry(NOON_MS, number, ((b"e", encode_compact(event)),)) for number, event in enumerate(events, first)
    ]


def engine_with(count: int) -> FastEngine:
    engine = FastEngine(parse(RULEBOOK), SECRET, 1, 3)
    engine.decide_entries(entries(1, count))
    return engine


def image_of(engine: FastEngine) -> tuple[dict[str, Any], bytes]:
    image = engine.image()
    pieces: list[bytes] = []
    assert image.write(lambda piece: pieces.append(bytes(piece)))
    image.close()
    return image.description, b"".join(pieces)


def ignore(_piece: memoryview) -> None:
    """Take a piece of an image and do nothing with it."""


def test_there_is_one_image_at_a_time() -> None:
    engine = engine_with(10)
    image = engine.image()
    with pytest.raises(ValueError, match="taken already"):
        engine.image()
    image.close()
    image.close()
    engine.image().close()


def test_what_an_image_has_kept_is_given_back_once() -> None:
    engine = engine_with(100)
    image = engine.image()
    engine.decide_entries(entries(1, 100))
    engine.decide_entries(entries(101, 100))
    image.close()
    image.discard()
    image.discard()
    assert not image.write(ignore)
    description, data = image_of(engine)
    again = FastEngine(parse(RULEBOOK), SECRET, 1, 3)
    again.restore(description, BytesIO(data))
    assert again.sizes == engine.sizes


def test_an_image_is_given_up_where_the_records_move() -> None:
    engine = engine_with(100)
    image = engine.image()
    engine.adopt(parse(RULEBOOK.replace("version = 1", "version = 2")))
    assert image.write(ignore)
    image.close()
    image = engine.image()
    engine.adopt(parse(RULEBOOK.replace("version = 1", "version = 3") + MORE))
    assert not image.write(ignore)


def test_an_image_keeps_what_former_rulebooks_left() -> None:
    engine = engine_with(100)
    later = parse(
        RULEBOOK.replace("version = 1", "version = 2").replace("streak_days = 2\nstreak_bonus = 7\n", "") + MORE
    )
    engine.adopt(later)
    engine.decide_entries(entries(101, 100))
    description, data = image_of(engine)
    again = FastEngine(later, SECRET, 1, 3)
    again.restore(description, BytesIO(data))
    assert again.sizes == engine.sizes
    last = entries(201, 100)
    assert list(again.decide_entries(last).decisions()) == list(engine.decide_entries(last).decisions())


@pytest.mark.parametrize(("rulebook", "slack_days"), [(RULEBOOK + MORE, 1), (RULEBOOK, 31)])
def test_an_image_of_another_engine_is_refused(rulebook: str, slack_days: int) -> None:
    description, data = image_of(engine_with(100))
    other = FastEngine(parse(rulebook), SECRET, slack_days, 3)
    with pytest.raises(StateMismatch):
        other.restore(description, BytesIO(data))


def test_an_image_is_checked_before_anything_is_made_of_it() -> None:
    description, data = image_of(engine_with(100))
    stride, count = description["shape"]["tables"][0]
    # So many records that look alike are in the way of any index.
    damaged = BytesIO(b"A" * (stride * count) + data[stride * count :])

    def check() -> None:
        assert damaged.read() == b""
        raise SnapshotError("it is damaged")

    with pytest.raises(SnapshotError, match="it is damaged"):
        FastEngine(parse(RULEBOOK), SECRET, 1, 3).restore(description, damaged, check)
    damaged.seek(0)
    with pytest.raises(MemoryError):
        FastEngine(parse(RULEBOOK), SECRET, 1, 3).restore(description, damaged)


def test_memory_is_counted_and_used_again() -> None:
    engine = engine_with(100)
    before = engine.memory_bytes
    assert before > 0
    assert engine.headroom_bytes(1000) > engine.headroom_bytes(10) > 0
    day = parse(RULEBOOK).calendar.day(NOON_MS)
    engine.reclaim(day + 1)
    assert engine.sizes["devices"] == 30
    engine.reclaim(day + 10)
    assert engine.sizes["devices"] == engine.sizes["ids"] == 0
    assert engine.sizes["members"] == 50
    engine.decide_entries(entries(1001, 100))
    assert engine.memory_bytes == before
