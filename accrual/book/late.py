"""Late events: decided on the day that they belong to, on top of what is booked for it (SPEC section 9)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any, Final, LiteralString

import msgspec
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from accrual.book.chunks import Done
from accrual.book.days import BookedDay, note_days
from accrual.book.posting import act, is_settled, lock_members
from accrual.book.programme import newest_rulebook
from accrual.book.settle import settle_members
from accrual.book.texts import shown, stored
from accrual.book.waiting import Deferred, claim, held_ids, late_events, open_exception, resolve
from accrual.engine.late import LateEngine
from accrual.events import Event, decode_compact
from accrual.outcomes import Entry
from accrual.rulebook import Limit, Rulebook, day_text

__all__ = ["judge_late_events"]

CHUNK_EVENTS: Final = 2000
KEYS: Final = ("device", "ip", "phone")

# What a limit of a business day counted, by day and key. An event that step 8 of the decision refused has a cause.
TOTALS: Final[LiteralString] = """
    SELECT day - date '1970-01-01', {key}::text, {measured} FROM book.entries
    WHERE day = ANY(%(days)s::date[]) AND {key} = ANY(%(keys)s::{type}[])
        AND (%(kinds)s::text[] IS NULL OR kind = ANY(%(kinds)s::text[]))
        AND (outcome IN ('granted', 'held') OR {refused_too} AND outcome = 'rejected' AND cause IS NULL)
    GROUP BY 1, 2
"""
MEASURES: Final[dict[str, LiteralString]] = {
    "events": "count(*)",
    "points": f"greatest({-(2**63)}, least(sum(points), {2**63 - 1}))::bigint",
    "members": "(array_agg(DISTINCT member))[1:%(members)s]",
}

# Until its ledger has come so far, a partition may still book, or be about to commit, entries that came on time.
NOT_YET_PAST: Final = """
    SELECT FROM book.partitions WHERE split_part(through, '-', 1)::numeric < %s ORDER BY partition_id FOR SHARE
"""

DAILY: Final = """
    SELECT member, kind, day - date '1970-01-01', count(*) FROM book.entries
    WHERE day = ANY(%(days)s::date[]) AND member = ANY(%(members)s) AND kind = ANY(%(kinds)s)
        AND outcome IN ('granted', 'held') GROUP BY 1, 2, 3
"""

# What members did on any day that once marks and streaks remember, in the order of booking.
REMEMBERED: Final = """
    SELECT member, kind, day - date '1970-01-01' FROM book.entries
    WHERE member = ANY(%(members)s) AND kind = ANY(%(kinds)s) AND outcome IN ('granted', 'held') ORDER BY number, seq
"""

MEMBERS: Final = """
    SELECT member, state, tier, card_until_ms, immune_until_ms, incomplete FROM book.members WHERE member = ANY(%s)
"""

BOOK: Final = """
    WITH booked AS (
        INSERT INTO book.entries (day, partition_id, seq, late, rulebook, stream_id, item, ts_ms, event, kind, member,
            amount_fen, order_id, device, ip, phone,
            outcome, cause, frozen, base, uncapped, points, campaigns, evidence)
        SELECT d.day, partition_id, seq, true, %(rulebook)s, d.stream_id, d.item, d.ts_ms, d.event, d.kind, d.member,
            d.amount_fen, d.order_id, d.device, d.ip, d.phone,
            e.outcome, e.cause, e.frozen, e.base, e.uncapped, e.points, e.campaigns, e.evidence
        FROM jsonb_to_recordset(%(entries)s) AS e (partition_id smallint, seq bigint, outcome text, cause text,
            frozen boolean, base bigint, uncapped bigint, points bigint, campaigns text[], evidence jsonb)
        JOIN book.deferred d USING (partition_id, seq)
        RETURNING member, outcome, points
    )
    UPDATE book.balances b SET pending = b.pending + r.pending, held = b.held + r.held
    FROM (
        SELECT member, coalesce(sum(points) FILTER (WHERE outcome <> 'held'), 0)::bigint AS pending,
            coalesce(sum(points) FILTER (WHERE outcome = 'held'), 0)::bigint AS held
        FROM booked GROUP BY member
    ) r
    WHERE r.member = b.member
