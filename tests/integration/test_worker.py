"""The worker on a real Valkey and a real Redis: its ledger is what the reference engine says of the same stream."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import uvloop

from accrual.engine import Entry, Secret
from accrual.errors import InvalidEvent, LedgerError, StateMismatch, StreamTrimmed, UnsafeServer, UsageError
from accrual.events import arrival_of, mapping_from_json
from accrual.ledger import EntriesBatch, LedgerReader, RulebookRecord, entry_line
from accrual.rulebook import load, parse
from accrual.settings import Settings
from accrual.stream import Keys
from accrual.worker import Worker
from servers import Server, ServerFactory, ServerKind
from workers import (
    NOON_MS,
    RULEBOOK,
    SECRET,
    Fields,
    WorkerProcess,
    checkpoint_of,
    command,
    compact,
    dead_letter_lines,
    expected,
    fill,
    ledger_output,
    ledger_rows,
    order,
    orders,
    stream_entries,
    wait_for_batch,
    wait_for_events,
    wait_until,
)

SCENARIOS = sorted((Path(__file__).parents[1] / "vectors" / "scenarios").iterdir())

pack = msgspec.msgpack.encode


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(RULEBOOK, encoding="utf-8")
    return path


def drain(server: Server, rulebook: Path, partition: str = "p", **settings: Any) -> None:
    """Run a worker in this process, up to the end of the stream."""
    chosen: dict[str, Any] = {"secret": SECRET.key.hex(), "progress": False, "lease_ms": 400} | settings
    worker = Worker(
        Settings(redis=server.url, partition=partition, rulebook=str(rulebook), **chosen), load(rulebook), drain=True
    )
    uvloop.run(worker.run())
    assert gc.get_freeze_count() == 0


def check(server: Server, rulebook: str | Path = RULEBOOK, partition: str = "p", secret: Secret = SECRET) -> None:
    """Compare everything that was committed with what the reference engine decides."""
    client = server.client()
    book = load(rulebook) if isinstance(rulebook, Path) else parse(rulebook)
    entries = stream_entries(client, partition)
    wanted = expected(entries, book, secret)
    assert ledger_rows(client, partition) == wanted.rows
    assert ledger_output(server, partition) == wanted.ledger
    letters = dead_letter_lines(server, partition)
    assert letters == [
        {
            "detail": letter.detail,
            "event": letter.event,
            "id": f"{number}-0",
            "index": position.index,
            "reason": letter.reason,
            "stream_id": position.stream_id,
        }
        for number, (position, letter) in enumerate(wanted.dead_letters, start=1)
    ]
    checkpoint = checkpoint_of(client, partition)
    assert (checkpoint.entries, checkpoint.duplicates, checkpoint.dead_letters) == (
        len(wanted.rows),
        wanted.duplicates,
        len(wanted.dead_letters),
    )
    assert checkpoint.events == checkpoint.entries + checkpoint.duplicates + checkpoint.dead_letters
    assert checkpoint.stream_entries == len(entries)


# ---------------------------------------------------------------------------------- what is decided


def scenario_entries(lines: list[bytes], encoding: str) -> Iterator[tuple[str, Fields]]:
    """Yield a scenario's events as stream entries; an ID's time is the arrival, which on a stream cannot go back."""
    arrival_ms, batch = 0, list[bytes]()
    for number, line in enumerate(lines):
        try:
            fields = msgspec.json.decode(line)
            at_ms = fields.get("at", fields.get("ts"))
            event = compact(fields)
        except (InvalidEvent, msgspec.DecodeError, AttributeError, UnicodeDecodeError):
            event, at_ms = None, arrival_ms
        at_ms = max(arrival_ms, at_ms if isinstance(at_ms, int) and at_ms > 0 else 0, 1)
        if encoding == "b" and batch and (at_ms != arrival_ms or event is None):
            yield f"{arrival_ms}-{number}", {"b": pack([msgspec.Raw(item) for item in batch])}
            batch.clear()
        arrival_ms = at_ms
        if event is None or encoding == "j":
            yield f"{arrival_ms}-{number + 1}", {"j": line}
        elif encoding == "e":
            yield f"{arrival_ms}-{number + 1}", {"e": event}
        else:
            batch.append(event)
    if batch:
        yield f"{arrival_ms}-{len(lines) + 1}", {"b": pack([msgspec.Raw(item) for item in batch])}


@pytest.mark.parametrize("encoding", ["e", "b", "j"])
def test_every_scenario_streamed_is_decided_as_the_reference_engine_does(server: Server, encoding: str) -> None:
    client = server.client()
    for scenario in SCENARIOS:
        lines = (scenario / "events.jsonl").read_bytes().splitlines()
        fill(client, scenario.name, scenario_entries(lines, encoding))
        drain(server, scenario / "rulebook.toml", scenario.name)
        wanted = expected(stream_entries(client, scenario.name), load(scenario / "rulebook.toml"))
        assert ledger_rows(client, scenario.name) == wanted.rows, scenario.name
        assert checkpoint_of(client, scenario.name).dead_letters == len(wanted.dead_letters)


def arrivals_of(lines: list[bytes]) -> list[int]:
    arrivals = []
    for line in lines:
        try:
            arrivals.append(arrival_of(mapping_from_json(line)))
        except InvalidEvent:
            continue
    return arrivals


def test_the_vectors_come_out_of_the_stream_as_they_come_out_of_a_file(server: Server) -> None:
    """Where no arrival goes back, the stream's ledger has the very outcomes of the vector."""
    compared = 0
    for scenario in SCENARIOS:
        lines = (scenario / "events.jsonl").read_bytes().splitlines()
        arrivals = arrivals_of(lines)
        if arrivals != sorted(arrivals):
            continue
        fill(server.client(), scenario.name, scenario_entries(lines, "j"))
        drain(server, scenario / "rulebook.toml", scenario.name)
        outcomes = [json.loads(line) for line in (scenario / "outcomes.jsonl").read_bytes().splitlines()]
        wanted = [line for line in outcomes if line["outcome"] not in ("duplicate", "dead_letter")]
        found = [json.loads(entry_line(*row)) for row in ledger_rows(server.client(), scenario.name)]
        for line in (*wanted, *found):
            for key in ("line", "seq", "stream_id", "index"):
                line.pop(key, None)
        assert found == wanted, scenario.name
        compared += 1
    assert compared >= 5


