"""What the events stream answers to ``XREAD`` and ``XRANGE``: the compiled reader's plain twin, and the choice."""

from __future__ import annotations

from typing import Any, Final, Literal, Protocol, Self

import hiredis

from accrual.errors import CoreMissing
from accrual.events import StreamEntry
from accrual.stream.checkpoint import StreamId, parse_stream_id

__all__ = ["PlainReplyReader", "Reader", "ReplyKind", "open_reader"]

ReplyKind = Literal["entries", "nothing", "error", "status"]

BUFFER_BYTES: Final = 256 * 1024


class Reader(Protocol):
    """Receives the bytes of replies and holds one complete reply at a time."""

    def get_buffer(self, size_hint: int) -> memoryview:
        """Return writable memory for the next bytes."""

    def buffer_updated(self, size: int) -> bool:
        """Take note of ``size`` new bytes; return whether a complete reply is there."""

    def clear(self) -> bool:
        """Forget the reply; return whether another complete one was received behind it."""

    def pass_on(self, other: Self) -> None:
        """Keep the reply, and let ``other`` have what was received behind it, which receives from now on."""

    def abandon(self) -> None:
        """Forget everything received, complete or not: for a new connection."""

    @property
    def kind(self) -> str | None:
        """``entries``, ``nothing``, ``error`` or ``status``; ``None`` while the reply is not complete."""

    @property
    def error(self) -> str:
        """The server's error message, or an empty string."""

    @property
    def value(self) -> bytes:
        """The bytes of a status reply."""

    @property
    def size(self) -> int:
        """The bytes of the reply; 0 where nobody would decide it elsewhere."""

    @property
    def entries(self) -> int:
        """The number of stream entries."""

    @property
    def most_events(self) -> int:
        """The most valid events that the entries can hold; at least one each."""

    @property
    def first(self) -> StreamId:
        """The ID of the first entry."""

    @property
    def last(self) -> StreamId:
        """The ID of the last entry."""


class PlainReplyReader:
    """Stream entries as Python objects, for the reference engine: slow, and needs nothing compiled of ours."""

    size = 0

    def __init__(self) -> None:
        self._buffer = bytearray(BUFFER_BYTES)
        self._parser = hiredis.Reader()
        self.rows: list[StreamEntry] = []
        self.abandon()

    def get_buffer(self, size_hint: int) -> memoryview:  # noqa: ARG002 - the hint does not matter here
        """Return writable memory for the next bytes."""
        return memoryview(self._buffer)

    def buffer_updated(self, size: int) -> bool:
        """Take note of ``size`` new bytes; return whether a complete reply is there."""
        self._parser.feed(bytes(memoryview(self._buffer)[:size]))
        return self._held or self._take()

    def clear(self) -> bool:
        """Forget the reply; return whether another complete one was received behind it."""
        self._held = False
        return self._take()

    def pass_on(self, other: Self) -> None:
        """Keep the reply, and let ``other`` have what was received behind it, which receives from now on."""
        other.abandon()
        self._parser, other._parser = other._parser, self._parser
        other._take()

    def abandon(self) -> None:
        """Forget everything received, complete or not: for a new connection."""
        self._parser = hiredis.Reader()
        self._held = False
        self._reply: Any = None
        self.rows = []

    @property
    def kind(self) -> ReplyKind | None:
        """``entries``, ``nothing``, ``error`` or ``status``; ``None`` while the reply is not complete."""
        if not self._held:
            return None
        if self._reply is None:
            return "nothing"
        if isinstance(self._reply, hiredis.ReplyError):
            return "error"
        return "entries" if isinstance(self._reply, list) else "status"

    @property
    def error(self) -> str:
        """The server's error message, or an empty string."""
        return str(self._reply) if self.kind == "error" else ""

    @property
    def value(self) -> bytes:
        """The bytes of a status reply."""
        return self._reply if isinstance(self._reply, bytes) else b""

    @property
    def entries(self) -> int:
        """The number of stream entries."""
        return len(self.rows)

    @property
    def most_events(self) -> int:
        """The number of stream entries: the engine that this is for does not know its memory anyway."""
        return len(self.rows)

    @property
    def first(self) -> StreamId:
        """The ID of the first entry."""
        if not self.rows:
            raise ValueError("the reply has no entries")
        return self.rows[0].ms, self.rows[0].seq

    @property
    def last(self) -> StreamId:
        """The ID of the last entry."""
        if not self.rows:
            raise ValueError("the reply has no entries")
        return self.rows[-1].ms, self.rows[-1].seq

    def _take(self) -> bool:
        reply = self._parser.gets()
        self._held = reply is not False
        self._reply = reply
        self.rows = _rows(reply) if isinstance(reply, list) else []
        return self._held


def _rows(reply: list[Any]) -> list[StreamEntry]:
    # One stream of XREAD is [[key, [entry, ...]]]; XRANGE answers [entry, ...]; an entry is [ID, [name, value, ...]].
    if reply and isinstance(reply[0][1][0], list):
        reply = reply[0][1]
    rows = []
    for stream_id, values in reply:
        ms, seq = parse_stream_id(stream_id)
        rows.append(StreamEntry(ms, seq, tuple(zip(values[::2], values[1::2], strict=True))))
    return rows


def open_reader(engine_name: str) -> Reader:
    """Return the reader that goes with an engine: ``fast`` or ``reference``.

    Raises ``CoreMissing`` where the compiled core is not there.
    """
    if engine_name == "reference":
        return PlainReplyReader()
    try:
        from fastpath.resp import ReplyReader
    except ImportError as error:
        raise CoreMissing(error) from error
    return ReplyReader()
