"""Totals of sliding windows (SPEC section 3), entry by entry, in SQL.

Nothing is looked up for an entry. What each brings is added where it comes and taken away where it leaves the window,
in the order of what the key then has as ``latest``, so that one running sum is the total of them all. That is exact:
``latest`` only grows, so what has left a window is in no later one, and where it leaves, ``latest`` is past what it was
when it came. Keys that have no more in all than the limit lets through are left out before; nearly all of them are. So
it takes two sorts, however hot a key is, and the second one of little.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from psycopg import sql

from accrual.audit.recorded import LAST_SEQ
from accrual.book.database import Connection

__all__ = ["DECIDED", "KEPT", "Span", "first_seq", "first_taken", "sliding_query", "span_of", "unit_of"]

# The entries of a day, and the earliest event time among them.
SPAN: Final = """
    SELECT min(seq), max(seq), min(least(ts_ms, split_part(stream_id, '-', 1)::bigint)) FROM book.entries
    WHERE day = %(day)s::date AND partition_id = %(partition_id)s AND NOT late
"""

# The last entry of a day that arrived too early for a window.
TOO_EARLY: Final = """
    SELECT max(seq) FROM book.entries WHERE day = %(day)s::date - %(days)s::integer AND partition_id = %(partition_id)s
        AND NOT late AND split_part(stream_id, '-', 1)::bigint < %(since_ms)s
"""

TAKEN: Final = """
    SELECT min(seq) FROM book.exceptions
    WHERE kind = 'id_taken' AND partition_id = %(partition_id)s AND seq BETWEEN %(first)s AND %(last)s
"""

# Entries that were counted, from `first` on, each with the event time and the arrival; `max` is only there where the
# entry is one of the day that was let through. Every event counts that was not refused before limits were looked at.
COUNTED: Final = """
    WITH counted AS (
        SELECT e.seq, e.member, e.points, e.{key} AS key, split_part(e.stream_id, '-', 1)::bigint AS at_ms,
            least(e.ts_ms, split_part(e.stream_id, '-', 1)::bigint) AS ms,
            CASE WHEN e.day = %(day)s::date AND e.outcome IN ('granted', 'held') AND {adds} THEN r.max END AS max
        FROM book.entries e JOIN unnest(
            %(firsts)s::bigint[], %(lasts)s::bigint[], %(maxima)s::bigint[], %(clamps)s::boolean[], %(kinds)s::jsonb[]
        ) AS r (first, last, max, clamps, kinds)
            ON e.seq BETWEEN r.first AND r.last AND (r.kinds IS NULL OR r.kinds ? e.kind)
        WHERE e.day BETWEEN %(day)s::date - 3 AND %(day)s::date + 1 AND NOT e.late
            AND e.partition_id = %(partition_id)s AND e.seq BETWEEN %(first)s AND %(last)s
            AND {counts} AND e.{key} IS NOT NULL
    ), placed AS (
        {placed}
    ), running AS (
        SELECT p.key, p.member, p.points, m.seq, m.max, sum(m.value) OVER (
            PARTITION BY p.key ORDER BY m.place, m.seq ROWS UNBOUNDED PRECEDING
        ) AS total
        FROM placed p CROSS JOIN LATERAL (VALUES
            (place, seq, {value},
                CASE WHEN seq < %(taken)s OR NOT %(falls)s AND at_ms / %(unit_ms)s <= place THEN max END),
            {leaving}
        ) AS m (place, seq, value, max)
        WHERE p.whole > %(least)s
    )
    SELECT %(partition)s::text, seq, member, key::text, max, least(total, {most})::bigint, points
    FROM running WHERE total > max ORDER BY seq
"""

DECIDED: Final = "e.outcome IN ('granted', 'held', 'rejected') AND e.cause IS NULL"
KEPT: Final = "e.outcome IN ('granted', 'held')"

# A place is a bucket's index: the latest, or of what leaves, the first latest with which it is in no window any more.
BUCKETS: Final = """
    SELECT *, max(ms / %(unit_ms)s) OVER (PARTITION BY key ORDER BY seq ROWS UNBOUNDED PRECEDING) AS place,
        {whole} OVER (PARTITION BY key) AS whole FROM counted
