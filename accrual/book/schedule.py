"""``jobs``: one process that does all the jobs of the book, each when it is time.

Jobs that may take long have a thread of their own, with its own connections, so that no settlement keeps a released
member waiting. Of several such processes one is at work in each of these lanes and the others stand by; they would do
no harm either, since every job is safe to run twice, and beside every other, at once.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import msgspec
import redis

from accrual.book.chunks import Done, is_stopped
from accrual.book.database import Connection, open_book
from accrual.book.expire import expire
from accrual.book.outbox import send_outbox
from accrual.book.reminders import remind
from accrual.book.service import run_again
from accrual.book.settle import settle
from accrual.book.slow import count_waiting, slow
from accrual.rulebook import Rulebook, day_text
from accrual.settings import Settings
from accrual.stream import Keys, StreamServer, parse_stream_id

__all__ = ["DueDay", "Report", "Scheduler", "days_to_settle"]

# What one run of one job did.
Report: TypeAlias = dict[str, Any]

LEADER_LOCK: Final = 0x6A6F_6273  # "jobs"
STANDBY_S: Final = 1.0

# Jobs of a lane are done one after the other: what was settled may be reminded of, and points expire after the last
# reminder. What all of them have to tell is sent last where each is done once.
LANES: Final = (("slow",), ("settle", "remind", "expire"), ("outbox",))

# Days whose settlement is not finished, or that have got entries since the scheduler settled them last.
DAYS_TO_SETTLE: Final = """
    SELECT d.day - date '1970-01-01', d.through::text, CASE WHEN s.finished THEN s.through::text END
    FROM (SELECT day, jsonb_object_agg(partition_id, last_seq) AS through FROM book.days GROUP BY day) d
    LEFT JOIN book.settled_days s USING (day)
    WHERE d.day <= date '1970-01-01' + %s AND (s.finished AND s.through = d.through) IS NOT TRUE
    ORDER BY d.day
"""

log = logging.getLogger("accrual.book")


class DueDay(msgspec.Struct, frozen=True):
    """A day to be settled: ``through`` is what to note afterwards, ``since`` what was noted the last time, if ever."""

    day: int
    through: str
    since: str | None


def days_to_settle(connection: Connection, client: redis.Redis, rulebook: Rulebook, today: int) -> list[DueDay]:
    """Return the days that are to be settled now, or again.

    A day is due ``settlement_days`` after it, once the book of every partition has come to a later day, or to the end
    of its stream. What comes later still makes it due again.
    """
    last = today - rulebook.settlement_days
    for name, through in connection.execute("SELECT name, through FROM book.partitions").fetchall():
        position = parse_stream_id(through)
        if position < _end_of_stream(client, Keys(name)):
            last = min(last, rulebook.calendar.day(position[0]) - 1)
    return [DueDay(*row) for row in connection.execute(DAYS_TO_SETTLE, (last,)).fetchall()]


def _end_of_stream(client: redis.Redis, keys: Keys) -> tuple[int, int]:
    if not client.exists(keys.events):
        return 0, 0
    information: Any = client.xinfo_stream(keys.events)
    return parse_stream_id(information["last-generated-id"])


class Scheduler:
    """Does the jobs by ``rulebook``. ``now_ms`` is the time by which a business day is today's."""

    def __init__(
        self, settings: Settings, rulebook: Rulebook, *, now_ms: Callable[[], int] = lambda: int(time.time() * 1000)
    ) -> None:
        self._settings = settings
        self._rulebook = rulebook
        self._now_ms = now_ms

    def run(self, stopping: threading.Event) -> None:
        """Do each job at its interval until ``stopping`` is set; a server or database that is away is waited for.

        Raises what waiting cannot mend; then ``stopping`` is set too, so that the other lanes end.
        """

        def work(lane: int) -> None:
            try:
                longest_pause_s = self._settings.backoff_limit_ms / 1000
                run_again(functools.partial(self._work, lane, stopping), stopping, longest_pause_s=longest_pause_s)
            except BaseException:
                stopping.set()
                raise

        with ThreadPoolExecutor(len(LANES), "jobs") as threads:
            ended = [threads.submit(work, lane) for lane in range(len(LANES))]
        for lane in ended:
            lane.result()

    def dry_run(self, stopping: threading.Event) -> Iterator[Report]:
        """Say what each job would do now, beside whoever is at it; what one would leave to another is not seen."""
        with self._opened(stopping, dry_run=True) as jobs:
            for name in itertools.chain(*LANES):
                if not stopping.is_set():
                    yield from jobs.run(name)

    def run_once(self, stopping: threading.Event) -> Iterator[Report]:
        """Do each job once, when nobody else is at it any more, and say what each of them did."""
        for lane, names in enumerate(LANES):
            with self._leading(lane, stopping) as jobs:
                for name in names:
                    if not stopping.is_set():
                        yield from jobs.run(name)

    def _work(self, lane: int, stopping: threading.Event) -> None:
        with self._leading(lane, stopping) as jobs:
            due_s = dict.fromkeys(LANES[lane], time.monotonic())
            while not stopping.is_set():
                for name in [name for name, at_s in due_s.items() if at_s <= time.monotonic()]:
                    _log(jobs.run(name))
                    due_s[name] = time.monotonic() + getattr(self._settings, f"{name}_interval_s")
                stopping.wait(max(0.0, min(due_s.values()) - time.monotonic()))

    @contextmanager
    def _leading(self, lane: int, stopping: threading.Event) -> Iterator[_Jobs]:
        """Wait for our turn. It ends with the connection, however that comes to its end."""
        with self._opened(stopping) as jobs:
            if not _leads(jobs.connection, lane):
                log.info("another scheduler does %s; standing by", ", ".join(LANES[lane]))
                while not stopping.wait(STANDBY_S) and not _leads(jobs.connection, lane):
                    pass
            yield jobs

    @contextmanager
    def _opened(self, stopping: threading.Event, *, dry_run: bool = False) -> Iterator[_Jobs]:
        with (
            open_book(self._settings.database) as connection,
            StreamServer(self._settings.redis).client() as client,
        ):
            today = self._rulebook.calendar.day
            yield _Jobs(
                connection=connection,
                client=client,
                rulebook=self._rulebook,
                refund_wait_hours=self._settings.refund_wait_hours,
                stopping=stopping,
                today=lambda: today(self._now_ms()),
                dry_run=dry_run,
            )


