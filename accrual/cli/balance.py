"""``accrual balance``: the points of a member."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, settings_of, write_json

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "balance",
        "print the points of a member, by account",
        "accrual balance --database postgresql://localhost/book --member m1",
        _run,
    )
    add_settings(parser, "database")
    parser.add_argument("--member", metavar="M", required=True, help="the member; an unknown one has no points")


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import open_book
    from accrual.book.texts import stored

    settings = settings_of(parsed, "database")
    with open_book(settings.database) as connection:
        row = connection.execute(
            "SELECT available, held, pending FROM book.balances WHERE member = %s", (stored(parsed.member),)
        ).fetchone()
    available, held, pending = row or (0, 0, 0)
    write_json([{"available": available, "held": held, "member": parsed.member, "pending": pending}])
    return 0
