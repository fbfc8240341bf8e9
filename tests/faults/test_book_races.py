"""Twenty jobs at once on one member: what comes out is what some order of them, one after the other, would give."""

from __future__ import annotations

import random
import threading
from datetime import date

import pytest

from accrual.book import adjust, connect, expire, rebuild, release, settle, slow
from accrual.rulebook import day_number
from books import Partition, at, balance, ingest
from servers import Server

DAY = day_number(date(2026, 11, 10))
THREADS = 20


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_releases_adjustments_and_settlements_of_one_member(valkey: Server, book: str, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    partition = Partition(valkey.client())
    orders = [
        {"id": f"e{number}", "kind": "order_paid", "member": "m", "ts": at(number % 2, number), "amount": 1000}
        | {"order": f"o{number}", "device": "d"}
        for number in range(14)
    ]
    refunds = [
        {"id": f"r{number}", "kind": "order_refunded", "member": "m", "ts": at(1, 60 + number), "amount": 500}
        | {"order": f"o{number}"}
        for number in range(0, 14, 3)
    ]
    partition.send(*orders, *refunds)
    with connect(book) as connection:
        ingest(connection, partition)
        pending, _, held = balance(connection, "m")
        assert pending + held == 140
        assert held > 0
    jobs = ["release"] * 7 + ["adjust"] * 6 + ["settle"] * 5 + ["slow"] * 2
    rng.shuffle(jobs)
    start = threading.Barrier(THREADS)
    failed: list[Exception] = []

    def run(number: int, job: str) -> None:
        try:
            with connect(book) as connection:
                start.wait()
                if job == "release":
                    release(connection, "m", reason="checked", by=f"reviewer {number}")
                elif job == "adjust":
                    points = 10 if number % 2 else -7
                    adjust(
                        connection, "m", points, reason="race", note="", by="x", approval_points=99, key=f"k{number}"
                    )
                elif job == "settle":
                    settle(connection, partition.rulebook, DAY + number % 2)
                else:
                    slow(connection, partition.rulebook, refund_wait_hours=1)
        except Exception as error:  # noqa: BLE001 - told to the test, which fails
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number, job)) for number, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    adjusted = sum(10 if number % 2 else -7 for number, job in enumerate(jobs) if job == "adjust")
    with connect(book) as connection:
        for day in (DAY, DAY + 1):
            settle(connection, partition.rulebook, day)
        assert balance(connection, "m") == (0, 140 - 5 * len(refunds) + adjusted, 0)
        counts: dict[str, int] = dict(
            connection.execute("SELECT kind, count(*)::int FROM book.postings GROUP BY kind").fetchall()
        )
        assert counts["refund"] == len(refunds)
        assert counts["adjust"] == jobs.count("adjust")
        assert connection.execute("SELECT count(*) FROM book.outbox").fetchone() == (1,)
        # An order that was fully refunded while it was held leaves nothing to release; none is here.
        assert counts["release"] == held // 10
        assert list(rebuild(connection)) == []
        expire(connection, DAY + 3650)
        assert balance(connection, "m")[1] <= 0
