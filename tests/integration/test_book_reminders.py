"""Reminders of points that are about to expire: once per lot and distance, one message per member."""

from __future__ import annotations

import json
import threading
from datetime import date
from pathlib import Path
from typing import Any

from accrual.book import Connection, Done, adjust, connect, expire, remind, send_outbox, settle
from accrual.rulebook import Rulebook, day_number, parse
from books import BOOK_RULEBOOK, Partition, facts, ingest, order, run_json
from servers import Server

DAY = day_number(date(2026, 11, 10))
EXPIRY = day_number(date(2027, 11, 10))


def with_days(*days_ahead: int) -> Rulebook:
    return parse(rulebook_text(*days_ahead))


def rulebook_text(*days_ahead: int) -> str:
    return BOOK_RULEBOOK.replace("expiry_months = 12", f"expiry_months = 12\nexpiry_reminder_days = {list(days_ahead)}")


def settled(valkey: Server, connection: Connection, *orders: dict[str, object], name: str = "p") -> Partition:
    """Return a partition with the points of ``orders`` available."""
    partition = Partition(valkey.client(), name)
    partition.send(*orders)
    ingest(connection, partition)
    days = connection.execute("SELECT DISTINCT day - date '1970-01-01' FROM book.entries").fetchall()
    for (day,) in days:
        settle(connection, partition.rulebook, day)
    return partition


def messages(connection: Connection) -> list[dict[str, Any]]:
    """Return what is in the outbox, without the ids, which are numbers that nobody can foresee."""
    rows = connection.execute("SELECT message, stream, value FROM book.outbox ORDER BY message").fetchall()
    found = []
    for number, stream, value in rows:
        message = json.loads(value)
        assert (stream, message.pop("id")) == ("notifications", f"book-{number}")
        found.append(message)
    return found


def short(connection: Connection) -> list[tuple[str, int, int]]:
    """Return the member, points and distance of every message."""
    return [(one["member"], one["points"], one["days_ahead"]) for one in messages(connection)]


def test_each_distance_once(valkey: Server, book: str) -> None:
    rulebook = with_days(15, 3)
    with connect(book) as connection:
        settled(valkey, connection, order(1))
        counts = {ahead: remind(connection, rulebook, EXPIRY - ahead).members for ahead in range(20, -3, -1)}
        assert {ahead for ahead, count in counts.items() if count} == {15, 3}
        assert [remind(connection, rulebook, EXPIRY - ahead) for ahead in (15, 10, 3, 0)] == [Done()] * 4
        lot = {"day": "2026-11-10", "expires_on": "2027-11-10", "points": 10}
        assert messages(connection) == [
            {
                "kind": "expiry_reminder",
                "member": "m1",
                "day": day,
                "points": 10,
                "expires_on": "2027-11-10",
                "days_ahead": days_ahead,
                "lots": [lot | {"days_ahead": days_ahead}],
            }
            for day, days_ahead in (("2027-10-26", 15), ("2027-11-07", 3))
        ]
        assert connection.execute("SELECT lot_day::text, days_ahead FROM book.reminders ORDER BY 2").fetchall() == [
            ("2026-11-10", 3),
            ("2026-11-10", 15),
        ]


