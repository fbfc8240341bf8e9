"""The archive beside a real server: nothing of the input is missing, twice, or trimmed before it is archived."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import redis.asyncio

from accrual.archive import Archive, exported_lines, read_stretch
from accrual.archive.export import raw_fields
from accrual.blobs import open_store
from accrual.engine import StreamEntry
from accrual.errors import ArchiveError, OwnershipLost, StreamTrimmed
from accrual.ledger import entry_line
from accrual.stream import START, Archived, Keys, archive_standing, note_segment, trim_events
from archives import ArchiverProcess, archive_of, archived, drain_archive
from objects import object_server
from servers import Server, ServerFactory, ServerKind
from workers import (
    NOON_MS,
    RULEBOOK,
    WorkerProcess,
    checkpoint_of,
    command,
    compact,
    expected,
    fill,
    ledger_output,
    order,
    orders,
    stream_entries,
    wait_until,
)

KEYS: Final = Keys("p")
KEY: Final = bytes(range(32))
DAY_MS: Final = 86_400_000


# What is ours alone, or the store's, is the same on every server.
OF_THE_STORE: Final = pytest.mark.parametrize(
    "server_kind", [pytest.param("valkey", marks=pytest.mark.valkey)], indirect=True
)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return archive_of(tmp_path / "archive", keys=(KEY,))


@pytest.fixture
def client(server: Server) -> redis.Redis:
    return server.client()


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(RULEBOOK, encoding="utf-8")
    return path


def mixed(client: redis.Redis) -> None:
    """Fill the stream with single events, batches, JSON, what decodes in part and what does not at all."""
    fill(client, "p", orders(1, 40))
    values: list[list[bytes]] = [
        [b"b", b"\x93" + compact(order(50)) + b"\xc1"[:0] + b"\xc0" + compact(order(51))],
        [b"j", json.dumps(order(52)).encode()],
        [b"j", json.dumps([order(53), {"id": "nothing else"}, order(52, amount=7)]).encode()],
        [b"e", b"\xc1 not MessagePack \xff\x00"],
        [b"e", compact(order(54)), b"e", compact(order(55))],
        [b"\xff", b""],
        [b"b", b"\x90"],
        [b"e", compact(order(3))],
    ]
    for number, fields in enumerate(values):
        client.execute_command("XADD", KEYS.events, f"{NOON_MS + 100}-{number}", *fields)
    fill(client, "p", orders(200, 260))


def standing_of(client: redis.Redis) -> Archived:
    standing = archive_standing(client, KEYS)
    assert standing is not None
    return standing


def own(client: redis.Redis) -> None:
    """Be the owner of the partition, with everything consumed."""
    client.hset(KEYS.checkpoint, mapping={"owner": "me", "position": f"{1 << 60}-0"})


def trim(server: Server, before: tuple[int, int], *, wanted: bool = False) -> Any:
    """Trim as a worker does that owns the partition: see ``own``."""

    async def run() -> Any:
        client = redis.asyncio.Redis(host="127.0.0.1", port=server.port, protocol=2)
        try:
            return await trim_events(client, KEYS, "me", before, archived=wanted)
        finally:
            await client.aclose()

    return asyncio.run(run())


def test_everything_is_archived_as_it_was(client: redis.Redis, archive: Archive) -> None:
    mixed(client)
    drain_archive(client, archive)
    entries = stream_entries(client, "p")
    assert archived(archive) == entries
    last = archive.segment(archive.numbers()[-1]).standing
    assert standing_of(client) == last
    assert (last.position, last.entries) == (entries[-1][:2], len(entries))
    assert last.segments == 3


def test_it_goes_on_where_it_was(client: redis.Redis, archive: Archive) -> None:
    drain_archive(client, archive)
    assert list(archive.numbers()) == []
    assert standing_of(client) == Archived()
    for first in (1, 60, 90):
        fill(client, "p", orders(first, first + 30))
        drain_archive(client, archive)
        drain_archive(client, archive)
    assert archived(archive) == stream_entries(client, "p")


def test_large_and_small_entries_fit(client: redis.Redis, archive: Archive) -> None:
    sizes = [1, 5_000_000, 10, 2_000_000, *[3] * 3000]
    fill(client, "p", ((f"{NOON_MS + at}-0", {"e": b"x" * size}) for at, size in enumerate(sizes)))
    drain_archive(client, archive, archive_segment_bytes=1 << 20)
    assert archived(archive) == stream_entries(client, "p")
    assert [archive.header(number).count for number in archive.numbers()] == [2, 2, 3000]


@OF_THE_STORE
def test_a_segment_that_a_crash_left_is_taken_as_it_is(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 100))
    entries = stream_entries(client, "p")
    drain_archive(client, archive)
    before = standing_of(client)
    fill(client, "p", orders(100, 200))
    entries = stream_entries(client, "p")
    # Stored, of another size than the next archiver would have chosen, and not taken note of.
    left = archive.append(before, entries[99:107], 1)
    assert standing_of(client) == before
    drain_archive(client, archive)
    assert archived(archive) == entries
    assert archive.segment(left.header.number).digest == left.digest


@OF_THE_STORE
def test_a_segment_of_another_stream_is_not_taken(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 50))
    archive.append(Archived(), [StreamEntry(NOON_MS + 1, 0, ((b"e", b"something else"),))], 1)
    assert archive_standing(client, KEYS, Archived()) == Archived()
    with pytest.raises(ArchiveError, match=r"000000000001.segment: has other entries than the stream"):
        drain_archive(client, archive)
    assert standing_of(client) == Archived()


def test_a_server_that_forgot_the_archive_learns_it_from_the_store(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 100))
    drain_archive(client, archive)
    before = standing_of(client)
    client.delete(KEYS.archive)
    fill(client, "p", orders(100, 150))
    drain_archive(client, archive)
    assert standing_of(client).entries == 149
    assert archived(archive) == stream_entries(client, "p")
    assert archive.segment(before.segments).standing == before


def test_a_server_that_is_behind_catches_up_with_the_store(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 200))
    drain_archive(client, archive)
    first = archive.segment(1).standing
    names = ("segments", "digest", "position", "entries")
    client.hset(KEYS.archive, mapping=dict(zip(names, first.to_arguments(), strict=True)))
    fill(client, "p", orders(200, 220))
    drain_archive(client, archive)
    assert archived(archive) == stream_entries(client, "p")


@OF_THE_STORE
def test_an_archive_of_another_stream_is_refused(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 100))
    drain_archive(client, archive)
    client.delete(KEYS.archive, KEYS.events)
    fill(client, "p", orders(500, 510))
    with pytest.raises(StreamTrimmed, match="would have a gap: the stream was deleted"):
        drain_archive(client, archive)
    assert not client.exists(KEYS.archive)


@OF_THE_STORE
def test_another_store_is_refused(client: redis.Redis, archive: Archive, tmp_path: Path) -> None:
    fill(client, "p", orders(1, 100))
    drain_archive(client, archive)
    with pytest.raises(ArchiveError, match=r"events-p: segment .*, the last that was archived, is missing"):
        drain_archive(client, archive_of(tmp_path / "empty"))
    other = archive_of(tmp_path / "other", keys=(KEY,))
    client.rename(KEYS.archive, "kept")
    drain_archive(client, other)
    client.rename("kept", KEYS.archive)
    with pytest.raises(ArchiveError, match="is not the one that was archived; it is another store"):
        drain_archive(client, other)


def test_what_was_trimmed_before_it_began_is_not_passed_over_in_silence(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 100))
    client.xtrim(KEYS.events, maxlen=60, approximate=False)
    with pytest.raises(StreamTrimmed, match="would have a gap: 39 entries after 0-0 were trimmed"):
        drain_archive(client, archive)
    assert not client.exists(KEYS.archive)
    drain_archive(client, archive, late=True)
    entries = stream_entries(client, "p")
    assert archived(archive) == entries
    assert archive.header(1).entries_before == 39
    assert standing_of(client).entries == 99
    with pytest.raises(ArchiveError, match="events-p: begins behind"):
        next(archive.stretch(START, None))


def test_a_late_archive_of_an_emptied_stream(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 10))
    client.xtrim(KEYS.events, maxlen=0, approximate=False)
    drain_archive(client, archive, late=True)
    fill(client, "p", orders(10, 20))
    drain_archive(client, archive)
    assert archived(archive) == stream_entries(client, "p")
    assert archive.header(1).entries_before == 9


@pytest.mark.parametrize("how", ["trimmed", "deleted", "made anew"])
def test_what_disappears_before_it_is_archived_stops_it(client: redis.Redis, archive: Archive, how: str) -> None:
    fill(client, "p", orders(1, 100))
    drain_archive(client, archive)
    before = archived(archive)
    if how == "made anew":
        client.delete(KEYS.events)
        fill(client, "p", orders(100, 300))
    else:
        fill(client, "p", orders(100, 200))
        if how == "trimmed":
            client.xtrim(KEYS.events, maxlen=50, approximate=False)
        else:
            client.xdel(KEYS.events, f"{NOON_MS + 150}-0")
    with pytest.raises(StreamTrimmed, match="would have a gap"):
        drain_archive(client, archive)
    assert archived(archive) == before


def test_two_at_once_write_one_archive(server: Server, client: redis.Redis, archive: Archive, tmp_path: Path) -> None:
    fill(client, "p", orders(1, 3000))
    failures: list[Exception] = []

    def work(size: int) -> None:
        try:
            with server.client() as own:
                drain_archive(own, archive_of(tmp_path / "archive", keys=(KEY,)), archive_segment_bytes=size)
        except Exception as error:  # noqa: BLE001 - the test fails of it below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(size,)) for size in (1024, 1500, 4000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert archived(archive) == stream_entries(client, "p")


def test_a_segment_is_noted_once_and_in_order(client: redis.Redis) -> None:
    fill(client, "p", orders(1, 4))
    one = Archived(1, b"1" * 32, (NOON_MS + 1, 0), 1)
    two = Archived(2, b"2" * 32, (NOON_MS + 2, 0), 2)
    assert not note_segment(client, KEYS, Archived(), one)
    archive_standing(client, KEYS, Archived())
    assert not note_segment(client, KEYS, one, two)
    for _ in range(2):
        assert note_segment(client, KEYS, Archived(), one)
    assert not note_segment(client, KEYS, Archived(), Archived(1, b"x" * 32, (NOON_MS + 1, 0), 1))
    assert not note_segment(client, KEYS, Archived(1, b"x" * 32), two)
    assert note_segment(client, KEYS, one, two)
    assert standing_of(client) == two


@OF_THE_STORE
def test_what_is_older_than_the_retention_is_deleted(client: redis.Redis, archive: Archive) -> None:
    day_ms, now_ms = 86_400_000, time.time_ns() // 1_000_000
    for age_days in (40, 31, 29, 1):
        fill(client, "p", [(f"{now_ms - age_days * day_ms}-0", {"e": b"x" * 5000})])
    drain_archive(client, archive, archive_retention_days=0)
    assert list(archive.numbers()) == [1, 2, 3, 4]
    drain_archive(client, archive, archive_retention_days=30)
    assert list(archive.numbers()) == [3, 4]
    assert archived(archive) == stream_entries(client, "p")[2:]
    # Nothing of it may be left, and it goes on all the same.
    client.hset(KEYS.archive, "noise", "")
    for number in (3, 4):
        assert archive.header(number).number == number
    archive.delete_before(1 << 50, through=4)
    with pytest.raises(ArchiveError, match="the last that was archived, is missing"):
        drain_archive(client, archive, archive_retention_days=30)


@OF_THE_STORE
def test_an_archive_of_which_all_is_expired_goes_on(client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", [("1000-0", {"e": b"x"}), ("1000-1", {"e": b"y"})])
    drain_archive(client, archive, archive_retention_days=30)
    drain_archive(client, archive, archive_retention_days=30)
    assert list(archive.numbers()) == []
    fill(client, "p", orders(1, 10))
    drain_archive(client, archive, archive_retention_days=3650)
    assert archived(archive) == stream_entries(client, "p")[2:]
    assert archive.header(2).entries_before == 2


@OF_THE_STORE
def test_what_is_expired_is_deleted_although_the_archive_cannot_go_on(
    server: Server, client: redis.Redis, archive: Archive, tmp_path: Path
) -> None:
    now_ms = time.time_ns() // 1_000_000
    for age_days in (40, 31, 1):
        fill(client, "p", [(f"{now_ms - age_days * DAY_MS}-0", {"e": b"x" * 5000})])
    drain_archive(client, archive)
    client.xtrim(KEYS.events, 0)
    fill(client, "p", [("*", {"e": b"x"})])
    client.xtrim(KEYS.events, 0)
    with pytest.raises(StreamTrimmed):
        drain_archive(client, archive, archive_retention_days=35)
    assert list(archive.numbers()) == [2, 3]
    # The place of an archive that another one has replaced, by the command for it.
    client.delete(KEYS.archive)
    drain_archive(client, archive_of(tmp_path / "another"), late=True)
    place = ("--partition", "p", "--archive", str(tmp_path / "archive"))
    assert command("archive", "expire", *place).returncode == 2
    done = command("archive", "expire", *place, "--archive-retention-days", "30", "--redis", server.url)
    assert (done.returncode, done.stdout) == (0, b"segments deleted: 1\n")
    assert list(archive.numbers()) == [3]
    done = command("archive", "expire", *place, "--archive-retention-days", "30")
    assert (done.returncode, done.stdout) == (0, b"segments deleted: 0\n")


@OF_THE_STORE
def test_a_clock_that_runs_ahead_deletes_nothing(
    client: redis.Redis, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ms = time.time_ns() // 1_000_000
    for age_days in (40, 1):
        fill(client, "p", [(f"{now_ms - age_days * DAY_MS}-0", {"e": b"x" * 5000})])
    drain_archive(client, archive)
    monkeypatch.setattr(time, "time_ns", lambda: (now_ms + 3650 * DAY_MS) * 1_000_000)
    drain_archive(client, archive, archive_retention_days=60)
    assert list(archive.numbers()) == [1, 2]
    drain_archive(client, archive, archive_retention_days=30)
    assert list(archive.numbers()) == [2]


# ---------------------------------------------------------------------------------------------------- trimming


def test_nothing_is_trimmed_that_is_not_archived(server: Server, client: redis.Redis, archive: Archive) -> None:
    fill(client, "p", orders(1, 1001))
    own(client)
    end = (NOON_MS + 1000, 0)
    assert trim(server, end, wanted=True).entries == 0
    archive_standing(client, KEYS, Archived())
    assert trim(server, end).entries == 0
    assert trim(server, end).before == START
    drain_archive(client, archive)
    fill(client, "p", orders(1001, 3000))
    trimmed = trim(server, (NOON_MS + 2999, 0))
    assert trimmed.before == end
    # The server trims whole nodes of a hundred entries.
    assert 900 <= trimmed.entries < 1000
    assert stream_entries(client, "p")[0].ms <= NOON_MS + 1000
    drain_archive(client, archive)
    assert [entry.ms - NOON_MS for entry in archived(archive)] == list(range(1, 3000))


def test_without_an_archive_all_is_trimmed_however_much_it_is(server: Server, client: redis.Redis) -> None:
    own(client)
    # Left to itself the server trims some ten thousand entries at once.
    fill(client, "p", ((f"{at}-0", {"e": b"x"}) for at in range(1, 35_001)))
    trimmed = trim(server, (35_000, 0))
    assert trimmed.before == (35_000, 0)
    assert trimmed.entries >= 34_900
    assert client.xlen(KEYS.events) == 35_000 - trimmed.entries


def test_only_the_owner_trims_and_nothing_that_was_not_consumed(server: Server, client: redis.Redis) -> None:
    fill(client, "p", orders(1, 3001))
    client.hset(
        KEYS.checkpoint, mapping={"owner": "another", "owner_name": "host:1", "position": f"{NOON_MS + 2000}-0"}
    )
    with pytest.raises(OwnershipLost, match="taken over by host:1"):
        trim(server, (NOON_MS + 1000, 0))
    assert client.xlen(KEYS.events) == 3000
    client.hset(KEYS.checkpoint, "owner", "me")
    trimmed = trim(server, (NOON_MS + 3000, 0))
    assert trimmed.before == (NOON_MS + 2000, 0)
    assert 1900 <= trimmed.entries < 2000
    assert stream_entries(client, "p")[0].ms <= NOON_MS + 2000
    # Before the first batch nothing was consumed.
    client.hdel(KEYS.checkpoint, "position")
    assert trim(server, (NOON_MS + 3000, 0)).entries == 0


def test_a_full_server_can_still_be_archived_and_trimmed(
    server_kind: ServerKind, server_factory: ServerFactory, archive: Archive
) -> None:
    server = server_factory(server_kind)
    client = server.client()
    fill(client, "p", orders(1, 2001))
    own(client)
    archive_standing(client, KEYS, Archived())
    client.config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        fill(client, "p", orders(2001, 2002))
    drain_archive(client, archive)
    assert trim(server, (NOON_MS + 2000, 0)).entries >= 1900


def test_a_worker_trims_only_behind_the_archive_and_its_ledger_can_be_made_from_it(
    server: Server, client: redis.Redis, rulebook: Path, tmp_path: Path, archive: Archive
) -> None:
    fill(client, "p", orders(1, 1500))
    mixed_at = [(f"{NOON_MS + 1600}-{number}", {"e": b"\xc1"}) for number in range(3)]
    fill(client, "p", mixed_at)
    drain_archive(client, archive)
    ends = standing_of(client).position
    fill(client, "p", orders(2000, 4000))
    everything = stream_entries(client, "p")
    snapshots = ("--snapshots", str(tmp_path / "s"), "--snapshot-interval-s", "0", "--snapshots-kept", "1")
    with WorkerProcess(server.url, "p", rulebook, *snapshots, "--trim-input", "--batch-entries", "100") as worker:
        wait_until(lambda: checkpoint_of(client, "p").events == 3502, "all is committed")
        wait_until(lambda: "what comes then is not archived yet" in worker.said, "trimming waits for the archive")
        assert client.xlen(KEYS.events) >= 2000
        assert stream_entries(client, "p")[0][:2] <= ends
        drain_archive(client, archive)
        fill(client, "p", orders(5000, 5001))
        wait_until(lambda: client.xlen(KEYS.events) < 500, "what is archived is trimmed")
        assert worker.finish() == 0, worker.log
    drain_archive(client, archive)
    entries = list(read_stretch(open_store(str(tmp_path / "archive")), "p", START, ends, archive_keys()))
    entries += archive.stretch(ends, checkpoint_of(client, "p").position)
    assert entries[:-1] == everything
    assert expected(entries).ledger == ledger_output(server, "p")


def archive_keys() -> Any:
    from accrual.archive import ArchiveKeys

    return ArchiveKeys([KEY])


def test_a_worker_that_is_to_have_an_archive_does_not_trim_before_it_has(
    server: Server, client: redis.Redis, rulebook: Path, tmp_path: Path
) -> None:
    fill(client, "p", orders(1, 1000))
    snapshots = ("--snapshots", str(tmp_path / "s"), "--snapshot-interval-s", "0", "--snapshots-kept", "1")
    config = tmp_path / "accrual.toml"
    config.write_text(f'archive = "{tmp_path}/archive"\n')
    flags = (*snapshots, "--trim-input", "--batch-entries", "100", "--config", str(config))
    with WorkerProcess(server.url, "p", rulebook, *flags) as worker:
        wait_until(lambda: "trimmed entries=0 before=0-0" in worker.said, "it wants to trim")
        assert worker.finish() == 0, worker.log
    assert client.xlen(KEYS.events) == 999


# ---------------------------------------------------------------------------------------------------- commands


@OF_THE_STORE
def test_the_export_is_what_replay_reads(
    server: Server, client: redis.Redis, archive: Archive, tmp_path: Path, rulebook: Path
) -> None:
    mixed(client)
    with WorkerProcess(server.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0, worker.log
    drain_archive(client, archive)
    variables = {"ACCRUAL_ARCHIVE_KEY": KEY.hex(), "ACCRUAL_ARCHIVE": str(tmp_path / "archive")}
    exported = command("archive", "export", "--partition", "p", variables=variables)
    assert exported.returncode == 0, exported.stderr.decode()
    events = tmp_path / "events.jsonl"
    events.write_bytes(exported.stdout)
    replayed = command("replay", "--rulebook", rulebook, events)
    assert replayed.returncode == 0, replayed.stderr.decode()
    wanted = expected(stream_entries(client, "p"))
    lines = [json.loads(line) for line in replayed.stdout.splitlines()]
    assert len(lines) == len(wanted.rows) + len(wanted.dead_letters) + wanted.duplicates
    rows = [json.loads(entry_line(*row)) for row in wanted.rows]
    decided = [line for line in lines if line["outcome"] not in ("dead_letter", "duplicate")]
    assert [(line["event"], line["outcome"], line["points"]) for line in decided] == [
        (row["event"], row["outcome"], row["points"]) for row in rows
    ]
    reasons = [line["reason"] for line in lines if line["outcome"] == "dead_letter"]
    assert reasons == [letter.reason for _, letter in wanted.dead_letters]


@OF_THE_STORE
def test_the_export_loses_nothing(client: redis.Redis) -> None:
    mixed(client)
    lines = [json.loads(line) for line in exported_lines(stream_entries(client, "p"))]
    by_place = {(line["stream_id"], line["index"]): line for line in lines}
    assert len(by_place) == len(lines)
    assert all(line["at"] == int(line["stream_id"].partition("-")[0]) for line in lines)

    def raw(number: int, index: int = 0) -> Any:
        return raw_fields(by_place[f"{NOON_MS + 100}-{number}", index]["raw"])

    assert by_place[f"{NOON_MS + 100}-0", 0].items() >= order(50).items()
    assert raw(0, 1) == ((b"e", b"\xc0"),)
    assert by_place[f"{NOON_MS + 100}-0", 2].items() >= order(51).items()
    assert by_place[f"{NOON_MS + 100}-1", 0].items() >= order(52).items()
    assert raw(2, 1) == ((b"j", b'{"id": "nothing else"}'),)
    assert raw(3) == ((b"e", b"\xc1 not MessagePack \xff\x00"),)
    assert raw(4) == ((b"e", compact(order(54))), (b"e", compact(order(55))))
    assert raw(5) == ((b"\xff", b""),)
    assert raw(6) == ((b"b", b"\x90"),)


@OF_THE_STORE
def test_a_stretch_is_exported(client: redis.Redis, archive: Archive, tmp_path: Path) -> None:
    fill(client, "p", orders(1, 100))
    drain_archive(client, archive)
    flags = ("--partition", "p", "--archive", tmp_path / "archive")
    variables = {"ACCRUAL_ARCHIVE_KEY": KEY.hex()}

    def export(*more: str) -> subprocess.CompletedProcess[bytes]:
        return command("archive", "export", *flags, *more, variables=variables)

    def numbers(*more: str) -> list[int]:
        done = export(*more)
        assert done.returncode == 0, done.stderr.decode()
        return [json.loads(line)["at"] - NOON_MS for line in done.stdout.splitlines()]

    assert numbers("--from", f"{NOON_MS + 30}-0", "--to", f"{NOON_MS + 40}-0") == list(range(30, 41))
    assert numbers("--from", f"{NOON_MS + 90}") == list(range(90, 100))
    assert numbers("--to", f"{NOON_MS + 5}") == [1, 2, 3, 4, 5][: len(numbers("--to", f"{NOON_MS + 5}"))]
    beyond = export("--to", f"{NOON_MS + 100}-0")
    assert (beyond.returncode, beyond.stdout) == (1, b"")
    assert f"ends at {NOON_MS + 99}-0, before {NOON_MS + 100}-0".encode() in beyond.stderr
    assert export("--from", "yesterday").returncode == 2
    assert export("--drain").returncode == 2
    variables["ACCRUAL_ARCHIVE_KEY"] = "0" * 64
    wrong = export()
    assert (wrong.returncode, wrong.stdout) == (1, b"")
    assert b"000000000001.segment: is encrypted, and none of the keys" in wrong.stderr


@OF_THE_STORE
def test_all_segments_are_verified(server: Server, client: redis.Redis, archive: Archive, tmp_path: Path) -> None:
    fill(client, "p", orders(1, 100))
    drain_archive(client, archive)
    variables = {"ACCRUAL_ARCHIVE_KEY": KEY.hex(), "ACCRUAL_ARCHIVE": str(tmp_path / "archive")}

    def verify() -> subprocess.CompletedProcess[bytes]:
        return command("archive", "verify", "--redis", server.url, "--partition", "p", variables=variables)

    last = archive.numbers()[-1]
    found = verify()
    assert found.stdout.decode() == f"segments: 1 to {last}; entries: 99, up to {NOON_MS + 99}-0\n"
    path = tmp_path / "archive" / "events-p" / f"{last:012d}.segment"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    torn = verify()
    assert torn.returncode == 1
    assert f"{last:012d}.segment: is cut short or damaged".encode() in torn.stderr
    path.unlink()
    before = archive.segment(last - 1).standing
    archive.append(before, [StreamEntry(NOON_MS + 99, 0, ((b"e", b"another"),))], 1)
    replaced = verify()
    assert replaced.returncode == 1
    assert f"{last:012d}.segment: is not the one that was archived".encode() in replaced.stderr
    path.unlink()
    missing = verify()
    assert missing.returncode == 1
    assert f"ends with segment {last - 1}, and {last} were archived".encode() in missing.stderr


def test_where_nothing_is_nothing_was_verified(tmp_path: Path) -> None:
    done = command("archive", "verify", "--partition", "p", "--archive", tmp_path / "mistyped")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"mistyped/events-p: there is no segment of p to verify" in done.stderr


def test_it_follows_the_stream_until_it_is_told_to_stop(server: Server, client: redis.Redis, tmp_path: Path) -> None:
    with ArchiverProcess(server.url, tmp_path / "archive", "--archive-interval-s", "0") as process:
        for first, last in ((1, 100), (300, 300), (301, 301)):
            fill(client, "p", orders(first, last + 1))
            wait_until(functools.partial(reached, client, last), f"{last} is archived")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert archived(archive_of(tmp_path / "archive")) == stream_entries(client, "p")


def reached(client: redis.Redis, number: int) -> bool:
    position: Any = client.hget(KEYS.archive, "position")
    return bool(position == f"{NOON_MS + number}-0".encode())


def test_a_server_that_goes_away_is_waited_for(
    server_kind: ServerKind, server_factory: ServerFactory, tmp_path: Path
) -> None:
    server = server_factory(server_kind, {"appendonly": "yes", "appendfsync": "always"})
    fill(server.client(), "p", orders(1, 100))
    with ArchiverProcess(server.url, tmp_path / "archive", "--archive-interval-s", "0") as process:
        wait_until(lambda: reached(server.client(), 99), "all is archived")
        server.kill()
        wait_until(lambda: "trying again" in process.said, "it notices")
        server.start()
        fill(server.client(), "p", orders(100, 200))
        wait_until(lambda: reached(server.client(), 199), "it goes on")
        assert process.poll() is None
    assert archived(archive_of(tmp_path / "archive")) == stream_entries(server.client(), "p")


@pytest.mark.parametrize(
    "seed", [pytest.param(1), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 9))]
)
def test_killed_again_and_again_it_has_everything_once(
    server: Server, client: redis.Redis, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    first = 1
    for _ in range(4):
        last = first + rng.randrange(2000, 6000)
        with ArchiverProcess(
            server.url, tmp_path / "archive", "--archive-interval-s", "0", "--archive-segment-bytes", "2000"
        ):
            fill(client, "p", orders(first, last))
            wait_until(lambda: bool(client.exists(KEYS.archive)), "the archive begins")
            time.sleep(rng.random() * 0.5)
        first = last
    archive = archive_of(tmp_path / "archive")
    drain_archive(client, archive)
    assert archived(archive) == stream_entries(client, "p")


def test_in_an_object_store_it_is_the_same(valkey: Server, tmp_path: Path) -> None:
    client = valkey.client()
    mixed(client)
    key = tmp_path / "key"
    key.write_text(KEY.hex())
    with object_server() as objects:
        bucket = objects.bucket()
        flags = ("--partition", "p", "--archive", f"{bucket}/loyalty", "--archive-key-file", key)
        for first in (300, 310):
            fill(client, "p", orders(first, first + 10))
            done = command("archive", "--redis", valkey.url, *flags, "--drain", variables=objects.variables)
            assert done.returncode == 0, done.stderr.decode()
            client.xtrim(KEYS.events, maxlen=8, approximate=False)
        done = command("archive", "verify", "--redis", valkey.url, *flags, variables=objects.variables)
        assert done.returncode == 0, done.stderr.decode()
        assert b"segments: 1 to 2; entries: 127" in done.stdout
        exported = command("archive", "export", *flags, variables=objects.variables)
        assert exported.stdout.count(b"\n") == 131
        missing = command("archive", "export", *flags[:2], "--archive", "s3://nowhere", variables=objects.variables)
        assert missing.returncode == 1
        assert b"s3://nowhere" in missing.stderr
