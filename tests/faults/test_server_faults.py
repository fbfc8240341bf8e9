"""Faults of the server: a torn append-only file, no memory left, no disk left.

A full disk is made with RLIMIT_FSIZE, which needs no rights: from outside, ``prlimit`` lowers the size that the running
process may give a file, and a write beyond it fails with EFBIG where the disk would say ENOSPC. Both are the same to a
server: a write that came out short. The signal that comes with it, SIGXFSZ, must be ignored from the start, as Python
does for itself; a line of shell does it for the server.
"""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from accrual.embedded import Options
from accrual.ledger import LedgerReader
from accrual.stream import Keys
from cutting import Cut, CuttingProxy, whole_commands
from runs import check, check_like, drain, producing
from servers import Server, ServerFactory, ServerKind, binary_of
from workers import (
    WorkerProcess,
    checkpoint_of,
    dead_letter_lines,
    ledger_output,
    wait_for_batch,
    wait_for_events,
    wait_until,
)

KEYS = Keys("p")
ON_DISK: Final[Options] = {"appendonly": "yes", "appendfsync": "always", "auto-aof-rewrite-percentage": 0}
SMALL_BATCHES: Final = ("--batch-entries", "20", "--linger-ms", "0")


def append_only_file(server: Server) -> Path:
    """Return the file that the server appends to."""
    return max((server.directory / "appendonlydir").glob("*.incr.aof"))


class Transaction(NamedTuple):
    """A commit in an append-only file: where it starts and ends, and where each of its commands does."""

    start: int
    end: int
    commands: list[int]


def commits_in(data: bytes) -> list[Transaction]:
    """Return the transactions that append to the ledger, in order."""
    found, begun, starts, commits = [], 0, list[int](), False
    for start, end, words in whole_commands(data):
        name = words[0].upper()
        if name == b"MULTI":
            begun, starts, commits = start, [], False
        starts.append(start)
        commits = commits or (name == b"XADD" and words[1] == KEYS.ledger.encode())
        if name == b"EXEC" and commits:
            found.append(Transaction(begun, end, starts))
    return found


def fill_at_once(server: Server, rng: random.Random, count: int) -> None:
    """Add ``count`` entries with duplicates, conflicts and poison among them."""
    with producing(server, "p", count, 10_000_000, rng) as producer:
        producer.join()


