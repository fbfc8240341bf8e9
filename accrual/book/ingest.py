"""Ledger batches into the book: each in one transaction with its position and digest, so that none counts twice.

Several batches that are there already share a transaction. A transaction goes like this:

1. the partition's row is locked, and must stand where we believe it does (two ingesters of a partition take turns);
2. event ids are claimed. Where the book already holds one, the entry moves nothing, and an exception says so;
3. balances are changed, in the order of members, as every job locks them;
4. only then is the number drawn that orders these entries among postings, and the entries are copied in.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, LiteralString

import msgspec
import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from accrual.book import copying
from accrual.book.copying import Column
from accrual.book.database import Connection, retried
from accrual.book.members import ControlEvent, member_changes, note_members
from accrual.book.texts import stored
from accrual.errors import BookError
from accrual.ledger import EntriesBatch, Link, RulebookRecord
from accrual.ledger.columns import signed
from accrual.outcomes import CAUSES, OUTCOMES, Counts
from accrual.rulebook import day_text, parse
from accrual.stream import parse_stream_id, stream_id_text

__all__ = ["Book", "position_of"]

ORDER_KIND: Final = "order_paid"
HELD, DEFERRED, APPLIED = (OUTCOMES.index(name) for name in ("held", "deferred", "applied"))
MASKED: Final = ("device", "ip", "phone")
TEXT_TYPE: Final = 25

ENTRY_COLUMNS: Final = (
    "day, partition_id, seq, late, number, rulebook, stream_id, item, ts_ms, event, kind, member, outcome, cause, "
    "frozen, amount_fen, order_id, base, uncapped, points, campaigns, evidence, device, ip, phone, masked"
)

UPSERT_BALANCES: Final = """
    INSERT INTO book.balances AS b (member, pending, held)
    SELECT * FROM unnest(%b::text[], %b::bigint[], %b::bigint[])
    ON CONFLICT (member) DO UPDATE SET pending = b.pending + excluded.pending, held = b.held + excluded.held
"""

_json = msgspec.json.Encoder()


def position_of(connection: Connection, partition: str) -> tuple[int, Link]:
    """Return the partition's number in the book and where the book stands in its ledger; a new one is added."""
    connection.execute("INSERT INTO book.partitions (name) VALUES (%s) ON CONFLICT DO NOTHING", (partition,))
    row = connection.execute(
        "SELECT partition_id, batch, digest, through, next_seq, rulebook FROM book.partitions WHERE name = %s",
        (partition,),
    ).fetchone()
    assert row is not None
    return row[0], Link(row[1], bytes(row[2]), parse_stream_id(row[3]), row[4], row[5])


