"""What the jobs of the book share on the command line: who, dry runs, and what was done as a line of JSON."""

from __future__ import annotations

import argparse

import msgspec

from accrual.cli.arguments import write_lines

__all__ = ["add_job_flags", "report"]

_encode = msgspec.json.Encoder(order="sorted").encode


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--by`` and ``--dry-run``."""
    parser.add_argument("--by", metavar="WHO", default="scheduler", help="who has it done; default: scheduler")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")


def report(done: msgspec.Struct, *, dry_run: bool) -> None:
    """Print what was done."""
    write_lines([_encode(msgspec.structs.asdict(done) | {"dry_run": dry_run})])
