"""The keys that segments are encrypted with: the newest encrypts, all of them decrypt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from accrual.errors import UsageError
from accrual.settings import Settings

__all__ = ["NO_KEYS", "ArchiveKeys", "check_of"]

KEY: Final = re.compile(r"[0-9a-fA-F]{64}")


class ArchiveKeys:
    """Keys of 32 bytes, the newest first. Without any, segments are not encrypted."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        if any(len(key) != 32 for key in keys):
            raise UsageError("a key of the archive must have 32 bytes")
        self.newest = keys[0] if keys else None
        self._by_check = {check_of(key): key for key in keys}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the keys that the settings name: ``archive_key``, or the lines of ``archive_key_file``."""
        if settings.archive_key and settings.archive_key_file:
            raise UsageError("archive_key and archive_key_file: give one of them")
        if not settings.archive_key_file:
            return cls([bytes.fromhex(settings.archive_key)] if settings.archive_key else [])
        path = Path(settings.archive_key_file)
        try:
            lines = path.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'is not a file of keys'}") from None
        if not lines or not all(map(KEY.fullmatch, lines)):
            # A line may be a key with a slip in it: it must not be in a message.
            raise UsageError(f"{path}: must have lines of 64 hex digits, one key each, the newest first")
        return cls([bytes.fromhex(line) for line in lines])

    def find(self, check: bytes) -> bytes | None:
        """Return the key with this ``check_of``, if it is here."""
        return self._by_check.get(check)


def check_of(key: bytes) -> bytes:
    """Return 8 bytes by which a key is recognised, and which say nothing else of it."""
    return hashlib.blake2b(key, digest_size=8, person=b"accrual archive").digest()


NO_KEYS: Final = ArchiveKeys()
