"""``accrual slow``: the refunds and late events that wait in the book."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of, until_told_to_stop
from accrual.cli.jobs import report
from accrual.rulebook import load

__all__ = ["add"]

POLL_S = 1.0


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "slow",
        "deal with the refunds and late events that wait in the book",
        "accrual slow --rulebook rulebook.toml --redis redis://localhost:6379 --database postgresql://localhost/book "
        "--drain",
        _run,
    )
    add_settings(parser, "rulebook", "redis", "database", "refund_wait_hours", "log_level")
    parser.add_argument("--drain", action="store_true", help="deal with what waits now, then exit")
    parser.add_argument("--by", metavar="WHO", default="scheduler", help="who has it done; default: scheduler")


def _run(parsed: argparse.Namespace) -> int:
    from accrual.book import open_book, send_outbox, slow
    from accrual.stream import StreamServer

    settings = settings_of(parsed, "rulebook", "redis", "database")
    log_to_stderr(settings.log_level)
    rulebook = load(settings.rulebook)
    with (
        until_told_to_stop() as stopping,
        open_book(settings.database) as connection,
        StreamServer(settings.redis).client() as client,
    ):
        while True:
            wait_hours = settings.refund_wait_hours
            done = slow(connection, rulebook, refund_wait_hours=wait_hours, by=parsed.by, stopping=stopping)
            send_outbox(connection, client)
            if parsed.drain:
                report(done, dry_run=False)
                return 0
            if stopping.wait(POLL_S):
                return 0
