"""One server process of our own: how it starts, ends, is killed and paused, and never outlives us."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from accrual.errors import AccrualError, StreamError

__all__ = ["HOST", "EmbeddedProcess", "Lifeline", "has_ended"]

HOST: Final = "127.0.0.1"
START_ATTEMPTS: Final = 5
POLL_INTERVAL_S: Final = 0.01
LOG_TAIL_LINES: Final = 20

# The shell waits on a pipe that only this process holds open. If the pipe closes without a word we have died,
# and the child goes too; a word means that the child has ended, and its number may be another's by now.
LIFELINE: Final = 'read -r word; test -n "$word" || { kill -KILL "$1"; shift; rm -rf -- "$@"; }'


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


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a child process has ended.

    ``Popen.poll`` takes a lock, and a signal whose handler raises may come right then: it would stay locked for ever.
    """
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class EmbeddedProcess(ABC):
    """One server process; its directory, its port and its Unix socket stay the same over a restart.

    Its ``stop``, the end of the ``with`` block and the death of this process all end it. What kind of server it is, a
    subclass says: with what command it starts, when it answers, and which error is raised where it does not come up.
    """

    failure: type[AccrualError] = StreamError

    def __init__(self, name: str, directory: Path | None, port: int | None) -> None:
        self.name = name
        # A socket's path must fit in 108 bytes, and a caller's directory may not leave room for it.
        self._own_directory = Path(tempfile.mkdtemp(prefix="accrual-server-"))
        self.directory = (directory or self._own_directory / "data").absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log_path = self.directory / "server.log"
        self._fixed_port = port
        self._port: int | None = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None

    # ------------------------------------------------------------------------------------- what kind it is

    @abstractmethod
    def _prepare(self) -> None:
        """Write what the server reads at its start. The port is known by now."""

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """Return the command that starts the server."""

    @abstractmethod
    def _answers(self) -> bool:
        """Tell whether the server, and no other in its place, answers."""

    def _user(self) -> int | None:
        """Return the user that the server must run as; ``None`` for our own."""
        return None

    # ------------------------------------------------------------------------------------------ where it is

    @property
    def port(self) -> int:
        """The loopback port; an error before the first start, which chooses it."""
        if self._port is None:
            raise self.failure(f"the embedded {self.name} has not been started yet")
        return self._port

    @property
    def process_id(self) -> int:
        """The number of the running process; an error if there is none."""
        if not self.running:
            raise self.failure(f"the embedded {self.name} is not running")
        return self._required_process().pid

    @property
    def running(self) -> bool:
        """Whether the process is alive (a paused one is)."""
        return self._process is not None and not has_ended(self._process)

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
            except AccrualError as error:
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
        self._prepare()
        self.log_path.touch()
        log_start = self.log_path.stat().st_size
        with self.log_path.open("ab") as log:
            # Its own process group keeps a terminal's Ctrl-C from the server: we stop it, in order.
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                user=self._user(),
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
                raise self.failure(f"{self.name} ended at its start:\n{self._log_tail(log_start)}")
            if time.monotonic() > deadline:
                raise self.failure(f"{self.name} does not answer:\n{self._log_tail(log_start)}")
            time.sleep(POLL_INTERVAL_S)

    def _log_tail(self, log_start: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _required_process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise self.failure(f"the embedded {self.name} is not running")
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