POISON: list[dict[str, bytes]] = [
    {"e": b""},
    {"e": b"\xc1"},
    {"e": b"\x90"},
    {"e": pack({"id": "x"})},
    {"e": compact(order(1)) + b"\x00"},
    {"e": b"\x9d" + b"\xa1x" * 3},
    {"e": b"\xdd\xff\xff\xff\xff"},
    {"b": b"\x90"},
    {"b": b""},
    {"b": compact(order(1))[:-1]},
    {"b": pack([1, "text", None, []])},
    {"j": b""},
    {"j": b"[]"},
    {"j": b"{oops"},
    {"j": b"7"},
    {"j": b'[{"id":"a"},7,"x"]'},
    {"j": b'{"id":"\xff"}'},
    {"j": b"[" * 5000},
    {"x": compact(order(1))},
    {"": b""},
    {"e": compact(order(1)), "b": b"\x90"},
    {f"f{number}": b"x" for number in range(1500)},
]


def mixed_entries(count: int, seed: int) -> Iterator[tuple[str, Fields]]:
    """Yield entries of all encodings, with duplicates, conflicts, poison, and poison items inside batches."""
    rng = random.Random(seed)
    number = 0
    for position in range(count):
        stream_id = f"{NOON_MS + 7 * position}-{position % 3}"
        kind = rng.randrange(8)
        if kind == 0:
            yield stream_id, rng.choice(POISON)
            continue
        events = []
        for _ in range(1 if kind <= 3 else rng.randrange(1, 12)):
            number += 1
            events.append(order(rng.choice([number, number, number, rng.randrange(number + 1)])))
            if rng.random() < 0.05:
                events[-1]["amount"] = rng.choice([-1, "10", 10**13, None, 12])
            if rng.random() < 0.05:
                events[-1]["kind"] = rng.choice(["checkin", "nonsense", "member_frozen", "order_refunded"])
        if kind in (1, 4):
            yield stream_id, {"j": msgspec.json.encode(events if kind == 4 else events[0])}
            continue
        names = ("id", "kind", "member", "ts", "amount", "order", "device", "ip", "phone")
        items: list[Any] = [[event[name] for name in names] for event in events]
        if kind >= 5 and rng.random() < 0.3:
            items.insert(rng.randrange(len(items) + 1), rng.choice([None, 3, [], {}, ["x"], "text", 1.5]))
        yield stream_id, {"b": pack(items)} if kind >= 5 else {"e": pack(items[0])}


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_all_encodings_and_poison_side_by_side(server: Server, rulebook: Path, engine: str) -> None:
    fill(server.client(), "p", mixed_entries(1500, seed=7))
    drain(server, rulebook, engine=engine)
    check(server)
    reasons = {letter["reason"] for letter in dead_letter_lines(server, "p")}
    assert reasons >= {"invalid", "id_conflict", "unknown_kind"}


