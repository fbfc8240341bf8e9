"""The life of a worker: it owns a partition, recovers its state, works until told to stop, gives the partition up."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from typing import Any, Final

import redis
import redis.asyncio

from accrual.engine import STREAM_SLACK_DAYS, Engine, Secret, open_engine
from accrual.errors import LedgerError, MemoryLimitReached, StateMismatch, StreamError, StreamTrimmed
from accrual.rulebook import Rulebook
from accrual.settings import Settings
from accrual.stream import (
    Checkpoint,
    Held,
    Keys,
    Owned,
    Ownership,
    StreamId,
    StreamServer,
    check_eviction,
    check_server,
    parse_stream_id,
    stream_id_text,
)
from accrual.worker.commits import CommitQueue
from accrual.worker.intake import Intake
from accrual.worker.pipeline import Pipeline
from accrual.worker.progress import Progress, live_stream
from accrual.worker.recovery import Recovery
from accrual.worker.snapshots import Snapshots
from accrual.worker.tasks import Tasks
from accrual.worker.trouble import Trouble

__all__ = ["Worker"]

log = logging.getLogger("accrual.worker")

RELEASE_TIMEOUT_S: Final = 1.0
STATUS_CUT_SHORT: Final = 1
# How often it is asked whether the server has become one that evicts; an operator changes that, or a failover.
SAFETY_INTERVAL_S: Final = 5.0
# How soon a standby that found no way to a warm state looks for a snapshot again.
COLD_PAUSE_S: Final = 10.0


class Worker:
    """One worker of one partition. ``rulebook`` is what it was started with; the ledger may know a newer one.

    With ``drain`` it commits up to the end of the stream, as found when it starts to read, and is done.
    """

    def __init__(self, settings: Settings, rulebook: Rulebook, *, drain: bool = False) -> None:
        self._settings = settings
        self._rulebook = rulebook
        self._drain = drain
        self._keys = Keys(settings.partition)
        self._server = StreamServer(settings.redis)
        self._intake = Intake(self._server, self._keys, settings)
        self._client = self._server.async_client()
        self._ownership = Ownership(self._client, self._keys, settings.lease_ms)
        self._progress = Progress(live_stream(settings.progress))
        self._tasks = Tasks()
        self._commits: CommitQueue | None = None
        self._pipeline: Pipeline | None = None
        self._snapshots: Snapshots | None = None
        self._standby: Recovery | None = None
        self._standby_is_full = False
        self._cold_until_s = 0.0

    async def run(self) -> None:
        """Work until the stream is drained, or SIGTERM or SIGINT comes; then all that was decided has been committed.

        Raises ``AccrualError`` where the work cannot go on; nothing is half done then either.
        """
        for words in _without_effect(self._settings):
            log.warning("%s", words)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)
        try:
            await self._tasks.in_foreground(self._work())
            await self._finish()
        finally:
            # Whoever takes the partition next need not wait for a disk or a store.
            if self._snapshots is not None:
                self._snapshots.give_up()
            await self._tasks.end()
            if self._commits is not None:
                self._progress.finish()
            await self._release()
            if self._snapshots is not None:
                await self._snapshots.end()
            await self._client.aclose()
            # What this run leaves behind may be collected again: a process may run several workers in turn.
            gc.unfreeze()

    async def _work(self) -> None:
        owned = await self._own()
        self._tasks.in_background(self._keep())
        self._tasks.in_background(self._progress.show())
        committed = owned.checkpoint
        engine, slack_days = await self._recover(owned)
        commits = CommitQueue(
            self._server, self._keys, self._ownership.nonce, committed, self._settings, self._progress
        )
        snapshots = Snapshots(self._settings, owned.secret, slack_days, self._client)
        pipeline = Pipeline(
            self._settings,
            self._client,
            self._keys,
            self._intake,
            engine,
            slack_days,
            commits,
            snapshots,
            self._progress,
        )
        self._commits, self._pipeline, self._snapshots = commits, pipeline, snapshots
        self._progress.start_from(committed)
        self._tasks.in_background(commits.run())
        if committed.batch == 0:
            pipeline.record()
        elif self._is_newer(committed):
            await pipeline.adopt(self._rulebook)
        log.info(
            "owner partition=%s batch=%d position=%s rulebook=%d engine=%s",
            *(self._keys.partition, committed.batch, stream_id_text(committed.position)),
            *(engine.rulebook.version, self._settings.engine),
        )
        end = await self._end_of_stream(committed) if self._drain else None
        # What is there by now stays: the collector need not look through it again and again while events wait.
        gc.collect()
        gc.freeze()
        await pipeline.run(end)

    async def _own(self) -> Owned:
        """Take the partition, or stand by until its owner has been silent for as long as its lease."""
        settings = self._settings
        trouble = Trouble(self._server.name, settings.backoff_limit_ms)
        secret = Secret(bytes.fromhex(settings.secret)) if settings.secret else None
        checked = announced = False
        while True:
            try:
                if not checked:
                    for advice in await check_server(self._client):
                        log.warning("%s", advice)
                    checked = True
                answer = await self._ownership.acquire(secret)
            except (OSError, redis.RedisError) as error:
                await asyncio.sleep(trouble.pause_s(error))
                continue
            trouble.over()
            if isinstance(answer, Owned):
                return answer
            if not announced:
                self._stand_by(answer)
                announced = True
            await self._follow(secret)
            # Where nobody renews it, the lease is over in that time.
            await asyncio.sleep(min(settings.lease_ms / 4, max(1, answer.left_ms)) / 1000)

    def _stand_by(self, held: Held) -> None:
        owner = held.owner_name or "another worker"
        if not self._settings.wait:
            raise StreamError(
                f"partition {self._keys.partition} is owned by {owner}; its lease runs for another {held.left_ms} ms"
            )
        log.info("standing by: partition %s is owned by %s", self._keys.partition, owner)

    async def _follow(self, secret: Secret | None) -> None:
        """Replay what the owner has committed since the last time, so that little is left to do in its place."""
        try:
            seen = await self._ownership.look(secret)
        except (OSError, redis.RedisError):
            # The next attempt to take the partition says it.
            return
        if seen is None or seen.checkpoint.batch == 0 or self._standby_is_full or time.monotonic() < self._cold_until_s:
            return
        standby = self._standby
        if standby is None or not standby.leads_to(seen.checkpoint):
            # A server that came back without its last commits is followed anew.
            standby = self._recovery(seen)
        begins, self._standby = standby is not self._standby, standby
        try:
            await standby.follow(seen.checkpoint)
        except MemoryLimitReached as error:
            log.warning("%s (the standby follows no further)", error)
            self._standby_is_full = True
        except (LedgerError, StreamTrimmed) as error:
            # Commits were lost, or the input was trimmed up to here: the next one begins anew, from a newer snapshot.
            self._standby = None
            if begins:
                self._stand_by_cold(error)
        else:
            self._cold_until_s = 0.0

    def _stand_by_cold(self, error: Exception) -> None:
        if not self._cold_until_s:
            log.warning("standing by without the state, which is looked for again and again: %s", error)
        self._cold_until_s = time.monotonic() + COLD_PAUSE_S

    def _recovery(self, owned: Owned) -> Recovery:
        return Recovery(self._client, self._keys, self._intake, owned.secret, self._settings)

    async def _recover(self, owned: Owned) -> tuple[Engine, int]:
        """Return the engine as the committed batches leave it, and the slack in days with which it was opened."""
        try:
            return await self._recovered(owned)
        except MemoryLimitReached as error:
            await self._progress.stand_still(error)

    async def _recovered(self, owned: Owned) -> tuple[Engine, int]:
        committed = owned.checkpoint
        if self._standby is not None and self._standby.leads_to(committed):
            try:
                return await self._standby.run(committed), self._standby.slack_days
            except (LedgerError, StreamTrimmed) as error:
                log.warning("what was replayed while standing by is of no use: %s", error)
        # Its memory is needed.
        self._standby = None
        if committed.batch:
            recovery = self._recovery(owned)
            return await recovery.run(committed), recovery.slack_days
        if await self._client.exists(self._keys.ledger):
            raise StateMismatch(f"{self._keys.ledger} has batches, but {self._keys.checkpoint} knows of none")
        engine = open_engine(self._settings.engine, self._rulebook, owned.secret, STREAM_SLACK_DAYS, assisted=True)
        return engine, STREAM_SLACK_DAYS

    def _is_newer(self, committed: Checkpoint) -> bool:
        """Tell whether the rulebook given at the start is newer than the recorded one."""
        given, recorded = self._rulebook.version, committed.rulebook
        if given == recorded and self._rulebook.digest != committed.rulebook_sha256:
            raise StateMismatch(
                f"rulebook version {given} was adopted with another text: a changed rulebook needs a higher version"
            )
        if given < recorded:
            log.warning("rulebook version %d was given, but version %d is in force and stays so", given, recorded)
        return given > recorded

    async def _end_of_stream(self, committed: Checkpoint) -> StreamId:
        if not await self._client.exists(self._keys.events):
            return committed.position
        information: dict[str, Any] = await self._client.xinfo_stream(self._keys.events)
        return parse_stream_id(information["last-generated-id"])

    async def _keep(self) -> None:
        """Renew the lease, and learn what the server has to tell."""
        trouble = Trouble("heartbeat", self._settings.lease_ms // 4)
        check_s = 0.0
        while True:
            try:
                if time.monotonic() >= check_s:
                    await check_eviction(self._client)
                    check_s = time.monotonic() + SAFETY_INTERVAL_S
                beat = await self._ownership.beat(self._progress.trouble)
            except (OSError, redis.RedisError) as error:
                await asyncio.sleep(trouble.pause_s(error))
                continue
            trouble.over()
            self._progress.stream_size(beat.added, beat.removed)
            if self._pipeline is not None:
                self._pipeline.pending = beat.pending
            await asyncio.sleep(self._settings.lease_ms / 4000)

    async def _finish(self) -> None:
        """Wait until what was decided has landed; after a drain also until the snapshot that was begun is whole."""
        commits, snapshots = self._commits, self._snapshots
        if commits is None or snapshots is None:
            return
        for rest in (commits.settled, snapshots.finished):
            if not self._tasks.stopping:
                await self._tasks.in_foreground(rest())
        try:
            async with asyncio.timeout(self._settings.stop_timeout_ms / 1000):
                await self._tasks.in_foreground(commits.settled())
        except TimeoutError:
            raise StreamError(
                f"stopped with {commits.waiting} batches that have not landed: their events will be decided again"
            ) from None

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await self._ownership.release()
        except (OSError, TimeoutError, redis.RedisError) as error:
            log.debug("the lease is left to run out: %s", error)

    def _signalled(self) -> None:
        """End the work in good order at the first signal, and at once at the second."""
        if self._tasks.stopping:
            # At no moment is anything half done, so nothing has to be tidied up.
            os._exit(STATUS_CUT_SHORT)
        log.info("stopping")
        self._tasks.stop()


def _without_effect(settings: Settings) -> list[str]:
    """Return in words which settings are given that do nothing beside the others."""
    plain, given = settings.engine == "reference", []
    if plain and settings.memory_limit_bytes:
        given.append("memory_limit_bytes has no effect: the reference engine does not know what memory it takes")
    if plain and settings.snapshots:
        given.append("snapshots has no effect: the reference engine takes none, and a restart replays the whole stream")
    if plain or not settings.snapshots:
        without = "the reference engine takes no snapshots" if plain else "without snapshots there is nothing to keep"
        names = [name for name in ("snapshot_store", "trim_input") if getattr(settings, name)]
        given += [f"{name} has no effect: {without}" for name in names]
    return given