def test_runs_that_were_missed_are_made_up_for_by_one(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        settled(valkey, connection, order(1))
        assert remind(connection, with_days(30, 15, 3), EXPIRY - 2) == Done(members=1, points=10)
        assert short(connection) == [("m1", 10, 3)]
        # Nor does a larger distance come after a smaller one, whoever asks for which day.
        assert remind(connection, with_days(30, 15, 3), EXPIRY - 14) == Done()
        assert remind(connection, with_days(20, 10), EXPIRY - 5) == Done()
        assert remind(connection, with_days(1), EXPIRY - 1).members == 1


def test_the_day_of_expiry_is_distance_zero_and_later_is_too_late(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        settled(valkey, connection, order(1))
        assert remind(connection, with_days(0), EXPIRY + 1) == Done()
        assert remind(connection, with_days(0), EXPIRY).members == 1
        assert remind(connection, with_days(), EXPIRY - 1) == Done()


def test_a_member_gets_one_message_for_all_lots(valkey: Server, book: str) -> None:
    orders = [order(1), order(2, amount=500, day=12), order(3, "m2", day=12), order(4, amount=700, day=40)]
    with connect(book) as connection:
        settled(valkey, connection, *orders)
        assert remind(connection, with_days(15, 3), EXPIRY - 3) == Done(members=2, points=25)
        first, second = messages(connection)
        assert (first["member"], first["points"], first["expires_on"], first["days_ahead"]) == (
            *("m1", 15),
            *("2027-11-10", 3),
        )
        assert first["lots"] == [
            {"day": "2026-11-10", "expires_on": "2027-11-10", "points": 10, "days_ahead": 3},
            {"day": "2026-11-22", "expires_on": "2027-11-22", "points": 5, "days_ahead": 15},
        ]
        assert (second["member"], second["points"], second["days_ahead"]) == ("m2", 10, 15)


def test_what_is_used_up_is_not_reminded_of(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        settled(valkey, connection, order(1), order(2, "m2"))
        values: dict[str, Any] = {"reason": "test", "note": "", "by": "tester", "approval_points": 1 << 40}
        adjust(connection, "m1", -10, **values)
        adjust(connection, "m2", -4, **values)
        remind(connection, with_days(15), EXPIRY - 15)
        assert short(connection) == [("m2", 6, 15)]
        expire(connection, EXPIRY)
        assert remind(connection, with_days(0), EXPIRY) == Done()


def test_a_dry_run_changes_nothing(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        settled(valkey, connection, order(1), order(2, "m2"))
        before = facts(connection)
        actions = connection.execute("SELECT count(*) FROM book.actions").fetchone()
        promised = remind(connection, with_days(15), EXPIRY - 15, dry_run=True)
        assert promised == Done(members=2, points=20)
        assert messages(connection) == []
        assert connection.execute("SELECT count(*) FROM book.reminders").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM book.actions").fetchone() == actions
        assert facts(connection) == before
        assert remind(connection, with_days(15), EXPIRY - 15) == promised
        assert facts(connection) == before


def test_racing_runs_write_each_message_once(valkey: Server, book: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("accrual.book.chunks.CHUNK_MEMBERS", 7)
    members = sorted(f"m{number}" for number in range(50))
    with connect(book) as connection:
        settled(valkey, connection, *(order(number, member) for number, member in enumerate(members)))
    done: list[Done] = []

    def run() -> None:
        with connect(book) as connection:
            done.append(remind(connection, with_days(15), EXPIRY - 15))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with connect(book) as connection:
        assert sorted(short(connection)) == [(member, 10, 15) for member in members]
    assert (sum(one.members for one in done), sum(one.points for one in done)) == (50, 500)


def test_messages_go_over_the_partition_of_the_member(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        first = settled(valkey, connection, order(1, "m1"), name="one")
        second = settled(valkey, connection, order(2, "m2"), order(3, "a\0b\\0c"), name="two")
        # Known to no partition, since no event of it was ever decided: it is told over the first one.
        adjust(connection, "m3", 5, reason="test", note="", by="tester", approval_points=100)
        (expiry,) = connection.execute(
            "SELECT expires_on - date '1970-01-01' FROM book.lots WHERE member = 'm3'"
        ).fetchone() or (0,)
        remind(connection, with_days(15), EXPIRY - 15)
        remind(connection, with_days(0), expiry)
        assert send_outbox(connection, valkey.client()) == 4
        assert send_outbox(connection, valkey.client()) == 0
    told = {}
    for partition in (first, second):
        entries: Any = valkey.client().xrange(partition.keys.notifications)
        told[partition.name] = sorted(json.loads(fields[b"n"])["member"] for _, fields in entries)
    assert told == {"one": ["m1", "m3"], "two": ["a\0b\\0c", "m2"]}


def test_the_command(valkey: Server, book: str, tmp_path: Path) -> None:
    with connect(book) as connection:
        settled(valkey, connection, order(1))
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(rulebook_text(15, 3))
    words = ["remind", "--rulebook", str(rulebook), "--database", book, "--day", "2027-10-26"]
    promised = {"dry_run": True, "members": 1, "points": 10, "postings": 0}
    assert run_json(*words, "--dry-run") == [promised]
    assert run_json(*words, "--by", "alice") == [promised | {"dry_run": False}]
    assert run_json(*words) == [{"dry_run": False, "members": 0, "points": 0, "postings": 0}]
    with connect(book) as connection:
        rows = connection.execute("SELECT by, details ->> 'day' FROM book.actions WHERE kind = 'remind'").fetchall()
        assert rows == [("alice", "2027-10-26")]
