"""The programme as the book knows it: the rulebooks that the ledgers recorded."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg

from accrual.book.database import Connection
from accrual.rulebook import Calendar, Rulebook, parse

__all__ = ["EXPIRY_MONTHS", "day_start_ms", "expiry_months", "newest_rulebook", "rulebooks_of", "today"]

# Where no rulebook is recorded yet: the default of SPEC section 2.
EXPIRY_MONTHS: Final = 12
RULEBOOKS_KEPT: Final = 64

# What the slow path decided was decided by its own rulebook, which the entry's partition need not have recorded.
RULEBOOK: Final = """
    SELECT text FROM book.rulebooks WHERE version = %(version)s
    ORDER BY partition_id = %(partition_id)s DESC, batch DESC LIMIT 1
"""


def newest_rulebook(cursor: psycopg.Cursor[Any]) -> Rulebook | None:
    """Return the newest rulebook that any ledger recorded; ``None`` in a book without any."""
    cursor.execute("SELECT text FROM book.rulebooks ORDER BY version DESC, batch DESC LIMIT 1")
    row = cursor.fetchone()
    return parse(row[0]) if row else None


def rulebooks_of(connection: Connection) -> Callable[[int, int], Rulebook | None]:
    """Return what finds the rulebook of a partition (its number) and version; ``None`` where nobody recorded it."""

    @functools.lru_cache(RULEBOOKS_KEPT)
    def rulebook_of(partition_id: int, version: int) -> Rulebook | None:
        parameters = {"partition_id": partition_id, "version": version}
        row = connection.execute(RULEBOOK, parameters).fetchone()
        return parse(row[0]) if row else None

    return rulebook_of


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
