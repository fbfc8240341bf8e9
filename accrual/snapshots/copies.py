"""Copies of snapshots in a store, for a worker that starts on another machine."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from accrual.blobs import BlobStore
from accrual.errors import SnapshotError
from accrual.snapshots.directory import SnapshotDirectory
from accrual.snapshots.format import SnapshotHeader, read_header
from accrual.snapshots.pace import Pace

__all__ = ["SnapshotCopies"]

NAME: Final = re.compile(r"(\d{12})\.snapshot")
READ_BYTES: Final = 1 << 20


class SnapshotCopies:
    """The copies of the snapshots of ``partition`` in ``store``.

    Raises what a store does: ``OSError`` while it is away, ``BlobError`` where it refuses.
    """

    def __init__(self, store: BlobStore, partition: str) -> None:
        self._store = store
        self._folder = f"snapshots-{partition}"

    def batches(self) -> list[int]:
        """Return the batches of which there are copies, the newest first."""
        names = (NAME.fullmatch(name.partition("/")[2]) for name in self._store.names(self._folder))
        return sorted((int(match[1]) for match in names if match), reverse=True)

    def put(self, path: Path, batch: int, pace: Pace) -> None:
        """Copy the snapshot at ``path``, unless ``pace`` is stopped."""
        with io.BufferedReader(_Stoppable(path, pace), READ_BYTES) as file:
            self._store.put(self._name(batch), file, replace=True)

    def header(self, batch: int) -> SnapshotHeader:
        """Return the header of a copy, of which no more is read. Raises ``SnapshotError`` where it is not sound."""
        name = self._name(batch)
        return read_header(name, _beginning(name, self._store.read(name)))

    def remove_before(self, batch: int, pace: Pace) -> None:
        """Delete the copies of batches before ``batch``, whatever they are, unless ``pace`` is stopped."""
        for older in self.batches():
            if older < batch:
                pace.check()
                self._store.delete(self._name(older))

    def fetch(self, batch: int, directory: SnapshotDirectory) -> Path:
        """Bring a copy into ``directory`` and return its path there. Whether to believe it is for its reader to say."""
        return directory.take(batch, self._store.read(self._name(batch)))

    def _name(self, batch: int) -> str:
        return f"{self._folder}/{batch:012d}.snapshot"


def _beginning(name: str, pieces: Iterator[bytes]) -> Callable[[int], bytes]:
    """Return what reads the first bytes of a copy."""
    taken = bytearray()

    def read(size: int) -> bytes:
        while len(taken) < size:
            piece = next(pieces, b"")
            if not piece:
                raise SnapshotError(f"{name}: is cut short")
            taken.extend(piece)
        first = bytes(taken[:size])
        del taken[:size]
        return first

    return read


class _Stoppable(io.FileIO):
    """A file that is read for as long as it is wanted: it ends whoever copies it."""

    def __init__(self, path: Path, pace: Pace) -> None:
        super().__init__(path)
        self._pace = pace

    def readinto(self, place: Any, /) -> int:
        self._pace.check()
        return super().readinto(place)
