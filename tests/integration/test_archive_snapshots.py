"""Copies of snapshots: a worker on another machine goes on from the newest, and nothing is believed for being there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from accrual.stream import Keys
from objects import ObjectServer, object_server
from servers import Server
from workers import (
    RULEBOOK,
    WorkerProcess,
    checkpoint_of,
    expected,
    fill,
    ledger_output,
    orders,
    stream_entries,
    wait_until,
)

KEYS: Final = Keys("p")
FLAGS: Final = ("--snapshot-interval-s", "0", "--snapshots-kept", "2", "--batch-entries", "100", "--trim-input")


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "directory":
        return str(tmp_path / "copies")
    server: ObjectServer = request.getfixturevalue("objects")
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    return f"{server.bucket()}/copies"


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(RULEBOOK, encoding="utf-8")
    return path


def run(server: Server, rulebook: Path, directory: Path, store: str, events: int) -> str:
    """Let a worker decide so many events, then one more so that a last snapshot is taken; return its log."""
    client = server.client()
    first = checkpoint_of(client, "p").events
    fill(client, "p", orders(first + 1, events))
    flags = (*FLAGS, "--snapshots", str(directory), "--snapshot-store", store)
    with WorkerProcess(server.url, "p", rulebook, *flags) as worker:
        wait_until(lambda: checkpoint_of(client, "p").events == events - 1, "all is committed")
        wait_until(lambda: "trimmed entries=" in worker.said, "the input is trimmed")
        fill(client, "p", orders(events, events + 1))
        wait_until(lambda: checkpoint_of(client, "p").events == events, "the last is committed")
        last = rf"snapshot batch={checkpoint_of(client, 'p').batch} .*trimmed entries="
        wait_until(lambda: bool(re.search(last, worker.said, re.DOTALL)), "the last snapshot is copied")
        assert worker.finish() == 0, worker.log
        return worker.said


def test_a_new_machine_goes_on_from_the_copy(valkey: Server, rulebook: Path, tmp_path: Path, store: str) -> None:
    client = valkey.client()
    run(valkey, rulebook, tmp_path / "one", store, 2000)
    assert client.xlen(KEYS.events) < 1900
    said = run(valkey, rulebook, tmp_path / "two", store, 3000)
    assert "snapshot fetched file=p-" in said
    assert "snapshot read file=p-" in said
    # The first machine comes back with what it had: the copies are newer.
    said = run(valkey, rulebook, tmp_path / "one", store, 3500)
    assert "snapshot fetched file=p-" in said
    # Nothing is fetched where the newest is here.
    said = run(valkey, rulebook, tmp_path / "one", store, 4000)
    assert "snapshot fetched" not in said
    assert "snapshot read file=p-" in said
    fill(client, "whole", orders(1, 4001))
    wanted = expected(stream_entries(client, "whole"))
    assert ledger_output(valkey, "p") == wanted.ledger


def test_a_copy_that_is_damaged_is_not_believed(valkey: Server, rulebook: Path, tmp_path: Path) -> None:
    store = tmp_path / "copies"
    run(valkey, rulebook, tmp_path / "one", str(store), 2000)
    copies = sorted((store / "snapshots-p").iterdir())
    assert len(copies) == 2
    data = copies[-1].read_bytes()
    copies[-1].write_bytes(data[: len(data) // 2] + b"x" + data[len(data) // 2 + 1 :])
    said = run(valkey, rulebook, tmp_path / "two", str(store), 2100)
    assert "snapshot refused: " in said
    assert f"snapshot read file=p-{copies[0].name}" in said


def test_a_damaged_file_is_replaced_by_its_copy(valkey: Server, rulebook: Path, tmp_path: Path) -> None:
    store = tmp_path / "copies"
    run(valkey, rulebook, tmp_path / "one", str(store), 2000)
    newest = max((tmp_path / "one").iterdir())
    data = newest.read_bytes()
    newest.write_bytes(data[:-100] + b"x" * 100)
    said = run(valkey, rulebook, tmp_path / "one", str(store), 2100)
    assert re.search(rf"snapshot refused: .*{re.escape(newest.name)}: ", said)
    assert f"snapshot fetched file={newest.name}" in said
    assert f"snapshot read file={newest.name}" in said


def test_without_its_copy_nothing_is_trimmed(valkey: Server, rulebook: Path, tmp_path: Path) -> None:
    client = valkey.client()
    fill(client, "p", orders(1, 2000))
    (tmp_path / "copies").write_text("in the way of a directory")
    flags = (*FLAGS, "--snapshots", str(tmp_path / "one"), "--snapshot-store", str(tmp_path / "copies"))
    with WorkerProcess(valkey.url, "p", rulebook, *flags) as worker:
        wait_until(lambda: checkpoint_of(client, "p").events == 1999, "all is committed")
        wait_until(lambda: "failed: " in worker.said, "it says that there is no copy")
        assert worker.finish() == 0, worker.log
        assert "trimmed" not in worker.said
    assert client.xlen(KEYS.events) == 1999
    shutil.rmtree(tmp_path / "one")
    with WorkerProcess(valkey.url, "p", rulebook, *flags, "--drain") as worker:
        assert worker.wait() == 0, worker.log
        assert "the copies of snapshots cannot be read" in worker.said