@pytest.mark.parametrize(
    ("flags", "without_effect"),
    [
        (
            ("--engine", "reference", "--snapshots", "x", "--memory-limit-bytes", "1"),
            {"snapshots", "memory_limit_bytes"},
        ),
        (("--engine", "reference", "--snapshot-store", "x", "--trim-input"), {"snapshot_store", "trim_input"}),
        (("--snapshot-store", "x", "--trim-input"), {"snapshot_store", "trim_input"}),
        ((), set()),
    ],
)
def test_settings_that_do_nothing_are_named(
    valkey: Server, rulebook: Path, flags: tuple[str, ...], without_effect: set[str]
) -> None:
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", *flags) as worker:
        assert worker.wait() == 0, worker.log
    named = re.findall(r"WARNING (\w+) has no effect: ", worker.log)
    assert (len(named), set(named)) == (len(without_effect), without_effect)


def test_an_entry_with_very_many_bad_items_is_one_commit(valkey: Server, rulebook: Path) -> None:
    client = valkey.client()
    many = b"\xdc" + (3000).to_bytes(2, "big") + b"\xc0" * 2999 + compact(order(1))
    entries = [{"b": many}, *[{"e": b"\xc1"}] * 3000, {"e": compact(order(2))}]
    fill(client, "p", ((f"{NOON_MS + number}-0", fields) for number, fields in enumerate(entries)))
    drain(valkey, rulebook)
    check(valkey)
    assert client.xlen(Keys("p").deadletters) == 5999


def test_the_ledger_does_not_depend_on_the_batches(server: Server, rulebook: Path) -> None:
    client = server.client()
    entries = list(mixed_entries(400, seed=3))
    outputs = []
    for partition, settings in (
        ("one", {"batch_entries": 1, "in_flight_batches": 1}),
        ("seven", {"batch_entries": 7, "in_flight_batches": 64}),
        ("large", {"in_flight_bytes": 1 << 16}),
        ("plain", {"engine": "reference", "batch_entries": 100}),
    ):
        fill(client, partition, entries)
        drain(server, rulebook, partition, **settings)
        outputs.append(ledger_output(server, partition))
    assert client.xlen(Keys("one").ledger) == 401
    assert len(set(outputs)) == 1
    assert outputs[0].count(b"\n") > 400


def test_the_ledger_keeps_no_raw_device_ip_or_phone(server: Server, rulebook: Path) -> None:
    fill(server.client(), "p", orders(1, 300))
    drain(server, rulebook)
    batches: Any = server.client().xrange(Keys("p").ledger)
    kept = b"".join(fields[b"batch"] for _, fields in batches)
    for number in range(1, 300):
        for key in ("device", "ip", "phone"):
            assert order(number)[key].encode() not in kept


# ------------------------------------------------------------------------------------- start and stop


def test_an_empty_partition_gets_its_rulebook_and_nothing_else(server: Server, rulebook: Path) -> None:
    drain(server, rulebook)
    [record] = LedgerReader(server.client(), "p").batches()
    assert isinstance(record, RulebookRecord)
    assert (record.text, record.version, record.after) == (RULEBOOK, 1, (0, 0))
    drain(server, rulebook)
    assert server.client().xlen(Keys("p").ledger) == 1
    assert ledger_output(server, "p") == b""


def test_drains_follow_one_another(server: Server, rulebook: Path) -> None:
    for first in range(1, 501, 100):
        fill(server.client(), "p", orders(first, first + 100))
        drain(server, rulebook)
    check(server)


