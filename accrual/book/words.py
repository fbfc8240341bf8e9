"""Postings in words: how many points, why, and by which rule."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction

import msgspec

from accrual.book.database import Connection
from accrual.book.texts import shown
from accrual.rulebook import Rulebook, parse

__all__ = ["Campaigns", "Posting", "explain"]


class Posting(msgspec.Struct, frozen=True):
    """A posting with what explains it. What belongs to an entry is ``None`` where the posting names none."""

    number: int
    seq: int | None
    kind: str
    from_account: str
    to_account: str
    points: int
    day: str
    partition: str | None
    event: str | None
    order: str | None
    event_kind: str | None
    amount_fen: int | None
    base: int | None
    uncapped: int | None
    entry_points: int | None
    campaigns: tuple[str, ...]
    evidence: tuple[tuple[str, int], ...]
    frozen: bool | None
    rulebook: int | None
    by: str | None
    reason: str | None
    note: str | None
    booked_at: datetime
    partition_id: int | None


class Campaigns:
    """The rulebooks that decided entries, as the ledgers recorded them."""

    def __init__(self, connection: Connection) -> None:
        rows = connection.execute("SELECT partition_id, version, text FROM book.rulebooks ORDER BY batch").fetchall()
        self._texts: dict[tuple[int, int], str] = {
            (partition_id, version): text for partition_id, version, text in rows
        }
        self._rulebooks: dict[tuple[int, int], Rulebook] = {}

    def of(self, posting: Posting) -> Rulebook | None:
        """Return the rulebook that decided the posting's entry; ``None`` where there is no entry or no record of it."""
        if posting.partition_id is None or posting.rulebook is None:
            return None
        key = posting.partition_id, posting.rulebook
        if key not in self._rulebooks and key in self._texts:
            self._rulebooks[key] = parse(self._texts[key])
        return self._rulebooks.get(key)


def explain(posting: Posting, rulebook: Rulebook | None) -> str:
    """Return what happened and why, in a sentence or two."""
    if posting.kind in ("accrue", "late"):
        return _accrual(posting, rulebook)
    deeds = {
        "settle": f"{_points(posting)} earned on {posting.day} became available",
        "release": f"{_points(posting)} of {_entry(posting)} were released after review",
        "confirm": f"{_points(posting)} of {_entry(posting)} were taken back after review",
        "clawback": f"{_points(posting)} of {_entry(posting)} were taken back with those found to be abuse",
        "refund": f"{_points(posting)} went back because {_entry(posting)} was refunded",
        "expire": f"{_points(posting)} earned on {posting.day} expired",
        "adjust": f"{_points(posting)} were {'taken' if posting.from_account == 'available' else 'given'} by hand",
        "redeem": f"{_points(posting)} were spent",
    }
    why = f" ({posting.reason})" if posting.reason else ""
    who = f" by {posting.by}" if posting.by and posting.by != "scheduler" else ""
    note = f": {posting.note}" if posting.note else ""
    return f"{deeds[posting.kind]}{who}{why}{note}"


def _points(posting: Posting) -> str:
    return f"{posting.points} point" if posting.points == 1 else f"{posting.points} points"


def _entry(posting: Posting) -> str:
    return f"order {posting.order}" if posting.order else f"{posting.event_kind} {posting.event}"


def _accrual(posting: Posting, rulebook: Rulebook | None) -> str:
    """Explain an entry: base, campaigns, clamp, limits, rulebook version."""
    paid = "" if posting.amount_fen is None else f" of {posting.amount_fen // 100}.{posting.amount_fen % 100:02d} yuan"
    sentences = [f"{posting.event_kind}{paid}: base {posting.base}"]
    if posting.campaigns:
        multipliers = _multipliers(rulebook)
        named = ", ".join(f"{name}{multipliers.get(name, '')}" for name in posting.campaigns)
        sentences.append(f"with {named}: {posting.uncapped}")
    actions = {limit.id: limit.action for limit in rulebook.limits} if rulebook else {}
    for limit, observed in posting.evidence:
        sentences.append(f"limit {limit} ({actions.get(limit, 'tripped')}) at {observed}")
    if posting.uncapped is not None and posting.points < posting.uncapped:
        sentences.append(f"clamped to {posting.points}")
    if posting.to_account == "held":
        sentences.append("held because the member was frozen" if posting.frozen else "held for review")
    if posting.kind == "late":
        sentences.append("the event came late")
    return f"{'; '.join(sentences)}. Rulebook version {posting.rulebook}"


def _multipliers(rulebook: Rulebook | None) -> Mapping[str, str]:
    if rulebook is None:
        return {}
    return {shown(campaign.id): f" ×{_decimal(campaign.multiplier)}" for campaign in rulebook.campaigns}


def _decimal(value: Fraction) -> str:
    """Return a multiplier as the rulebook has it: a decimal of at most four places."""
    whole, rest = divmod(value.numerator * 10_000 // value.denominator, 10_000)
    return f"{whole}.{rest:04d}".rstrip("0").rstrip(".")
