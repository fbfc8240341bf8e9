"""The compiled core alone: what one event costs, stage by stage, on a state that knows a given number of keys.

``WarmCore`` lets the engine decide a census first, which shows it every member, device, phone and address once; then
come replies with fresh events of the standard workload. Everything that is measured works on bytes that are already
there, as they are after ``recv``: what the kernel and the server cost is in drain.py.

========== ==========================================================================================================
scan       from the bytes of an ``XREAD`` reply to the place of each entry
decide     from there to decisions: MessagePack, hashing, tables, rules
encode     from decisions to the bytes of a ledger batch
digest     SHA-256 of the batch, which the next one names
========== ==========================================================================================================
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from accrual.engine import BatchHeader, Counts, ReferenceEngine, Secret, StreamEntry, open_engine
from accrual.engine.fast import FastBatch, FastEngine
from accrual.rulebook import Rulebook, load
from bench.machine import ROOT, WORKER_CORE, Memory, pinned
from bench.report import Figure, table
from bench.wire import Entries
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, Workload
from fastpath.resp import ReplyReader

__all__ = ["RULEBOOK", "STAGES", "Core", "CoreSettings", "WarmCore", "measure_core", "reference_slice", "summary"]

RULEBOOK: Final = ROOT / "bench" / "rulebook.toml"
STAGES: Final = ("scan", "decide", "encode", "digest")
# A benchmark's fingerprints need not be secret, and must be the same in every run.
SECRET: Final = Secret(bytes(range(16)))
KEY: Final = "accrual:{bench}:events"

# As much as one read of a busy socket brings.
RECEIVE_BYTES: Final = 128 * 1024
WARM_UP_REPLIES: Final = 4
MEMBERS_PER_EVENT_AND_SECOND: Final = 500


@dataclass(frozen=True)
class CoreSettings:
    """What is measured: ``keys`` members and phones, 1.2 times as many devices, and ``replies`` of 8192 fresh events."""

    keys: int
    replies: int = 24
    reference_events: int = 8192
    seed: int = DEFAULT_SEED

    @property
    def workload(self) -> Workload:
        """The workload with that many members, each of whom comes as often as in the standard one."""
        return Workload(members=self.keys, rate_per_s=max(1, self.keys // MEMBERS_PER_EVENT_AND_SECOND), seed=self.seed)


class Core(msgspec.Struct, frozen=True):
    """What one run of the core has shown."""

    keys: int
    events: int
    event_bytes: float
    batch_bytes: float
    """The size of an event's share of the ledger batch."""
    stages: list[Figure]
    total: Figure
    reference: Figure
    """Decode and decide by the plain-Python twin: what ``scan`` and ``decide`` are compared with."""
    measured: Memory
    """What the memory did while the figures were taken."""
    state: Memory
    """What the state takes, census and measured events together."""
    committed_bytes: int
    records: dict[str, int]
    outcomes: dict[str, int]
    census_events_per_s: float

    @property
    def bytes_per_record(self) -> float:
        """The memory in use for each record of any table."""
        return self.state.resident_bytes / sum(self.records.values())


