"""A partition from its beginning: the chain of digests, every event decided again, every row of the book compared.

The events come from the stream, or from wherever ``events`` reads them: the archive, where the stream was trimmed. They
are decided with the rulebooks that the ledger recorded, by the reference engine unless another is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import redis

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown
from accrual.engine import BatchHeader, Engine, Secret, open_engine
from accrual.errors import LedgerError, RulebookError
from accrual.events import StreamEntry
from accrual.ledger import Chain, EntriesBatch, LedgerReader, RulebookRecord, decode_header
from accrual.ledger.columns import signed
from accrual.outcomes import Entry, Position
from accrual.rulebook import day_text, parse
from accrual.stream import Keys, StreamId, entries_after, stream_id_text

__all__ = ["EventSource", "check_partition", "stream_source"]

# Gives the stream entries after one ID and through another, of which there were so many: as many as can be had.
EventSource: TypeAlias = Callable[[StreamId, StreamId, int], Sequence[StreamEntry]]

# A batch whose bytes come out differently may have many entries that do; the first ones say what there is to say.
SHOWN_DIFFERENCES: Final = 20

BATCH: Final = """
    SELECT digest, previous, after, through, first_seq, stream_entries, events, entries, duplicates, dead_letters
    FROM book.batches WHERE (partition_id, batch) = (%s, %s)
"""

ROWS: Final = """
    SELECT seq, stream_id, item, ts_ms, day::text, event, kind, member, outcome, cause, frozen, amount_fen, order_id,
        base, uncapped, points, campaigns, evidence, device, ip, phone
    FROM book.entries
    WHERE NOT late AND partition_id = %(partition_id)s AND seq BETWEEN %(first)s AND %(last)s
        AND day = ANY(%(days)s::date[])
"""

DEFERRED: Final = """
    SELECT seq, stream_id, item, ts_ms, day::text, event, kind, member, cause, amount_fen, order_id, device, ip, phone,
        payload
    FROM book.deferred WHERE partition_id = %s AND seq BETWEEN %s AND %s
