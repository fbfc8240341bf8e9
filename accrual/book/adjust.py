"""``adjust``: points given or taken by a person, with a reason, and large ones by two persons (SPEC section 9).

What should never have been posted is undone in the same way, always by two: a posting of its own, `correct`, takes it
back lot by lot.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Final

import msgspec
import psycopg

from accrual.book.database import Connection, retried
from accrual.book.posting import act, lock_members, plan, post
from accrual.book.programme import expiry_months, today
from accrual.book.rebuild import rebuild_member
from accrual.book.texts import shown, stored
from accrual.errors import BookError, UsageError
from accrual.rulebook import MAXIMUM_POINTS, day_text

__all__ = ["Adjustment", "adjust", "approve", "check_reason", "check_text", "reject", "undo", "waiting_adjustments"]

REASON: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NOTE_BYTES: Final = 4096
COLUMNS: Final = "adjustment, member, points, reason, note, asked_by, approved_by, action, rejected_by, corrects"

MOVE: Final = """
    SELECT 0, %(member)s, 'adjust', CASE WHEN %(points)s > 0 THEN 'issuance' ELSE 'available' END,
        CASE WHEN %(points)s > 0 THEN 'available' ELSE 'issuance' END, abs(%(points)s), %(day)s::date,
        (%(day)s::date + make_interval(months => %(months)s))::date, false
"""


UNDO: Final = """
    INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, lot_days,
        lot_points, partition_id, seq, late, cause_seq, corrects)
    SELECT nextval('book.numbers'), %(action)s, 'correct', member, to_account, from_account, points, day, lot_days,
        lot_points, partition_id, seq, late, cause_seq, number
    FROM book.standing WHERE number = %(corrects)s
"""


class Adjustment(msgspec.Struct, frozen=True):
    """An adjustment; ``state`` is ``posted``, ``waiting`` for a second person, or ``rejected`` by one.

    One that ``corrects`` a posting, by its number, undoes it; ``points`` are those of the posting then.
    """

    adjustment: str
    member: str
    points: int
    reason: str
    note: str
    by: str
    state: str
    approved_by: str | None = None
    rejected_by: str | None = None
    corrects: int | None = None


def check_reason(reason: str) -> str:
    """Return ``reason``. Raises ``UsageError`` where it is no reason code."""
    if not REASON.fullmatch(reason):
        raise UsageError(f"--reason: {reason!r} is not a code of 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    return reason


def check_text(flag: str, text: str, *, shortest: int = 1, longest: int = 64) -> str:
    """Return ``text``. Raises ``UsageError`` naming ``flag`` where it is not so many bytes of UTF-8."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{flag}: {text!r} is not UTF-8") from None
    if not shortest <= size <= longest:
        raise UsageError(f"{flag}: {text[:longest]!r} is not {shortest} to {longest} bytes of UTF-8")
    return text


def adjust(
    connection: Connection,
    member: str,
    points: int,
    *,
    reason: str,
    note: str,
    by: str,
    approval_points: int,
    key: str = "",
    dry_run: bool = False,
) -> Adjustment:
    """Give ``points`` to a member, or take them where they are negative, and return what became of it.

    An adjustment of more than ``approval_points`` waits for ``approve``. The ``key`` makes it unique: with one that is
    known, nothing is done twice. Raises ``BookError`` where the key is that of another adjustment.
    """
    check_reason(reason)
    check_text("--member", member)
    check_text("--by", by)
    check_text("--note", note, shortest=0, longest=NOTE_BYTES)
    if not 0 < abs(points) <= MAXIMUM_POINTS:
        raise UsageError(f"--points: {points} is nothing that can be given or taken")
    key = check_text("--id", key or f"adjust-{secrets.token_hex(8)}")

    def work() -> Adjustment:
        with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by) "
                "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (stored(key), stored(member), points, reason, stored(note), stored(by)),
            )
            is_new = cursor.rowcount == 1
            found = _locked(cursor, key)
            _check_same(found, (member, points, reason, None))
            # One that waited before goes on waiting, even if it would not have to by what the setting is now.
            if is_new and abs(points) <= approval_points:
                _post(cursor, found, by=by)
            return _locked(cursor, key)

    return retried(work)


def undo(
    connection: Connection, posting: int, *, reason: str, note: str, by: str, key: str = "", dry_run: bool = False
) -> Adjustment:
    """Ask for the posting of number ``posting`` to be undone, and return what waits for ``approve``.

    The ``key`` is by default one that is the same whenever this posting is meant. Raises ``BookError`` where there is
    no such posting, it is undone, or the key is that of another adjustment.
    """
    check_reason(reason)
    check_text("--by", by)
    check_text("--note", note, shortest=0, longest=NOTE_BYTES)
    key = check_text("--id", key or f"undo-{posting}")
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        cursor.execute("SELECT member, points FROM book.standing WHERE number = %s", (posting,))
        row = cursor.fetchone()
        if row is None:
            raise BookError(f"--undo: there is no posting {posting} that could be undone")
        cursor.execute(
            "INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by, corrects) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            (stored(key), *row, reason, stored(note), stored(by), posting),
        )
        found = _locked(cursor, key)
        _check_same(found, (shown(row[0]), row[1], reason, posting))
        return found


