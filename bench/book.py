"""The ledger into the book: entries per second, beside bare ``COPY`` of the same rows in the same run.

A real worker drains a morning in which every member comes once, and then the standard workload; its ledger stays on the
server. Then, in turn, each into an empty database:

bare copy   **the ceiling**: the rows of the entries alone, made ready ahead, into a table without any index, in as many
            transactions: what PostgreSQL takes in at all, where nobody asks anything of it afterwards
plain       **the peer**: the same rows, made ready ahead, into one table with a primary key, an index of members and
            unique event ids, and balances by one upsert a transaction: the least of a book, done the plain way
ingest      ``accrual book --drain``: chain verified, position and digest in the same transaction, unique event ids,
            index of members, index of orders, balances up to date
settle      the pending points of the whole day become available, with a lot for each member

What counts is the workload behind the morning, whose members plain and ingest know, as a book does on any day but its
first; the morning, where each member is new, is a row of its own. All on one core (ingester and PostgreSQL share it),
then on two. A run's time goes from a commit to the last one. After each run the book has as many entries as the ledger,
its accounts add up to zero, and what it has pending, held and available is what the entries say.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, LiteralString, NamedTuple, Self

import msgspec
import redis
from psycopg import sql

from accrual.book import Connection, open_book, settle
from accrual.book.follow import GROUP_ENTRIES, Follower
from accrual.book.ingest import copy_rows
from accrual.book.rows import BALANCE_COLUMNS, ENTRY_COLUMNS, Group, group_of
from accrual.embedded import EmbeddedDatabase
from accrual.ledger import START, Chain, LedgerReader
from accrual.rulebook import load
from accrual.stream import Keys, checkpoint_of
from bench.core import RULEBOOK
from bench.machine import SERVER_CORE, WORKER_CORE, file_system_of, pinned, yardstick_ms
from bench.report import Figure, table
from bench.running import PARTITION, Worker, put, put_census, scattered_census, server_in, workspace
from bench.workload import CENSUS_FIRST_NUMBER, CHUNK_EVENTS, DEFAULT_SEED, Events, Workload

__all__ = ["BookMeasured", "BookSettings", "measure_book", "new_book", "summary"]

# All else is as PostgreSQL has it.
DATABASE: Final = {"shared_buffers": "1GB", "max_wal_size": "8GB"}
SHAPES: Final = {"one core": WORKER_CORE, "two cores": SERVER_CORE}
LAST_SHARE: Final = 4
MICROSECONDS: Final = 1e6

PLAIN_TABLE: Final[tuple[LiteralString, ...]] = (
    "ALTER TABLE plain ADD PRIMARY KEY (partition_id, seq), ADD UNIQUE (event)",
    "CREATE INDEX ON plain (member)",
    'CREATE TABLE plain_balances (member text COLLATE "C" PRIMARY KEY, pending bigint NOT NULL, held bigint NOT NULL)',
    "CREATE TEMP TABLE plain_raised (LIKE plain_balances) ON COMMIT DELETE ROWS",
)
PLAIN_RAISE: Final = """
    INSERT INTO plain_balances AS b SELECT * FROM plain_raised ORDER BY member
    ON CONFLICT (member) DO UPDATE SET pending = b.pending + excluded.pending, held = b.held + excluded.held
"""


@dataclass(frozen=True)
class BookSettings:
    """What is measured. ``events`` are rounded up to whole chunks of 8192."""

    events: int = 1_000_000
    runs: int = 3
    members: int = 1_000_000
    seed: int = DEFAULT_SEED
    directory: Path | None = None

    @property
    def workload(self) -> Workload:
        """The standard workload."""
        return Workload(members=self.members, seed=self.seed)


@dataclass(frozen=True)
class Ledger:
    """A ledger on its server; from ``first_seq`` on it is of the workload that counts."""

    client: redis.Redis
    first_seq: int


class Run(msgspec.Struct, frozen=True):
    """One run; processor times are per entry."""

    entries_per_s: float
    last_entries_per_s: float
    """Over the last quarter of the workload, when the indexes are as large as they get."""
    new_entries_per_s: float
    """Over the morning before, of which each entry is a new member's."""
    python_us: float
    postgresql_us: float
    log_bytes: float
    """What an entry takes of PostgreSQL's write-ahead log."""
    disk_bytes: float
    """What it takes of the book's tables and indexes, identities and balances included."""
    bare_per_s: float = 0.0
    plain_per_s: float = 0.0
    settled_members_per_s: float = 0.0
    entries: int = 0
    members: int = 0


