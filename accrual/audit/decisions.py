"""A stretch of a ledger: the chain of digests, every event decided again, every row of the book compared.

Events are decided with the rulebooks that the ledger recorded, by the reference engine unless another is asked for. A
ledger is cut into stretches of whole days, each decided in a process of its own on what was committed before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import pairwise
from typing import Any, Final

import msgspec
import redis

from accrual.audit.attributes import check_attributes
from accrual.audit.events import Events
from accrual.audit.findings import Finding
from accrual.audit.rows import compare_rows, told
from accrual.audit.standing import Standing, Unknown
from accrual.book.database import Connection
from accrual.book.texts import shown
from accrual.engine import Batch, BatchHeader, Engine, ReferenceEngine, Secret, open_engine
from accrual.errors import LedgerError, RulebookError
from accrual.ledger import Chain, EntriesBatch, LedgerReader, Link, RulebookRecord, decode_header
from accrual.outcomes import Entry, Position
from accrual.rulebook import day_number, parse
from accrual.stream import Keys, checkpoint_of, parse_stream_id, stream_id_text

__all__ = ["Ledger", "Stretch", "check_ends", "check_stretch", "stretches_of"]

BATCH: Final = """
    SELECT digest, previous, after, through, first_seq, rulebook, stream_entries, events, entries, duplicates,
        dead_letters
    FROM book.batches WHERE (partition_id, batch) = (%s, %s)
"""

LINK: Final = """
    SELECT digest, through, first_seq + entries, rulebook FROM book.batches WHERE (partition_id, batch) = (%s, %s)
"""

RECORD: Final = """
    SELECT version, name, text, zone_rules, slack_days FROM book.rulebooks WHERE (partition_id, batch) = (%s, %s)
