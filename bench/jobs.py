"""The large jobs of the book: a day of a million members settled, and a million lots expired, beside who else is there.

A real worker decides an event worth 50 points of every member; its ledger is booked once, and every piece below starts
on a copy of that book. Beside each of them a *reader* asks for the balance of some member a hundred times a second, and
an *ingester* posts a batch of a hundred entries of the next day ten times a second, both timed from when they were due:

alone              the reader and the ingester, and no job: **the floor** of what they notice
settle, expire     ``accrual settle`` and ``accrual expire`` as processes of their own
one transaction    **the peer**: the same rows written by plain statements of one transaction, the way it is done first

What the job has changed is compared with what the peer has.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, LiteralString, Self

import msgspec
import numpy as np
import redis
from psycopg import sql

from accrual.book import connect, open_book
from accrual.book.ingest import Book
from accrual.book.rows import Group, group_of
from accrual.embedded import EmbeddedDatabase
from accrual.ledger import Chain, LedgerReader
from bench.book import DATABASE
from bench.core import RULEBOOK
from bench.machine import ROOT, WORKER_CORE, file_system_of, pinned, yardstick_ms
from bench.report import Figure, table
from bench.running import PARTITION, Worker, put, put_census, scattered_census, server_in, workspace
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, KINDS, ORDER, SCATTER, Events, Workload

__all__ = ["JobsMeasured", "JobsSettings", "measure_jobs", "summary"]

EVENT_KIND: Final = KINDS.index("group_opened")
EVENT_POINTS: Final = 50
DAY: Final = "2026-11-15"
EXPIRY: Final = "2027-11-15"
DAY_MS: Final = 86_400_000

FILL_ENTRIES: Final = 65_536
INGEST_ENTRIES: Final = 100
INGEST_INTERVAL_S: Final = 0.1
READ_INTERVAL_S: Final = 0.01

COMMAND: Final = (sys.executable, "-m", "accrual.cli")
FILLED: Final = "filled"
MIB: Final = 1 << 20

# The members that a reader asks for, and that the jobs take in another order.
READ: Final = "SELECT available, held, pending FROM book.balances WHERE member = %s"

# What a job writes, by plain statements: they take the place of all its transactions. Members are locked in the order
# in which the ingester does it; without that one of the two ends in a deadlock.
LOCK_ALL: Final = "SELECT count(*) FROM (SELECT FROM book.balances ORDER BY member FOR UPDATE) b"
PEER_SETTLE: Final[tuple[LiteralString, ...]] = (
    LOCK_ALL,
    """
    INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, lot_days,
        lot_points, lot_expires_on)
    SELECT nextval('book.numbers'), %(action)s, 'settle', member, 'pending', 'available', points, %(day)s::date,
        ARRAY[%(day)s::date], ARRAY[points], %(expiry)s::date
    FROM (
        SELECT member, sum(points)::bigint AS points FROM book.entries
        WHERE day = %(day)s::date AND outcome = 'granted' AND points > 0 GROUP BY member
    ) p
    """,
    """
    INSERT INTO book.lots (member, day, expires_on, points)
    SELECT member, day, lot_expires_on, points FROM book.postings WHERE action = %(action)s
    """,
    """
    UPDATE book.balances b SET pending = pending - p.points, available = available + p.points
    FROM book.postings p WHERE p.action = %(action)s AND p.member = b.member
    """,
)
PEER_EXPIRE: Final[tuple[LiteralString, ...]] = (
    LOCK_ALL,
    """
    INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, lot_days,
        lot_points)
    SELECT nextval('book.numbers'), %(action)s, 'expire', member, 'available', 'expired', points, day, ARRAY[day],
        ARRAY[points]
    FROM book.lots WHERE expires_on <= %(expiry)s::date AND points > 0
    """,
    "UPDATE book.lots SET points = 0 WHERE expires_on <= %(expiry)s::date AND points > 0",
    """
    UPDATE book.balances b SET available = available - p.points
    FROM book.postings p WHERE p.action = %(action)s AND p.member = b.member
    """,
)

# What a job has done, but for the numbers of postings: the ingester touches other days alone.
RESULT: Final = """
    SELECT (SELECT count(*) FROM book.postings), (SELECT sum(points) FROM book.postings),
        (SELECT sum(points) FROM book.lots), (SELECT count(*) FROM book.lots WHERE points > 0),
        (SELECT sum(available) FROM book.balances), (SELECT sum(points) FROM book.accounts),
        (SELECT bit_xor(hashtextextended(row(member, kind, points, day, lot_days, lot_points)::text, 0))
            FROM book.postings),
        (SELECT bit_xor(hashtextextended(row(member, day, expires_on, points)::text, 0)) FROM book.lots)
