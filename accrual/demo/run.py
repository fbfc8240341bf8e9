"""The demo from end to end: a server, the member day on its stream, a worker, and what became of it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from accrual.demo import RULEBOOK
from accrual.demo.bookkeeping import Booked, keep_the_book
from accrual.demo.drain import Drained, drain
from accrual.demo.feed import feed
from accrual.demo.memberday import DAY_START_MS, MAXIMUM_SCALE, MemberDay, generate
from accrual.demo.summary import Summary, summarise
from accrual.embedded import EmbeddedDatabase, EmbeddedServer, Options
from accrual.errors import UsageError
from accrual.rulebook import load
from accrual.stream import Checkpoint, Keys

if TYPE_CHECKING:
    from accrual.demo.screen import Screen

__all__ = [
    "PARTITION",
    "command_line",
    "keep_book",
    "make_day",
    "new_directory",
    "open_screen",
    "open_server",
    "run",
    "wait",
]

PARTITION: Final = "demo"
LOOK_INTERVAL_S: Final = 0.2

# As in production: what a commit wrote is on the disk a second later at most. The file begins empty and is read once
# or never, so that rewriting it would only take the second core from the worker.
SERVER_OPTIONS: Final[Options] = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "auto-aof-rewrite-percentage": 0,
}


def open_screen() -> Screen:
    """Return what shows the demo to a person. Raises ``UsageError`` where rich is not installed."""
    try:
        from accrual.demo.screen import Screen
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise UsageError("rich is not installed, and it shows the demo: pip install 'accrual[demo]'") from None
    return Screen()


def new_directory(directory: Path | None) -> Path:
    """Make the directory of a run, by default one of its own below ``demo-data``.

    Raises ``UsageError`` where there is something in it: a server would take it for its data.
    """
    directory = directory or Path("demo-data", time.strftime("%Y%m%d-%H%M%S"))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory}: is not an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    # What the demo leaves in a checkout is nobody's to commit.
    (directory / ".gitignore").write_text("*\n", encoding="utf-8")
    return directory


def open_server(directory: Path, *, with_data: bool) -> EmbeddedServer:
    """Return the server of ``directory``, not started. Raises ``UsageError`` where ``with_data`` it has none."""
    if with_data and not (directory / "appendonlydir").is_dir():
        raise UsageError(f"{directory}: has no data of a demo")
    return EmbeddedServer(SERVER_OPTIONS, directory=directory)


def make_day(scale: int, seed: int, screen: Screen) -> MemberDay:
    """Return the member day of ``scale`` districts. Raises ``UsageError`` where there cannot be so many."""
    if scale > MAXIMUM_SCALE:
        raise UsageError(f"--scale: {scale} is more than {MAXIMUM_SCALE}")
    with screen.stage("making the member day"):
        day = generate(scale, seed)
    screen.say(
        f"day: {len(day):,} events of {day.truth.members:,} shoppers, made from the grocery baskets of the package "
        "completejourney (accrual/demo/data/README.md says what they are), with actions, accidents and abusers added"
    )
    return day


def run(day: MemberDay, server: EmbeddedServer, screen: Screen) -> Summary:
    """Stream ``day`` into the running ``server``, run the worker on it, and show and return what became of it.

    Raises ``StreamError`` where the server or the worker fails; a ledger that is broken is told in the summary.
    """
    rulebook = load(RULEBOOK)
    keys = Keys(PARTITION)
    client = server.client()
    screen.say(f"server: {server.url}, a Valkey of our own with its append-only file in {server.directory}")
    _feed(day, server, keys, screen)
    drained = _drain(day, server, keys, screen)
    started_s = time.monotonic()
    with screen.stage("reading and verifying the ledger"):
        summary = summarise(client, keys, rulebook, day.truth)
    screen.say(
        f"ledger: {summary.entries:,} entries in {summary.checkpoint.batch:,} batches, read and verified in "
        f"{time.monotonic() - started_s:.1f} s"
    )
    screen.show(summary, drained, rulebook)
    size_bytes = sum(path.stat().st_size for path in server.directory.rglob("*") if path.is_file())
    data = f"data ({size_bytes / 1e6:,.0f} MB, to be deleted when nobody needs them)"
    where = f"The ledger is the stream {keys.ledger} of the server whose {data} are in"
    screen.show_lines(["", where, f"  {server.directory}"])
    return summary


def keep_book(server: EmbeddedServer, database: EmbeddedDatabase, screen: Screen) -> Booked:
    """Take what ``run`` left on ``server`` into the book in the running ``database``, and show and return it."""
    rulebook = load(RULEBOOK)
    screen.say(f"database: {database.url}, a PostgreSQL of our own")
    with screen.stage("posting, settling and auditing the book"):
        booked = keep_the_book(server, database, PARTITION, rulebook, rulebook.calendar.day(DAY_START_MS))
    screen.say(
        f"book: {booked.entries:,} entries posted in {booked.ingest_s:.1f} s, {booked.settled_members:,} members "
        f"settled in {booked.settle_s:.1f} s, audited in {booked.audit_s:.1f} s"
    )
    screen.show_book(booked)
    return booked


def wait(server: EmbeddedServer, screen: Screen, database: EmbeddedDatabase | None = None) -> None:
    """Say how to look at what the running server and database have, and let them run until Ctrl-C."""
    at = f"--redis {server.url} --partition {PARTITION}"
    looks = [f"  {command_line(command)} {at} | head" for command in ("ledger", "deadletters")]
    if database is not None:
        looks += [f"  {command_line('held')} --database '{database.url}' | head"]
    screen.show_lines(["", "It runs until Ctrl-C. Meanwhile, in another terminal:", *looks])
    try:
        while server.running:
            time.sleep(LOOK_INTERVAL_S)
    except KeyboardInterrupt:
        screen.say("stopping")


def command_line(*words: str) -> str:
    """Return a command of ours as it can be typed where the demo was: with the program's path if it is on none."""
    installed = Path(sys.executable).with_name("accrual")
    if shutil.which("accrual"):
        program = ["accrual"]
    elif installed.exists():
        program = [min(str(installed), os.path.relpath(installed), key=len)]
    else:
        program = [sys.executable, "-m", "accrual.cli"]
    return shlex.join([*program, *words])


def _feed(day: MemberDay, server: EmbeddedServer, keys: Keys, screen: Screen) -> None:
    started_s = time.monotonic()
    with screen.stage("streaming the member day", len(day), "to go") as stage:
        feed(day, keys, server.unix_socket_path, stage.reached)
    duration_s = time.monotonic() - started_s
    screen.say(f"stream: {len(day):,} events in {duration_s:.1f} s ({len(day) / duration_s:,.0f}/s), one entry each")


def _drain(day: MemberDay, server: EmbeddedServer, keys: Keys, screen: Screen) -> Drained:
    with screen.stage("the worker decides and commits", len(day), "lag") as stage:

        def look(checkpoint: Checkpoint) -> None:
            stage.reached(checkpoint.events)

        log_path = server.directory / "worker.log"
        drained = drain(server.client(), keys, server.unix_url, RULEBOOK, log_path, look)
    screen.say(
        f"worker: {drained.events:,} events in {drained.duration_s:.2f} s ({drained.events_per_s:,}/s), committed in "
        f"{drained.batches:,} batches"
    )
    return drained
