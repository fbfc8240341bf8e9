"""``accrual confirm``: a reviewer takes back what a frozen member holds."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of
from accrual.cli.days import add_day
from accrual.cli.verdicts import add_verdict_flags, send_and_report
from accrual.errors import UsageError
from accrual.stream import StreamServer

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "confirm",
        "take back the held points of a member, and block the member",
        "accrual confirm --database postgresql://localhost/book --redis redis://localhost:6379 --member m1 "
        "--reason device_farm --by alice\n"
        "  accrual confirm --database postgresql://localhost/book --redis redis://localhost:6379 --member m1 "
        "--reason device_farm --by alice --claw-back-from 2026-11-01 --claw-back-to 2026-11-15",
        _run,
    )
    add_settings(parser, "database", "redis", "log_level")
    add_verdict_flags(parser)
    add_day(
        parser,
        "claw-back-from",
        "with --claw-back-to: the first business day of a span of which the points that are left are taken back too",
        required=False,
    )
    add_day(parser, "claw-back-to", "the last day of that span", required=False)


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import confirm, open_book

    settings = settings_of(parsed, "database", "redis")
    log_to_stderr(settings.log_level)
    first, last = parsed.claw_back_from, parsed.claw_back_to
    if (first is None) != (last is None):
        raise UsageError("--claw-back-from, --claw-back-to: both or neither")
    server = StreamServer(settings.redis)
    with open_book(settings.database) as connection:
        verdict = confirm(
            connection,
            parsed.member,
            reason=parsed.reason,
            by=parsed.by,
            note=parsed.note,
            claw_back=None if first is None else (first, last),
            partition=parsed.partition,
            dry_run=parsed.dry_run,
        )
        send_and_report(connection, server, verdict, dry_run=parsed.dry_run)
    return 0
