"""What is said of a batch as a whole: its place in the ledger, its counts, its dead letters and their originals."""

from __future__ import annotations

import msgspec

from accrual.events import Fields
from accrual.outcomes.decision import DeadLetter, Position

__all__ = ["BatchHeader", "Counts", "RejectedItem"]


class BatchHeader(msgspec.Struct, frozen=True):
    """What a ledger batch says of its place: its number, its predecessor's digest, where it starts."""

    batch: int
    previous: bytes
    after: tuple[int, int]
    first_seq: int


class Counts(msgspec.Struct):
    """How many of each a batch has. ``events = entries + duplicates + dead_letters``, always."""

    stream_entries: int = 0
    events: int = 0
    entries: int = 0
    duplicates: int = 0
    dead_letters: int = 0


class RejectedItem(msgspec.Struct, frozen=True):
    """A dead letter with what must be kept of it: names and values of the original fields."""

    position: Position
    letter: DeadLetter
    original: Fields