"""


@dataclass(frozen=True)
class JobsSettings:
    """What is measured."""

    members: int = 1_000_000
    runs: int = 3
    alone_s: float = 10.0
    beside_events: int = 40 * CHUNK_EVENTS
    """Events of the next day, which the ingester posts until there are no more; whole chunks of 8192."""
    seed: int = DEFAULT_SEED
    directory: Path | None = None

    @property
    def workload(self) -> Workload:
        """The members and the events beside."""
        return Workload(members=self.members, seed=self.seed)


class Spread(msgspec.Struct, frozen=True):
    """A quantity that varies, by run."""

    median: Figure
    p99: Figure
    maximum: Figure


class Held(msgspec.Struct, frozen=True):
    """The resident memory of a process, by run: the median of its first and of its last quarter, and the most."""

    first_quarter: Figure
    last_quarter: Figure
    peak: Figure


class Piece(msgspec.Struct, frozen=True):
    """What one piece of work has shown; what does not apply to it is ``None``."""

    name: str
    reads: Spread | None
    ingests: Spread | None
    """``None`` where the ingester had posted all it had before the piece began, in some run."""
    rate: Figure | None = None
    statement_s: list[Figure] | None = None
    """How long each statement of the peer took."""
    transactions: Spread | None = None
    process: Held | None = None
    backend: Held | None = None
    """PostgreSQL's process for the job, without what it shares with others."""


class JobsMeasured(msgspec.Struct, frozen=True):
    """All of it."""

    members: int
    points: int
    pieces: list[Piece]
    database_settings: dict[str, str]
    yardstick_ms: Figure
    file_system: str


@dataclass
class _Sample:
    """One run of one piece."""

    name: str
    read_s: list[float] = field(default_factory=list)
    ingest_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    statement_s: list[float] = field(default_factory=list)
    transaction_s: list[float] = field(default_factory=list)
    process_bytes: list[int] = field(default_factory=list)
    backend_bytes: list[int] = field(default_factory=list)


def measure_jobs(settings: JobsSettings, tell: Callable[[str], None] = print) -> JobsMeasured:
    """Book a day of all members, then settle and expire it over and over; ``tell`` hears what is going on."""
    yardsticks = [_yardstick()]
    samples: list[_Sample] = []
    with workspace(settings.directory) as directory, EmbeddedDatabase(DATABASE) as database:
        tell(f"jobs: a book of {settings.members:,} members")
        beside = _fill(settings, directory, database)
        for number in range(1, settings.runs + 1):
            run = _run(settings, database, beside)
            yardsticks.append(_yardstick())
            rates = ", ".join(f"{one.name} {one.seconds:.1f} s" for one in run if one.seconds)
            tell(f"jobs: run {number} of {settings.runs}: {rates}")
            samples += run
    names = list(dict.fromkeys(sample.name for sample in samples))
    return JobsMeasured(
        members=settings.members,
        points=settings.members * EVENT_POINTS,
        pieces=[_piece(settings, [one for one in samples if one.name == name]) for name in names],
        database_settings=DATABASE,
        yardstick_ms=Figure("yardstick", "ms", tuple(yardsticks)),
        file_system=file_system_of(Path(tempfile.gettempdir())),
    )


def _yardstick() -> float:
    with pinned(WORKER_CORE):
        return yardstick_ms()


# ------------------------------------------------------------------------------------------------ the book


