"""Business days counted again in SQL: an entry beyond what a limit lets through is named, and nothing else is."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from accrual.book import Connection, connect, rebuild, settle, slow
from accrual.rulebook import day_number
from audits import found, triggers_off
from books import TAKING_RULEBOOK, Partition, at, ingest, order, taking
from limits import limit, rulebook, told
from servers import Server

DAY = "2026-11-10"


def outcomes(connection: Connection, where: str = "true") -> list[tuple[Any, ...]]:
    query = f"SELECT event, outcome, points FROM book.entries WHERE {where} ORDER BY seq"
    return connection.execute(query).fetchall()


def granted(event: str, points: int) -> str:
    return f"UPDATE book.entries SET outcome = 'granted', cause = NULL, points = {points} WHERE event = '{event}'"


def checkin(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"c{number}", "kind": "checkin", "member": "m1", "ts": at(0, number)} | fields


# What the limits are, what comes, what becomes of it, what is planted, and who is named for it.
PLANTS: dict[str, tuple[list[str], list[dict[str, Any]], list[tuple[str, str, int]], str, list[tuple[Any, ...]]]] = {
    "an event behind those that other limits refused": (
        [limit("ips", "ip", "events", "day", 1, "reject"), limit("devices", "device", "events", "day", 2, "reject")],
        [order(1, device="d", ip="i"), order(2, device="d", ip="i"), order(3, device="d", ip="j")],
        [("e1", "granted", 10), ("e2", "rejected", 0), ("e3", "rejected", 0)],
        granted("e3", 10),
        [("devices", 3, "m1", DAY, 2, 3, -10)],
    ),
    # The one that `max_per_day` refused counts for none.
    "an event behind one that no limit refused": (
        [limit("members", "member", "events", "day", 2, "reject")],
        [checkin(1), checkin(2), order(3), order(4), order(5)],
        [
            ("c1", "granted", 5),
            ("c2", "rejected", 0),
            ("e3", "granted", 10),
            *((f"e{n}", "rejected", 0) for n in (4, 5)),
        ],
        granted("e5", 10),
        [("members", 5, "m1", DAY, 2, 4, -10)],
    ),
    "a member behind one that the limit refused": (
        [limit("phones", "phone", "members", "day", 2, "reject")],
        [order(number, f"m{number % 3}", phone="p") for number in range(5)],
        [("e0", "granted", 10), ("e1", "granted", 10), *((f"e{number}", "rejected", 0) for number in (2, 3, 4))],
        granted("e3", 10),
        [("phones", 4, "m0", DAY, 2, 3, -10)],
    ),
    "a member too many": (
        [limit("phones", "phone", "members", "day", 1, "reject")],
        [order(number, f"m{number}", phone="p") for number in range(3)],
        [("e0", "granted", 10), ("e1", "rejected", 0), ("e2", "rejected", 0)],
        granted("e2", 0),
        # More than one too many are as many as the engines know.
        [("phones", 3, "m2", DAY, 1, 2, None)],
    ),
    "points of an event that the limit refused": (
        [limit("members", "member", "points", "day", 30, "reject")],
        [order(1, amount=1200), order(2, amount=1200), order(3, amount=1200), order(4, amount=500)],
        [("e1", "granted", 12), ("e2", "granted", 12), ("e3", "rejected", 0), ("e4", "granted", 5)],
        granted("e3", 12),
        [("members", 3, "m1", DAY, 30, 36, -6), ("members", 4, "m1", DAY, 30, 41, -5)],
    ),
    "points that the limit clamps": (
        [limit("members", "member", "points", "day", 30, "clamp")],
        [order(1, amount=1200), order(2, amount=1200), order(3, amount=1200), order(4, amount=500)],
        [("e1", "granted", 12), ("e2", "granted", 12), ("e3", "granted", 6), ("e4", "granted", 0)],
        granted("e3", 10),
        [("members", 3, "m1", DAY, 30, 34, -4)],
    ),
}


@pytest.mark.parametrize("what", PLANTS)
def test_what_is_planted_beyond_a_day_is_named(valkey: Server, book: str, what: str) -> None:
    limits, events, decided, planted, named = PLANTS[what]
    text = rulebook(1, *limits).replace("max_per_day = 9", "max_per_day = 1")
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(*events)
    with connect(book) as connection:
        ingest(connection, partition)
        triggers_off(connection)
        assert outcomes(connection) == decided
        assert [finding.line() for finding in found(valkey, connection)] == []
        assert connection.execute(planted).rowcount == 1
        assert told(connection) == named


def late(number: int, member: str, **fields: Any) -> dict[str, Any]:
    return order(number, member, at=at(4, number)) | fields


LATE_LIMITS = [
    limit("devices", "device", "events", "day", 3, "reject"),
    limit("phones", "phone", "members", "day", 2, "reject"),
    limit("ips", "ip", "points", "day", 60, "reject"),
    limit("points", "member", "points", "day", 30, "clamp"),
]
# What is planted in late entries, and what is named for it.
LATE_PLANTS = {
    "UPDATE book.entries SET device = (SELECT device FROM book.entries WHERE event = 'e1') WHERE event = 'e21'": [
        ("devices", 6, "m6", DAY, 3, 5, -10)
    ],
    "UPDATE book.entries SET phone = (SELECT phone FROM book.entries WHERE event = 'e1') WHERE event = 'e21'": [
        ("phones", 6, "m6", DAY, 2, 3, -10)
    ],
    "UPDATE book.entries SET ip = (SELECT ip FROM book.entries WHERE event = 'e1') WHERE event = 'e22'": [
        ("ips", 7, "m7", DAY, 60, 70, -10)
    ],
    "UPDATE book.entries SET points = 25 WHERE event = 'e23'": [("points", 8, "m1", DAY, 30, 55, -25)],
    "UPDATE book.entries SET kind = 'checkin' WHERE event IN ('e21', 'e24')": [
        ("checkin counted more often than max_per_day", 9, "m6", DAY, 1, 2, -10)
    ],
}


def test_late_entries_count_on_top_of_what_was_booked_before_them(valkey: Server, book: str) -> None:
    text = rulebook(1, *LATE_LIMITS).replace("max_per_day = 9", "max_per_day = 1")
    partition = Partition(valkey.client(), rulebook=text)
    keys: dict[str, Any] = {"device": "d", "phone": "p", "ip": "i"}
    partition.send(*(order(number, f"m{number}", 1500 + 1500 * (number == 1), **keys) for number in (1, 2, 3, 4)))
    partition.send(order(5, "m5", 1500, ip="i"))
    partition.send(late(21, "m6"), late(22, "m7"), late(23, "m1", amount=2500), late(24, "m6"), late(25, "m8", **keys))
    with connect(book) as connection:
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=0)
        triggers_off(connection)
        assert outcomes(connection) == [
            *(("e1", "granted", 30), ("e2", "granted", 15), ("e3", "rejected", 0), ("e4", "rejected", 0)),
            *(("e5", "granted", 15), ("e21", "granted", 10), ("e22", "granted", 10), ("e23", "granted", 0)),
            ("e24", "granted", 10),
        ]
        assert [finding.line() for finding in found(valkey, connection)] == []
        for statement, named in LATE_PLANTS.items():
            with connection.transaction(force_rollback=True):
                assert connection.execute(statement).rowcount >= 1
                assert told(connection) == named, statement


def test_points_that_were_taken_let_others_through(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    partition.send(taking(1, "m1", 400_000), late(2, "m1", amount=150_000))
    with connect(book) as connection:
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=0)
        triggers_off(connection)
        assert outcomes(connection) == [("e1", "granted", -2000), ("e2", "granted", 1500)]
        assert [finding.line() for finding in found(valkey, connection)] == []
        connection.execute("UPDATE book.entries SET points = 3500 WHERE event = 'e2'")
        assert told(connection) == [("member-cap", 2, "m1", DAY, 1000, 1500, -500)]


@pytest.mark.parametrize("window", ["day", "24h"])
def test_an_entry_whose_id_was_taken_may_have_taken_points(valkey: Server, book: str, window: str) -> None:
    text = TAKING_RULEBOOK.replace('window = "day"', f'window = "{window}"')
    first, second = (Partition(valkey.client(), name, text) for name in ("p", "q"))
    first.send(order(1, "m9"))
    second.send(order(3, "m2", 60_000), order(4, "m2", 30_000), taking(1, "m2", 400_000), order(6, "m2", 180_000))
    with connect(book) as connection:
        ingest(connection, first, second)
        triggers_off(connection)
        rows = outcomes(connection, "partition_id = 2")
        assert rows == [("e3", "granted", 600), ("e4", "granted", 300), ("e6", "granted", 1800)]
        assert told(connection) == []
        # What came before it is judged all the same.
        connection.execute("UPDATE book.entries SET points = 700 WHERE event = 'e4'")
        assert told(connection) == [("member-cap", 2, "m2", DAY, 1000, 1300, -300)]


def test_days_of_years_beyond_9999(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    far = (date.max - date(2026, 11, 10)).days + 5
    partition.send(order(1), order(2, day=far), order(3, day=far, device="d"))
    partition.send(order(4, day=far + 4), order(5, "m2", ts=at(far), at=at(far + 4, 5)))
    with connect(book) as connection:
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        settle(connection, partition.rulebook, day_number(date(2026, 11, 10)) + far)
        assert not list(found(valkey, connection))
        assert not list(rebuild(connection, dry_run=True))
