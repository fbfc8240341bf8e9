"""Business days at their edges: both engines keep the totals of every day that an event can still be of."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from accrual.engine import ReferenceEngine, Secret, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.errors import RulebookError
from accrual.events import Event, encode_compact
from accrual.rulebook import parse

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
