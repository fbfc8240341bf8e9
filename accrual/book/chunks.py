"""Large jobs in small transactions: short locks, bounded memory, and a place to go on from after a crash."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, LiteralString, TypeAlias

import msgspec
import psycopg

from accrual.book.database import Connection, retried

__all__ = ["CHUNK_MEMBERS", "Done", "Key", "find_members", "in_chunks", "in_chunks_of_members", "is_stopped"]

CHUNK_MEMBERS: Final = 5000
REPORT_S: Final = 5.0

Key: TypeAlias = tuple[Any, ...]

# The members of a job, found in one pass: what a chunk costs must not grow with how many there are, whatever the
# database knows of its tables. They are written in their order, so that a chunk finds its own side by side.
CREATE_FOUND: Final = 'CREATE TEMP TABLE IF NOT EXISTS found_members (member text COLLATE "C" PRIMARY KEY)'
INSERT_FOUND: Final[LiteralString] = "INSERT INTO found_members SELECT member FROM ({}) found ORDER BY member"
CHOOSE_FOUND: Final = "SELECT member FROM found_members WHERE member > %s ORDER BY member LIMIT %s"

log = logging.getLogger("accrual.book")


class Done(msgspec.Struct):
    """What a job did: postings and their points, over so many members."""

    members: int = 0
    postings: int = 0
    points: int = 0

    def add(self, other: Done) -> None:
        """Count what ``other`` did as well."""
        self.members += other.members
        self.postings += other.postings
        self.points += other.points


def in_chunks(
    connection: Connection,
    job: str,
    choose: Callable[[psycopg.Cursor[Any], Key], Sequence[Key]],
    work: Callable[[psycopg.Cursor[Any], Sequence[Key]], Done],
    first: Key,
    *,
    members: int | None = None,
    dry_run: bool = False,
    stopping: threading.Event | None = None,
) -> Done:
    """Do ``work`` for the keys that ``choose`` gives after a key (at first ``first``), each chunk a transaction.

    Both take a cursor. A chunk that met another job is tried again. With ``dry_run`` every transaction is undone. Once
    ``stopping`` is set no further chunk is begun. ``members`` is how many there are, where that is known. How long each
    transaction took, and so held its locks, is in the log at level ``debug``.
    """
    total = Done()
    after = first
    reported_s = time.monotonic()
    while not is_stopped(stopping):
        keys, done = retried(functools.partial(_chunk, connection, job, choose, work, after, dry_run=dry_run))
        if not keys:
            break
        total.add(done)
        after = keys[-1]
        if time.monotonic() - reported_s >= REPORT_S:
            reported_s = time.monotonic()
            of = "" if members is None else f" of {members}"
            log.info("%s: %d%s members, %d postings, %d points", job, total.members, of, total.postings, total.points)
    return total


def find_members(connection: Connection, query: LiteralString, parameters: Mapping[str, object]) -> int:
    """Find the members that ``query`` selects, each once, for ``in_chunks_of_members``; return how many there are."""

    def find() -> int:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute(CREATE_FOUND)
            cursor.execute("TRUNCATE found_members")
            return cursor.execute(INSERT_FOUND.format(query), parameters).rowcount

    return retried(find)


def in_chunks_of_members(
    connection: Connection,
    job: str,
    work: Callable[[psycopg.Cursor[Any], Sequence[str]], Done],
    *,
    dry_run: bool = False,
    stopping: threading.Event | None = None,
) -> Done:
    """Do ``work`` for the members that were found, in their order, as ``in_chunks`` does."""

    def choose(cursor: psycopg.Cursor[Any], after: Key) -> list[Key]:
        cursor.execute(CHOOSE_FOUND, (after[0], CHUNK_MEMBERS))
        return cursor.fetchall()

    def of_members(cursor: psycopg.Cursor[Any], keys: Sequence[Key]) -> Done:
        return work(cursor, [member for (member,) in keys])

    (members,) = connection.execute("SELECT count(*) FROM found_members").fetchone() or (0,)
    return in_chunks(connection, job, choose, of_members, ("",), members=members, dry_run=dry_run, stopping=stopping)


def is_stopped(stopping: threading.Event | None) -> bool:
    """Tell whether a job should end before it is done; what it has left is done by the next one."""
    return stopping is not None and stopping.is_set()


def _chunk(
    connection: Connection,
    job: str,
    choose: Callable[[psycopg.Cursor[Any], Key], Sequence[Key]],
    work: Callable[[psycopg.Cursor[Any], Sequence[Key]], Done],
    after: Key,
    *,
    dry_run: bool,
) -> tuple[Sequence[Key], Done]:
    with connection.cursor() as cursor:
        keys = choose(cursor, after)
        if not keys:
            return keys, Done()
        started_s = time.monotonic()
        with connection.transaction(force_rollback=dry_run):
            done = work(cursor, keys)
        log.debug("%s: transaction keys=%d seconds=%.4f", job, len(keys), time.monotonic() - started_s)
        return keys, done
