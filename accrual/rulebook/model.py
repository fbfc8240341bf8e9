"""What a rulebook says, as plain values (SPEC section 2). Rates and multipliers are exact fractions."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

import msgspec

from accrual.errors import RulebookError
from accrual.events import ORDER_KIND
from accrual.rulebook.calendar import Calendar, day_of_month, day_of_week

__all__ = ["Campaign", "EarningRule", "Limit", "Rulebook", "Window", "combined_multiplier"]

Stacking = Literal["multiply", "add", "max"]
Measure = Literal["events", "members", "points"]
Action = Literal["reject", "hold", "freeze", "clamp"]
LimitKey = Literal["member", "device", "ip", "phone"]


class EarningRule(msgspec.Struct, frozen=True):
    """One ``[[earn]]``: per yuan (``points_per_yuan``) or fixed (``points``), never both."""

    kind: str
    points_per_yuan: Fraction | None = None
    category_rates: dict[str, Fraction] = {}
    min_amount_fen: int = 0
    points: int = 0
    max_per_day: int | None = None
    streak_days: int | None = None
    streak_bonus: int = 0
    once: bool = False

    def line_rate(self, category: str) -> Fraction:
        """Return the points per *fen* of a line of ``category``."""
        assert self.points_per_yuan is not None
        return self.points_per_yuan * self.category_rates.get(category, Fraction(1)) / 100


class Campaign(msgspec.Struct, frozen=True):
    """One ``[[campaign]]``. A condition that is ``None`` does not apply; all others must hold."""

    id: str
    multiplier: Fraction
    kinds: tuple[str, ...] = (ORDER_KIND,)
    days_of_month: frozenset[int] | None = None
    weekdays: frozenset[int] | None = None
    from_day: int | None = None
    until_day: int | None = None
    hours: tuple[int, int] | None = None
    cities: frozenset[str] | None = None
    tiers: frozenset[str] | None = None
    card: bool = False
    tags: frozenset[str] | None = None
    percent: int | None = None

    def on_day(self, day: int) -> bool:
        """Tell whether the conditions on the date hold for the local day number ``day``."""
        return (
            (self.days_of_month is None or day_of_month(day) in self.days_of_month)
            and (self.weekdays is None or day_of_week(day) in self.weekdays)
            and (self.from_day is None or self.from_day <= day)
            and (self.until_day is None or day <= self.until_day)
        )

    def at_minute(self, minute: int) -> bool:
        """Tell whether the condition on the local time of day holds at ``minute`` (0..1439)."""
        if self.hours is None:
            return True
        start, end = self.hours
        return start <= minute < end if start < end else minute >= start or minute < end

    def draws(self, member: str) -> bool:
        """Tell whether ``member`` belongs to the campaign's percentage."""
        return self.percent is None or zlib.crc32(f"{self.id}:{member}".encode()) % 100 < self.percent


class Window(msgspec.Struct, frozen=True):
    """A limit's window: sliding over ``duration_ms``, or the business day where that is ``None``."""

    duration_ms: int | None

    @property
    def bucket_ms(self) -> int:
        """The width of one of a sliding window's eight buckets."""
        assert self.duration_ms is not None
        return self.duration_ms // 8


class Limit(msgspec.Struct, frozen=True):
    """One ``[[limit]]``. ``kinds`` is ``None`` for every kind with an earning rule."""

    id: str
    key: LimitKey
    measure: Measure
    window: Window
    max: int
    action: Action
    kinds: tuple[str, ...] | None = None

    def applies_to(self, kind: str) -> bool:
        """Tell whether events of ``kind`` are subject to the limit."""
        return self.kinds is None or kind in self.kinds

    @property
    def identity(self) -> tuple[str, LimitKey, Measure, Window, int | None]:
        """What must stay the same for a limit to keep its counts when a new rulebook version is adopted.

        A limit on distinct members remembers only ``max + 1`` of them, so with another ``max`` it starts afresh.
        """
        return (self.id, self.key, self.measure, self.window, self.max if self.measure == "members" else None)


class Rulebook(msgspec.Struct, frozen=True):
    """A checked rulebook. ``text`` is the TOML it came from, byte for byte."""

    text: str
    name: str
    version: int
    timezone: str
    stacking: Stacking
    earning_rules: tuple[EarningRule, ...]
    campaigns: tuple[Campaign, ...]
    limits: tuple[Limit, ...]
    point_value_fen: Fraction = Fraction(1)
    settlement_days: int = 1
    expiry_months: int = 12
    expiry_reminder_days: tuple[int, ...] = (15, 3)

    def earning_rule(self, kind: str) -> EarningRule | None:
        """Return the earning rule of ``kind``, or ``None``."""
        return next((rule for rule in self.earning_rules if rule.kind == kind), None)

    @property
    def calendar(self) -> Calendar:
        """The local calendar of the programme."""
        return Calendar(self.timezone)

    def check_successor(self, successor: Rulebook) -> None:
        """Check that ``successor`` may follow this rulebook on a partition. Raises ``RulebookError``.

        The time zone is what makes business days, and those of the ledger and the book are not made anew.
        """
        if successor.timezone != self.timezone:
            in_force = f"where {self.timezone!r} is in force: a programme keeps its own"
            raise RulebookError([f"programme.timezone: {successor.timezone!r} {in_force}"])

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the rulebook's text: two versions with the same digest are the same rulebook."""
        return hashlib.sha256(self.text.encode()).digest()


def combined_multiplier(stacking: Stacking, multipliers: Iterable[Fraction]) -> Fraction:
    """Return ``M`` of SPEC section 4, step 9, for the multipliers of the matching campaigns."""
    values = list(multipliers)
    if not values:
        return Fraction(1)
    if stacking == "multiply":
        return functools.reduce(lambda left, right: left * right, values)
    if stacking == "add":
        return 1 + sum((value - 1 for value in values), Fraction(0))
    return max(values)
