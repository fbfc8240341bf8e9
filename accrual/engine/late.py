"""The reference engine for late events: steps 8 to 12 on a day that is over, its totals told instead of counted.

Only windows of a business day apply (SPEC section 9), and the totals of that day come from what is booked for it.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import msgspec

from accrual.engine.counters import When, members_counter, total_counter
from accrual.engine.reference import Member, ReferenceEngine, Streak
from accrual.events import Event
from accrual.outcomes import Decision, Entry
from accrual.rulebook import Limit, Rulebook

__all__ = ["BookedEvent", "LateEngine"]

COUNTED: Final = ("granted", "held")


class BookedEvent(msgspec.Struct, frozen=True):
    """An entry of the day as the book holds it: what limits count of it.

    Keys are whatever stands for device, IP and phone in the events that will be decided; ``""`` where absent.
    ``refused_early`` marks one that step 8 rejected, which no limit counts.
    """

    kind: str
    member: str
    device: str
    ip: str
    phone: str
    outcome: str
    refused_early: bool
    points: int


class LateEngine:
    """Decides late events of day number ``day``, one after the other, each on top of what was accepted before."""

    def __init__(self, rulebook: Rulebook, day: int) -> None:
        limits = tuple(limit for limit in rulebook.limits if limit.window.duration_ms is None)
        self.rulebook = msgspec.structs.replace(rulebook, limits=limits)
        self.day = day
        self._engine = ReferenceEngine(self.rulebook)
        # From here on the engine forgets nothing, so that what it is told stays where it was put.
        self._engine.reclaim(day)

    def member(self, name: str) -> Member:
        """Return what the engine knows of a member, to be told more: state, tier, card, immunity, once marks."""
        return self._engine.members[name]

    def tell_streak(self, name: str, kind: str, day: int) -> None:
        """Tell of an entry of ``kind`` that counts for the member's streak; they come in the order of booking."""
        streaks = self._engine.members[name].streaks
        streaks[kind] = streaks.get(kind, Streak(day - 1, 0)).reached(day)

    def tell(self, event: BookedEvent) -> None:
        """Tell of an entry of the day."""
        if event.outcome in COUNTED:
            self._engine.members[event.member].daily[event.kind, self.day] += 1
        if event.refused_early:
            return
        when = When(0, self.day, 0)
        for limit in self.rulebook.limits:
            key = getattr(event, limit.key)
            if not key or not limit.applies_to(event.kind):
                continue
            if limit.measure == "members":
                self._engine.sights.setdefault((limit.identity, key), members_counter(limit)).see(event.member, when)
            elif limit.measure == "events":
                self._total(limit, key).add(when, 1)
            elif event.outcome in COUNTED:
                self._total(limit, key).add(when, event.points)

    def decide(self, event: Event) -> tuple[Decision, bool]:
        """Decide ``event`` and tell whether it may be booked: not where a limit tripped that is more than a clamp.

        What may not be booked leaves no trace.
        """
        engine = self._engine
        before = copy.deepcopy((engine.members[event.member], self._counters(event)))
        decision = engine.decide(event, event.ts)
        engine.decided.clear()
        clamps = {limit.id for limit in self.rulebook.limits if limit.action == "clamp"}
        if isinstance(decision, Entry) and all(limit in clamps for limit, _ in decision.evidence):
            return decision, True
        engine.members[event.member], counters = before
        for table, key in self._keys(event):
            if (id(table), key) in counters:
                table[key] = counters[id(table), key]
            else:
                table.pop(key, None)
        return decision, False

    def _total(self, limit: Limit, key: str) -> Any:
        return self._engine.totals.setdefault((limit.identity, key), total_counter(limit))

    def _keys(self, event: Event) -> list[tuple[dict[tuple[object, ...], Any], tuple[object, ...]]]:
        """Return where the counters of the event's keys are."""
        tables: tuple[Any, ...] = (self._engine.totals, self._engine.sights)
        return [
            (table, (limit.identity, getattr(event, limit.key))) for table in tables for limit in self.rulebook.limits
        ]

    def _counters(self, event: Event) -> dict[tuple[int, tuple[object, ...]], Any]:
        return {(id(table), key): table[key] for table, key in self._keys(event) if key in table}
