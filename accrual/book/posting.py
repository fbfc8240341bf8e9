"""The one way in which points move between accounts, and what that does to lots (SPEC section 9).

What undoes a posting is not a move but its mirror image: `adjust.undo`.

A job opens a transaction, locks the members it means to move points of, writes its moves into a temporary table, and
has them posted::

    with connection.transaction(), connection.cursor() as cursor:
        lock_members(cursor, members)
        plan(cursor, "SELECT ...")          # under the lock, so that it sees all that was booked before
        post(cursor, act(cursor, "settle", by="scheduler"))

Points that arrive in ``available`` first fill the hole that no lot covered, then form or grow the lot of their day.
Points that leave it use up lots by earliest expiry, the lot of their own day first where the move says so; what no lot
covers makes a hole.

All of it is done as if the moves were made one by one, in the order in which they were planned, but in the same few
statements whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, LiteralString

import psycopg
from psycopg.types.json import Jsonb

from accrual.book.spread import Leaving, Lot, spread

__all__ = [
    "ENTRY_COLUMNS",
    "MOVE_COLUMNS",
    "act",
    "begin_settlement",
    "is_settled",
    "lock_day",
    "lock_members",
    "plan",
    "post",
]

Cursor = psycopg.Cursor[Any]

# Namespaces of advisory locks.
DAY_LOCK: Final = 0x626F_6F6B  # "book"

MOVE_COLUMNS: Final = "member, kind, from_account, to_account, points, day, lot_expires_on, own_lot_first"
ENTRY_COLUMNS: Final = "partition_id, seq, late, cause_seq"

CREATE_MOVES: Final = """
    CREATE TEMP TABLE IF NOT EXISTS moves (
        place bigint GENERATED ALWAYS AS IDENTITY,
        member text COLLATE "C" NOT NULL,
        kind text NOT NULL,
        from_account text NOT NULL,
        to_account text NOT NULL,
        points bigint NOT NULL,
        day date NOT NULL,
        lot_expires_on date,
        own_lot_first boolean NOT NULL DEFAULT false,
        partition_id smallint,
        seq bigint,
        late boolean,
        cause_seq bigint,
        lot_days date[],
        lot_points bigint[]
    ) ON COMMIT DELETE ROWS
"""

SPREAD_ARRIVING: Final = """
    UPDATE moves m SET
        lot_days = CASE WHEN hole = 0 THEN ARRAY[m.day] WHEN hole = points THEN ARRAY[NULL::date]
            ELSE ARRAY[NULL, m.day] END,
        lot_points = CASE WHEN hole = 0 OR hole = points THEN ARRAY[points] ELSE ARRAY[hole, points - hole] END,
        lot_expires_on = coalesce(known_expiry, lot_expires_on)
    FROM (
        SELECT place, least(m.points, greatest(0, -b.available - m.before)) AS hole, l.expires_on AS known_expiry
        FROM (
            SELECT place, member, day, points,
                sum(points) OVER (PARTITION BY member ORDER BY place)::bigint - points AS before
            FROM moves WHERE to_account = 'available'
        ) m
        JOIN book.balances b USING (member) LEFT JOIN book.lots l ON (l.member, l.day) = (m.member, m.day)
    ) s
    WHERE s.place = m.place
"""

# As long as a member's moves find all that they want in the lots of their own days, none meets what another has left.
# That is nearly always so, and is done here; from the first one on that does not, `spread` does one after the other.
TAKE_OWN_LOTS: Final = """
    UPDATE moves m SET lot_days = ARRAY[day], lot_points = ARRAY[points]
    FROM (
        SELECT place, bool_and(is_there) OVER (PARTITION BY member ORDER BY place) AS are_there
        FROM (
            SELECT place, m.member, own_lot_first AND coalesce(l.points, 0)
                >= sum(m.points) OVER (PARTITION BY m.member, m.day, own_lot_first ORDER BY place) AS is_there
            FROM moves m LEFT JOIN book.lots l USING (member, day) WHERE from_account = 'available'
        ) m
    ) o
    WHERE o.place = m.place AND are_there
