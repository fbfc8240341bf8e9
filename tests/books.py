"""Ledgers for tests of the book, decided here by the reference engine and put on a real server, and the book's jobs."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

import redis

from accrual.book import Connection
from accrual.book.follow import Follower, follow
from accrual.book.posting import act, lock_members, plan, post
from accrual.engine import STREAM_SLACK_DAYS, BatchHeader, ReferenceEngine, StreamEntry
from accrual.events import encode_compact, validate
from accrual.ledger import START, RulebookRecord, decode_header
from accrual.rulebook import Rulebook, parse
from accrual.stream import Checkpoint, Keys
from accrual.stream.deadletters import letter_fields
from workers import SECRET, command

__all__ = [
    "BOOK_RULEBOOK",
    "DAY_MS",
    "MORNING_MS",
    "TAKING_RULEBOOK",
    "Partition",
    "at",
    "balance",
    "facts",
    "ingest",
    "order",
    "redeem",
    "run_json",
    "taking",
]

DAY_MS: Final = 86_400_000
# 2026-11-10, 08:00 in Shanghai: the beginning of a UTC day, and no member day.
MORNING_MS: Final = 1_794_268_800_000

BOOK_RULEBOOK: Final = """\
[programme]
name = "book-test"
version = 1
timezone = "Asia/Shanghai"
expiry_months = 12

[[earn]]
kind = "order_paid"
points_per_yuan = "1"

[[earn]]
kind = "checkin"
points = 5
max_per_day = 1
streak_days = 3
streak_bonus = 50

[[earn]]
kind = "group_opened"
points = 50
once = true

[[campaign]]
id = "member-day"
multiplier = "2"
days_of_month = [15]

[[limit]]
id = "member-cap"
key = "member"
measure = "points"
window = "day"
max = 1000
action = "clamp"

