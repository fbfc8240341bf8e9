"""New business days: their tables are made while others read and write, and nobody waits for anybody."""

from __future__ import annotations

from datetime import date

import pytest

from accrual.book import connect, settle, slow, statement
from accrual.rulebook import day_number
from books import Partition, at, balance, ingest, order
from servers import Server

DAY = day_number(date(2026, 11, 10))


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ, READ ONLY"])
def test_a_new_day_waits_for_no_reader_and_keeps_none_waiting(valkey: Server, book: str, isolation: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2, "m2"))
    with connect(book) as writer, connect(book) as reader, connect(book) as other, connect(book) as job:
        for connection in (writer, other, job):
            connection.execute("SET statement_timeout = '5s'")
        ingest(writer, partition)
        # As pg_dump, an audit, or a statement that somebody pages through.
        reader.execute(f"BEGIN ISOLATION LEVEL {isolation}")
        assert reader.execute("SELECT count(*) FROM book.entries").fetchone() == (2,)
        assert len(reader.execute("SELECT * FROM book.holdings").fetchall()) == 2
        with job.transaction():
            settle(job, partition.rulebook, DAY)
            # One of the first table's rows is written here, and another day's table is made there.
            partition.send(
                order(3, "m3", day=1), order(4, "m2", ts=at(-9), at=at(1)), order(5, "m2", ts=at(-900), at=at(1))
            )
            ingest(writer, partition)
            assert [line["points"] for line in statement(other, "m3")] == [10]
        slow(writer, partition.rulebook, refund_wait_hours=1)
        assert other.execute("SELECT count(*) FROM book.entries").fetchone() == (5,)
        assert balance(other, "m2") == (20, 10, 0)
        seen = 2 if isolation.startswith("REPEATABLE") else 5
        assert reader.execute("SELECT count(*) FROM book.entries").fetchone() == (seen,)
        reader.execute("ROLLBACK")
