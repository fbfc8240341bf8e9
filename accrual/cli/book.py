"""``accrual book``: follow the ledgers of partitions into the book."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of, until_told_to_stop
from accrual.rulebook import load

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "book",
        "post the ledgers of one or many partitions (a,b,c) to the book in PostgreSQL",
        "accrual book --rulebook rulebook.toml --redis redis://localhost:6379 --database postgresql://localhost/book "
        "--partition city-1",
        _run,
    )
    add_settings(
        parser, "rulebook", "redis", "database", "partition", "require_durable", "backoff_limit_ms", "log_level"
    )
    parser.add_argument(
        "--drain", action="store_true", help="post up to the end of the ledger as it is at the start, then exit"
    )


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import BookService

    settings = settings_of(parsed, "rulebook", "redis", "database", "partition")
    log_to_stderr(settings.log_level)
    load(settings.rulebook)
    with until_told_to_stop() as stopping:
        BookService(settings, drain=parsed.drain).run(stopping)
    return 0
