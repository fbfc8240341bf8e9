"""``accrual demo``: the main job by one command, on a server of its own."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from accrual.cli.arguments import Commands, add_command, positive

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "demo",
        "stream a member day of grocery baskets through a server, a worker and a book of its own, and sum up",
        "accrual demo\n  accrual demo --scale 3 --keep\n  accrual demo --serve demo-data/20261115-200000",
        _run,
    )
    parser.add_argument(
        "--scale",
        type=positive,
        default=1,
        metavar="N",
        help="districts that live the same day: 290,731 events and some 60 MB of server memory each; default: 1",
    )
    parser.add_argument("--seed", type=int, default=20261115, metavar="N", help="another day; default: 20261115")
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="empty or new directory that keeps the server's data; default: demo-data/<time>",
    )
    parser.add_argument("--keep", action="store_true", help="let the server run at the end, until Ctrl-C")
    parser.add_argument("--serve", type=Path, metavar="DIR", help="only serve what an earlier run left in DIR")


def _run(parsed: argparse.Namespace) -> int:
    """Run the demo; the status is 1 where a proof fails."""
    # No other command should wait for what this one imports.
    from accrual.demo import run as demo
    from accrual.demo.bookkeeping import open_database

    screen = demo.open_screen()
    _end_as_at_ctrl_c()
    if parsed.serve is not None:
        with demo.open_server(parsed.serve, with_data=True) as server:
            demo.wait(server, screen)
        return 0
    day = demo.make_day(parsed.scale, parsed.seed, screen)
    directory = demo.new_directory(parsed.directory)
    with demo.open_server(directory, with_data=False) as server, open_database() as database:
        summary = demo.run(day, server, screen)
        booked = demo.keep_book(server, database, screen)
        if parsed.keep:
            demo.wait(server, screen, database)
    if not parsed.keep:
        serve = demo.command_line("demo", "--serve", str(directory))
        screen.show_lines(["To look at the ledger and the dead letters:", f"  {serve}"])
    failed = [proof.claim for proof in (*summary.proofs(), *booked.proofs()) if not proof.holds]
    for claim in failed:
        print(f"accrual demo: this does not hold: {claim}", file=sys.stderr)
    return 1 if failed else 0


def _end_as_at_ctrl_c() -> None:
    """However the demo is asked to end, it stops first the worker, then the server."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup a terminal that goes away is no reason to end.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
