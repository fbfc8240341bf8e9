"""Keys that attackers choose, keys without end, and rulebooks that change while workers are killed."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import pytest
import redis

from accrual.engine import STREAM_SLACK_DAYS, Entry, Position, ReferenceEngine, Secret, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.ledger import LedgerReader, RulebookRecord, entry_line
from accrual.outcomes.privacy import _round as sip_round
from accrual.rulebook import Rulebook, parse
from accrual.snapshots import SnapshotReader
from accrual.stream import Keys
from accrual.stream.rulebooks import offer
from cutting import Cut, CuttingProxy, Where
from fastpath.core import DEFAULT_SEGMENT_SHIFT
from runs import check, check_like, drain, producing
from servers import Server
from workers import (
    NOON_MS,
    RULEBOOK,
    SECRET,
    WorkerProcess,
    checkpoint_of,
    compact,
    fill,
    ledger_output,
    ledger_rows,
    order,
    stream_entries,
    wait_for_events,
    wait_until,
)

KEYS = Keys("p")
DAY_MS: Final = 86_400_000
PER_KEY: Final = """
[[limit]]
id = "{key}-points"
key = "{key}"
measure = "points"
window = "day"
max = 300
action = "clamp"

[[limit]]
id = "{key}-minute"
key = "{key}"
measure = "events"
window = "60s"
max = 3
action = "hold"
"""
# Every table has keys to count by.
ALL_KEYS: Final = RULEBOOK + "".join(PER_KEY.format(key=key) for key in ("device", "ip", "phone"))


# ----------------------------------------------------------------------------------------- hash flooding

SEGMENT_SHIFT: Final = 11
LINES: Final = 1 << (SEGMENT_SHIFT - 3)


# What the half of the key is XORed with that a table's hashes start from (fastpath/rules.pxd).
DOMAINS: Final = {"devices": 1, "ids": 4, "members": 5}


def line_of(fingerprint: int) -> int:
    """Return where in its segment the search for a key starts (fastpath/table.pxd): in which line of eight slots."""
    return (fingerprint >> 32) % LINES


def lines_searched(fingerprints: Sequence[int]) -> int:
    """Return how many lines are looked at while the keys are put into one segment, one after the other."""
    used, searched = Counter[int](), 0
    for fingerprint in fingerprints:
        line = line_of(fingerprint)
        searched += 1
        while used[line] == 8:
            line = (line + 1) % LINES
            searched += 1
        used[line] += 1
    return searched


def keys_for_one_line(secret: Secret, count: int) -> list[str]:
    """Find devices that all start in the same line of their segment, as one can who knows the secret."""
    found: list[str] = []
    for number in range(400 * LINES):
        if line_of(secret.fingerprint("device", f"device-{number}")) == 0:
            found.append(f"device-{number}")
            if len(found) == count:
                return found
    raise AssertionError("too few keys were tried")


def engine_with(
    secret: Secret, devices: Sequence[str], segment_shift: int = SEGMENT_SHIFT
) -> tuple[FastEngine, list[int]]:
    """Decide an order from each device, twice; return the engine and the fingerprints as the ledger has them."""
    engine, reference = (
        FastEngine(parse(ALL_KEYS), secret, 1, segment_shift),
        ReferenceEngine(parse(ALL_KEYS), secret, 1),
    )
    entries = [
        StreamEntry(NOON_MS + number, 0, ((b"e", compact(order(number, device=device, ip=device, phone=device))),))
        for number, device in enumerate([*devices, *devices], 1)
    ]
    decisions = list(engine.decide_entries(entries).decisions())
    assert decisions == list(reference.decide_entries(entries).decisions())
    first = decisions[: len(devices)]
    return engine, [decision.fingerprints[0] for _, decision in first if isinstance(decision, Entry)]


def test_keys_that_collide_under_one_secret_are_harmless_under_another(rng: random.Random) -> None:
    known, other = Secret(rng.randbytes(16)), Secret(rng.randbytes(16))
    chosen = keys_for_one_line(known, 200)
    ordinary = [f"a-device-{rng.getrandbits(64)}" for _ in chosen]
    attacked, collided = engine_with(known, chosen)
    flooded, spread = engine_with(other, chosen)
    usual, usually = engine_with(other, ordinary)
    assert collided == [known.fingerprint("device", device) for device in chosen]
    # With the secret known, every search goes through what came before it; otherwise through a line or two.
    assert {line_of(fingerprint) for fingerprint in collided} == {0}
    assert lines_searched(collided) > 10 * len(chosen)
    assert lines_searched(spread) < 1.1 * len(chosen)
    assert lines_searched(usually) < 1.1 * len(chosen)
    # That was a model of the index; the index itself shows the same.
    assert attacked.lines_searched["devices"] == lines_searched(collided)
    for engine, fingerprints in ((flooded, spread), (usual, usually)):
        assert engine.lines_searched["devices"] == lines_searched(fingerprints)
        for table in ("ids", "devices", "ips", "phones"):
            assert engine.lines_searched[table] < 1.1 * engine.sizes[table]
    # Even then the answers are right (they were compared with the reference), and the memory is the same.
    assert attacked.memory_bytes == flooded.memory_bytes == usual.memory_bytes
    assert attacked.sizes == flooded.sizes == usual.sizes


def test_keys_that_collide_do_not_make_a_table_larger(rng: random.Random) -> None:
    """Segments are split by the upper bits of a hash: keys that share those under one secret, tried under another."""
    known, other = Secret(rng.randbytes(16)), Secret(rng.randbytes(16))
    chosen: list[str] = []
    while len(chosen) < 400:
        device = f"device-{rng.getrandbits(64)}"
        if known.fingerprint("device", device) >> 57 == 0:
            chosen.append(device)
    attacked, _ = engine_with(known, chosen, segment_shift=5)
    flooded, fingerprints = engine_with(other, chosen, segment_shift=5)
    usual, _ = engine_with(other, [f"a-device-{rng.getrandbits(64)}" for _ in chosen], segment_shift=5)
    # Segments are half to three quarters full, and after a split a quarter to three eighths.
    assert abs(flooded.memory_bytes - usual.memory_bytes) < usual.memory_bytes // 10
    assert attacked.memory_bytes < 2 * usual.memory_bytes
    shared = Counter(fingerprint >> 57 for fingerprint in fingerprints)
    assert max(shared.values()) < 20


def names_for_one_line(secret: Secret, table: str, count: int, lines: int) -> list[str]:
    """Find names of eight digits that all start in the same line of ``table``, as one can who knows the secret."""
    numbers = np.arange(4 * count * lines)
    digits = (numbers[:, np.newaxis] // 10 ** np.arange(7, -1, -1) % 10 + ord("0")).astype(np.uint8)
    # SipHash-1-3 of all of them side by side: each is one word, and another one ends it.
    first, second = (int.from_bytes(secret.key[half : half + 8], "little") for half in (0, 8))
    first ^= DOMAINS[table]
    v0: Any = first ^ 0x736F6D6570736575
    v1: Any = second ^ 0x646F72616E646F6D
    v2: Any = first ^ 0x6C7967656E657261
    v3: Any = second ^ 0x7465646279746573
    for word in (digits.view("<u8")[:, 0], 8 << 56):
        v0, v1, v2, v3 = sip_round(v0, v1, v2, v3 ^ word)
        v0 = v0 ^ word
    v2 = v2 ^ 0xFF
    for _ in range(3):
        v0, v1, v2, v3 = sip_round(v0, v1, v2, v3)
    found = numbers[((v0 ^ v1 ^ v2 ^ v3) >> 32) % lines == 0][:count]
    assert len(found) == count
    return [f"{number:08}" for number in found.tolist()]


def flooded_engine(secret: Secret, ids: Sequence[str], members: Sequence[str]) -> FastEngine:
    """Decide an order of each member, each of them once more as a duplicate, and another order of each member."""
    rulebook = parse(RULEBOOK)
    engine, reference = FastEngine(rulebook, secret, 1, SEGMENT_SHIFT), ReferenceEngine(rulebook, secret, 1)
    orders = [order(n, id=one, member=member) for n, (one, member) in enumerate(zip(ids, members, strict=True))]
    others = [event | {"id": f"other-{event['id']}"} for event in orders]
    entries = [
        StreamEntry(NOON_MS + number, 0, ((b"e", compact(event)),))
        for number, event in enumerate([*orders, *orders, *others], 1)
    ]
    batch = engine.decide_entries(entries)
    assert batch.counts.duplicates == len(ids)
    assert list(batch.decisions()) == list(reference.decide_entries(entries).decisions())
    return engine


def test_members_and_events_that_collide_under_one_secret_are_harmless_under_another(rng: random.Random) -> None:
    """Members are found by their names, in a loop of their own."""
    known, other = Secret(rng.randbytes(16)), Secret(rng.randbytes(16))
    ids, members = (names_for_one_line(known, table, 200, LINES) for table in ("ids", "members"))
    attacked, flooded = flooded_engine(known, ids, members), flooded_engine(other, ids, members)
    usual = flooded_engine(other, [f"e{n}" for n in rng.sample(range(10**9), 200)], [f"m{n}" for n in range(200)])
    assert attacked.lines_searched["members"] == lines_searched([0] * 200)
    assert attacked.lines_searched["ids"] > 10 * 200
    for engine in (flooded, usual):
        for table, size in (("ids", 400), ("members", 200)):
            assert engine.sizes[table] == attacked.sizes[table] == size
            assert engine.lines_searched[table] < 1.1 * size
    assert attacked.memory_bytes == flooded.memory_bytes == usual.memory_bytes


def test_a_worker_is_not_flooded_by_keys_that_collide_under_another_secret(
    valkey: Server, rulebook: Path, tmp_path: Path, rng: random.Random
) -> None:
    # The segments of a worker's tables are as large as they come, so that so many keys take a while to find.
    count, lines, known = 20, 1 << (DEFAULT_SEGMENT_SHIFT - 3), Secret(rng.randbytes(16))
    chosen = zip(
        *(names_for_one_line(known, table, count, lines) for table in ("ids", "members", "devices")), strict=True
    )
    events = [order(n, id=one, member=member, device=device) for n, (one, member, device) in enumerate(chosen)]
    values = [compact(event) for event in [*events, *events]]
    client = valkey.client()
    fill(client, "p", ((f"{NOON_MS + number}-0", {"e": value}) for number, value in enumerate(values, 1)))
    drain(valkey.url, rulebook, "p", "--snapshots", str(tmp_path / "snapshots"), "--snapshot-interval-s", "0")
    check(valkey)
    assert checkpoint_of(client, "p").duplicates == count
    # What the worker has come to, and what it would have come to with the secret that the keys were made for.
    (path,) = (tmp_path / "snapshots").glob("*.snapshot")
    flooded, attacked = FastEngine(parse(RULEBOOK), SECRET), FastEngine(parse(RULEBOOK), known)
    with SnapshotReader(path) as reader:
        flooded.restore(reader.header.image, reader, reader.finish)
    attacked.decide_entries(stream_entries(client, "p"))
    for table in ("ids", "members", "devices"):
        assert flooded.sizes[table] == attacked.sizes[table] == count
        assert flooded.lines_searched[table] < 1.1 * count
        assert attacked.lines_searched[table] == lines_searched([0] * count)


def test_two_partitions_without_a_configured_secret_have_their_own(valkey: Server, rulebook: Path) -> None:
    client = valkey.client()
    entries = [(f"{NOON_MS + number}-0", {"e": compact(order(number))}) for number in range(1, 100)]
    fingerprints = []
    for partition in ("p", "q"):
        fill(client, partition, entries)
        with WorkerProcess(valkey.url, partition, rulebook, "--drain", secret=None) as worker:
            assert worker.wait() == 0, worker.log
        fingerprints.append({entry.fingerprints[0] for _, _, entry in ledger_rows(client, partition)})
    assert len(fingerprints[0]) == len(fingerprints[1]) == 61
    assert not fingerprints[0] & fingerprints[1]


# ---------------------------------------------------------------------------------------- key explosion


def explosion(day: int, count: int, rng: random.Random) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield orders of one day; nearly each comes from a device, an address and a phone of its own."""
    seen: dict[str, list[str]] = defaultdict(list)
    for number in range(count):
        ms = NOON_MS + day * DAY_MS + number
        fields = {}
        for name in ("device", "ip", "phone"):
            again = seen[name] and rng.random() < 0.2
            fields[name] = rng.choice(seen[name]) if again else f"{name}-{rng.getrandbits(64):016x}"
            seen[name].append(fields[name])
        event = order(number, id=f"order-{rng.getrandbits(64):016x}", ts=ms, **fields)
        yield f"{ms}-0", {"e": compact(event)}