class Book:
    """Posts the ledger of one partition. ``link`` is where the book stands, and where its chain goes on."""

    def __init__(self, connection: Connection, partition: str) -> None:
        self.connection = connection
        self.partition = partition
        self.partition_id, self.link = position_of(connection, partition)
        self._known_days: set[int] = set()
        self._freezing_limits: dict[int, frozenset[str]] = {}

    def post(
        self,
        batches: Sequence[EntriesBatch | RulebookRecord],
        links: Sequence[Link],
        controls: Mapping[int, ControlEvent],
    ) -> None:
        """Post ``batches`` that were verified, the first continuing ``link``; ``links`` is where each of them ends.

        ``controls`` has the control events of their applied entries, by seq. Raises ``BookError`` where another
        ingester of this partition was faster.
        """
        entries = [batch for batch in batches if isinstance(batch, EntriesBatch) and batch.header.counts.entries]
        days = {int(day) for batch in entries for day in np.unique(batch.integers("day")[_is_booked(batch)])}
        for day in sorted(days - self._known_days):
            self.connection.execute("SELECT book.ensure_day(%s::date)", (day_text(day),))
            self._known_days.add(day)
        retried(lambda: self._post(batches, entries, links, controls))
        self.link = links[-1]

    def _post(
        self,
        batches: Sequence[EntriesBatch | RulebookRecord],
        entries: Sequence[EntriesBatch],
        links: Sequence[Link],
        controls: Mapping[int, ControlEvent],
    ) -> None:
        with self.connection.transaction(), self.connection.cursor() as cursor:
            self._lock_position(cursor)
            self._record_rulebooks(cursor, batches)
            taken = self._claim(cursor, entries)
            self._raise_balances(cursor, entries, taken)
            number = next_number(cursor)
            for batch in entries:
                self._copy_entries(cursor, batch, number, taken)
                self._insert_deferred(cursor, batch, number)
            self._note_members(cursor, entries, controls, number)
            self._record(cursor, batches, links, number)

    def _lock_position(self, cursor: psycopg.Cursor[Any]) -> None:
        cursor.execute(
            "SELECT batch, digest FROM book.partitions WHERE partition_id = %s FOR UPDATE", (self.partition_id,)
        )
        batch, digest = cursor.fetchone() or (0, b"")
        if (batch, bytes(digest)) != (self.link.batch, self.link.digest):
            raise BookError(
                f"partition {self.partition}: the book is at batch {batch}, not {self.link.batch}: another "
                "`accrual book` posts it"
            )

    def _record_rulebooks(self, cursor: psycopg.Cursor[Any], batches: Sequence[EntriesBatch | RulebookRecord]) -> None:
        for batch in batches:
            if isinstance(batch, RulebookRecord):
                cursor.execute(
                    "INSERT INTO book.rulebooks (partition_id, batch, version, name, text, zone_rules, slack_days) "
                    "VALUES (%s, %s, %s, %s, %s, %s, %s)",
                    (
                        *(self.partition_id, batch.batch, batch.version, batch.name),
                        *(batch.text, batch.zone_rules, batch.slack_days),
                    ),
                )

    # ----------------------------------------------------------------------------------------------- identities

    def _claim(self, cursor: psycopg.Cursor[Any], batches: Sequence[EntriesBatch]) -> set[int]:
        """Claim the event ids of ``batches`` and return the seqs of the entries whose id the book already holds."""
        rows = [_identity_rows(batch, self.partition_id) for batch in batches]
        if not any(rows):
            return set()
        try:
            with self.connection.transaction():
                _copy(cursor, "book.identities", "event, order_id, day, partition_id, seq, late", rows)
        except psycopg.errors.UniqueViolation:
            return self._claim_one_by_one(cursor, rows)
        return set()

    def _claim_one_by_one(self, cursor: psycopg.Cursor[Any], rows: Sequence[bytes]) -> set[int]:
        cursor.execute("CREATE TEMP TABLE IF NOT EXISTS claims (LIKE book.identities) ON COMMIT DELETE ROWS")
        cursor.execute("TRUNCATE claims")
        _copy(cursor, "claims", "event, order_id, day, partition_id, seq, late", rows)
        cursor.execute("INSERT INTO book.identities SELECT * FROM claims ORDER BY seq ON CONFLICT (event) DO NOTHING")
        cursor.execute(
            """
            INSERT INTO book.exceptions (kind, partition_id, seq, event, detail, data)
            SELECT 'id_taken', c.partition_id, c.seq, c.event,
                'the ledger has it, but its id was already booked: seq ' || i.seq || ' of partition ' || p.name,
                jsonb_build_object('partition', p.name, 'seq', i.seq)
            FROM claims c JOIN book.identities i USING (event) JOIN book.partitions p ON p.partition_id = i.partition_id
            WHERE (i.partition_id, i.seq) <> (c.partition_id, c.seq)
            RETURNING seq
            """
        )
        return {seq for (seq,) in cursor.fetchall()}

    # ------------------------------------------------------------------------------------------------- balances

    def _raise_balances(self, cursor: psycopg.Cursor[Any], batches: Sequence[EntriesBatch], taken: set[int]) -> None:
        changes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for batch in batches:
            outcome, points = batch.integers("outcome"), batch.integers("points")
            rows = np.flatnonzero((points > 0) & (outcome <= HELD))
            members = batch.texts("member")
            first_seq = batch.header.first_seq
            # An outcome is also the account: 0 granted, to pending; 1 held.
            for row, account, moved in zip(rows.tolist(), outcome[rows].tolist(), points[rows].tolist(), strict=True):
                if not taken or first_seq + row not in taken:
                    changes[members[row]][account] += moved
        if not changes:
            return
        # Members in the database's order: every transaction that locks several of them does it in this one.
        members = sorted(changes, key=str.encode)
        ordered = [changes[member] for member in members]
        cursor.execute(
            UPSERT_BALANCES,
            (
                [stored(member) for member in members],
                [change[0] for change in ordered],
                [change[1] for change in ordered],
            ),
        )

    # -------------------------------------------------------------------------------------------------- entries

    def _copy_entries(self, cursor: psycopg.Cursor[Any], batch: EntriesBatch, number: int, taken: set[int]) -> None:
        booked = _is_booked(batch)
        if taken:
            booked = booked.copy()
            booked[[row for row in range(len(booked)) if batch.header.first_seq + row in taken]] = False
        if not booked.any():
            return
        columns = _entry_columns(batch, self.partition_id, number)
        if not booked.all():
            rows = np.flatnonzero(booked)
            columns = [column.taken(rows) for column in columns]
        _copy(cursor, "book.entries", ENTRY_COLUMNS, [copying.rows_of(columns)])

    def _insert_deferred(self, cursor: psycopg.Cursor[Any], batch: EntriesBatch, number: int) -> None:
        if DEFERRED not in batch.integers("outcome"):
            return
        rows = [
            (
                *(self.partition_id, seq, number, batch.header.rulebook, position.stream_id, position.index),
                *(day_text(entry.day), entry.ts, stored(entry.event), stored(entry.kind), stored(entry.member)),
                *(entry.cause, entry.amount, stored(entry.order) or None),
                *(_signed(fingerprint) for fingerprint in entry.fingerprints),
                entry.payload,
            )
            for seq, position, entry in batch.rows()
            if entry.outcome == "deferred"
        ]
        cursor.executemany(
            "INSERT INTO book.deferred (partition_id, seq, number, rulebook, stream_id, item, day, ts_ms, event, kind, "
            "member, cause, amount_fen, order_id, device, ip, phone, payload) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            rows,
        )
        cursor.executemany(
            "INSERT INTO book.waiting (partition_id, seq, cause, number) VALUES (%s, %s, %s, %s)",
            [(row[0], row[1], row[11], number) for row in rows],
        )

    def _note_members(
        self,
        cursor: psycopg.Cursor[Any],
        batches: Sequence[EntriesBatch],
        controls: Mapping[int, ControlEvent],
        number: int,
    ) -> None:
        changes = [
            change for batch in batches for change in member_changes(batch, self._freezing(cursor, batch), controls)
        ]
        note_members(cursor, self.partition_id, number, changes)

    def _freezing(self, cursor: psycopg.Cursor[Any], batch: EntriesBatch) -> frozenset[str]:
        """Return the limits that freeze, by the rulebook that decided ``batch``."""
        version = batch.header.rulebook
        if version not in self._freezing_limits:
            cursor.execute(
                "SELECT text FROM book.rulebooks WHERE partition_id = %s AND version = %s AND batch < %s "
                "ORDER BY batch DESC LIMIT 1",
                (self.partition_id, version, batch.batch),
            )
            row = cursor.fetchone()
            rulebook = parse(row[0]) if row else None
            limits = rulebook.limits if rulebook else ()
            self._freezing_limits = {version: frozenset(limit.id for limit in limits if limit.action == "freeze")}
        return self._freezing_limits[version]

    # ------------------------------------------------------------------------------------------------- position

    def _record(
        self,
        cursor: psycopg.Cursor[Any],
        batches: Sequence[EntriesBatch | RulebookRecord],
        links: Sequence[Link],
        number: int,
    ) -> None:
        rows = [_batch_row(batch, link, self.partition_id, number) for batch, link in zip(batches, links, strict=True)]
        cursor.executemany(
            "INSERT INTO book.batches (partition_id, batch, number, digest, previous, after, through, first_seq, "
            "stream_entries, events, entries, duplicates, dead_letters, rulebook) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            rows,
        )
        last = links[-1]
        cursor.execute(
            "UPDATE book.partitions SET batch = %s, digest = %s, through = %s, next_seq = %s, rulebook = %s "
            "WHERE partition_id = %s",
            (last.batch, last.digest, stream_id_text(last.through), last.next_seq, last.rulebook, self.partition_id),
        )


