"""The segments of a partition in a store. Each names the one before, so that none can be missing unnoticed."""

from __future__ import annotations

import bisect
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Final

from accrual.archive.keys import NO_KEYS, ArchiveKeys
from accrual.archive.segment import Segment, SegmentHeader, make_segment, read_header
from accrual.blobs import BlobStore
from accrual.errors import ArchiveError, BlobMissing
from accrual.events import StreamEntry
from accrual.stream import START, Archived, Keys, StreamId, stream_id_text

__all__ = ["Archive", "read_stretch"]

NAME: Final = re.compile(r"(\d{12})\.segment")


def read_stretch(
    store: BlobStore, partition: str, after: StreamId, upto: StreamId | None, keys: ArchiveKeys = NO_KEYS
) -> Iterator[StreamEntry]:
    """Yield the entries of a partition's stream behind ``after`` up to and with ``upto``, or to the archive's end.

    They are as the stream had them: exact IDs, fields in their order, bytes of values. Raises ``ArchiveError``, before
    the first one, where the archive does not have the whole stretch; and where a segment cannot be believed.
    """
    return Archive(store, partition, keys).stretch(after, upto)


class Archive:
    """The archive of ``partition`` in ``store``. Raises ``UsageError`` for a name that is none."""

    def __init__(self, store: BlobStore, partition: str, keys: ArchiveKeys = NO_KEYS) -> None:
        self._store = store
        self._partition = Keys(partition).partition
        self._folder = f"events-{partition}"
        self._keys = keys

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self._store.url}/{self._folder}"

    def numbers(self) -> Sequence[int]:
        """Return the numbers of the segments that are there, in order; none, or without a gap."""
        names = (NAME.fullmatch(name.partition("/")[2]) for name in self._store.names(self._folder))
        numbers = [int(match[1]) for match in names if match]
        for number, following in itertools.pairwise(numbers):
            if following != number + 1:
                raise ArchiveError(f"{self.place}: segment {number + 1} is missing")
        return numbers

    def append(self, before: Archived, entries: Sequence[StreamEntry], created_ms: int) -> Segment:
        """Store ``entries`` as the segment that follows ``before``. Raises ``BlobExists`` if there is one."""
        name = self._name(before.segments + 1)
        data = make_segment(self._partition, before, entries, self._keys.newest, created_ms)
        self._store.put(name, io.BytesIO(data))
        return Segment.parse(data, self._shown(name))

    def header(self, number: int) -> SegmentHeader:
        """Return the header of a segment, reading little more than that."""
        name = self._name(number)
        header = read_header(self._store.read(name), self._shown(name))
        self._check_place(header, number)
        return header

    def segment(self, number: int) -> Segment:
        """Return a segment, with its digests checked."""
        name = self._name(number)
        segment = Segment.parse(b"".join(self._store.read(name)), self._shown(name))
        self._check_place(segment.header, number)
        return segment

    def entries(self, segment: Segment) -> Iterator[StreamEntry]:
        """Yield the entries of a segment."""
        return segment.entries(self._keys)

    def segments(self, numbers: Sequence[int]) -> Iterator[Segment]:
        """Yield the segments with these consecutive numbers, each checked against the one before."""
        before: Archived | None = None
        for number in numbers:
            try:
                segment = self.segment(number)
            except BlobMissing as error:
                raise ArchiveError(f"{error} (deleted after its retention, perhaps, while it was read)") from None
            if before is not None:
                check_link(segment, before)
            before = segment.standing
            yield segment

    def stretch(self, after: StreamId, upto: StreamId | None) -> Iterator[StreamEntry]:
        """Yield the entries behind ``after`` up to ``upto``: see ``read_stretch``."""
        numbers = self.numbers()
        if not numbers:
            raise ArchiveError(f"{self.place}: there is no segment")
        self._check_covers(numbers, after, upto)
        # The first segment that ends behind `after`.
        place = bisect.bisect_right(numbers, after, key=lambda number: self.header(number).last)
        for segment in self.segments(numbers[place:]):
            if upto is not None and segment.header.first > upto:
                return
            for entry in self.entries(segment):
                if after < entry[:2] and (upto is None or entry[:2] <= upto):
                    yield entry

    def beginning(self) -> StreamId:
        """Return the ID behind which the archive has everything; that of the stream's beginning if it is empty."""
        numbers = self.numbers()
        return self.header(numbers[0]).previous_last if numbers else START

    def end(self) -> StreamId:
        """Return the ID of the last entry; that of the stream's beginning if there is none."""
        numbers = self.numbers()
        return self.header(numbers[-1]).last if numbers else START

    def delete_before(self, oldest_ms: int, through: int | None = None) -> int:
        """Delete segments whose last entry arrived before ``oldest_ms``, the oldest first, none behind ``through``.

        Returns how many.
        """
        deleted = 0
        for number in self.numbers():
            if (through is not None and number > through) or self.header(number).last[0] >= oldest_ms:
                break
            self._store.delete(self._name(number))
            deleted += 1
        return deleted

    def _check_covers(self, numbers: Sequence[int], after: StreamId, upto: StreamId | None) -> None:
        begins, ends = self.header(numbers[0]).previous_last, self.header(numbers[-1]).last
        if after < begins:
            raise ArchiveError(
                f"{self.place}: begins behind {stream_id_text(begins)}; what came before was deleted after its "
                "retention, or had been trimmed before the archive began"
            )
        if upto is not None and upto > ends:
            raise ArchiveError(f"{self.place}: ends at {stream_id_text(ends)}, before {stream_id_text(upto)}")

    def _check_place(self, header: SegmentHeader, number: int) -> None:
        name = self._shown(self._name(number))
        if header.partition != self._partition:
            raise ArchiveError(f"{name}: is of partition {header.partition}")
        if header.number != number:
            raise ArchiveError(f"{name}: is segment {header.number} under another name")

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:012d}.segment"

    def _shown(self, name: str) -> str:
        return f"{self._store.url}/{name}"


def check_link(segment: Segment, before: Archived) -> None:
    """Check that ``segment`` continues what ends at ``before``. Raises ``ArchiveError``."""
    header = segment.header
    if (header.previous_digest, header.previous_last) != (before.digest, before.position):
        raise ArchiveError(f"{segment.name}: does not continue segment {before.segments}: one of them is foreign")
    if header.entries_before != before.entries:
        raise ArchiveError(
            f"{segment.name}: counts {header.entries_before} entries before it, and there were {before.entries}"
        )
