"""Whether an event costs more the longer the stream is: each tenth of a long one, beside the first.

core       the compiled core alone, as in core.py, over a stream of many days: ids, windows and days expire and their
           records are used again. In processor time.
worker     the worker end to end, on a state that knows every key, by when its batches were seen in the ledger: what
           worker and server take while events stream and ledger become longer, as a rate and in processor time of both

The first tenth is the peer of all the others. A yardstick is taken before each tenth of the core, so that a bad moment
of the machine is not taken for growth. The first day is the programme's member day, with one campaign more than others.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from accrual.rulebook import load
from accrual.stream import checkpoint_of
from bench.core import RULEBOOK, WarmCore
from bench.drain import forget_work, keep_work
from bench.latency import Committed, follow
from bench.machine import WORKER_CORE, pinned, yardstick_ms
from bench.report import Figure, table
from bench.rows import Integers
from bench.running import KEYS, Worker, census_of, put, put_census, server_in, workspace
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, Workload

__all__ = ["PARTS", "Drained", "Growth", "GrowthSettings", "measure_growth", "summary"]

PARTS: Final = 10
DAY_S: Final = 86_400
SECOND_NS: Final = 1_000_000_000
SAMPLE_S: Final = 0.01


@dataclass(frozen=True)
class GrowthSettings:
    """What is measured: ``core_events`` over ``days``, and ``worker_events`` end to end, each ``runs`` times."""

    core_events: int = 10_000_000
    days: int = 12
    core_members: int = 100_000
    worker_events: int = 4_000_000
    worker_members: int = 1_000_000
    runs: int = 3
    seed: int = DEFAULT_SEED
    directory: Path | None = None

    @property
    def core_workload(self) -> Workload:
        """The workload as slow as it must be to last so many days, but not below an event per second."""
        rate_per_s = max(1, self.core_events // (self.days * DAY_S))
        return Workload(members=self.core_members, rate_per_s=rate_per_s, seed=self.seed)

    @property
    def worker_workload(self) -> Workload:
        """The standard workload."""
        return Workload(members=self.worker_members, rate_per_s=max(1, self.worker_members // 500), seed=self.seed)


class Growth(msgspec.Struct, frozen=True):
    """What each tenth has shown, in order."""

    core: list[Figure]
    """ns of processor time per event."""
    yardstick_ms: list[Figure]
    records: list[int]
    """In all tables, at the end of each tenth."""
    state_bytes: list[int]
    worker: list[Figure]
    """Events per second, end to end."""
    processor: list[Figure]
    """ns of processor time per event, of server and worker together."""


def measure_growth(settings: GrowthSettings, tell: Callable[[str], None] = print) -> Growth:
    """Measure the core and the worker; ``tell`` hears what is going on."""
    context = multiprocessing.get_context("spawn")
    cores = []
    for number in range(1, settings.runs + 1):
        tell(f"growth, core: run {number} of {settings.runs}, {settings.core_events:,} events")
        with ProcessPoolExecutor(1, context) as executor:
            cores.append(executor.submit(_run_core, settings).result())
    workers = [drained.by_tenth() for drained in _run_workers(settings, tell)]
    return Growth(
        core=_by_tenth("core", "ns/event", [core.event_ns for core in cores]),
        yardstick_ms=_by_tenth("yardstick", "ms", [core.yardstick_ms for core in cores]),
        records=cores[-1].records,
        state_bytes=cores[-1].state_bytes,
        worker=_by_tenth("worker", "events/s", [rates for rates, _ in workers]),
        processor=_by_tenth("server and worker", "ns/event", [spent for _, spent in workers]),
    )


def _by_tenth(name: str, unit: str, runs: Sequence[Sequence[float]]) -> list[Figure]:
    return [Figure(f"{name}, tenth {n}", unit, values) for n, values in enumerate(zip(*runs, strict=True), start=1)]


# ------------------------------------------------------------------------------------------------ the core


class _Core(msgspec.Struct, frozen=True):
    """One run, a value for each tenth."""

    event_ns: list[float]
    yardstick_ms: list[float]
    records: list[int]
    state_bytes: list[int]


def _run_core(settings: GrowthSettings) -> _Core:
    result = _Core([], [], [], [])
    replies = max(1, settings.core_events // (PARTS * CHUNK_EVENTS))
    with pinned(WORKER_CORE):
        core = WarmCore(settings.core_workload, load(RULEBOOK))
        for _ in range(PARTS):
            result.yardstick_ms.append(yardstick_ms())
            # Made one at a time: a stream of days does not fit in memory.
            spent_ns = sum(sum(core.take(core.replies(1)[0])) for _ in range(replies))
            result.event_ns.append(spent_ns / (replies * CHUNK_EVENTS))
            result.records.append(sum(core.engine.sizes.values()))
            result.state_bytes.append(core.engine.memory_bytes)
    return result


# ---------------------------------------------------------------------------------------------- the worker


class Drained(NamedTuple):
    """One drain: when batches were committed, and the processor time of server and worker together up to ``at_ns``."""

    committed: Committed
    at_ns: Integers
    processor_ns: Integers

    def by_tenth(self) -> tuple[list[float], list[float]]:
        """Return the events per second of each tenth, and the ns of processor time per event.

        The clock starts with the first batch, which is therefore left out; a batch that spans two tenths is divided.
        """
        through, committed_ns = self.committed
        bounds = np.linspace(through[0], through[-1], PARTS + 1)
        moments = np.interp(bounds, through, committed_ns)
        events = (through[-1] - through[0]) / PARTS
        spent_ns = np.diff(np.interp(moments, self.at_ns, self.processor_ns))
        return (events * SECOND_NS / np.diff(moments)).tolist(), (spent_ns / events).tolist()


def _run_workers(settings: GrowthSettings, tell: Callable[[str], None]) -> list[Drained]:
    """Drain the same stream as often as there are runs."""
    context = multiprocessing.get_context("spawn")
    workload = settings.worker_workload
    runs = []
    with (
        workspace(settings.directory) as directory,
        server_in(directory) as server,
        ProcessPoolExecutor(1, context) as executor,
    ):
        client = server.client(protocol=2, socket_timeout=None)
        put_census(server, census_of(workload, workload.census_size))
        with Worker(server.url, "--drain") as worker:
            worker.end(ask=False)
        keep_work(client)
        known = checkpoint_of(client, KEYS).batch, 0
        chunks = range(0, settings.worker_events, CHUNK_EVENTS)
        filled = put(server, (workload.events(first, CHUNK_EVENTS) for first in chunks))
        for number in range(1, settings.runs + 1):
            tell(f"growth, worker: run {number} of {settings.runs}, {filled.events:,} events")
            forget_work(client)
            followed = executor.submit(follow, server.port, KEYS.ledger, known, filled.events)
            with Worker(server.url, "--drain") as worker:
                clocks = sampled((server.process_id, worker.pid), followed.done)
                worker.end(ask=False)
            runs.append(Drained(followed.result(), *clocks))
    return runs


def sampled(processes: Sequence[int], done: Callable[[], bool]) -> tuple[Integers, Integers]:
    """Read the processor time of ``processes`` until it is ``done``; return moments, and the sum at each, in ns."""
    at_ns, spent_ns = [], []
    # How Linux names the clock of another process, all its threads included (clock_getcpuclockid). It stays readable
    # until somebody has waited for the process.
    clocks = [~process << 3 | 2 for process in processes]
    while True:
        last = done()
        at_ns.append(time.monotonic_ns())
        spent_ns.append(sum(map(time.clock_gettime_ns, clocks)))
        if last:
            return np.array(at_ns), np.array(spent_ns)
        time.sleep(SAMPLE_S)


# ---------------------------------------------------------------------------------------------- for people


def summary(result: Growth) -> str:
    """Return the table: a row for each tenth."""
    headings = ["tenth", "core, ns/event", "over first", "yardstick, ms", "records", "state, MiB"]
    headings += ["end to end, events/s", "server + worker, ns/event", "over first"]
    rows = []
    for number in range(PARTS):
        core, processor = result.core[number], result.processor[number]
        rows.append(
            [
                str(number + 1),
                _with_noise(core),
                f"{core.ratio_to(result.core[0]):.2f}",
                f"{result.yardstick_ms[number].median:.0f}",
                f"{result.records[number]:,}",
                f"{result.state_bytes[number] / 2**20:,.0f}",
                _with_noise(result.worker[number]),
                _with_noise(processor),
                f"{processor.ratio_to(result.processor[0]):.2f}",
            ]
        )
    return table(headings, rows)


def _with_noise(figure: Figure) -> str:
    return f"{figure.median:,.0f} ±{figure.noise:.0%}"
