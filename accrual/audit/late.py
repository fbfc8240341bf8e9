"""Every late entry decided again, on top of what the book says was booked before it (SPEC section 9).

What a member was at the time (frozen or blocked, of which tier, with a card or not) is not kept, so there the entry is
taken at its word; everything else is computed again: totals of the day, daily counts, streaks, once marks, campaigns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from psycopg import sql

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.engine.late import LateEngine
from accrual.events import Event, decode_compact
from accrual.outcomes import Entry
from accrual.rulebook import Campaign, Limit, Rulebook

__all__ = ["check_late"]

# The late entries of a day, and with them the place in which they came: those of one number are decided in that order.
MINE: Final = """
    WITH mine AS (
        SELECT e.*, d.number AS came, d.payload, day_of.n AS day_number
        FROM book.entries e JOIN book.deferred d USING (partition_id, seq),
            LATERAL (SELECT e.day - date '1970-01-01' AS n) day_of
        WHERE e.day = %(day)s::date AND e.late
    )
"""

ENTRIES: Final = """
    SELECT p.name, m.partition_id, m.seq, m.rulebook, m.day_number, m.device, m.ip, m.phone, m.payload, m.outcome,
        m.cause, m.frozen, m.base, m.uncapped, m.points, m.campaigns, m.evidence
    FROM mine m JOIN book.partitions p USING (partition_id) ORDER BY m.number, m.came, m.partition_id, m.seq
"""

# What was booked before each of them, of which a query says what it asks for.
BEFORE: Final = """
    FROM mine m JOIN book.entries x ON {same}
    LEFT JOIN book.deferred o ON x.late AND (o.partition_id, o.seq) = (x.partition_id, x.seq)
    WHERE (x.number, coalesce(o.number, 0), x.partition_id, x.seq) < (m.number, m.came, m.partition_id, m.seq)
        AND x.outcome = ANY(%(outcomes)s) AND (x.outcome <> 'rejected' OR x.cause IS NULL)
        AND (%(kinds)s::text[] IS NULL OR x.kind = ANY(%(kinds)s) AND m.kind = ANY(%(kinds)s))
    GROUP BY m.partition_id, m.seq
"""

SAME_KEY: Final = "x.day = m.day AND x.{key} = m.{key} AND m.rulebook = %(version)s"
# Of any day: the members are looked up by the index, so that not all days are read for those of one.
SAME_MEMBER: Final = """
    x.member = ANY(ARRAY(SELECT member FROM mine WHERE kind = ANY(%(kinds)s)))
        AND x.member = m.member AND x.kind = m.kind AND m.rulebook = %(version)s
"""

MEASURES: Final = {
    "events": "count(*)",
    "points": "sum(x.points)::numeric",
    "members": "array_agg(DISTINCT x.member)",
}

HISTORY: Final = """
    count(*) FILTER (WHERE x.day = m.day),
    array_agg(x.day - date '1970-01-01' ORDER BY x.number, coalesce(o.number, 0), x.partition_id, x.seq)