def _is_booked(batch: EntriesBatch) -> NDArray[np.bool_]:
    """Tell of each entry whether it is booked as it is; deferred ones wait for the slow path."""
    booked: NDArray[np.bool_] = batch.integers("outcome") != DEFERRED
    return booked


def _identity_rows(batch: EntriesBatch, partition_id: int) -> bytes:
    """Return the rows of ``book.identities``."""
    booked = np.flatnonzero(_is_booked(batch))
    count = batch.header.counts.entries
    pays = np.array([kind == ORDER_KIND for kind in batch.kinds])[batch.integers("kind")]
    columns = [
        copying.texts(*batch.raw_texts("event")),
        copying.texts(*batch.raw_texts("order"), empty_is_null=True).where(pays),
        copying.dates(batch.integers("day")),
        copying.integers(np.full(count, partition_id), 2),
        copying.integers(batch.header.first_seq + np.arange(count), 8),
        copying.booleans(np.zeros(count)),
    ]
    return copying.rows_of([column.taken(booked) for column in columns] if len(booked) < count else columns)


def _entry_columns(batch: EntriesBatch, partition_id: int, number: int) -> list[Column]:
    """Return the columns of ``book.entries``, in the order of ``ENTRY_COLUMNS``, for all entries of a batch."""
    count = batch.header.counts.entries
    integers = batch.integers
    amount = integers("amount")
    ids = [f"{ms}-{seq}".encode() for ms, seq in zip(integers("at").tolist(), integers("at_seq").tolist(), strict=True)]
    return [
        copying.dates(integers("day")),
        copying.integers(np.full(count, partition_id), 2),
        copying.integers(batch.header.first_seq + np.arange(count), 8),
        copying.booleans(np.zeros(count)),
        copying.integers(np.full(count, number), 8),
        copying.integers(np.full(count, batch.header.rulebook), 4),
        copying.texts(np.array([len(text) for text in ids]), b"".join(ids)),
        copying.integers(integers("index"), 4),
        copying.integers(integers("ts"), 8),
        copying.texts(*batch.raw_texts("event")),
        copying.coded(integers("kind"), [stored(kind).encode() for kind in batch.kinds]),
        copying.texts(*batch.raw_texts("member")),
        copying.coded(integers("outcome"), [outcome.encode() for outcome in OUTCOMES]),
        copying.coded(integers("cause"), [cause.encode() or None for cause in CAUSES]),
        copying.booleans(integers("frozen")),
        copying.integers(amount, 8, amount < 0),
        copying.texts(*batch.raw_texts("order"), empty_is_null=True),
        *(copying.integers(integers(name), 8) for name in ("base", "uncapped", "points")),
        copying.coded(integers("campaign_set"), [_text_array(ids) for ids in batch.campaign_sets]),
        _json_column(count, _evidence(batch)),
        *(copying.integers(integers(name), 8, integers(name) == 0) for name in ("device", "ip", "phone")),
        _json_column(count, _masked(batch)),
    ]


