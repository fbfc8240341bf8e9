"""The days of the book: the last entry of each business day in each ledger, kept by whoever writes entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import psycopg

from accrual.rulebook import day_text

__all__ = ["BookedDay", "note_days"]

# A row is locked after balances, and in one order.
NOTE: Final = """
    INSERT INTO book.days AS d (day, partition_id, last_seq)
    SELECT day, partition_id, max(seq)
    FROM unnest(%s::date[], %s::smallint[], %s::bigint[]) AS b (day, partition_id, seq)
    GROUP BY day, partition_id ORDER BY day, partition_id
    ON CONFLICT (day, partition_id) DO UPDATE SET last_seq = greatest(d.last_seq, excluded.last_seq)
"""


class BookedDay(NamedTuple):
    """An entry of day number ``day`` that is booked."""

    day: int
    partition_id: int
    seq: int


def note_days(cursor: psycopg.Cursor[Any], booked: Sequence[BookedDay]) -> None:
    """Note which entries are booked, within the transaction that books them; the last ones of a day are enough."""
    if booked:
        days, partitions, seqs = zip(*booked, strict=True)
        cursor.execute(NOTE, ([day_text(day) for day in days], list(partitions), list(seqs)))
