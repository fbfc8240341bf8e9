"""Findings made proposals: an adjustment for each member whose points are wrong, for a person to approve.

Only what can be said in points of one entry is proposed: an entry, of the ledger or late, that comes out with other
points when it is decided again, and a refund that took others than it should have. The adjustment waits like any large
one does, and names the entry as its key, so that it is proposed once, whichever checks have seen the fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import stored

__all__ = ["propose"]

REASON = "audit"


def propose(connection: Connection, findings: Iterable[Finding], *, by: str) -> Iterator[dict[str, Any]]:
    """Write an adjustment that waits for each finding that comes to points, and yield what is proposed."""
    for finding in findings:
        points = _points(finding)
        if not points or finding.member is None:
            continue
        key = f"audit-{finding.partition}-{finding.seq}"
        note = f"{finding.check}: {finding.detail}"
        connection.execute(
            "INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by) "
            "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            (stored(key), stored(finding.member), points, REASON, stored(note), stored(by)),
        )
        yield {"adjustment": key, "member": finding.member, "points": points, "reason": REASON, "note": note}


def _points(finding: Finding) -> int:
    """Return by how many points the member is to be put right; 0 where the finding is not about points."""
    if finding.seq is None:
        return 0
    if finding.owed is not None:
        return finding.owed
    if finding.check not in ("decisions", "late"):
        return 0
    return _moved(finding.expected) - _moved(finding.found)


def _moved(told: Any) -> int:
    if not isinstance(told, dict) or told.get("outcome") not in ("granted", "held"):
        return 0
    return int(told["points"])
