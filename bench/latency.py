"""From append to committed under open-loop load: how long an event waits until its outcome is in the ledger.

producer   sends on a fixed schedule, whatever the server does: event ``i`` is due ``i / rate`` after the start. When it
           is late it sends at once, and the time still counts from when the event was due (no coordinated omission).
worker     ``accrual worker`` as a process of its own, which has met every key before
follower   a third process that reads the ledger stream; when a batch arrives there, its events are committed
floor      in the worker's place a copier that decides nothing and waits for no company: it reads with ``XREAD`` and
           commits the bytes by ``MULTI``, ``XADD``, ``EXEC``

All clocks are the machine's monotonic one. The n-th event that was sent is the n-th that was committed, because a
stream keeps its order; so no event has to carry its time. Times go into an HdrHistogram of three digits.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import hiredis
import msgspec
import numpy as np
import numpy.typing as npt
import redis
from hdrh.histogram import HdrHistogram

from accrual.embedded import EmbeddedDatabase, EmbeddedServer
from accrual.stream import Keys, checkpoint_of, stream_id_text
from bench.behind import PACE_SAID, Behind, Mark, behind_of, catching_up
from bench.book import DATABASE
from bench.machine import WORKER_CORE, pinned, yardstick_ms
from bench.memory import find_memory_for
from bench.report import Figure, table
from bench.rows import Booleans, Integers
from bench.running import KEYS, SNAPSHOT_WRITTEN, Said, Worker, census_of, connected, put_census, server_in, workspace
from bench.wire import Entries, command
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED, Workload
from fastpath.resp import ReplyReader

__all__ = ["PERCENTILES", "VARIANTS", "Committed", "Latency", "LatencySettings", "follow", "measure_latency", "summary"]

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9, 100.0)
VARIANTS: Final = ("quiet", "book", "snapshot")
FLOOR_KEYS: Final = Keys("floor")

SECOND_NS: Final = 1_000_000_000
LONGEST_US: Final = 3_600 * 1_000_000
DIGITS: Final = 3
# How often the producer looks at its schedule. What is due in between waits, and that counts.
TICK_S: Final = 0.0005
LEAD_NS: Final = SECOND_NS // 5
BLOCK_MS: Final = 1000
COPY_ENTRIES: Final = 8192
RECEIVE_BYTES: Final = 1 << 18
# What comes before the first reading of a run warms caches and connections; it counts for nothing.
WARM_UP_S: Final = 1
PATIENCE_S: Final = 60.0
# A worker's log has tenths of a second, so a snapshot may have begun that much earlier than it says.
LOG_STEP_NS: Final = SECOND_NS // 10
BESIDE_BOOK: Final = ("worker, the book behind", "floor, the book behind")


@dataclass(frozen=True)
class LatencySettings:
    """What is measured: ``rate_per_s`` events for ``seconds``, ``runs`` times; one long run of ``snapshot_seconds``.

    ``members`` have been met before in the quiet variant and in the one with a book, ``snapshot_members`` in the one
    with snapshots.
    ``linger_ms`` is the worker's setting: how long it waits for company after a batch that was not full.
    """

    rate_per_s: int = 100_000
    seconds: int = 10
    runs: int = 3
    members: int = 1_000_000
    snapshot_members: int = 10_000_000
    snapshot_seconds: int = 90
    snapshot_interval_s: int = 60
    linger_ms: int = 1
    seed: int = DEFAULT_SEED
    directory: Path | None = None
    variants: tuple[str, ...] = VARIANTS


class Percentiles(msgspec.Struct, frozen=True):
    """One row of the table. A run of a figure is a percentile of all events of a run, in ms."""

    name: str
    events: int
    figures: list[Figure]
    """One for each of ``PERCENTILES``."""
    sent_late: Figure
    """The 99th percentile of how long after it was due an event was sent: the harness's own part of the time."""
    histograms: list[str]
    """Of each run: µs, in the compressed form that every HdrHistogram reads."""


