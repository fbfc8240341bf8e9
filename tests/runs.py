"""Runs of workers over one stream, and what must come out of them whatever happens on the way."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from accrual.stream import Keys
from servers import Server
from workers import (
    NOON_MS,
    WorkerProcess,
    checkpoint_of,
    compact,
    expected,
    fill,
    ledger_output,
    ledger_rows,
    order,
    stream_entries,
)

__all__ = ["check", "check_like", "drain", "producing"]


@contextmanager
def producing(
    server: Server, partition: str, count: int, per_second: int, rng: random.Random, *copies: str
) -> Iterator[threading.Thread]:
    """Add ``count`` entries in the background: some duplicates, some conflicts, some poison.

    ``copies`` are partitions that get the same.
    """
    # A generator of its own: how much of it is used depends on when the producer is stopped.
    entries = _entries(count, random.Random(rng.getrandbits(64)))
    stop = threading.Event()

    def produce() -> None:
        client = redis.Redis(host="127.0.0.1", port=server.port)
        while not stop.is_set() and (next_ones := list(itertools.islice(entries, 50))):
            for name in (partition, *copies):
                fill(client, name, next_ones)
            time.sleep(50 / per_second)
        client.close()

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def _entries(count: int, rng: random.Random) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(1, count + 1):
        chosen = rng.choice([number] * 8 + [rng.randrange(1, number + 1)])
        event = order(chosen) if rng.random() > 0.01 else order(chosen, amount=1)
        value = {"e": compact(event)} if rng.random() > 0.02 else {"e": b"\xc1"}
        yield f"{NOON_MS + number}-0", value


def drain(url: str, rulebook: Path, partition: str = "p", *flags: str) -> None:
    with WorkerProcess(url, partition, rulebook, "--drain", *flags) as worker:
        assert worker.wait() == 0, worker.log


def check(server: Server, partition: str = "p") -> None:
    """The ledger, its bytes and the counts are those of a run in which nothing happened."""
    client = server.client()
    entries = stream_entries(client, partition)
    wanted = expected(entries)
    assert ledger_rows(client, partition) == wanted.rows
    assert ledger_output(server, partition) == wanted.ledger
    checkpoint = checkpoint_of(client, partition)
    assert checkpoint.stream_entries == len(entries)
    assert checkpoint.events == len(wanted.rows) + wanted.duplicates + len(wanted.dead_letters)
    assert client.xlen(Keys(partition).deadletters) == checkpoint.dead_letters == len(wanted.dead_letters)


def check_like(server: Server, one: str, other: str) -> None:
    """Compare two partitions to the byte: ledger, entries and dead letters."""
    client = server.client()
    assert ledger_output(server, one) == ledger_output(server, other)
    assert ledger_rows(client, one) == ledger_rows(client, other)
    letters = [client.xrange(Keys(name).deadletters) for name in (one, other)]
    assert letters[0] == letters[1]
