"""``accrual check``: whether a rulebook would be accepted."""

from __future__ import annotations

import argparse
import sys

from accrual.cli.arguments import Commands, add_command, write_lines
from accrual.errors import RulebookError
from accrual.rulebook import advice, load

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "check", "check a rulebook", "accrual check rulebook.toml", _run)
    parser.add_argument("rulebook", metavar="RULEBOOK", help="file with the rulebook")


def _run(parsed: argparse.Namespace) -> int:
    """Print what is wrong, a finding per line, or what the rulebook has. The findings are the data of a check.

    What it may say but hardly means is a warning on stderr, and changes nothing.
    """
    try:
        rulebook = load(parsed.rulebook)
    except RulebookError as error:
        write_lines(finding.encode(errors="replace") for finding in error.findings)
        return 1
    for line in advice(rulebook, parsed.rulebook):
        print(f"accrual check: warning: {line}", file=sys.stderr)
    rules = (
        (len(rulebook.earning_rules), "earning rule"),
        (len(rulebook.campaigns), "campaign"),
        (len(rulebook.limits), "limit"),
    )
    counted = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in rules)
    line = f"{parsed.rulebook}: {rulebook.name} version {rulebook.version} ({rulebook.timezone}): {counted}"
    write_lines([line.encode(errors="replace")])
    return 0
