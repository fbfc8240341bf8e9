"""``book rebuild``: balances, lots, the states of members and days made anew from the facts; what differs is said.

Whoever changes points locks balances first, so that holding those keeps facts and projections as they are until the two
have been compared and put right: ingester and jobs wait, those who read do not. Of a single member only that member's
are held. Only rows that differ are written. What facts do not tell of a member (tier, card, immunity) stays as it is.

Who only asks holds nobody up: each comparison is one query, which sees facts and projections at one moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import psycopg
from psycopg import errors

from accrual.book.database import Connection, retried
from accrual.book.people import check_person
from accrual.book.posting import act, lock_members
from accrual.book.texts import shown, stored
from accrual.errors import BookError
from accrual.rulebook import parse

__all__ = ["rebuild", "rebuild_member"]

PAGE_ROWS: Final = 500

LOCK: Final = "LOCK TABLE book.balances, book.lots, book.members, book.days IN SHARE ROW EXCLUSIVE MODE"

CREATE_DIFFERENCES: Final = """
    CREATE TEMP TABLE IF NOT EXISTS differences (
        projection text NOT NULL, member text COLLATE "C", day date, was jsonb, is_now jsonb,
        partition_id smallint, number bigint
    )
"""

COMPARE_BALANCES: Final = """
    WITH facts AS (
        SELECT m.member, sum(side.points) FILTER (WHERE account = 'pending') AS pending,
            sum(side.points) FILTER (WHERE account = 'available') AS available,
            sum(side.points) FILTER (WHERE account = 'held') AS held
        FROM book.movements m, LATERAL (VALUES (from_account, -points), (to_account, points)) AS side (account, points)
        WHERE %(member)s::text IS NULL OR m.member = %(member)s GROUP BY m.member
    ), both_sides AS (
        SELECT coalesce(b.member, f.member) AS member,
            jsonb_build_object('pending', coalesce(b.pending, 0), 'available', coalesce(b.available, 0),
                'held', coalesce(b.held, 0)) AS was,
            jsonb_build_object('pending', coalesce(f.pending, 0), 'available', coalesce(f.available, 0),
                'held', coalesce(f.held, 0)) AS is_now
        FROM (SELECT * FROM book.balances WHERE %(member)s::text IS NULL OR member = %(member)s) b
        FULL JOIN facts f ON f.member = b.member
        WHERE (coalesce(b.pending, 0), coalesce(b.available, 0), coalesce(b.held, 0))
            <> (coalesce(f.pending, 0), coalesce(f.available, 0), coalesce(f.held, 0))
    )
    INSERT INTO differences (projection, member, was, is_now) SELECT 'balances', member, was, is_now FROM both_sides
"""

# A lot keeps the expiry date that it was formed with.
COMPARE_LOTS: Final = """
    WITH facts AS (
        SELECT p.member, part.day, min(p.lot_expires_on) AS expires_on,
            sum(CASE p.to_account WHEN 'available' THEN part.points ELSE -part.points END) AS points
        FROM book.postings p, unnest(p.lot_days, p.lot_points) AS part (day, points)
        WHERE part.day IS NOT NULL AND (%(member)s::text IS NULL OR p.member = %(member)s) GROUP BY p.member, part.day
    )
    INSERT INTO differences (projection, member, day, was, is_now)
    SELECT 'lots', coalesce(l.member, f.member), coalesce(l.day, f.day),
        CASE WHEN l.member IS NOT NULL THEN jsonb_build_object('expires_on', l.expires_on, 'points', l.points) END,
        CASE WHEN f.member IS NOT NULL THEN jsonb_build_object('expires_on', f.expires_on, 'points', f.points) END
    FROM (SELECT * FROM book.lots WHERE %(member)s::text IS NULL OR member = %(member)s) l
    FULL JOIN facts f ON (f.member, f.day) = (l.member, l.day)
    WHERE (l.expires_on, l.points) IS DISTINCT FROM (f.expires_on, f.points)
"""

CREATE_FREEZING: Final = """
    CREATE TEMP TABLE IF NOT EXISTS freezing_limits (partition_id smallint, version bigint, limit_id text COLLATE "C")
