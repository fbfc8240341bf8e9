"""Clocks that jump, day boundaries and the hour that comes twice: no decision changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import fastpath.core
from accrual.ledger import entry_line
from accrual.stream import Keys
from runs import check_like, drain
from servers import Server
from workers import (
    ROOT,
    RULEBOOK,
    WorkerProcess,
    checkpoint_of,
    compact,
    expected,
    fill,
    ledger_output,
    order,
    stream_entries,
    wait_for_batch,
)

BERLIN: Final = RULEBOOK.replace("Asia/Shanghai", "Europe/Berlin")
JUMPING: Final = (str(ROOT / "tests" / "jumping.py"),)
HOUR_MS: Final = 3_600_000
# Two days before summer time ends there, at 01:00 UTC of 25 October 2026.
START_MS: Final = int(datetime(2026, 10, 23, tzinfo=UTC).timestamp()) * 1000
# The server's clock is right, ahead, behind; and once for a while so far ahead that ids are forgotten meanwhile.
OFFSETS_HOURS: Final = (0, 0, 1, -1, 25, -3)


def on_a_server_whose_clock_jumps(count: int, rng: random.Random) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield orders of a week. An entry's ID is the server's time, or follows the last one where that went back."""
    now_ms, last, offset_ms = START_MS, (0, 0), 0
    for number in range(1, count + 1):
        now_ms += rng.randrange(2 * 7 * 24 * HOUR_MS // count)
        if rng.random() < 0.02:
            offset_ms = rng.choice(OFFSETS_HOURS) * HOUR_MS
        if number == count // 2:
            offset_ms = 4 * 24 * HOUR_MS
        last = max((now_ms + offset_ms, 0), (last[0], last[1] + 1))
        again = rng.random() < 0.2
        event = order(rng.randrange(1, number + 1) if again else number, ts=now_ms - rng.randrange(HOUR_MS))
        yield f"{last[0]}-{last[1]}", {"e": compact(event)}


def test_clocks_that_jump_change_no_decision(valkey: Server, tmp_path: Path, rng: random.Random) -> None:
    client = valkey.client()
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BERLIN, encoding="utf-8")
    entries = list(on_a_server_whose_clock_jumps(2000, rng))
    for partition in ("p", "unbroken"):
        fill(client, partition, entries)
    snapshots = ("--snapshots", str(tmp_path / "snapshots"), "--snapshot-interval-s", "0")
    small = ("--batch-entries", "10", "--linger-ms", "0", "--in-flight-batches", "1")
    for _ in range(2):
        with WorkerProcess(valkey.url, "p", rulebook, *small, *snapshots, program=JUMPING) as worker:
            wait_for_batch(client, checkpoint_of(client, "p").batch + 20)
            worker.kill()
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *snapshots, program=JUMPING) as worker:
        assert worker.wait() == 0, worker.log
    drain(valkey.url, rulebook, "unbroken")
    check_like(valkey, "unbroken", "p")
    wanted = expected(stream_entries(client, "p"), BERLIN)
    assert ledger_output(valkey, "p") == b"".join(entry_line(*row) + b"\n" for row in wanted.rows)
    assert client.xlen(Keys("p").deadletters) == len(wanted.dead_letters)
    # What the jumps made late, or forgotten, is as late or forgotten in every run.
    outcomes = {entry.outcome for _, _, entry in wanted.rows}
    assert outcomes >= {"granted", "deferred"}
    assert wanted.duplicates + len(wanted.dead_letters) > 0


def test_the_compiled_core_cannot_read_a_clock() -> None:
    """What it does not call it cannot depend on; it asks neither the system for the time nor for random numbers."""
    folder = Path(fastpath.core.__file__).parent
    modules = [*folder.glob("*.so")]
    assert any(path.name.startswith("decide.") for path in modules)
    for path in modules:
        found = path.read_bytes()
        for name in (b"clock_gettime", b"gettimeofday", b"localtime", b"getrandom"):
            assert name not in found, (path.name, name)
