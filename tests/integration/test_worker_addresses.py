"""A worker reaches its server however the URL says: TLS, ACL users, databases, Unix sockets, Sentinel."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import redis

from accrual.errors import UsageError
from accrual.stream import Keys, StreamServer, without_password
from servers import Server, ServerFactory, binary_of
from workers import (
    RULEBOOK,
    WorkerProcess,
    checkpoint_of,
    command,
    fill,
    ledger_output,
    orders,
    wait_for_events,
    wait_until,
)

# A key pair for these tests and nothing else: its own authority, for localhost, valid from 2020 to 2120.
CERTIFICATE: Final = """\
-----BEGIN CERTIFICATE-----
MIIBbjCCARWgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1hY2NydWFs
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1hY2NydWFsIHRlc3RzMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAENo95
gotWNSsqzlxHYA7oEpeD9PZbn4g+rNULecw2MGtN/vOOSWPN6eGcGsXoQys42rPs
atM9k/lTr1ibOVDLQaNOMEwwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMA8G
A1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFLsUOaWCpgr910xF+C6Au+z7xmdyMAoG
CCqGSM49BAMCA0cAMEQCIFjk1DY2MkFyQhy2i0PRtqPQuJfJIxR8ZrZpl91hZb82
AiASn3KScYfuYWuW97Nvc/3tN235gQnlk40xEC6ljFrV4g==
-----END CERTIFICATE-----
"""
KEY: Final = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgIL90tq5fpk7K1xJx
KWSbPxcLet1qKAm5aVhrkHbr+NuhRANCAAQ2j3mCi1Y1KyrOXEdgDugSl4P09luf
iD6s1Qt5zDYwa03+845JY83p4ZwaxehDKzjas+xq0z2T+VOvWJs5UMtB
-----END PRIVATE KEY-----
"""


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(RULEBOOK, encoding="utf-8")
    return path