"""


class Accepted(msgspec.Struct, frozen=True):
    """A late event that is booked, and as what."""

    event: Deferred
    entry: Entry


def judge_late_events(cursor: psycopg.Cursor[Any], rulebook: Rulebook, by: str, days: Collection[int]) -> Done | None:
    """Deal with the first of the late events that wait, within the cursor's transaction and turn.

    They are those before one that came meanwhile, of a day that is not among ``days`` and may have no table yet. Return
    what was done; ``None`` where none waits. Raises ``RulebookError`` for a rulebook whose business days are not
    those of the ledgers.
    """
    waiting = late_events(cursor, CHUNK_EVENTS)
    events = _first_ones([*takewhile(lambda event: event.day in days, waiting)])
    if not events:
        return None
    recorded = newest_rulebook(cursor)
    if recorded is not None:
        recorded.check_successor(rulebook)
    held = held_ids(cursor, events)
    fresh: dict[str, Deferred] = {}
    for event in events:
        if event.event not in held:
            fresh.setdefault(event.event, event)
    duplicates = [event for event in events if fresh.get(event.event) is not event]
    accepted, refused = _decide(cursor, rulebook, list(fresh.values()))
    action = act(cursor, "late", by=stored(by), details={"rulebook": rulebook.version})
    claim(cursor, refused)
    claim(cursor, [item.event for item in accepted], late=True)
    resolve(cursor, duplicates, "duplicate", action)
    resolve(cursor, refused, "exception", action)
    done = _book(cursor, rulebook, accepted, action)
    resolve(cursor, [item.event for item in accepted], "late", action)
    return done


def _first_ones(events: Sequence[Deferred]) -> Sequence[Deferred]:
    """Return the events up to one whose member has an earlier one of another day.

    Where those days are settled, each fills what the one before has left of the member's hole.
    """
    days: dict[str, int] = {}
    for number, event in enumerate(events):
        if days.setdefault(event.member, event.day) != event.day:
            return events[:number]
    return events


# ------------------------------------------------------------------------------------------------------- decisions


def _decide(
    cursor: psycopg.Cursor[Any], rulebook: Rulebook, events: Sequence[Deferred]
) -> tuple[list[Accepted], list[Deferred]]:
    """Lock the members of ``events``; return what is booked, and the events that are left to a person."""
    engine = LateEngine(rulebook)
    if engine.limits and events:
        _hold_back_ingest(cursor, rulebook, events)
    # Here members may go on: nothing else that is booked for them counts in a limit on another key.
    _tell_totals(cursor, engine, events, KEYS)
    lock_members(cursor, [event.member for event in events])
    _tell_totals(cursor, engine, events, ("member",))
    incomplete = _tell_members(cursor, engine, rulebook, events)
    accepted: list[Accepted] = []
    refused: list[Deferred] = []
    for deferred in events:
        entry = None
        if deferred.member in incomplete and _asks_for_member(rulebook, deferred):
            said = f"campaigns ask for tier or card, and a control event of {deferred.member} had left the stream"
            open_exception(cursor, "member_unknown", deferred, said)
        else:
            entry = _decide_one(cursor, engine, deferred)
        if entry is None:
            refused.append(deferred)
        else:
            accepted.append(Accepted(deferred, entry))
    return accepted, refused


def _hold_back_ingest(cursor: psycopg.Cursor[Any], rulebook: Rulebook, events: Sequence[Deferred]) -> None:
    """Keep entries of the days of ``events`` from being booked, until the transaction ends.

    What has a lower number than these late entries is what they are decided on top of, also where another partition's
    ingester is days behind. Those that have come past the days, as all have by and by, go on.
    """
    end_ms = rulebook.calendar.start_ms(max(event.day for event in events) + 2)
    cursor.execute(NOT_YET_PAST, (end_ms,))


def _decide_one(cursor: psycopg.Cursor[Any], engine: LateEngine, deferred: Deferred) -> Entry | None:
    """Return the entry that ``deferred`` becomes; ``None`` where it is left to a person, who is told why."""
    decision, may_be_booked = engine.decide(_event(deferred))
    if not isinstance(decision, Entry):
        said = f"the rulebook has no earning rule for {deferred.kind} any more"
        open_exception(cursor, "late_unknown_kind", deferred, said)
        return None
    if may_be_booked:
        return decision
    limits = stored(", ".join(limit for limit, _ in decision.evidence))
    open_exception(cursor, "late_tripped", deferred, f"it trips {limits}", {"evidence": _evidence(decision)})
    return None


def _asks_for_member(rulebook: Rulebook, deferred: Deferred) -> bool:
    """Tell whether a campaign that may match asks for the member's tier or card."""
    return any(
        (campaign.tiers is not None or campaign.card)
        and shown(deferred.kind) in campaign.kinds
        and campaign.on_day(deferred.day)
        for campaign in rulebook.campaigns
    )


def _event(deferred: Deferred) -> Event:
    """Return the event, with fingerprints in the place of device, IP and phone: they are compared for equality only."""
    keys = {name: _key(deferred, name) for name in KEYS}
    return msgspec.structs.replace(decode_compact(deferred.payload), **keys)


def _key(deferred: Deferred, name: str) -> str:
    value = getattr(deferred, name)
    return "" if value is None else shown(value) if isinstance(value, str) else str(value)


def _evidence(entry: Entry) -> list[dict[str, object]]:
    return [{"limit": stored(limit), "observed": observed} for limit, observed in entry.evidence]


# -------------------------------------------------------------------------------------- what the engine is told


