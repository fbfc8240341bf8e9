"""Ledger batches into the book: once each, in order, whatever the ids and members are."""

from __future__ import annotations

import os
import re
import socket
import threading
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from accrual.audit.members import check_members
from accrual.audit.recorded import recorded_rulebooks
from accrual.book import connect, exceptions, held, rebuild, settle, slow, statement
from accrual.book.follow import Follower, follow
from accrual.errors import BookError
from accrual.rulebook import day_number
from audits import found
from books import BOOK_RULEBOOK, TAKING_RULEBOOK, Partition, at, balance, facts, ingest, order, taking
from servers import Server
from workers import WorkerProcess, compact, fill, wait_until

FACTS = {
    "batches": "number",
    "rulebooks": "version",
    "entries": "points",
    "entries_20261110": "points",
    "identities": "seq",
    "actions": "by",
    "postings": "points",
}
WAITING_FOR_US = "SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
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


def test_names_of_a_rulebook_that_the_database_cannot_keep(valkey: Server, book: str) -> None:
    text = BOOK_RULEBOOK
    for name in ("book-test", "member-cap", "device-orders"):
        text = text.replace(f'"{name}"', rf'"{name}\u0000\\0"')
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(*(order(number, device="d") for number in range(1, 7)), order(7, "m2", 200_000))
    partition.send(order(8, "m3", device="d") | {"at": at(3)}, order(9, "m4", 200_000) | {"at": at(3)})
    limit, cap = "device-orders\0\\0", "member-cap\0\\0"
    with connect(book) as connection:
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        (frozen,) = held(connection)
        assert frozen["entries"][0]["evidence"] == [{"limit": limit, "observed": 6}]
        assert f"limit {limit}" in frozen["entries"][0]["words"]
        (left,) = exceptions(connection)
        assert left["data"] == {"evidence": [{"limit": limit, "observed": 7}]}
        for member in ("m2", "m4"):
            (line,) = statement(connection, member)
            assert f"limit {cap}" in line["words"]
        assert not list(rebuild(connection, dry_run=True))
        assert not list(found(valkey, connection))


def test_what_the_server_is_configured_to_does_not_matter(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(book, autocommit=True) as connection:
        for setting in ("datestyle = 'German'", "default_transaction_isolation = 'repeatable read'"):
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET {setting}")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    partition = Partition(valkey.client())
    partition.send(order(1, "会员"), order(2, "会员", device="d"))
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "会员") == (0, 20, 0)
        assert [line["day"] for line in statement(connection, "会员")] == ["2026-11-10"] * 3
        assert not list(found(valkey, connection))
        with connection.transaction():
            assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)


def test_a_database_that_vanishes_is_noticed(book: str) -> None:
    # Its own address is that of a socket in a directory.
    address = re.sub("host=[^&]*", "host=127.0.0.1", book)
    for url, idle_s in ((address, 5), (f"{address}&keepalives_idle=77", 77)):
        with connect(url) as connection, socket.socket(fileno=os.dup(connection.fileno())) as own:
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle_s
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


