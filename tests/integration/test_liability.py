"""What is owed: every report's closing is what is outstanding, and the next one's opening."""

from __future__ import annotations

import csv
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet
import pytest
from psycopg import sql

from accrual.book import Connection, adjust, confirm, connect, expire, release, settle, slow
from accrual.book.liability import LiabilityLine, liability
from accrual.errors import BookError, UsageError
from accrual.rulebook import day_number, parse
from books import BOOK_RULEBOOK, TAKING_RULEBOOK, Partition, at, ingest, order, run_json, taking
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


def days_pass(connection: Connection, days: int) -> None:
    """Let all that is booked have been booked so many days before."""
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        for table, column in (("batches", "booked_at"), ("postings", "booked_at"), ("actions", "done_at")):
            query = "UPDATE book.{} SET {} = {} - make_interval(days => %s)"
            names = [sql.Identifier(name) for name in (table, column, column)]
            connection.execute(sql.SQL(query).format(*names), (days,))


def today(connection: Connection) -> int:
    row = connection.execute("SELECT (now() AT TIME ZONE 'Asia/Shanghai')::date - date '1970-01-01'").fetchone()
    assert row is not None
    return int(row[0])


def movement(lines: list[LiabilityLine]) -> dict[str, int]:
    names = ("opening", "granted", "reversed", "redeemed", "expired", "adjusted", "closing")
    return {line.line: line.points for line in lines if line.line in names}


def points(lines: list[LiabilityLine], name: str) -> int:
    return sum(line.points for line in lines if line.line == name)


