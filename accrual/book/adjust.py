"""``adjust``: points given or taken by a person, with a reason, and large ones by two persons (SPEC section 9).

What should never have been posted is undone in the same way, always by two: a posting of its own, `correct`, takes it
back lot by lot. What is large is for the book to say, not for whoever asks: the database has the limit, and refuses to
post what needs a second person and has none (migration 0003).
"""

from __future__ import annotations

import secrets
from datetime import date
from typing import Any, Final

import msgspec
import psycopg

from accrual.book.database import Connection, retried
from accrual.book.people import NOTE_BYTES, check_person, check_reason, check_text, person
from accrual.book.posting import act, is_settled, lock_members, plan, post
from accrual.book.programme import expiry_months, newest_rulebook, today
from accrual.book.rebuild import rebuild_member
from accrual.book.settle import settle_members
from accrual.book.texts import shown, stored
from accrual.errors import BookError, UsageError
from accrual.rulebook import MAXIMUM_POINTS, day_number, day_text

__all__ = [
    "Adjustment",
    "ApprovalLimit",
    "adjust",
    "approve",
    "limit_approval",
    "reject",
    "undo",
    "waiting_adjustments",
]

# What the audit proposes has keys of its own, so that an approved one can be told from any other adjustment.
RESERVED_PREFIX: Final = "audit-"
COLUMNS: Final = "adjustment, member, points, reason, note, asked_by, approved_by, action, rejected_by, corrects"

# Whether one that was not asked for before may be posted at once.
IS_SMALL: Final = "SELECT abs(points) <= approval_points FROM book.adjustments WHERE adjustment = %s"

MOVE: Final = """
    SELECT %(member)s, 'adjust', CASE WHEN %(points)s > 0 THEN 'issuance' ELSE 'available' END,
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

# Whether the entries of a member and day have their points where the postings have put them.
FITS: Final = """
    WITH moved AS (
        SELECT account, sum(side.points) AS points
        FROM book.movements m, LATERAL (VALUES (from_account, -points), (to_account, points)) AS side (account, points)
        WHERE (member, day) = (%(member)s, %(day)s) AND account IN ('pending', 'held') GROUP BY account
    ), left_over AS (
        SELECT account, sum(points_left) AS points FROM book.holdings
        WHERE (member, day) = (%(member)s, %(day)s) AND account IN ('pending', 'held') GROUP BY account
    )
    SELECT coalesce(bool_and(coalesce(m.points, 0) = coalesce(l.points, 0)), true)
    FROM moved m FULL JOIN left_over l USING (account)
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


class ApprovalLimit(msgspec.Struct, frozen=True):
    """From how many points on an adjustment waits for a second person; ``changed`` where that is new."""

    points: int
    changed: bool


def adjust(
    connection: Connection,
    member: str,
    points: int,
    *,
    reason: str,
    note: str,
    by: str,
    approval_points: int | None = None,
    key: str = "",
    dry_run: bool = False,
) -> Adjustment:
    """Give ``points`` to a member, or take them where they are negative, and return what became of it.

    An adjustment of more points than the book's limit, or than ``approval_points`` where that is less, waits for
    ``approve``. The ``key`` makes it unique: with one that is known, nothing is done twice. Raises ``BookError`` where
    the key is that of another adjustment.
    """
    check_reason(reason)
    check_text("--member", member)
    check_person(by)
    check_text("--note", note, shortest=0, longest=NOTE_BYTES)
    if not 0 < abs(points) <= MAXIMUM_POINTS:
        raise UsageError(f"--points: {points} is nothing that can be given or taken")
    key = _check_key(key or f"adjust-{secrets.token_hex(8)}")

    def work() -> Adjustment:
        with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by, approval_points) "
                "VALUES (%s, %s, %s, %s, %s, %s, least(%s, book.approval_points())) ON CONFLICT DO NOTHING",
                (stored(key), stored(member), points, reason, stored(note), stored(by), approval_points),
            )
            is_new = cursor.rowcount == 1
            found = _locked(cursor, key)
            _check_same(found, (member, points, reason, None))
            # One that waited before goes on waiting, even if it would not have to by what the limit is now.
            if is_new and cursor.execute(IS_SMALL, (stored(key),)).fetchone() == (True,):
                _post(cursor, found)
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
    check_person(by)
    check_text("--note", note, shortest=0, longest=NOTE_BYTES)
    key = _check_key(key or f"undo-{posting}")
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
    check_person(by)

    def work() -> Adjustment:
        with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
            found = _locked(cursor, key)
            if found.state == "rejected":
                raise BookError(f"adjustment {key} was rejected by {found.rejected_by}")
            if found.state == "waiting":
                if person(found.by) == person(by):
                    raise BookError(f"adjustment {key} was asked for by {found.by}: somebody else must approve it")
                _post(cursor, found, approved_by=by)
            return _locked(cursor, key)

    return retried(work)


def reject(connection: Connection, key: str, *, by: str, dry_run: bool = False) -> Adjustment:
    """Turn down the adjustment ``key`` that waits. Raises ``BookError`` where it is posted, or there is none."""
    check_person(by)
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


