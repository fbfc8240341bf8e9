"""``settle``: the pending points of a business day become available, as a lot of that day (SPEC section 9).

Where a member's entries of the day add up to less than nothing, that much leaves what is available instead.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import psycopg

from accrual.book.chunks import Done, find_members, in_chunks_of_members, is_stopped
from accrual.book.database import Connection
from accrual.book.people import check_person
from accrual.book.posting import act, begin_settlement, is_settled, lock_day, lock_members, plan, post
from accrual.book.texts import stored
from accrual.rulebook import Rulebook, day_text

__all__ = ["settle", "settle_again", "settle_members"]

# Those who have something pending of the day, and all who have negative points of it: what they have may add up to
# nothing now, and no more once something that is about to be posted has taken back a part of it.
FIND_ALL: Final = """
    SELECT member FROM (
        SELECT member, CASE outcome WHEN 'granted' THEN points ELSE 0 END AS points, points < 0 AS is_negative
        FROM book.entries WHERE day = %(day)s AND outcome IN ('granted', 'held')
        UNION ALL
        SELECT member, CASE to_account WHEN 'pending' THEN points ELSE -points END, false FROM book.postings
        WHERE day = %(day)s AND 'pending' IN (from_account, to_account)
    ) p
    GROUP BY member HAVING sum(points) <> 0 OR bool_or(is_negative)
"""

# Those who got entries of the day after it was settled: a few, which are found without looking at all the others again.
# Of a stretch with two ends the database expects so few rows that it looks for their blocks.
FIND_STRAGGLERS: Final = """
    SELECT DISTINCT e.member
    FROM (
        SELECT partition_id, coalesce((%(since)s::jsonb ->> partition_id::text)::bigint, 0) AS settled_seq, last_seq
        FROM book.days WHERE day = %(day)s
    ) d CROSS JOIN LATERAL (
        SELECT member FROM book.entries
        WHERE day = %(day)s AND partition_id = d.partition_id AND points <> 0
            AND seq BETWEEN d.settled_seq + 1 AND d.last_seq
    ) e
    WHERE d.last_seq > d.settled_seq
"""

PENDING: Final = """
    SELECT member, 'settle', CASE WHEN sum(points) > 0 THEN 'pending' ELSE 'available' END,
        CASE WHEN sum(points) > 0 THEN 'available' ELSE 'pending' END, abs(sum(points)), %(day)s::date,
        (%(day)s::date + make_interval(months => %(months)s))::date, false
    FROM (
        SELECT member, points FROM book.entries
        WHERE day = %(day)s AND outcome = 'granted' AND member = ANY(%(members)s)
        UNION ALL
        SELECT member, CASE to_account WHEN 'pending' THEN points ELSE -points END FROM book.postings
        WHERE day = %(day)s AND 'pending' IN (from_account, to_account) AND member = ANY(%(members)s)
    ) p
    GROUP BY member HAVING sum(points) <> 0 ORDER BY member
"""

# Of which days the moves have taken something out of pending that may have stayed there when the day was settled: with
# negative points beside it, it may have come to nothing.
LEFT_BEHIND: Final = """
    SELECT DISTINCT m.day - date '1970-01-01' FROM moves m
    JOIN book.entries e ON (e.day, e.member) = (m.day, m.member) AND e.points < 0
    WHERE m.from_account = 'pending' AND m.to_account = 'issuance' ORDER BY 1
"""

UNFINISH: Final = "UPDATE book.settled_days SET finished = false WHERE day = ANY(%s::date[]) AND finished"

# What was undone or taken back since we began may be of a member whom we had already passed.
FINISH: Final = """
    UPDATE book.settled_days SET finished = true WHERE day = %(day)s AND NOT finished AND NOT EXISTS (
        SELECT FROM book.postings p WHERE day = %(day)s AND number > %(action)s AND (
            corrects IS NOT NULL OR (from_account, to_account) = ('pending', 'issuance') AND EXISTS (
                SELECT FROM book.entries e WHERE (e.day, e.member) = (p.day, p.member) AND e.points < 0))
    )
"""


def settle(
    connection: Connection,
    rulebook: Rulebook,
    day: int,
    *,
    by: str = "scheduler",
    dry_run: bool = False,
    stopping: threading.Event | None = None,
    since: str | None = None,
) -> Done:
    """Settle day number ``day`` and return what was done; what became pending after an earlier settlement too.

    Lots expire ``expiry_months`` of ``rulebook`` after the day, or when the member's lot of that day does already. Once
    ``stopping`` is set, the rest is left to the next settlement of the day. With ``since``, the day's last seqs by
    partition (JSON) before a settlement that was finished, only members with entries behind them are looked at.
    """
    check_person(by)
    text = day_text(day)
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        action = act(cursor, "settle", by=stored(by), details={"day": text, "rulebook": rulebook.version})
        begin_settlement(cursor, day, action)
    find_members(connection, FIND_ALL if since is None else FIND_STRAGGLERS, {"day": text, "since": since})

    def work(cursor: psycopg.Cursor[Any], members: Sequence[str]) -> Done:
        return settle_members(cursor, rulebook, day, members, action)

    done = in_chunks_of_members(connection, f"settle {text}", work, dry_run=dry_run, stopping=stopping)
    if not dry_run and not is_stopped(stopping):
        with connection.transaction(), connection.cursor() as cursor:
            lock_day(cursor, day)
            cursor.execute(FINISH, {"day": text, "action": action})
    return done


def settle_members(
    cursor: psycopg.Cursor[Any], rulebook: Rulebook, day: int, members: Sequence[str], action: int
) -> Done:
    """Settle what ``members`` (as ``stored``) have pending of day number ``day``, within the cursor's transaction."""
    lock_members(cursor, members)
    parameters = {"day": day_text(day), "months": rulebook.expiry_months, "members": list(members)}
    postings = plan(cursor, PENDING, parameters)
    return Done(postings, postings, post(cursor, action))


def settle_again(cursor: psycopg.Cursor[Any]) -> None:
    """Have the days be settled again of which the moves that were posted have left something to be settled."""
    cursor.execute(LEFT_BEHIND)
    # Locked, so that nobody says meanwhile that a settlement is finished which has not seen these moves.
    days = [day_text(day) for (day,) in cursor.fetchall() if is_settled(cursor, day)]
    if days:
        cursor.execute(UNFINISH, (days,))
