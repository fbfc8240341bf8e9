"""The snapshots of a partition in a directory.

A snapshot is written under a name that starts with a dot, and gets its own once its batch is in the ledger: so a file
with the name of a snapshot was of this ledger when it got it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from accrual.errors import SnapshotError
from accrual.snapshots.format import Image, SnapshotHeader, SnapshotReader, sync_directory, write_snapshot
from accrual.snapshots.pace import Pace

__all__ = ["SnapshotDirectory"]

NAME: Final = re.compile(r"(?P<partition>.+)-(?P<batch>\d{12})\.snapshot")
LEFT_OVER: Final = re.compile(r"\.(?P<partition>.+)-\d{12}\.snapshot\.\d+")


class SnapshotDirectory:
    """Holds the snapshots of ``partition`` in ``directory``, which is made if it does not exist.

    Raises ``SnapshotError`` where it cannot be made, or later on not be read.
    """

    def __init__(self, directory: Path, partition: str) -> None:
        self._directory = directory
        self._partition = partition
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SnapshotError(f"{directory}: {error.strerror}") from None

    def paths(self) -> list[Path]:
        """Return the snapshots, the newest first."""
        return [self.path_of(batch) for batch in self.batches()]

    def path_of(self, batch: int) -> Path:
        """Return where the snapshot of ``batch`` is, or would be."""
        return self._directory / f"{self._partition}-{batch:012d}.snapshot"

    def batches(self) -> list[int]:
        """Return the batches of the snapshots, the newest first."""
        return sorted((int(match["batch"]) for _, match in self._matching(NAME)), reverse=True)

    def write(self, header: SnapshotHeader, image: Image, pace: Pace) -> int | None:
        """Write a snapshot that is still to be published; return its size, or ``None`` if its image was lost."""
        return write_snapshot(self._unpublished(header.checkpoint.batch), header, image, pace)

    def publish(self, batch: int) -> None:
        """Give the snapshot of ``batch`` that was written its name."""
        self._unpublished(batch).replace(self.path_of(batch))
        sync_directory(self._directory)

    def discard(self, batch: int) -> None:
        """Remove the snapshot of ``batch`` if it was written and not published."""
        self._unpublished(batch).unlink(missing_ok=True)

    def take(self, batch: int, pieces: Iterable[bytes]) -> Path:
        """Write the bytes of a snapshot that was made elsewhere, whole or not at all, and return its path."""
        temporary = self._unpublished(batch)
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            self.publish(batch)
        finally:
            temporary.unlink(missing_ok=True)
        return self.path_of(batch)

    def header(self, batch: int) -> SnapshotHeader:
        """Return the header of the snapshot of ``batch``. Raises ``SnapshotError`` where it is not sound."""
        with SnapshotReader(self.path_of(batch)) as reader:
            return reader.header

    def headers(self) -> list[SnapshotHeader]:
        """Return the headers of the snapshots that have a sound one, the newest first."""
        headers = []
        for batch in self.batches():
            try:
                headers.append(self.header(batch))
            except SnapshotError:
                continue
        return headers

    def remove_before(self, batch: int, pace: Pace) -> None:
        """Remove the snapshots of batches before ``batch``, whatever they are, unless ``pace`` is stopped."""
        for older in self.batches():
            if older < batch:
                pace.check()
                self.path_of(older).unlink(missing_ok=True)
        sync_directory(self._directory)

    def tidy(self) -> None:
        """Remove what others have left behind that were killed while they wrote: it is of no use to anybody."""
        for path, _ in self._matching(LEFT_OVER):
            path.unlink(missing_ok=True)

    def _unpublished(self, batch: int) -> Path:
        path = self.path_of(batch)
        return path.with_name(f".{path.name}.{os.getpid()}")

    def _matching(self, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
        try:
            paths = list(self._directory.iterdir())
        except OSError as error:
            raise SnapshotError(f"{self._directory}: {error.strerror}") from None
        matches = [(path, pattern.fullmatch(path.name)) for path in paths]
        return [(path, match) for path, match in matches if match and match["partition"] == self._partition]
