"""Random histories of the book beside a model written from the specification: the same points after every step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from datetime import date
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from accrual.book import Connection, adjust, approve, confirm, connect, expire, rebuild, release, settle, slow, undo
from accrual.book.programme import today
from accrual.embedded import EmbeddedDatabase
from accrual.errors import BookError
from accrual.ledger import EntriesBatch, LedgerReader
from accrual.rulebook import day_number
from book_model import Model, ModelEntry, ModelPosting
from books import DAY_MS, MORNING_MS, Partition, ingest
from servers import Server, empty
from workers import wait_until

FIRST_DAY: Final = day_number(date(2026, 11, 10))
CAP: Final = 1000
MEMBERS: Final = ("m1", "m2", "会员")
NAMES: Final = st.sampled_from(MEMBERS)
# The partition that an event is sent to: mostly the same one, so that events of a member meet there.
PLACES: Final = st.sampled_from([0, 0, 0, 1])
# The one that gets an order a second time, if any does.
AGAIN: Final = st.sampled_from([None, None, None, None, 0, 1])
AMOUNTS: Final = st.sampled_from([0, 99, 100, 1234, 5000, 30_000, 120_000])
# Whether an order takes points from its member instead of giving some.
TAKING: Final = st.sampled_from([False, False, True])

RULEBOOK: Final = """\
[programme]
name = "model"
version = 1
timezone = "Asia/Shanghai"
stacking = "add"
expiry_months = 1

[[earn]]
kind = "order_paid"
points_per_yuan = "1"

[[campaign]]
id = "weekend"
multiplier = "2.5"
weekdays = ["sat", "sun"]

[[campaign]]
id = "taking"
multiplier = "0.25"
tags = ["taking"]

[[campaign]]
id = "taking-more"
multiplier = "0.1"
tags = ["taking"]

[[limit]]
id = "cap"
key = "member"
measure = "points"
window = "day"
max = 1000
action = "clamp"
"""

_servers: dict[str, Any] = {}


# How long after its beginning the connection of a job is ended, if it is.
BREAKS: Final = st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.002, 0.006])

NEW_POSTINGS: Final = """
    SELECT p.number, p.kind, p.member, p.day - date '1970-01-01', p.from_account, p.to_account, p.points,
        ARRAY(SELECT lot - date '1970-01-01' FROM unnest(lot_days) AS lot), lot_points, e.event, r.amount_fen
    FROM book.postings p
    LEFT JOIN book.entries e ON (e.day, e.partition_id, e.seq, e.late) = (p.day, p.partition_id, p.seq, p.late)
    LEFT JOIN book.refunds r ON p.kind = 'refund' AND (r.action, r.seq) = (p.action, p.cause_seq)
    WHERE p.kind <> 'correct' AND p.number > %s
"""


def _without_none(row: Sequence[Any]) -> tuple[Any, ...]:
    """Return a row of the book such that it can be sorted: what has no lot has the day 0."""
    *fields, days, points, event, amount = row
    return (*fields, [day or 0 for day in days], points or [], event or "", amount or 0)


def _of_model(posting: ModelPosting) -> tuple[Any, ...]:
    days, points = [day or 0 for day, _ in posting.lots], [points for _, points in posting.lots]
    fields = (posting.kind, posting.member, posting.day, posting.source, posting.target, posting.points)
    return (*fields, days, points, posting.event, posting.amount)


def _turns(late: Sequence[Any]) -> list[list[Any]]:
    """Return late entries as they are booked together: a member's are of one day."""
    turns: list[list[Any]] = []
    days: dict[str, int] = {}
    for entry in late:
        if not turns or days.get(entry.member, entry.day) != entry.day:
            turns.append([])
            days = {}
        days[entry.member] = entry.day
        turns[-1].append(entry)
    return turns


def month_later(day: int) -> int:
    """Return the day a month after, clamped to the month's end: all days here are in November, which has 30."""
    return day_number(date.fromordinal(day + date(1970, 1, 1).toordinal()).replace(month=12))


