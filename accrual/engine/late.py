"""The reference engine for late events: steps 8 to 12 on days that are over, their totals told instead of counted.

Only windows of a business day apply (SPEC section 9), and the totals of a day come from what is booked for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import msgspec

from accrual.engine.counters import CounterKey, When, members_counter, total_counter
from accrual.engine.reference import OFFLINE_SLACK_DAYS, Member, ReferenceEngine, Streak
from accrual.events import Event
from accrual.outcomes import Decision, Entry
from accrual.rulebook import Limit, Rulebook

__all__ = ["LateEngine"]


class LateEngine:
    """Decides late events one after the other, each on top of what it was told and of those it let pass before.

    What stands for device, IP and phone in the events stands for them as a key of totals too.
    """

    def __init__(self, rulebook: Rulebook) -> None:
        self.limits = tuple(limit for limit in rulebook.limits if limit.window.duration_ms is None)
        self._clamps = {limit.id for limit in self.limits if limit.action == "clamp"}
        # Offline an engine forgets nothing by itself, however far back late events go.
        by_day = msgspec.structs.replace(rulebook, limits=self.limits)
        self._engine = ReferenceEngine(by_day, slack_days=OFFLINE_SLACK_DAYS)

    def member(self, name: str) -> Member:
        """Return what the engine knows of a member, to be told more: state, tier, card, daily counts, once marks."""
        return self._engine.members[name]

    def tell_streak(self, name: str, kind: str, day: int) -> None:
        """Tell of an entry of ``kind`` that counts for the member's streak; they come in the order of booking."""
        streaks = self.member(name).streaks
        streaks[kind] = streaks.get(kind, Streak(day - 1, 0)).reached(day)

    def tell_total(self, limit: Limit, key: str, day: int, total: int) -> None:
        """Tell the ``total`` of a limit on events or points on day number ``day``."""
        counter = self._engine.totals.setdefault((limit.identity, key), total_counter(limit))
        counter.add(When(0, day, 0), total)

    def tell_members(self, limit: Limit, key: str, day: int, members: Iterable[str]) -> None:
        """Tell which members a limit saw on day number ``day``; where there are more, any ``max + 1`` will do."""
        counter = self._engine.sights.setdefault((limit.identity, key), members_counter(limit))
        for member in members:
            counter.see(member, When(0, day, 0))

    def decide(self, event: Event) -> tuple[Decision, bool]:
        """Decide ``event`` and tell whether it may be booked: not where a limit tripped that is more than a clamp.

        What may not be booked leaves no trace.
        """
        engine = self._engine
        member, counters = copy.deepcopy(self.member(event.member)), self._counters(event)
        decision = engine.decide(event, event.ts)
        engine.decided.clear()
        if isinstance(decision, Entry) and all(limit in self._clamps for limit, _ in decision.evidence):
            return decision, True
        engine.members[event.member] = member
        for table, key, counter in counters:
            if counter is None:
                self._tables[table].pop(key, None)
            else:
                self._tables[table][key] = counter
        return decision, False

    @property
    def _tables(self) -> tuple[dict[CounterKey, Any], ...]:
        return self._engine.totals, self._engine.sights

    def _counters(self, event: Event) -> list[tuple[int, CounterKey, Any]]:
        """Return copies of the counters that the event may change, each with its table and key; ``None`` for none."""
        keys = [(limit.identity, getattr(event, limit.key)) for limit in self.limits]
        tables = enumerate(self._tables)
        return [(number, key, copy.deepcopy(table.get(key))) for number, table in tables for key in keys]
