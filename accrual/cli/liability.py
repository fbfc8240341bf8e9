"""``accrual liability``: what the programme owes its members, and how it came to."""

from __future__ import annotations

import argparse
from decimal import Decimal, InvalidOperation

from accrual.cli.arguments import (
    Commands,
    add_command,
    add_settings,
    log_to_stderr,
    settings_of,
    write_json,
    write_lines,
)
from accrual.cli.days import add_day
from accrual.errors import UsageError
from accrual.rulebook import load

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "liability",
        "report the points outstanding by state and age, at fair value, and their movement in a period",
        "accrual liability --rulebook rulebook.toml --database postgresql://localhost/book --from 2026-11-01 "
        "--to 2026-11-30 --breakage 0.12 --format csv",
        _run,
    )
    add_settings(parser, "rulebook", "database", "log_level")
    add_day(parser, "from", "the first day of the period")
    add_day(parser, "to", "its last day, at the end of which points are outstanding")
    parser.add_argument(
        "--basis",
        choices=("posting", "business"),
        default="posting",
        help="the day that a movement belongs to: that of its posting, so that a period that is over never changes, or "
        "the business day that it is about; default: posting",
    )
    parser.add_argument(
        "--breakage", type=_share, default=Decimal(0), metavar="SHARE", help="share never spent, 0 to 1; default: 0"
    )
    parser.add_argument(
        "--format",
        choices=("jsonl", "csv", "parquet"),
        default="jsonl",
        help="how the report is written; default: jsonl",
    )
    parser.add_argument("--output", metavar="FILE", help="with --format parquet: the file to write")


def _share(text: str) -> Decimal:
    try:
        share = Decimal(text)
    except InvalidOperation:
        share = Decimal("nan")
    if not share.is_finite():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return share


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import open_book
    from accrual.book.liability import as_csv, as_parquet, liability

    settings = settings_of(parsed, "rulebook", "database")
    log_to_stderr(settings.log_level)
    rulebook = load(settings.rulebook)
    if (parsed.format == "parquet") != (parsed.output is not None):
        raise UsageError("--output: goes with --format parquet, and only with that")
    with open_book(settings.database) as connection:
        first_day = getattr(parsed, "from")
        lines = liability(connection, rulebook, first_day, parsed.to, breakage=parsed.breakage, basis=parsed.basis)
    if parsed.format == "parquet":
        as_parquet(lines, parsed.output)
    elif parsed.format == "csv":
        write_lines(as_csv(lines))
    else:
        write_json(lines)
    return 0
