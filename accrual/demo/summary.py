"""What became of the member day: read from the ledger, counted by column, and held against what was planted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray

from accrual.demo.memberday import Truth
from accrual.errors import LedgerError
from accrual.ledger import Chain, EntriesBatch, LedgerReader
from accrual.outcomes import CAUSES, OUTCOMES
from accrual.rulebook import Rulebook
from accrual.stream import Checkpoint, Keys, checkpoint_of, last_letter, read_letters

__all__ = ["Frozen", "Proof", "Summary", "summarise"]

PARTS: Final = ("entries", "duplicates", "dead letters")

Integers = NDArray[np.int64]


class Frozen(msgspec.Struct, frozen=True):
    """A member whom an event froze: which limit, what was observed, and the masked forms that a reviewer sees."""

    member: str
    limit: str
    observed: int
    ts_ms: int
    device_masked: str
    phone_masked: str


class Proof(msgspec.Struct, frozen=True):
    """Something that must hold, in words, and whether it does."""

    claim: str
    holds: bool


@dataclass(kw_only=True)
class Summary:
    """The ledger in figures. Points are those of entries with that outcome, groups those of ``Truth.abusers``."""

    truth: Truth
    checkpoint: Checkpoint
    stream_entries: int
    """Entries of the events stream."""
    dead_letters: Counter[str]
    """Dead letters by reason."""
    events: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Entries by (kind, outcome)."""
    points: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Points by (kind, outcome)."""
    deferred: Counter[str] = field(default_factory=Counter)
    """Deferred entries by cause."""
    clamped_points: int = 0
    """Points that limits with the action ``clamp`` took away from granted and held entries."""
    limit_events: Counter[str] = field(default_factory=Counter)
    """Entries that tripped a limit, by limit."""
    limit_members: dict[str, set[str]] = field(default_factory=dict)
    """Members who tripped it."""
    campaign_events: Counter[str] = field(default_factory=Counter)
    """Granted and held entries that a campaign applied to."""
    campaign_points: Counter[str] = field(default_factory=Counter)
    """The points of those entries, all of them: with several campaigns, each has the whole."""
    group_points: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Points by (group of abusers, outcome)."""
    frozen: list[Frozen] = field(default_factory=list)
    """The members who became frozen, in the order of events."""
    entries: int = 0
    duplicates: int = 0
    dead_lettered: int = 0
    """Entries, duplicates and dead letters, as the ledger's batches count them."""
    ledger_fault: str = ""
    """What is wrong with the ledger, empty where it was verified to its end."""

    def of_outcome(self, counts: Counter[tuple[str, str]], outcome: str) -> int:
        """Return the sum of ``counts`` over everything with ``outcome``."""
        return sum(count for (_, found), count in counts.items() if found == outcome)

    @property
    def noticed(self) -> frozenset[str]:
        """The members who tripped any limit."""
        return frozenset().union(*self.limit_members.values())

    @property
    def lookalikes(self) -> frozenset[str]:
        """The planted honest members whose events look like abuse."""
        return frozenset().union(*self.truth.lookalikes.values())

    @property
    def noticed_ordinary(self) -> frozenset[str]:
        """Those of them whom nobody planted."""
        return self.noticed - self.lookalikes.union(*self.truth.abusers.values())

    def planted_and_found(self) -> list[tuple[str, int, int]]:
        """Return what was planted and can be counted exactly: ``(what, planted, found)``."""
        truth = self.truth
        rows = [("duplicates: the same event again", truth.duplicates, self.duplicates)]
        reasons = [*truth.dead_letters, *(self.dead_letters.keys() - truth.dead_letters.keys())]
        rows += [
            (f"dead letters: {reason}", truth.dead_letters.get(reason, 0), self.dead_letters[reason])
            for reason in reasons
        ]
        causes = [*truth.deferred, *(self.deferred.keys() - truth.deferred.keys())]
        rows += [(f"deferred: {cause}", truth.deferred.get(cause, 0), self.deferred[cause]) for cause in causes]
        return rows

    def proofs(self) -> list[Proof]:
        """Return what must hold of every run."""
        checkpoint, streamed = self.checkpoint, self.truth.events
        counted = (self.entries, self.duplicates, self.dead_lettered)
        committed = (checkpoint.entries, checkpoint.duplicates, checkpoint.dead_letters)
        parts = " + ".join(f"{count:,} {name}" for count, name in zip(counted, PARTS, strict=True))
        chained = f"{checkpoint.batch:,} batches chained by SHA-256, up to {checkpoint.digest.hex()[:16]}…"
        return [
            Proof(f"every event is in the stream: {streamed:,}", self.stream_entries == streamed),
            Proof(f"{streamed:,} events in = {parts}", streamed == sum(counted)),
            Proof("the checkpoint says the same", committed == counted and checkpoint.events == streamed),
            Proof(f"{self.dead_letters.total():,} dead letters are kept", self.dead_letters.total() == counted[2]),
            Proof(
                "duplicates, dead letters and deferred events are those that were planted",
                all(planted == found for _, planted, found in self.planted_and_found()),
            ),
            Proof(self.ledger_fault or f"the ledger is whole: {chained}", not self.ledger_fault),
        ]


