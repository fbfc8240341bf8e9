"""The pace of a snapshot: what it holds back, and that it can be let go."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from accrual.snapshots import Pace, SnapshotHeader, SnapshotReader, write_snapshot
from accrual.snapshots.format import UNFLUSHED_BYTES
from accrual.stream import Checkpoint

HEADER = SnapshotHeader(
    partition="p",
    checkpoint=Checkpoint(batch=1),
    slack_days=1,
    zone_rules="2026a",
    rulebook="",
    secret=bytes(16),
    created_ms=0,
    image={},
)


class Image:
    """An image of some pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.description: dict[str, object] = {}
        self._pieces = pieces

    def write(self, sink: object) -> bool:
        assert callable(sink)
        for piece in self._pieces:
            sink(piece)
        return True


def test_a_piece_takes_its_time() -> None:
    pace = Pace(1_000_000)
    begun_s = time.monotonic()
    for _ in range(3):
        pace.wrote(20_000)
    assert time.monotonic() - begun_s >= 0.06


def test_what_was_slow_is_not_made_up_for() -> None:
    pace = Pace(1_000_000)
    time.sleep(0.05)
    begun_s = time.monotonic()
    pace.wrote(20_000)
    pace.wrote(20_000)
    assert time.monotonic() - begun_s >= 0.02


def test_whoever_hurries_waits_no_longer() -> None:
    pace = Pace(1)
    waiting = threading.Thread(target=pace.wrote, args=(1 << 30,))
    waiting.start()
    pace.hurry()
    waiting.join(60)
    assert not waiting.is_alive()
    pace.wrote(1 << 30)


def test_a_file_that_is_flushed_on_the_way_is_whole(tmp_path: Path) -> None:
    pieces = [bytes([number]) * (UNFLUSHED_BYTES // 2 + 1) for number in range(5)]
    path = tmp_path / "p-000000000001.snapshot"
    size = write_snapshot(path, HEADER, Image(pieces), Pace())
    assert size == path.stat().st_size
    with SnapshotReader(path) as reader:
        assert reader.header == HEADER
        for piece in pieces:
            assert reader.read(len(piece)) == piece
        reader.finish()
