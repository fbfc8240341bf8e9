"""The database: connections, migrations, and what is tried again."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
from psycopg import sql

from accrual.errors import BookError, UsageError

__all__ = ["Connection", "connect", "merge", "migrate", "open_book", "retried"]

Connection: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"
ResultT = TypeVar("ResultT")

OLDEST_VERSION: Final = 150000
MIGRATION_NAME: Final = re.compile(r"(\d{4})_\w+\.sql")
LOCK: Final = 0x6163_6372  # "accr": while one process migrates, others wait.
ATTEMPTS: Final = 8
FIRST_PAUSE_S: Final = 0.02

# Texts are copied in as UTF-8, dates are compared as texts, and who waits for a lock means to see what was done under
# it: none of these is for the server's configuration or the environment to say.
ENCODING: Final = "UTF8"
SETTINGS: Final = """
    SET timezone = 'UTC'; SET datestyle = 'ISO'; SET default_transaction_isolation = 'read committed'
"""

# Of a database whose machine has vanished nobody tells us. Unless the URL says otherwise, the system asks for a sign of
# life after so many seconds of silence, so often, so many times, and waits so many ms for what was sent to arrive.
ALIVE: Final = {"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}

# Two transactions met: one of them is told so and only has to come again.
PASSING: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure, psycopg.errors.LockNotAvailable)


def connect(url: str) -> Connection:
    """Return a connection to the database at ``url``, a transaction of its own for every statement outside a block.

    Raises ``UsageError`` for a URL that cannot be understood, ``BookError`` where the database does not let us in, is
    older than PostgreSQL 15, or has another encoding than UTF-8.
    """
    try:
        address = psycopg.conninfo.make_conninfo("", **(ALIVE | psycopg.conninfo.conninfo_to_dict(url)))
    except psycopg.ProgrammingError as error:
        raise UsageError(f"--database: {_without_password(_words(error), url)}") from None
    try:
        connection = psycopg.connect(
            address, autocommit=True, application_name="accrual", connect_timeout=10, client_encoding=ENCODING
        )
    except psycopg.OperationalError as error:
        raise BookError(f"the database: {_words(error)}") from error
    if connection.info.server_version < OLDEST_VERSION:
        found = connection.info.server_version // 10000
        connection.close()
        raise BookError(f"the database is PostgreSQL {found}, and the book needs 15 or newer")
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != ENCODING:
        connection.close()
        raise BookError(f"the database has the encoding {encoding}, and the book needs {ENCODING}")
    connection.execute(SETTINGS)
    return connection


@contextmanager
def open_book(url: str) -> Iterator[Connection]:
    """Open the book at ``url``, made or brought up to date first; an error of the database is a ``BookError``.

    A text that the database cannot be asked for, as it is no UTF-8, is a ``UsageError``.
    """
    with connect(url) as connection:
        try:
            migrate(connection)
            yield connection
        except psycopg.Error as error:
            raise BookError(f"the database: {_words(error)}") from error
        except UnicodeEncodeError as error:
            raise UsageError(f"{error.object!r} is not UTF-8") from None


def migrate(connection: Connection) -> list[str]:
    """Bring the schema up to date and return the names of the migrations applied.

    Each is applied in one transaction and recorded with its checksum. Raises ``BookError`` where one that was applied
    has another text here, or where the schema is newer than this program.
    """
    ours = _migrations()
    if _applied(connection) == {name: checksum for name, checksum, _ in ours}:
        return []
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        connection.execute("CREATE SCHEMA IF NOT EXISTS book")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS book.migrations (name text PRIMARY KEY, sha256 text NOT NULL, "
            "applied_at timestamptz NOT NULL DEFAULT now())"
        )
        applied = _applied(connection)
        _refuse_foreign(applied, {name: checksum for name, checksum, _ in ours})
        new = [migration for migration in ours if migration[0] not in applied]
        for name, checksum, text in new:
            connection.execute(sql.SQL(text))
            connection.execute("INSERT INTO book.migrations (name, sha256) VALUES (%s, %s)", (name, checksum))
    return [name for name, _, _ in new]


def retried(work: Callable[[], ResultT]) -> ResultT:
    """Do ``work``, one transaction, again where another transaction was in its way."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return work()
        except PASSING:
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    return work()


def merge(cursor: psycopg.Cursor[Any], statement: str, parameters: Mapping[str, object] | None = None) -> None:
    """Do a ``MERGE`` within a transaction: again where another one has added a row that it was about to add.

    It has waited for that one to end, so it finds the row then.
    """
    while True:
        try:
            with cursor.connection.transaction():
                cursor.execute(statement, parameters)
        except psycopg.errors.UniqueViolation:
            continue
        return


def _migrations() -> list[tuple[str, str, str]]:
    """Return the name, checksum and text of every migration, in order."""
    folder = importlib.resources.files("accrual.book").joinpath("migrations")
    found = sorted(
        (file for file in folder.iterdir() if MIGRATION_NAME.fullmatch(file.name)), key=lambda file: file.name
    )
    texts = [(file.name, file.read_text(encoding="utf-8")) for file in found]
    return [(name, hashlib.sha256(text.encode()).hexdigest(), text) for name, text in texts]


def _applied(connection: Connection) -> dict[str, str]:
    if connection.execute("SELECT to_regclass('book.migrations')").fetchone() == (None,):
        return {}
    return dict(connection.execute("SELECT name, sha256 FROM book.migrations").fetchall())


def _refuse_foreign(applied: dict[str, str], ours: dict[str, str]) -> None:
    for name, checksum in sorted(applied.items()):
        if name not in ours:
            raise BookError(f"the book was made by a newer program: this one does not know {name}")
        if checksum != ours[name]:
            raise BookError(f"the book was made with another {name} than this program has")


def _without_password(words: str, url: str) -> str:
    """Return what is said of ``url`` without what it quotes from before the host."""
    before = url.rpartition("@")[0]
    return re.sub(r'"([^"]*)"', lambda quoted: '"…"' if "@" in quoted[1] or quoted[1] in before else quoted[0], words)


def _words(error: psycopg.Error) -> str:
    return " ".join(str(error).split())
