"""Columns: integers at the narrowest width that holds their spread, and byte strings end to end (docs/LEDGER.md).

An integer column is ``[base, width, bytes]``: value i is ``base`` plus the i-th little-endian unsigned number of
``width`` bytes. A bytes column is ``[lengths, bytes]``. What is unpacked may be torn, so every size is checked before
memory is taken for it; ``ValueError`` says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Final, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

__all__ = [
    "INT64_MAXIMUM",
    "BytesColumn",
    "IntegerColumn",
    "checked_texts",
    "pack_bytes",
    "pack_integers",
    "signed",
    "unpack_bytes",
    "unpack_integers",
    "unpack_texts",
]

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
IntegerColumn = tuple[Int64, Literal[0, 1, 2, 4, 8], bytes]
BytesColumn = tuple[IntegerColumn, bytes]

INT64_MAXIMUM: Final = 2**63 - 1
WORD: Final = 2**64 - 1


def signed(value: int) -> int:
    """Return the signed 64-bit number that has the bits of the unsigned 64-bit ``value``."""
    return value - 2**64 if value > INT64_MAXIMUM else value


def pack_integers(values: Sequence[int]) -> IntegerColumn:
    """Pack signed 64-bit integers. Raises ``OverflowError`` for a larger one."""
    if not values:
        return 0, 0, b""
    array = np.array(values, dtype=np.int64)
    base = int(array.min())
    width = _width(int(array.max()) - base)
    differences = array.view(np.uint64) - np.uint64(base & WORD)
    return base, width, differences.astype(f"<u{width}").tobytes() if width else b""


def _width(spread: int) -> Literal[0, 1, 2, 4, 8]:
    if spread == 0:
        return 0
    if spread < 2**8:
        return 1
    if spread < 2**16:
        return 2
    return 4 if spread < 2**32 else 8


def unpack_integers(column: IntegerColumn, count: int) -> NDArray[np.int64]:
    """Return the ``count`` values of an integer column, read-only."""
    base, width, data = column
    if len(data) != width * count:
        raise ValueError(f"{len(data)} bytes, where {count} values of {width} bytes need {width * count}")
    if width == 0:
        # One value seen ``count`` times takes no memory, so that a false count cannot ask for much.
        return np.broadcast_to(np.int64(base), (count,))
    differences = np.frombuffer(data, dtype=f"<u{width}")
    if count and base + int(differences.max()) > INT64_MAXIMUM:
        raise ValueError("a value is beyond 64 bits")
    values = (differences.astype(np.uint64) + np.uint64(base & WORD)).view(np.int64)
    values.flags.writeable = False
    return values


def pack_bytes(values: Sequence[bytes]) -> BytesColumn:
    """Pack byte strings."""
    return pack_integers([len(value) for value in values]), b"".join(values)


def unpack_bytes(column: BytesColumn, count: int) -> list[bytes]:
    """Return the ``count`` byte strings of a bytes column."""
    data = column[1]
    return [data[start:end] for start, end in pairwise(_bounds(column, count))]


def unpack_texts(column: BytesColumn, count: int) -> list[str]:
    """Return the ``count`` UTF-8 texts of a bytes column."""
    data = column[1]
    if not data.isascii():
        return [value.decode() for value in unpack_bytes(column, count)]
    text = data.decode()
    return [text[start:end] for start, end in pairwise(_bounds(column, count))]


def checked_texts(column: BytesColumn, count: int) -> tuple[NDArray[np.int64], bytes]:
    """Return the lengths of the ``count`` UTF-8 texts of a bytes column, and their bytes end to end."""
    lengths, data = _checked_lengths(column, count), column[1]
    if not data.isascii():
        unpack_texts(column, count)
    return lengths, data


def _bounds(column: BytesColumn, count: int) -> list[int]:
    """Return where each value starts, and where the last one ends."""
    return [0, *np.cumsum(_checked_lengths(column, count)).tolist()]


def _checked_lengths(column: BytesColumn, count: int) -> NDArray[np.int64]:
    try:
        lengths = unpack_integers(column[0], count)
    except ValueError as error:
        raise ValueError(f"lengths: {error}") from None
    size = len(column[1])
    # Each length is compared first, so that their sum cannot leave 64 bits.
    if count and (int(lengths.min()) < 0 or int(lengths.max()) > size):
        raise ValueError(f"a length from {lengths.min()} to {lengths.max()} in {size} bytes")
    total = int(lengths.sum())
    if total != size:
        raise ValueError(f"{size} bytes, where the lengths add up to {total}")
    return lengths
