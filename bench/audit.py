"""What the audit takes to decide a stretch of a ledger again, and to begin one in the middle of it, on one core.

decide      the reference engine decides the events and encodes the batch: **the peer**, which all else is to be spared
take over   the days before a stretch: committed entries and their events, decided by nobody
remember    all before those days: what committed entries leave behind for ever, found by column
read        **the ceiling** of both: a batch decoded, and nothing else
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from accrual.audit.standing import Following, lasting_rows
from accrual.engine import BatchHeader, ReferenceEngine, StreamEntry
from accrual.ledger import GENESIS, EntriesBatch, decode
from accrual.rulebook import load
from bench.core import RULEBOOK, SECRET, CoreSettings, reference_slice
from bench.machine import WORKER_CORE, pinned
from bench.report import Figure, table
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED

__all__ = ["AuditMeasured", "AuditSettings", "measure_audit", "summary"]

BATCH_ENTRIES: Final = 1024
NAMES: Final = ("decide", "take over", "remember", "read")


@dataclass(frozen=True)
class AuditSettings:
    """What is measured: the first ``events`` of the workload of so many ``members``."""

    events: int = 4 * CHUNK_EVENTS
    runs: int = 3
    members: int = 100_000
    seed: int = DEFAULT_SEED


class AuditMeasured(msgspec.Struct, frozen=True):
    """Events per second, by name."""

    events: int
    figures: list[Figure]


def measure_audit(settings: AuditSettings, tell: Callable[[str], None] = print) -> AuditMeasured:
    """Decide, take over, remember and read the same batches, each ``runs`` times.

    Raises ``RuntimeError`` where an engine that took over does not stand where the one does that decided.
    """
    core = CoreSettings(settings.members, reference_events=settings.events, seed=settings.seed)
    entries = reference_slice(core)
    parts = [entries[start : start + BATCH_ENTRIES] for start in range(0, len(entries), BATCH_ENTRIES)]
    runs = []
    with pinned(WORKER_CORE):
        for number in range(1, settings.runs + 1):
            runs.append(_run(parts))
            tell(f"audit: run {number} of {settings.runs}: {len(entries) / runs[-1]['decide']:,.0f} events/s decided")
    figures = [Figure(name, "events/s", tuple(len(entries) / spent_s[name] for spent_s in runs)) for name in NAMES]
    return AuditMeasured(len(entries), figures)


def _run(parts: Sequence[Sequence[StreamEntry]]) -> Mapping[str, float]:
    """Return the processor time in s that each of them took."""
    rulebook, by_id = load(RULEBOOK), {entry[:2]: entry for part in parts for entry in part}
    engine = ReferenceEngine(rulebook, SECRET, slack_days=1)
    taking, remembering = Following(SECRET), Following(SECRET)
    for following in (taking, remembering):
        following.adopt(rulebook.text, 1)
    spent_s: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        with _timed(spent_s, "decide"):
            data = _decided(engine, part)
        with _timed(spent_s, "read"):
            decode(data)
        with _timed(spent_s, "take over"):
            taking.take(part, [row[1:] for row in _batch(data).rows()])
        with _timed(spent_s, "remember"):
            assert remembering.engine is not None
            remembering.remember(lasting_rows(_batch(data), remembering.engine), by_id.get)
    assert taking.engine is not None
    if _decided(taking.engine, parts[-1]) != _decided(engine, parts[-1]):
        raise RuntimeError("an engine that took over stands elsewhere than the one that decided")
    return spent_s


@contextlib.contextmanager
def _timed(spent_s: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent_s[name] += time.process_time() - started


def _decided(engine: ReferenceEngine, part: Sequence[StreamEntry]) -> bytes:
    return engine.decide_entries(part).encode(BatchHeader(1, GENESIS, (0, 0), 1))


def _batch(data: bytes) -> EntriesBatch:
    batch = decode(data)
    assert isinstance(batch, EntriesBatch)
    return batch


def summary(measured: AuditMeasured) -> str:
    """Return the table."""
    peer = measured.figures[0]
    rows = [
        [figure.name, f"{figure.median:,.0f}", f"±{figure.noise:.0%}", f"{figure.ratio_to(peer):.1f}"]
        for figure in measured.figures
    ]
    return f"{measured.events:,} events\n\n{table(['audit, one core', 'events/s', 'noise', 'over decide'], rows)}"
