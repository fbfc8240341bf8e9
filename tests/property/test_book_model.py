"""Random histories of the book beside a model written from the specification: the same points after every step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from accrual.book import adjust, approve, confirm, connect, expire, rebuild, release, settle, slow, undo
from accrual.book.programme import today
from accrual.embedded import EmbeddedDatabase
from accrual.ledger import EntriesBatch, LedgerReader
from accrual.rulebook import day_number
from book_model import Model, ModelEntry
from books import DAY_MS, MORNING_MS, Partition, ingest
from servers import Server, empty

FIRST_DAY: Final = day_number(date(2026, 11, 10))
CAP: Final = 1000
MEMBERS: Final = ("m1", "m2", "会员")
AMOUNTS: Final = st.sampled_from([0, 99, 100, 1234, 5000, 30_000, 120_000])

RULEBOOK: Final = """\
[programme]
name = "model"
version = 1
timezone = "Asia/Shanghai"
expiry_months = 1

[[earn]]
kind = "order_paid"
points_per_yuan = "1"

[[campaign]]
id = "weekend"
multiplier = "2.5"
weekdays = ["sat", "sun"]

[[limit]]
id = "cap"
key = "member"
measure = "points"
window = "day"
max = 1000
action = "clamp"
"""

_servers: dict[str, Any] = {}


def month_later(day: int) -> int:
    """Return the day a month after, clamped to the month's end: all days here are in November, which has 30."""
    return day_number(date.fromordinal(day + date(1970, 1, 1).toordinal()).replace(month=12))


