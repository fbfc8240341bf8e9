"""Ledger batches into the book: each in one transaction with its position and digest, so that none counts twice.

Several batches that are there already share a transaction. A transaction goes like this:

1. the partition's row is locked, and must stand where we believe it does (two ingesters of a partition take turns);
2. event ids are claimed. Where the book already holds one, the entry moves nothing, and an exception says so;
3. balances are changed, in the order of members, as every job locks them;
4. only then is the number drawn that orders these entries among postings, and the entries are copied in, with the last
   one of each day.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from accrual.book import copying
from accrual.book.database import Connection, merge, retried
from accrual.book.days import BookedDay, note_days
from accrual.book.members import member_changes, note_members
from accrual.book.rows import (
    BALANCE_COLUMNS,
    DEFERRED_COLUMNS,
    ENTRY_COLUMNS,
    IDENTITY_COLUMNS,
    WAITING_COLUMNS,
    Group,
    group_of,
)
from accrual.book.texts import stored
from accrual.book.waiting import take_turn
from accrual.errors import BookError
from accrual.ledger import EntriesBatch, Link, RulebookRecord
from accrual.outcomes import Counts
from accrual.rulebook import day_text, parse
from accrual.stream import parse_stream_id, stream_id_text

__all__ = ["Book", "copy_rows", "position_of"]

CREATE_CLAIMS: Final = (
    "CREATE TEMP TABLE IF NOT EXISTS claims (LIKE book.identities INCLUDING DEFAULTS) ON COMMIT DELETE ROWS"
)
CREATE_RAISED: Final = """
    CREATE TEMP TABLE IF NOT EXISTS raised (member text COLLATE "C", pending bigint, held bigint) ON COMMIT DELETE ROWS
"""
# What a crash of the database takes of the last moments is read from the ledger again, from the position that it has
# left. Whatever a job makes of it comes to the disk behind it.
NEED_NOT_WAIT: Final = "SET LOCAL synchronous_commit = off"

POSITION: Final = "SELECT partition_id, batch, digest, through, next_seq, rulebook FROM book.partitions WHERE name = %s"

# One member after the other by the primary key, whose rows are locked in that order.
PLAN_RAISE: Final = "SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)"
RAISE: Final = """
    MERGE INTO book.balances b USING (SELECT member, pending, held FROM raised ORDER BY member) r ON b.member = r.member
    WHEN MATCHED THEN UPDATE SET pending = b.pending + r.pending, held = b.held + r.held
    WHEN NOT MATCHED THEN INSERT (member, pending, held) VALUES (r.member, r.pending, r.held)
"""


def position_of(connection: Connection, partition: str) -> tuple[int, Link]:
    """Return the partition's number in the book and where the book stands in its ledger; a new one is added."""
    row = connection.execute(POSITION, (partition,)).fetchone()
    if row is None:
        with connection.transaction(), connection.cursor() as cursor:
            # A late event that is being decided holds back the partitions that there are.
            take_turn(cursor)
            cursor.execute("INSERT INTO book.partitions (name) VALUES (%s) ON CONFLICT DO NOTHING", (partition,))
            row = cursor.execute(POSITION, (partition,)).fetchone()
    assert row is not None
    return row[0], Link(row[1], bytes(row[2]), parse_stream_id(row[3]), row[4], row[5])


