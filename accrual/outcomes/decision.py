"""What an engine says of an event: a ledger entry, a duplicate, or a dead letter (SPEC sections 4 and 5)."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from accrual.rulebook import day_text

__all__ = [
    "CAUSES",
    "OUTCOMES",
    "DeadLetter",
    "DeadLetterReason",
    "Decision",
    "Duplicate",
    "Entry",
    "Outcome",
    "Position",
    "outcome_line",
    "outcome_mapping",
]

Outcome = Literal["granted", "held", "rejected", "deferred", "applied"]
DeadLetterReason = Literal["invalid", "id_conflict", "unknown_kind", "ts_in_future", "stale_control"]

OUTCOMES: Final = ("granted", "held", "rejected", "deferred", "applied")
MEMBER_FROZEN: Final = "member_frozen"
CAUSES: Final = ("", "member_blocked", "once", "max_per_day", "refund", "late")


class Position(msgspec.Struct, frozen=True, order=True):
    """Where an event stands on a stream: its entry's ID (``ms``, ``seq``) and its index within the entry."""

    ms: int
    seq: int
    index: int = 0

    @property
    def stream_id(self) -> str:
        """The entry ID as the stream server writes it."""
        return f"{self.ms}-{self.seq}"


class Entry(msgspec.Struct, frozen=True):
    """A decided event as the ledger keeps it.

    ``ts`` is in ms, ``amount`` in fen (``None`` where absent), ``day`` a day number. ``cause`` says which rule of step
    6 to 8 settled the event before any limit was looked at, ``""`` where none did; ``reasons`` has all that the
    specification reports. Fingerprints are keyed 64-bit hashes, 0 where the event has no such key; the masked forms
    are given where a limit tripped, ``payload`` (compact, without device, IP and phone) where the event is deferred.
    """

    event: str
    kind: str
    member: str
    outcome: Outcome
    ts: int
    day: int
    amount: int | None = None
    order: str = ""
    base: int = 0
    uncapped: int = 0
    points: int = 0
    campaigns: tuple[str, ...] = ()
    cause: str = ""
    frozen_before: bool = False
    evidence: tuple[tuple[str, int], ...] = ()
    fingerprints: tuple[int, int, int] = (0, 0, 0)
    masked: tuple[str, str, str] = ("", "", "")
    payload: bytes = b""

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons of SPEC section 5."""
        frozen = (MEMBER_FROZEN,) if self.frozen_before else ()
        cause = (self.cause,) if self.cause else ()
        return (*frozen, *cause, *(limit for limit, _ in self.evidence))


class Duplicate(msgspec.Struct, frozen=True):
    """The same event again: counted, and nothing else."""

    event: str


class DeadLetter(msgspec.Struct, frozen=True):
    """An event that cannot be decided. ``event`` is ``None`` where it is ``invalid``; ``detail`` is for people."""

    event: str | None
    reason: DeadLetterReason
    detail: str


Decision = Entry | Duplicate | DeadLetter

_encoder = msgspec.json.Encoder(order="sorted")


def outcome_mapping(decision: Decision) -> dict[str, Any]:
    """Return the fields of SPEC section 5, without ``line``."""
    if isinstance(decision, Duplicate):
        return {"event": decision.event, "outcome": "duplicate"}
    if isinstance(decision, DeadLetter):
        return {"event": decision.event, "outcome": "dead_letter", "reason": decision.reason}
    fields: dict[str, Any] = {
        "event": decision.event,
        "kind": decision.kind,
        "member": decision.member,
        "outcome": decision.outcome,
    }
    if decision.outcome == "applied":
        return fields
    fields["reasons"] = decision.reasons
    if decision.outcome == "deferred":
        return fields
    return fields | {
        "base": decision.base,
        "campaigns": decision.campaigns,
        "day": day_text(decision.day),
        "evidence": [{"limit": limit, "observed": observed} for limit, observed in decision.evidence],
        "points": decision.points,
        "uncapped": decision.uncapped,
    }


def outcome_line(decision: Decision, **position: Any) -> bytes:
    """Return one line of JSON (no newline): keys sorted, no spaces, non-ASCII text as it is."""
    return _encoder.encode(outcome_mapping(decision) | position)
