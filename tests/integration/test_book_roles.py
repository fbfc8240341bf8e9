"""The roles of docs/BOOK.md: an application that ingests and does the jobs, and cannot change a fact; a reader."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from typing import Final

import psycopg
import pytest

from accrual.book import (
    adjust,
    close_exception,
    confirm,
    connect,
    exceptions,
    expire,
    limit_approval,
    rebuild,
    release,
    remind,
    send_outbox,
    settle,
    slow,
    statement,
)
from accrual.errors import BookError
from accrual.rulebook import day_number
from books import Partition, at, balance, ingest, order, run_json
from servers import Server
from workers import ROOT

DAY: Final = day_number(date(2026, 11, 10))
FACTS: Final = {
    "batches": "batch",
    "rulebooks": "batch",
    "entries": "points",
    "identities": "seq",
    "deferred": "seq",
    "resolutions": "seq",
    "refunds": "seq",
    "actions": "by",
    "postings": "points",
    "reminders": "member",
}
ROLES: Final = ("accrual_application", "accrual_reader")


def documented_grants() -> str:
    section = (ROOT / "docs" / "BOOK.md").read_text(encoding="utf-8").partition("\n## Roles\n")[2].partition("\n## ")[0]
    (grants,) = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    return str(grants)


@pytest.fixture
def roles(book: str) -> Iterator[dict[str, str]]:
    with psycopg.connect(book, autocommit=True) as owner:
        owner.execute(documented_grants())
        yield {role: book.replace("accrual@", f"{role}@") for role in ROLES}
        for role in ROLES:
            owner.execute(f"DROP OWNED BY {role}")
            owner.execute(f"DROP ROLE {role}")


def test_the_application_does_everything_but_change_facts(valkey: Server, roles: dict[str, str]) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d1") for number in range(1, 8)), order(8, "m2"))
    refund = {"id": "r1", "kind": "order_refunded", "member": "m2", "ts": at(4), "order": "o8", "amount": 500}
    partition.send(order(9, "m2", at=at(4)), refund, refund | {"id": "r2", "order": "nowhere"})
    with connect(roles["accrual_application"]) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        slow(connection, partition.rulebook, refund_wait_hours=0)
        adjust(connection, "m2", 7, reason="goodwill", note="", by="alice", approval_points=10)
        release(connection, "m1", reason="checked", by="alice")
        confirm(connection, "m2", reason="fraud", by="alice", claw_back=(DAY, DAY))
        assert send_outbox(connection, valkey.client()) == 2
        remind(connection, partition.rulebook, DAY + 362)
        (exception,) = exceptions(connection)
        close_exception(connection, exception["exception"], by="alice", reason="checked")
        expire(connection, DAY + 365)
        assert balance(connection, "m1") == (0, 0, 0)
        connection.execute("UPDATE book.balances SET pending = 1 WHERE member = 'm1'")
        assert len(list(rebuild(connection))) == 1
        with pytest.raises(BookError, match="--limit: only the owner of the book may set it"):
            limit_approval(connection, 1 << 40, reason="policy", by="alice")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("UPDATE book.adjustments SET points = 1")
        for fact, column in FACTS.items():
            assert connection.execute(f"SELECT count(*) > 0 FROM book.{fact}").fetchone() == (True,), fact
            for change in (
                f"UPDATE book.{fact} SET {column} = {column}",
                f"DELETE FROM book.{fact}",
                f"TRUNCATE book.{fact}",
                f"ALTER TABLE book.{fact} DISABLE TRIGGER ALL",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(change)


def test_the_reader_reads(valkey: Server, roles: dict[str, str]) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    with connect(roles["accrual_application"]) as connection:
        ingest(connection, partition)
    reader = roles["accrual_reader"]
    assert run_json("balance", "--database", reader, "--member", "m1")[0]["pending"] == 10
    assert len(run_json("statement", "--database", reader, "--member", "m1")) == 1
    assert run_json("exceptions", "--database", reader) == []
    with connect(reader) as connection:
        assert [line["points"] for line in statement(connection, "m1")] == [10]
        for change in ("UPDATE book.balances SET pending = 0", "SELECT book.ensure_day('2030-01-01')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(change)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            settle(connection, partition.rulebook, DAY)
