"""Late events: decided as they would have been on time, where limits have only windows of a business day."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.engine import Entry, ReferenceEngine
from accrual.engine.late import LateEngine
from accrual.events import Event, validate
from accrual.rulebook import Limit, Rulebook, parse
from books import DAY_MS, at

RULEBOOK = """\
[programme]
name = "late"
version = 1
timezone = "Asia/Shanghai"
stacking = "add"

[[earn]]
kind = "order_paid"
points_per_yuan = "1"
category_rates = { fresh = "2.5" }
min_amount_fen = 200

[[earn]]
kind = "checkin"
points = 5
max_per_day = 2
streak_days = 3
streak_bonus = 50

[[earn]]
kind = "group_opened"
points = 50
once = true

[[campaign]]
id = "gold"
multiplier = "1.5"
tiers = ["gold"]
kinds = ["order_paid", "checkin"]

[[campaign]]
id = "evening"
multiplier = "2"
hours = "18:00-02:00"

[[limit]]
id = "cap"
key = "member"
measure = "points"
window = "day"
max = 60
action = "clamp"

[[limit]]
id = "device-cap"
key = "device"
measure = "points"
window = "day"
max = 90
action = "hold"

[[limit]]
id = "device-events"
key = "device"
measure = "events"
window = "day"
max = 4
action = "reject"
kinds = ["order_paid"]

[[limit]]
id = "ip-members"
key = "ip"
measure = "members"
window = "day"
max = 2
action = "freeze"
"""

BURST = """
[[limit]]
id = "burst"
key = "member"
measure = "events"
window = "60s"
max = 1
action = "reject"
"""

MEMBERS = st.sampled_from(["m1", "m2", "m3", "会员"])


@st.composite
def events(draw: st.DrawFn) -> list[Event]:
    """Return events of three days, in any order."""
    drawn = []
    for number in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["order_paid", "order_paid", "checkin", "group_opened"]))
        fields: dict[str, Any] = {
            "id": f"e{number}",
            "kind": kind,
            "member": draw(MEMBERS),
            "ts": at(draw(st.integers(0, 2)), draw(st.integers(0, 900))),
            "device": draw(st.sampled_from(["", "d1", "d2"])),
            "ip": draw(st.sampled_from(["", "i1"])),
        }
        if kind == "order_paid":
            fields["amount"] = draw(st.sampled_from([0, 199, 200, 1234, 5000]))
            fields["lines"] = draw(st.sampled_from([[], [["fresh", fields["amount"]]]]))
        drawn.append(validate(fields))
    return drawn


def told(rulebook: Rulebook, entries: list[tuple[Event, Entry]]) -> LateEngine:
    """Return an engine that was told of ``entries``, as far as they are booked, the way the book tells it."""
    engine = LateEngine(rulebook)
    totals: defaultdict[tuple[Limit, str, int], int] = defaultdict(int)
    seen: defaultdict[tuple[Limit, str, int], set[str]] = defaultdict(set)
    for event, entry in entries:
        counted = entry.outcome in ("granted", "held")
        if counted:
            member = engine.member(event.member)
            member.daily[event.kind, entry.day] += 1
            member.once.add(event.kind)
            engine.tell_streak(event.member, event.kind, entry.day)
        for limit in engine.limits:
            key = getattr(event, limit.key)
            if not key or entry.cause or not limit.applies_to(event.kind) or not (counted or limit.measure != "points"):
                continue
            if limit.measure == "members":
                seen[limit, key, entry.day].add(event.member)
            else:
                totals[limit, key, entry.day] += entry.points if limit.measure == "points" else 1
    for (limit, key, day), total in totals.items():
        engine.tell_total(limit, key, day, total)
    for (limit, key, day), members in seen.items():
        engine.tell_members(limit, key, day, sorted(members))
    return engine


def is_trip(rulebook: Rulebook, entry: Entry) -> bool:
    clamps = {limit.id for limit in rulebook.limits if limit.action == "clamp"}
    return any(limit not in clamps for limit, _ in entry.evidence)


@pytest.mark.parametrize("text", [RULEBOOK, RULEBOOK + BURST], ids=["day windows", "and a sliding one"])
@given(history=events(), booked=st.integers(0, 14))
def test_decided_as_on_time(text: str, history: list[Event], booked: int) -> None:
    """Some are booked on time and the others come late: an engine that sees them all on time says the same."""
    plain = parse(RULEBOOK)
    on_time = ReferenceEngine(plain)
    on_time.members["m2"].tier = "gold"
    entries: list[tuple[Event, Entry]] = []
    for event in history[:booked]:
        entry = on_time.decide(event, event.ts)
        assert isinstance(entry, Entry)
        entries.append((event, entry))
    engine = told(parse(text), entries)
    for name, known in on_time.members.items():
        member = engine.member(name)
        member.state, member.tier = known.state, known.tier
    for event in history[booked:]:
        expected = on_time.decide(event, event.ts)
        assert isinstance(expected, Entry)
        decision, may_be_booked = engine.decide(event)
        assert decision == expected
        assert may_be_booked == (not is_trip(plain, expected))
        if not may_be_booked:
            # On time it counts and freezes; late it is for a person, and the two go separate ways.
            break


@given(history=events())
def test_what_may_not_be_booked_leaves_no_trace(history: list[Event]) -> None:
    """Left out of the history, an event that trips changes nothing of what is decided after it."""
    rulebook = parse(RULEBOOK)
    engine = LateEngine(rulebook)
    decided = [(event, *engine.decide(event)) for event in history]
    again = LateEngine(rulebook)
    for event, decision, may_be_booked in decided:
        if may_be_booked:
            assert again.decide(event) == (decision, True)


def test_days_far_apart_are_kept_apart() -> None:
    engine = LateEngine(parse(RULEBOOK))

    def points(number: int, day: int) -> int:
        fields = {"id": f"e{number}", "kind": "order_paid", "member": "m1", "ts": at() + day * DAY_MS, "amount": 4000}
        decision, _ = engine.decide(validate(fields))
        assert isinstance(decision, Entry)
        return decision.points

    assert [points(1, -900), points(2, 0), points(3, -900), points(4, 0), points(5, -900)] == [40, 40, 20, 20, 0]


def test_a_kind_without_a_rule_is_not_booked() -> None:
    engine = LateEngine(parse(RULEBOOK))
    decision, may_be_booked = engine.decide(validate({"id": "e1", "kind": "review", "member": "m1", "ts": at()}))
    assert not may_be_booked
    assert not isinstance(decision, Entry)
