"""From a rulebook to the flat description that the compiled core loads, and the layout of its records."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any, Final

from accrual.events import LIMIT_KEYS
from accrual.rulebook import Campaign, EarningRule, Limit, Rulebook
from accrual.rulebook.bounds import base_scale

__all__ = ["BUILT_IN_KIND_ORDER", "Layout", "Layouts", "describe"]

# In the order of the ledger's `kinds`, after the earning rules.
BUILT_IN_KIND_ORDER: Final = (
    "order_refunded",
    "member_updated",
    "member_frozen",
    "member_released",
    "member_blocked",
)
MEASURES: Final = ("events", "members", "points")
ACTIONS: Final = ("reject", "hold", "freeze", "clamp")
HEADER_BYTES: Final = 24
MEMBER_BYTES: Final = 64
MINUTES: Final = 1440
ALWAYS_DAY: Final = 2**31 - 1

# Bytes of a limit's counters in the record of its key. A sliding total has its latest bucket index and eight buckets.
SLIDING_EVENTS_BYTES: Final = 8 + 8 * 4
SLIDING_POINTS_BYTES: Final = 8 + 8 * 8
DAY_TOTAL_BYTES: Final = 8


def _round_up(size: int) -> int:
    return (size + 7) // 8 * 8


class Layout:
    """Where each part of a table's records stands: part to ``(offset, size)``, in bytes."""

    def __init__(self, start: int, parts: Iterable[tuple[object, int]] = ()) -> None:
        self.parts: dict[object, tuple[int, int]] = {"fixed": (0, start)}
        self.stride = start
        for part, size in parts:
            self.parts[part] = (self.stride, size)
            self.stride += _round_up(size)

    def offset(self, part: object) -> int:
        """Return where ``part`` starts; 0 where there is no such part."""
        return self.parts.get(part, (0, 0))[0]

    def moves_to(self, new: Layout) -> list[tuple[int, int, int]]:
        """Return ``(source, target, size)`` for every part that ``new`` keeps."""
        return [
            (source, new.parts[part][0], min(size, new.parts[part][1]))
            for part, (source, size) in self.parts.items()
            if part in new.parts
        ]


