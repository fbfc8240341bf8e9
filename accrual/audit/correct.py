"""Findings made proposals: what would put each of them right, for a person to approve or to carry out.

A posting that should not have been is to be undone. Where an entry comes out with other points than it was booked with,
an adjustment by the difference is owed. Both wait as any large adjustment does, under a key that names the posting or
the entry, so that each fault is proposed once, whichever checks have seen it; what is owed beyond adjustments that were
approved or turned down goes under the next key. What is left is not for a posting to put right: it comes with the
remedy in words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown, stored

__all__ = ["Approved", "Correction", "approved_points", "correction_of", "is_put_right", "propose"]

REASON: Final = "audit"

REBUILD: Final = "accrual book rebuild"
BY_HAND: Final = "accrual statement says what the member has done since; accrual adjust puts it right"
RESTORE: Final = "restore the last backup that the audit confirms, and let accrual book follow from there"
SERVER: Final = "stop accrual book and restore the stream server (docs/DURABILITY.md)"
COMPARE: Final = "somebody wrote to the database past the program: compare with the last backup"
REMEDIES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("balances", "lots", "available", "members", "days"), REBUILD),
    **dict.fromkeys(("decisions", "late", "caps", "once", "refunds", "reversals", "holds", "expiry"), BY_HAND),
    **dict.fromkeys(("rows", "rulebooks", "batches", "entries", "identities"), RESTORE),
    **dict.fromkeys(("postings", "lot_dates", "adjustments", "actions", "deferred"), COMPARE),
    **dict.fromkeys(("chain", "dead_letters"), SERVER),
    "events": "send again what the line says was left out; it counts as a late event",
    "settlements": "accrual settle --day, of the day that the line names",
    "attributes": "send the member_updated or member_released again that made it so",
    "not_audited": "give the audit the archive that the events went to",
}

# These only say that there was too much: who has given back more than that has put it right as well.
AT_MOST: Final = ("caps", "once")

# Neither case nor spaces make another person of anybody.
PERSON: Final = "lower(btrim(regexp_replace(j.{}, '[[:space:]]+', ' ', 'g')))"

# An adjustment counts where another person approved it, and as far as it was posted and stands.
APPROVED: Final = f"""
    SELECT j.adjustment, o.member, sum(CASE o.to_account WHEN 'available' THEN o.points ELSE -o.points END)::bigint
    FROM book.adjustments j JOIN book.postings o USING (action)
    WHERE j.corrects IS NULL AND j.reason = %s AND starts_with(j.adjustment, 'audit-') AND o.kind = 'adjust'
        AND {PERSON.format("approved_by")} NOT IN ('', {PERSON.format("asked_by")})
        AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = o.number)
    GROUP BY 1, 2
"""  # noqa: S608

KNOWN: Final = """
    SELECT adjustment, member, points, corrects, rejected_by, action IS NOT NULL FROM book.adjustments
    WHERE adjustment = %(key)s OR starts_with(adjustment, %(key)s || '#') ORDER BY asked_at, adjustment
"""

# Points that adjustments have moved, by the key of what they correct and the member.
Approved = Mapping[tuple[str, str], int]


class Correction(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is to be posted: ``points`` for the member of an entry, or the undoing of the posting ``corrects``."""

    adjustment: str
    points: int = 0
    corrects: int | None = None


class Known(NamedTuple):
    """An adjustment under one of the keys of a correction."""

    adjustment: str
    member: str
    points: int
    corrects: int | None
    rejected_by: str | None
    is_posted: bool

    @property
    def state(self) -> str:
        """What became of it."""
        return "posted" if self.is_posted else "waiting" if self.rejected_by is None else "rejected"


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


def approved_points(connection: Connection) -> Approved:
    """Return what was posted of adjustments that were proposed here and that another person approved."""
    points: defaultdict[tuple[str, str], int] = defaultdict(int)
    for key, member, moved in connection.execute(APPROVED, (REASON,)):
        points[shown(key).partition("#")[0], shown(member)] += moved
    return dict(points)


def is_put_right(finding: Finding, approved: Approved) -> bool:
    """Tell whether adjustments have moved just what ``finding`` says is owed to its member."""
    correction = correction_of(finding)
    if correction is None or correction.corrects is not None or finding.member is None:
        return False
    moved = approved.get((correction.adjustment, finding.member), 0)
    is_too_much = finding.check in AT_MOST and correction.points < 0
    return moved <= correction.points if is_too_much else moved == correction.points


def propose(connection: Connection, findings: Iterable[Finding], *, by: str) -> Iterator[dict[str, Any]]:
    """Write an adjustment that waits for each finding that a posting puts right, and yield it; else the remedy.

    ``state`` says of each whether it waits, was posted, or was turned down and by whom: then it is not asked for again.
    """
    proposed: set[str] = set()
    approved = approved_points(connection)
    # Where an entry is named by several checks, the one that knows what it should have been says what is owed.
    for finding in sorted(findings, key=lambda finding: finding.check in AT_MOST):
        correction = correction_of(finding)
        if correction is None:
            line: dict[str, Any] = {"check": finding.check, "detail": finding.detail, "member": finding.member}
            yield {name: value for name, value in line.items() if value} | {"remedy": REMEDIES[finding.check]}
        elif correction.adjustment not in proposed:
            proposed.add(correction.adjustment)
            note = f"{finding.check}: {finding.detail}"
            about = {"member": finding.member, "reason": REASON, "note": note}
            yield _proposed(connection, finding, correction, note, by, approved) | about


def _proposed(
    connection: Connection, finding: Finding, correction: Correction, note: str, by: str, approved: Approved
) -> dict[str, Any]:
    """Return what stands of ``correction``; what is owed and was not asked for yet waits from now on."""
    with connection.transaction():
        rows = connection.execute(KNOWN, {"key": stored(correction.adjustment)}).fetchall()
        known = [Known(*row) for row in rows]
        ours = [one for one in known if one.corrects == correction.corrects and _is_of(one, finding)]
        owed = correction.points
        if correction.corrects is None:
            owed -= approved.get((correction.adjustment, finding.member or ""), 0)
        answered = _answered(ours, owed)
        if answered is not None:
            return answered
        key = correction.adjustment if not known else f"{correction.adjustment}#{len(known) + 1}"
        wanted = msgspec.structs.replace(correction, adjustment=key, points=owed)
        _write(connection, finding, wanted, note, by)
        return {**msgspec.to_builtins(wanted), "state": "waiting"}


def _answered(ours: list[Known], owed: int) -> dict[str, Any] | None:
    """Return what was made of ``owed`` points, or of an undoing, before; ``None`` where it is to be asked for."""
    for one in reversed(ours):
        told: dict[str, Any] = {"adjustment": shown(one.adjustment), "state": one.state}
        told |= {"points": one.points} if one.corrects is None else {"corrects": one.corrects}
        is_same = one.corrects is not None or one.points == owed
        if one.state == "waiting":
            changed = f"another amount is owed by now, {owed}: reject this one and propose again"
            return told if is_same else told | {"remedy": changed}
        if one.state == "rejected" and is_same:
            return told | {"rejected_by": shown(one.rejected_by)}
        if one.state == "posted" and (one.corrects is not None or owed == 0):
            return told
    return None


def _is_of(known: Known, finding: Finding) -> bool:
    return known.corrects is not None or shown(known.member) == finding.member


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
