"""Files in a directory of this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from accrual.blobs.store import check_name
from accrual.errors import BlobExists, BlobMissing

__all__ = ["DirectoryStore"]

PIECE_BYTES: Final = 1 << 20
# What nobody has written to for so long was left behind by a writer that was killed.
LEFT_BEHIND_S: Final = 3600


class DirectoryStore:
    """A store in ``directory``: a folder is a directory below it, a file has mode 0600.

    A file is written under another name and brought to the disk before it appears under its own, and the directory
    is brought to the disk before ``put`` returns.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def url(self) -> str:
        """The directory."""
        return str(self._directory)

    def put(self, name: str, source: BinaryIO, *, replace: bool = False) -> None:
        """Store all that ``source`` has under ``name``; ``BlobExists`` if it exists and is not to be replaced."""
        path = self._path(name)
        self._make(path.parent)
        self._tidy(path.parent)
        # It is made with mode 0600.
        descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(written)
        try:
            with os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(source, file, PIECE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                # Other than a rename, a link fails where the name is taken, whoever was quicker.
                path.hardlink_to(temporary)
        except FileExistsError:
            raise BlobExists(f"{path}: exists already") from None
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file."""
        path = self._path(name)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise BlobMissing(f"{path}: there is no such file") from None
        with file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def names(self, folder: str) -> list[str]:
        """Return the names of all files in ``folder``, in their order."""
        try:
            found = [path.name for path in (self._directory / folder).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{name}" for name in found if not name.startswith("."))

    def delete(self, name: str) -> None:
        """Delete a file; that it is gone already is no error."""
        path = self._path(name)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        _sync(path.parent)

    def _path(self, name: str) -> Path:
        return self._directory / check_name(name)

    def _make(self, folder: Path) -> None:
        """Make a folder, and see that it outlives a power cut."""
        if folder.is_dir():
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync(self._directory)

    def _tidy(self, folder: Path) -> None:
        for path in folder.glob(".*"):
            try:
                if path.stat().st_mtime < time.time() - LEFT_BEHIND_S:
                    path.unlink()
            except FileNotFoundError:
                continue


def _sync(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
