"""An S3 server for tests: a process of its own on a free loopback port."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.error import URLError

__all__ = ["ObjectServer", "object_server"]

START_TIMEOUT_S: Final = 60.0


class ObjectServer:
    """A running S3 server that lets everybody in."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._numbers = itertools.count(1)

    @property
    def variables(self) -> dict[str, str]:
        """What a client's environment must say."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    def bucket(self) -> str:
        """Make a new bucket and return its URL."""
        name = f"bucket-{next(self._numbers)}"
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")):  # noqa: S310
            return f"s3://{name}"


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Run a server for as long as the block lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _wait(f"http://127.0.0.1:{port}/moto-api/", process, log.fileno())
            yield ObjectServer(port)
        finally:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: int) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url):  # noqa: S310
                return
        except (URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"no S3 server: {os.pread(log, 1 << 20, 0).decode()}") from None
            time.sleep(0.1)
