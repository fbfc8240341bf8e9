"""Late entries are decided again on top of what was booked before them, and errors in them are named."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from accrual.audit.findings import Finding
from accrual.audit.late import check_late
from accrual.audit.sums import check_sums
from accrual.book import connect, settle, slow
from accrual.rulebook import Rulebook, day_number, parse
from books import BOOK_RULEBOOK, Partition, at, ingest
from servers import Server

RULEBOOK = (
    BOOK_RULEBOOK
    + """
[[limit]]
id = "phone-members"
key = "phone"
measure = "members"
window = "day"
max = 2
action = "reject"

[[limit]]
id = "device-points"
key = "device"
measure = "points"
window = "day"
max = 100
action = "clamp"
kinds = ["order_paid"]

[[limit]]
id = "minute"
key = "member"
measure = "events"
window = "60s"
max = 1
action = "reject"
kinds = ["group_opened"]

[[campaign]]
id = "gold"
multiplier = "3"
tiers = ["gold"]

[[campaign]]
id = "rain"
multiplier = "1.5"
tags = ["rain"]
"""
)
DAYS = ("2026-11-10", "2026-11-11", "2026-11-12")


def event(name: str, kind: str, member: str, day: int, minute: int, **fields: Any) -> dict[str, Any]:
    made = {"id": name, "kind": kind, "member": member, "ts": at(day, minute)} | fields
    return made | {"order": f"order-{name}"} if kind == "order_paid" else made


def late(name: str, kind: str, member: str, day: int, minute: int, arrival: int, **fields: Any) -> dict[str, Any]:
    return event(name, kind, member, day, minute, at=at(arrival, minute), **fields)


@pytest.fixture
def written(valkey: Server, book: str) -> tuple[str, Rulebook]:
    """A book with late entries of all kinds: its URL, with its triggers off, and its rulebook."""
    partition = Partition(valkey.client(), rulebook=RULEBOOK)
    with connect(book) as connection:
        partition.send(
            event("t1", "member_updated", "m1", 0, 0, tier="gold"),
            event("o1", "order_paid", "m1", 0, 1, amount=2000, device="d", phone="p"),
            event("o2", "order_paid", "m2", 0, 2, amount=3000, device="d", phone="p"),
            event("o3", "order_paid", "m3", 0, 3, amount=500, device="e", phone="p"),
            event("c1", "checkin", "m1", 0, 4),
            event("c2", "checkin", "m1", 1, 5),
            event("f1", "member_frozen", "m5", 1, 6),
            event("b1", "member_blocked", "m6", 1, 7),
        )
        ingest(connection, partition)
        settle(connection, partition.rulebook, day_number_of("2026-11-10"))
        partition.send(
            late("l1", "order_paid", "m1", 0, 10, 4, amount=1000, device="d", tags=["rain"]),
            late("l2", "order_paid", "m2", 0, 11, 4, amount=9900, device="d"),
            late("l3", "order_paid", "m1", 0, 12, 4, amount=50_000, device="d"),
            late("l4", "order_paid", "m4", 0, 13, 4, amount=100, phone="p"),
            late("l5", "checkin", "m1", 0, 14, 4),
            late("l6", "checkin", "m1", 2, 15, 5),
            late("l7", "group_opened", "m2", 1, 16, 5),
            late("l8", "group_opened", "m2", 1, 16, 5),
            late("l9", "order_paid", "m5", 1, 17, 5, amount=700),
            late("l10", "order_paid", "m6", 1, 18, 5, amount=700),
            late("l11", "order_paid", "会\\0员\0", 1, 19, 5, amount=700),
        )
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=0)
        partition.send(
            event("t2", "member_updated", "m1", 6, 0, tier="plain"),
            late("l12", "order_paid", "m1", 0, 20, 6, amount=300, device="f"),
            late("l13", "order_paid", "m4", 0, 21, 6, amount=100_000, device="e"),
        )
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=0)
        connection.execute("ALTER TABLE book.entries DISABLE TRIGGER USER")
    return book, partition.rulebook


def day_number_of(text: str) -> int:
    return day_number(date.fromisoformat(text))


def found(url: str, rulebook: Rulebook) -> list[Finding]:
    with connect(url) as connection:
        notes: list[str] = []
        findings = [
            finding
            for day in DAYS
            for finding in check_late(connection, day, {rulebook.version: rulebook}, notes.append)
        ]
        assert notes == []
        return findings


def test_late_entries_that_are_right(written: tuple[str, Rulebook]) -> None:
    url, rulebook = written
    with connect(url) as connection:
        rows = connection.execute(
            "SELECT event, outcome, coalesce(cause, ''), uncapped, points FROM book.entries WHERE late "
            "ORDER BY substr(event, 2)::integer"
        ).fetchall()
    assert rows == [
        ("l1", "granted", "", 45, 10),
        ("l2", "granted", "", 99, 0),
        ("l3", "granted", "", 1500, 0),
        # l4 would be the third member with that phone.
        ("l5", "rejected", "max_per_day", 0, 0),
        ("l6", "granted", "", 55, 55),
        ("l7", "granted", "", 50, 50),
        ("l8", "rejected", "once", 0, 0),
        ("l9", "held", "", 7, 7),
        ("l10", "rejected", "member_blocked", 0, 0),
        ("l11", "granted", "", 7, 7),
        ("l12", "granted", "", 3, 3),
        ("l13", "granted", "", 1000, 100),
    ]
    assert [finding.line() for finding in found(url, rulebook)] == []


@pytest.mark.parametrize(
    ("planted", "seqs_of"),
    [
        ("UPDATE book.entries SET points = 11 WHERE event = 'l1'", {"l1", "l2", "l3"}),
        ("UPDATE book.entries SET campaigns = '{rain}' WHERE event = 'l1'", {"l1"}),
        ("UPDATE book.entries SET campaigns = '{gold}', base = 7, uncapped = 7 WHERE event = 'l11'", {"l11"}),
        ("UPDATE book.entries SET evidence = NULL WHERE event = 'l3'", {"l3"}),
        ("UPDATE book.entries SET uncapped = 5, points = 5 WHERE event = 'l6'", {"l6"}),
        ("UPDATE book.entries SET outcome = 'granted', cause = NULL, points = 5 WHERE event = 'l5'", {"l5"}),
        ("UPDATE book.entries SET outcome = 'granted', cause = NULL, points = 50 WHERE event = 'l8'", {"l8"}),
        ("UPDATE book.entries SET outcome = 'granted' WHERE event = 'l9'", {"l9"}),
        ("UPDATE book.entries SET kind = 'nonsense' WHERE event = 'c1'", {"l5", "l6"}),
        ("UPDATE book.entries SET device = NULL WHERE event = 'o2'", {"l1", "l2", "l3"}),
    ],
)
def test_an_error_that_is_planted(written: tuple[str, Rulebook], planted: str, seqs_of: set[str]) -> None:
    url, rulebook = written
    with connect(url) as connection:
        seqs = {
            seq for (seq,) in connection.execute("SELECT seq FROM book.entries WHERE event = ANY(%s)", (list(seqs_of),))
        }
        assert connection.execute(planted).rowcount == 1
    findings = found(url, rulebook)
    assert {finding.seq for finding in findings} == seqs, [finding.line() for finding in findings]
    assert {finding.check for finding in findings} == {"late"}


def test_a_late_entry_is_of_its_event_to_the_letter(written: tuple[str, Rulebook]) -> None:
    numbers = ("ts_ms", "item", "amount_fen", "device", "ip", "phone")
    with connect(written[0]) as connection:
        assert not list(check_sums(connection, "deferred"))
        for change in (
            *(f"{name} = coalesce({name}, 0) + 1" for name in numbers),
            *(f"{name} = 'other'" for name in ("event", "kind", "order_id", "stream_id")),
        ):
            with connection.transaction(force_rollback=True):
                connection.execute(f"UPDATE book.entries SET {change} WHERE event = 'l2'")
                details = [finding.detail for finding in check_sums(connection, "deferred")]
                assert details == ["a late entry that no deferred event explains"], change


def test_one_that_should_have_been_left_to_a_person(written: tuple[str, Rulebook]) -> None:
    url, rulebook = written
    stricter = parse(RULEBOOK.replace('action = "clamp"\nkinds', 'action = "hold"\nkinds'))
    (first, *_) = found(url, stricter)
    assert first.detail == "a late entry that trips a limit, and was to be left to a person"
    assert found(url, rulebook) == []


def test_a_rulebook_that_nobody_has_any_more(written: tuple[str, Rulebook]) -> None:
    url, _ = written
    notes: list[str] = []
    with connect(url) as connection:
        assert list(check_late(connection, "2026-11-12", {}, notes.append)) == []
    assert notes == ["day 2026-11-12: 1 late entries not decided again: rulebook version 1 is not known"]
