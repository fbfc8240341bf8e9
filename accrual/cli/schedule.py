"""``accrual jobs``: all the jobs of the book, each when it is time."""

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
from accrual.rulebook import load

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "jobs",
        "do the jobs of the book, each when it is time: slow, settle, remind, expire, and send what they have to tell",
        "accrual jobs --rulebook rulebook.toml --redis redis://localhost:6379 --database postgresql://localhost/book",
        _run,
    )
    intervals = [f"{job}_interval_s" for job in ("slow", "settle", "remind", "expire", "outbox")]
    add_settings(
        parser, "rulebook", "redis", "database", "refund_wait_hours", *intervals, "backoff_limit_ms", "log_level"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="do each job once, print what it did, then exit")
    how.add_argument(
        "--dry-run", action="store_true", help="print what each job would do now, change nothing, then exit"
    )


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import Scheduler

    settings = settings_of(parsed, "rulebook", "redis", "database")
    log_to_stderr(settings.log_level)
    scheduler = Scheduler(settings, load(settings.rulebook))
    with until_told_to_stop() as stopping:
        if parsed.once or parsed.dry_run:
            write_json(scheduler.dry_run(stopping) if parsed.dry_run else scheduler.run_once(stopping))
        else:
            scheduler.run(stopping)
    return 0