def _text_array(values: Sequence[str]) -> bytes | None:
    """Return a ``text[]`` as a binary ``COPY`` has it; ``None``, for null, where it is empty."""
    if not values:
        return None
    head = struct.pack(">iiiii", 1, 0, TEXT_TYPE, len(values), 1)
    return head + b"".join(struct.pack(">i", len(data)) + data for data in (stored(value).encode() for value in values))


def _evidence(batch: EntriesBatch) -> dict[int, object]:
    """Return the evidence of SPEC section 5 of the entries that tripped a limit, by row."""
    tripped = batch.integers("tripped")
    observed = iter(batch.integers("observed").tolist())
    return {
        row: [
            {"limit": limit, "observed": next(observed)}
            for number, limit in enumerate(batch.limits)
            if int(tripped[row]) >> number & 1
        ]
        for row in np.flatnonzero(tripped).tolist()
    }


def _masked(batch: EntriesBatch) -> dict[int, object]:
    rows = np.flatnonzero(batch.integers("tripped")).tolist()
    texts = [batch.texts(f"{key}_masked") for key in MASKED]
    found = (
        {key: stored(text) for key, text in zip(MASKED, values, strict=True) if text}
        for values in zip(*texts, strict=True)
    )
    return {row: masked for row, masked in zip(rows, found, strict=True) if masked}


def _json_column(count: int, values: Mapping[int, object]) -> Column:
    """Return a ``jsonb`` column that is null but for the rows in ``values``."""
    lengths = np.full(count, copying.NULL)
    encoded = {row: b"\x01" + _json.encode(value) for row, value in sorted(values.items())}
    lengths[list(encoded)] = [len(data) for data in encoded.values()]
    return Column(lengths, np.frombuffer(b"".join(encoded.values()), np.uint8))


def _batch_row(batch: EntriesBatch | RulebookRecord, link: Link, partition_id: int, number: int) -> tuple[Any, ...]:
    if isinstance(batch, EntriesBatch):
        header, counts = batch.header, batch.header.counts
        previous, after, first_seq = header.previous, header.after, header.first_seq
    else:
        counts = Counts()
        previous, after, first_seq = batch.previous, batch.after, batch.first_seq
    return (
        *(partition_id, link.batch, number, link.digest, previous, stream_id_text(after)),
        *(stream_id_text(link.through), first_seq, counts.stream_entries, counts.events, counts.entries),
        *(counts.duplicates, counts.dead_letters, link.rulebook),
    )


def next_number(cursor: psycopg.Cursor[Any]) -> int:
    """Draw the number that orders what is booked now behind all that was booked before."""
    cursor.execute("SELECT nextval('book.numbers')")
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def _copy(cursor: psycopg.Cursor[Any], table: LiteralString, columns: LiteralString, rows: Sequence[bytes]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(sql.SQL(table), sql.SQL(columns))
    with cursor.copy(statement) as copy:
        copy.write(copying.HEADER)
        for piece in rows:
            copy.write(piece)
        copy.write(copying.TRAILER)


def _signed(value: int) -> int | None:
    """Return a fingerprint as the database keeps it: null for none, else the signed number with its bits."""
    return signed(value) if value else None
