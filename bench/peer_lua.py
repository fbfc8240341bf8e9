"""The peer: a worker as a good team writes it first, with redis-py (hiredis) and one Lua call per event.

A consumer group brings some hundred entries at a time. Python decodes them, works out base points and those campaigns
that need no stored state, and names the counters; one script per event (peer.lua), a whole group of them pipelined in
one round trip, claims the id with ``SET NX``, checks and counts the limits, adds the points to the member's balance and
writes the ledger entry. ``XACK`` follows once per group. It is competent, atomic per event, and does the same job on
the same rulebook, with the usual simplifications: windows are fixed instead of sliding, multipliers are floating-point
numbers, and nothing chains the ledger or keeps what a refund needs.

::

    python -m bench.peer_lua --redis redis://localhost:6379 --partition p --rulebook bench/rulebook.toml

prints ``{"events": ..., "seconds": ..., "outcomes": {...}}``; the time goes from the first read to the last ``XACK``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import redis

from accrual.rulebook import Campaign, EarningRule, Limit, Rulebook, load
from accrual.stream import Keys

__all__ = ["PeerWorker", "main"]

GROUP: Final = "accrual"
CONSUMER: Final = "worker-1"
READ_ENTRIES: Final = 500
SCRIPT: Final = Path(__file__).with_name("peer.lua")
DAY_S: Final = 86_400
COMPACT_ITEMS: Final = 13

decode: Final = msgspec.msgpack.Decoder(list).decode


class PeerWorker:
    """One consumer of one partition. ``drain`` runs until nothing is left to read."""

    def __init__(self, client: redis.Redis, partition: str, rulebook: Rulebook) -> None:
        self._client: Any = client
        self._prefix = f"accrual:{{{partition}}}:peer"
        self._events = Keys(partition).events
        self._rules = {rule.kind: rule for rule in rulebook.earning_rules}
        self._limits = {
            kind: [(number, limit) for number, limit in enumerate(rulebook.limits, start=1) if limit.applies_to(kind)]
            for kind in self._rules
        }
        self._campaigns = [campaign for campaign in rulebook.campaigns if not _needs_member(campaign)]
        self._calendar = rulebook.calendar
        self._script = client.script_load(script_of(rulebook))
        self.outcomes: Counter[str] = Counter()

    def drain(self) -> int:
        """Decide everything that is in the stream and return how many events that were."""
        self._client.xgroup_create(self._events, GROUP, id="0")
        events = 0
        while reply := self._client.xreadgroup(GROUP, CONSUMER, {self._events: ">"}, count=READ_ENTRIES):
            ((_, entries),) = reply
            self._decide(entries)
            events += len(entries)
        return events

    def _decide(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for entry_id, fields in entries:
            self._send(pipeline, int(entry_id.partition(b"-")[0]), decode(fields[b"e"]))
        self.outcomes.update(_text(outcome) for outcome in pipeline.execute())
        self._client.xack(self._events, GROUP, *(entry_id for entry_id, _ in entries))

    def _send(self, pipeline: Any, arrival_ms: int, event: list[Any]) -> None:
        event += [None] * (COMPACT_ITEMS - len(event))
        event_id, kind, member, ts, amount, _, device, ip, phone, city, lines, tags, attributes = event
        rule = self._rules.get(kind)
        if kind == "member_updated":
            pipeline.hset(f"{self._prefix}:member:{member}", mapping={"tier": attributes["tier"], "card": attributes["card_until"]})
            return
        if rule is None:
            pipeline.xadd(f"{self._prefix}:deferred", {"event": event_id, "kind": kind, "member": member})
            return
        time_ms = min(ts, arrival_ms)
        day = self._calendar.day(time_ms)
        base = _base(rule, amount, lines)
        points = base
        for campaign in self._campaigns:
            if kind in campaign.kinds and self._matches(campaign, day, time_ms, member, city, tags):
                points *= float(campaign.multiplier)
        values = {"member": member, "device": device, "ip": ip, "phone": phone}
        keys = [f"{self._prefix}:id:{event_id}", f"{self._prefix}:member:{member}", f"{self._prefix}:ledger"]
        numbers = []
        for number, limit in self._limits[kind]:
            if value := values[limit.key]:
                window = day if limit.window.duration_ms is None else time_ms // limit.window.duration_ms
                keys.append(f"{self._prefix}:limit:{number}:{value}:{window}")
                numbers.append(number)
        pipeline.evalsha(
            *(self._script, len(keys), *keys, event_id, member, kind, time_ms, int(base), points),
            *(rule.max_per_day or "", "1" if rule.once else "", rule.streak_days or "", rule.streak_bonus, day),
            *numbers,
        )

    def _matches(
        self, campaign: Campaign, day: int, time_ms: int, member: str, city: str | None, tags: Sequence[str] | None
    ) -> bool:
        return (
            campaign.on_day(day)
            and campaign.at_minute(self._calendar.minute(time_ms))
            and (campaign.cities is None or city in campaign.cities)
            and (campaign.tags is None or not campaign.tags.isdisjoint(tags or ()))
            and campaign.draws(member)
        )


def script_of(rulebook: Rulebook) -> str:
    """Return the script with the rulebook's tables in front, as Lua source."""
    limits = ", ".join(map(_lua_limit, rulebook.limits))
    campaigns = ", ".join(_lua_campaign(campaign) for campaign in rulebook.campaigns if _needs_member(campaign))
    tables = f"local LIMITS = {{ {limits} }}\nlocal CAMPAIGNS = {{ {campaigns} }}\n"
    return tables + SCRIPT.read_text(encoding="utf-8")


