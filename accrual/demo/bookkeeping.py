"""The demo goes on into the book: the ledger posted to a PostgreSQL of its own, settled, looked at and audited."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any, Final

import msgspec

from accrual.audit import Audit, AuditReport
from accrual.book import Connection, exceptions, open_book, settle, slow, statement
from accrual.book.follow import Follower, follow
from accrual.demo.summary import Proof
from accrual.embedded import EmbeddedDatabase, EmbeddedServer
from accrual.rulebook import Rulebook
from accrual.settings import Settings

__all__ = ["Booked", "keep_the_book", "open_database"]

# Nothing is lost by it that the demo could not make again, and the first run need not wait for the disk.
OPTIONS: Final = {"synchronous_commit": "off", "max_wal_size": "4GB", "shared_buffers": "512MB"}

# A member with as many kinds of postings as any who was refunded.
SOMEONE: Final = """
    SELECT member FROM book.movements WHERE member IN (SELECT member FROM book.postings WHERE kind = 'refund')
    GROUP BY member ORDER BY count(DISTINCT kind) DESC, count(*), member LIMIT 1
"""


class Booked(msgspec.Struct, frozen=True):
    """What the book made of the day: counts and times, the chart of accounts, a statement, what waits for a person."""

    entries: int
    ingest_s: float
    settled_members: int
    settled_points: int
    settle_s: float
    accounts: dict[str, int]
    exceptions: Counter[str]
    member: str
    lines: list[dict[str, Any]]
    audit: AuditReport
    audit_s: float
    findings: list[str]

    def proofs(self) -> list[Proof]:
        """Return what must hold."""
        checks = (
            f"the audit finds nothing in {self.audit.checks} checks: every entry decided again, every sum made again"
        )
        return [
            Proof("the postings of the book add up to zero", sum(self.accounts.values()) == 0),
            Proof(self.findings[0] if self.findings else checks, not self.findings and not self.audit.notes),
        ]


def open_database() -> EmbeddedDatabase:
    """Return the database of a run, not started: a PostgreSQL of our own in a directory that goes with it."""
    return EmbeddedDatabase(OPTIONS)


def keep_the_book(
    server: EmbeddedServer, database: EmbeddedDatabase, partition: str, rulebook: Rulebook, day: int
) -> Booked:
    """Post the ledger, deal with refunds and late events, settle day number ``day``, and audit all of it."""
    with open_book(database.url) as connection:
        started_s = time.monotonic()
        with Follower(connection, server.client(), partition) as follower:
            follow([follower], threading.Event(), drain=True)
        ingested_s = time.monotonic()
        slow(connection, rulebook, refund_wait_hours=0)
        slow_s = time.monotonic()
        settled = settle(connection, rulebook, day)
        settled_s = time.monotonic()
        report = AuditReport()
        settings = Settings(redis=server.url, database=database.url)
        audit = Audit(settings=settings, engine="fast")
        findings = [finding.line().decode() for finding in audit.run(report)]
        member = _someone(connection)
        return Booked(
            entries=follower.book.link.next_seq - 1,
            ingest_s=ingested_s - started_s,
            settled_members=settled.members,
            settled_points=settled.points,
            settle_s=settled_s - slow_s,
            accounts={account: int(points) for account, points in connection.execute("SELECT * FROM book.accounts")},
            exceptions=Counter(line["kind"] for line in exceptions(connection)),
            member=member,
            lines=list(statement(connection, member)),
            audit=report,
            audit_s=time.monotonic() - settled_s,
            findings=findings,
        )


def _someone(connection: Connection) -> str:
    """Return a member whose statement is worth a look."""
    row = connection.execute(SOMEONE).fetchone()
    return "" if row is None else row[0]
