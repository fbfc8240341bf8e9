"""The snapshots of a partition in a directory: the newest few are kept."""

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
    """Keeps the ``kept`` newest snapshots of ``partition`` in ``directory``, which is made if it does not exist.

    Raises ``SnapshotError`` where it cannot be made, or later on not be read.
    """

    def __init__(self, directory: Path, partition: str, kept: int) -> None:
        self._directory = directory
        self._partition = partition
        self._kept = kept
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
        """Write a snapshot and remove those that are too many; return its size, or ``None`` if its image was lost."""
        size = write_snapshot(self.path_of(header.checkpoint.batch), header, image, pace)
        if size is not None:
            self._prune()
        return size

    def take(self, batch: int, pieces: Iterable[bytes]) -> Path:
        """Write the bytes of a snapshot that was made elsewhere, whole or not at all, and return its path."""
        path = self.path_of(batch)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(self._directory)
        return path

    def headers(self) -> list[SnapshotHeader]:
        """Return the headers of the snapshots that have a sound one, the newest first."""
        headers = []
        for path in self.paths():
            try:
                with SnapshotReader(path) as reader:
                    headers.append(reader.header)
            except SnapshotError:
                continue
        return headers

    def _prune(self) -> None:
        # A file of another process that was killed while it wrote it is of no use to anybody.
        for path in [*self.paths()[self._kept :], *(path for path, _ in self._matching(LEFT_OVER))]:
            path.unlink(missing_ok=True)
        sync_directory(self._directory)

    def _matching(self, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
        try:
            paths = list(self._directory.iterdir())
        except OSError as error:
            raise SnapshotError(f"{self._directory}: {error.strerror}") from None
        matches = [(path, pattern.fullmatch(path.name)) for path in paths]
        return [(path, match) for path, match in matches if match and match["partition"] == self._partition]