def _fill(settings: JobsSettings, directory: Path, database: EmbeddedDatabase) -> list[Group]:
    """Make the book that every piece starts with; return what the ingester posts beside them, batch by batch."""
    _create(database, FILLED)
    with server_in(directory) as server:
        client = server.client(protocol=2, socket_timeout=None)
        put_census(server, _one_each(settings.workload))
        _decide(server.url)
        with open_book(database.url_of(FILLED)) as connection:
            book = Book(connection, PARTITION)
            for group in _groups(client, book, FILL_ENTRIES):
                book.post(group)
            connection.execute("VACUUM ANALYZE")
            put(server, _next_day(settings))
            _decide(server.url, "--batch-entries", INGEST_ENTRIES)
            return list(_groups(client, book, 1))


def _decide(url: str, *flags: str | int) -> None:
    with Worker(url, "--drain", *flags, anywhere=True) as worker:
        worker.end(ask=False)


def _one_each(workload: Workload) -> Iterator[Events]:
    """Yield an event of every member."""
    for chunk in scattered_census(workload):
        yield Events(**{**chunk._asdict(), "kind": np.full_like(chunk.kind, EVENT_KIND)})


def _next_day(settings: JobsSettings) -> Iterator[Events]:
    for first in range(0, settings.beside_events, CHUNK_EVENTS):
        chunk = settings.workload.events(first, CHUNK_EVENTS)
        kind = np.full_like(chunk.kind, ORDER)
        later_ms = chunk.arrival_ms + DAY_MS
        yield Events(**{**chunk._asdict(), "kind": kind, "arrival_ms": later_ms, "ts_ms": later_ms})


def _groups(client: redis.Redis, book: Book, entries: int) -> Iterator[Group]:
    """Yield the rows of the ledger behind ``book``, at least so many entries a transaction."""
    chain = Chain(book.link)
    batches, links, first_seq = [], [], chain.link.next_seq
    for batch in LedgerReader(client, PARTITION).batches(chain=chain):
        batches.append(batch)
        links.append(chain.link)
        if chain.link.next_seq - first_seq >= entries:
            yield group_of(batches, links, {}, book.partition_id)
            batches, links, first_seq = [], [], chain.link.next_seq
    if batches:
        yield group_of(batches, links, {}, book.partition_id)


def _create(database: EmbeddedDatabase, name: str, *, template: str = "template0") -> None:
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    with connect(database.url) as outside:
        outside.execute(create)
        outside.execute("CHECKPOINT")


@contextlib.contextmanager
def _copy(database: EmbeddedDatabase, name: str) -> Iterator[str]:
    """Give the URL of a copy of the filled book, and throw it away afterwards."""
    _create(database, name, template=FILLED)
    yield database.url_of(name)
    with connect(database.url) as outside:
        outside.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


# ----------------------------------------------------------------------------------------------- the pieces


def _run(settings: JobsSettings, database: EmbeddedDatabase, beside: Sequence[Group]) -> list[_Sample]:
    """Do every piece once. Raises ``RuntimeError`` where job and peer come to different books."""
    pieces: list[_Sample] = []
    results: dict[str, list[Any]] = {}
    with _copy(database, "jobs") as url, _Neighbours(url, settings, beside) as neighbours:
        with neighbours.beside("warm"):
            time.sleep(settings.alone_s / 10)
        with neighbours.beside("alone") as alone:
            time.sleep(settings.alone_s)
        pieces.append(alone)
        for job, day in (("settle", DAY), ("expire", EXPIRY)):
            pieces.append(_job(url, neighbours, job, day))
            results.setdefault("jobs", []).append(_result(url))
    with _copy(database, "peer") as url, _Neighbours(url, settings, beside) as neighbours:
        for job, statements in (("settle", PEER_SETTLE), ("expire", PEER_EXPIRE)):
            pieces.append(_peer(url, neighbours, f"{job}, one transaction", statements))
            results.setdefault("peer", []).append(_result(url))
    settled, expired = results["jobs"]
    points = settings.members * EVENT_POINTS
    right = (settings.members, points, points, settings.members, points, 0), (2 * points, 0, 0)
    if results["jobs"] != results["peer"] or (settled[:6], (expired[1], expired[2], expired[4])) != right:
        raise RuntimeError(f"the jobs came to {results['jobs']}, the peer to {results['peer']}")
    order = ("alone", "settle", "settle, one transaction", "expire", "expire, one transaction")
    return sorted(pieces, key=lambda piece: order.index(piece.name))


