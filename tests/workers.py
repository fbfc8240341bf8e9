"""Workers and commands as the tests run them: real processes, and what the reference engine expects of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

import redis

from accrual import stream
from accrual.engine import STREAM_SLACK_DAYS, DeadLetter, Entry, Position, ReferenceEngine, Secret, StreamEntry
from accrual.events import encode_compact, validate
from accrual.ledger import LedgerReader, entry_line
from accrual.rulebook import Rulebook, parse
from accrual.stream import Checkpoint, Keys
from servers import Server

__all__ = [
    "NOON_MS",
    "ROOT",
    "RULEBOOK",
    "SECRET",
    "Expected",
    "WorkerProcess",
    "checkpoint_of",
    "command",
    "compact",
    "dead_letter_lines",
    "expected",
    "fill",
    "ledger_output",
    "ledger_rows",
    "order",
    "orders",
    "stream_entries",
    "wait_for_batch",
    "wait_for_events",
    "wait_until",
]

ROOT: Final = Path(__file__).resolve().parents[1]
NOON_MS: Final = 1_794_715_200_000
SECRET: Final = Secret(bytes(range(16)))

RULEBOOK: Final = """\
[programme]
name = "test"
version = 1
timezone = "Asia/Shanghai"

[[earn]]
kind = "order_paid"
points_per_yuan = "1"
category_rates = { fresh = "2" }

[[earn]]
kind = "checkin"
points = 5
max_per_day = 1

[[campaign]]
id = "member-day"
multiplier = "2"
days_of_month = [15]

[[limit]]
id = "device-burst"
key = "device"
measure = "events"
window = "60s"
max = 5
action = "hold"

[[limit]]
id = "daily-points"
key = "member"
measure = "points"
window = "day"
max = 2000
action = "clamp"
"""

Fields = dict[str, bytes]


def order(number: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a plausible order; the same ``number`` gives the same one."""
    return {
        "id": f"order-{number}",
        "kind": "order_paid",
        "member": f"会员-{number * 7919 % 97}",
        "ts": NOON_MS + number,
        "amount": 100 + number * 31 % 5000,
        "order": f"o-{number}",
        "device": f"device-{number * 104_729 % 61}",
        "ip": f"10.0.{number % 7}.{number % 251}",
        "phone": f"138{number * 7919 % 97:08d}",
    } | fields


def compact(event: dict[str, Any]) -> bytes:
    """Return the compact form of an event."""
    return encode_compact(validate(event))


def fill(client: redis.Redis, partition: str, entries: Iterable[tuple[str, Fields]]) -> None:
    """Add stream entries with explicit IDs."""
    pipeline = client.pipeline(transaction=False)
    for number, (stream_id, fields) in enumerate(entries):
        pipeline.xadd(Keys(partition).events, fields, id=stream_id)  # type: ignore[arg-type]
        if number % 1000 == 999:
            pipeline.execute()
    pipeline.execute()


def orders(first: int, last: int) -> Iterator[tuple[str, Fields]]:
    """Yield compact orders as stream entries: one event each."""
    for number in range(first, last):
        yield f"{NOON_MS + number}-0", {"e": compact(order(number))}


def stream_entries(client: redis.Redis, partition: str) -> list[StreamEntry]:
    """Return the events stream as it is, with fields in order and names that may repeat."""
    return list(stream.entries_after(client, Keys(partition), stream.START, None))


