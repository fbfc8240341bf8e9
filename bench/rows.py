"""Byte strings by the thousand, without a Python object for each: a small algebra over numpy arrays.

``Rows`` holds one byte string a row, as pieces of up to eight bytes side by side. Pieces are words, so that numpy moves
eight bytes at a time, and ``packed`` ORs each word into its place: bytes that a row does not use are zero in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "WORD_BYTES",
    "Booleans",
    "Bytes",
    "Integers",
    "Packed",
    "Piece",
    "Rows",
    "Table",
    "Words",
    "beside",
    "constant",
    "decimal",
    "numbered",
]

Booleans = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

assert sys.byteorder == "little", "the first byte of a word must be its lowest"

WORD_BYTES: Final = 8
# The lowest bytes of a word, by their number.
MASKS: Final = np.array([(1 << 8 * size) - 1 for size in range(WORD_BYTES + 1)], np.uint64)

# Four digits at a time: as many as a table can hold.
GROUP: Final = 4
GROUP_TEXT: Final = np.frombuffer(b"".join(b"%04d" % number for number in range(10**GROUP)), np.uint32)
POWERS_OF_TEN: Final = 10 ** np.arange(1, 19, dtype=np.int64)


class Packed(NamedTuple):
    """Byte strings end to end: string ``i`` is ``data[offsets[i]:offsets[i + 1]]``."""

    data: Bytes
    offsets: Integers

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Integers:
        """The length of each string in bytes."""
        return np.diff(self.offsets)

    def strings(self) -> list[bytes]:
        """Return every string as an object: for tests and slow peers only."""
        data = self.data.tobytes()
        return [data[start:end] for start, end in pairwise(self.offsets.tolist())]

    def grouped(self, size: int) -> Packed:
        """Return ``size`` neighbours at a time as one string; the last group may be smaller."""
        return Packed(self.data, np.append(self.offsets[:-1:size], self.offsets[-1]))

    def rows(self) -> Rows:
        """Return the strings as rows, to put others beside them."""
        words = _words_anywhere(np.append(self.data, np.zeros(WORD_BYTES, np.uint8)))
        sizes = self.sizes
        pieces = []
        # One piece there must be, if only to say how many rows there are.
        for start in range(0, max(1, int(sizes.max(initial=0))), WORD_BYTES):
            taken = np.clip(sizes - start, 0, WORD_BYTES)
            # A string that has ended reads any word, of which the mask leaves nothing.
            pieces.append(Piece(words[np.minimum(self.offsets[:-1] + start, len(self.data))] & MASKS[taken], taken))
        return Rows(pieces)


class Piece(NamedTuple):
    """Up to eight bytes of every row: ``words``, zero beyond ``sizes`` bytes. An array of one stands for all rows."""

    words: Words
    sizes: Integers


class Rows:
    """One byte string a row, as pieces side by side."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces

    @classmethod
    def of(cls, cells: Bytes, sizes: Integers | None = None) -> Rows:
        """Return the first ``sizes`` bytes of each row of ``cells``, by default all of them."""
        count, width = cells.shape
        padded = np.zeros((count, -(-width // WORD_BYTES) * WORD_BYTES), np.uint8)
        padded[:, :width] = cells
        words = padded.view(np.uint64)
        whole = np.array([width]) if sizes is None else sizes
        taken = [np.clip(whole - number * WORD_BYTES, 0, WORD_BYTES) for number in range(words.shape[1])]
        return cls([Piece(words[:, number] & MASKS[sizes], sizes) for number, sizes in enumerate(taken)])

    def where(self, condition: Booleans) -> Rows:
        """Return the same with the rows emptied for which ``condition`` does not hold."""
        kept = -condition.astype(np.int64)
        return Rows([Piece(words & kept.view(np.uint64), sizes & kept) for words, sizes in self.pieces])

    def either(self, other: Rows) -> Rows:
        """Return the same with the rows of ``other``, of one piece, laid over those that are empty."""
        (first, *rest), (over,) = self.pieces, other.pieces
        return Rows([Piece(first.words | over.words, first.sizes | over.sizes), *rest])

    @property
    def sizes(self) -> Integers:
        """The length of each row in bytes."""
        rows = max(len(piece.words) for piece in self.pieces)
        return sum((piece.sizes for piece in self.pieces), np.zeros(rows, np.int64))

    def packed(self) -> Packed:
        """Return the rows end to end. Rows must be long enough for no word to reach into what its neighbour writes."""
        sizes = self.sizes
        offsets = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        data = np.zeros(int(offsets[-1]) + WORD_BYTES, np.uint8)
        places = _words_anywhere(data)
        position = offsets[:-1].copy()
        for words, taken in _merged(self.pieces):
            _or_into(places, position, words, taken)
            position += taken
        return Packed(data[:-WORD_BYTES], offsets)


def _words_anywhere(data: Bytes) -> Words:
    """Return the word that starts at each byte of ``data`` as one overlapping view."""
    return np.ndarray((len(data) - WORD_BYTES + 1,), np.uint64, data, strides=(1,))


def _merged(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield the same bytes in fewer pieces: neighbours that fit in one word become one."""
    pending = Piece(np.zeros(1, np.uint64), np.zeros(1, np.int64))
    for piece in pieces:
        if pending.sizes.max() + piece.sizes.max() <= WORD_BYTES:
            shift = (8 * pending.sizes).astype(np.uint64)
            pending = Piece(pending.words | (piece.words << shift), pending.sizes + piece.sizes)
        else:
            yield pending
            pending = piece
    yield pending


def _or_into(places: Words, position: Integers, words: Words, sizes: Integers) -> None:
    if len(sizes) == len(position) and 2 * np.count_nonzero(sizes) < len(sizes):
        # What few rows have, only few rows pay for.
        rows = np.flatnonzero(sizes)
        position, words = position[rows], words[rows]
    assert np.all(position[1:] - position[:-1] >= WORD_BYTES), "rows are too short"
    places[position] |= words


class Table:
    """A vocabulary of byte strings, from which rows are picked by number."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        width = max(map(len, texts))
        cells = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), np.uint8).reshape(-1, width)
        self._pieces = Rows.of(cells, np.array([len(text) for text in texts])).pieces

    def pick(self, numbers: npt.NDArray[np.integer]) -> Rows:
        """Return the strings with these numbers."""
        return Rows([Piece(words[numbers], sizes[numbers]) for words, sizes in self._pieces])


def beside(*parts: Rows) -> Rows:
    """Return each row of the first part followed by the same row of the next ones. One-row parts are repeated."""
    return Rows([piece for part in parts for piece in part.pieces])


def constant(text: bytes) -> Rows:
    """Return ``text`` for every row."""
    return Rows.of(np.frombuffer(text, np.uint8)[None, :])


def digits(numbers: Integers, width: int) -> Bytes:
    """Return the last ``width`` decimal digits of ``numbers`` (not negative) as ASCII, zeros in front."""
    groups = -(-width // GROUP)
    texts = np.empty((len(numbers), groups), np.uint32)
    rest = numbers
    for group in range(groups - 1, -1, -1):
        rest, low = np.divmod(rest, 10**GROUP)
        texts[:, group] = GROUP_TEXT[low]
    return texts.view(np.uint8)[:, groups * GROUP - width :]


def numbered(before: bytes, numbers: Integers, width: int, after: bytes = b"") -> Rows:
    """Return ``width`` digits of each number between two constants: in as few pieces as can be."""
    cells = np.empty((len(numbers), len(before) + width + len(after)), np.uint8)
    cells[:, : len(before)] = np.frombuffer(before, np.uint8)
    cells[:, len(before) : len(before) + width] = digits(numbers, width)
    cells[:, len(before) + width :] = np.frombuffer(after, np.uint8)
    return Rows.of(cells)


def decimal(numbers: Integers) -> Rows:
    """Return ``numbers`` (not negative) in decimal, without zeros in front."""
    width = len(str(numbers.max()))
    cells = digits(numbers, width)
    if len(str(numbers.min())) == width:
        return Rows.of(cells)
    size = 1 + np.searchsorted(POWERS_OF_TEN, numbers, side="right")
    # Each row starts where its first digit is; what was in front of it is left out.
    columns = np.minimum(np.arange(width) + (width - size)[:, None], width - 1)
    return Rows.of(np.take_along_axis(cells, columns, axis=1), size)
