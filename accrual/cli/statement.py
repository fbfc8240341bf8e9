"""``accrual statement``: a member's postings, newest first, in words."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, positive, settings_of, write_json
from accrual.cli.days import add_day
from accrual.rulebook import day_text

__all__ = ["add"]


KINDS = (
    "accrue",
    "late",
    "settle",
    "release",
    "confirm",
    "refund",
    "clawback",
    "expire",
    "adjust",
    "redeem",
    "correct",
)
ACCOUNTS = ("pending", "available", "held", "issuance", "expired", "redeemed")


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "statement",
        "print the postings of a member as JSON lines, newest first, each explained",
        "accrual statement --database postgresql://localhost/book --member m1 --kind refund",
        _run,
    )
    add_settings(parser, "database")
    parser.add_argument("--member", metavar="M", required=True, help="the member; an unknown one has no postings")
    parser.add_argument("--kind", choices=KINDS, help="only postings of this kind")
    parser.add_argument("--state", choices=ACCOUNTS, help="only points that went to this account or came from it")
    add_day(parser, "from", "only points of this business day and later", required=False)
    add_day(parser, "to", "only points of this business day and earlier", required=False)
    parser.add_argument("--limit", type=positive, metavar="N", help="at most so many, the newest; default: all")


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import open_book, statement

    settings = settings_of(parsed, "database")
    first, last = (None if day is None else day_text(day) for day in (getattr(parsed, "from"), parsed.to))
    with open_book(settings.database) as connection:
        lines = statement(
            connection,
            parsed.member,
            kind=parsed.kind,
            account=parsed.state,
            first_day=first,
            last_day=last,
            limit=parsed.limit,
        )
        write_json(lines)
    return 0