class WarmCore:
    """An engine with a census behind it, and the way of one reply through it. ``batch`` is the last one decided."""

    def __init__(self, workload: Workload, rulebook: Rulebook) -> None:
        self.workload = workload
        self.reader = ReplyReader()
        self.engine = FastEngine(rulebook, SECRET)
        self.header = BatchHeader(1, bytes(32), (0, 0), 1)
        self.encoded = b""
        self._batch: FastBatch | None = None
        self._next_event = 0
        self._take_census()

    @property
    def batch(self) -> FastBatch:
        """The batch that was decided last."""
        assert self._batch is not None, "nothing was decided yet"
        return self._batch

    def replies(self, count: int) -> list[bytes]:
        """Return the next ``count`` replies of 8192 entries."""
        first, self._next_event = self._next_event, self._next_event + count * CHUNK_EVENTS
        starts = range(first, self._next_event, CHUNK_EVENTS)
        return [Entries.of(self.workload.events(start, CHUNK_EVENTS)).reply(KEY) for start in starts]

    def take(self, reply: bytes) -> tuple[int, int, int, int]:
        """Send one reply through every stage and return what each took, in ns."""
        scan_ns = self.scan(reply)
        started = time.perf_counter_ns()
        self.decide()
        decided = time.perf_counter_ns()
        self.encode()
        encoded = time.perf_counter_ns()
        self.digest()
        return scan_ns, decided - started, encoded - decided, time.perf_counter_ns() - encoded

    def scan(self, reply: bytes) -> int:
        """Hand a reply over as a socket would, piece by piece, and return how long the reader worked, in ns.

        Copying the bytes is not counted: on a socket the kernel does it.
        """
        self.reader.clear()
        source = memoryview(reply)
        spent = 0
        while source:
            place = self.reader.get_buffer(len(source))
            size = min(len(place), len(source), RECEIVE_BYTES)
            place[:size] = source[:size]
            started = time.perf_counter_ns()
            self.reader.buffer_updated(size)
            spent += time.perf_counter_ns() - started
            source = source[size:]
        return spent

    def decide(self) -> None:
        """Decide the reply that the reader holds."""
        self._batch = self.engine.decide_reply(self.reader)

    def encode(self) -> None:
        """Encode the batch as the next one of a ledger."""
        self.encoded = self.batch.encode(self.header)

    def digest(self) -> None:
        """Chain the batch to its predecessor."""
        last = self.header
        self.header = BatchHeader(
            last.batch + 1,
            hashlib.sha256(self.encoded).digest(),
            self.batch.through,
            last.first_seq + self.batch.counts.entries,
        )

    def _take_census(self) -> None:
        started = time.perf_counter()
        for first in range(0, self.workload.census_size, CHUNK_EVENTS):
            self.scan(Entries.of(self.workload.census(first, CHUNK_EVENTS)).reply(KEY))
            self.decide()
        self.census_s = time.perf_counter() - started


