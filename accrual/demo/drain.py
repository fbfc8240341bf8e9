"""Runs the worker on the streamed day: a process of its own, as in production, watched through the checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import redis

from accrual.embedded import Lifeline, has_ended
from accrual.errors import StreamError
from accrual.stream import Checkpoint, Keys, checkpoint_of

__all__ = ["Drained", "drain"]

LOOK_INTERVAL_S: Final = 0.1
STOP_TIMEOUT_S: Final = 15.0
STOPPING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOG_TAIL_LINES: Final = 20
TOTAL: Final = re.compile(r" total events=(\d+) batches=(\d+) seconds=\S+ events_per_s=(\d+) ")


class Drained(msgspec.Struct, frozen=True):
    """What the worker says of its run in the last line of its log."""

    events: int
    batches: int
    events_per_s: int

    @property
    def duration_s(self) -> float:
        """From its first read to its last commit."""
        return self.events / max(1, self.events_per_s)


def drain(
    client: redis.Redis, keys: Keys, url: str, rulebook: Path, log_path: Path, look: Callable[[Checkpoint], None]
) -> Drained:
    """Run ``accrual worker --drain`` to its end; ten times a second ``look`` is shown the checkpoint.

    Its log goes to ``log_path``. Raises ``StreamError`` with the end of the log if it fails. Whatever happens here, it
    does not go on: it is asked to finish, as by an operator, or killed where this process dies without a word.
    """
    command = [sys.executable, "-m", "accrual.cli", "worker", "--drain", "--no-progress"]
    command += ["--rulebook", str(rulebook), "--redis", url, "--partition", keys.partition]
    worker: subprocess.Popen[bytes] | None = None
    lifeline: Lifeline | None = None
    try:
        with log_path.open("wb") as log, _signals_held_back():
            # In a process group of its own it is spared a terminal's Ctrl-C: we stop it, in order.
            worker = subprocess.Popen(
                command, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
            lifeline = Lifeline(worker.pid)
        while not has_ended(worker):
            time.sleep(LOOK_INTERVAL_S)
            look(checkpoint_of(client, keys))
    finally:
        if worker is not None:
            _stop(worker)
        if lifeline is not None:
            lifeline.release()
    look(checkpoint_of(client, keys))
    text = log_path.read_text(encoding="utf-8", errors="replace")
    total = TOTAL.search(text)
    if worker.returncode != 0 or total is None:
        tail = "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
        raise StreamError(f"the worker ended with status {worker.returncode}: {tail}")
    return Drained(*map(int, total.groups()))


def _environment() -> dict[str, str]:
    """Return this environment without the user's settings: they are meant for other servers and partitions."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCRUAL_")}
    # The worker must import the very modules that this process has, whatever lies in the working directory.
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let no signal come in between, as of the start of a process and our knowing of it: nobody would stop it then."""
    came: list[int] = []

    def hold_back(number: int, _frame: object) -> None:
        came.append(number)

    before = {number: signal.signal(number, hold_back) for number in STOPPING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in came:
        signal.raise_signal(late)


def _stop(worker: subprocess.Popen[bytes]) -> None:
    if not has_ended(worker):
        worker.terminate()
    try:
        worker.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