"""

OTHERS_LEAVING: Final = """
    SELECT place, member, CASE WHEN own_lot_first THEN day END, points FROM moves
    WHERE from_account = 'available' AND lot_days IS NULL ORDER BY place
"""

LOTS_LEFT: Final = """
    SELECT member, day, l.points - coalesce(taken, 0) FROM book.lots l
    LEFT JOIN (
        SELECT member, day, sum(points)::bigint AS taken FROM moves
        WHERE from_account = 'available' AND lot_days IS NOT NULL GROUP BY member, day
    ) m USING (member, day)
    WHERE member = ANY(%s) AND l.points > coalesce(taken, 0) ORDER BY expires_on, day
"""

NOTE_PARTS: Final = """
    UPDATE moves m SET lot_days = p.days, lot_points = p.parts
    FROM (
        SELECT place, array_agg(day ORDER BY number) AS days, array_agg(points ORDER BY number) AS parts
        FROM unnest(%s::bigint[], %s::date[], %s::bigint[]) WITH ORDINALITY AS part (place, day, points, number)
        GROUP BY place
    ) p
    WHERE p.place = m.place
"""

INSERT_POSTINGS: Final = """
    INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, lot_days,
        lot_points, lot_expires_on, partition_id, seq, late, cause_seq)
    SELECT nextval('book.numbers'), %(action)s, kind, member, from_account, to_account, points, day, lot_days,
        lot_points, CASE WHEN to_account = 'available' THEN lot_expires_on END, partition_id, seq, late, cause_seq
    FROM (SELECT * FROM moves ORDER BY place) m
"""

GROW_LOTS: Final = """
    INSERT INTO book.lots AS l (member, day, expires_on, points)
    SELECT member, day, min(lot_expires_on), sum(lot_points[cardinality(lot_points)]) FROM moves
    WHERE to_account = 'available' AND lot_days[cardinality(lot_days)] IS NOT NULL
    GROUP BY member, day
    ON CONFLICT (member, day) DO UPDATE SET points = l.points + excluded.points
"""

SHRINK_LOTS: Final = """
    UPDATE book.lots l SET points = l.points - u.points
    FROM (
        SELECT m.member, part.day, sum(part.points) AS points
        FROM moves m, unnest(m.lot_days, m.lot_points) AS part (day, points)
        WHERE m.from_account = 'available' AND part.day IS NOT NULL GROUP BY m.member, part.day
    ) u
    WHERE (l.member, l.day) = (u.member, u.day)
"""

CHANGE_BALANCES: Final = """
    UPDATE book.balances b SET
        pending = b.pending + m.pending, available = b.available + m.available, held = b.held + m.held
    FROM (
        SELECT member,
            sum(CASE 'pending' WHEN to_account THEN points WHEN from_account THEN -points ELSE 0 END) AS pending,
            sum(CASE 'available' WHEN to_account THEN points WHEN from_account THEN -points ELSE 0 END) AS available,
            sum(CASE 'held' WHEN to_account THEN points WHEN from_account THEN -points ELSE 0 END) AS held
        FROM moves GROUP BY member
    ) m
    WHERE m.member = b.member
"""

# What an entry of negative points has the other way round is the only thing that goes to `held`, or from `available` to
# `pending`.
SUM: Final = """
    SELECT coalesce(sum(CASE WHEN to_account = 'held' OR (from_account, to_account) = ('available', 'pending')
        THEN -points ELSE points END), 0)::bigint FROM moves
