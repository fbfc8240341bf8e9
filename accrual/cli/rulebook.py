"""``accrual rulebook``: hand a running worker a new version, and see which one is in force."""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Final

import msgspec
import redis

from accrual.cli.arguments import Commands, add_command, add_settings, settings_of, write_lines
from accrual.errors import RulebookError, StreamError
from accrual.ledger import LedgerReader
from accrual.rulebook import Rulebook, load
from accrual.stream import Keys, StreamServer, offer, standing

__all__ = ["add"]

POLL_INTERVAL_S: Final = 0.05


def add(commands: Commands) -> None:
    """Declare the command."""
    example = "accrual rulebook activate --redis redis://localhost:6379 --partition city-1 rulebook-4.toml"
    parser = add_command(commands, "rulebook", "hand over a new rulebook, or show the one in force", example, _activate)
    actions: Commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    activate = add_command(
        actions, "activate", "hand a new version to the worker, and wait until it is in force", example, _activate
    )
    activate.add_argument("rulebook", metavar="RULEBOOK", help="file with the new rulebook")
    activate.add_argument(
        "--timeout", type=_seconds, metavar="S", default=30.0, help="how long to wait for the worker, in s; default: 30"
    )
    add_settings(activate, "redis", "partition")
    show = add_command(
        actions,
        "show",
        "show the rulebook in force as JSON, or its text",
        "accrual rulebook show --redis redis://localhost:6379 --partition city-1 --text > rulebook.toml",
        _show,
    )
    show.add_argument("--text", action="store_true", help="print the rulebook itself, byte for byte")
    add_settings(show, "redis", "partition")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _activate(parsed: argparse.Namespace) -> int:
    new = load(parsed.rulebook)
    # The positional argument has the name of a setting; it is not one here.
    del parsed.rulebook
    settings = settings_of(parsed, "redis", "partition")
    keys = Keys(settings.partition)
    with StreamServer(settings.redis).client() as client:
        now = standing(client, keys).checkpoint
        if now.rulebook_sha256 == new.digest:
            print(f"rulebook version {new.version} is in force already")
            return 0
        if not now.batch:
            raise StreamError(f"partition {keys.partition} has no ledger yet: start a worker with --rulebook")
        if new.version <= now.rulebook:
            raise RulebookError([f"version {new.version} is not above {now.rulebook}, which is in force"])
        offer(client, keys, new)
        _await_adoption(client, keys, new, parsed.timeout)
    print(f"rulebook version {new.version} is in force")
    return 0


def _await_adoption(client: redis.Redis, keys: Keys, new: Rulebook, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    sha256 = new.digest.hex()
    while True:
        now = standing(client, keys)
        if now.checkpoint.rulebook_sha256 == new.digest:
            return
        if now.refused_sha256 == sha256:
            raise RulebookError([f"the worker refused it: {now.refused_reason}"])
        if now.pending_sha256 != sha256:
            raise StreamError(f"another rulebook took its place; version {now.checkpoint.rulebook} is in force")
        if time.monotonic() > deadline_s:
            owner = f"worker {now.owner_name}" if now.owner_name else "no worker"
            raise StreamError(
                f"after {timeout_s:g} s version {new.version} is still pending ({owner} owns the partition): "
                "the next worker that runs will adopt it"
            )
        time.sleep(POLL_INTERVAL_S)


def _show(parsed: argparse.Namespace) -> int:
    settings = settings_of(parsed, "redis", "partition")
    keys = Keys(settings.partition)
    with StreamServer(settings.redis).client() as client:
        now = standing(client, keys)
        if not now.checkpoint.batch:
            raise StreamError(f"partition {keys.partition} has no ledger yet")
        record = LedgerReader(client, settings.partition).rulebook_at(now.checkpoint.batch)
    if parsed.text:
        sys.stdout.buffer.write(record.text.encode())
        return 0
    shown = {
        "batch": record.batch,
        "name": record.name,
        "pending": now.pending_sha256 or None,
        "refused": {"reason": now.refused_reason, "sha256": now.refused_sha256} if now.refused_sha256 else None,
        "sha256": record.sha256.hex(),
        "version": record.version,
        "zone_rules": record.zone_rules,
    }
    write_lines([msgspec.json.encode(shown, order="sorted")])
    return 0
