"""How far the archive of a partition has come, and trimming that respects it.

The position is a hash beside the stream, in its hash slot; the segments themselves are ``accrual.archive``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import redis
import redis.asyncio

from accrual.errors import StreamTrimmed
from accrual.events import StreamEntry
from accrual.stream.checkpoint import NO_DIGEST, START, StreamId, parse_stream_id, stream_id_text
from accrual.stream.commit import lost_to
from accrual.stream.keys import Keys
from accrual.stream.scripts import ARCHIVE, ARCHIVED, TRIM
from accrual.stream.server import with_fields_in_order

__all__ = ["Archived", "Trimmed", "archive_standing", "entries_after", "note_segment", "segments_noted", "trim_events"]

FIRST_PAGE_ENTRIES: Final = 64
LARGEST_PAGE_ENTRIES: Final = 2048
# The server does nothing else while it answers, so an answer is kept small.
PAGE_BYTES: Final = 1 << 20


class Archived(msgspec.Struct, frozen=True):
    """What an archive has: ``entries`` stream entries up to ``position``, in ``segments``, the last with ``digest``.

    What had been trimmed before a late archive began counts as entries.
    """

    segments: int = 0
    digest: bytes = NO_DIGEST
    position: StreamId = START
    entries: int = 0

    def to_arguments(self) -> list[str]:
        """Return it as the scripts take it."""
        return [str(self.segments), self.digest.hex(), stream_id_text(self.position), str(self.entries)]


class Trimmed(msgspec.Struct, frozen=True):
    """How many entries trimming removed, and the first that had to stay."""

    entries: int
    before: StreamId


def archive_standing(client: redis.Redis, keys: Keys, begin: Archived | None = None) -> Archived | None:
    """Return how far the archive has come, ``None`` if it has not begun. With ``begin`` it begins there.

    Raises ``StreamTrimmed`` where entries behind that are gone; then nothing begins.
    """
    script: Any = client.register_script(ARCHIVE.text)
    answer = script(keys=[keys.events, keys.archive], args=begin.to_arguments() if begin else [])
    if answer is None:
        return None
    why, segments, digest, position, entries = (value.decode() for value in answer)
    if why:
        raise StreamTrimmed(f"the archive of {keys.events} would have a gap: {why}")
    return Archived(int(segments), bytes.fromhex(digest), parse_stream_id(position), int(entries))


def segments_noted(client: redis.Redis, keys: Keys) -> int:
    """Return how many segments were taken note of, whatever has become of the stream; 0 if no archive has begun."""
    noted: Any = client.hmget(keys.archive, "segments")
    return int(noted[0] or 0)


def note_segment(client: redis.Redis, keys: Keys, before: Archived, after: Archived) -> bool:
    """Take note of the segment between the two; return whether the archive stands at ``after`` now.

    It does not where it was not at ``before``. To note the same segment twice is harmless.
    """
    script: Any = client.register_script(ARCHIVED.text)
    return bool(script(keys=[keys.archive], args=[before.digest.hex(), *after.to_arguments()]))


def entries_after(client: redis.Redis, keys: Keys, after: StreamId, through: StreamId | None) -> Iterator[StreamEntry]:
    """Yield the entries of the events stream behind ``after``, up to ``through`` or to its end, in small pages."""
    plain = with_fields_in_order(client)
    last = "+" if through is None else stream_id_text(through)
    entries = FIRST_PAGE_ENTRIES
    while True:
        page: Any = plain.xrange(keys.events, f"({stream_id_text(after)}", last, entries)
        size_bytes = 0
        for stream_id, values in page:
            after = parse_stream_id(stream_id)
            size_bytes += sum(map(len, values))
            yield StreamEntry(*after, tuple(zip(values[::2], values[1::2], strict=True)))
        if len(page) < entries:
            return
        fitting = PAGE_BYTES * len(page) // max(1, size_bytes)
        entries = max(1, min(LARGEST_PAGE_ENTRIES, 2 * entries, fitting))


async def trim_events(
    client: redis.asyncio.Redis, keys: Keys, nonce: str, before: StreamId, *, archived: bool
) -> Trimmed:
    """Remove the events before ``before``, as far as they were consumed and the archive has them.

    The server leaves some that it might remove. ``archived`` says that there is to be an archive: until it has begun
    nothing is removed. Raises ``OwnershipLost`` where ``nonce`` is not the owner's.
    """
    script: Any = client.register_script(TRIM.text)
    arguments = [nonce, stream_id_text(before), "1" if archived else ""]
    total = 0
    while True:
        status, value, *rest = await script(keys=[keys.checkpoint, keys.events, keys.archive], args=arguments)
        if status == b"owner":
            raise lost_to(value)
        total += rest[0]
        if not rest[0]:
            return Trimmed(total, parse_stream_id(value))
