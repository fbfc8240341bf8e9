"""Postings and holds in plain English: what happened, how many points it came to, why, and by which rule.

Pure, from what is booked and the rulebook that decided it. The figures are those that were booked; the rulebook only
says what they mean: rates, multipliers, what is allowed. Where it is not known, the line does without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Final

import msgspec

from accrual.rulebook import EarningRule, Limit, Rulebook, day_text

__all__ = ["BookedEntry", "Posting", "Refund", "explain", "explain_held", "utc"]

EPOCH: Final = datetime.fromtimestamp(0, UTC)
STACKING: Final = {"multiply": "multiplied", "add": "added", "max": "the largest counts"}
# Whence and where points go by settlements, releases and confirmations but of what takes points from the member.
GIVING: Final = {("pending", "available"), ("held", "pending"), ("held", "available"), ("held", "issuance")}
ACTIONS: Final = {"freeze": "which freezes", "hold": "which holds", "reject": "which rejects"}


class BookedEntry(msgspec.Struct, frozen=True):
    """The entry whose points moved. ``evidence`` has what was observed for each tripped limit (SPEC section 5).

    ``rulebook`` is the version that decided it, ``arrived`` when its event came, ``frozen`` whether its member had been
    frozen before it. Why points are held is said without what they were made of.
    """

    kind: str
    event: str
    outcome: str
    rulebook: int
    frozen: bool
    evidence: Sequence[tuple[str, int]]
    order: str | None
    amount_fen: int | None
    base: int = 0
    uncapped: int = 0
    points: int = 0
    campaigns: Sequence[str] = ()
    arrived: str = ""


class Refund(msgspec.Struct, frozen=True):
    """The refund that took points back."""

    event: str
    amount_fen: int


class Posting(msgspec.Struct, frozen=True):
    """Points that moved; days are dates as text. ``lots`` is how they touch lots: by day, ``None`` for the hole."""

    kind: str
    day: str
    from_account: str
    to_account: str
    points: int
    lots: Sequence[tuple[str | None, int]] = ()
    lot_expires_on: str | None = None
    by: str | None = None
    reason: str | None = None
    note: str | None = None
    details: Mapping[str, Any] = {}
    entry: BookedEntry | None = None
    refund: Refund | None = None


def explain(posting: Posting, rulebook: Rulebook | None) -> str:
    """Return the explanation of ``posting``. ``rulebook`` is the one that decided its entry, if it has one."""
    if posting.kind in ("accrue", "late"):
        return _accrued(posting, rulebook)
    points, what, decided = _points(posting.points), _what(posting), _decided(posting)
    were = "was" if posting.points == 1 else "were"
    match posting.kind:
        case "settle" | "release" | "confirm" if (posting.from_account, posting.to_account) not in GIVING:
            said = _taken(posting)
        case "settle":
            said = f"Business day {posting.day} was settled: {points} became available"
        case "release":
            said = f"{points}, held for {what}, {were} released to {posting.to_account}{decided}{_immune(posting)}"
        case "confirm":
            said = f"{points}, held for {what}, {were} taken back{decided}"
        case "clawback":
            said = f"{points}, earned by {what}, {were} taken back out of {posting.from_account}{decided}"
        case "refund":
            of = f" {posting.refund.event} of {_yuan(posting.refund.amount_fen)}" if posting.refund else ""
            said = f"Refund{of} for {what}: {points} {were} taken back out of {posting.from_account}"
        case "expire":
            said = f"{points} of the lot of {posting.day} expired"
        case "adjust":
            said = f"{points} {were} {'given' if posting.to_account == 'available' else 'taken'}{decided}"
        case "correct":
            undone = f"Posting {posting.details.get('corrects')}, {posting.details.get('kind')}, was undone"
            said = f"{undone}: {points} went back from {posting.from_account} to {posting.to_account}{decided}"
        case _:
            said = f"{points} {were} redeemed{decided}"
    return f"{said}{_lots(posting)}."


def _taken(posting: Posting) -> str:
    """Return what became of an entry or a day that takes points from its member: they move the other way."""
    points = f"{_points(posting.points)}, to be taken for {_what(posting)},"
    were, decided = "was" if posting.points == 1 else "were", _decided(posting)
    if posting.kind == "settle":
        return f"Business day {posting.day} was settled: {_points(posting.points)} {were} taken"
    if posting.kind == "confirm":
        return f"{points} {were} left to the member{decided}"
    return f"{points} {were} taken out of {posting.from_account}{decided}{_immune(posting)}"


def explain_held(entry: BookedEntry, held: int, rulebook: Rulebook | None) -> str:
    """Return why an entry has ``held`` points held, or has frozen its member; ``rulebook`` has decided it."""
    if entry.outcome == "applied":
        return f"Control event {entry.event} froze the member."
    what = _paid(entry)
    steps = [
        *(_limit(entry, limit, observed, rulebook) for limit, observed in entry.evidence),
        *(["the member had been frozen before"] if entry.frozen else []),
        "it was rejected" if entry.outcome == "rejected" else _held(held),
    ]
    return f"{what[0].upper()}{what[1:]}: {'; '.join(steps)}."


def _held(points: int) -> str:
    return f"{_points(abs(points))} {'held' if points >= 0 else 'to be taken, and held'}"


def utc(time_ms: int) -> str:
    """Return a time in UTC, to the millisecond; years beyond 9999 have as many digits as they need."""
    day, within = divmod(timedelta(milliseconds=time_ms), timedelta(days=1))
    return f"{day_text(day)}T{(EPOCH + within).timetz().isoformat(timespec='milliseconds')}"


def _accrued(posting: Posting, rulebook: Rulebook | None) -> str:
    entry = posting.entry
    if entry is None:
        return f"{_points(posting.points)} of business day {posting.day} went to {posting.to_account}."
    what = _what(posting)
    late = f", which came late, at {entry.arrived}" if posting.kind == "late" else ""
    steps = [
        f"{what[0].upper()}{what[1:]} on {posting.day}{late}: {_base(entry, rulebook)}",
        *_multiplied(entry, rulebook),
        *(_limit(entry, limit, observed, rulebook) for limit, observed in entry.evidence),
        *(["the member was frozen"] if entry.frozen else []),
    ]
    granted = f"{_points(abs(entry.points))} {'granted' if entry.points >= 0 else 'taken'}"
    done = _held(entry.points) if entry.outcome == "held" else granted
    name = f"rulebook {rulebook.name} version" if rulebook else "rulebook version"
    return f"{'; '.join(steps)}. {done}, decided by {name} {entry.rulebook}."


def _what(posting: Posting) -> str:
    """Return what was paid or done, or else the day that it was about."""
    return f"business day {posting.day}" if posting.entry is None else _paid(posting.entry)


def _paid(entry: BookedEntry) -> str:
    amount = f" of {_yuan(entry.amount_fen)}" if entry.amount_fen is not None else ""
    name = entry.kind if entry.order is None else f"order {entry.order}"
    return f"{name}{amount} (event {entry.event})"


def _base(entry: BookedEntry, rulebook: Rulebook | None) -> str:
    rule = rulebook.earning_rule(entry.kind) if rulebook else None
    said = f"base {_points(entry.base)}"
    if rule is None:
        return said
    if rule.points_per_yuan is not None:
        return said + _priced(entry, rule, rule.points_per_yuan)
    if rule.streak_bonus and entry.base == rule.points + rule.streak_bonus:
        return f"{said}, {rule.points} and {rule.streak_bonus} for {rule.streak_days} days in a row"
    return said


def _priced(entry: BookedEntry, rule: EarningRule, rate: Fraction) -> str:
    if entry.amount_fen is not None and entry.amount_fen < rule.min_amount_fen:
        return f", as less than {_yuan(rule.min_amount_fen)} earns nothing"
    categories = ", times the rates of its categories" if rule.category_rates else ""
    return f" at {_decimal(rate)} per yuan{categories}"


def _multiplied(entry: BookedEntry, rulebook: Rulebook | None) -> list[str]:
    """Return the campaigns with their multipliers, and what they make of the points."""
    if not entry.campaigns:
        return []
    known = {campaign.id: campaign.multiplier for campaign in rulebook.campaigns} if rulebook else {}
    names = [f"{name} ×{_decimal(known[name])}" if name in known else name for name in entry.campaigns]
    stacked = f" ({STACKING[rulebook.stacking]})" if rulebook and len(names) > 1 else ""
    noun, verb = ("campaign", "makes") if len(names) == 1 else ("campaigns", "make")
    return [f"{noun} {_list(names)}{stacked} {verb} it {entry.uncapped}"]


def _limit(entry: BookedEntry, name: str, observed: int, rulebook: Rulebook | None) -> str:
    """Return how a limit tripped, and what came of it."""
    limit = next((limit for limit in rulebook.limits if limit.id == name), None) if rulebook else None
    if limit is None:
        return f"limit {name} tripped at {observed}"
    # Of distinct members no more are counted than it takes to trip.
    more = " or more" if limit.measure == "members" else ""
    measured = f"{observed}{more} {limit.measure} per {limit.key} {_window(limit)} where {limit.max} are allowed"
    if limit.action == "clamp":
        return f"limit {name} clamps it, as it would make {measured}"
    immune = ", but the member was immune" if entry.outcome == "granted" else ""
    return f"limit {name}, {ACTIONS[limit.action]}, tripped with {measured}{immune}"


def _window(limit: Limit) -> str:
    if limit.window.duration_ms is None:
        return "and business day"
    seconds = limit.window.duration_ms // 1000
    for unit_s, name in ((3600, "h"), (60, "min")):
        if seconds % unit_s == 0:
            return f"in {seconds // unit_s} {name}"
    return f"in {seconds} s"


def _decided(posting: Posting) -> str:
    """Return who decided it, and why."""
    by = f" by {posting.by}" if posting.by else ""
    approved_by = posting.details.get("approved_by")
    approved = f", approved by {approved_by}" if approved_by else ""
    why = ": ".join(filter(None, (posting.reason, posting.note)))
    return f"{by}{approved}{f' ({why})' if why else ''}"


def _immune(posting: Posting) -> str:
    until = posting.details.get("immune_until_ms")
    return "" if until is None else f"; no limit freezes the member or holds their points until {utc(until)}"


def _lots(posting: Posting) -> str:
    """Return what became of the lots that the points came to, or came from."""
    if posting.kind == "expire" or not posting.lots:
        return ""
    said = _arrived if posting.to_account == "available" else _left
    return f"; {_list([said(posting, day, points) for day, points in posting.lots])}"


def _arrived(posting: Posting, day: str | None, points: int) -> str:
    if day is None:
        return f"{points} made up for a balance below zero"
    verb = "is" if points == 1 else "are"
    until = f", which expires on {posting.lot_expires_on}" if posting.lot_expires_on else ""
    return f"{points} {verb} in the lot of {day}{until}"


def _left(_: Posting, day: str | None, points: int) -> str:
    return f"{points} left the balance below zero" if day is None else f"{points} came from the lot of {day}"


def _points(count: int) -> str:
    return f"{count} point{'s' * (count != 1)}"


def _yuan(amount_fen: int) -> str:
    return f"{amount_fen // 100}.{amount_fen % 100:02} yuan"


def _decimal(value: Fraction) -> str:
    """Return a rate or multiplier as the rulebook has it: a decimal of at most four places."""
    whole, rest = divmod(value.numerator * 10_000 // value.denominator, 10_000)
    return f"{whole}.{rest:04d}".rstrip("0").rstrip(".")


def _list(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
