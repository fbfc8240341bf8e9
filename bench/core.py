"""The compiled core alone: what one event costs, stage by stage, on a state that knows a given number of keys.

``WarmCore`` lets the engine decide a census first, which shows it every member, device, phone and address once; then
come replies with fresh events of the standard workload. Everything that is measured works on bytes that are already
there, as they are after ``recv``: what the kernel and the server cost is in drain.py. Times are processor time, so that
whoever else is on the machine disturbs the figures less.

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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from accrual.engine import BatchHeader, ReferenceEngine, Secret, StreamEntry, open_engine
from accrual.engine.fast import FastBatch, FastEngine
from accrual.rulebook import Rulebook, load
from bench.machine import ROOT, WORKER_CORE, Memory, pinned, yardstick_ms
from bench.memory import find_memory_for, random_line_ns
from bench.report import Figure, table
from bench.wire import Entries
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, Workload
from fastpath.core import DEFAULT_SEGMENT_SHIFT
from fastpath.resp import ReplyReader

__all__ = ["RULEBOOK", "STAGES", "Core", "CoreSettings", "WarmCore", "measure_core", "reference_slice", "summary"]

RULEBOOK: Final = ROOT / "bench" / "rulebook.toml"
STAGES: Final = ("scan", "decide", "encode", "digest")
# The last one, which is no part of the core: the worker chains what it commits.
DIGEST: Final = 3
# A benchmark's fingerprints need not be secret, and must be the same in every run.
SECRET: Final = Secret(bytes(range(16)))
KEY: Final = "accrual:{bench}:events"

# As much as one read of a busy socket brings.
RECEIVE_BYTES: Final = 128 * 1024
WARM_UP_REPLIES: Final = 4
MEMBERS_PER_EVENT_AND_SECOND: Final = 500

# Lines of 64 bytes that an event of the workload touches in the tables: five of slots, the others of records.
LINES: Final = 16


@dataclass(frozen=True)
class CoreSettings:
    """What is measured: ``keys`` members and phones, 1.2 times as many devices; ``replies`` of 8192 fresh events."""

    keys: int
    replies: int = 24
    runs: int = 3
    reference_events: int = 8192
    seed: int = DEFAULT_SEED

    @property
    def workload(self) -> Workload:
        """The workload with that many members, each of whom comes as often as in the standard one."""
        return Workload(members=self.keys, rate_per_s=max(1, self.keys // MEMBERS_PER_EVENT_AND_SECOND), seed=self.seed)


class Core(msgspec.Struct, frozen=True):
    """What the core has shown. A run of a figure is the mean over all events of one process."""

    keys: int
    events: int
    event_bytes: float
    batch_bytes: float
    """The size of an event's share of the ledger batch."""
    stages: list[Figure]
    total: Figure
    """All stages but the digest."""
    slowest: Figure
    """The longest that one reply of 8192 events took: growth must not be a long stop."""
    reference: Figure
    """Decode and decide by the plain-Python twin: what ``scan`` and ``decide`` are compared with."""
    measured: Memory
    """What was added while the figures were taken."""
    state: Memory
    """What the state takes, census and measured events together."""
    committed_bytes: int
    records: dict[str, int]
    outcomes: dict[str, int]
    yardstick_ms: Figure
    lines: Figure
    """What ``LINES`` lines at random in as much memory take to read, and nothing else: nobody is spared that."""

    @property
    def bytes_per_record(self) -> float:
        """The memory in use for each record of any table."""
        return self.state.resident_bytes / sum(self.records.values())


class WarmCore:
    """An engine with a census behind it, and the way of one reply through it. ``batch`` is the last one decided."""

    def __init__(self, workload: Workload, rulebook: Rulebook, segment_shift: int = DEFAULT_SEGMENT_SHIFT) -> None:
        self.workload = workload
        self.reader = ReplyReader()
        self.engine = FastEngine(rulebook, SECRET, segment_shift=segment_shift)
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
        started = time.thread_time_ns()
        self.decide()
        decided = time.thread_time_ns()
        self.encode()
        encoded = time.thread_time_ns()
        self.digest()
        return scan_ns, decided - started, encoded - decided, time.thread_time_ns() - encoded

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
            started = time.thread_time_ns()
            self.reader.buffer_updated(size)
            spent += time.thread_time_ns() - started
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
        for first in range(0, self.workload.census_size, CHUNK_EVENTS):
            self.scan(Entries.of(self.workload.census(first, CHUNK_EVENTS)).reply(KEY))
            self.decide()