def as_entries(entries: Iterator[tuple[str, dict[str, bytes]]]) -> list[StreamEntry]:
    return [
        StreamEntry(int(stream_id.removesuffix("-0")), 0, tuple((key.encode(), value) for key, value in fields.items()))
        for stream_id, fields in entries
    ]


def test_memory_comes_back_after_each_of_ten_explosions(rng: random.Random) -> None:
    rulebook = parse(ALL_KEYS)
    engine, reference = FastEngine(rulebook, SECRET, 1, 5), ReferenceEngine(rulebook, SECRET, 1)
    calendar, peaks, limit = rulebook.calendar, [], 0
    for cycle in range(10):
        # Three days of keys, of which none is needed a week later.
        for day in range(3):
            entries = as_entries(explosion(7 * cycle + day, 400, rng))
            if limit:
                assert engine.memory_bytes + engine.headroom_bytes(len(entries)) <= limit
            decisions = list(engine.decide_entries(entries).decisions())
            assert decisions == list(reference.decide_entries(entries).decisions())
        sizes = engine.sizes
        assert all(sizes[table] > 500 for table in ("ids", "devices", "ips", "phones"))
        peaks.append(engine.memory_bytes)
        limit = limit or engine.memory_bytes + 2 * engine.headroom_bytes(400)
        engine.reclaim(calendar.day(NOON_MS + (7 * cycle + 6) * DAY_MS))
        # Of the exploded tables nothing is left; members are kept for ever, and there are as many as before.
        assert {name: size for name, size in engine.sizes.items() if size} == {"members": 97}
    # What was reclaimed is what the next explosion is made of. Segments are not merged again, so the index settles at
    # what each of them has needed at its fullest; the smaller they are, as here, the more that varies.
    assert max(peaks) < 1.25 * peaks[0]


