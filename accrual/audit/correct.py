"""Findings made proposals: what would put each of them right, for a person to approve or to carry out.

A posting that should not have been is to be undone. Where an entry comes out with other points than it was booked with,
an adjustment by the difference is owed. Both wait as any large adjustment does, under a key that names the posting or
the entry, so that each fault is proposed once, whichever checks have seen it. What is left is not for a posting to put
right: it comes with the remedy in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown, stored

__all__ = ["Correction", "approved_corrections", "correction_of", "propose"]

REASON: Final = "audit"

REBUILD: Final = "accrual book rebuild"
BY_HAND: Final = "accrual statement says what the member has done since; accrual adjust puts it right"
RESTORE: Final = "restore the last backup that the audit confirms, and let accrual book follow from there"
SERVER: Final = "stop accrual book and restore the stream server (docs/DURABILITY.md)"
COMPARE: Final = "somebody wrote to the database past the program: compare with the last backup"
REMEDIES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("balances", "lots", "available"), REBUILD),
    **dict.fromkeys(("decisions", "late", "caps", "once", "refunds", "reversals", "holds", "expiry"), BY_HAND),
    **dict.fromkeys(("rows", "batches", "entries", "identities"), RESTORE),
    **dict.fromkeys(("postings", "lot_dates", "adjustments", "deferred"), COMPARE),
    **dict.fromkeys(("chain", "dead_letters"), SERVER),
    "settlements": "accrual settle --day, of the day that the line names",
    "not_audited": "give the audit the archive that the events went to",
}


class Correction(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is to be posted: ``points`` for the member of an entry, or the undoing of the posting ``corrects``."""

    adjustment: str
    points: int = 0
    corrects: int | None = None


def correction_of(finding: Finding) -> Correction | None:
    """Return what would put ``finding`` right, where that is a posting."""
    if finding.posting is not None:
        return Correction(f"audit-undo-{finding.posting}", corrects=finding.posting)
    if finding.seq is None or finding.member is None:
        return None
    points = finding.owed
    if points is None and finding.check in ("decisions", "late"):
        points = _moved(finding.expected) - _moved(finding.found)
    return Correction(f"audit-{finding.partition}-{finding.seq}", points) if points else None


def approved_corrections(connection: Connection) -> frozenset[Correction]:
    """Return the adjustments by points that were proposed so, and approved."""
    rows = connection.execute(
        "SELECT adjustment, points FROM book.adjustments "
        "WHERE action IS NOT NULL AND corrects IS NULL AND reason = %s AND adjustment LIKE 'audit-%%'",
        (REASON,),
    )
    return frozenset(Correction(shown(key), points) for key, points in rows)


def propose(connection: Connection, findings: Iterable[Finding], *, by: str) -> Iterator[dict[str, Any]]:
    """Write an adjustment that waits for each finding that a posting puts right, and yield it; else the remedy."""
    proposed: set[str] = set()
    for finding in findings:
        correction = correction_of(finding)
        if correction is None:
            line: dict[str, Any] = {"check": finding.check, "detail": finding.detail, "member": finding.member}
            yield {name: value for name, value in line.items() if value} | {"remedy": REMEDIES[finding.check]}
        elif correction.adjustment not in proposed:
            proposed.add(correction.adjustment)
            note = f"{finding.check}: {finding.detail}"
            _write(connection, finding, correction, note, by)
            about = {"member": finding.member, "reason": REASON, "note": note}
            yield msgspec.to_builtins(correction) | about


def _write(connection: Connection, finding: Finding, correction: Correction, note: str, by: str) -> None:
    about: dict[str, Any] = {
        "key": stored(correction.adjustment),
        "reason": REASON,
        "note": stored(note),
        "by": stored(by),
    }
    about |= {"corrects": correction.corrects, "member": stored(finding.member or ""), "points": correction.points}
    connection.execute(
        """
        INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by, corrects)
        SELECT %(key)s, coalesce(p.member, %(member)s), coalesce(p.points, %(points)s), %(reason)s, %(note)s, %(by)s,
            %(corrects)s
        FROM (SELECT) one LEFT JOIN book.postings p ON p.number = %(corrects)s
        ON CONFLICT DO NOTHING
        """,
        about,
    )


def _moved(told: Any) -> int:
    if not isinstance(told, dict) or told.get("outcome") not in ("granted", "held"):
        return 0
    return int(told["points"])
