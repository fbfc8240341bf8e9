"""Adjustments: points given and taken by people, each key once, large ones by two of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import date
from typing import Any

import psycopg
import pytest

from accrual.book import (
    Adjustment,
    Connection,
    adjust,
    approve,
    connect,
    limit_approval,
    reject,
    settle,
    waiting_adjustments,
)
from accrual.book.programme import today
from accrual.errors import BookError, UsageError
from accrual.rulebook import day_number, day_text
from books import BOOK_RULEBOOK, Partition, at, balance, facts, ingest, run_json
from servers import Server
from workers import command

DAY = day_number(date(2026, 11, 10))
LIMIT = 100


def give(connection: Connection, points: int, member: str = "m1", **fields: Any) -> Adjustment:
    values: dict[str, Any] = {"reason": "goodwill", "note": "late", "by": "alice", "approval_points": LIMIT} | fields
    return adjust(connection, member, points, **values)


def lots(connection: Connection, member: str = "m1") -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT day - date '1970-01-01', expires_on::text, points FROM book.lots WHERE member = %s ORDER BY day",
        (member,),
    ).fetchall()


def earned(valkey: Server, connection: Connection, rulebook: str = BOOK_RULEBOOK) -> Partition:
    """Return a partition in which m1 has 10 points available, from 2026-11-10."""
    partition = Partition(valkey.client(), rulebook=rulebook)
    partition.send({"id": "e1", "kind": "order_paid", "member": "m1", "ts": at(), "amount": 1000, "order": "o1"})
    ingest(connection, partition)
    settle(connection, partition.rulebook, DAY)
    return partition


def race(url: str, count: int, work: Callable[[Connection, int], object]) -> list[object]:
    """Do ``work`` in so many threads at once, each with its own connection, and return what came of each."""
    results: list[object] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        with connect(url) as connection:
            start.wait()
            try:
                results[number] = work(connection, number)
            except BookError as error:
                results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_points_are_given_as_a_lot_of_today(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection, BOOK_RULEBOOK.replace("expiry_months = 12", "expiry_months = 6"))
        done = give(connection, 7)
        assert (done.state, done.points, done.by) == ("posted", 7, "alice")
        with connection.cursor() as cursor:
            day = today(cursor)
        row = connection.execute("SELECT (%s::date + interval '6 months')::date::text", (day_text(day),)).fetchone()
        assert row is not None
        assert (day, row[0], 7) in lots(connection)
        assert balance(connection, "m1") == (0, 17, 0)
        # A second one of the same day grows the lot.
        give(connection, 5)
        assert (day, row[0], 12) in lots(connection)
        rows = connection.execute(
            "SELECT a.by, a.reason, a.note, p.kind, p.from_account, p.to_account, p.points "
            "FROM book.postings p JOIN book.actions a USING (action) WHERE p.kind = 'adjust' ORDER BY number"
        ).fetchall()
        assert rows[0] == ("alice", "goodwill", "late", "adjust", "issuance", "available", 7)
        assert connection.execute("SELECT sum(points) FROM book.accounts").fetchone() == (0,)


def test_a_book_without_a_rulebook_gives_lots_of_twelve_months(book: str) -> None:
    with connect(book) as connection:
        give(connection, 7)
        ((day, expires_on, points),) = lots(connection)
        found = date.fromisoformat(expires_on)
        assert (day_number(found) - day, points) in ((365, 7), (366, 7))


def test_points_taken_use_up_lots_and_make_a_hole_that_is_filled_first(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        give(connection, -4)
        assert lots(connection) == [(DAY, "2027-11-10", 6)]
        give(connection, -9)
        assert balance(connection, "m1") == (0, -3, 0)
        assert lots(connection) == [(DAY, "2027-11-10", 0)]
        give(connection, 2)
        assert balance(connection, "m1") == (0, -1, 0)
        assert sum(lot[2] for lot in lots(connection)) == 0
        give(connection, 8)
        assert balance(connection, "m1") == (0, 7, 0)
        assert sum(lot[2] for lot in lots(connection)) == 7
        rows = connection.execute(
            "SELECT points, lot_points, array_positions(lot_days, NULL) FROM book.postings WHERE kind = 'adjust' "
            "ORDER BY number"
        ).fetchall()
        assert rows == [(4, [4], []), (9, [6, 3], [2]), (2, [2], [1]), (8, [1, 7], [1])]


def test_the_same_key_posts_once(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        first = give(connection, 7, key="ticket-1")
        assert give(connection, 7, key="ticket-1") == first
        assert balance(connection, "m1") == (0, 17, 0)
        for other in ({"points": 8}, {"points": 7, "member": "m2"}, {"points": 7, "reason": "other"}):
            with pytest.raises(BookError, match="ticket-1 is another one: 7 points for m1, goodwill"):
                give(connection, key="ticket-1", **other)
        assert balance(connection, "m1") == (0, 17, 0)
        # Without a key every one is its own.
        assert give(connection, 1).adjustment != give(connection, 1).adjustment


def test_a_large_one_waits_for_somebody_else(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        assert give(connection, LIMIT, key="just").state == "posted"
        for number, points in enumerate((LIMIT + 1, -LIMIT - 1)):
            key = f"large-{number}"
            before = facts(connection)
            assert give(connection, points, key=key).state == "waiting"
            assert give(connection, points, key=key).state == "waiting"
            # Raising the setting does not let the person who asked have it posted.
            assert give(connection, points, key=key, approval_points=10 * LIMIT).state == "waiting"
            assert [one.adjustment for one in waiting_adjustments(connection)] == [key]
            with pytest.raises(BookError, match=f"{key} was asked for by alice: somebody else must approve it"):
                approve(connection, key, by="alice")
            assert facts(connection) == before
            done = approve(connection, key, by="bob")
            assert (done.state, done.by, done.approved_by) == ("posted", "alice", "bob")
            assert approve(connection, key, by="carol") == done
            assert give(connection, points, key=key) == done
            assert waiting_adjustments(connection) == []
        assert balance(connection, "m1") == (0, 10 + LIMIT, 0)
        rows = connection.execute("SELECT by, details ->> 'approved_by' FROM book.actions WHERE kind = 'adjust'")
        assert sorted(rows.fetchall(), key=str) == [("alice", "bob"), ("alice", "bob"), ("alice", None)]


def test_one_that_is_turned_down_is_never_posted(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        before = facts(connection)
        give(connection, LIMIT + 1, key="large")
        done = reject(connection, "large", by="bob")
        assert (done.state, done.rejected_by) == ("rejected", "bob")
        assert reject(connection, "large", by="carol") == done
        assert give(connection, LIMIT + 1, key="large") == done
        with pytest.raises(BookError, match="large was rejected by bob"):
            approve(connection, "large", by="carol")
        assert waiting_adjustments(connection) == []
        assert facts(connection) == before
        give(connection, 1, key="small")
        with pytest.raises(BookError, match="small is posted"):
            reject(connection, "small", by="bob")
        for decide in (approve, reject):
            with pytest.raises(BookError, match="there is no adjustment nothing"):
                decide(connection, "nothing", by="bob")


def test_a_dry_run_changes_nothing(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        give(connection, LIMIT + 1, key="large")
        before = facts(connection)
        assert give(connection, 7, key="small", dry_run=True).state == "posted"
        assert give(connection, LIMIT + 1, key="other", dry_run=True).state == "waiting"
        assert approve(connection, "large", by="bob", dry_run=True).state == "posted"
        assert reject(connection, "large", by="bob", dry_run=True).state == "rejected"
        assert facts(connection) == before
        assert [(one.adjustment, one.state) for one in waiting_adjustments(connection)] == [("large", "waiting")]
        assert connection.execute("SELECT count(*) FROM book.adjustments").fetchone() == (1,)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reason": "Good Will"}, "--reason"),
        ({"reason": ""}, "--reason"),
        ({"reason": "x" * 65}, "--reason"),
        ({"points": 0}, "--points"),
        ({"points": 1 << 63}, "--points"),
        ({"member": ""}, "--member"),
        ({"member": "会" * 22}, "--member"),
        ({"member": "\udcff"}, "--member"),
        ({"by": ""}, "--by"),
        ({"by": " \u3000"}, "--by"),
        ({"key": "audit-p-1"}, "--id"),
        ({"note": "x" * 5000}, "--note"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(book: str, fields: dict[str, Any], words: str) -> None:
    with connect(book) as connection:
        with pytest.raises(UsageError, match=words):
            give(connection, **({"points": 1} | fields))
        assert connection.execute("SELECT count(*) FROM book.adjustments").fetchone() == (0,)


def test_the_limit_is_the_book_s_and_whoever_asks_may_only_lower_it(book: str) -> None:
    with connect(book) as connection:
        assert give(connection, 10_001, key="a", approval_points=1 << 40).state == "waiting"
        assert give(connection, 10_000, key="b", approval_points=None).state == "posted"
        limit = limit_approval(connection, 50, reason="policy", by="carol")
        assert (limit.points, limit.changed) == (50, True)
        assert not limit_approval(connection, 50, reason="policy", by="carol").changed
        assert give(connection, 51, key="c", approval_points=None).state == "waiting"
        assert give(connection, 50, key="d", approval_points=49).state == "waiting"
        assert give(connection, 50, key="e").state == "posted"
        limit_approval(connection, 1000, reason="policy", by="carol")
        assert give(connection, 1000, key="f", approval_points=None).state == "posted"
        # What waited goes on waiting.
        assert give(connection, 51, key="c", approval_points=None).state == "waiting"
        rows = connection.execute(
            "SELECT by, reason, points FROM book.actions JOIN book.approval_limits USING (action) ORDER BY action"
        ).fetchall()
        assert rows == [("carol", "policy", 50), ("carol", "policy", 1000)]
        with pytest.raises(UsageError, match="--limit"):
            limit_approval(connection, -1, reason="policy", by="carol")


@pytest.mark.parametrize("alias", ["alice ", "Alice", " ALICE", "alice\t"])
def test_nobody_is_two_persons(book: str, alias: str) -> None:
    with connect(book) as connection:
        give(connection, LIMIT + 1, key="large")
        with pytest.raises(BookError, match="large was asked for by alice: somebody else must approve it"):
            approve(connection, "large", by=alias)
        assert balance(connection, "m1") == (0, 0, 0)


def test_the_database_posts_nothing_that_is_not_approved(book: str) -> None:
    """Past the program, as somebody with the rights of the application would try."""
    with connect(book) as connection:
        give(connection, 5, key="small")
        give(connection, 10_001, key="large")
        give(connection, 7, key="rejected", approval_points=1)
        reject(connection, "rejected", by="bob")

        def refused(*statements: str) -> None:
            before = facts(connection)
            with pytest.raises(psycopg.errors.RestrictViolation), connection.transaction():
                connection.execute("; ".join(statements))
            assert facts(connection) == before

        def posting(
            points: int,
            action: str = "(SELECT max(action) FROM book.actions)",
            member: str = "m1",
            kind: str = "adjust",
        ) -> str:
            corrects = "NULL" if kind == "adjust" else "(SELECT min(number) FROM book.postings)"
            return (
                "INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, "
                f"lot_days, lot_points, corrects) SELECT nextval('book.numbers'), {action}, '{kind}', '{member}', "
                f"'issuance', 'available', {points}, '2026-11-10', ARRAY['2026-11-10'::date], ARRAY[{points}], "
                f"{corrects}"
            )

        act = "INSERT INTO book.actions (kind, by) VALUES ('adjust', 'alice')"
        decide = (
            "UPDATE book.adjustments SET action = (SELECT max(action) FROM book.actions), approved_by = {} "
            "WHERE adjustment = '{}'"
        )
        for approved_by in ("NULL", "'ALICE '", "' '"):
            refused(act, decide.format(approved_by, "large"), posting(10_001))
        for wrong in (posting(10_002), posting(10_001, member="m2"), posting(10_001, kind="correct")):
            refused(act, decide.format("'bob'", "large"), wrong)
        refused(act, posting(5))
        refused(act, decide.format("'bob'", "large"), posting(10_001), posting(10_001))
        refused(posting(5, "(SELECT action FROM book.adjustments WHERE adjustment = 'small')"))
        ask = (
            "INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by, approval_points) VALUES "
        )
        refused(
            act,
            f"{ask} ('mine', 'm1', 20000, 'x', '', 'alice', 1 << 40)",
            decide.format("NULL", "mine"),
            posting(20_000),
        )
        refused(
            act,
            f"{ask} ('audit-p-1', 'm1', 20, 'audit', '', 'alice', 99)",
            decide.format("NULL", "audit-p-1"),
            posting(20),
        )
        for change in (
            "points = 1",
            "asked_by = 'bob'",
            "approval_points = 99999",
            "member = 'm2'",
            "adjustment = 'x'",
        ):
            refused(f"UPDATE book.adjustments SET {change} WHERE adjustment = 'large'")
        refused("UPDATE book.adjustments SET rejected_by = NULL WHERE adjustment = 'rejected'")
        refused("UPDATE book.adjustments SET approved_by = 'bob' WHERE adjustment = 'small'")
        refused("DELETE FROM book.adjustments")
        refused("TRUNCATE book.adjustments")
        refused("DELETE FROM book.approval_limits", "TRUNCATE book.approval_limits")
        connection.execute(act)
        assert approve(connection, "large", by="bob").state == "posted"


def test_texts_that_the_database_cannot_keep(book: str) -> None:
    strange = "a\0b\\0c"
    with connect(book) as connection:
        done = give(connection, LIMIT + 1, strange, key=strange, note=strange, by=strange)
        assert (done.member, done.adjustment, done.note, done.by) == (strange,) * 4
        assert waiting_adjustments(connection) == [done]
        assert approve(connection, strange, by="bob").state == "posted"


def test_twenty_racing_with_one_key_post_once(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        results = race(book, 20, lambda connection, _: give(connection, 7, key="ticket-1"))
        assert results == [results[0]] * 20
        assert balance(connection, "m1") == (0, 17, 0)
        assert connection.execute("SELECT count(*) FROM book.postings WHERE kind = 'adjust'").fetchone() == (1,)


def test_twenty_racing_with_keys_of_their_own_add_up(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        points = [number - 9 or 5 for number in range(20)]
        race(book, 20, lambda connection, number: give(connection, points[number], key=f"ticket-{number}"))
        available = 10 + sum(points)
        assert balance(connection, "m1") == (0, available, 0)
        assert sum(lot[2] for lot in lots(connection)) == available
        assert connection.execute("SELECT sum(points) FROM book.accounts").fetchone() == (0,)


def test_racing_approvals_and_rejections_decide_once(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
        give(connection, LIMIT + 1, key="large")
        decisions = (approve, reject)
        race(book, 12, lambda connection, number: decisions[number % 2](connection, "large", by=f"person-{number}"))
        (row,) = connection.execute("SELECT action IS NOT NULL, rejected_by IS NOT NULL FROM book.adjustments")
        assert row[0] != row[1]
        assert balance(connection, "m1") == (0, 10 + (LIMIT + 1 if row[0] else 0), 0)


def test_the_command(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        earned(valkey, connection)
    adjustment = ["adjust", "--database", book, "--member", "m1", "--reason", "goodwill", "--note", "late"]
    by_alice = [*adjustment, "--by", "alice", "--adjust-approval-points", str(LIMIT)]
    (line,) = run_json(*by_alice, "--points", "-5", "--id", "ticket-1")
    assert line == {
        "adjustment": "ticket-1",
        "approved_by": None,
        "by": "alice",
        "corrects": None,
        "dry_run": False,
        "member": "m1",
        "note": "late",
        "points": -5,
        "reason": "goodwill",
        "rejected_by": None,
        "state": "posted",
    }
    (large,) = run_json(*by_alice, "--points", "101")
    assert large["state"] == "waiting"
    assert [one["adjustment"] for one in run_json("adjust", "--database", book, "--list")] == [large["adjustment"]]
    decide = ["adjust", "--database", book, "--approve", large["adjustment"]]
    refused = command(*decide, "--by", "alice")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"was asked for by alice" in refused.stderr
    assert run_json(*decide, "--by", "bob")[0]["state"] == "posted"
    limit = ["adjust", "--database", book, "--by", "carol", "--reason", "policy", "--limit"]
    assert run_json(*limit, "0", "--dry-run") == [{"changed": True, "dry_run": True, "points": 0}]
    assert run_json(*adjustment, "--by", "alice", "--points", "1", "--dry-run")[0]["state"] == "posted"
    assert run_json(*limit, "0") == [{"changed": True, "dry_run": False, "points": 0}]
    assert run_json(*adjustment, "--by", "alice", "--points", "1")[0]["state"] == "waiting"
    for words, wrong in (
        (["--points", "5"], "--by"),
        (["--by", "alice", "--limit", "0", "--list"], "one at a time"),
        (["--by", "alice"], "--points"),
        (["--approve", ""], "--by"),
        (["--by", "alice", "--points", "5", "--reason", "?"], "--reason"),
    ):
        done = command(*adjustment, *words)
        assert (done.returncode, wrong in done.stderr.decode()) == (2, True), done.stderr
    with connect(book) as connection:
        assert balance(connection, "m1") == (0, 106, 0)
    assert json.loads(command("balance", "--database", book, "--member", "m1").stdout)["available"] == 106
