"""Stores of files: a directory and an S3 server behave alike, and a file appears whole or not at all."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from accrual.blobs import BlobStore, open_store
from accrual.errors import BlobError, BlobExists, BlobMissing, UsageError
from objects import ObjectServer, object_server


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


@pytest.fixture(params=["directory", "file", "s3", "s3-prefix"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "directory":
        return str(tmp_path / "store")
    if request.param == "file":
        return (tmp_path / "a store").as_uri()
    server = cast(ObjectServer, request.getfixturevalue("objects"))
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    return server.bucket() + ("/some/prefix/" if request.param == "s3-prefix" else "")


@pytest.fixture
def store(url: str) -> BlobStore:
    return open_store(url)


def content(store: BlobStore, name: str) -> bytes:
    return b"".join(store.read(name))


def test_what_is_put_is_read(store: BlobStore) -> None:
    large = os.urandom(3_000_001)
    for name, data in (("one/a", b""), ("one/b.segment", b"b"), ("two/c", large)):
        store.put(name, io.BytesIO(data))
        assert content(store, name) == data


def test_names_are_those_of_the_folder_in_order(store: BlobStore) -> None:
    assert store.names("one") == []
    for name in ("one/b", "one/a", "one-more/a", "on/a", "one/10", "one/9"):
        store.put(name, io.BytesIO(b"x"))
    assert store.names("one") == ["one/10", "one/9", "one/a", "one/b"]


def test_what_is_there_stays_unless_it_is_to_be_replaced(store: BlobStore) -> None:
    store.put("one/a", io.BytesIO(b"first"))
    with pytest.raises(BlobExists, match="one/a: exists already"):
        store.put("one/a", io.BytesIO(b"second"))
    assert content(store, "one/a") == b"first"
    store.put("one/a", io.BytesIO(b"third"), replace=True)
    assert content(store, "one/a") == b"third"
    assert store.names("one") == ["one/a"]


def test_of_many_writers_one_succeeds(store: BlobStore) -> None:
    outcomes: list[int] = []

    def write(number: int) -> None:
        try:
            store.put("one/a", io.BytesIO(b"%d" % number))
            outcomes.append(number)
        except BlobExists:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
        # The emulator of S3 looks first and writes then; the real one does both at once.
        if store.url.startswith("s3"):
            thread.join()
    for thread in threads:
        thread.join()
    assert content(store, "one/a") == b"%d" % outcomes[0]
    assert len(outcomes) == 1


def test_what_is_deleted_is_gone(store: BlobStore) -> None:
    store.put("one/a", io.BytesIO(b"x"))
    store.delete("one/a")
    store.delete("one/a")
    assert store.names("one") == []
    with pytest.raises(BlobMissing, match="one/a: there is no such"):
        content(store, "one/a")


def test_reading_may_end_early(store: BlobStore) -> None:
    data = os.urandom(5_000_000)
    store.put("one/a", io.BytesIO(data))
    pieces = store.read("one/a")
    first = next(pieces)
    assert data.startswith(first)
    assert len(first) < len(data)
    cast("Generator[bytes]", pieces).close()
    assert content(store, "one/a") == data


def test_a_large_file_is_put_in_parts(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 40)
    with path.open("rb") as file:
        store.put("one/large", file, replace=True)
    assert content(store, "one/large") == path.read_bytes()


@pytest.mark.parametrize("name", ["a", "a/b/c", "/a", "../a", "a/..", "a/.b", "a/", "a/b c", "a/\n", "a/" + "x" * 201])
def test_other_names_are_refused(store: BlobStore, name: str) -> None:
    with pytest.raises(BlobError, match="is not the name of a file"):
        store.put(name, io.BytesIO(b"x"))
    with pytest.raises(BlobError, match="is not the name of a file"):
        content(store, name)


@pytest.mark.parametrize("url", ["", "file://host/path", "s3://", "ftp://host/path", "file://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError):
        open_store(url)


def test_a_file_of_a_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    open_store(str(tmp_path / "store")).put("one/a", io.BytesIO(b"x"))
    assert (tmp_path / "store" / "one" / "a").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "store" / "one").stat().st_mode & 0o777 == 0o700


class Breaks(io.RawIOBase):
    """A source that breaks off in the middle."""

    def __init__(self) -> None:
        self.left = 3

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if not self.left:
            raise OSError("the disk is gone")
        return b"x" * min(1 << 20, size if size > 0 else 1 << 20)


def test_a_source_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(OSError, match="the disk is gone"):
        store.put("one/a", cast(BinaryIO, Breaks()))
    assert list((tmp_path / "one").iterdir()) == []


def test_what_a_killed_writer_left_is_removed_in_time(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("one/a", io.BytesIO(b"x"))
    old, new = tmp_path / "one" / ".b.old", tmp_path / "one" / ".b.new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.put("one/c", io.BytesIO(b"x"))
    assert not old.exists()
    assert new.exists()
    assert store.names("one") == ["one/a", "one/c"]


def test_a_store_that_is_away_may_come_back(monkeypatch: pytest.MonkeyPatch, objects: ObjectServer) -> None:
    for name, value in objects.variables.items():
        monkeypatch.setenv(name, value)
    bucket = objects.bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"s3://bucket-.*/one"):
        open_store(bucket).names("one")


def test_a_bucket_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, objects: ObjectServer) -> None:
    for name, value in objects.variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BlobError, match="s3://no-such-bucket/one/a"):
        open_store("s3://no-such-bucket").put("one/a", io.BytesIO(b"x"))
