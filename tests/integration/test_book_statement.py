"""What people read: a member's statement in words, what waits for a person; and projections made anew."""

from __future__ import annotations

from datetime import date
from typing import Any

from accrual.book import Connection, adjust, connect, expire, rebuild, release, settle, slow, statement
from accrual.rulebook import day_number
from books import Partition, at, ingest, order, run_json
from servers import Server
from workers import command

DAY = day_number(date(2026, 11, 10))


def refund(number: int, of: int, amount: int) -> dict[str, object]:
    event = {"id": f"r{number}", "kind": "order_refunded", "member": "m1", "ts": at(1, number)}
    return event | {"order": f"o{of}", "amount": amount}


def lines(connection: Connection, member: str = "m1", **chosen: Any) -> list[dict[str, Any]]:
    return list(statement(connection, member, **chosen))


def history(server: Server, connection: Connection) -> Partition:
    partition = Partition(server.client())
    partition.send(order(1), order(2, amount=200_000), order(3, "m2"))
    partition.send(order(4, ts=at(5), amount=3000), refund(1, 1, 400), order(5, amount=700, at=at(5)))
    ingest(connection, partition)
    settle(connection, partition.rulebook, DAY)
    slow(connection, partition.rulebook, refund_wait_hours=1)
    adjust(connection, "m1", -5, reason="goodwill", note="by mistake", by="alice", approval_points=100)
    expire(connection, day_number(date(2027, 11, 10)))
    return partition


