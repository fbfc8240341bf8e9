"""Where events are read again: the stream, and the archive for what has left it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import redis

from accrual.events import StreamEntry
from accrual.stream import START, Keys, StreamId, entries_after, parse_stream_id

if TYPE_CHECKING:
    from accrual.archive import Archive

__all__ = ["Events", "StreamCount"]

LAST_SEQ: Final = (1 << 64) - 1
END: Final[StreamId] = (1 << 64, 0)

# How many entries were ever added to a stream, how many of them have left it, and the ID of the last one.
StreamCount = tuple[int, int, StreamId]


class Events:
    """The events of a partition. Stretches that follow each other are read in one go.

    What came behind the first entry that the stream has is taken from it, and what came before from the ``archive``.
    """

    def __init__(self, client: redis.Redis, keys: Keys, archive: Archive | None = None) -> None:
        self._client = client
        self._keys = keys
        self._archive = archive
        self._through = END
        self._coming: Iterator[StreamEntry] = iter(())
        self._next: StreamEntry | None = None

    def read(self, after: StreamId, through: StreamId, count: int) -> list[StreamEntry]:
        """Return what is there behind ``after`` up to and with ``through``, where there should be ``count`` entries."""
        if self._through == after:
            entries = self._take(through)
            if len(entries) == count:
                return entries
        # If some were trimmed while we read, they are in the archive by now.
        self._open(after)
        return self._take(through)

    def find(self, stream_id: StreamId) -> StreamEntry | None:
        """Return one entry, ``None`` where it is gone. Where they are asked for in order the archive is read once."""
        before = _before(stream_id)
        found = next(entries_after(self._client, self._keys, before, stream_id), None)
        if found is not None or not self._is_archived(before):
            return found
        if before < self._through:
            self._open(before)
        while self._next is not None and self._next[:2] < stream_id:
            self._next = next(self._coming, None)
        self._through = before
        return self._next if self._next is not None and self._next[:2] == stream_id else None

    def covers(self, after: StreamId) -> bool:
        """Tell whether everything that ever came behind ``after`` must still be there to be read."""
        return after >= self._trimmed_through() or self._is_archived(after)

    def count(self) -> StreamCount:
        """Return what the stream says of itself."""
        said = self._said()
        if said is None:
            return 0, 0, START
        added = said["entries-added"]
        return added, added - said["length"], parse_stream_id(said["last-generated-id"])

    def count_between(self, after: StreamId, through: StreamId, most: int) -> int | None:
        """Return how many entries the stream has there; ``None`` for ``most`` or more, and where some were trimmed."""
        found = sum(1 for _ in itertools.islice(entries_after(self._client, self._keys, after, through), most))
        return None if found == most or self._trimmed_through() > after else found

    def _open(self, after: StreamId) -> None:
        self._through = after
        self._coming = self._behind(after)
        self._next = next(self._coming, None)

    def _take(self, through: StreamId) -> list[StreamEntry]:
        entries = []
        while self._next is not None and self._next[:2] <= through:
            entries.append(self._next)
            self._next = next(self._coming, None)
        self._through = through
        return entries

    def _behind(self, after: StreamId) -> Iterator[StreamEntry]:
        if self._archive is not None and after < self._trimmed_through() and self._is_archived(after):
            end = self._archive.header(self._archive.numbers()[-1]).last
            if after < end:
                yield from self._archive.stretch(after, end)
                after = end
        yield from entries_after(self._client, self._keys, after, None)

    def _trimmed_through(self) -> StreamId:
        """Return the ID up to which entries may have been trimmed."""
        said = self._said()
        if said is None:
            return END
        if said["length"] == said["entries-added"]:
            return START
        if not said["length"]:
            return parse_stream_id(said["last-generated-id"])
        return _before(parse_stream_id(said["first-entry"][0]))

    def _said(self) -> Any:
        try:
            return self._client.xinfo_stream(self._keys.events)
        except redis.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return None

    def _is_archived(self, after: StreamId) -> bool:
        """Tell whether there is an archive that has all that came behind ``after``."""
        return self._archive is not None and bool(self._archive.numbers()) and self._archive.beginning() <= after


def _before(stream_id: StreamId) -> StreamId:
    ms, seq = stream_id
    return (ms, seq - 1) if seq else (ms - 1, LAST_SEQ)
