"""Snapshots while the worker works, and the way back from one."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import redis.asyncio

from accrual.blobs import open_store
from accrual.engine import Engine, Secret, open_engine
from accrual.errors import AccrualError, BlobError, MemoryLimitReached, SnapshotError
from accrual.ledger import digest_of
from accrual.rulebook import parse
from accrual.settings import Settings
from accrual.snapshots import Pace, SnapshotCopies, SnapshotDirectory, SnapshotHeader, SnapshotReader
from accrual.stream import Checkpoint, Keys, stream_id_text, trim_events
from accrual.worker.commits import CommitQueue
from accrual.worker.memory import MemoryLimit

__all__ = ["Resumed", "Snapshots", "resume"]

log = logging.getLogger("accrual.worker")


class Resumed(msgspec.Struct, frozen=True):
    """An engine as a snapshot has it, and where the partition stood then."""

    engine: Engine
    header: SnapshotHeader


def directory_of(settings: Settings) -> SnapshotDirectory | None:
    """Return where the settings want snapshots, if they do."""
    if not settings.snapshots or settings.engine != "fast":
        return None
    return SnapshotDirectory(Path(settings.snapshots), settings.partition, settings.snapshots_kept)


def copies_of(settings: Settings) -> SnapshotCopies | None:
    """Return where the settings want copies of snapshots, if they do."""
    if not settings.snapshot_store:
        return None
    return SnapshotCopies(open_store(settings.snapshot_store), settings.partition, settings.snapshots_kept)


class Snapshots:
    """Takes a snapshot at intervals. The image is written by a thread; the engine pauses only to begin it.

    A snapshot may be of a batch that has not landed yet. Should it never land, the ledger will have another one under
    that number, and no restart will use the snapshot.
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
        self._task = asyncio.get_running_loop().create_task(self._write(self._directory, header, image, commits))

    async def end(self) -> None:
        """Wait for a snapshot that is being written, as fast as that goes: nobody else needs the processor any more."""
        self._pace.hurry()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _write(
        self, directory: SnapshotDirectory, header: SnapshotHeader, image: Any, commits: CommitQueue
    ) -> None:
        batch = header.checkpoint.batch
        try:
            try:
                size = await asyncio.to_thread(directory.write, header, image, self._pace)
            finally:
                # What the engine saves for an image costs time and memory for as long as it is open.
                image.close()
                await asyncio.to_thread(image.discard)
            if size is None:
                log.warning("snapshot batch=%d was given up: the records moved, or memory ran out", batch)
                return
            log.info("snapshot batch=%d bytes=%d seconds=%.1f", batch, size, time.monotonic() - self._begun_s)
            if self._copies is not None:
                # Without its copy nothing is trimmed: another machine could not go on from what is left.
                await asyncio.to_thread(self._copies.put, directory.path_of(batch), batch)
            if self._settings.trim_input:
                await self._trim(directory, commits.landed)
        except (OSError, SnapshotError, BlobError, MemoryError) as error:
            # The work goes on; the next one may find room.
            log.warning("snapshot batch=%d failed: %s", batch, str(error) or "there is no memory for it")
        except redis.RedisError as error:
            log.warning("the events stream was not trimmed: %s", error)
        finally:
            self._task = None

    async def _trim(self, directory: SnapshotDirectory, landed: Checkpoint) -> None:
        """Remove what no restart will read, before the oldest snapshot that is kept, and what the archive has."""
        headers = directory.headers()
        if len(headers) < self._settings.snapshots_kept or headers[-1].checkpoint.batch > landed.batch:
            return
        wanted = headers[-1].checkpoint.position
        archived = bool(self._settings.archive)
        trimmed = await trim_events(self._client, self._keys, wanted, archived=archived)
        waits = "" if trimmed.before == wanted else " (what comes then is not archived yet)"
        log.info("trimmed entries=%d before=%s%s", trimmed.entries, stream_id_text(trimmed.before), waits)


async def resume(
    client: redis.asyncio.Redis, settings: Settings, secret: Secret, committed: Checkpoint
) -> Resumed | None:
    """Return the engine of the newest snapshot that can be believed, or ``None``.

    It must be whole, of this partition, and of a batch that the ledger has with the same digest. Every other one is
    named in the log, with the reason. One that is only in the store of copies is fetched when its turn comes.
    """
    directory, copies = directory_of(settings), copies_of(settings)
    if directory is None:
        return None
    for batch in sorted({*directory.batches(), *await _copied(copies, committed)}, reverse=True):
        try:
            path = await _path_of(batch, directory, copies)
            with SnapshotReader(path) as reader:
                await _check_origin(client, settings, secret, committed, path, reader.header)
                MemoryLimit(settings.memory_limit_bytes).check_image(reader.header.image)
                engine = await asyncio.to_thread(_restored, reader, secret)
        except MemoryLimitReached:
            raise
        except AccrualError as error:
            log.warning("snapshot refused: %s", error)
            continue
        log.info("snapshot read file=%s batch=%d", path.name, reader.header.checkpoint.batch)
        return Resumed(engine, reader.header)
    return None


async def _copied(copies: SnapshotCopies | None, committed: Checkpoint) -> list[int]:
    """Return the batches of which there are copies, none if the store is away: then those here have to do."""
    try:
        found = await asyncio.to_thread(copies.batches) if copies is not None else []
    except (OSError, BlobError) as error:
        log.warning("the copies of snapshots cannot be read: %s", error)
        return []
    return [batch for batch in found if batch <= committed.batch]


async def _path_of(batch: int, directory: SnapshotDirectory, copies: SnapshotCopies | None) -> Path:
    """Return where the snapshot of ``batch`` is, once its copy was fetched if it is not here."""
    path = directory.path_of(batch)
    if copies is None or path.exists():
        return path
    try:
        path = await asyncio.to_thread(copies.fetch, batch, directory)
    except OSError as error:
        raise SnapshotError(f"{path}: its copy was not fetched: {error}") from None
    log.info("snapshot fetched file=%s", path.name)
    return path


async def _check_origin(
    client: redis.asyncio.Redis,
    settings: Settings,
    secret: Secret,
    committed: Checkpoint,
    path: Path,
    header: SnapshotHeader,
) -> None:
    of = header.checkpoint
    if header.partition != settings.partition:
        raise SnapshotError(f"{path}: is of partition {header.partition}")
    if header.secret != secret.key:
        raise SnapshotError(f"{path}: was taken with another secret")
    if of.batch > committed.batch:
        raise SnapshotError(f"{path}: is of batch {of.batch}, and {committed.batch} are committed")
    page: Any = await client.xrange(Keys(settings.partition).ledger, f"{of.batch}-0", f"{of.batch}-0")
    if not page or digest_of(page[0][1].get(b"batch", b"")) != of.digest:
        raise SnapshotError(f"{path}: the ledger has another batch {of.batch}: it is of another stream")


def _restored(reader: SnapshotReader, secret: Secret) -> Engine:
    """Fill a new engine; for another thread, because it takes a while."""
    header = reader.header
    engine = open_engine("fast", parse(header.rulebook), secret, header.slack_days, assisted=True)
    cast(Any, engine).restore(header.image, reader)
    reader.finish()
    return engine
