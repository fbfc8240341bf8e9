"""``accrual slow``: the refunds and late events that wait in the book."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of, until_told_to_stop
from accrual.cli.jobs import add_job_flags, report
from accrual.rulebook import load

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "slow",
        "deal with the refunds and late events that wait in the book",
        "accrual slow --rulebook rulebook.toml --redis redis://localhost:6379 --database postgresql://localhost/book "
        "--drain",
        _run,
    )
    add_settings(parser, "rulebook", "redis", "database", "refund_wait_hours", "backoff_limit_ms", "log_level")
    parser.add_argument("--drain", action="store_true", help="deal with what waits now, print what was done, then exit")
    add_job_flags(parser)


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import SlowService

    settings = settings_of(parsed, "rulebook", "redis", "database")
    log_to_stderr(settings.log_level)
    service = SlowService(settings, load(settings.rulebook), by=parsed.by)
    with until_told_to_stop() as stopping:
        if parsed.drain or parsed.dry_run:
            report(service.drain(stopping, dry_run=parsed.dry_run), dry_run=parsed.dry_run)
        else:
            service.run(stopping)
    return 0
