"""The embedded server itself: it comes, goes, keeps its address, and leaves nothing behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from accrual.embedded import EmbeddedServer, has_ended
from accrual.errors import StreamError, UsageError
from servers import Server, ServerFactory, ServerKind, binary_of
from workers import wait_until

pytestmark = pytest.mark.both_servers

ORPHAN = """
import sys, time
from pathlib import Path
from accrual.embedded import EmbeddedServer

server = EmbeddedServer(binary=Path(sys.argv[1])).start()
print(server.process_id, flush=True)
time.sleep(60)
"""


def wait_until_gone(process_id: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{process_id}/stat")
        # A zombie is gone too; in a container nobody may be there to collect it.
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_shared_server_is_empty_for_each_test(server: Server) -> None:
    assert server.client().dbsize() == 0
    server.client().set("left", "behind")


def test_a_shared_server_is_emptied_after_another_test(server: Server) -> None:
    assert server.client().dbsize() == 0


def test_it_answers_on_its_port_and_on_its_socket(server: Server) -> None:
    for url in (server.url, server.unix_url):
        with redis.Redis.from_url(url) as client:
            assert client.ping()


def test_a_restart_keeps_address_and_data(server_factory: ServerFactory, server_kind: ServerKind) -> None:
    server = server_factory(server_kind, {"appendonly": "yes", "appendfsync": "always"})
    server.client().set("points", "60")
    before = server.url, server.process_id
    server.restart()
    assert server.url == before[0]
    assert server.process_id != before[1]
    assert server.client().get("points") == b"60"


def test_a_kill_loses_only_what_was_not_written(server_factory: ServerFactory, server_kind: ServerKind) -> None:
    durable = server_factory(server_kind, {"appendonly": "yes", "appendfsync": "always"})
    forgetful = server_factory(server_kind)
    for server in (durable, forgetful):
        server.client().set("points", "60")
        server.kill()
        assert not server.running
        server.start()
    assert durable.client().get("points") == b"60"
    assert forgetful.client().get("points") is None


def test_a_paused_server_is_silent_until_it_is_resumed(server_factory: ServerFactory) -> None:
    server = server_factory()
    client = server.client(socket_timeout=0.2, retry=None)
    client.ping()
    server.pause()
    with pytest.raises(redis.exceptions.TimeoutError):
        client.ping()
    server.resume()
    assert server.client().ping()


def test_a_paused_server_can_be_stopped(server_factory: ServerFactory) -> None:
    server = server_factory()
    server.pause()
    server.stop(timeout_s=5.0)
    assert not server.running


def test_options_of_several_words_and_odd_characters_arrive(server_factory: ServerFactory) -> None:
    server = server_factory(options={"save": ("900", "1"), "requirepass": 'a "b\\c', "maxmemory": 64 << 20})
    settings = server.client(password='a "b\\c').config_get()
    assert settings["save"] == "900 1"
    assert settings["maxmemory"] == str(64 << 20)


def test_the_directory_of_a_caller_stays(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30)
    with EmbeddedServer({"appendonly": "yes"}, directory=directory) as server:
        server.client().set("points", "60")
        socket_path = server.unix_socket_path
    assert (directory / "server.log").exists()
    assert not socket_path.parent.exists()
    with EmbeddedServer({"appendonly": "yes"}, directory=directory) as server:
        assert server.client().get("points") == b"60"


def test_a_refused_option_ends_with_the_reason() -> None:
    with pytest.raises(StreamError, match="no-such-option"), EmbeddedServer({"no-such-option": "yes"}):
        pass


def test_a_port_that_was_asked_for_and_is_taken_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StreamError, match="in use"), EmbeddedServer(port=port):
            pass


def test_a_program_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a program"):
        EmbeddedServer(binary=tmp_path / "valkey-server")


def test_the_server_ends_when_its_owner_is_killed(server_kind: ServerKind) -> None:
    command = [sys.executable, "-c", ORPHAN, str(binary_of(server_kind))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        process_id = int(owner.stdout.readline())
        assert not wait_until_gone(process_id, timeout_s=0.2)
        owner.send_signal(signal.SIGKILL)
        assert wait_until_gone(process_id)


def test_a_child_that_has_ended_is_noticed_whatever_a_signal_left_locked() -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        assert not has_ended(process)
        assert process.stdin is not None
        process.stdin.close()
        with process._waitpid_lock:  # type: ignore[attr-defined]
            wait_until(lambda: has_ended(process), "its end is noticed")
    assert has_ended(process)
