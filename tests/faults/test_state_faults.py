"""Faults around the state: whatever becomes of its snapshots, the ledger is that of an unbroken run, to the byte."""

from __future__ import annotations

import random
import re
import signal
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from accrual.settings import Settings
from accrual.snapshots import SnapshotDirectory
from accrual.stream import Keys, parse_stream_id
from runs import check, check_like, drain, producing
from servers import Server
from workers import (
    NOON_MS,
    WorkerProcess,
    checkpoint_of,
    compact,
    fill,
    order,
    wait_for_batch,
    wait_for_events,
    wait_until,
)

KEYS = Keys("p")
DEFAULT_LEASE_MS = Settings().lease_ms
FREQUENT = ("--snapshot-interval-s", "0", "--batch-entries", "50", "--linger-ms", "1")


def entries_of(numbers: range) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"{NOON_MS + number}-0", {"e": compact(order(number))}) for number in numbers]


def with_snapshots(directory: Path, *flags: str) -> tuple[str, ...]:
    return ("--snapshots", str(directory), *FREQUENT, *flags)


@pytest.fixture
def taken(valkey: Server, rulebook: Path, tmp_path: Path) -> SnapshotDirectory:
    """A partition with 2000 events decided and some snapshots taken, and 500 more events on the stream."""
    directory = tmp_path / "snapshots"
    client = valkey.client()
    fill(client, "p", entries_of(range(1, 2001)))
    drain(valkey.url, rulebook, "p", *with_snapshots(directory))
    fill(client, "p", entries_of(range(2001, 2501)))
    snapshots = SnapshotDirectory(directory, "p")
    assert 1 <= len(snapshots.paths()) <= 3
    return snapshots


def kill_repeatedly(server: Server, rulebook: Path, directory: Path, rng: random.Random, kills: int) -> None:
    """Kill workers that do nothing but take snapshots beside their work."""
    client = server.client()
    flags = with_snapshots(directory, "--snapshots-kept", "2")
    with producing(server, "p", 3000 * kills, 500, rng):
        for _ in range(kills):
            with WorkerProcess(server.url, "p", rulebook, *flags, lease_ms=100) as worker:
                wait_for_batch(client, checkpoint_of(client, "p").batch + rng.randrange(0, 4))
                time.sleep(rng.uniform(0.0, 0.2))
                worker.kill()
    with WorkerProcess(server.url, "p", rulebook, "--drain", *flags) as worker:
        assert worker.wait() == 0, worker.log
    assert "snapshot read" in worker.log
    check(server)
    client.copy(KEYS.events, Keys("unbroken").events)
    drain(server.url, rulebook, "unbroken")
    check_like(server, "unbroken", "p")
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_workers_killed_while_they_take_snapshots(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    kill_repeatedly(valkey, rulebook, tmp_path / "snapshots", rng, kills=3)


@pytest.mark.slow
def test_workers_killed_twenty_times_while_they_take_snapshots(
    server: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    kill_repeatedly(server, rulebook, tmp_path / "snapshots", rng, kills=20)


def test_a_restart_goes_on_from_the_newest_snapshot(
    valkey: Server, rulebook: Path, tmp_path: Path, taken: SnapshotDirectory
) -> None:
    newest = taken.headers()[0].checkpoint.batch
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *with_snapshots(tmp_path / "snapshots")) as worker:
        assert worker.wait() == 0, worker.log
    assert f"snapshot read file=p-{newest:012d}.snapshot batch={newest}" in worker.log
    check(valkey)
    assert taken.paths()[0].stat().st_mode & 0o777 == 0o600


def spoil_magic(data: bytearray) -> None:
    data[:8] = b"NOTASNAP"


def spoil_version(data: bytearray) -> None:
    data[8:12] = struct.pack("<I", 2)


def spoil_header(data: bytearray) -> None:
    data[100] ^= 1


def spoil_image(data: bytearray) -> None:
    data[-200] ^= 1


def tear(data: bytearray) -> None:
    del data[-100:]


def lengthen(data: bytearray) -> None:
    data.append(0)


def empty(data: bytearray) -> None:
    data.clear()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_magic, "is not a snapshot"),
        (spoil_version, "has format 2; this version reads format 1"),
        (spoil_header, "is damaged in its header"),
        (spoil_image, "is damaged"),
        (tear, "is cut short"),
        (lengthen, "goes on behind its end"),
        (empty, "is cut short"),
    ],
)
def test_a_snapshot_that_cannot_be_believed_is_refused(
    spoil: object, reason: str, valkey: Server, rulebook: Path, tmp_path: Path, taken: SnapshotDirectory
) -> None:
    assert callable(spoil)
    # The newest is damaged; an older one, or the stream from its beginning, takes its place.
    path = taken.paths()[0]
    data = bytearray(path.read_bytes())
    spoil(data)
    path.write_bytes(data)
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *with_snapshots(tmp_path / "snapshots")) as worker:
        assert worker.wait() == 0, worker.log
    assert re.search(rf"snapshot refused: .*{re.escape(path.name)}: {reason}", worker.log)
    check(valkey)


