"""``accrual expire``: what is left of lots whose time is over."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands
from accrual.cli.jobs import add_day_job, run_day_job

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    add_day_job(
        commands,
        "expire",
        "expire what is left of the lots whose expiry date is not after a day",
        _run,
        example="2027-11-15",
        day="lots that expire on this day or before",
    )


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import expire

    return run_day_job(
        parsed,
        lambda connection, _: expire(connection, parsed.day, by=parsed.by, dry_run=parsed.dry_run),
    )
