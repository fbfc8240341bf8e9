"""``accrual remind``: tell members of points that are about to expire."""

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
        "remind",
        "write messages to members whose points are about to expire, each once; `accrual jobs` or `accrual slow` sends "
        "them",
        "accrual remind --rulebook rulebook.toml --database postgresql://localhost/book --day 2027-11-15",
        _run,
    )
    add_settings(parser, "rulebook", "database", "log_level")
    add_day(parser, "day", "the day from which expiry_reminder_days of the rulebook count")
    add_job_flags(parser)


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import open_book, remind

    settings = settings_of(parsed, "rulebook", "database")
    log_to_stderr(settings.log_level)
    rulebook = load(settings.rulebook)
    with open_book(settings.database) as connection:
        report(remind(connection, rulebook, parsed.day, by=parsed.by, dry_run=parsed.dry_run), dry_run=parsed.dry_run)
    return 0
