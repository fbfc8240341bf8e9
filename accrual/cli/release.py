"""``accrual release``: a reviewer lets a frozen member go on."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of
from accrual.cli.days import add_day
from accrual.cli.verdicts import add_verdict_flags, send_and_report

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "release",
        "release the held points of a member, and the member",
        "accrual release --database postgresql://localhost/book --redis redis://localhost:6379 --member m1 "
        "--reason checked --by alice --immune-until 2026-12-01",
        _run,
    )
    add_settings(parser, "database", "redis", "log_level")
    add_verdict_flags(parser)
    add_day(parser, "immune-until", "no limit freezes or holds the member before this day begins", required=False)


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import day_start_ms, open_book, release

    settings = settings_of(parsed, "database", "redis")
    log_to_stderr(settings.log_level)
    immunity = None
    with open_book(settings.database) as connection:
        if parsed.immune_until is not None:
            immunity = day_start_ms(connection, parsed.immune_until)
        verdict = release(
            connection,
            parsed.member,
            reason=parsed.reason,
            by=parsed.by,
            note=parsed.note,
            immune_until_ms=immunity,
            dry_run=parsed.dry_run,
        )
        send_and_report(connection, settings.redis, verdict, dry_run=parsed.dry_run)
    return 0
