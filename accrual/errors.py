"""The error tree of the project: everything we raise on purpose is an ``AccrualError``.

::

    AccrualError
    ├── InvalidEvent          an event breaks the table of SPEC section 1 (routed to the dead letters, never a crash)
    ├── RulebookError         a rulebook is refused (SPEC section 2); carries every finding
    ├── UsageError            a command line or a setting is wrong (exit status 2)
    ├── CoreMissing           the compiled core cannot be loaded (exit status 1: the installation is wrong)
    ├── LedgerError           a ledger batch does not decode, or the chain of digests is broken
    ├── StreamError           the stream server refused, or its answer makes no sense
    │   ├── OwnershipLost     another worker owns the partition; nothing more may be written
    │   ├── StreamTrimmed     entries disappeared before they were read
    │   └── UnsafeServer      the server's configuration could lose or evict data
    ├── SnapshotError         a snapshot is torn, damaged, foreign or of another version, or cannot be written
    ├── BlobError             a store of files refuses, or has no such file
    │   ├── BlobMissing       there is no file of that name
    │   └── BlobExists        there is one already, and it stays
    ├── ArchiveError          a segment is torn, damaged, foreign or of another version, or the key is another
    ├── StateMismatch         a replay came out differently from what is committed
    ├── BookError             the book refuses, or what it holds contradicts the ledger
    └── DeliveryError         the producer could not hand an event over
"""

from __future__ import annotations

__all__ = [
    "AccrualError",
    "ArchiveError",
    "BlobError",
    "BlobExists",
    "BlobMissing",
    "BookError",
    "CoreMissing",
    "DeliveryError",
    "InvalidEvent",
    "LedgerError",
    "OwnershipLost",
    "RulebookError",
    "SnapshotError",
    "StateMismatch",
    "StreamError",
    "StreamTrimmed",
    "UnsafeServer",
    "UsageError",
]


class AccrualError(Exception):
    """Base of all errors of this project."""


class InvalidEvent(AccrualError):
    """An event breaks the table of SPEC section 1. ``str(error)`` names the field and what is wrong with it."""


class RulebookError(AccrualError):
    """A rulebook is refused. ``findings`` has one line per fault: file, line where known, key and reason."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


class UsageError(AccrualError):
    """A command line or a setting is wrong."""


class CoreMissing(AccrualError):
    """The compiled core cannot be loaded, and nothing takes its place silently."""

    def __init__(self, error: ImportError) -> None:
        super().__init__(
            f"the compiled core cannot be loaded ({error}): build it with `make build`, or choose the plain engine by "
            "name, --engine reference"
        )


class LedgerError(AccrualError):
    """A ledger batch does not decode, or the chain of digests is broken."""


class StreamError(AccrualError):
    """The stream server refused a command, or its answer makes no sense."""


class OwnershipLost(StreamError):
    """Another worker owns the partition: this one can write nothing more."""


class StreamTrimmed(StreamError):
    """Entries of the events stream disappeared before they were read."""


class UnsafeServer(StreamError):
    """The server's configuration could evict or lose data, so the worker refuses to start on it."""


class SnapshotError(AccrualError):
    """A snapshot cannot be believed, or not be written. ``str(error)`` names the file and what is wrong."""


class BlobError(AccrualError):
    """A store of files refuses what was asked, and asking again would not help. ``str(error)`` names the file."""


class BlobMissing(BlobError):
    """There is no file of that name in the store."""


class BlobExists(BlobError):
    """The store has a file of that name already, and keeps it."""


class ArchiveError(AccrualError):
    """The archive cannot be believed, or does not have what was asked for. ``str(error)`` names the segment."""


class StateMismatch(AccrualError):
    """A replayed batch differs from the committed one: the state cannot be trusted."""


class MemoryLimitReached(AccrualError):
    """The state has no room for what comes next; with a higher limit it goes on from where it is."""


class BookError(AccrualError):
    """The book refuses what was asked, or what it holds contradicts the ledger."""


class DeliveryError(AccrualError):
    """The producer could not hand an event over to the stream."""