def measure_core(settings: CoreSettings) -> Core:
    """Measure in a process of its own, so that its memory is all that is counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_measure, settings).result()


def _measure(settings: CoreSettings) -> Core:
    rulebook = load(RULEBOOK)
    with pinned(WORKER_CORE):
        reference = _reference_figure(settings, rulebook)
        empty = Memory.now()
        core = WarmCore(settings.workload, rulebook)
        census = Memory.now()
        replies = core.replies(WARM_UP_REPLIES + settings.replies)
        warm_up, measured = replies[:WARM_UP_REPLIES], replies[WARM_UP_REPLIES:]
        for reply in warm_up:
            core.take(reply)
        outcomes: dict[str, int] = {}
        batch_bytes = 0
        before = Memory.now()
        spent = []
        for reply in measured:
            spent.append(core.take(reply))
            batch_bytes += len(core.encoded)
            outcomes = _added(outcomes, core.batch)
        after = Memory.now()
    events = CHUNK_EVENTS * len(measured)
    per_event = np.array(spent) / CHUNK_EVENTS
    return Core(
        keys=settings.keys,
        events=events,
        event_bytes=sum(map(len, measured)) / events,
        batch_bytes=batch_bytes / events,
        stages=[
            Figure(stage, "ns/event", tuple(column))
            for stage, column in zip(STAGES, per_event.T.tolist(), strict=True)
        ],
        total=Figure("total", "ns/event", tuple(per_event.sum(axis=1).tolist())),
        reference=reference,
        measured=after.since(before),
        # The replies that were made in between are not part of the state.
        state=_sum(census.since(empty), after.since(before)),
        committed_bytes=core.engine.memory_bytes,
        records=core.engine.sizes,
        outcomes=outcomes,
        census_events_per_s=settings.workload.census_size / core.census_s,
    )


def _sum(*parts: Memory) -> Memory:
    return Memory(**{name: sum(getattr(part, name) for part in parts) for name in Memory.__struct_fields__})


def _added(outcomes: dict[str, int], batch: FastBatch) -> dict[str, int]:
    counts = {**batch.outcomes, "duplicate": batch.counts.duplicates, "dead_letter": batch.counts.dead_letters}
    return {name: outcomes.get(name, 0) + count for name, count in counts.items()}


# ------------------------------------------------------------------------------------------------- the peer


def reference_slice(settings: CoreSettings) -> list[StreamEntry]:
    """Return the first events of the workload as the plain engine takes them."""
    count = -(-settings.reference_events // CHUNK_EVENTS) * CHUNK_EVENTS
    entries = Entries.of(settings.workload.events(0, count))
    columns = zip(entries.ms.tolist(), entries.seq.tolist(), entries.values.strings(), strict=True)
    return [StreamEntry(ms, seq, ((b"e", value),)) for ms, seq, value in columns][: settings.reference_events]


def _reference_figure(settings: CoreSettings, rulebook: Rulebook) -> Figure:
    """Let the plain engine decide a slice in eight parts, and check that the compiled one decides the same."""
    entries = reference_slice(settings)
    reference, fast = ReferenceEngine(rulebook, SECRET), open_engine("fast", rulebook, SECRET)
    size = max(1, len(entries) // 8)
    runs = []
    for start in range(0, len(entries), size):
        part = entries[start : start + size]
        started = time.perf_counter_ns()
        decided = reference.decide_entries(part)
        runs.append((time.perf_counter_ns() - started) / len(part))
        twin = fast.decide_entries(part)
        assert _same(decided.counts, twin.counts) and +decided.points == _positive(twin.points), "the engines disagree"
    return Figure("reference", "ns/event", tuple(runs))


def _same(left: Counts, right: Counts) -> bool:
    return msgspec.structs.astuple(left) == msgspec.structs.astuple(right)


def _positive(points: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in points.items() if count > 0}


# ---------------------------------------------------------------------------------------------- for people


def summary(results: list[Core]) -> str:
    """Return the table of all key counts, stage by stage."""
    headings = ["ns/event"] + [f"{result.keys:,} keys" for result in results]
    rows = [[stage] + [_with_noise(result.stages[number]) for result in results] for number, stage in enumerate(STAGES)]
    rows.append(["total", *(_with_noise(result.total) for result in results)])
    rows.append(["events/s, one core", *(f"{1e9 / result.total.median:,.0f}" for result in results)])
    rows.append(["plain engine, decode + decide", *(_with_noise(result.reference) for result in results)])
    rows.append(["compiled over plain", *(f"{_advantage(result):,.0f} x" for result in results)])
    rows.append([f"over {results[0].keys:,} keys", *(f"{r.total.ratio_to(results[0].total):.2f}" for r in results)])
    rows += [[name, *(value(result) for result in results)] for name, value in MEMORY_ROWS.items()]
    return table(headings, rows)


def _advantage(result: Core) -> float:
    scan, decide = (result.stages[STAGES.index(stage)] for stage in ("scan", "decide"))
    return result.reference.median / (scan.median + decide.median)


def _with_noise(figure: Figure) -> str:
    """Return the median and the middle half of the runs: single replies are interrupted, and that is not the core."""
    low, high = np.percentile(figure.runs, [25, 75])
    return f"{figure.median:,.0f} ({low:,.0f}-{high:,.0f})"


MEMORY_ROWS: Final[dict[str, Any]] = {
    "records in all tables": lambda result: f"{sum(result.records.values()):,}",
    "state, MiB resident": lambda result: f"{result.state.resident_bytes / 2**20:,.0f}",
    "of that on huge pages": lambda result: f"{result.state.huge_page_bytes / max(1, result.state.resident_bytes):.0%}",
    "tables, MiB committed": lambda result: f"{result.committed_bytes / 2**20:,.0f}",
    "bytes per record": lambda result: f"{result.bytes_per_record:,.0f}",
    "bytes per key": lambda result: f"{result.state.resident_bytes / result.keys:,.0f}",
    "page faults per 1000 events": lambda result: f"{1000 * result.measured.minor_faults / result.events:.1f}",
    "event, bytes": lambda result: f"{result.event_bytes:.0f}",
    "ledger, bytes per event": lambda result: f"{result.batch_bytes:.0f}",
}
