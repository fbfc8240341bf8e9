"""Archived input that is decided again gives the ledger that was committed, or says where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from accrual.engine import StreamEntry
from accrual.stream import Keys
from archives import archive_of, archived, drain_archive, write_archive
from runs import drain
from servers import Server
from workers import NOON_MS, RULEBOOK, SECRET, WorkerProcess, checkpoint_of, command, compact, fill, order

KEYS: Final = Keys("p")
DAY_MS: Final = 86_400_000
SMALL_BATCHES: Final = ("--batch-entries", "16")


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(RULEBOOK, encoding="utf-8")
    return path


def days(first: int, count: int, *, first_number: int = 1) -> Any:
    """Yield 40 orders for each of some days; they have the same ids on each."""
    for day in range(first, first + count):
        for number in range(first_number, first_number + 40):
            ms = NOON_MS + day * DAY_MS + number
            yield f"{ms}-0", {"e": compact(order(number, ts=ms))}


def replayed(server: Server, place: Path, *flags: str) -> tuple[int, str]:
    """Return the exit status of ``accrual archive replay`` and what it says."""
    words = ("archive", "replay", "--redis", server.url, "--partition", "p", "--archive", str(place))
    done = command(*words, *flags, variables={"ACCRUAL_SECRET": SECRET.key.hex()})
    return done.returncode, (done.stdout or done.stderr).decode()


def changed(entries: list[StreamEntry], place: int) -> list[StreamEntry]:
    """Return ``entries`` with another amount in one of them."""
    ms, seq, _ = entries[place]
    event = order(place % 40 + 1, ts=ms, amount=77)
    return [*entries[:place], StreamEntry(ms, seq, ((b"e", compact(event)),)), *entries[place + 1 :]]


def test_archived_input_gives_the_ledger_that_was_committed(valkey: Server, rulebook: Path, tmp_path: Path) -> None:
    """Also where ids come again after they were forgotten, and where rulebooks change in between."""
    client, place = valkey.client(), tmp_path / "archive"
    fill(client, "p", days(0, 2))
    drain(valkey.url, rulebook, "p", *SMALL_BATCHES)
    rulebook.write_text(
        RULEBOOK.replace("version = 1", "version = 2").replace('per_yuan = "1"', 'per_yuan = "3"'), encoding="utf-8"
    )
    fill(client, "p", days(6, 2))
    drain(valkey.url, rulebook, "p", *SMALL_BATCHES)
    committed = checkpoint_of(client, "p")
    # The ids of the first days were forgotten by then, as an offline replay with its long memory has not.
    assert committed.duplicates + committed.dead_letters == 80
    assert committed.entries == 80
    assert committed.rulebook == 2
    archive = archive_of(place)
    drain_archive(client, archive, archive_segment_bytes=1024)
    entries = archived(archive)
    client.delete(KEYS.events)
    whole = f"batches 1 to {committed.batch} of {committed.batch}: 160 events, decided as committed\n"
    for engine in ("fast", "reference"):
        assert replayed(valkey, place, "--engine", engine) == (0, whole)

    # An archive that has not come so far is decided as far as it goes.
    write_archive(archive_of(tmp_path / "shorter"), entries[:100], 30)
    status, said = replayed(valkey, tmp_path / "shorter")
    assert (status, said.partition(" of ")[0]) == (0, "batches 1 to 8")

    # What is not what was decided is found, with its place.
    write_archive(archive_of(tmp_path / "changed"), changed(entries, 20), 30)
    status, said = replayed(valkey, tmp_path / "changed")
    assert status == 1
    assert f"batch 3, entry 21 (stream {entries[20].ms}-0, index 0): was committed as" in said
    write_archive(archive_of(tmp_path / "fewer"), entries[:20] + entries[21:], 30)
    status, said = replayed(valkey, tmp_path / "fewer")
    assert status == 1
    assert "batch 3 consumed 16 entries" in said
    assert replayed(valkey, tmp_path / "nothing")[0] == 1


def test_a_stretch_behind_a_snapshot_is_decided_again(valkey: Server, rulebook: Path, tmp_path: Path) -> None:
    client, place, snapshots = valkey.client(), tmp_path / "archive", str(tmp_path / "snapshots")
    fill(client, "p", days(0, 2))
    drain(valkey.url, rulebook, "p", *SMALL_BATCHES)
    with WorkerProcess(
        valkey.url, "p", rulebook, "--drain", "--snapshots", snapshots, "--snapshot-interval-s", "0"
    ) as (worker):
        assert worker.wait() == 0, worker.log
    at = checkpoint_of(client, "p").batch
    archive = archive_of(place)
    drain_archive(client, archive, archive_segment_bytes=1024)
    fill(client, "p", days(2, 2, first_number=30))
    drain(valkey.url, rulebook, "p", *SMALL_BATCHES)
    drain_archive(client, archive, archive_segment_bytes=1024)
    # What came before the snapshot is deleted after its retention.
    assert archive.delete_before(NOON_MS + DAY_MS, through=100) > 0
    status, said = replayed(valkey, place)
    assert status == 1
    assert "begins behind" in said
    assert replayed(valkey, place, "--engine", "reference", "--snapshots", snapshots)[0] == 2
    last = checkpoint_of(client, "p").batch
    status, said = replayed(valkey, place, "--snapshots", snapshots)
    assert (status, said) == (0, f"batches {at + 1} to {last} of {last}: 80 events, decided as committed\n")
