"""``accrual expire``: what is left of lots whose time is over."""

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
        "expire",
        "expire what is left of the lots whose expiry date is not after a day",
        "accrual expire --rulebook rulebook.toml --database postgresql://localhost/book --day 2027-11-15",
        _run,
    )
    add_settings(parser, "rulebook", "database", "log_level")
    add_day(parser, "day", "lots that expire on this day or before")
    add_job_flags(parser)


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import expire, open_book

    settings = settings_of(parsed, "rulebook", "database")
    log_to_stderr(settings.log_level)
    load(settings.rulebook)
    with open_book(settings.database) as connection:
        report(expire(connection, parsed.day, by=parsed.by, dry_run=parsed.dry_run), dry_run=parsed.dry_run)
    return 0
