"""The schema: brought up to date once, by whoever comes first, and never by a program that is older than it."""

from __future__ import annotations

import hashlib
import importlib.resources
import threading
from datetime import date
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from accrual.book import Connection, connect, migrate, open_book, rebuild, settle, slow, statement
from accrual.cli import main
from accrual.errors import BookError
from accrual.rulebook import day_number
from audits import found
from books import Partition, at, balance, facts, ingest, order
from servers import Server

FOLDER = Path(str(importlib.resources.files("accrual.book"))) / "migrations"
NAMES = sorted(file.name for file in FOLDER.glob("*.sql"))


def applied(connection: psycopg.Connection[tuple[object, ...]]) -> list[object]:
    return [name for (name,) in connection.execute("SELECT name FROM book.migrations ORDER BY applied_at, name")]


def earlier_book(connection: psycopg.Connection[tuple[object, ...]], migrations: int) -> None:
    """Make the book as a program with so many migrations did."""
    connection.execute("DROP SCHEMA book CASCADE")
    connection.execute("CREATE SCHEMA book")
    connection.execute(
        "CREATE TABLE book.migrations (name text PRIMARY KEY, sha256 text NOT NULL, "
        "applied_at timestamptz NOT NULL DEFAULT now())"
    )
    for name in NAMES[:migrations]:
        text = (FOLDER / name).read_text(encoding="utf-8")
        connection.execute(text.encode())
        checksum = hashlib.sha256(text.encode()).hexdigest()
        connection.execute("INSERT INTO book.migrations (name, sha256) VALUES (%s, %s)", (name, checksum))


def test_a_book_of_an_earlier_program_keeps_what_it_has(book: str) -> None:
    with connect(book) as connection:
        earlier_book(connection, 1)
        connection.execute("INSERT INTO book.actions (kind, by) VALUES ('adjust', 'alice')")
        connection.execute(
            "INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, lot_days, "
            "lot_points) SELECT nextval('book.numbers'), action, 'adjust', 'm1', 'issuance', 'available', 5, "
            "'2026-11-10', ARRAY['2026-11-10'::date], ARRAY[5] FROM book.actions"
        )
        assert migrate(connection) == NAMES[1:]
        assert migrate(connection) == []
        assert applied(connection) == NAMES
        assert connection.execute("SELECT member, points FROM book.standing").fetchall() == [("m1", 5)]


def test_entries_of_the_default_partition_go_to_their_days(book: str) -> None:
    insert = (
        "INSERT INTO book.entries (day, partition_id, seq, late, number, rulebook, stream_id, item, ts_ms, event, "
        "kind, member, outcome, frozen, base, uncapped, points) "
        "VALUES (%s, 1, %s, true, %s, 1, '1-0', 0, 1, %s, 'order_paid', 'm', 'granted', false, 1, 1, 1)"
    )
    days = ["2026-11-10", "1970-01-05", "2026-11-05", "2026-11-12", "2027-01-01", "2025-11-10", "2025-11-08"]
    with connect(book) as connection:
        earlier_book(connection, 2)
        connection.execute("SELECT book.ensure_day('2026-11-10')")
        for number, day in enumerate(days, 1):
            connection.execute(insert, (day, number, number, f"e{number}"))
        ask = "INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by, action) VALUES "
        connection.execute("INSERT INTO book.actions (kind, by) VALUES ('adjust', 'alice')")
        connection.execute(f"{ask} ('posted', 'm', -20000, 'x', '', 'alice', (SELECT action FROM book.actions))")
        connection.execute(f"{ask} ('waiting', 'm', 30000, 'x', '', 'alice', NULL)")
        before = connection.execute("SELECT * FROM book.entries ORDER BY seq").fetchall()
        assert migrate(connection) == NAMES[2:]
        assert connection.execute("SELECT * FROM book.entries ORDER BY seq").fetchall() == before
        rows = connection.execute("SELECT tableoid::regclass::text FROM book.entries ORDER BY seq").fetchall()
        assert [name.removeprefix("book.entries_") for (name,) in rows] == [
            *("20261110", "other", "20261105", "20261112", "20270101", "20251110", "other")
        ]
        with pytest.raises(psycopg.errors.RestrictViolation):
            connection.execute("DELETE FROM book.entries WHERE day < '2000-01-01'")
        with pytest.raises(psycopg.errors.CheckViolation, match="no partition of relation"):
            connection.execute(insert, ("2026-11-11", 99, 99, "e99"))
        limits = connection.execute("SELECT adjustment, approval_points FROM book.adjustments ORDER BY 1").fetchall()
        assert limits == [("posted", 20_000), ("waiting", 0)]
        # A book that has nothing yet learns its first day when it gets it.
        earlier_book(connection, 2)
        migrate(connection)
        connection.execute("SELECT book.ensure_day(day) FROM (VALUES ('2026-11-10'::date), ('2001-01-01')) d (day)")
        tables = connection.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'book.entries'::regclass"
        )
        assert sorted(name for (name,) in tables) == ["book.entries_20261110", "book.entries_other"]