def test_every_posting_is_a_line_newest_first(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        found = lines(connection)
    assert [(line["kind"], line["points"]) for line in found] == [
        ("expire", 991),
        ("adjust", 5),
        ("refund", 4),
        ("late", 0),
        ("settle", 1000),
        ("accrue", 60),
        ("accrue", 990),
        ("accrue", 10),
    ]
    numbers = [(line["number"], line.get("seq", 0)) for line in found]
    assert numbers == sorted(numbers, reverse=True)


def test_lines_are_explained(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        words = {(line["kind"], line["points"]): line["words"] for line in lines(connection)}
    by = "decided by rulebook book-test version 1."
    assert words["accrue", 10] == (
        f"Order o1 of 10.00 yuan (event e1) on 2026-11-10: base 10 points at 1 per yuan. 10 points granted, {by}"
    )
    assert words["accrue", 990] == (
        "Order o2 of 2000.00 yuan (event e2) on 2026-11-10: base 2000 points at 1 per yuan; limit member-cap clamps "
        f"it, as it would make 2010 points per member and business day where 1000 are allowed. 990 points granted, {by}"
    )
    assert words["accrue", 60] == (
        "Order o4 of 30.00 yuan (event e4) on 2026-11-15: base 30 points at 1 per yuan; campaign member-day ×2 makes "
        f"it 60. 60 points granted, {by}"
    )
    assert words["late", 0] == (
        "Order o5 of 7.00 yuan (event e5) on 2026-11-10, which came late, at 2026-11-15T00:00:00.000+00:00: base 7 "
        "points at 1 per yuan; limit member-cap clamps it, as it would make 1007 points per member and business day "
        f"where 1000 are allowed. 0 points granted, {by}"
    )
    assert words["refund", 4] == (
        "Refund r1 of 4.00 yuan for order o1 of 10.00 yuan (event e1): 4 points were taken back out of available; "
        "4 came from the lot of 2026-11-10."
    )
    assert words["adjust", 5] == (
        "5 points were taken by alice (goodwill: by mistake); 5 came from the lot of 2026-11-10."
    )
    assert words["settle", 1000] == (
        "Business day 2026-11-10 was settled: 1000 points became available; 1000 are in the lot of 2026-11-10, which "
        "expires on 2027-11-10."
    )
    assert words["expire", 991] == "991 points of the lot of 2026-11-10 expired."


def test_lines_can_be_chosen(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        assert [line["points"] for line in lines(connection, kind="accrue")] == [60, 990, 10]
        assert [line["points"] for line in lines(connection, first_day="2026-11-15", last_day="2026-11-15")] == [60]
        assert [line["kind"] for line in lines(connection, account="expired")] == ["expire"]
        assert [line["kind"] for line in lines(connection, limit=2)] == ["expire", "adjust"]
        assert lines(connection, "nobody") == []


def test_the_command(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
    found = run_json("statement", "--database", book, "--member", "m1", "--kind", "refund")
    assert [(line["from"], line["to"], line["order"], line["event"]) for line in found] == [
        ("available", "issuance", "o1", "e1")
    ]
    found = run_json("statement", "--database", book, "--member", "m1", "--to", "2026-11-10", "--limit", "1")
    assert [line["kind"] for line in found] == ["expire"]
    refused = command("statement", "--database", book, "--member", "m1", "--from", "yesterday")
    assert refused.returncode == 2
    assert b"'yesterday' is not a date" in refused.stderr


def test_the_command_by_state(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    # The sixth order of a device freezes its member.
    partition.send(*(order(number, device="d") for number in range(1, 8)))
    with connect(book) as connection:
        ingest(connection, partition)
        release(connection, "m1", reason="checked", by="alice")
        settle(connection, partition.rulebook, DAY)

    def moved(state: str) -> list[tuple[str, str, str, int]]:
        found = run_json("statement", "--database", book, "--member", "m1", "--state", state)
        return [(line["kind"], line["from"], line["to"], line["points"]) for line in found]

    settled, granted = ("settle", "pending", "available", 70), ("accrue", "issuance", "pending", 10)
    assert moved("held") == [("release", "held", "pending", 10)] * 2 + [("accrue", "issuance", "held", 10)] * 2
    assert moved("pending") == [settled] + [("release", "held", "pending", 10)] * 2 + [granted] * 5


def test_projections_come_out_equal_or_are_put_right(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        history(valkey, connection)
        assert list(rebuild(connection)) == []
        connection.execute("UPDATE book.balances SET pending = pending + 1 WHERE member = 'm1'")
        connection.execute("UPDATE book.lots SET points = points + 9 WHERE member = 'm2'")
        connection.execute("INSERT INTO book.balances (member, held) VALUES ('nobody', 3)")
        found = [(line["projection"], line["member"]) for line in rebuild(connection, dry_run=True)]
        assert found == [("balances", "m1"), ("balances", "nobody"), ("lots", "m2")]
        done = command("book", "rebuild", "--database", book)
        assert (done.returncode, len(done.stdout.splitlines())) == (1, 3)
        assert list(rebuild(connection)) == []
    assert command("book", "rebuild", "--database", book).returncode == 0


def test_exceptions_wait_for_a_person(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = history(valkey, connection)
        partition.send(refund(2, 2, 900_000), refund(3, 77, 1))
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=0)
    one, other = run_json("exceptions", "--database", book)
    assert (one["kind"], one["event"], one["member"]) == ("refund_exceeds_order", "r2", "m1")
    assert one["detail"] == "order o2 has 200000 fen; 0 fen were refunded before, and 900000 more are too much"
    assert (other["kind"], other["detail"]) == ("order_unknown", "there is no order o77")
    flags = ("exceptions", "--database", book, "--close", str(one["exception"]))
    assert command(*flags).returncode == 2
    assert run_json(*flags, "--by", "alice", "--reason", "adjusted") == []
    assert [line["event"] for line in run_json("exceptions", "--database", book)] == ["r3"]
    assert len(run_json("exceptions", "--database", book, "--all")) == 2
    again = command(*flags, "--by", "alice", "--reason", "adjusted")
    assert (again.returncode, b"there is none open" in again.stderr) == (1, True)
    with connect(book) as connection:
        partition.send(order(77, amount=100))
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=0)
    assert run_json("exceptions", "--database", book) == []