def test_a_snapshot_of_another_stream_is_refused(
    valkey: Server, rulebook: Path, tmp_path: Path, taken: SnapshotDirectory
) -> None:
    client = valkey.client()
    before = taken.paths()
    client.delete(KEYS.events, KEYS.ledger, KEYS.checkpoint, KEYS.deadletters, KEYS.lease)
    fill(client, "p", entries_of(range(5001, 9001)))
    drain(valkey.url, rulebook, "p", "--batch-entries", "50")
    flags = with_snapshots(tmp_path / "snapshots")
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *flags) as worker:
        assert worker.wait() == 0, worker.log
    assert worker.log.count("it is of another stream") == len(before)
    assert "snapshot read" not in worker.log
    check(valkey)


def test_input_is_trimmed_behind_the_oldest_snapshot_and_no_further(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    client = valkey.client()
    directory = tmp_path / "snapshots"
    flags = with_snapshots(directory, "--snapshots-kept", "1", "--trim-input")
    fill(client, "p", entries_of(range(1, 3001)))
    client.copy(KEYS.events, Keys("unbroken").events)
    drain(valkey.url, rulebook, "p", *flags)
    # The stream server trims whole nodes of a hundred entries.
    wait_until(lambda: client.xlen(KEYS.events) < 3000, "nothing was trimmed")
    oldest = SnapshotDirectory(directory, "p").headers()[-1].checkpoint
    page: Any = client.xrange(KEYS.events, count=1)
    assert parse_stream_id(page[0][0]) <= oldest.position
    later = entries_of(range(3001, 3501))
    fill(client, "p", later)
    fill(client, "unbroken", later)
    drain(valkey.url, rulebook, "p", *flags)
    drain(valkey.url, rulebook, "unbroken")
    check_like(valkey, "unbroken", "p")
    # Without its snapshots the partition cannot be recovered, and says so.
    for path in directory.iterdir():
        path.unlink()
    with WorkerProcess(valkey.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 1
    assert "are still there: a restart replays what came after the snapshot" in worker.log


def test_a_standby_is_warm_and_takes_over(valkey: Server, rulebook: Path, rng: random.Random) -> None:
    client = valkey.client()
    with (
        producing(valkey, "p", 100_000, 500, rng),
        WorkerProcess(valkey.url, "p", rulebook, "--batch-entries", "20", lease_ms=DEFAULT_LEASE_MS) as owner,
    ):
        wait_for_batch(client, 5)
        with WorkerProcess(valkey.url, "p", rulebook, "--batch-entries", "20", lease_ms=DEFAULT_LEASE_MS) as standby:
            wait_until(lambda: "standing by" in standby.said, "the second worker stands by")
            wait_for_batch(client, checkpoint_of(client, "p").batch + 20)
            owner.kill()
            killed_at, killed_s = checkpoint_of(client, "p").batch, time.monotonic()
            wait_for_batch(client, killed_at)
            assert time.monotonic() - killed_s < 3.0
            assert standby.finish() == 0
    # What the owner had committed before its end was replayed before it; only the rest was left.
    assert "standing by" in standby.log
    recovered = re.search(r"recovered batches=(\d+) .* replayed=(\d+) seconds=([\d.]+)", standby.log)
    assert recovered is not None
    assert int(recovered[1]) == killed_at
    assert int(recovered[2]) <= killed_at // 2
    assert float(recovered[3]) < 1.0
    drain(valkey.url, rulebook)
    check(valkey)


def test_at_the_memory_limit_input_waits_and_nothing_is_lost(valkey: Server, rulebook: Path) -> None:
    client = valkey.client()
    fill(client, "p", entries_of(range(1, 2001)))
    limit = ("--memory-limit-bytes", str(1 << 20))
    with WorkerProcess(valkey.url, "p", rulebook, *limit) as worker:
        wait_until(lambda: "memory limit reached" in worker.said, "the worker reaches its memory limit")
        assert checkpoint_of(client, "p").events == 0
        wait_until(lambda: b"MEMORY LIMIT" in (client.hget(KEYS.checkpoint, "trouble") or b""), "its status says so")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert not client.hexists(KEYS.checkpoint, "trouble")
    assert "memory limit reached" in worker.log
    with WorkerProcess(valkey.url, "p", rulebook, "--memory-limit-bytes", str(1 << 30)) as worker:
        wait_for_events(client, 2000)
        assert worker.finish() == 0
    assert "memory limit" not in worker.log
    check(valkey)
