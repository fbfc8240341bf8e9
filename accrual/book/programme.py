"""The programme as the book knows it: the rulebook that the ledgers recorded last."""

from __future__ import annotations

import time
from typing import Any, Final

import psycopg

from accrual.book.database import Connection
from accrual.rulebook import Calendar, Rulebook, parse

__all__ = ["EXPIRY_MONTHS", "day_start_ms", "expiry_months", "newest_rulebook", "today"]

# Where no rulebook is recorded yet: the default of SPEC section 2.
EXPIRY_MONTHS: Final = 12


def newest_rulebook(cursor: psycopg.Cursor[Any]) -> Rulebook | None:
    """Return the newest rulebook that any ledger recorded; ``None`` in a book without any."""
    cursor.execute("SELECT text FROM book.rulebooks ORDER BY version DESC, batch DESC LIMIT 1")
    row = cursor.fetchone()
    return parse(row[0]) if row else None


def expiry_months(cursor: psycopg.Cursor[Any]) -> int:
    """Return how many months a lot lives."""
    rulebook = newest_rulebook(cursor)
    return EXPIRY_MONTHS if rulebook is None else rulebook.expiry_months


def today(cursor: psycopg.Cursor[Any]) -> int:
    """Return the number of today's business day: for what people and jobs do, never for a decision on an event."""
    return _calendar(cursor).day(int(time.time() * 1000))


def day_start_ms(connection: Connection, day: int) -> int:
    """Return when a business day begins, in ms."""
    with connection.cursor() as cursor:
        return _calendar(cursor).start_ms(day)


def _calendar(cursor: psycopg.Cursor[Any]) -> Calendar:
    rulebook = newest_rulebook(cursor)
    return Calendar("UTC") if rulebook is None else rulebook.calendar
