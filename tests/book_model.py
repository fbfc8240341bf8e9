"""A small model of the book (SPEC section 9), written from the page alone: dictionaries, and one loop per rule.

It knows nothing of SQL, of locks or of how the book finds things, and the book must come to the same points. Days are
numbers of days.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Model", "ModelEntry"]


@dataclass
class ModelEntry:
    """An entry, where its points are and how many it still holds."""

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

    def __post_init__(self) -> None:
        self.account = {"granted": "pending", "held": "held"}.get(self.outcome, "")
        self.left = self.points if self.account else 0


@dataclass
class Account:
    """The points of one member; lots by the day that they were earned on."""

    pending: int = 0
    available: int = 0
    held: int = 0
    lots: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))

    def arrive(self, day: int, points: int) -> None:
        """Points come into ``available``: a hole is filled before they form a lot."""
        hole = max(0, -self.available)
        self.available += points
        self.lots[day] += max(0, points - hole)

    def leave(self, points: int, own_day: int | None = None) -> None:
        """Points leave ``available``: from their own lot, then by earliest expiry, then out of nothing."""
        self.available -= points
        order = sorted(self.lots, key=lambda day: (day != own_day, day))
        for day in order:
            used = min(points, self.lots[day])
            self.lots[day] -= used
            points -= used


class Model:
    """The book: ``expires_on`` gives the day on which a lot of a day expires."""

    def __init__(self, expires_on: Callable[[int], int]) -> None:
        self.expires_on = expires_on
        self.accounts: defaultdict[str, Account] = defaultdict(Account)
        self.entries: dict[str, ModelEntry] = {}
        self.settled: set[int] = set()
        self.exceptions: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.granted = self.reversed = self.expired = self.adjusted = 0

    # ------------------------------------------------------------------------------------------------- the ledger

    def book(self, entry: ModelEntry) -> None:
        """Book an entry of the ledger, or a late one."""
        assert entry.event not in self.ids
        self.ids.add(entry.event)
        self.entries[entry.event] = entry
        account = self.accounts[entry.member]
        if entry.account:
            setattr(account, entry.account, getattr(account, entry.account) + entry.points)
            self.granted += entry.points

    def book_late(self, entry: ModelEntry) -> None:
        """Book a late entry: of a settled day it is available at once."""
        self.book(entry)
        if entry.day in self.settled and entry.account == "pending":
            self._settle_member(entry.day, entry.member)

    # --------------------------------------------------------------------------------------------------- the jobs

    def settle(self, day: int) -> None:
        self.settled.add(day)
        for member in {entry.member for entry in self.entries.values() if entry.day == day}:
            self._settle_member(day, member)

    def _settle_member(self, day: int, member: str) -> None:
        mine = [
            entry
            for entry in self.entries.values()
            if (entry.day, entry.member, entry.account) == (day, member, "pending")
        ]
        points = sum(entry.left for entry in mine)
        for entry in mine:
            entry.account = "available"
        self.accounts[member].pending -= points
        if points:
            self.accounts[member].arrive(day, points)

    def release(self, member: str) -> None:
        account = self.accounts[member]
        for entry in self._held(member):
            account.held -= entry.left
            if entry.day in self.settled:
                entry.account = "available"
                account.arrive(entry.day, entry.left)
            else:
                entry.account = "pending"
                account.pending += entry.left

    def confirm(self, member: str) -> None:
        for entry in self._held(member):
            self._reverse(entry, entry.left)

    def claw_back(self, member: str, first: int, last: int) -> None:
        for entry in self.entries.values():
            if entry.member == member and first <= entry.day <= last and entry.account in ("pending", "available"):
                self._reverse(entry, entry.left)

    def refund(self, event: str, member: str, order: str, amount: int) -> None:
        """Refund an order that is booked; what cannot be is an exception."""
        if event in self.ids:
            return
        self.ids.add(event)
        entry = next(entry for entry in self.entries.values() if entry.order == order)
        if entry.member != member or entry.refunded + amount > entry.amount:
            self.exceptions.append((event, order))
            return
        entry.refunded += amount
        if entry.amount == 0:
            return
        keep = min(entry.points, entry.uncapped * (entry.amount - entry.refunded) // entry.amount)
        self._reverse(entry, max(0, entry.left - keep))

    def expire(self, day: int) -> None:
        for account in self.accounts.values():
            for lot_day, points in list(account.lots.items()):
                if points and self.expires_on(lot_day) <= day:
                    account.available -= points
                    account.lots[lot_day] = 0
                    self.expired += points

    def adjust(self, member: str, points: int, today: int) -> None:
        self.adjusted += points
        if points > 0:
            self.accounts[member].arrive(today, points)
        else:
            self.accounts[member].leave(-points)

    # ------------------------------------------------------------------------------------------------- in private

    def _held(self, member: str) -> list[ModelEntry]:
        return [entry for entry in self.entries.values() if (entry.member, entry.account) == (member, "held")]

    def _reverse(self, entry: ModelEntry, points: int) -> None:
        account = self.accounts[entry.member]
        entry.left -= points
        self.reversed += points
        if entry.account == "available":
            account.leave(points, entry.day)
        elif entry.account:
            setattr(account, entry.account, getattr(account, entry.account) - points)
