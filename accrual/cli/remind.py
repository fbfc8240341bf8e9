"""``accrual remind``: tell members of points that are about to expire."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands
from accrual.cli.jobs import add_day_job, run_day_job

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    add_day_job(
        commands,
        "remind",
        "write messages to members whose points are about to expire, each once; `accrual jobs` or `accrual slow` sends "
        "them",
        _run,
        example="2027-11-15",
        day="the day from which expiry_reminder_days of the rulebook count",
    )


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import remind

    return run_day_job(
        parsed,
        lambda connection, rulebook: remind(connection, rulebook, parsed.day, by=parsed.by, dry_run=parsed.dry_run),
    )