class Expected:
    """What the reference engine decides: the ledger's rows and lines, and the dead letters."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Position, Entry]] = []
        self.dead_letters: list[tuple[Position, DeadLetter]] = []
        self.duplicates = 0

    @property
    def ledger(self) -> bytes:
        """The output of ``accrual ledger``."""
        return b"".join(entry_line(*row) + b"\n" for row in self.rows)


def expected(
    entries: Sequence[StreamEntry],
    rulebook: Rulebook | str = RULEBOOK,
    secret: Secret = SECRET,
    adoptions: dict[tuple[int, int], Rulebook] | None = None,
) -> Expected:
    """Decide ``entries`` one by one; ``adoptions`` says after which stream ID another rulebook is in force."""
    engine = ReferenceEngine(parse(rulebook) if isinstance(rulebook, str) else rulebook, secret, STREAM_SLACK_DAYS)
    result = Expected()
    for entry in entries:
        for position, decision in engine.decide_entries([entry]).decisions():
            if isinstance(decision, Entry):
                result.rows.append((len(result.rows) + 1, position, decision))
            elif isinstance(decision, DeadLetter):
                result.dead_letters.append((position, decision))
            else:
                result.duplicates += 1
        if adoptions and (entry.ms, entry.seq) in adoptions:
            engine.adopt(adoptions[entry.ms, entry.seq])
    return result


def checkpoint_of(client: redis.Redis, partition: str) -> Checkpoint:
    """Return the checkpoint of a partition."""
    return stream.checkpoint_of(client, Keys(partition))


def ledger_rows(client: redis.Redis, partition: str) -> list[tuple[int, Position, Entry]]:
    """Return the committed entries, with all that the ledger keeps of them, verified."""
    return list(LedgerReader(client, partition).entries())


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Wait until ``condition`` holds; fail saying ``what`` did not happen."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s} s: {what}")
        time.sleep(0.01)


def wait_for_batch(client: redis.Redis, number: int, partition: str = "p") -> None:
    """Wait until a batch behind ``number`` has landed."""
    wait_until(lambda: checkpoint_of(client, partition).batch > number, f"a batch behind {number} lands")


def wait_for_events(client: redis.Redis, events: int, partition: str = "p") -> None:
    """Wait until exactly ``events`` have been committed."""
    wait_until(lambda: checkpoint_of(client, partition).events == events, f"{events} events are committed")


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a command: this one's, without the user's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCRUAL_")}
    return kept | variables


def command(
    *arguments: str | Path, timeout_s: float = 60.0, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run ``accrual`` with ``arguments`` and return what came out."""
    return subprocess.run(
        [sys.executable, "-m", "accrual.cli", *map(str, arguments)],
        cwd=ROOT,
        env=environment(**(variables or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


def ledger_output(server: Server, partition: str) -> bytes:
    """Return what ``accrual ledger`` prints."""
    done = command("ledger", "--redis", server.url, "--partition", partition)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def dead_letter_lines(server: Server, partition: str, *flags: str) -> list[dict[str, Any]]:
    """Return what ``accrual deadletters`` prints, decoded."""
    done = command("deadletters", "--redis", server.url, "--partition", partition, *flags)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


class WorkerProcess:
    """A worker as a process of its own; it is killed at the end of the ``with`` block if it still runs.

    ``flags`` go to the command. The secret is the tests' own unless ``secret`` says otherwise. ``program`` is what the
    interpreter runs: the command line, or a program of the tests around it.
    """

    def __init__(
        self,
        url: str,
        partition: str,
        rulebook: Path,
        *flags: str,
        secret: Secret | None = SECRET,
        engine: str = "fast",
        lease_ms: int = 400,
        program: Sequence[str] = ("-m", "accrual.cli"),
    ) -> None:
        variables = {} if secret is None else {"ACCRUAL_SECRET": secret.key.hex()}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait()
        self.process = subprocess.Popen(
            [
                *(sys.executable, *program, "worker", "--redis", url, "--partition", partition),
                *("--rulebook", str(rulebook), "--engine", engine, "--lease-ms", str(lease_ms), *flags),
            ],
            cwd=ROOT,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        self._said = ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait(timeout_s)
        if not self._log.closed:
            self._said = self.said
            self._log.close()
        return status

    @property
    def said(self) -> str:
        """What the worker has said on stderr so far."""
        return self._said if self._log.closed else os.pread(self._log.fileno(), 1 << 30, 0).decode()

    @property
    def log(self) -> str:
        """What the worker said on stderr; waits for its end."""
        self.wait()
        return self.said

    def finish(self) -> int:
        """Ask it to end (SIGTERM) and return the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.signal(signal.SIGCONT)
        self.wait()
