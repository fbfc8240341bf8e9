"""``accrual replay``: decide a file of events without a server, in bounded memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, Final

from accrual.cli.arguments import Commands, add_command
from accrual.engine import OFFLINE_SLACK_DAYS, DeadLetter, Decision, Engine, StreamEntry, open_engine, outcome_line
from accrual.errors import InvalidEvent
from accrual.events import arrival_of, mapping_from_json
from accrual.events.text import compact_from_mapping
from accrual.rulebook import load

__all__ = ["add", "outcome_lines"]

BATCH_LINES: Final = 4096
RECLAIM_BATCHES: Final = 64
READ_BYTES: Final = 1 << 20
MAXIMUM_LINE_BYTES: Final = 16 << 20


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "replay",
        "decide a file of events, without a server",
        "accrual replay --rulebook rulebook.toml events.jsonl > outcomes.jsonl",
        _run,
    )
    parser.add_argument("--rulebook", metavar="FILE", required=True, help="file with the rulebook")
    parser.add_argument(
        "--engine",
        choices=("fast", "reference"),
        default="fast",
        help="the compiled engine, or the plain one that it is checked against; default: fast",
    )
    parser.add_argument("events", metavar="EVENTS.jsonl", help='events, one JSON object per line; "-" reads stdin')


def _run(parsed: argparse.Namespace) -> int:
    engine = open_engine(parsed.engine, load(parsed.rulebook), slack_days=OFFLINE_SLACK_DAYS)
    with ExitStack() as stack:
        file = sys.stdin.buffer if parsed.events == "-" else stack.enter_context(Path(parsed.events).open("rb"))
        for line in outcome_lines(engine, read_lines(file)):
            sys.stdout.buffer.write(line + b"\n")
    return 0


def outcome_lines(engine: Engine, lines: Iterable[bytes | None]) -> Iterator[bytes]:
    """Decide ``lines`` of JSON in order and yield one line of outcome for each; ``None`` is a line that is too long.

    Memory is bounded: every so many batches, what lies more than the engine's slack before the middle one of the latest
    arrivals is dropped. The middle one, because a single arrival may be of any time, the engine being right about it.
    """
    numbered = enumerate(lines, start=1)
    for turn in count(1):
        batch = list(islice(numbered, BATCH_LINES))
        if not batch:
            return
        entries, spoiled = _entries(batch)
        decided = engine.decide_entries(entries).decisions() if entries else iter(())
        for number, _ in batch:
            yield outcome_line(spoiled[number] if number in spoiled else next(decided)[1], line=number)
        if entries and turn % RECLAIM_BATCHES == 0:
            arrivals = sorted(entry.ms for entry in entries)
            engine.reclaim(engine.rulebook.calendar.day(arrivals[len(arrivals) // 2]))


def _entries(lines: list[tuple[int, bytes | None]]) -> tuple[list[StreamEntry], dict[int, Decision]]:
    """Return the stream entries that would have brought the events, and the dead letters of lines that have none."""
    entries, spoiled = list[StreamEntry](), dict[int, Decision]()
    for number, line in lines:
        try:
            entries.append(_entry(number, line))
        except InvalidEvent as error:
            spoiled[number] = DeadLetter(None, "invalid", str(error))
    return entries, spoiled


def _entry(number: int, line: bytes | None) -> StreamEntry:
    """Return the stream entry that would have brought the event of ``line`` at its arrival."""
    if line is None:
        raise InvalidEvent(f"the line has more than {MAXIMUM_LINE_BYTES} bytes")
    fields = mapping_from_json(line)
    return StreamEntry(arrival_of(fields), number, ((b"e", compact_from_mapping(fields)),))


def read_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines of ``file`` without their ends; ``None`` for one of more than ``MAXIMUM_LINE_BYTES``."""
    pending: list[bytes] = []
    size = 0
    while chunk := file.read(READ_BYTES):
        first, *others = chunk.split(b"\n")
        size += len(first)
        pending.append(first)
        if others:
            yield b"".join(pending) if size <= MAXIMUM_LINE_BYTES else None
            yield from others[:-1]
            pending, size = [others[-1]], len(others[-1])
        elif size > MAXIMUM_LINE_BYTES:
            pending.clear()
    if size:
        yield b"".join(pending) if size <= MAXIMUM_LINE_BYTES else None
