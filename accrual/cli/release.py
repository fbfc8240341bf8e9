"""``accrual release``: a reviewer lets a frozen member go on."""

from __future__ import annotations

import argparse
from datetime import UTC, date, datetime, timedelta
from typing import Final

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of
from accrual.cli.verdicts import add_verdict_flags, send_and_report
from accrual.rulebook import day_number
from accrual.stream import StreamServer

__all__ = ["add"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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
    parser.add_argument(
        "--immune-until",
        metavar="TIME",
        type=_time,
        help="no limit freezes or holds the member before: the beginning of a business day, 2026-12-01, a time, "
        "2026-12-01T08:00:00Z, or ms since 1970",
    )


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import day_start_ms, open_book, release

    settings = settings_of(parsed, "database", "redis")
    log_to_stderr(settings.log_level)
    server = StreamServer(settings.redis)
    with open_book(settings.database) as connection:
        immunity = parsed.immune_until
        if isinstance(immunity, date):
            immunity = day_start_ms(connection, day_number(immunity))
        verdict = release(
            connection,
            parsed.member,
            reason=parsed.reason,
            by=parsed.by,
            note=parsed.note,
            immune_until_ms=immunity,
            partition=parsed.partition,
            dry_run=parsed.dry_run,
        )
        send_and_report(connection, server, verdict, dry_run=parsed.dry_run)
    return 0


def _time(text: str) -> int | date:
    """Return a time in ms, or a day whose beginning depends on the programme's zone."""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        if len(text) == len("YYYY-MM-DD"):
            day = date.fromisoformat(text)
            if day < EPOCH.date():
                raise ValueError
            return day
        return (datetime.fromisoformat(text) - EPOCH) // timedelta(milliseconds=1)
    except (ValueError, TypeError):
        # A time without an offset from UTC cannot be compared with one that has it.
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a date, nor a time with its offset from UTC, nor a number of ms"
        ) from None