def test_what_was_decided_is_decided_alike_in_a_deeper_stack(valkey: Server, rulebook: Path) -> None:
    """Whether an event that nests is valid is a property of its bytes."""

    def nested(depth: int) -> bytes:
        return msgspec.json.encode(order(depth))[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}"

    def drain_below(frames: int) -> None:
        if frames:
            drain_below(frames - 1)
        else:
            drain(valkey, rulebook)

    depths = [1, 30, 31, 32, 300, 600, 800, 950, 5000]
    entries = [(f"{NOON_MS + number}-0", {"j": nested(depth)}) for number, depth in enumerate(depths)]
    batch = b"[" + b",".join(nested(depth) for depth in depths) + b"]"
    fill(valkey.client(), "p", [*entries, (f"{NOON_MS + 100}-0", {"j": batch})])
    drain(valkey, rulebook)
    assert checkpoint_of(valkey.client(), "p").entries == 3
    drain_below(400)
    check(valkey)


def test_a_drain_ends_where_the_stream_ended_when_it_started(server: Server, rulebook: Path) -> None:
    """Entries keep coming while it drains; it does not run after them."""
    client = server.client()
    fill(client, "p", orders(1, 5000))
    with WorkerProcess(server.url, "p", rulebook, "--drain", "--batch-entries", "20") as worker:
        number = 5000
        while worker.process.poll() is None:
            fill(client, "p", orders(number, number + 50))
            number += 50
        assert worker.wait() == 0, worker.log
    assert 4999 <= checkpoint_of(client, "p").entries < number - 1


def test_a_live_worker_commits_what_comes_and_ends_in_good_order(server: Server, rulebook: Path) -> None:
    client = server.client()
    with WorkerProcess(server.url, "p", rulebook) as worker:
        for first in range(1, 401, 40):
            fill(client, "p", orders(first, first + 40))
            wait_for_events(client, first + 39)
        assert worker.finish() == 0, worker.log
    assert not client.exists(Keys("p").lease)
    assert "Traceback" not in worker.log
    check(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_ends_the_worker_with_everything_decided_committed(
    valkey: Server, rulebook: Path, number: signal.Signals
) -> None:
    client = valkey.client()
    fill(client, "p", orders(1, 4000))
    with WorkerProcess(valkey.url, "p", rulebook, "--batch-entries", "4") as worker:
        wait_for_batch(client, 20)
        worker.signal(number)
        assert worker.wait() == 0, worker.log
    committed = checkpoint_of(client, "p").entries
    assert 0 < committed < 3999
    assert not client.exists(Keys("p").lease)
    drain(valkey, rulebook)
    check(valkey)


def test_a_second_signal_may_cut_the_end_short_but_corrupts_nothing(valkey: Server, rulebook: Path) -> None:
    client = valkey.client()
    fill(client, "p", orders(1, 3000))
    with WorkerProcess(valkey.url, "p", rulebook, "--batch-entries", "50", "--stop-timeout-ms", "60000") as worker:
        wait_for_batch(client, 5)
        valkey.pause()
        worker.signal(signal.SIGTERM)
        with pytest.raises(Exception, match="timed out"):
            worker.process.wait(0.3)
        worker.signal(signal.SIGTERM)
        assert worker.wait(5) != 0
        valkey.resume()
    wait_until(lambda: not client.exists(Keys("p").lease), "the lease runs out")
    drain(valkey, rulebook)
    check(valkey)


def test_a_signal_while_standing_by_ends_the_worker(valkey: Server, rulebook: Path) -> None:
    with WorkerProcess(valkey.url, "p", rulebook) as owner:
        wait_until(lambda: bool(valkey.client().exists(Keys("p").lease)), "the owner starts")
        with WorkerProcess(valkey.url, "p", rulebook) as standby:
            wait_until(lambda: "standing by" in standby.said, "it stands by")
            with pytest.raises(Exception, match="timed out"):
                standby.process.wait(1.0)
            assert standby.finish() == 0
            assert "standing by" in standby.log
        assert owner.finish() == 0


# ----------------------------------------------------------------------------------------- ownership


def test_a_second_worker_is_refused_or_waits_and_takes_over(server: Server, rulebook: Path) -> None:
    client = server.client()
    fill(client, "p", orders(1, 100))
    with WorkerProcess(server.url, "p", rulebook) as first:
        wait_for_events(client, 99)
        refused = command(
            *("worker", "--redis", server.url, "--partition", "p", "--rulebook", rulebook, "--no-wait"),
            variables={"ACCRUAL_SECRET": SECRET.key.hex()},
        )
        assert refused.returncode == 1
        assert b"is owned by" in refused.stderr.splitlines()[-1]
        with WorkerProcess(server.url, "p", rulebook) as second:
            wait_until(lambda: "standing by" in second.said, "it stands by")
            with pytest.raises(Exception, match="timed out"):
                second.process.wait(1.0)
            first.kill()
            fill(client, "p", orders(100, 200))
            wait_for_events(client, 199)
            assert second.finish() == 0
            assert "recovered" in second.log
    check(server)


def test_a_clean_end_hands_over_without_waiting_for_the_lease(valkey: Server, rulebook: Path) -> None:
    client = valkey.client()
    with WorkerProcess(valkey.url, "p", rulebook, lease_ms=60_000) as first:
        wait_until(lambda: checkpoint_of(client, "p").batch == 1, "the first worker works")
        assert first.finish() == 0
    drain(valkey, rulebook)


# ----------------------------------------------------------------------------------------- rulebooks

SECOND = RULEBOOK.replace("version = 1", "version = 2").replace('points_per_yuan = "1"', 'points_per_yuan = "3"')


def activate(server: Server, path: Path, *flags: str) -> Any:
    return command("rulebook", "activate", "--redis", server.url, "--partition", "p", path, *flags)


def test_a_new_rulebook_is_adopted_between_two_batches(server: Server, rulebook: Path, tmp_path: Path) -> None:
    client = server.client()
    second = tmp_path / "second.toml"
    second.write_text(SECOND, encoding="utf-8")
    with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "20") as worker:
        fill(client, "p", orders(1, 2000))
        wait_until(lambda: checkpoint_of(client, "p").entries > 100, "the worker works")
        done = activate(server, second)
        assert done.returncode == 0, done.stderr
        fill(client, "p", orders(2000, 2200))
        wait_for_events(client, 2199)
        assert worker.finish() == 0
    batches = list(LedgerReader(client, "p").batches())
    records = [batch for batch in batches if isinstance(batch, RulebookRecord)]
    assert [record.version for record in records] == [1, 2]
    adoption = records[1].after
    assert adoption > (0, 0)
    wanted = expected(stream_entries(client, "p"), adoptions={adoption: parse(SECOND)})
    assert ledger_rows(client, "p") == wanted.rows
    versions = {batch.header.rulebook for batch in batches if isinstance(batch, EntriesBatch)}
    assert versions == {1, 2}
    # A restart replays the recorded history, whatever it is started with.
    drain(server, rulebook)
    drain(server, second)
    assert client.xlen(Keys("p").ledger) == len(batches)


