"""The workload as a server sees it: ``XADD`` commands to fill a stream, and the replies that ``XREAD`` gives on it.

Entry IDs are chosen here, not by the server, so that a stream's time is the workload's and every run reads the same
bytes.
"""

from __future__ import annotations

from itertools import chain, repeat
from typing import Final, Literal, NamedTuple

import numpy as np

from accrual.stream import stream_id_text
from bench.rows import Integers, Packed, Rows, Table, beside, constant, decimal
from bench.workload import Events

__all__ = ["ENCODINGS", "EVENTS_PER_BATCH", "Encoding", "Entries", "command", "reply_head", "xread_command"]

Encoding = Literal["e", "b", "j"]
ENCODINGS: Final[tuple[Encoding, ...]] = ("e", "b", "j")
EVENTS_PER_BATCH: Final = 64
BATCH_HEAD: Final = b"\xdc" + EVENTS_PER_BATCH.to_bytes(2, "big")

# From here on, strings are long enough that joining them one by one costs nothing.
LONG_BYTES: Final = 512
LENGTHS: Final = Table([b"$%d\r\n" % length for length in range(1 << 15)])


class Entries(NamedTuple):
    """Stream entries of one field each: IDs as two columns, and the field's values."""

    ms: Integers
    seq: Integers
    encoding: Encoding
    values: Packed
    events: int

    @classmethod
    def of(cls, events: Events, encoding: Encoding = "e") -> Entries:
        """Put each event in an entry of its own (``e``, ``j``), or 64 neighbours in each (``b``)."""
        if encoding == "b":
            return cls._batches(events)
        values = events.compact() if encoding == "e" else events.json()
        return cls(events.arrival_ms, events.seq, encoding, values, len(events))

    @classmethod
    def _batches(cls, events: Events) -> Entries:
        if len(events) % EVENTS_PER_BATCH:
            raise ValueError(f"{len(events)} events do not fill entries of {EVENTS_PER_BATCH}")
        # A batch arrives when its last event does.
        last = slice(EVENTS_PER_BATCH - 1, None, EVENTS_PER_BATCH)
        batches = events.compact().grouped(EVENTS_PER_BATCH)
        values = _joined(constant(BATCH_HEAD), batches, b"")
        return cls(events.arrival_ms[last], events.seq[last], "b", values, len(events))

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.ms)

    @property
    def last(self) -> tuple[int, int]:
        """The ID of the last entry."""
        return int(self.ms[-1]), int(self.seq[-1])

    def xadd(self, key: str) -> Packed:
        """Return one ``XADD`` command for each entry."""
        before = b"*5\r\n$4\r\nXADD\r\n" + _bulk(key.encode())
        between = b"\r\n" + _bulk(self.encoding.encode())
        return _joined(beside(constant(before), self._id(), constant(between), self._length()), self.values, b"\r\n")

    def reply_entries(self) -> Packed:
        """Return each entry as it stands in a reply of ``XREAD``."""
        return _joined(self._reply_heads(), self.values, b"\r\n")

    def reply_sizes(self) -> Integers:
        """Return the length of each of ``reply_entries``, without making them."""
        return self._reply_heads().sizes + self.values.sizes + len(b"\r\n")

    def reply(self, key: str) -> bytes:
        """Return the reply of an ``XREAD`` that gives all entries."""
        return reply_head(key, len(self)) + self.reply_entries().data.tobytes()

    def _reply_heads(self) -> Rows:
        between = constant(b"\r\n*2\r\n" + _bulk(self.encoding.encode()))
        return beside(constant(b"*2\r\n"), self._id(), between, self._length())

    def _id(self) -> Rows:
        """Return the IDs as RESP texts, but for the line's end."""
        text = beside(decimal(self.ms), constant(b"-"), decimal(self.seq))
        return beside(LENGTHS.pick(text.sizes), text)

    def _length(self) -> Rows:
        return LENGTHS.pick(self.values.sizes)


def reply_head(key: str, entries: int) -> bytes:
    """Return what an ``XREAD`` reply of one stream has in front of its entries."""
    return b"*1\r\n*2\r\n" + _bulk(key.encode()) + b"*%d\r\n" % entries


def command(*arguments: bytes | str | int) -> bytes:
    """Return a command as RESP."""
    texts = [argument if isinstance(argument, bytes) else str(argument).encode() for argument in arguments]
    return b"*%d\r\n" % len(texts) + b"".join(map(_bulk, texts))


def xread_command(key: str, count: int, after: tuple[int, int]) -> bytes:
    """Return an ``XREAD`` of up to ``count`` entries behind the ID ``after``."""
    return command("XREAD", "COUNT", count, "STREAMS", key, stream_id_text(after))


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


def _joined(heads: Rows, values: Packed, tail: bytes) -> Packed:
    """Return each head followed by its value and ``tail``."""
    if len(values.data) < LONG_BYTES * len(values):
        return beside(heads, values.rows(), constant(tail)).packed()
    sizes = heads.sizes + values.sizes + len(tail)
    texts = heads.packed().strings()
    if len(texts) < len(values):
        texts *= len(values)
    parts = chain.from_iterable(zip(texts, values.strings(), repeat(tail), strict=False))
    return Packed(np.frombuffer(b"".join(parts), np.uint8), np.append(0, np.cumsum(sizes)))
