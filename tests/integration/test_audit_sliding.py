"""Windows counted again in SQL: an entry beyond a sliding one is named, and all totals are the reference engine's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from accrual.book import Connection, connect, slow
from accrual.rulebook import parse
from audits import found, triggers_off
from books import DAY_MS, Partition, at, ingest, order
from limits import capped, limit, name_in, rulebook, told
from servers import Server

CLAMPED = limit("member-points", "member", "points", "8h", 30, "clamp")
REFUSED = limit("ip-events", "ip", "events", "80s", 3, "reject")
SHARED = limit("device-members", "device", "members", "80s", 2, "reject")


def test_what_is_planted_beyond_a_window_is_named(valkey: Server, book: str) -> None:
    midnight = at(0, 16 * 60)
    partition = Partition(valkey.client(), rulebook=rulebook(1, CLAMPED, REFUSED, SHARED))
    # Two of three are before midnight: the third one's window reaches back to another day.
    partition.send(*(order(n, "m1", 1200, ts=midnight + (n - 2) * 3_600_000) for n in (1, 2, 3, 4)))
    seconds = {11: -30, 12: -20, 13: -10, 14: 10, 15: 20}
    partition.send(*(order(n, "m2", 100, ip="i1", ts=midnight + DAY_MS + s * 1000) for n, s in seconds.items()))
    several = {"m3": -20, "m4": -10, "m5": 0, "m6": 10, "m7": 80}
    days = 2 * DAY_MS
    partition.send(
        *(order(n, m, 100, device="d2", ts=midnight + days + s * 1000) for n, (m, s) in enumerate(several.items(), 21))
    )
    with connect(book) as connection:
        ingest(connection, partition)
        triggers_off(connection)
        outcomes = connection.execute("SELECT event, outcome, points FROM book.entries ORDER BY seq").fetchall()
        assert outcomes == [
            *(("e1", "granted", 12), ("e2", "granted", 12), ("e3", "granted", 6), ("e4", "granted", 0)),
            *(("e11", "granted", 1), ("e12", "granted", 1), ("e13", "granted", 1)),
            *(("e14", "rejected", 0), ("e15", "rejected", 0)),
            *(("e21", "granted", 1), ("e22", "granted", 1), ("e23", "rejected", 0), ("e24", "rejected", 0)),
            ("e25", "granted", 1),
        ]
        assert [finding.line() for finding in found(valkey, connection)] == []
        connection.execute("UPDATE book.entries SET points = 10 WHERE event = 'e3'")
        connection.execute("UPDATE book.entries SET outcome = 'held', points = 1 WHERE event = 'e15'")
        connection.execute("UPDATE book.entries SET outcome = 'granted' WHERE event IN ('e23', 'e24')")
        assert told(connection) == [
            ("member-points", 3, "m1", "2026-11-11", 30, 34, -4),
            ("ip-events", 9, "m2", "2026-11-12", 3, 5, -1),
            ("device-members", 12, "m5", "2026-11-13", 2, 3, None),
            ("device-members", 13, "m6", "2026-11-13", 2, 3, None),
        ]


def test_what_was_taken_later_does_not_hide_what_was_too_much(valkey: Server, book: str) -> None:
    lowering = "".join(
        f'\n[[campaign]]\nid = "{name}"\nmultiplier = "0.25"\ntags = ["taking"]\n' for name in ("one", "other")
    )
    text = rulebook(1, CLAMPED).replace("version = 1", 'version = 1\nstacking = "add"') + lowering
    partition = Partition(valkey.client(), rulebook=text)
    partition.send(order(1, "m1", 1200), order(2, "m1", 4000), order(3, "m1", 12_000, tags=["taking"]))
    partition.send(order(4, "m1", 4000), order(5, "m1", 2000), order(6, "m1", 12_000, tags=["taking"]))
    with connect(book) as connection:
        ingest(connection, partition)
        triggers_off(connection)
        rows = connection.execute("SELECT points FROM book.entries ORDER BY seq").fetchall()
        assert [points for (points,) in rows] == [12, 18, -60, 40, 20, -60]
        assert [finding.line() for finding in found(valkey, connection)] == []
        connection.execute("UPDATE book.entries SET points = 40 WHERE event = 'e2'")
        assert told(connection) == [
            ("member-points", 2, "m1", "2026-11-10", 30, 52, -22),
            ("member-points", 4, "m1", "2026-11-10", 30, 32, -2),
            ("member-points", 5, "m1", "2026-11-10", 30, 52, -20),
        ]


def test_windows_are_those_of_a_partition_and_of_what_was_counted(valkey: Server, book: str) -> None:
    """Refused before limits were looked at, late, or of another partition: nothing of that counts."""
    events = limit("member-events", "member", "events", "24h", 2, "reject")
    partitions = [Partition(valkey.client(), name, rulebook(1, events)) for name in ("p", "q")]
    blocked = {"kind": "member_blocked", "member": "m3", "ts": at()}
    for number, partition in enumerate(partitions):
        partition.send(order(number * 10 + 1, "m1"), order(number * 10 + 2, "m1"), order(number * 10 + 3, "m2"))
        partition.send(blocked | {"id": f"b{number}"}, *(order(number * 10 + n, "m3") for n in (4, 5, 6)))
        partition.send(*(order(number * 10 + n, "m2", at=at(3)) for n in (7, 8)))
        refund = {"kind": "order_refunded", "member": "m2", "ts": at(0, 9), "order": "o3", "amount": 1}
        partition.send(refund | {"id": f"r{number}"})
    with connect(book) as connection:
        ingest(connection, *partitions)
        triggers_off(connection)
        assert told(connection) == []
        # One more is one too many: the event whose limit said no, or one that counts otherwise.
        connection.execute("UPDATE book.entries SET outcome = 'granted', cause = NULL WHERE kind = 'order_paid'")
        assert [finding[1:2] + finding[4:6] for finding in told(connection)] == [(7, 2, 3), (7, 2, 3)]


def test_an_entry_whose_id_was_taken_may_have_moved_the_window_on(valkey: Server, book: str) -> None:
    events = limit("device-events", "device", "events", "8s", 2, "reject")
    members = limit("device-members", "device", "members", "8s", 2, "reject")
    first, second = (Partition(valkey.client(), name, rulebook(1, events, members)) for name in ("p", "q"))
    first.send(order(1, "m9"))
    seconds = {11: 0, 12: 1, 1: 15, 13: 2}
    at_once = [
        order(n, f"m{n}", device="d1", ts=at() + second * 1000, at=at() + 20_000) for n, second in seconds.items()
    ]
    second.send(*at_once)
    # What came behind, at its time, is judged again.
    second.send(*(order(n, "m2", device="d1", ts=at(0, 1) + n * 1000) for n in (14, 15, 16)))
    with connect(book) as connection:
        ingest(connection, first, second)
        triggers_off(connection)
        rows = connection.execute(
            "SELECT event, outcome FROM book.entries WHERE partition_id = 2 ORDER BY seq"
        ).fetchall()
        assert rows == [
            *(("e11", "granted"), ("e12", "granted"), ("e13", "granted")),
            *(("e14", "granted"), ("e15", "granted"), ("e16", "rejected")),
        ]
        assert told(connection) == []
        connection.execute("UPDATE book.entries SET outcome = 'granted' WHERE event = 'e16'")
        assert [finding[:2] + finding[4:6] for finding in told(connection)] == [("device-events", 7, 2, 3)]


# Limits that hold let everything through, and their evidence has the totals of the reference engine. Recorded as limits
# that reject or clamp, just those entries are too much. The versions change what is counted, and break counts off.
SEEDS = range(3)
LIMITS = [
    ("a", "member", "events", "8s", 2),
    ("b", "device", "events", "80s", 3),
    ("c", "ip", "events", "24h", 12),
    ("d", "device", "members", "8s", 1),
    ("e", "ip", "members", "5m", 2),
    ("f", "phone", "members", "24h", 2),
    ("g", "member", "points", "8s", 15),
    ("h", "device", "points", "1h", 60),
    ("i", "phone", "points", "24h", 99),
    ("j", "ip", "events", "day", 20),
    ("k", "phone", "members", "day", 3),
    ("l", "device", "points", "day", 99),
]
KINDS = ["order_paid", "checkin", "review"]


def versions(chosen: random.Random, action: str, clamp: str) -> list[str]:
    """Return texts of rulebooks that follow each other: some limits are left out, or are for some kinds only."""
    zone = chosen.choice(["Asia/Shanghai", "America/New_York", "Pacific/Apia"])
    texts = []
    for version in range(1, 9):
        # Some are really refused: what limits count of those is counted too.
        limits = [limit("refused", "member", "events", "5m", 6, "reject"), CLAMPED.replace("30", "200")]
        for name, key, measure, window, most in LIMITS:
            if chosen.random() < 0.2:
                continue
            kinds = chosen.sample(KINDS, 2) if chosen.random() < 0.3 else []
            raised = most + chosen.choice([0, 0, 0, 1])
            limits.append(limit(name, key, measure, window, raised, clamp if measure == "points" else action, *kinds))
        texts.append(rulebook(version, *limits, zone=zone))
    return texts


def stream(chosen: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """Yield events around midnights and the change of clocks, out of order, some of them late."""
    arrival = at(chosen.choice([-10, 0, 1])) + chosen.randrange(DAY_MS)
    for n in range(number):
        arrival += chosen.choice([0, 0, chosen.randrange(3000), chosen.randrange(40_000), chosen.randrange(60_000)])
        if chosen.random() < 0.01:
            arrival += chosen.randrange(30 * 3_600_000)
        late = chosen.choice([0, 0, chosen.randrange(4000), chosen.randrange(90_000), chosen.randrange(-500_000, 1)])
        if chosen.random() < 0.08:
            late = chosen.randrange(50 * 3_600_000)
        event: dict[str, Any] = {"id": f"e{n}", "kind": chosen.choice(KINDS), "member": f"m{chosen.randint(1, 4)}"}
        event |= {"ts": arrival - late, "at": arrival}
        if event["kind"] == "order_paid":
            event["amount"] = chosen.choice([0, 500, 900, 3000])
        for key, values in {"device": ["d1", "d2"], "ip": ["i1", "i2", "i3"], "phone": ["p1"]}.items():
            if chosen.random() < 0.8:
                event[key] = chosen.choice(values)
        if chosen.random() < 0.01:
            event = {"id": f"e{n}", "kind": "member_blocked", "member": "m4", "ts": arrival}
        elif chosen.random() < 0.02:
            event = {"id": f"e{n}", "kind": "member_released", "member": "m4", "ts": arrival}
        yield event


def booked(valkey: Server, connection: Connection, chosen: random.Random, texts: list[str]) -> None:
    """Book what comes of a stream that is decided by rulebooks, one behind the other."""
    events = list(stream(chosen, 600))
    partition = Partition(valkey.client(), rulebook=texts[0])
    for number, text in enumerate(texts):
        if number:
            partition.adopt(text)
        piece = len(events) // len(texts)
        some = events[number * piece : (number + 1) * piece]
        for start in range(0, piece, 50):
            partition.send(*some[start : start + 50])
    ingest(connection, partition)
    triggers_off(connection)


@pytest.mark.parametrize("seed", SEEDS)
def test_totals_are_those_of_the_reference_engine(valkey: Server, book: str, seed: int) -> None:
    chosen = random.Random(seed)
    texts = versions(chosen, "hold", "hold")
    bounds = {(parse(text).version, one.id): one.max for text in texts for one in parse(text).limits}
    with connect(book) as connection:
        booked(valkey, connection, chosen, texts)
        rows = connection.execute(
            "SELECT seq, rulebook, points, evidence FROM book.entries WHERE outcome IN ('granted', 'held') ORDER BY seq"
        ).fetchall()
        tripped = [
            (seq, one["limit"], bounds[version, one["limit"]], one["observed"], points)
            for seq, version, points, evidence in rows
            for one in evidence or []
            if one["limit"] not in ("refused", "member-points")
        ]
        assert {name for _, name, *_ in tripped} == {name for name, *_ in LIMITS}
        for action in ("reject", "clamp"):
            # Points that are clamped to none may come behind any number of others.
            expected = {
                (seq, name, most, total)
                for seq, name, most, total, points in tripped
                if action == "reject" or name not in "ghil" or points
            }
            with connection.transaction(force_rollback=True):
                for version, text in enumerate(versions(random.Random(seed), "reject", action), 1):
                    connection.execute("UPDATE book.rulebooks SET text = %s WHERE version = %s", (text, version))
                assert {(one.seq, name_in(one), one.expected, one.found) for one in capped(connection)} == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_beyond_windows_that_were_kept_to(valkey: Server, book: str, seed: int) -> None:
    chosen = random.Random(seed)
    texts = versions(chosen, "reject", chosen.choice(["reject", "clamp"]))
    with connect(book) as connection:
        booked(valkey, connection, chosen, texts)
        tripped = connection.execute("SELECT FROM book.entries WHERE evidence IS NOT NULL").fetchall()
        assert len(tripped) > 50
        slow(connection, parse(texts[-1]), refund_wait_hours=0)
        assert connection.execute("SELECT FROM book.entries WHERE late LIMIT 1").fetchall()
        assert [finding.line() for finding in capped(connection)] == []
