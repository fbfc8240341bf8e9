"""Owners that change while snapshots, trimming and servers that lose commits get in the way.

Whatever happens, no event is lost, the ledger is that of an unbroken run, and whoever has lost the partition writes
nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import uvloop

from accrual.engine import Secret
from accrual.errors import OwnershipLost, UnsafeServer
from accrual.rulebook import load
from accrual.settings import Settings
from accrual.snapshots import SnapshotDirectory
from accrual.stream import Keys, refuse
from accrual.worker import Worker
from cutting import Cut, CuttingProxy
from runs import check, drain
from servers import Server, ServerFactory
from workers import (
    ROOT,
    WorkerProcess,
    checkpoint_of,
    expected,
    fill,
    ledger_output,
    orders,
    stream_entries,
    wait_for_batch,
    wait_for_events,
    wait_until,
)

KEYS = Keys("p")
SILENT_STORE = (str(ROOT / "tests" / "silent_store.py"),)
SAVED = [KEYS.checkpoint, KEYS.ledger, KEYS.events, KEYS.deadletters]


def frequent(directory: Path, kept: int = 3, batch_entries: int = 20) -> tuple[str, ...]:
    return (
        *("--snapshots", str(directory), "--snapshot-interval-s", "0", "--snapshots-kept", str(kept)),
        *("--batch-entries", str(batch_entries), "--linger-ms", "1"),
    )


def batches_in(directory: Path) -> list[int]:
    return SnapshotDirectory(directory, "p").batches()


def save(client: redis.Redis) -> None:
    """Put aside what the server has now."""
    for key in SAVED:
        client.copy(key, f"{key}-saved", replace=True)


def lose(client: redis.Redis) -> None:
    """Go back to what was put aside, as a failover does to a replica that was behind; nobody owns the partition."""
    with client.pipeline(transaction=True) as transaction:
        for key in SAVED:
            transaction.delete(key)
            transaction.copy(f"{key}-saved", key, replace=True)
        transaction.delete(KEYS.lease)
        transaction.execute()


def check_whole(server: Server, events: int) -> None:
    """Compare with what the reference decides of ``events`` orders; the stream itself may be trimmed."""
    client = server.client()
    assert checkpoint_of(client, "p").events == events
    fill(client, "whole", orders(1, events + 1))
    assert ledger_output(server, "p") == expected(stream_entries(client, "whole")).ledger


# ------------------------------------------------------------------------------- snapshots and the ledger


def feed(worker: WorkerProcess, client: redis.Redis, last: int, said: str, times: int = 1) -> int:
    """Add orders behind ``last`` until the worker has said something so many times; return the last."""
    end = last + 100_000
    while worker.said.count(said) < times:
        assert last < end, f"it never says {said}"
        fill(client, "p", orders(last + 1, last + 101))
        last += 100
        wait_for_events(client, last)
    return last


def test_a_server_that_lost_commits_loses_no_input_to_the_snapshots_of_them(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    """Those snapshots have higher numbers, and positions that the ledger has not come to again."""
    client, directory, older = valkey.client(), tmp_path / "snapshots", tmp_path / "older"
    with WorkerProcess(valkey.url, "p", rulebook, *frequent(directory), "--trim-input") as worker:
        kept = feed(worker, client, 0, "snapshot batch=", 3)
        worker.kill()
    save(client)
    shutil.copytree(directory, older)
    with WorkerProcess(valkey.url, "p", rulebook, *frequent(directory), "--trim-input", lease_ms=100) as worker:
        fill(client, "p", orders(kept + 1, kept + 4001))
        wait_for_events(client, kept + 4000)
        # The last three at least are behind that.
        said = worker.said.count("trimmed entries=")
        last = feed(worker, client, kept + 4000, "trimmed entries=", said + 4)
        worker.kill()
    lost = batches_in(directory)
    lose(client)
    assert checkpoint_of(client, "p").batch < lost[-1]
    # Older ones are there too, as where more are kept: of what is there, the lost ones have the highest numbers.
    shutil.copytree(older, directory, dirs_exist_ok=True)
    fill(client, "p", orders(kept + 1, last + 1))
    flags = (*frequent(directory, batch_entries=7), "--trim-input")
    with WorkerProcess(valkey.url, "p", rulebook, *flags, lease_ms=100) as worker:
        wait_for_events(client, last)
        worker.kill()
    assert checkpoint_of(client, "p").batch > lost[0]
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *flags) as worker:
        assert worker.wait() == 0, worker.log
    assert "snapshot read file=" in worker.log
    check_whole(valkey, last)


def test_a_snapshot_of_a_batch_that_never_lands_takes_no_ones_place(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    client, directory = valkey.client(), tmp_path / "snapshots"
    fill(client, "p", orders(1, 2001))
    flags = (*frequent(directory, kept=1), "--trim-input")
    with (
        CuttingProxy(valkey.port) as proxy,
        WorkerProcess(proxy.url, "p", rulebook, *flags, lease_ms=100) as worker,
    ):
        wait_for_events(client, 2000)
        taken = f"snapshot batch={checkpoint_of(client, 'p').batch} bytes="
        # Before that it would wait for the server behind the cut, and no other snapshot is begun meanwhile.
        wait_until(lambda: "trimmed entries=" in worker.said.partition(taken)[2], "the last snapshot is done with")
        proxy.cut_at(Cut("commit", 1, "before"))
        fill(client, "p", orders(2001, 2011))
        wait_until(proxy.reached.is_set, "the commit is held up")
        wait_until(lambda: any(directory.glob(".*")), "a snapshot is written of what has not landed")
        worker.kill()
    assert batches_in(directory) == [checkpoint_of(client, "p").batch]
    drain(valkey.url, rulebook, "p", *flags)
    assert not list(directory.glob(".*"))
    check_whole(valkey, 2010)


def test_a_partition_that_was_made_anew_takes_snapshots_again(valkey: Server, rulebook: Path, tmp_path: Path) -> None:
    """Those of the former one, in the directory and in the store, have higher numbers for a long time."""
    client, directory, store = valkey.client(), tmp_path / "snapshots", tmp_path / "store"
    flags = (*frequent(directory), "--trim-input", "--snapshot-store", str(store))
    fill(client, "p", orders(1, 40_001))
    with WorkerProcess(valkey.url, "p", rulebook, *flags) as worker:
        wait_for_events(client, 40_000)
        feed(worker, client, 40_000, "trimmed entries=")
        worker.kill()
    highest = batches_in(directory)[0]
    client.flushall()
    with WorkerProcess(valkey.url, "p", rulebook, *flags) as worker:
        events = feed(worker, client, 0, "trimmed entries=")
        worker.kill()
    new = [batch for batch in batches_in(directory) if batch <= checkpoint_of(client, "p").batch]
    assert len(new) >= 3
    assert new[0] < highest
    with WorkerProcess(valkey.url, "p", rulebook, *flags, "--drain") as worker:
        assert worker.wait() == 0, worker.log
    assert f"snapshot read file=p-{new[0]:012d}.snapshot" in worker.log
    check_whole(valkey, events)


# ------------------------------------------------------------------------------------- zombies and the end


def test_a_zombie_with_a_snapshot_under_way_writes_nothing_and_exits(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    client, store = valkey.client(), tmp_path / "store"
    fill(client, "p", orders(1, 2001))
    flags = (*frequent(tmp_path / "snapshots", kept=1), "--trim-input", "--snapshot-store", str(store))
    with WorkerProcess(valkey.url, "p", rulebook, *flags, program=SILENT_STORE) as zombie:
        wait_for_events(client, 2000)
        wait_until(lambda: "silent: " in zombie.said, "a copy is under way")
        zombie.signal(signal.SIGSTOP)
        with WorkerProcess(valkey.url, "p", rulebook) as heir:
            wait_until(lambda: "owner partition" in heir.said, "another takes the partition")
            zombie.signal(signal.SIGCONT)
            assert zombie.wait(5) == 1
            assert heir.finish() == 0
    assert "was taken over by" in zombie.log.splitlines()[-1]
    assert "Traceback" not in zombie.log
    assert "trimmed" not in zombie.log
    assert client.xlen(KEYS.events) == 2000
    assert not store.exists()


def test_only_the_owner_refuses_a_rulebook(server: Server) -> None:
    client = server.client()
    client.hset(KEYS.checkpoint, mapping={"owner": "another", "owner_name": "host:1"})
    client.hset(KEYS.rulebooks, mapping={"pending": "text", "pending_sha256": "ab"})

    async def run(nonce: str, sha256: str) -> None:
        asynchronous = redis.asyncio.Redis(host="127.0.0.1", port=server.port, protocol=2)
        try:
            await refuse(asynchronous, KEYS, nonce, sha256, "why")
        finally:
            await asynchronous.aclose()

    with pytest.raises(OwnershipLost, match="taken over by host:1"):
        asyncio.run(run("me", "ab"))
    asyncio.run(run("another", "cd"))
    assert client.hgetall(KEYS.rulebooks) == {b"pending": b"text", b"pending_sha256": b"ab"}
    asyncio.run(run("another", "ab"))
    assert client.hgetall(KEYS.rulebooks) == {b"refused_sha256": b"ab", b"refused_reason": b"why"}


@pytest.mark.parametrize("busy_with", ["the file", "the copy"])
def test_a_worker_told_to_stop_hands_over_at_once_whatever_its_snapshot_waits_for(
    valkey: Server, rulebook: Path, tmp_path: Path, busy_with: str
) -> None:
    client, directory = valkey.client(), tmp_path / "snapshots"
    fill(client, "p", orders(1, 1001))
    flags = (*frequent(directory), "--snapshot-store", str(tmp_path / "store"))
    if busy_with == "the file":
        # A byte a second.
        flags = (*flags, "--snapshot-rate-bytes", "1")
    with WorkerProcess(valkey.url, "p", rulebook, *flags, lease_ms=60_000, program=SILENT_STORE) as worker:
        wait_for_events(client, 1000)
        if busy_with == "the file":
            wait_until(lambda: any(directory.glob(".*")), "a snapshot is begun")
        else:
            wait_until(lambda: "silent: " in worker.said, "a copy is under way")
        with WorkerProcess(valkey.url, "p", rulebook) as heir:
            wait_until(lambda: "standing by" in heir.said, "another stands by")
            asked_s = time.monotonic()
            worker.signal(signal.SIGTERM)
            wait_until(lambda: "owner partition" in heir.said, "it takes the partition")
            assert time.monotonic() - asked_s < 2.0
            assert worker.wait(5) == 0, worker.log
            assert heir.finish() == 0
    assert "was given up: the worker ends" in worker.log or busy_with == "the copy"
    assert not list(directory.glob(".*"))
    check(valkey)


# ------------------------------------------------------------------------------------------------ standby


@contextlib.contextmanager
def owner_and_standby(
    server: Server, rulebook: Path, events: int, owner_flags: tuple[str, ...] = (), flags: tuple[str, ...] = ()
) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """Run an owner that has decided so many events, and a standby."""
    fill(server.client(), "p", orders(1, events + 1))
    with WorkerProcess(server.url, "p", rulebook, *owner_flags) as owner:
        wait_for_events(server.client(), events)
        with WorkerProcess(server.url, "p", rulebook, *flags) as standby:
            wait_until(lambda: "standing by" in standby.said, "the second worker stands by")
            yield owner, standby


@pytest.mark.parametrize("server_went", ["back", "elsewhere"])
def test_a_standby_takes_over_from_a_server_that_lost_commits(valkey: Server, rulebook: Path, server_went: str) -> None:
    client = valkey.client()
    with owner_and_standby(valkey, rulebook, 200) as (owner, standby):
        save(client)
        fill(client, "p", orders(201, 401))
        wait_for_events(client, 400)
        # It follows four times a lease; that it has come so far is told by what it says later.
        time.sleep(0.5)
        standby.signal(signal.SIGSTOP)
        owner.kill()
        lose(client)
        fill(client, "p", orders(201, 401))
        if server_went == "elsewhere":
            # The same numbers have other batches now.
            drain(valkey.url, rulebook, "p", "--batch-entries", "10")
        standby.signal(signal.SIGCONT)
        wait_until(lambda: "owner partition" in standby.said, "it takes over")
        wait_for_events(client, 400)
        assert standby.finish() == 0, standby.log
    check(valkey)


def test_a_standby_with_another_secret_is_refused_at_once(valkey: Server, rulebook: Path) -> None:
    with WorkerProcess(valkey.url, "p", rulebook, lease_ms=60_000) as owner:
        wait_until(lambda: "owner partition" in owner.said, "the first worker owns the partition")
        for secret, why in (
            (Secret(bytes(16)), "is not the one that the partition was started with"),
            (None, "the partition was started with a configured secret, and none is configured now"),
        ):
            with WorkerProcess(valkey.url, "p", rulebook, secret=secret) as standby:
                assert standby.wait(20) == 2
            assert why in standby.log.splitlines()[-1]
        assert owner.finish() == 0


def test_a_standby_without_snapshots_stays_and_takes_over_from_one_that_is_there_by_then(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    client, there, here = valkey.client(), tmp_path / "there", tmp_path / "here"
    here.mkdir()
    flags = frequent(there, kept=1)
    fill(client, "p", orders(1, 2001))
    with WorkerProcess(valkey.url, "p", rulebook, *flags, "--trim-input") as owner:
        wait_for_events(client, 2000)
        wait_until(lambda: client.xlen(KEYS.events) < 2000, "input is trimmed")
        with WorkerProcess(valkey.url, "p", rulebook, "--snapshots", str(here)) as standby:
            wait_until(lambda: "standing by without the state" in standby.said, "it finds no way to the state")
            owner.kill()
            shutil.copytree(there, here, dirs_exist_ok=True)
            wait_until(lambda: "owner partition" in standby.said, "it takes over")
            fill(client, "p", orders(2001, 2101))
            wait_for_events(client, 2100)
            assert standby.finish() == 0, standby.log
    assert standby.log.count("standing by without the state") == 1
    assert "snapshot read" in standby.log
    check_whole(valkey, 2100)


def test_a_standby_that_fell_behind_the_trimming_goes_on_from_a_newer_snapshot(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    client = valkey.client()
    flags = (*frequent(tmp_path / "snapshots", kept=1), "--trim-input")
    with owner_and_standby(valkey, rulebook, 1000, flags, flags) as (owner, standby):
        wait_until(lambda: "snapshot read" in standby.said, "it has a state")
        standby.signal(signal.SIGSTOP)
        first = stream_entries(client, "p")[0].ms
        fill(client, "p", orders(1001, 4001))
        wait_for_events(client, 4000)
        wait_until(lambda: stream_entries(client, "p")[0].ms > first + 2000, "input is trimmed")
        standby.signal(signal.SIGCONT)
        wait_until(lambda: standby.said.count("snapshot read") == 2, "it begins anew")
        owner.kill()
        wait_until(lambda: "owner partition" in standby.said, "it takes over")
        assert standby.finish() == 0, standby.log
    check_whole(valkey, 4000)


# ------------------------------------------------------------------------------------------------ the server


def test_a_server_that_begins_to_evict_stops_the_worker(
    server_factory: ServerFactory, rulebook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accrual.worker.worker.SAFETY_INTERVAL_S", 0.1)
    server = server_factory("valkey")
    client = server.client()
    settings = Settings(redis=server.url, partition="p", rulebook=str(rulebook), progress=False, lease_ms=400)

    async def run() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(Worker(settings, load(rulebook)).run())
            await asyncio.to_thread(wait_for_batch, client, 0)
            client.config_set("maxmemory-policy", "allkeys-lru")

    with pytest.raises(ExceptionGroup) as raised:
        uvloop.run(run())
    (error,) = raised.value.exceptions
    assert isinstance(error, UnsafeServer)
    assert "allkeys-lru" in str(error)