"""

# A verdict decides; a freeze counts where no verdict came after it, and never over a block. Whether the member was
# immune shows in what was held; where the event was rejected, in the immunity that the last release gave.
COMPARE_STATES: Final = """
    WITH freezes AS (
        SELECT e.* FROM book.entries e
        WHERE NOT e.late AND e.evidence IS NOT NULL AND e.outcome IN ('held', 'rejected') AND EXISTS (
            SELECT FROM freezing_limits f
            WHERE (f.partition_id, f.version) = (e.partition_id, e.rulebook)
                AND e.evidence @> jsonb_build_array(jsonb_build_object('limit', f.limit_id)))
    ), changes AS (
        SELECT member, partition_id, number, seq, CASE kind
            WHEN 'member_released' THEN 'active' WHEN 'member_blocked' THEN 'blocked' ELSE 'frozen' END AS state
        FROM book.entries
        WHERE outcome = 'applied' AND kind IN ('member_frozen', 'member_released', 'member_blocked')
        UNION ALL
        SELECT member, f.partition_id, f.number, seq, 'frozen' FROM freezes f LEFT JOIN book.members m USING (member)
        WHERE outcome = 'held'
            OR least(ts_ms, split_part(stream_id, '-', 1)::bigint) >= coalesce(m.immune_until_ms, 0)
        UNION ALL
        SELECT details ->> 'member', NULL, action, 0, CASE kind WHEN 'release' THEN 'active' ELSE 'blocked' END
        FROM book.actions WHERE kind IN ('release', 'confirm')
    ), last_ones AS (
        SELECT member, max(partition_id) AS partition_id, max(number) AS number,
            max(ARRAY[number, seq]) FILTER (WHERE state = 'frozen') AS frozen,
            max(ARRAY[number, seq]) FILTER (WHERE state <> 'frozen') AS judged,
            (array_agg(state ORDER BY number DESC, seq DESC) FILTER (WHERE state <> 'frozen'))[1] AS verdict
        FROM changes WHERE %(member)s::text IS NULL OR member = %(member)s GROUP BY member
    ), facts AS (
        SELECT member, partition_id, number,
            CASE WHEN verdict = 'blocked' THEN 'blocked' WHEN frozen > judged OR judged IS NULL THEN 'frozen'
                ELSE 'active' END AS state
        FROM last_ones
    )
    INSERT INTO differences (projection, member, was, is_now, partition_id, number)
    SELECT 'members', coalesce(m.member, f.member),
        CASE WHEN m.member IS NOT NULL THEN jsonb_build_object('state', m.state) END,
        jsonb_build_object('state', coalesce(f.state, 'active')), f.partition_id, f.number
    FROM (SELECT * FROM book.members WHERE %(member)s::text IS NULL OR member = %(member)s) m
    FULL JOIN facts f ON f.member = m.member
    WHERE coalesce(m.state, 'active') <> coalesce(f.state, 'active')
"""

COMPARE_DAYS: Final = """
    INSERT INTO differences (projection, day, partition_id, was, is_now)
    SELECT 'days', day, partition_id, to_jsonb(d.last_seq), to_jsonb(f.last_seq)
    FROM (SELECT day, partition_id, max(seq) AS last_seq FROM book.entries GROUP BY day, partition_id) f
    FULL JOIN book.days d USING (day, partition_id)
    WHERE d.last_seq IS DISTINCT FROM f.last_seq
"""

FITS: Final = """
    SELECT greatest(available, 0) = (SELECT coalesce(sum(points), 0) FROM book.lots WHERE member = %(member)s)
    FROM book.balances WHERE member = %(member)s
"""

PUT_RIGHT: Final = (
    """
    INSERT INTO book.balances (member, pending, available, held)
    SELECT member, (is_now ->> 'pending')::bigint, (is_now ->> 'available')::bigint, (is_now ->> 'held')::bigint
    FROM differences WHERE projection = 'balances' ORDER BY member
    ON CONFLICT (member) DO UPDATE
        SET pending = excluded.pending, available = excluded.available, held = excluded.held
    """,
    """
    DELETE FROM book.lots l USING differences d
    WHERE d.projection = 'lots' AND d.is_now IS NULL AND (l.member, l.day) = (d.member, d.day)
    """,
    """
    INSERT INTO book.lots (member, day, expires_on, points)
    SELECT member, day, (is_now ->> 'expires_on')::date, (is_now ->> 'points')::bigint
    FROM differences WHERE projection = 'lots' AND is_now IS NOT NULL ORDER BY member, day
    ON CONFLICT (member, day) DO UPDATE SET expires_on = excluded.expires_on, points = excluded.points
    """,
    """
    INSERT INTO book.members (member, partition_id, state, incomplete, number)
    SELECT member, coalesce(partition_id, (SELECT min(partition_id) FROM book.partitions)), is_now ->> 'state', true,
        coalesce(number, 0)
    FROM differences WHERE projection = 'members' ORDER BY member
    ON CONFLICT (member) DO UPDATE SET state = excluded.state, number = excluded.number
    """,
    """
    DELETE FROM book.days n USING differences d
    WHERE d.projection = 'days' AND d.is_now IS NULL AND (n.day, n.partition_id) = (d.day, d.partition_id)
    """,
    """
    INSERT INTO book.days (day, partition_id, last_seq)
    SELECT day, partition_id, is_now::bigint FROM differences WHERE projection = 'days' AND is_now IS NOT NULL
    ORDER BY day, partition_id
    ON CONFLICT (day, partition_id) DO UPDATE SET last_seq = excluded.last_seq
    """,
)

DIFFERENCES: Final = """
    SELECT projection, member, day::text, p.name, was, is_now
    FROM differences d LEFT JOIN book.partitions p ON projection = 'days' AND p.partition_id = d.partition_id
    ORDER BY 1, 2, 3, 4
