"""Postings that should not have been: undone to the letter by a posting of its own, which two persons decide."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from accrual.audit import Audit, AuditReport
from accrual.book import (
    Adjustment,
    Connection,
    adjust,
    approve,
    confirm,
    connect,
    exceptions,
    expire,
    rebuild,
    release,
    settle,
    slow,
    statement,
    undo,
    waiting_adjustments,
)
from accrual.book.liability import liability
from accrual.book.schedule import days_to_settle
from accrual.errors import BookError
from accrual.rulebook import day_number
from accrual.settings import Settings
from audits import found
from books import TAKING_RULEBOOK, Partition, at, balance, facts, ingest, order, run_json, taking
from servers import Server
from workers import SECRET, command

DAY = day_number(date(2026, 11, 10))
WHO: Any = {"by": "alice", "reason": "checked"}


def newest(connection: Connection, kind: str) -> int:
    row = connection.execute("SELECT max(number) FROM book.postings WHERE kind = %s", (kind,)).fetchone()
    assert row is not None
    assert row[0] is not None
    return int(row[0])


def take_back(connection: Connection, posting: int) -> Adjustment:
    waiting = undo(connection, posting, reason="mistake", note="seen twice", by="alice")
    assert waiting.state == "waiting"
    return approve(connection, waiting.adjustment, by="bob")


def points(connection: Connection) -> dict[str, list[str]]:
    """Return what points there are, apart from how they came about."""
    found = facts(connection)
    return {name: found[name] for name in ("balances", "lots")}


@pytest.fixture
def partition(valkey: Server, book: str) -> Partition:
    """A ledger in which m1 was frozen at its sixth order, and m2 has two orders and a refund; booked."""
    made = Partition(valkey.client())
    made.send(*(order(number, device="d") for number in range(1, 8)))
    made.send(order(10, "m2", 3000), order(11, "m2", 500))
    with connect(book) as connection:
        ingest(connection, made)
    return made


def test_whatever_was_posted_can_be_undone_and_done_again(book: str, partition: Partition) -> None:
    def refund(connection: Connection) -> None:
        event = {"id": "r1", "kind": "order_refunded", "member": "m2", "ts": at(2), "order": "o10", "amount": 1500}
        partition.send(event)
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)

    deeds: dict[str, Callable[[Connection], object]] = {
        "settle": lambda connection: settle(connection, partition.rulebook, DAY),
        "release": lambda connection: release(connection, "m1", **WHO),
        "adjust": lambda connection: adjust(
            connection, "m2", -40, reason="taken", note="", by="alice", approval_points=100
        ),
        "refund": refund,
        "expire": lambda connection: expire(connection, DAY + 365),
    }
    with connect(book) as connection:
        for kind, deed in deeds.items():
            before = points(connection)
            deed(connection)
            after = points(connection)
            numbers = connection.execute(
                "SELECT number FROM book.standing "
                "WHERE action = (SELECT max(action) FROM book.postings WHERE kind = %s) ORDER BY number DESC",
                (kind,),
            ).fetchall()
            assert numbers
            for (number,) in numbers:
                assert take_back(connection, number).state == "posted"
            assert points(connection) == before, kind
            assert list(rebuild(connection, dry_run=True)) == []
            if kind in ("settle", "expire"):
                deed(connection)
                assert points(connection) == after, kind


def test_what_is_undone_counts_for_nothing_in_what_comes_after(book: str, partition: Partition) -> None:
    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        confirm(connection, "m1", **WHO)
        confirmed = newest(connection, "confirm")
        assert take_back(connection, confirmed).points == 10
        # What was held is so again, and can be released once.
        assert balance(connection, "m1")[2] == 10
        assert release(connection, "m1", **WHO).points == 10
        assert balance(connection, "m1") == (0, 60, 0)
        assert not release(connection, "m1", **WHO).changed


def test_a_refund_that_was_undone_is_done_again(valkey: Server, book: str, partition: Partition) -> None:
    def refund(number: int, amount: int) -> None:
        event = {"id": f"r{number}", "kind": "order_refunded", "member": "m2", "ts": at(2, number), "order": "o10"}
        partition.send(event | {"amount": amount})
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)

    def findings() -> list[bytes]:
        settings = Settings(redis=valkey.url, database=book, secret=SECRET.key.hex())
        return [finding.line() for finding in Audit(settings=settings, workers=1).run(AuditReport())]

    with connect(book) as connection:
        refund(1, 2000)
        refund(2, 1000)
        assert balance(connection, "m2") == (5, 0, 0)
        first, second = connection.execute("SELECT number FROM book.postings WHERE kind = 'refund' ORDER BY 1")
        take_back(connection, first[0])
        assert balance(connection, "m2") == (25, 0, 0)
        refund(3, 2000)
        assert balance(connection, "m2") == (5, 0, 0)
        assert list(exceptions(connection)) == []
        refund(4, 1)
        assert [line["kind"] for line in exceptions(connection)] == ["refund_exceeds_order"]
        # The second was right as it was when it was posted, with the first before it.
        assert findings() == []
        take_back(connection, second[0])
        assert balance(connection, "m2") == (15, 0, 0)
        assert findings() == []


def test_only_a_settlement_that_stands_and_covered_it_makes_an_entry_available(book: str, partition: Partition) -> None:
    def accounts() -> dict[str, str]:
        return dict(
            connection.execute("SELECT event, account FROM book.holdings WHERE member = 'm2' ORDER BY event").fetchall()
        )

    def refund(number: int) -> tuple[int, int, int]:
        event = {"id": f"r{number}", "kind": "order_refunded", "member": "m2", "ts": at(2, number), "amount": 500}
        partition.send(event | {"order": f"o{number}"})
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        return balance(connection, "m2")

    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        first = connection.execute("SELECT number FROM book.postings WHERE member = 'm2'").fetchone() or (0,)
        partition.send(order(12, "m2", 2000))
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        second = newest(connection, "settle")
        take_back(connection, first[0])
        assert balance(connection, "m2") == (35, 20, 0)
        assert accounts() == {"e10": "pending", "e11": "pending", "e12": "available"}
        assert refund(11) == (30, 20, 0)
        assert refund(12) == (30, 15, 0)
        # What the second one made available has been used since.
        with pytest.raises(BookError, match="cannot be undone"):
            take_back(connection, second)
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m2") == (0, 45, 0)
        assert set(accounts().values()) == {"available"}
        take_back(connection, newest(connection, "settle"))
        assert accounts() == {"e10": "pending", "e11": "pending", "e12": "available"}
        settle(connection, partition.rulebook, DAY)
        assert refund(10) == (0, 40, 0)


def test_what_has_moved_on_since_is_not_undone(book: str, partition: Partition) -> None:
    with connect(book) as connection:
        partition.send(order(20, "m3", 5000, day=1))
        partition.send(*(order(number, "m3", device="e", at=at(1, 60)) for number in range(21, 28)))
        ingest(connection, partition)
        assert release(connection, "m3", **WHO).points == 20
        released = newest(connection, "release")
        settle(connection, partition.rulebook, DAY)
        before = facts(connection)
        # The points of the other day would do for it, and are not those that were released.
        with pytest.raises(
            BookError, match="the points that it moved were moved on, or its points have been used since"
        ):
            take_back(connection, released)
        assert facts(connection) == before


def test_what_is_pending_again_is_due_again(valkey: Server, book: str, partition: Partition) -> None:
    def due() -> list[int]:
        return [one.day for one in days_to_settle(connection, valkey.client(), partition.rulebook, DAY + 1)]

    def settled() -> None:
        for one in days_to_settle(connection, valkey.client(), partition.rulebook, DAY + 1):
            settle(connection, partition.rulebook, one.day, since=one.since)
            connection.execute("UPDATE book.settled_days SET through = %s::jsonb", (one.through,))

    with connect(book) as connection:
        settled()
        assert due() == []
        take_back(connection, newest(connection, "settle"))
        assert balance(connection, "m2") == (35, 0, 0)
        assert due() == [DAY]
        settled()
        assert (balance(connection, "m2"), due()) == ((0, 35, 0), [])


def test_two_persons_and_once(book: str, partition: Partition) -> None:
    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        number = newest(connection, "settle")
        waiting = undo(connection, number, reason="mistake", note="", by="alice")
        assert waiting == undo(connection, number, reason="mistake", note="", by="alice")
        assert waiting_adjustments(connection) == [waiting]
        with pytest.raises(BookError, match="was asked for by alice"):
            approve(connection, waiting.adjustment, by="alice")
        other = undo(connection, number, reason="mistake", note="", by="bob", key="other")
        before = facts(connection)
        assert approve(connection, other.adjustment, by="alice", dry_run=True).state == "posted"
        assert facts(connection) == before
        assert approve(connection, waiting.adjustment, by="bob").state == "posted"
        after = facts(connection)
        assert approve(connection, waiting.adjustment, by="bob").state == "posted"
        with pytest.raises(BookError, match=f"posting {number} is undone already"):
            approve(connection, other.adjustment, by="alice")
        for posting in (number, newest(connection, "correct"), 0, 1 << 40):
            with pytest.raises(BookError, match=f"--undo: there is no posting {posting} that could be undone"):
                undo(connection, posting, reason="mistake", note="", by="carol", key="again")
        with pytest.raises(BookError, match=f"{waiting.adjustment} is another one"):
            adjust(connection, "m2", 35, reason="mistake", note="", by="a", approval_points=9, key=waiting.adjustment)
        assert facts(connection) == after


def test_points_that_have_been_used_since_are_not_undone(book: str, partition: Partition) -> None:
    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        number = connection.execute("SELECT number FROM book.postings WHERE member = 'm2'").fetchone() or (0,)
        adjust(connection, "m2", -30, reason="taken", note="", by="alice", approval_points=100)
        before = facts(connection)
        with pytest.raises(BookError, match=f"posting {number[0]} cannot be undone: .* have been used since"):
            take_back(connection, number[0])
        assert facts(connection) == before


def test_it_is_seen_in_statement_and_liability(book: str, partition: Partition) -> None:
    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        expire(connection, DAY + 365)
        before = liability(connection, partition.rulebook, DAY - 100, DAY + 5000)
        number = newest(connection, "expire")
        take_back(connection, number)
        ((member,),) = connection.execute("SELECT member FROM book.postings WHERE number = %s", (number,))
        (line,) = statement(connection, member, kind="correct")
        assert (line["from"], line["to"], line["by"]) == ("expired", "available", "alice")
        assert line["words"].startswith(f"Posting {number}, expire, was undone: {line['points']} points went back from")
        for basis in ("posting", "business"):
            after = liability(connection, partition.rulebook, DAY - 100, DAY + 5000, basis=basis)
            moved = {line.line: line.points for line in after if not line.state}
            was = {line.line: line.points for line in before if not line.state}
            assert moved["adjusted"] - was["adjusted"] == line["points"]
            assert moved["closing"] - was["closing"] == line["points"]
            assert {name: moved[name] for name in ("granted", "reversed", "expired")} == {
                name: was[name] for name in ("granted", "reversed", "expired")
            }


def test_one_member_is_made_anew(book: str, partition: Partition) -> None:
    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        before = points(connection)
        connection.execute("UPDATE book.balances SET available = available + 3")
        connection.execute("UPDATE book.members SET state = 'active'")
        assert {(line["projection"], line["member"]) for line in rebuild(connection, member="m1")} == {
            ("balances", "m1"),
            ("members", "m1"),
        }
        assert list(rebuild(connection, member="m1")) == []
        assert points(connection) != before
        assert {line["member"] for line in rebuild(connection)} == {"m2"}
        assert points(connection) == before


def test_the_commands(book: str, partition: Partition) -> None:
    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        before = points(connection)
        settled = newest(connection, "settle")
        connection.execute("UPDATE book.balances SET available = 0 WHERE member = 'm1'")
    base = ["adjust", "--database", book]
    (line,) = run_json(*base, "--undo", str(settled), "--reason", "mistake", "--by", "alice")
    assert (line["corrects"], line["state"], line["adjustment"]) == (settled, "waiting", f"undo-{settled}")
    (line,) = run_json(*base, "--approve", line["adjustment"], "--by", "bob")
    assert (line["state"], line["approved_by"]) == ("posted", "bob")
    for words, wrong in ((["--by", "alice"], "--reason"), (["--by", "a", "--reason", "x", "--list"], "one at a time")):
        done = command(*base, "--undo", "7", *words)
        assert (done.returncode, wrong in done.stderr.decode()) == (2, True), done.stderr
    rebuilt = command("book", "rebuild", "--database", book, "--member", "m1")
    assert (rebuilt.returncode, rebuilt.stdout.count(b"\n")) == (1, 1)
    with connect(book) as connection:
        settle(connection, partition.rulebook, DAY)
        assert points(connection) == before


def test_what_moved_negative_points_is_undone(valkey: Server, book: str) -> None:
    made = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    made.send(
        order(1),
        taking(2, day=1),
        order(3, "m2", 500),
        {"id": "f", "kind": "member_frozen", "member": "m2"} | {"ts": at(0, 4)},
    )
    made.send(taking(5, "m2"), taking(6, "m2", day=1))

    def is_right() -> bool:
        assert not list(rebuild(connection, dry_run=True))
        return [finding.line() for finding in found(valkey, connection)] == []

    with connect(book) as connection:
        ingest(connection, made)
        settle(connection, made.rulebook, DAY)
        settle(connection, made.rulebook, DAY + 1)
        assert balance(connection, "m1") == (0, 5, 0)
        take_back(connection, newest(connection, "settle"))
        assert balance(connection, "m1") == (-5, 10, 0)
        assert is_right()
        settle(connection, made.rulebook, DAY + 1)
        assert balance(connection, "m1") == (0, 5, 0)
        assert is_right()
        # What a release took out of what is available comes back, and is held again.
        release(connection, "m2", **WHO)
        assert balance(connection, "m2") == (0, -5, 0)
        take_back(connection, newest(connection, "release"))
        assert balance(connection, "m2") == (0, 0, -5)
        assert is_right()
        confirm(connection, "m2", **WHO)
        assert balance(connection, "m2") == (0, 0, 0)
        take_back(connection, newest(connection, "confirm"))
        assert balance(connection, "m2") == (0, 0, -5)
        release(connection, "m2", **WHO)
        assert balance(connection, "m2") == (0, -5, 0)
        assert is_right()


def test_a_release_that_is_undone_after_its_day_came_to_nothing(valkey: Server, book: str) -> None:
    made = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    frozen = {"id": "f", "kind": "member_frozen", "member": "m1", "ts": at(0, 2)}
    made.send(taking(1), frozen, order(3, amount=500))
    with connect(book) as connection:
        ingest(connection, made)
        release(connection, "m1", **WHO)
        assert settle(connection, made.rulebook, DAY).postings == 0
        assert balance(connection, "m1") == (0, 0, 0)
        take_back(connection, newest(connection, "release"))
        assert balance(connection, "m1") == (0, -5, 5)
        assert not list(rebuild(connection, dry_run=True))
        assert not list(found(valkey, connection))