"""

EARNED: Final = ("granted", "held")

# What is told of an engine, by entry.
Place = tuple[int, int]


def check_late(
    connection: Connection, day: str, rulebooks: Mapping[int, Rulebook], note: Callable[[str], object]
) -> Iterator[Finding]:
    """Yield the late entries of ``day`` that come out differently when they are decided again.

    ``note`` is told in words of those whose version is not among ``rulebooks``.
    """
    rows = connection.execute(MINE + ENTRIES, {"day": day}).fetchall()
    for version in sorted({row[3] for row in rows}):
        chosen = [row for row in rows if row[3] == version]
        if version not in rulebooks:
            note(f"day {day}: {len(chosen)} late entries not decided again: rulebook version {version} is not known")
            continue
        before = _Before(connection, day, rulebooks[version])
        for row in chosen:
            yield from _check_one(row, day, rulebooks[version], before)


def _check_one(row: tuple[Any, ...], day: str, rulebook: Rulebook, before: _Before) -> Iterator[Finding]:
    partition, partition_id, seq, _, day_number, *keys = row[:8]
    payload, *told = row[8:]
    found = _told(*told)
    event = msgspec.structs.replace(
        decode_compact(bytes(payload)),
        **{name: "" if key is None else str(key) for name, key in zip(("device", "ip", "phone"), keys, strict=True)},
    )
    engine = LateEngine(_taken_at_its_word(rulebook, found["campaigns"]))
    before.tell(engine, (partition_id, seq), event, day_number)
    blocked = found["outcome"] == "rejected" and found["cause"] == "member_blocked"
    engine.member(event.member).state = "blocked" if blocked else "frozen" if found["frozen"] else "active"
    decision, may_be_booked = engine.decide(event)
    expected: dict[str, Any] | None = None
    detail = "decided again, the late entry comes out differently"
    if not isinstance(decision, Entry):
        detail = "a late entry of a kind that its rulebook does not know"
    else:
        expected = {name: getattr(decision, attribute) for name, attribute in FIELDS.items()}
        if not may_be_booked:
            detail = "a late entry that trips a limit, and was to be left to a person"
        elif expected == found:
            return
    yield Finding("late", detail, partition, seq=seq, member=event.member, day=day, expected=expected, found=found)


FIELDS: Final = {
    "outcome": "outcome",
    "cause": "cause",
    "frozen": "frozen_before",
    "base": "base",
    "uncapped": "uncapped",
    "points": "points",
    "campaigns": "campaigns",
    "evidence": "evidence",
}


def _told(*booked: Any) -> dict[str, Any]:
    """Return what is booked of an entry in the words of a decision."""
    told = dict(zip(FIELDS, booked, strict=True))
    evidence = told["evidence"] or ()
    return told | {
        "cause": told["cause"] or "",
        "campaigns": tuple(shown(campaign) for campaign in told["campaigns"] or ()),
        "evidence": tuple((item["limit"], item["observed"]) for item in evidence),
    }


def _taken_at_its_word(rulebook: Rulebook, campaigns: tuple[str, ...]) -> Rulebook:
    """Return ``rulebook`` with the conditions on tier and card replaced by what the entry's ``campaigns`` say."""

    def asks(campaign: Campaign) -> bool:
        return campaign.tiers is not None or campaign.card

    if not any(map(asks, rulebook.campaigns)):
        return rulebook
    kept = [campaign for campaign in rulebook.campaigns if not asks(campaign) or campaign.id in campaigns]
    freed = tuple(msgspec.structs.replace(campaign, tiers=None, card=False) for campaign in kept)
    return msgspec.structs.replace(rulebook, campaigns=freed)


class _Before:
    """What was booked before each late entry of a day and a version: totals by limit, and what members did."""

    def __init__(self, connection: Connection, day: str, rulebook: Rulebook) -> None:
        self._connection = connection
        self._about = {"day": day, "version": rulebook.version}
        self._rules = {rule.kind: rule for rule in rulebook.earning_rules}
        self._totals: dict[str, dict[Place, Any]] = {
            limit.id: self._totals_of(limit) for limit in rulebook.limits if limit.window.duration_ms is None
        }
        kinds = [
            stored(kind)
            for kind, rule in self._rules.items()
            if rule.once or rule.max_per_day is not None or rule.streak_days is not None
        ]
        rows = self._ask(SAME_MEMBER, HISTORY, EARNED, kinds) if kinds else []
        self._history: dict[Place, tuple[int, list[int]]] = {
            (partition_id, seq): (count, days) for partition_id, seq, count, days in rows
        }

    def _totals_of(self, limit: Limit) -> dict[Place, Any]:
        kinds = None if limit.kinds is None else [stored(kind) for kind in limit.kinds]
        outcomes = EARNED if limit.measure == "points" else (*EARNED, "rejected")
        same = sql.SQL(SAME_KEY).format(key=sql.Identifier(limit.key))
        return {row[:2]: row[2] for row in self._ask(same, MEASURES[limit.measure], outcomes, kinds)}

    def _ask(
        self, same: sql.Composed | str, wanted: str, outcomes: tuple[str, ...], kinds: list[str] | None
    ) -> list[tuple[Any, ...]]:
        query = sql.SQL(MINE + "SELECT m.partition_id, m.seq, {wanted}" + BEFORE).format(
            wanted=sql.SQL(wanted), same=sql.SQL(same) if isinstance(same, str) else same
        )
        return self._connection.execute(query, self._about | {"outcomes": list(outcomes), "kinds": kinds}).fetchall()

    def tell(self, engine: LateEngine, place: Place, event: Event, day: int) -> None:
        """Tell ``engine`` what it is to know when it decides ``event``, the entry at ``place``."""
        for limit in engine.limits:
            total, key = self._totals[limit.id].get(place), getattr(event, limit.key)
            if total is None:
                continue
            if limit.measure == "members":
                engine.tell_members(limit, key, day, map(shown, total[: limit.max + 1]))
            else:
                engine.tell_total(limit, key, day, int(total))
        count, days = self._history.get(place, (0, []))
        rule = self._rules.get(event.kind)
        if rule is None or not days:
            return
        member = engine.member(event.member)
        member.daily[event.kind, day] = count
        member.once.add(event.kind)
        for earlier in days:
            engine.tell_streak(event.member, event.kind, earlier)
