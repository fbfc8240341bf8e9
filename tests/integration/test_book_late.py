"""Late events: decided on the day they belong to, on top of what is booked for it, and booked exactly once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accrual.audit.caps import booked_days, check_caps
from accrual.audit.late import check_late
from accrual.audit.recorded import recorded_rulebooks
from accrual.book import Connection, Done, adjust, confirm, connect, late, rebuild, settle, slow, waiting
from accrual.book.follow import Follower, follow
from accrual.book.ingest import Book
from accrual.engine import Entry, ReferenceEngine
from accrual.errors import RulebookError
from accrual.events import validate
from accrual.rulebook import day_number, parse
from audits import found
from books import BOOK_RULEBOOK, TAKING_RULEBOOK, Partition, at, balance, facts, ingest, order, run_json, taking
from servers import Server
from workers import ROOT, SECRET, command, wait_until

DAY = day_number(date(2026, 11, 10))
WAIT_HOURS = 168
WAITS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

Event = dict[str, Any]


def checkin(number: int, member: str = "m1", **fields: Any) -> Event:
    return {"id": f"c{number}", "kind": "checkin", "member": member, "ts": at(minutes=number)} | fields


def late_of(event: Event, days: int = 3) -> Event:
    """Return the event as one that arrives ``days`` after it happened."""
    return event | {"at": event["ts"] + days * 86_400_000}


def work(connection: Connection, partition: Partition) -> Done:
    return slow(connection, partition.rulebook, refund_wait_hours=WAIT_HOURS)


def entries(connection: Connection, columns: str = "event, outcome, points") -> list[tuple[Any, ...]]:
    """Return the late entries, in the order of their arrival."""
    return connection.execute(f"SELECT {columns} FROM book.entries WHERE late ORDER BY partition_id, seq").fetchall()


def exceptions(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT kind, event FROM book.exceptions ORDER BY exception").fetchall()


def results(connection: Connection) -> dict[str, int]:
    rows = connection.execute("SELECT result, count(*) FROM book.resolutions GROUP BY 1").fetchall()
    return dict(rows)


def is_consistent(connection: Connection) -> bool:
    """Tell whether nothing waits that is dealt with, and all movements add up to zero and to the balances."""
    (waiting,) = connection.execute(
        "SELECT count(*) FROM book.waiting JOIN book.resolutions USING (partition_id, seq)"
    ).fetchone() or (1,)
    accounts: dict[str, int] = dict(connection.execute("SELECT account, points FROM book.accounts").fetchall())
    sums = connection.execute("SELECT sum(pending), sum(available), sum(held) FROM book.balances").fetchone()
    assert sums is not None
    named = tuple(accounts.get(name, 0) for name in ("pending", "available", "held"))
    return waiting == 0 and sum(accounts.values()) == 0 and named == tuple(value or 0 for value in sums)


def test_a_late_order_is_booked_on_its_day(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), late_of(order(2, device="d1", ip="10.0.0.1", phone="13800000000")))
    with connect(book) as connection:
        ingest(connection, partition)
        assert balance(connection, "m1") == (10, 0, 0)
        assert work(connection, partition) == Done(1, 1, 10)
        assert balance(connection, "m1") == (20, 0, 0)
        columns = (
            "day::text, partition_id, seq, rulebook, event, kind, member, outcome, cause, amount_fen, order_id, points"
        )
        assert entries(connection, columns) == [
            ("2026-11-10", 1, 2, 1, "e2", "order_paid", "m1", "granted", None, 1000, "o2", 10)
        ]
        # What the ledger said of it goes on standing beside it.
        row = connection.execute(
            "SELECT count(*) FROM book.entries e JOIN book.deferred d USING (partition_id, seq) WHERE e.late "
            "AND (e.stream_id, e.item, e.ts_ms, e.day, e.device, e.ip, e.phone) "
            "= (d.stream_id, d.item, d.ts_ms, d.day, d.device, d.ip, d.phone)"
        ).fetchone()
        assert row == (1,)
        rows = connection.execute(
            "SELECT paid_order, payer, seq, late FROM book.identities WHERE event = 'e2'"
        ).fetchall()
        assert rows == [("o2", "m1", 2, True)]
        # Its number is that of a fact booked after all that was there before.
        row = connection.execute(
            "SELECT max(number) FILTER (WHERE late) > max(number) FILTER (WHERE NOT late) FROM book.entries"
        ).fetchone()
        assert row == (True,)
        before = facts(connection)
        assert work(connection, partition) == Done()
        assert facts(connection) == before
        assert results(connection) == {"late": 1}
        assert is_consistent(connection)
        assert settle(connection, partition.rulebook, DAY).points == 20


def test_of_a_settled_day_the_points_are_available_at_once(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        partition.send(late_of(order(2)), late_of(order(3, "m2")), late_of(order(4, "m2", ts=at(1))))
        ingest(connection, partition)
        work(connection, partition)
        assert balance(connection, "m1") == (0, 20, 0)
        assert balance(connection, "m2") == (10, 10, 0)
        lots = connection.execute("SELECT member, day::text, expires_on::text, points FROM book.lots ORDER BY 1, 2")
        assert lots.fetchall() == [("m1", "2026-11-10", "2027-11-10", 20), ("m2", "2026-11-10", "2027-11-10", 10)]
        accounts = connection.execute("SELECT event, account FROM book.holdings ORDER BY event").fetchall()
        assert accounts == [("e1", "available"), ("e2", "available"), ("e3", "available"), ("e4", "pending")]
        assert settle(connection, partition.rulebook, DAY).points == 0
        assert settle(connection, partition.rulebook, DAY + 1).points == 10
        assert is_consistent(connection)


def test_settled_days_fill_a_hole_in_the_order_of_arrival(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(valkey.client())
    days = [1, 0, 1, 2, 0]
    partition.send(order(100, "m2"))
    partition.send(*(late_of(order(number, ts=at(day, number), amount=300), 5) for number, day in enumerate(days)))
    found = []
    with connect(book) as connection:
        ingest(connection, partition)
        for day in range(3):
            settle(connection, partition.rulebook, DAY + day)
        adjust(connection, "m1", -5, reason="spent", note="", by="shop", approval_points=1000)
        for chunk in (1000, 1):
            monkeypatch.setattr(late, "CHUNK_EVENTS", chunk)
            with connection.transaction(force_rollback=True):
                work(connection, partition)
                found.append(
                    connection.execute(
                        "SELECT day::text, points FROM book.lots WHERE member = 'm1' ORDER BY 1"
                    ).fetchall()
                )
                assert balance(connection, "m1") == (0, 10, 0)
    # Day 1 fills three of five, day 0 the other two.
    assert found[0] == [("2026-11-10", 4), ("2026-11-11", 3), ("2026-11-12", 3)]
    assert found[0] == found[1]


def test_an_id_that_is_booked_is_a_duplicate(valkey: Server, book: str) -> None:
    one, other = Partition(valkey.client(), "one"), Partition(valkey.client(), "other")
    one.send(order(1))
    other.send(late_of(order(1, amount=5000)), late_of(order(2)), late_of(order(3, amount=2000), 3))
    one.send(late_of(order(3)))
    with connect(book) as connection:
        ingest(connection, one, other)
        work(connection, one)
        assert sorted(entries(connection)) in (
            [("e2", "granted", 10), ("e3", "granted", 10)],
            [("e2", "granted", 10), ("e3", "granted", 20)],
        )
        assert results(connection) == {"duplicate": 2, "late": 2}
        assert exceptions(connection) == []
        assert is_consistent(connection)


def test_what_step_8_refuses_is_booked_without_points(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    group = {"kind": "group_opened", "member": "m1"}
    partition.send(checkin(1), {"id": "g1", "ts": at(), **group})
    partition.send({"id": "x1", "kind": "member_blocked", "member": "m2", "ts": at(minutes=3)})
    partition.send(
        late_of(checkin(2)),
        late_of({"id": "g2", "ts": at(-40), **group}, 50),
        late_of(order(3, "m2")),
        late_of(checkin(4, "m3")),
        late_of(checkin(5, "m3")),
    )
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert entries(connection, "event, outcome, cause, base, uncapped, points") == [
            ("c2", "rejected", "max_per_day", 0, 0, 0),
            ("g2", "rejected", "once", 0, 0, 0),
            ("e3", "rejected", "member_blocked", 0, 0, 0),
            ("c4", "granted", None, 5, 5, 5),
            ("c5", "rejected", "max_per_day", 0, 0, 0),
        ]
        assert results(connection) == {"late": 5}
        assert exceptions(connection) == []
        assert balance(connection, "m1") == (55, 0, 0)
        assert balance(connection, "m2") == (0, 0, 0)


def test_a_clamp_lets_through_what_the_day_has_left(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1, amount=60_000))
    partition.send(
        late_of(order(2, amount=30_000)),
        late_of(order(3, amount=30_000)),
        late_of(order(4, amount=30_000)),
        late_of(order(5, amount=30_000, ts=at(1))),
    )
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert entries(connection, "event, uncapped, points, evidence") == [
            ("e2", 300, 300, None),
            ("e3", 300, 100, [{"limit": "member-cap", "observed": 1200}]),
            ("e4", 300, 0, [{"limit": "member-cap", "observed": 1300}]),
            ("e5", 300, 300, None),
        ]
        assert balance(connection, "m1") == (1300, 0, 0)
        assert exceptions(connection) == []


def test_a_trip_is_for_a_person(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, f"m{number}", device="d1") for number in range(4)))
    # Rejected on that day, without points, but counted by the limit; refused early, and not counted.
    partition.send(checkin(90, "m9", device="d1"), checkin(91, "m9", device="d1"))
    partition.send(
        late_of(order(10, "a", device="d1")),
        late_of(order(11, "b", device="d1")),
        late_of(order(12, "b", device="d2")),
        late_of(order(13, "b", device="d1", ts=at(1))),
    )
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert entries(connection) == [("e12", "granted", 10), ("e13", "granted", 10)]
        rows = connection.execute("SELECT kind, member, event, data FROM book.exceptions ORDER BY exception").fetchall()
        evidence = {"evidence": [{"limit": "device-orders", "observed": 6}]}
        # Neither of them is booked, so the second one is the sixth again.
        assert rows == [("late_tripped", "a", "e10", evidence), ("late_tripped", "b", "e11", evidence)]
        assert connection.execute("SELECT member FROM book.members WHERE state <> 'active'").fetchall() == []
        assert balance(connection, "a") == (0, 0, 0)
        assert results(connection) == {"late": 2, "exception": 2}
        # The event has been dealt with: that it comes once more makes it a duplicate.
        again = Partition(valkey.client(), "again")
        again.send(late_of(order(10, "a")))
        ingest(connection, again)
        work(connection, again)
        assert results(connection) == {"late": 2, "exception": 2, "duplicate": 1}
        assert balance(connection, "a") == (0, 0, 0)


def test_what_a_rejecting_limit_counted_counts(valkey: Server, book: str) -> None:
    text = (
        BOOK_RULEBOOK
        + '[[limit]]\nid = "crowd"\nkey = "ip"\nmeasure = "members"\nwindow = "day"\nmax = 2\naction = "reject"\n'
    )
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(*(order(number, f"m{number}", ip="i1") for number in range(4)))
    partition.send(late_of(order(10, "m0", ip="i1")), late_of(order(11, "m0", ip="i2")))
    with connect(book) as connection:
        ingest(connection, partition)
        assert balance(connection, "m3") == (0, 0, 0)
        work(connection, partition)
        assert entries(connection) == [("e11", "granted", 10)]
        rows = connection.execute("SELECT event, data FROM book.exceptions").fetchall()
        assert rows == [("e10", {"evidence": [{"limit": "crowd", "observed": 3}]})]


def test_sliding_windows_do_not_apply(valkey: Server, book: str) -> None:
    text = (
        BOOK_RULEBOOK
        + '[[limit]]\nid = "burst"\nkey = "member"\nmeasure = "events"\nwindow = "1h"\nmax = 1\naction = "reject"\n'
    )
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(*(late_of(order(number)) for number in range(5)))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert [outcome for _, outcome, _ in entries(connection)] == ["granted"] * 5


def test_a_frozen_member_s_points_are_held(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), {"id": "f1", "kind": "member_frozen", "member": "m1", "ts": at(minutes=2)})
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        partition.send(late_of(order(2)))
        ingest(connection, partition)
        work(connection, partition)
        assert entries(connection, "outcome, frozen, points") == [("held", True, 10)]
        assert balance(connection, "m1") == (0, 10, 10)
        assert settle(connection, partition.rulebook, DAY).points == 0
        # What a reviewer said in the book holds at once, before its event has come around.
        confirm(connection, "m1", reason="abuse", by="reviewer")
        partition.send(late_of(order(3)))
        ingest(connection, partition)
        work(connection, partition)
        assert entries(connection, "event, outcome, cause")[1:] == [("e3", "rejected", "member_blocked")]
        assert balance(connection, "m1") == (0, 10, 0)


def test_streaks_go_on_where_a_late_event_is_the_latest(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(checkin(1), checkin(2, ts=at(1)), checkin(3, "m2"), checkin(4, "m2", ts=at(1)))
    partition.send(checkin(5, "m2", ts=at(4)))
    partition.send(late_of(checkin(6, ts=at(2))), late_of(checkin(7, "m2", ts=at(2))), late_of(checkin(8, ts=at(3))))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        # The third day in a row of the one; the other has a later one, after a gap, which a late event cannot fill.
        assert entries(connection) == [("c6", "granted", 55), ("c7", "granted", 5), ("c8", "granted", 5)]


def test_campaigns_are_those_of_the_day(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(late_of(order(1, ts=at(5))), late_of(order(2, ts=at(6)), 2))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert entries(connection, "event, base, points, campaigns") == [
            ("e1", 10, 20, ["member-day"]),
            ("e2", 10, 10, None),
        ]


GOLD = BOOK_RULEBOOK + '[[campaign]]\nid = "gold"\nmultiplier = "3"\ntiers = ["gold"]\nfrom = 2026-11-11\n'


def test_tier_and_card_are_what_the_book_knows(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=GOLD)
    partition.send({"id": "u1", "kind": "member_updated", "member": "m1", "ts": at(), "tier": "gold"})
    partition.send({"id": "u2", "kind": "member_updated", "member": "m2", "ts": at(), "tier": "gold"})
    # The stream is trimmed before the book has seen what the second one said.
    last: Any = valkey.client().xrevrange(partition.keys.events, count=1)
    valkey.client().xdel(partition.keys.events, last[0][0])
    partition.send(
        late_of(order(1, "m1", ts=at(1))),
        late_of(order(2, "m2", ts=at(1))),
        late_of(order(3, "m3", ts=at(1))),
        late_of(order(4, "m2", ts=at(0, 5)), 5),
        late_of(checkin(5, "m2", ts=at(1))),
    )
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert entries(connection) == [
            ("e1", "granted", 30),
            ("e3", "granted", 10),
            ("e4", "granted", 10),
            ("c5", "granted", 5),
        ]
        assert exceptions(connection) == [("member_unknown", "e2")]


def test_a_kind_that_the_rulebook_no_longer_knows(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(late_of(checkin(1)), late_of(order(2)))
    start = BOOK_RULEBOOK.index('[[earn]]\nkind = "checkin"')
    end = BOOK_RULEBOOK.index('[[earn]]\nkind = "group_opened"')
    newer = parse((BOOK_RULEBOOK[:start] + BOOK_RULEBOOK[end:]).replace("version = 1", "version = 2"))
    with connect(book) as connection:
        ingest(connection, partition)
        slow(connection, newer, refund_wait_hours=WAIT_HOURS)
        assert exceptions(connection) == [("late_unknown_kind", "c1")]
        assert entries(connection, "event, rulebook") == [("e2", 2)]


def test_a_rulebook_with_other_business_days_is_refused(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(late_of(order(1)))
    elsewhere = parse(BOOK_RULEBOOK.replace("Asia/Shanghai", "America/New_York"))
    with connect(book) as connection:
        ingest(connection, partition)
        with pytest.raises(RulebookError, match="timezone"):
            slow(connection, elsewhere, refund_wait_hours=WAIT_HOURS)
        assert entries(connection) == []


def test_a_refund_of_a_late_order(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    refund = {"id": "r1", "kind": "order_refunded", "member": "m1", "ts": at(3), "amount": 500, "order": "o1"}
    partition.send(refund, late_of(order(1)))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        assert results(connection) == {"late": 1, "refund": 1}
        assert balance(connection, "m1") == (5, 0, 0)
        rows = connection.execute("SELECT order_seq, order_late, reversed FROM book.refunds").fetchall()
        assert rows == [(2, True, 5)]
        rows = connection.execute("SELECT seq, late, cause_seq FROM book.postings").fetchall()
        assert rows == [(2, True, 1)]
        assert is_consistent(connection)


def test_days_get_a_table_each_and_those_long_before_the_first_share_one(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1, ts=at(30)))
    partition.send(late_of(order(2, ts=at(20)), 11), late_of(order(3, ts=at(-400)), 432))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        rows = connection.execute("SELECT event, tableoid::regclass::text FROM book.entries ORDER BY event").fetchall()
        assert rows == [
            ("e1", "book.entries_20261210"),
            ("e2", "book.entries_20261130"),
            ("e3", "book.entries_other"),
        ]


def test_an_event_that_comes_meanwhile_of_a_day_without_a_table_is_for_the_next_run(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1, day=10))
    with connect(book) as connection, connect(book) as ingesting:
        ingest(connection, partition)

        def late_events(*arguments: Any) -> Any:
            monkeypatch.undo()
            partition.send(order(2, day=5, at=at(10, 60)))
            ingest(ingesting, partition)
            return waiting.late_events(*arguments)

        monkeypatch.setattr(late, "late_events", late_events)
        assert work(connection, partition) == Done()
        assert work(connection, partition) == Done(1, 1, 20)
        assert entries(connection) == [("e2", "granted", 20)]


def test_texts_that_the_database_cannot_keep(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    strange = ["a\0b", "a\\0b", "\0", "会员\0"]
    partition.send(*(order(number, text, device="d1") for number, text in enumerate(strange)), order(9, device="d1"))
    partition.send(*(late_of(order(number, text, id=f"late{text}", order=text)) for number, text in enumerate(strange)))
    partition.send(*(late_of(checkin(number, text, device="d1")) for number, text in enumerate(strange)))
    with connect(book) as connection:
        ingest(connection, partition)
        work(connection, partition)
        rows = connection.execute("SELECT pending FROM book.balances WHERE member <> 'm1'").fetchall()
        assert rows == [(20,)] * len(strange)
        assert [kind for kind, _ in exceptions(connection)] == ["late_tripped"] * len(strange)


def history() -> list[Event]:
    """Return late events of five members and three days, many of them from one device, more than it may have."""
    events = []
    for number in range(60):
        member, day = f"m{number * 7 % 5}", number % 3
        fields: dict[str, Any] = {"ts": at(day, number), "device": "d1" if number % 2 else ""}
        event = (order(number, member, 9000 + number, **fields), checkin(number, member, **fields))[number % 5 == 0]
        events.append(late_of(event, 6))
    return events


def booked(connection: Connection) -> dict[str, Any]:
    """Return what came of the deferred events, with the days' lots."""
    queries = {
        "entries": "SELECT day, seq, event, member, outcome, cause, points, evidence FROM book.entries WHERE late",
        "exceptions": "SELECT kind, event, data::text FROM book.exceptions",
        "resolutions": "SELECT seq, result FROM book.resolutions",
        "balances": "SELECT member, pending, available, held FROM book.balances",
        "lots": "SELECT member, day, points FROM book.lots",
    }
    return {name: sorted(map(repr, connection.execute(query).fetchall())) for name, query in queries.items()}


