"""The snapshots of a partition in a directory: the newest few are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from accrual.errors import SnapshotError
from accrual.snapshots.format import Image, SnapshotHeader, SnapshotReader, sync_directory, write_snapshot

__all__ = ["SnapshotDirectory"]

NAME: Final = re.compile(r"(?P<partition>.+)-(?P<batch>\d{12})\.snapshot")
LEFT_OVER: Final = re.compile(r"\.(?P<partition>.+)-\d{12}\.snapshot\.\d+")


class SnapshotDirectory:
    """Keeps the ``kept`` newest snapshots of ``partition`` in ``directory``, which is made if it does not exist.

    Raises ``SnapshotError`` where it cannot be.
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
        found = [(match["batch"], path) for path, match in self._matching(NAME)]
        return [path for _, path in sorted(found, reverse=True)]

    def write(self, header: SnapshotHeader, image: Image) -> int | None:
        """Write a snapshot and remove those that are too many; return its size, or ``None`` if its image was lost."""
        name = f"{self._partition}-{header.checkpoint.batch:012d}.snapshot"
        size = write_snapshot(self._directory / name, header, image)
        if size is not None:
            self._prune()
        return size

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
        matches = [(path, pattern.fullmatch(path.name)) for path in self._directory.iterdir()]
        return [(path, match) for path, match in matches if match and match["partition"] == self._partition]