def _result(url: str) -> Any:
    """Return what the book came to, and make ready for what comes next as the nights between would."""
    with connect(url) as connection:
        row = connection.execute(RESULT).fetchone()
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
    return row


def _job(url: str, neighbours: _Neighbours, job: str, day: str) -> _Sample:
    """Run a command of ours and listen to what it logs of each transaction."""
    words = [*COMMAND, job, "--rulebook", str(RULEBOOK), "--database", url, "--day", day, "--log-level", "debug"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCRUAL_", "PYTHONSAFEPATH"))}
    with neighbours.beside(job) as sample:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=ROOT, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stderr is not None
            lines = []
            backend = 0
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r" transaction keys=\d+ seconds=([0-9.]+)", line):
                    backend = backend or neighbours.other_backend()
                    sample.transaction_s.append(float(found[1]))
                    sample.process_bytes.append(_resident(process.pid, "VmRSS"))
                    sample.backend_bytes.append(_resident(backend, "RssAnon"))
        sample.seconds = time.perf_counter() - started_s
    if process.returncode:
        raise RuntimeError(f"accrual {job} failed:\n{''.join(lines)}")
    return sample


def _peer(url: str, neighbours: _Neighbours, name: str, statements: Iterable[LiteralString]) -> _Sample:
    parameters = {"day": DAY, "expiry": EXPIRY}
    with connect(url) as connection, neighbours.beside(name) as sample:
        started_s = time.perf_counter()
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute("INSERT INTO book.actions (kind, by) VALUES ('peer', 'bench') RETURNING action")
            (action,) = cursor.fetchone() or (0,)
            for statement in statements:
                statement_started_s = time.perf_counter()
                cursor.execute(statement, {**parameters, "action": action})
                sample.statement_s.append(time.perf_counter() - statement_started_s)
        sample.seconds = time.perf_counter() - started_s
        sample.transaction_s.append(sample.seconds)
    return sample