def _lua_limit(limit: Limit) -> str:
    # A counter must outlive its window, and no more.
    duration_ms = limit.window.duration_ms
    expiry_s = 2 * DAY_S if duration_ms is None else 2 * duration_ms // 1000
    return (
        f"{{ id = '{limit.id}', measure = '{limit.measure}', max = {limit.max}, action = '{limit.action}', "
        f"expiry = {expiry_s} }}"
    )


def _lua_campaign(campaign: Campaign) -> str:
    def names(values: Sequence[str]) -> str:
        return "{ " + ", ".join(f"['{value}'] = true" for value in values) + " }"

    tiers = f"tiers = {names(sorted(campaign.tiers))}, " if campaign.tiers else ""
    card = "card = true, " if campaign.card else ""
    return f"{{ kinds = {names(campaign.kinds)}, {tiers}{card}multiplier = {float(campaign.multiplier)} }}"


def _needs_member(campaign: Campaign) -> bool:
    return campaign.card or campaign.tiers is not None


def _base(rule: EarningRule, amount: int | None, lines: list[tuple[str, int]] | None) -> float:
    if rule.points_per_yuan is None:
        return rule.points
    if amount is None or amount < rule.min_amount_fen:
        return 0
    return float(sum(fen * rule.line_rate(category) for category, fen in lines or [("", amount)]))


def _text(reply: object) -> str:
    """Return the outcome that a script has answered; other commands of the pipeline answer numbers or entry IDs."""
    if isinstance(reply, bytes):
        return "deferred" if b"-" in reply else reply.decode()
    return "applied"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the peer from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peer_lua", description="drain a stream with redis-py and Lua")
    parser.add_argument("--redis", required=True, metavar="URL")
    parser.add_argument("--partition", required=True, metavar="P")
    parser.add_argument("--rulebook", required=True, metavar="FILE")
    parsed = parser.parse_args(arguments)
    with redis.Redis.from_url(parsed.redis, protocol=2) as client:
        worker = PeerWorker(client, parsed.partition, load(parsed.rulebook))
        started = time.perf_counter()
        events = worker.drain()
        seconds = time.perf_counter() - started
    json.dump({"events": events, "seconds": seconds, "outcomes": worker.outcomes}, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