class Book:
    """Posts the ledger of one partition. ``link`` is where the book stands, and where its chain goes on."""

    def __init__(self, connection: Connection, partition: str) -> None:
        self.connection = connection
        self.partition = partition
        self.partition_id, self.link = position_of(connection, partition)
        self._known_days: set[int] = set()
        self._is_on_disk = True
        self._freezing_limits: dict[int, frozenset[str]] = {}

    def post(self, group: Group) -> None:
        """Post batches that were verified, the first continuing ``link``. ``flush`` brings them to the disk.

        Raises ``BookError`` where another ingester of this partition was faster.
        """
        for day in sorted(group.days.keys() - self._known_days):
            self.connection.execute("SELECT book.ensure_day(%s::date)", (day_text(day),))
            self._known_days.add(day)
        retried(lambda: self._post(group))
        self.link = group.links[-1]
        self._is_on_disk = False

    def flush(self) -> None:
        """Wait until all that was posted is on the database's disk: ``post`` does not."""
        if not self._is_on_disk:
            # A commit that waits for its own, behind all the others.
            self.connection.execute(
                "UPDATE book.partitions SET batch = batch WHERE partition_id = %s", (self.partition_id,)
            )
            self._is_on_disk = True

    def _post(self, group: Group) -> None:
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.execute(NEED_NOT_WAIT)
            self._lock_position(cursor)
            self._record_rulebooks(cursor, group.batches)
            taken = self._claim(cursor, group)
            if taken:
                group = group_of(group.batches, group.links, group.controls, self.partition_id, taken)
            self._raise_balances(cursor, group)
            cursor.execute("SELECT set_config('book.number', nextval('book.numbers')::text, true)::bigint")
            number: int = (cursor.fetchone() or (0,))[0]
            copy_rows(cursor, "book.entries", ENTRY_COLUMNS, group.entries)
            copy_rows(cursor, "book.deferred", DEFERRED_COLUMNS, group.deferred)
            copy_rows(cursor, "book.waiting", WAITING_COLUMNS, group.waiting)
            self._note_members(cursor, group, number, taken)
            note_days(cursor, [BookedDay(day, self.partition_id, seq) for day, seq in group.days.items()])
            self._record(cursor, group)

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
                        *(self.partition_id, batch.batch, batch.version, stored(batch.name)),
                        *(batch.text, batch.zone_rules, batch.slack_days),
                    ),
                )

    def _claim(self, cursor: psycopg.Cursor[Any], group: Group) -> set[int]:
        """Claim the event ids of ``group`` and return the seqs of the entries whose id the book already holds."""
        try:
            with self.connection.transaction():
                copy_rows(cursor, "book.identities", IDENTITY_COLUMNS, group.identities)
        except psycopg.errors.UniqueViolation:
            return self._claim_one_by_one(cursor, group.identities)
        return set()

    def _claim_one_by_one(self, cursor: psycopg.Cursor[Any], rows: Sequence[memoryview]) -> set[int]:
        cursor.execute(CREATE_CLAIMS)
        cursor.execute("TRUNCATE claims")
        copy_rows(cursor, "claims", IDENTITY_COLUMNS, rows)
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

    def _raise_balances(self, cursor: psycopg.Cursor[Any], group: Group) -> None:
        cursor.execute(CREATE_RAISED)
        copy_rows(cursor, "raised", BALANCE_COLUMNS, group.balances)
        cursor.execute(PLAN_RAISE)
        merge(cursor, RAISE)

    def _note_members(self, cursor: psycopg.Cursor[Any], group: Group, number: int, taken: set[int]) -> None:
        changes = [
            change
            for batch in group.batches
            if isinstance(batch, EntriesBatch)
            for change in member_changes(batch, self._freezing(cursor, batch), group.controls, taken)
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

    def _record(self, cursor: psycopg.Cursor[Any], group: Group) -> None:
        ended = zip(group.batches, group.links, strict=True)
        cursor.executemany(
            "INSERT INTO book.batches (partition_id, batch, digest, previous, after, through, first_seq, "
            "stream_entries, events, entries, duplicates, dead_letters, rulebook) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [_batch_row(batch, link, self.partition_id) for batch, link in ended],
        )
        last = group.links[-1]
        cursor.execute(
            "UPDATE book.partitions SET batch = %s, digest = %s, through = %s, next_seq = %s, rulebook = %s "
            "WHERE partition_id = %s",
            (last.batch, last.digest, stream_id_text(last.through), last.next_seq, last.rulebook, self.partition_id),
        )


def _batch_row(batch: EntriesBatch | RulebookRecord, link: Link, partition_id: int) -> tuple[Any, ...]:
    if isinstance(batch, EntriesBatch):
        header, counts = batch.header, batch.header.counts
        previous, after, first_seq = header.previous, header.after, header.first_seq
    else:
        counts = Counts()
        previous, after, first_seq = batch.previous, batch.after, batch.first_seq
    return (
        *(partition_id, link.batch, link.digest, previous, stream_id_text(after)),
        *(stream_id_text(link.through), first_seq, counts.stream_entries, counts.events, counts.entries),
        *(counts.duplicates, counts.dead_letters, link.rulebook),
    )


def copy_rows(
    cursor: psycopg.Cursor[Any], table: LiteralString, columns: Sequence[str], rows: Sequence[memoryview]
) -> None:
    """Copy rows, in pieces as ``copying.rows_of`` returns them, into ``columns`` of a table."""
    if not any(rows):
        return
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    with cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(sql.SQL(table), names)) as copy:
        copy.write(copying.HEADER)
        for piece in rows:
            copy.write(piece)
        copy.write(copying.TRAILER)
