"""``expire``: what is left of a lot when its time is over (SPEC section 9).

Only lots expire: points that are held or pending are in none, and so they do not while they are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import psycopg

from accrual.book.chunks import CHUNK_MEMBERS, Done, Key, in_chunks
from accrual.book.database import Connection
from accrual.book.people import check_person
from accrual.book.posting import act, lock_members, plan, post
from accrual.book.texts import stored
from accrual.rulebook import day_text

__all__ = ["expire"]

ANY_DUE: Final = "SELECT EXISTS (SELECT FROM book.lots WHERE points > 0 AND expires_on <= %s::date)"

# In the order of the index, so that a chunk goes on where the last one ended, whatever has been used up behind it.
CHOOSE: Final = """
    SELECT expires_on::text, member FROM book.lots
    WHERE points > 0 AND expires_on <= %(day)s::date AND (expires_on, member) > (%(after_day)s::date, %(after)s)
    ORDER BY lots.expires_on, member LIMIT %(limit)s
"""

# No more than what was chosen, however many lots of these members are overdue: a chunk stays as small as it should be.
EXPIRED: Final = """
    SELECT member, 'expire', 'available', 'expired', points, day, NULL::date, true
    FROM book.lots
    WHERE points > 0 AND (expires_on, member) IN (SELECT * FROM unnest(%(expires_on)s::date[], %(members)s::text[]))
    ORDER BY member, expires_on, day
"""


def expire(
    connection: Connection,
    day: int,
    *,
    by: str = "scheduler",
    dry_run: bool = False,
    stopping: threading.Event | None = None,
) -> Done:
    """Expire every lot whose expiry date is not after day number ``day``, and return what was done.

    A member whose lots have several expiry dates is counted once for each.
    """
    check_person(by)
    text = day_text(day)
    if connection.execute(ANY_DUE, (text,)).fetchone() == (False,):
        return Done()
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        action = act(cursor, "expire", by=stored(by), details={"day": text})

    def choose(cursor: psycopg.Cursor[Any], after: Key) -> list[Key]:
        parameters = {"day": text, "after_day": after[0], "after": after[1], "limit": CHUNK_MEMBERS}
        cursor.execute(CHOOSE, parameters)
        return cursor.fetchall()

    def work(cursor: psycopg.Cursor[Any], keys: Sequence[Key]) -> Done:
        dates = sorted(set(keys))
        members = [member for _, member in dates]
        lock_members(cursor, members)
        postings = plan(cursor, EXPIRED, {"expires_on": [date for date, _ in dates], "members": members})
        return Done(len(dates), postings, post(cursor, action))

    return in_chunks(connection, f"expire {text}", choose, work, ("-infinity", ""), dry_run=dry_run, stopping=stopping)