class Shape(msgspec.Struct, frozen=True):
    """What the runs on so many cores have shown."""

    name: str
    entries: int
    members: int
    bare: Figure
    plain: Figure
    ingest: Figure
    last: Figure
    new: Figure
    python: Figure
    postgresql: Figure
    log: Figure
    disk: Figure
    settle: Figure


class BookMeasured(msgspec.Struct, frozen=True):
    """All of it."""

    shapes: list[Shape]
    database_settings: dict[str, str]
    yardstick_ms: Figure
    file_system: str


def measure_book(settings: BookSettings, tell: Callable[[str], None] = print) -> BookMeasured:
    """Fill a ledger and book it, over and over; ``tell`` hears what is going on."""
    yardsticks = [_yardstick()]
    with _without_warnings(), workspace(settings.directory) as directory, server_in(directory) as server:
        tell(f"book: a ledger of {settings.events:,} events")
        client = server.client(protocol=2, socket_timeout=None)
        put_census(server, _morning(settings.workload))
        _decide(server.url)
        first_seq = checkpoint_of(client, Keys(PARTITION)).next_seq
        put(server, _day(settings))
        _decide(server.url)
        shapes = []
        for name in SHAPES:
            shapes.append(_measure_shape(settings, Ledger(client, first_seq), name, tell))
            yardsticks.append(_yardstick())
    return BookMeasured(
        shapes=shapes,
        database_settings=DATABASE,
        yardstick_ms=Figure("yardstick", "ms", tuple(yardsticks)),
        file_system=file_system_of(Path(tempfile.gettempdir())),
    )


def _morning(workload: Workload) -> Iterator[Events]:
    for chunk in scattered_census(workload):
        yield Events(**{**chunk._asdict(), "number": chunk.number - CENSUS_FIRST_NUMBER})


def _day(settings: BookSettings) -> Iterator[Events]:
    """Yield the workload, with ids behind those of the morning: ids grow with time."""
    for first in range(0, settings.events, CHUNK_EVENTS):
        chunk = settings.workload.events(first, CHUNK_EVENTS)
        yield Events(**{**chunk._asdict(), "number": chunk.number + CENSUS_FIRST_NUMBER})


