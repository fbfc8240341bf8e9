"""The proof that no product of a rulebook overflows the compiled engine's exact arithmetic (SPEC section 2).

The engine computes ``floor(N × m / (Q × d))``: ``N`` is the base in ``Q``-ths of a point, ``m / d`` the multiplier of
the matching campaigns in lowest terms. It holds ``N``, ``m`` and ``Q × d`` in 128 bits, their product in 256, and the
result in 64. Whether that is enough follows from the largest amount an event may carry and from the largest set of
campaigns that can match one event together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Final

from accrual.events import MAXIMUM_AMOUNT_FEN
from accrual.rulebook.model import Campaign, EarningRule, Rulebook

__all__ = ["MAXIMUM_POINTS", "base_scale", "largest_sets", "overflow_findings"]

MAXIMUM_POINTS: Final = 2**63 - 1
_WIDE: Final = 2**127


def base_scale(rule: EarningRule) -> int:
    """Return ``Q``: the number of equal parts of a point in which every line of ``rule`` is a whole number."""
    if rule.points_per_yuan is None:
        return 1
    rates = [rule.line_rate(category) for category in (*rule.category_rates, "")]
    rates.append(rule.points_per_yuan / 100)
    return math.lcm(*(rate.denominator for rate in rates))


def largest_base(rule: EarningRule) -> Fraction:
    """Return the largest ``base_exact`` that an event of this rule can have."""
    if rule.points_per_yuan is None:
        return Fraction(rule.points + rule.streak_bonus)
    rates = [rule.line_rate(category) for category in rule.category_rates]
    return MAXIMUM_AMOUNT_FEN * max([*rates, rule.points_per_yuan / 100])


def overflow_findings(rulebook: Rulebook) -> Iterator[tuple[str, str]]:
    """Yield ``(kind, reason)`` for every earning rule whose largest product could overflow."""
    for rule in rulebook.earning_rules:
        base, scale = largest_base(rule), base_scale(rule)
        if base * scale >= _WIDE or scale >= 2**63 or base > MAXIMUM_POINTS:
            yield rule.kind, f"an event could be worth {_scientific(base)} points, beyond the exact arithmetic"
            continue
        for campaigns in largest_sets(rulebook, rule.kind):
            reason = _product_finding(rulebook, base, scale, campaigns)
            if reason is not None:
                yield rule.kind, reason
                break


def _product_finding(rulebook: Rulebook, base: Fraction, scale: int, campaigns: list[Campaign]) -> str | None:
    """Bound every subset of ``campaigns``: numerators and denominators in lowest terms divide these products."""
    multipliers = [campaign.multiplier for campaign in campaigns]
    if rulebook.stacking == "multiply":
        numerator = math.prod(value.numerator for value in multipliers)
        denominator = math.prod(value.denominator for value in multipliers)
        largest = math.prod((max(value, Fraction(1)) for value in multipliers), start=Fraction(1))
    else:
        denominator = math.lcm(*(value.denominator for value in multipliers))
        if rulebook.stacking == "add":
            # Those above 1 together give the largest sum, those below it the smallest.
            above = sum((value - 1 for value in multipliers if value > 1), Fraction(0))
            below = sum((1 - value for value in multipliers if value < 1), Fraction(0))
            largest = max(1 + above, below - 1)
        else:
            largest = max([*multipliers, Fraction(1)])
        numerator = math.ceil(largest * denominator)
    ids = ", ".join(campaign.id for campaign in campaigns)
    if base * largest > MAXIMUM_POINTS:
        return f"with campaigns {ids} an event could be worth {_scientific(base * largest)} points, beyond 2^63 - 1"
    if numerator >= _WIDE or denominator * scale >= _WIDE:
        return f"the product of campaigns {ids} needs more than the 127 bits of the exact arithmetic"
    return None


def largest_sets(rulebook: Rulebook, kind: str) -> Iterator[list[Campaign]]:
    """Yield sets of campaigns that could match one event of ``kind``, such that every possible set is within one.

    An event has one city and its member one tier; the conditions on dates, tags and cards are taken as fulfilled.
    """
    campaigns = [campaign for campaign in rulebook.campaigns if kind in campaign.kinds]
    seen = set()
    for city in _named(campaign.cities for campaign in campaigns):
        in_city = [campaign for campaign in campaigns if campaign.cities is None or city in campaign.cities]
        for tier in _named(campaign.tiers for campaign in in_city):
            chosen = [campaign for campaign in in_city if campaign.tiers is None or tier in campaign.tiers]
            key = tuple(campaign.id for campaign in chosen)
            if chosen and key not in seen:
                seen.add(key)
                yield chosen


def _named(conditions: Iterable[frozenset[str] | None]) -> list[str | None]:
    """Return every name that a condition mentions, and ``None`` for all the others."""
    names = {name for condition in conditions if condition is not None for name in condition}
    return [None, *sorted(names)]


def _scientific(value: Fraction) -> str:
    digits = len(str(int(value))) - 1
    return f"about 10^{digits}" if digits > 6 else str(int(value))
