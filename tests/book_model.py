"""A small model of the book (SPEC section 9), written from the page alone: dictionaries, and one loop per rule.

It knows nothing of SQL, of locks or of how the book finds things, and the book must come to the same points. Days are
numbers of days.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Model", "ModelEntry", "ModelPosting"]


@dataclass
class ModelEntry:
    """An entry, where its points are and how many it still holds; ``settled_by`` is the place of the settlement."""

    event: str
    member: str
    day: int
    outcome: str
    points: int
    uncapped: int = 0
    amount: int = 0
    order: str = ""
    account: str = ""
    left: int = 0
    refunded: int = 0
    settled_by: int | None = None

    def __post_init__(self) -> None:
        self.account = {"granted": "pending", "held": "held"}.get(self.outcome, "")
        self.left = self.points if self.account else 0


@dataclass
class ModelPosting:
    """Points that moved: ``lots`` says over which lots, ``None`` for what none covered, of ``event``'s entry if any."""

    kind: str
    member: str
    day: int
    source: str
    target: str
    points: int
    lots: list[tuple[int | None, int]]
    event: str = ""
    amount: int = 0
    is_undone: bool = False


@dataclass
class Account:
    """The points of one member; lots by the day that they were earned on."""

    pending: int = 0
    available: int = 0
    held: int = 0
    lots: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))

    def move(self, account: str, points: int) -> None:
        """Points come into an account of the member, or leave it; what is the programme's is not the member's."""
        if account in ("pending", "available", "held"):
            setattr(self, account, getattr(self, account) + points)

    def arriving(self, day: int, points: int) -> list[tuple[int | None, int]]:
        """Points come into ``available``: a hole is filled before they form a lot."""
        hole = min(points, max(0, -self.available))
        self.lots[day] += points - hole
        return [(lot, part) for lot, part in ((None, hole), (day, points - hole)) if part]

    def leaving(self, points: int, own_day: int | None = None) -> list[tuple[int | None, int]]:
        """Points leave ``available``: from their own lot, then by earliest expiry, then out of nothing."""
        parts: list[tuple[int | None, int]] = []
        for day in sorted(self.lots, key=lambda day: (day != own_day, day)):
            used = min(points, self.lots[day])
            self.lots[day] -= used
            points -= used
            parts += [(day, used)] if used else []
        return parts + ([(None, points)] if points else [])

    def is_sound(self) -> bool:
        """Tell whether the points can be as they are."""
        lots = self.lots.values()
        return min([0, *lots]) == 0 and sum(lots) == max(0, self.available)