def expected_of(connection: Connection, partition: Partition) -> dict[str, Any]:
    """Return what comes of all that waits when one process deals with it; nothing of it stays."""
    with connection.transaction(force_rollback=True):
        work(connection, partition)
        return booked(connection)


def test_twenty_at_once_do_what_one_would(valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(valkey.client())
    partition.send(order(500, "stranger"), order(501, "stranger", ts=at(1)))
    partition.send(*history())
    faults: list[BaseException] = []

    def run() -> None:
        try:
            with connect(book) as connection:
                work(connection, partition)
        except BaseException as error:  # noqa: BLE001 - told to the test
            faults.append(error)

    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY + 1)
        expected = expected_of(connection, partition)
        assert len(expected["exceptions"]) > 0
        monkeypatch.setattr(late, "CHUNK_EVENTS", 4)
        threads = [threading.Thread(target=run) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert booked(connection) == expected
        assert is_consistent(connection)


@pytest.mark.parametrize("step", ["lock_members", "claim", "resolve", "settle_members"])
def test_killed_in_the_middle_it_leaves_nothing_half_done(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(late, "CHUNK_EVENTS", 10)
    partition = Partition(valkey.client())
    partition.send(order(500, "stranger"))
    partition.send(*history())
    original = getattr(late, step)

    def kill(cursor: psycopg.Cursor[Any], *arguments: Any, **named: Any) -> Any:
        result = original(cursor, *arguments, **named)
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return result

    with connect(book) as watching:
        ingest(watching, partition)
        settle(watching, partition.rulebook, DAY)
        expected = expected_of(watching, partition)
        before = facts(watching), booked(watching)
        with monkeypatch.context() as patched:
            patched.setattr(late, step, kill)
            connection = connect(book)
            with pytest.raises(psycopg.OperationalError), connection:
                work(connection, partition)
        assert (facts(watching), booked(watching)) == before
        work(watching, partition)
        assert booked(watching) == expected


def test_an_id_that_the_ingester_books_at_the_same_moment(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition, other = Partition(valkey.client()), Partition(valkey.client(), "other")
    partition.send(late_of(order(1, id="same")))
    # It has come past the day, so that nothing keeps it waiting.
    other.send(order(2, "m3", day=3))
    with connect(book) as connection, connect(book) as ingesting:
        ingest(connection, partition, other)
        other.send(order(3, "m2", day=3, id="same"))

        def claim(*arguments: Any, **named: Any) -> Any:
            ingest(ingesting, other)
            return waiting.claim(*arguments, **named)

        monkeypatch.setattr(late, "claim", claim)
        work(connection, partition)
        assert balance(connection, "m1") == (0, 0, 0)
        assert balance(connection, "m2") == (10, 0, 0)
        assert results(connection) == {"duplicate": 1}


def test_a_partition_that_is_days_behind_books_before_or_after(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries with the same device count for a late event just if they come before it in the book."""
    partition, behind = Partition(valkey.client()), Partition(valkey.client(), "behind")
    for number in (1, 11):
        partition.send(late_of(order(number, device="d1")))
    with connect(book) as connection, connect(book) as ingesting, Follower(ingesting, behind.client, "behind") as own:
        ingest(connection, partition)
        own.step()
        behind.send(*[order(number, f"m{number}", device="d1") for number in range(2, 7)])
        is_about_to_commit, may_commit = threading.Event(), threading.Event()

        def record(book: Book, *arguments: Any) -> None:
            note(book, *arguments)
            is_about_to_commit.set()
            assert may_commit.wait(60)

        note = Book._record
        monkeypatch.setattr(Book, "_record", record)
        book_more = partial(follow, [own], threading.Event(), drain=True)
        threads = [threading.Thread(target=book_more), threading.Thread(target=work, args=(connection, partition))]
        threads[0].start()
        assert is_about_to_commit.wait(60)
        threads[1].start()
        with connect(book) as watching:
            wait_until(lambda: watching.execute(WAITS).fetchone() == (1,), "the late events wait")
            may_commit.set()
        for thread in threads:
            thread.join(60)
        assert (entries(connection), exceptions(connection)) == ([], [("late_tripped", "e1"), ("late_tripped", "e11")])
        # Once it has come past the day, nobody waits for it.
        monkeypatch.undo()
        behind.send(order(20, "m2", day=2))
        ingest(ingesting, behind)
        partition.send(late_of(order(21, device="d2")))
        ingest(connection, partition)
        with ingesting.transaction():
            ingesting.execute("SELECT FROM book.partitions WHERE name = 'behind' FOR UPDATE")
            assert work(connection, partition) == Done(1, 1, 10)
        recorded = recorded_rulebooks(connection)
        for day in booked_days(connection, None, None):
            assert not list(check_caps(connection, day, recorded))
            assert not list(check_late(connection, day, {1: partition.rulebook}, print))


def test_a_partition_that_is_new_to_the_book_waits_for_the_late_events_that_are_being_decided(
    valkey: Server, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition, new = Partition(valkey.client()), Partition(valkey.client(), "new")
    for number in (1, 11):
        partition.send(late_of(order(number, device="d1")))
    new.send(*[order(number, f"m{number}", device="d1") for number in range(2, 7)])
    with connect(book) as connection, connect(book) as ingesting, connect(book) as watching:
        ingest(connection, partition)
        booking = threading.Thread(target=ingest, args=(ingesting, new))

        def claim(*arguments: Any, **named: Any) -> Any:
            if not booking.ident:
                booking.start()
                wait_until(lambda: watching.execute(WAITS).fetchone() == (1,), "the new partition waits")
            return waiting.claim(*arguments, **named)

        monkeypatch.setattr(late, "claim", claim)
        work(connection, partition)
        booking.join(60)
        assert (entries(connection, "event"), exceptions(connection)) == ([("e1",), ("e11",)], [])
        are_late = connection.execute("SELECT late FROM book.entries ORDER BY number, seq").fetchall()
        assert are_late == [(True,)] * 2 + [(False,)] * 5


# ------------------------------------------------------------------------------------------ beside the engine

DAY_WINDOWS = (
    BOOK_RULEBOOK
    + """
[[limit]]
id = "ip-points"
key = "ip"
measure = "points"
window = "day"
max = 400
action = "hold"

[[limit]]
id = "phone-members"
key = "phone"
measure = "members"
window = "day"
max = 2
action = "reject"
kinds = ["order_paid"]
"""
)


@st.composite
def days_of_events(draw: st.DrawFn) -> list[tuple[Event, bool]]:
    """Return events of two days, each with whether it comes late."""
    drawn = []
    for number in range(draw(st.integers(1, 16))):
        kind = draw(st.sampled_from(["order_paid", "order_paid", "checkin", "group_opened"]))
        event: Event = {
            "kind": kind,
            "member": draw(st.sampled_from(["a", "b", "会员\0"])),
            "ts": at(draw(st.integers(0, 1)), number),
            "device": draw(st.sampled_from(["", "d1"])),
            "ip": draw(st.sampled_from(["", "i1"])),
            "phone": draw(st.sampled_from(["", "p1"])),
        }
        if kind == "order_paid":
            event["amount"] = draw(st.sampled_from([0, 99, 5000, 15_000, 90_000]))
        drawn.append((event, draw(st.booleans())))
    return drawn


def test_decided_as_on_time(valkey: Server, book: str) -> None:
    """What is late is decided as a reference engine would that had seen it last, on time, and only what it may book."""
    count = 0

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(drawn=days_of_events())
    def run(drawn: Sequence[tuple[Event, bool]]) -> None:
        nonlocal count
        count += 1
        # One book for all examples: each has members, keys and ids of its own.
        partition = Partition(valkey.client(), f"p{count}", DAY_WINDOWS)
        events = [
            (_apart(event, count) | {"id": f"{count}-{number}"}, is_late)
            for number, (event, is_late) in enumerate(drawn)
        ]
        on_time = [event for event, is_late in events if not is_late]
        come_late = [late_of(event, 4) for event, is_late in events if is_late]
        if on_time:
            partition.send(*sorted(on_time, key=lambda event: event["ts"]))
        if come_late:
            partition.send(*come_late)
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        work(connection, partition)
        wanted = _expected(partition, sorted(on_time, key=lambda event: event["ts"]), come_late)
        rows = connection.execute(
            "SELECT event, outcome, cause, points FROM book.entries JOIN book.partitions p USING (partition_id) "
            "WHERE late AND p.name = %s ORDER BY seq",
            (partition.name,),
        ).fetchall()
        assert rows == wanted
        assert is_consistent(connection)

    with connect(book) as connection:
        run()


def _apart(event: Event, count: int) -> Event:
    names = {name: f"{event[name]}-{count}" for name in ("member", "device", "ip", "phone") if event[name]}
    return event | names


def _expected(partition: Partition, on_time: Sequence[Event], come_late: Sequence[Event]) -> list[tuple[Any, ...]]:
    """Return the late entries by an engine that decides all anew for each of them, and drops those that trip."""
    rows: list[tuple[Any, ...]] = []
    accepted: list[Event] = list(on_time)
    for event in come_late:
        engine = ReferenceEngine(partition.rulebook, SECRET)
        for earlier in accepted:
            engine.decide(validate(earlier), earlier["ts"])
        decision = engine.decide(validate(event), event["ts"])
        assert isinstance(decision, Entry)
        if all(limit == "member-cap" for limit, _ in decision.evidence):
            accepted.append(event)
            rows.append((event["id"], decision.outcome, decision.cause or None, decision.points))
    return rows


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def arguments(valkey: Server, book: str, tmp_path: Path) -> list[str]:
    path = tmp_path / "rulebook.toml"
    path.write_text(BOOK_RULEBOOK, encoding="utf-8")
    return ["slow", "--rulebook", str(path), "--redis", valkey.url, "--database", book]


def test_the_command_deals_with_what_waits(valkey: Server, book: str, arguments: list[str]) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), late_of(order(2)))
    with connect(book) as connection:
        ingest(connection, partition)
        done = {"dry_run": True, "members": 1, "points": 10, "postings": 1}
        assert run_json(*arguments, "--dry-run") == [done | {"waiting": 1}]
        assert balance(connection, "m1") == (10, 0, 0)
        assert run_json(*arguments, "--drain", "--by", "ops") == [done | {"dry_run": False, "waiting": 0}]
        assert balance(connection, "m1") == (20, 0, 0)
        assert connection.execute("SELECT kind, by FROM book.actions").fetchall() == [("late", "ops")]


def has_points(connection: Connection, member: str) -> bool:
    return balance(connection, member) == (10, 0, 0)


def test_the_service_goes_on_until_it_is_told_to_stop(valkey: Server, book: str, arguments: list[str]) -> None:
    partition = Partition(valkey.client())
    with (
        connect(book) as connection,
        subprocess.Popen([sys.executable, "-m", "accrual.cli", *arguments], cwd=ROOT) as process,
    ):
        try:
            for number in (1, 2):
                partition.send(late_of(order(number, f"m{number}")))
                ingest(connection, partition)
                wait_until(partial(has_points, connection, f"m{number}"), "the late order is booked")
                # Its connection is ended; it comes back.
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'accrual' AND datname = current_database() AND pid <> pg_backend_pid()"
                )
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(("left_out", "name"), [("--database", "database"), ("--rulebook", "rulebook")])
def test_what_is_missing_is_named(arguments: list[str], left_out: str, name: str) -> None:
    place = arguments.index(left_out)
    done = command(*arguments[:place], *arguments[place + 2 :], "--drain")
    assert done.returncode == 2
    assert name in done.stderr.decode()


def test_late_events_that_take_points(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    partition.send(order(1), {"id": "f", "kind": "member_frozen", "member": "m2", "ts": at(0, 2)})
    with connect(book) as connection:
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        # The first two days are settled, the third is not; m2 is frozen, and the day of m3 comes to nothing.
        settle(connection, partition.rulebook, DAY + 1)
        partition.send(
            *(late_of(taking(number, member)) for number, member in ((3, "m1"), (4, "m2"), (5, "m3"))),
            late_of(order(6, "m3", 500)),
            late_of(taking(7, "m1", 4000, day=1), 4),
            late_of(taking(8, "m1", day=2), 4),
        )
        ingest(connection, partition)
        done = work(connection, partition)
        assert done.points == -5 - 5 - 5 + 5 - 20 - 5
        points = {member: balance(connection, member) for member in ("m1", "m2", "m3")}
        assert points == {"m1": (-5, 10 - 5 - 20, 0), "m2": (0, 0, -5), "m3": (0, 0, 0)}
        rows = connection.execute(
            "SELECT from_account, to_account, points, lot_days::text[], lot_points FROM book.postings "
            "WHERE action IN (SELECT action FROM book.actions WHERE kind = 'late') ORDER BY number"
        ).fetchall()
        assert rows == [
            ("available", "pending", 5, ["2026-11-10"], [5]),
            ("available", "pending", 20, ["2026-11-10", None], [5, 15]),
        ]
        assert not list(rebuild(connection, dry_run=True))
        assert not list(found(valkey, connection))
