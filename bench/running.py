"""What runs beside a measurement: a server, a connection to it, and services whose logs tell what happened when."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple, Self

from accrual.embedded import EmbeddedServer, Options
from bench.core import RULEBOOK
from bench.drain import KEYS, PARTITION, Filled, fill
from bench.machine import ROOT, SERVER_CORE, WORKER_CORE, pinned
from bench.wire import EVENTS_PER_BATCH
from bench.workload import CHUNK_EVENTS, SCATTER, Events, Workload

__all__ = [
    "KEYS",
    "PARTITION",
    "SNAPSHOT_WRITTEN",
    "Said",
    "Service",
    "Worker",
    "census_of",
    "connected",
    "put",
    "put_census",
    "server_in",
    "workspace",
]

START_TIMEOUT_S: Final = 120.0
SNAPSHOT_WRITTEN: Final = r" snapshot batch=\d+ bytes=\d+ seconds="


class Said(NamedTuple):
    """A line of a log, when it came (ns of the monotonic clock), and what a pattern found in it."""

    at_ns: int
    text: str
    match: re.Match[str]

    def number(self, name: str) -> float:
        """Return the number that stands in the line as ``name=number``. Raises ``RuntimeError`` where none does."""
        found = re.search(rf"\b{name}=([0-9.]+)", self.text)
        if found is None:
            raise RuntimeError(f"the log has no {name} in: {self.text}")
        return float(found[1])


class Service:
    """``accrual command`` of the benchmarks' partition as a process of its own, with what it says and when it says it.

    ``flags`` go to the command. It is killed at the end of the ``with`` block if it still runs. On the worker's core
    alone unless ``anywhere``: then it may use every core there is.
    """

    def __init__(self, command: str, url: str, *flags: str | Path | int, anywhere: bool = False) -> None:
        self._command = command
        # The settings that this shell may hold for a service are not what is measured.
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("ACCRUAL_", "PYTHONSAFEPATH"))
        }
        with contextlib.nullcontext() if anywhere else pinned(WORKER_CORE):
            self.started_ns = time.monotonic_ns()
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "accrual.cli", command, "--rulebook", RULEBOOK, "--redis", url),
                    *("--partition", PARTITION, *map(str, flags)),
                ],
                cwd=ROOT,
                env=kept,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        self._lines: list[tuple[int, str]] = []
        self._heard = threading.Condition()
        self._ended = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.usage: resource.struct_rusage | None = None

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def all_said(self, pattern: str) -> list[Said]:
        """Return the lines so far in which ``pattern`` is found."""
        with self._heard:
            lines = list(self._lines)
        return [Said(at_ns, text, match) for at_ns, text in lines if (match := re.search(pattern, text))]

    def said(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> Said:
        """Wait for the first line in which ``pattern`` is found. Raises ``RuntimeError`` where none comes."""
        deadline = time.monotonic() + timeout_s
        with self._heard:
            while True:
                for at_ns, text in self._lines:
                    if match := re.search(pattern, text):
                        return Said(at_ns, text, match)
                if self._ended or not self._heard.wait(deadline - time.monotonic()):
                    raise RuntimeError(f"accrual {self._command} did not say {pattern!r}:\n{self._log()}")

    def end(self, *, ask: bool = True) -> None:
        """Wait for the end, ``ask``-ing for it with SIGTERM. Raises ``RuntimeError`` where it failed."""
        if ask:
            self._process.send_signal(signal.SIGTERM)
        _, status, self.usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._listener.join()
        if self._process.returncode:
            raise RuntimeError(f"accrual {self._command} failed:\n{self._log()}")

    @property
    def peak_bytes(self) -> int:
        """The most resident memory that it ever had; only after its end."""
        if self.usage is None:
            raise RuntimeError(f"accrual {self._command} still runs")
        return self.usage.ru_maxrss * 1024

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                with self._heard:
                    self._lines.append((time.monotonic_ns(), line.rstrip()))
                    self._heard.notify_all()
        with self._heard:
            self._ended = True
            self._heard.notify_all()

    def _log(self) -> str:
        return "\n".join(text for _, text in self._lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        self._listener.join()


class Worker(Service):
    """``accrual worker``. One with a thread that writes a snapshot may run ``anywhere``."""

    def __init__(self, url: str, *flags: str | Path | int, anywhere: bool = False) -> None:
        super().__init__("worker", url, *flags, anywhere=anywhere)


@contextlib.contextmanager
def workspace(directory: Path | None) -> Iterator[Path]:
    """Give a folder of its own, in ``directory`` if one is named, for as long as the block lasts."""
    with TemporaryDirectory(dir=directory, prefix="accrual-bench-") as name:
        yield Path(name)


@contextlib.contextmanager
def server_in(directory: Path, options: Options | None = None) -> Iterator[EmbeddedServer]:
    """Run a server on its core, with its files in ``directory``."""
    with contextlib.ExitStack() as stack:
        with pinned(SERVER_CORE):
            server = stack.enter_context(EmbeddedServer(options, directory=directory))
        yield server


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """Give a connection to the server at ``port`` of this machine."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def census_of(workload: Workload, events: int) -> Iterator[Events]:
    """Yield the first ``events`` of the census in chunks; as many as there are members show no second device."""
    for first in range(0, events, CHUNK_EVENTS):
        yield workload.census(first, min(CHUNK_EVENTS, events - first))


def scattered_census(workload: Workload) -> Iterator[Events]:
    """Yield an event of every member in chunks, in an order that has nothing to do with their names."""
    for chunk in census_of(workload, workload.members):
        member = chunk.device * SCATTER % workload.members
        yield Events(**{**chunk._asdict(), "member": member, "device": member, "phone": member})


def put(server: EmbeddedServer, chunks: Iterable[Events]) -> Filled:
    """Put ``chunks`` on the stream, one event per entry, and return how to read them again."""
    with connected(server.port) as connection, pinned(WORKER_CORE):
        return fill(connection, chunks, "e")


def put_census(server: EmbeddedServer, chunks: Iterable[Events]) -> None:
    """Put ``chunks`` on the stream, 64 events per entry; a chunk that does not fill its entries goes one by one."""
    with connected(server.port) as connection, pinned(WORKER_CORE):
        for chunk in chunks:
            fill(connection, [chunk], "e" if len(chunk) % EVENTS_PER_BATCH else "b")
