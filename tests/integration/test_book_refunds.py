"""Refunds: what an order's points shrink to, out of which account, once each, and what a person must look at."""

from __future__ import annotations

import sys
import threading
from datetime import date
from typing import Any

import psycopg
import pytest

from accrual.book import (
    Connection,
    Done,
    SlowService,
    adjust,
    close_exception,
    confirm,
    connect,
    rebuild,
    refunds,
    release,
    settle,
    slow,
    waiting,
)
from accrual.book.slow import SlowDone
from accrual.rulebook import day_number
from accrual.settings import Settings
from audits import found
from book_model import Model, ModelEntry
from books import TAKING_RULEBOOK, Partition, at, balance, facts, ingest, order, taking
from servers import Server

DAY = day_number(date(2026, 11, 10))
WAIT_HOURS = 168

Event = dict[str, Any]


def refund(number: int, of: int, amount: int, member: str = "m1", **fields: Any) -> Event:
    return {
        "id": f"r{number}",
        "kind": "order_refunded",
        "member": member,
        "ts": at(minutes=500 + number),
        "amount": amount,
        "order": f"o{of}",
    } | fields


def work(connection: Connection, partition: Partition, *, wait_hours: float = WAIT_HOURS) -> Done:
    return slow(connection, partition.rulebook, refund_wait_hours=wait_hours)


def exceptions(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT kind, event, closed_at IS NULL FROM book.exceptions ORDER BY exception"
    ).fetchall()


def results(connection: Connection) -> dict[str, str]:
    """Return what became of each deferred event; of those that still wait, that."""
    rows = connection.execute(
        "SELECT d.event, coalesce(r.result, 'waiting'), w.seq IS NOT NULL FROM book.deferred d "
        "LEFT JOIN book.resolutions r USING (partition_id, seq) LEFT JOIN book.waiting w USING (partition_id, seq) "
        "ORDER BY d.number, d.seq"
    ).fetchall()
    # A deferred event waits or is dealt with, never both.
    assert all((result == "waiting") == waits for _, result, waits in rows)
    return {event: result for event, result, _ in rows}


def sums_to_zero(connection: Connection) -> bool:
    row = connection.execute("SELECT coalesce(sum(points), 0) FROM book.accounts").fetchone()
    return row == (0,)


def test_a_refund_takes_back_its_share(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2))
    partition.send(refund(1, 1, 300))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert balance(connection, "m1") == (17, 0, 0)
        rows = connection.execute(
            "SELECT p.kind, p.member, from_account, to_account, points, day::text, partition_id, seq, late, cause_seq, "
            "a.kind, a.by FROM book.postings p JOIN book.actions a USING (action)"
        ).fetchall()
        assert rows == [("refund", "m1", "pending", "issuance", 3, "2026-11-10", 1, 1, False, 3, "refund", "scheduler")]
        rows = connection.execute(
            "SELECT partition_id, seq, order_partition_id, order_seq, order_late, amount_fen, reversed "
            "FROM book.refunds"
        ).fetchall()
        assert rows == [(1, 3, 1, 1, False, 300, 3)]
        assert connection.execute("SELECT partition_id, seq FROM book.identities WHERE event = 'r1'").fetchall() == [
            (1, 3)
        ]
        assert results(connection) == {"r1": "refund"}
        before = facts(connection)
        assert work(connection, partition) == Done()
        assert facts(connection) == before
        # The rest of it, in two refunds that come at once, takes back the rest.
        partition.send(refund(2, 1, 699), refund(3, 1, 1))
        ingest(connection, partition)
        work(connection, partition)
        assert balance(connection, "m1") == (10, 0, 0)
        assert connection.execute("SELECT seq, reversed FROM book.refunds ORDER BY seq").fetchall() == [
            (3, 3),
            (4, 7),
            (5, 0),
        ]
        assert sums_to_zero(connection)


def test_a_clamped_order_keeps_what_the_rest_of_it_would_earn(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1, amount=150_000), refund(1, 1, 30_000), refund(2, 1, 60_000), refund(3, 1, 59_999))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        # 1500 points uncapped, 1000 granted: 120 000 fen are still worth 1200, 60 000 only 600, and one fen nothing.
        assert connection.execute("SELECT reversed FROM book.refunds ORDER BY seq").fetchall() == [(0,), (400,), (600,)]
        assert balance(connection, "m1") == (0, 0, 0)
        assert connection.execute("SELECT count(*) FROM book.postings").fetchone() == (2,)


