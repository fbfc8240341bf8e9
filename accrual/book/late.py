"""Late events: decided again on the day that they belong to, on top of what is booked for it (SPEC section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import psycopg
from psycopg.types.json import Jsonb

from accrual.book.chunks import Done
from accrual.book.posting import act, is_settled, lock_members
from accrual.book.settle import settle_members
from accrual.book.texts import shown, stored
from accrual.book.waiting import Deferred, claim, held_ids, open_exception, resolve, waiting_after
from accrual.engine.late import BookedEvent, LateEngine
from accrual.events import Event, decode_compact
from accrual.outcomes import Entry
from accrual.rulebook import Rulebook, day_text

__all__ = ["judge_late_events"]

CHUNK_EVENTS: Final = 500

BOOKED: Final = """
    SELECT kind, member, device, ip, phone, outcome, cause IS NOT NULL, points FROM book.entries
    WHERE day = %(day)s::date AND outcome IN ('granted', 'held', 'rejected') AND (
        member = ANY(%(members)s) OR device = ANY(%(devices)s) OR ip = ANY(%(ips)s) OR phone = ANY(%(phones)s))
"""

# What members did on any day that once marks and streaks remember, in the order of booking.
REMEMBERED: Final = """
    SELECT member, kind, day - date '1970-01-01' FROM book.entries
    WHERE member = ANY(%(members)s) AND kind = ANY(%(kinds)s) AND outcome IN ('granted', 'held') ORDER BY number, seq
"""

MEMBERS: Final = """
    SELECT member, state, tier, card_until_ms, immune_until_ms, incomplete FROM book.members WHERE member = ANY(%s)
"""

INSERT: Final = """
    INSERT INTO book.entries (day, partition_id, seq, late, rulebook, stream_id, item, ts_ms, event, kind, member,
        outcome, cause, frozen, amount_fen, order_id, base, uncapped, points, campaigns, evidence, device, ip, phone)
    SELECT day, partition_id, seq, true, %(rulebook)s, stream_id, item, ts_ms, event, kind, member,
        %(outcome)s, %(cause)s, %(frozen)s, amount_fen, order_id, %(base)s, %(uncapped)s, %(points)s, %(campaigns)s,
        %(evidence)s, device, ip, phone
    FROM book.deferred WHERE (partition_id, seq) = (%(partition_id)s, %(seq)s)
"""

RAISE: Final = """
    UPDATE book.balances SET pending = pending + %(pending)s, held = held + %(held)s WHERE member = %(member)s
