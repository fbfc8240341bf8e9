"""The counters behind limits, written for reading (SPEC section 3). The compiled engine has its own."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

import msgspec

from accrual.rulebook import MAXIMUM_POINTS, Limit, Window

__all__ = [
    "CounterKey",
    "DayMembers",
    "DayTotal",
    "SlidingMembers",
    "SlidingTotal",
    "When",
    "members_counter",
    "saturated",
    "total_counter",
]

BUCKETS: Final = 8

# The identity of a limit, and what it counts by: a member, device, IP or phone.
CounterKey = tuple[tuple[str, str, str, Window, int | None], str]


class When(msgspec.Struct, frozen=True):
    """When an event counts: its time in ms, its business day, and the minute of that day."""

    time_ms: int
    day: int
    minute: int


def saturated(value: int) -> int:
    """Keep ``value`` within signed 64 bits, as every total of every engine does."""
    return max(-MAXIMUM_POINTS - 1, min(MAXIMUM_POINTS, value))


class SlidingTotal:
    """A total over a sliding window of eight buckets."""

    def __init__(self, bucket_ms: int) -> None:
        self.bucket_ms = bucket_ms
        self.latest: int | None = None
        self.buckets: defaultdict[int, int] = defaultdict(int)

    def _latest_with(self, index: int) -> int:
        return index if self.latest is None else max(self.latest, index)

    def read(self, when: When) -> int:
        """Return the total as an event at that time would see it; nothing moves."""
        latest = self._latest_with(when.time_ms // self.bucket_ms)
        total = 0
        for index in range(latest - BUCKETS + 1, latest + 1):
            total = saturated(total + self.buckets.get(index, 0))
        return total

    def add(self, when: When, amount: int) -> int:
        """Count ``amount`` and return the total."""
        index = when.time_ms // self.bucket_ms
        self.latest = self._latest_with(index)
        oldest = self.latest - BUCKETS + 1
        bucket = max(index, oldest)
        self.buckets[bucket] = saturated(self.buckets[bucket] + amount)
        for stale in [index for index in self.buckets if index < oldest]:
            del self.buckets[stale]
        return self.read(when)


class DayTotal:
    """One total per business day."""

    def __init__(self) -> None:
        self.totals: defaultdict[int, int] = defaultdict(int)

    def read(self, when: When) -> int:
        """Return the total of the day."""
        return self.totals.get(when.day, 0)

    def add(self, when: When, amount: int) -> int:
        """Count ``amount`` and return the total."""
        self.totals[when.day] = saturated(self.totals[when.day] + amount)
        return self.totals[when.day]

    def forget_before(self, first_day: int) -> bool:
        """Drop the days before ``first_day`` and tell whether there are others."""
        for day in [day for day in self.totals if day < first_day]:
            del self.totals[day]
        return bool(self.totals)


class SlidingMembers:
    """The distinct members of a sliding window: the last sights of the ``maximum + 1`` seen most recently."""

    def __init__(self, window_ms: int, maximum: int) -> None:
        self.window_ms = window_ms
        self.maximum = maximum
        self.latest_ms = 0
        self.sights: dict[str, int] = {}

    def see(self, member: str, when: When) -> int:
        """Note that ``member`` was seen and return the number of members within the window, up to ``maximum + 1``."""
        self.latest_ms = max(self.latest_ms, when.time_ms)
        self.sights[member] = max(self.sights.get(member, 0), when.time_ms)
        if len(self.sights) > self.maximum + 1:
            del self.sights[min(self.sights, key=self.sights.__getitem__)]
        return sum(1 for sight_ms in self.sights.values() if sight_ms > self.latest_ms - self.window_ms)


class DayMembers:
    """The distinct members of each business day, up to ``maximum + 1``."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.days: defaultdict[int, list[str]] = defaultdict(list)

    def see(self, member: str, when: When) -> int:
        """Note that ``member`` was seen and return the number of members of that day."""
        members = self.days[when.day]
        if member not in members and len(members) <= self.maximum:
            members.append(member)
        return len(members)

    def forget_before(self, first_day: int) -> bool:
        """Drop the days before ``first_day`` and tell whether there are others."""
        for day in [day for day in self.days if day < first_day]:
            del self.days[day]
        return bool(self.days)


def total_counter(limit: Limit) -> SlidingTotal | DayTotal:
    """Return an empty counter for a limit on events or points."""
    return DayTotal() if limit.window.duration_ms is None else SlidingTotal(limit.window.bucket_ms)


def members_counter(limit: Limit) -> SlidingMembers | DayMembers:
    """Return an empty counter for a limit on distinct members."""
    if limit.window.duration_ms is None:
        return DayMembers(limit.max)
    return SlidingMembers(limit.window.duration_ms, limit.max)