def _decide(url: str) -> None:
    with Worker(url, "--drain", anywhere=True) as worker:
        worker.end(ask=False)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep the book from warning that the ledger is not kept on disk, which is meant to be so here."""
    log = logging.getLogger("accrual.book")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _yardstick() -> float:
    with pinned(WORKER_CORE):
        return yardstick_ms()


def _measure_shape(settings: BookSettings, ledger: Ledger, name: str, tell: Callable[[str], None]) -> Shape:
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:
        # A process stays on the core on which it was started.
        with pinned(SHAPES[name]):
            database = stack.enter_context(EmbeddedDatabase(DATABASE))
        for number in range(1, settings.runs + 1):
            with new_book(database, number) as connection, pinned(WORKER_CORE):
                runs.append(_run(connection, ledger))
            last = runs[-1]
            rates = f"{last.entries_per_s:,.0f} entries/s, bare {last.bare_per_s:,.0f}, plain {last.plain_per_s:,.0f}"
            tell(f"book, {name}: run {number} of {settings.runs}: {rates}")

    def figure(what: str, unit: str, field: str) -> Figure:
        return Figure(f"{name} {what}", unit, tuple(float(getattr(run, field)) for run in runs))

    return Shape(
        name=name,
        entries=runs[-1].entries,
        members=runs[-1].members,
        bare=figure("bare copy", "rows/s", "bare_per_s"),
        plain=figure("plain book", "rows/s", "plain_per_s"),
        ingest=figure("ingest", "entries/s", "entries_per_s"),
        last=figure("ingest of the last quarter", "entries/s", "last_entries_per_s"),
        new=figure("ingest of new members", "entries/s", "new_entries_per_s"),
        python=figure("python", "us", "python_us"),
        postgresql=figure("postgresql", "us", "postgresql_us"),
        log=figure("write-ahead log", "bytes", "log_bytes"),
        disk=figure("on disk", "bytes", "disk_bytes"),
        settle=figure("settle", "members/s", "settled_members_per_s"),
    )


def _run(connection: Connection, ledger: Ledger) -> Run:
    """Copy, ingest, settle, in an empty book, and check what it came to."""
    bare = _bare_copy(connection, ledger)
    plain = _plain_book(connection, ledger)
    run = _ingest(connection, ledger)
    entries, members = _check(connection, ledger)
    settled = _settle(connection)
    return msgspec.structs.replace(
        run, bare_per_s=bare, plain_per_s=plain, settled_members_per_s=settled, entries=entries, members=members
    )


@contextlib.contextmanager
def new_book(database: EmbeddedDatabase, number: int) -> Iterator[Connection]:
    """Give an empty book, and throw it away afterwards."""
    name = sql.Identifier(f"book_{number}")
    with open_book(database.url) as outside:
        outside.execute(sql.SQL("CREATE DATABASE {}").format(name))
        with open_book(database.url_of(f"book_{number}")) as connection:
            outside.execute("CHECKPOINT")
            yield connection
        outside.execute(sql.SQL("DROP DATABASE {}").format(name))
        outside.execute("CHECKPOINT")


def _bare_copy(connection: Connection, ledger: Ledger) -> float:
    """Copy the rows of the entries into a table without indexes, and return the rows per second."""
    with _plain_table(connection):
        seconds = 0.0
        for group, counts in _groups(ledger):
            if not counts:
                continue
            started = time.perf_counter()
            with connection.cursor() as cursor:
                copy_rows(cursor, "plain", ENTRY_COLUMNS, group.entries)
            seconds += time.perf_counter() - started
        return _rows(connection) / seconds


def _plain_book(connection: Connection, ledger: Ledger) -> float:
    """Copy the same rows into a table with indexes, keep balances beside it, and return the rows per second."""
    with _plain_table(connection):
        for statement in PLAIN_TABLE:
            connection.execute(statement)
        rows_before, seconds = 0, 0.0
        for group, counts in _groups(ledger):
            if counts and not rows_before:
                rows_before = _rows(connection)
            started = time.perf_counter()
            with connection.transaction(), connection.cursor() as cursor:
                copy_rows(cursor, "plain", ENTRY_COLUMNS, group.entries)
                copy_rows(cursor, "plain_raised", BALANCE_COLUMNS, group.balances)
                cursor.execute(PLAIN_RAISE)
            seconds += (time.perf_counter() - started) * counts
        rate = (_rows(connection) - rows_before) / seconds
        connection.execute("DROP TABLE plain_balances, plain_raised")
        return rate


@contextlib.contextmanager
def _plain_table(connection: Connection) -> Iterator[None]:
    columns = sql.SQL(", ").join(map(sql.Identifier, ENTRY_COLUMNS))
    connection.execute(sql.SQL("CREATE TABLE plain AS SELECT {} FROM book.entries WITH NO DATA").format(columns))
    # The ingester does not wait for its commits either.
    connection.execute("SET synchronous_commit = off")
    yield
    connection.execute("RESET synchronous_commit")
    connection.execute("DROP TABLE plain")
    connection.execute("CHECKPOINT")


def _rows(connection: Connection) -> int:
    row: Any = connection.execute("SELECT count(*) FROM plain").fetchone()
    return int(row[0])


def _groups(ledger: Ledger) -> Iterator[tuple[Group, bool]]:
    """Yield the rows of a transaction at a time, and whether they count."""
    chain = Chain(START)
    batches, links, first_seq = [], [], chain.link.next_seq
    for batch in LedgerReader(ledger.client, PARTITION).batches(chain=chain):
        batches.append(batch)
        links.append(chain.link)
        if chain.link.next_seq - first_seq >= GROUP_ENTRIES or chain.link.next_seq == ledger.first_seq:
            yield group_of(batches, links, {}, 1), first_seq >= ledger.first_seq
            batches, links, first_seq = [], [], chain.link.next_seq
    yield group_of(batches, links, {}, 1), True


class Mark(NamedTuple):
    """Where the book is at a time, and what that took so far."""

    next_seq: int
    time_s: float
    python_s: float
    postgresql_s: float
    log_bytes: int

    @classmethod
    def of(cls, connection: Connection, next_seq: int) -> Self:
        """Return how it is now."""
        postgresql_s = _processor_s(connection.info.backend_pid)
        return cls(next_seq, time.perf_counter(), time.process_time(), postgresql_s, _log_position(connection))


def _ingest(connection: Connection, ledger: Ledger) -> Run:
    """Book the whole ledger."""
    with Follower(connection, ledger.client, PARTITION) as follower:
        marks = [Mark.of(connection, follower.book.link.next_seq)]
        while follower.step():
            marks.append(Mark.of(connection, follower.book.link.next_seq))
    counting = [mark for mark in marks if mark.next_seq >= ledger.first_seq]
    if len(counting) == 1:
        # So little that morning and workload share a transaction.
        counting = marks
    first, last = counting[0], counting[-1]
    entries = last.next_seq - first.next_seq
    return Run(
        entries_per_s=_rate(first, last),
        last_entries_per_s=_rate(counting[-max(2, len(counting) // LAST_SHARE)], last),
        new_entries_per_s=_rate(marks[0], first),
        python_us=(last.python_s - first.python_s) / entries * MICROSECONDS,
        postgresql_us=(last.postgresql_s - first.postgresql_s) / entries * MICROSECONDS,
        log_bytes=(last.log_bytes - first.log_bytes) / entries,
        disk_bytes=_table_bytes(connection) / (last.next_seq - 1),
    )


def _rate(first: Mark, last: Mark) -> float:
    return (last.next_seq - first.next_seq) / (last.time_s - first.time_s) if first is not last else 0.0


def _settle(connection: Connection) -> float:
    """Settle every day, and return the members per second."""
    rulebook = load(RULEBOOK)
    days = connection.execute("SELECT DISTINCT day - date '1970-01-01' FROM book.entries").fetchall()
    started = time.perf_counter()
    members = sum(settle(connection, rulebook, day).members for (day,) in days)
    seconds = time.perf_counter() - started
    if connection.execute("SELECT count(*) FROM book.balances WHERE pending > 0").fetchone() != (0,):
        raise RuntimeError("there are pending points after the settlement")
    return members / seconds


def _check(connection: Connection, ledger: Ledger) -> tuple[int, int]:
    """Check the book against the ledger and itself; return its entries and members. Raises ``RuntimeError``."""
    last = LedgerReader(ledger.client, PARTITION).last_batch()
    found: Any = connection.execute(
        """
        SELECT (SELECT batch FROM book.partitions),
            (SELECT count(*) FROM book.entries) + (SELECT count(*) FROM book.deferred),
            (SELECT sum(entries) FROM book.batches),
            (SELECT sum(points) FROM book.accounts), (SELECT sum(pending) FROM book.balances),
            (SELECT sum(points) FROM book.entries WHERE outcome = 'granted'), (SELECT count(*) FROM book.balances)
        """
    ).fetchone()
    batch, entries, counted, accounts, pending, granted, members = found
    if (batch, entries, accounts, pending) != (last, counted, 0, granted):
        raise RuntimeError(f"the book does not add up: {found}, of a ledger with {last} batches")
    return int(entries), int(members)


def _log_position(connection: Connection) -> int:
    row: Any = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()
    return int(row[0])


def _table_bytes(connection: Connection) -> int:
    row: Any = connection.execute(
        "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class "
        "WHERE relnamespace = 'book'::regnamespace AND relkind = 'r'"
    ).fetchone()
    return int(row[0])


def _processor_s(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(measured: BookMeasured) -> str:
    """Return the table."""
    rows = []
    for shape in measured.shapes:
        for what, figure, text in (
            ("bare copy", shape.bare, f"{shape.bare.median:,.0f} rows/s"),
            ("plain book", shape.plain, f"{shape.plain.median:,.0f} rows/s"),
            ("ingest", shape.ingest, f"{shape.ingest.median:,.0f} entries/s"),
            ("of its last quarter", shape.last, f"{shape.last.median:,.0f} entries/s"),
            ("of new members, before", shape.new, f"{shape.new.median:,.0f} entries/s"),
            ("ingester, processor", shape.python, f"{shape.python.median:.1f} µs an entry"),
            ("PostgreSQL, processor", shape.postgresql, f"{shape.postgresql.median:.1f} µs an entry"),
            ("write-ahead log", shape.log, f"{shape.log.median:,.0f} bytes an entry"),
            ("on disk", shape.disk, f"{shape.disk.median:,.0f} bytes an entry"),
            ("settle", shape.settle, f"{shape.settle.median:,.0f} members/s"),
        ):
            peers = (shape.bare, shape.plain) if figure.unit == "entries/s" else ()
            ratios = [f"{figure.ratio_to(peer):.2f}" for peer in peers] or ["", ""]
            rows.append([f"{shape.name}: {what}", text, f"±{figure.noise:.0%}", *ratios])
    last = measured.shapes[-1]
    head = f"{last.entries:,} entries of {last.members:,} members"
    stated = ", ".join(f"{name} = {value}" for name, value in measured.database_settings.items())
    return f"{head} ({stated})\n\n{table(['book', 'median', 'noise', 'of bare copy', 'of plain'], rows)}"