def everything(server: Server) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the ledger and the dead letters as the commands print them."""
    return ledger_output(server, "p"), dead_letter_lines(server, "p")


def check_whole(server: Server) -> int:
    """Check that batches, checkpoint and dead letters are of one moment; return the number of batches."""
    client = server.client()
    checkpoint = checkpoint_of(client, "p")
    batches = list(LedgerReader(client, "p").batches())
    assert len(batches) == checkpoint.batch
    assert client.xlen(KEYS.deadletters) == checkpoint.dead_letters
    assert checkpoint.events == checkpoint.entries + checkpoint.duplicates + checkpoint.dead_letters
    return checkpoint.batch


# ------------------------------------------------------------------------------------------- a torn file


def places_to_tear(data: bytes, rng: random.Random, count: int) -> list[int]:
    """Return offsets within the commits: between them, between their commands, in the midst of a command."""
    commits = commits_in(data)
    places = [commits[-1].end - 1, commits[-1].commands[-1]]
    while len(places) < count:
        commit = rng.choice(commits)
        places.append(
            rng.choice(
                [
                    commit.start,
                    rng.choice(commit.commands),
                    rng.choice(commit.commands) + 1,
                    rng.randrange(commit.start, commit.end),
                ]
            )
        )
    return places[:count]


def tear_and_go_on(factory: ServerFactory, kind: ServerKind, rulebook: Path, rng: random.Random, tears: int) -> None:
    server = factory(kind, {**ON_DISK, "aof-load-truncated": "yes"})
    fill_at_once(server, rng, 400)
    drain(server.url, rulebook, "p", *SMALL_BATCHES)
    check(server)
    unbroken = everything(server)
    server.kill()
    whole, kept = append_only_file(server), server.directory.with_name("kept")
    shutil.copytree(whole.parent, kept)
    data = whole.read_bytes()
    commits = commits_in(data)
    assert len(commits) > 20
    for place in places_to_tear(data, rng, tears):
        shutil.rmtree(whole.parent)
        shutil.copytree(kept, whole.parent)
        with whole.open("r+b") as file:
            file.truncate(place)
        server.start()
        # Every commit whose EXEC is whole is there, and nothing of the next.
        assert check_whole(server) == sum(commit.end <= place for commit in commits)
        server.client().delete(KEYS.lease)
        drain(server.url, rulebook, "p", *SMALL_BATCHES)
        assert everything(server) == unbroken, f"torn at byte {place} of {len(data)}"
        server.kill()


def test_a_file_torn_anywhere_has_the_last_batch_whole_or_not_at_all(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    tear_and_go_on(server_factory, server_kind, rulebook, rng, tears=4)


@pytest.mark.slow
def test_a_file_torn_at_a_hundred_bytes(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    tear_and_go_on(server_factory, server_kind, rulebook, rng, tears=100)


def tear_under_a_worker(
    factory: ServerFactory, kind: ServerKind, rulebook: Path, rng: random.Random, crashes: int
) -> None:
    """A power cut of the server: it has not answered the last commit, and any part of that may be on the disk."""
    server = factory(kind, {**ON_DISK, "aof-load-truncated": "yes"})
    fill_at_once(server, rng, 1000)
    with CuttingProxy(server.port) as proxy:
        flags = (*SMALL_BATCHES, "--in-flight-batches", str(rng.randrange(1, 5)))
        with WorkerProcess(proxy.url, "p", rulebook, *flags, lease_ms=10_000) as worker:
            for _ in range(crashes):
                before = checkpoint_of(server.client(), "p").batch
                proxy.cut_at(Cut("commit", rng.randrange(2, 6), "executed"))
                wait_until(proxy.reached.is_set, "the commit is reached")
                server.kill()
                file = append_only_file(server)
                commits = commits_in(file.read_bytes())
                assert len(commits) > before
                with file.open("r+b") as torn:
                    torn.truncate(rng.randrange(commits[-1].start, commits[-1].end + 1))
                server.start()
                assert check_whole(server) in (len(commits) - 1, len(commits))
                proxy.mend()
            wait_for_events(server.client(), 1000)
            assert worker.finish() == 0, worker.log
            assert "Traceback" not in worker.log
    check(server)
    server.client().copy(KEYS.events, Keys("unbroken").events)
    drain(server.url, rulebook, "unbroken")
    check_like(server, "unbroken", "p")


def test_a_worker_goes_on_when_its_server_comes_back_with_a_torn_file(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    tear_under_a_worker(server_factory, server_kind, rulebook, rng, crashes=3)


@pytest.mark.slow
def test_a_worker_goes_on_through_ten_torn_files(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    tear_under_a_worker(server_factory, server_kind, rulebook, rng, crashes=10)


def test_a_power_cut_that_takes_commits_stops_the_worker_and_the_next_goes_on_from_what_is_left(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    """With ``everysec`` and ``no``, what was answered need not be on the disk: here the last few commits are not."""
    server = server_factory(server_kind, {**ON_DISK, "appendfsync": "everysec", "aof-load-truncated": "yes"})
    fill_at_once(server, rng, 1000)
    with WorkerProcess(server.url, "p", rulebook, *SMALL_BATCHES, lease_ms=60_000) as worker:
        wait_for_events(server.client(), 1000)
        unbroken = everything(server)
        server.kill()
        file = append_only_file(server)
        commits = commits_in(file.read_bytes())
        left = rng.randrange(1, len(commits) - 1)
        with file.open("r+b") as torn:
            torn.truncate(rng.randrange(commits[left - 1].end, commits[left].end))
        server.start()
        assert worker.wait() == 1
        assert "it has lost commits" in worker.log.splitlines()[-1]
    assert check_whole(server) == left
    server.client().delete(KEYS.lease)
    drain(server.url, rulebook)
    assert everything(server) == unbroken
    check(server)


def test_a_crash_of_the_server_alone_loses_nothing_that_the_kernel_has(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    server = server_factory(server_kind, {**ON_DISK, "appendfsync": "no"})
    fill_at_once(server, rng, 2000)
    with WorkerProcess(server.url, "p", rulebook, *SMALL_BATCHES, lease_ms=10_000) as worker:
        wait_for_batch(server.client(), rng.randrange(1, 20))
        server.kill()
        server.start()
        wait_for_events(server.client(), 2000)
        assert worker.finish() == 0, worker.log
    check(server)


# ------------------------------------------------------------------------------------------- no memory left


def reach_the_limit_repeatedly(
    factory: ServerFactory, kind: ServerKind, rulebook: Path, rng: random.Random, times: int
) -> None:
    """The ledger grows until the server is full; some room is made, and it is full again."""
    server = factory(kind)
    client = server.client()
    fill_at_once(server, rng, 1500 * times)
    with WorkerProcess(server.url, "p", rulebook, *SMALL_BATCHES, "--backoff-limit-ms", "100") as worker:
        for _ in range(times):
            wait_for_batch(client, checkpoint_of(client, "p").batch)
            refused = worker.said.count("OOM")
            client.config_set("maxmemory", client.info("memory")["used_memory"] + rng.randrange(1, 60_000))
            stuck = still(client)
            # Near the limit some still find room. Nothing of a refused batch is there, and the partition is kept.
            assert worker.said.count("OOM") > refused
            assert check_whole(server) == stuck
            assert client.exists(KEYS.lease)
            assert worker.process.poll() is None
            client.config_set("maxmemory", 0)
        wait_for_events(client, 1500 * times)
        assert worker.finish() == 0, worker.log
    assert worker.log.count("works again") == worker.log.count("OOM")
    check(server)
    client.copy(KEYS.events, Keys("unbroken").events)
    drain(server.url, rulebook, "unbroken")
    check_like(server, "unbroken", "p")


def still(client: Any, for_s: float = 0.5) -> int:
    """Wait until no batch has landed for a while; return the last one's number."""
    last, since_s = checkpoint_of(client, "p").batch, time.monotonic()
    deadline_s = since_s + 20
    while time.monotonic() - since_s < for_s:
        assert time.monotonic() < deadline_s, "batches land all the time"
        time.sleep(0.02)
        if (now := checkpoint_of(client, "p").batch) != last:
            last, since_s = now, time.monotonic()
    return last


