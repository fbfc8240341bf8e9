"""The days of the book: the last entry of each business day in each ledger, kept by whoever writes entries."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import psycopg

from accrual.book.rows import Group
from accrual.ledger import EntriesBatch
from accrual.outcomes import OUTCOMES
from accrual.rulebook import day_text

__all__ = ["BookedDay", "note_days", "of_group"]

DEFERRED: Final = OUTCOMES.index("deferred")

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


def of_group(group: Group, partition_id: int, without: Collection[int]) -> list[BookedDay]:
    """Return the last entries of each day in each batch of ``group``, but for those whose seqs are in ``without``."""
    found = []
    for batch in group.batches:
        if isinstance(batch, EntriesBatch) and batch.header.counts.entries:
            seqs = batch.header.first_seq + np.arange(batch.header.counts.entries)
            booked = (batch.integers("outcome") != DEFERRED) & ~np.isin(seqs, sorted(without))
            days, seqs = batch.integers("day")[booked], seqs[booked]
            found += [BookedDay(day, partition_id, int(seqs[days == day].max())) for day in np.unique(days).tolist()]
    return found
