"""``book rebuild``: balances and lots made anew from the facts; they come out equal, or what differs is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from accrual.book.database import Connection
from accrual.book.texts import shown

__all__ = ["rebuild"]

# What jobs and ingester change is kept from changing until the comparison and the exchange are done; reading goes on.
LOCK: Final = "LOCK TABLE book.balances, book.lots, book.postings, book.partitions IN SHARE ROW EXCLUSIVE MODE"

BALANCES: Final = """
    CREATE TEMP TABLE rebuilt_balances ON COMMIT DROP AS
    SELECT member, coalesce(sum(points) FILTER (WHERE account = 'pending'), 0)::bigint AS pending,
        coalesce(sum(points) FILTER (WHERE account = 'available'), 0)::bigint AS available,
        coalesce(sum(points) FILTER (WHERE account = 'held'), 0)::bigint AS held
    FROM book.legs WHERE member IS NOT NULL GROUP BY member
"""

# A lot keeps the expiry date that it was formed with.
LOTS: Final = """
    CREATE TEMP TABLE rebuilt_lots ON COMMIT DROP AS
    SELECT p.member, part.day, min(p.lot_expires_on) AS expires_on,
        sum(CASE p.to_account WHEN 'available' THEN part.points ELSE -part.points END)::bigint AS points
    FROM book.postings p, unnest(p.lot_days, p.lot_points) AS part (day, points)
    WHERE part.day IS NOT NULL GROUP BY p.member, part.day
"""

DIFFERENT_BALANCES: Final = """
    SELECT coalesce(n.member, o.member),
        jsonb_build_object('pending', coalesce(o.pending, 0), 'available', coalesce(o.available, 0),
            'held', coalesce(o.held, 0)),
        jsonb_build_object('pending', coalesce(n.pending, 0), 'available', coalesce(n.available, 0),
            'held', coalesce(n.held, 0))
    FROM (SELECT * FROM book.balances WHERE (pending, available, held) <> (0, 0, 0)) o
    FULL JOIN (SELECT * FROM rebuilt_balances WHERE (pending, available, held) <> (0, 0, 0)) n USING (member)
    WHERE (o.pending, o.available, o.held) IS DISTINCT FROM (n.pending, n.available, n.held) ORDER BY 1
"""

DIFFERENT_LOTS: Final = """
    SELECT coalesce(n.member, o.member),
        jsonb_build_object('day', o.day, 'expires_on', o.expires_on, 'points', o.points),
        jsonb_build_object('day', n.day, 'expires_on', n.expires_on, 'points', n.points)
    FROM book.lots o FULL JOIN rebuilt_lots n ON (n.member, n.day) = (o.member, o.day)
    WHERE (o.expires_on, o.points) IS DISTINCT FROM (n.expires_on, n.points) ORDER BY 1
"""

EXCHANGE: Final = (
    "DELETE FROM book.balances",
    "INSERT INTO book.balances SELECT member, pending, available, held FROM rebuilt_balances ORDER BY member",
    "DELETE FROM book.lots",
    "INSERT INTO book.lots SELECT member, day, expires_on, points FROM rebuilt_lots ORDER BY member, day",
)


def rebuild(connection: Connection, *, dry_run: bool = False) -> Iterator[dict[str, Any]]:
    """Make the projections anew, in one transaction, and yield what differed: what was there, and what it is now.

    Ingester and jobs wait while it runs; those who read do not. With ``dry_run`` nothing is changed.
    """
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        cursor.execute(LOCK)
        cursor.execute(BALANCES)
        cursor.execute(LOTS)
        differences = []
        for projection, query in (("balances", DIFFERENT_BALANCES), ("lots", DIFFERENT_LOTS)):
            cursor.execute(query)
            differences += [(projection, *row) for row in cursor.fetchall()]
        if differences:
            for statement in EXCHANGE:
                cursor.execute(statement)
    for projection, member, was, is_now in differences:
        yield {"projection": projection, "member": shown(member), "was": was, "is": is_now}