def summarise(client: redis.Redis, keys: Keys, rulebook: Rulebook, truth: Truth) -> Summary:
    """Read and verify the whole ledger of a partition that no worker writes to. A fault in it ends in the summary."""
    count: Any = client.xlen(keys.events)
    letters = read_letters(client, keys, last_letter(client, keys))
    summary = Summary(
        truth=truth,
        checkpoint=checkpoint_of(client, keys),
        stream_entries=count,
        dead_letters=Counter(letter.item.letter.reason for letter in letters),
        limit_members={limit.id: set() for limit in rulebook.limits},
    )
    counting = _Counting(summary, rulebook)
    chain = Chain()
    try:
        for batch in LedgerReader(client, keys.partition).batches(chain=chain):
            if isinstance(batch, EntriesBatch):
                counting.add(batch)
    except LedgerError as error:
        summary.ledger_fault = f"the ledger is broken: {error}"
    return summary


class _Counting:
    """Counts one batch after the other, by column: row by row it would take longer than the worker did."""

    def __init__(self, summary: Summary, rulebook: Rulebook) -> None:
        self._summary = summary
        self._freezing = {limit.id for limit in rulebook.limits if limit.action == "freeze"}
        self._groups = list(summary.truth.abusers)
        self._group_of = {
            member: number for number, group in enumerate(self._groups) for member in summary.truth.abusers[group]
        }

    def add(self, batch: EntriesBatch) -> None:
        """Count the entries of ``batch``."""
        summary, counts = self._summary, batch.header.counts
        summary.entries += counts.entries
        summary.duplicates += counts.duplicates
        summary.dead_lettered += counts.dead_letters
        outcomes, points = batch.integers("outcome"), batch.integers("points")
        kinds = batch.integers("kind")
        members = batch.texts("member")
        summary.events.update(_by_pair(batch.kinds, kinds, outcomes))
        summary.points.update(_by_pair(batch.kinds, kinds, outcomes, points))

        causes = batch.integers("cause")[outcomes == OUTCOMES.index("deferred")]
        summary.deferred.update(_named(CAUSES, np.bincount(causes, minlength=len(CAUSES))))

        group = np.array([self._group_of.get(member, -1) for member in members], np.int64)
        planted = group >= 0
        summary.group_points.update(_by_pair(self._groups, group[planted], outcomes[planted], points[planted]))

        earned = (outcomes == OUTCOMES.index("granted")) | (outcomes == OUTCOMES.index("held"))
        summary.clamped_points += int((batch.integers("uncapped") - points)[earned].sum())
        self._add_campaigns(batch, earned, points)
        self._add_limits(batch, members)

    def _add_campaigns(self, batch: EntriesBatch, earned: NDArray[np.bool_], points: Integers) -> None:
        sets = batch.integers("campaign_set")[earned]
        entries = np.bincount(sets, minlength=len(batch.campaign_sets)).tolist()
        gained = _sums(sets, points[earned], len(batch.campaign_sets)).tolist()
        for campaigns, count, points_of_set in zip(batch.campaign_sets, entries, gained, strict=True):
            for campaign in campaigns:
                self._summary.campaign_events[campaign] += count
                self._summary.campaign_points[campaign] += points_of_set

    def _add_limits(self, batch: EntriesBatch, members: list[str]) -> None:
        """Count the entries that tripped limits: they are few, so they are taken one by one."""
        summary = self._summary
        tripped = batch.integers("tripped")
        rows = np.flatnonzero(tripped).tolist()
        observed = iter(batch.integers("observed").tolist())
        was_frozen, ts_ms = batch.integers("frozen"), batch.integers("ts")
        masked = zip(batch.texts("device_masked"), batch.texts("phone_masked"), strict=True)
        for row, (device, phone) in zip(rows, masked, strict=True):
            mask, member, is_frozen = int(tripped[row]), members[row], bool(was_frozen[row])
            for limit in (limit for number, limit in enumerate(batch.limits) if mask >> number & 1):
                seen = next(observed)
                summary.limit_events[limit] += 1
                summary.limit_members[limit].add(member)
                # Nobody is immune on the member day, so the first limit that freezes does (SPEC section 4, step 12).
                if limit in self._freezing and not is_frozen:
                    summary.frozen.append(Frozen(member, limit, seen, int(ts_ms[row]), device, phone))
                    is_frozen = True


def _by_pair(
    names: tuple[str, ...] | list[str], codes: Integers, outcomes: Integers, values: Integers | None = None
) -> dict[tuple[str, str], int]:
    """Return how many rows there are of each (name, outcome), or the sum of their ``values``."""
    pairs = codes * len(OUTCOMES) + outcomes
    size = len(names) * len(OUTCOMES)
    sums = np.bincount(pairs, minlength=size) if values is None else _sums(pairs, values, size)
    return _named([(name, outcome) for name in names for outcome in OUTCOMES], sums)


def _sums(codes: Integers, values: Integers, size: int) -> Integers:
    """Return the exact sum of ``values`` for each code below ``size``."""
    sums = np.zeros(size, np.int64)
    np.add.at(sums, codes, values)
    return sums


def _named(names: Any, counts: Integers) -> dict[Any, int]:
    return {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}
