"""``slow``: late events, then refunds, each in the order in which they came (SPEC section 9).

Late events come first, since a refund may be of one of them. A refund that must go on waiting for its order is left
alone until there is something to be done about it.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import msgspec
import psycopg
import redis

from accrual.book.chunks import Done, is_stopped
from accrual.book.database import Connection, open_book, retried
from accrual.book.late import judge_late_events
from accrual.book.outbox import send_outbox
from accrual.book.people import check_person
from accrual.book.refunds import judge_refunds
from accrual.book.service import run_again
from accrual.book.waiting import take_turn
from accrual.rulebook import Rulebook
from accrual.settings import Settings
from accrual.stream import StreamServer

__all__ = ["SlowDone", "SlowService", "count_waiting", "slow"]

POLL_S: Final = 1.0
REPORT_S: Final = 5.0

# A dry run does all in one transaction, so that what comes later sees what comes before. It looks at no more late
# events and refunds than so many, or one chunk, so that its locks end as soon as those of any other transaction.
DRY_RUN_EVENTS: Final = 1000

# The newest of them first, with the days on which they came: the first day that a book ever has says which are long
# past.
ENSURE_DAYS: Final = """
    SELECT day - date '1970-01-01', book.ensure_day(day) FROM (
        SELECT DISTINCT unnest(ARRAY[d.day, to_timestamp(split_part(d.stream_id, '-', 1)::bigint / 1000)::date]) AS day
        FROM book.waiting w JOIN book.deferred d USING (partition_id, seq) WHERE w.cause = 'late'
    ) days ORDER BY day DESC
"""

log = logging.getLogger("accrual.book")


class SlowDone(Done):
    """What was done, and how many events wait then, as ``count_waiting`` has it: after a dry run all that waited."""

    waiting: int = 0


class SlowService:
    """``accrual slow`` as it runs: what waits is dealt with, and what there is to tell the stream server is sent."""

    def __init__(self, settings: Settings, rulebook: Rulebook, *, by: str) -> None:
        self._settings = settings
        self._rulebook = rulebook
        self._by = by

    def run(self, stopping: threading.Event) -> None:
        """Look again and again until ``stopping`` is set; a server or database that is away is waited for."""

        def work() -> None:
            with self._opened() as (connection, client):
                while not stopping.is_set():
                    self._once(connection, client, stopping)
                    stopping.wait(POLL_S)

        run_again(work, stopping, longest_pause_s=self._settings.backoff_limit_ms / 1000)

    def drain(self, stopping: threading.Event, *, dry_run: bool = False) -> SlowDone:
        """Deal with what waits now, and return what was done; with ``dry_run`` what would be done with the first."""
        with self._opened() as (connection, client):
            done = self._once(connection, client, stopping, dry_run=dry_run)
            return SlowDone(**msgspec.structs.asdict(done), waiting=count_waiting(connection))

    @contextmanager
    def _opened(self) -> Iterator[tuple[Connection, redis.Redis]]:
        with open_book(self._settings.database) as connection, StreamServer(self._settings.redis).client() as client:
            yield connection, client

    def _once(
        self, connection: Connection, client: redis.Redis, stopping: threading.Event, *, dry_run: bool = False
    ) -> Done:
        wait_hours = self._settings.refund_wait_hours
        done = slow(
            connection, self._rulebook, refund_wait_hours=wait_hours, by=self._by, dry_run=dry_run, stopping=stopping
        )
        if not dry_run:
            send_outbox(connection, client, stopping)
        return done


def slow(
    connection: Connection,
    rulebook: Rulebook,
    *,
    refund_wait_hours: float,
    by: str = "scheduler",
    dry_run: bool = False,
    stopping: threading.Event | None = None,
) -> Done:
    """Deal with all that waits and can be dealt with now, and return what was done.

    With ``dry_run`` the first of them are dealt with in one transaction, which is undone. Once ``stopping`` is set no
    further chunk is begun.
    """
    check_person(by)
    total = Done()
    wait_s = refund_wait_hours * 3600
    days = {day for day, _ in retried(lambda: connection.execute(ENSURE_DAYS).fetchall())}
    with connection.transaction(force_rollback=True) if dry_run else nullcontext():
        for judge in (
            functools.partial(judge_late_events, rulebook=rulebook, by=by, days=days),
            functools.partial(judge_refunds, wait_s=wait_s, by=by),
        ):
            _all_of(connection, judge, total, stopping, most=DRY_RUN_EVENTS if dry_run else None)
        if total.members:
            _say(connection, total)
    return total


def count_waiting(connection: Connection) -> int:
    """Return how many events wait, also those that must go on waiting for an order."""
    return int((connection.execute("SELECT count(*) FROM book.waiting").fetchone() or (0,))[0])


def _all_of(
    connection: Connection,
    judge: Callable[[psycopg.Cursor[Any]], Done | None],
    total: Done,
    stopping: threading.Event | None,
    *,
    most: int | None,
) -> None:
    """Have chunk after chunk judged, of ``most`` events or one more chunk, and count what was done."""
    reported_s = time.monotonic()
    waited = 0 if most is None else count_waiting(connection)
    while not is_stopped(stopping):
        done = retried(functools.partial(_in_turn, connection, judge))
        if done is None:
            return
        total.add(done)
        if most is not None and waited - count_waiting(connection) >= most:
            return
        if time.monotonic() - reported_s >= REPORT_S:
            reported_s = time.monotonic()
            _say(connection, total)


def _say(connection: Connection, total: Done) -> None:
    words = "slow: %d members, %d postings, %d points; %d events wait"
    log.info(words, total.members, total.postings, total.points, count_waiting(connection))


def _in_turn(connection: Connection, judge: Callable[[psycopg.Cursor[Any]], Done | None]) -> Done | None:
    with connection.transaction(), connection.cursor() as cursor:
        take_turn(cursor)
        return judge(cursor)