@pytest.mark.slow
def test_a_worker_goes_through_ten_explosions_under_a_memory_limit(
    valkey: Server, tmp_path: Path, rng: random.Random
) -> None:
    """Keys without end, day after day: first the limit is too low, then just enough for what is alive."""
    client, rulebook = valkey.client(), tmp_path / "rulebook.toml"
    rulebook.write_text(ALL_KEYS, encoding="utf-8")
    flags = ("--batch-entries", "2000", "--batch-events", "2000")
    # A week between the explosions of two days each, so that everything of one is expired in the next.
    for cycle in range(10):
        for day in range(2):
            fill(client, "p", explosion(7 * cycle + day, 20_000, rng))
    client.copy(KEYS.events, Keys("unbroken").events)
    low, enough = 80 << 20, 96 << 20
    with WorkerProcess(valkey.url, "p", rulebook, *flags, "--memory-limit-bytes", str(low)) as worker:
        wait_until(lambda: "memory limit reached" in worker.said, "the worker reaches its memory limit")
        stuck = checkpoint_of(client, "p")
        assert 0 < stuck.events < 40_000
        assert worker.finish() == 0, worker.log
    with WorkerProcess(valkey.url, "p", rulebook, *flags, "--memory-limit-bytes", str(enough)) as worker:
        wait_for_events(client, 400_000)
        assert worker.finish() == 0, worker.log
    assert "memory limit reached" not in worker.log
    drain(valkey.url, rulebook, "unbroken")
    check_like(valkey, "unbroken", "p")


