"""What the programme owes its members: points outstanding, and how they came and went in a period (SPEC section 9).

Every movement counts on its *effective day*, which is recorded with it, so that a report can be made again:

=====================  ==============================================================================
entry                  its business day
refund                 the business day of the refund
expiry                 the day that was expired
adjustment             the business day on which it was posted
settlement, release,   the local date on which it was done, but never before the business day of the points
confirmation,
clawback
=====================  ==============================================================================

Points are integers, and what they are worth is an exact fraction of a fen until it is rounded, once, half up.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import msgspec

from accrual.book.database import Connection
from accrual.errors import BookError, UsageError
from accrual.rulebook import Rulebook, day_text

__all__ = ["AGES", "LiabilityLine", "as_csv", "as_parquet", "liability"]

# Upper ends of the age brackets, in days since the points were earned; older ones are in a bracket of their own.
AGES: Final = (30, 90, 180, 365)

# Movements with the day of the points and the effective day. What touches `available` is told by lot; a part that no
# lot covers has no day.
LEGS: Final = """
    WITH moved AS (
        SELECT 'accrue' AS kind, 'issuance' AS from_account, CASE outcome WHEN 'held' THEN 'held' ELSE 'pending' END
            AS to_account, points, day, day AS effective, NULL::date[] AS lot_days, NULL::bigint[] AS lot_points
        FROM book.entries WHERE outcome IN ('granted', 'held') AND points > 0
        UNION ALL
        SELECT p.kind, p.from_account, p.to_account, p.points, p.day,
            CASE p.kind WHEN 'adjust' THEN p.day WHEN 'expire' THEN (a.details ->> 'day')::date
                WHEN 'refund' THEN greatest(d.day, p.day)
                ELSE greatest((a.done_at AT TIME ZONE %(zone)s)::date, p.day) END,
            p.lot_days, p.lot_points
        FROM book.postings p JOIN book.actions a USING (action)
        LEFT JOIN book.refunds r ON p.kind = 'refund' AND r.action = p.action AND r.seq = p.cause_seq
            AND (r.order_partition_id, r.order_seq, r.order_late) = (p.partition_id, p.seq, p.late)
        LEFT JOIN book.deferred d ON (d.partition_id, d.seq) = (r.partition_id, r.seq)
    ), parts AS (
        SELECT m.kind, m.from_account, m.to_account, coalesce(part.points, m.points) AS points,
            CASE WHEN m.lot_days IS NULL THEN m.day ELSE part.day END AS day, m.effective, m.day AS earned
        FROM moved m LEFT JOIN LATERAL unnest(m.lot_days, m.lot_points) AS part (day, points) ON true
    )
"""

MOVEMENT: Final = (
    LEGS  # noqa: S608 - nothing but texts of this file
    + """
    SELECT coalesce(sum(points) FILTER (WHERE effective < %(first)s AND from_account = 'issuance'), 0)
            - coalesce(sum(points) FILTER (
                WHERE effective < %(first)s AND to_account IN ('issuance', 'redeemed', 'expired')), 0),
        coalesce(sum(points) FILTER (WHERE within AND kind = 'accrue'), 0),
        coalesce(sum(points) FILTER (WHERE within AND kind IN ('refund', 'confirm', 'clawback')), 0),
        coalesce(sum(points) FILTER (WHERE within AND to_account = 'redeemed'), 0),
        coalesce(sum(points) FILTER (WHERE within AND to_account = 'expired'), 0),
        coalesce(sum(CASE from_account WHEN 'issuance' THEN points ELSE -points END)
            FILTER (WHERE within AND kind = 'adjust'), 0)
    FROM (SELECT *, effective BETWEEN %(first)s::date AND %(last)s::date AS within FROM parts) p
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


class LiabilityLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the report; ``state`` and ``age`` (days) only of what is outstanding."""

    line: str
    points: int
    value_fen: int
    state: str = ""
    age: str = ""


def liability(
    connection: Connection, rulebook: Rulebook, first_day: int, last_day: int, *, breakage: Decimal = Decimal(0)
) -> list[LiabilityLine]:
    """Return the report of the days ``first_day`` to ``last_day``, both included, at ``rulebook``'s fair value.

    ``breakage`` is the share of outstanding points, 0 to 1, that is expected never to be spent. Raises ``BookError``
    where what is outstanding is not what the movements come to.
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
    }
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor.execute(MOVEMENT, parameters)
        opening, granted, reversed_points, redeemed, expired, adjusted = map(int, cursor.fetchone() or (0,) * 6)
        cursor.execute(OUTSTANDING, parameters)
        outstanding = cursor.fetchall()
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
