"""No more than limits let through, counted again from the entries of a day and, for sliding windows, those before.

A limit that clamps or rejects bounds what was granted and held; one that holds or freezes may be passed. Entries are
counted by partition and through rulebook versions as long as the limit keeps its counts, as the engines count them.
Each entry that was let through with more than that is a finding of its own, and owes what was too much of it. Late
entries count among themselves here, and in no sliding window: what they are decided on is another check.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from psycopg import sql

from accrual.audit.findings import Finding
from accrual.audit.recorded import LAST_SEQ, Recorded
from accrual.audit.sliding import Span, first_seq, first_taken, sliding_query, span_of, unit_of
from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.rulebook import EarningRule, Limit, Window

__all__ = ["booked_days", "check_caps", "check_once"]

# Entries that were let through, each with what had been counted with it: a maximum for each stretch of seqs.
COUNTED: Final = """
    WITH counted AS (
        SELECT p.name, e.seq, e.number, e.member, e.points, e.{key}::text AS key, r.max, r.clamps
        FROM book.entries e JOIN book.partitions p USING (partition_id) JOIN unnest(
            %(firsts)s::bigint[], %(lasts)s::bigint[], %(maxima)s::bigint[], %(clamps)s::boolean[], %(kinds)s::jsonb[]
        ) AS r (first, last, max, clamps, kinds) ON {of} AND (r.kinds IS NULL OR r.kinds ? e.kind)
        WHERE e.day = %(day)s::date AND e.outcome IN ('granted', 'held') AND e.{key} IS NOT NULL
    ), running AS (
        SELECT *, {running} AS total FROM ({seen}) c
    )
    SELECT name, seq, member, key, max, total::bigint, points FROM running WHERE total > max AND {adds} ORDER BY {place}
"""

OF_PARTITION: Final = "NOT e.late AND e.partition_id = %(partition_id)s AND e.seq BETWEEN r.first AND r.last"
OF_LATE: Final = "e.late AND e.rulebook BETWEEN r.first AND r.last"

ALL: Final = "SELECT * FROM counted"
FIRST_SIGHTS: Final = "SELECT *, min(seq) OVER (PARTITION BY key, member) AS sight FROM counted"

# How a measure adds up entry by entry, in what it is added up from, and which entries add to it.
MEASURES: Final = {
    "points": ("sum(points) OVER (PARTITION BY key ORDER BY {place})", ALL, "(points > 0 OR NOT clamps)"),
    "events": ("row_number() OVER (PARTITION BY key ORDER BY {place})", ALL, "true"),
    "members": ("dense_rank() OVER (PARTITION BY key ORDER BY sight)", FIRST_SIGHTS, "true"),
}

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

    ``window_ms`` is that of a sliding window, ``None`` for the day itself.
    """

    detail: str
    key: str
    measure: str
    places: list[tuple[int, int, Limit]]
    window_ms: int | None = None

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
        "SELECT DISTINCT day FROM book.entries WHERE (%(first)s::date IS NULL OR day >= %(first)s) "
        "AND (%(last)s::date IS NULL OR day <= %(last)s) ORDER BY 1",
        {"first": first, "last": last},
    )
    return [day.isoformat() for (day,) in rows]


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
        for counted in itertools.chain(_limits(during, sliding=False), _daily(during)):
            yield from _check(connection, counted, about, OF_PARTITION)
        # A window reaches back to entries of days before, by what was in force then.
        about |= {"partition": records[0].partition, "last": span.last}
        for counted in _limits(until, sliding=True):
            yield from _check_sliding(connection, counted, about, span)
    versions = {record.rulebook.version: record for record in recorded}
    for (version,) in connection.execute(LATE_VERSIONS, (day,)).fetchall():
        if version in versions:
            records = [versions[version]._replace(first_seq=version, last_seq=version)]
            for counted in itertools.chain(_limits(records, sliding=False), _daily(records)):
                yield from _check(connection, counted, {"day": day}, OF_LATE)


def _limits(records: Sequence[Recorded], *, sliding: bool) -> Iterator[Counted]:
    """Yield the limits of days, or those with a sliding window, each as long as it keeps its counts."""
    going: dict[Any, Counted] = {}
    for *_, first, last, rulebook in records:
        kept: dict[Any, Counted] = {}
        for limit in rulebook.limits:
            window_ms = limit.window.duration_ms
            if (window_ms is not None) is not sliding:
                continue
            detail = f"limit {limit.id}: {limit.measure} of {limit.key}"
            new = Counted(detail, limit.key, limit.measure, [], window_ms)
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
            yield Counted(f"{kind} counted more often than max_per_day", "member", "events", places)


def _as_limit(rule: EarningRule) -> Limit:
    """Return ``max_per_day`` as the limit that it is."""
    assert rule.max_per_day is not None
    return Limit(rule.kind, "member", "events", Window(None), rule.max_per_day, "reject", (rule.kind,))


def _check(connection: Connection, counted: Counted, about: dict[str, object], of: str) -> Iterator[Finding]:
    if all(bound is None for bound in counted.bounds):
        return
    running, seen, adds = MEASURES[counted.measure]
    place = "number, seq" if of == OF_LATE else "seq"
    query = sql.SQL(COUNTED).format(
        key=sql.Identifier(counted.key),
        of=sql.SQL(of),
        running=sql.SQL(running.format(place=place)),
        seen=sql.SQL(seen),
        adds=sql.SQL(adds),
        place=sql.SQL(place),
    )
    yield from _too_much(connection, query, counted, about)


def _check_sliding(connection: Connection, counted: Counted, about: dict[str, object], span: Span) -> Iterator[Finding]:
    bounds = [bound for bound in counted.since(span.first).bounds if bound is not None]
    if counted.window_ms is None or not bounds:
        return
    first = first_seq(connection, about, span, counted.window_ms)
    taken = first_taken(connection, about | {"first": first})
    about = about | {
        "first": first,
        "least": min(bounds),
        "taken": LAST_SEQ if taken is None else taken,
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