"""


def rebuild(
    connection: Connection, *, by: str = "operator", member: str | None = None, dry_run: bool = False
) -> Iterator[dict[str, Any]]:
    """Make the projections anew, in one transaction, and yield what differed: what was there, and what it is now.

    All is in place before the first difference comes. Of one ``member`` only, if named. With ``dry_run`` nothing is
    changed. Raises ``BookError`` where the facts come to what cannot be: a posting is wrong then, and the audit says
    which.
    """
    check_person(by)
    name = None if member is None else stored(member)

    def work() -> None:
        with connection.transaction() as transaction, connection.cursor() as cursor:
            if not dry_run:
                _lock(cursor, name)
            found = _compare(cursor, name)
            if dry_run:
                return
            if not found:
                # Nothing is left behind, not even the row that stands for a member whom the book does not know.
                raise psycopg.Rollback(transaction)
            _put_right(cursor)
            act(cursor, "rebuild", by=stored(by), details={"differences": found})

    with connection.cursor() as cursor:
        _forget(cursor)
    retried(work)
    with connection.transaction(), connection.cursor(name="differences") as cursor:
        cursor.itersize = PAGE_ROWS
        cursor.execute(DIFFERENCES)
        for projection, of, day, partition, was, is_now in cursor:
            about = {"projection": projection, "member": shown(of), "day": day, "partition": partition}
            yield {name: value for name, value in about.items() if value is not None} | {"was": was, "is": is_now}


def rebuild_member(cursor: psycopg.Cursor[Any], name: str) -> None:
    """Make the projections of the member ``name`` (as ``stored``) anew, within the cursor's transaction.

    The member must be locked. Raises ``BookError`` as ``rebuild`` does.
    """
    _compare(cursor, name)
    _put_right(cursor)
    cursor.execute(FITS, {"member": name})
    if cursor.fetchone() == (False,):
        raise BookError(f"the lots of member {shown(name)} do not come to what is available")


def _forget(cursor: psycopg.Cursor[Any]) -> None:
    cursor.execute(CREATE_DIFFERENCES)
    cursor.execute("TRUNCATE differences")


def _lock(cursor: psycopg.Cursor[Any], name: str | None) -> None:
    """Let nobody change points, or those of the member ``name``, until the transaction ends."""
    if name is None:
        cursor.execute(LOCK)
    else:
        lock_members(cursor, [name])


def _compare(cursor: psycopg.Cursor[Any], name: str | None) -> int:
    """Write down what differs, and return how much; days are of no member."""
    _forget(cursor)
    _note_freezing_limits(cursor)
    queries = [COMPARE_BALANCES, COMPARE_LOTS, COMPARE_STATES, *([COMPARE_DAYS] if name is None else [])]
    return sum(cursor.execute(query, {"member": name}).rowcount for query in queries)


def _put_right(cursor: psycopg.Cursor[Any]) -> None:
    try:
        for statement in PUT_RIGHT:
            cursor.execute(statement)
    except (errors.CheckViolation, errors.NotNullViolation) as error:
        said = error.diag.message_detail or ""
        raise BookError(f"the postings come to what cannot be, so one of them is wrong: {said}") from error


def _note_freezing_limits(cursor: psycopg.Cursor[Any]) -> None:
    """Note the limits whose action is to freeze, by partition and version of the rulebook."""
    cursor.execute(CREATE_FREEZING)
    cursor.execute("TRUNCATE freezing_limits")
    cursor.execute("SELECT partition_id, version, text FROM book.rulebooks")
    cursor.executemany(
        "INSERT INTO freezing_limits VALUES (%s, %s, %s)",
        [
            (partition_id, version, stored(limit.id))
            for partition_id, version, text in cursor.fetchall()
            for limit in parse(text).limits
            if limit.action == "freeze"
        ],
    )
