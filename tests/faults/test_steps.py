"""``kill -9`` at every step of a commit and of a snapshot, each found by counting.

A worker is killed at one step, its successor at the next, all on one stream that goes on meanwhile. What comes out is
the ledger of an unbroken run, to the byte.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, get_args

import pytest

from accrual.snapshots import SnapshotReader
from accrual.stream import Keys
from cutting import Cut, CuttingProxy, Where
from runs import check, check_like, drain, producing
from servers import Server
from workers import ROOT, WorkerProcess, checkpoint_of, wait_for_batch, wait_until

KEYS = Keys("p")
SMALL_BATCHES: Final = ("--batch-entries", "20", "--linger-ms", "1", "--in-flight-batches", "1")


def compare_trimmed(server: Server, rulebook: Path, *flags: str) -> None:
    """Likewise where the stream is trimmed, and ``unbroken`` has all that was ever on it."""
    drain(server.url, rulebook, "p", *flags)
    drain(server.url, rulebook, "unbroken")
    check(server, "unbroken")
    check_like(server, "unbroken", "p")


def compare(server: Server, rulebook: Path) -> None:
    """Go on to the end of the stream, and compare with a run in which nothing happened."""
    drain(server.url, rulebook)
    check(server)
    server.client().copy(KEYS.events, Keys("unbroken").events)
    drain(server.url, rulebook, "unbroken")
    check_like(server, "unbroken", "p")


# ------------------------------------------------------------------------------------------------- commits

# Each of the places between two bytes where something can be different: nothing was sent, some of it, all but the
# last byte; done, but not answered; answered in part, answered.
COMMIT_PLACES: Final[list[tuple[Where, float]]] = [
    ("before", 0.0),
    ("in request", 0.0),
    ("in request", 0.5),
    ("in request", 1.0),
    ("executed", 0.0),
    ("in reply", 0.0),
    ("in reply", 1.0),
    ("answered", 0.0),
]
COMMIT_STEPS: Final = [Cut("commit", number, where, part) for number in (1, 2, 5) for where, part in COMMIT_PLACES]
# The others that a worker sends in its life; a successor has batches to replay, so it sends all of them.
OTHER_STEPS: Final = [
    Cut(name, 1, where)
    for name in ("INFO", "SCRIPT LOAD", "acquire", "HGETALL", "XRANGE", "XREAD", "heartbeat", "release")
    for where in get_args(Where)
]


def killed_at(cut: Cut, server: Server, rulebook: Path) -> None:
    """Run a worker as far as ``cut``, and kill it there."""
    before = checkpoint_of(server.client(), "p").batch
    with (
        CuttingProxy(server.port, cut) as proxy,
        WorkerProcess(proxy.url, "p", rulebook, *SMALL_BATCHES, lease_ms=100) as worker,
    ):
        if cut.name == "release":
            wait_for_batch(server.client(), before)
            worker.process.terminate()
        wait_until(proxy.reached.is_set, f"{cut} is reached; seen: {proxy.seen}")
        if cut.name == "commit" and cut.where in {"executed", "in reply", "answered"}:
            assert checkpoint_of(server.client(), "p").batch == before + cut.number
        elif cut.name == "commit":
            assert checkpoint_of(server.client(), "p").batch == before + cut.number - 1
        worker.kill()


def kill_at_steps(server: Server, rulebook: Path, rng: random.Random, steps: Sequence[Cut]) -> None:
    with producing(server, "p", 100_000, 1000, rng):
        drain(server.url, rulebook, "p", *SMALL_BATCHES)
        for step in steps:
            print(step)
            killed_at(step, server, rulebook)
    compare(server, rulebook)


def test_a_worker_killed_at_some_steps_of_its_commits(server: Server, rulebook: Path, rng: random.Random) -> None:
    kill_at_steps(server, rulebook, rng, [*rng.sample(COMMIT_STEPS, 4), *rng.sample(OTHER_STEPS, 2)])


@pytest.mark.slow
def test_a_worker_killed_at_every_step_of_its_commits(server: Server, rulebook: Path, rng: random.Random) -> None:
    steps = COMMIT_STEPS + OTHER_STEPS
    kill_at_steps(server, rulebook, rng, rng.sample(steps, len(steps)))


# ----------------------------------------------------------------------------------------------- snapshots


class Call(NamedTuple):
    """A call of the thread that writes snapshots, for ``tests/dying.py``."""

    name: str
    number: int
    where: str

    def __str__(self) -> str:
        return ":".join(map(str, self))


# The second and third snapshot have older ones to remove, and so have their copies. A snapshot is written in some
# thirty pieces, and read back in as many when the next worker starts.
SNAPSHOT_STEPS: Final = [
    Call(name, number, where)
    for name, numbers in {
        "open": (1, 2, 3, 4, 5),
        "write": (1, 2, 3, 4, 10, 20, 30, 40, 70),
        "readinto": (1, 2, 3, 10, 20),
        "fsync": (1, 2, 3, 4, 5, 6),
        "replace": (1, 2, 3),
        "unlink": (1, 2, 3, 4),
        "close": (1, 2, 3),
    }.items()
    for number in numbers
    for where in ("before", "after")
]


TRIM_STEPS: Final = [Cut("trim", number, where) for number in (1, 2, 5) for where in get_args(Where)]


def trimming(directory: Path) -> tuple[str, ...]:
    return (
        *("--snapshots", str(directory), "--snapshot-interval-s", "0", "--snapshots-kept", "1", "--trim-input"),
        *SMALL_BATCHES,
    )


def killed_while_it_writes(call: Call, server: Server, rulebook: Path, flags: Sequence[str]) -> str:
    """Run a worker that ends at ``call``; return what it said."""
    program = (str(ROOT / "tests" / "dying.py"), str(call))
    with WorkerProcess(server.url, "p", rulebook, *flags, lease_ms=100, program=program) as worker:
        assert worker.wait() == -9, worker.log
    return worker.log


def check_snapshots(directory: Path) -> None:
    """Whatever has the name of a snapshot is one, as a whole."""
    for path in directory.glob("[!.]*"):
        header_bytes = int.from_bytes(path.read_bytes()[12:16], "little")
        with SnapshotReader(path) as reader:
            reader.read(path.stat().st_size - (16 + header_bytes + 32) - 32)
            reader.finish()
        assert path.name.endswith(".snapshot")


def kill_at_calls(server: Server, rulebook: Path, directory: Path, rng: random.Random, calls: Sequence[Call]) -> None:
    flags = (*trimming(directory), "--snapshot-store", str(directory.with_name("store")))
    said = ""
    with producing(server, "p", 100_000, 1000, rng, "unbroken"):
        for call in calls:
            print(call)
            said += killed_while_it_writes(call, server, rulebook, flags)
            check_snapshots(directory)
        with WorkerProcess(server.url, "p", rulebook, "--drain", *flags) as worker:
            assert worker.wait() == 0, worker.log
    said += worker.log
    assert "snapshot read" in said
    # None was ever damaged, and none of a batch that never landed.
    assert "snapshot refused" not in said
    compare_trimmed(server, rulebook, *flags)


def test_a_worker_killed_at_some_steps_of_its_snapshots(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    kill_at_calls(valkey, rulebook, tmp_path / "snapshots", rng, rng.sample(SNAPSHOT_STEPS, 4))


@pytest.mark.slow
def test_a_worker_killed_at_every_step_of_its_snapshots(
    server: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    calls = rng.sample(SNAPSHOT_STEPS, len(SNAPSHOT_STEPS))
    kill_at_calls(server, rulebook, tmp_path / "snapshots", rng, calls)


def kill_at_trims(server: Server, rulebook: Path, directory: Path, rng: random.Random, steps: Sequence[Cut]) -> None:
    flags = trimming(directory)
    with producing(server, "p", 100_000, 300, rng, "unbroken"):
        for step in steps:
            print(step)
            with (
                CuttingProxy(server.port, step) as proxy,
                WorkerProcess(proxy.url, "p", rulebook, *flags, lease_ms=100) as worker,
            ):
                wait_until(proxy.reached.is_set, f"{step} is reached; seen: {proxy.seen}")
                worker.kill()
    compare_trimmed(server, rulebook, *flags)


def test_a_worker_killed_at_some_steps_of_its_trimming(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    kill_at_trims(valkey, rulebook, tmp_path / "snapshots", rng, rng.sample(TRIM_STEPS, 2))


@pytest.mark.slow
def test_a_worker_killed_at_every_step_of_its_trimming(
    server: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    kill_at_trims(server, rulebook, tmp_path / "snapshots", rng, rng.sample(TRIM_STEPS, len(TRIM_STEPS)))
