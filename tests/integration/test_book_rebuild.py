"""Projections made anew from the facts: equal after every kind of posting, put right where they are not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import pytest

from accrual.book import Connection, adjust, confirm, connect, expire, rebuild, release, settle, slow
from accrual.rulebook import day_number
from books import Partition, at, balance, facts, ingest, order
from servers import Server
from workers import command

DAY = day_number(date(2026, 11, 10))
WHO: Any = {"by": "alice", "reason": "checked"}

SPOIL = (
    "UPDATE book.balances SET pending = pending + 1, available = available - 3 WHERE member = 'm2'",
    "DELETE FROM book.balances WHERE member = 'm3'",
    "INSERT INTO book.balances (member, held) VALUES ('nobody', 3)",
    "UPDATE book.lots SET points = points + 9, expires_on = expires_on + 1 WHERE member = 'm2'",
    "DELETE FROM book.lots WHERE member = 'm3'",
    "INSERT INTO book.lots (member, day, expires_on, points) VALUES ('nobody', '2026-11-10', '2027-11-10', 5)",
    "UPDATE book.members SET state = 'active' WHERE member = 'm1'",
    "DELETE FROM book.members WHERE member = 'm5'",
    "UPDATE book.days SET last_seq = 1 WHERE day = '2026-11-10'",
    "DELETE FROM book.days WHERE day = '2026-11-11'",
    "INSERT INTO book.days SELECT '2026-11-09', 1, 7",
)


def control(number: int, kind: str, member: str, **fields: object) -> dict[str, object]:
    return {"id": f"c{number}", "kind": kind, "member": member, "ts": at(minutes=number)} | fields


def state(connection: Connection, member: str) -> str:
    row = connection.execute("SELECT state FROM book.members WHERE member = %s", (member,)).fetchone()
    return row[0] if row else "none"


def history(server: Server, connection: Connection) -> Partition:
    """Book something of everything: m1 is frozen by a limit, m4 released, m5 blocked, m6 unfrozen by an event."""
    partition = Partition(server.client())
    partition.send(*(order(number, device="d1") for number in range(1, 8)))
    partition.send(*(order(10 + number, "m4", device="d4") for number in range(1, 8)))
    partition.send(*(order(20 + number, "m5", device="d5") for number in range(1, 8)))
    partition.send(order(30, "m2"), order(31, "m2", ts=at(1)), order(32, "m3"), order(33, "m6"), order(34, "m\\0"))
    partition.send(control(40, "member_frozen", "m6"), control(41, "member_updated", "m2", tier="gold"))
    partition.send(order(42, "m6"), control(43, "member_released", "m6", immune_until=at(3)), order(44, "m6"))
    refund = {"id": "r1", "kind": "order_refunded", "member": "m2", "ts": at(2), "order": "o30", "amount": 300}
    partition.send(order(50, "m2", ts=at(0, 700), at=at(3)), refund | {"ts": at(3)})
    ingest(connection, partition)
    settle(connection, partition.rulebook, DAY)
    slow(connection, partition.rulebook, refund_wait_hours=1)
    release(connection, "m4", **WHO)
    confirm(connection, "m5", **WHO, claw_back=(DAY, DAY))
    for member, points in (("m3", -30), ("m2", 40), ("m3", 5), ("m7", 9)):
        adjust(connection, member, points, reason="goodwill", note="", by="alice", approval_points=100)
    expire(connection, day_number(date(2027, 11, 10)))
    return partition


def test_they_come_out_equal(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        states = [state(connection, f"m{number}") for number in range(1, 8)]
        assert states == ["frozen", "active", "none", "active", "blocked", "active", "none"]
        before = facts(connection)
        assert list(rebuild(connection)) == []
        assert facts(connection) == before


def test_what_differs_is_said_and_put_right(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        before = facts(connection)
        for change in SPOIL:
            connection.execute(change)
        spoilt = facts(connection)
        found = list(rebuild(connection, dry_run=True))
        assert facts(connection) == spoilt
        days = [line for line in found if line["projection"] == "days"]
        assert [(line["day"], line["partition"], line["was"], line["is"]) for line in days] == [
            ("2026-11-09", "p", 7, None),
            ("2026-11-10", "p", 1, 32),
            ("2026-11-11", "p", None, 23),
        ]
        found = [line for line in found if line not in days]
        assert [(line["projection"], line["member"]) for line in found] == [
            *(("balances", member) for member in ("m2", "m3", "nobody")),
            *(("lots", member) for member in ("m2", "m2", "m3", "nobody")),
            *(("members", member) for member in ("m1", "m5")),
        ]
        by_key = {(line["projection"], line["member"]): (line["was"], line["is"]) for line in found}
        nothing = {"available": 0, "held": 0, "pending": 0}
        assert by_key["balances", "nobody"] == (nothing | {"held": 3}, nothing)
        assert by_key["lots", "nobody"] == ({"expires_on": "2027-11-10", "points": 5}, None)
        assert by_key["members", "m1"] == ({"state": "active"}, {"state": "frozen"})
        assert by_key["members", "m5"] == (None, {"state": "blocked"})
        done = command("book", "rebuild", "--database", book)
        assert (done.returncode, len(done.stdout.splitlines())) == (1, len(found) + len(days))
        assert facts(connection) == before
        assert (state(connection, "m1"), state(connection, "m5")) == ("frozen", "blocked")
        assert command("book", "rebuild", "--database", book).returncode == 0
        noted = connection.execute("SELECT details FROM book.actions WHERE kind = 'rebuild'").fetchall()
        assert noted == [({"differences": len(found) + len(days)},)]
        assert connection.execute("SELECT last_seq FROM book.days ORDER BY day").fetchall() == [(32,), (23,)]


def test_it_waits_for_a_job_that_is_at_work(valkey: Server, book: str) -> None:
    with connect(book) as connection, connect(book) as job:
        history(valkey, connection)
        found: list[Any] = []
        with job.transaction():
            job.execute("UPDATE book.balances SET pending = pending + 1 WHERE member = 'm2'")
            rebuilding = threading.Thread(target=lambda: found.extend(rebuild(connection)))
            rebuilding.start()
            rebuilding.join(0.3)
            assert rebuilding.is_alive()
            job.execute("UPDATE book.balances SET pending = pending - 1 WHERE member = 'm2'")
        rebuilding.join()
        assert found == []


def test_who_only_asks_keeps_nobody_waiting_and_writes_nothing(valkey: Server, book: str) -> None:
    with connect(book) as connection, connect(book) as job:
        history(valkey, connection)
        count = "SELECT count(*) FROM book.balances"
        before = connection.execute(count).fetchone()
        connection.execute("SET lock_timeout = '5s'")
        with job.transaction():
            job.execute("UPDATE book.balances SET pending = pending + 1")
            assert list(rebuild(connection, dry_run=True)) == []
            assert list(rebuild(connection, member="m1", dry_run=True)) == []
        connection.execute("UPDATE book.balances SET pending = pending - 1")
        for dry_run in (True, False):
            assert list(rebuild(connection, member="unknown", dry_run=dry_run)) == []
        assert connection.execute(count).fetchone() == before


@pytest.mark.parametrize("flags", [("--dry-run",), ("--member", "m1")])
def test_flags_of_a_rebuild_do_not_let_the_ingester_loose(flags: tuple[str, ...]) -> None:
    done = command("book", *flags)
    assert done.returncode == 2
    assert done.stderr == b"accrual book: --dry-run, --member: go with rebuild, and only with that\n"


def test_it_tells_the_truth_while_jobs_and_the_ingester_run(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    for first in range(0, 600, 20):
        partition.send(*(order(number, f"m{number % 7}") for number in range(first, first + 20)))
    stop = threading.Event()

    def run(work: Any) -> None:
        with connect(book) as connection:
            while not stop.is_set():
                work(connection)

    def adjusts(connection: Connection) -> None:
        adjust(connection, "m1", 1, reason="goodwill", note="", by="alice", approval_points=100)

    def settles(connection: Connection) -> None:
        settle(connection, partition.rulebook, DAY)

    with ThreadPoolExecutor() as threads, connect(book) as connection, connect(book) as other:
        jobs = [threads.submit(run, work) for work in (adjusts, adjusts, settles)]
        ingesting = threads.submit(ingest, other, partition)
        try:
            differences = [list(rebuild(connection)) for _ in range(12)]
            ingesting.result()
        finally:
            stop.set()
        assert [job.result() for job in jobs] == [None] * 3
        assert differences == [[]] * 12
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m2") == (0, 860, 0)
        assert list(rebuild(connection)) == []