def test_held_points_are_reversed_where_they_are_held(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d1") for number in range(1, 8)), refund(1, 6, 500), refund(2, 1, 1000))
    with connect(book) as connection:
        ingest(connection, partition)
        assert balance(connection, "m1") == (50, 0, 20)
        work(connection, partition)
        assert balance(connection, "m1") == (40, 0, 15)


def test_released_points_are_reversed_where_they_went(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d1") for number in range(1, 8)))
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        release(connection, "m1", reason="checked", by="reviewer")
        assert balance(connection, "m1") == (0, 70, 0)
        partition.send(refund(1, 6, 500), refund(2, 1, 1000))
        ingest(connection, partition)
        work(connection, partition)
        assert balance(connection, "m1") == (0, 55, 0)


def test_what_was_confirmed_is_not_taken_back_again(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, device="d1") for number in range(1, 8)))
    with connect(book) as connection:
        ingest(connection, partition)
        confirm(connection, "m1", reason="fraud", by="reviewer")
        assert balance(connection, "m1") == (50, 0, 0)
        partition.send(refund(1, 6, 500), refund(2, 7, 1000))
        ingest(connection, partition)
        work(connection, partition)
        assert balance(connection, "m1") == (50, 0, 0)
        assert connection.execute("SELECT amount_fen, reversed FROM book.refunds ORDER BY seq").fetchall() == [
            (500, 0),
            (1000, 0),
        ]


def test_available_points_leave_the_lot_of_their_order_first(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1, amount=5000))
    partition.send(order(2, amount=3000, ts=at(1)))
    with connect(book) as connection:
        ingest(connection, partition)
        for day in (DAY, DAY + 1):
            settle(connection, partition.rulebook, day)
        partition.send(refund(1, 2, 2000, ts=at(1, 1)))
        ingest(connection, partition)
        work(connection, partition)
        lots = "SELECT day::text, points FROM book.lots ORDER BY day"
        assert connection.execute(lots).fetchall() == [("2026-11-10", 50), ("2026-11-11", 10)]
        # What its own lot no longer has, the others give; what none has makes a hole.
        adjust(connection, "m1", -55, reason="spent", note="", by="shop", approval_points=1000)
        assert connection.execute(lots).fetchall() == [("2026-11-10", 0), ("2026-11-11", 5)]
        partition.send(refund(2, 1, 5000, ts=at(1, 2)))
        ingest(connection, partition)
        work(connection, partition)
        assert balance(connection, "m1") == (0, -45, 0)
        assert connection.execute(lots).fetchall() == [("2026-11-10", 0), ("2026-11-11", 0)]
        row = connection.execute(
            "SELECT lot_days::text[], lot_points FROM book.postings WHERE kind = 'refund' ORDER BY number DESC LIMIT 1"
        ).fetchone()
        assert row == (["2026-11-11", None], [5, 45])


def test_what_a_person_must_look_at(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2), order(3, order="twice"), order(4, order="twice"))
    partition.send(
        refund(1, 1, 1001),
        refund(2, 1, 100, member="m2"),
        refund(3, 2, 600),
        refund(4, 2, 500),
        refund(5, 3, 100, order="twice"),
    )
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert exceptions(connection) == [
            ("refund_exceeds_order", "r1", True),
            ("refund_of_another_member", "r2", True),
            ("refund_exceeds_order", "r4", True),
            ("order_ambiguous", "r5", True),
        ]
        assert results(connection) == {
            "r1": "exception",
            "r2": "exception",
            "r3": "refund",
            "r4": "exception",
            "r5": "exception",
        }
        assert balance(connection, "m1") == (34, 0, 0)
        # What was refused is no part of the sum, and its id is taken.
        partition.send(refund(6, 1, 1000), refund(7, 2, 400))
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) | {"r6": "refund", "r7": "refund"} == results(connection)
        assert balance(connection, "m1") == (20, 0, 0)
        assert len(exceptions(connection)) == 4


def test_an_order_that_cost_nothing_has_nothing_to_reverse(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1, amount=0), refund(1, 1, 0), refund(2, 1, 1))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) == {"r1": "refund", "r2": "exception"}
        assert connection.execute("SELECT count(*) FROM book.postings").fetchone() == (0,)


def test_a_refund_of_a_rejected_order_reverses_nothing(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send({"id": "c1", "kind": "member_blocked", "member": "m1", "ts": at()}, order(1), refund(1, 1, 1000))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) == {"r1": "refund"}
        assert balance(connection, "m1") == (0, 0, 0)
        # Sent again, and decided: the entry that has points is the order's.
        partition.send({"id": "c2", "kind": "member_released", "member": "m1", "ts": at(minutes=2)})
        partition.send(order(2, order="o1"), refund(2, 1, 500))
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) == {"r1": "refund", "r2": "refund"}
        assert balance(connection, "m1") == (5, 0, 0)


