"""``accrual deadletters``: what could not be decided, and sending it again."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from typing import get_args

import redis

from accrual.cli.arguments import Commands, add_command, add_settings, positive, settings_of, write_lines
from accrual.errors import StreamError, UsageError
from accrual.outcomes import DeadLetterReason
from accrual.stream import Keys, StoredLetter, StreamServer, last_letter, read_letters, redrive

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "deadletters",
        "print the dead letters as JSON lines, or send them again",
        "accrual deadletters --redis redis://localhost:6379 --partition city-1 --reason unknown_kind\n"
        "  accrual deadletters --redis redis://localhost:6379 --partition city-1 --reason unknown_kind --redrive\n"
        "  accrual deadletters --redis redis://localhost:6379 --partition city-1 --reason unknown_kind --redrive "
        "--execute --rate 50",
        _run,
    )
    add_settings(parser, "redis", "partition")
    parser.add_argument("--reason", choices=get_args(DeadLetterReason), help="only those with this reason")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most so many; default: all")
    parser.add_argument(
        "--redrive",
        action="store_true",
        help="send them again as new stream entries; without --execute, only show them",
    )
    parser.add_argument(
        "--execute",
        action="store_true",
        help="with --redrive: do it; each leaves the dead letters as it enters the stream",
    )
    parser.add_argument(
        "--rate", type=positive, metavar="N", default=100, help="with --execute: so many per second; default: 100"
    )


def _run(parsed: argparse.Namespace) -> int:
    if parsed.execute and not parsed.redrive:
        raise UsageError("--execute: goes with --redrive, and only with that")
    settings = settings_of(parsed, "redis", "partition")
    keys = Keys(settings.partition)
    with StreamServer(settings.redis).client() as client:
        # What fails again while we are at it becomes a new dead letter; it must not be sent round and round.
        letters = read_letters(client, keys, last_letter(client, keys), parsed.reason)
        letters = itertools.islice(letters, parsed.limit)
        if not parsed.redrive:
            write_lines(letter.line() for letter in letters)
        elif not parsed.execute:
            count = write_lines(letter.line() for letter in letters)
            print(f"dry run: {count} dead letters would be sent again; add --execute to do it", file=sys.stderr)
        else:
            count = write_lines(_redriven(client, keys, letters, parsed.rate))
            print(f"{count} dead letters were sent again", file=sys.stderr)
    return 0


def _redriven(client: redis.Redis, keys: Keys, letters: Iterator[StoredLetter], rate: int) -> Iterator[bytes]:
    """Send ``letters`` again, at most ``rate`` a second, and yield a line for each that was."""
    for letter in letters:
        started_s = time.monotonic()
        if not letter.can_be_redriven:
            raise StreamError(
                f"dead letter {letter.entry_id} has too many fields to be sent again; it would stay invalid"
            )
        stream_id = redrive(client, keys, letter)
        if stream_id is None:
            continue
        yield letter.line(redriven=stream_id)
        time.sleep(max(0.0, started_s + 1 / rate - time.monotonic()))
