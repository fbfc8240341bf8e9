"""The scheduler: which days are due, everything in its order, one leader, an orderly end."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import redis

from accrual.book import Connection, Done, Scheduler, connect, release, schedule, settle, slow
from accrual.book.schedule import days_to_settle
from accrual.errors import BookError
from accrual.rulebook import Rulebook, day_number, parse
from accrual.settings import Settings
from books import BOOK_RULEBOOK, DAY_MS, Partition, at, balance, facts, ingest, order, run_json
from servers import Server, ServerFactory
from workers import ROOT, environment, wait_until

DAY = day_number(date(2026, 11, 10))
EXPIRY = day_number(date(2027, 11, 10))
NOTHING = {"members": 0, "postings": 0, "points": 0}

Order = dict[str, Any]


def scheduler(valkey: Server, book: str, rulebook: Rulebook, day: int, **settings: Any) -> Scheduler:
    """Return a scheduler for which it is the morning of the ``day``-th day from 2026-11-10."""
    return Scheduler(Settings(redis=valkey.url, database=book, **settings), rulebook, now_ms=lambda: at(day))


def once(valkey: Server, book: str, partition: Partition, day: int) -> list[dict[str, Any]]:
    """Do each job once on the ``day``-th day and return what was done, without the jobs that had nothing to do."""
    reports = list(scheduler(valkey, book, partition.rulebook, day).run_once(threading.Event()))
    assert [report["job"] for report in reports if report["job"] != "settle"] == ["slow", "remind", "expire", "outbox"]
    return [report for report in reports if any(report.get(name) for name in ("postings", "points", "messages"))]


def due(valkey: Server, connection: Connection, partition: Partition, day: int) -> list[int]:
    """Return the days from 2026-11-10 that are due on the ``day``-th."""
    found = days_to_settle(connection, valkey.client(), partition.rulebook, DAY + day)
    return [one.day - DAY for one in found]


def arrive(partition: Partition, event: Order) -> None:
    """Let an event arrive that no worker has decided yet."""
    partition.client.xadd(partition.keys.events, {"j": json.dumps(event)}, id=f"{event['ts']}-999")


def test_a_day_is_due_when_its_time_has_come_and_the_book_is_past_it(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    with connect(book) as connection:
        assert due(valkey, connection, partition, 5) == []
        partition.send(order(1))
        ingest(connection, partition)
        assert due(valkey, connection, partition, 0) == []
        # The book has all that arrived; then something arrives that it has not.
        assert due(valkey, connection, partition, 1) == [0]
        arrive(partition, order(2))
        assert due(valkey, connection, partition, 1) == []
        assert due(valkey, connection, partition, 100) == []


def test_a_later_arrival_shows_that_the_book_is_past_a_day(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    partition.send(order(2, day=1))
    with connect(book) as connection:
        ingest(connection, partition)
        arrive(partition, order(3, day=1))
        assert due(valkey, connection, partition, 1) == [0]
        assert due(valkey, connection, partition, 100) == [0]


def test_every_partition_must_be_past_a_day(valkey: Server, book: str) -> None:
    one, other = Partition(valkey.client(), "one"), Partition(valkey.client(), "other")
    one.send(order(1), order(2, day=1))
    other.send(order(3, "m2"))
    with connect(book) as connection:
        ingest(connection, one, other)
        assert due(valkey, connection, one, 1) == [0]
        other.send(order(4, "m2"))
        assert due(valkey, connection, one, 1) == []
        ingest(connection, other)
        assert due(valkey, connection, one, 1) == [0]


@pytest.mark.parametrize("days", [0, 3])
def test_settlement_days_are_waited_for(valkey: Server, book: str, days: int) -> None:
    text = BOOK_RULEBOOK.replace("expiry_months = 12", f"expiry_months = 12\nsettlement_days = {days}")
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(order(1))
    with connect(book) as connection:
        ingest(connection, partition)
        assert [due(valkey, connection, partition, day) for day in (days - 1, days)] == [[], [0]]


def test_each_job_once(valkey: Server, book: str) -> None:
    text = BOOK_RULEBOOK.replace("expiry_months = 12", "expiry_months = 12\nexpiry_reminder_days = [3]")
    partition = Partition(valkey.client(), rulebook=text)
    refund = {"id": "r1", "kind": "order_refunded", "member": "m1", "ts": at(1), "amount": 700, "order": "o2"}
    partition.send(order(1), order(2, amount=700), order(3, day=1), refund)
    with connect(book) as connection:
        ingest(connection, partition)
        # The refund comes first, so that what it takes back is not settled.
        assert once(valkey, book, partition, 1) == [
            {"job": "slow", "members": 1, "postings": 1, "points": 7},
            {"job": "settle", "day": "2026-11-10", "members": 1, "postings": 1, "points": 10},
        ]
        assert balance(connection, "m1") == (10, 10, 0)
        before = facts(connection)
        assert once(valkey, book, partition, 1) == []
        assert facts(connection) == before
        assert once(valkey, book, partition, 2)[0]["day"] == "2026-11-11"
        # On the last day: told, over the stream too, before the points of the first day expire.
        assert once(valkey, book, partition, EXPIRY - DAY) == [
            {"job": "remind", "day": "2027-11-10", "members": 1, "postings": 0, "points": 20},
            {"job": "expire", "day": "2027-11-10", "members": 1, "postings": 1, "points": 10},
            {"job": "outbox", "messages": 1},
        ]
        assert balance(connection, "m1") == (0, 10, 0)
        assert valkey.client().xlen(partition.keys.notifications) == 1
        assert once(valkey, book, partition, EXPIRY - DAY) == []


def test_a_dry_run_says_what_each_job_would_do(valkey: Server, book: str, tmp_path: Path) -> None:
    text = BOOK_RULEBOOK.replace("expiry_months = 12", "expiry_months = 1\nexpiry_reminder_days = [3]")
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(order(2, day=-33), order(3, "m2", day=-28))
    with connect(book) as connection:
        ingest(connection, partition)
        assert len(once(valkey, book, partition, -27)) == 2
        partition.send(order(1), order(4, at=at(4), ts=at(0)))
        ingest(connection, partition)
        before = facts(connection), due(valkey, connection, partition, 1)
        jobs = scheduler(valkey, book, partition.rulebook, 1)
        # Another process does the jobs, which is nothing to wait for.
        with jobs._leading(0, threading.Event()):
            reports = list(jobs.dry_run(threading.Event()))
        assert reports == [
            {"job": "slow", "members": 1, "postings": 1, "points": 10, "waiting": 1},
            {"job": "settle", "day": "2026-11-10", "members": 1, "postings": 1, "points": 10},
            {"job": "remind", "day": "2026-11-11", "members": 1, "postings": 0, "points": 10},
            {"job": "expire", "day": "2026-11-11", "members": 1, "postings": 1, "points": 10},
            {"job": "outbox", "messages": 0},
        ]
        assert (facts(connection), due(valkey, connection, partition, 1)) == before
        path = tmp_path / "rulebook.toml"
        path.write_text(text, encoding="utf-8")
        flags = ["--rulebook", str(path), "--redis", valkey.url, "--database", book]
        assert [line["job"] for line in run_json("jobs", *flags, "--dry-run")][-1] == "outbox"
        assert facts(connection) == before[0]


def test_a_long_settlement_says_how_far_it_is(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("accrual.book.chunks.REPORT_S", 0.0)
    monkeypatch.setattr("accrual.book.chunks.CHUNK_MEMBERS", 2)
    partition = Partition(valkey.client())
    partition.send(*(order(number, f"m{number}") for number in range(3)))
    with connect(book) as connection:
        ingest(connection, partition)
        caplog.set_level("INFO", "accrual.book")
        caplog.clear()
        settle(connection, partition.rulebook, DAY)
    assert caplog.messages == [
        "settle 2026-11-10: 2 of 3 members, 2 postings, 20 points",
        "settle 2026-11-10: 3 of 3 members, 3 postings, 30 points",
    ]


def test_stragglers_are_settled_again(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, f"m{number}") for number in range(5)), order(6, day=1))
    with connect(book) as connection:
        ingest(connection, partition)
        assert once(valkey, book, partition, 1)[0]["points"] == 50
        assert due(valkey, connection, partition, 1) == []
        # Of the first day, but here only on the second.
        partition.send(order(7, "m2", at=at(1, 9)), order(8, "m9", at=at(1, 9)))
        ingest(connection, partition)
        assert due(valkey, connection, partition, 1) == [0]
        again = {"job": "settle", "day": "2026-11-10", "members": 2, "postings": 2, "points": 20}
        assert once(valkey, book, partition, 1) == [again]
        assert once(valkey, book, partition, 1) == []
        assert balance(connection, "m2") == (0, 20, 0)
        assert balance(connection, "m1") == (10, 10, 0)


def test_days_settled_by_hand_or_half_are_settled_again(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2, "m2"), order(3, day=1))
    with connect(book) as connection:
        ingest(connection, partition)
        stopping = threading.Event()
        stopping.set()
        assert settle(connection, partition.rulebook, DAY, stopping=stopping).points == 0
        assert connection.execute("SELECT finished FROM book.settled_days").fetchall() == [(False,)]
        assert once(valkey, book, partition, 1)[0]["points"] == 20
        assert settle(connection, partition.rulebook, DAY + 1).points == 10
        assert due(valkey, connection, partition, 2) == [1]
        assert once(valkey, book, partition, 2) == []
        assert due(valkey, connection, partition, 2) == []


def test_days_without_a_partition_of_their_own(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    with connect(book) as connection:
        partition.send(order(1), *(order(day, ts=at(-day), at=at(0, 2)) for day in (2000, 3000)))
        ingest(connection, partition)
        assert due(valkey, connection, partition, 1) == [0]
        slow(connection, partition.rulebook, refund_wait_hours=1)
        assert due(valkey, connection, partition, 1) == [-3000, -2000, 0]
        query = "SELECT day - date '1970-01-01', last_seq FROM book.days ORDER BY day"
        assert connection.execute(query).fetchall() == [(DAY - 3000, 3), (DAY - 2000, 2), (DAY, 1)]


def test_two_schedulers_take_turns(valkey: Server, book: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "accrual.book")
    partition = Partition(valkey.client())
    partition.send(order(1), order(2, day=1))
    with connect(book) as connection:
        ingest(connection, partition)
        with served(valkey, book, partition) as leader:
            wait_until(lambda: balance(connection, "m1") == (10, 10, 0), "the first day is settled")
            with served(valkey, book, partition) as other:
                wait_until(lambda: "standing by" in caplog.text, "another stands by")
                partition.send(order(3, at=at(1, 5)))
                ingest(connection, partition)
                # The leader has settled within the minute, and looks again only after it; the other one at once.
                leader.set()
                wait_until(lambda: balance(connection, "m1") == (10, 20, 0), "the second day is settled")
                other.set()
        assert connection.execute("SELECT count(*) FROM book.postings").fetchone() == (2,)
        locks = """
            SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """
        wait_until(lambda: connection.execute(locks).fetchone() == (0,), "no lock is held")


def test_a_blocked_settlement_keeps_nobody_else_waiting(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), *(order(number, "m2", device="d") for number in range(2, 9)), order(9, "m3"))
    partition.send(order(10, day=1))
    refund = {"id": "r1", "kind": "order_refunded", "member": "m3", "ts": at(1, 20), "amount": 400, "order": "o9"}
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE pg_blocking_pids(pid) = ARRAY[%s::integer]"
    with connect(book) as connection, connect(book) as blocker:
        ingest(connection, partition)
        assert balance(connection, "m2") == (50, 0, 20)
        blocker.execute("BEGIN")
        blocker.execute("SELECT FROM book.balances WHERE member = 'm1' FOR UPDATE")
        with served(valkey, book, partition):
            pid = (blocker.info.backend_pid,)
            wait_until(lambda: connection.execute(blocked, pid).fetchone() == (1,), "a job waits for the lock")
            partition.send(refund)
            ingest(connection, partition)
            release(connection, "m2", reason="checked", by="alice")
            arrived = partition.client.xlen(partition.keys.events)
            wait_until(lambda: partition.client.xlen(partition.keys.events) == arrived + 1, "the release is sent")
            wait_until(lambda: balance(connection, "m3") == (6, 0, 0), "the refund is made")
            assert connection.execute(blocked, pid).fetchone() == (1,)
            assert balance(connection, "m1") == (20, 0, 0)
            blocker.execute("ROLLBACK")
            wait_until(lambda: balance(connection, "m1") == (10, 10, 0), "the first day is settled")


def test_what_waiting_cannot_mend_ends_all_jobs(valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(valkey.client())

    def refuse(*_: object, **__: object) -> Done:
        raise BookError("this cannot be mended")

    monkeypatch.setattr(schedule, "expire", refuse)
    stopping = threading.Event()
    with pytest.raises(BookError, match="cannot be mended"):
        scheduler(valkey, book, partition.rulebook, 1).run(stopping)
    assert stopping.is_set()


def test_a_stream_server_that_does_not_let_us_in_ends_all_jobs(server_factory: ServerFactory, book: str) -> None:
    server = server_factory("valkey", {"requirepass": "word"})
    stopping = threading.Event()
    too_long = threading.Timer(10, stopping.set)
    too_long.start()
    with connect(book) as connection:
        connection.execute("INSERT INTO book.partitions (name) VALUES ('p')")
        with pytest.raises(redis.AuthenticationError):
            scheduler(server, book, parse(BOOK_RULEBOOK), 1).run(stopping)
    too_long.cancel()


def test_the_database_may_go_away(valkey: Server, book: str, caplog: pytest.LogCaptureFixture) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    with connect(book) as connection:
        ingest(connection, partition)
        with served(valkey, book, partition, settle_interval_s=1):
            wait_until(lambda: balance(connection, "m1") == (0, 10, 0), "the first day is settled")
            # The scheduler is between two jobs when its day is marked as done.
            done = "SELECT count(*) FROM book.settled_days WHERE finished AND through IS NOT NULL"
            wait_until(lambda: connection.execute(done).fetchone() == (1,), "the job is done")
            partition.send(order(2))
            ingest(connection, partition)
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            wait_until(lambda: balance(connection, "m1") == (0, 20, 0), "the second day is settled")
            wait_until(lambda: "trying again" in caplog.text, "it says that it tries again")


def test_a_stream_server_that_is_full_is_waited_for(
    server_factory: ServerFactory, book: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_factory("valkey")
    client = server.client()
    partition = Partition(client)
    partition.send({"id": "f1", "kind": "member_frozen", "member": "m1", "ts": at()}, order(1))
    with connect(book) as connection:
        ingest(connection, partition)
        release(connection, "m1", reason="checked", by="alice")
        client.config_set("maxmemory", 1)
        with served(server, book, partition, settle_interval_s=1):
            wait_until(lambda: "trying again" in caplog.text, "it says that it tries again")
            wait_until(lambda: balance(connection, "m1") == (0, 10, 0), "the day is settled all the same")
            client.config_set("maxmemory", 0)
            sent = "SELECT count(*) FROM book.outbox WHERE sent_at IS NOT NULL"
            wait_until(lambda: connection.execute(sent).fetchone() == (1,), "the fast path is told")


def test_a_job_that_is_told_to_stop_ends_in_order(valkey: Server, book: str, tmp_path: Path) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK)
    partition = Partition(valkey.client())
    now_ms = int(time.time() * 1000)
    partition.send(order(1, ts=now_ms - 3 * DAY_MS))
    with connect(book) as connection:
        ingest(connection, partition)
        words = ["jobs", "--rulebook", str(rulebook), "--redis", valkey.url, "--database", book]
        process = subprocess.Popen(
            [sys.executable, "-m", "accrual.cli", *words],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            # The points are available a moment before the day is marked as done, and a stop may come between the two.
            done = "SELECT count(*) FROM book.settled_days WHERE finished AND through IS NOT NULL"
            wait_until(lambda: connection.execute(done).fetchone() == (1,), "the job is done")
            assert balance(connection, "m1") == (0, 10, 0)
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0, log
        assert "1 members, 1 postings, 10 points" in log
        assert "Traceback" not in log
        reports = run_json(*words, "--once")
        assert [report["job"] for report in reports] == ["slow", "remind", "expire", "outbox"]
        assert reports[0] == {"job": "slow"} | NOTHING


@contextlib.contextmanager
def served(valkey: Server, book: str, partition: Partition, **settings: Any) -> Iterator[threading.Event]:
    """Run a scheduler in a thread, on the second day, until the event that this gives is set or the block ends."""
    stopping = threading.Event()
    failed: list[Exception] = []

    def run() -> None:
        try:
            scheduler(valkey, book, partition.rulebook, 1, **settings).run(stopping)
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield stopping
    finally:
        stopping.set()
        thread.join(20)
    assert not thread.is_alive()
    assert failed == []
