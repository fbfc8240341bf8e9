"""What the programme owes its members: points outstanding, and how they came and went in a period (SPEC section 9).

A movement belongs to the day on which the book posted it, by the clock of the programme: whatever comes late, is
refunded or corrected afterwards belongs to a later day, and the report of a period that is over stays what it was. By
*business day*, the other basis, a movement belongs to the day that it is about, and closed periods change:

=====================  ==============================================================================
entry                  its business day
refund                 the business day of the refund
expiry                 the day that was expired
adjustment             the business day on which it was posted
settlement, release,   the local date on which it was done, but never before the business day of the points
confirmation,
clawback, correction
=====================  ==============================================================================

Points are integers, and what they are worth is an exact fraction of a fen until it is rounded, once, half up.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, Literal, TypeAlias

import msgspec

from accrual.book.database import Connection
from accrual.errors import BookError, UsageError
from accrual.rulebook import Rulebook, day_text

__all__ = ["AGES", "Basis", "LiabilityLine", "as_csv", "as_parquet", "liability"]

Basis: TypeAlias = Literal["posting", "business"]

# Upper ends of the age brackets, in days since the points were earned; older ones are in a bracket of their own.
AGES: Final = (30, 90, 180, 365)

# Dates are those of the transaction's zone: `AT TIME ZONE` takes CET, EET, MET and WET for abbreviations, which know no
# summer.
SET_ZONE: Final = "SELECT set_config('timezone', %(zone)s, true)"

# The time of posting is when the transaction began, so that one that began before midnight may end behind it.
UNSETTLED_S: Final = 3600
IS_OPEN: Final = """
    SELECT now() < (%(last)s::date + 1)::timestamptz + make_interval(secs => %(unsettled_s)s)
"""

# Movements with the day of the points and the day that they belong to. What touches `available` is told by lot; a part
# that no lot covers has no day.
LEGS: Final = """
    WITH posted AS (
        SELECT number, min(booked_at) AS posted_at FROM book.batches GROUP BY number
    ), moved AS (
        SELECT 'accrue' AS kind, 'issuance' AS from_account, CASE e.outcome WHEN 'held' THEN 'held' ELSE 'pending' END
            AS to_account, e.points, e.day, coalesce(b.posted_at, a.done_at) AS posted_at, e.day AS business_day,
            NULL::date[] AS lot_days, NULL::bigint[] AS lot_points
        FROM book.entries e LEFT JOIN posted b ON b.number = e.number
        LEFT JOIN book.resolutions r ON e.late AND (r.partition_id, r.seq) = (e.partition_id, e.seq)
        LEFT JOIN book.actions a USING (action)
        WHERE e.outcome IN ('granted', 'held') AND e.points <> 0
        UNION ALL
        SELECT p.kind, p.from_account, p.to_account, p.points, p.day, p.booked_at,
            CASE p.kind WHEN 'adjust' THEN p.day WHEN 'expire' THEN (a.details ->> 'day')::date
                WHEN 'refund' THEN greatest(d.day, p.day)
                ELSE greatest(a.done_at::date, p.day) END,
            p.lot_days, p.lot_points
        FROM book.postings p JOIN book.actions a USING (action)
        LEFT JOIN book.refunds r ON p.kind = 'refund' AND r.action = p.action AND r.seq = p.cause_seq
            AND (r.order_partition_id, r.order_seq, r.order_late) = (p.partition_id, p.seq, p.late)
        LEFT JOIN book.deferred d ON (d.partition_id, d.seq) = (r.partition_id, r.seq)
    ), parts AS (
        SELECT m.kind, m.from_account, m.to_account, coalesce(part.points, m.points) AS points,
            CASE WHEN m.lot_days IS NULL THEN m.day ELSE part.day END AS day, m.day AS earned,
            CASE %(basis)s WHEN 'posting' THEN m.posted_at::date ELSE m.business_day END AS effective
        FROM moved m LEFT JOIN LATERAL unnest(m.lot_days, m.lot_points) AS part (day, points) ON true
    )
"""

MOVEMENT: Final = (
    LEGS  # noqa: S608 - nothing but texts of this file
    + """
    SELECT coalesce(sum(points * outstanding) FILTER (WHERE effective < %(first)s), 0),
        coalesce(sum(points) FILTER (WHERE within AND kind = 'accrue'), 0),
        coalesce(sum(-points * outstanding) FILTER (WHERE within AND kind IN ('refund', 'confirm', 'clawback')), 0),
        coalesce(sum(points) FILTER (WHERE within AND to_account = 'redeemed'), 0),
        coalesce(sum(points) FILTER (WHERE within AND to_account = 'expired'), 0),
        coalesce(sum(points * outstanding) FILTER (WHERE within AND kind IN ('adjust', 'correct')), 0),
        count(*) FILTER (WHERE effective IS NULL)
    FROM (
        SELECT *, effective BETWEEN %(first)s::date AND %(last)s::date AS within,
            (from_account IN ('issuance', 'redeemed', 'expired'))::integer
                - (to_account IN ('issuance', 'redeemed', 'expired'))::integer AS outstanding
        FROM parts
    ) p
