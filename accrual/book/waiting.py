"""The deferred events that wait in the book, and how they leave it: once each, with what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, LiteralString

import msgspec
import psycopg
from psycopg.types.json import Jsonb

__all__ = ["Deferred", "claim", "held_ids", "open_exception", "resolve", "take_turn", "waiting_after"]

# Deferred events are dealt with in the order in which they came, by one transaction at a time.
TURN_LOCK: Final = 0x736C_6F77  # "slow"

ORDER_KIND: Final = "order_paid"

QUERY: Final[LiteralString] = """
    SELECT d.partition_id, d.seq, d.number, d.day - date '1970-01-01', d.event, d.kind, d.member, d.order_id,
        d.amount_fen, d.device, d.ip, d.phone, d.payload, extract(epoch FROM now() - d.booked_at)::float8
    FROM book.waiting w JOIN book.deferred d USING (partition_id, seq)
"""


class Deferred(msgspec.Struct, frozen=True):
    """A deferred event; texts are as ``stored``, keys are fingerprints, ``waited_s`` is since it was booked."""

    partition_id: int
    seq: int
    number: int
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
    waited_s: float

    @property
    def place(self) -> tuple[int, int, int]:
        """Where it stands among all that wait."""
        return self.number, self.partition_id, self.seq


def take_turn(cursor: psycopg.Cursor[Any]) -> None:
    """Keep others from dealing with deferred events until the transaction ends."""
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", (TURN_LOCK,))


def waiting_after(
    cursor: psycopg.Cursor[Any], cause: str, place: tuple[int, int, int], limit: int, day: int | None = None
) -> list[Deferred]:
    """Return the first ``limit`` events of ``cause`` that wait behind ``place``; of one business day if it is given."""
    cursor.execute(
        QUERY
        + "WHERE w.cause = %(cause)s AND (w.number, w.partition_id, w.seq) > (%(number)s, %(partition_id)s, %(seq)s) "
        "AND (%(day)s::int IS NULL OR d.day = date '1970-01-01' + %(day)s::int) "
        "ORDER BY w.number, w.partition_id, w.seq LIMIT %(limit)s",
        {"cause": cause, "number": place[0], "partition_id": place[1], "seq": place[2], "day": day, "limit": limit},
    )
    return [Deferred(*row) for row in cursor.fetchall()]


def held_ids(cursor: psycopg.Cursor[Any], events: Sequence[Deferred]) -> set[str]:
    """Return the event ids that the book already holds."""
    cursor.execute("SELECT event FROM book.identities WHERE event = ANY(%s)", ([event.event for event in events],))
    return {event for (event,) in cursor.fetchall()}


def claim(cursor: psycopg.Cursor[Any], events: Sequence[Deferred], *, late: bool = False) -> None:
    """Book the event ids; ``late`` where the events become entries, and their orders are paid by them."""
    cursor.executemany(
        "INSERT INTO book.identities (event, day, partition_id, seq, late, paid_order) "
        "VALUES (%s, date '1970-01-01' + %s, %s, %s, %s, %s)",
        [
            (
                *(event.event, event.day, event.partition_id, event.seq, late),
                event.order_id if late and event.kind == ORDER_KIND else None,
            )
            for event in events
        ],
    )


def resolve(cursor: psycopg.Cursor[Any], events: Sequence[Deferred], result: str, action: int) -> None:
    """Note what became of ``events``, which wait no longer; what a person was asked about them is settled."""
    if not events:
        return
    keys = {"partitions": [event.partition_id for event in events], "seqs": [event.seq for event in events]}
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
    """Leave ``event`` to a person, saying why. To say the same again changes nothing."""
    cursor.execute(
        "INSERT INTO book.exceptions (kind, member, partition_id, seq, event, detail, data) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (kind, event.member, event.partition_id, event.seq, event.event, detail, Jsonb(data or {})),
    )