def _leads(connection: Connection, lane: int) -> bool:
    return connection.execute("SELECT pg_try_advisory_lock(%s, %s)", (LEADER_LOCK, lane)).fetchone() == (True,)


class _Jobs(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs over open connections. Each stops between two chunks when it is told to."""

    connection: Connection
    client: redis.Redis
    rulebook: Rulebook
    refund_wait_hours: float
    stopping: threading.Event
    today: Callable[[], int]
    dry_run: bool

    def run(self, name: str) -> list[Report]:
        """Do the job ``name`` and return what it did: one report, for ``settle`` one for each day."""
        today = self.today()
        how: dict[str, Any] = {"dry_run": self.dry_run, "stopping": self.stopping}
        match name:
            case "slow":
                done = slow(self.connection, self.rulebook, refund_wait_hours=self.refund_wait_hours, **how)
                # A dry run looks at the first of them only.
                waiting = {"waiting": count_waiting(self.connection)} if self.dry_run else {}
                return [_report(name, done) | waiting]
            case "settle":
                return [_report(name, done, day) for day, done in self._settle(today, how)]
            case "remind":
                return [_report(name, remind(self.connection, self.rulebook, today, **how), today)]
            case "expire":
                return [_report(name, expire(self.connection, today, **how), today)]
            case _:
                return [{"job": name, "messages": self._send()}]

    def _settle(self, today: int, how: Mapping[str, Any]) -> Iterator[tuple[int, Done]]:
        for due in days_to_settle(self.connection, self.client, self.rulebook, today):
            if is_stopped(self.stopping):
                return
            done = settle(self.connection, self.rulebook, due.day, since=due.since, **how)
            if not self.dry_run and not is_stopped(self.stopping):
                self.connection.execute(
                    "UPDATE book.settled_days SET through = %s::jsonb WHERE day = %s::date",
                    (due.through, day_text(due.day)),
                )
            yield due.day, done

    def _send(self) -> int:
        if not self.dry_run:
            return send_outbox(self.connection, self.client, self.stopping)
        row = self.connection.execute("SELECT count(*) FROM book.outbox WHERE sent_at IS NULL").fetchone()
        return int((row or (0,))[0])


def _report(name: str, done: Done, day: int | None = None) -> Report:
    return {"job": name} | ({} if day is None else {"day": day_text(day)}) | msgspec.structs.asdict(done)


def _log(reports: list[Report]) -> None:
    """Say what was done, where anything was."""
    for report in reports:
        counts = {name: value for name, value in report.items() if name not in ("job", "day")}
        if any(counts.values()):
            words = ", ".join(f"{value} {name}" for name, value in counts.items())
            log.info("%s: %s", " ".join(str(report[name]) for name in ("job", "day") if name in report), words)
