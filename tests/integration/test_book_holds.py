"""Release, confirm and the list of a reviewer: what happens to points, and what the fast path is told."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import redis

from accrual.book import (
    Connection,
    Verdict,
    adjust,
    confirm,
    connect,
    held,
    rebuild,
    release,
    send_outbox,
    settle,
    slow,
    statement,
)
from accrual.book.follow import Follower, follow
from accrual.errors import BookError, UsageError
from accrual.events import Event, decode_compact, encode_compact, validate
from accrual.rulebook import day_number
from accrual.stream import Keys, stream_time_ms
from audits import found
from books import BOOK_RULEBOOK, TAKING_RULEBOOK, Partition, at, balance, ingest, run_json, taking
from servers import Server
from workers import WorkerProcess, command, ledger_rows

DAY: Final = day_number(date(2026, 11, 10))
NOV_20_MS: Final = 1_795_132_800_000


def order(number: int, day: int = 0, member: str = "m1", **fields: Any) -> dict[str, Any]:
    """Return an order of 10 yuan: 10 points."""
    named = {"id": f"e{number}", "kind": "order_paid", "member": member, "order": f"o{number}"}
    return named | {"ts": at(day, number), "amount": 1000} | fields


def freeze(day: int = 0, member: str = "m1") -> dict[str, Any]:
    return {"id": f"freeze-{member}-{day}", "kind": "member_frozen", "member": member, "ts": at(day)}


def let_go(connection: Connection, member: str = "m1", **fields: Any) -> Verdict:
    values: dict[str, Any] = {"reason": "checked", "by": "alice"} | fields
    return release(connection, member, **values)


def take_back(connection: Connection, member: str = "m1", **fields: Any) -> Verdict:
    values: dict[str, Any] = {"reason": "device_farm", "by": "alice"} | fields
    return confirm(connection, member, **values)


def lots(connection: Connection, member: str = "m1") -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT day::text, expires_on::text, points FROM book.lots WHERE member = %s ORDER BY day", (member,)
    ).fetchall()


def postings(connection: Connection, kind: str) -> list[tuple[Any, ...]]:
    """Return the entries' seqs, accounts and points of the postings of a kind, in order."""
    return connection.execute(
        "SELECT seq, from_account, to_account, points FROM book.postings WHERE kind = %s ORDER BY number", (kind,)
    ).fetchall()


def state(connection: Connection, member: str = "m1") -> Any:
    return connection.execute("SELECT state, immune_until_ms FROM book.members WHERE member = %s", (member,)).fetchone()


def written(connection: Connection) -> list[dict[str, Any]]:
    """Return the messages in the outbox, sent or not, in the order in which they were written."""
    rows = connection.execute("SELECT value FROM book.outbox ORDER BY message").fetchall()
    return [json.loads(value) for (value,) in rows]


def told(client: redis.Redis, partition: str = "p") -> list[Event]:
    """Return the events of the book that are on the stream."""
    entries: Any = client.xrange(Keys(partition).events)
    events = [decode_compact(fields[b"e"]) for _, fields in entries]
    return [event for event in events if event.id.startswith("book-")]


def is_balanced(connection: Connection) -> bool:
    """Tell whether all postings add up to zero, lots to what is available, and balances to the postings."""
    assert connection.execute("SELECT coalesce(sum(points), 0) FROM book.accounts").fetchone() == (0,)
    differing = connection.execute(
        """
        SELECT member FROM book.balances b CROSS JOIN LATERAL (
            SELECT coalesce(sum(points) FILTER (WHERE account = 'pending'), 0) AS pending,
                coalesce(sum(points) FILTER (WHERE account = 'available'), 0) AS available,
                coalesce(sum(points) FILTER (WHERE account = 'held'), 0) AS held
            FROM book.legs WHERE member = b.member
        ) l
        WHERE (b.pending, b.available, b.held) <> (l.pending, l.available, l.held)
            OR greatest(b.available, 0) <> (SELECT coalesce(sum(points), 0) FROM book.lots WHERE member = b.member)
        """
    ).fetchall()
    assert differing == []
    return True


