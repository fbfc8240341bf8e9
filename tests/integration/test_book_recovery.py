"""The recovery runbook of docs/BOOK.md: a restored backup goes on, a ledger that was lost stops the book."""

from __future__ import annotations

from datetime import date

import psycopg
import pytest
import redis

from accrual.book import connect, rebuild, settle, slow
from accrual.errors import StreamError
from accrual.rulebook import day_number
from books import Partition, at, facts, ingest, order
from servers import Server

DAY = day_number(date(2026, 11, 10))


def test_a_book_from_a_backup_books_the_rest_of_the_ledger_again(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2, "m2"))
    with connect(book) as connection:
        ingest(connection, partition)
    name = psycopg.conninfo.conninfo_to_dict(book)["dbname"]
    restored, outside = book.replace("?", "_backup?"), book.replace(f"/{name}?", "/postgres?")
    with psycopg.connect(outside, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}_backup TEMPLATE {name}")
    refund = {"id": "r1", "kind": "order_refunded", "member": "m1", "ts": at(1), "order": "o1", "amount": 500}
    partition.send(*(order(number, f"m{number}", device="d1") for number in range(3, 12)), order(12, "m2", at=at(4)))
    partition.send(refund | {"ts": at(4)})
    found = []
    for url in (book, restored):
        with connect(url) as connection:
            ingest(connection, partition)
            slow(connection, partition.rulebook, refund_wait_hours=1)
            settle(connection, partition.rulebook, DAY)
            assert list(rebuild(connection)) == []
            found.append(facts(connection))
    assert found[0] == found[1]
    with psycopg.connect(outside, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name}_backup WITH (FORCE)")


def test_a_ledger_that_ends_before_the_book_stops_it(valkey: Server, book: str) -> None:
    client: redis.Redis = valkey.client()
    partition = Partition(client)
    partition.send(order(1))
    kept = {key: client.dump(key) or b"" for key in (partition.keys.ledger, partition.keys.checkpoint)}
    partition.send(order(2))
    with connect(book) as connection:
        ingest(connection, partition)
        for key, data in kept.items():
            client.restore(key, 0, data, replace=True)
        with pytest.raises(StreamError, match=r"ends at batch 2, but batch 3 is booked: the server has lost"):
            ingest(connection, partition)
        assert connection.execute("SELECT count(*) FROM book.entries").fetchone() == (2,)