"""

STEPS: Final = (INSERT_POSTINGS, SHRINK_LOTS, CHANGE_BALANCES)


def act(
    cursor: Cursor,
    kind: str,
    *,
    by: str,
    reason: str | None = None,
    note: str | None = None,
    details: Mapping[str, object] | None = None,
) -> int:
    """Record what is being done, by whom and why, and return the number that postings and messages name."""
    cursor.execute(
        "INSERT INTO book.actions (kind, by, reason, note, details) VALUES (%s, %s, %s, %s, %s) RETURNING action",
        (kind, by, reason, note, Jsonb(dict(details or {}))),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def lock_members(cursor: Cursor, members: Sequence[str]) -> None:
    """Lock the balances of ``members`` (as ``stored``) until the transaction ends; one that has none gets one.

    Everybody locks members in this order, so that two who want the same ones wait for each other, not both for ever.
    """
    chosen = sorted(set(members), key=str.encode)
    cursor.execute(
        "INSERT INTO book.balances (member) SELECT * FROM unnest(%s::text[]) ON CONFLICT DO NOTHING", (chosen,)
    )
    cursor.execute("SELECT 1 FROM book.balances WHERE member = ANY(%s) ORDER BY member FOR UPDATE", (chosen,))


def plan(cursor: Cursor, query: LiteralString, parameters: Mapping[str, object], *, of_entries: bool = False) -> int:
    """Plan the moves that ``query`` selects (``MOVE_COLUMNS``) of locked members, and return how many there are.

    Those of a member are made in the order in which they are selected: first those into ``available``, if any, and then
    those out of it.
    With ``of_entries`` it also selects which entry each of them is of, and why (``ENTRY_COLUMNS``).
    """
    columns = f"{MOVE_COLUMNS}, {ENTRY_COLUMNS}" if of_entries else MOVE_COLUMNS
    cursor.execute(CREATE_MOVES)
    cursor.execute("DELETE FROM moves")
    cursor.execute(f"INSERT INTO moves ({columns}) {query}", parameters)
    return cursor.rowcount


def post(cursor: Cursor, action: int) -> int:
    """Post the moves that were planned, in their order, and return the sum of their points.

    Those of entries with negative points, which go the other way, count below zero.
    """
    cursor.execute(SPREAD_ARRIVING)
    # What arrives may leave again.
    cursor.execute(GROW_LOTS)
    _spread_leaving(cursor)
    for step in STEPS:
        cursor.execute(step, {"action": action})
    cursor.execute(SUM)
    return int((cursor.fetchone() or (0,))[0])


def _spread_leaving(cursor: Cursor) -> None:
    """Note which lots the moves out of ``available`` use up."""
    cursor.execute(TAKE_OWN_LOTS)
    cursor.execute(OTHERS_LEAVING)
    others = [Leaving(*row) for row in cursor.fetchall()]
    if others:
        cursor.execute(LOTS_LEFT, (list({move.member for move in others}),))
        parts = list(spread(others, [Lot(*row) for row in cursor.fetchall()]))
        columns = [list(column) for column in zip(*parts, strict=True)]
        cursor.execute(NOTE_PARTS, columns)


def is_settled(cursor: Cursor, day: int) -> bool:
    """Tell whether day number ``day`` is settled, and keep a settlement of it from beginning until we are done."""
    cursor.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (DAY_LOCK, day))
    cursor.execute("SELECT EXISTS (SELECT FROM book.settled_days WHERE day = date '1970-01-01' + %s)", (day,))
    return cursor.fetchone() == (True,)


def lock_day(cursor: Cursor, day: int) -> None:
    """Wait for all who have asked whether day number ``day`` is settled, and let nobody ask until we are done."""
    cursor.execute("SELECT pg_advisory_xact_lock(%s, %s)", (DAY_LOCK, day))


def begin_settlement(cursor: Cursor, day: int, action: int) -> None:
    """Mark day number ``day`` as settled from now on: whatever is released or comes late is available at once."""
    lock_day(cursor, day)
    cursor.execute(
        "INSERT INTO book.settled_days (day, action) VALUES (date '1970-01-01' + %s, %s) ON CONFLICT DO NOTHING",
        (day, action),
    )
