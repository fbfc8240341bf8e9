"""What a partition stands at before a batch: the reference engine as all that was committed before leaves it.

Nothing is decided for it. What lasts for ever (what control events and freezes made of members, once marks, streaks)
is taken over from committed entries since the beginning; what is forgotten after some days (ids, daily counts, windows)
from those of the days before, with their events. So a stretch of a ledger can be decided again without all that came
before it being decided again: each committed fact is verified where the stretch that it is part of is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

from accrual.audit.events import Events
from accrual.audit.rows import booked_evidence
from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.engine import ReferenceEngine, Secret
from accrual.engine.batch import items_of_entry
from accrual.engine.counters import When
from accrual.engine.reference import Tripped
from accrual.errors import InvalidEvent, LedgerError, RulebookError
from accrual.events import CONTROL_KINDS, Event, StreamEntry
from accrual.ledger import EntriesBatch, LedgerReader, RulebookRecord, decode
from accrual.outcomes import OUTCOMES, Entry, Position
from accrual.rulebook import Calendar, parse
from accrual.stream import StreamId, parse_stream_id

__all__ = ["Follower", "Following", "Standing", "Unknown", "lasting_rows", "warm_from"]

HELD, APPLIED = (OUTCOMES.index(name) for name in ("held", "applied"))
# What these bring is in the event alone.
TELLING_KINDS: Final = ("member_updated", "member_released")

BATCHES: Final = "SELECT batch, through FROM book.batches WHERE partition_id = %s AND batch < %s ORDER BY batch DESC"

BOOKED_BATCHES: Final = """
    SELECT batch, after, through, first_seq, stream_entries, entries, r.text, r.slack_days
    FROM book.batches b LEFT JOIN book.rulebooks r USING (partition_id, batch)
    WHERE partition_id = %s AND batch < %s ORDER BY batch
"""

BOOKED: Final = """
    SELECT * FROM (
        SELECT seq, stream_id, item, ts_ms, day - date '1970-01-01', event, kind, member, outcome,
            coalesce(cause, '') AS cause, points, evidence
        FROM book.entries WHERE NOT late AND partition_id = %(partition_id)s AND seq BETWEEN %(first)s AND %(last)s
        UNION ALL
        SELECT seq, stream_id, item, ts_ms, day - date '1970-01-01', event, kind, member, 'deferred', cause, 0, NULL
        FROM book.deferred WHERE partition_id = %(partition_id)s AND seq BETWEEN %(first)s AND %(last)s
    ) e WHERE %(all)s OR outcome = 'applied' OR outcome IN ('granted', 'held') AND kind = ANY(%(kinds)s)
        OR evidence IS NOT NULL ORDER BY seq
"""

TAKEN: Final = """
    SELECT EXISTS (SELECT FROM book.exceptions WHERE kind = 'id_taken' AND partition_id = %s AND seq <= %s)
