"""``accrual ledger``: the committed entries, verified on the way."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, settings_of, write_lines
from accrual.ledger import LedgerReader, entry_line
from accrual.stream import Keys, StreamServer

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "ledger",
        "print the committed ledger entries as JSON lines, in order",
        "accrual ledger --redis redis://localhost:6379 --partition city-1 | head",
        _run,
    )
    add_settings(parser, "redis", "partition")


def _run(parsed: argparse.Namespace) -> int:
    settings = settings_of(parsed, "redis", "partition")
    Keys(settings.partition)
    with StreamServer(settings.redis).client() as client:
        write_lines(entry_line(*row) for row in LedgerReader(client, settings.partition).entries())
    return 0
