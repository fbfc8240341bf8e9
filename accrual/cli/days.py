"""Business days on a command line: ``YYYY-MM-DD`` to a day number."""

from __future__ import annotations

import argparse
from datetime import date

from accrual.rulebook import day_number

__all__ = ["add_day"]


def add_day(parser: argparse.ArgumentParser, name: str, what: str, *, required: bool = True) -> None:
    """Add the flag ``--name`` that takes a day; its value is a day number, ``None`` where it is not given."""
    parser.add_argument(f"--{name}", metavar="YYYY-MM-DD", type=_day, required=required, help=what)


def _day(text: str) -> int:
    try:
        return day_number(date.fromisoformat(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date, YYYY-MM-DD") from None
