"""Every late entry decided again, on top of what the book says was booked before it (SPEC section 9).

Steps 8 to 12 are written here once more, so that neither the engines nor the book's own way of deciding late events has
a part in it. What a member was at the time (frozen or blocked, of which tier, with a card or not) is not kept, so there
the entry is taken at its word; everything else is computed: totals of the day, daily counts, streaks, once marks,
campaigns, points.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from fractions import Fraction
from typing import Any, Final

import msgspec
from psycopg import sql

from accrual.audit.findings import Finding
from accrual.audit.rows import booked_evidence
from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.events import Event, decode_compact
from accrual.rulebook import Campaign, EarningRule, Limit, Rulebook

__all__ = ["Decided", "Known", "check_late", "decide"]

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

LARGEST_TOTAL: Final = 2**63 - 1
# Dates and weekdays repeat after 400 years.
EPOCH: Final = date(1970, 1, 1).toordinal()
CYCLE_DAYS: Final = 146_097

# What is told of what was booked before, by entry.
Place = tuple[int, int]


class Known(msgspec.Struct):
    """What is known of an event before it is decided.

    ``totals`` has what each limit has counted for the event's key, by the limit's id: a number, or members. ``today``
    is how often the member has earned by this kind on that day, ``days`` on which days ever, in the order of booking.
    """

    totals: dict[str, Any]
    today: int
    days: list[int]
    blocked: bool
    frozen: bool
    campaigns: Sequence[str]


class Decided(msgspec.Struct):
    """What an event becomes. ``trips`` more than a clamp: then it is left to a person."""

    outcome: str
    cause: str = ""
    frozen: bool = False
    base: int = 0
    uncapped: int = 0
    points: int = 0
    campaigns: tuple[str, ...] = ()
    evidence: tuple[tuple[str, int], ...] = ()
    trips: bool = False


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
    rule = rulebook.earning_rule(event.kind)
    expected: dict[str, Any] | None = None
    detail = "decided again, the late entry comes out differently"
    if rule is None:
        detail = "a late entry of a kind that its rulebook does not know"
    else:
        decided = decide(rulebook, rule, event, day_number, before.known((partition_id, seq), found))
        expected = {name: getattr(decided, name) for name in FIELDS}
        if decided.trips:
            detail = "a late entry that trips a limit, and was to be left to a person"
        elif expected == found:
            return
    yield Finding("late", detail, partition, seq=seq, member=event.member, day=day, expected=expected, found=found)


FIELDS: Final = ("outcome", "cause", "frozen", "base", "uncapped", "points", "campaigns", "evidence")


def _told(*booked: Any) -> dict[str, Any]:
    """Return what is booked of an entry in the words of a decision."""
    told = dict(zip(FIELDS, booked, strict=True))
    return told | {
        "cause": told["cause"] or "",
        "campaigns": tuple(shown(campaign) for campaign in told["campaigns"] or ()),
        "evidence": booked_evidence(told["evidence"]),
    }


# ------------------------------------------------------------------------------------------------ steps 8 to 12


def decide(rulebook: Rulebook, rule: EarningRule, event: Event, day: int, known: Known) -> Decided:
    """Take steps 8 to 12 for an event of day number ``day``, whose kind has the earning ``rule``."""
    refused = _refused(rule, known)
    if refused:
        return Decided("rejected", refused)
    minute = rulebook.calendar.local(event.ts)[1]
    matching = [campaign for campaign in rulebook.campaigns if _matches(campaign, event, day, minute, known.campaigns)]
    base = _base(rule, event, day, known.days)
    uncapped = math.floor(base * _multiplier(rulebook.stacking, [campaign.multiplier for campaign in matching]))
    limits = [
        limit
        for limit in rulebook.limits
        if limit.window.duration_ms is None
        and (limit.kinds is None or event.kind in limit.kinds)
        and getattr(event, limit.key)
    ]
    tripped = _counted(limits, event, known)
    points = uncapped
    if not any(limit.action == "reject" and limit.id in tripped for limit in limits):
        points = _capped(limits, uncapped, known, tripped)
    return Decided(
        outcome="held" if known.frozen else "granted",
        frozen=known.frozen,
        base=math.floor(base),
        uncapped=uncapped,
        points=points,
        campaigns=tuple(campaign.id for campaign in matching),
        evidence=tuple((limit.id, tripped[limit.id]) for limit in limits if limit.id in tripped),
        trips=any(limit.action != "clamp" and limit.id in tripped for limit in limits),
    )


def _refused(rule: EarningRule, known: Known) -> str:
    """Step 8."""
    if known.blocked:
        return "member_blocked"
    if rule.once and known.days:
        return "once"
    return "max_per_day" if rule.max_per_day is not None and known.today >= rule.max_per_day else ""


def _base(rule: EarningRule, event: Event, day: int, days: Sequence[int]) -> Fraction:
    """Step 9, before campaigns: exact."""
    if rule.points_per_yuan is None:
        is_bonus = rule.streak_days is not None and _run(days, day) % rule.streak_days == 0 < _run(days, day)
        return Fraction(rule.points + (rule.streak_bonus if is_bonus else 0))
    amount = event.amount or 0
    if amount < rule.min_amount_fen:
        return Fraction(0)
    lines = event.lines or (("", amount),)
    rates = rule.category_rates
    return sum((fen * rule.points_per_yuan * rates.get(name, Fraction(1)) / 100 for name, fen in lines), Fraction(0))


def _run(days: Sequence[int], day: int) -> int:
    """Return the run of days that an event of ``day`` makes behind those of ``days``; 0 where it adds nothing."""
    last, run = day - 1 if not days else days[0] - 1, 0
    for number, each in enumerate((*days, day)):
        if each > last:
            last, run = each, run + 1 if each == last + 1 else 1
        elif number == len(days):
            return 0
    return run


def _matches(campaign: Campaign, event: Event, day: int, minute: int, claimed: Sequence[str]) -> bool:
    """Tell whether all conditions hold; of tier and card the entry is believed what campaigns it has ``claimed``."""
    if (campaign.tiers is not None or campaign.card) and campaign.id not in claimed:
        return False
    on = date.fromordinal(EPOCH + day % CYCLE_DAYS)
    conditions = (
        event.kind in campaign.kinds,
        campaign.days_of_month is None or on.day in campaign.days_of_month,
        campaign.weekdays is None or on.weekday() in campaign.weekdays,
        campaign.from_day is None or day >= campaign.from_day,
        campaign.until_day is None or day <= campaign.until_day,
        campaign.hours is None or _is_between(minute, *campaign.hours),
        campaign.cities is None or event.city in campaign.cities,
        campaign.tags is None or any(tag in campaign.tags for tag in event.tags),
        campaign.percent is None or zlib.crc32(f"{campaign.id}:{event.member}".encode()) % 100 < campaign.percent,
    )
    return all(conditions)


def _is_between(minute: int, start: int, end: int) -> bool:
    return (minute - start) % 1440 < (end - start) % 1440


def _multiplier(stacking: str, multipliers: Sequence[Fraction]) -> Fraction:
    if not multipliers:
        return Fraction(1)
    if stacking == "multiply":
        return math.prod(multipliers, start=Fraction(1))
    return sum((each - 1 for each in multipliers), Fraction(1)) if stacking == "add" else max(multipliers)


def _counted(limits: Sequence[Limit], event: Event, known: Known) -> dict[str, int]:
    """Step 10: return what the limits on events and members that trip have counted with this event."""
    tripped = {}
    for limit in limits:
        before = known.totals.get(limit.id)
        if limit.measure == "events":
            observed = min(LARGEST_TOTAL, int(before or 0) + 1)
        elif limit.measure == "members":
            observed = min(limit.max + 1, len({*map(shown, before or ()), event.member}))
        else:
            continue
        if observed > limit.max:
            tripped[limit.id] = observed
    return tripped


def _capped(limits: Sequence[Limit], uncapped: int, known: Known, tripped: dict[str, int]) -> int:
    """Step 11: return what the limits on points leave, and add what tripped; clamps come first."""
    points = uncapped
    for clamps in (True, False):
        for limit in limits:
            if limit.measure != "points" or (limit.action == "clamp") != clamps:
                continue
            used = _total(int(known.totals.get(limit.id) or 0))
            if used + points > limit.max:
                tripped[limit.id] = _total(used + points)
                points = max(0, limit.max - used) if clamps else points
    return points


def _total(points: int) -> int:
    return max(-LARGEST_TOTAL - 1, min(LARGEST_TOTAL, points))


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

    def known(self, place: Place, found: Mapping[str, Any]) -> Known:
        """Return what was known when the entry at ``place`` was decided; ``found`` is what it says of its member."""
        today, days = self._history.get(place, (0, []))
        totals = {limit: of_entries[place] for limit, of_entries in self._totals.items() if place in of_entries}
        blocked = found["outcome"] == "rejected" and found["cause"] == "member_blocked"
        return Known(totals, today, days, blocked, found["frozen"], found["campaigns"])
