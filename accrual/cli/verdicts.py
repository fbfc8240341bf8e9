"""What ``release`` and ``confirm`` share on the command line."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

import redis

from accrual.cli.jobs import report
from accrual.stream import StreamServer

if TYPE_CHECKING:
    from accrual.book import Connection, Verdict

__all__ = ["add_verdict_flags", "send_and_report"]

log = logging.getLogger("accrual.book")


def add_verdict_flags(parser: argparse.ArgumentParser) -> None:
    """Add who, whom and why."""
    parser.add_argument("--member", metavar="M", required=True, help="the member")
    parser.add_argument("--reason", metavar="CODE", required=True, help="why, as a code of A-Z a-z 0-9 _ . -")
    parser.add_argument("--note", metavar="TEXT", default="", help="why, in words")
    parser.add_argument("--by", metavar="WHO", required=True, help="who has looked at it")
    parser.add_argument("--partition", metavar="P", help="where a member's events go of whom the book has none")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")


def send_and_report(connection: Connection, server: StreamServer, verdict: Verdict, *, dry_run: bool) -> None:
    """Send what the verdict left in the outbox, and print what was done.

    The verdict stands where the stream server is away or refuses: whoever sends the outbox next sends its event.
    """
    from accrual.book import send_outbox

    if not dry_run:
        try:
            with server.client() as client:
                send_outbox(connection, client)
        except redis.RedisError as error:
            words = " ".join(str(error).split())
            log.warning("the fast path has not been told yet: %s; `accrual jobs` or `accrual slow` will tell it", words)
    report(verdict, dry_run=dry_run)