[[limit]]
id = "device-orders"
key = "device"
measure = "events"
window = "day"
max = 5
action = "freeze"
"""

# By which an order that is tagged `taking` comes to minus half its base.
TAKING_RULEBOOK: Final = BOOK_RULEBOOK.replace("version = 1", 'version = 1\nstacking = "add"') + "".join(
    f'\n[[campaign]]\nid = "{name}"\nmultiplier = "0.25"\ntags = ["taking"]\n' for name in ("taking", "taking-more")
)


def at(day: int = 0, minutes: int = 0) -> int:
    """Return a time in ms: ``minutes`` after 08:00 of the ``day``-th day from 2026-11-10, in Shanghai."""
    return MORNING_MS + day * DAY_MS + minutes * 60_000


def order(number: int, member: str = "m1", amount: int = 1000, day: int = 0, **fields: Any) -> dict[str, Any]:
    """Return order ``o<number>``, event ``e<number>``: so many minutes after 08:00 of the ``day``-th day."""
    return {
        "id": f"e{number}",
        "kind": "order_paid",
        "member": member,
        "ts": at(day, number),
        "amount": amount,
        "order": f"o{number}",
    } | fields


def taking(number: int, member: str = "m1", amount: int = 1000, day: int = 0, **fields: Any) -> dict[str, Any]:
    """Return an order that by ``TAKING_RULEBOOK`` takes points from its member: 5 for 10 yuan."""
    return order(number, member, amount, day, tags=["taking"]) | fields


class Partition:
    """A partition on a real server whose ledger this process writes: ``send`` decides events as a worker would.

    An event is a mapping as in SPEC section 1; its ``at`` is when it arrives, by default its ``ts``.
    """

    def __init__(self, client: redis.Redis, name: str = "p", rulebook: str = BOOK_RULEBOOK) -> None:
        self.client = client
        self.name = name
        self.keys = Keys(name)
        self.rulebook: Rulebook = parse(rulebook)
        self.engine = ReferenceEngine(self.rulebook, SECRET, STREAM_SLACK_DAYS)
        self.link = START
        self.checkpoint = Checkpoint()
        self._last = (0, 0)
        self._record()

    def adopt(self, rulebook: str) -> None:
        """Record another rulebook, and decide by it from then on."""
        self.rulebook = parse(rulebook)
        self.engine.adopt(self.rulebook)
        self._record()

    def _record(self) -> None:
        link = self.link
        header = BatchHeader(link.batch + 1, link.digest, link.through, link.next_seq)
        record = RulebookRecord.of(header, self.rulebook, STREAM_SLACK_DAYS)
        data = record.encode()
        digest = decode_header(data).digest
        self._commit(data, self.checkpoint.after_rulebook(digest, self.rulebook.version, record.sha256))

    def send(self, *events: Mapping[str, Any]) -> None:
        """Append ``events`` to the stream, one entry each, decide them and commit one ledger batch."""
        entries = [self._append(event) for event in events]
        batch = self.engine.decide_entries(entries)
        link = self.link
        data = batch.encode(BatchHeader(link.batch + 1, link.digest, link.through, link.next_seq))
        digest = decode_header(data).digest
        first = self.checkpoint.dead_letters + 1
        for number, item in enumerate(batch.rejected, first):
            fields = letter_fields(item)
            pairs = dict(zip(fields[::2], fields[1::2], strict=True))
            self.client.xadd(self.keys.deadletters, pairs, id=f"{number}-0")  # type: ignore[arg-type]
        self._commit(data, self.checkpoint.after_entries(digest, batch.through, batch.counts))

    def _append(self, event: Mapping[str, Any]) -> StreamEntry:
        arrival = int(event.get("at", event["ts"]))
        last = self._last
        self._last = (arrival, 0) if arrival > last[0] else (last[0], last[1] + 1)
        value = encode_compact(validate(event))
        self.client.xadd(self.keys.events, {"e": value}, id=f"{self._last[0]}-{self._last[1]}")
        return StreamEntry(*self._last, ((b"e", value),))

    def _commit(self, data: bytes, checkpoint: Checkpoint) -> None:
        self.link = decode_header(data).link
        self.checkpoint = checkpoint
        with self.client.pipeline() as transaction:
            transaction.xadd(self.keys.ledger, {"batch": data}, id=f"{self.link.batch}-0")
            transaction.hset(self.keys.checkpoint, mapping=dict(checkpoint.to_hash()))
            transaction.execute()


def ingest(connection: Connection, *partitions: Partition) -> None:
    """Post all that ``partitions`` have."""
    with ExitStack() as opened:
        followers = [
            opened.enter_context(Follower(connection, partition.client, partition.name)) for partition in partitions
        ]
        follow(followers, threading.Event(), drain=True)


def redeem(connection: Connection, member: str, points: int) -> None:
    """Spend a member's points, as whoever sells goods for them does."""
    move = "SELECT %(member)s, 'redeem', 'available', 'redeemed', %(points)s, date '2026-11-10', NULL::date, false"
    with connection.transaction(), connection.cursor() as cursor:
        lock_members(cursor, [member])
        plan(cursor, move, {"member": member, "points": points})
        post(cursor, act(cursor, "redeem", by="shop"))


def balance(connection: Connection, member: str) -> tuple[int, int, int]:
    """Return a member's points: pending, available, held."""
    row = connection.execute(
        "SELECT pending, available, held FROM book.balances WHERE member = %s", (member,)
    ).fetchone()
    return (row[0], row[1], row[2]) if row else (0, 0, 0)


def facts(connection: Connection) -> dict[str, Any]:
    """Return all that was booked and what it came to, without times and numbers of actions: to compare two books."""
    tables = {
        "entries": "SELECT day, partition_id, seq, late, event, member, outcome, points FROM book.entries",
        "postings": "SELECT kind, member, from_account, to_account, points, day, lot_days, lot_points, seq "
        "FROM book.postings",
        "balances": "SELECT member, pending, available, held FROM book.balances "
        "WHERE (pending, available, held) <> (0, 0, 0)",
        "lots": "SELECT member, day, expires_on, points FROM book.lots WHERE points > 0",
        "accounts": "SELECT account, points FROM book.accounts",
        "partitions": "SELECT name, batch, digest, through, next_seq FROM book.partitions",
    }
    return {name: sorted(map(repr, connection.execute(query).fetchall())) for name, query in tables.items()}


def run_json(*arguments: str) -> list[Any]:
    """Run an ``accrual`` command that must succeed and return its lines of JSON."""
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
