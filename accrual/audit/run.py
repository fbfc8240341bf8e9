"""All checks, in parallel: stretches of ledgers in processes of their own, days and sums in threads of this one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any, Final, TypeAlias

import msgspec
import psycopg
from redis import Redis

from accrual.audit.caps import booked_days, check_caps, check_once
from accrual.audit.connection import first_connection, same_moment
from accrual.audit.correct import Approved, approved_points, is_put_right
from accrual.audit.decisions import Ledger, Stretch, check_ends, check_stretch, stretches_of
from accrual.audit.events import Events
from accrual.audit.findings import Finding
from accrual.audit.late import check_late
from accrual.audit.lots import check_lot_dates
from accrual.audit.members import check_members
from accrual.audit.recorded import Recorded, recorded_rulebooks
from accrual.audit.refunds import check_refunds
from accrual.audit.sums import check_sums, names_of_checks
from accrual.blobs import open_store
from accrual.book.database import Connection
from accrual.errors import BookError, UsageError
from accrual.outcomes import NO_SECRET, Secret
from accrual.rulebook import Rulebook, load
from accrual.settings import Settings
from accrual.stream import Keys, StreamServer, checkpoint_of, secret_check

__all__ = ["Audit", "AuditReport"]

Check: TypeAlias = Callable[..., Iterator[Finding]]

# So many findings of a check are kept and told, that is, of a stretch, a day or a query; of the others how many.
MOST_FINDINGS: Final = 10_000
# A stretch of fewer days is not worth what it takes to begin it in the middle of a ledger.
SHORTEST_STRETCH_DAYS: Final = 4

log = logging.getLogger("accrual.audit")


class Found(msgspec.Struct):
    """What came of a check: findings, how many that adjustments have put right, and what could not be checked.

    After a stretch that ``differs`` the next one does not stand where the ledger says.
    """

    findings: list[Finding] = []
    put_right: int = 0
    notes: list[str] = []
    differs: bool = False

    def take(self, found: Iterable[Finding], approved: Approved, most: int) -> Found:
        """Take over findings but for those that are put right; of more than ``most`` only how many there are."""
        untold = 0
        check = ""
        for finding in found:
            self.differs = self.differs or finding.check == "decisions"
            if is_put_right(finding, approved):
                self.put_right += 1
            elif len(self.findings) < most:
                self.findings.append(finding)
            else:
                untold, check = untold + 1, finding.check
        if untold:
            detail = f"{untold} more findings are not told: put these right, and the next audit tells them"
            self.findings.append(Finding(check, detail))
        return self


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
    bound what is decided again and the checks that go by day; chains of digests and sums are always those of the whole.
    The ``fast`` engine decides many times as fast as the ``reference`` engine, but it is the code that is audited, and
    it decides each ledger from its beginning. With ``complete``, what cannot be decided again is a finding,
    ``not_audited``; else it is only noted. Of one check at most ``most_findings`` are told.
    """

    settings: Settings
    partitions: tuple[str, ...] = ()
    first_day: str | None = None
    last_day: str | None = None
    workers: int = 2
    engine: str = "reference"
    complete: bool = False
    most_findings: int = MOST_FINDINGS
    stretch_days: int = SHORTEST_STRETCH_DAYS

    def run(self, report: AuditReport) -> Iterator[Finding]:
        """Yield the findings as checks end, and fill ``report``. Errors of the server pass through as they are."""
        with ExitStack() as opened:
            connection, snapshot = opened.enter_context(first_connection(self.settings.database))
            try:
                run = _Run(self, snapshot, approved_points(connection), _partitions(connection, self.partitions))
                days = booked_days(connection, self.first_day, self.last_day)
                stretches = self._stretches(connection, run.partitions)
            except psycopg.errors.UndefinedTable:
                raise BookError("the database has no book") from None
            processes = opened.enter_context(ProcessPoolExecutor(self.workers, get_context("spawn")))
            # A ledger's thread only waits for its stretches.
            threads = opened.enter_context(ThreadPoolExecutor(self.workers + len(stretches)))
            futures = dict(run.submit(processes, threads, stretches, days, recorded_rulebooks(connection)))
            for future in as_completed(futures):
                found = future.result()
                if self.complete:
                    found.findings += [Finding("not_audited", note) for note in found.notes]
                report.checks += 1
                report.findings += len(found.findings)
                report.put_right += found.put_right
                report.notes += found.notes
                log.info("%s: %d findings", futures[future], len(found.findings))
                yield from found.findings

    def _stretches(self, connection: Connection, partitions: Mapping[str, int]) -> dict[str, list[Stretch]]:
        """Return the stretches of each ledger, all together enough for every worker."""
        is_cut = self.engine == "reference"
        first_day = self.first_day if is_cut else None
        pieces = math.ceil(self.workers / max(1, len(partitions))) if is_cut else 1
        return {
            name: stretches_of(connection, number, first_day, self.last_day, pieces, self.stretch_days)
            for name, number in partitions.items()
        }

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

    def events_of(self, client: Redis, keys: Keys) -> tuple[Events, Events]:
        """Return two readers of events: the stream, and the archive for what has left it."""
        archive = None
        if self.settings.archive:
            from accrual.archive import Archive, ArchiveKeys

            archive = Archive(open_store(self.settings.archive), keys.partition, ArchiveKeys.of(self.settings))
        return Events(client, keys, archive), Events(client, keys, archive)


