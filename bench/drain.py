"""End to end: a full stream on a real server, drained by the worker, beside its ceiling and its peer in the same run.

ceiling    one connection that asks for 4096 events at a time, two requests ahead, and throws the bytes away: what the
           server can hand out at all
worker     ``accrual worker --drain`` as a process of its own, from its first read to its last commit, by its own log
peer       redis-py and one Lua call per event (peer_lua.py), on a part of the same stream

The server has a core, and the worker both: its threads go where there is room. Ceiling and worker take turns, so that
both meet the same moods of the machine.
After every run the books are checked: events in = entries + duplicates, no dead letter, as many duplicates as were
planted; and after the last run of each variant the whole ledger is read and verified.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import redis

from accrual.embedded import EmbeddedServer, Options
from accrual.ledger import EntriesBatch, LedgerReader
from accrual.stream import Checkpoint, Keys, checkpoint_of
from bench.core import RULEBOOK
from bench.machine import SERVER_CORE, WORKER_CORE, file_system_of, pinned, run_module, yardstick_ms
from bench.memory import find_memory_for
from bench.report import Figure, table
from bench.wire import EVENTS_PER_BATCH, Encoding, Entries, command, reply_head, xread_command
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, Events, Workload

__all__ = ["VARIANTS", "Drain", "DrainSettings", "Drained", "Variant", "measure_drain", "summary"]

Transport = Literal["tcp", "unix"]

PARTITION: Final = "bench"
KEYS: Final = Keys(PARTITION)
CEILING_EVENTS: Final = 4096
CEILING_S: Final = 0.5
REQUESTS_AHEAD: Final = 2
RECEIVE_BYTES: Final = 1 << 20
REPLY_ON: Final = b"+OK\r\n"
LASTING_KEYS: Final = (KEYS.ledger, KEYS.checkpoint, KEYS.rulebooks)
KEPT: Final = ":kept"
TOTAL: Final = re.compile(r"total events=(?P<events>\d+) .*?events_per_s=(?P<rate>\d+)")

# Rewriting the file beside a measurement would measure the rewriting.
DURABLE: Final[Options] = {"appendonly": "yes", "appendfsync": "always", "auto-aof-rewrite-percentage": "0"}


@dataclass(frozen=True)
class Variant:
    """One way to have the events on the stream. ``share`` is the part of the events that it takes to measure it.

    With ``census`` the worker has met every member, device, phone and address before, as on any day but the first.
    """

    name: str
    title: str
    encoding: Encoding
    options: Options
    share: float = 1.0
    census: bool = True


VARIANTS: Final = (
    Variant("single", "one event per entry", "e", {}),
    Variant("batches", f"{EVENTS_PER_BATCH} events per entry", "b", {}),
    Variant("empty", "one event per entry, on an empty state", "e", {}, census=False),
    Variant("json", "JSON, one event per entry", "j", {}, share=0.25),
    Variant("durable", "one event per entry, appendfsync always", "e", DURABLE),
)


@dataclass(frozen=True)
class DrainSettings:
    """What is measured. ``events`` and ``peer_events`` are rounded up to whole chunks of 8192."""

    events: int = 2_000_000
    peer_events: int = 50_000
    runs: int = 5
    members: int = 1_000_000
    seed: int = DEFAULT_SEED
    transport: Transport = "tcp"
    directory: Path | None = None
    variants: tuple[str, ...] = tuple(variant.name for variant in VARIANTS)

    @property
    def workload(self) -> Workload:
        """The standard workload."""
        return Workload(members=self.members, seed=self.seed)


class Filled(msgspec.Struct):
    """A stream, and how to read all of it: commands, and the length of the reply to each."""

    events: int = 0
    duplicates: int = 0
    entries: int = 0
    requests: list[bytes] = []
    reply_bytes: list[int] = []


class Drained(msgspec.Struct, frozen=True):
    """What the runs of one variant have shown. Shares are of the time from first read to last commit."""

    name: str
    title: str
    events: int
    entry_bytes: float
    ceiling: Figure
    worker: Figure
    worker_cpu: Figure
    """Processor time of the worker, that of a start without work left out, per second of draining."""
    server_cpu: Figure
    outside_s: Figure
    """What the process took besides: its start before the first read, its end after the last commit."""
    ledger_bytes_per_event: float


class Drain(msgspec.Struct, frozen=True):
    """All of it."""

    variants: list[Drained]
    peer: Figure
    peer_outcomes: dict[str, int]
    yardstick_ms: Figure
    file_system: str
    server_settings: dict[str, dict[str, Any]]


def measure_drain(settings: DrainSettings, tell: Any = print) -> Drain:
    """Measure every variant and the peer; ``tell`` hears what is going on."""
    chosen = [variant for variant in VARIANTS if variant.name in settings.variants]
    yardsticks = [_yardstick()]
    with _server(settings, {}) as server:
        tell(f"peer: {settings.peer_events:,} events")
        peer, outcomes = _measure_peer(server, settings)
    yardsticks.append(_yardstick())
    drained = []
    for variant in chosen:
        with _server(settings, variant.options) as server:
            drained.append(_drain_variant(server, settings, variant, tell))
        yardsticks.append(_yardstick())
    return Drain(
        variants=drained,
        peer=peer,
        peer_outcomes=outcomes,
        yardstick_ms=Figure("yardstick", "ms", tuple(yardsticks)),
        file_system=file_system_of(settings.directory or Path(tempfile.gettempdir())),
        server_settings={variant.name: dict(variant.options) for variant in chosen},
    )


def _yardstick() -> float:
    with pinned(WORKER_CORE):
        return yardstick_ms()


@contextlib.contextmanager
def _server(settings: DrainSettings, options: Options) -> Iterator[EmbeddedServer]:
    with contextlib.ExitStack() as stack:
        directory = None
        if settings.directory is not None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=settings.directory)))
        with pinned(SERVER_CORE):
            server = stack.enter_context(EmbeddedServer(options, directory=directory))
        yield server


def _url(server: EmbeddedServer, settings: DrainSettings) -> str:
    return server.unix_url if settings.transport == "unix" else server.url


@contextlib.contextmanager
def _connected(server: EmbeddedServer, settings: DrainSettings) -> Iterator[socket.socket]:
    if settings.transport == "unix":
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server.unix_socket_path))
            yield connection
    else:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection


# ----------------------------------------------------------------------------------------------- the stream


def fill(connection: socket.socket, chunks: Iterable[Events], encoding: Encoding) -> Filled:
    """Put all ``chunks`` on the stream, in order, and return how to read them again."""
    filled = Filled()
    after: tuple[int, int] | None = None
    # Nobody reads a million answers; whether all has arrived is asked at the end.
    connection.sendall(command("CLIENT", "REPLY", "OFF"))
    for chunk in chunks:
        entries = Entries.of(chunk, encoding)
        if after is None:
            after = int(entries.ms[0]) - 1, 0
        connection.sendall(entries.xadd(KEYS.events).data.data)
        after = _plan_reading(filled, entries, after)
        filled.events += len(chunk)
        filled.duplicates += chunk.duplicates
        filled.entries += len(entries)
    connection.sendall(command("CLIENT", "REPLY", "ON"))
    answer = connection.recv(len(REPLY_ON))
    if answer != REPLY_ON:
        raise RuntimeError(f"the server answered {answer!r}")
    return filled


def events_of(settings: DrainSettings, count: int) -> Iterator[Events]:
    """Yield at least ``count`` events of the workload, in whole chunks."""
    for first in range(0, count, CHUNK_EVENTS):
        yield settings.workload.events(first, CHUNK_EVENTS)


def census_of(settings: DrainSettings) -> Iterator[Events]:
    """Yield the events that show every key once."""
    for first in range(0, settings.workload.census_size, CHUNK_EVENTS):
        yield settings.workload.census(first, CHUNK_EVENTS)


def _plan_reading(filled: Filled, entries: Entries, after: tuple[int, int]) -> tuple[int, int]:
    count = CEILING_EVENTS * len(entries) // entries.events
    sizes = np.add.reduceat(entries.reply_sizes(), np.arange(0, len(entries), count))
    for start, size in zip(range(0, len(entries), count), sizes.tolist(), strict=True):
        asked = min(count, len(entries) - start)
        filled.requests.append(xread_command(KEYS.events, asked, after))
        filled.reply_bytes.append(len(reply_head(KEYS.events, asked)) + size)
        last = start + asked - 1
        after = int(entries.ms[last]), int(entries.seq[last])
    return after


# ---------------------------------------------------------------------------------------------- the ceiling


def ceiling(connection: socket.socket, filled: Filled) -> float:
    """Read the whole stream, bytes only, as often as a steady figure needs, and return the events per second."""
    seconds, times = 0.0, 0
    while seconds < CEILING_S:
        seconds += read_all(connection, filled)
        times += 1
    return times * filled.events / seconds


def read_all(connection: socket.socket, filled: Filled) -> float:
    """Read the whole stream once and return the seconds that took."""
    place = memoryview(bytearray(RECEIVE_BYTES))
    started = time.perf_counter()
    for request in filled.requests[:REQUESTS_AHEAD]:
        connection.sendall(request)
    received = expected = 0
    for number, size in enumerate(filled.reply_bytes):
        expected += size
        while received < expected:
            count = connection.recv_into(place)
            if count == 0:
                raise ConnectionError("the server closed the connection")
            received += count
        if number + REQUESTS_AHEAD < len(filled.requests):
            connection.sendall(filled.requests[number + REQUESTS_AHEAD])
    seconds = time.perf_counter() - started
    if received != expected:
        raise RuntimeError(f"{received} bytes came instead of {expected}")
    return seconds


# ----------------------------------------------------------------------------------------------- the worker


class WorkerRun(msgspec.Struct, frozen=True):
    """One run of the worker, by its own log and by the clock on the wall."""

    events: int
    events_per_s: float
    outside_s: float
    """Everything before the first read and after the last commit, by the clock on the wall."""
    worker_cpu_s: float
    server_cpu_s: float

    @property
    def seconds(self) -> float:
        """From the first read to the last commit."""
        return self.events / self.events_per_s


def run_worker(url: str, client: redis.Redis) -> WorkerRun:
    """Let the worker drain the partition from its beginning, on any core: its threads share the server's."""
    server_before, worker_before = _server_cpu_s(client), _children_cpu_s()
    started = time.perf_counter()
    try:
        done = run_module(
            *("accrual.cli", "worker", "--rulebook", str(RULEBOOK), "--redis", url),
            *("--partition", PARTITION, "--drain"),
            anywhere=True,
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the worker failed:\n{error.stderr}") from error
    wall_s = time.perf_counter() - started
    total = TOTAL.search(done.stderr)
    if total is None:
        raise RuntimeError(f"the worker's log has no total:\n{done.stderr}")
    events, rate = int(total["events"]), float(total["rate"])
    return WorkerRun(
        events=events,
        events_per_s=rate,
        outside_s=wall_s - events / max(1.0, rate),
        worker_cpu_s=_children_cpu_s() - worker_before,
        server_cpu_s=_server_cpu_s(client) - server_before,
    )


def forget_work(client: redis.Redis) -> None:
    """Take back what a worker has left, but for what was kept by ``keep_work``."""
    client.delete(KEYS.ledger, KEYS.deadletters, KEYS.checkpoint, KEYS.lease, KEYS.rulebooks)
    for key in LASTING_KEYS:
        if client.exists(key + KEPT):
            client.copy(key + KEPT, key)


def keep_work(client: redis.Redis) -> None:
    """Let every later run start from what a worker has left now."""
    for key in LASTING_KEYS:
        client.copy(key, key + KEPT)


def check_books(client: redis.Redis, known: Checkpoint, filled: Filled, run: WorkerRun) -> Checkpoint:
    """Check that every event has exactly one outcome, and return the checkpoint. Raises ``RuntimeError``."""
    checkpoint = checkpoint_of(client, KEYS)
    found = (checkpoint.events, checkpoint.entries, checkpoint.duplicates, checkpoint.dead_letters)
    events = known.events + filled.events
    expected = (events, events - filled.duplicates, filled.duplicates, 0)
    if found != expected or run.events != filled.events or client.xlen(KEYS.deadletters):
        raise RuntimeError(f"events, entries, duplicates and dead letters are {found} instead of {expected}")
    return checkpoint


def check_ledger(client: redis.Redis, checkpoint: Checkpoint) -> int:
    """Read the ledger from its beginning, verify its chain and its counts, and return its length in bytes."""
    entries = 0
    for batch in LedgerReader(client, PARTITION).batches():
        if isinstance(batch, EntriesBatch):
            entries += batch.header.counts.entries
    if entries != checkpoint.entries:
        raise RuntimeError(f"the ledger has {entries} entries, the checkpoint says {checkpoint.entries}")
    return int(client.memory_usage(KEYS.ledger, samples=0) or 0)


def _server_cpu_s(client: redis.Redis) -> float:
    used: Any = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _take_census(server: EmbeddedServer, settings: DrainSettings, client: redis.Redis) -> None:
    """Let the worker meet every key, and keep what it leaves."""
    with _connected(server, settings) as connection, pinned(WORKER_CORE):
        fill(connection, census_of(settings), "b")
    run_worker(_url(server, settings), client)
    keep_work(client)


def _drain_variant(server: EmbeddedServer, settings: DrainSettings, variant: Variant, tell: Any) -> Drained:
    client = server.client(protocol=2, socket_timeout=None)
    always = variant.options.get("appendfsync") == "always"
    if always:
        client.config_set("appendfsync", "no")
    tell(f"{variant.title}: filling the stream")
    if variant.census:
        _take_census(server, settings, client)
    # What a start costs shows where there is nothing to do; a start after a census replays it.
    idle = run_worker(_url(server, settings), client)
    known = checkpoint_of(client, KEYS)
    known_entries = client.xlen(KEYS.events)
    with _connected(server, settings) as connection, pinned(WORKER_CORE):
        filled = fill(connection, events_of(settings, int(settings.events * variant.share)), variant.encoding)
    if client.xlen(KEYS.events) != known_entries + filled.entries:
        raise RuntimeError(f"the stream has {client.xlen(KEYS.events)} entries, not {filled.entries} more")
    if always:
        client.config_set("appendfsync", "always")
    ceilings, runs = [], []
    checkpoint = Checkpoint()
    for number in range(1, settings.runs + 1):
        forget_work(client)
        find_memory_for(settings.members)
        with _connected(server, settings) as connection, pinned(WORKER_CORE):
            ceilings.append(ceiling(connection, filled))
        runs.append(run_worker(_url(server, settings), client))
        checkpoint = check_books(client, known, filled, runs[-1])
        tell(
            f"{variant.title}: run {number} of {settings.runs}: "
            f"{runs[-1].events_per_s:,.0f} events/s, ceiling {ceilings[-1]:,.0f}"
        )
    ledger_bytes = check_ledger(client, checkpoint)
    return Drained(
        name=variant.name,
        title=variant.title,
        events=filled.events,
        entry_bytes=sum(filled.reply_bytes) / filled.entries,
        ceiling=Figure(f"{variant.name} ceiling", "events/s", tuple(ceilings)),
        worker=Figure(f"{variant.name} worker", "events/s", tuple(run.events_per_s for run in runs)),
        worker_cpu=Figure("worker", "s/s", tuple((run.worker_cpu_s - idle.worker_cpu_s) / run.seconds for run in runs)),
        server_cpu=Figure("server", "s/s", tuple((run.server_cpu_s - idle.server_cpu_s) / run.seconds for run in runs)),
        outside_s=Figure("outside", "s", tuple(run.outside_s for run in runs)),
        ledger_bytes_per_event=ledger_bytes / checkpoint.events,
    )


# ------------------------------------------------------------------------------------------------- the peer


def _measure_peer(server: EmbeddedServer, settings: DrainSettings) -> tuple[Figure, dict[str, int]]:
    client = server.client(protocol=2)
    rates = []
    outcomes: dict[str, int] = {}
    for _ in range(settings.runs):
        client.flushall()
        with _connected(server, settings) as connection:
            filled = fill(connection, events_of(settings, settings.peer_events), "e")
        done = run_module(
            *("bench.peer_lua", "--redis", _url(server, settings), "--partition", PARTITION),
            *("--rulebook", str(RULEBOOK)),
            anywhere=True,
        )
        said = json.loads(done.stdout)
        outcomes = said["outcomes"]
        if said["events"] != filled.events or outcomes.get("duplicate", 0) != filled.duplicates:
            raise RuntimeError(f"the peer counted {said} of {filled.events} events")
        rates.append(said["events"] / said["seconds"])
    return Figure("peer", "events/s", tuple(rates)), outcomes


# ---------------------------------------------------------------------------------------------- for people


def summary(result: Drain) -> str:
    """Return the table: a row for each variant and one for the peer."""
    headings = ["", "events/s", "noise", "ceiling", "of ceiling", "over peer", "worker CPU", "server CPU"]
    rows = []
    for drained in result.variants:
        worker, ceiling = drained.worker, drained.ceiling
        rows.append(
            [
                drained.title,
                f"{worker.median:,.0f}",
                f"±{worker.noise:.0%}",
                f"{ceiling.median:,.0f} ±{ceiling.noise:.0%}",
                f"{worker.ratio_to(ceiling):.2f}",
                f"{worker.ratio_to(result.peer):.0f} x",
                f"{drained.worker_cpu.median:.0%}",
                f"{drained.server_cpu.median:.0%}",
            ]
        )
    peer = result.peer
    rows.append(["redis-py + Lua (the peer)", f"{peer.median:,.0f}", f"±{peer.noise:.0%}", "", "", "1 x", "", ""])
    return table(headings, rows)
