"""What a server answers to XREAD or XRANGE, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable

from accrual.engine import StreamEntry
from accrual.stream import Reader

__all__ = ["bulk", "receive", "reply_of"]


def bulk(data: bytes) -> bytes:
    """Return a bulk string."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def reply_of(entries: Iterable[StreamEntry], key: bytes | None = b"accrual:{p}:events") -> bytes:
    """Return the answer with ``entries``: to an XREAD of the stream ``key``, or to an XRANGE where that is ``None``."""
    encoded = [_entry(entry) for entry in entries]
    body = b"*%d\r\n" % len(encoded) + b"".join(encoded)
    return body if key is None else b"*1\r\n*2\r\n" + bulk(key) + body


def _entry(entry: StreamEntry) -> bytes:
    fields = b"".join(bulk(part) for pair in entry.fields for part in pair)
    return b"*2\r\n" + bulk(b"%d-%d" % (entry.ms, entry.seq)) + b"*%d\r\n%b" % (2 * len(entry.fields), fields)


def receive(reader: Reader, data: bytes) -> None:
    """Let ``reader`` have ``data`` piece by piece, as a connection does."""
    while data:
        place = reader.get_buffer(len(data))
        size = min(len(place), len(data))
        place[:size] = data[:size]
        reader.buffer_updated(size)
        data = data[size:]
