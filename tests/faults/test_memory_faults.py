"""The memory limit: keys without end up to it and back, restarts under it, and rulebooks for which there is no room."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from accrual.rulebook import parse
from accrual.stream import Keys
from accrual.stream.rulebooks import offer
from runs import check_like, drain
from servers import Server
from workers import NOON_MS, RULEBOOK, WorkerProcess, checkpoint_of, compact, fill, order, wait_for_events, wait_until

KEYS: Final = Keys("p")
DAY_MS: Final = 86_400_000
ENTRY_EVENTS: Final = 64
PER_KEY: Final = """
[[limit]]
id = "{key}-{hours}"
key = "{key}"
measure = "points"
window = "{hours}h"
max = 3000
action = "clamp"
"""
SMALL_BATCHES: Final = ("--batch-entries", "32")
# What two days of strangers need, and what they need where nothing of the days before is given up for them.
TOO_LITTLE: Final = 100 << 20
ENOUGH: Final = 112 << 20


def rules(version: int, hours: int) -> str:
    """Return a rulebook that counts by every key, in a window of each length up to ``hours``."""
    text = RULEBOOK.replace("version = 1", f"version = {version}")
    lengths = range(1, hours + 1)
    return text + "".join(PER_KEY.format(key=key, hours=each) for key in ("device", "ip", "phone") for each in lengths)


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(rules(1, 18), encoding="utf-8")
    return path


def strangers(day: int, count: int, rng: random.Random) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield ``count`` orders of a day, many in an entry, each with a device, an address and a phone of its own."""
    for number in range(0, count, ENTRY_EVENTS):
        ms = NOON_MS + day * DAY_MS + number
        events = []
        for place in range(ENTRY_EVENTS):
            name = f"{rng.getrandbits(64):016x}"
            events.append(msgspec.Raw(compact(order(place, id=name, ts=ms, device=name, ip=name, phone=name))))
        yield f"{ms}-0", {"b": msgspec.msgpack.encode(events)}


def fill_weeks(client: Any, weeks: range, rng: random.Random) -> None:
    """Add two days of each week; of one week nothing is needed in the next."""
    for week in weeks:
        for day in range(2):
            fill(client, "p", strangers(7 * week + day, 4032, rng))


def limit(size: int) -> tuple[str, ...]:
    return (*SMALL_BATCHES, "--memory-limit-bytes", str(size))


def test_keys_without_end_up_to_the_limit_and_back(valkey: Server, rulebook: Path, rng: random.Random) -> None:
    client = valkey.client()
    fill_weeks(client, range(3), rng)
    with WorkerProcess(valkey.url, "p", rulebook, *limit(TOO_LITTLE), "--progress") as worker:
        wait_until(lambda: "MEMORY LIMIT REACHED, no input is taken" in worker.said, "its status says so")
        stuck = checkpoint_of(client, "p")
        assert 0 < stuck.events < 8064
        assert worker.finish() == 0, worker.log
    assert "memory limit reached: memory_bytes=" in worker.log
    # With a little more what has expired makes room for what comes, again and again.
    drain(valkey.url, rulebook, "p", *limit(ENOUGH))
    assert checkpoint_of(client, "p").events == 3 * 8064
    # A replay under the limit drops the same; without that it would come back with no room for another day.
    fill_weeks(client, range(3, 4), rng)
    client.copy(KEYS.events, Keys("unbroken").events)
    with WorkerProcess(valkey.url, "p", rulebook, *limit(ENOUGH)) as worker:
        wait_for_events(client, 4 * 8064)
        with WorkerProcess(valkey.url, "p", rulebook, *limit(TOO_LITTLE)) as standby:
            wait_until(lambda: "the standby follows no further" in standby.said, "a standby has no room")
            assert standby.finish() == 0, standby.log
        assert worker.finish() == 0, worker.log
    assert "memory limit reached" not in worker.log
    drain(valkey.url, rulebook, "unbroken")
    check_like(valkey, "unbroken", "p")


def test_a_restart_that_finds_no_room_says_so_and_keeps_its_partition(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    client = valkey.client()
    fill_weeks(client, range(1), rng)
    snapshots = ("--snapshots", str(tmp_path / "snapshots"), "--snapshot-interval-s", "0")
    drain(valkey.url, rulebook, "p", *SMALL_BATCHES)
    drain(valkey.url, rulebook, "p", *SMALL_BATCHES, *snapshots)
    before = checkpoint_of(client, "p")
    for flags, said in (((), "no more input is taken"), (snapshots, "the snapshot is not read")):
        little = ("--memory-limit-bytes", str(10 << 20))
        with WorkerProcess(valkey.url, "p", rulebook, *SMALL_BATCHES, *little, *flags, "--progress") as worker:
            wait_until(lambda: "MEMORY LIMIT REACHED" in worker.said, "its status says so")
            assert said in worker.said
            assert client.exists(KEYS.lease)
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0, worker.log
        assert checkpoint_of(client, "p") == before
    drain(valkey.url, rulebook, "p", *SMALL_BATCHES, *snapshots)


def test_a_rulebook_for_which_there_is_no_room_waits(valkey: Server, rulebook: Path, rng: random.Random) -> None:
    client = valkey.client()
    rulebook.write_text(rules(1, 8), encoding="utf-8")
    fill(client, "p", strangers(0, 8000, rng))
    larger, enough = parse(rules(2, 18)), 96 << 20
    with WorkerProcess(valkey.url, "p", rulebook, *limit(enough)) as worker:
        wait_for_events(client, 8000)
        offer(client, KEYS, larger)
        wait_until(lambda: "rulebook 2 cannot be adopted" in worker.said, "the rulebook waits")
        fill(client, "p", strangers(1, 640, rng))
        wait_for_events(client, 8640)
        assert worker.finish() == 0, worker.log
    assert worker.log.count("memory limit reached") == 1
    assert checkpoint_of(client, "p").rulebook == 1
    # It is still pending, and is adopted where there is room: under a limit, too.
    with WorkerProcess(valkey.url, "p", rulebook, *limit(400 << 20)) as worker:
        wait_until(lambda: checkpoint_of(client, "p").rulebook == 2, "the rulebook is adopted")
        assert worker.finish() == 0, worker.log
    # Nor does a replay adopt it where it does not fit.
    with WorkerProcess(valkey.url, "p", rulebook, *limit(enough)) as worker:
        wait_until(lambda: "rulebook 2 cannot be adopted" in worker.said, "the replay stops")
        assert worker.finish() == 0, worker.log


def test_a_snapshot_that_might_not_fit_is_put_off(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    client = valkey.client()
    fill(client, "p", strangers(0, 4032, rng))
    snapshots = ("--snapshots", str(tmp_path / "snapshots"), "--snapshot-interval-s", "0")
    with WorkerProcess(valkey.url, "p", rulebook, *limit(TOO_LITTLE), *snapshots) as worker:
        wait_for_events(client, 4032)
        wait_until(lambda: "put off: memory_limit_bytes has no room" in worker.said, "a snapshot is put off")
        assert worker.finish() == 0, worker.log
    assert "memory limit reached" not in worker.log
    drain(valkey.url, rulebook, "p", *limit(400 << 20), *snapshots)
    assert list((tmp_path / "snapshots").glob("*.snapshot"))
