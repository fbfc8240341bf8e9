"""``accrual book``: follow the ledgers of partitions into the book."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import (
    Commands,
    add_command,
    add_settings,
    log_to_stderr,
    settings_of,
    until_told_to_stop,
    write_json,
)
from accrual.errors import UsageError
from accrual.rulebook import load

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "book",
        "post the ledgers of one or many partitions (a,b,c) to the book in PostgreSQL",
        "accrual book --rulebook rulebook.toml --redis redis://localhost:6379 --database postgresql://localhost/book "
        "--partition city-1\n  accrual book rebuild --database postgresql://localhost/book",
        _run,
    )
    add_settings(
        parser, "rulebook", "redis", "database", "partition", "require_durable", "backoff_limit_ms", "log_level"
    )
    parser.add_argument(
        "deed",
        nargs="?",
        choices=("rebuild",),
        help="rebuild: make balances, lots, states and days anew from the facts, and exit 1 where they differ",
    )
    parser.add_argument(
        "--drain", action="store_true", help="post up to the end of the ledger as it is at the start, then exit"
    )
    parser.add_argument(
        "--by", metavar="WHO", default="operator", help="with rebuild: who has it done; default: operator"
    )
    parser.add_argument("--member", metavar="M", help="with rebuild: of this member only")
    parser.add_argument("--dry-run", action="store_true", help="with rebuild: say what differs, and change nothing")


def _run(parsed: argparse.Namespace) -> int:
    return _rebuild(parsed) if parsed.deed == "rebuild" else _follow(parsed)


def _rebuild(parsed: argparse.Namespace) -> int:
    """Make the projections anew and print what differed; that is something wrong, even though it is mended now."""
    from accrual.book import open_book, rebuild

    settings = settings_of(parsed, "database")
    with open_book(settings.database) as connection:
        return 1 if write_json(rebuild(connection, by=parsed.by, member=parsed.member, dry_run=parsed.dry_run)) else 0


def _follow(parsed: argparse.Namespace) -> int:
    from accrual.book import BookService

    if parsed.dry_run or parsed.member is not None:
        raise UsageError("--dry-run, --member: go with rebuild, and only with that")
    settings = settings_of(parsed, "rulebook", "redis", "database", "partition")
    log_to_stderr(settings.log_level)
    load(settings.rulebook)
    with until_told_to_stop() as stopping:
        BookService(settings, drain=parsed.drain).run(stopping)
    return 0