class Latency(msgspec.Struct, frozen=True):
    """All of it."""

    rows: list[Percentiles]
    snapshots: list[dict[str, float]]
    """Bytes and seconds of each snapshot that was written under load."""
    behind: list[Behind]
    """How far behind the book was in the loads beside it."""
    linger_ms: int
    yardstick_ms: Figure


# ------------------------------------------------------------------------------------------------ the clocks


class Sent(NamedTuple):
    """When events were due and when they were sent: after ``through[k]`` events, at ``at_ns[k]``."""

    start_ns: int
    rate_per_s: int
    through: Integers
    at_ns: Integers

    @property
    def events(self) -> int:
        """How many there were."""
        return int(self.through[-1])

    @property
    def due_ns(self) -> Integers:
        """When each event was due."""
        return self.start_ns + np.arange(self.events, dtype=np.int64) * SECOND_NS // self.rate_per_s

    @property
    def sent_ns(self) -> Integers:
        """When each event was sent."""
        return each_of(self.through, self.at_ns)


class Committed(NamedTuple):
    """When batches were seen in the ledger: with each, ``through[k]`` events were committed, at ``at_ns[k]``."""

    through: Integers
    at_ns: Integers


def each_of(through: Integers, at_ns: Integers) -> Integers:
    """Return the time of each event where ``through[k]`` events in all had happened at ``at_ns[k]``.

    Raises ``RuntimeError`` where the counts go back.
    """
    counts = np.diff(through, prepend=0)
    if len(counts) and counts.min() < 0:
        raise RuntimeError("counts of events that go back")
    return np.repeat(at_ns, counts)