"""


class Accepted(msgspec.Struct, frozen=True):
    """A late event that is booked, and as what."""

    event: Deferred
    entry: Entry


def judge_late_events(
    cursor: psycopg.Cursor[Any], rulebook: Rulebook, place: tuple[int, int, int], by: str
) -> tuple[tuple[int, int, int] | None, Done]:
    """Deal with the first late event behind ``place`` and others of its day, within the cursor's transaction and turn.

    Return where to go on (``None`` at the end) and what was done.
    """
    first = waiting_after(cursor, "late", place, 1)
    if not first:
        return None, Done()
    day = first[0].day
    events = waiting_after(cursor, "late", place, CHUNK_EVENTS, day)
    held = held_ids(cursor, events)
    duplicates: list[Deferred] = []
    fresh: dict[str, Deferred] = {}
    for event in events:
        if event.event in held or event.event in fresh:
            duplicates.append(event)
        else:
            fresh[event.event] = event
    action = act(cursor, "late", by=by, details={"day": day_text(day), "rulebook": rulebook.version})
    lock_members(cursor, [event.member for event in fresh.values()])
    accepted, refused = _decide(cursor, rulebook, day, list(fresh.values()))
    claim(cursor, refused)
    resolve(cursor, duplicates, "duplicate", action)
    resolve(cursor, refused, "exception", action)
    done = _book(cursor, rulebook, day, accepted, action)
    resolve(cursor, [item.event for item in accepted], "late", action)
    # Every event of the chunk has been dealt with, so the next one starts from the same place.
    return place, done


def _decide(
    cursor: psycopg.Cursor[Any], rulebook: Rulebook, day: int, events: Sequence[Deferred]
) -> tuple[list[Accepted], list[Deferred]]:
    """Return the events that are booked and those that are left to a person."""
    engine, incomplete = _engine(cursor, rulebook, day, events)
    attributes_matter = any(campaign.tiers is not None or campaign.card for campaign in rulebook.campaigns)
    accepted, refused = [], []
    for deferred in events:
        if attributes_matter and deferred.member in incomplete:
            said = (
                f"a control event of {shown(deferred.member)} had left the stream, and campaigns ask for tier or card"
            )
            open_exception(cursor, "member_unknown", deferred, said)
            refused.append(deferred)
            continue
        decision, may_be_booked = engine.decide(_event(deferred))
        if may_be_booked and isinstance(decision, Entry):
            accepted.append(Accepted(deferred, decision))
            continue
        refused.append(deferred)
        if isinstance(decision, Entry):
            evidence = [{"limit": limit, "observed": observed} for limit, observed in decision.evidence]
            limits = ", ".join(limit for limit, _ in decision.evidence)
            open_exception(cursor, "late_tripped", deferred, f"it trips {limits}", {"evidence": evidence})
        else:
            open_exception(cursor, "late_unknown_kind", deferred, f"there is no earning rule for {deferred.kind}")
    return accepted, refused


def _event(deferred: Deferred) -> Event:
    """Return the event, with fingerprints in the place of device, IP and phone: they are compared for equality only."""
    keys = {name: _key(getattr(deferred, name)) for name in ("device", "ip", "phone")}
    return msgspec.structs.replace(decode_compact(deferred.payload), **keys)


def _key(fingerprint: int | None) -> str:
    return "" if fingerprint is None else str(fingerprint)


def _engine(
    cursor: psycopg.Cursor[Any], rulebook: Rulebook, day: int, events: Sequence[Deferred]
) -> tuple[LateEngine, set[str]]:
    """Return an engine that knows what is booked, and the members of whom not everything is known."""
    engine = LateEngine(rulebook, day)
    members = sorted({event.member for event in events})
    keys = {
        f"{name}s": sorted({key for event in events if (key := getattr(event, name)) is not None})
        for name in ("device", "ip", "phone")
    }
    cursor.execute(BOOKED, {"day": day_text(day), "members": members, **keys})
    for kind, member, device, ip, phone, outcome, refused_early, points in cursor.fetchall():
        booked = BookedEvent(
            shown(kind), shown(member), _key(device), _key(ip), _key(phone), outcome, refused_early, points
        )
        engine.tell(booked)
    kinds = {rule.kind for rule in rulebook.earning_rules if rule.once or rule.streak_days is not None}
    cursor.execute(REMEMBERED, {"members": members, "kinds": [stored(kind) for kind in kinds]})
    for member, kind, booked_day in cursor.fetchall():
        engine.member(shown(member)).once.add(shown(kind))
        engine.tell_streak(shown(member), shown(kind), booked_day)
    incomplete = set()
    cursor.execute(MEMBERS, (members,))
    for name, state, tier, card_until_ms, immune_until_ms, is_incomplete in cursor.fetchall():
        member = engine.member(shown(name))
        member.state, member.tier = state, shown(tier) or ""
        member.card_until, member.immune_until = card_until_ms or 0, immune_until_ms or 0
        if is_incomplete:
            incomplete.add(name)
    return engine, incomplete


def _book(cursor: psycopg.Cursor[Any], rulebook: Rulebook, day: int, accepted: Sequence[Accepted], action: int) -> Done:
    """Book late entries; those of a settled day are available at once, in the lot of that day."""
    if not accepted:
        return Done()
    settled = is_settled(cursor, day)
    cursor.execute("SELECT set_config('book.number', nextval('book.numbers')::text, true)")
    claim(cursor, [item.event for item in accepted], late=True)
    cursor.executemany(INSERT, [_row(item, rulebook) for item in accepted])
    raised = [item for item in accepted if item.entry.points]
    cursor.executemany(RAISE, [_raise(item) for item in raised])
    if settled:
        settle_members(cursor, rulebook, day, [item.event.member for item in raised], action)
    points = sum(item.entry.points for item in raised)
    return Done(len({item.event.member for item in accepted}), len(accepted), points)


def _row(item: Accepted, rulebook: Rulebook) -> dict[str, object]:
    entry = item.entry
    evidence = [{"limit": limit, "observed": observed} for limit, observed in entry.evidence]
    return {
        "partition_id": item.event.partition_id,
        "seq": item.event.seq,
        "rulebook": rulebook.version,
        "outcome": entry.outcome,
        "cause": entry.cause or None,
        "frozen": entry.frozen_before,
        "base": entry.base,
        "uncapped": entry.uncapped,
        "points": entry.points,
        "campaigns": [stored(campaign) for campaign in entry.campaigns] or None,
        "evidence": Jsonb(evidence) if evidence else None,
    }


def _raise(item: Accepted) -> dict[str, object]:
    points, held = item.entry.points, item.entry.outcome == "held"
    return {"member": item.event.member, "pending": 0 if held else points, "held": points if held else 0}
