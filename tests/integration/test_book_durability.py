"""What is safe to be booked: asked of real servers, each in the configurations that promise something, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from accrual.book import connect, durability, follow, open_book
from accrual.book.durability import FLUSH_S, Durability
from accrual.book.follow import Follower
from accrual.embedded import EmbeddedDatabase
from accrual.errors import UnsafeServer
from books import BOOK_RULEBOOK, Partition, balance, ingest, order
from servers import Server, ServerFactory, ServerKind
from workers import command, wait_until

NO_FILE = "the server has appendonly off"
KERNEL = "the server has appendfsync no, and may lose half a minute and more to a power cut"


class Clock:
    """The time that the book goes by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        for module in (durability, follow):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))


def refusal(client: redis.Redis) -> str:
    with pytest.raises(UnsafeServer) as refused:
        Durability(client, require_durable=True)
    return str(refused.value)


def after(clock: Clock, pause_s: float, asked: Callable[[], int]) -> int:
    clock.now_s += pause_s
    return asked()


def test_what_each_configuration_promises(
    server_factory: ServerFactory,
    server_kind: ServerKind,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = server_factory(server_kind, {"appendonly": "yes", "appendfsync": "always"})
    client = server.client()
    clock = Clock(monkeypatch)
    always = Durability(client, require_durable=True)
    assert always.safe_batch(5) == 5

    client.config_set("appendfsync", "everysec")
    everysec = Durability(client, require_durable=True)
    assert everysec.safe_batch(5) == 0
    assert after(clock, FLUSH_S - 0.1, lambda: everysec.safe_batch(6)) == 0
    assert after(clock, 0.1, lambda: everysec.safe_batch(7)) == 5
    assert after(clock, FLUSH_S, lambda: everysec.safe_batch(7)) == 7
    assert caplog.messages == []

    # The kernel decides when it is written: no time is long enough.
    client.config_set("appendfsync", "no")
    assert Durability(client, require_durable=False).safe_batch(5) == 5
    assert caplog.messages == [f"{KERNEL}: should it lose its ledger, the book will contradict it"]
    assert refusal(client) == f"{KERNEL}: what is booked from it could be lost there"
    client.config_set("appendonly", "no")
    assert Durability(client, require_durable=False).safe_batch(5) == 5
    assert refusal(client) == f"{NO_FILE}: what is booked from it could be lost there"


def test_where_rewrites_put_writing_off(server_factory: ServerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_factory(
        "valkey", {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "yes"}
    )
    client = server.client()
    clock = Clock(monkeypatch)
    durable = Durability(client, require_durable=True)
    assert durable.safe_batch(5) == 0
    # A snapshot that takes its time: a millisecond for each key, and the server writes nothing to the disk meanwhile.
    client.mset({f"key-{number}": number for number in range(10_000)})
    client.config_set("rdb-key-save-delay", "1000")
    client.bgsave()
    assert client.info("persistence")["rdb_bgsave_in_progress"] == 1
    assert after(clock, FLUSH_S, lambda: durable.safe_batch(6)) == 0
    assert after(clock, FLUSH_S, lambda: durable.safe_batch(6)) == 0
    client.execute_command("BGSAVE", "CANCEL")
    wait_until(lambda: client.info("persistence")["rdb_bgsave_in_progress"] == 0, "the snapshot is given up")
    assert after(clock, FLUSH_S - 0.1, lambda: durable.safe_batch(6)) == 0
    assert after(clock, 0.1, lambda: durable.safe_batch(6)) == 6


def test_another_configuration_counts_from_then_on(
    server_factory: ServerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_factory("valkey", {"appendonly": "yes", "appendfsync": "always"})
    client = server.client()
    clock = Clock(monkeypatch)
    durable, lenient = (Durability(client, require_durable=required) for required in (True, False))
    assert durable.safe_batch(5) == 5

    client.config_set("appendfsync", "everysec")
    assert after(clock, 0.0, lambda: durable.safe_batch(6)) == 0
    assert after(clock, 0.1, lambda: durable.safe_batch(6)) == 0
    assert after(clock, FLUSH_S, lambda: durable.safe_batch(7)) == 6

    client.config_set("appendonly", "no")
    with pytest.raises(UnsafeServer, match=NO_FILE):
        durable.safe_batch(8)
    assert [lenient.safe_batch(8), lenient.safe_batch(8)] == [0, 8]
    assert caplog.messages == [f"{NO_FILE}: should it lose its ledger, the book will contradict it"]

    # Its file is of no use before all is in it.
    client.mset({f"key-{number}": number for number in range(4000)})
    client.config_set("rdb-key-save-delay", "1000")
    client.config_set("appendonly", "yes")
    client.config_set("appendfsync", "always")
    assert [lenient.safe_batch(9) for _ in range(3)] == [0, 0, 0]
    assert after(clock, FLUSH_S, lambda: lenient.safe_batch(9)) == 0
    client.config_set("rdb-key-save-delay", "0")
    wait_until(lambda: lenient.safe_batch(9) == 9, "all is in the file")


def test_another_server_counts_from_then_on(server_factory: ServerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have lost what was seen, and have other batches by the same numbers."""
    server = server_factory("valkey", {"appendonly": "yes", "appendfsync": "everysec"})
    client = server.client()
    clock = Clock(monkeypatch)
    durable = Durability(client, require_durable=True)
    assert durable.safe_batch(10) == 0
    assert after(clock, FLUSH_S, lambda: durable.safe_batch(10)) == 10
    # As a server is that has lost its last ones without having been restarted: a replica that copied another's data.
    assert durable.safe_batch(7) == 0
    assert after(clock, FLUSH_S, lambda: durable.safe_batch(10)) == 7
    assert not durable.has_changed()

    server.restart()
    wait_until(client.ping, "it is back")
    assert durable.has_changed()
    assert durable.safe_batch(10) == 0
    assert durable.safe_batch(10) == 0
    assert after(clock, FLUSH_S, lambda: durable.safe_batch(11)) == 10

    server.stop()
    server.options = {**server.options, "appendonly": "no"}
    server.start()
    with pytest.raises(UnsafeServer, match=NO_FILE):
        durable.safe_batch(11)


def test_a_server_that_does_not_say(server_factory: ServerFactory, caplog: pytest.LogCaptureFixture) -> None:
    server = server_factory("valkey", {"appendonly": "yes", "appendfsync": "always"})
    client = server.client()
    client.execute_command("ACL", "SETUSER", "default", "-config")
    assert Durability(client, require_durable=False).safe_batch(5) == 0
    unknown = "the server does not say what its appendfsync is (CONFIG GET)"
    assert caplog.messages == [f"{unknown}: should it lose its ledger, the book will contradict it"]
    assert refusal(client) == f"{unknown}: what is booked from it could be lost there"


def test_the_command_refuses_what_could_be_lost(server_factory: ServerFactory, book: str, tmp_path: Path) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK)
    server = server_factory("valkey", {"appendonly": "yes", "appendfsync": "no"})
    flags = ["--rulebook", str(rulebook), "--redis", server.url, "--database", book, "--partition", "p", "--drain"]
    done = command("book", *flags, "--require-durable")
    assert (done.returncode, KERNEL in done.stderr.decode()) == (1, True), done.stderr
    done = command("book", *flags)
    assert (done.returncode, KERNEL in done.stderr.decode()) == (0, True), done.stderr


def test_a_ledger_that_is_not_safe_yet_is_waited_for_and_that_is_said(
    server_factory: ServerFactory, book: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_factory("valkey", {"appendonly": "yes", "appendfsync": "everysec"})
    clock = Clock(monkeypatch)
    monkeypatch.setattr(follow, "REPORT_S", 1.0)
    caplog.set_level("INFO", "accrual.book")
    partition = Partition(server.client())
    partition.send(order(1), order(2))
    with connect(book) as connection, Follower(connection, server.client(), "p", require_durable=True) as follower:
        assert not follower.step()
        assert not after(clock, 1.0, follower.step)
        assert balance(connection, "m1") == (0, 0, 0)
        assert [message.partition(": ")[2] for message in caplog.messages] == [
            "2 entries behind, 0 entries/s posted, 0 arriving, waiting for the server to write them to its disk"
        ]
        clock.now_s += FLUSH_S
        wait_until(follower.step, "it is on the disk")
        assert balance(connection, "m1") == (20, 0, 0)
        assert not follower.step()
        assert len(caplog.messages) == 1


# What an otherwise idle database writes of itself is less.
OF_A_BATCH_BYTES = 500


def test_what_is_drained_is_on_the_disk_of_the_database(
    valkey: Server, database_factory: Callable[..., EmbeddedDatabase]
) -> None:
    partition = Partition(valkey.client())
    database = database_factory({"wal_writer_delay": "10s"})
    with open_book(database.url) as connection:
        for number in range(3):
            partition.send(order(number))
            ingest(connection, partition)
            (unwritten,) = connection.execute(
                "SELECT pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn()"
            ).fetchone() or (None,)
            assert unwritten is not None
            assert unwritten < OF_A_BATCH_BYTES
