"""``accrual adjust``: points given or taken by a person, with a reason."""

from __future__ import annotations

import argparse

from accrual.cli.arguments import Commands, add_command, add_settings, settings_of, write_json
from accrual.cli.jobs import report
from accrual.errors import UsageError

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "adjust",
        "give points to a member or take them, undo a posting, or decide on what waits for a second person",
        "accrual adjust --database postgresql://localhost/book --member m1 --points -5 --reason goodwill "
        "--note 'late delivery' --by alice\n"
        "  accrual adjust --database postgresql://localhost/book --undo 81320 --reason posted-twice --by alice\n"
        "  accrual adjust --database postgresql://localhost/book --list\n"
        "  accrual adjust --database postgresql://localhost/book --approve adjust-1f2e3d4c5b6a7980 --by bob\n"
        "  accrual adjust --database postgresql://owner@localhost/book --limit 5000 --reason policy --by carol",
        _run,
    )
    add_settings(parser, "database", "adjust_approval_points")
    parser.add_argument("--member", metavar="M", help="whose points")
    parser.add_argument("--points", type=int, metavar="N", help="how many; negative ones are taken")
    parser.add_argument("--reason", metavar="CODE", help="why, as a code of A-Z a-z 0-9 _ . -")
    parser.add_argument("--note", metavar="TEXT", default="", help="why, in words")
    parser.add_argument("--by", metavar="WHO", help="who decides it")
    parser.add_argument("--id", metavar="KEY", default="", help="makes it unique: the same one is never posted twice")
    parser.add_argument(
        "--undo", type=int, metavar="N", help="ask for the posting of that number to be undone; somebody else approves"
    )
    parser.add_argument("--approve", metavar="KEY", help="post one that waits")
    parser.add_argument("--reject", metavar="KEY", help="turn down one that waits")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="let adjustments of more points need a second person: the owner's to say"
    )
    parser.add_argument("--list", action="store_true", default=None, help="print those that wait, oldest first")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")


def _run(parsed: argparse.Namespace) -> int:
    from accrual import book

    settings = settings_of(parsed, "database")
    deeds = {"approve": ("by",), "reject": ("by",), "list": (), "undo": ("reason", "by"), "limit": ("reason", "by")}
    chosen = [deed for deed in deeds if getattr(parsed, deed) is not None]
    if len(chosen) > 1:
        raise UsageError("--approve, --reject, --list, --undo and --limit: one at a time")
    _require(parsed, *(deeds[chosen[0]] if chosen else ("member", "points", "reason", "by")))
    with book.open_book(settings.database) as connection:
        if parsed.list:
            write_json(book.waiting_adjustments(connection))
            return 0
        if parsed.limit is not None:
            limit = book.limit_approval(
                connection, parsed.limit, reason=parsed.reason, note=parsed.note, by=parsed.by, dry_run=parsed.dry_run
            )
            report(limit, dry_run=parsed.dry_run)
            return 0
        if parsed.approve is not None:
            done = book.approve(connection, parsed.approve, by=parsed.by, dry_run=parsed.dry_run)
        elif parsed.reject is not None:
            done = book.reject(connection, parsed.reject, by=parsed.by, dry_run=parsed.dry_run)
        elif parsed.undo is not None:
            done = book.undo(
                connection,
                parsed.undo,
                reason=parsed.reason,
                note=parsed.note,
                by=parsed.by,
                key=parsed.id,
                dry_run=parsed.dry_run,
            )
        else:
            done = book.adjust(
                connection,
                parsed.member,
                parsed.points,
                reason=parsed.reason,
                note=parsed.note,
                by=parsed.by,
                approval_points=settings.adjust_approval_points,
                key=parsed.id,
                dry_run=parsed.dry_run,
            )
    report(done, dry_run=parsed.dry_run)
    return 0


def _require(parsed: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(parsed, name) is None:
            raise UsageError(f"--{name}: missing")