def test_a_server_that_fills_up_in_the_midst_of_a_drain_is_waited_for(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    reach_the_limit_repeatedly(server_factory, server_kind, rulebook, rng, times=2)


@pytest.mark.slow
def test_a_server_that_fills_up_fifteen_times(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    reach_the_limit_repeatedly(server_factory, server_kind, rulebook, rng, times=15)


# ---------------------------------------------------------------------------------------------- no disk left


@pytest.fixture
def limited_server(tmp_path: Path) -> Iterator[Callable[[ServerKind, Options], Server]]:
    """Start servers that take a file-size limit for a full disk rather than for their end."""
    with contextlib.ExitStack() as servers:

        def start(kind: ServerKind, options: Options) -> Server:
            program = tmp_path / "server"
            program.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec '{binary_of(kind)}' \"$@\"\n", encoding="utf-8")
            program.chmod(0o755)
            return servers.enter_context(Server(options, binary=program))

        yield start


def limit_files(process_id: int, size: int) -> None:
    """Let a process give no file more than ``size`` bytes; -1 takes the limit away."""
    hard = resource.prlimit(process_id, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process_id, resource.RLIMIT_FSIZE, (size, hard))


def fill_the_disk(server: Server, rng: random.Random) -> None:
    """Leave the server room for some bytes more in its append-only file, up to some batches."""
    limit_files(server.process_id, append_only_file(server).stat().st_size + rng.randrange(1, 20_000))


@pytest.mark.parametrize("policy", ["everysec", "no"])
def test_a_server_without_disk_refuses_and_is_waited_for(
    limited_server: Callable[[ServerKind, Options], Server],
    server_kind: ServerKind,
    rulebook: Path,
    rng: random.Random,
    policy: str,
) -> None:
    server = limited_server(server_kind, {**ON_DISK, "appendfsync": policy})
    client = server.client()
    fill_at_once(server, rng, 3000)
    with WorkerProcess(server.url, "p", rulebook, *SMALL_BATCHES, "--backoff-limit-ms", "100") as worker:
        wait_for_batch(client, 3)
        fill_the_disk(server, rng)
        wait_until(lambda: client.info("persistence")["aof_last_write_status"] == "err", "writing fails")
        wait_until(lambda: "MISCONF" in worker.said, "the worker hears of it")
        stuck = still(client)
        assert stuck == check_whole(server)
        assert worker.process.poll() is None
        limit_files(server.process_id, -1)
        wait_for_events(client, 3000)
        assert worker.finish() == 0, worker.log
    assert "works again" in worker.log
    # What is on the disk is what was promised.
    server.stop()
    server.start()
    check(server)


def test_a_server_that_ends_for_want_of_disk_is_waited_for(
    limited_server: Callable[[ServerKind, Options], Server],
    server_kind: ServerKind,
    rulebook: Path,
    rng: random.Random,
) -> None:
    """With ``appendfsync always`` a server that cannot write ends, rather than answer what it cannot keep."""
    server = limited_server(server_kind, ON_DISK)
    client = server.client()
    fill_at_once(server, rng, 3000)
    with WorkerProcess(server.url, "p", rulebook, *SMALL_BATCHES, lease_ms=10_000) as worker:
        wait_for_batch(client, 3)
        fill_the_disk(server, rng)
        wait_until(lambda: not server.running, "the server ends")
        assert worker.process.poll() is None
        server.kill()
        server.start()
        # The worker would have stopped, had the server lost a batch that it had acknowledged.
        wait_for_events(server.client(), 3000)
        assert worker.finish() == 0, worker.log
    assert "works again" in worker.log
    check(server)


# ------------------------------------------------------------------------------- no disk left for snapshots


def snapshots_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.snapshot"))


def wait_for_another(directory: Path, before: list[Path]) -> None:
    wait_until(lambda: bool(set(snapshots_in(directory)) - set(before)), "another snapshot is taken")


def test_snapshots_that_find_no_room_are_thrown_away(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    directory, client = tmp_path / "snapshots", valkey.client()
    flags = ("--snapshots", str(directory), "--snapshot-interval-s", "0", "--snapshots-kept", "2")
    with (
        producing(valkey, "p", 100_000, 500, rng),
        WorkerProcess(valkey.url, "p", rulebook, *flags, "--batch-entries", "50") as worker,
    ):
        wait_until(lambda: len(snapshots_in(directory)) == 2, "two snapshots are taken")
        limit_files(worker.process.pid, rng.randrange(0, snapshots_in(directory)[-1].stat().st_size))
        wait_until(lambda: "File too large" in worker.said, "a snapshot fails")
        before, batch = snapshots_in(directory), checkpoint_of(client, "p").batch
        # The work goes on, and the old ones stay.
        wait_for_batch(client, batch + 10)
        assert snapshots_in(directory) == before
        assert len(before) == 2
        limit_files(worker.process.pid, -1)
        wait_for_another(directory, before)
        worker.kill()
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *flags) as worker:
        assert worker.wait() == 0, worker.log
    assert "snapshot read" in worker.log
    assert not list(directory.glob(".*"))
    check(valkey)


def test_snapshots_on_a_full_disk_are_thrown_away(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    """The very error of a full disk: the files that the first snapshots would be written to lead to /dev/full."""
    directory, client = tmp_path / "snapshots", valkey.client()
    directory.mkdir()
    flags = ("--snapshots", str(directory), "--snapshot-interval-s", "1", "--batch-entries", "50")
    last = rng.randrange(80, 120)
    with producing(valkey, "p", 100_000, 500, rng), WorkerProcess(valkey.url, "p", rulebook, *flags) as worker:
        # By then it has removed what others have left.
        wait_until(lambda: "owner partition" in worker.said, "the worker begins")
        for batch in range(1, last + 1):
            (directory / f".p-{batch:012d}.snapshot.{worker.process.pid}").symlink_to("/dev/full")
        wait_until(lambda: bool(snapshots_in(directory)), "a snapshot finds room")
        assert int(snapshots_in(directory)[0].name[2:14]) > last
        assert "No space left on device" in worker.said
        assert worker.finish() == 0, worker.log
        assert "Traceback" not in worker.log
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *flags) as worker:
        assert worker.wait() == 0, worker.log
    assert "snapshot read" in worker.log
    assert not list(directory.glob(".*"))
    assert checkpoint_of(client, "p").batch > last
    check(valkey)
