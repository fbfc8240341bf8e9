"""Copies of snapshots in a store, for a worker that starts on another machine."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Final

from accrual.blobs import BlobStore
from accrual.snapshots.directory import SnapshotDirectory
from accrual.snapshots.pace import Pace

__all__ = ["SnapshotCopies"]

NAME: Final = re.compile(r"(\d{12})\.snapshot")
READ_BYTES: Final = 1 << 20


class SnapshotCopies:
    """The copies of the ``kept`` newest snapshots of ``partition`` in ``store``.

    Raises what a store does: ``OSError`` while it is away, ``BlobError`` where it refuses.
    """

    def __init__(self, store: BlobStore, partition: str, kept: int) -> None:
        self._store = store
        self._folder = f"snapshots-{partition}"
        self._kept = kept

    def batches(self) -> list[int]:
        """Return the batches of which there are copies, the newest first."""
        names = (NAME.fullmatch(name.partition("/")[2]) for name in self._store.names(self._folder))
        return sorted((int(match[1]) for match in names if match), reverse=True)

    def put(self, path: Path, batch: int, pace: Pace) -> None:
        """Copy the snapshot at ``path``, and delete the copies that are too many, unless ``pace`` is stopped."""
        with io.BufferedReader(_Stoppable(path, pace), READ_BYTES) as file:
            self._store.put(self._name(batch), file, replace=True)
        # One of a later batch is of a ledger that is no more; it must not push out this one.
        older = [number for number in self.batches() if number <= batch]
        for number in older[self._kept :]:
            pace.check()
            self._store.delete(self._name(number))

    def fetch(self, batch: int, directory: SnapshotDirectory) -> Path:
        """Bring a copy into ``directory`` and return its path there. Whether to believe it is for its reader to say."""
        return directory.take(batch, self._store.read(self._name(batch)))

    def _name(self, batch: int) -> str:
        return f"{self._folder}/{batch:012d}.snapshot"


class _Stoppable(io.FileIO):
    """A file that is read for as long as it is wanted: it ends whoever copies it."""

    def __init__(self, path: Path, pace: Pace) -> None:
        super().__init__(path)
        self._pace = pace

    def readinto(self, place: Any, /) -> int:
        self._pace.check()
        return super().readinto(place)