def _resident(pid: int, name: str) -> int:
    """Return a size from the status of a process, or 0 where it has ended meanwhile."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class _Neighbours:
    """A reader and an ingester, at work while somebody else is; each has a connection of its own."""

    def __init__(self, url: str, settings: JobsSettings, groups: Iterable[Group]) -> None:
        self._reading = connect(url)
        self._posting = connect(url)
        self._book = Book(self._posting, PARTITION)
        self._groups = iter(groups)
        self._members = settings.members
        self._read = 0
        self._ended_s = float("inf")
        self._ended = threading.Event()

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[_Sample]:
        """Work as long as the block lasts, and note in the sample how long everything took that fell due in it."""
        sample = _Sample(name)
        self._ended_s = float("inf")
        self._ended.clear()
        with ThreadPoolExecutor(2, "neighbours") as threads:
            reads = threads.submit(self._paced, READ_INTERVAL_S, self._read_one)
            ingests = threads.submit(self._paced, INGEST_INTERVAL_S, self._post_one)
            try:
                yield sample
            finally:
                self._ended_s = time.perf_counter()
                self._ended.set()
        sample.read_s, sample.ingest_s = reads.result(), ingests.result()

    def other_backend(self) -> int:
        """Return the number of the PostgreSQL process that is connected to this database and not ours."""
        with connect(self._reading.info.dsn) as asking:
            ours = [one.info.backend_pid for one in (asking, self._reading, self._posting)]
            row = asking.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
                "AND backend_type = 'client backend' AND pid <> ALL(%s)",
                (ours,),
            ).fetchone()
        return int(row[0]) if row else 0

    def _paced(self, interval_s: float, work: Callable[[], bool]) -> list[float]:
        """Do ``work`` at every interval until the end, and return how long after it was due each was done.

        What fell due while one took too long is done late, but done: a stall counts for all who would have met it.
        """
        due_s = time.perf_counter()
        took_s: list[float] = []
        while due_s < self._ended_s and work():
            took_s.append(time.perf_counter() - due_s)
            due_s += interval_s
            self._ended.wait(max(0.0, due_s - time.perf_counter()))
        return took_s

    def _read_one(self) -> bool:
        self._read += SCATTER
        member = f"m{self._read % self._members:08d}"
        return self._reading.execute(READ, (member,)).fetchone() is not None

    def _post_one(self) -> bool:
        group = next(self._groups, None)
        if group is not None:
            self._book.post(group)
        return group is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reading.close()
        self._posting.close()


# --------------------------------------------------------------------------------------------- the figures


def _piece(settings: JobsSettings, samples: Sequence[_Sample]) -> Piece:
    name = samples[0].name

    def spread(what: str, field_name: str) -> Spread | None:
        runs = [np.array(getattr(sample, field_name)) * 1000 for sample in samples]
        if not all(map(len, runs)):
            return None
        points = {"median": 50, "p99": 99, "maximum": 100}
        return Spread(
            **{
                word: Figure(f"{name}: {what}, {word}", "ms", tuple(float(np.percentile(run, point)) for run in runs))
                for word, point in points.items()
            }
        )

    def held(what: str, field_name: str) -> Held:
        runs = [np.array(getattr(sample, field_name)) / MIB for sample in samples]
        quarters = [max(1, len(run) // 4) for run in runs]

        def figure(word: str, values: Iterable[float]) -> Figure:
            return Figure(f"{name}: {what}, {word}", "MiB", tuple(map(float, values)))

        return Held(
            first_quarter=figure("first quarter", (np.median(run[:n]) for run, n in zip(runs, quarters, strict=True))),
            last_quarter=figure("last quarter", (np.median(run[-n:]) for run, n in zip(runs, quarters, strict=True))),
            peak=figure("peak", (run.max() for run in runs)),
        )

    reads, ingests = spread("balance query", "read_s"), spread("ingest", "ingest_s")
    if name == "alone":
        return Piece(name, reads, ingests)
    rate = Figure(f"{name}: rate", "members/s", tuple(settings.members / sample.seconds for sample in samples))
    statements = [
        Figure(f"{name}: statement {number}", "s", tuple(seconds))
        for number, seconds in enumerate(zip(*(sample.statement_s for sample in samples), strict=True), 1)
    ]
    transactions = spread("transaction", "transaction_s")
    if statements:
        return Piece(name, reads, ingests, rate, statements, transactions)
    process, backend = held("process", "process_bytes"), held("backend", "backend_bytes")
    return Piece(name, reads, ingests, rate, None, transactions, process, backend)


def summary(measured: JobsMeasured) -> str:
    """Return the table: a column for each piece."""
    rates = {piece.name: piece.rate for piece in measured.pieces if piece.rate is not None}
    rows = [
        ["members/s", *(_number(piece.rate) for piece in measured.pieces)],
        ["noise", *(f"±{piece.rate.noise:.0%}" if piece.rate else "" for piece in measured.pieces)],
        ["of one transaction", *(_ratio(piece.name, rates) for piece in measured.pieces)],
        ["transaction", *(_spread(piece.transactions) for piece in measured.pieces)],
        ["process", *(_held(piece.process) for piece in measured.pieces)],
        ["PostgreSQL's process", *(_held(piece.backend) for piece in measured.pieces)],
        ["balance query beside", *(_spread(piece.reads) for piece in measured.pieces)],
        [f"ingest of {INGEST_ENTRIES} beside", *(_spread(piece.ingests) for piece in measured.pieces)],
    ]
    stated = ", ".join(f"{name} = {value}" for name, value in measured.database_settings.items())
    head = f"a day of {measured.members:,} members and {measured.points:,} points ({stated})"
    units = "times: median / 99th percentile / longest, ms; memory: first quarter / last quarter / most, MiB"
    return f"{head}\n{units}\n\n{table(['jobs', *(piece.name for piece in measured.pieces)], rows)}"


def _number(figure: Figure | None) -> str:
    return f"{figure.median:,.0f}" if figure else ""


def _ratio(name: str, rates: dict[str, Figure]) -> str:
    peer = rates.get(f"{name}, one transaction")
    return f"{rates[name].ratio_to(peer):.2f}" if peer else ""


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return " / ".join(f"{figure.median:,.1f}" for figure in (spread.median, spread.p99, spread.maximum))


def _held(held: Held | None) -> str:
    if held is None:
        return ""
    return " / ".join(f"{figure.median:.0f}" for figure in (held.first_quarter, held.last_quarter, held.peak))
