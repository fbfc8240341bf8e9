"""The grocery baskets that the demo's member day is made of, and the compact file that holds them.

The file is an XZ stream: one line of JSON (the categories, the columns' lengths) and then the columns, each
as planes of bytes: all lowest bytes, then all second bytes, and so on. Sorted columns are stored as
differences. Planes of similar bytes are what makes 155 848 baskets fit in little over a megabyte. Where the
baskets come from is told in
``data/README.md``.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Baskets", "dump", "load", "parse"]

FORMAT: Final = "accrual-demo-baskets-1"

# Name, type on disk, and whether the column holds differences to the value before (wrapping around).
COLUMNS: Final = (
    ("household", "<u2", True),
    ("day", "<u2", True),
    ("second", "<u4", False),
    ("store", "<u2", False),
    ("line_count", "<u1", False),
    ("category", "<u1", False),
    ("amount_fen", "<u4", False),
)

# Chosen by trying: low bytes of amounts and times share no alignment with their neighbours.
COMPRESSION: Final = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


@dataclass(frozen=True, eq=False)
class Baskets:
    """``n`` baskets with ``m`` lines in all, as columns, sorted by household, day and second.

    A basket's line is what was paid for one category of goods, never 0. A basket for which nothing was paid
    has no line.
    """

    categories: tuple[str, ...]
    """Names of the categories of goods, sorted."""
    household: npt.NDArray[np.uint16]
    """``(n,)`` the household that bought, 1..2500."""
    day: npt.NDArray[np.uint16]
    """``(n,)`` day of the year 2017, 0..364; day 0 is a Sunday."""
    second: npt.NDArray[np.uint32]
    """``(n,)`` local second of the day, 0..86 399."""
    store: npt.NDArray[np.uint16]
    """``(n,)`` number of the store."""
    line_start: npt.NDArray[np.int64]
    """``(n + 1,)`` basket ``i`` has lines ``line_start[i]`` up to, not including, ``line_start[i + 1]``."""
    category: npt.NDArray[np.uint8]
    """``(m,)`` index into ``categories``, rising within a basket."""
    amount_fen: npt.NDArray[np.uint32]
    """``(m,)`` amount of the line in fen (the cents of the original data), > 0."""

    def __len__(self) -> int:
        return len(self.household)

    @property
    def total_fen(self) -> npt.NDArray[np.int64]:
        """``(n,)`` amount of each basket in fen."""
        sums = np.concatenate(([0], np.cumsum(self.amount_fen, dtype=np.int64)))
        return sums[self.line_start[1:]] - sums[self.line_start[:-1]]

    def first_households(self, count: int) -> Baskets:
        """Return the baskets of the first ``count`` households: a small set for tests and quick looks."""
        numbers = np.unique(self.household)
        size = len(self) if count >= len(numbers) else int(np.searchsorted(self.household, numbers[count]))
        lines = int(self.line_start[size])
        return Baskets(
            self.categories,
            self.household[:size],
            self.day[:size],
            self.second[:size],
            self.store[:size],
            self.line_start[: size + 1],
            self.category[:lines],
            self.amount_fen[:lines],
        )


def load() -> Baskets:
    """Read the baskets that come with the package: 155 848 of them, in well under a second."""
    return parse(files("accrual.demo").joinpath("data/baskets.xz").read_bytes())


def parse(data: bytes) -> Baskets:
    """Decode what ``dump`` made. Raises ``ValueError`` or ``lzma.LZMAError`` where ``data`` is not that."""
    header_line, _, body = lzma.decompress(data).partition(b"\n")
    header = json.loads(header_line)
    if header.get("format") != FORMAT:
        raise ValueError(f"not a file of baskets: the format is {header.get('format')!r}, not {FORMAT!r}")
    columns: dict[str, npt.NDArray[Any]] = {}
    offset = 0
    for name, kind, is_delta in COLUMNS:
        dtype, length = np.dtype(kind), header["lengths"][name]
        planes = np.frombuffer(body, np.uint8, length * dtype.itemsize, offset)
        planes = planes.reshape(dtype.itemsize, length)
        offset += planes.size
        values = np.ascontiguousarray(planes.T).view(dtype).reshape(length)
        columns[name] = np.cumsum(values, dtype=dtype) if is_delta else values
    counts = columns.pop("line_count")
    line_start = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    return Baskets(categories=tuple(header["categories"]), line_start=line_start, **columns)


def dump(baskets: Baskets) -> bytes:
    """Encode ``baskets`` as the compact file."""
    planes, lengths = [], {}
    for name, kind, is_delta in COLUMNS:
        column = np.diff(baskets.line_start) if name == "line_count" else getattr(baskets, name)
        values = column.astype(kind)
        if is_delta:
            values = np.diff(values, prepend=values.dtype.type(0))
        planes.append(values.view(np.uint8).reshape(len(values), -1).T.tobytes())
        lengths[name] = len(values)
    header = {"format": FORMAT, "categories": baskets.categories, "lengths": lengths}
    body = json.dumps(header, separators=(",", ":")).encode() + b"\n" + b"".join(planes)
    return lzma.compress(body, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=COMPRESSION)