def approve(connection: Connection, key: str, *, by: str, dry_run: bool = False) -> Adjustment:
    """Post the adjustment ``key`` that waits. Raises ``BookError`` where ``by`` has asked for it, or there is none."""
    check_text("--by", by)

    def work() -> Adjustment:
        with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
            found = _locked(cursor, key)
            if found.state == "rejected":
                raise BookError(f"adjustment {key} was rejected by {found.rejected_by}")
            if found.state == "waiting":
                if found.by == by:
                    raise BookError(f"adjustment {key} was asked for by {by}: somebody else must approve it")
                _post(cursor, found, by=by)
                cursor.execute(
                    "UPDATE book.adjustments SET approved_by = %s WHERE adjustment = %s", (stored(by), stored(key))
                )
            return _locked(cursor, key)

    return retried(work)


def reject(connection: Connection, key: str, *, by: str, dry_run: bool = False) -> Adjustment:
    """Turn down the adjustment ``key`` that waits. Raises ``BookError`` where it is posted, or there is none."""
    check_text("--by", by)
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        found = _locked(cursor, key)
        if found.state == "posted":
            raise BookError(f"adjustment {key} is posted; take it back with another one")
        if found.state == "waiting":
            cursor.execute(
                "UPDATE book.adjustments SET rejected_by = %s WHERE adjustment = %s", (stored(by), stored(key))
            )
        return _locked(cursor, key)


def waiting_adjustments(connection: Connection) -> list[Adjustment]:
    """Return the adjustments that wait for a second person, oldest first."""
    rows = connection.execute(
        f"SELECT {COLUMNS} FROM book.adjustments WHERE action IS NULL AND rejected_by IS NULL "  # noqa: S608
        "ORDER BY asked_at, adjustment"
    )
    return [_adjustment(row) for row in rows.fetchall()]


def _locked(cursor: psycopg.Cursor[Any], key: str) -> Adjustment:
    query = f"SELECT {COLUMNS} FROM book.adjustments WHERE adjustment = %s FOR UPDATE"  # noqa: S608
    cursor.execute(query, (stored(key),))
    row = cursor.fetchone()
    if row is None:
        raise BookError(f"there is no adjustment {key}")
    return _adjustment(row)


def _check_same(found: Adjustment, asked: tuple[str, int, str, int | None]) -> None:
    if (found.member, found.points, found.reason, found.corrects) != asked:
        known = f"{found.points} points for {found.member}, {found.reason}"
        raise BookError(f"adjustment {found.adjustment} is another one: {known}")


def _adjustment(row: tuple[Any, ...]) -> Adjustment:
    key, member, points, reason, note, asked_by, approved_by, action, rejected_by, corrects = row
    state = "posted" if action is not None else "rejected" if rejected_by is not None else "waiting"
    return Adjustment(
        adjustment=shown(key),
        member=shown(member),
        points=points,
        reason=reason,
        note=shown(note),
        by=shown(asked_by),
        state=state,
        approved_by=shown(approved_by),
        rejected_by=shown(rejected_by),
        corrects=corrects,
    )


def _post(cursor: psycopg.Cursor[Any], adjustment: Adjustment, *, by: str) -> None:
    member = stored(adjustment.member)
    lock_members(cursor, [member])
    action = (_move if adjustment.corrects is None else _undo)(cursor, adjustment, by)
    cursor.execute(
        "UPDATE book.adjustments SET action = %s WHERE adjustment = %s", (action, stored(adjustment.adjustment))
    )


def _act(cursor: psycopg.Cursor[Any], deed: str, adjustment: Adjustment, by: str, **details: object) -> int:
    details["adjustment"] = stored(adjustment.adjustment)
    if by != adjustment.by:
        details["approved_by"] = stored(by)
    note, asked_by = stored(adjustment.note), stored(adjustment.by)
    return act(cursor, deed, by=asked_by, reason=adjustment.reason, note=note, details=details)


def _move(cursor: psycopg.Cursor[Any], adjustment: Adjustment, by: str) -> int:
    """Move the points of an adjustment, and return the action."""
    action = _act(cursor, "adjust", adjustment, by)
    parameters = {
        "member": stored(adjustment.member),
        "points": adjustment.points,
        "day": day_text(today(cursor)),
        "months": expiry_months(cursor),
    }
    plan(cursor, MOVE, parameters)
    post(cursor, action)
    return action


def _undo(cursor: psycopg.Cursor[Any], adjustment: Adjustment, by: str) -> int:
    """Undo the posting that ``adjustment`` corrects, and return the action.

    The member's balances and lots are then made anew, so that it does not matter whether the wrong posting had changed
    them. Where its points have been used since, they cannot be: that is a ``BookError``, and nothing is posted.
    """
    cursor.execute("SELECT kind FROM book.standing WHERE number = %s", (adjustment.corrects,))
    row = cursor.fetchone()
    if row is None:
        raise BookError(f"posting {adjustment.corrects} is undone already")
    action = _act(cursor, "correct", adjustment, by, corrects=adjustment.corrects, kind=row[0])
    cursor.execute(UNDO, {"action": action, "corrects": adjustment.corrects})
    try:
        rebuild_member(cursor, stored(adjustment.member))
    except BookError as error:
        used = "or its points have been used since; adjust them by hand"
        raise BookError(f"posting {adjustment.corrects} cannot be undone: {error}, {used}") from error
    return action