def test_a_refused_rulebook_changes_nothing(server: Server, rulebook: Path, tmp_path: Path) -> None:
    client = server.client()
    fill(client, "p", orders(1, 50))
    with WorkerProcess(server.url, "p", rulebook) as worker:
        wait_for_events(client, 49)
        before = client.xlen(Keys("p").ledger)
        path = tmp_path / "other.toml"
        for text, why in (
            (RULEBOOK.replace("= 5\naction", "= 6\naction"), b"version 1 is not above 1"),
            (RULEBOOK.replace("version = 1", "version = 0"), b"version"),
            (SECOND + "\nsurprise = 1\n", b"surprise"),
        ):
            path.write_text(text, encoding="utf-8")
            done = activate(server, path)
            assert done.returncode == 1
            assert why in done.stderr
        # Past the command's own checks, the worker refuses by itself.
        client.hset(Keys("p").rulebooks, mapping={"pending": "version = 9", "pending_sha256": "00" * 32})
        wait_until(lambda: bool(client.hexists(Keys("p").rulebooks, "refused_reason")), "the worker refuses")
        assert not client.hexists(Keys("p").rulebooks, "pending")
        assert client.xlen(Keys("p").ledger) == before
        assert worker.finish() == 0
        assert "rulebook refused" in worker.log