class Layouts:
    """The layouts of all tables. What members have done is kept by kind for ever, what limits counted by identity."""

    def __init__(self) -> None:
        self.once_kinds: dict[str, int] = {}
        self.streak_kinds: dict[str, int] = {}
        self.daily_kinds: dict[str, int] = {}
        self.member = Layout(MEMBER_BYTES)
        self.days = {key: Layout(HEADER_BYTES) for key in LIMIT_KEYS}
        self.windows = {key: Layout(HEADER_BYTES) for key in LIMIT_KEYS}

    def adopt(self, rulebook: Rulebook) -> None:
        """Lay out the records for ``rulebook``."""
        for rule in rulebook.earning_rules:
            for kinds, wanted in (
                (self.once_kinds, rule.once),
                (self.streak_kinds, rule.streak_days is not None),
                (self.daily_kinds, rule.max_per_day is not None),
            ):
                if wanted:
                    kinds.setdefault(rule.kind, len(kinds))
        sliding = {key: _limit_parts(rulebook, key, sliding=True) for key in LIMIT_KEYS}
        daily = {key: _limit_parts(rulebook, key, sliding=False) for key in LIMIT_KEYS}
        once = [("once", len(self.once_kinds) // 64 * 8 + 8)] if self.once_kinds else []
        streaks = [(("streak", kind), 8) for kind in self.streak_kinds]
        counts = [(("daily", kind), 8) for kind in self.daily_kinds]
        self.member = Layout(MEMBER_BYTES, [*once, *streaks, *sliding["member"]])
        self.windows = {key: Layout(HEADER_BYTES, sliding[key]) for key in LIMIT_KEYS if key != "member"}
        self.days = {key: Layout(HEADER_BYTES, daily[key]) for key in LIMIT_KEYS if key != "member"}
        self.days["member"] = Layout(HEADER_BYTES, [*counts, *daily["member"]])

    def tables(self) -> list[Layout]:
        """Return the layouts in the core's order: members, members' days, then each key's windows and days."""
        keyed = [layout for key in LIMIT_KEYS[1:] for layout in (self.windows[key], self.days[key])]
        return [self.member, self.days["member"], *keyed]

    def limit_offset(self, limit: Limit) -> int:
        """Return where the counters of ``limit`` stand in the record of its key."""
        if limit.window.duration_ms is None:
            return self.days[limit.key].offset(limit.identity)
        return (self.member if limit.key == "member" else self.windows[limit.key]).offset(limit.identity)


def _limit_parts(rulebook: Rulebook, key: str, *, sliding: bool) -> list[tuple[object, int]]:
    limits = [limit for limit in rulebook.limits if limit.key == key]
    return [
        (limit.identity, _counter_bytes(limit)) for limit in limits if (limit.window.duration_ms is not None) == sliding
    ]


def _counter_bytes(limit: Limit) -> int:
    sliding = limit.window.duration_ms is not None
    if limit.measure == "members":
        kept = limit.max + 1
        return 8 + 8 * kept + 4 * kept if sliding else 8 + 4 * kept
    if not sliding:
        return DAY_TOTAL_BYTES
    return SLIDING_EVENTS_BYTES if limit.measure == "events" else SLIDING_POINTS_BYTES


def describe(rulebook: Rulebook, layouts: Layouts) -> dict[str, Any]:
    """Return the rulebook as plain numbers, lists and masks; bit ``i`` of a campaign mask is the i-th campaign."""
    campaigns = rulebook.campaigns
    priced = rulebook.earning_rule("order_paid")
    scale = base_scale(priced) if priced else 1
    per_yuan = priced if priced and priced.points_per_yuan is not None else None

    def mask_where(condition: Callable[[Campaign], bool]) -> int:
        return sum(1 << number for number, campaign in enumerate(campaigns) if condition(campaign))

    def names_of(conditions: Iterable[frozenset[str] | None]) -> list[str]:
        return sorted({name for condition in conditions for name in condition or ()})

    def masks_by_name(names: list[str], condition: Callable[[Campaign], frozenset[str] | None]) -> list[int]:
        """Return a mask for each name, and a last one for the names that no campaign has."""
        rows = []
        for name in (*names, None):
            allowed = [conditions is None or name in conditions for conditions in map(condition, campaigns)]
            rows.append(sum(1 << number for number, holds in enumerate(allowed) if holds))
        return rows

    cities = names_of(campaign.cities for campaign in campaigns)
    tiers = names_of(campaign.tiers for campaign in campaigns)
    tags = names_of(campaign.tags for campaign in campaigns)
    return {
        "earning": [_describe_rule(rulebook, rule, layouts) for rule in rulebook.earning_rules],
        "kinds": [*(rule.kind for rule in rulebook.earning_rules), *BUILT_IN_KIND_ORDER],
        "category_weights": {}
        if per_yuan is None
        else {category: int(per_yuan.line_rate(category) * scale) for category in per_yuan.category_rates},
        "blank_weight": int(per_yuan.line_rate("") * scale) if per_yuan else 0,
        "limits": [_describe_limit(limit, layouts) for limit in rulebook.limits],
        "key_windows": [bool(_limit_parts(rulebook, key, sliding=True)) for key in LIMIT_KEYS],
        "key_days": [bool(_limit_parts(rulebook, key, sliding=False)) for key in LIMIT_KEYS],
        "campaigns": [
            {
                "days_of_month": sum(1 << day for day in campaign.days_of_month or ()),
                "weekdays": sum(1 << day for day in campaign.weekdays or ()),
                "from_day": -ALWAYS_DAY if campaign.from_day is None else campaign.from_day,
                "until_day": ALWAYS_DAY if campaign.until_day is None else campaign.until_day,
                "percent": -1 if campaign.percent is None else campaign.percent,
                "crc": zlib.crc32(f"{campaign.id}:".encode()),
            }
            for campaign in campaigns
        ],
        "cities": cities,
        "city_masks": masks_by_name(cities, lambda campaign: campaign.cities),
        "tiers": tiers,
        "tier_masks": masks_by_name(tiers, lambda campaign: campaign.tiers),
        "tags": tags,
        "tag_masks": masks_by_name(tags, lambda campaign: campaign.tags or frozenset())[:-1],
        "untagged": mask_where(lambda campaign: campaign.tags is None),
        "carded": mask_where(lambda campaign: campaign.card),
        "drawn": mask_where(lambda campaign: campaign.percent is not None),
        "minute_masks": [
            sum(1 << number for number, campaign in enumerate(campaigns) if campaign.at_minute(minute))
            for minute in range(MINUTES)
        ],
        "transitions": rulebook.calendar.transitions(),
    }


def _describe_rule(rulebook: Rulebook, rule: EarningRule, layouts: Layouts) -> dict[str, Any]:
    scale = base_scale(rule)
    applying = [(number, limit) for number, limit in enumerate(rulebook.limits) if limit.applies_to(rule.kind)]
    once = layouts.once_kinds.get(rule.kind, 0)
    return {
        "per_yuan": rule.points_per_yuan is not None,
        "once": rule.once,
        "points": rule.points,
        "streak_bonus": rule.streak_bonus,
        "min_amount_fen": rule.min_amount_fen,
        "streak_days": rule.streak_days or 0,
        "max_per_day": rule.max_per_day or 0,
        "scale": scale,
        "weight": 0 if rule.points_per_yuan is None else int(rule.points_per_yuan / 100 * scale),
        "once_offset": layouts.member.offset("once") + once // 64 * 8,
        "once_bit": once % 64,
        "streak_offset": layouts.member.offset(("streak", rule.kind)),
        "daily_offset": layouts.days["member"].offset(("daily", rule.kind)),
        "campaigns": sum(
            1 << number for number, campaign in enumerate(rulebook.campaigns) if rule.kind in campaign.kinds
        ),
        "counting_limits": sum(1 << number for number, limit in applying if limit.measure != "points"),
        "points_limits": sum(1 << number for number, limit in applying if limit.measure == "points"),
    }


def _describe_limit(limit: Limit, layouts: Layouts) -> dict[str, Any]:
    return {
        "key": LIMIT_KEYS.index(limit.key),
        "measure": MEASURES.index(limit.measure),
        "action": ACTIONS.index(limit.action),
        "max": limit.max,
        "duration_ms": limit.window.duration_ms or 0,
        "offset": layouts.limit_offset(limit),
        "kept": limit.max + 1 if limit.measure == "members" else 0,
    }
