"""A restart on a large state: what the state takes, how long a snapshot and a restart take, how fast a replay is.

The state is that of ten million members, devices and phones and two million addresses, each of which a real worker has
met once (``state_of``). Then, on one server:

write         a worker takes a snapshot. **Ceiling**: as many bytes written, digested and brought to the disk.
restart       a worker starts from that snapshot, of which nothing is in the page cache, and replays the fresh events
              that came after it. The time goes from the start of its process. **Ceiling** of the reading: the same file
              read and digested, as cold; **peer**: a worker without a snapshot, which replays the whole stream.
replay        the events behind the snapshot. **Ceiling**: the raw ``XREAD`` of the same events.
memory        the most that the restarted worker ever had resident, interpreter and all. **Floor**: the records alone.

Restarts and their ceilings take turns. After each restart the worker must have regenerated every committed batch, which
it checks itself, and the checkpoint must be what it was.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from accrual.embedded import EmbeddedServer
from accrual.snapshots import SnapshotReader
from accrual.stream import Checkpoint, checkpoint_of
from bench.drain import Filled, ceiling
from bench.machine import WORKER_CORE, file_system_of, pinned, yardstick_ms
from bench.memory import find_memory_for
from bench.report import Figure, table
from bench.running import KEYS, SNAPSHOT_WRITTEN, Worker, census_of, connected, put, put_census, server_in, workspace
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, Events, Workload

__all__ = ["Restart", "RestartSettings", "measure_restart", "state_of", "summary"]

PIECE_BYTES: Final = 1 << 20
SECOND_NS: Final = 1_000_000_000
MEMBERS_PER_ADDRESS: Final = 5
NEVER_S: Final = 86_400


@dataclass(frozen=True)
class RestartSettings:
    """What is measured: a state of ``members``, ``replay_events`` behind its snapshot, ``runs`` restarts."""

    members: int = 10_000_000
    replay_events: int = 2_000_000
    runs: int = 3
    seed: int = DEFAULT_SEED
    directory: Path | None = None

    @property
    def workload(self) -> Workload:
        """The workload with that many members."""
        return Workload(members=self.members, rate_per_s=max(1, self.members // 500), seed=self.seed)


class Restart(msgspec.Struct, frozen=True):
    """What the runs have shown."""

    members: int
    replayed_events: int
    """How many events each restart replays behind the snapshot."""
    snapshot_bytes: int
    memory: Figure
    """Peak of the resident memory of a restarted worker, bytes."""
    write: Figure
    write_ceiling: Figure
    read: Figure
    """From the start of the process until the snapshot was read and believed."""
    read_ceiling: Figure
    replay: Figure
    replay_ceiling: Figure
    restart: Figure
    """From the start of the process until it takes new events."""
    full_replay: Figure
    """The same without a snapshot."""
    first_drain: Figure
    """Events per second when every key is met for the first time."""
    yardstick_ms: Figure
    file_system: str


def state_of(workload: Workload) -> Iterator[Events]:
    """Yield events that show each member, with a device and a phone, once; five members share an address."""
    for events in census_of(workload, workload.members):
        addresses = workload.members // MEMBERS_PER_ADDRESS
        yield Events(**(events._asdict() | {"ip": events.ip % addresses}))


def measure_restart(settings: RestartSettings, tell: Callable[[str], None] = print) -> Restart:
    """Build the state, take a snapshot of it and restart from that; ``tell`` hears what is going on."""
    with workspace(settings.directory) as directory, server_in(directory) as server:
        return _Measurement(settings, directory, server, tell).run()


class _Measurement:
    """The steps of one measurement, on one server."""

    def __init__(
        self, settings: RestartSettings, directory: Path, server: EmbeddedServer, tell: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._server = server
        self._client = server.client(protocol=2, socket_timeout=None)
        self._tell = tell
        self._yardsticks: list[float] = []

    def run(self) -> Restart:
        """Measure everything."""
        settings, tell = self._settings, self._tell
        tell(f"restart: a state of {settings.members:,} members")
        self._yardstick()
        first_drain = self._build()
        tell("restart: a snapshot")
        write = self._snapshot()
        (path,) = self._snapshots.iterdir()
        write_ceiling = written_and_digested_s(self._directory, path.stat().st_size)
        with SnapshotReader(path) as reader:
            of = reader.header.checkpoint
        filled = self._add(settings.replay_events)
        self._drain(*self._from_snapshot)
        known = checkpoint_of(self._client, KEYS)
        restarts, read_ceilings, replay_ceilings = [], [], []
        for number in range(1, settings.runs + 1):
            tell(f"restart: run {number} of {settings.runs}")
            with pinned(WORKER_CORE):
                read_ceilings.append(read_and_digested_s(path))
                with connected(self._server.port) as connection:
                    replay_ceilings.append(ceiling(connection, filled))
            restarts.append(self._restart(path, of, known))
            self._yardstick()
        tell("restart: without a snapshot")
        find_memory_for(settings.members)
        full_replay = started_s(self._drain())
        return Restart(
            members=settings.members,
            replayed_events=known.events - of.events,
            snapshot_bytes=path.stat().st_size,
            memory=_figure("memory", "bytes", [restart.peak_bytes for restart in restarts]),
            write=_figure("write", "s", [write]),
            write_ceiling=_figure("write ceiling", "s", [write_ceiling]),
            read=_figure("read", "s", [restart.read_s for restart in restarts]),
            read_ceiling=_figure("read ceiling", "s", read_ceilings),
            replay=_figure("replay", "events/s", [restart.replay_per_s for restart in restarts]),
            replay_ceiling=_figure("replay ceiling", "events/s", replay_ceilings),
            restart=_figure("restart", "s", [restart.whole_s for restart in restarts]),
            full_replay=_figure("full replay", "s", [full_replay]),
            first_drain=_figure("first drain", "events/s", [first_drain]),
            yardstick_ms=_figure("yardstick", "ms", self._yardsticks),
            file_system=file_system_of(self._directory),
        )

    @property
    def _snapshots(self) -> Path:
        return self._directory / "snapshots"

    def _yardstick(self) -> None:
        with pinned(WORKER_CORE):
            self._yardsticks.append(yardstick_ms())

    def _build(self) -> float:
        """Let a worker meet every key, and return the events per second at which it did."""
        put_census(self._server, state_of(self._settings.workload))
        find_memory_for(self._settings.members)
        return self._drain().said(" total events=").number("events_per_s")

    def _snapshot(self) -> float:
        """Take a snapshot behind the next batch and return the seconds that took."""
        put(self._server, [self._settings.workload.events(0, CHUNK_EVENTS)])
        at_once = ("--snapshot-interval-s", 0, "--snapshot-rate-bytes", 0)
        worker = self._drain("--snapshots", self._snapshots, "--snapshots-kept", 1, *at_once)
        return worker.said(SNAPSHOT_WRITTEN).number("seconds")

    def _add(self, events: int) -> Filled:
        """Put so many fresh events on the stream."""
        # The chunk behind the one of the snapshot is left out: the ceiling reads from a millisecond before the first.
        first_event = 2 * CHUNK_EVENTS
        chunks = range(first_event, first_event + events, CHUNK_EVENTS)
        return put(self._server, (self._settings.workload.events(first, CHUNK_EVENTS) for first in chunks))

    @property
    def _from_snapshot(self) -> tuple[str | Path | int, ...]:
        """The flags of a worker that starts from a snapshot and takes no other."""
        return ("--snapshots", self._snapshots, "--snapshots-kept", 1, "--snapshot-interval-s", NEVER_S)

    def _drain(self, *flags: str | Path | int) -> Worker:
        """Let a worker start, commit what is there and end."""
        # While it starts the server has next to nothing to do, so the threads of the worker may have both cores.
        with Worker(self._server.url, "--drain", *flags, anywhere=True) as worker:
            worker.end(ask=False)
        return worker

    def _restart(self, path: Path, of: Checkpoint, known: Checkpoint) -> _Restarted:
        find_memory_for(self._settings.members)
        forget_cached(path)
        worker = self._drain(*self._from_snapshot)
        if checkpoint_of(self._client, KEYS) != known:
            raise RuntimeError("a restart without new events has committed something")
        read_ns = worker.said(" snapshot read file=").at_ns
        recovered_ns = worker.said(" recovered batches=").at_ns
        return _Restarted(
            read_s=(read_ns - worker.started_ns) / SECOND_NS,
            replay_per_s=(known.events - of.events) * SECOND_NS / (recovered_ns - read_ns),
            whole_s=started_s(worker),
            peak_bytes=worker.peak_bytes,
        )


class _Restarted(msgspec.Struct, frozen=True):
    """One restart, by the clock on the wall."""

    read_s: float
    replay_per_s: float
    whole_s: float
    peak_bytes: int


def started_s(worker: Worker) -> float:
    """Return how long it took from the start of the process until it could take new events."""
    return (worker.said(" owner partition").at_ns - worker.started_ns) / SECOND_NS


def _figure(name: str, unit: str, runs: list[float] | list[int]) -> Figure:
    return Figure(name, unit, tuple(map(float, runs)))


# --------------------------------------------------------------------------------------------- the ceilings


def forget_cached(path: Path) -> None:
    """Let the kernel forget what it holds of a file, so that it must come from the disk again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_and_digested_s(path: Path) -> float:
    """Read a file that is not cached, digest it, and return the seconds that took."""
    forget_cached(path)
    place = memoryview(bytearray(PIECE_BYTES))
    started = time.perf_counter()
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(place):
            digest.update(place[:size])
    digest.digest()
    return time.perf_counter() - started


