"""What a server answers to XREAD or XRANGE, byte for byte, and a connection that brings it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from accrual.engine import StreamEntry
from accrual.stream import Reader

__all__ = ["MemoryConnection", "bulk", "receive", "reply_of"]


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


class MemoryConnection:
    """A read connection without a server: one reply at a time goes from ``replies`` into the reader."""

    def __init__(self, reader: Reader, replies: deque[bytes]) -> None:
        self._reader = reader
        self._replies = replies

    async def reply(self) -> str:
        """Return the kind of the next reply, which the reader then holds."""
        if self._reader.kind is None:
            receive(self._reader, self._replies.popleft())
        assert self._reader.kind is not None
        return self._reader.kind

    def receive_into(self, reader: Reader) -> None:
        """Give what comes from now on to ``reader``."""
        self._reader.pass_on(reader)
        self._reader = reader

    def close(self) -> None:
        """Leave everything as it is."""
