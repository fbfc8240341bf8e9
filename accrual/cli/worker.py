"""``accrual worker``: own a partition, decide its events, commit its ledger."""

from __future__ import annotations

import argparse

import uvloop

from accrual.cli.arguments import Commands, add_command, add_settings, log_to_stderr, settings_of
from accrual.rulebook import load
from accrual.worker import Worker

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "worker",
        "decide the events of a partition and commit its ledger",
        "accrual worker --rulebook rulebook.toml --redis redis://localhost:6379 --partition city-1",
        _run,
    )
    add_settings(
        parser,
        *("rulebook", "redis", "partition", "engine", "batch_entries", "batch_events"),
        *("in_flight_batches", "in_flight_bytes", "block_ms", "linger_ms", "lease_ms", "wait"),
        *(
            "snapshots",
            "snapshot_interval_s",
            "snapshot_rate_bytes",
            "snapshots_kept",
            "snapshot_store",
            "trim_input",
            "archive",
            "memory_limit_bytes",
        ),
        *("reply_timeout_ms", "stop_timeout_ms", "backoff_limit_ms", "progress", "log_level"),
    )
    parser.add_argument(
        "--drain", action="store_true", help="commit up to the end of the stream as it is at the start, then exit"
    )


def _run(parsed: argparse.Namespace) -> int:
    settings = settings_of(parsed, "rulebook", "redis", "partition")
    log_to_stderr(settings.log_level)
    worker = Worker(settings, load(settings.rulebook), drain=parsed.drain)
    uvloop.run(worker.run())
    return 0
