"""Columns to the rows of PostgreSQL's binary ``COPY``, without a Python object per value.

A batch of the ledger has its texts end to end, and ``COPY`` wants rows end to end: each field a length of four bytes
and its data. So the place of every field is computed for all rows at once, and whole columns are scattered to theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from accrual.book.texts import stored_bytes

__all__ = [
    "HEADER",
    "NULL",
    "TRAILER",
    "Column",
    "booleans",
    "coded",
    "dates",
    "integers",
    "joined",
    "padded",
    "pieces",
    "rows_of",
    "texts",
]

HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER: Final = b"\xff\xff"
NULL: Final = -1
LENGTH_BYTES: Final = 4
POSTGRESQL_EPOCH_DAY: Final = 10957  # 2000-01-01


class Column:
    """One column: ``lengths`` of its values, -1 for null, and their bytes end to end in ``data``."""

    def __init__(self, lengths: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.lengths = lengths
        self.data = data

    def where(self, wanted: NDArray[np.bool_]) -> Column:
        """Return the column with null in the rows that are not ``wanted``."""
        kept = self.taken(np.flatnonzero(wanted))
        return Column(np.where(wanted, self.lengths, NULL), kept.data)

    def taken(self, rows: NDArray[np.intp]) -> Column:
        """Return the column of some of the rows, in the order given."""
        sizes = np.maximum(self.lengths, 0)
        starts = np.cumsum(sizes) - sizes
        return Column(self.lengths[rows], self.data[_spans(starts[rows], sizes[rows])])


def integers(values: NDArray[Any], width: int, null: NDArray[np.bool_] | None = None) -> Column:
    """Return a column of ``smallint``, ``integer`` or ``bigint`` (``width`` 2, 4, 8); ``null`` marks absent values.

    Unsigned values of 64 bits become the signed ones with the same bits.
    """
    if values.dtype == np.uint64:
        values = values.view(np.int64)
    big = np.ascontiguousarray(values).astype(f">i{width}")
    if null is None or not null.any():
        return Column(np.full(len(values), width, np.int64), big.view(np.uint8))
    return Column(np.where(null, NULL, width).astype(np.int64), big[~null].view(np.uint8))


def dates(days: NDArray[Any]) -> Column:
    """Return a column of ``date`` from day numbers (0 is 1970-01-01)."""
    return integers(days - POSTGRESQL_EPOCH_DAY, 4)


def booleans(values: NDArray[Any]) -> Column:
    """Return a column of ``boolean``."""
    return Column(np.ones(len(values), np.int64), np.ascontiguousarray(values).astype(np.uint8))


def texts(lengths: NDArray[np.int64], data: bytes, *, empty_is_null: bool = False) -> Column:
    """Return a column of ``text`` from UTF-8 end to end, each as ``stored`` writes it."""
    if b"\0" in data or b"\\" in data:
        ends = np.cumsum(lengths).tolist()
        values = [stored_bytes(data[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]
        lengths, data = np.array([len(value) for value in values]), b"".join(values)
    if empty_is_null:
        lengths = np.where(lengths == 0, NULL, lengths)
    return Column(np.array(lengths, np.int64), np.frombuffer(data, np.uint8))


def pieces(values: Sequence[bytes]) -> Column:
    """Return a column of ``values``, each the bytes of any type."""
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    return Column(lengths, np.frombuffer(b"".join(values), np.uint8))


def joined(columns: Sequence[Column]) -> Column:
    """Return the columns as one, their rows one after the other."""
    lengths = [column.lengths for column in columns] or [np.zeros(0, np.int64)]
    data = [column.data for column in columns] or [np.zeros(0, np.uint8)]
    return Column(np.concatenate(lengths), np.concatenate(data))


def padded(column: Column) -> NDArray[np.bytes_]:
    """Return the values, none of which is null or ends with a zero byte, as an array of strings of equal width."""
    width = max(1, int(column.lengths.max()))
    rows = np.zeros((len(column.lengths), width), np.uint8)
    rows.reshape(-1)[_spans(np.arange(len(rows)) * width, column.lengths)] = column.data
    return rows.view(f"S{width}").reshape(-1)


def coded(codes: NDArray[Any], values: Sequence[bytes | None]) -> Column:
    """Return the column of ``values[code]``: each value the bytes of any type, ``None`` for null."""
    lengths = np.array([NULL if value is None else len(value) for value in values] or [0], np.int64)
    data = np.frombuffer(b"".join(value or b"" for value in values), np.uint8)
    return Column(lengths, data).taken(np.asarray(codes, np.intp))


def rows_of(columns: Sequence[Column]) -> bytes:
    """Return the rows that have ``columns``; a binary ``COPY`` is ``HEADER``, any number of such rows, ``TRAILER``."""
    count = len(columns[0].lengths)
    sizes = [np.maximum(column.lengths, 0) for column in columns]
    row_sizes = 2 + LENGTH_BYTES * len(columns) + sum(sizes, np.zeros(count, np.int64))
    buffer = np.empty(int(row_sizes.sum()), np.uint8)
    place = np.cumsum(row_sizes) - row_sizes
    _scatter(buffer, place, np.full(count, len(columns)).astype(">i2").view(np.uint8), 2)
    place = place + 2
    for column, size in zip(columns, sizes, strict=True):
        _scatter(buffer, place, column.lengths.astype(">i4").view(np.uint8), LENGTH_BYTES)
        place = place + LENGTH_BYTES
        width = int(size[0]) if count else 0
        if count and (size == width).all():
            _scatter(buffer, place, column.data, width)
        else:
            buffer[_spans(place, size)] = column.data
        place = place + size
    return buffer.tobytes()


def _scatter(buffer: NDArray[np.uint8], place: NDArray[np.int64], data: NDArray[np.uint8], width: int) -> None:
    """Write values of ``width`` bytes each to their places."""
    values = data.reshape(-1, width) if width else data
    for byte in range(width):
        buffer[place + byte] = values[:, byte]


def _spans(starts: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Return the positions of all bytes of the spans, end to end."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total)