def latency_us(sent: Sent, committed: Committed) -> Integers:
    """Return how long each event took from when it was due until it was committed, in µs rounded up.

    Raises ``RuntimeError`` where not exactly the events that were sent were committed.
    """
    done_ns = each_of(*committed)
    if len(done_ns) != sent.events:
        raise RuntimeError(f"{sent.events} events were sent and {len(done_ns)} committed")
    waited_ns = done_ns - sent.due_ns
    if waited_ns.min(initial=0) < 0:
        raise RuntimeError("an event was committed before it was due: the clocks do not agree")
    return -(-waited_ns // 1000)


def during(sent: Sent, committed: Committed, windows: Sequence[tuple[int, int]]) -> Booleans:
    """Return which events waited at any moment of ``windows`` (from, to, ns)."""
    due_ns, done_ns = sent.due_ns, each_of(*committed)
    touched = np.zeros(sent.events, np.bool_)
    for begin_ns, end_ns in windows:
        touched |= (done_ns >= begin_ns) & (due_ns <= end_ns)
    return touched


def histogram_of(values_us: npt.NDArray[np.int64]) -> HdrHistogram:
    """Return the histogram of ``values_us``."""
    histogram = HdrHistogram(1, LONGEST_US, DIGITS)
    values, counts = np.unique(np.maximum(values_us, 1), return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if not histogram.record_value(value, count):
            raise RuntimeError(f"{value} us are more than the histogram holds")
    return histogram


def percentiles_of(name: str, runs: Sequence[tuple[Integers, Integers]]) -> Percentiles:
    """Return the row of ``runs``: of each, the latencies and by how much events were sent late, in µs."""
    histograms = [histogram_of(values) for values, _ in runs]
    late = [histogram_of(values).get_value_at_percentile(99.0) for _, values in runs]
    figures = [
        Figure(
            f"{name} {_title(percentile)}",
            "ms",
            tuple(histogram.get_value_at_percentile(percentile) / 1000 for histogram in histograms),
        )
        for percentile in PERCENTILES
    ]
    return Percentiles(
        name=name,
        events=sum(len(values) for values, _ in runs),
        figures=figures,
        sent_late=Figure(f"{name} sent late", "ms", tuple(value / 1000 for value in late)),
        histograms=[histogram.encode().decode() for histogram in histograms],
    )


def _title(percentile: float) -> str:
    return "max" if percentile == 100 else f"p{percentile:g}"


# --------------------------------------------------------------------------------- the processes beside worker


class Load(NamedTuple):
    """A stretch of the workload to send: ``events`` of them, from number ``first``, both whole chunks."""

    workload: Workload
    first: int
    events: int
    rate_per_s: int

    def after(self) -> Load:
        """Return the stretch of the same length that comes next."""
        return self._replace(first=self.first + self.events)


_together: Any = None


def _share(barrier: Any) -> None:
    global _together  # noqa: PLW0603 - a process of the pool learns it once, when it starts
    _together = barrier


def _begin() -> None:
    """Wait until the other processes of this load are as far."""
    if _together is not None:
        _together.wait(PATIENCE_S)


def produce(port: int, key: str, load: Load) -> Sent:
    """Send ``load`` to the stream ``key`` on its schedule. Everything is made before the first event is due."""
    chunks = []
    for first in range(load.first, load.first + load.events, CHUNK_EVENTS):
        commands = Entries.of(load.workload.events(first, CHUNK_EVENTS)).xadd(key)
        chunks.append((commands.data.data, commands.offsets.tolist()))
    through, at_ns = [], []
    with connected(port) as connection:
        # Nobody reads a hundred thousand answers a second; that all has arrived shows in the ledger.
        connection.sendall(command("CLIENT", "REPLY", "OFF"))
        _begin()
        start_ns = time.monotonic_ns() + LEAD_NS
        sent = 0
        while sent < load.events:
            due = (time.monotonic_ns() - start_ns) * load.rate_per_s // SECOND_NS + 1
            if due <= sent:
                time.sleep(TICK_S)
                continue
            # A piece ends with its chunk at the latest; what is due beyond that follows at once.
            number, begin = divmod(sent, CHUNK_EVENTS)
            end = min(CHUNK_EVENTS, due - number * CHUNK_EVENTS)
            data, offsets = chunks[number]
            connection.sendall(data[offsets[begin] : offsets[end]])
            sent = number * CHUNK_EVENTS + end
            through.append(sent)
            at_ns.append(time.monotonic_ns())
    return Sent(start_ns, load.rate_per_s, np.array(through), np.array(at_ns))


class _Counted(msgspec.Struct):
    """What a follower needs to know of a batch; a batch that records a rulebook has no events."""

    events: int = 0


def follow(port: int, key: str, after: tuple[int, int], events: int) -> Committed:
    """Read the ledger stream ``key`` behind ``after`` until it has so many events more, noting when each batch came.

    Raises ``RuntimeError`` where nothing comes for a minute.
    """
    decode = msgspec.msgpack.Decoder(_Counted).decode
    through, at_ns = [], []
    with redis.Redis(port=port, protocol=2) as client:
        client.ping()
        _begin()
        position: bytes | str = stream_id_text(after)
        seen = 0
        heard_ns = time.monotonic_ns()
        while seen < events:
            reply: Any = client.xread({key: position}, count=64, block=BLOCK_MS)
            now_ns = time.monotonic_ns()
            if not reply and now_ns - heard_ns > PATIENCE_S * SECOND_NS:
                raise RuntimeError(f"{seen} of {events} events were committed, and then no more")
            for stream_id, fields in reply[0][1] if reply else ():
                position = stream_id
                seen += decode(fields[b"batch"]).events
                through.append(seen)
                at_ns.append(now_ns)
                heard_ns = now_ns
    return Committed(np.array(through), np.array(at_ns))


def copy(port: int, keys: Keys, events: int) -> None:
    """Read the events stream from its beginning and commit what was read as it is, until all is there: the floor."""
    reader, answers = ReplyReader(), hiredis.Reader()
    with pinned(WORKER_CORE), connected(port) as connection:
        _begin()
        position, copied = (0, 0), 0
        while copied < events:
            asked = (
                "XREAD",
                "COUNT",
                COPY_ENTRIES,
                "BLOCK",
                BLOCK_MS,
                "STREAMS",
                keys.events,
                stream_id_text(position),
            )
            connection.sendall(command(*asked))
            pieces = _receive(connection, reader)
            if reader.kind == "entries":
                position, copied = reader.last, copied + reader.entries
                value = msgspec.msgpack.encode({"events": reader.entries, "reply": b"".join(pieces)})
                connection.sendall(
                    command("MULTI") + command("XADD", keys.ledger, "*", "batch", value) + command("EXEC")
                )
                _executed(connection, answers)
            reader.clear()


def _receive(connection: Any, reader: ReplyReader) -> list[bytes]:
    """Receive one reply into ``reader`` and return its bytes."""
    pieces = []
    complete = False
    while not complete:
        place = reader.get_buffer(RECEIVE_BYTES)
        size = connection.recv_into(place)
        if not size:
            raise ConnectionError("the server closed the connection")
        pieces.append(bytes(place[:size]))
        complete = reader.buffer_updated(size)
    return pieces


def _executed(connection: Any, answers: hiredis.Reader) -> None:
    """Wait for the three answers of a transaction."""
    for _ in range(3):
        while (answer := answers.gets()) is False:
            answers.feed(connection.recv(4096))
        if isinstance(answer, Exception):
            raise answer


# ------------------------------------------------------------------------------------------------ the measurement


class Measured(NamedTuple):
    """One load from the first event to the last."""

    sent: Sent
    committed: Committed

    @property
    def span_ns(self) -> tuple[int, int]:
        """From the end of the warm-up to the last commit."""
        return self.sent.start_ns + WARM_UP_S * SECOND_NS, int(self.committed.at_ns[-1])

    def row(self, chosen: Booleans | None = None) -> tuple[Integers, Integers]:
        """Return latencies and how late events were sent, in µs, of the ``chosen`` ones behind the warm-up."""
        counted = self.sent.due_ns >= self.span_ns[0]
        if chosen is not None:
            counted &= chosen
        late_us = (self.sent.sent_ns - self.sent.due_ns) // 1000
        return latency_us(self.sent, self.committed)[counted], late_us[counted]


def measure_latency(settings: LatencySettings, tell: Callable[[str], None] = print) -> Latency:
    """Measure the chosen variants, each beside its floor; ``tell`` hears what is going on."""
    rows: list[Percentiles] = []
    snapshots: list[dict[str, float]] = []
    behind: list[Behind] = []
    yardsticks = [_yardstick()]
    for variant in settings.variants:
        with workspace(settings.directory) as directory, server_in(directory) as server:
            if variant == "quiet":
                rows += _quiet(server, settings, tell)
            elif variant == "book":
                found, behind = _beside_book(server, settings, tell)
                rows += found
            else:
                found, snapshots = _under_snapshots(server, directory, settings, tell)
                rows += found
        yardsticks.append(_yardstick())
    return Latency(rows, snapshots, behind, settings.linger_ms, Figure("yardstick", "ms", tuple(yardsticks)))


def _yardstick() -> float:
    with pinned(WORKER_CORE):
        return yardstick_ms()


def _workload(members: int, settings: LatencySettings) -> Workload:
    return Workload(members=members, rate_per_s=max(1, members // 500), seed=settings.seed)


def _load(workload: Workload, seconds: int, settings: LatencySettings) -> Load:
    events = settings.rate_per_s * (WARM_UP_S + seconds)
    return Load(workload, 0, -(-events // CHUNK_EVENTS) * CHUNK_EVENTS, settings.rate_per_s)


def _quiet(server: EmbeddedServer, settings: LatencySettings, tell: Callable[[str], None]) -> list[Percentiles]:
    """Worker and floor in turns, so that both meet the same moods of the machine."""
    workload = _workload(settings.members, settings)
    load = _load(workload, settings.seconds, settings)
    _take_census(server, workload, tell)
    find_memory_for(workload.members)
    floors, runs = [], []
    with Worker(server.url, "--linger-ms", settings.linger_ms) as worker:
        worker.said("owner partition")
        for number in range(1, settings.runs + 1):
            tell(f"latency, quiet: run {number} of {settings.runs}, {load.events:,} events each")
            floors.append(_through_floor(server, load).row())
            runs.append(_through_worker(server, load).row())
            load = load.after()
        worker.end()
    return [percentiles_of("worker", runs), percentiles_of("floor: a copier", floors)]


def _beside_book(
    server: EmbeddedServer, settings: LatencySettings, tell: Callable[[str], None]
) -> tuple[list[Percentiles], list[Behind]]:
    """In turns the worker alone, and worker and floor beside a book that has all of the ledger to catch up with."""
    workload = _workload(settings.members, settings)
    load = _load(workload, settings.seconds, settings)
    _take_census(server, workload, tell)
    find_memory_for(workload.members)
    measured: dict[str, list[Measured]] = {name: [] for name in ("worker, no book", *BESIDE_BOOK)}
    marks: dict[str, list[list[Mark]]] = {name: [] for name in BESIDE_BOOK}
    with EmbeddedDatabase(DATABASE) as database, Worker(server.url, "--linger-ms", settings.linger_ms) as worker:
        worker.said("owner partition")
        for number in range(1, settings.runs + 1):
            tell(f"latency, book: run {number} of {settings.runs}, {load.events:,} events each")
            measured["worker, no book"].append(_through_worker(server, load))
            load = load.after()
            with catching_up(server, database, number) as (watch, ingester):
                for name, through in zip(BESIDE_BOOK, (_through_worker, _through_floor), strict=True):
                    one = through(server, load)
                    measured[name].append(one)
                    marks[name].append(watch.between(*one.span_ns))
            load = load.after()
            for said in ingester.all_said(PACE_SAID)[-1:]:
                tell(f"latency, book: it said {said.match[0]!r}")
        worker.end()
    rows = [percentiles_of(name, [one.row() for one in runs]) for name, runs in measured.items()]
    return rows, [behind_of(name, loads) for name, loads in marks.items()]


def _under_snapshots(
    server: EmbeddedServer, directory: Path, settings: LatencySettings, tell: Callable[[str], None]
) -> tuple[list[Percentiles], list[dict[str, float]]]:
    """One long run, during which snapshots begin and end; events between them are what the others compare with."""
    workload = _workload(settings.snapshot_members, settings)
    load = _load(workload, settings.snapshot_seconds, settings)
    _take_census(server, workload, tell)
    find_memory_for(workload.members)
    flags = ("--linger-ms", settings.linger_ms, "--snapshots", directory / "snapshots", "--snapshots-kept", 1)
    with Worker(server.url, *flags, "--snapshot-interval-s", settings.snapshot_interval_s, anywhere=True) as worker:
        worker.said("owner partition")
        tell(f"latency, snapshot: {load.events:,} events on a state of {settings.snapshot_members:,} members")
        measured = _through_worker(server, load)
        # Told to end, it would give up a snapshot that it has begun, which has a name with a dot until it is whole.
        while any((directory / "snapshots").glob(".*")):
            time.sleep(0.1)
        worker.end()
    if failed := worker.all_said(r" snapshot batch=\d+ (was given up|failed)"):
        raise RuntimeError(failed[0].text)
    written = [line for line in worker.all_said(SNAPSHOT_WRITTEN) if _begun_ns(line) < measured.sent.due_ns[-1]]
    if not written:
        raise RuntimeError("no snapshot was begun before the load ended: give it more seconds")
    windows = [(_begun_ns(line), line.at_ns) for line in written]
    touched = during(*measured, windows)
    floor = _through_floor(server, _load(workload, settings.seconds, settings))
    rows = [percentiles_of("worker while a snapshot is written", [measured.row(touched)])]
    between, late = measured.row(~touched)
    if len(between):
        rows.append(percentiles_of("worker between snapshots", [(between, late)]))
    else:
        tell("latency, snapshot: there was always one being written, so there is nothing to compare with but the floor")
    rows.append(percentiles_of("floor on that server", [floor.row()]))
    return rows, [{name: line.number(name) for name in ("bytes", "seconds")} for line in written]


def _begun_ns(written: Said) -> int:
    """Return when a snapshot was begun at the earliest, from what the log says at its end."""
    return written.at_ns - int(written.number("seconds") * SECOND_NS) - LOG_STEP_NS


def _take_census(server: EmbeddedServer, workload: Workload, tell: Callable[[str], None]) -> None:
    """Let the worker meet every key."""
    tell(f"latency: a state of {workload.members:,} members")
    put_census(server, census_of(workload, workload.census_size))
    find_memory_for(workload.members)
    with Worker(server.url, "--drain") as worker:
        worker.end(ask=False)


def _through_worker(server: EmbeddedServer, load: Load) -> Measured:
    """Send ``load`` through the worker that runs, and check that every event has exactly one outcome."""
    client = server.client(protocol=2)
    before = checkpoint_of(client, KEYS)
    measured = _measured(server, load, KEYS, (before.batch, 0))
    after = checkpoint_of(client, KEYS)
    duplicates = sum(
        load.workload.events(first, CHUNK_EVENTS).duplicates
        for first in range(load.first, load.first + load.events, CHUNK_EVENTS)
    )
    found = (after.events - before.events, after.duplicates - before.duplicates, after.dead_letters)
    if found != (load.events, duplicates, 0):
        raise RuntimeError(f"events, duplicates and dead letters are {found}, not {(load.events, duplicates, 0)}")
    return measured


def _through_floor(server: EmbeddedServer, load: Load) -> Measured:
    """Send ``load`` through the copier, on keys of its own."""
    client = server.client(protocol=2)
    measured = _measured(server, load, FLOOR_KEYS, (0, 0), (copy, server.port, FLOOR_KEYS, load.events))
    client.delete(FLOOR_KEYS.events, FLOOR_KEYS.ledger)
    return measured


def _measured(
    server: EmbeddedServer, load: Load, keys: Keys, after: tuple[int, int], *beside: tuple[Any, ...]
) -> Measured:
    """Let producer, follower and what goes ``beside`` them begin together, and return what they saw."""
    context = multiprocessing.get_context("spawn")
    tasks: list[tuple[Any, ...]] = [
        (produce, server.port, keys.events, load),
        (follow, server.port, keys.ledger, after, load.events),
        *beside,
    ]
    barrier = context.Barrier(len(tasks))
    with ProcessPoolExecutor(len(tasks), context, initializer=_share, initargs=(barrier,)) as executor:
        sent, committed, *_ = _results([executor.submit(*task) for task in tasks])
    return Measured(sent, committed)


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """Return what the processes return; the first error ends the wait for the others, which time out by themselves."""
    return [future.result() for future in futures]


# ---------------------------------------------------------------------------------------------- for people


def summary(result: Latency) -> str:
    """Return the table: a row for each way, a column for each percentile."""
    headings = [f"ms, linger {result.linger_ms} ms", *map(_title, PERCENTILES), "sent late, p99", "events"]
    rows = [
        [
            row.name,
            *(_with_noise(figure) for figure in row.figures),
            f"{row.sent_late.median:.2f}",
            f"{row.events:,}",
        ]
        for row in result.rows
    ]
    tables = [table(headings, rows)]
    if result.behind:
        headings = ["the book, entries", "behind at the begin", "at the end", "at the least", "booked/s"]
        tables.append(table(headings, [_behind(one) for one in result.behind]))
    return "\n\n".join(tables)


def _behind(one: Behind) -> list[str]:
    """Return the row of a book, which says so where it was not behind all the while."""
    caught_up = sum(entries <= 0 for entries in one.least.runs)
    least = f"0: caught up in {caught_up} of {len(one.least.runs)}" if caught_up else f"{min(one.least.runs):,.0f}"
    begin, end, booked = (f"{figure.median:,.0f}" for figure in (one.begin, one.end, one.booked))
    return [one.name, begin, end, least, booked]


def _with_noise(figure: Figure) -> str:
    noise = f" ±{figure.noise:.0%}" if len(figure.runs) > 1 else ""
    return f"{figure.median:,.2f}{noise}"
