from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

# Benchmarks are no part of what gets installed. At the end, so that no build of another mode is shadowed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.growth import GrowthSettings
from bench.report import Figure
from bench.restart import (
    PIECE_BYTES,
    Restart,
    RestartSettings,
    read_and_digested_s,
    state_of,
    summary,
    written_and_digested_s,
)
from bench.running import Said, census_of
from bench.workload import CHUNK_EVENTS, Workload

WORKLOAD = Workload(members=20_000, rate_per_s=40)


def test_the_state_has_every_key_once_and_five_members_an_address() -> None:
    chunks = list(state_of(WORKLOAD))
    for name in ("member", "device", "phone"):
        assert len(np.unique(np.concatenate([getattr(events, name) for events in chunks]))) == WORKLOAD.members
    addresses = np.concatenate([events.ip for events in chunks])
    assert len(np.unique(addresses)) == WORKLOAD.members // 5
    assert sum(map(len, chunks)) == WORKLOAD.members


def test_a_census_can_be_of_any_length() -> None:
    assert [len(events) for events in census_of(WORKLOAD, CHUNK_EVENTS + 1)] == [CHUNK_EVENTS, 1]


def test_a_log_line_gives_its_numbers() -> None:
    text = "INFO snapshot batch=12 bytes=4096 seconds=1.5"
    line = Said(7, text, re.compile("snapshot").search(text) or pytest.fail("no match"))
    assert (line.number("bytes"), line.number("seconds")) == (4096, 1.5)
    with pytest.raises(RuntimeError, match="no lag"):
        line.number("lag")


def test_ceilings_take_all_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PIECE_BYTES + 5))
    assert 0 < read_and_digested_s(path) < 10
    assert 0 < written_and_digested_s(tmp_path, 3 * PIECE_BYTES + 5) < 10
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_compares_each_figure() -> None:
    def figure(*runs: float, unit: str = "s") -> Figure:
        return Figure("x", unit, runs)

    result = Restart(
        members=10,
        replayed_events=5,
        snapshot_bytes=1 << 30,
        memory=figure(3 * 2.0**30, unit="bytes"),
        write=figure(6.0),
        write_ceiling=figure(3.0),
        read=figure(8.0, 12.0),
        read_ceiling=figure(5.0),
        replay=figure(500_000.0),
        replay_ceiling=figure(2_000_000.0),
        restart=figure(10.0),
        full_replay=figure(40.0),
        first_drain=figure(1.0),
        yardstick_ms=figure(1.0),
        file_system="ext4",
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary(result).splitlines()[2:]]
    assert rows == [
        ["resident, GiB", "3.00", "the records alone: 1.00", "3.00"],
        ["snapshot written, s", "6.0", "the same bytes written: 3.0", "2.00"],
        ["snapshot read, s", "10.0 ±20%", "the same bytes read: 5.0", "2.00"],
        ["replay, events/s", "500,000", "raw XREAD: 2,000,000", "0.25"],
        ["restart, s", "10.0", "without a snapshot: 40.0", "0.25"],
    ]


def test_a_large_state_keeps_the_pace_of_the_standard_workload() -> None:
    assert RestartSettings(members=1_000_000).workload == Workload(members=1_000_000)


def test_a_long_stream_lasts_as_many_days_as_it_should() -> None:
    settings = GrowthSettings(core_events=10_000_000, days=12)
    assert settings.core_events / settings.core_workload.rate_per_s / 86_400 == pytest.approx(12, rel=0.1)
