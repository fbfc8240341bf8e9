"""The ingester and PostgreSQL are killed while a ledger is posted: the book is that of an unbroken run, to the row."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from accrual.book import connect
from accrual.embedded import EmbeddedDatabase
from accrual.errors import BookError
from books import BOOK_RULEBOOK, Partition, at, facts, ingest
from servers import Server
from workers import ROOT, environment, wait_until

BATCHES = 60
BATCH_EVENTS = 40
PAUSE_S = 0.1


@contextmanager
def book_process(server: Server, url: str, rulebook: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``accrual book`` on partition ``p``; it is killed at the end if it has not ended before."""
    flags = ["--rulebook", str(rulebook), "--redis", server.url, "--database", url, "--partition", "p"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "accrual.cli", "book", *flags],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def fill(partition: Partition, rng: random.Random) -> None:
    """Commit batches of orders, check-ins, refunds, repeated and late events, freezes and tiers."""
    for batch in range(BATCHES):
        events = []
        for number in range(BATCH_EVENTS):
            member = f"会员{rng.randrange(30)}"
            common = {"id": f"{batch}-{number}", "member": member, "ts": at(batch // 10, number)}
            kind = rng.choice(
                ["order_paid"] * 6 + ["checkin", "order_refunded", "late", "member_frozen", "member_updated"]
            )
            if kind in ("order_paid", "late"):
                late = {"ts": at(batch // 10 - 4), "at": at(batch // 10, number)} if kind == "late" else {}
                amount = rng.randrange(1, 30_000)
                device = f"d{rng.randrange(40)}"
                paid = {"kind": "order_paid", "amount": amount, "order": f"o{batch}-{number}", "device": device}
                events.append(common | paid | late)
            elif kind == "order_refunded":
                order = f"o{rng.randrange(batch + 1)}-{rng.randrange(BATCH_EVENTS)}"
                events.append(common | {"kind": kind, "amount": rng.randrange(1, 5000), "order": order})
            elif kind == "member_updated":
                events.append(common | {"kind": kind, "tier": rng.choice(["gold", "silver"])})
            else:
                events.append(common | {"kind": kind})
        partition.send(*events)
        time.sleep(PAUSE_S)


def booked(url: str) -> int:
    """Return the number of the last batch booked; 0 while the database cannot say."""
    try:
        with connect(url) as connection:
            row = connection.execute("SELECT batch FROM book.partitions WHERE name = 'p'").fetchone()
    except (psycopg.Error, BookError):
        return 0
    return row[0] if row else 0


def wait_for_more(url: str, producer: threading.Thread) -> None:
    """Wait until the book has gone on, if there is still something for it to go on with."""
    before = booked(url)
    wait_until(lambda: booked(url) > before or not producer.is_alive(), "a batch is booked")


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(BOOK_RULEBOOK, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "seed", [20261115, pytest.param(7, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_the_ingester_and_the_database_are_killed(
    valkey: Server,
    book: str,
    database_factory: Callable[[], EmbeddedDatabase],
    rulebook: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    database = database_factory()
    partition = Partition(valkey.client(), rulebook=BOOK_RULEBOOK)
    producer = threading.Thread(target=fill, args=(partition, random.Random(seed)))
    producer.start()
    log = tmp_path / "book.log"
    for _ in range(6):
        with book_process(valkey, database.url, rulebook, log) as process:
            wait_for_more(database.url, producer)
            time.sleep(rng.uniform(0.0, 0.3))
            if rng.random() < 0.5:
                database.kill()
                database.start()
                time.sleep(rng.uniform(0.0, 0.5))
            assert process.poll() is None, log.read_text(encoding="utf-8")
    producer.join()
    with book_process(valkey, database.url, rulebook, log):
        wait_until(lambda: booked(database.url) == partition.link.batch, "the last batch is booked")
    with connect(book) as unbroken, connect(database.url) as broken:
        ingest(unbroken, partition)
        assert facts(broken) == facts(unbroken)
        for table in ("deferred", "waiting", "members"):
            columns = "partition_id, seq" if table != "members" else "member, state, tier"
            rows = [
                connection.execute(f"SELECT {columns} FROM book.{table} ORDER BY 1, 2").fetchall()
                for connection in (unbroken, broken)
            ]
            assert rows[0] == rows[1]
            assert rows[0], table


def test_a_ledger_that_ends_before_what_is_booked_stops_the_book(
    valkey: Server, book: str, rulebook: Path, tmp_path: Path
) -> None:
    partition = Partition(valkey.client())
    partition.send({"id": "1", "kind": "order_paid", "member": "m", "ts": at(), "amount": 100})
    partition.send({"id": "2", "kind": "order_paid", "member": "m", "ts": at(), "amount": 100})
    with connect(book) as connection:
        ingest(connection, partition)
    client = valkey.client()
    client.xtrim(partition.keys.ledger, maxlen=0)
    client.delete(partition.keys.ledger, partition.keys.checkpoint)
    Partition(client)
    log = tmp_path / "book.log"
    with book_process(valkey, book, rulebook, log) as process:
        assert process.wait(20) == 1
    assert "its ledger ends at batch 1, but batch 3 is booked" in log.read_text(encoding="utf-8")