def _tell_totals(
    cursor: psycopg.Cursor[Any], engine: LateEngine, events: Sequence[Deferred], keys: Sequence[str]
) -> None:
    """Tell the totals of the limits on ``keys`` that ``events`` are subject to."""
    for limit in engine.limits:
        if limit.key not in keys:
            continue
        subject = [event for event in events if getattr(event, limit.key) and limit.applies_to(shown(event.kind))]
        if not subject:
            continue
        for day, key, total in _totals(cursor, limit, subject):
            if limit.measure == "members":
                engine.tell_members(limit, shown(key), day, map(shown, total))
            else:
                engine.tell_total(limit, shown(key), day, total)


def _totals(cursor: psycopg.Cursor[Any], limit: Limit, subject: Sequence[Deferred]) -> list[tuple[int, str, Any]]:
    query = sql.SQL(TOTALS).format(
        key=sql.Identifier(limit.key),
        type=sql.SQL("text" if limit.key == "member" else "bigint"),
        measured=sql.SQL(MEASURES[limit.measure]),
        refused_too=sql.Literal(limit.measure != "points"),
    )
    parameters = {
        "days": _days(subject),
        "keys": list({getattr(event, limit.key) for event in subject}),
        "kinds": None if limit.kinds is None else [stored(kind) for kind in limit.kinds],
        "members": limit.max + 1,
    }
    return cursor.execute(query, parameters).fetchall()


def _tell_members(
    cursor: psycopg.Cursor[Any], engine: LateEngine, rulebook: Rulebook, events: Sequence[Deferred]
) -> set[str]:
    """Tell what the members of ``events`` are and did; return those of whom not everything is known."""
    rules = {rule.kind: rule for rule in rulebook.earning_rules}
    daily = _of_kinds(events, [kind for kind, rule in rules.items() if rule.max_per_day is not None])
    if daily["members"]:
        for name, kind, day, count in cursor.execute(DAILY, daily).fetchall():
            engine.member(shown(name)).daily[shown(kind), day] = count
    kinds = [kind for kind, rule in rules.items() if rule.once or rule.streak_days is not None]
    remembered = _of_kinds(events, kinds)
    if remembered["members"]:
        for name, kind, day in cursor.execute(REMEMBERED, remembered).fetchall():
            engine.member(shown(name)).once.add(shown(kind))
            engine.tell_streak(shown(name), shown(kind), day)
    incomplete = set()
    cursor.execute(MEMBERS, (list({event.member for event in events}),))
    for name, state, tier, card_until_ms, immune_until_ms, is_incomplete in cursor.fetchall():
        member = engine.member(shown(name))
        member.state, member.tier = state, shown(tier) or ""
        member.card_until, member.immune_until = card_until_ms or 0, immune_until_ms or 0
        if is_incomplete:
            incomplete.add(name)
    return incomplete


def _of_kinds(events: Sequence[Deferred], kinds: Sequence[str]) -> dict[str, list[str]]:
    """Return the kinds as stored, and the members and days of the events that are of one of them."""
    names = [stored(kind) for kind in kinds]
    chosen = [event for event in events if event.kind in names]
    return {"kinds": names, "members": list({event.member for event in chosen}), "days": _days(chosen)}


def _days(events: Sequence[Deferred]) -> list[str]:
    return [day_text(day) for day in sorted({event.day for event in events})]


# ------------------------------------------------------------------------------------------------------- booking


def _book(cursor: psycopg.Cursor[Any], rulebook: Rulebook, accepted: Sequence[Accepted], action: int) -> Done:
    """Book late entries; those of a settled day are available at once, in the lot of that day."""
    if not accepted:
        return Done()
    settled = [day for day in sorted({item.event.day for item in accepted}) if is_settled(cursor, day)]
    cursor.execute("SELECT set_config('book.number', nextval('book.numbers')::text, true)")
    cursor.execute(BOOK, {"rulebook": rulebook.version, "entries": Jsonb([_row(item) for item in accepted])})
    note_days(cursor, [BookedDay(item.event.day, item.event.partition_id, item.event.seq) for item in accepted])
    raised = [item for item in accepted if item.entry.points]
    for day in settled:
        members = [item.event.member for item in raised if item.event.day == day and item.entry.outcome == "granted"]
        settle_members(cursor, rulebook, day, members, action)
    points = sum(item.entry.points for item in raised)
    return Done(len({item.event.member for item in accepted}), len(raised), points)


def _row(item: Accepted) -> dict[str, object]:
    entry = item.entry
    return {
        "partition_id": item.event.partition_id,
        "seq": item.event.seq,
        "outcome": entry.outcome,
        "cause": entry.cause or None,
        "frozen": entry.frozen_before,
        "base": entry.base,
        "uncapped": entry.uncapped,
        "points": entry.points,
        "campaigns": [stored(campaign) for campaign in entry.campaigns] or None,
        "evidence": _evidence(entry) or None,
    }
