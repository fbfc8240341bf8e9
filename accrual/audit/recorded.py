"""The rulebooks that ledgers recorded, and which entries each of them decided."""

from __future__ import annotations

from typing import Final, NamedTuple

from accrual.book.database import Connection
from accrual.rulebook import Rulebook, parse

__all__ = ["Recorded", "recorded_rulebooks"]

LAST_SEQ: Final = 2**63 - 1

QUERY: Final = """
    SELECT partition_id, p.name, b.first_seq, lead(b.first_seq) OVER (PARTITION BY partition_id ORDER BY r.batch) - 1,
        r.text
    FROM book.rulebooks r JOIN book.batches b USING (partition_id, batch) JOIN book.partitions p USING (partition_id)
    ORDER BY partition_id, r.batch
"""


class Recorded(NamedTuple):
    """A rulebook by which the entries of a partition from ``first_seq`` to ``last_seq`` were decided."""

    partition_id: int
    partition: str
    first_seq: int
    last_seq: int
    rulebook: Rulebook


def recorded_rulebooks(connection: Connection) -> list[Recorded]:
    """Return every recorded rulebook, those of a partition in their order."""
    return [
        Recorded(partition_id, partition, first, LAST_SEQ if last is None else last, parse(text))
        for partition_id, partition, first, last, text in connection.execute(QUERY).fetchall()
    ]
