"""``release`` and ``confirm``: what a reviewer makes of a frozen member (SPEC section 9).

Released points go on as if they had never been held; confirmed ones go back to where they came from, and with them,
where the reviewer asks for it, what the member earned in a span of days before; what took points from the member then
is left alone. The fast path learns of it by an event that is written in the same transaction (outbox.py). What it
decides until it has learnt of it is held, or granted, as before: such points are booked later, and a release or a
confirmation that is repeated then takes them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import psycopg

from accrual.book.database import Connection, retried
from accrual.book.outbox import write_event
from accrual.book.people import NOTE_BYTES, check_person, check_reason, check_text
from accrual.book.posting import act, is_settled, lock_members, plan, post
from accrual.book.programme import expiry_months
from accrual.book.settle import settle_again
from accrual.book.texts import stored
from accrual.errors import BookError, UsageError
from accrual.rulebook import day_text

__all__ = ["Verdict", "confirm", "release"]

# SPEC section 1: a time is less than this.
TIMES_END_MS: Final = 2**53

HELD: Final = "FROM book.holdings WHERE member = %(member)s AND account = 'held' AND points_left <> 0"

HELD_DAYS: Final = f"SELECT DISTINCT day - date '1970-01-01' {HELD} ORDER BY 1"

RELEASED: Final = f"""
    SELECT member, 'release', CASE WHEN points_left > 0 THEN 'held' ELSE there END,
        CASE WHEN points_left > 0 THEN there ELSE 'held' END, abs(points_left), day,
        (day + make_interval(months => %(months)s))::date, false, partition_id, seq, late, NULL::bigint
    FROM (
        SELECT *, CASE WHEN day = ANY(%(settled)s::date[]) THEN 'available' ELSE 'pending' END AS there {HELD}
    ) h
    ORDER BY points_left < 0, number, seq
"""  # noqa: S608 - nothing but texts of this file

CONFIRMED: Final = """
    SELECT member, CASE account WHEN 'held' THEN 'confirm' ELSE 'clawback' END,
        CASE WHEN points_left > 0 THEN account ELSE 'issuance' END,
        CASE WHEN points_left > 0 THEN 'issuance' ELSE account END, abs(points_left), day,
        NULL::date, account = 'available', partition_id, seq, late, NULL::bigint
    FROM book.holdings
    WHERE member = %(member)s AND points_left <> 0
        AND (account = 'held' OR points_left > 0 AND day BETWEEN %(first)s::date AND %(last)s::date)
    ORDER BY number, seq