# ------------------------------------------------------------------------------------ rulebooks that change


def version(number: int) -> Rulebook:
    """Return a rulebook that gives other points and has, or has not, one more limit."""
    text = RULEBOOK.replace("version = 1", f"version = {number}").replace('per_yuan = "1"', f'per_yuan = "{number}"')
    return parse(text + (PER_KEY.format(key="phone") if number % 2 else ""))


def expected_by_the_record(client: redis.Redis) -> list[tuple[int, Position, Entry]]:
    """Decide the stream anew, each stretch under the rulebook that the ledger recorded for it."""
    rows: list[tuple[int, Position, Entry]] = []
    entries = stream_entries(client, "p")
    engine, first = None, 0
    for batch in LedgerReader(client, "p").batches():
        if isinstance(batch, RulebookRecord):
            rulebook = parse(batch.text)
            if engine is None:
                engine = ReferenceEngine(rulebook, SECRET, STREAM_SLACK_DAYS)
            else:
                engine.adopt(rulebook)
            continue
        assert engine is not None
        last = first + batch.header.counts.stream_entries
        for position, decision in engine.decide_entries(entries[first:last]).decisions():
            if isinstance(decision, Entry):
                rows.append((len(rows) + 1, position, decision))
        first = last
    assert first == len(entries)
    return rows