def limit_approval(
    connection: Connection, points: int, *, reason: str, note: str = "", by: str, dry_run: bool = False
) -> ApprovalLimit:
    """Let adjustments of more than ``points`` need a second person from now on: for the owner of the book alone.

    Raises ``BookError`` for anybody else.
    """
    check_reason(reason)
    check_person(by)
    check_text("--note", note, shortest=0, longest=NOTE_BYTES)
    if not 0 <= points <= MAXIMUM_POINTS:
        raise UsageError(f"--limit: {points} is no number of points")
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        if cursor.execute("SELECT book.approval_points()").fetchone() == (points,):
            return ApprovalLimit(points, changed=False)
        action = act(cursor, "limit", by=stored(by), reason=reason, note=stored(note), details={"points": points})
        try:
            cursor.execute("INSERT INTO book.approval_limits (action, points) VALUES (%s, %s)", (action, points))
        except psycopg.errors.InsufficientPrivilege:
            raise BookError("--limit: only the owner of the book may set it") from None
        return ApprovalLimit(points, changed=True)


def _check_key(key: str) -> str:
    if key.startswith(RESERVED_PREFIX):
        raise UsageError(f"--id: {key!r} begins with {RESERVED_PREFIX}, as only what the audit proposes does")
    return check_text("--id", key)


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


def _post(cursor: psycopg.Cursor[Any], adjustment: Adjustment, *, approved_by: str | None = None) -> None:
    lock_members(cursor, [stored(adjustment.member)])
    action = (_move if adjustment.corrects is None else _undo)(cursor, adjustment, approved_by)
    cursor.execute(
        "UPDATE book.adjustments SET action = %s, approved_by = %s WHERE adjustment = %s",
        (action, None if approved_by is None else stored(approved_by), stored(adjustment.adjustment)),
    )


def _act(
    cursor: psycopg.Cursor[Any], deed: str, adjustment: Adjustment, approved_by: str | None, **details: object
) -> int:
    details["adjustment"] = stored(adjustment.adjustment)
    if approved_by is not None:
        details["approved_by"] = stored(approved_by)
    note, asked_by = stored(adjustment.note), stored(adjustment.by)
    return act(cursor, deed, by=asked_by, reason=adjustment.reason, note=note, details=details)


def _move(cursor: psycopg.Cursor[Any], adjustment: Adjustment, approved_by: str | None) -> int:
    """Move the points of an adjustment, and return the action."""
    action = _act(cursor, "adjust", adjustment, approved_by)
    parameters = {
        "member": stored(adjustment.member),
        "points": adjustment.points,
        "day": day_text(today(cursor)),
        "months": expiry_months(cursor),
    }
    plan(cursor, MOVE, parameters)
    post(cursor, action)
    return action


def _undo(cursor: psycopg.Cursor[Any], adjustment: Adjustment, approved_by: str | None) -> int:
    """Undo the posting that ``adjustment`` corrects, and return the action.

    The member's balances and lots are then made anew, so that it does not matter whether the wrong posting had changed
    them. Where its points have been used since, they cannot be: that is a ``BookError``, and nothing is posted.
    """
    cursor.execute(
        "SELECT kind, member, day, from_account = 'pending', to_account = 'pending' FROM book.standing "
        "WHERE number = %s",
        (adjustment.corrects,),
    )
    row = cursor.fetchone()
    if row is None:
        raise BookError(f"posting {adjustment.corrects} is undone already")
    kind, member, day, is_pending_again, was_pending = row
    fitted = _fits(cursor, member, day)
    action = _act(cursor, "correct", adjustment, approved_by, corrects=adjustment.corrects, kind=kind)
    cursor.execute(UNDO, {"action": action, "corrects": adjustment.corrects})
    try:
        rebuild_member(cursor, member)
        if is_pending_again and kind != "settle":
            _move_on(cursor, member, day, approved_by or adjustment.by)
        if fitted and not _fits(cursor, member, day):
            raise BookError("the points that it moved were moved on")
        if was_pending and kind != "settle":
            # With negative points beside them, they may have come to nothing when the day was settled.
            _move_on(cursor, member, day, approved_by or adjustment.by)
    except BookError as error:
        used = "or its points have been used since; adjust them by hand"
        raise BookError(f"posting {adjustment.corrects} cannot be undone: {error}, {used}") from error
    if kind == "settle":
        # The day is due again, for whoever looks for days next.
        cursor.execute("UPDATE book.settled_days SET finished = false WHERE day = %s", (day,))
    return action


def _move_on(cursor: psycopg.Cursor[Any], member: str, day: date, by: str) -> None:
    """Settle what has come back to a day that is settled: the entry of the points went on without them."""
    number, rulebook = day_number(day), newest_rulebook(cursor)
    if rulebook is not None and is_settled(cursor, number):
        details = {"day": day_text(number), "rulebook": rulebook.version}
        settle_members(cursor, rulebook, number, [member], act(cursor, "settle", by=stored(by), details=details))


def _fits(cursor: psycopg.Cursor[Any], member: str, day: date) -> bool:
    return cursor.execute(FITS, {"member": member, "day": day}).fetchone() == (True,)