def test_by_business_day_each_opening_is_the_closing_before(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        before = 0
        for first, last in ((0, 0), (1, 1), (2, 2), (3, 9), (10, 30), (31, 364), (365, 365), (366, 1000)):
            lines = liability(connection, RULEBOOK, DAY + first, DAY + last, basis="business")
            assert points(lines, "opening") == before
            before = points(lines, "closing")
            assert points(lines, "outstanding") == before
        whole = liability(connection, RULEBOOK, DAY - 100, DAY + 1000, basis="business")
        (owed,) = connection.execute("SELECT sum(pending + available + held) FROM book.balances").fetchone() or (0,)
        assert points(whole, "closing") == owed == before
        assert [(line.line, line.points) for line in whole if line.line != "outstanding"] == [
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


def test_a_period_that_is_over_never_changes(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    with connect(book) as connection:
        now = today(connection)
        first, second, third = (now - 60, now - 31), (now - 30, now - 1), (now, now + 29)

        # Booked forty days ago, and settled but for the second day.
        partition.send(order(1, amount=3000), order(2, "m2", day=1), order(3, "m3", amount=500))
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        days_pass(connection, 20)
        closed = {"opening": 0, "granted": 45, "reversed": 0, "redeemed": 0, "expired": 0, "adjusted": 0, "closing": 45}

        # Booked twenty days ago: of the days of the first period, and two refunds of its orders.
        refunds = [
            {"id": f"r{number}", "kind": "order_refunded", "member": member, "ts": at(4), "amount": 400, "order": paid}
            for number, (member, paid) in enumerate((("m1", "o1"), ("m2", "o2")))
        ]
        partition.send(order(20, "m4", 999, ts=at(0, 300), at=at(4)), order(21, "m2", ts=at(1, 30), at=at(4)), *refunds)
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        adjust(connection, "m1", -3, reason="taken", note="", by="alice", approval_points=1000)
        days_pass(connection, 20)
        before = {period: liability(connection, RULEBOOK, *period) for period in (first, second)}
        assert movement(before[first]) == closed
        assert movement(before[second]) == {
            "opening": 45,
            "granted": 9 + 10,
            "reversed": -8,
            "redeemed": 0,
            "expired": 0,
            "adjusted": -3,
            "closing": 53,
        }

        # Booked now.
        partition.send(order(30, "m5", 1200, ts=at(0, 400), at=at(5)))
        partition.send(
            {"id": "r9", "kind": "order_refunded", "member": "m3", "ts": at(2), "amount": 500, "order": "o3"}
        )
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        settle(connection, partition.rulebook, DAY + 1)
        assert expire(connection, DAY + 365).points == 44
        for period, lines in before.items():
            assert liability(connection, RULEBOOK, *period) == lines
        last = liability(connection, RULEBOOK, *third)
        assert movement(last) == {
            "opening": 53,
            "granted": 12,
            "reversed": -5,
            "redeemed": 0,
            "expired": -44,
            "adjusted": 0,
            "closing": 16,
        }
        (owed,) = connection.execute("SELECT sum(pending + available + held) FROM book.balances").fetchone() or (0,)
        assert points(last, "outstanding") == owed == 16


def test_the_programme_has_its_own_midnight(valkey: Server, book: str, caplog: pytest.LogCaptureFixture) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    with connect(book) as connection:
        ingest(connection, partition)
        now = today(connection)
        caplog.clear()
        connection.execute("SET session_replication_role = replica")
        for seconds, granted in ((-1, [10, 0]), (0, [0, 10])):
            connection.execute(
                "UPDATE book.batches SET booked_at = (date '1970-01-01' + %s)::timestamp AT TIME ZONE 'Asia/Shanghai' "
                "+ make_interval(secs => %s)",
                (now - 9, seconds),
            )
            days = [liability(connection, RULEBOOK, now - ago, now - ago) for ago in (10, 9)]
            assert [movement(lines)["granted"] for lines in days] == granted
        assert not caplog.messages
        liability(connection, RULEBOOK, now - 9, now)
        assert "the report may still change" in caplog.text
        # What posted them has gone.
        connection.execute("DELETE FROM book.batches")
        with pytest.raises(BookError, match="belong to no day"):
            liability(connection, RULEBOOK, now - 9, now)


def test_a_zone_that_is_called_like_its_winter_has_a_summer(valkey: Server, book: str) -> None:
    text = BOOK_RULEBOOK.replace("Asia/Shanghai", "CET")
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(order(1))
    with connect(book) as connection:
        ingest(connection, partition)
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE book.batches SET booked_at = '2026-07-01T22:30Z'")
        day = day_number(date(2026, 7, 2))
        assert movement(liability(connection, parse(text), day, day))["granted"] == 10
        assert connection.execute("SHOW timezone").fetchone() == ("UTC",)


def test_what_is_outstanding_by_state_and_age(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d") for number in range(1, 8)))
    partition.send(order(10, "m2", 3000, ts=at(40)))
    with connect(book) as connection:
        ingest(connection, partition)
        lines = liability(connection, RULEBOOK, DAY + 35, DAY + 45, breakage=Decimal("0.1"), basis="business")
    outstanding = {
        (line.state, line.age): (line.points, line.value_fen) for line in lines if line.line == "outstanding"
    }
    # 0.75 fen a point: 37.5 and 15 and 22.5 fen, halves up.
    assert outstanding == {("pending", "31-90"): (50, 38), ("held", "31-90"): (20, 15), ("pending", "0-30"): (30, 23)}
    assert (points(lines, "opening"), points(lines, "granted"), points(lines, "closing")) == (70, 30, 100)
    assert [(line.points, line.value_fen) for line in lines[-2:]] == [(-10, -7), (90, 68)]


def test_every_format_has_the_same_rows_and_bad_input_is_refused(valkey: Server, book: str, tmp_path: Path) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(RULEBOOK.text, encoding="utf-8")
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d") for number in range(1, 8)))
    with connect(book) as connection:
        ingest(connection, partition)
        adjust(connection, "m2", -400, reason="taken", note="", by="alice", approval_points=1000)
        with pytest.raises(UsageError, match="is after"):
            liability(connection, RULEBOOK, DAY, DAY - 1)
    # The adjustment is of today, whenever that is.
    period = ("--from", "2026-11-01", "--to", "2099-12-31", "--basis", "business")
    flags = ("liability", "--rulebook", str(rulebook), "--database", book, *period)
    lines = [{"state": "", "age": ""} | line for line in run_json(*flags, "--breakage", "0.25")]
    assert {(line["state"], line["age"], line["points"], line["value_fen"]) for line in lines if line["state"]} == {
        ("pending", "366+", 50, 38),
        ("held", "366+", 20, 15),
        ("available", "overdrawn", -400, -300),
    }
    printed = command(*flags, "--format", "csv", "--breakage", "0.25").stdout.decode().splitlines()
    assert printed[0] == "line,points,value_fen,state,age"
    assert list(csv.DictReader(printed)) == [{name: str(value) for name, value in line.items()} for line in lines]
    path = tmp_path / "liability.parquet"
    assert command(*flags, "--format", "parquet", "--output", path, "--breakage", "0.25").returncode == 0
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == printed[0].split(",")
    assert table.to_pylist() == lines
    for wrong in (("--breakage", "2"), ("--breakage", "much"), ("--format", "parquet"), ("--output", "x")):
        assert command(*flags, *wrong).returncode == 2


def test_negative_points_are_owed_by_members(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    frozen = {"id": "f", "kind": "member_frozen", "member": "m2", "ts": at(0, 3)}
    partition.send(order(1, amount=300), taking(2), frozen, taking(4, "m2"), taking(5, "m3", 400, day=1))
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        lines = liability(connection, partition.rulebook, DAY, DAY + 1, basis="business")
        assert movement(lines) == {
            **dict.fromkeys(("opening", "reversed", "redeemed", "expired", "adjusted"), 0),
            "granted": 3 - 5 - 5 - 2,
            "closing": -9,
        }
        confirm(connection, "m2", reason="abuse", by="alice")
        lines = liability(connection, partition.rulebook, DAY - 9, DAY + 1000, basis="business")
        assert (movement(lines)["reversed"], movement(lines)["closing"]) == (5, -4)
        outstanding = {(line.state, line.age): line.points for line in lines if line.line == "outstanding"}
        assert outstanding == {("available", "overdrawn"): -2, ("pending", "366+"): -2}
