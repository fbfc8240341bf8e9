"""The dates on which lots expire, computed again: ``expiry_months`` after the business day (SPEC section 9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown
from accrual.rulebook import Rulebook

__all__ = ["check_lot_dates"]

# PostgreSQL puts a day that the month does not have at the month's end, as the specification does. What is wrong is
# found once, and not for every posting, as a plan may do that was made before there were statistics.
QUERY: Final = """
    WITH formed AS MATERIALIZED (
        SELECT DISTINCT day, lot_expires_on FROM book.postings WHERE to_account = 'available' AND kind <> 'correct'
    ), wrong AS MATERIALIZED (
        SELECT * FROM formed, LATERAL (
            SELECT array_agg((day + make_interval(months => months))::date) AS dates
            FROM unnest(%(months)s::integer[]) AS months
        ) d
        WHERE (lot_expires_on = ANY(dates)) IS NOT TRUE
    )
    SELECT p.number, p.member, p.day::text, p.lot_expires_on::text, w.dates::text[]
    FROM book.postings p JOIN wrong w ON w.day = p.day AND w.lot_expires_on IS NOT DISTINCT FROM p.lot_expires_on
    WHERE p.to_account = 'available' AND p.kind <> 'correct' ORDER BY p.number
"""


def check_lot_dates(connection: Connection, rulebooks: Iterable[Rulebook]) -> Iterator[Finding]:
    """Yield the postings whose lot expires on a date that none of ``rulebooks`` gives."""
    months = sorted({rulebook.expiry_months for rulebook in rulebooks})
    for number, member, day, found, expected in connection.execute(QUERY, {"months": months}):
        detail = f"posting {number}: its lot expires on a date that no rulebook gives"
        yield Finding("lot_dates", detail, member=shown(member), day=day, expected=expected, found=found)
