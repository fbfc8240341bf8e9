"""From the events stream into segments, beside the worker and in its own process.

The order is: read, store the segment, take note of it on the server. A segment is stored only where there is none of
its number, so whatever a crash or a second archiver left there is looked at, and taken as it is if it has the same
entries as the stream.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import redis

from accrual.archive.chain import Archive, check_link
from accrual.archive.segment import Segment
from accrual.errors import ArchiveError, BlobExists
from accrual.events import StreamEntry
from accrual.settings import Settings
from accrual.stream import (
    START,
    Archived,
    Keys,
    StreamId,
    archive_standing,
    entries_after,
    note_segment,
    parse_stream_id,
    segments_noted,
    stream_id_text,
)

__all__ = ["Archiver", "delete_expired"]

log = logging.getLogger("accrual.archive")

POLL_S: Final = 0.5
LAST_SEQ: Final = (1 << 64) - 1
DAY_MS: Final = 86_400_000
RETENTION_CHECK_S: Final = 600.0


class Archiver:
    """Archives the input of one partition.

    With ``late`` an archive may begin behind entries that have been trimmed; otherwise it refuses to. What was read but
    is not in a segment yet is forgotten when ``run`` ends, and read again.
    """

    def __init__(self, client: redis.Redis, archive: Archive, settings: Settings, *, late: bool = False) -> None:
        self._client = client
        self._archive = archive
        self._keys = Keys(settings.partition)
        self._settings = settings
        self._late = late
        self._checked_s = float("-inf")

    def run(self, stopping: threading.Event, *, drain: bool, worked: Callable[[], None] = lambda: None) -> None:
        """Archive until ``stopping`` is set; or up to the end of the stream as it is now, to ``drain`` it.

        ``worked`` is called whenever something was done, or there was nothing to do. Raises ``StreamTrimmed`` where
        entries are gone that the archive does not have, ``ArchiveError`` where what is in the store is not the archive
        of this stream, and what the server or the store raise while they are away.
        """
        # Whatever else may be wrong, what people were promised is deleted.
        self._delete_expired()
        self._begin()
        end = self._last_entry() if drain else None
        while not stopping.is_set():
            self._delete_expired()
            standing = self._standing()
            worked()
            if end is not None and standing.position >= end:
                return
            entries = self._collect(standing.position, end, stopping)
            if stopping.is_set():
                return
            if entries:
                self._store(standing, entries)
            else:
                stopping.wait(POLL_S)

    def _begin(self) -> None:
        """Begin an archive that has not begun, and check that one that has is in this store."""
        place, numbers = self._archive.place, self._archive.numbers()
        standing = archive_standing(self._client, self._keys)
        if standing is None:
            # Either there is none, or the server has lost what it knew of it.
            begin = self._archive.segment(numbers[-1]).standing if numbers else self._first_standing()
            standing = archive_standing(self._client, self._keys, begin)
        last = standing.segments if standing is not None else 0
        if last in numbers:
            if self._archive.segment(last).standing != standing:
                raise ArchiveError(f"{place}: segment {last} is not the one that was archived; it is another store")
        elif last and (numbers or not self._is_expired(self._standing().position)):
            raise ArchiveError(f"{place}: segment {last}, the last that was archived, is missing; is it another store?")
        log.info("archive place=%s segments=%d", place, last)

    def _standing(self) -> Archived:
        """Return how far the archive has come; and see that everything behind that is still on the stream."""
        standing = archive_standing(self._client, self._keys)
        if standing is None:
            raise ArchiveError(f"{self._keys.archive} was deleted: start again to begin an archive, or to resume it")
        return standing

    def _first_standing(self) -> Archived:
        """Return where an archive begins that has nothing: at the stream's beginning, or behind what was trimmed."""
        if not self._late or not self._client.exists(self._keys.events):
            return Archived()
        information: dict[str, Any] = self._client.xinfo_stream(self._keys.events)
        removed = information["entries-added"] - information["length"]
        if not removed:
            return Archived()
        if not information["length"]:
            return Archived(position=parse_stream_id(information["last-generated-id"]), entries=removed)
        ms, seq = parse_stream_id(information["first-entry"][0])
        return Archived(position=(ms, seq - 1) if seq else (ms - 1, LAST_SEQ), entries=removed)

    def _last_entry(self) -> StreamId:
        """Return the ID of the stream's last entry."""
        page: Any = self._client.xrevrange(self._keys.events, "+", "-", 1)
        return parse_stream_id(page[0][0]) if page else START

    def _collect(self, after: StreamId, end: StreamId | None, stopping: threading.Event) -> list[StreamEntry]:
        """Return the entries of a segment: once it is full, has waited for long enough, or has come to ``end``."""
        entries: list[StreamEntry] = []
        size_bytes = 0
        deadline_s = time.monotonic() + self._settings.archive_interval_s
        while not stopping.is_set():
            for entry in entries_after(self._client, self._keys, after, end):
                entries.append(entry)
                for name, value in entry.fields:
                    size_bytes += len(name) + len(value)
                if size_bytes >= self._settings.archive_segment_bytes or stopping.is_set():
                    return entries
            if end is not None or time.monotonic() >= deadline_s:
                break
            after = entries[-1][:2] if entries else after
            stopping.wait(POLL_S)
        return entries

    def _store(self, before: Archived, entries: list[StreamEntry]) -> None:
        """Store a segment and take note of it, unless another archiver was quicker."""
        # What was deleted before it was read would be a gap that nobody sees; it raises.
        if self._standing() != before:
            return
        try:
            segment = self._archive.append(before, entries, time.time_ns() // 1_000_000)
        except BlobExists:
            found = self._archive.segment(before.segments + 1)
            if not self._is_ours(found, before):
                return
            segment = found
        after = segment.standing
        if note_segment(self._client, self._keys, before, after):
            log.info(
                "archived segment=%d entries=%d through=%s bytes=%d",
                *(after.segments, segment.header.count, stream_id_text(after.position), len(segment.sealed)),
            )

    def _is_ours(self, found: Segment, before: Archived) -> bool:
        """Tell whether a segment that is there already is of our stream: left by a crash, or another archiver's.

        ``False`` if the other archiver has gone on meanwhile, so that nothing can be compared. Raises ``ArchiveError``
        where it is of another stream.
        """
        check_link(found, before)
        ours = entries_after(self._client, self._keys, before.position, found.header.last)
        if all(one == other for one, other in itertools.zip_longest(self._archive.entries(found), ours)):
            return True
        if self._standing() != before:
            return False
        raise ArchiveError(f"{found.name}: has other entries than the stream: it is of another one, move it away")

    def _delete_expired(self) -> None:
        """Delete what is older than the retention, from time to time; but nothing that was not taken note of."""
        if not self._settings.archive_retention_days or time.monotonic() < self._checked_s + RETENTION_CHECK_S:
            return
        delete_expired(self._archive, self._settings, self._client, through=segments_noted(self._client, self._keys))
        self._checked_s = time.monotonic()

    def _is_expired(self, position: StreamId) -> bool:
        days = self._settings.archive_retention_days
        return bool(days) and position[0] < _oldest_ms(days, self._client)


def delete_expired(archive: Archive, settings: Settings, client: redis.Redis | None, through: int | None = None) -> int:
    """Delete the segments whose last entry is older than the retention, none behind ``through``; return how many.

    A clock that has run ahead must not delete an archive: with a ``client`` its server's, which the IDs of the entries
    are from, has to agree that they are as old.
    """
    days = settings.archive_retention_days
    deleted = archive.delete_before(_oldest_ms(days, client), through)
    if deleted:
        log.info("deleted segments=%d older_than_days=%d", deleted, days)
    return deleted


def _oldest_ms(retention_days: int, client: redis.Redis | None) -> int:
    now_ms = time.time_ns() // 1_000_000
    if client is not None:
        seconds, microseconds = client.time()
        now_ms = min(now_ms, seconds * 1000 + microseconds // 1000)
    return now_ms - retention_days * DAY_MS