class _Run(msgspec.Struct, frozen=True):
    """An audit at one moment of the database: what its checks, in whatever thread or process, have in common."""

    audit: Audit
    snapshot: str
    approved: Approved
    partitions: dict[str, int]

    def submit(
        self,
        processes: Executor,
        threads: Executor,
        stretches: Mapping[str, list[Stretch]],
        days: list[str],
        recorded: list[Recorded],
    ) -> Iterator[tuple[Future[Found], str]]:
        """Submit all checks and yield them with their names."""

        def over(check: Check, *arguments: Any) -> Future[Found]:
            return threads.submit(self.over, check, *arguments)

        for name in self.partitions:
            yield threads.submit(self.ledger, processes, name, stretches[name]), f"ledger {name}"
            yield processes.submit(_ends, self, name), f"ends of {name}"
        for name in names_of_checks():
            yield over(check_sums, name), name
        versions = self._by_version(recorded)
        yield over(check_refunds), "refunds"
        yield over(check_members, recorded), "members"
        yield over(check_once, recorded), "once"
        yield over(check_lot_dates, versions.values()), "lot_dates"
        for day in days:
            yield over(check_caps, day, recorded), f"caps {day}"
            yield threads.submit(self.late, day, versions), f"late {day}"

    def ledger(self, processes: Executor, partition: str, stretches: list[Stretch]) -> Found:
        """Check a ledger, its stretches at once, and return what was found in their order.

        Where one differs, what comes behind it is decided again on what it has left, and not on what was committed.
        """
        futures = [processes.submit(_stretch, self, partition, stretch) for stretch in stretches]
        found: list[Found] = []
        for place, future in enumerate(futures):
            found.append(future.result())
            following = [stretch for stretch in stretches[place + 1 :] if stretch.decided]
            if found[-1].differs and following:
                for late in futures[place + 1 :]:
                    late.cancel()
                rest = [Stretch(stretches[place].first, following[-1].last)]
                rest += [stretch for stretch in stretches[place + 1 :] if not stretch.decided]
                found[-1:] = [processes.submit(_stretch, self, partition, stretch).result() for stretch in rest]
                break
        return Found(
            [finding for one in found for finding in one.findings],
            sum(one.put_right for one in found),
            [note for one in found for note in one.notes],
        )

    def over(self, check: Check, *arguments: Any) -> Found:
        """Run a check of the database."""
        with same_moment(self.audit.settings.database, self.snapshot) as connection:
            return self.found(check(connection, *arguments))

    def late(self, day: str, versions: Mapping[int, Rulebook]) -> Found:
        """Check the late entries of a day."""
        notes: list[str] = []
        found = self.over(check_late, day, versions, notes.append)
        found.notes += notes
        return found

    def found(self, findings: Iterable[Finding], notes: list[str] | None = None) -> Found:
        """Return what is left of findings; ``notes`` are filled while they come."""
        return Found(notes=[] if notes is None else notes).take(findings, self.approved, self.audit.most_findings)

    def _by_version(self, recorded: list[Recorded]) -> dict[int, Rulebook]:
        """Return the recorded rulebooks by version, and the configured one, which jobs may use already."""
        configured = [load(self.audit.settings.rulebook)] if self.audit.settings.rulebook else []
        known = [record.rulebook for record in recorded]
        return {rulebook.version: rulebook for rulebook in configured + known}


def _partitions(connection: Connection, wanted: tuple[str, ...]) -> dict[str, int]:
    rows = connection.execute("SELECT name, partition_id FROM book.partitions ORDER BY name").fetchall()
    known: dict[str, int] = dict(rows)
    return {name: known.get(name, 0) for name in wanted} if wanted else known


def _stretch(run: _Run, partition: str, stretch: Stretch) -> Found:
    return _over_ledger(run, partition, lambda ledger: check_stretch(ledger, stretch))


def _ends(run: _Run, partition: str) -> Found:
    return _over_ledger(run, partition, _check_ends)


def _check_ends(ledger: Ledger) -> Iterator[Finding]:
    if not ledger.partition_id:
        yield Finding("chain", "the book does not know this partition", ledger.partition)
        return
    yield from check_ends(ledger)
    yield from _dead_letters(ledger.client, Keys(ledger.partition))


def _over_ledger(run: _Run, partition: str, check: Callable[[Ledger], Iterator[Finding]]) -> Found:
    notes: list[str] = []
    keys, settings = Keys(partition), run.audit.settings
    with same_moment(settings.database, run.snapshot) as connection, StreamServer(settings.redis).client() as client:
        ledger = Ledger(
            connection,
            client,
            partition,
            run.partitions[partition],
            run.audit.secret_of(client, keys),
            run.audit.events_of(client, keys),
            notes.append,
            run.audit.engine,
        )
        return run.found(check(ledger), notes)


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
