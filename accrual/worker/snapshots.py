"""Snapshots while the worker works, and the way back from one."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import redis
import redis.asyncio

from accrual.blobs import open_store
from accrual.engine import Engine, Secret, open_engine
from accrual.errors import AccrualError, BlobError, RulebookError, SnapshotError, StateMismatch
from accrual.ledger import digest_of
from accrual.rulebook import parse
from accrual.settings import Settings
from accrual.snapshots import Pace, SnapshotCopies, SnapshotDirectory, SnapshotHeader, SnapshotReader
from accrual.stream import START, Checkpoint, Keys, StreamId, stream_id_text, trim_events
from accrual.worker.commits import CommitQueue
from accrual.worker.memory import MemoryLimit
from accrual.worker.tasks import in_thread

__all__ = ["Resumed", "Snapshots", "resume"]

log = logging.getLogger("accrual.worker")

# How long the end of a worker waits for what a disk or a store has not answered yet.
END_TIMEOUT_S: Final = 1.0


class Resumed(msgspec.Struct, frozen=True):
    """An engine as a snapshot has it, and where the partition stood then."""

    engine: Engine
    header: SnapshotHeader


def directory_of(settings: Settings) -> SnapshotDirectory | None:
    """Return where the settings want snapshots, if they do."""
    if not settings.snapshots or settings.engine != "fast":
        return None
    return SnapshotDirectory(Path(settings.snapshots), settings.partition)


def copies_of(settings: Settings) -> SnapshotCopies | None:
    """Return where the settings want copies of snapshots, if they do."""
    if not settings.snapshot_store:
        return None
    return SnapshotCopies(open_store(settings.snapshot_store), settings.partition)


class Snapshots:
    """Takes a snapshot at intervals. The image is written by a thread; the engine pauses only to begin it.

    A snapshot is begun behind a batch that may not have landed yet. Once it has, the snapshot gets its name and
    older ones are removed: should it never land, it is as if nothing had been written. One whose batch the ledger has
    lost since, as in a failover, or never had, counts for nothing, whatever its number.
    """

    def __init__(self, settings: Settings, secret: Secret, slack_days: int, client: redis.asyncio.Redis) -> None:
        self._settings = settings
        self._secret = secret
        self._slack_days = slack_days
        self._client = client
        self._keys = Keys(settings.partition)
        self._directory = directory_of(settings)
        self._copies = copies_of(settings)
        self._limit = MemoryLimit(settings.memory_limit_bytes)
        self._pace = Pace(settings.snapshot_rate_bytes)
        self._begun_s = time.monotonic()
        self._last_batch = -1
        self._task: asyncio.Task[None] | None = None
        self._landing: asyncio.Task[None] | None = None
        if self._directory is not None:
            self._directory.tidy()

    @property
    def are_due(self) -> bool:
        """Whether it is time for one."""
        if self._directory is None or self._task is not None:
            return False
        return time.monotonic() - self._begun_s >= self._settings.snapshot_interval_s

    def consider(self, engine: Engine, commits: CommitQueue) -> None:
        """Begin a snapshot of ``engine``, which stands at the tail of ``commits``, if one is due."""
        tail = commits.tail
        if self._directory is None or not self.are_due or tail.batch == self._last_batch:
            return
        self._begun_s = time.monotonic()
        self._last_batch = tail.batch
        if not self._limit.allows(engine, engine.headroom_bytes(self._settings.batch_events, imaging=True)):
            log.warning("snapshot batch=%d put off: memory_limit_bytes has no room for what it keeps", tail.batch)
            return
        try:
            image = cast(Any, engine).image()
        except MemoryError as error:
            # Nothing was begun, and the work needs none of it; the next one may find memory.
            log.warning("snapshot batch=%d failed: %s", tail.batch, error)
            return
        header = SnapshotHeader(
            partition=self._settings.partition,
            checkpoint=tail,
            slack_days=self._slack_days,
            zone_rules=importlib.metadata.version("tzdata"),
            rulebook=engine.rulebook.text,
            secret=self._secret.key,
            created_ms=time.time_ns() // 1_000_000,
            image=image.description,
        )
        self._task = asyncio.get_running_loop().create_task(self._take(self._directory, header, image, commits))

    async def finished(self) -> None:
        """Wait for a snapshot that was begun, as fast as that goes: nobody else needs the processor any more."""
        self._pace.hurry()
        if self._task is not None:
            await asyncio.wait([self._task])

    def give_up(self) -> None:
        """Write nothing more: no snapshot, no name of one, no copy."""
        self._pace.stop()
        if self._landing is not None:
            self._landing.cancel()

    async def end(self) -> None:
        """Give up, and see that nothing is left behind, unless a disk or a store is silent for too long."""
        self.give_up()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=END_TIMEOUT_S)

    async def _take(
        self, directory: SnapshotDirectory, header: SnapshotHeader, image: Any, commits: CommitQueue
    ) -> None:
        batch = header.checkpoint.batch
        try:
            size = await self._write(directory, header, image)
            if size is None:
                log.warning("snapshot batch=%d was given up: the records moved, or memory ran out", batch)
                return
            await self._landed(commits, batch)
            await in_thread(directory.publish, batch)
            log.info("snapshot batch=%d bytes=%d seconds=%.1f", batch, size, time.monotonic() - self._begun_s)
            await self._keep(directory, batch, commits)
        except (OSError, AccrualError, MemoryError, redis.RedisError, asyncio.CancelledError) as error:
            if self._pace.stopped:
                log.info("snapshot batch=%d was given up: the worker ends", batch)
            elif isinstance(error, redis.RedisError):
                log.warning("older snapshots were not removed, nor was the events stream trimmed: %s", _reason(error))
            else:
                # The work goes on; the next one may find room.
                log.warning("snapshot batch=%d failed: %s", batch, _reason(error))
        finally:
            directory.discard(batch)
            self._task = None

    async def _write(self, directory: SnapshotDirectory, header: SnapshotHeader, image: Any) -> int | None:
        """Write the image, and return its size if it is whole."""
        try:
            return await in_thread(directory.write, header, image, self._pace)
        finally:
            # What the engine saves for an image costs time and memory for as long as it is open.
            image.close()
            await in_thread(image.discard)

    async def _landed(self, commits: CommitQueue, batch: int) -> None:
        """Wait until ``batch`` has landed, for as long as there is a worker."""
        self._landing = asyncio.get_running_loop().create_task(commits.reached(batch))
        await self._landing
        self._landing = None
        self._pace.check()

    async def _keep(self, directory: SnapshotDirectory, batch: int, commits: CommitQueue) -> None:
        """Remove snapshots that are too many, copy the one of ``batch``, and remove input that no restart will read."""
        oldest = await self._tidied(directory, commits.landed)
        if self._copies is not None:
            # Without its copy nothing is trimmed: another machine could not go on from what is left.
            await in_thread(self._copies.put, directory.path_of(batch), batch, self._pace)
            oldest = min(oldest, await self._tidied(self._copies, commits.landed))
        if self._settings.trim_input and oldest > START:
            self._pace.check()
            await self._trim(oldest, commits.nonce)

    async def _tidied(self, place: SnapshotDirectory | SnapshotCopies, landed: Checkpoint) -> StreamId:
        """Remove what is older than the oldest snapshot that ``place`` is to keep, and return the position of that.

        Only those count that a restart would believe. While there are too few nothing is removed: ``START``.
        """
        believed = 0
        for batch in await in_thread(place.batches):
            try:
                header = await in_thread(place.header, batch)
                await _check_origin(self._client, self._settings, self._secret, landed, header)
            except (SnapshotError, StateMismatch):
                continue
            believed += 1
            if believed == self._settings.snapshots_kept:
                await in_thread(place.remove_before, batch, self._pace)
                return header.checkpoint.position
        return START

    async def _trim(self, before: StreamId, nonce: str) -> None:
        """Remove what comes before ``before``, if the archive has it."""
        archived = bool(self._settings.archive)
        trimmed = await trim_events(self._client, self._keys, nonce, before, archived=archived)
        waits = "" if trimmed.before == before else " (what comes then is not archived yet)"
        log.info("trimmed entries=%d before=%s%s", trimmed.entries, stream_id_text(trimmed.before), waits)


async def resume(
    client: redis.asyncio.Redis, settings: Settings, secret: Secret, committed: Checkpoint
) -> Resumed | None:
    """Return the engine of the newest snapshot that can be believed, or ``None``.

    It must be whole, of this partition, and of a batch that the ledger has with the same digest. Every other one is
    named in the log, with the reason. A copy that can be believed is fetched where no file can.
    """
    directory, copies = directory_of(settings), copies_of(settings)
    if directory is None:
        return None
    check = partial(_check_origin, client, settings, secret, committed)
    here, copied = directory.batches(), await _copied(copies, committed)
    for batch in sorted({*here, *copied}, reverse=True):
        path = directory.path_of(batch)
        for places in (here, copied):
            if batch not in places:
                continue
            try:
                if copies is not None and places is copied:
                    await _fetch(copies, batch, directory, check)
                with SnapshotReader(path) as reader:
                    await check(reader.header)
                    MemoryLimit(settings.memory_limit_bytes).check_image(reader.header.image)
                    engine = await in_thread(_restored, path, reader, secret)
            except SnapshotError as error:
                log.warning("snapshot refused: %s", error)
            except StateMismatch as error:
                log.warning("snapshot refused: %s: %s", path, error)
            except MemoryError:
                # Of such a file no copy is better.
                log.warning("snapshot refused: %s: there is no memory for its state", path)
                break
            else:
                log.info("snapshot read file=%s batch=%d", path.name, batch)
                return Resumed(engine, reader.header)
    return None


async def _copied(copies: SnapshotCopies | None, committed: Checkpoint) -> list[int]:
    """Return the batches of which there are copies, none if the store is away: then those here have to do."""
    try:
        found = await in_thread(copies.batches) if copies is not None else []
    except (OSError, BlobError) as error:
        log.warning("the copies of snapshots cannot be read: %s", error)
        return []
    return [batch for batch in found if batch <= committed.batch]


async def _fetch(
    copies: SnapshotCopies, batch: int, directory: SnapshotDirectory, check: Callable[[SnapshotHeader], Awaitable[None]]
) -> None:
    """Bring the copy of the snapshot of ``batch`` to where it belongs, if ``check`` takes its header."""
    path = directory.path_of(batch)
    try:
        await check(await in_thread(copies.header, batch))
        await in_thread(copies.fetch, batch, directory)
    except (OSError, BlobError, SnapshotError, StateMismatch) as error:
        raise SnapshotError(f"{path}: its copy was not fetched: {error}") from None
    log.info("snapshot fetched file=%s", path.name)


async def _check_origin(
    client: redis.asyncio.Redis, settings: Settings, secret: Secret, committed: Checkpoint, header: SnapshotHeader
) -> None:
    """Check that the ledger has the batch that a snapshot is of. Raises ``StateMismatch``."""
    of = header.checkpoint
    if header.partition != settings.partition:
        raise StateMismatch(f"is of partition {header.partition}")
    if header.secret != secret.key:
        raise StateMismatch("was taken with another secret")
    if of.batch > committed.batch:
        raise StateMismatch(f"is of batch {of.batch}, and {committed.batch} are committed")
    page: Any = await client.xrange(Keys(settings.partition).ledger, f"{of.batch}-0", f"{of.batch}-0")
    if not page or digest_of(page[0][1].get(b"batch", b"")) != of.digest:
        raise StateMismatch(f"the ledger has another batch {of.batch}: it is of another stream")


def _restored(path: Path, reader: SnapshotReader, secret: Secret) -> Engine:
    """Fill a new engine; for another thread, because it takes a while."""
    header = reader.header
    try:
        engine = open_engine("fast", parse(header.rulebook), secret, header.slack_days, assisted=True)
        cast(Any, engine).restore(header.image, reader, reader.finish)
    except (RulebookError, StateMismatch) as error:
        # Damage may show in many ways before all is read and the digest tells.
        raise SnapshotError(f"{path}: {error}") from None
    return engine


def _reason(error: BaseException) -> str:
    no_memory = "there is no memory for it" if isinstance(error, MemoryError) else type(error).__name__
    return str(error) or no_memory
