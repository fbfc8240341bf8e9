"""Files in a bucket of S3, or of a server that speaks its protocol.

By ``obstore``, the Python side of Rust's ``object_store``: one wheel that needs nothing but ``typing-extensions``. It
reads and writes in pieces, several at once where a file is large, tries again by itself, and can create an object only
where there is none (``If-None-Match``), which the archive is built on.

Where the server is and who we are comes from the environment, as with every tool for S3: ``AWS_ENDPOINT_URL``,
``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_ALLOW_HTTP``, or from the
machine's own role. Nothing of that is a setting of ours, so nothing of it can get into a message or a log.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import BinaryIO, Final

import obstore
from obstore import exceptions
from obstore.store import S3Store

from accrual.blobs.store import check_name
from accrual.errors import BlobError, BlobExists, BlobMissing, UsageError

__all__ = ["ObjectStore"]

PIECE_BYTES: Final = 1 << 20
# An upload has at most 10 000 parts, and a snapshot may have tens of GiB.
PART_BYTES: Final = 16 << 20
PARTS_AT_ONCE: Final = 4

LASTING: Final = (
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.UnknownConfigurationKeyError,
)


class ObjectStore:
    """A store in the bucket, and below the prefix, of an ``s3://`` URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        try:
            self._store = S3Store.from_url(
                self._url,
                client_options={
                    "connect_timeout": timedelta(seconds=5),
                    "timeout": timedelta(minutes=5),
                    # The library forgets what the environment says of this where it is given options at all.
                    "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1"),
                },
                # The caller tries again as well, and says so; here only what is over in a moment is waited out.
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
            )
        except (exceptions.BaseError, ValueError) as error:
            raise UsageError(f"{self._url}: {_reason(error)}") from None

    @property
    def url(self) -> str:
        """The URL, which has no secrets in it."""
        return self._url

    def put(self, name: str, source: BinaryIO, *, replace: bool = False) -> None:
        """Store all that ``source`` has under ``name``; ``BlobExists`` if it exists and is not to be replaced."""
        with self._translated(check_name(name)):
            if replace:
                obstore.put(self._store, name, source, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
            else:
                obstore.put(self._store, name, source, mode="create")

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file."""
        with self._translated(check_name(name)):
            for piece in obstore.get(self._store, name).stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)

    def names(self, folder: str) -> list[str]:
        """Return the names of all files in ``folder``, in their order."""
        with self._translated(folder):
            return sorted(found["path"] for page in obstore.list(self._store, prefix=folder) for found in page)

    def delete(self, name: str) -> None:
        """Delete a file; that it is gone already is no error."""
        with self._translated(check_name(name)):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                return

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn the library's errors into those of a store."""
        place = f"{self._url}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            raise BlobMissing(f"{place}: there is no such object: {_reason(error)}") from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise BlobExists(f"{place}: exists already") from None
        except LASTING as error:
            raise BlobError(f"{place}: {_reason(error)}") from None
        except exceptions.BaseError as error:
            raise ConnectionError(f"{place}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return what the library says in one line, without what it adds for its own developers."""
    return str(error).partition("Debug source:")[0].strip().partition("\n")[0] or type(error).__name__
