"""The audit's own way of deciding a late event comes to what the book's does, whatever was booked before it."""

from __future__ import annotations

from typing import Any

from hypothesis import assume, given, note
from hypothesis import strategies as st

from accrual.audit.late import Known, decide
from accrual.engine.late import LateEngine
from accrual.errors import InvalidEvent, RulebookError
from accrual.events import CONTROL_KINDS, REFUND_KIND, validate
from accrual.outcomes import Entry
from accrual.rulebook import parse
from strategies import AROUND_MS, MEMBERS, TIERS, event_mappings, rulebook_texts

FIELDS = ("outcome", "cause", "base", "uncapped", "points", "campaigns", "evidence")


@given(rulebook_texts(), st.data())
def test_late_events_are_decided_alike(text: str, data: st.DataObject) -> None:
    note(text)
    arrival_ms = data.draw(st.sampled_from(AROUND_MS)) + data.draw(st.integers(0, 86_400_000))
    try:
        rulebook = parse(text)
        event = validate(data.draw(event_mappings(0, arrival_ms)))
    except (RulebookError, InvalidEvent):
        assume(False)
        raise
    rule = rulebook.earning_rule(event.kind)
    assume(rule is not None and event.kind not in CONTROL_KINDS and event.kind != REFUND_KIND)
    assert rule is not None
    day = rulebook.calendar.day(event.ts)
    days = data.draw(st.lists(st.integers(day - 4, day + 2), max_size=6))
    state = data.draw(st.sampled_from(["active", "active", "frozen", "blocked"]))

    engine = LateEngine(rulebook)
    totals: dict[str, Any] = {}
    for limit in engine.limits:
        if not getattr(event, limit.key) or not data.draw(st.booleans()):
            continue
        if limit.measure == "members":
            totals[limit.id] = data.draw(st.lists(st.sampled_from(MEMBERS), max_size=limit.max + 1, unique=True))
            engine.tell_members(limit, getattr(event, limit.key), day, totals[limit.id])
        else:
            totals[limit.id] = data.draw(st.one_of(st.integers(0, 8), st.sampled_from([99, 2999, 2**63 - 1])))
            engine.tell_total(limit, getattr(event, limit.key), day, totals[limit.id])
    member = engine.member(event.member)
    member.state, member.tier = state, data.draw(st.sampled_from(["", *TIERS]))
    member.card_until = event.ts + data.draw(st.sampled_from([-1, 1]))
    member.daily[event.kind, day] = days.count(day)
    if days:
        member.once.add(event.kind)
    for earlier in days:
        engine.tell_streak(event.member, event.kind, earlier)

    decision, may_be_booked = engine.decide(event)
    assert isinstance(decision, Entry)
    known = Known(totals, days.count(day), days, state == "blocked", state == "frozen", decision.campaigns)
    decided = decide(rulebook, rule, event, day, known)
    assert decided.trips == (not may_be_booked)
    if may_be_booked:
        assert {name: getattr(decided, name) for name in FIELDS} == {name: getattr(decision, name) for name in FIELDS}
        assert decided.frozen == decision.frozen_before