class BookMachine(RuleBasedStateMachine):
    """Two partitions, three members, orders of a few days; what is booked is told to the model entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = ExitStack()
        self.url = self.opened.enter_context(new_book())
        self.connection = self.opened.enter_context(connect(self.url))
        server: Server = _servers["valkey"]
        empty(server)
        self.partitions = [Partition(server.client(), name, rulebook=RULEBOOK) for name in ("p", "q")]
        self.rulebook = self.partitions[0].rulebook
        self.model = Model(month_later)
        self.day = 0
        self.minute = 0
        self.sent = 0
        self.orders: list[tuple[str, str]] = []
        self.taking: set[str] = set()
        self.deferred: list[Any] = []
        # Before the first ingest the book knows no rulebook, and lots would live as long as they do by default.
        ingest(self.connection, *self.partitions)
        self.batches_booked = [1, 1]
        # The numbers that the book has given to the model's postings, in the model's order.
        self.numbers: list[int] = []

    def teardown(self) -> None:
        self.opened.close()

    # ------------------------------------------------------------------------------------------------ the ledger

    def _send(self, place: int, **fields: Any) -> None:
        self.sent += 1
        self.minute = min(self.minute + 1, 600)
        now_ms = MORNING_MS + self.day * DAY_MS + self.minute * 60_000
        self.partitions[place].send({"id": f"e{self.sent}", "ts": now_ms, "at": now_ms} | fields)

    @rule(place=PLACES, again=AGAIN, member=NAMES, amount=AMOUNTS, ago=st.sampled_from([0, 0, 1]), is_taking=TAKING)
    def order(self, member: str, amount: int, ago: int, is_taking: bool, place: int, again: int | None) -> None:
        self._order(member, amount, ago, is_taking, place, again)

    @rule(place=PLACES, again=AGAIN, member=NAMES, amount=AMOUNTS, ago=st.integers(2, 4), is_taking=TAKING)
    def late_order(self, member: str, amount: int, ago: int, is_taking: bool, place: int, again: int | None) -> None:
        self._order(member, amount, ago, is_taking, place, again)

    def _order(self, member: str, amount: int, ago: int, is_taking: bool, place: int, again: int | None) -> None:
        name = f"o{self.sent}"
        self.orders.append((name, member))
        ts = MORNING_MS + (self.day - ago) * DAY_MS
        tags = ["taking"] if is_taking else []
        self.taking |= {name} if is_taking else set()
        about: dict[str, Any] = {"member": member, "amount": amount, "order": name, "ts": ts, "tags": tags}
        self._send(place, kind="order_paid", **about)
        if again is not None:
            self._send(again, id=f"e{self.sent}", kind="order_paid", **about)

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), place=PLACES, amount=AMOUNTS, repeated=st.booleans())
    def refund(self, data: st.DataObject, place: int, amount: int, repeated: bool) -> None:
        name, member = data.draw(st.sampled_from(self.orders))
        member = data.draw(st.sampled_from([member] * 4 + list(MEMBERS)))
        self._send(place, kind="order_refunded", member=member, amount=amount, order=name)
        if repeated:
            self._send(place, kind="order_refunded", member=member, amount=amount, order=name)

    @rule(place=PLACES, member=NAMES)
    def freeze(self, place: int, member: str) -> None:
        self._send(place, kind="member_frozen", member=member)

    @precondition(lambda self: self.day < 12)
    @rule()
    def next_day(self) -> None:
        self.day, self.minute = self.day + 1, 0

    # -------------------------------------------------------------------------------------------------- the book

    @rule(place=PLACES, break_s=BREAKS)
    def ingest(self, place: int, break_s: float) -> None:
        """Post what is there of a partition; the other one stays behind."""
        partition = self.partitions[place]
        self._do(lambda connection: ingest(connection, partition), break_s)
        for batch in LedgerReader(partition.client, partition.name).batches(self.batches_booked[place] + 1):
            self.batches_booked[place] = batch.batch
            if isinstance(batch, EntriesBatch):
                for _, _, entry in batch.rows():
                    self._tell_model(entry)

    def _do(self, work: Callable[[Connection], object], break_s: float) -> None:
        """Do ``work``; with ``break_s`` first on a connection that is ended so long after it was begun."""
        if break_s:
            with connect(self.url) as doomed:
                pid = doomed.info.backend_pid
                ending = ("SELECT pg_terminate_backend(%s)", (pid,))
                killer = threading.Timer(break_s, self.connection.execute, ending)
                killer.start()
                try:
                    work(doomed)
                except psycopg.OperationalError:
                    pass
                finally:
                    killer.join()
            # What it was just about to commit may still land.
            gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)"
            wait_until(lambda: self.connection.execute(gone, (pid,)).fetchone() == (True,), "the connection ends")
        work(self.connection)

    def _tell_model(self, entry: Any) -> None:
        if entry.outcome == "deferred":
            self.deferred.append(entry)
        elif entry.outcome != "applied":
            self.model.book_once(
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
        else:
            assert entry.kind == "member_frozen"
            self.model.freeze(entry.member)

    @rule(break_s=BREAKS)
    def slow(self, break_s: float) -> None:
        self._do(lambda connection: slow(connection, self.rulebook, refund_wait_hours=1), break_s)
        late = [entry for entry in self.deferred if entry.cause == "late"]
        refunds = [entry for entry in self.deferred if entry.cause == "refund"]
        self.deferred = []
        for turn in _turns(late):
            self.model.settle_late([self._late(entry) for entry in turn if entry.event not in self.model.ids])
        for entry in refunds:
            if any(known.order == entry.order for known in self.model.entries.values()):
                self.model.refund(entry.event, entry.member, entry.order, entry.amount)
            else:
                self.deferred.append(entry)

    def _late(self, entry: Any) -> ModelEntry:
        """Book a late order as the page says: per yuan, times M = 1 + Σ (multiplier − 1), clamped to what is left.

        Where the member is blocked (step 8 of the decision), no points are computed.
        """
        outcome = self.model.outcome_of(entry.member)
        weekend = (entry.day + 3) % 7 >= 5
        percent = 100 + 150 * weekend - 165 * (entry.order in self.taking)
        uncapped = entry.amount * percent // 10_000
        same_day = [
            known for known in self.model.entries.values() if (known.member, known.day) == (entry.member, entry.day)
        ]
        used = sum(known.points for known in same_day)
        points = uncapped if used + uncapped <= CAP else max(0, CAP - used)
        if outcome == "rejected":
            uncapped = points = 0
        booked = ModelEntry(entry.event, entry.member, entry.day, outcome, points, uncapped, entry.amount, entry.order)
        self.model.book(booked)
        return booked

    @rule(ago=st.integers(0, 4), break_s=BREAKS)
    def settle(self, ago: int, break_s: float) -> None:
        day = FIRST_DAY + self.day - ago
        self._do(lambda connection: settle(connection, self.rulebook, day), break_s)
        self.model.settle(day)

    @rule(member=NAMES, break_s=BREAKS)
    def release(self, member: str, break_s: float) -> None:
        if self._is_known(member):
            self._do(lambda connection: release(connection, member, reason="checked", by="reviewer"), break_s)
            self.model.release(member)

    @rule(
        member=NAMES,
        span=st.sampled_from([None, (0, 2), (0, 12)]),
        is_let_go=st.booleans(),
        break_s=BREAKS,
    )
    def confirm(self, member: str, span: tuple[int, int] | None, is_let_go: bool, break_s: float) -> None:
        """Confirm; the member stays blocked until a release, unless a person lets the member go on at once.

        The event that says so stays in the outbox: the ledger goes on with what is held, and the book alone knows.
        """
        if not self._is_known(member):
            return
        days = None if span is None else (FIRST_DAY + span[0], FIRST_DAY + span[1])
        self._do(lambda connection: confirm(connection, member, reason="abuse", by="reviewer", claw_back=days), break_s)
        self.model.confirm(member)
        if days:
            self.model.claw_back(member, *days)
        if is_let_go:
            release(self.connection, member, reason="checked", by="reviewer")
            self.model.release(member)

    def _is_known(self, member: str) -> bool:
        return any(entry.member == member for entry in self.model.entries.values())

    @rule(day=st.integers(25, 45), break_s=BREAKS)
    def expire(self, day: int, break_s: float) -> None:
        self._do(lambda connection: expire(connection, FIRST_DAY + day), break_s)
        self.model.expire(FIRST_DAY + day)

    @rule(member=NAMES, points=st.sampled_from([-700, -30, 40, 900]), break_s=BREAKS)
    def adjust(self, member: str, points: int, break_s: float) -> None:
        with self.connection.cursor() as cursor:
            day = today(cursor)
        about: dict[str, Any] = {"reason": "test", "note": "", "by": "tester", "key": f"key-{len(self.numbers)}"}
        self._do(lambda connection: adjust(connection, member, points, **about), break_s)
        self.model.adjust(member, points, day)

    @precondition(lambda self: any(not posting.is_undone for posting in self.model.postings))
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        """Undo a posting, of whatever kind and however long ago: it can be if its points are where it has put them."""
        standing = [place for place, posting in enumerate(self.model.postings) if not posting.is_undone]
        # The newest ones first, which is also what a failing history is made shorter to.
        place = data.draw(st.sampled_from(standing[::-1]))
        waiting = undo(self.connection, self.numbers[place], reason="mistake", note="", by="tester")
        refused = nullcontext() if self.model.undo(place) else pytest.raises(BookError, match="cannot be undone")
        with refused:
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
    def postings_are_the_model_s(self) -> None:
        """Compare what was posted by the last step, and note the numbers of the model's postings."""
        known = len(self.numbers)
        rows = self.connection.execute(NEW_POSTINGS, (max(self.numbers, default=0),)).fetchall()
        found = sorted((_without_none(row[1:]), row[0]) for row in rows)
        wanted = sorted(
            (_of_model(posting), known + place) for place, posting in enumerate(self.model.postings[known:])
        )
        assert [row for row, _ in found] == [row for row, _ in wanted]
        self.numbers += [0] * len(wanted)
        for (_, number), (_, place) in zip(found, wanted, strict=True):
            self.numbers[place] = number

    @invariant()
    def exceptions_are_the_model_s(self) -> None:
        rows = self.connection.execute("SELECT kind, event FROM book.exceptions ORDER BY kind, event").fetchall()
        assert rows == sorted(self.model.exceptions)

    @invariant()
    def states_are_the_model_s(self) -> None:
        rows = self.connection.execute("SELECT member, state FROM book.members WHERE state <> 'active'").fetchall()
        assert dict(rows) == self.model.states

    @invariant()
    def the_accounts_add_up(self) -> None:
        rows: dict[str, int] = dict(self.connection.execute("SELECT account, points FROM book.accounts").fetchall())
        assert sum(rows.values()) == 0
        for account in ("expired", "issuance"):
            assert rows.get(account, 0) == self.model.total(account)
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


