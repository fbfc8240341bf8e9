"""Columns to the rows of PostgreSQL's binary ``COPY``, without a Python object per value.

A row is a count of fields, and each field a length of four bytes and its data. Rows are laid out side by side at the
width of the widest, a column at a time; then the bytes that belong to no value are left out, all in one pass. What
takes time is the number of columns, so those that can be are put together to one of several fields beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from accrual.book.texts import stored_bytes

__all__ = [
    "HEADER",
    "NULL",
    "TRAILER",
    "Coded",
    "Column",
    "beside",
    "booleans",
    "coded",
    "coded_together",
    "dates",
    "decimals",
    "integers",
    "joined",
    "pieces",
    "repeated",
    "rows_of",
    "texts",
    "together",
]

HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER: Final = b"\xff\xff"
NULL: Final = -1
COUNT_BYTES: Final = 2
LENGTH_BYTES: Final = 4
LARGEST_CODE: Final = 2**63 - 1
POSTGRESQL_EPOCH_DAY: Final = 10957  # 2000-01-01

# Rows that are laid out at once: few enough for the processor's caches.
BLOCK_ROWS: Final = 2048
WORD_BYTES: Final = (2, 4, 8)
# Up to this width, which bytes belong to a value is looked up rather than compared: in a table of its square.
LOOKED_UP_BYTES: Final = 256


# Codes, and the value that each of them stands for: the bytes of any type, `None` for null.
Coded: TypeAlias = tuple[NDArray[Any], Sequence[bytes | None]]


class Column:
    """One column: a value in each row of ``data``, at its beginning; ``lengths`` says how long it is, -1 for null.

    ``lengths`` is ``None`` where every value fills its row. With ``codes`` each value is that of the row that its code
    says, so that a long value that is seen often takes little memory. ``fields`` is 0, or of how many fields each
    value is, which then has their lengths in it as a row has them.
    """

    def __init__(
        self,
        data: NDArray[np.uint8],
        lengths: NDArray[np.int32] | None = None,
        codes: NDArray[np.intp] | None = None,
        fields: int = 0,
    ) -> None:
        self.data = data
        self.lengths = lengths
        self.codes = codes
        self.fields = fields

    @property
    def width(self) -> int:
        """The length of the longest value, or more."""
        return int(self.data.shape[1])

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.data if self.codes is None else self.codes)

    def taken(self, rows: NDArray[np.intp]) -> Column:
        """Return the column of some of the rows, in the order given, without codes and no wider than they need."""
        if self.codes is not None:
            rows = self.codes.take(rows)
        data = self.data.take(rows, axis=0)
        if self.lengths is None:
            return Column(data, fields=self.fields)
        lengths = self.lengths.take(rows)
        width = max(0, int(lengths.max(initial=0)))
        full = width > 0 and int(lengths.min()) == width
        return Column(data[:, :width], None if full else lengths, fields=self.fields)

    def sizes(self) -> NDArray[np.int32]:
        """Return how long the value in each row of ``data`` is, -1 for null."""
        return np.full(len(self.data), self.width, np.int32) if self.lengths is None else self.lengths

    def where(self, wanted: NDArray[np.bool_]) -> Column:
        """Return the column, which has no codes, with null in the rows that are not ``wanted``."""
        return Column(self.data, np.where(wanted, self.sizes(), np.int32(NULL)))

    def padded(self) -> NDArray[np.bytes_]:
        """Return the values, none of which is coded, null or ends with a zero byte, as an array of strings."""
        if not self.width:
            return np.zeros(len(self.data), "S1")
        return np.ascontiguousarray(self.data).view(f"S{self.width}").reshape(-1)


def integers(values: NDArray[Any], width: int, null: NDArray[np.bool_] | None = None) -> Column:
    """Return a column of ``smallint``, ``integer`` or ``bigint`` (``width`` 2, 4, 8); ``null`` marks absent values.

    Unsigned values of 64 bits become the signed ones with the same bits.
    """
    if values.dtype == np.uint64:
        values = values.view(np.int64)
    big = np.ascontiguousarray(values).astype(f">i{width}").view(np.uint8).reshape(-1, width)
    if null is None or not null.any():
        return Column(big)
    return Column(big, np.where(null, np.int32(NULL), np.int32(width)))


def dates(days: NDArray[Any]) -> Column:
    """Return a column of ``date`` from day numbers (0 is 1970-01-01)."""
    return integers(days - POSTGRESQL_EPOCH_DAY, 4)


def booleans(values: NDArray[Any]) -> Column:
    """Return a column of ``boolean``."""
    return Column(np.ascontiguousarray(values).astype(np.uint8).reshape(-1, 1))


def repeated(value: bytes, count: int) -> Column:
    """Return a column of one value, ``count`` times."""
    return Column(np.broadcast_to(np.frombuffer(value, np.uint8), (count, len(value))))


def texts(lengths: NDArray[Any], data: bytes, *, empty_is_null: bool = False) -> Column:
    """Return a column of ``text`` from UTF-8 end to end, each as ``stored`` writes it."""
    if b"\0" in data or b"\\" in data:
        ends = np.cumsum(lengths).tolist()
        values = [stored_bytes(data[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]
        lengths, data = np.array([len(value) for value in values]), b"".join(values)
    column = _column_of(np.asarray(lengths, np.int32), np.frombuffer(data, np.uint8))
    if empty_is_null and not (lengths > 0).all():
        return Column(column.data, np.where(lengths == 0, np.int32(NULL), np.asarray(lengths, np.int32)))
    return column


def pieces(values: Sequence[bytes | None]) -> Column:
    """Return a column of ``values``, each the bytes of any type, ``None`` for null."""
    lengths = np.array([NULL if value is None else len(value) for value in values], np.int32)
    return _column_of(lengths, np.frombuffer(b"".join(value or b"" for value in values), np.uint8))


def coded(codes: NDArray[Any], values: Sequence[bytes | None]) -> Column:
    """Return the column of ``values[code]``: each value the bytes of any type, ``None`` for null."""
    table = pieces(values)
    return Column(table.data, table.lengths, np.asarray(codes, np.intp))


def coded_together(parts: Sequence[Coded]) -> Column:
    """Return what ``coded`` makes of each part as one column of as many fields.

    It has a row for each combination that there is, so the parts should be such that these are few.
    """
    combined, count = np.asarray(parts[0][0], np.int64), len(parts[0][1])
    for codes, values in parts[1:]:
        if count * len(values) > LARGEST_CODE:
            distinct, combined = np.unique(combined, return_inverse=True)
            count = len(distinct)
        combined, count = combined * len(values) + codes, count * len(values)
    _, firsts, combined = np.unique(combined, return_index=True, return_inverse=True)
    fields = [[_field(values[code]) for code in codes[firsts].tolist()] for codes, values in parts]
    table = pieces([b"".join(row) for row in zip(*fields, strict=True)])
    return Column(table.data, table.lengths, combined, fields=len(parts))


def _field(value: bytes | None) -> bytes:
    return NULL.to_bytes(LENGTH_BYTES, signed=True) if value is None else len(value).to_bytes(LENGTH_BYTES) + value


def together(columns: Sequence[Column]) -> Column:
    """Return columns without codes, whose values all fill their rows, as one of as many fields."""
    rows, _ = _laid_out(columns, 0)
    return Column(rows, fields=len(columns))


def decimals(values: NDArray[Any]) -> Column:
    """Return a column of ``text``: numbers, none of them below zero, in decimal."""
    digits = np.empty((len(values), len(str(int(values.max(initial=0))))), np.uint8)
    rest = np.asarray(values, np.uint64)
    for place in reversed(range(digits.shape[1])):
        rest, digits[:, place] = np.divmod(rest, np.uint64(10))
    # Zeros in front are left out, but for the last digit, which may be one.
    shown = np.logical_or.accumulate(digits > 0, axis=1)
    shown[:, -1:] = True
    return texts(shown.sum(axis=1), (digits + np.uint8(ord("0")))[shown].tobytes())


def beside(left: Column, right: Column, *, between: bytes) -> Column:
    """Return a column of ``text``: the values of two, none of which is coded or null, with a text in between."""
    middle = np.broadcast_to(np.frombuffer(between, np.uint8), (len(left), len(between)))
    data = np.hstack([left.data, middle, right.data])
    sizes = left.sizes() + right.sizes() + np.int32(len(between))
    if left.lengths is None:
        return Column(data, sizes)
    parts = (_filled(left.sizes(), left.width), np.ones_like(middle, np.bool_), _filled(right.sizes(), right.width))
    return texts(sizes, data[np.hstack(parts)].tobytes())


def joined(columns: Sequence[Column]) -> Column:
    """Return the columns, all of them coded or none, as one, their rows one below the other."""
    width = max(column.width for column in columns)
    full = all(column.lengths is None and column.width == width for column in columns)
    ends = np.cumsum([len(column.data) for column in columns])
    data = np.zeros((ends[-1], width), np.uint8)
    for column, end in zip(columns, ends.tolist(), strict=True):
        data[end - len(column.data) : end, : column.width] = column.data
    codes = [
        column.codes + (end - len(column.data))
        for column, end in zip(columns, ends.tolist(), strict=True)
        if column.codes is not None
    ]
    lengths = None if full else np.concatenate([column.sizes() for column in columns])
    return Column(data, lengths, np.concatenate(codes) if codes else None, fields=columns[0].fields)


def rows_of(columns: Sequence[Column], order: NDArray[np.intp] | None = None) -> list[memoryview]:
    """Return the rows that have ``columns``, those in ``order`` where it is given, in pieces.

    A binary ``COPY`` is ``HEADER``, any number of such rows, ``TRAILER``.
    """
    if order is None:
        order = np.arange(len(columns[0]))
    blocks = (order[start : start + BLOCK_ROWS] for start in range(0, len(order), BLOCK_ROWS))
    return [_block([column.taken(rows) for column in columns]) for rows in blocks]


def _block(columns: Sequence[Column]) -> memoryview:
    rows, belongs = _laid_out(columns, COUNT_BYTES)
    rows[:, :COUNT_BYTES].view(">i2")[:] = sum(max(1, column.fields) for column in columns)
    return (rows.reshape(-1) if belongs is None else rows[belongs]).data


def _laid_out(columns: Sequence[Column], start: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Return the rows of ``columns`` from byte ``start`` on, and which of their bytes belong to them: ``None``, all."""
    width = start + sum(column.width + (0 if column.fields else LENGTH_BYTES) for column in columns)
    rows = np.empty((len(columns[0]), width), np.uint8)
    belongs = None if all(column.lengths is None for column in columns) else np.ones(rows.shape, np.bool_)
    for column in columns:
        if not column.fields:
            lengths = column.width if column.lengths is None else column.lengths[:, np.newaxis]
            rows[:, start : start + LENGTH_BYTES].view(">i4")[:] = lengths
            start += LENGTH_BYTES
        end = start + column.width
        _write(rows[:, start:end], column.data)
        if column.lengths is not None and belongs is not None:
            belongs[:, start:end] = _filled(column.lengths, column.width)
        start = end
    return rows, belongs


