"""Expiry: what is left of each lot whose time is over, once, and nothing else."""

from __future__ import annotations

import importlib
import threading
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from accrual.book import Connection, Done, adjust, connect, expire, settle
from accrual.book.posting import lock_members, post
from accrual.rulebook import day_number
from books import BOOK_RULEBOOK, Partition, balance, facts, ingest, order, redeem, run_json
from servers import Server

# The package has a function of that name in its place.
EXPIRE = importlib.import_module("accrual.book.expire")
DAY = day_number(date(2026, 11, 10))
EXPIRY = day_number(date(2027, 11, 10))


def use(connection: Connection, member: str, points: int) -> None:
    """Take available points as an adjustment does."""
    adjust(connection, member, -points, reason="test", note="", by="tester", approval_points=1 << 40)


def lots(connection: Connection, member: str = "m1") -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT day::text, expires_on::text, points FROM book.lots WHERE member = %s ORDER BY day", (member,)
    ).fetchall()


def settled(valkey: Server, connection: Connection, *days: list[dict[str, object]]) -> Partition:
    """Return a partition whose ``days``, from 2026-11-10 on, have been booked and settled."""
    partition = Partition(valkey.client())
    for number, events in enumerate(days):
        partition.send(*events)
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY + number)
    return partition


def test_what_is_left_of_a_lot_expires_once(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        settled(valkey, connection, [order(1), order(2, "m2", 700)], [order(3, amount=500, day=1)])
        use(connection, "m1", 4)
        assert expire(connection, EXPIRY - 1) == Done()
        assert expire(connection, EXPIRY) == Done(members=2, postings=2, points=6 + 7)
        assert lots(connection) == [("2026-11-10", "2027-11-10", 0), ("2026-11-11", "2027-11-11", 5)]
        assert balance(connection, "m1") == (0, 5, 0)
        assert balance(connection, "m2") == (0, 0, 0)
        before = facts(connection)
        assert expire(connection, EXPIRY) == Done()
        assert facts(connection) == before
        rows = connection.execute(
            "SELECT member, from_account, to_account, points, day::text, lot_days::text, lot_points, by "
            "FROM book.postings JOIN book.actions USING (action) WHERE postings.kind = 'expire' ORDER BY member"
        ).fetchall()
        assert rows == [
            ("m1", "available", "expired", 6, "2026-11-10", "{2026-11-10}", [6], "scheduler"),
            ("m2", "available", "expired", 7, "2026-11-10", "{2026-11-10}", [7], "scheduler"),
        ]
        accounts: dict[str, int] = dict(connection.execute("SELECT account, points FROM book.accounts").fetchall())
        assert (accounts["expired"], sum(accounts.values())) == (13, 0)


def test_a_run_that_comes_late_expires_all_that_is_overdue(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        settled(valkey, connection, [order(1)], [order(2, amount=500, day=1)], [order(3, amount=300, day=2)])
        assert expire(connection, EXPIRY + 1) == Done(members=2, postings=2, points=15)
        assert lots(connection)[2] == ("2026-11-12", "2027-11-12", 3)
        assert balance(connection, "m1") == (0, 3, 0)


def test_a_dry_run_changes_nothing_and_counts_what_would_be(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of one lot, and a member with lots in several of them: each is counted once all the same.
    monkeypatch.setattr(EXPIRE, "CHUNK_MEMBERS", 1)
    with connect(book) as connection:
        settled(valkey, connection, [order(1), order(2, "m2")], [order(3, day=1), order(4, "m3", day=1)])
        before = facts(connection)
        actions = connection.execute("SELECT count(*) FROM book.actions").fetchone()
        promised = expire(connection, EXPIRY + 1, dry_run=True)
        assert facts(connection) == before
        assert connection.execute("SELECT count(*) FROM book.actions").fetchone() == actions
        assert promised == expire(connection, EXPIRY + 1) == Done(members=4, postings=4, points=40)


def test_lots_with_one_expiry_date_each_expire(valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With 12 months, 2028-02-28 and 2028-02-29 both end on 2029-02-28; chunks of one end between the two.
    monkeypatch.setattr(EXPIRE, "CHUNK_MEMBERS", 1)
    leap = (date(2028, 2, 28) - date(2026, 11, 10)).days
    partition = Partition(valkey.client())
    partition.send(order(1, day=leap), order(2, amount=500, day=leap + 1))
    with connect(book) as connection:
        ingest(connection, partition)
        for day in (leap, leap + 1):
            settle(connection, partition.rulebook, DAY + day)
        assert [lot[1] for lot in lots(connection)] == ["2029-02-28", "2029-02-28"]
        assert expire(connection, day_number(date(2029, 2, 28))).points == 15
        assert balance(connection, "m1") == (0, 0, 0)


def test_pending_and_held_points_do_not_expire(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d1") for number in range(1, 8)))
    with connect(book) as connection:
        ingest(connection, partition)
        assert balance(connection, "m1") == (50, 0, 20)
        assert expire(connection, EXPIRY + 1000) == Done()
        settle(connection, partition.rulebook, DAY)
        assert expire(connection, EXPIRY + 1000).points == 50
        assert balance(connection, "m1") == (0, 0, 20)


def test_a_member_with_a_hole_has_nothing_to_expire(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = settled(valkey, connection, [order(1)])
        use(connection, "m1", 25)
        assert balance(connection, "m1") == (0, -15, 0)
        assert expire(connection, EXPIRY) == Done()
        # What comes next fills the hole, and only the rest makes a lot that expires.
        partition.send(order(2, amount=2000, day=1))
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY + 1)
        assert expire(connection, EXPIRY + 1) == Done(members=1, postings=1, points=5)
        assert balance(connection, "m1") == (0, 0, 0)


def test_racing_runs_and_spending_give_one_serial_result(valkey: Server, book: str) -> None:
    members = [f"m{number}" for number in range(40)]
    orders = [order(number, member) for number, member in enumerate(members)]
    with connect(book) as connection:
        settled(valkey, connection, orders)
    done: list[Done] = []

    def run(number: int) -> None:
        with connect(book) as connection:
            if number % 2:
                done.append(expire(connection, EXPIRY))
            else:
                for member in members:
                    use(connection, member, 1)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with connect(book) as connection:
        # Each member had 10 points and spent 4, so that what expired is 10 less what was spent before it did.
        assert connection.execute("SELECT sum(points) FROM book.accounts").fetchone() == (0,)
        rows = connection.execute("SELECT member, sum(points) FROM book.lots GROUP BY member HAVING sum(points) > 0")
        assert rows.fetchall() == []
        expired: dict[str, int] = dict(
            connection.execute(
                "SELECT member, count(*) FROM book.postings WHERE kind = 'expire' GROUP BY member"
            ).fetchall()
        )
        assert expired == dict.fromkeys(members, 1)
        total = sum(one.points for one in done)
        balances = connection.execute("SELECT sum(available) FROM book.balances").fetchone()
        assert balances == (40 * (10 - 4) - total,)


def test_a_run_that_is_told_to_stop_leaves_the_rest_to_the_next(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPIRE, "CHUNK_MEMBERS", 2)
    stopping = threading.Event()
    posted = post

    def post_and_stop(*arguments: Any) -> int:
        stopping.set()
        return posted(*arguments)

    with connect(book) as connection:
        settled(valkey, connection, [order(number, f"m{number}") for number in range(5)])
        with monkeypatch.context() as patched:
            patched.setattr(EXPIRE, "post", post_and_stop)
            assert expire(connection, EXPIRY, stopping=stopping) == Done(members=2, postings=2, points=20)
        assert expire(connection, EXPIRY) == Done(members=3, postings=3, points=30)


def test_the_command(valkey: Server, book: str, tmp_path: Path) -> None:
    with connect(book) as connection:
        settled(valkey, connection, [order(1)])
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK)
    words = ["expire", "--rulebook", str(rulebook), "--database", book, "--day", "2027-11-10"]
    promised = {"dry_run": True, "members": 1, "points": 10, "postings": 1}
    assert run_json(*words, "--dry-run") == [promised]
    assert run_json(*words, "--by", "alice") == [promised | {"dry_run": False}]
    assert run_json(*words) == [{"dry_run": False, "members": 0, "points": 0, "postings": 0}]
    with connect(book) as connection:
        row = connection.execute("SELECT by, details FROM book.actions WHERE kind = 'expire'").fetchone()
        assert row == ("alice", {"day": "2027-11-10"})


def test_nothing_expires_before_it_is_locked(valkey: Server, book: str) -> None:
    """What was chosen may be used up by the time the lock is there: the lot is looked at again under it."""
    with connect(book) as spender, connect(book) as connection:
        settled(valkey, connection, [order(1)])
        done: list[Done] = []
        thread = threading.Thread(target=lambda: done.append(expire(connection, EXPIRY)))
        with spender.transaction(), spender.cursor() as cursor:
            lock_members(cursor, ["m1"])
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            redeem(spender, "m1", 10)
        thread.join()
        assert [one.postings for one in done] == [0]
        assert balance(spender, "m1") == (0, 0, 0)