def test_a_history_of_a_blocked_member(machine: None) -> None:
    """What random histories seldom come to: late orders, refunds, a freeze and another confirmation while blocked."""
    book = BookMachine()

    def check() -> None:
        book.balances_and_lots_are_the_model_s()
        book.postings_are_the_model_s()
        book.exceptions_are_the_model_s()
        book.states_are_the_model_s()
        book.the_accounts_add_up()

    def deal_with_all() -> None:
        book.ingest(place=0, break_s=0.0)
        check()
        book.slow(break_s=0.0)
        check()

    def refund(order: str, amount: int) -> None:
        book._send(0, kind="order_refunded", member="m1", amount=amount, order=order)

    try:
        book.order(member="m1", amount=5000, ago=0, is_taking=False, place=0, again=None)
        book.freeze(place=0, member="m1")
        book.order(member="m1", amount=1234, ago=0, is_taking=False, place=0, again=None)
        deal_with_all()
        book.confirm(member="m1", span=None, is_let_go=False, break_s=0.0)
        check()
        assert (book.model.states, book.model.accounts["m1"].held) == ({"m1": "blocked"}, 0)
        # The ledger has not learnt of it: it goes on to hold what comes, and says once more that the member is frozen.
        book.order(member="m1", amount=30_000, ago=0, is_taking=False, place=0, again=None)
        book.freeze(place=0, member="m1")
        book.late_order(member="m1", amount=1234, ago=2, is_taking=False, place=0, again=None)
        late = book.orders[-1][0]
        # Of the late order, also more than it was; of what was granted before; and of what is held now.
        for order, amount in ((late, 1000), (late, 1000), (book.orders[0][0], 1000), (book.orders[2][0], 10_000)):
            refund(order, amount)
        deal_with_all()
        account, entries = book.model.accounts["m1"], {entry.order: entry for entry in book.model.entries.values()}
        assert (entries[late].outcome, entries[late].points, book.model.states) == ("rejected", 0, {"m1": "blocked"})
        assert (account.pending, account.held) == (40, 200)
        assert [kind for kind, _ in book.model.exceptions] == ["refund_exceeds_order"]
        book.confirm(member="m1", span=(0, 0), is_let_go=False, break_s=0.0)
        check()
        assert (account.pending, account.held) == (0, 0)
        book.confirm(member="m1", span=(0, 0), is_let_go=False, break_s=0.0)
        check()
        book.release(member="m1", break_s=0.0)
        book.late_order(member="m1", amount=1234, ago=2, is_taking=False, place=0, again=None)
        deal_with_all()
        # That day is a Sunday.
        assert (account.pending, account.held, book.model.states) == (30, 0, {})
    finally:
        book.teardown()


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