def measure_core(settings: CoreSettings) -> Core:
    """Measure in processes of their own, one after the other, so that their memory is all that is counted."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as executor:
        core = _together([executor.submit(_measure, settings).result() for _ in range(settings.runs)])
        lines = [executor.submit(_read_lines, core.committed_bytes).result() for _ in range(settings.runs)]
    return msgspec.structs.replace(core, lines=Figure("lines", "ns", tuple(lines)))


def _together(runs: Sequence[Core]) -> Core:
    """Return the last run with the figures of all of them; whatever else it says is the same in each."""

    def joined(figures: Sequence[Figure]) -> Figure:
        return msgspec.structs.replace(figures[0], runs=tuple(value for figure in figures for value in figure.runs))

    return msgspec.structs.replace(
        runs[-1],
        stages=[joined(figures) for figures in zip(*(run.stages for run in runs), strict=True)],
        total=joined([run.total for run in runs]),
        slowest=joined([run.slowest for run in runs]),
        reference=joined([run.reference for run in runs]),
        yardstick_ms=joined([run.yardstick_ms for run in runs]),
    )


class Taken(NamedTuple):
    """What a row of replies took and gave."""

    spent_ns: npt.NDArray[np.int64]
    """``(replies, stages)``."""
    batch_bytes: int
    outcomes: Counter[str]

    def per_event(self) -> list[float]:
        """Return what each stage took for one event, on average.

        Not the median of the replies: a table that grows does so in few of them, and all events pay for it.
        """
        means: list[float] = (self.spent_ns.mean(axis=0) / CHUNK_EVENTS).tolist()
        return means


def _measure(settings: CoreSettings) -> Core:
    rulebook = load(RULEBOOK)
    find_memory_for(settings.keys)
    with pinned(WORKER_CORE):
        yardstick_before = yardstick_ms()
        reference = _reference_figure(settings, rulebook)
        empty = Memory.now()
        core = WarmCore(settings.workload, rulebook)
        census = Memory.now().since(empty)
        replies = core.replies(WARM_UP_REPLIES + settings.replies)
        _take_all(core, replies[:WARM_UP_REPLIES])
        measured = replies[WARM_UP_REPLIES:]
        before = Memory.now()
        taken = _take_all(core, measured)
        growth = Memory.now().since(before)
        yardstick_after = yardstick_ms()
    events = CHUNK_EVENTS * len(measured)
    per_event = taken.per_event()
    return Core(
        keys=settings.keys,
        events=events,
        event_bytes=sum(map(len, measured)) / events,
        batch_bytes=taken.batch_bytes / events,
        stages=[Figure(stage, "ns/event", (mean,)) for stage, mean in zip(STAGES, per_event, strict=True)],
        total=Figure("total", "ns/event", (sum(per_event[:DIGEST]),)),
        slowest=Figure("slowest reply", "ms", (float(taken.spent_ns.sum(axis=1).max()) / 1e6,)),
        reference=reference,
        measured=growth,
        # The replies that were made in between are not part of the state.
        state=census.and_then(growth),
        committed_bytes=core.engine.memory_bytes,
        records=core.engine.sizes,
        outcomes=dict(taken.outcomes),
        yardstick_ms=Figure("yardstick", "ms", (yardstick_before, yardstick_after)),
        lines=Figure("lines", "ns", ()),
    )


def _read_lines(size_bytes: int) -> float:
    with pinned(WORKER_CORE):
        return LINES * random_line_ns(size_bytes)


def _take_all(core: WarmCore, replies: Sequence[bytes]) -> Taken:
    spent_ns = np.empty((len(replies), len(STAGES)), np.int64)
    batch_bytes = 0
    outcomes: Counter[str] = Counter()
    for number, reply in enumerate(replies):
        spent_ns[number] = core.take(reply)
        batch_bytes += len(core.encoded)
        counts = core.batch.counts
        outcomes.update(core.batch.outcomes, duplicate=counts.duplicates, dead_letter=counts.dead_letters)
    return Taken(spent_ns, batch_bytes, outcomes)


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
        started = time.thread_time_ns()
        decided = reference.decide_entries(part)
        runs.append((time.thread_time_ns() - started) / len(part))
        twin = fast.decide_entries(part)
        if decided.counts != twin.counts or +decided.points != +Counter(twin.points):
            raise RuntimeError("the engines disagree")
    return Figure("reference", "ns/event", (float(np.median(runs)),))


# ---------------------------------------------------------------------------------------------- for people


def summary(results: list[Core]) -> str:
    """Return the table of all key counts, stage by stage."""
    headings = ["ns/event"] + [f"{result.keys:,} keys" for result in results]
    rows = [[stage] + [_with_noise(result.stages[number]) for result in results] for number, stage in enumerate(STAGES)]
    rows.insert(DIGEST, ["scan + decide + encode", *(_with_noise(result.total) for result in results)])
    rows.append(["events/s, one core", *(f"{1e9 / result.total.median:,.0f}" for result in results)])
    rows.append(["plain engine, decode + decide", *(_with_noise(result.reference) for result in results)])
    rows.append(["compiled over plain", *(f"{_advantage(result):,.0f} x" for result in results)])
    rows.append([f"over {results[0].keys:,} keys", *(f"{r.total.ratio_to(results[0].total):.2f}" for r in results)])
    rows.append([f"{LINES} random lines of that memory", *(_with_noise(result.lines) for result in results)])
    rows.append(["slowest reply of 8192, ms", *(_with_noise(result.slowest, 1) for result in results)])
    rows.append(["yardstick, ms", *(_with_noise(result.yardstick_ms) for result in results)])
    rows += [[name, *(value(result) for result in results)] for name, value in MEMORY_ROWS.items()]
    return table(headings, rows)


def _advantage(result: Core) -> float:
    scan, decide = (result.stages[STAGES.index(stage)] for stage in ("scan", "decide"))
    return result.reference.median / (scan.median + decide.median)


def _with_noise(figure: Figure, places: int = 0) -> str:
    return f"{figure.median:,.{places}f} ±{figure.noise:.0%}"


MEMORY_ROWS: Final[dict[str, Any]] = {
    "records in all tables": lambda result: f"{sum(result.records.values()):,}",
    "state, MiB resident": lambda result: f"{result.state.resident_bytes / 2**20:,.0f}",
    "of that on huge pages": lambda result: f"{result.state.huge_page_bytes / max(1, result.state.resident_bytes):.0%}",
    "tables, MiB committed": lambda result: f"{result.committed_bytes / 2**20:,.0f}",
    "bytes per record": lambda result: f"{result.bytes_per_record:,.0f}",
    "bytes per key": lambda result: f"{result.state.resident_bytes / result.keys:,.0f}",
    "page faults, minor and major": lambda result: f"{result.measured.minor_faults} + {result.measured.major_faults}",
    "event, bytes": lambda result: f"{result.event_bytes:.0f}",
    "ledger, bytes per event": lambda result: f"{result.batch_bytes:.0f}",
}
