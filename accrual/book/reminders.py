"""``remind``: members are told of points that are about to expire (docs/NOTIFICATIONS.md).

A lot is reminded of once for each of the rulebook's ``expiry_reminder_days``: at the smallest that its expiry date is
not farther away than, and never at a larger one afterwards. So missed runs are made up for by one reminder, not by one
for each.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
import psycopg

from accrual.book.chunks import Done, find_members, in_chunks_of_members
from accrual.book.database import Connection
from accrual.book.outbox import NOTIFICATIONS
from accrual.book.people import check_person
from accrual.book.posting import act, lock_members
from accrual.book.texts import shown, stored
from accrual.rulebook import Rulebook, day_text

__all__ = ["remind"]

# The lots that are due, each with the number of days ahead that it is due at.
DUE: Final = """
    SELECT l.member, l.day, l.expires_on, l.points, n.days_ahead
    FROM book.lots l CROSS JOIN LATERAL (
        SELECT min(days_ahead) AS days_ahead FROM unnest(%(days_ahead)s::integer[]) AS days_ahead
        WHERE days_ahead >= l.expires_on - %(day)s::date
    ) n
    WHERE l.points > 0 AND l.expires_on BETWEEN %(day)s::date AND %(day)s::date + %(farthest)s
        AND NOT EXISTS (
            SELECT FROM book.reminders r
            WHERE (r.member, r.lot_day) = (l.member, l.day) AND r.days_ahead <= n.days_ahead
        )
"""

FIND: Final = f"SELECT DISTINCT member FROM ({DUE}) due"  # noqa: S608 - nothing but texts of this file

# With the members locked, nobody else reminds them of the same lots.
#
# A member's partition is where the lot was earned, which is looked up in one day's entries. Members who only ever got
# points from a person have none: they are told over the first one.
REMIND: Final = f"""
    WITH due AS ({DUE} AND l.member = ANY(%(members)s)), reminded AS (
        INSERT INTO book.reminders (member, lot_day, days_ahead, action)
        SELECT member, day, days_ahead, %(action)s FROM due
    )
    SELECT d.member, d.day::text, d.expires_on::text, d.points, d.days_ahead,
        coalesce(
            (SELECT partition_id FROM book.members m WHERE m.member = d.member),
            (SELECT partition_id FROM book.entries e WHERE e.member = d.member AND e.day = d.day LIMIT 1),
            (SELECT partition_id FROM book.entries e WHERE e.member = d.member ORDER BY number DESC LIMIT 1),
            (SELECT min(partition_id) FROM book.partitions)
        )
    FROM due d ORDER BY d.member, d.expires_on, d.day
"""  # noqa: S608

_encode = msgspec.json.Encoder(order="sorted").encode


def remind(
    connection: Connection,
    rulebook: Rulebook,
    day: int,
    *,
    by: str = "scheduler",
    dry_run: bool = False,
    stopping: threading.Event | None = None,
) -> Done:
    """Write the reminders of day number ``day`` into the outbox: one message for each member.

    In what is returned ``postings`` is 0, as none are made, and ``points`` is what the members were reminded of.
    """
    check_person(by)
    days_ahead = sorted(rulebook.expiry_reminder_days)
    # Without a partition there is no stream to tell anybody over.
    (somewhere,) = connection.execute("SELECT EXISTS (SELECT FROM book.partitions)").fetchone() or (False,)
    if not days_ahead or not somewhere:
        return Done()
    parameters = {"day": day_text(day), "days_ahead": days_ahead, "farthest": days_ahead[-1]}
    if not find_members(connection, FIND, parameters):
        return Done()
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        details = {"day": day_text(day), "rulebook": rulebook.version}
        action = act(cursor, "remind", by=stored(by), details=details)

    def work(cursor: psycopg.Cursor[Any], members: Sequence[str]) -> Done:
        lock_members(cursor, members)
        cursor.execute(REMIND, parameters | {"members": list(members), "action": action})
        return _write(cursor, cursor.fetchall(), day_text(day), action)

    return in_chunks_of_members(connection, f"remind {day_text(day)}", work, dry_run=dry_run, stopping=stopping)


def _write(cursor: psycopg.Cursor[Any], lots: Iterable[tuple[Any, ...]], day: str, action: int) -> Done:
    """Write a message for each member of ``lots``, which come by member and then by expiry date."""
    by_member = [list(group) for _, group in itertools.groupby(lots, key=lambda lot: lot[0])]
    cursor.execute("SELECT nextval('book.numbers') FROM generate_series(1, %s)", (len(by_member),))
    numbers = [number for (number,) in cursor.fetchall()]
    done = Done(members=len(by_member))
    with cursor.copy("COPY book.outbox (partition_id, message, stream, value, action) FROM STDIN") as copy:
        for number, member_lots in zip(numbers, by_member, strict=True):
            message = _message(number, day, member_lots)
            done.points += message["points"]
            copy.write_row((member_lots[0][5], number, NOTIFICATIONS, _encode(message), action))
    return done


def _message(number: int, day: str, lots: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    member, _, expires_on, _, days_ahead, _ = lots[0]
    return {
        "id": f"book-{number}",
        "kind": "expiry_reminder",
        "member": shown(member),
        "day": day,
        "points": sum(lot[3] for lot in lots),
        "expires_on": expires_on,
        "days_ahead": days_ahead,
        "lots": [
            {"day": earned_on, "points": points, "expires_on": expires_on, "days_ahead": days_ahead}
            for _, earned_on, expires_on, points, days_ahead, _ in lots
        ],
    }
