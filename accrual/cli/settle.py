"""``accrual settle``: make the pending points of a business day available."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands
from accrual.cli.jobs import add_day_job, run_day_job

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    add_day_job(
        commands,
        "settle",
        "make the pending points of a business day available",
        _run,
        example="2026-11-15",
        day="the business day to settle",
    )


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import settle

    return run_day_job(
        parsed,
        lambda connection, rulebook: settle(connection, rulebook, parsed.day, by=parsed.by, dry_run=parsed.dry_run),
    )
