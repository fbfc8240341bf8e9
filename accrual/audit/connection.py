"""Connections of the audit: read-only, and all of them looking at the same moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import sql

from accrual.book.database import Connection, connect

__all__ = ["first_connection", "same_moment"]

BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"


@contextmanager
def first_connection(url: str) -> Iterator[tuple[Connection, str]]:
    """Open the connection whose moment all others share; give it and the name of the moment."""
    with connect(url) as connection:
        connection.execute(BEGIN)
        (snapshot,) = connection.execute("SELECT pg_export_snapshot()").fetchone() or ("",)
        yield connection, snapshot
        connection.execute("ROLLBACK")


@contextmanager
def same_moment(url: str, snapshot: str) -> Iterator[Connection]:
    """Open another connection that sees the moment ``snapshot``, while the first one is open."""
    with connect(url) as connection:
        connection.execute(BEGIN)
        connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        yield connection
        connection.execute("ROLLBACK")
