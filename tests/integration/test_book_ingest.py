"""Ledger batches into the book: once each, in order, whatever the ids and members are."""

from __future__ import annotations

import threading
from datetime import date

import psycopg
import pytest

from accrual.book import connect, rebuild, settle, slow, statement
from accrual.book.follow import Follower, follow
from accrual.errors import BookError
from accrual.rulebook import day_number
from audits import found
from books import BOOK_RULEBOOK, Partition, at, balance, facts, ingest, order
from servers import Server

FACTS = {
    "batches": "number",
    "rulebooks": "version",
    "entries": "points",
    "entries_20261110": "points",
    "identities": "seq",
    "actions": "by",
    "postings": "points",
}
DAY = day_number(date(2026, 11, 10))


def test_entries_become_pending_and_held_points(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d1") for number in range(1, 8)))
    with connect(book) as connection:
        ingest(connection, partition)
        assert balance(connection, "m1") == (50, 0, 20)
        assert connection.execute("SELECT sum(points) FROM book.accounts").fetchone() == (0,)
        assert connection.execute("SELECT state FROM book.members").fetchall() == [("frozen",)]
        ingest(connection, partition)
        assert balance(connection, "m1") == (50, 0, 20)


def test_facts_cannot_be_changed(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2))
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        assert connection.execute("SELECT count(*) FROM book.postings").fetchone() == (1,)
        for table, column in FACTS.items():
            for change in (f"UPDATE book.{table} SET {column} = {column}", f"DELETE FROM book.{table}"):
                with pytest.raises(psycopg.errors.RestrictViolation, match="append-only"):
                    connection.execute(change)
            with pytest.raises(psycopg.errors.RestrictViolation, match="append-only"):
                connection.execute(f"TRUNCATE book.{table} CASCADE")


def test_texts_that_the_database_cannot_keep(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    strange = ["a\0b", "a\\0b", "a\\\\0b", "\0", "会员\0", "a␀b"]
    partition.send(
        *(order(number, member, id=f"{member}{number}", order=f"o{member}") for number, member in enumerate(strange))
    )
    with connect(book) as connection:
        ingest(connection, partition)
        rows = connection.execute("SELECT pending FROM book.balances").fetchall()
        assert rows == [(10,)] * len(strange)


def test_an_id_that_is_already_booked_moves_nothing(valkey: Server, book: str) -> None:
    one, other = Partition(valkey.client(), "one"), Partition(valkey.client(), "other")
    one.send(order(1), order(2))
    other.send(order(2, amount=5000), order(3))
    with connect(book) as connection:
        ingest(connection, one)
        ingest(connection, other)
        assert balance(connection, "m1") == (30, 0, 0)
        rows = connection.execute("SELECT kind, event, data FROM book.exceptions").fetchall()
        assert rows == [("id_taken", "e2", {"partition": "one", "seq": 2})]


def test_two_ingesters_of_one_partition_post_once(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    for first in range(0, 200, 10):
        partition.send(*(order(number) for number in range(first, first + 10)))

    def run() -> None:
        with connect(book) as connection:
            while True:
                try:
                    with Follower(connection, valkey.client(), "p") as follower:
                        follow([follower], threading.Event(), drain=True)
                except BookError:
                    continue
                return

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with connect(book) as connection:
        assert connection.execute("SELECT count(*), sum(points) FROM book.entries").fetchone() == (200, 2000 - 1000)
        assert len(facts(connection)["partitions"]) == 1


def test_settlement_makes_lots(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2, "m2"), order(3, "m2"))
    with connect(book) as connection:
        ingest(connection, partition)
        done = settle(connection, partition.rulebook, DAY, dry_run=True)
        assert (done.members, done.points) == (2, 30)
        assert balance(connection, "m2") == (20, 0, 0)
        done = settle(connection, partition.rulebook, DAY)
        assert (done.members, done.points) == (2, 30)
        assert balance(connection, "m2") == (0, 20, 0)
        assert settle(connection, partition.rulebook, DAY).points == 0
        lots = connection.execute(
            "SELECT member, day::text, expires_on::text, points FROM book.lots ORDER BY member"
        ).fetchall()
        assert lots == [("m1", "2026-11-10", "2027-11-10", 10), ("m2", "2026-11-10", "2027-11-10", 20)]
        partition.send(order(4, "m2"))
        ingest(connection, partition)
        assert balance(connection, "m2") == (10, 20, 0)
        assert settle(connection, partition.rulebook, DAY).points == 10
        assert balance(connection, "m2") == (0, 30, 0)


def test_a_rulebook_may_have_the_largest_version(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=BOOK_RULEBOOK.replace("version = 1", f"version = {2**53 - 1}"))
    partition.send(order(1), order(2, day=-4) | {"at": at()}, order(1) | {"id": "r1", "kind": "order_refunded"})
    with connect(book) as connection:
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        assert balance(connection, "m1") == (10, 0, 0)
        assert [line["rulebook"] for line in statement(connection, "m1")] == [2**53 - 1] * 3
        assert not list(found(valkey, connection))
        assert not list(rebuild(connection, dry_run=True))
