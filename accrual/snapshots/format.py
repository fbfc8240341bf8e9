"""One snapshot (docs/SNAPSHOTS.md): a head with its own digest, the engine's image, and a digest of it all.

========================= ======================================================
``ACCRSNAP``              8 bytes
format                    4 bytes, little-endian like every number here
size of the header        4 bytes
header                    MessagePack of ``SnapshotHeader``
SHA-256 of the above      32 bytes: nothing of the header is believed without it
image                     as the engine writes it; the header says what it holds
SHA-256 of all the above  32 bytes
========================= ======================================================
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, Self

import msgspec

from accrual.errors import SnapshotError
from accrual.snapshots.pace import Pace
from accrual.stream import Checkpoint

__all__ = ["FORMAT", "Image", "SnapshotHeader", "SnapshotReader", "read_header", "write_snapshot"]

MAGIC: Final = b"ACCRSNAP"
FORMAT: Final = 1
HEAD: Final = struct.Struct("<8sII")
MAXIMUM_HEADER_BYTES: Final = 64 << 20
DIGEST_BYTES: Final = 32
# How much of the file may wait to be brought to the disk, and lie in the page cache where nobody will read it.
UNFLUSHED_BYTES: Final = 16 << 20


class Image(Protocol):
    """What an engine gives: ``accrual.engine.fast.EngineImage``."""

    description: dict[str, Any]

    def write(self, sink: Any) -> bool:
        """Hand the image to ``sink``, piece by piece; return whether it is whole."""


class SnapshotHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot is of. The key of the hashes is part of the state: without it the image means nothing.

    ``checkpoint`` is where the partition stood behind the batch after which the image was begun; ``rulebook`` is the
    text in force, ``zone_rules`` the version of the tzdata package that decided, ``created_ms`` is for people.
    """

    partition: str
    checkpoint: Checkpoint
    slack_days: int
    zone_rules: str
    rulebook: str
    secret: bytes
    created_ms: int
    image: dict[str, Any]


def read_header(name: object, read: Callable[[int], bytes]) -> SnapshotHeader:
    """Return the header of the snapshot ``name``, whose next bytes ``read`` returns. Raises ``SnapshotError``."""
    head = read(HEAD.size)
    magic, version, size = HEAD.unpack(head)
    if magic != MAGIC:
        raise SnapshotError(f"{name}: is not a snapshot")
    if version != FORMAT:
        raise SnapshotError(f"{name}: has format {version}; this version reads format {FORMAT}")
    if size > MAXIMUM_HEADER_BYTES:
        raise SnapshotError(f"{name}: is damaged in its header")
    encoded = read(size)
    if read(DIGEST_BYTES) != hashlib.sha256(head + encoded).digest():
        raise SnapshotError(f"{name}: is damaged in its header")
    try:
        return msgspec.msgpack.decode(encoded, type=SnapshotHeader)
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"{name}: its header does not decode: {error}") from None


def write_snapshot(path: Path, header: SnapshotHeader, image: Image, pace: Pace) -> int | None:
    """Write a snapshot to ``path``, bring it to the disk, and return its size in bytes.

    Returns ``None``, leaving nothing, if the image was lost while it was written. Nothing is left behind an error
    either: ``OSError`` passes through, and what ``pace`` raises where it was stopped.
    """
    encoded = msgspec.msgpack.encode(header)
    head = HEAD.pack(MAGIC, FORMAT, len(encoded)) + encoded
    try:
        # It holds member names and the key of the fingerprints.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
            sink = _Digesting(file, pace)
            sink.write(head)
            sink.write(sink.digest())
            whole = image.write(sink.write)
            sink.write(sink.digest())
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if not whole:
        path.unlink(missing_ok=True)
        return None
    return sink.size


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Digesting:
    """Writes and digests, at a pace, and brings what it writes to the disk on the way: no flood comes at the end.

    What is there is taken out of the page cache, which has better uses than a file that is read at the next restart.
    """

    def __init__(self, file: io.FileIO, pace: Pace) -> None:
        self._file = file
        self._pace = pace
        self._digest = hashlib.sha256()
        self._flushed = 0
        self.size = 0

    def write(self, piece: bytes | memoryview) -> None:
        self._digest.update(piece)
        self.size += len(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[self._file.write(rest) :]
        if self.size - self._flushed >= UNFLUSHED_BYTES:
            self._flush()
        self._pace.wrote(len(piece))

    def _flush(self) -> None:
        descriptor = self._file.fileno()
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, self.size, os.POSIX_FADV_DONTNEED)
        self._flushed = self.size

    def digest(self) -> bytes:
        return self._digest.digest()


class SnapshotReader:
    """Reads a snapshot: its ``header`` at once, then its image by ``read``; ``finish`` says whether to believe it.

    Raises ``SnapshotError`` that says what is wrong with the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        # What was read into memory is digested by another thread, while the next of it is read.
        self._digesting = ThreadPoolExecutor(1, "digest")
        self._behind: deque[Future[None]] = deque()
        try:
            # Closed by close().
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise SnapshotError(f"{path}: {error.strerror}") from None
        try:
            self.header = read_header(path, self.read)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._digesting.shutdown()
        self._file.close()

    def read(self, size: int, /) -> bytes:
        """Return the next ``size`` bytes. What was read into memory before may be changed after that."""
        while self._behind:
            self._behind.popleft().result()
        data = bytearray(size)
        self._fill(memoryview(data))
        self._digest.update(data)
        return bytes(data)

    def readinto(self, place: memoryview, /) -> int:
        """Fill ``place`` with the next bytes, which must stay as they are until the next ``read``."""
        self._fill(place)
        self._behind.append(self._digesting.submit(self._digest.update, place))
        return len(place)

    def _fill(self, place: memoryview) -> None:
        try:
            while place:
                size = self._file.readinto(place)
                if not size:
                    raise SnapshotError(f"{self._path}: is cut short")
                place = place[size:]
        except OSError as error:
            raise SnapshotError(f"{self._path}: {error.strerror}") from None

    def finish(self) -> None:
        """Check that all of the image was read and is what was written."""
        expected = self._digest.digest()
        if self.read(DIGEST_BYTES) != expected:
            raise SnapshotError(f"{self._path}: is damaged")
        if self._file.read(1):
            raise SnapshotError(f"{self._path}: goes on behind its end")