"""


# A committed entry, and where its event was.
Row = tuple[Position, Entry]


class Unknown(Exception):
    """What a stretch begins with cannot be had; the words say why."""


class Follower(ReferenceEngine):
    """The reference engine, told what others decided: it takes over what each entry leaves behind."""

    def take(self, event: Event, entry: Entry, arrival_ms: int) -> None:
        """Take over all that ``entry``, decided of ``event``, leaves behind."""
        arrival_day = self.calendar.day(arrival_ms)
        self._reach(arrival_day)
        self.decided[event.id] = (event, arrival_day)
        rule = self.rulebook.earning_rule(event.kind)
        if entry.cause or entry.outcome == "applied" or rule is None:
            self.remember(entry, arrival_ms, event)
            return
        when: When = self._when(event, arrival_ms)
        limits = self._limits(event, when)
        self._count(event, limits, when, Tripped())
        if entry.outcome != "rejected":
            for limit in limits:
                if limit.measure == "points":
                    self._total(limit, event).add(when, entry.points)
            if rule.max_per_day is not None:
                self.members[event.member].daily[rule.kind, when.day] += 1
        self.remember(entry, arrival_ms, event)

    def remember(self, entry: Entry, arrival_ms: int, event: Event) -> None:
        """Take over what ``entry`` leaves behind for ever; of ``event`` only what a control event says is looked at."""
        member = self.members[entry.member]
        if entry.outcome == "applied":
            self._control(event)
        if entry.cause or entry.outcome not in ("granted", "held", "rejected"):
            return
        immune = min(entry.ts, arrival_ms) < member.immune_until
        if not immune and not self.freezing_limits.isdisjoint(limit for limit, _ in entry.evidence):
            member.state = "frozen"
        rule = self.rulebook.earning_rule(entry.kind)
        if rule is None or entry.outcome == "rejected":
            return
        if rule.once:
            member.once.add(rule.kind)
        streak = self._streak(member, rule, entry.day)
        if streak is not None:
            member.streaks[rule.kind] = streak

    @property
    def freezing_limits(self) -> set[str]:
        """The ids of the limits that freeze."""
        return {limit.id for limit in self.rulebook.limits if limit.action == "freeze"}

    @property
    def lasting_kinds(self) -> set[str]:
        """The kinds whose entries leave something behind for ever."""
        return {rule.kind for rule in self.rulebook.earning_rules if rule.once or rule.streak_days is not None}


class Following:
    """Follows a ledger. ``engine`` is what it has come to: ``None`` before the first rulebook. Free of I/O."""

    def __init__(self, secret: Secret) -> None:
        self.engine: Follower | None = None
        self._secret = secret

    def adopt(self, text: str, slack_days: int) -> None:
        """Take over a rulebook."""
        rulebook = parse(text)
        if self.engine is None:
            self.engine = Follower(rulebook, self._secret, slack_days)
        else:
            self.engine.adopt(rulebook)

    def remember(self, rows: Iterable[Row], find: Callable[[StreamId], StreamEntry | None]) -> None:
        """Take over what the entries of ``rows`` leave behind for ever; ``find`` finds the control events of some."""
        assert self.engine is not None
        for position, entry in rows:
            event = Event(id=entry.event, kind=entry.kind, member=entry.member, ts=entry.ts)
            if entry.outcome == "applied" and entry.kind in TELLING_KINDS:
                found = find((position.ms, position.seq))
                if found is None:
                    raise Unknown(f"the {entry.kind} at {position.stream_id} is gone")
                event = items_of_entry(found)[position.index].event()
            self.engine.remember(entry, position.ms, event)

    def take(self, entries: Iterable[StreamEntry], rows: Iterable[Row]) -> None:
        """Take over all that the entries of ``rows``, decided of events of stream ``entries``, leave behind."""
        assert self.engine is not None
        committed = dict(rows)
        for stream_entry in entries:
            for position, event in _events_of(stream_entry, committed):
                self.engine.take(event, committed[position], stream_entry.ms)


def warm_from(calendar: Calendar, slack_days: int, throughs: Iterable[tuple[int, int]]) -> int:
    """Return the first of the batches before one of which everything is needed to decide it.

    ``throughs`` has their numbers and the times in ms at which they end, the last one first. An event is of the day of
    its arrival or the one before. What counts with it came at most a day before those: no sliding window is longer. Ids
    are remembered for ``slack_days`` more than those two days.
    """
    last_day: int | None = None
    for batch, through_ms in throughs:
        day = calendar.day(through_ms) if through_ms else 0
        last_day = day if last_day is None else last_day
        if day < last_day - 2 - max(1, slack_days):
            return batch + 1
    return 1


class Standing:
    """Makes the engine that a stretch begins with.

    Committed entries are those of the ledger; what has left its head (batches before ``present``) is what the book has.
    """

    def __init__(
        self,
        connection: Connection,
        partition_id: int,
        reader: LedgerReader,
        present: int,
        events: tuple[Events, Events],
        secret: Secret,
    ) -> None:
        self._connection = connection
        self._id = partition_id
        self._reader = reader
        self._present = present
        self._events, control_events = events
        self._find = control_events.find
        self._following = Following(secret)

    def before(self, first: int) -> Follower | None:
        """Return the engine before batch ``first``; ``None`` where no rulebook was recorded before it.

        Raises ``Unknown`` where something that it would have to know is gone.
        """
        warm = self._warm_from(first)
        try:
            self._follow_book(min(first, self._present), warm)
            self._follow_ledger(first, warm)
        except (LedgerError, RulebookError, InvalidEvent) as error:
            raise Unknown(str(error)) from error
        return self._following.engine

    def _warm_from(self, first: int) -> int:
        row = self._connection.execute(
            "SELECT text, max(slack_days) OVER () FROM book.rulebooks WHERE partition_id = %s AND batch < %s LIMIT 1",
            (self._id, first),
        ).fetchone()
        if row is None:
            return 1
        batches = self._connection.execute(BATCHES, (self._id, first))
        throughs = ((batch, parse_stream_id(through)[0]) for batch, through in batches)
        return warm_from(parse(row[0]).calendar, row[1], throughs)

    def _follow_ledger(self, first: int, warm: int) -> None:
        following = self._following
        expected = self._present
        for number, data in self._reader.values(self._present, first - 1):
            if number != expected:
                break
            expected += 1
            batch = decode(data)
            if isinstance(batch, RulebookRecord):
                following.adopt(batch.text, batch.slack_days)
            elif following.engine is None or not batch.header.counts.stream_entries:
                continue
            elif number < warm:
                following.remember(lasting_rows(batch, following.engine), self._find)
            else:
                header = batch.header
                rows = [row[1:] for row in batch.rows()] if header.counts.entries else []
                following.take(self._read(header.after, header.through, header.counts.stream_entries), rows)
        if expected < first:
            raise Unknown(f"batch {expected} is missing")

    def _follow_book(self, first: int, warm: int) -> None:
        """Follow what the book has of batches that have left the ledger."""
        if first == 1:
            return
        following, next_seq = self._following, 1
        lasting: tuple[int, int] | None = None
        for row in self._connection.execute(BOOKED_BATCHES, (self._id, first)).fetchall():
            batch, after, through, first_seq, stream_entries, entries, text, slack_days = row
            next_seq = first_seq + entries
            if text is None and batch < warm:
                lasting = (lasting[0] if lasting else first_seq, next_seq - 1)
                continue
            self._remember_booked(lasting)
            lasting = None
            if text is not None:
                following.adopt(text, slack_days)
            elif stream_entries and following.engine is not None:
                events = self._read(parse_stream_id(after), parse_stream_id(through), stream_entries)
                following.take(events, self._booked(first_seq, next_seq - 1))
        self._remember_booked(lasting)
        if self._connection.execute(TAKEN, (self._id, next_seq - 1)).fetchone() == (True,):
            raise Unknown("of entries whose id was taken the book does not know what they left behind")

    def _remember_booked(self, seqs: tuple[int, int] | None) -> None:
        engine = self._following.engine
        if seqs is not None and engine is not None:
            self._following.remember(self._booked(*seqs, engine.lasting_kinds), self._find)

    def _booked(self, first: int, last: int, lasting_kinds: Iterable[str] | None = None) -> Iterator[Row]:
        kinds = [stored(kind) for kind in lasting_kinds or ()]
        about = {"partition_id": self._id, "first": first, "last": last, "kinds": kinds, "all": lasting_kinds is None}
        for row in self._connection.execute(BOOKED, about).fetchall():
            _, stream_id, item, ts_ms, day, event, kind, member, outcome, cause, points, evidence = row
            entry = Entry(
                event=shown(event),
                kind=shown(kind),
                member=shown(member),
                outcome=outcome,
                ts=ts_ms,
                day=day,
                points=points,
                cause=cause,
                evidence=booked_evidence(evidence),
            )
            yield Position(*parse_stream_id(stream_id), item), entry

    def _read(self, after: StreamId, through: StreamId, count: int) -> list[StreamEntry]:
        entries = self._events.read(after, through, count)
        if len(entries) < count:
            raise Unknown(f"of {count} events of the days before {len(entries)} are still there")
        return entries


def _events_of(entry: StreamEntry, committed: dict[Position, Entry]) -> Iterator[tuple[Position, Event]]:
    """Yield the events of a stream entry that have an entry of the ledger."""
    try:
        items = items_of_entry(entry)
    except InvalidEvent:
        return
    for item in items:
        position = Position(entry.ms, entry.seq, item.index)
        if position in committed:
            yield position, item.event()


def lasting_rows(batch: EntriesBatch, engine: Follower) -> Iterator[Row]:
    """Yield the entries of ``batch`` that leave something behind for ever, with what is needed of them."""
    outcome, kind, tripped = (batch.integers(name) for name in ("outcome", "kind", "tripped"))
    if not len(outcome):
        return
    freezing, kinds = engine.freezing_limits, engine.lasting_kinds
    lasting = np.array([name in kinds or name in CONTROL_KINDS for name in batch.kinds])[kind]
    mask = np.uint64(sum(1 << number for number, limit in enumerate(batch.limits) if limit in freezing))
    chosen = np.flatnonzero(((outcome <= HELD) | (outcome == APPLIED)) & lasting | ((tripped & mask) != 0))
    if not len(chosen):
        return
    events, members = batch.texts("event"), batch.texts("member")
    at, at_seq, index, ts, day = (batch.integers(name) for name in ("at", "at_seq", "index", "ts", "day"))
    for row in chosen.tolist():
        entry = Entry(
            event=events[row],
            kind=batch.kinds[int(kind[row])],
            member=members[row],
            outcome=OUTCOMES[int(outcome[row])],
            ts=int(ts[row]),
            day=int(day[row]),
            evidence=tuple((limit, 0) for number, limit in enumerate(batch.limits) if int(tripped[row]) >> number & 1),
        )
        yield Position(int(at[row]), int(at_seq[row]), int(index[row])), entry
