"""The servers that tests run on: which there are, and where their programs come from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final, Literal, Protocol

from accrual.embedded import EmbeddedServer as Server
from accrual.embedded import Options, valkey_binary

__all__ = ["SERVER_KINDS", "Server", "ServerFactory", "ServerKind", "binary_of", "empty", "version_of"]

ServerKind = Literal["valkey", "redis7"]
SERVER_KINDS: Final[tuple[ServerKind, ...]] = ("valkey", "redis7")


class ServerFactory(Protocol):
    """Starts private servers."""

    def __call__(
        self,
        kind: ServerKind = "valkey",
        options: Options | None = None,
        *,
        directory: Path | None = None,
    ) -> Server:
        """Return a running server of ``kind`` with ``options`` over the defaults; it ends with the test."""


def binary_of(kind: ServerKind) -> Path:
    """Return the server program of ``kind``; ``LookupError``, saying how to get it, if there is none."""
    if kind == "valkey":
        return valkey_binary()
    named = os.environ.get("ACCRUAL_REDIS_SERVER")
    binary = Path(named) if named else Path(sys.prefix) / "redis7" / "bin" / "redis-server"
    if not binary.is_file():
        raise LookupError(
            f"there is no Redis at {binary}: run `make test`, or {sys.executable} tools/fetch_redis.py, "
            "or set ACCRUAL_REDIS_SERVER=/path/to/redis-server"
        )
    return binary


def version_of(kind: ServerKind) -> str:
    """Return the version that the program says it is, such as ``7.0.15``."""
    said = subprocess.run([binary_of(kind), "--version"], check=True, capture_output=True, text=True).stdout
    return next(word.removeprefix("v=") for word in said.split() if word.startswith("v="))


def empty(server: Server) -> None:
    """Bring a shared server back to its beginning: running, with no data, no scripts and nothing paused."""
    server.start()
    server.resume()
    with server.client() as client:
        client.flushall()
        client.script_flush()
