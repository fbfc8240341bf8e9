"""The reference engine: SPEC section 4 in plain Python, step by step. Slow, obvious, and never chosen silently.

The compiled engine must agree with it to the byte, so this file is written to be read beside the specification.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import msgspec

from accrual.engine.batch import PlainBatch, items_of_entry
from accrual.engine.counters import (
    CounterKey,
    DayMembers,
    DayTotal,
    SlidingMembers,
    SlidingTotal,
    When,
    members_counter,
    saturated,
    total_counter,
)
from accrual.errors import InvalidEvent
from accrual.events import CONTROL_KINDS, REFUND_KIND, Event, StreamEntry, encode_compact
from accrual.outcomes import NO_SECRET, DeadLetter, Decision, Duplicate, Entry, Position, Secret, mask
from accrual.rulebook import Campaign, EarningRule, Limit, Rulebook, combined_multiplier

__all__ = ["FUTURE_TOLERANCE_MS", "OFFLINE_SLACK_DAYS", "STREAM_SLACK_DAYS", "ReferenceEngine"]

FUTURE_TOLERANCE_MS: Final = 600_000
OFFLINE_SLACK_DAYS: Final = 31
STREAM_SLACK_DAYS: Final = 1

TotalCounter = SlidingTotal | DayTotal
MembersCounter = SlidingMembers | DayMembers


class Member:
    """What the engine knows of one member. ``state`` is active, frozen or blocked; times are in ms."""

    def __init__(self) -> None:
        self.state = "active"
        self.tier = ""
        self.card_until = 0
        self.immune_until = 0
        self.once: set[str] = set()
        self.daily: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.streaks: dict[str, Streak] = {}


class Streak(msgspec.Struct, frozen=True):
    """A run of consecutive business days, ``last_day`` being the latest of them."""

    last_day: int
    run: int

    def reached(self, day: int) -> Streak:
        """Return the streak as an event on ``day`` leaves it."""
        if day <= self.last_day:
            return self
        return Streak(day, self.run + 1 if day == self.last_day + 1 else 1)


class Tripped:
    """The limits that an event tripped, and what each observed."""

    def __init__(self) -> None:
        self.observed: dict[str, int] = {}
        self.actions: set[str] = set()

    def note(self, limit: Limit, observed: int) -> None:
        self.observed[limit.id] = observed
        self.actions.add(limit.action)

    def evidence(self, rulebook: Rulebook) -> tuple[tuple[str, int], ...]:
        """Return ``(limit id, observed)`` pairs in rulebook order."""
        return tuple((limit.id, self.observed[limit.id]) for limit in rulebook.limits if limit.id in self.observed)


def matches(campaign: Campaign, event: Event, member: Member, when: When) -> bool:
    """Tell whether every condition of ``campaign`` holds."""
    return (
        event.kind in campaign.kinds
        and campaign.on_day(when.day)
        and campaign.at_minute(when.minute)
        and (campaign.cities is None or event.city in campaign.cities)
        and (campaign.tiers is None or member.tier in campaign.tiers)
        and (not campaign.card or when.time_ms < member.card_until)
        and (campaign.tags is None or not campaign.tags.isdisjoint(event.tags))
        and campaign.draws(event.member)
    )


class ReferenceEngine:
    """A deterministic state machine over events: no I/O, no clock, no randomness.

    ``secret`` keys the fingerprints that entries carry; it takes no part in any decision. Ids, daily totals and windows
    are kept ``slack_days`` longer than the day of arrival and the next one. One day is what the vectors need, and what
    keeps an event whose tolerated future ``ts`` lies past midnight from counting twice. From ``OFFLINE_SLACK_DAYS`` on
    arrivals may go back in time, by any number of days: then nothing is forgotten before ``reclaim`` says so.
    """

    def __init__(self, rulebook: Rulebook, secret: Secret = NO_SECRET, slack_days: int = OFFLINE_SLACK_DAYS) -> None:
        self.secret = secret
        self.slack_days = slack_days
        self.members: defaultdict[str, Member] = defaultdict(Member)
        self.decided: dict[str, tuple[Event, int]] = {}
        self.latest_arrival_day = 0
        self.totals: dict[CounterKey, TotalCounter] = {}
        self.sights: dict[CounterKey, MembersCounter] = {}
        # The latest business day on which limits counted by a device, IP or phone.
        self.last_days: dict[tuple[str, str], int] = {}
        self.rulebook = rulebook
        self.adopt(rulebook)

    def adopt(self, rulebook: Rulebook) -> None:
        """Decide by ``rulebook`` from now on.

        Limits whose ``identity`` is unchanged keep their counts, others start empty; what members have done (streaks,
        daily counts, once marks) is kept by kind. Raises ``RulebookError`` where it may not follow the one in force.
        """
        self.rulebook.check_successor(rulebook)
        self.rulebook = rulebook
        self.calendar = rulebook.calendar
        kept = {limit.identity for limit in rulebook.limits}
        self.totals = {key: counter for key, counter in self.totals.items() if key[0] in kept}
        self.sights = {key: counter for key, counter in self.sights.items() if key[0] in kept}

    @property
    def memory_bytes(self) -> int:
        """Return 0: what Python objects take is not known."""
        return 0

    def headroom_bytes(self, events: int, *, imaging: bool = False) -> int:  # noqa: ARG002 - nobody counts it
        """Return 0, like ``memory_bytes``."""
        return 0

    def adoption_bytes(self, rulebook: Rulebook) -> int:  # noqa: ARG002 - nor this
        """Return 0, like ``memory_bytes``."""
        return 0

    def reclaim(self, day: int) -> None:
        """Drop what no event that arrives on the business day ``day`` or later can need."""
        first_day = day - 1 - self.slack_days
        self.decided = {name: kept for name, kept in self.decided.items() if kept[1] >= first_day}
        for member in self.members.values():
            for key in [key for key in member.daily if key[1] < first_day]:
                del member.daily[key]
        self.totals = {key: kept for key, kept in self.totals.items() if self._is_needed(key, kept, first_day)}
        self.sights = {key: kept for key, kept in self.sights.items() if self._is_needed(key, kept, first_day)}
        for place in [place for place, last_day in self.last_days.items() if last_day < first_day - 1]:
            del self.last_days[place]

    def _reach(self, arrival_day: int) -> None:
        """Drop, once a business day of a stream, what no later event can ask for."""
        if arrival_day > self.latest_arrival_day and self.slack_days < OFFLINE_SLACK_DAYS:
            self.latest_arrival_day = arrival_day
            self.reclaim(arrival_day)

    def _is_needed(self, key: CounterKey, counter: TotalCounter | MembersCounter, first_day: int) -> bool:
        """Tell whether events from ``first_day`` on can see a counter, and drop the days of it that they cannot.

        A window is at most a day long. Those by member stay, like all that is known of members.
        """
        if isinstance(counter, DayTotal | DayMembers):
            return counter.forget_before(first_day)
        (_, key_name, *_), value = key
        return key_name == "member" or self.last_days[key_name, value] >= first_day - 1

    def decide_entries(self, entries: Sequence[StreamEntry]) -> PlainBatch:
        """Decide every event of ``entries``, in order. The entries must not be empty."""
        batch = PlainBatch(self.rulebook, entries[-1][:2], len(entries))
        for entry in entries:
            try:
                items = items_of_entry(entry)
            except InvalidEvent as error:
                batch.add(Position(entry.ms, entry.seq), DeadLetter(None, "invalid", str(error)), entry.fields)
                continue
            for item in items:
                decision: Decision
                try:
                    decision = self.decide(item.event(), entry.ms)
                except InvalidEvent as error:
                    decision = DeadLetter(None, "invalid", str(error))
                batch.add(Position(entry.ms, entry.seq, item.index), decision, item.original)
        return batch

    def decide(self, event: Event, arrival_ms: int) -> Decision:
        """Decide a valid ``event`` that arrived at ``arrival_ms``: steps 2 to 12."""
        day, arrival_day = self.calendar.day(min(event.ts, arrival_ms)), self.calendar.day(arrival_ms)
        self._reach(arrival_day)
        earlier = self._remembered(event.id, arrival_day)
        if earlier is not None:
            if earlier == event:
                return Duplicate(event.id)
            return DeadLetter(event.id, "id_conflict", f"id: {event.id!r} was already decided with other content")
        rule = self.rulebook.earning_rule(event.kind)
        if rule is None and event.kind not in CONTROL_KINDS and event.kind != REFUND_KIND:
            return DeadLetter(event.id, "unknown_kind", f"kind: there is no earning rule for {event.kind!r}")
        if event.ts > arrival_ms + FUTURE_TOLERANCE_MS:
            ahead_ms = event.ts - arrival_ms
            return DeadLetter(event.id, "ts_in_future", f"ts: {ahead_ms} ms after the event's arrival at {arrival_ms}")
        decision = self._decide_new(event, rule, arrival_ms, day, arrival_day)
        if isinstance(decision, Entry):
            self.decided[event.id] = (event, arrival_day)
        return decision

    def _remembered(self, event_id: str, arrival_day: int) -> Event | None:
        earlier = self.decided.get(event_id)
        if earlier is None or arrival_day > earlier[1] + 1 + self.slack_days:
            return None
        return earlier[0]

    def _decide_new(
        self, event: Event, rule: EarningRule | None, arrival_ms: int, day: int, arrival_day: int
    ) -> Entry | DeadLetter:
        late = day < arrival_day - 1
        if event.kind in CONTROL_KINDS:
            if late:
                days = arrival_day - day
                detail = f"ts: {days} business days before the event's arrival at {arrival_ms}"
                return DeadLetter(event.id, "stale_control", detail)
            self._control(event)
            return self._entry(event, "applied", day)
        if rule is None:
            return self._entry(event, "deferred", day, cause="refund", payload=self._payload(event))
        if late:
            return self._entry(event, "deferred", day, cause="late", payload=self._payload(event))
        return self._accrue(event, rule, self._when(event, arrival_ms))

    def _control(self, event: Event) -> None:
        member = self.members[event.member]
        if event.kind == "member_updated":
            member.tier = event.tier or member.tier
            member.card_until = event.card_until or member.card_until
        elif event.kind == "member_frozen":
            if member.state != "blocked":
                member.state = "frozen"
        elif event.kind == "member_released":
            member.state = "active"
            member.immune_until = event.immune_until or 0
        else:
            member.state = "blocked"

    def _when(self, event: Event, arrival_ms: int) -> When:
        time_ms = min(event.ts, arrival_ms)
        return When(time_ms, *self.calendar.local(time_ms))

    def _accrue(self, event: Event, rule: EarningRule, when: When) -> Entry:
        """Take steps 8 to 12."""
        member = self.members[event.member]
        cause = self._refusal(member, rule, when.day)
        if cause:
            return self._entry(event, "rejected", when.day, cause=cause)

        frozen_before = member.state == "frozen"
        streak = self._streak(member, rule, when.day)
        base_exact = self._base(event, rule, member, streak)
        campaigns = [campaign for campaign in self.rulebook.campaigns if matches(campaign, event, member, when)]
        multiplier = combined_multiplier(self.rulebook.stacking, [campaign.multiplier for campaign in campaigns])
        uncapped = math.floor(base_exact * multiplier)

        tripped = Tripped()
        limits = self._limits(event, when)
        self._count(event, limits, when, tripped)
        points = uncapped
        if "reject" not in tripped.actions:
            points = self._test_points(event, limits, when, uncapped, tripped)

        immune = when.time_ms < member.immune_until
        if "freeze" in tripped.actions and not immune:
            member.state = "frozen"
        if "reject" in tripped.actions:
            outcome, points = "rejected", 0
        else:
            self._keep(event, rule, limits, member, streak, when, points)
            held = member.state == "frozen" or ("hold" in tripped.actions and not immune)
            outcome = "held" if held else "granted"
        return self._entry(
            event,
            outcome,
            when.day,
            base=math.floor(base_exact),
            uncapped=uncapped,
            points=points,
            campaigns=tuple(campaign.id for campaign in campaigns),
            frozen_before=frozen_before,
            evidence=tripped.evidence(self.rulebook),
        )

    def _limits(self, event: Event, when: When) -> list[Limit]:
        """Return the limits that ``event`` is subject to, and take note of the day on which their keys were seen."""
        limits = [limit for limit in self.rulebook.limits if limit.applies_to(event.kind) and getattr(event, limit.key)]
        for place in {(limit.key, getattr(event, limit.key)) for limit in limits if limit.key != "member"}:
            self.last_days[place] = max(self.last_days.get(place, when.day), when.day)
        return limits

    def _refusal(self, member: Member, rule: EarningRule, day: int) -> str:
        """Step 8: return the reason of an early rejection, or an empty string."""
        if member.state == "blocked":
            return "member_blocked"
        if rule.once and rule.kind in member.once:
            return "once"
        if rule.max_per_day is not None and member.daily.get((rule.kind, day), 0) >= rule.max_per_day:
            return "max_per_day"
        return ""

    def _streak(self, member: Member, rule: EarningRule, day: int) -> Streak | None:
        """Return the rule's streak as an event on ``day`` leaves it; ``None`` where the rule has none."""
        if rule.streak_days is None:
            return None
        return member.streaks.get(rule.kind, Streak(day - 1, 0)).reached(day)

    def _base(self, event: Event, rule: EarningRule, member: Member, streak: Streak | None) -> Fraction:
        """Step 9: return ``base_exact``."""
        if rule.points_per_yuan is None:
            grown = streak is not None and streak != member.streaks.get(rule.kind)
            bonus = streak is not None and rule.streak_days is not None and grown and streak.run % rule.streak_days == 0
            return Fraction(rule.points + (rule.streak_bonus if bonus else 0))
        assert event.amount is not None
        if event.amount < rule.min_amount_fen:
            return Fraction(0)
        lines = event.lines or (("", event.amount),)
        return sum((amount * rule.line_rate(category) for category, amount in lines), Fraction(0))

    def _count(self, event: Event, limits: list[Limit], when: When, tripped: Tripped) -> None:
        """Step 10: count the event on every limit on events or members, tripped or not."""
        for limit in limits:
            if limit.measure == "points":
                continue
            key = (limit.identity, getattr(event, limit.key))
            if limit.measure == "events":
                observed = self._total(limit, event).add(when, 1)
            else:
                counter = self.sights.get(key)
                if counter is None:
                    counter = self.sights[key] = members_counter(limit)
                observed = counter.see(event.member, when)
            if observed > limit.max:
                tripped.note(limit, observed)

    def _test_points(self, event: Event, limits: list[Limit], when: When, uncapped: int, tripped: Tripped) -> int:
        """Step 11: return what the limits on points leave of ``uncapped``. Clamps come first."""
        points = uncapped
        on_points = [limit for limit in limits if limit.measure == "points"]
        for limit in sorted(on_points, key=lambda limit: limit.action != "clamp"):
            used = self._total(limit, event).read(when)
            observed = saturated(used + points)
            if observed > limit.max:
                tripped.note(limit, observed)
                if limit.action == "clamp":
                    points = max(0, limit.max - used)
        return points

    def _keep(
        self,
        event: Event,
        rule: EarningRule,
        limits: list[Limit],
        member: Member,
        streak: Streak | None,
        when: When,
        points: int,
    ) -> None:
        """Step 12: keep what an event that was not rejected leaves behind."""
        for limit in limits:
            if limit.measure == "points":
                self._total(limit, event).add(when, points)
        if rule.max_per_day is not None:
            member.daily[rule.kind, when.day] += 1
        if rule.once:
            member.once.add(rule.kind)
        if streak is not None:
            member.streaks[rule.kind] = streak

    def _total(self, limit: Limit, event: Event) -> TotalCounter:
        key = (limit.identity, getattr(event, limit.key))
        counter = self.totals.get(key)
        if counter is None:
            counter = self.totals[key] = total_counter(limit)
        return counter

    def _payload(self, event: Event) -> bytes:
        """Return the whole event but for the raw device, IP and phone, whose fingerprints the entry carries."""
        return encode_compact(msgspec.structs.replace(event, device="", ip="", phone=""))

    def _entry(self, event: Event, outcome: str, day: int, **fields: object) -> Entry:
        keys = (("device", event.device), ("ip", event.ip), ("phone", event.phone))
        fingerprints = tuple(self.secret.fingerprint(name, text) for name, text in keys)
        masked = tuple(mask(name, text) for name, text in keys) if fields.get("evidence") else ("", "", "")
        return msgspec.convert(
            {
                "event": event.id,
                "kind": event.kind,
                "member": event.member,
                "outcome": outcome,
                "ts": event.ts,
                "day": day,
                "amount": event.amount,
                "order": event.order,
                "fingerprints": fingerprints,
                "masked": masked,
                **fields,
            },
            Entry,
        )
