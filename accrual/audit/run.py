"""All checks, in parallel: partitions in processes of their own, days and sums in threads of this one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any, TypeAlias

import msgspec
import psycopg
from redis import Redis

from accrual.audit.caps import booked_days, check_caps, check_once, rulebooks
from accrual.audit.connection import first_connection, same_moment
from accrual.audit.correct import approved_corrections, correction_of
from accrual.audit.decisions import EventSource, check_partition, stream_source
from accrual.audit.findings import Finding
from accrual.audit.late import check_late
from accrual.audit.lots import check_lot_dates
from accrual.audit.refunds import check_refunds
from accrual.audit.sums import check_sums, names_of_checks
from accrual.blobs import open_store
from accrual.book.database import Connection
from accrual.errors import BookError, UsageError
from accrual.events import StreamEntry
from accrual.outcomes import NO_SECRET, Secret
from accrual.rulebook import Rulebook, load
from accrual.settings import Settings
from accrual.stream import Keys, StreamId, StreamServer, checkpoint_of, secret_check

__all__ = ["Audit", "AuditReport"]

# A check yields findings over a connection; what comes of it is those, and notes of what could not be checked.
Check: TypeAlias = Callable[..., Iterator[Finding]]
Found: TypeAlias = tuple[list[Finding], list[str]]

log = logging.getLogger("accrual.audit")


class AuditReport(msgspec.Struct):
    """What an audit did, apart from its findings: how many checks ran, and what could not be checked, in words.

    ``put_right`` counts what is no finding any more, since an adjustment that was proposed for it has been approved.
    """

    checks: int = 0
    findings: int = 0
    put_right: int = 0
    notes: list[str] = msgspec.field(default_factory=list)


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What is audited: the book and the ledgers that ``settings`` name; of some ``partitions`` only, if named.

    Events that have left the stream are read from the archive of the settings. ``first_day`` and ``last_day`` (dates)
    bound the checks that go by day; sums are always those of the whole book. The ``fast`` engine decides many times as
    fast as the ``reference`` engine, but it is the code that is audited. With ``complete``, what cannot be decided
    again is a finding, ``not_audited``; else it is only noted.
    """

    settings: Settings
    partitions: tuple[str, ...] = ()
    first_day: str | None = None
    last_day: str | None = None
    workers: int = 2
    engine: str = "reference"
    complete: bool = False

    def run(self, report: AuditReport) -> Iterator[Finding]:
        """Yield the findings as checks end, and fill ``report``. Errors of the server pass through as they are."""
        with ExitStack() as opened:
            connection, snapshot = opened.enter_context(first_connection(self.settings.database))
            try:
                partitions = self.partitions or _partitions(connection)
                days = booked_days(connection, self.first_day, self.last_day)
                approved = approved_corrections(connection)
            except psycopg.errors.UndefinedTable:
                raise BookError("the database has no book") from None
            processes = opened.enter_context(ProcessPoolExecutor(self.workers, get_context("spawn")))
            threads = opened.enter_context(ThreadPoolExecutor(self.workers))
            futures = dict(self._submit(processes, threads, partitions, days, snapshot, rulebooks(connection)))
            for future in as_completed(futures):
                findings, notes = future.result()
                if self.complete:
                    findings += [Finding("not_audited", note) for note in notes]
                open_ones = [finding for finding in findings if correction_of(finding) not in approved]
                report.checks += 1
                report.findings += len(open_ones)
                report.put_right += len(findings) - len(open_ones)
                report.notes += notes
                log.info("%s: %d findings", futures[future], len(open_ones))
                yield from open_ones

    def _submit(
        self,
        processes: Executor,
        threads: Executor,
        partitions: tuple[str, ...],
        days: list[str],
        snapshot: str,
        recorded: list[tuple[int, str, Rulebook]],
    ) -> Iterator[tuple[Future[Found], str]]:
        def over(check: Check, *arguments: Any) -> Future[Found]:
            return threads.submit(_over, self.settings.database, snapshot, check, *arguments)

        for name in partitions:
            yield processes.submit(_partition, self, name, snapshot), f"partition {name}"
        for name in names_of_checks():
            yield over(check_sums, name), name
        versions = self._by_version(recorded)
        yield over(check_refunds), "refunds"
        yield over(check_once, recorded), "once"
        yield over(check_lot_dates, versions.values()), "lot_dates"
        for day in days:
            yield over(check_caps, day, recorded), f"caps {day}"
            yield threads.submit(_late, self.settings.database, snapshot, day, versions), f"late {day}"

    def _by_version(self, recorded: list[tuple[int, str, Rulebook]]) -> dict[int, Rulebook]:
        """Return the recorded rulebooks by version, and the configured one, which jobs may use already."""
        configured = [load(self.settings.rulebook)] if self.settings.rulebook else []
        known = [rulebook for _, _, rulebook in recorded]
        return {rulebook.version: rulebook for rulebook in configured + known}

    def secret_of(self, client: Redis, keys: Keys) -> Secret:
        """Return the key of a partition's fingerprints: the configured one, or the one that the partition made.

        Raises ``UsageError`` where it is not the one that the partition was started with: nothing would come out right.
        """
        found: Any = client.hmget(keys.checkpoint, "secret", "secret_check")
        kept, check = (value.decode() if value else "" for value in found)
        text = self.settings.secret or kept
        secret = Secret(bytes.fromhex(text)) if text else NO_SECRET
        if check and check != secret_check(secret):
            raise UsageError(f"secret: partition {keys.partition} was started with another one")
        return secret

    def source_of(self, client: Redis, keys: Keys) -> EventSource:
        """Return where events are read: the stream, and the archive for what has left it."""
        if not self.settings.archive:
            return stream_source(client, keys)
        from accrual.archive import ArchiveKeys, read_stretch

        store, archive_keys = open_store(self.settings.archive), ArchiveKeys.of(self.settings)

        def archived(after: StreamId, through: StreamId, _count: int) -> list[StreamEntry]:
            return list(read_stretch(store, keys.partition, after, through, archive_keys))

        return stream_source(client, keys, archived)


