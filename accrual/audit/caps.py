"""No more than limits let through, counted again from a day's entries, for the limits that can be counted so.

A limit of a business day that clamps or rejects bounds what was granted and held; one that holds or freezes may be
passed. Entries are counted by partition and rulebook version, as the engines counted them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from psycopg import sql

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.rulebook import Limit, Rulebook, parse

__all__ = ["booked_days", "check_caps", "check_once", "rulebooks"]

CAP: Final = """
    SELECT e.{key}::text, {measured}, array_agg(DISTINCT e.member) FROM book.entries e
    WHERE e.day = %(day)s::date AND e.partition_id = %(partition_id)s AND e.rulebook = %(version)s
        AND e.outcome IN ('granted', 'held') AND e.{key} IS NOT NULL
        AND (%(kinds)s::text[] IS NULL OR e.kind = ANY(%(kinds)s))
    GROUP BY 1 HAVING {measured} > %(max)s ORDER BY 1
"""

MEASURES: Final = {"points": "sum(e.points)", "events": "count(*)", "members": "count(DISTINCT e.member)"}

PER_DAY: Final = """
    SELECT member, count(*) FROM book.entries
    WHERE day = %(day)s::date AND partition_id = %(partition_id)s AND rulebook = %(version)s AND kind = %(kind)s
        AND outcome IN ('granted', 'held') GROUP BY member HAVING count(*) > %(max)s ORDER BY member
"""

ONCE: Final = """
    SELECT member, count(*) FROM book.entries WHERE partition_id = %(partition_id)s AND kind = %(kind)s
        AND rulebook = ANY(%(versions)s) AND outcome IN ('granted', 'held')
    GROUP BY member HAVING count(*) > 1 ORDER BY member
"""


def rulebooks(connection: Connection) -> list[tuple[int, str, Rulebook]]:
    """Return every recorded rulebook with the number and name of its partition."""
    rows = connection.execute(
        "SELECT DISTINCT ON (partition_id, version) partition_id, p.name, r.text FROM book.rulebooks r "
        "JOIN book.partitions p USING (partition_id) ORDER BY partition_id, version, r.batch"
    ).fetchall()
    return [(partition_id, name, parse(text)) for partition_id, name, text in rows]


def booked_days(connection: Connection, first: str | None, last: str | None) -> list[str]:
    """Return the business days that have entries, as dates, in order."""
    rows = connection.execute(
        "SELECT DISTINCT day FROM book.entries WHERE (%(first)s::date IS NULL OR day >= %(first)s) "
        "AND (%(last)s::date IS NULL OR day <= %(last)s) ORDER BY 1",
        {"first": first, "last": last},
    )
    return [day.isoformat() for (day,) in rows]


def check_caps(connection: Connection, day: str, recorded: Sequence[tuple[int, str, Rulebook]]) -> Iterator[Finding]:
    """Yield where more was let through on ``day`` than a limit or ``max_per_day`` of ``recorded`` rulebooks allows."""
    for partition_id, partition, rulebook in recorded:
        about = {"day": day, "partition_id": partition_id, "version": rulebook.version}
        for limit in rulebook.limits:
            if limit.window.duration_ms is None and limit.action in ("clamp", "reject"):
                yield from _check_limit(connection, limit, partition, about)
        for rule in rulebook.earning_rules:
            if rule.max_per_day is None:
                continue
            parameters = about | {"kind": stored(rule.kind), "max": rule.max_per_day}
            for member, count in connection.execute(PER_DAY, parameters):
                detail = f"{rule.kind} counted more often than max_per_day"
                yield Finding(
                    "caps", detail, partition, member=shown(member), day=day, expected=rule.max_per_day, found=count
                )


def _check_limit(connection: Connection, limit: Limit, partition: str, about: dict[str, object]) -> Iterator[Finding]:
    query = sql.SQL(CAP).format(key=sql.Identifier(limit.key), measured=sql.SQL(MEASURES[limit.measure]))
    kinds = None if limit.kinds is None else [stored(kind) for kind in limit.kinds]
    parameters = about | {"kinds": kinds, "max": limit.max}
    for key, measured, members in connection.execute(query, parameters):
        who = shown(members[0]) if len(members) == 1 else None
        detail = f"limit {limit.id}: {limit.measure} of {limit.key} {shown(key)}"
        yield Finding(
            "caps", detail, partition, member=who, day=str(about["day"]), expected=limit.max, found=int(measured)
        )


def check_once(connection: Connection, recorded: Sequence[tuple[int, str, Rulebook]]) -> Iterator[Finding]:
    """Yield where a member earned more than once what by ``recorded`` rulebooks can be earned once."""
    versions: dict[tuple[int, str, str], list[int]] = {}
    for partition_id, partition, rulebook in recorded:
        for rule in rulebook.earning_rules:
            if rule.once:
                versions.setdefault((partition_id, partition, rule.kind), []).append(rulebook.version)
    for (partition_id, partition, kind), known in versions.items():
        parameters = {"partition_id": partition_id, "kind": stored(kind), "versions": known}
        for member, count in connection.execute(ONCE, parameters):
            detail = f"{kind} can be earned once in a life"
            yield Finding("once", detail, partition, member=shown(member), expected=1, found=count)
