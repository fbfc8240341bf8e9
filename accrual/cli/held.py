"""``accrual held``: whom a reviewer should look at, and why."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, settings_of, write_json

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "held",
        "print the members who are frozen or have points held as JSON lines, newest first, with what made them so",
        "accrual held --database postgresql://localhost/book --member m1",
        _run,
    )
    add_settings(parser, "database")
    parser.add_argument("--member", metavar="M", help="only this member")


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import held, open_book

    settings = settings_of(parsed, "database")
    with open_book(settings.database) as connection:
        write_json(held(connection, parsed.member))
    return 0
