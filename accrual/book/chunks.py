"""Large jobs in small transactions: short locks, bounded memory, and a place to go on from after a crash."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import psycopg

from accrual.book.database import Connection, retried

__all__ = ["CHUNK_MEMBERS", "Done", "in_chunks"]

CHUNK_MEMBERS: Final = 5000
REPORT_S: Final = 5.0

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


class _Undone(Exception):
    """Ends a transaction that was only for looking."""


def in_chunks(
    connection: Connection,
    job: str,
    choose: Callable[[psycopg.Cursor[Any], str], Sequence[str]],
    work: Callable[[psycopg.Cursor[Any], Sequence[str]], Done],
    *,
    dry_run: bool = False,
) -> Done:
    """Do ``work`` for the members that ``choose`` gives after a member (first after ``""``), each chunk a transaction.

    Both take a cursor. A chunk that met another job is tried again. With ``dry_run`` every transaction is undone.
    """
    total = Done()
    after = ""
    reported_s = time.monotonic()
    while True:
        members: Sequence[str] = []

        def one_chunk(after: str = after) -> tuple[Sequence[str], Done]:
            with connection.cursor() as cursor:
                chosen = choose(cursor, after)
                return chosen, _transaction(connection, cursor, chosen, work, dry_run=dry_run) if chosen else Done()

        members, done = retried(one_chunk)
        if not members:
            return total
        total.add(done)
        after = members[-1]
        if time.monotonic() - reported_s >= REPORT_S:
            reported_s = time.monotonic()
            log.info("%s: %d members, %d postings, %d points", job, total.members, total.postings, total.points)


def _transaction(
    connection: Connection,
    cursor: psycopg.Cursor[Any],
    members: Sequence[str],
    work: Callable[[psycopg.Cursor[Any], Sequence[str]], Done],
    *,
    dry_run: bool,
) -> Done:
    done = Done()
    try:
        with connection.transaction():
            done = work(cursor, members)
            if dry_run:
                raise _Undone
    except _Undone:
        pass
    return done