def race(url: str, count: int, work: Callable[[Connection, int], Verdict]) -> list[Verdict]:
    """Do ``work`` in so many threads at once, each with its own connection, and return what came of each."""
    results: list[Verdict] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        with connect(url) as connection:
            start.wait()
            results.append(work(connection, number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


def counting(connection: Connection) -> list[str]:
    """Have the statements of ``connection`` written into the list that is returned."""
    counted: list[str] = []

    class Counting(psycopg.Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **named: Any) -> Any:
            counted.append(str(query))
            return super().execute(query, *arguments, **named)

    connection.cursor_factory = Counting
    return counted


@pytest.fixture
def partition(valkey: Server) -> Partition:
    return Partition(valkey.client())


# ----------------------------------------------------------------------------------------------------------- release


def test_released_points_go_where_they_would_be(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(order(1), freeze(), order(2), order(3, day=1), order(4, day=1))
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m1") == (0, 10, 30)
        done = let_go(connection, note="spoke to the member", immune_until_ms=NOV_20_MS)
        assert done == Verdict("m1", "active", True, 3, 30, event=done.event)
        # Day 0 is settled, day 1 is not.
        assert balance(connection, "m1") == (20, 20, 0)
        assert lots(connection) == [("2026-11-10", "2027-11-10", 20)]
        assert postings(connection, "release") == [
            (3, "held", "available", 10),
            (4, "held", "pending", 10),
            (5, "held", "pending", 10),
        ]
        assert state(connection) == ("active", NOV_20_MS)
        assert written(connection) == [
            {"id": done.event, "kind": "member_released", "member": "m1", "immune_until": NOV_20_MS}
        ]
        ((by, reason, note),) = connection.execute(
            "SELECT DISTINCT by, reason, note FROM book.postings JOIN book.actions a USING (action) "
            "WHERE a.kind = 'release'"
        ).fetchall()
        assert (by, reason, note) == ("alice", "checked", "spoke to the member")
        # The day's settlement takes the rest, once.
        settle(connection, partition.rulebook, DAY + 1)
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m1") == (0, 40, 0)
        assert is_balanced(connection)


def test_a_lot_expires_by_the_newest_rulebook(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = Partition(
            valkey.client(), rulebook=BOOK_RULEBOOK.replace("expiry_months = 12", "expiry_months = 3")
        )
        partition.send(freeze(), order(1))
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        let_go(connection)
        assert lots(connection) == [("2026-11-10", "2027-02-10", 10)]


def test_a_second_release_does_nothing(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(freeze(), order(1))
        ingest(connection, partition)
        assert let_go(connection).changed
        assert let_go(connection) == Verdict("m1", "active")
        assert let_go(connection, immune_until_ms=NOV_20_MS) == Verdict("m1", "active")
        assert state(connection) == ("active", None)
        assert len(written(connection)) == 1
        ((actions,),) = connection.execute("SELECT count(*) FROM book.actions WHERE kind = 'release'").fetchall()
        assert actions == 1


def test_what_was_decided_before_the_release_arrived_is_released_by_another(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(freeze(), order(1))
        ingest(connection, partition)
        first = let_go(connection)
        # The fast path has not been told yet.
        partition.send(order(2))
        ingest(connection, partition)
        assert (state(connection)[0], balance(connection, "m1")) == ("active", (10, 0, 10))
        second = let_go(connection)
        assert (second.changed, second.points) == (True, 10)
        assert [message["id"] for message in written(connection)] == [first.event, second.event]
        assert balance(connection, "m1") == (20, 0, 0)


def test_a_frozen_member_without_points_is_released(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(freeze())
        ingest(connection, partition)
        done = let_go(connection)
        assert (done.changed, done.postings, bool(done.event)) == (True, 0, True)
        assert state(connection)[0] == "active"


def test_what_was_refunded_while_it_was_held_is_not_released(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        refund = {"id": "r1", "kind": "order_refunded", "member": "m1", "ts": at(0, 9), "amount": 600, "order": "o1"}
        partition.send(freeze(), order(1), order(2), refund)
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        assert let_go(connection).points == 14
        assert balance(connection, "m1") == (14, 0, 0)
        assert is_balanced(connection)


# ----------------------------------------------------------------------------------------------------------- confirm


def test_confirmed_points_go_back_and_the_member_is_blocked(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(order(1), freeze(), order(2), order(3, day=1))
        ingest(connection, partition)
        done = take_back(connection)
        assert done == Verdict("m1", "blocked", True, 2, 20, event=done.event)
        assert balance(connection, "m1") == (10, 0, 0)
        assert postings(connection, "confirm") == [(3, "held", "issuance", 10), (4, "held", "issuance", 10)]
        assert written(connection) == [{"id": done.event, "kind": "member_blocked", "member": "m1"}]
        assert state(connection)[0] == "blocked"
        assert take_back(connection) == Verdict("m1", "blocked")
        assert len(written(connection)) == 1
        assert is_balanced(connection)


def test_points_of_a_span_of_days_are_clawed_back(partition: Partition, book: str) -> None:
    """From where they are: the day's own lot first, then the others, then a hole."""
    with connect(book) as connection:
        for day in range(4):
            partition.send(order(day, day=day))
        partition.send(freeze(3), order(9, day=3))
        ingest(connection, partition)
        for day in range(3):
            settle(connection, partition.rulebook, DAY + day)
        adjust(connection, "m1", -15, reason="spent", note="", by="shop", approval_points=100)
        assert balance(connection, "m1") == (10, 15, 10)
        assert [points for _, _, points in lots(connection)] == [0, 5, 10]
        # Day 2 from its own lot, although that of day 1 expires before; days 0 and 3 stay.
        done = take_back(connection, claw_back=(DAY + 2, DAY + 2))
        assert (done.postings, done.points, done.clawed_back) == (2, 20, 10)
        assert balance(connection, "m1") == (10, 5, 0)
        assert [points for _, _, points in lots(connection)] == [0, 5, 0]
        # The member is blocked already, but the span is another one. What is pending goes from there.
        again = take_back(connection, claw_back=(DAY, DAY + 3))
        assert (again.changed, again.postings, again.clawed_back, again.event) == (True, 3, 30, "")
        assert balance(connection, "m1") == (0, -15, 0)
        assert [row[1:] for row in postings(connection, "clawback")] == [
            ("available", "issuance", 10),
            ("available", "issuance", 10),
            ("available", "issuance", 10),
            ("pending", "issuance", 10),
        ]
        assert take_back(connection, claw_back=(DAY, DAY + 3)) == Verdict("m1", "blocked")
        assert len(written(connection)) == 1
        assert is_balanced(connection)


def test_a_release_after_a_confirmation_and_the_other_way_round(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(freeze(), order(1))
        ingest(connection, partition)
        take_back(connection)
        # What was taken back stays so; only the member comes back.
        assert let_go(connection).points == 0
        assert (state(connection)[0], balance(connection, "m1")) == ("active", (0, 0, 0))
        partition.send(order(2))
        ingest(connection, partition)
        let_go(connection)
        assert balance(connection, "m1") == (10, 0, 0)
        assert take_back(connection).points == 0
        assert balance(connection, "m1") == (10, 0, 0)
        kinds = [message["kind"] for message in written(connection)]
        assert kinds == ["member_blocked", "member_released", "member_released", "member_blocked"]


# ------------------------------------------------------------------------------------------------------------- races


@pytest.mark.parametrize("action", ["freeze", "hold"])
def test_twenty_racing_releases_are_one(valkey: Server, book: str, action: str) -> None:
    """Also where the book knows nothing of the member but the points, which a limit without a freeze has held."""
    with connect(book) as connection:
        partition = Partition(valkey.client(), rulebook=BOOK_RULEBOOK.replace('"freeze"', f'"{action}"'))
        partition.send(*(order(number, device="d1") for number in range(1, 9)))
        ingest(connection, partition)
        assert (balance(connection, "m1"), state(connection) is None) == ((50, 0, 30), action == "hold")
        settle(connection, partition.rulebook, DAY)

        def work(connection: Connection, number: int) -> Verdict:
            done = let_go(connection, by=f"reviewer-{number}")
            with valkey.client() as client:
                send_outbox(connection, client)
            return done

        results = race(book, 20, work)
        assert Counter(result.changed for result in results) == {True: 1, False: 19}
        assert (balance(connection, "m1"), len(postings(connection, "release"))) == ((0, 80, 0), 3)
        # Also where the sender was somebody else's, nothing is left unsent.
        assert [(event.kind, event.member) for event in told(valkey.client())] == [("member_released", "m1")]
        assert send_outbox(connection, valkey.client()) == 0
        assert is_balanced(connection)


def test_racing_releases_and_confirmations_are_one_after_the_other(
    partition: Partition, valkey: Server, book: str
) -> None:
    with connect(book) as connection:
        partition.send(order(1), freeze(), *(order(number) for number in range(2, 6)))
        ingest(connection, partition)

        def work(connection: Connection, number: int) -> Verdict:
            if number % 4 == 0:
                settle(connection, partition.rulebook, DAY)
            done = let_go(connection) if number % 2 else take_back(connection)
            with valkey.client() as client:
                send_outbox(connection, client)
            return done

        results = race(book, 20, work)
        # Whoever came first had the points.
        moved = [result for result in results if result.points]
        assert [result.points for result in moved] == [40]
        assert len(postings(connection, "release")) + len(postings(connection, "confirm")) == 4
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m1") == (0, 50 if moved[0].state == "active" else 10, 0)
        # Changes take turns, and the last one is the state; the stream has them in the same order.
        kinds = [message["kind"] for message in written(connection)]
        assert all(first != second for first, second in itertools.pairwise(kinds))
        assert len(kinds) == sum(result.changed for result in results)
        assert [event.kind for event in told(valkey.client())] == kinds
        assert state(connection)[0] == {"member_released": "active", "member_blocked": "blocked"}[kinds[-1]]
        assert is_balanced(connection)


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_an_unknown_member_needs_a_partition(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(order(1))
        ingest(connection, partition)
        for verdict in (let_go, take_back):
            with pytest.raises(BookError, match="--member: the book knows no member m2"):
                verdict(connection, "m2")
            with pytest.raises(BookError, match="--partition: the book knows no partition q"):
                verdict(connection, "m2", partition="q")
            with pytest.raises(BookError, match="--partition: member m1 is in partition p, not in q"):
                verdict(connection, "m1", partition="q")
        assert written(connection) == []
        assert let_go(connection, "m2", partition="p") == Verdict("m2", "active")
        done = take_back(connection, "m2", partition="p")
        assert (done.changed, done.state) == (True, "blocked")
        assert [message["member"] for message in written(connection)] == ["m2"]
        # Now the book knows where.
        assert let_go(connection, "m2").changed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reason": "Because!"}, "--reason"),
        ({"by": ""}, "--by"),
        ({"by": "\udcff"}, "--by"),
        ({"note": "x" * 4097}, "--note"),
        ({"member": "m" * 65}, "--member"),
        ({"immune_until_ms": 0}, "--immune-until"),
        ({"immune_until_ms": 2**53}, "--immune-until"),
    ],
)
def test_bad_input_is_named(book: str, fields: dict[str, Any], message: str) -> None:
    with connect(book) as connection, pytest.raises(UsageError, match=message):
        let_go(connection, **({"member": "m1"} | fields))


def test_a_span_that_ends_before_it_begins(book: str) -> None:
    with connect(book) as connection, pytest.raises(UsageError, match="2026-11-11 is after 2026-11-10"):
        take_back(connection, claw_back=(DAY + 1, DAY))


def test_many_held_entries_take_no_more_statements_than_a_few(valkey: Server, book: str) -> None:
    made = Partition(valkey.client())
    members = {"few": 2, "many": 40}
    made.send(*(freeze(member=member) for member in members))
    numbers = iter(range(1, 100))
    made.send(*(order(next(numbers), 0, member) for member, count in members.items() for _ in range(count)))
    with connect(book) as connection:
        ingest(connection, made)
        settle(connection, made.rulebook, DAY)
        adjust(connection, "many", -25, reason="spent", note="", by="shop")
        counted = counting(connection)
        taken = {}
        for member, count in members.items():
            counted.clear()
            assert let_go(connection, member).postings == count
            taken[member] = len(counted)
        assert taken["few"] == taken["many"]
        # What arrived first has filled the hole.
        assert (balance(connection, "many"), lots(connection, "many")) == (
            (0, 375, 0),
            [("2026-11-10", "2027-11-10", 375)],
        )
        parts = (
            "SELECT lot_points, lot_days[1] IS NULL FROM book.postings WHERE kind = 'release' AND member = 'many' "
            "ORDER BY number"
        )
        assert connection.execute(parts).fetchall()[:4] == [([10], True), ([10], True), ([5, 5], True), ([10], False)]
        assert is_balanced(connection)


def test_many_entries_are_clawed_back_with_no_more_statements_than_a_few(valkey: Server, book: str) -> None:
    made = Partition(valkey.client())
    members = {"few": 2, "many": 40}
    numbers = iter(range(1, 100))
    for day in range(2):
        made.send(*(order(next(numbers), day, name) for name, count in members.items() for _ in range(count // 2)))
    with connect(book) as connection:
        ingest(connection, made)
        for day in range(2):
            settle(connection, made.rulebook, DAY + day)
        # Nothing is left of the first lot: its entries use up the other, which then is too little for its own.
        for member, count in members.items():
            adjust(connection, member, -5 * count, reason="spent", note="", by="shop")
        counted = counting(connection)
        taken = {}
        for member, count in members.items():
            counted.clear()
            assert take_back(connection, member, claw_back=(DAY, DAY + 1)).postings == count
            taken[member] = len(counted)
        assert taken["few"] == taken["many"]
        assert balance(connection, "many") == (0, -200, 0)
        assert is_balanced(connection)


def test_a_dry_run_changes_nothing(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(freeze(), order(1))
        ingest(connection, partition)
        assert let_go(connection, dry_run=True) == Verdict("m1", "active", True, 1, 10)
        assert take_back(connection, dry_run=True) == Verdict("m1", "blocked", True, 1, 10)
        assert (written(connection), state(connection)[0], balance(connection, "m1")) == ([], "frozen", (0, 0, 10))


def test_members_with_any_characters(partition: Partition, valkey: Server, book: str) -> None:
    name = "\0\\0会员"
    with connect(book) as connection:
        partition.send(freeze(member=name), order(1, member=name))
        ingest(connection, partition)
        assert [line["member"] for line in held(connection)] == [name]
        assert let_go(connection, name).points == 10
        send_outbox(connection, valkey.client())
        assert [event.member for event in told(valkey.client())] == [name]


# -------------------------------------------------------------------------------------------------------------- held


def test_the_reviewer_sees_whom_and_why(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        assert list(held(connection)) == []
        same_device = [order(number, member="m2", device="d1", phone="13800001234") for number in range(1, 8)]
        partition.send(order(20, member="m0"), *same_device, freeze(1, "m3"))
        partition.send(freeze(1, "m1"), order(10, day=1), order(11, day=1))
        ingest(connection, partition)
        first, second, third = held(connection)
        assert (first["member"], first["state"], first["held"]) == ("m1", "frozen", 20)
        assert [entry["event"] for entry in first["entries"]] == ["e11", "e10", "freeze-m1-1"]
        assert first["since"] == "2026-11-11T00:00:00.000+00:00"
        # The sixth order from the device froze m2, the seventh is held for that and trips the limit again.
        assert (second["member"], second["held"], third["member"], third["held"]) == ("m3", 0, "m2", 20)
        assert [entry["kind"] for entry in second["entries"]] == ["member_frozen"]
        seventh, sixth = third["entries"]
        assert (sixth["reasons"], seventh["reasons"]) == (["device-orders"], ["member_frozen", "device-orders"])
        assert sixth["evidence"] == [{"limit": "device-orders", "observed": 6}]
        assert sixth["masked"]["phone"] != "13800001234"
        assert second["entries"][0]["words"] == "Control event freeze-m3-1 froze the member."
        assert ": limit device-orders, which freezes, tripped with 6 events per device" in sixth["words"]
        assert seventh["words"].endswith("; the member had been frozen before; 10 points held.")
        assert (sixth["held"], sixth["order"], sixth["amount"], sixth["day"]) == (10, "o6", 1000, "2026-11-10")
        assert [line["member"] for line in held(connection, "m2")] == ["m2"]
        assert list(held(connection, "m0")) == []
        # A refund while held leaves less of it; a release leaves nothing to see.
        let_go(connection, "m2")
        take_back(connection, "m1")
        assert [line["member"] for line in held(connection)] == ["m3"]


def test_the_reviewer_sees_why_whatever_else_is_said_of_the_member(partition: Partition, book: str) -> None:
    update = {"id": "u1", "kind": "member_updated", "member": "m1", "ts": at(0, 5), "tier": "gold"}
    with connect(book) as connection:
        partition.send(freeze(1, "m1"))
        ingest(connection, partition)
        partition.send(update)
        ingest(connection, partition)
        (line,) = held(connection)
        assert [entry["event"] for entry in line["entries"]] == ["freeze-m1-1"]
        # Made anew, the state comes from the same entry.
        connection.execute("UPDATE book.members SET state = 'active', number = 0")
        assert len(list(rebuild(connection))) == 1
        assert list(held(connection)) == [line]


# ------------------------------------------------------------------------------------------------ commands, worker


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(BOOK_RULEBOOK, encoding="utf-8")
    return path


class FastPath:
    """A partition that a real worker decides; the book follows when told to."""

    def __init__(self, server: Server, book: str, rulebook: Path) -> None:
        self.server = server
        self.client = server.client()
        self.book = book
        self.rulebook = rulebook
        self.keys = Keys("p")
        self._number = 0

    def orders(self, count: int, **fields: Any) -> None:
        """Let m1 pay so many orders now, 10 points each."""
        for _ in range(count):
            self._number += 1
            event = order(self._number, ts=stream_time_ms(self.client, self.keys), **fields)
            self.client.xadd(self.keys.events, {"e": encode_compact(validate(event))})

    def decide(self) -> None:
        """Let a worker decide what is there, and the book follow."""
        with WorkerProcess(self.server.url, "p", self.rulebook, "--drain") as worker:
            assert worker.wait() == 0, worker.log
        with connect(self.book) as connection, Follower(connection, self.client, "p") as follower:
            follow([follower], threading.Event(), drain=True)

    def outcomes(self) -> list[str]:
        return [entry.outcome for _, _, entry in ledger_rows(self.client, "p")]

    def run(self, *words: str) -> Any:
        """Run a command of the reviewer and return what it prints."""
        places = ("--database", self.book, "--redis", self.server.url)
        (line,) = run_json(*words, *places, "--member", "m1", "--reason", "checked", "--by", "alice")
        return line


def test_the_fast_path_learns_of_it(server: Server, book: str, rulebook: Path) -> None:
    path = FastPath(server, book, rulebook)
    # The sixth order from one device freezes the member.
    path.orders(7, device="d1")
    path.decide()
    assert path.outcomes() == ["granted"] * 5 + ["held"] * 2
    with connect(book) as connection:
        assert (balance(connection, "m1"), state(connection)[0]) == ((50, 0, 20), "frozen")
        done = path.run("release", "--immune-until", "2100-01-01T00:00:00+08:00")
        assert (done["changed"], done["points"], done["state"], done["dry_run"]) == (True, 20, "active", False)
        # Active again, and no limit freezes or holds.
        path.orders(2, device="d1")
        path.decide()
        assert path.outcomes()[7:] == ["applied", "granted", "granted"]
        assert balance(connection, "m1") == (90, 0, 0)
        assert state(connection) == ("active", 4_102_416_000_000)
        done = path.run("confirm", "--claw-back-from", "1970-01-02", "--claw-back-to", "2099-12-31")
        assert (done["changed"], done["clawed_back"], done["state"]) == (True, 90, "blocked")
        path.orders(2)
        path.decide()
        assert path.outcomes()[10:] == ["applied", "rejected", "rejected"]
        (*_, entry) = ledger_rows(path.client, "p")[-1]
        assert entry.cause == "member_blocked"
        assert (state(connection)[0], balance(connection, "m1")) == ("blocked", (0, 0, 0))
        assert path.run("confirm")["changed"] is False
        assert [event.kind for event in told(path.client)] == ["member_released", "member_blocked"]


def test_commands_where_the_stream_server_is_away(partition: Partition, valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition.send(freeze(), order(1))
        ingest(connection, partition)
        common = ("--database", book, "--member", "m1", "--reason", "checked", "--by", "alice")
        away = command("release", *common, "--redis", "redis://127.0.0.1:1")
        assert away.returncode == 0, away.stderr
        assert json.loads(away.stdout)["changed"] is True
        assert b"the fast path has not been told yet" in away.stderr
        assert b"Traceback" not in away.stderr
        assert balance(connection, "m1") == (10, 0, 0)
        # An address that is none is told before anything is done.
        wrong = command("confirm", *common, "--redis", "nowhere")
        assert (wrong.returncode, wrong.stdout) == (2, b"")
        # A dry run sends nothing either; whoever comes next does, and says that nothing is left to be done.
        (line,) = run_json("release", *common, "--redis", valkey.url, "--dry-run")
        assert (line["changed"], line["dry_run"], told(valkey.client())) == (False, True, [])
        (line,) = run_json("release", *common, "--redis", valkey.url)
        assert (line["changed"], line["event"]) == (False, "")
        assert [event.kind for event in told(valkey.client())] == ["member_released"]


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("2026-11-20", NOV_20_MS - 8 * 3_600_000),
        ("2026-11-20T00:00:00Z", NOV_20_MS),
        ("2026-11-20T08:00:00.5+08:00", NOV_20_MS + 500),
        (str(NOV_20_MS), NOV_20_MS),
    ],
)
def test_times_of_immunity(partition: Partition, valkey: Server, book: str, text: str, milliseconds: int) -> None:
    with connect(book) as connection:
        partition.send(freeze())
        ingest(connection, partition)
        words = ("--member", "m1", "--reason", "checked", "--by", "alice", "--immune-until", text)
        run_json("release", "--database", book, "--redis", valkey.url, *words)
        assert state(connection) == ("active", milliseconds)
        assert [event.immune_until for event in told(valkey.client())] == [milliseconds]


@pytest.mark.parametrize("text", ["tomorrow", "2026-11-20T00:00:00", "1969-12-31", "2026-13-01", "-5", ""])
def test_times_that_are_none(text: str) -> None:
    words = ("--member", "m1", "--reason", "checked", "--by", "alice", f"--immune-until={text}")
    done = command("release", "--database", "postgresql://127.0.0.1:1/x", "--redis", "redis://127.0.0.1:1", *words)
    assert done.returncode == 2
    assert b"--immune-until" in done.stderr


def test_commands_that_go_wrong(partition: Partition, valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition.send(order(1))
        ingest(connection, partition)
    places = ("--database", book, "--redis", valkey.url, "--reason", "checked", "--by", "alice")
    unknown = command("release", *places, "--member", "m9")
    assert unknown.returncode == 1
    assert b"the book knows no member m9" in unknown.stderr
    half = command("confirm", *places, "--member", "m1", "--claw-back-from", "2026-11-10")
    assert half.returncode == 2
    assert b"--claw-back-to" in half.stderr
    for name in ("release", "confirm", "held"):
        said = command(name, "--help")
        assert b"example:" in said.stdout


def test_the_list_as_a_command(partition: Partition, book: str) -> None:
    with connect(book) as connection:
        partition.send(freeze(member="m2"), freeze(member="会员"), order(1, member="会员"))
        ingest(connection, partition)
    assert [line["member"] for line in run_json("held", "--database", book)] == ["会员", "m2"]
    (line,) = run_json("held", "--database", book, "--member", "会员")
    assert (line["held"], line["state"], line["entries"][0]["reasons"]) == (10, "frozen", ["member_frozen"])
    assert run_json("held", "--database", book, "--member", "m9") == []


# ----------------------------------------------------------------------------------------------------- negative points


def frozen_history(server: Server, connection: Connection) -> Partition:
    """Book 10 points of m1, and of two days 10 and minus 5 that are held, as is what was taken first: minus 10."""
    partition = Partition(server.client(), rulebook=TAKING_RULEBOOK)
    partition.send(order(1), freeze(), taking(2, amount=2000), order(3), taking(4, day=1), order(5, 1))
    ingest(connection, partition)
    assert balance(connection, "m1") == (10, 0, 5)
    return partition


def is_right(server: Server, connection: Connection) -> bool:
    assert list(rebuild(connection, dry_run=True)) == []
    assert [finding.line() for finding in found(server, connection)] == []
    return is_balanced(connection)


def test_held_points_that_are_to_be_taken_are_released(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = frozen_history(valkey, connection)
        done = let_go(connection)
        assert (done.postings, done.points) == (4, 5)
        assert balance(connection, "m1") == (15, 0, 0)
        # What gives comes first, so that it is there when something is taken.
        assert postings(connection, "release") == [
            (4, "held", "pending", 10),
            (6, "held", "pending", 10),
            (3, "pending", "held", 10),
            (5, "pending", "held", 5),
        ]
        assert not let_go(connection).changed
        assert is_right(valkey, connection)
        settle(connection, partition.rulebook, DAY)
        settle(connection, partition.rulebook, DAY + 1)
        assert (balance(connection, "m1"), [points for *_, points in lots(connection)]) == ((0, 15, 0), [10, 5])
        assert is_right(valkey, connection)


def test_held_points_that_are_to_be_taken_are_released_after_the_settlement(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = frozen_history(valkey, connection)
        adjust(connection, "m1", -14, reason="taken", note="", by="alice")
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m1") == (0, -4, 5)
        let_go(connection)
        # The 10 points of the first day make up for the 4 that nothing had covered; the second day is not settled.
        assert (balance(connection, "m1"), lots(connection)) == ((5, -4, 0), [("2026-11-10", "2027-11-10", 0)])
        rows = connection.execute(
            "SELECT from_account, to_account, points, lot_days::text[], lot_points FROM book.postings "
            "WHERE kind = 'release' AND 'available' IN (from_account, to_account) ORDER BY number"
        ).fetchall()
        assert rows == [
            ("held", "available", 10, [None, "2026-11-10"], [4, 6]),
            ("available", "held", 10, ["2026-11-10", None], [6, 4]),
        ]
        words = {line["event"]: line["words"] for line in statement(connection, "m1", kind="release")}
        assert words["e2"] == (
            "10 points, to be taken for order o2 of 20.00 yuan (event e2), were taken out of available by alice "
            "(checked); 6 came from the lot of 2026-11-10 and 4 left the balance below zero."
        )
        assert is_right(valkey, connection)
        settle(connection, partition.rulebook, DAY + 1)
        assert (balance(connection, "m1"), lots(connection)[1][2]) == ((0, 1, 0), 1)
        assert is_right(valkey, connection)


def test_held_points_that_are_to_be_taken_are_left_to_who_is_confirmed(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = frozen_history(valkey, connection)
        # A claw-back takes what was given, and leaves alone what was taken.
        partition.send(
            {"id": "free", "kind": "member_released", "member": "m1", "ts": at(1, 9)}, taking(10, day=1), order(11, 1)
        )
        ingest(connection, partition)
        settle(connection, partition.rulebook, DAY)
        assert balance(connection, "m1") == (5, 10, 5)
        done = take_back(connection, claw_back=(DAY, DAY + 1))
        assert (done.postings, done.points, done.clawed_back) == (6, 10 + 10 + 5, 20)
        assert balance(connection, "m1") == (-5, 0, 0)
        assert postings(connection, "confirm") == [
            (3, "issuance", "held", 10),
            (4, "held", "issuance", 10),
            (5, "issuance", "held", 5),
            (6, "held", "issuance", 10),
        ]
        assert {row[1:3] for row in postings(connection, "clawback")} == {
            ("available", "issuance"),
            ("pending", "issuance"),
        }
        words = {line["event"]: line["words"] for line in statement(connection, "m1", kind="confirm")}
        assert words["e4"] == (
            "5 points, to be taken for order o4 of 10.00 yuan (event e4), were left to the member by alice "
            "(device_farm)."
        )
        assert not take_back(connection, claw_back=(DAY, DAY + 1)).changed
        assert is_right(valkey, connection)
        settle(connection, partition.rulebook, DAY + 1)
        assert balance(connection, "m1") == (0, -5, 0)
        assert is_right(valkey, connection)