def test_a_database_that_cannot_keep_every_text_is_refused(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        name = f"{connection.info.dbname}_latin"
        connection.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0")
        try:
            with pytest.raises(BookError, match="the encoding LATIN1, and the book needs UTF8"):
                connect(database.replace(connection.info.dbname, name))
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


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


def test_what_is_not_booked_changes_no_state(valkey: Server, book: str) -> None:
    one, other = Partition(valkey.client(), "one"), Partition(valkey.client(), "other")
    kinds = ("member_frozen", "member_blocked", "member_updated")
    for partition, members in ((one, "ab"), (other, "cd")):
        said = {"ts": at(), "member": members[0], "tier": "gold"}
        partition.send(*(said | {"id": kind, "kind": kind} for kind in kinds))
        partition.send(*(order(number, members[1], device="d") for number in range(1, 8)))
    with connect(book) as connection:
        ingest(connection, one)
        ingest(connection, other)
        states = connection.execute("SELECT member, state, tier FROM book.members ORDER BY member").fetchall()
        assert states == [("a", "blocked", "gold"), ("b", "frozen", None), ("c", "active", "gold")]
        assert not list(rebuild(connection, dry_run=True))
        assert not list(check_members(connection, recorded_rulebooks(connection)))


def test_what_is_noted_beside_entries(valkey: Server, book: str) -> None:
    one, other = Partition(valkey.client(), "one"), Partition(valkey.client(), "other")
    one.send(
        order(1),
        order(2, "m2", day=1),
        order(3, "m3", day=1, order=""),
        {"id": "c1", "kind": "checkin", "member": "m1", "ts": at(1, 9)},
    )
    # Of these, the id of a day's last one is booked, and the last one of all is left to a job.
    refund = {"id": "r1", "kind": "order_refunded", "member": "m1", "ts": at(1, 9), "order": "o1", "amount": 1}
    other.send(order(5), order(2, "m2"), order(6, "m6", day=1), refund)
    with connect(book) as connection:
        ingest(connection, one, other)
        paid = connection.execute(
            "SELECT event, paid_order, payer, late FROM book.identities ORDER BY event"
        ).fetchall()
        assert paid == [
            ("c1", None, None, False),
            ("e1", "o1", "m1", False),
            ("e2", "o2", "m2", False),
            ("e3", None, None, False),
            ("e5", "o5", "m1", False),
            ("e6", "o6", "m6", False),
        ]
        query = "SELECT day::text, partition_id, last_seq FROM book.days ORDER BY day, partition_id"
        days = [("2026-11-10", 1, 1), ("2026-11-10", 2, 1), ("2026-11-11", 1, 4), ("2026-11-11", 2, 3)]
        assert connection.execute(query).fetchall() == days
        one.send(order(7, day=1), order(8, day=2))
        ingest(connection, one)
        days[2:] = [("2026-11-11", 1, 5), days[3], ("2026-11-12", 1, 6)]
        assert connection.execute(query).fetchall() == days


FROZEN_AND_REJECTED = (
    BOOK_RULEBOOK
    + """
[[limit]]
id = "device-most"
key = "device"
measure = "events"
window = "day"
max = 8
action = "reject"
"""
)


def test_who_goes_on_tripping_limits_is_frozen_once(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=FROZEN_AND_REJECTED)
    released = [
        {"id": f"r{member}", "kind": "member_released", "member": member, "ts": at(), "immune_until": at(0, minutes)}
        for member, minutes in (("m2", 300), ("m3", 400))
    ]
    partition.send(*released, *(order(number, f"m{number % 4}", device="d") for number in range(1, 400)))
    with connect(book) as connection:
        ingest(connection, partition)
        states = connection.execute("SELECT member, state FROM book.members ORDER BY member").fetchall()
        assert states == [("m0", "frozen"), ("m1", "frozen"), ("m2", "frozen"), ("m3", "active")]
        assert not list(found(valkey, connection))
        # A row that is written again leaves the one that was there behind.
        assert connection.execute("SELECT pg_relation_size('book.members')").fetchone() == (8192,)


def test_a_control_event_changes_what_its_kind_does(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    said = {"ts": at(), "tier": "gold", "card_until": at(8), "immune_until": at(9)}
    kinds = ("member_updated", "member_frozen", "member_released", "member_blocked")
    partition.send(*({"id": kind, "kind": kind, "member": kind} | said for kind in kinds))
    with connect(book) as connection:
        ingest(connection, partition)
        columns = "member, state, tier, card_until_ms, immune_until_ms"
        assert connection.execute(f"SELECT {columns} FROM book.members ORDER BY member").fetchall() == [
            ("member_blocked", "blocked", None, None, None),
            ("member_frozen", "frozen", None, None, None),
            ("member_released", "active", None, None, at(9)),
            ("member_updated", "active", "gold", at(8), None),
        ]
        assert not list(found(valkey, connection))


def test_a_stream_entry_of_many_control_events_is_read_once(valkey: Server, book: str, tmp_path: Path) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK, encoding="utf-8")
    client = valkey.client()
    update = {"kind": "member_updated", "ts": at(), "tier": "gold"}
    for page in range(3):
        numbers = range(page * 100, page * 100 + 100)
        events = [msgspec.Raw(compact(update | {"id": f"u{number}", "member": f"m{number}"})) for number in numbers]
        fill(client, "p", [(f"{at()}-{page}", {"b": msgspec.msgpack.encode(events)})])
    with WorkerProcess(valkey.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0, worker.log
    client.config_resetstat()
    with connect(book) as connection:
        with Follower(connection, client, "p") as follower:
            follow([follower], threading.Event(), drain=True)
        rows = connection.execute("SELECT tier, incomplete, count(*) FROM book.members GROUP BY 1, 2").fetchall()
        assert rows == [("gold", False, 300)]
    said: Any = client.info("commandstats")
    # And some of the ledger.
    assert said["cmdstat_xrange"]["calls"] < 20


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


def test_an_ingester_that_starts_again_uses_up_no_numbers_of_partitions(valkey: Server, book: str) -> None:
    """There are 32 767 of them."""
    partition, other = Partition(valkey.client()), Partition(valkey.client(), "q")
    with connect(book) as connection:
        for _ in range(5):
            ingest(connection, partition)
        ingest(connection, other)
        assert connection.execute("SELECT partition_id, name FROM book.partitions").fetchall() == [(1, "p"), (2, "q")]


def test_a_member_whom_another_partition_adds_at_the_same_moment(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1, "m0"), order(2, "m1"), order(3, "m2"))

    def run() -> None:
        with connect(book) as connection:
            ingest(connection, partition)

    with connect(book) as connection:
        ingesting = threading.Thread(target=run)
        with connection.transaction():
            connection.execute("INSERT INTO book.balances (member, pending) VALUES ('m1', 5)")
            ingesting.start()
            wait_until(lambda: bool(connection.execute(WAITING_FOR_US).fetchall()), "the ingester waits")
        ingesting.join()
        assert [balance(connection, f"m{number}") for number in range(3)] == [(10, 0, 0), (15, 0, 0), (10, 0, 0)]


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


def test_negative_points_of_a_worker_are_posted(valkey: Server, book: str, tmp_path: Path) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(TAKING_RULEBOOK, encoding="utf-8")
    events = [
        order(1),
        taking(2),
        taking(3, "m2", 300),
        {"id": "f", "kind": "member_frozen", "member": "m3", "ts": at(0, 4)},
        order(5, "m3", 200),
        taking(6, "m3"),
        order(7, "m4", 500),
        taking(8, "m4"),
    ]
    fill(valkey.client(), "p", [(f"{event['ts']}-0", {"e": compact(event)}) for event in events])
    with WorkerProcess(valkey.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0, worker.log
    with connect(book) as connection:
        with Follower(connection, valkey.client(), "p") as follower:
            follow([follower], threading.Event(), drain=True)
        points = {member: balance(connection, member) for member in ("m1", "m2", "m3", "m4")}
        assert points == {"m1": (5, 0, 0), "m2": (-2, 0, 0), "m3": (0, 0, -3), "m4": (0, 0, 0)}
        accounts = connection.execute("SELECT account, points FROM book.accounts ORDER BY account").fetchall()
        assert accounts == [("held", -3), ("issuance", 0), ("pending", 3)]
        moved = [
            (line["from"], line["to"], line["points"], line["words"].partition(". ")[2].partition(",")[0])
            for member in ("m1", "m3")
            for line in statement(connection, member)
        ]
        assert [(*moves, words) for *moves, words in moved] == [
            ("pending", "issuance", 5, "5 points taken"),
            ("issuance", "pending", 10, "10 points granted"),
            ("held", "issuance", 5, "5 points to be taken"),
            ("issuance", "held", 2, "2 points held"),
        ]
        (line,) = held(connection)
        assert (line["held"], [entry["held"] for entry in line["entries"]]) == (-3, [-5, 2, 0])
        assert line["entries"][0]["words"].endswith("5 points to be taken, and held.")
        assert not list(rebuild(connection, dry_run=True))
        assert not list(found(valkey, connection))


def test_a_day_that_comes_to_less_than_nothing_is_settled_out_of_lots(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    partition.send(order(1, "m1", 2000), order(2, "m2", 300))
    partition.send(taking(3, "m1", day=1), taking(4, "m2", day=1))
    partition.send(order(5, "m3", day=1), taking(6, "m3", day=1), order(7, "m4", 500, day=1), taking(8, "m4", day=1))
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        assert (balance(connection, "m1"), balance(connection, "m2")) == ((-5, 20, 0), (-5, 3, 0))
        done = settle(connection, partition.rulebook, DAY + 1, dry_run=True)
        assert (done.postings, done.points) == (3, 5 - 5 - 5)
        settle(connection, partition.rulebook, DAY + 1)
        rows = connection.execute(
            "SELECT member, from_account, to_account, points, lot_days::text[], lot_points, lot_expires_on::text "
            "FROM book.postings WHERE day = '2026-11-11' ORDER BY member"
        ).fetchall()
        assert rows == [
            ("m1", "available", "pending", 5, ["2026-11-10"], [5], None),
            ("m2", "available", "pending", 5, ["2026-11-10", None], [3, 2], None),
            ("m3", "pending", "available", 5, ["2026-11-11"], [5], "2027-11-11"),
        ]
        points = {member: balance(connection, member) for member in ("m1", "m2", "m3", "m4")}
        assert points == {"m1": (0, 15, 0), "m2": (0, -2, 0), "m3": (0, 5, 0), "m4": (0, 0, 0)}
        # What comes later settles the rest, whatever else is pending; it makes up for what no lot had.
        partition.send(taking(10, "m3", 400, day=1), order(11, "m2", 1000, day=1), order(12, "m3", 200, day=2))
        ingest(connection, partition)
        assert balance(connection, "m3") == (0, 5, 0)
        settle(connection, partition.rulebook, DAY + 1)
        assert (balance(connection, "m2"), balance(connection, "m3")) == ((0, 8, 0), (2, 3, 0))
        words = {line["points"]: line["words"] for line in statement(connection, "m3", kind="settle")}
        assert words == {
            5: "Business day 2026-11-11 was settled: 5 points became available; 5 are in the lot of 2026-11-11, which "
            "expires on 2027-11-11.",
            2: "Business day 2026-11-11 was settled: 2 points were taken; 2 came from the lot of 2026-11-11.",
        }
        assert not list(rebuild(connection, dry_run=True))
        assert not list(found(valkey, connection))
