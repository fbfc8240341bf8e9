"""``slow``: late events, then refunds, each in the order in which they came (SPEC section 9).

Late events come first, since a refund may be of one of them. A pass looks at everything that waits, chunk by chunk;
what must go on waiting, for its order, is looked at again by the next pass.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import psycopg

from accrual.book.chunks import Done
from accrual.book.database import Connection, retried
from accrual.book.late import judge_late_events
from accrual.book.refunds import judge_refunds
from accrual.book.waiting import take_turn
from accrual.rulebook import Rulebook

__all__ = ["slow"]

BEGINNING: Final = (0, 0, 0)

log = logging.getLogger("accrual.book")


def slow(
    connection: Connection,
    rulebook: Rulebook,
    *,
    refund_wait_hours: float,
    by: str = "scheduler",
    stopping: threading.Event | None = None,
) -> Done:
    """Deal with all that waits and can be dealt with now, and return what was done."""
    total = Done()
    place: tuple[int, int, int] | None = BEGINNING
    while place is not None and not _stopped(stopping):
        place, done = retried(
            functools.partial(_in_turn, connection, functools.partial(_late, rulebook=rulebook, place=place, by=by))
        )
        total.add(done)
    again = True
    while again and not _stopped(stopping):
        again, place = False, BEGINNING
        while place is not None and not _stopped(stopping):
            place, repeat, done = retried(
                functools.partial(
                    _in_turn,
                    connection,
                    functools.partial(_refunds, place=place, wait_s=refund_wait_hours * 3600, by=by),
                )
            )
            again = again or repeat
            total.add(done)
    if total.postings:
        log.info("slow: %d members, %d postings, %d points", total.members, total.postings, total.points)
    return total


def _stopped(stopping: threading.Event | None) -> bool:
    return stopping is not None and stopping.is_set()


def _in_turn(connection: Connection, work: Callable[[psycopg.Cursor[Any]], Any]) -> Any:
    with connection.transaction(), connection.cursor() as cursor:
        take_turn(cursor)
        return work(cursor)


def _late(cursor: psycopg.Cursor[Any], *, rulebook: Rulebook, place: tuple[int, int, int], by: str) -> Any:
    return judge_late_events(cursor, rulebook, place, by)


def _refunds(cursor: psycopg.Cursor[Any], *, place: tuple[int, int, int], wait_s: float, by: str) -> Any:
    return judge_refunds(cursor, place, wait_s, by)