"""


class Verdict(msgspec.Struct, frozen=True):
    """What a release or a confirmation did; not ``changed``: there was nothing to be done.

    ``clawed_back`` is the part of ``points`` that was not held. ``event`` is the id of what the fast path is told with;
    empty where it need not be told, or nothing was meant.
    """

    member: str
    state: str
    changed: bool = False
    postings: int = 0
    points: int = 0
    clawed_back: int = 0
    event: str = ""


def release(
    connection: Connection,
    member: str,
    *,
    reason: str,
    by: str,
    note: str = "",
    immune_until_ms: int | None = None,
    partition: str | None = None,
    dry_run: bool = False,
) -> Verdict:
    """Release what ``member`` has held, and the member; does nothing where the member is active and nothing is held.

    ``partition`` is needed only for a member whom the book does not know; without it that is a ``BookError``.
    """
    _check(member, reason, by, note)
    if immune_until_ms is not None and not 0 < immune_until_ms < TIMES_END_MS:
        raise UsageError(f"--immune-until: {immune_until_ms} ms is not a time that an event may have")
    name = stored(member)

    def work() -> Verdict:
        with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
            state, partition_id = _locked(cursor, member, partition)
            cursor.execute(HELD_DAYS, {"member": name})
            days = [day for (day,) in cursor.fetchall()]
            if not days and state == "active":
                return Verdict(member, state)
            settled = [day_text(day) for day in days if is_settled(cursor, day)]
            details = {"member": name, "immune_until_ms": immune_until_ms}
            action = act(cursor, "release", by=stored(by), reason=reason, note=stored(note), details=details)
            about = {"member": name, "settled": settled, "months": expiry_months(cursor)}
            postings = plan(cursor, RELEASED, about, of_entries=True)
            points = post(cursor, action)
            immunity = {} if immune_until_ms is None else {"immune_until": immune_until_ms}
            event = _tell(cursor, "member_released", member, partition_id, action, immunity)
            _set_state(cursor, name, "active", partition_id, action, immune_until_ms)
            return Verdict(member, "active", True, postings, points, event="" if dry_run else event)

    return retried(work)


def confirm(
    connection: Connection,
    member: str,
    *,
    reason: str,
    by: str,
    note: str = "",
    claw_back: tuple[int, int] | None = None,
    partition: str | None = None,
    dry_run: bool = False,
) -> Verdict:
    """Take back what ``member`` has held, and block the member; does nothing where both have been done.

    ``claw_back`` is the first and last day number of a span of business days, of whose entries everything that they
    still hold is taken back too. ``partition`` is needed only for a member whom the book does not know; without it that
    is a ``BookError``.
    """
    _check(member, reason, by, note)
    if claw_back and claw_back[0] > claw_back[1]:
        raise UsageError(
            f"--claw-back-from, --claw-back-to: {day_text(claw_back[0])} is after {day_text(claw_back[1])}"
        )
    name = stored(member)
    first, last = (day_text(day) for day in claw_back) if claw_back else (None, None)

    def work() -> Verdict:
        with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
            state, partition_id = _locked(cursor, member, partition)
            postings = plan(cursor, CONFIRMED, {"member": name, "first": first, "last": last}, of_entries=True)
            if not postings and state == "blocked":
                return Verdict(member, state)
            details = {"member": name, "claw_back": [first, last] if claw_back else None}
            action = act(cursor, "confirm", by=stored(by), reason=reason, note=stored(note), details=details)
            cursor.execute("SELECT coalesce(sum(points), 0)::bigint FROM moves WHERE kind = 'clawback'")
            clawed_back: int = (cursor.fetchone() or (0,))[0]
            points = post(cursor, action)
            if clawed_back:
                settle_again(cursor)
            event = _tell(cursor, "member_blocked", member, partition_id, action) if state != "blocked" else ""
            _set_state(cursor, name, "blocked", partition_id, action)
            return Verdict(member, "blocked", True, postings, points, clawed_back, "" if dry_run else event)

    return retried(work)


def _check(member: str, reason: str, by: str, note: str) -> None:
    check_text("--member", member)
    check_reason(reason)
    check_person(by)
    check_text("--note", note, shortest=0, longest=NOTE_BYTES)


def _locked(cursor: psycopg.Cursor[Any], member: str, partition: str | None) -> tuple[str, int]:
    """Lock a member and return the state and the partition that the book knows. Raises ``BookError``."""
    name = stored(member)
    partition_id = _partition_id(cursor, member, partition)
    lock_members(cursor, [name])
    cursor.execute("SELECT state FROM book.members WHERE member = %s FOR UPDATE", (name,))
    (state,) = cursor.fetchone() or ("active",)
    return state, partition_id


def _partition_id(cursor: psycopg.Cursor[Any], member: str, partition: str | None) -> int:
    """Return the partition that the member's events go to, for good: that of the newest one, or else the one named."""
    cursor.execute(
        """
        SELECT partition_id, name FROM book.partitions WHERE partition_id = coalesce(
            (SELECT partition_id FROM book.members WHERE member = %(member)s),
            (SELECT partition_id FROM book.entries WHERE member = %(member)s ORDER BY number DESC LIMIT 1))
        """,
        {"member": stored(member)},
    )
    known: tuple[int, str] | None = cursor.fetchone()
    if known is not None:
        if partition not in (None, known[1]):
            raise BookError(f"--partition: member {member} is in partition {known[1]}, not in {partition}")
        return known[0]
    if partition is None:
        raise BookError(f"--member: the book knows no member {member}; if there is one, name the --partition")
    cursor.execute("SELECT partition_id FROM book.partitions WHERE name = %s", (partition,))
    named: tuple[int] | None = cursor.fetchone()
    if named is None:
        raise BookError(f"--partition: the book knows no partition {partition}")
    return named[0]


def _tell(
    cursor: psycopg.Cursor[Any],
    kind: str,
    member: str,
    partition_id: int,
    action: int,
    attributes: Mapping[str, object] | None = None,
) -> str:
    return write_event(cursor, partition_id, {"kind": kind, "member": member, **(attributes or {})}, action)


def _set_state(
    cursor: psycopg.Cursor[Any],
    name: str,
    state: str,
    partition_id: int,
    number: int,
    immune_until_ms: int | None = None,
) -> None:
    """Note the state as it will be: the event is on its way, and until it is applied nobody needs to act again."""
    cursor.execute(
        """
        INSERT INTO book.members AS m (member, partition_id, state, immune_until_ms, number) VALUES (%s, %s, %s, %s, %s)
        ON CONFLICT (member) DO UPDATE SET state = excluded.state, number = excluded.number,
            immune_until_ms = CASE excluded.state WHEN 'active' THEN excluded.immune_until_ms ELSE m.immune_until_ms END
        """,
        (name, partition_id, state, immune_until_ms, number),
    )
