"""No more than limits let through, counted again from the entries of a day and, for sliding windows, those before.

A limit that clamps or rejects bounds what was granted and held; one that holds or freezes may be passed. Entries are
counted by partition and through rulebook versions as long as the limit keeps its counts, as the engines count them:
events and members also of those that a limit refused. Each entry that was let through with more than that is a finding
of its own, and owes what was too much of it. A late entry counts on top of all that was booked for its day before it,
and in no sliding window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from psycopg import sql

from accrual.audit.findings import Finding
from accrual.audit.recorded import LAST_SEQ, Recorded
from accrual.audit.sliding import DECIDED, KEPT, Span, first_seq, first_taken, sliding_query, span_of, unit_of
from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.rulebook import EarningRule, Limit, Rulebook, Window, combined_multiplier

__all__ = ["booked_days", "check_caps", "check_once"]

# Entries that were counted; `max` is only there where the entry is one that was let through and had to be within it.
COUNTED: Final = """
    WITH counted AS (
        SELECT e.partition_id, e.seq, e.number, {came} AS came, e.member, e.points, e.{key}::text AS key,
            CASE WHEN {judged} AND e.outcome IN ('granted', 'held') AND {adds} AND e.seq < %(taken)s
                THEN r.max END AS max
        FROM book.entries e JOIN unnest(
            %(firsts)s::bigint[], %(lasts)s::bigint[], %(maxima)s::bigint[], %(clamps)s::boolean[], %(kinds)s::jsonb[]
        ) AS r (first, last, max, clamps, kinds) ON {of} AND (r.kinds IS NULL OR r.kinds ? e.kind)
        WHERE e.day = %(day)s::date AND {counts} AND e.{key} IS NOT NULL AND {keys}
    ), running AS (
        SELECT *, {total} OVER (PARTITION BY key ORDER BY {place} ROWS UNBOUNDED PRECEDING) AS total FROM ({seen}) c
    )
    SELECT p.name, seq, member, key, max, least(total, {most})::bigint, points
    FROM running JOIN book.partitions p USING (partition_id) WHERE total > max ORDER BY {place}
"""


class Those(NamedTuple):
    """Which entries of a day count for one, which of them are judged, and in what place they came."""

    of: str
    judged: str
    place: str
    came: str = "NULL::bigint"
    keys: str = "true"


OF_PARTITION: Final = Those(
    "NOT e.late AND e.partition_id = %(partition_id)s AND e.seq BETWEEN r.first AND r.last", "true", "seq"
)
# All partitions count, and those that were booked by one number in the order in which they came.
OF_LATE: Final = Those(
    of="true",
    judged="e.late AND e.rulebook BETWEEN r.first AND r.last",
    place="number, came, partition_id, seq",
    came="""
            CASE WHEN e.late THEN coalesce(
                (SELECT d.number FROM book.deferred d WHERE (d.partition_id, d.seq) = (e.partition_id, e.seq)), 0
            ) ELSE 0 END""",
    keys="""e.{key} IN (
            SELECT {key} FROM book.entries WHERE day = %(day)s::date AND late AND rulebook = ANY(%(firsts)s::bigint[])
        )""",
)

ALL: Final = "SELECT * FROM counted"
FIRST_SIGHTS: Final = "SELECT *, row_number() OVER (PARTITION BY key, member ORDER BY {place}) AS sight FROM counted"


class Measure(NamedTuple):
    """Which entries a measure counts, how it adds them up, and which of them can be too much."""

    counts: str
    total: str
    adds: str = "true"
    seen: str = ALL
    most: str = "9223372036854775807"


MEASURES: Final = {
    "points": Measure(KEPT, "sum(points)", "(e.points > 0 OR NOT r.clamps)"),
    "events": Measure(DECIDED, "count(*)"),
    "members": Measure(DECIDED, "count(*) FILTER (WHERE sight = 1)", seen=FIRST_SIGHTS, most="max + 1"),
    # What `max_per_day` counts: only what was not refused.
    "earned": Measure(KEPT, "count(*)"),
}

# The longest business day there is, and more.
LONGEST_DAY_MS: Final = 48 * 3_600_000

LATE_VERSIONS: Final = "SELECT DISTINCT rulebook FROM book.entries WHERE day = %s::date AND late ORDER BY 1"

ONCE: Final = """
    SELECT seq, member, points, day::text, total FROM (
        SELECT seq, member, points, day, row_number() OVER (PARTITION BY member ORDER BY seq) AS total
        FROM book.entries WHERE NOT late AND partition_id = %(partition_id)s AND kind = %(kind)s
            AND outcome IN ('granted', 'held')
            AND EXISTS (SELECT FROM unnest(%(firsts)s::bigint[], %(lasts)s::bigint[]) AS r (first, last)
                WHERE seq BETWEEN r.first AND r.last)
    ) e WHERE total > 1 ORDER BY seq
