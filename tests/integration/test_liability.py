"""What is owed: every report's closing is what is outstanding, and the next one's opening."""

from __future__ import annotations

import csv
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet
import pytest

from accrual.book import Connection, adjust, confirm, connect, expire, release, settle, slow
from accrual.book.liability import LiabilityLine, liability
from accrual.errors import UsageError
from accrual.rulebook import day_number, parse
from books import BOOK_RULEBOOK, Partition, at, ingest, order, run_json
from servers import Server
from workers import command

DAY = day_number(date(2026, 11, 10))
RULEBOOK = parse(BOOK_RULEBOOK.replace("expiry_months", 'point_value_fen = "0.75"\nexpiry_months'))


def history(server: Server, connection: Connection) -> None:
    partition = Partition(server.client())
    partition.send(*(order(number, device="d") for number in range(1, 8)))
    partition.send(*(order(number, "m2", 3000, ts=at(2, number)) for number in range(10, 14)))
    partition.send({"id": "r1", "kind": "order_refunded", "member": "m2", "ts": at(3), "amount": 1500, "order": "o10"})
    partition.send(order(20, "m3", 999, ts=at(0, 300), at=at(4)))
    ingest(connection, partition)
    slow(connection, partition.rulebook, refund_wait_hours=1)
    for day in range(4):
        settle(connection, partition.rulebook, DAY + day)
    release(connection, "m1", reason="checked", by="alice")
    confirm(connection, "m3", reason="abuse", by="alice", claw_back=(DAY, DAY))
    adjust(connection, "m2", -200, reason="taken", note="", by="alice", approval_points=1000)
    adjust(connection, "m4", 7, reason="given", note="", by="alice", approval_points=1000)
    expire(connection, DAY + 365)


def points(lines: list[LiabilityLine], name: str) -> int:
    return sum(line.points for line in lines if line.line == name)


def test_each_opening_is_the_closing_before(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        before = 0
        for first, last in ((0, 0), (1, 1), (2, 2), (3, 9), (10, 30), (31, 364), (365, 365), (366, 1000)):
            lines = liability(connection, RULEBOOK, DAY + first, DAY + last)
            assert points(lines, "opening") == before
            before = points(lines, "closing")
            assert points(lines, "outstanding") == before
        whole = liability(connection, RULEBOOK, DAY - 100, DAY + 1000)
        (owed,) = connection.execute("SELECT sum(pending + available + held) FROM book.balances").fetchone() or (0,)
        assert points(whole, "closing") == owed == before
        movement = [(line.line, line.points) for line in whole if line.line != "outstanding"]
        assert movement == [
            ("opening", 0),
            ("granted", 70 + 120 + 9),
            ("reversed", -15 - 9),
            ("redeemed", 0),
            ("expired", -70),
            ("adjusted", -193),
            ("closing", -88),
            ("expected_breakage", 0),
            ("expected_liability", -88),
        ]


def test_what_is_outstanding_by_state_and_age(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d") for number in range(1, 8)))
    partition.send(order(10, "m2", 3000, ts=at(40)))
    with connect(book) as connection:
        ingest(connection, partition)
        lines = liability(connection, RULEBOOK, DAY + 35, DAY + 45, breakage=Decimal("0.1"))
    outstanding = {
        (line.state, line.age): (line.points, line.value_fen) for line in lines if line.line == "outstanding"
    }
    # 0.75 fen a point: 37.5 and 15 and 22.5 fen, halves up.
    assert outstanding == {("pending", "31-90"): (50, 38), ("held", "31-90"): (20, 15), ("pending", "0-30"): (30, 23)}
    assert (points(lines, "opening"), points(lines, "granted"), points(lines, "closing")) == (70, 30, 100)
    assert [(line.points, line.value_fen) for line in lines[-2:]] == [(-10, -7), (90, 68)]


def test_files_and_bad_input(valkey: Server, book: str, tmp_path: Path) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK, encoding="utf-8")
    with connect(book) as connection:
        history(valkey, connection)
        with pytest.raises(UsageError, match="is after"):
            liability(connection, RULEBOOK, DAY, DAY - 1)
    flags = ("liability", "--rulebook", str(rulebook), "--database", book, "--from", "2026-11-01", "--to", "2026-12-31")
    lines = run_json(*flags, "--breakage", "0.25")
    table = list(csv.DictReader(command(*flags, "--format", "csv", "--breakage", "0.25").stdout.decode().splitlines()))
    assert [(row["line"], int(row["points"])) for row in table] == [(line["line"], line["points"]) for line in lines]
    path = tmp_path / "liability.parquet"
    assert command(*flags, "--format", "parquet", "--output", path, "--breakage", "0.25").returncode == 0
    assert pyarrow.parquet.read_table(path).column("points").to_pylist() == [line["points"] for line in lines]
    for wrong in (("--breakage", "2"), ("--breakage", "much"), ("--format", "parquet"), ("--output", "x")):
        assert command(*flags, *wrong).returncode == 2
