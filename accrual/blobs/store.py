"""What a store of files can do, and the URL that chooses one.

======================  ======================================================================
``/path``, ``path``      a directory, made when something is put there
``file:///path``         the same
``s3://bucket/prefix``   a bucket of S3, or of a server that speaks its protocol
======================  ======================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol
from urllib.parse import unquote, urlsplit

from accrual.errors import BlobError, UsageError

__all__ = ["BlobStore", "check_name", "open_store"]

# A name is a folder and a file. No part starts with a dot: such names are for files that are not whole yet.
PART: Final = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}"
NAME: Final = re.compile(f"{PART}/{PART}")


class BlobStore(Protocol):
    """Holds files by names of the form ``folder/file``, of the characters ``A-Z a-z 0-9 _ . -``.

    Raises ``BlobError`` for what no further attempt would change, and ``OSError`` where one might help: the disk is
    full, the network is away.
    """

    @property
    def url(self) -> str:
        """Where it is, for people."""

    def put(self, name: str, source: BinaryIO, *, replace: bool = False) -> None:
        """Store all that ``source`` has from where it stands, under ``name``: whole, or not at all.

        Raises ``BlobExists`` if there is such a file, of however many writers only one succeeds; with ``replace`` the
        new one takes its place.
        """

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file, in pieces of some size. Raises ``BlobMissing``."""

    def names(self, folder: str) -> list[str]:
        """Return the names of all files in ``folder``, in their order; none if there is no such folder."""

    def delete(self, name: str) -> None:
        """Delete a file; that it is gone already is no error."""


def open_store(url: str) -> BlobStore:
    """Return the store at ``url``. Raises ``UsageError`` for one that is none of the above."""
    parts = urlsplit(url)
    if not url or parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(f"{url!r} is not the URL of a directory: it must be file:///path")
        return _directory(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        if not parts.netloc:
            raise UsageError(f"{url!r} is not the URL of a bucket: it must be s3://bucket/prefix")
        try:
            from accrual.blobs.objects import ObjectStore
        except ImportError as error:
            raise UsageError(f"{url}: needs the extra object-store: pip install 'accrual[object-store]'") from error
        return ObjectStore(url)
    if "://" in url:
        raise UsageError(f"{url!r}: a store is a directory, file:///path or s3://bucket/prefix")
    return _directory(Path(url))


def check_name(name: str) -> str:
    """Return ``name`` if it is one. Raises ``BlobError``."""
    if not NAME.fullmatch(name):
        raise BlobError(f"{name!r} is not the name of a file in a store")
    return name


def _directory(path: Path) -> BlobStore:
    from accrual.blobs.directory import DirectoryStore

    return DirectoryStore(path)