def written_and_digested_s(directory: Path, size: int) -> float:
    """Write so many bytes to a file, digest them, bring them to the disk, and return the seconds that took."""
    piece = memoryview(os.urandom(PIECE_BYTES))
    digest = hashlib.sha256()
    with pinned(WORKER_CORE), tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        started = time.perf_counter()
        rest = size
        while rest:
            written = file.write(piece[:rest])
            digest.update(piece[:written])
            rest -= written
        digest.digest()
        os.fsync(file.fileno())
        return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------- for people


def summary(result: Restart) -> str:
    """Return the table: each figure beside what it is to be compared with."""
    gib = result.snapshot_bytes / 2**30
    compared: list[tuple[str, Figure, str, str, float]] = [
        ("resident, GiB", result.memory, ",.2f", "the records alone", result.snapshot_bytes),
        ("snapshot written, s", result.write, ",.1f", "the same bytes written", result.write_ceiling.median),
        ("snapshot read, s", result.read, ",.1f", "the same bytes read", result.read_ceiling.median),
        ("replay, events/s", result.replay, ",.0f", "raw XREAD", result.replay_ceiling.median),
        ("restart, s", result.restart, ",.1f", "without a snapshot", result.full_replay.median),
    ]
    rows = []
    for title, figure, places, other, value in compared:
        scale = 2**30 if figure.unit == "bytes" else 1
        noise = f" ±{figure.noise:.0%}" if len(figure.runs) > 1 else ""
        beside = f"{other}: {value / scale:{places}}"
        rows.append([title, f"{figure.median / scale:{places}}{noise}", beside, f"{figure.median / value:.2f}"])
    title = f"{result.members:,} members, snapshot of {gib:.2f} GiB"
    return table([title, "", "beside", "ratio"], rows)