class BookMachine(RuleBasedStateMachine):
    """One partition, three members, orders of a few days; what is booked is told to the model entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = ExitStack()
        self.url = self.opened.enter_context(new_book())
        self.connection = self.opened.enter_context(connect(self.url))
        server: Server = _servers["valkey"]
        empty(server)
        self.partition = Partition(server.client(), rulebook=RULEBOOK)
        self.model = Model(month_later)
        self.day = 0
        self.minute = 0
        self.sent = 0
        self.orders: list[tuple[str, str]] = []
        self.deferred: list[tuple[str, dict[str, Any]]] = []
        self.model_frozen: set[str] = set()
        # Before the first ingest the book knows no rulebook, and lots would live as long as they do by default.
        ingest(self.connection, self.partition)
        self.batches_booked = 1

    def teardown(self) -> None:
        self.opened.close()

    # ------------------------------------------------------------------------------------------------ the ledger

    def _send(self, **fields: Any) -> None:
        self.sent += 1
        self.minute = min(self.minute + 1, 600)
        now_ms = MORNING_MS + self.day * DAY_MS + self.minute * 60_000
        event = {"id": f"e{self.sent}", "ts": now_ms, "at": now_ms} | fields
        self.partition.send(event)

    @rule(member=st.sampled_from(MEMBERS), amount=AMOUNTS, ago=st.sampled_from([0, 0, 1]))
    def order(self, member: str, amount: int, ago: int) -> None:
        name = f"o{self.sent}"
        self.orders.append((name, member))
        ts = MORNING_MS + (self.day - ago) * DAY_MS
        self._send(kind="order_paid", member=member, amount=amount, order=name, ts=ts)

    @rule(member=st.sampled_from(MEMBERS), amount=AMOUNTS, ago=st.integers(2, 4))
    def late_order(self, member: str, amount: int, ago: int) -> None:
        name = f"o{self.sent}"
        self.orders.append((name, member))
        ts = MORNING_MS + (self.day - ago) * DAY_MS
        self._send(kind="order_paid", member=member, amount=amount, order=name, ts=ts)

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), amount=AMOUNTS, repeated=st.booleans())
    def refund(self, data: st.DataObject, amount: int, repeated: bool) -> None:
        name, member = data.draw(st.sampled_from(self.orders))
        member = data.draw(st.sampled_from([member] * 4 + list(MEMBERS)))
        self._send(kind="order_refunded", member=member, amount=amount, order=name)
        if repeated:
            self._send(kind="order_refunded", member=member, amount=amount, order=name)

    @rule(member=st.sampled_from(MEMBERS))
    def freeze(self, member: str) -> None:
        self._send(kind="member_frozen", member=member)

    @precondition(lambda self: self.day < 12)
    @rule()
    def next_day(self) -> None:
        self.day, self.minute = self.day + 1, 0

    # -------------------------------------------------------------------------------------------------- the book

    @rule(broken=st.booleans())
    def ingest(self, broken: bool) -> None:
        """Post what is there; where it is ``broken`` the connection is ended somewhere on the way first."""
        if broken:
            self._ingest_and_break()
        ingest(self.connection, self.partition)
        for batch in LedgerReader(self.partition.client, "p").batches(self.batches_booked + 1):
            self.batches_booked = batch.batch
            if isinstance(batch, EntriesBatch):
                for _, _, entry in batch.rows():
                    self._tell_model(entry)

    def _ingest_and_break(self) -> None:
        with connect(self.url) as doomed:
            pid = doomed.info.backend_pid
            killer = threading.Timer(0.005, self.connection.execute, ("SELECT pg_terminate_backend(%s)", (pid,)))
            killer.start()
            try:
                ingest(doomed, self.partition)
            except psycopg.OperationalError:
                pass
            finally:
                killer.join()

    def _tell_model(self, entry: Any) -> None:
        if entry.outcome == "deferred":
            self.deferred.append((entry.cause, {"entry": entry}))
        elif entry.outcome != "applied":
            self.model.book(
                ModelEntry(
                    entry.event,
                    entry.member,
                    entry.day,
                    entry.outcome,
                    entry.points,
                    entry.uncapped,
                    entry.amount or 0,
                    entry.order,
                )
            )
        elif entry.kind == "member_frozen":
            self.model_frozen.add(entry.member)
        else:
            self.model_frozen.discard(entry.member)

    @rule()
    def slow(self) -> None:
        slow(self.connection, self.partition.rulebook, refund_wait_hours=1)
        waiting = sorted(self.deferred, key=lambda item: item[0] == "refund")
        self.deferred = []
        for cause, item in waiting:
            entry = item["entry"]
            if cause == "late":
                self._late(entry)
            elif any(known.order == entry.order for known in self.model.entries.values()):
                self.model.refund(entry.event, entry.member, entry.order, entry.amount)
            else:
                self.deferred.append((cause, item))

    def _late(self, entry: Any) -> None:
        """Decide a late order as the page says: per yuan, ×2.5 at the weekend, clamped to what the day has left."""
        weekend = (entry.day + 3) % 7 >= 5
        uncapped = entry.amount * 5 // 200 if weekend else entry.amount // 100
        same_day = [
            known for known in self.model.entries.values() if (known.member, known.day) == (entry.member, entry.day)
        ]
        points = max(0, min(uncapped, CAP - sum(known.points for known in same_day)))
        outcome = "held" if entry.member in self.model_frozen else "granted"
        self.model.book_late(
            ModelEntry(entry.event, entry.member, entry.day, outcome, points, uncapped, entry.amount, entry.order)
        )

    @rule(ago=st.integers(0, 4))
    def settle(self, ago: int) -> None:
        day = FIRST_DAY + self.day - ago
        settle(self.connection, self.partition.rulebook, day)
        self.model.settle(day)

    @rule(member=st.sampled_from(MEMBERS))
    def release(self, member: str) -> None:
        if self._is_known(member):
            release(self.connection, member, reason="checked", by="reviewer")
            self.model.release(member)
            self.model_frozen.discard(member)

    @rule(member=st.sampled_from(MEMBERS), span=st.sampled_from([None, (0, 2), (0, 12)]))
    def confirm(self, member: str, span: tuple[int, int] | None) -> None:
        if not self._is_known(member):
            return
        days = None if span is None else (FIRST_DAY + span[0], FIRST_DAY + span[1])
        confirm(self.connection, member, reason="abuse", by="reviewer", claw_back=days)
        self.model.confirm(member)
        if days:
            self.model.claw_back(member, *days)
        # The model has no blocked members: the event stays in the outbox, and a person lets the member go on.
        release(self.connection, member, reason="checked", by="reviewer")
        self.model_frozen.discard(member)

    def _is_known(self, member: str) -> bool:
        return any(entry.member == member for entry in self.model.entries.values())

    @rule(day=st.integers(25, 45))
    def expire(self, day: int) -> None:
        expire(self.connection, FIRST_DAY + day)
        self.model.expire(FIRST_DAY + day)

    @rule(member=st.sampled_from(MEMBERS), points=st.sampled_from([-700, -30, 40, 900]))
    def adjust(self, member: str, points: int) -> None:
        with self.connection.cursor() as cursor:
            day = today(cursor)
        adjust(self.connection, member, points, reason="test", note="", by="tester", approval_points=10_000)
        self.model.adjust(member, points, day)

    @rule(
        member=st.sampled_from(MEMBERS),
        points=st.sampled_from([-700, 900]),
        ago=st.integers(0, 4),
        day=st.integers(25, 45),
    )
    def mistakes(self, member: str, points: int, ago: int, day: int) -> None:
        """Jobs that should not have run, each undone before anything else: only that the day is settled stays."""
        with self._undone():
            adjust(self.connection, member, points, reason="test", note="", by="tester", approval_points=10_000)
        with self._undone():
            settle(self.connection, self.partition.rulebook, FIRST_DAY + self.day - ago)
        self.model.settled.add(FIRST_DAY + self.day - ago)
        with self._undone():
            expire(self.connection, FIRST_DAY + day)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo whatever is posted within, the last of it first."""
        newer = "SELECT number FROM book.postings WHERE number > %s ORDER BY number DESC"
        ((before,),) = self.connection.execute("SELECT nextval('book.numbers')")
        yield
        for (number,) in self.connection.execute(newer, (before,)).fetchall():
            waiting = undo(self.connection, number, reason="mistake", note="", by="tester")
            approve(self.connection, waiting.adjustment, by="somebody else")

    # ------------------------------------------------------------------------------------------------ what holds

    @invariant()
    def balances_and_lots_are_the_model_s(self) -> None:
        rows = self.connection.execute("SELECT member, pending, available, held FROM book.balances").fetchall()
        found = {member: tuple(points) for member, *points in rows if any(points)}
        wanted = {
            member: (account.pending, account.available, account.held)
            for member, account in self.model.accounts.items()
            if account.pending or account.available or account.held
        }
        assert found == wanted
        lots = self.connection.execute(
            "SELECT member, day - date '1970-01-01', points FROM book.lots WHERE points > 0 ORDER BY 1, 2"
        ).fetchall()
        assert lots == sorted(
            (member, day, points)
            for member, account in self.model.accounts.items()
            for day, points in account.lots.items()
            if points
        )

    @invariant()
    def the_accounts_add_up(self) -> None:
        rows: dict[str, int] = dict(self.connection.execute("SELECT account, points FROM book.accounts").fetchall())
        assert sum(rows.values()) == 0
        assert rows.get("expired", 0) == self.model.expired
        assert -rows.get("issuance", 0) == self.model.granted - self.model.reversed + self.model.adjusted
        assert list(rebuild(self.connection, dry_run=True)) == []


def new_book() -> Any:
    """Return a context that gives the URL of a new book."""
    return _servers["new_book"]()


@pytest.fixture
def machine(valkey: Server, _session_database: EmbeddedDatabase, new_database: Any) -> Iterator[None]:
    _servers.update(valkey=valkey, new_book=new_database)
    yield
    _servers.clear()


def test_histories_of_the_book(machine: None) -> None:
    run_state_machine_as_test(
        BookMachine,
        settings=settings(
            max_examples=12,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.mark.slow
def test_many_histories_of_the_book(machine: None) -> None:
    run_state_machine_as_test(
        BookMachine,
        settings=settings(
            max_examples=400,
            stateful_step_count=80,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
