"""What the jobs of the book share on the command line: days, who, dry runs, and what was done as a line of JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from accrual.cli.arguments import Commands, Run, add_command, add_settings, log_to_stderr, settings_of, write_json
from accrual.cli.days import add_day
from accrual.rulebook import Rulebook, load

if TYPE_CHECKING:
    from accrual.book import Connection, Done

__all__ = ["add_day_job", "add_job_flags", "report", "run_day_job"]


def add_day_job(commands: Commands, name: str, what: str, run: Run, *, example: str, day: str) -> None:
    """Declare a job of a business day: ``example`` is one, and ``day`` says what it means."""
    command = f"accrual {name} --rulebook rulebook.toml --database postgresql://localhost/book --day {example}"
    parser = add_command(commands, name, what, command, run)
    add_settings(parser, "rulebook", "database", "log_level")
    add_day(parser, "day", day)
    add_job_flags(parser)


def run_day_job(parsed: argparse.Namespace, job: Callable[[Connection, Rulebook], Done]) -> int:
    """Do a job that ``add_day_job`` has declared, and print what was done."""
    from accrual.book import open_book

    settings = settings_of(parsed, "rulebook", "database")
    log_to_stderr(settings.log_level)
    rulebook = load(settings.rulebook)
    with open_book(settings.database) as connection:
        report(job(connection, rulebook), dry_run=parsed.dry_run)
    return 0


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--by`` and ``--dry-run``."""
    parser.add_argument("--by", metavar="WHO", default="scheduler", help="who has it done; default: scheduler")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")


def report(done: msgspec.Struct, *, dry_run: bool) -> None:
    """Print what was done."""
    write_json([msgspec.structs.asdict(done) | {"dry_run": dry_run}])
