"""The archive of a partition's input: every stream entry, as it was, in segments outside of the stream server.

::

    keys      the keys that segments are encrypted with
    segment   one segment: written, read and checked (docs/ARCHIVE.md)
    chain     the segments of a partition in a store: each names the one before
    follow    from the events stream into segments
    export    from segments to lines of JSON

Needs the extra ``archive``.
"""

from accrual.archive.chain import Archive, read_stretch
from accrual.archive.export import exported_lines
from accrual.archive.follow import Archiver, delete_expired
from accrual.archive.keys import NO_KEYS, ArchiveKeys
from accrual.archive.segment import Segment, SegmentHeader

__all__ = [
    "NO_KEYS",
    "Archive",
    "ArchiveKeys",
    "Archiver",
    "Segment",
    "SegmentHeader",
    "delete_expired",
    "exported_lines",
    "read_stretch",
]
