"""The deferred events that wait in the book, and how they leave it: once each, with what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, LiteralString

import msgspec
import psycopg
from psycopg.types.json import Jsonb

from accrual.events import ORDER_KIND

__all__ = [
    "Deferred",
    "claim",
    "held_ids",
    "late_events",
    "open_exception",
    "refunds_to_judge",
    "resolve",
    "take_turn",
]

# Deferred events are dealt with in the order in which they came, by one transaction at a time.
TURN_LOCK: Final = 0x736C_6F77  # "slow"


COLUMNS: Final[LiteralString] = """
    d.partition_id, d.seq, d.day - date '1970-01-01', d.event, d.kind, d.member, d.order_id, d.amount_fen,
    d.device, d.ip, d.phone, d.payload
"""
IN_ORDER: Final[LiteralString] = "ORDER BY w.number, w.partition_id, w.seq LIMIT %(limit)s"

LATE: Final[LiteralString] = f"""
    SELECT {COLUMNS}, false FROM book.waiting w JOIN book.deferred d USING (partition_id, seq)
    WHERE w.cause = 'late' {IN_ORDER}
"""  # noqa: S608

# A refund whose order nobody knows is left alone until there is something to be done about it. By `OFFSET 0` they are
# looked at one after the other, until there are as many as wanted: otherwise the database reads all it ever booked.
REFUNDS: Final[LiteralString] = f"""
    SELECT {COLUMNS}, d.given_up FROM book.waiting w CROSS JOIN LATERAL (
        SELECT d.*, x.closed_at IS NOT NULL AS given_up FROM book.deferred d
        LEFT JOIN book.exceptions x
            ON x.kind = 'order_unknown' AND (x.partition_id, x.seq, x.event) = (d.partition_id, d.seq, d.event)
        WHERE (d.partition_id, d.seq) = (w.partition_id, w.seq) AND (
            EXISTS (SELECT FROM book.identities i WHERE i.event = d.event)
            OR EXISTS (
                SELECT FROM book.identities i
                JOIN book.entries e ON (e.day, e.member) = (i.day, i.payer)
                    AND (e.partition_id, e.seq, e.late) = (i.partition_id, i.seq, i.late)
                WHERE i.paid_order = d.order_id
            )
            OR x.closed_at IS NOT NULL
            OR (x.exception IS NULL AND d.booked_at <= now() - make_interval(secs => %(wait_s)s))
        )
        OFFSET 0
    ) d
    WHERE w.cause = 'refund' {IN_ORDER}
"""  # noqa: S608


class Deferred(msgspec.Struct, frozen=True):
    """A deferred event; texts are as ``stored``, keys are fingerprints.

    ``given_up`` is a refund whose order was unknown until a person dealt with it.
    """

    partition_id: int
    seq: int
    day: int
    event: str
    kind: str
    member: str
    order_id: str | None
    amount_fen: int | None
    device: int | None
    ip: int | None
    phone: int | None
    payload: bytes
    given_up: bool


def take_turn(cursor: psycopg.Cursor[Any]) -> None:
    """Keep others from dealing with deferred events until the transaction ends."""
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", (TURN_LOCK,))


def late_events(cursor: psycopg.Cursor[Any], limit: int) -> list[Deferred]:
    """Return the first late events that wait, in order, at most ``limit``."""
    cursor.execute(LATE, {"limit": limit})
    return [Deferred(*row) for row in cursor.fetchall()]


def refunds_to_judge(cursor: psycopg.Cursor[Any], limit: int, wait_s: float) -> list[Deferred]:
    """Return the first refunds that wait and can be dealt with, in order, at most ``limit``.

    Their order is known, or their id is booked, or they have waited for longer than ``wait_s`` and nobody was told yet,
    or a person has dealt with them.
    """
    cursor.execute(REFUNDS, {"limit": limit, "wait_s": wait_s})
    return [Deferred(*row) for row in cursor.fetchall()]


def held_ids(cursor: psycopg.Cursor[Any], events: Sequence[Deferred]) -> set[str]:
    """Return the event ids that the book already holds."""
    cursor.execute("SELECT event FROM book.identities WHERE event = ANY(%s)", ([event.event for event in events],))
    return {event for (event,) in cursor.fetchall()}


def claim(cursor: psycopg.Cursor[Any], events: Sequence[Deferred], *, late: bool = False) -> None:
    """Book the event ids; ``late`` where the events become entries, and their orders are paid by them.

    Raises ``SerializationFailure`` where an ingester has booked one of them since ``held_ids``: tried again, that event
    is a duplicate.
    """
    cursor.execute(
        """
        INSERT INTO book.identities (event, day, partition_id, seq, late, paid_order, payer)
        SELECT event, day, partition_id, seq, %(late)s, CASE WHEN pays THEN order_id END, CASE WHEN pays THEN member END
        FROM book.deferred CROSS JOIN LATERAL (
            SELECT %(late)s AND kind = %(kind)s AND order_id IS NOT NULL AS pays
        ) d JOIN unnest(%(partitions)s::smallint[], %(seqs)s::bigint[]) AS c (partition_id, seq)
            USING (partition_id, seq)
        ORDER BY event ON CONFLICT DO NOTHING
        """,
        {"late": late, "kind": ORDER_KIND, **_keys(events)},
    )
    if cursor.rowcount < len(events):
        raise psycopg.errors.SerializationFailure("an event id was booked at the same moment")


def resolve(cursor: psycopg.Cursor[Any], events: Sequence[Deferred], result: str, action: int) -> None:
    """Note what became of ``events``, which wait no longer; what a person was asked about them is settled."""
    if not events:
        return
    keys = _keys(events)
    cursor.execute(
        "INSERT INTO book.resolutions (partition_id, seq, result, action) "
        "SELECT *, %(result)s, %(action)s FROM unnest(%(partitions)s::smallint[], %(seqs)s::bigint[])",
        {**keys, "result": result, "action": action},
    )
    cursor.execute(
        "DELETE FROM book.waiting WHERE (partition_id, seq) IN "
        "(SELECT * FROM unnest(%(partitions)s::smallint[], %(seqs)s::bigint[]))",
        keys,
    )
    if result != "exception":
        cursor.execute(
            "UPDATE book.exceptions SET closed_at = now(), closed_by = %(action)s WHERE closed_at IS NULL AND "
            "(partition_id, seq) IN (SELECT * FROM unnest(%(partitions)s::smallint[], %(seqs)s::bigint[]))",
            {**keys, "action": action},
        )


def open_exception(
    cursor: psycopg.Cursor[Any], kind: str, event: Deferred, detail: str, data: dict[str, object] | None = None
) -> None:
    """Leave ``event`` to a person, saying why, in texts as ``stored``. To say the same again changes nothing."""
    cursor.execute(
        "INSERT INTO book.exceptions (kind, member, partition_id, seq, event, detail, data) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (kind, event.member, event.partition_id, event.seq, event.event, detail, Jsonb(data or {})),
    )


def _keys(events: Sequence[Deferred]) -> dict[str, list[int]]:
    return {"partitions": [event.partition_id for event in events], "seqs": [event.seq for event in events]}