def test_a_refund_waits_for_its_order(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(refund(1, 1, 1000), refund(2, 2, 500))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) == {"r1": "waiting", "r2": "waiting"}
        assert exceptions(connection) == []
        partition.send(order(1))
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) == {"r1": "refund", "r2": "waiting"}
        assert balance(connection, "m1") == (0, 0, 0)
        # When it has waited long enough, a person is told, once; should the order still come, that is done with.
        for _ in range(2):
            work(connection, partition, wait_hours=0)
            assert exceptions(connection) == [("order_unknown", "r2", True)]
        partition.send(order(2))
        ingest(connection, partition)
        work(connection, partition, wait_hours=0)
        assert results(connection) == {"r1": "refund", "r2": "refund"}
        assert exceptions(connection) == [("order_unknown", "r2", False)]
        assert balance(connection, "m1") == (5, 0, 0)


def test_a_refund_that_has_waited_in_vain_burns_nothing(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(refund(number, number, 100) for number in range(20)))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition, wait_hours=0)
        assert len(exceptions(connection)) == 20
        last = connection.execute("SELECT last_value FROM book.numbers").fetchone()
        for _ in range(3):
            work(connection, partition, wait_hours=0)
        assert connection.execute("SELECT last_value FROM book.numbers").fetchone() == last


def test_a_refund_that_a_person_has_dealt_with_is_left_alone(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(refund(1, 1, 1000))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition, wait_hours=0)
        (number,) = connection.execute("SELECT exception FROM book.exceptions").fetchone() or (0,)
        close_exception(connection, number, by="clerk", reason="paid_back")
        partition.send(order(1))
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) == {"r1": "exception"}
        assert balance(connection, "m1") == (10, 0, 0)
        assert exceptions(connection) == [("order_unknown", "r1", False)]


def test_a_dry_run_says_what_would_be_done(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(2), refund(1, 1, 300), refund(2, 1, 700), refund(3, 2, 1001), refund(4, 4, 1))
    with connect(book) as connection:
        ingest(connection, partition)
        before = facts(connection), results(connection)
        done = slow(connection, partition.rulebook, refund_wait_hours=0, dry_run=True)
        assert done == Done(2, 2, 10)
        assert (facts(connection), results(connection), exceptions(connection)) == (*before, [])
        assert slow(connection, partition.rulebook, refund_wait_hours=0) == done


