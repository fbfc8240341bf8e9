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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, LiteralString

import psycopg
from psycopg.types.json import Jsonb

__all__ = ["ENTRY_COLUMNS", "MOVE_COLUMNS", "act", "is_settled", "lock_members", "plan", "post"]

Cursor = psycopg.Cursor[Any]

# Namespaces of advisory locks.
DAY_LOCK: Final = 0x626F_6F6B  # "book"

MOVE_COLUMNS: Final = "turn, member, kind, from_account, to_account, points, day, lot_expires_on, own_lot_first"
ENTRY_COLUMNS: Final = "partition_id, seq, late, cause_seq"

# Moves of one member out of `available` have different turns, since each of them changes the lots that the next one
# meets. All others may share one.
CREATE_MOVES: Final = """
    CREATE TEMP TABLE IF NOT EXISTS moves (
        place bigint GENERATED ALWAYS AS IDENTITY,
        turn integer NOT NULL,
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
    ) ON COMMIT DELETE ROWS;
    CREATE UNIQUE INDEX IF NOT EXISTS moves_leaving ON moves (turn, member) WHERE from_account = 'available'
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
            FROM moves WHERE turn = %(turn)s AND to_account = 'available'
        ) m
        JOIN book.balances b USING (member) LEFT JOIN book.lots l ON (l.member, l.day) = (m.member, m.day)
    ) s
    WHERE s.place = m.place
"""

SPREAD_LEAVING: Final = """
    WITH lots AS (
        SELECT m.place, m.points AS wanted, l.day, l.points,
            sum(l.points) OVER (
                PARTITION BY m.place ORDER BY (m.own_lot_first AND l.day = m.day) DESC, l.expires_on, l.day
            ) - l.points AS before
        FROM moves m JOIN book.lots l USING (member)
        WHERE m.turn = %(turn)s AND m.from_account = 'available' AND l.points > 0
    ), used AS (
        SELECT place, array_agg(day ORDER BY before) AS days,
            array_agg(least(points, wanted - before)::bigint ORDER BY before) AS parts,
            sum(least(points, wanted - before)) AS covered
        FROM lots WHERE before < wanted GROUP BY place
    )
    UPDATE moves m SET
        lot_days = coalesce(u.days, '{}') || CASE WHEN u.covered = m.points THEN '{}' ELSE ARRAY[NULL::date] END,
        lot_points = coalesce(u.parts, '{}')
            || CASE WHEN u.covered = m.points THEN '{}' ELSE ARRAY[(m.points - coalesce(u.covered, 0))::bigint] END
    FROM moves n LEFT JOIN used u USING (place)
    WHERE n.place = m.place AND m.turn = %(turn)s AND m.from_account = 'available'
"""

INSERT_POSTINGS: Final = """
    INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, lot_days,
        lot_points, lot_expires_on, partition_id, seq, late, cause_seq)
    SELECT nextval('book.numbers'), %(action)s, kind, member, from_account, to_account, points, day, lot_days,
        lot_points, CASE WHEN to_account = 'available' THEN lot_expires_on END, partition_id, seq, late, cause_seq
    FROM (SELECT * FROM moves WHERE turn = %(turn)s ORDER BY place) m
"""

GROW_LOTS: Final = """
    INSERT INTO book.lots AS l (member, day, expires_on, points)
    SELECT member, day, min(lot_expires_on), sum(lot_points[cardinality(lot_points)]) FROM moves
    WHERE turn = %(turn)s AND to_account = 'available' AND lot_days[cardinality(lot_days)] IS NOT NULL
    GROUP BY member, day
    ON CONFLICT (member, day) DO UPDATE SET points = l.points + excluded.points
"""

SHRINK_LOTS: Final = """
    UPDATE book.lots l SET points = l.points - u.points
    FROM (
        SELECT m.member, part.day, part.points FROM moves m, unnest(m.lot_days, m.lot_points) AS part (day, points)
        WHERE m.turn = %(turn)s AND m.from_account = 'available' AND part.day IS NOT NULL
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
        FROM moves WHERE turn = %(turn)s GROUP BY member
    ) m
    WHERE m.member = b.member
"""

STEPS: Final = (SPREAD_ARRIVING, SPREAD_LEAVING, INSERT_POSTINGS, GROW_LOTS, SHRINK_LOTS, CHANGE_BALANCES)


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

    With ``of_entries`` it also selects which entry each of them is of, and why (``ENTRY_COLUMNS``).
    """
    columns = f"{MOVE_COLUMNS}, {ENTRY_COLUMNS}" if of_entries else MOVE_COLUMNS
    cursor.execute(CREATE_MOVES)
    cursor.execute("DELETE FROM moves")
    cursor.execute(f"INSERT INTO moves ({columns}) {query}", parameters)
    return cursor.rowcount


def post(cursor: Cursor, action: int) -> int:
    """Post the moves that were planned, in the order of their turns, and return the sum of their points."""
    cursor.execute("SELECT turn, sum(points)::bigint FROM moves GROUP BY turn ORDER BY turn")
    turns = cursor.fetchall()
    for turn, _ in turns:
        for step in STEPS:
            cursor.execute(step, {"turn": turn, "action": action})
    return sum(points for _, points in turns)


def is_settled(cursor: Cursor, day: int) -> bool:
    """Tell whether day number ``day`` is settled, and keep a settlement of it from beginning until we are done."""
    cursor.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (DAY_LOCK, day))
    cursor.execute("SELECT EXISTS (SELECT FROM book.settled_days WHERE day = date '1970-01-01' + %s)", (day,))
    return cursor.fetchone() == (True,)


def begin_settlement(cursor: Cursor, day: int, action: int) -> None:
    """Mark day number ``day`` as settled from now on: whatever is released or comes late is available at once."""
    cursor.execute("SELECT pg_advisory_xact_lock(%s, %s)", (DAY_LOCK, day))
    cursor.execute(
        "INSERT INTO book.settled_days (day, action) VALUES (date '1970-01-01' + %s, %s) ON CONFLICT DO NOTHING",
        (day, action),
    )
