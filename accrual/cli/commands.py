"""The table of commands, and how one of them is run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import redis

from accrual import __version__
from accrual.cli import (
    BAD_USAGE,
    DONE,
    FOUND_SOMETHING_WRONG,
    adjust,
    archive,
    audit,
    balance,
    book,
    check,
    confirm,
    deadletters,
    demo,
    exceptions,
    expire,
    held,
    ledger,
    liability,
    release,
    remind,
    rulebook,
    schedule,
    settle,
    slow,
    statement,
    worker,
)
from accrual.cli.arguments import Commands, add_command
from accrual.errors import AccrualError, RulebookError, UsageError

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status. Its data goes to stdout, what is wrong to stderr, in one line."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone, which is their right; nothing may be flushed at exit any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (AccrualError, redis.RedisError, OSError, MemoryError) as error:
        print(f"accrual {parsed.command}: {_message(error)}", file=sys.stderr)
        return BAD_USAGE if isinstance(error, UsageError) else FOUND_SOMETHING_WRONG
    return status


def _message(error: Exception) -> str:
    """Return what is wrong, without a traceback."""
    if isinstance(error, RulebookError):
        return "\n  ".join(error.findings)
    if isinstance(error, redis.AuthenticationError):
        return f"the server does not let us in: {error}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return " ".join(str(error).split()) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accrual",
        description="Loyalty points: events in, points decided, ledger committed exactly once.",
        epilog="`accrual COMMAND --help` has an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"accrual {__version__}")
    commands: Commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    check.add(commands)
    _add_replay(commands)
    worker.add(commands)
    ledger.add(commands)
    deadletters.add(commands)
    rulebook.add(commands)
    archive.add(commands)
    for command in (
        book,
        schedule,
        slow,
        settle,
        remind,
        expire,
        adjust,
        held,
        release,
        confirm,
        balance,
        statement,
        exceptions,
        audit,
        liability,
    ):
        command.add(commands)
    demo.add(commands)
    return parser


def _add_replay(commands: Commands) -> None:
    parser = add_command(
        commands,
        "replay",
        "decide a file of events, without a server",
        "accrual replay --rulebook rulebook.toml events.jsonl > outcomes.jsonl",
        _replay,
    )
    parser.add_argument("--rulebook", metavar="FILE", required=True, help="file with the rulebook")
    parser.add_argument(
        "--engine",
        choices=("fast", "reference"),
        default="fast",
        help="the compiled engine, or the plain one that it is checked against; default: fast",
    )
    parser.add_argument("events", metavar="EVENTS.jsonl", help='events, one JSON object per line; "-" reads stdin')


def _replay(parsed: argparse.Namespace) -> int:
    from accrual.cli.replay import replay

    return replay(parsed.rulebook, parsed.events, parsed.engine)