def test_a_dry_run_is_short_and_a_long_run_says_how_far_it_is(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The package has a function of the module's name.
    module = sys.modules[slow.__module__]
    monkeypatch.setattr(module, "DRY_RUN_EVENTS", 2)
    monkeypatch.setattr(module, "REPORT_S", 0.0)
    monkeypatch.setattr("accrual.book.refunds.CHUNK_EVENTS", 1)
    caplog.set_level("INFO", "accrual.book")
    partition = Partition(valkey.client())
    partition.send(*(order(number) for number in range(1, 4)), *(refund(number, number, 100) for number in range(1, 4)))
    with connect(book) as connection:
        ingest(connection, partition)
        caplog.clear()
        assert slow(connection, partition.rulebook, refund_wait_hours=0, dry_run=True) == Done(2, 2, 2)
        assert caplog.messages[-1] == "slow: 2 members, 2 postings, 2 points; 1 events wait"
        settings = Settings(database=book, redis=valkey.url, refund_wait_hours=0)
        service = SlowService(settings, partition.rulebook, by="tester")
        assert service.drain(threading.Event(), dry_run=True) == SlowDone(2, 2, 2, waiting=3)
        caplog.clear()
        assert slow(connection, partition.rulebook, refund_wait_hours=0) == Done(3, 3, 3)
        assert caplog.messages[:3] == [
            f"slow: {done} members, {done} postings, {done} points; {3 - done} events wait" for done in (1, 2, 3)
        ]


def test_refunds_of_a_member_meet_lots_in_their_order(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are dealt with together or one by one, each takes from the lots that the one before has left."""
    partition = Partition(valkey.client())
    for day in range(3):
        partition.send(order(day, amount=1000, ts=at(day)), order(10 + day, amount=1000, ts=at(day, 1)))
    partition.send(
        *(refund(number, of, 400, ts=at(3, number)) for number, of in enumerate([2, 2, 1, 0, 12, 2, 11, 1, 10, 0]))
    )
    found = []
    with connect(book) as connection:
        ingest(connection, partition)
        for day in range(3):
            settle(connection, partition.rulebook, DAY + day)
        adjust(connection, "m1", -35, reason="spent", note="", by="shop", approval_points=1000)
        for chunk in (1000, 1):
            monkeypatch.setattr(refunds, "CHUNK_EVENTS", chunk)
            with connection.transaction(force_rollback=True):
                work(connection, partition)
                found.append(
                    connection.execute(
                        "SELECT cause_seq, points, lot_days::text[], lot_points FROM book.postings "
                        "WHERE kind = 'refund' ORDER BY number"
                    ).fetchall()
                )
                assert balance(connection, "m1") == (0, -11, 0)
    assert found[0] == found[1]
    assert [cause for cause, *_ in found[0]] == list(range(7, 12)) + list(range(13, 17))


def test_an_id_counts_once_over_all_partitions(valkey: Server, book: str) -> None:
    one, other = Partition(valkey.client(), "one"), Partition(valkey.client(), "other")
    one.send(order(1), refund(1, 1, 300))
    other.send(order(2, "m2"), refund(1, 1, 300), refund(2, 2, 100, "m2", id="e1"))
    with connect(book) as connection:
        ingest(connection, one, other)
        work(connection, one)
        assert balance(connection, "m1") == (7, 0, 0)
        assert balance(connection, "m2") == (10, 0, 0)
        rows = connection.execute(
            "SELECT p.name, seq, result FROM book.resolutions JOIN book.partitions p USING (partition_id)"
        )
        assert sorted(rows.fetchall()) == [
            ("one", 2, "refund"),
            ("other", 2, "duplicate"),
            ("other", 3, "duplicate"),
        ]
        assert connection.execute("SELECT count(*) FROM book.waiting").fetchone() == (0,)


def test_texts_that_the_database_cannot_keep(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    strange = ["a\0b", "a\\0b", "\0", "会员\0"]
    for number, text in enumerate(strange):
        partition.send(order(number, text, order=text), refund(number, number, 500, text, order=text, id=f"r{text}"))
    partition.send(refund(9, 9, 1001, strange[0], order=strange[0]))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert connection.execute("SELECT pending FROM book.balances").fetchall() == [(5,)] * len(strange)
        assert exceptions(connection) == [("refund_exceeds_order", "r9", True)]


def history(members: int = 5, orders: int = 40) -> tuple[list[Event], Model]:
    """Return events of orders and their refunds, good and bad, and what a book should make of them."""
    model = Model(lambda day: day)
    events = [order(number, f"m{number % members}", 700 + 37 * number) for number in range(orders)]
    for event in events:
        points = event["amount"] // 100
        model.book(
            ModelEntry(event["id"], event["member"], DAY, "granted", points, points, event["amount"], event["order"])
        )
    for number in range(3 * orders):
        of = number * 7 % orders
        refunded = refund(number, of, 100 + 61 * (number % 11), f"m{of % members}" if number % 13 else "stranger")
        model.refund(refunded["id"], refunded["member"], refunded["order"], refunded["amount"])
        events.append(refunded)
    return events, model


def agrees(connection: Connection, model: Model) -> None:
    """Check the balances and exceptions of a book against those of the model."""
    rows = connection.execute("SELECT member, pending, available, held FROM book.balances").fetchall()
    expected = {name: (account.pending, account.available, account.held) for name, account in model.accounts.items()}
    assert {name: (pending, available, held) for name, pending, available, held in rows} == expected
    assert sorted(event for _, event, _ in exceptions(connection)) == sorted(event for _, event in model.exceptions)
    assert connection.execute("SELECT count(*) FROM book.waiting").fetchone() == (0,)
    assert sums_to_zero(connection)


def test_twenty_at_once_do_what_one_would(valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refunds, "CHUNK_EVENTS", 3)
    partition = Partition(valkey.client())
    events, model = history()
    partition.send(*events)
    faults: list[BaseException] = []

    def run() -> None:
        try:
            with connect(book) as connection:
                slow(connection, partition.rulebook, refund_wait_hours=WAIT_HOURS)
        except BaseException as error:  # noqa: BLE001 - told to the test
            faults.append(error)

    with connect(book) as connection:
        ingest(connection, partition)
        threads = [threading.Thread(target=run) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        agrees(connection, model)
        assert any(model.exceptions)


@pytest.mark.parametrize("step", ["claim", "post", "resolve"])
def test_killed_in_the_middle_it_leaves_nothing_half_done(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(refunds, "CHUNK_EVENTS", 10)
    partition = Partition(valkey.client())
    events, model = history(orders=10)
    partition.send(*events)
    original = getattr(refunds, step)

    def kill(cursor: psycopg.Cursor[Any], *arguments: Any, **named: Any) -> Any:
        result = original(cursor, *arguments, **named)
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return result

    with connect(book) as watching:
        ingest(watching, partition)
        before = facts(watching), results(watching), exceptions(watching)
        with monkeypatch.context() as patched:
            patched.setattr(refunds, step, kill)
            connection = connect(book)
            with pytest.raises(psycopg.OperationalError), connection:
                slow(connection, partition.rulebook, refund_wait_hours=WAIT_HOURS)
        assert (facts(watching), results(watching), exceptions(watching)) == before
        slow(watching, partition.rulebook, refund_wait_hours=WAIT_HOURS)
        agrees(watching, model)


def test_an_id_that_the_ingester_books_at_the_same_moment(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), refund(1, 1, 300, id="same"))
    other = Partition(valkey.client(), "other")
    with connect(book) as connection, connect(book) as ingesting:
        ingest(connection, partition, other)
        other.send(order(2, "m2", id="same"))

        def claim(*arguments: Any, **named: Any) -> Any:
            ingest(ingesting, other)
            return waiting.claim(*arguments, **named)

        monkeypatch.setattr(refunds, "claim", claim)
        work(connection, partition)
        assert balance(connection, "m1") == (10, 0, 0)
        assert balance(connection, "m2") == (10, 0, 0)
        assert results(connection) == {"same": "duplicate"}


def test_a_refund_gives_nothing_back_of_an_order_that_took_points(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    freeze: Event = {"id": "f", "kind": "member_frozen", "member": "m2", "ts": at(0, 2)}
    partition.send(order(1, amount=2000), taking(2), freeze, taking(3, "m2"))
    # What is above a lower maximum is clamped to nothing, also where it is below zero.
    partition.adopt(TAKING_RULEBOOK.replace("version = 1", "version = 2").replace("max = 1000", "max = 0"))
    partition.send(taking(4))
    partition.send(refund(1, 2, 400), refund(2, 2, 600), refund(3, 3, 1000, "m2"), refund(4, 4, 500), refund(5, 2, 1))
    with connect(book) as connection:
        ingest(connection, partition)
        row = connection.execute("SELECT uncapped, points FROM book.entries WHERE event = 'e4'").fetchone()
        assert row == (-5, 0)
        confirm(connection, "m2", reason="abuse", by="alice")
        work(connection, partition)
        assert (balance(connection, "m1"), balance(connection, "m2")) == ((15, 0, 0), (0, 0, 0))
        rows = connection.execute("SELECT amount_fen, reversed FROM book.refunds ORDER BY seq").fetchall()
        assert rows == [(400, 0), (600, 0), (1000, 0), (500, 0)]
        assert exceptions(connection) == [("refund_exceeds_order", "r5", True)]
        assert not list(rebuild(connection, dry_run=True))
        assert not list(found(valkey, connection))


def test_a_settled_day_that_came_to_nothing_is_settled_again_after_a_refund(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    partition.send(order(1, amount=500), taking(2), order(3, "m2", 500), taking(4, "m2"), order(5, "m3"))
    partition.send(refund(1, 1, 300))
    finished = "SELECT finished FROM book.settled_days"
    with connect(book) as connection:
        ingest(connection, partition)
        assert settle(connection, partition.rulebook, DAY).postings == 1
        assert connection.execute(finished).fetchone() == (True,)
        work(connection, partition)
        assert balance(connection, "m1") == (-3, 0, 0)
        assert connection.execute(finished).fetchone() == (False,)
        assert not list(found(valkey, connection))
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m1") == (0, -3, 0)
        assert connection.execute(finished).fetchone() == (True,)
        confirm(connection, "m2", reason="abuse", by="alice", claw_back=(DAY, DAY))
        assert (balance(connection, "m2"), connection.execute(finished).fetchone()) == ((-5, 0, 0), (False,))
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m2") == (0, -5, 0)
        # From now on refunds of that day come out of what is available.
        partition.send(refund(2, 1, 200), refund(3, 5, 500, "m3"))
        ingest(connection, partition)
        work(connection, partition)
        assert (balance(connection, "m1"), balance(connection, "m3")) == ((0, -5, 0), (0, 5, 0))
        assert connection.execute(finished).fetchone() == (True,)
        assert not list(rebuild(connection, dry_run=True))
        assert not list(found(valkey, connection))
