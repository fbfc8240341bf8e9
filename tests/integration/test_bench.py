"""The benchmarks that last, on as little as they take: whether they work and their books add up, not how fast it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Benchmarks are no part of what gets installed. At the end, so that no build of another mode is shadowed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.audit import AuditSettings, measure_audit
from bench.audit import summary as summary_of_audit
from bench.book import BookSettings, measure_book, summary
from bench.growth import PARTS, GrowthSettings, measure_growth
from bench.jobs import JobsSettings, measure_jobs
from bench.jobs import summary as summary_of_jobs
from bench.latency import LatencySettings, measure_latency
from bench.latency import summary as summary_of_latency
from bench.restart import RestartSettings, measure_restart
from bench.workload import CHUNK_EVENTS


@pytest.mark.slow
def test_latency_of_worker_and_floor(tmp_path: Path) -> None:
    settings = LatencySettings(
        rate_per_s=CHUNK_EVENTS, seconds=1, runs=1, members=1_000, directory=tmp_path, variants=("quiet",)
    )
    worker, floor = measure_latency(settings, lambda _: None).rows
    assert worker.events == floor.events == CHUNK_EVENTS
    for row in (worker, floor):
        values = [figure.median for figure in row.figures]
        assert values[0] > 0
        assert values == sorted(values)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_latency_beside_a_book_that_is_behind(tmp_path: Path) -> None:
    settings = LatencySettings(
        rate_per_s=CHUNK_EVENTS, seconds=1, runs=1, members=1_000, directory=tmp_path, variants=("book",)
    )
    result = measure_latency(settings, lambda _: None)
    assert [row.events for row in result.rows] == [CHUNK_EVENTS] * 3
    assert [one.name for one in result.behind] == [row.name for row in result.rows[1:]]
    for one in result.behind:
        assert min(one.begin.runs) >= min(one.least.runs) >= 0
    assert "behind at the begin" in summary_of_latency(result)


@pytest.mark.slow
def test_latency_while_snapshots_are_written(tmp_path: Path) -> None:
    settings = LatencySettings(
        rate_per_s=CHUNK_EVENTS,
        seconds=1,
        snapshot_members=1_000,
        snapshot_seconds=4,
        snapshot_interval_s=1,
        directory=tmp_path,
        variants=("snapshot",),
    )
    result = measure_latency(settings, lambda _: None)
    assert result.snapshots
    during, between, floor = result.rows
    assert during.events
    assert during.events + between.events == 4 * CHUNK_EVENTS
    assert floor.events == CHUNK_EVENTS


@pytest.mark.slow
def test_restart_and_replay(tmp_path: Path) -> None:
    settings = RestartSettings(members=5_000, replay_events=4 * CHUNK_EVENTS, runs=1, directory=tmp_path)
    result = measure_restart(settings, lambda _: None)
    assert result.replayed_events >= 4 * CHUNK_EVENTS
    assert result.memory.median > result.snapshot_bytes > 0
    assert result.restart.median > result.read.median > 0


@pytest.mark.slow
def test_growth_of_a_stream(tmp_path: Path) -> None:
    settings = GrowthSettings(
        core_events=PARTS * CHUNK_EVENTS,
        core_members=1_000,
        worker_events=12 * CHUNK_EVENTS,
        worker_members=1_000,
        runs=1,
        directory=tmp_path,
    )
    result = measure_growth(settings, lambda _: None)
    assert len(result.core) == len(result.worker) == PARTS
    assert min(figure.median for figure in (*result.core, *result.worker)) > 0
    assert result.records[-1] > result.records[0]


def test_a_ledger_is_booked_and_settled() -> None:
    measured = measure_book(BookSettings(events=2 * CHUNK_EVENTS, runs=1, members=1_000), lambda _: None)
    assert [shape.name for shape in measured.shapes] == ["one core", "two cores"]
    for shape in measured.shapes:
        assert 2 * CHUNK_EVENTS * 0.99 < shape.entries - 1_000 < 2 * CHUNK_EVENTS
        assert 0 < shape.ingest.median < shape.bare.median
        assert 0 < shape.plain.median < shape.bare.median
        assert shape.settle.median > 0
    assert "of bare copy | of plain" in " ".join(summary(measured).split())


@pytest.mark.slow
def test_a_day_is_settled_and_expired_beside_others() -> None:
    settings = JobsSettings(members=12_000, runs=1, alone_s=0.5, beside_events=CHUNK_EVENTS)
    measured = measure_jobs(settings, lambda _: None)
    assert measured.points == 600_000
    for piece in measured.pieces:
        assert piece.reads is not None
        assert piece.ingests is not None
        assert 0 < piece.reads.median.median <= piece.reads.maximum.median
        assert 0 < piece.ingests.median.median <= piece.ingests.maximum.median
    jobs = [piece for piece in measured.pieces if piece.process is not None]
    assert [piece.name for piece in jobs] == ["settle", "expire"]
    for piece in jobs:
        assert piece.rate is not None
        assert piece.transactions is not None
        # Three transactions of it, none of which is the whole of it.
        assert piece.transactions.maximum.median < 1000 * measured.members / piece.rate.median
        assert piece.process is not None
        assert piece.backend is not None
        assert min(piece.process.first_quarter.median, piece.backend.first_quarter.median) > 0
    assert "of one transaction" in summary_of_jobs(measured)


def test_a_ledger_is_decided_again_and_begun_in_the_middle() -> None:
    measured = measure_audit(AuditSettings(events=2048, runs=1, members=1_000), lambda _: None)
    assert measured.events == 2048
    rates = {figure.name: figure.median for figure in measured.figures}
    assert 0 < rates["take over"] < rates["remember"] < rates["read"]
    assert rates["decide"] < rates["remember"]
    assert "over decide" in summary_of_audit(measured)