def test_a_book_of_a_newer_or_another_program_is_refused(book: str) -> None:
    with connect(book) as connection:
        connection.execute("INSERT INTO book.migrations (name, sha256) VALUES ('9999_future.sql', '')")
    with (
        pytest.raises(BookError, match=r"made by a newer program: this one does not know 9999_future\.sql"),
        open_book(book),
    ):
        pass
    with connect(book) as connection:
        connection.execute("DELETE FROM book.migrations WHERE name = '9999_future.sql'")
        connection.execute("UPDATE book.migrations SET sha256 = 'other' WHERE name = %s", (NAMES[0],))
    with pytest.raises(BookError, match=f"another {NAMES[0]} than this program has"), open_book(book):
        pass


def test_a_postgresql_older_than_15_is_refused(
    book: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("balance", "--database", book, "--member", "m1")
    for version, status in ((150000, 0), (149999, 1), (130014, 1)):
        monkeypatch.setattr(psycopg.ConnectionInfo, "server_version", version)
        assert main(arguments) == status
        said = f"accrual balance: the database is PostgreSQL {version // 10000}, and the book needs 15 or newer\n"
        assert capfd.readouterr().err == (said if status else "")


def test_several_at_once_make_one_book(book: str) -> None:
    with connect(book) as connection:
        connection.execute("DROP SCHEMA book CASCADE")
    done: list[list[str]] = []

    def run() -> None:
        with connect(book) as connection:
            done.append(migrate(connection))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [[], [], [], NAMES]


def test_a_book_of_an_earlier_program_takes_negative_points(book: str) -> None:
    insert = (
        "INSERT INTO book.entries (day, partition_id, seq, late, number, rulebook, stream_id, item, ts_ms, event, "
        "kind, member, outcome, frozen, base, uncapped, points) "
        "VALUES (%s, 1, %s, false, 1, 1, '1-0', 0, 1, 'e', 'order_paid', 'm', 'granted', false, 10, -5, -5)"
    )
    files = (
        "SELECT oid::regclass::text, pg_relation_filenode(oid) FROM pg_class "
        "WHERE relname ~ '^(entries_|balances)' AND relkind = 'r' ORDER BY 1"
    )
    with connect(book) as connection:
        earlier_book(connection, 4)
        connection.execute("SELECT book.ensure_day(day) FROM (VALUES ('2026-11-10'::date), ('2001-01-01')) d (day)")
        before = connection.execute(files).fetchall()
        assert [name for name, _ in before] == ["book.balances", "book.entries_20261110", "book.entries_other"]
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(insert, ("2026-11-10", 1))
        assert migrate(connection) == NAMES[4:]
        assert connection.execute(files).fetchall() == before
        connection.execute("SELECT book.ensure_day('2026-11-11')")
        for number, day in enumerate(("2026-11-10", "2001-01-01", "2026-11-11")):
            connection.execute(insert, (day, number))
        connection.execute("INSERT INTO book.balances (member, pending, held) VALUES ('m', -15, -1)")
        moved = connection.execute("SELECT DISTINCT from_account, to_account, points FROM book.movements").fetchall()
        assert moved == [("pending", "issuance", 5)]
        checks = connection.execute("SELECT DISTINCT conname FROM pg_constraint WHERE conname LIKE '%points_check'")
        assert sorted(name for (name,) in checks) == [
            *("adjustments_points_check", "approval_limits_points_check", "lots_points_check", "postings_points_check")
        ]


TABLES = (
    "SELECT relname FROM pg_class WHERE relnamespace = 'book'::regnamespace AND relkind IN ('r', 'p') "
    "AND NOT relispartition AND relname NOT IN ('migrations', 'partitions') ORDER BY 1"
)
COLUMNS = (
    "SELECT attname FROM pg_attribute WHERE attrelid = format('book.%%I', %s::text)::regclass AND attnum > 0 "
    "AND NOT attisdropped ORDER BY attnum"
)


def made_earlier(connection: Connection, migrations: int) -> None:
    """Have the book look as if a program with so many migrations had filled it."""
    connection.execute("CREATE SCHEMA kept")
    for (table,) in [("partitions",), *connection.execute(TABLES).fetchall()]:
        connection.execute(sql.SQL("CREATE TABLE kept.{0} AS SELECT * FROM book.{0}").format(sql.Identifier(table)))
    (number,) = connection.execute("SELECT nextval('book.numbers')").fetchone() or (0,)
    earlier_book(connection, migrations)
    connection.execute("SELECT setval('book.numbers', %s)", (number,))
    connection.execute("SELECT book.ensure_day(day) FROM (SELECT DISTINCT day FROM kept.entries ORDER BY day DESC) d")
    with connection.transaction():
        for (table,) in [("partitions",), *connection.execute(TABLES).fetchall()]:
            columns = sql.SQL(", ").join(sql.Identifier(name) for (name,) in connection.execute(COLUMNS, (table,)))
            insert = sql.SQL("INSERT INTO book.{0} ({1}) OVERRIDING SYSTEM VALUE SELECT {1} FROM kept.{0}")
            connection.execute(insert.format(sql.Identifier(table), columns))
    connection.execute("DROP SCHEMA kept CASCADE")


def test_a_book_of_an_earlier_program_finds_entries_by_member(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    checkin = {"id": "c1", "kind": "checkin", "member": "m1", "ts": at(1, 9)}
    refund = {"kind": "order_refunded", "ts": at(4), "amount": 500}
    partition.send(order(1), order(2, "m2", order=""), order(3, "m2", day=1), checkin)
    partition.send(order(4, "m3", at=at(4)), order(5, "m3", ts=at(-900), at=at(4)))
    partition.send(refund | {"id": "r1", "member": "m1", "order": "o1"})
    day = day_number(date(2026, 11, 10))
    with connect(book) as connection:
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        settle(connection, partition.rulebook, day)
        tables = {
            table: sorted(map(repr, connection.execute(f"SELECT * FROM book.{table}")))
            for table in ("entries", "identities", "days", "settled_days")
        }
        before = facts(connection)
        made_earlier(connection, 5)
        assert connection.execute("SELECT to_regclass('book.days')").fetchone() == (None,)
        assert migrate(connection) == NAMES[5:]
        assert facts(connection) == before
        for table, rows in tables.items():
            assert sorted(map(repr, connection.execute(f"SELECT * FROM book.{table}"))) == rows
        paid = connection.execute("SELECT event, payer FROM book.identities WHERE payer IS NOT NULL ORDER BY event")
        assert paid.fetchall() == [("e1", "m1"), ("e3", "m2"), ("e4", "m3"), ("e5", "m3")]
        with pytest.raises(psycopg.errors.RestrictViolation):
            connection.execute("UPDATE book.identities SET payer = NULL")
        # It goes on as if it had never been another one, on days that it has and on one that is new.
        partition.send(*(refund | {"id": f"r{number}", "member": "m3", "order": f"o{number}"} for number in (4, 5)))
        partition.send(order(6, "m1", day=5), order(7, "m3", ts=at(0, 50), at=at(5)))
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        assert [balance(connection, member) for member in ("m1", "m2", "m3")] == [(25, 5, 0), (10, 10, 0), (5, 15, 0)]
        assert [line["event"] for line in statement(connection, "m3", kind="refund")] == ["e5", "e4"]
        assert list(rebuild(connection)) == []
        assert [finding.line() for finding in found(valkey, connection)] == []
        # Every day has the indexes that entries are to have, and no other; late is what is said to be.
        entries = "SELECT inhrelid AS oid FROM pg_inherits WHERE inhparent = 'book.entries'::regclass"
        indexes = connection.execute(
            "SELECT e.oid::regclass::text, indisprimary, pg_get_indexdef(indexrelid) "
            f"FROM ({entries}) e LEFT JOIN pg_index ON indrelid = e.oid ORDER BY 1, 2"
        ).fetchall()
        wanted = [
            (False, "USING brin (partition_id, seq int8_minmax_multi_ops) WITH (autosummarize='on')"),
            (True, "USING btree (member, seq, partition_id, late, day)"),
        ]
        days = ["20261110", "20261111", "20261115", "other"]
        assert [(name, primary, "USING " + text.partition("USING ")[2]) for name, primary, text in indexes] == [
            (f"book.entries_{day}", *index) for day in days for index in wanted
        ]
        defaults = connection.execute(
            "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef JOIN pg_attribute "
            "ON (attrelid, attnum) = (adrelid, adnum) WHERE attname = 'late' AND adrelid IN "
            f"({entries} UNION VALUES ('book.entries'::regclass::oid), ('book.identities'::regclass::oid))"
        ).fetchall()
        assert defaults == [("false",)] * (len(days) + 2)