"""

TAKEN: Final = "SELECT seq FROM book.exceptions WHERE kind = 'id_taken' AND partition_id = %s AND seq BETWEEN %s AND %s"


def stream_source(client: redis.Redis, keys: Keys, archive: EventSource | None = None) -> EventSource:
    """Return what reads events from the stream itself, and those that have left it from the ``archive``."""

    def read(after: StreamId, through: StreamId, count: int) -> Sequence[StreamEntry]:
        entries = list(entries_after(client, keys, after, through))
        if len(entries) < count and archive is not None:
            return archive(after, through, count)
        return entries

    return read


def check_partition(
    connection: Connection,
    client: redis.Redis,
    partition: str,
    secret: Secret,
    events: EventSource,
    note: Callable[[str], object],
    engine: str = "reference",
) -> Iterator[Finding]:
    """Yield what is wrong with the ledger of ``partition`` and with what the book has of it.

    ``note`` is told in words what could not be decided again, since its events are gone. ``engine`` decides.
    """
    row = connection.execute("SELECT partition_id, batch FROM book.partitions WHERE name = %s", (partition,)).fetchone()
    if row is None:
        yield Finding("chain", "the book does not know this partition", partition)
        return
    checking = _Partition(connection, partition, row[0], secret, events, note, engine)
    chain = Chain()
    try:
        for batch in LedgerReader(client, partition).batches(chain=chain):
            if batch.batch > row[1]:
                break
            yield from checking.check(batch, chain)
    except LedgerError as error:
        yield Finding("chain", str(error), partition, batch=chain.link.batch + 1)
        return
    if chain.link.batch < row[1]:
        yield Finding("chain", "the ledger ends before the book", partition, expected=row[1], found=chain.link.batch)


class _Partition:
    """Goes through the batches of a partition."""

    def __init__(
        self,
        connection: Connection,
        partition: str,
        partition_id: int,
        secret: Secret,
        events: EventSource,
        note: Callable[[str], object],
        engine: str,
    ) -> None:
        self._connection = connection
        self._partition = partition
        self._id = partition_id
        self._secret = secret
        self._events = events
        self._note = note
        self._engine_name = engine
        self._engine: Engine | None = None
        self._can_decide = True

    def check(self, batch: EntriesBatch | RulebookRecord, chain: Chain) -> Iterator[Finding]:
        """Yield what is wrong with a batch that the chain has just taken."""
        yield from self._check_record(batch, chain)
        if isinstance(batch, RulebookRecord):
            yield from self._adopt(batch)
            return
        rows = list(batch.rows()) if batch.header.counts.entries else []
        yield from self._decide_again(batch, chain, rows)
        yield from self._compare_rows(batch, rows)

    def _finding(self, check: str, detail: str, batch: int, **where: Any) -> Finding:
        return Finding(check, detail, self._partition, batch, **where)

    def _check_record(self, batch: EntriesBatch | RulebookRecord, chain: Chain) -> Iterator[Finding]:
        """Compare what the book wrote down of a batch with the ledger's own."""
        booked = self._connection.execute(BATCH, (self._id, batch.batch)).fetchone()
        place = batch.header if isinstance(batch, EntriesBatch) else batch
        counts = (0, 0, 0, 0, 0)
        if isinstance(batch, EntriesBatch):
            of = batch.header.counts
            counts = (of.stream_entries, of.events, of.entries, of.duplicates, of.dead_letters)
        ledger = (
            *(chain.link.digest.hex(), place.previous.hex(), stream_id_text(place.after)),
            *(stream_id_text(chain.link.through), place.first_seq, *counts),
        )
        found = None if booked is None else (bytes(booked[0]).hex(), bytes(booked[1]).hex(), *booked[2:])
        if found != ledger:
            yield self._finding(
                "chain", "the book has another batch than the ledger", batch.batch, expected=ledger, found=found
            )

    def _adopt(self, record: RulebookRecord) -> Iterator[Finding]:
        try:
            rulebook = parse(record.text)
        except RulebookError as error:
            yield self._finding("decisions", f"its rulebook is refused: {error.findings[0]}", record.batch)
            self._can_decide = False
            return
        if self._engine is None:
            self._engine = open_engine(self._engine_name, rulebook, self._secret, record.slack_days)
        else:
            self._engine.adopt(rulebook)

    def _decide_again(
        self, batch: EntriesBatch, chain: Chain, rows: Sequence[tuple[int, Position, Entry]]
    ) -> Iterator[Finding]:
        header = batch.header
        if not self._can_decide or self._engine is None or header.counts.stream_entries == 0:
            return
        entries = self._events(header.after, header.through, header.counts.stream_entries)
        if len(entries) != header.counts.stream_entries:
            self._can_decide = False
            self._note(
                f"partition {self._partition}: not decided again from batch {batch.batch} on: of its "
                f"{header.counts.stream_entries} events {len(entries)} are still there"
            )
            return
        again = self._engine.decide_entries(entries)
        place = BatchHeader(header.batch, header.previous, header.after, header.first_seq)
        if decode_header(again.encode(place)).digest != chain.link.digest:
            yield from self._differences(batch, rows, again)

    def _differences(
        self, batch: EntriesBatch, rows: Sequence[tuple[int, Position, Entry]], again: Any
    ) -> Iterator[Finding]:
        decided = [(place, decision) for place, decision in again.decisions() if isinstance(decision, Entry)]
        shown_ones = 0
        for number in range(max(len(rows), len(decided))):
            ledger = rows[number][1:] if number < len(rows) else None
            mine = decided[number] if number < len(decided) else None
            if ledger == mine:
                continue
            seq = batch.header.first_seq + number
            member = (mine or ledger or (None, None))[1]
            yield self._finding(
                "decisions",
                "decided again, the entry comes out differently",
                batch.batch,
                seq=seq,
                member=member.member if member else None,
                expected=_told(mine),
                found=_told(ledger),
            )
            shown_ones += 1
            if shown_ones == SHOWN_DIFFERENCES:
                break
        if shown_ones == 0:
            yield self._finding("decisions", "decided again, its counts come out differently", batch.batch)

    # ------------------------------------------------------------------------------------------------ the book

    def _compare_rows(self, batch: EntriesBatch, rows: Sequence[tuple[int, Position, Entry]]) -> Iterator[Finding]:
        if not rows:
            return
        first, last = rows[0][0], rows[-1][0]
        days = sorted({day_text(entry.day) for _, _, entry in rows})
        parameters = {"partition_id": self._id, "first": first, "last": last, "days": days}
        booked = {row[0]: _booked(row) for row in self._connection.execute(ROWS, parameters)}
        booked |= {row[0]: _booked_deferred(row) for row in self._connection.execute(DEFERRED, (self._id, first, last))}
        taken = {seq for (seq,) in self._connection.execute(TAKEN, (self._id, first, last))}
        for seq, position, entry in rows:
            ledger = _of_ledger(position, entry)
            found = booked.get(seq)
            if found == ledger or (found is None and seq in taken):
                continue
            detail = (
                "the book does not have the entry" if found is None else "the book has another entry than the ledger"
            )
            names = [name for name in ledger if found is None or found.get(name) != ledger[name]]
            yield self._finding(
                "rows",
                detail,
                batch.batch,
                seq=seq,
                member=entry.member,
                day=day_text(entry.day),
                expected={name: _plain(ledger[name]) for name in names},
                found=None if found is None else {name: _plain(found.get(name)) for name in names},
            )