def _write(place: NDArray[np.uint8], data: NDArray[np.uint8]) -> None:
    """Write ``data``, as whole words where its width is one."""
    width = data.shape[1]
    if width in WORD_BYTES and data.strides[1] == 1:
        place.view(f"u{width}")[:] = data.view(f"u{width}")
    else:
        place[:] = data


def _column_of(lengths: NDArray[np.int32], data: NDArray[np.uint8]) -> Column:
    """Return the column of values that are end to end in ``data``."""
    width = max(0, int(lengths.max(initial=0)))
    if len(data) == width * len(lengths):
        return Column(data.reshape(len(lengths), width), None if width or not len(lengths) else lengths)
    rows = np.zeros((len(lengths), width), np.uint8)
    rows[_filled(lengths, width)] = data
    return Column(rows, lengths)


def _filled(lengths: NDArray[np.int32], width: int) -> NDArray[np.bool_]:
    """Return which bytes of rows of ``width`` bytes belong to values of ``lengths``."""
    if width > LOOKED_UP_BYTES:
        return np.asarray(np.arange(width, dtype=np.int32) < lengths[:, np.newaxis])
    return _filled_by_length(width).take(lengths, axis=0)


@functools.lru_cache(maxsize=128)
def _filled_by_length(width: int) -> NDArray[np.bool_]:
    """Return ``_filled`` of each length from 0 to ``width``, and in the last row, which is that of -1, of null."""
    filled = np.tri(width + 2, width, -1, dtype=np.bool_)
    filled[-1] = False
    return filled