class Model:
    """The book: ``expires_on`` gives the day on which a lot of a day expires."""

    def __init__(self, expires_on: Callable[[int], int]) -> None:
        self.expires_on = expires_on
        self.accounts: defaultdict[str, Account] = defaultdict(Account)
        self.entries: dict[str, ModelEntry] = {}
        self.postings: list[ModelPosting] = []
        self.settled: set[int] = set()
        self.exceptions: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        # Who is frozen or blocked; nobody else is.
        self.states: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------- the ledger

    def book(self, entry: ModelEntry) -> None:
        """Book an entry of the ledger, or a late one."""
        assert entry.event not in self.ids
        self.ids.add(entry.event)
        self.entries[entry.event] = entry
        self.accounts[entry.member].move(entry.account, entry.points)

    def book_once(self, entry: ModelEntry) -> None:
        """Book an entry of the ledger whose id another one, in the ledger of another partition, may have had before."""
        if entry.event in self.ids:
            self.exceptions.append(("id_taken", entry.event))
        else:
            self.book(entry)

    def freeze(self, member: str) -> None:
        """Freeze a member, unless blocked."""
        self.states.setdefault(member, "frozen")

    def outcome_of(self, member: str) -> str:
        """Return what an order of a member comes to, no limit having tripped but a clamp."""
        return {"frozen": "held", "blocked": "rejected"}.get(self.states.get(member, ""), "granted")

    def settle_late(self, entries: Iterable[ModelEntry]) -> None:
        """Make what late entries that were booked together have brought of settled days available, together."""
        for day, member in dict.fromkeys((entry.day, entry.member) for entry in entries if entry.account == "pending"):
            if day in self.settled:
                self._settle_member(day, member)

    # --------------------------------------------------------------------------------------------------- the jobs

    def settle(self, day: int) -> None:
        self.settled.add(day)
        for member in {entry.member for entry in self.entries.values() if entry.day == day}:
            self._settle_member(day, member)

    def _settle_member(self, day: int, member: str) -> None:
        points = self._moved(member, day, "pending")
        if points:
            for entry in self._entries_in(member, "pending"):
                if entry.day == day:
                    entry.account, entry.settled_by = "available", len(self.postings)
            self._post("settle", member, day, "pending", "available", points)

    def release(self, member: str) -> None:
        self.states.pop(member, None)
        # What gives comes before what takes.
        for entry in sorted(self._entries_in(member, "held"), key=lambda entry: entry.left < 0):
            if entry.left:
                target = "available" if entry.day in self.settled else "pending"
                self._post("release", member, entry.day, "held", target, entry.left, entry.event)
                entry.account, entry.settled_by = target, None

    def confirm(self, member: str) -> None:
        self.states[member] = "blocked"
        for entry in self._entries_in(member, "held"):
            self._reverse("confirm", entry, entry.left)

    def claw_back(self, member: str, first: int, last: int) -> None:
        for entry in self._entries_in(member, "pending", "available"):
            if first <= entry.day <= last:
                self._reverse("clawback", entry, max(0, entry.left))

    def refund(self, event: str, member: str, order: str, amount: int) -> None:
        """Refund an order that is booked; what cannot be is an exception."""
        if event in self.ids:
            return
        self.ids.add(event)
        entry = next(entry for entry in self.entries.values() if entry.order == order)
        if entry.member != member:
            self.exceptions.append(("refund_of_another_member", event))
            return
        if entry.refunded + amount > entry.amount:
            self.exceptions.append(("refund_exceeds_order", event))
            return
        entry.refunded += amount
        keep = entry.left
        if entry.amount and entry.points > 0:
            keep = min(entry.points, entry.uncapped * (entry.amount - entry.refunded) // entry.amount)
        self._reverse("refund", entry, max(0, entry.left - keep), amount)

    def expire(self, day: int) -> None:
        for member, account in list(self.accounts.items()):
            for lot_day, points in sorted(account.lots.items()):
                if points and self.expires_on(lot_day) <= day:
                    self._post("expire", member, lot_day, "available", "expired", points)

    def adjust(self, member: str, points: int, today: int) -> None:
        source, target = ("issuance", "available") if points > 0 else ("available", "issuance")
        self._post("adjust", member, today, source, target, abs(points))

    def undo(self, place: int) -> bool:
        """Undo a posting, to the letter; return whether it could be: its points must be where it has put them."""
        trial = copy.deepcopy(self)
        trial._undo(trial.postings[place], place)
        posting = self.postings[place]
        if not trial._is_sound(posting.member, posting.day):
            return False
        if posting.kind == "release" and posting.target == "pending" and posting.day in self.settled:
            # With what it takes from pending again, the day may have come to nothing when it was settled.
            trial._settle_member(posting.day, posting.member)
        self.__dict__.update(trial.__dict__)
        return True

    def total(self, account: str) -> int:
        """Return what is in an account of the programme."""
        granted = sum(entry.points for entry in self.entries.values() if entry.outcome in ("granted", "held"))
        standing = [posting for posting in self.postings if not posting.is_undone]
        came = sum(posting.points for posting in standing if posting.target == account)
        went = sum(posting.points for posting in standing if posting.source == account)
        return came - went - (granted if account == "issuance" else 0)

    # ------------------------------------------------------------------------------------------------- in private

    def _entries_in(self, member: str, *accounts: str) -> list[ModelEntry]:
        return [entry for entry in self.entries.values() if entry.member == member and entry.account in accounts]

    def _reverse(self, kind: str, entry: ModelEntry, points: int, amount: int = 0) -> None:
        entry.left -= points
        if points:
            self._post(kind, entry.member, entry.day, entry.account, "issuance", points, entry.event, amount)

    def _post(
        self, kind: str, member: str, day: int, source: str, target: str, points: int, event: str = "", amount: int = 0
    ) -> None:
        if points < 0:
            source, target, points = target, source, -points
        account = self.accounts[member]
        lots: list[tuple[int | None, int]] = []
        if target == "available":
            lots = account.arriving(day, points)
        elif source == "available":
            lots = account.leaving(points, day if kind in ("refund", "clawback", "expire") else None)
        account.move(source, -points)
        account.move(target, points)
        self.postings.append(ModelPosting(kind, member, day, source, target, points, lots, event, amount))

    def _undo(self, posting: ModelPosting, place: int) -> None:
        account = self.accounts[posting.member]
        account.move(posting.source, posting.points)
        account.move(posting.target, -posting.points)
        for day, points in posting.lots:
            if day is not None:
                account.lots[day] += points if posting.source == "available" else -points
        posting.is_undone = True
        entry = self.entries.get(posting.event)
        if entry is None:
            for other in self.entries.values():
                if other.settled_by == place:
                    other.account, other.settled_by = "pending", None
        elif posting.kind == "release":
            entry.account, entry.settled_by = "held", None
        else:
            entry.left += posting.points if posting.target == "issuance" else -posting.points
            entry.refunded -= posting.amount
        if posting.source == "pending" and posting.kind != "settle" and posting.day in self.settled:
            # The entry went on without them.
            self._settle_member(posting.day, posting.member)

    def _moved(self, member: str, day: int, account: str) -> int:
        """Return what an account has of a member's day, as entries and postings moved it."""
        outcome = {"pending": "granted", "held": "held"}[account]
        entries = [entry for entry in self.entries.values() if (entry.member, entry.day) == (member, day)]
        moved = sum(entry.points for entry in entries if entry.outcome == outcome)
        for posting in self.postings:
            if (posting.member, posting.day) == (member, day) and not posting.is_undone:
                moved += posting.points * ((posting.target == account) - (posting.source == account))
        return moved

    def _is_sound(self, member: str, day: int) -> bool:
        """Tell whether a member's points can be as they are, and those of a day are where its entries have them."""
        return self.accounts[member].is_sound() and all(
            self._moved(member, day, account)
            == sum(entry.left for entry in self._entries_in(member, account) if entry.day == day)
            for account in ("pending", "held")
        )
