"""The ledger into the book: entries per second, beside bare ``COPY`` of the same rows in the same run.

A real worker drains the standard workload, once; its ledger stays on the server. Then, in turn:

bare copy   **the ceiling**: the rows of the entries alone, made ready ahead, into a table without any index, in as many
            transactions: what PostgreSQL takes in at all, where nobody asks anything of it afterwards
plain       **the peer**: the same rows, made ready ahead, into one table with a primary key, an index of members and
            unique event ids, and balances by one upsert a transaction: the least of a book, done the plain way
ingest      ``accrual book --drain`` into an empty book: chain verified, position and digest in the same transaction,
            unique event ids, index of members, index of orders, balances up to date
settle      the pending points of the whole day become available, with a lot for each member

Both on one core (ingester and PostgreSQL share it), then on two. A run's time goes from the first read of the ledger to
the last commit. After each run the book has as many entries as the ledger, its accounts add up to zero, and what it has
pending, held and available is what the entries say.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, LiteralString

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
from bench.core import RULEBOOK
from bench.machine import SERVER_CORE, WORKER_CORE, file_system_of, pinned, yardstick_ms
from bench.report import Figure, table
from bench.running import PARTITION, Worker, put, server_in, workspace
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, Workload

__all__ = ["BookMeasured", "BookSettings", "measure_book", "new_book", "summary"]

# All else is as PostgreSQL has it: every commit is on the disk before it is answered.
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

    events: int = 2_000_000
    runs: int = 3
    members: int = 1_000_000
    seed: int = DEFAULT_SEED
    directory: Path | None = None

    @property
    def workload(self) -> Workload:
        """The standard workload."""
        return Workload(members=self.members, seed=self.seed)


class Run(msgspec.Struct, frozen=True):
    """One run; processor times are per entry."""

    entries_per_s: float
    last_entries_per_s: float
    """Over the last quarter of the ledger, when the indexes are as large as they get."""
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
        firsts = range(0, settings.events, CHUNK_EVENTS)
        put(server, (settings.workload.events(first, CHUNK_EVENTS) for first in firsts))
        with Worker(server.url, "--drain", anywhere=True) as worker:
            worker.end(ask=False)
        client = server.client(protocol=2, socket_timeout=None)
        shapes = []
        for name in SHAPES:
            shapes.append(_measure_shape(settings, client, name, tell))
            yardsticks.append(_yardstick())
    return BookMeasured(
        shapes=shapes,
        database_settings=DATABASE,
        yardstick_ms=Figure("yardstick", "ms", tuple(yardsticks)),
        file_system=file_system_of(Path(tempfile.gettempdir())),
    )


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


def _measure_shape(settings: BookSettings, client: redis.Redis, name: str, tell: Callable[[str], None]) -> Shape:
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:
        # A process stays on the core on which it was started.
        with pinned(SHAPES[name]):
            database = stack.enter_context(EmbeddedDatabase(DATABASE))
        for number in range(1, settings.runs + 1):
            with new_book(database, number) as connection, pinned(WORKER_CORE):
                runs.append(_run(connection, client))
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
        python=figure("python", "us", "python_us"),
        postgresql=figure("postgresql", "us", "postgresql_us"),
        log=figure("write-ahead log", "bytes", "log_bytes"),
        disk=figure("on disk", "bytes", "disk_bytes"),
        settle=figure("settle", "members/s", "settled_members_per_s"),
    )


def _run(connection: Connection, client: redis.Redis) -> Run:
    """Copy, ingest, settle, in an empty book, and check what it came to."""
    bare = _bare_copy(connection, client)
    plain = _plain_book(connection, client)
    run = _ingest(connection, client)
    entries, members = _check(connection, client)
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


def _bare_copy(connection: Connection, client: redis.Redis) -> float:
    """Copy the rows of all entries into a table without indexes, and return the rows per second."""
    with _plain_table(connection):
        seconds = 0.0
        for group in _groups(client):
            started = time.perf_counter()
            with connection.cursor() as cursor:
                copy_rows(cursor, "plain", ENTRY_COLUMNS, group.entries)
            seconds += time.perf_counter() - started
        return _rows(connection) / seconds


def _plain_book(connection: Connection, client: redis.Redis) -> float:
    """Copy the same rows into a table with indexes, keep balances beside it, and return the rows per second."""
    with _plain_table(connection):
        for statement in PLAIN_TABLE:
            connection.execute(statement)
        seconds = 0.0
        for group in _groups(client):
            started = time.perf_counter()
            with connection.transaction(), connection.cursor() as cursor:
                copy_rows(cursor, "plain", ENTRY_COLUMNS, group.entries)
                copy_rows(cursor, "plain_raised", BALANCE_COLUMNS, group.balances)
                cursor.execute(PLAIN_RAISE)
            seconds += time.perf_counter() - started
        rate = _rows(connection) / seconds
        connection.execute("DROP TABLE plain_balances, plain_raised")
        return rate


@contextlib.contextmanager
def _plain_table(connection: Connection) -> Iterator[None]:
    columns = sql.SQL(", ").join(map(sql.Identifier, ENTRY_COLUMNS))
    connection.execute(sql.SQL("CREATE TABLE plain AS SELECT {} FROM book.entries WITH NO DATA").format(columns))
    yield
    connection.execute("DROP TABLE plain")
    connection.execute("CHECKPOINT")


def _rows(connection: Connection) -> float:
    row: Any = connection.execute("SELECT count(*) FROM plain").fetchone()
    return float(row[0])


def _groups(client: redis.Redis) -> Iterator[Group]:
    """Yield the rows of a transaction at a time."""
    chain = Chain(START)
    batches, links, first_seq = [], [], chain.link.next_seq
    for batch in LedgerReader(client, PARTITION).batches(chain=chain):
        batches.append(batch)
        links.append(chain.link)
        if chain.link.next_seq - first_seq >= GROUP_ENTRIES:
            yield group_of(batches, links, {}, 1)
            batches, links, first_seq = [], [], chain.link.next_seq
    yield group_of(batches, links, {}, 1)


def _ingest(connection: Connection, client: redis.Redis) -> Run:
    """Book the whole ledger."""
    with Follower(connection, client, PARTITION) as follower:
        log_before = _log_position(connection)
        python_before_s, postgresql_before_s = time.process_time(), _processor_s(connection.info.backend_pid)
        marks = [(time.perf_counter(), follower.book.link.next_seq)]
        while follower.step():
            marks.append((time.perf_counter(), follower.book.link.next_seq))
        entries = marks[-1][1] - marks[0][1]
        python_s = time.process_time() - python_before_s
        postgresql_s = _processor_s(connection.info.backend_pid) - postgresql_before_s
    return Run(
        entries_per_s=_rate(marks),
        last_entries_per_s=_rate(marks[-max(2, len(marks) // LAST_SHARE) :]),
        python_us=python_s / entries * MICROSECONDS,
        postgresql_us=postgresql_s / entries * MICROSECONDS,
        log_bytes=(_log_position(connection) - log_before) / entries,
        disk_bytes=_table_bytes(connection) / entries,
    )


def _rate(marks: Sequence[tuple[float, int]]) -> float:
    (start_s, first), (end_s, last) = marks[0], marks[-1]
    return (last - first) / (end_s - start_s)


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


def _check(connection: Connection, client: redis.Redis) -> tuple[int, int]:
    """Check the book against the ledger and itself; return its entries and members. Raises ``RuntimeError``."""
    last = LedgerReader(client, PARTITION).last_batch()
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