def test_a_rulebook_without_a_worker_stays_pending_until_one_runs(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second.toml"
    second.write_text(SECOND, encoding="utf-8")
    done = activate(valkey, second)
    assert (done.returncode, b"no ledger yet" in done.stderr) == (1, True)
    drain(valkey, rulebook)
    done = activate(valkey, second, "--timeout", "0.2")
    assert done.returncode == 1
    assert b"still pending" in done.stderr
    with WorkerProcess(valkey.url, "p", rulebook) as worker:
        wait_until(lambda: checkpoint_of(valkey.client(), "p").rulebook == 2, "the worker adopts it")
        assert worker.finish() == 0
    done = activate(valkey, second)
    assert (done.returncode, b"already" in done.stdout) == (0, True)
    shown = command("rulebook", "show", "--redis", valkey.url, "--partition", "p")
    assert json.loads(shown.stdout)["version"] == 2
    text = command("rulebook", "show", "--redis", valkey.url, "--partition", "p", "--text")
    assert text.stdout.decode() == SECOND


def test_a_start_with_a_newer_rulebook_adopts_it_and_a_changed_one_is_refused(
    valkey: Server, rulebook: Path, tmp_path: Path
) -> None:
    client = valkey.client()
    fill(client, "p", orders(1, 50))
    drain(valkey, rulebook)
    second = tmp_path / "second.toml"
    second.write_text(SECOND, encoding="utf-8")
    fill(client, "p", orders(50, 100))
    drain(valkey, second)
    adoption = (NOON_MS + 49, 0)
    wanted = expected(stream_entries(client, "p"), adoptions={adoption: parse(SECOND)})
    assert ledger_rows(client, "p") == wanted.rows
    second.write_text(SECOND.replace("max = 5", "max = 6"), encoding="utf-8")
    with pytest.raises(StateMismatch, match="another text"):
        drain(valkey, second)
    drain(valkey, rulebook)
    assert checkpoint_of(client, "p").rulebook == 2


# ---------------------------------------------------------------------------------- what is not right


def test_an_unsafe_server_is_refused(server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory(server_kind, {"maxmemory-policy": "allkeys-lru"})
    with pytest.raises(UnsafeServer, match="noeviction"):
        drain(server, rulebook)
    server.client().config_set("maxmemory-policy", "noeviction")
    server.client().execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(UnsafeServer, match="replica"):
        drain(server, rulebook)
    assert server.client().keys() == []


def test_a_restart_on_a_trimmed_stream_says_what_is_missing(server: Server, rulebook: Path) -> None:
    client = server.client()
    fill(client, "p", orders(1, 200))
    drain(server, rulebook)
    client.xtrim(Keys("p").events, maxlen=150, approximate=False)
    with pytest.raises(StreamTrimmed, match=r"199 entries .* 150 of them are still there"):
        drain(server, rulebook)


def test_a_ledger_that_comes_out_differently_is_not_continued(server: Server, rulebook: Path) -> None:
    """An event is changed behind the worker's back: same ID, another amount."""
    client = server.client()
    fill(client, "p", orders(1, 20))
    drain(server, rulebook)
    client.delete(Keys("p").events)
    fill(client, "p", ((stream_id, fields) for stream_id, fields in orders(1, 10)))
    changed = compact(order(10, amount=999_900))
    fill(client, "p", [(f"{NOON_MS + 10}-0", {"e": changed}), *orders(11, 20)])
    with pytest.raises(StateMismatch, match=r"entry 10 \(stream .*order-10.*order-10"):
        drain(server, rulebook)


@pytest.mark.parametrize("damage", ["missing", "changed", "foreign checkpoint", "lost checkpoint"])
def test_a_damaged_ledger_is_not_continued(valkey: Server, rulebook: Path, damage: str) -> None:
    client = valkey.client()
    keys = Keys("p")
    for first in (1, 51, 101):
        fill(client, "p", orders(first, first + 50))
        drain(valkey, rulebook)
    if damage == "missing":
        client.xdel(keys.ledger, "3-0")
    elif damage == "changed":
        batches: Any = client.xrange(keys.ledger)
        client.delete(keys.ledger)
        for entry_id, fields in batches:
            value = bytearray(fields[b"batch"])
            if entry_id == b"3-0":
                value[-1] ^= 1
            client.xadd(keys.ledger, {"batch": bytes(value)}, id=entry_id)
    elif damage == "foreign checkpoint":
        client.hset(keys.checkpoint, "entries", "149")
    else:
        client.delete(keys.checkpoint)
    with pytest.raises((StateMismatch, LedgerError)):
        drain(valkey, rulebook)


def test_a_wrong_secret_is_refused(valkey: Server, rulebook: Path) -> None:
    drain(valkey, rulebook)
    with pytest.raises(UsageError, match="secret"):
        drain(valkey, rulebook, secret="00" * 16)


def test_a_partition_without_a_configured_secret_keeps_its_own(valkey: Server, rulebook: Path) -> None:
    client = valkey.client()
    fill(client, "p", orders(1, 50))
    drain(valkey, rulebook, secret="")
    fill(client, "p", orders(50, 100))
    drain(valkey, rulebook, secret="")
    stored: Any = client.hget(Keys("p").checkpoint, "secret")
    wanted = expected(stream_entries(client, "p"), secret=Secret(bytes.fromhex(stored.decode())))
    rows = ledger_rows(client, "p")
    assert rows == wanted.rows
    entry: Entry = rows[0][2]
    assert all(entry.fingerprints)


def test_a_key_of_another_type_is_told_in_one_line(valkey: Server, rulebook: Path) -> None:
    valkey.client().set(Keys("p").events, "text")
    done = command("worker", "--redis", valkey.url, "--partition", "p", "--rulebook", rulebook, "--drain")
    assert done.returncode == 1
    assert b"WRONGTYPE" in done.stderr.splitlines()[-1]
    assert b"Traceback" not in done.stderr


def test_the_plain_event_loop_will_do_as_well(valkey: Server, rulebook: Path) -> None:
    fill(valkey.client(), "p", mixed_entries(300, seed=11))
    settings = Settings(
        redis=valkey.url, partition="p", rulebook=str(rulebook), secret=SECRET.key.hex(), progress=False
    )
    asyncio.run(Worker(settings, load(rulebook), drain=True).run())
    check(valkey)


def test_progress_is_told_live(valkey: Server, rulebook: Path) -> None:
    fill(valkey.client(), "p", orders(1, 100))
    with WorkerProcess(valkey.url, "p", rulebook, "--progress") as worker:
        wait_until(lambda: "lag 0" in worker.said, "it is told that all is done")
        with pytest.raises(Exception, match="timed out"):
            worker.process.wait(2.5)
        assert worker.finish() == 0
    lines = [line for line in worker.log.splitlines() if " · " in line]
    assert lines
    assert "99 events" in lines[0]
    assert "lag 0" in lines[-1]
    assert "granted" in lines[0]


def test_a_redriven_dead_letter_is_decided_again(server: Server, rulebook: Path, tmp_path: Path) -> None:
    client = server.client()
    unknown = [order(number, kind="vote", amount=None) for number in range(1, 6)]
    fill(client, "p", [(f"{NOON_MS + 1}-0", {"b": pack([msgspec.Raw(compact(event)) for event in unknown])})])
    fill(client, "p", [(f"{NOON_MS + 2}-0", {"j": b"{oops"})])
    drain(server, rulebook)
    common = ("deadletters", "--redis", server.url, "--partition", "p", "--redrive")

    dry = command(*common)
    assert dry.returncode == 0
    assert b"dry run: 6" in dry.stderr
    assert client.xlen(Keys("p").deadletters) == 6
    assert client.xlen(Keys("p").events) == 2

    # The rulebook learns the kind; of the letters with that reason, three go back.
    second = tmp_path / "second.toml"
    second.write_text(SECOND + '\n[[earn]]\nkind = "vote"\npoints = 5\n', encoding="utf-8")
    drain(server, second)
    done = command(*common, "--execute", "--reason", "unknown_kind", "--limit", "3", "--rate", "1000")
    assert done.returncode == 0, done.stderr
    redriven = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in redriven] == ["order-1", "order-2", "order-3"]
    drain(server, second)
    rows = ledger_rows(client, "p")
    assert [(position.stream_id, entry.event) for _, position, entry in rows] == [
        (line["redriven"], line["event"]) for line in redriven
    ]
    # All the rest; what fails again is a new dead letter, and is not sent round and round.
    done = command(*common, "--execute")
    assert done.stdout.count(b"\n") == 3
    drain(server, second)
    letters = dead_letter_lines(server, "p")
    assert [(letter["id"], letter["reason"]) for letter in letters] == [("7-0", "invalid")]
    checkpoint = checkpoint_of(client, "p")
    assert checkpoint.dead_letters == 7
    assert client.hget(Keys("p").checkpoint, "redriven") == b"6"


def test_an_out_of_memory_server_takes_no_redriven_letter(server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory("valkey")
    client: redis.Redis = server.client()
    fill(client, "p", [(f"{NOON_MS + 2}-0", {"j": b"{oops"})])
    drain(server, rulebook)
    client.config_set("maxmemory", "1mb")
    done = command("deadletters", "--redis", server.url, "--partition", "p", "--redrive", "--execute")
    assert done.returncode == 1
    assert b"maxmemory" in done.stderr
    assert client.xlen(Keys("p").deadletters) == 1
    assert client.xlen(Keys("p").events) == 1