def _told(decided: tuple[Position, Entry] | None) -> Any:
    if decided is None:
        return None
    position, entry = decided
    return {name: _plain(value) for name, value in _of_ledger(position, entry).items()}


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _keys(values: Sequence[int | None]) -> tuple[int | None, ...]:
    return tuple(signed(value) if value else None for value in values)


def _of_ledger(position: Position, entry: Entry) -> dict[str, Any]:
    """Return an entry of the ledger in the words that both sides are compared in."""
    told: dict[str, Any] = {
        "stream_id": position.stream_id,
        "item": position.index,
        "ts_ms": entry.ts,
        "day": day_text(entry.day),
        "event": entry.event,
        "kind": entry.kind,
        "member": entry.member,
        "outcome": entry.outcome,
        "cause": entry.cause,
        "amount_fen": entry.amount,
        "order": entry.order,
        "keys": _keys(entry.fingerprints),
    }
    if entry.outcome == "deferred":
        return told | {"payload": entry.payload}
    return told | {
        "frozen": entry.frozen_before,
        "base": entry.base,
        "uncapped": entry.uncapped,
        "points": entry.points,
        "campaigns": entry.campaigns,
        "evidence": entry.evidence,
    }


def _booked(row: tuple[Any, ...]) -> dict[str, Any]:
    _, stream_id, item, ts_ms, day, event, kind, member, outcome, cause, frozen, amount, order, *rest = row
    base, uncapped, points, campaigns, evidence, *keys = rest
    return {
        "stream_id": stream_id,
        "item": item,
        "ts_ms": ts_ms,
        "day": day,
        "event": shown(event),
        "kind": shown(kind),
        "member": shown(member),
        "outcome": outcome,
        "cause": cause or "",
        "amount_fen": amount,
        "order": shown(order) or "",
        "keys": tuple(keys),
        "frozen": frozen,
        "base": base,
        "uncapped": uncapped,
        "points": points,
        "campaigns": tuple(shown(campaign) for campaign in campaigns or ()),
        "evidence": tuple((item["limit"], item["observed"]) for item in evidence or ()),
    }


def _booked_deferred(row: tuple[Any, ...]) -> dict[str, Any]:
    _, stream_id, item, ts_ms, day, event, kind, member, cause, amount, order, *keys, payload = row
    return {
        "stream_id": stream_id,
        "item": item,
        "ts_ms": ts_ms,
        "day": day,
        "event": shown(event),
        "kind": shown(kind),
        "member": shown(member),
        "outcome": "deferred",
        "cause": cause,
        "amount_fen": amount,
        "order": shown(order) or "",
        "keys": tuple(keys),
        "payload": bytes(payload),
    }
