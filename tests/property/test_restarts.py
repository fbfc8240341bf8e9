"""Any split of a stream into runs, snapshots and restarts gives the same ledger.

What runs here is the worker's own main loop, recovery and snapshots; only the server is a list in memory. A run takes
the stream up to some entry in batches of some size; of its commits the first few land, as when the worker is killed and
the rest was never sent. The next run recovers: from the newest snapshot that can be believed, or from the beginning.

The server may lose commits between two runs, and the input may be trimmed: then it must never be trimmed before it was
consumed, and what is left must do for the next run, as long as the server still has the oldest kept snapshot's batch.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import msgspec
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from accrual.engine import STREAM_SLACK_DAYS, Engine, Entry, Position, ReferenceEngine, Secret, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.ledger import EntriesBatch, RulebookRecord, decode, digest_of, entry_line
from accrual.outcomes import RejectedItem
from accrual.rulebook import Rulebook, parse
from accrual.settings import Settings
from accrual.snapshots import SnapshotDirectory
from accrual.stream import START, Checkpoint, Commit, Keys, ReadConnection, StreamId, StreamServer, parse_stream_id
from accrual.stream.replies import Reader
from accrual.stream.scripts import TRIM
from accrual.worker.commits import CommitQueue
from accrual.worker.intake import Intake
from accrual.worker.pipeline import Pipeline
from accrual.worker.progress import Progress
from accrual.worker.recovery import Recovery
from accrual.worker.snapshots import Snapshots
from cutting import whole_commands
from replies import MemoryConnection, reply_of
from strategies import ZONES, rulebook_or_skip, rulebook_texts, streams
from workers import NOON_MS, RULEBOOK, compact, order

KEYS = Keys("p")
SECRET = Secret(bytes(range(16)))
SMALL_SEGMENTS = 3


# --------------------------------------------------------------------------------- a partition without a server


class State(NamedTuple):
    """A moment in the life of a partition: its checkpoint, and the first entry that was not trimmed."""

    checkpoint: Checkpoint
    first: StreamId


class Partition:
    """What a server holds of a partition, and what of its commands a recovery asks for."""

    def __init__(self, entries: Sequence[StreamEntry]) -> None:
        self.entries = entries
        self.ledger: list[bytes] = []
        self.dead_letters: list[RejectedItem] = []
        self.checkpoint = Checkpoint()
        self.first = START
        self.trimmed_unread = False
        self.history = [State(self.checkpoint, self.first)]

    def commit(self, commit: Commit) -> None:
        """Append a batch, as the commit script would."""
        assert commit.before == self.checkpoint
        self.ledger.append(commit.value)
        self.dead_letters += commit.letters
        self.checkpoint = commit.after
        self.history.append(State(self.checkpoint, self.first))

    def go_back(self, number: int) -> None:
        """Lose everything that came after a moment of the history, as a failover does."""
        self.history = self.history[: number + 1]
        self.checkpoint, self.first = self.history[-1]
        del self.ledger[self.checkpoint.batch :]
        del self.dead_letters[self.checkpoint.dead_letters :]

    def register_script(self, text: str) -> Any:
        """Return what trims, which trusts the worker more than the script does."""
        assert text == TRIM.text
        return self._trim

    async def _trim(self, keys: Sequence[str], args: Sequence[str]) -> list[Any]:
        assert keys[1] == KEYS.events
        before = parse_stream_id(args[1])
        self.trimmed_unread |= before > self.checkpoint.position
        removed = sum(self.first <= (entry.ms, entry.seq) < before for entry in self.entries)
        self.first = max(self.first, before)
        self.history.append(State(self.checkpoint, self.first))
        return [b"trimmed", args[1].encode(), removed]

    async def xrange(self, key: str, first: str, last: str, count: int | None = None) -> list[Any]:
        """Return batches of the ledger."""
        assert key == KEYS.ledger
        numbers = range(parse_stream_id(first)[0], min(parse_stream_id(last)[0], len(self.ledger)) + 1)
        return [(b"%d-0" % number, {b"batch": self.ledger[number - 1]}) for number in numbers][:count]

    def between(self, after: StreamId, through: StreamId, count: int | None) -> bytes:
        """Return the answer to ``XRANGE`` on the events."""
        found = [entry for entry in self.entries if after < (entry.ms, entry.seq) <= through]
        found = [entry for entry in found if (entry.ms, entry.seq) >= self.first][:count]
        return reply_of(found, key=None)


class Connection(MemoryConnection):
    """A read connection to a partition in memory, which it asks at once."""

    def __init__(self, partition: Partition, reader: Reader) -> None:
        super().__init__(reader, deque())
        self._partition = partition

    def send(self, pieces: Sequence[bytes]) -> None:
        for _, _, words in whole_commands(b"".join(pieces)):
            assert words[:2] == [b"XRANGE", KEYS.events.encode()]
            count = int(words[5]) if len(words) > 4 else None
            after, through = parse_stream_id(words[2].removeprefix(b"(")), parse_stream_id(words[3])
            self._replies.append(self._partition.between(after, through, count))


class LocalIntake(Intake):
    """An intake whose connections lead to a partition in memory."""

    def __init__(self, partition: Partition) -> None:
        super().__init__(cast(StreamServer, None), KEYS, Settings())
        self._partition = partition

    async def connect(self) -> ReadConnection:
        self.reader.abandon()
        return cast(ReadConnection, Connection(self._partition, self.reader))


class Landing:
    """Commits of which the first ``landing`` land at once, and the others never; ``None``: all do."""

    has_room = True
    nonce = "me"

    def __init__(self, partition: Partition, landing: int | None) -> None:
        self.tail = self.landed = partition.checkpoint
        self._partition = partition
        self._left = landing

    def append(self, commit: Commit) -> None:
        assert commit.before == self.tail
        self.tail = commit.after
        if self._left is None or self._left > 0:
            self._partition.commit(commit)
            self.landed = commit.after
            self._left = None if self._left is None else self._left - 1

    async def room(self) -> None:
        pass

    async def reached(self, batch: int) -> None:
        if self.landed.batch < batch:
            raise ConnectionError("the worker is killed before that")


# ---------------------------------------------------------------------------------------------------- runs


class Run(msgspec.Struct, frozen=True):
    """One life of a worker. ``until`` is how many entries are there; ``landing`` how many of its commits land.

    With ``snapshots`` one is taken, behind the first batch after so many others; ``damage`` is what becomes of the
    newest afterwards.
    """

    until: int
    batch_entries: int
    batch_events: int
    landing: int | None
    snapshots: int | None
    rulebook: int
    damage: str


@st.composite
def runs(draw: st.DrawFn, rulebooks: int) -> list[Run]:
    """Draw up to six runs; none goes back to an older rulebook."""
    count = draw(st.integers(1, 6))
    versions = sorted(draw(st.lists(st.integers(0, rulebooks - 1), min_size=count, max_size=count)))
    return [
        Run(
            until=draw(st.integers(0, 40)),
            batch_entries=draw(st.sampled_from([1, 2, 3, 7, 40])),
            batch_events=draw(st.sampled_from([1, 5, 1000])),
            landing=draw(st.one_of(st.none(), st.integers(0, 12))),
            snapshots=draw(st.one_of(st.none(), st.integers(0, 8))),
            rulebook=version,
            damage=draw(st.sampled_from(["", "", "", "remove", "flip", "cut"])),
        )
        for version in versions
    ]


def trimming_run(rng: random.Random, until: int) -> Run:
    """Choose a run with a snapshot that nothing happens to, in small batches."""
    return Run(
        until=until,
        batch_entries=rng.choice([1, 1, 2, 3]),
        batch_events=1000,
        landing=rng.choice([None, rng.randrange(6)]),
        snapshots=rng.randrange(6),
        rulebook=0,
        damage="",
    )


def small_engine(
    _name: str, rulebook: Rulebook, secret: Secret, slack_days: int = STREAM_SLACK_DAYS, *, assisted: bool = False
) -> Engine:
    """Open an engine whose tables have small segments, and no threads: there are many in a test."""
    assert assisted
    return cast(Engine, FastEngine(rulebook, secret, slack_days, SMALL_SEGMENTS))


@contextmanager
def small_engines() -> Iterator[None]:
    with (
        patch("accrual.worker.recovery.open_engine", small_engine),
        patch("accrual.worker.snapshots.open_engine", small_engine),
    ):
        yield


class OneSnapshot(Snapshots):
    """Takes one snapshot: behind the first batch after ``left`` others."""

    def __init__(self, left: int, chosen: Settings, slack_days: int, client: redis.asyncio.Redis) -> None:
        super().__init__(chosen, SECRET, slack_days, client)
        self._left = left

    def consider(self, engine: Engine, commits: CommitQueue) -> None:
        if self._left == 0:
            super().consider(engine, commits)
        self._left -= 1


async def live(partition: Partition, run: Run, rulebook: Rulebook, directory: Path, trimming: int = 0) -> None:
    """Do as ``Worker`` does: recover, adopt, decide up to the end of what is there, commit.

    ``trimming`` is how many snapshots are kept where the input is trimmed.
    """
    chosen = Settings(
        partition="p",
        batch_entries=run.batch_entries,
        batch_events=run.batch_events,
        linger_ms=0,
        snapshots="" if run.snapshots is None else str(directory),
        snapshot_interval_s=0,
        snapshots_kept=trimming or 3,
        trim_input=bool(trimming),
    )
    client, intake, committed = cast(redis.asyncio.Redis, partition), LocalIntake(partition), partition.checkpoint
    slack_days = STREAM_SLACK_DAYS
    if committed.batch:
        recovery = Recovery(client, KEYS, intake, SECRET, chosen)
        engine = await recovery.run(committed)
        slack_days = recovery.slack_days
    else:
        engine = small_engine("fast", rulebook, SECRET, assisted=True)
    commits = cast(CommitQueue, Landing(partition, run.landing))
    snapshots = OneSnapshot(run.snapshots or 0, chosen, slack_days, client)
    pipeline = Pipeline(chosen, client, KEYS, intake, engine, slack_days, commits, snapshots, Progress(None))
    if committed.batch == 0:
        pipeline.record()
    elif rulebook.version > committed.rulebook:
        await pipeline.adopt(rulebook)
    entries = partition.entries[: run.until]
    if entries and (end := (entries[-1].ms, entries[-1].seq)) > committed.position:
        await pipeline.run(end)
    await snapshots.finished()


def damage(directory: Path, how: str) -> None:
    """Do something to the newest snapshot."""
    newest = max(directory.glob("*.snapshot"), default=None)
    if newest is None or not how:
        return
    data = bytearray(newest.read_bytes())
    if how == "remove":
        newest.unlink()
    elif how == "flip":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    else:
        newest.write_bytes(data[: len(data) // 2])


def moments_to_go_on_from(partition: Partition, directory: Path) -> list[int]:
    """Return the moments of the history that a run can go on from with the snapshots that are there."""
    known = [
        header.checkpoint.batch
        for header in SnapshotDirectory(directory, "p").headers()
        if header.checkpoint.batch <= len(partition.ledger)
        and digest_of(partition.ledger[header.checkpoint.batch - 1]) == header.checkpoint.digest
    ]
    return [
        number
        for number, state in enumerate(partition.history)
        if state.first == START or (known and state.checkpoint.batch >= known[-1])
    ]


def lines_of(rows: Sequence[tuple[int, Position, Entry]]) -> bytes:
    return b"".join(entry_line(*row) + b"\n" for row in rows)


def check_against_an_unbroken_run(partition: Partition) -> None:
    """Decide the stream in one go with the reference, changing rulebooks where the ledger says so."""
    engine, first = None, 0
    wanted: list[tuple[int, Position, Entry]] = []
    letters: list[RejectedItem] = []
    rows: list[tuple[int, Position, Entry]] = []
    stretches: list[tuple[Rulebook, int]] = []
    for value in partition.ledger:
        batch = decode(value)
        if isinstance(batch, RulebookRecord):
            stretches.append((parse(batch.text), 0))
        else:
            assert isinstance(batch, EntriesBatch)
            rows += batch.rows()
            rulebook, count = stretches[-1]
            stretches[-1] = (rulebook, count + batch.header.counts.stream_entries)
    for rulebook, count in stretches:
        if engine is None:
            engine = ReferenceEngine(rulebook, SECRET, STREAM_SLACK_DAYS)
        else:
            engine.adopt(rulebook)
        if count:
            decided = engine.decide_entries(partition.entries[first : first + count])
            for position, decision in decided.decisions():
                if isinstance(decision, Entry):
                    wanted.append((len(wanted) + 1, position, decision))
            letters += decided.rejected
        first += count
    assert first == len(partition.entries) == partition.checkpoint.stream_entries
    assert rows == wanted
    assert lines_of(rows) == lines_of(wanted)
    assert partition.dead_letters == letters
    assert partition.checkpoint.dead_letters == len(letters)


@given(st.sampled_from(ZONES), streams(), st.data())
def test_any_split_into_runs_snapshots_and_restarts_gives_the_same_ledger(
    zone: str, entries: list[StreamEntry], data: st.DataObject
) -> None:
    books = [
        rulebook_or_skip(text) for text in [data.draw(rulebook_texts(version=version, zone=zone)) for version in (1, 2)]
    ]
    plan = data.draw(runs(len(books)))
    last = Run(len(entries), 5, 1000, None, 0, plan[-1].rulebook, "")
    partition = Partition(entries)
    with tempfile.TemporaryDirectory() as directory, small_engines():
        for run in [*plan, last]:
            asyncio.run(live(partition, run, books[run.rulebook], Path(directory)))
            damage(Path(directory), run.damage)
        check_against_an_unbroken_run(partition)
        # And once more from nothing: what was committed is what comes out.
        replay = Recovery(
            cast(redis.asyncio.Redis, partition), KEYS, LocalIntake(partition), SECRET, Settings(partition="p")
        )
        asyncio.run(replay.run(partition.checkpoint))


@settings(max_examples=settings().max_examples // 8)
@given(st.integers(0, 1 << 64))
def test_whatever_commits_a_server_loses_no_input_is_trimmed_unread_and_the_rest_leads_on(seed: int) -> None:
    # Runs that do something are rare among those that shrink well.
    rng, rulebook = random.Random(seed), parse(RULEBOOK)
    kept, until = rng.randrange(1, 4), 0
    partition = Partition(
        [StreamEntry(NOON_MS + number, 0, ((b"e", compact(order(number))),)) for number in range(1, 41)]
    )
    with tempfile.TemporaryDirectory() as name, small_engines():
        directory = Path(name)
        while until < len(partition.entries):
            until += rng.randrange(1, 10)
            asyncio.run(live(partition, trimming_run(rng, until), rulebook, directory, kept))
            moments = moments_to_go_on_from(partition, directory)
            assert moments[-1] == len(partition.history) - 1
            partition.go_back(rng.choice([moments[-1], rng.choice(moments)]))
        last = Run(len(partition.entries), 5, 1000, None, 0, 0, "")
        asyncio.run(live(partition, last, rulebook, directory, kept))
        assert not partition.trimmed_unread
        check_against_an_unbroken_run(partition)
