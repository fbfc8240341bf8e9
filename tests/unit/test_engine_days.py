"""Business days at their edges: both engines keep what is counted of every day that an event can still be of."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from accrual.cli import replay
from accrual.engine import OFFLINE_SLACK_DAYS, Engine, ReferenceEngine, Secret, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.errors import RulebookError
from accrual.events import MAXIMUM_TIME_MS, Event, encode_compact
from accrual.rulebook import parse
from accrual.rulebook.calendar import DAY_MS
from workers import NOON_MS

SECRET = Secret(bytes(range(16)))
RULEBOOK = """
[programme]
name = "days"
version = 1
timezone = "America/St_Johns"

[[earn]]
kind = "checkin"
points = 1
max_per_day = 2

[[limit]]
id = "device-day"
key = "device"
measure = "points"
window = "day"
max = 3
action = "hold"
"""


def entry(number: int, at: datetime, ts: datetime, member: str) -> StreamEntry:
    event = Event(f"e{number}", "checkin", member, int(ts.timestamp() * 1000), device="d1")
    return StreamEntry(int(at.timestamp() * 1000), number, ((b"e", encode_compact(event)),))


def test_a_day_that_comes_again_finds_its_totals() -> None:
    # On 7 November 2010 the clocks of St. John's went back at 00:01, to 23:01 of the day before: for an hour, events of
    # the 5th are not late again, although arrivals have been of the 7th.
    friday, saturday = datetime(2010, 11, 5, 12, tzinfo=UTC), datetime(2010, 11, 6, 12, tzinfo=UTC)
    before, first = saturday, datetime(2010, 11, 7, 2, 30, 30, tzinfo=UTC)
    again = datetime(2010, 11, 7, 2, 40, tzinfo=UTC)
    moments = [(before, friday), (before, friday), (before, saturday), (first, first), (first, saturday)]
    moments += [(again, friday), (again, first), (again, saturday), (again, friday), (again, again)]
    entries = [entry(number, at, ts, f"m{number % 2}") for number, (at, ts) in enumerate(moments, start=1)]
    rulebook = parse(RULEBOOK)
    reference, fast = ReferenceEngine(rulebook, SECRET, 1), FastEngine(rulebook, SECRET, 1, 3)
    decided = [list(engine.decide_entries(entries).decisions()) for engine in (reference, fast)]
    assert fast.sizes["device_days"] > 0
    assert decided[0] == decided[1]
    days = {decision.day for _, decision in decided[1] if hasattr(decision, "day")}
    assert len(days) == 3
    outcomes = [getattr(decision, "outcome", None) for _, decision in decided[1]]
    assert "held" in outcomes


@pytest.mark.parametrize("engine", [ReferenceEngine, FastEngine])
def test_a_programme_keeps_its_time_zone(engine: type[ReferenceEngine | FastEngine]) -> None:
    rulebook = parse(RULEBOOK)
    running = engine(rulebook, SECRET)
    with pytest.raises(RulebookError, match="Asia/Shanghai"):
        running.adopt(parse(RULEBOOK.replace("America/St_Johns", "Asia/Shanghai")))
    assert running.rulebook == rulebook
    running.adopt(msgspec.structs.replace(rulebook, version=2))


EVERYTHING = """
[programme]
name = "everything that is counted"
version = 1
timezone = "Asia/Shanghai"

[[earn]]
kind = "vote"
points = 1

[[earn]]
kind = "checkin"
points = 5
max_per_day = 1
""" + "".join(
    f"""
[[limit]]
id = "{measure}-{window}-{key}"
key = "{key}"
measure = "{measure}"
window = "{window}"
max = 1
action = "hold"
kinds = ["vote"]
"""
    for measure in ("events", "members", "points")
    for window in ("1h", "day")
    for key in ("member", "device")
)


def line(event_id: str, ms: int, kind: str = "vote", member: str = "m1", device: str = "d1") -> bytes:
    event = {"id": event_id, "kind": kind, "member": member, "ts": ms, "device": device}
    return msgspec.json.encode(event)


def outcomes(lines: list[bytes], engine: Engine | None = None) -> list[dict[str, Any]]:
    """Return what both engines say of the lines of a file, and look into ``engine`` afterwards."""
    rulebook = parse(EVERYTHING)
    said = list(replay.outcome_lines(engine or FastEngine(rulebook, SECRET, OFFLINE_SLACK_DAYS, 3), lines))
    assert said == list(replay.outcome_lines(ReferenceEngine(rulebook, SECRET, OFFLINE_SLACK_DAYS), lines))
    return [msgspec.json.decode(text) for text in said]


@pytest.mark.parametrize("jump_ms", [32 * DAY_MS, 33 * DAY_MS, 34 * DAY_MS, 35 * DAY_MS, 4000 * DAY_MS, None])
@pytest.mark.parametrize("strangers", [1, 100])
def test_an_arrival_far_ahead_takes_nothing_from_those_around_it(jump_ms: int | None, strangers: int) -> None:
    far_ms = MAXIMUM_TIME_MS - 1000 if jump_ms is None else NOON_MS + jump_ms
    before = [line("a", NOON_MS), line("b", NOON_MS, "checkin"), line("c", NOON_MS - DAY_MS, "checkin")]
    between = [line(f"x{i}", far_ms + i, ("vote", "dance")[i % 2], f"x{i}", f"x{i}") for i in range(strangers)]
    # Other days of the same member and device, for which the days before are put aside.
    between += [line(f"y{day}", NOON_MS + day * DAY_MS) for day in (-2, 2, 3)]
    after = [line("a", NOON_MS), line("a", NOON_MS + 1), line("d", NOON_MS, "checkin")]
    after += [line("e", NOON_MS - DAY_MS, "checkin"), line("f", NOON_MS + 1), line("g", NOON_MS + 2, member="m2")]
    same, other, *later = outcomes([*before, *between, *after])[-6:]
    assert (same["outcome"], other["reason"]) == ("duplicate", "id_conflict")
    # What comes behind the window of its key counts in the window's oldest part.
    by_day = ["events-day-device", "points-day-device"]
    sliding = ["events-1h-device", "points-1h-device"]
    by_member = [name.replace("device", "member") for name in (*by_day, *sliding)]
    assert [sorted(outcome["reasons"]) for outcome in later] == [
        ["max_per_day"],
        ["max_per_day"],
        sorted([*by_day, *sliding, *by_member]),
        sorted([*by_day, *sliding, "members-day-device"]),
    ]


def test_a_file_of_any_length_is_replayed_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "BATCH_LINES", 20)
    monkeypatch.setattr(replay, "RECLAIM_BATCHES", 2)
    lines = []
    for number in range(1000):
        # Two events a day, each told twice; now and then one that is far from all others.
        event, day = number // 2, number // 4
        ms = {7: 1, 113: MAXIMUM_TIME_MS}.get(number % 200, NOON_MS + day * DAY_MS)
        lines.append(line(f"e{event}", ms, member=f"m{event % 3}", device=f"d{event}"))
    engine = FastEngine(parse(EVERYTHING), SECRET, OFFLINE_SLACK_DAYS, 3)
    said = outcomes(lines, engine)
    assert sum(outcome["outcome"] == "duplicate" for outcome in said) == 490
    assert all(size < 150 for size in engine.sizes.values()), engine.sizes