"""
LEAVING: Final = "(greatest(ms / %(unit_ms)s, place - 7) + 8, 0, -{value}, NULL)"

# A place is a time. A member comes with a sight within the window, leaves a window after it, and stays where a later
# one came before that: then the leaving is taken back, and the later sight is the one that leaves.
SIGHTS: Final = """
    SELECT *, max(ms) OVER (PARTITION BY key ORDER BY seq ROWS UNBOUNDED PRECEDING) AS place,
        count(*) FILTER (WHERE sight IS NULL) OVER (PARTITION BY key) AS whole
    FROM (
        SELECT *, max(ms) OVER (
            PARTITION BY key, member ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS sight FROM counted
    ) c
"""
SEEN: Final = "(ms > greatest(place - %(window_ms)s, sight))"
THERE: Final = "((sight > place - %(window_ms)s) IS TRUE)"
COMING: Final = f"({SEEN} AND NOT {THERE})::integer"
GOING: Final = f"""
            (ms + %(window_ms)s, 0, -{SEEN}::integer, NULL),
            (sight + %(window_ms)s, 0, ({SEEN} AND {THERE})::integer, NULL)"""


class Measure(NamedTuple):
    """What is counted of a measure, which entries can be too much, and how places, values and totals are made."""

    counts: str
    adds: str
    placed: str
    value: str
    leaving: str
    most: str = "9223372036854775807"


MEASURES: Final = {
    "points": Measure(
        *(KEPT, "(e.points > 0 OR NOT r.clamps)", BUCKETS.format(whole="sum(greatest(points, 0))")),
        *("points", LEAVING.format(value="points")),
    ),
    "events": Measure(DECIDED, "true", BUCKETS.format(whole="count(*)"), "1", LEAVING.format(value="1")),
    "members": Measure(DECIDED, "true", SIGHTS, COMING, GOING, "max + 1"),
}


class Span(NamedTuple):
    """The entries of a day: the first and last seq, and the earliest event time among them."""

    first: int
    last: int
    earliest_ms: int


def span_of(connection: Connection, about: dict[str, object]) -> Span | None:
    """Return what a day's entries span; ``None`` where it has none."""
    row = connection.execute(SPAN, about).fetchone()
    return None if row is None or row[0] is None else Span(*row)


def first_seq(connection: Connection, about: dict[str, object], span: Span, window_ms: int) -> int:
    """Return the seq from which on entries must be counted for the windows of a day's entries.

    Let S be the earliest event time of those. With each of them, ``latest`` is not before S. An earlier entry counts in
    its window by its own time, which then is above S - W. Or it was below, and was raised to the oldest bucket; then it
    came behind the one that ``latest`` is of, so its arrival is not before that bucket of S. No time is above its
    arrival, so in both cases it arrived at S - W or later. What arrived before has no later time than that: it moves
    no ``latest`` that any of this depends on. Arrivals go up with seqs, so that is a seq. A window has 24 hours at the
    most, and what counts is of the day of its arrival or the one before; so all that is behind that seq is of three
    days before at the earliest, and of one day later at the latest.
    """
    early = [
        connection.execute(TOO_EARLY, about | {"days": days, "since_ms": span.earliest_ms - window_ms}).fetchone()
        for days in (1, 2)
    ]
    return max(row[0] or 0 for row in early if row is not None) + 1


def first_taken(connection: Connection, about: dict[str, object]) -> int:
    """Return the first seq whose event was counted, but is not in the book: its id was booked for another one.

    ``LAST_SEQ`` where there is none.

    Such an event may have moved ``latest`` on. Behind it, an entry is judged only where nothing that had arrived can
    have: so totals may be too low, but none is too high. Where it may have taken points, none is judged behind it.
    """
    (taken,) = connection.execute(TAKEN, about).fetchone() or (None,)
    return LAST_SEQ if taken is None else int(taken)


def sliding_query(key: str, measure: str) -> sql.Composed:
    """Return the query of what passes a limit's ``max`` by its sliding window."""
    parts = MEASURES[measure]._asdict()
    return sql.SQL(COUNTED).format(key=sql.Identifier(key), **{name: sql.SQL(part) for name, part in parts.items()})


def unit_of(measure: str, window_ms: int) -> int:
    """Return what places are counted in: buckets, or for members milliseconds."""
    return 1 if measure == "members" else window_ms // 8