def _partitions(connection: Connection) -> tuple[str, ...]:
    return tuple(name for (name,) in connection.execute("SELECT name FROM book.partitions ORDER BY name"))


def _partition(audit: Audit, name: str, snapshot: str) -> Found:
    notes: list[str] = []
    keys = Keys(name)
    with (
        same_moment(audit.settings.database, snapshot) as connection,
        StreamServer(audit.settings.redis).client() as client,
    ):
        secret, source = audit.secret_of(client, keys), audit.source_of(client, keys)
        findings = list(check_partition(connection, client, name, secret, source, notes.append, audit.engine))
        findings += _dead_letters(client, keys)
    return findings, notes


def _dead_letters(client: Redis, keys: Keys) -> list[Finding]:
    """Compare the dead letters that are kept with those that the ledger counts, while no worker is adding some."""
    before = checkpoint_of(client, keys)
    kept: Any = client.xlen(keys.deadletters)
    sent_again: Any = client.hget(keys.checkpoint, "redriven")
    if checkpoint_of(client, keys).batch != before.batch or kept + int(sent_again or 0) == before.dead_letters:
        return []
    detail = "dead letters that are kept or were sent again are not as many as the ledger counts"
    found = kept + int(sent_again or 0)
    return [Finding("dead_letters", detail, keys.partition, expected=before.dead_letters, found=found)]


def _over(database: str, snapshot: str, check: Check, *arguments: Any) -> Found:
    with same_moment(database, snapshot) as connection:
        return list(check(connection, *arguments)), []


def _late(database: str, snapshot: str, day: str, versions: Mapping[int, Rulebook]) -> Found:
    notes: list[str] = []
    with same_moment(database, snapshot) as connection:
        return list(check_late(connection, day, versions, notes.append)), notes
