"""One segment (docs/ARCHIVE.md): a head with its own digest, the entries compressed and encrypted, a digest of it all.

========================= ==================================================================
``ACCRSEGM``              8 bytes
format                    4 bytes, little-endian like every number here
size of the header        4 bytes
header                    MessagePack of ``SegmentHeader``
SHA-256 of the above      32 bytes: nothing of the header is believed without it
entries                   MessagePack, compressed with Zstandard, encrypted with AES-256-GCM
SHA-256 of all the above  32 bytes: the segment's digest, which the next one names
========================= ==================================================================
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from accrual.archive.keys import NO_KEYS, ArchiveKeys, check_of
from accrual.errors import ArchiveError
from accrual.events import StreamEntry
from accrual.stream import Archived, StreamId

__all__ = ["FORMAT", "Segment", "SegmentHeader", "make_segment", "read_header"]

MAGIC: Final = b"ACCRSEGM"
FORMAT: Final = 1
HEAD: Final = struct.Struct("<8sII")
MAXIMUM_HEADER_BYTES: Final = 1 << 16
# An entry cannot be larger than what a server takes of one command, 1 GiB.
MAXIMUM_PACKED_BYTES: Final = (1 << 31) - 1
DIGEST_BYTES: Final = 32
NONCE_BYTES: Final = 12
COMPRESSION_LEVEL: Final = 3

_Rows = list[tuple[int, int, list[bytes]]]
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(_Rows).decode


class SegmentHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a segment holds: ``count`` entries of a partition's stream, from ``first`` to ``last``.

    It continues segment ``number`` − 1, which has ``previous_digest`` and ends at ``previous_last``; no entry was
    between the two. ``entries_before`` are the stream's entries up to there, those included that were trimmed before
    the archive began. ``packed_bytes`` is the size of the entries before compression. ``key_check`` recognises the key
    and ``nonce`` is that of AES-256-GCM; both are empty where nothing is encrypted. ``created_ms`` is for people.
    """

    partition: str
    number: int
    previous_digest: bytes
    previous_last: StreamId
    entries_before: int
    first: StreamId
    last: StreamId
    count: int
    packed_bytes: int
    key_check: bytes
    nonce: bytes
    created_ms: int


class Segment(msgspec.Struct, frozen=True):
    """A segment whose digests are right; its entries are still as they are stored. ``name`` is for messages."""

    name: str
    header: SegmentHeader
    digest: bytes
    head: bytes
    sealed: bytes

    @classmethod
    def parse(cls, data: bytes, name: str) -> Segment:
        """Read a segment. Raises ``ArchiveError`` where it is torn, damaged or of another format."""
        header, size = _parse_head(data, name)
        end = len(data) - DIGEST_BYTES
        if end < size:
            raise ArchiveError(f"{name}: is cut short")
        view = memoryview(data)
        if hashlib.sha256(view[:end]).digest() != data[end:]:
            raise ArchiveError(f"{name}: is cut short or damaged")
        return cls(name, header, data[end:], data[: size - DIGEST_BYTES], data[size:end])

    @property
    def standing(self) -> Archived:
        """What an archive has that ends with this segment."""
        header = self.header
        return Archived(header.number, self.digest, header.last, header.entries_before + header.count)

    def entries(self, keys: ArchiveKeys = NO_KEYS) -> Iterator[StreamEntry]:
        """Yield the stream entries. Raises ``ArchiveError`` without the right key, or if they are not as described."""
        packed = self._unpacked(self._opened(keys))
        try:
            rows = _unpack(packed)
        except msgspec.MsgspecError as error:
            raise ArchiveError(f"{self.name}: its entries do not decode: {error}") from None
        self._check(rows)
        for ms, seq, values in rows:
            yield StreamEntry(ms, seq, tuple(zip(values[::2], values[1::2], strict=True)))

    def _opened(self, keys: ArchiveKeys) -> bytes:
        if not self.header.key_check:
            return self.sealed
        key = keys.find(self.header.key_check)
        if key is None:
            raise ArchiveError(f"{self.name}: is encrypted, and none of the keys that were given is its own")
        try:
            return AESGCM(key).decrypt(self.header.nonce, self.sealed, self.head)
        except (InvalidTag, ValueError):
            raise ArchiveError(f"{self.name}: was changed by somebody who does not have the key") from None

    def _unpacked(self, compressed: bytes) -> bytes:
        size = self.header.packed_bytes
        try:
            # What the data itself claims decides how much memory is taken.
            if zstandard.frame_content_size(compressed) == size <= MAXIMUM_PACKED_BYTES:
                return zstandard.ZstdDecompressor().decompress(compressed)
        except zstandard.ZstdError as error:
            raise ArchiveError(f"{self.name}: does not decompress: {error}") from None
        raise ArchiveError(f"{self.name}: does not decompress to the {size} bytes that its header names")

    def _check(self, rows: _Rows) -> None:
        header = self.header
        ids = [(ms, seq) for ms, seq, _ in rows]
        if not ids or len(ids) != header.count or ids[0] != header.first or ids[-1] != header.last:
            raise ArchiveError(f"{self.name}: does not have the entries that its header names")
        if any(one >= other for one, other in zip([header.previous_last, *ids], ids, strict=False)):
            raise ArchiveError(f"{self.name}: its entries are not in order")
        if any(len(values) % 2 for _, _, values in rows):
            raise ArchiveError(f"{self.name}: a field has no value")