def use_everything(url: str, client: redis.Redis, rulebook: Path) -> None:
    """Run every command that talks to a server on ``url``; ``client`` reaches the same database on its own way."""
    fill(client, "p", orders(1, 100))
    with WorkerProcess(url, "p", rulebook) as worker:
        wait_for_events(client, 99)
        assert worker.finish() == 0, worker.log
    # A restart reads the ledger and the stream again.
    with WorkerProcess(url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0, worker.log
    printed = command("ledger", "--redis", url, "--partition", "p")
    assert (printed.returncode, printed.stdout.count(b"\n")) == (0, 99), printed.stderr
    shown = command("rulebook", "show", "--redis", url, "--partition", "p", "--text")
    assert shown.stdout.decode() == RULEBOOK


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_unix_socket(server: Server, rulebook: Path) -> None:
    use_everything(server.unix_url, server.client(), rulebook)


def test_another_database(server: Server, rulebook: Path) -> None:
    use_everything(f"redis://127.0.0.1:{server.port}/7", server.client(db=7), rulebook)
    assert server.client().keys() == []


def test_an_alias_of_valkey(valkey: Server, rulebook: Path) -> None:
    use_everything(f"valkey://localhost:{valkey.port}", valkey.client(), rulebook)


def test_an_acl_user_with_a_password_that_must_be_quoted(server: Server, rulebook: Path) -> None:
    """What such a user must be allowed: docs/OPERATIONS.md, and its test."""
    server.client().execute_command("ACL", "SETUSER", "worker", "on", ">pass:word", "~accrual:*", "+@all")
    try:
        use_everything(f"redis://worker:pass%3Aword@127.0.0.1:{server.port}", server.client(), rulebook)
    finally:
        server.client().execute_command("ACL", "DELUSER", "worker")


def test_a_password(server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory("valkey", {"requirepass": "word"})
    use_everything(f"redis://:word@127.0.0.1:{server.port}", server.client(password="word"), rulebook)


def test_a_wrong_password_ends_a_worker_at_once(server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory("valkey", {"requirepass": "word"})
    with WorkerProcess(f"redis://:other@127.0.0.1:{server.port}", "p", rulebook) as worker:
        assert worker.wait(10) == 1
    assert "Traceback" not in worker.log
    assert "other" not in worker.log


@pytest.mark.redis7
def test_tls(server_factory: ServerFactory, rulebook: Path, tmp_path: Path) -> None:
    """On Redis, because the embedded Valkey is built without TLS."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(KEY)
    port = free_port()
    options = {"tls-port": port, "tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": certificate}
    server = server_factory("redis7", {name: str(value) for name, value in options.items()})
    mutual = f"ssl_certfile={certificate}&ssl_keyfile={key}"
    use_everything(f"rediss://localhost:{port}?ssl_ca_certs={certificate}&{mutual}", server.client(), rulebook)
    # Without the authority nobody is trusted.
    with WorkerProcess(f"rediss://localhost:{port}?{mutual}", "other", rulebook, "--drain") as worker:
        wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in worker.said, "it does not trust the server")
        assert worker.finish() == 0
    assert not server.client().exists(Keys("other").checkpoint)


@contextmanager
def sentinel_of(server: Server, directory: Path) -> Iterator[int]:
    """Run a Sentinel that watches ``server`` under the name ``cell``, and yield its port."""
    port = free_port()
    configuration = directory / "sentinel.conf"
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {directory}\nsentinel monitor cell 127.0.0.1 {server.port} 1\n"
        "sentinel down-after-milliseconds cell 300\nsentinel failover-timeout cell 2000\n"
    )
    process = subprocess.Popen(
        [binary_of("valkey"), configuration, "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with redis.Redis(port=port) as client:
            wait_until(lambda: answers(client), "Sentinel answers")
        yield port
    finally:
        process.kill()
        process.wait()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_sentinel_names_the_master_and_after_a_failover_the_new_one(
    server_factory: ServerFactory, rulebook: Path, tmp_path: Path
) -> None:
    first, second = server_factory("valkey"), server_factory("valkey")
    second.client().execute_command("REPLICAOF", "127.0.0.1", first.port)
    with sentinel_of(first, tmp_path) as port, redis.Redis(port=port) as sentinel:
        url = f"sentinel://127.0.0.1:1,127.0.0.1:{port}/cell"
        use_everything(url, first.client(), rulebook)
        wait_until(lambda: len(sentinel.sentinel_slaves("cell")) == 1, "Sentinel knows the replica")
        with WorkerProcess(url, "p", rulebook, lease_ms=60_000) as worker:
            fill(first.client(), "p", orders(100, 200))
            wait_until(lambda: checkpoint_of(second.client(), "p").entries == 199, "the replica has everything")
            first.kill()
            wait_until(lambda: second.client().info("replication")["role"] == "master", "the replica takes over")
            fill(second.client(), "p", orders(200, 300))
            wait_until(lambda: checkpoint_of(second.client(), "p").entries == 299, "the worker follows", 30)
            assert worker.finish() == 0, worker.log
    assert ledger_output(second, "p").count(b"\n") == 299


def fails_over(sentinel: redis.Redis) -> bool:
    """Ask for a failover, and return whether there will be one."""
    try:
        sentinel.execute_command("SENTINEL", "FAILOVER", "cell")
    except redis.ResponseError:
        return False
    return True


@pytest.mark.slow
def test_a_demoted_master_is_left_for_the_new_one(
    server_factory: ServerFactory, rulebook: Path, tmp_path: Path
) -> None:
    """The old master is still there, but refuses writes: READONLY."""
    first, second = server_factory("valkey"), server_factory("valkey")
    second.client().execute_command("REPLICAOF", "127.0.0.1", first.port)
    with sentinel_of(first, tmp_path) as port, redis.Redis(port=port) as sentinel:
        wait_until(lambda: len(sentinel.sentinel_slaves("cell")) == 1, "Sentinel knows the replica")
        with WorkerProcess(f"sentinel://127.0.0.1:{port}/cell", "p", rulebook, lease_ms=60_000) as worker:
            fill(first.client(), "p", orders(1, 100))
            wait_until(lambda: checkpoint_of(second.client(), "p").entries == 99, "the replica has everything")
            wait_until(lambda: fails_over(sentinel), "Sentinel finds the replica good enough")
            wait_until(lambda: second.client().info("replication")["role"] == "master", "the replica takes over")
            wait_until(lambda: first.client().info("replication")["role"] == "slave", "the master steps down", 30)
            fill(second.client(), "p", orders(100, 200))
            wait_until(lambda: checkpoint_of(second.client(), "p").entries == 199, "the worker follows", 30)
            assert worker.finish() == 0, worker.log


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:word@host:1/2", "redis://user:***@host:1/2"),
        ("redis://:word@host", "redis://:***@host"),
        ("redis://host?password=word&db=1", "redis://host?password=***&db=1"),
        ("sentinel://u:word@a:1,b:2/s?sentinel_password=word", "sentinel://u:***@a:1,b:2/s?sentinel_password=***"),
        ("unix:///path/to.sock?db=1", "unix:///path/to.sock?db=1"),
    ],
)
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:6379",
        "http://host",
        "redis://host:port",
        "sentinel://host",
        "sentinel:///service",
        "sentinel://host/service/x",
        "redis://host?db=x",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        StreamServer(url)
