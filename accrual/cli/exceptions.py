"""``accrual exceptions``: what waits for a person, and why."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, settings_of, write_json
from accrual.errors import UsageError

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "exceptions",
        "print what waits for a person as JSON lines, oldest first, or close one",
        "accrual exceptions --database postgresql://localhost/book\n"
        "  accrual exceptions --database postgresql://localhost/book --close 1234 --by alice --reason adjusted",
        _run,
    )
    add_settings(parser, "database")
    parser.add_argument("--all", action="store_true", help="print also those that were dealt with")
    parser.add_argument("--close", type=int, metavar="N", help="the number of one that has been dealt with")
    parser.add_argument("--by", metavar="WHO", help="with --close: who has dealt with it")
    parser.add_argument("--reason", metavar="CODE", help="with --close: how, as a code of A-Z a-z 0-9 _ . -")
    parser.add_argument("--note", metavar="TEXT", default="", help="with --close: how, in words")


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import close_exception, exceptions, open_book

    settings = settings_of(parsed, "database")
    with open_book(settings.database) as connection:
        if parsed.close is None:
            write_json(exceptions(connection, closed_too=parsed.all))
        elif parsed.by is None or parsed.reason is None:
            raise UsageError("--close: needs --by and --reason")
        else:
            close_exception(connection, parsed.close, by=parsed.by, reason=parsed.reason, note=parsed.note)
    return 0