"""
)

OUTSTANDING: Final = (
    LEGS  # noqa: S608 - nothing but texts of this file
    + """
    SELECT account, width_bucket(%(last)s::date - day, %(ages)s::integer[]) AS bracket, day IS NULL,
        sum(points)::bigint
    FROM (
        SELECT to_account AS account, CASE to_account WHEN 'available' THEN day ELSE earned END AS day, points,
            effective
        FROM parts
        UNION ALL
        SELECT from_account, CASE from_account WHEN 'available' THEN day ELSE earned END, -points, effective FROM parts
    ) l
    WHERE effective <= %(last)s::date AND account IN ('pending', 'available', 'held')
    GROUP BY 1, 2, 3 HAVING sum(points) <> 0 ORDER BY 1, 2, 3
"""
)


log = logging.getLogger("accrual.book")


class LiabilityLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the report; ``state`` and ``age`` (days) only of what is outstanding."""

    line: str
    points: int
    value_fen: int
    state: str = ""
    age: str = ""


def liability(
    connection: Connection,
    rulebook: Rulebook,
    first_day: int,
    last_day: int,
    *,
    breakage: Decimal = Decimal(0),
    basis: Basis = "posting",
) -> list[LiabilityLine]:
    """Return the report of the days ``first_day`` to ``last_day``, both included, at ``rulebook``'s fair value.

    ``basis`` says which day a movement belongs to, as above; days are those of ``rulebook``'s time zone. ``breakage``
    is the share of outstanding points, 0 to 1, that is expected never to be spent. Raises ``BookError`` where what is
    outstanding is not what the movements come to.
    """
    if not 0 <= breakage <= 1:
        raise UsageError(f"--breakage: {breakage} is not a share from 0 to 1")
    if first_day > last_day:
        raise UsageError(f"--from: {day_text(first_day)} is after {day_text(last_day)}")
    parameters = {
        "first": day_text(first_day),
        "last": day_text(last_day),
        "zone": rulebook.timezone,
        # A bracket begins behind the one before it.
        "ages": [age + 1 for age in AGES],
        "basis": basis,
        "unsettled_s": UNSETTLED_S,
    }
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor.execute(SET_ZONE, parameters)
        if basis == "posting" and cursor.execute(IS_OPEN, parameters).fetchone() == (True,):
            log.warning("%s ended less than an hour ago, if at all: the report may still change", day_text(last_day))
        cursor.execute(MOVEMENT, parameters)
        row = cursor.fetchone() or (0,) * 7
        opening, granted, reversed_points, redeemed, expired, adjusted, undated = map(int, row)
        cursor.execute(OUTSTANDING, parameters)
        outstanding = cursor.fetchall()
    if undated:
        raise BookError(f"{undated} movements belong to no day: what posted them is missing")
    closing = opening + granted - reversed_points - redeemed - expired + adjusted
    if sum(points for *_, points in outstanding) != closing:
        raise BookError(f"{closing} points should be outstanding, and {sum(row[-1] for row in outstanding)} are")
    movement = {
        "opening": opening,
        "granted": granted,
        "reversed": -reversed_points,
        "redeemed": -redeemed,
        "expired": -expired,
        "adjusted": adjusted,
        "closing": closing,
    }
    value = rulebook.point_value_fen
    lines = [LiabilityLine(name, points, _rounded(points * value)) for name, points in movement.items()]
    for state, bracket, uncovered, points in outstanding:
        age = "overdrawn" if uncovered else _bracket(bracket)
        lines.append(LiabilityLine("outstanding", points, _rounded(points * value), state, age))
    broken = _rounded(closing * Fraction(breakage))
    lines.append(LiabilityLine("expected_breakage", -broken, _rounded(-broken * value)))
    lines.append(LiabilityLine("expected_liability", closing - broken, _rounded((closing - broken) * value)))
    return lines


def as_csv(lines: Sequence[LiabilityLine]) -> Iterator[bytes]:
    """Yield the report as CSV, a line at a time, without newlines."""
    names = LiabilityLine.__struct_fields__
    for row in (names, *(msgspec.structs.astuple(line) for line in lines)):
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(row)
        yield text.getvalue().encode()


def as_parquet(lines: Sequence[LiabilityLine], path: str) -> None:
    """Write the report as a Parquet file. Raises ``UsageError`` where pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow: pip install 'accrual[finance]'") from error
    columns: dict[str, Any] = {
        name: [getattr(line, name) for line in lines] for name in LiabilityLine.__struct_fields__
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _bracket(number: int) -> str:
    lower = [0, *(age + 1 for age in AGES)]
    return f"{lower[number]}-{AGES[number]}" if number < len(AGES) else f"{lower[number]}+"


def _rounded(value: Fraction) -> int:
    """Return the nearest integer, a half up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
