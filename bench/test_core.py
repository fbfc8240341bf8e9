"""The core by pytest-benchmark: one reply of 8192 fresh events at a time, against a state that is warm.

``python -m bench core`` measures the same with its own processes, several runs and the memory; this is for comparing
two states of the sources (``--benchmark-autosave``, then ``--benchmark-compare``). Times are per reply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from accrual.engine import ReferenceEngine
from accrual.rulebook import load
from bench.core import RULEBOOK, SECRET, CoreSettings, WarmCore, reference_slice
from bench.machine import WORKER_CORE, pinned
from bench.workload import CHUNK_EVENTS

KEYS = (100_000, 1_000_000)
ROUNDS = 24
WARM_UP_REPLIES = 4
REFERENCE_EVENTS = CHUNK_EVENTS // 16


@pytest.fixture(scope="module", params=KEYS, ids="{:,} keys".format)
def core(request: pytest.FixtureRequest) -> Iterator[WarmCore]:
    """Give an engine that knows so many keys a table."""
    with pinned(WORKER_CORE):
        warm = WarmCore(CoreSettings(request.param).workload, load(RULEBOOK))
        for reply in warm.replies(WARM_UP_REPLIES):
            warm.take(reply)
        yield warm


def tell_events(benchmark: Any, events: int) -> None:
    """Put into the saved file what one round had to do."""
    benchmark.extra_info["events"] = events
    benchmark.extra_info["ns_per_event"] = round(1e9 * benchmark.stats.stats.median / events, 1)


@pytest.mark.benchmark(group="scan, decide, encode, digest")
def test_whole(benchmark: Any, core: WarmCore) -> None:
    """From the bytes of a reply to a chained ledger batch."""
    replies = iter(core.replies(ROUNDS))
    benchmark.pedantic(core.take, setup=lambda: ((next(replies),), {}), rounds=ROUNDS)
    tell_events(benchmark, CHUNK_EVENTS)


@pytest.mark.benchmark(group="decide")
def test_decide(benchmark: Any, core: WarmCore) -> None:
    """Decode and decide a reply that was scanned."""
    replies = iter(core.replies(ROUNDS))

    def receive() -> None:
        core.scan(next(replies))

    benchmark.pedantic(core.decide, setup=receive, rounds=ROUNDS)
    tell_events(benchmark, CHUNK_EVENTS)


@pytest.mark.benchmark(group="encode")
def test_encode(benchmark: Any, core: WarmCore) -> None:
    """Encode a batch that was decided."""
    replies = iter(core.replies(ROUNDS))

    def receive_and_decide() -> None:
        core.scan(next(replies))
        core.decide()

    benchmark.pedantic(core.encode, setup=receive_and_decide, rounds=ROUNDS)
    tell_events(benchmark, CHUNK_EVENTS)


@pytest.mark.benchmark(group="decide, plain engine, 512 events")
def test_reference_engine(benchmark: Any) -> None:
    """Decode and decide by the plain twin, on an empty state."""
    settings = CoreSettings(KEYS[0], reference_events=CHUNK_EVENTS)
    entries = reference_slice(settings)
    parts = iter([entries[at : at + REFERENCE_EVENTS] for at in range(0, len(entries), REFERENCE_EVENTS)])
    engine = ReferenceEngine(load(RULEBOOK), SECRET)
    with pinned(WORKER_CORE):
        benchmark.pedantic(engine.decide_entries, setup=lambda: ((next(parts),), {}), rounds=8)
    tell_events(benchmark, REFERENCE_EVENTS)
