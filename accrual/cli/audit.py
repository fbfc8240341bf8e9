"""``accrual audit``: whether the book is what the ledgers and the specification say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from accrual.cli.arguments import (
    Commands,
    add_command,
    add_settings,
    log_to_stderr,
    positive,
    settings_of,
    write_json,
    write_lines,
)
from accrual.cli.days import add_day
from accrual.errors import UsageError
from accrual.rulebook import day_text, load
from accrual.stream import partition_names

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "audit",
        "check the book and the ledgers against each other and against the specification: a line for each finding",
        "accrual audit --rulebook rulebook.toml --redis redis://localhost:6379 --database postgresql://localhost/book "
        "> findings.jsonl\n"
        "  accrual audit --propose findings.jsonl --database postgresql://localhost/book --by alice",
        _run,
    )
    add_settings(parser, "rulebook", "redis", "database", "partition", "archive", "archive_key_file", "log_level")
    add_day(
        parser, "from", "the first business day that is decided again, and of the checks that go by day", required=False
    )
    add_day(parser, "to", "the last of them", required=False)
    parser.add_argument(
        "--workers",
        type=positive,
        default=2,
        metavar="N",
        help="checks, and stretches of a ledger, at once; default: 2",
    )
    parser.add_argument(
        "--engine",
        choices=("reference", "fast"),
        default="reference",
        help="which decides again; the fast one is the one that is audited; default: reference",
    )
    parser.add_argument(
        "--complete", action="store_true", help="what cannot be decided again, since its events are gone, is a finding"
    )
    parser.add_argument(
        "--propose",
        type=Path,
        metavar="FILE",
        help="say what puts each finding right; what is to be posted waits for approval",
    )
    parser.add_argument("--by", metavar="WHO", help="with --propose: who proposes them")


def _run(parsed: argparse.Namespace) -> int:
    if parsed.propose is not None:
        return _propose(parsed)
    from accrual.audit import Audit, AuditReport

    settings = settings_of(parsed, "rulebook", "redis", "database")
    log_to_stderr(settings.log_level)
    load(settings.rulebook)
    first, last = (None if day is None else day_text(day) for day in (getattr(parsed, "from"), parsed.to))
    if first is not None and last is not None and first > last:
        raise UsageError(f"--from: {first} is after {last}")
    audit = Audit(
        settings=settings,
        partitions=tuple(partition_names(settings.partition)) if settings.partition else (),
        first_day=first,
        last_day=last,
        workers=parsed.workers,
        engine=parsed.engine,
        complete=parsed.complete,
    )
    report = AuditReport()
    write_lines(finding.line() for finding in audit.run(report))
    for note in report.notes:
        print(f"accrual audit: {note}", file=sys.stderr)
    put_right = f", and {report.put_right} that adjustments have put right" if report.put_right else ""
    print(f"accrual audit: {report.checks} checks, {report.findings} findings{put_right}", file=sys.stderr)
    return 1 if report.findings else 0


def _propose(parsed: argparse.Namespace) -> int:
    from accrual.audit import Finding, propose
    from accrual.book import open_book
    from accrual.book.people import check_person

    settings = settings_of(parsed, "database")
    if parsed.by is None:
        raise UsageError("--by: missing; --propose needs to know who proposes")
    check_person(parsed.by)
    lines = parsed.propose.read_bytes().splitlines()
    try:
        findings = [msgspec.json.decode(line, type=Finding) for line in lines]
    except msgspec.MsgspecError as error:
        raise UsageError(f"{parsed.propose}: is not the output of an audit: {error}") from None
    with open_book(settings.database) as connection:
        write_json(propose(connection, findings, by=parsed.by))
    return 0
