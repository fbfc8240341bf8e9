"""The table of commands, and how one of them is run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Final

from accrual import __version__
from accrual.cli import BAD_USAGE, DONE, FOUND_SOMETHING_WRONG
from accrual.cli.arguments import Commands
from accrual.errors import AccrualError, RulebookError, UsageError

__all__ = ["run"]

# Each command, in the order of the help, and the module that has it.
COMMANDS: Final = {
    "check": "check",
    "replay": "replay",
    "worker": "worker",
    "ledger": "ledger",
    "deadletters": "deadletters",
    "rulebook": "rulebook",
    "archive": "archive",
    "book": "book",
    "jobs": "schedule",
    "slow": "slow",
    "settle": "settle",
    "remind": "remind",
    "expire": "expire",
    "adjust": "adjust",
    "held": "held",
    "release": "release",
    "confirm": "confirm",
    "balance": "balance",
    "statement": "statement",
    "exceptions": "exceptions",
    "audit": "audit",
    "liability": "liability",
    "demo": "demo",
}


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status. Its data goes to stdout, what is wrong to stderr, in one line."""
    # What the other commands need takes longer to import than most take to run.
    named = [name for name in arguments[:1] if name in COMMANDS]
    parsed = _parser(named or COMMANDS).parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone, which is their right; nothing may be flushed at exit any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except _foreseen() as error:
        print(f"accrual {parsed.command}: {_message(error)}", file=sys.stderr)
        return BAD_USAGE if isinstance(error, UsageError) else FOUND_SOMETHING_WRONG
    return status


def _foreseen() -> tuple[type[Exception], ...]:
    """Return the errors that say enough without a traceback."""
    import redis

    return AccrualError, redis.RedisError, OSError, MemoryError


def _message(error: Exception) -> str:
    """Return what is wrong, without a traceback."""
    import redis

    if isinstance(error, RulebookError):
        return "\n  ".join(error.findings)
    if isinstance(error, redis.AuthenticationError):
        return f"the server does not let us in: {error}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return " ".join(str(error).split()) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)


def _parser(names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accrual",
        description="Loyalty points: events in, points decided, ledger committed exactly once.",
        epilog="`accrual COMMAND --help` has an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"accrual {__version__}")
    commands: Commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        import_module(f"accrual.cli.{COMMANDS[name]}").add(commands)
    return parser