"""


class Counted(msgspec.Struct, frozen=True):
    """What is counted of a day: ``places`` are stretches of seqs (of versions, for late entries) and their limits.

    ``window_ms`` is that of a sliding window, ``None`` for the day itself. ``falls`` is a total that need not grow.
    """

    detail: str
    key: str
    measure: str
    places: list[tuple[int, int, Limit]]
    window_ms: int | None = None
    falls: bool = False

    @property
    def bounds(self) -> list[int | None]:
        """The maximum of each place; ``None`` where it may be passed."""
        return [limit.max if limit.action in ("clamp", "reject") else None for *_, limit in self.places]

    def parameters(self) -> dict[str, object]:
        """Return the places as columns."""
        limits = [limit for *_, limit in self.places]
        return {
            "firsts": [first for first, _, _ in self.places],
            "lasts": [last for _, last, _ in self.places],
            "maxima": self.bounds,
            "clamps": [limit.action == "clamp" for limit in limits],
            "kinds": [_kinds(limit) for limit in limits],
        }

    def since(self, first: int) -> Counted:
        """Return what is counted from seq ``first`` on."""
        return msgspec.structs.replace(self, places=[place for place in self.places if place[1] >= first])

    def told(self, key: str) -> str:
        """Return it in words; a member is told apart from them."""
        return self.detail if self.key == "member" else f"{self.detail} {key}"


def booked_days(connection: Connection, first: str | None, last: str | None) -> list[str]:
    """Return the business days that have entries, as dates, in order."""
    rows = connection.execute(
        "SELECT day::text FROM (SELECT DISTINCT day FROM book.entries WHERE (%(first)s::date IS NULL "
        "OR day >= %(first)s) AND (%(last)s::date IS NULL OR day <= %(last)s)) d ORDER BY d.day",
        {"first": first, "last": last},
    )
    return [day for (day,) in rows]


def check_caps(connection: Connection, day: str, recorded: Sequence[Recorded]) -> Iterator[Finding]:
    """Yield each entry of ``day`` that a limit or ``max_per_day`` of ``recorded`` rulebooks had to keep out."""
    for partition_id, group in itertools.groupby(recorded, key=lambda record: record.partition_id):
        about: dict[str, object] = {"day": day, "partition_id": partition_id}
        span = span_of(connection, about)
        if span is None:
            continue
        records = list(group)
        until = [record for record in records if record.first_seq <= span.last]
        # Only what was in force with the day's entries counts; of what was in force before, what it counted then.
        during = [record for record in until if record.last_seq >= span.first]
        of_day = [*_limits(during, sliding=False), *_daily(during)]
        taken = _taken(connection, about, span) if any(counted.falls for counted in of_day) else LAST_SEQ
        for counted in of_day:
            # Where a total never falls, it is too low without what is not in the book, and none is too high.
            yield from _check(
                connection, counted, about | {"taken": taken if counted.falls else LAST_SEQ}, OF_PARTITION
            )
        # A window reaches back to entries of days before, by what was in force then.
        about |= {"partition": records[0].partition, "last": span.last}
        for counted in _limits(until, sliding=True):
            yield from _check_sliding(connection, counted, about, span)
    versions = {record.rulebook.version: record for record in recorded}
    for (version,) in connection.execute(LATE_VERSIONS, (day,)).fetchall():
        if version in versions:
            records = [versions[version]._replace(first_seq=version, last_seq=version)]
            for counted in itertools.chain(_limits(records, sliding=False), _daily(records)):
                # What the book does not have did not count for them.
                yield from _check(connection, counted, {"day": day, "taken": LAST_SEQ}, OF_LATE)


def _limits(records: Sequence[Recorded], *, sliding: bool) -> Iterator[Counted]:
    """Yield the limits of days, or those with a sliding window, each as long as it keeps its counts."""
    going: dict[Any, Counted] = {}
    falls = any(_takes_points(record.rulebook) for record in records)
    for *_, first, last, rulebook in records:
        kept: dict[Any, Counted] = {}
        for limit in rulebook.limits:
            window_ms = limit.window.duration_ms
            if (window_ms is not None) is not sliding:
                continue
            detail = f"limit {limit.id}: {limit.measure} of {limit.key}"
            new = Counted(detail, limit.key, limit.measure, [], window_ms, falls and limit.measure == "points")
            kept[limit.identity] = going.pop(limit.identity, new)
            kept[limit.identity].places.append((first, last, limit))
        yield from going.values()
        going = kept
    yield from going.values()


def _daily(records: Sequence[Recorded]) -> Iterator[Counted]:
    """Yield what is counted by ``max_per_day`` while ``records`` are in force."""
    for kind in sorted({rule.kind for record in records for rule in record.rulebook.earning_rules}):
        rules = [(record, record.rulebook.earning_rule(kind)) for record in records]
        places = [
            (record.first_seq, record.last_seq, _as_limit(rule))
            for record, rule in rules
            if rule is not None and rule.max_per_day is not None
        ]
        if places:
            yield Counted(f"{kind} counted more often than max_per_day", "member", "earned", places)


def _as_limit(rule: EarningRule) -> Limit:
    """Return ``max_per_day`` as the limit that it is."""
    assert rule.max_per_day is not None
    return Limit(rule.kind, "member", "events", Window(None), rule.max_per_day, "reject", (rule.kind,))


def _takes_points(rulebook: Rulebook) -> bool:
    """Tell whether campaigns may come to less than nothing: an entry then takes points from its member."""
    lowering = (campaign.multiplier for campaign in rulebook.campaigns if campaign.multiplier < 1)
    return combined_multiplier(rulebook.stacking, lowering) < 0


def _taken(connection: Connection, about: dict[str, object], span: Span) -> int:
    """Return the first seq of a day whose event counted but is not in the book: totals may have fallen by it."""
    first = first_seq(connection, about, span, LONGEST_DAY_MS)
    return first_taken(connection, about | {"first": first, "last": span.last})


def _check(connection: Connection, counted: Counted, about: dict[str, object], those: Those) -> Iterator[Finding]:
    if all(bound is None for bound in counted.bounds):
        return
    key = sql.Identifier(counted.key)
    measure = MEASURES[counted.measure]
    parts = those._asdict() | measure._asdict() | {"seen": measure.seen.format(place=those.place)}
    query = sql.SQL(COUNTED).format(key=key, **{name: sql.SQL(part).format(key=key) for name, part in parts.items()})
    yield from _too_much(connection, query, counted, about)


def _check_sliding(connection: Connection, counted: Counted, about: dict[str, object], span: Span) -> Iterator[Finding]:
    bounds = [bound for bound in counted.since(span.first).bounds if bound is not None]
    if counted.window_ms is None or not bounds:
        return
    first = first_seq(connection, about, span, counted.window_ms)
    about = about | {
        "first": first,
        "least": min(bounds),
        "taken": first_taken(connection, about | {"first": first}),
        "falls": counted.falls,
        "unit_ms": unit_of(counted.measure, counted.window_ms),
        "window_ms": counted.window_ms,
    }
    yield from _too_much(connection, sliding_query(counted.key, counted.measure), counted.since(first), about)


def _too_much(
    connection: Connection, query: sql.Composed, counted: Counted, about: dict[str, object]
) -> Iterator[Finding]:
    for partition, seq, member, key, most, total, points in connection.execute(query, about | counted.parameters()):
        owed = -min(points, total - most) if counted.measure == "points" else -points
        yield Finding(
            "caps",
            counted.told(shown(key)),
            partition,
            seq=seq,
            member=shown(member),
            day=str(about["day"]),
            expected=most,
            found=total,
            owed=owed or None,
        )


def _kinds(limit: Limit) -> str | None:
    return None if limit.kinds is None else msgspec.json.encode([stored(kind) for kind in limit.kinds]).decode()


def check_once(connection: Connection, recorded: Sequence[Recorded]) -> Iterator[Finding]:
    """Yield each entry by which a member earned again what by ``recorded`` rulebooks can be earned once."""
    places: dict[tuple[int, str, str], list[tuple[int, int]]] = {}
    for record in recorded:
        for rule in record.rulebook.earning_rules:
            if rule.once:
                key = record.partition_id, record.partition, rule.kind
                places.setdefault(key, []).append((record.first_seq, record.last_seq))
    for (partition_id, partition, kind), seqs in places.items():
        firsts, lasts = zip(*seqs, strict=True)
        about = {"partition_id": partition_id, "kind": stored(kind), "firsts": list(firsts), "lasts": list(lasts)}
        for seq, member, points, day, total in connection.execute(ONCE, about):
            detail = f"{kind} can be earned once in a life"
            where: dict[str, Any] = {"seq": seq, "member": shown(member), "day": day}
            yield Finding("once", detail, partition, **where, expected=1, found=total, owed=-points or None)
