"""From a rulebook to the flat description that the compiled core loads, and the layout of its records."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Final

from accrual.events import BUILT_IN_KINDS, LIMIT_KEYS, ORDER_KIND
from accrual.rulebook import Campaign, EarningRule, Limit, Rulebook
from accrual.rulebook.bounds import base_scale

__all__ = ["Layout", "Layouts", "describe"]

MEASURES: Final = ("events", "members", "points")
ACTIONS: Final = ("reject", "hold", "freeze", "clamp")
HEADER_BYTES: Final = 24
# What a record has before anything that a rulebook asks for; a member's also says who it is.
FIXED_BYTES: Final = dict.fromkeys(LIMIT_KEYS, HEADER_BYTES) | {"member": 64}
MINUTES: Final = 1440
ALWAYS_DAY: Final = 2**31 - 1
TIME_SLACK_BITS: Final = 64 - 53

# Bytes of a limit's counters in the record of its key. A sliding total has its latest bucket index and eight buckets.
SLIDING_EVENTS_BYTES: Final = 8 + 8 * 4
SLIDING_POINTS_BYTES: Final = 8 + 8 * 8
DAY_TOTAL_BYTES: Final = 8
# A record of such a multiple of bytes reaches into no more cache lines than it has to.
RECORD_BYTES: Final = 32
MARK_BYTES: Final = 8


def _round_up(size: int, multiple: int = 8) -> int:
    return -(-size // multiple) * multiple


class Layout:
    """Where each part of a table's records stands: part to ``(offset, size)``, in bytes."""

    def __init__(self, start: int, parts: Iterable[tuple[object, int]] = ()) -> None:
        self.parts: dict[object, tuple[int, int]] = {"fixed": (0, start)}
        self.size = start
        for part, size in parts:
            self.parts[part] = (self.size, size)
            self.size += _round_up(size)

    @property
    def stride(self) -> int:
        """The bytes from one record to the next."""
        return _round_up(self.size, RECORD_BYTES)

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
    """The layouts of all tables. What members have done is kept by kind for ever, what limits counted by identity.

    A record has two slots of a day, for even and odd days; a slot starts with a mark that says which day it holds. A
    spilled record is one slot behind a header.
    """

    def __init__(self) -> None:
        self.once_kinds: dict[str, int] = {}
        self.streak_kinds: dict[str, int] = {}
        self.daily_kinds: dict[str, int] = {}
        self.records = {key: Layout(FIXED_BYTES[key]) for key in LIMIT_KEYS}
        self.slots = {key: Layout(0) for key in LIMIT_KEYS}
        self.spilled = {key: Layout(HEADER_BYTES) for key in LIMIT_KEYS}

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
        once = [("once", len(self.once_kinds) // 64 * 8 + 8)] if self.once_kinds else []
        streaks = [(("streak", kind), 8) for kind in self.streak_kinds]
        counts = [(("daily", kind), 8) for kind in self.daily_kinds]
        for key in LIMIT_KEYS:
            daily = [*(counts if key == "member" else ()), *_limit_parts(rulebook, key, sliding=False)]
            slot = [("mark", MARK_BYTES), *daily] if daily else []
            slots = [((number, part), size) for number in range(2) for part, size in slot]
            kept = [*once, *streaks] if key == "member" else []
            self.records[key] = Layout(FIXED_BYTES[key], [*kept, *_limit_parts(rulebook, key, sliding=True), *slots])
            self.slots[key] = Layout(0, slot)
            self.spilled[key] = Layout(HEADER_BYTES, slot)

    def description(self) -> dict[str, Any]:
        """Return what ``resume`` needs, and a digest of where everything stands."""
        parts = [sorted((repr(part), *place) for part, place in layout.parts.items()) for layout in self.tables()]
        return {
            "once_kinds": list(self.once_kinds),
            "streak_kinds": list(self.streak_kinds),
            "daily_kinds": list(self.daily_kinds),
            "digest": hashlib.sha256(repr(parts).encode()).hexdigest(),
        }

    def resume(self, description: dict[str, Any], rulebook: Rulebook) -> None:
        """Lay out the records as they were under ``rulebook`` when ``description`` was made."""
        for kinds, names in (
            (self.once_kinds, description["once_kinds"]),
            (self.streak_kinds, description["streak_kinds"]),
            (self.daily_kinds, description["daily_kinds"]),
        ):
            kinds.clear()
            kinds.update({name: number for number, name in enumerate(names)})
        self.adopt(rulebook)

    def tables(self) -> list[Layout]:
        """Return the layouts in the core's order: the records of each key, then its spilled days."""
        return [*self.records.values(), *self.spilled.values()]

    def limit_offset(self, limit: Limit) -> int:
        """Return where the counters of ``limit`` stand in the record of its key, or in its slot of the day."""
        return (self.slots if limit.window.duration_ms is None else self.records)[limit.key].offset(limit.identity)


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
    priced = rulebook.earning_rule(ORDER_KIND)
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
        "kinds": [*(rule.kind for rule in rulebook.earning_rules), *BUILT_IN_KINDS],
        "category_weights": {}
        if per_yuan is None
        else {category: int(per_yuan.line_rate(category) * scale) for category in per_yuan.category_rates},
        "blank_weight": int(per_yuan.line_rate("") * scale) if per_yuan else 0,
        "day_offsets": [[layouts.records[key].offset((parity, "mark")) for key in LIMIT_KEYS] for parity in range(2)],
        "day_bytes": [layouts.slots[key].size for key in LIMIT_KEYS],
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
    keys = {limit.key for _, limit in applying}
    daily_keys = {limit.key for _, limit in applying if limit.window.duration_ms is None}
    if rule.max_per_day is not None:
        daily_keys.add("member")
    counting = [(number, limit) for number, limit in applying if limit.measure != "points"]
    pointing = [(number, limit) for number, limit in applying if limit.measure == "points"]
    pointing.sort(key=lambda numbered: numbered[1].action != "clamp")
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
        "once_offset": layouts.records["member"].offset("once") + once // 64 * 8,
        "once_bit": once % 64,
        "streak_offset": layouts.records["member"].offset(("streak", rule.kind)),
        "daily_offset": layouts.slots["member"].offset(("daily", rule.kind)),
        "keys": _mask_of(keys | {"member"}),
        "daily_keys": _mask_of(daily_keys),
        "campaigns": sum(
            1 << number for number, campaign in enumerate(rulebook.campaigns) if rule.kind in campaign.kinds
        ),
        "counting": [_describe_limit(number, limit, layouts) for number, limit in counting],
        "pointing": [_describe_limit(number, limit, layouts) for number, limit in pointing],
    }


def _mask_of(keys: Iterable[str]) -> int:
    return sum(1 << LIMIT_KEYS.index(key) for key in keys)


def _describe_limit(number: int, limit: Limit, layouts: Layouts) -> dict[str, Any]:
    key = LIMIT_KEYS.index(limit.key)
    daily = limit.window.duration_ms is None
    factor, shift = (0, 0) if daily else _division_by(limit.window.bucket_ms)
    return {
        "number": number,
        "place": key + len(LIMIT_KEYS) if daily else key,
        "measure": MEASURES.index(limit.measure),
        "action": ACTIONS.index(limit.action),
        "max": limit.max,
        "duration_ms": limit.window.duration_ms or 0,
        "bucket_factor": factor,
        "bucket_shift": shift,
        "offset": layouts.limit_offset(limit),
        "kept": limit.max + 1 if limit.measure == "members" else 0,
    }


def _division_by(divisor: int) -> tuple[int, int]:
    """Return the ``(factor, shift)`` by which the core divides times: ``t // divisor == t * factor >> 64 + shift``.

    With 2^shift not below the divisor over 2^11, the factor is exact enough for every ``t`` below 2^53.
    """
    shift = max(0, (divisor - 1).bit_length() - TIME_SLACK_BITS)
    return -(-(1 << (64 + shift)) // divisor), shift
