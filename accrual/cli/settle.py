"""``accrual settle``: make the pending points of a business day available."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of
from accrual.cli.days import add_day
from accrual.cli.jobs import add_job_flags, report
from accrual.rulebook import load

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "settle",
        "make the pending points of a business day available",
        "accrual settle --rulebook rulebook.toml --database postgresql://localhost/book --day 2026-11-15",
        _run,
    )
    add_settings(parser, "rulebook", "database", "log_level")
    add_day(parser, "day", "the business day to settle")
    add_job_flags(parser)


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import open_book, settle

    settings = settings_of(parsed, "rulebook", "database")
    log_to_stderr(settings.log_level)
    rulebook = load(settings.rulebook)
    with open_book(settings.database) as connection:
        report(settle(connection, rulebook, parsed.day, by=parsed.by, dry_run=parsed.dry_run), dry_run=parsed.dry_run)
    return 0
