"""What engines take and give: stream entries in, a batch of decisions out (SPEC sections 4 to 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from accrual.errors import InvalidEvent, StateMismatch
from accrual.events import (
    MAXIMUM_TIME_MS,
    Event,
    Fields,
    StreamEntry,
    decode_compact,
    items_of_json,
    mapping_from_json,
    split_batch,
    validate,
)
from accrual.ledger import encode_entries
from accrual.outcomes import BatchHeader, Counts, Decision, Duplicate, Entry, Position, RejectedItem
from accrual.rulebook import Calendar, Rulebook

__all__ = [
    "Batch",
    "Engine",
    "Item",
    "PlainBatch",
    "explain",
    "explain_invalid",
    "items_of_entry",
]


class Batch(Protocol):
    """The decisions on a run of stream entries, ready to be committed."""

    @property
    def counts(self) -> Counts:
        """How many events came in, and what became of them."""

    @property
    def through(self) -> tuple[int, int]:
        """The ID of the last stream entry."""

    @property
    def rejected(self) -> list[RejectedItem]:
        """The dead letters, in order."""

    @property
    def outcomes(self) -> dict[str, int]:
        """How many ledger entries have each outcome."""

    @property
    def points(self) -> dict[str, int]:
        """The sum of the points, by outcome."""

    def encode(self, header: BatchHeader) -> bytes:
        """Return the ledger batch: the bytes that docs/LEDGER.md describes."""

    def decisions(self) -> Iterator[tuple[Position, Decision]]:
        """Yield one decision per event, in stream order."""


class Engine(Protocol):
    """A deterministic state machine over stream entries."""

    @property
    def rulebook(self) -> Rulebook:
        """The rulebook by which it decides."""

    def adopt(self, rulebook: Rulebook) -> None:
        """Decide by ``rulebook`` from now on."""

    def decide_entries(self, entries: Sequence[StreamEntry]) -> Batch:
        """Decide every event of ``entries``, in order. The entries must not be empty."""

    @property
    def memory_bytes(self) -> int:
        """The memory that the state has in use; 0 where that is not known."""

    def headroom_bytes(self, events: int, *, imaging: bool = False) -> int:
        """Return the most by which ``memory_bytes`` can grow when so many events are decided.

        With ``imaging`` also where an image of the state is begun before them.
        """

    def adoption_bytes(self, rulebook: Rulebook) -> int:
        """Return the most by which ``memory_bytes`` can grow, for a moment too, while ``rulebook`` is adopted."""

    def reclaim(self, day: int) -> None:
        """Drop what no event that arrives on the business day ``day`` or later can need."""


class Item(msgspec.Struct, frozen=True):
    """One event of a stream entry, still encoded: its index in the entry, its encoding (`e` or `j`) and its bytes."""

    index: int
    encoding: bytes
    value: bytes

    def event(self) -> Event:
        """Decode and check the event. Raises ``InvalidEvent``."""
        return decode_compact(self.value) if self.encoding == b"e" else validate(mapping_from_json(self.value))

    @property
    def original(self) -> Fields:
        """What a dead letter keeps of it."""
        return ((self.encoding, self.value),)


def items_of_entry(entry: StreamEntry) -> list[Item]:
    """Return the events of a stream entry. Raises ``InvalidEvent`` where the entry is invalid as a whole."""
    if not 0 < entry.ms <= MAXIMUM_TIME_MS:
        raise InvalidEvent(f"the entry's ID says that it arrived at {entry.ms} ms, outside 1..{MAXIMUM_TIME_MS}")
    if len(entry.fields) != 1:
        names = ", ".join(repr(name.decode(errors="replace")) for name, _ in entry.fields)
        raise InvalidEvent(f"the entry has {len(entry.fields)} fields ({names}), not one")
    name, value = entry.fields[0]
    if name == b"e":
        return [Item(0, b"e", value)]
    if name == b"b":
        return [Item(index, b"e", item) for index, item in enumerate(split_batch(value))]
    if name == b"j":
        return [Item(index, b"j", item) for index, item in enumerate(items_of_json(value))]
    raise InvalidEvent(f"the entry's field {name.decode(errors='replace')!r} is none of e, b and j")


def explain_invalid(entry: StreamEntry) -> str:
    """Return in words why a stream entry is invalid as a whole."""
    try:
        items_of_entry(entry)
    except InvalidEvent as error:
        return str(error)
    raise StateMismatch(f"the engines disagree: the reference finds nothing wrong with {entry!r}")


def explain(reason: str, item: Item, event_id: str | None, arrival_ms: int, calendar: Calendar) -> str:
    """Return in words why the event of ``item`` is a dead letter."""
    try:
        event = item.event()
    except InvalidEvent as error:
        return str(error)
    if reason == "id_conflict":
        return f"id: {event_id!r} was already decided with other content"
    if reason == "unknown_kind":
        return f"kind: there is no earning rule for {event.kind!r}"
    if reason == "ts_in_future":
        return f"ts: {event.ts - arrival_ms} ms after the event's arrival at {arrival_ms}"
    if reason == "stale_control":
        days = calendar.day(arrival_ms) - calendar.day(min(event.ts, arrival_ms))
        return f"ts: {days} business days before the event's arrival at {arrival_ms}"
    raise StateMismatch(f"the engines disagree: the reference finds nothing wrong with {item!r}")


class PlainBatch:
    """A batch held as Python objects: what the reference engine gives."""

    def __init__(self, rulebook: Rulebook, through: tuple[int, int], stream_entries: int) -> None:
        self.rulebook = rulebook
        self.through = through
        self.counts = Counts(stream_entries=stream_entries)
        self.rejected: list[RejectedItem] = []
        self.outcomes: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self._decisions: list[tuple[Position, Decision]] = []

    def add(self, position: Position, decision: Decision, original: Fields) -> None:
        """Append the decision on the event at ``position``."""
        self._decisions.append((position, decision))
        self.counts.events += 1
        if isinstance(decision, Entry):
            self.counts.entries += 1
            self.outcomes[decision.outcome] += 1
            self.points[decision.outcome] += decision.points
        elif isinstance(decision, Duplicate):
            self.counts.duplicates += 1
        else:
            self.counts.dead_letters += 1
            self.rejected.append(RejectedItem(position, decision, original))

    def decisions(self) -> Iterator[tuple[Position, Decision]]:
        """Yield one decision per event, in stream order."""
        yield from self._decisions

    def encode(self, header: BatchHeader) -> bytes:
        """Return the ledger batch."""
        rows = [(position, decision) for position, decision in self._decisions if isinstance(decision, Entry)]
        return encode_entries(header, through=self.through, counts=self.counts, rulebook=self.rulebook, rows=rows)