def make_segment(
    partition: str, before: Archived, entries: Sequence[StreamEntry], key: bytes | None, created_ms: int
) -> bytes:
    """Return the segment of ``entries``, at least one, that follows ``before``; encrypted if there is a ``key``."""
    packed = _pack([(entry.ms, entry.seq, [part for pair in entry.fields for part in pair]) for entry in entries])
    header = SegmentHeader(
        partition=partition,
        number=before.segments + 1,
        previous_digest=before.digest,
        previous_last=before.position,
        entries_before=before.entries,
        first=entries[0][:2],
        last=entries[-1][:2],
        count=len(entries),
        packed_bytes=len(packed),
        key_check=check_of(key) if key else b"",
        nonce=os.urandom(NONCE_BYTES) if key else b"",
        created_ms=created_ms,
    )
    encoded = _pack(header)
    head = HEAD.pack(MAGIC, FORMAT, len(encoded)) + encoded
    sealed = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(packed)
    if key:
        # What the header says is authenticated with the entries.
        sealed = AESGCM(key).encrypt(header.nonce, sealed, head)
    data = head + hashlib.sha256(head).digest() + sealed
    return data + hashlib.sha256(data).digest()


def read_header(pieces: Iterator[bytes], name: str) -> SegmentHeader:
    """Return the header of a segment of which ``pieces`` are read as far as needed. Raises ``ArchiveError``."""
    data = b""
    for piece in pieces:
        data += piece
        if len(data) >= HEAD.size + MAXIMUM_HEADER_BYTES + DIGEST_BYTES:
            break
    return _parse_head(data, name)[0]


def _parse_head(data: bytes, name: str) -> tuple[SegmentHeader, int]:
    """Return the header, and how many bytes it takes with all that is before it and its digest."""
    if len(data) < HEAD.size:
        raise ArchiveError(f"{name}: is cut short")
    magic, version, size = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ArchiveError(f"{name}: is not a segment of an archive")
    if version != FORMAT:
        raise ArchiveError(f"{name}: has format {version}; this version reads format {FORMAT}")
    end = HEAD.size + size
    if size > MAXIMUM_HEADER_BYTES or len(data) < end + DIGEST_BYTES:
        raise ArchiveError(f"{name}: is cut short or damaged in its header")
    if hashlib.sha256(memoryview(data)[:end]).digest() != data[end : end + DIGEST_BYTES]:
        raise ArchiveError(f"{name}: is damaged in its header")
    try:
        return msgspec.msgpack.decode(memoryview(data)[HEAD.size : end], type=SegmentHeader), end + DIGEST_BYTES
    except msgspec.MsgspecError as error:
        raise ArchiveError(f"{name}: its header does not decode: {error}") from None
