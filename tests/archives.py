"""Archives as the tests need them: written without a server, or by a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from accrual.archive import Archive, ArchiveKeys, Archiver
from accrual.blobs import open_store
from accrual.engine import StreamEntry
from accrual.settings import Settings
from accrual.stream import Archived
from workers import ROOT, environment

__all__ = ["ArchiverProcess", "archive_of", "archived", "drain_archive", "write_archive"]

SEGMENT_BYTES = 4096


def archive_of(url: str | Path, partition: str = "p", keys: Sequence[bytes] = ()) -> Archive:
    """Return the archive of a partition."""
    return Archive(open_store(str(url)), partition, ArchiveKeys(keys))


def archived(archive: Archive) -> list[StreamEntry]:
    """Return everything that an archive has, checked."""
    return list(archive.stretch(archive.beginning(), None))


def write_archive(archive: Archive, entries: Sequence[StreamEntry], size: int) -> Archived:
    """Write ``entries`` as segments of ``size`` of them, without a server; return where it ends."""
    standing = Archived()
    for first in range(0, len(entries), size):
        standing = archive.append(standing, entries[first : first + size], 1).standing
    return standing


def drain_archive(
    client: redis.Redis, archive: Archive, partition: str = "p", *, late: bool = False, **settings: Any
) -> None:
    """Archive up to the end of the stream, in small segments."""
    chosen = Settings(partition=partition, **{"archive_segment_bytes": SEGMENT_BYTES, **settings})
    Archiver(client, archive, chosen, late=late).run(threading.Event(), drain=True)


class ArchiverProcess(subprocess.Popen[bytes]):
    """``accrual archive`` of partition ``p``, killed at the end of the ``with`` block if it still runs."""

    def __init__(self, url: str, place: str | Path, *flags: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end of the block
        super().__init__(
            [
                *(sys.executable, "-m", "accrual.cli", "archive", "--redis", url, "--partition", "p"),
                *("--archive", str(place), "--archive-segment-bytes", str(SEGMENT_BYTES), *flags),
            ],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )

    @property
    def said(self) -> str:
        """What it has said on stderr so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.wait()
        self._log.close()