"""

LAST_BATCH: Final = "SELECT batch FROM book.partitions WHERE partition_id = %s"

BATCHES: Final = "SELECT batch, after, through, events FROM book.batches WHERE partition_id = %s ORDER BY batch"

# As many entries behind the last batch are counted to compare the ledger with the stream; with more it lags too far.
COUNTED_BEHIND: Final = 100_000


class Stretch(msgspec.Struct, frozen=True):
    """Batches ``first`` to ``last`` of a ledger. What is not ``decided`` again is only followed along the chain."""

    first: int
    last: int
    decided: bool = True


class Ledger(msgspec.Struct, frozen=True):
    """The ledger of a partition and what there is to check it by; ``note`` is told what could not be decided again."""

    connection: Connection
    client: redis.Redis
    partition: str
    partition_id: int
    secret: Secret
    events: tuple[Events, Events]
    note: Callable[[str], object]
    engine: str = "reference"

    def present(self) -> int:
        """Return the number of the first batch that is there; 0 where none is."""
        page: Any = self.client.xrange(Keys(self.partition).ledger, "-", "+", 1)
        return int(page[0][0].split(b"-")[0]) if page else 0

    def link_before(self, batch: int) -> Link | None:
        """Return where the ledger stands before ``batch``, by itself or else by the book; ``None`` if nobody knows."""
        if batch == 1:
            return Link()
        try:
            for number, data in LedgerReader(self.client, self.partition).values(batch - 1, batch - 1):
                header = decode_header(data)
                if header.batch == number:
                    return header.link
        except LedgerError:
            pass
        row = self.connection.execute(LINK, (self.partition_id, batch - 1)).fetchone()
        return None if row is None else Link(batch - 1, bytes(row[0]), parse_stream_id(row[1]), row[2], row[3])


# ---------------------------------------------------------------------------------------------------- stretches


def stretches_of(
    connection: Connection, partition_id: int, first_day: str | None, last_day: str | None, pieces: int, days: int
) -> list[Stretch]:
    """Return the booked ledger of a partition as stretches.

    What may have entries of ``first_day`` to ``last_day`` (dates) is decided, in about ``pieces`` stretches of as many
    events, cut where a business day ends; none has fewer than ``days``.
    """
    row = connection.execute(
        "SELECT text FROM book.rulebooks WHERE partition_id = %s ORDER BY batch LIMIT 1", (partition_id,)
    ).fetchone()
    batches = connection.execute(BATCHES, (partition_id,)).fetchall()
    if row is None or not batches:
        return [Stretch(batches[0][0], batches[-1][0])] if batches else []
    calendar = parse(row[0]).calendar

    def day_of(stream_id: str) -> int:
        time_ms = parse_stream_id(stream_id)[0]
        return calendar.day(time_ms) if time_ms else 0

    placed = [(batch, day_of(after), day_of(through), events) for batch, after, through, events in batches]
    first = day_number(date.fromisoformat(first_day)) if first_day else 0
    last = day_number(date.fromisoformat(last_day)) + 1 if last_day else placed[-1][2]
    chosen = [place for place in placed if place[2] >= first and place[1] <= last]
    if not chosen:
        return [Stretch(placed[0][0], placed[-1][0], decided=False)]
    found = []
    if placed[0][0] < chosen[0][0]:
        found.append(Stretch(placed[0][0], chosen[0][0] - 1, decided=False))
    found += _cut(chosen, pieces, days)
    if chosen[-1][0] < placed[-1][0]:
        found.append(Stretch(chosen[-1][0] + 1, placed[-1][0], decided=False))
    return found


def _cut(batches: Sequence[tuple[int, int, int, int]], pieces: int, days: int) -> Iterator[Stretch]:
    share = sum(events for *_, events in batches) / pieces
    first, _, first_day, events = batches[0]
    for before, batch in pairwise(batches):
        if batch[2] > before[2] and batch[2] - first_day >= days and events >= share:
            yield Stretch(first, before[0])
            first, _, first_day, events = batch
        else:
            events += batch[3]
    yield Stretch(first, batches[-1][0])


# --------------------------------------------------------------------------------------------------------- ends


def check_ends(ledger: Ledger) -> Iterator[Finding]:
    """Yield what is wrong with where the ledger begins and ends, and with how many events the stream has brought."""
    name, present = ledger.partition, ledger.present()
    row = ledger.connection.execute(LAST_BATCH, (ledger.partition_id,)).fetchone()
    booked: int = (row or (0,))[0]
    checkpoint, last = checkpoint_of(ledger.client, Keys(name)), LedgerReader(ledger.client, name).last_batch()
    if last < checkpoint.batch:
        detail = f"the ledger ends at batch {last}, but the checkpoint is at batch {checkpoint.batch}"
        yield Finding("chain", detail, name, expected=checkpoint.batch, found=last)
    elif last < booked:
        yield Finding("chain", "the ledger ends before the book", name, expected=booked, found=last)
    at_checkpoint = ledger.connection.execute(LINK, (ledger.partition_id, checkpoint.batch)).fetchone()
    if at_checkpoint is not None and bytes(at_checkpoint[0]) != checkpoint.digest:
        expected, found = bytes(at_checkpoint[0]).hex(), checkpoint.digest.hex()
        detail = "the checkpoint has another digest than the book"
        yield Finding("chain", detail, name, checkpoint.batch, expected=expected, found=found)
    if present > booked + 1:
        detail = f"the ledger begins at batch {present}, and the book knows it up to batch {booked}"
        yield Finding("chain", detail, name, expected=booked + 1, found=present)
    elif present > 1:
        ledger.note(f"partition {name}: batches 1 to {present - 1} have left the ledger: only the book has them")
    yield from _check_count(ledger)


def _check_count(ledger: Ledger) -> Iterator[Finding]:
    """Compare how many entries the stream has had with how many the ledger counts; those still there are read later."""
    events = ledger.events[0]
    row = ledger.connection.execute(
        "SELECT coalesce(sum(stream_entries), 0)::bigint, (array_agg(through ORDER BY batch DESC))[1] "
        "FROM book.batches WHERE partition_id = %s",
        (ledger.partition_id,),
    ).fetchone()
    counted, through = row if row is not None and row[1] is not None else (0, "0-0")
    added, left, end = events.count()
    behind = events.count_between(parse_stream_id(through), end, COUNTED_BEHIND)
    if left and behind is not None and added > counted + behind:
        detail = "more entries were added to the stream than the ledger counts"
        yield Finding("events", detail, ledger.partition, expected=added - behind, found=counted)


# ----------------------------------------------------------------------------------------------------- a stretch


def check_stretch(ledger: Ledger, stretch: Stretch) -> Iterator[Finding]:
    """Yield what is wrong with a stretch of the ledger, and with what the book has of it."""
    reader, present = LedgerReader(ledger.client, ledger.partition), ledger.present()
    first, last = max(stretch.first, present), min(stretch.last, reader.last_batch())
    if not present or first > last:
        return
    link = ledger.link_before(first)
    if link is None:
        detail = f"the ledger goes on at batch {first}, and nobody knows the one before it"
        yield Finding("chain", detail, ledger.partition, first)
        return
    chain = Chain(link)
    checking = _Checking(ledger, decides=stretch.decided)
    if stretch.decided:
        checking.begin(reader, first, present)
    try:
        for _, data in reader.values(first, last):
            yield from checking.check(chain.feed(data), chain)
    except LedgerError as error:
        yield Finding("chain", str(error), ledger.partition, batch=chain.link.batch + 1)
        return
    if chain.link.batch < last:
        yield Finding("chain", f"batch {chain.link.batch + 1}: is missing", ledger.partition, chain.link.batch + 1)
        return
    yield from checking.end(chain.link.batch)


class _Checking:
    """Goes through the batches of a stretch."""

    def __init__(self, ledger: Ledger, *, decides: bool) -> None:
        self._ledger = ledger
        self._decides = self._can_decide = decides
        self._engine: Engine | None = None

    def begin(self, reader: LedgerReader, first: int, present: int) -> None:
        """Make the engine that decides from batch ``first`` on."""
        if first == 1:
            return
        ledger = self._ledger
        standing = Standing(ledger.connection, ledger.partition_id, reader, present, ledger.events, ledger.secret)
        try:
            if ledger.engine != "reference":
                raise Unknown(f"the {ledger.engine} engine decides from the beginning only")
            self._engine = standing.before(first)
        except Unknown as error:
            self._give_up(first, str(error))

    def check(self, batch: EntriesBatch | RulebookRecord, chain: Chain) -> Iterator[Finding]:
        """Yield what is wrong with a batch that the chain has just taken."""
        yield from self._check_batch(batch, chain)
        if isinstance(batch, RulebookRecord):
            yield from self._check_record(batch)
            yield from self._adopt(batch)
        elif self._decides:
            rows = list(batch.rows()) if batch.header.counts.entries else []
            yield from self._decide_again(batch, chain, rows)
            yield from compare_rows(
                self._ledger.connection, self._ledger.partition, self._ledger.partition_id, batch, rows
            )

    def end(self, batch: int) -> Iterator[Finding]:
        """Yield what the book says otherwise of members than their events, where ``batch`` is the last one booked."""
        ledger, engine = self._ledger, self._engine
        booked = ledger.connection.execute(LAST_BATCH, (ledger.partition_id,)).fetchone()
        if self._can_decide and isinstance(engine, ReferenceEngine) and booked == (batch,):
            yield from check_attributes(ledger.connection, ledger.partition, ledger.partition_id, engine)

    def _finding(self, check: str, detail: str, batch: int, **where: Any) -> Finding:
        return Finding(check, detail, self._ledger.partition, batch, **where)

    def _give_up(self, batch: int, why: str) -> None:
        self._can_decide = False
        self._ledger.note(f"partition {self._ledger.partition}: not decided again from batch {batch} on: {why}")

    def _check_batch(self, batch: EntriesBatch | RulebookRecord, chain: Chain) -> Iterator[Finding]:
        """Compare what the book wrote down of a batch with the ledger's own."""
        booked = self._ledger.connection.execute(BATCH, (self._ledger.partition_id, batch.batch)).fetchone()
        place = batch.header if isinstance(batch, EntriesBatch) else batch
        counts = (0, 0, 0, 0, 0)
        if isinstance(batch, EntriesBatch):
            of = batch.header.counts
            counts = (of.stream_entries, of.events, of.entries, of.duplicates, of.dead_letters)
        ledger = (
            *(chain.link.digest.hex(), place.previous.hex(), stream_id_text(place.after)),
            *(stream_id_text(chain.link.through), place.first_seq, chain.link.rulebook, *counts),
        )
        found = None if booked is None else (bytes(booked[0]).hex(), bytes(booked[1]).hex(), *booked[2:])
        if found != ledger:
            detail = "the book has another batch than the ledger"
            yield self._finding("chain", detail, batch.batch, expected=ledger, found=found)

    def _check_record(self, record: RulebookRecord) -> Iterator[Finding]:
        """Compare what the book wrote down of a rulebook with the ledger's own."""
        booked = self._ledger.connection.execute(RECORD, (self._ledger.partition_id, record.batch)).fetchone()
        names = ("version", "name", "text", "zone_rules", "slack_days")
        ledger = {name: getattr(record, name) for name in names}
        found = {} if booked is None else dict(zip(names, booked, strict=True)) | {"name": shown(booked[1])}
        wrong = [name for name in names if found.get(name) != ledger[name]]
        if wrong:
            yield self._finding(
                "rulebooks",
                "the book has another rulebook than the ledger",
                record.batch,
                expected={name: ledger[name] for name in wrong},
                found={name: found.get(name) for name in wrong},
            )

    def _adopt(self, record: RulebookRecord) -> Iterator[Finding]:
        if not self._can_decide:
            return
        try:
            rulebook = parse(record.text)
        except RulebookError as error:
            yield self._finding("decisions", f"its rulebook is refused: {error.findings[0]}", record.batch)
            self._give_up(record.batch, "its rulebook is refused")
            return
        if self._engine is None:
            self._engine = open_engine(self._ledger.engine, rulebook, self._ledger.secret, record.slack_days)
        else:
            self._engine.adopt(rulebook)

    def _decide_again(
        self, batch: EntriesBatch, chain: Chain, rows: Sequence[tuple[int, Position, Entry]]
    ) -> Iterator[Finding]:
        header, events = batch.header, self._ledger.events[0]
        counted = header.counts.stream_entries
        if not self._can_decide or self._engine is None or not counted:
            return
        entries = events.read(header.after, header.through, counted)
        if len(entries) != counted and (len(entries) > counted or events.covers(header.after)):
            how_many = "more" if len(entries) > counted else "fewer"
            where = f"after {stream_id_text(header.after)} through {stream_id_text(header.through)}"
            detail = f"the stream has {how_many} entries {where} than the ledger counts"
            yield self._finding("events", detail, batch.batch, expected=len(entries), found=counted)
        if len(entries) < counted:
            self._give_up(batch.batch, f"of its {counted} events {len(entries)} are still there")
            return
        again = self._engine.decide_entries(entries)
        place = BatchHeader(header.batch, header.previous, header.after, header.first_seq)
        if decode_header(again.encode(place)).digest != chain.link.digest:
            yield from self._differences(batch, rows, again)

    def _differences(
        self, batch: EntriesBatch, rows: Sequence[tuple[int, Position, Entry]], again: Batch
    ) -> Iterator[Finding]:
        """Yield each event of a batch whose bytes come out differently that has another entry than it should."""
        ledger = {position: (seq, entry) for seq, position, entry in rows}
        mine = {position: decision for position, decision in again.decisions() if isinstance(decision, Entry)}
        differs = False
        for position in sorted(ledger.keys() | mine.keys()):
            seq, found = ledger.get(position, (None, None))
            expected = mine.get(position)
            if found == expected:
                continue
            differs = True
            one = expected or found
            yield self._finding(
                "decisions",
                "decided again, the entry comes out differently"
                if found
                else f"decided again, the event at {position.stream_id}, {position.index} has an entry",
                batch.batch,
                seq=seq,
                member=one.member if one else None,
                expected=told(position, expected) if expected else None,
                found=told(position, found) if found else None,
            )
        if not differs:
            counts = [msgspec.to_builtins(of) for of in (again.counts, batch.header.counts)]
            detail = "decided again, its counts come out differently"
            yield self._finding("decisions", detail, batch.batch, expected=counts[0], found=counts[1])