def switch_and_kill(server: Server, tmp_path: Path, rng: random.Random, steps: Sequence[Cut]) -> None:
    """Hand over a new rulebook before each step, to the running worker or to the next one, and kill it there."""
    client = server.client()
    current = tmp_path / "rulebook.toml"
    current.write_text(version(1).text, encoding="utf-8")
    snapshots = ("--snapshots", str(tmp_path / "snapshots"), "--snapshot-interval-s", "0")
    flags = ("--batch-entries", "20", "--linger-ms", "1", "--in-flight-batches", str(rng.randrange(1, 4)), *snapshots)
    with producing(server, "p", 100_000, 500, rng):
        drain(server.url, current, "p", *flags)
        for number, step in enumerate(steps, 2):
            print(step)
            if rng.random() < 0.5:
                offer(client, KEYS, version(number))
            else:
                current.write_text(version(number).text, encoding="utf-8")
            with (
                CuttingProxy(server.port, step) as proxy,
                WorkerProcess(proxy.url, "p", current, *flags, lease_ms=100) as worker,
            ):
                wait_until(proxy.reached.is_set, f"{step} is reached; seen: {proxy.seen}; {worker.said}")
                worker.kill()
    # Whatever was pending is adopted now, and the stream goes on a little.
    last = version(len(steps) + 2)
    current.write_text(last.text, encoding="utf-8")
    drain(server.url, current, "p", *flags)
    fill(client, "p", ((f"{NOON_MS + 200_000 + n}-0", {"e": compact(order(200_000 + n))}) for n in range(100)))
    drain(server.url, current, "p", *flags)
    rows = expected_by_the_record(client)
    assert ledger_rows(client, "p") == rows
    assert ledger_output(server, "p") == b"".join(entry_line(*row) + b"\n" for row in rows)
    versions = [batch.version for batch in LedgerReader(client, "p").batches() if isinstance(batch, RulebookRecord)]
    assert versions == sorted(set(versions))
    assert (versions[0], versions[-1]) == (1, last.version)
    assert len(versions) > 2
    # And a restart that replays everything finds the same.
    drain(server.url, current)


SWITCH_STEPS: Final = [Cut("adoption", 1, where) for where in get_args(Where)] + [
    Cut("commit", number, where) for number in (1, 2) for where in get_args(Where)
]


def test_rulebooks_that_change_while_workers_are_killed(valkey: Server, tmp_path: Path, rng: random.Random) -> None:
    switch_and_kill(valkey, tmp_path, rng, rng.sample(SWITCH_STEPS, 5))


@pytest.mark.slow
def test_rulebooks_that_change_at_every_step(server: Server, tmp_path: Path, rng: random.Random) -> None:
    switch_and_kill(server, tmp_path, rng, rng.sample(SWITCH_STEPS * 2, 2 * len(SWITCH_STEPS)))
