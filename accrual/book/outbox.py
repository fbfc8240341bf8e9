"""The transactional outbox: messages are written with what they tell of, and sent afterwards, each exactly once.

A message is sent in three steps, and whoever sends may die between any two of them:

1. it gets its position, the next one of its partition, and that is committed;
2. a script on the server appends it unless that position was sent before, and notes the position (outbox.lua);
3. it is marked as sent.

An event gets its ``ts`` when it is sent, so that it is never too old to be applied. What the stream server loses under
its durability setting (docs/DURABILITY.md) is lost with the note of it, and not sent again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import psycopg
import redis

from accrual.book.database import Connection
from accrual.events import encode_compact, validate
from accrual.stream import Keys, send_message, stream_time_ms

__all__ = ["NOTIFICATIONS", "send_outbox", "write_event"]

EVENTS: Final = "events"
NOTIFICATIONS: Final = "notifications"

# Of the senders of a partition, one at a time.
SENDER_LOCK: Final = 0x6F75_7462  # "outb"

_encode = msgspec.json.Encoder(order="sorted").encode
_decode = msgspec.json.decode


def write_event(cursor: psycopg.Cursor[Any], partition_id: int, event: Mapping[str, object], action: int) -> str:
    """Write an event, without ``id`` and ``ts``, into the outbox, and return the id that it will have."""
    cursor.execute("SELECT nextval('book.numbers')")
    message: int = (cursor.fetchone() or (0,))[0]
    event_id = f"book-{message}"
    cursor.execute(
        "INSERT INTO book.outbox (partition_id, message, stream, value, action) VALUES (%s, %s, %s, %s, %s)",
        (partition_id, message, EVENTS, _encode({"id": event_id, **event}), action),
    )
    return event_id


def send_outbox(connection: Connection, client: redis.Redis) -> int:
    """Send what is in the outbox and return how many messages were sent. Errors of the client pass through.

    A partition that somebody else is sending is left to them.
    """
    rows = connection.execute(
        "SELECT DISTINCT p.partition_id, p.name FROM book.outbox o JOIN book.partitions p USING (partition_id) "
        "WHERE o.sent_at IS NULL ORDER BY 2"
    ).fetchall()
    return sum(_send_partition(connection, client, partition_id, Keys(name)) for partition_id, name in rows)


def _send_partition(connection: Connection, client: redis.Redis, partition_id: int, keys: Keys) -> int:
    (locked,) = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", (SENDER_LOCK, partition_id)).fetchone() or (
        False,
    )
    if not locked:
        return 0
    try:
        _place(connection, partition_id)
        rows = connection.execute(
            "SELECT message, stream, position, value FROM book.outbox WHERE partition_id = %s AND sent_at IS NULL "
            "AND position IS NOT NULL ORDER BY position",
            (partition_id,),
        ).fetchall()
        for message, stream, position, value in rows:
            if stream == EVENTS:
                send_message(client, keys, keys.events, position, "e", _event(client, keys, value))
            else:
                send_message(client, keys, keys.notifications, position, "n", value)
            connection.execute(
                "UPDATE book.outbox SET sent_at = now() WHERE (partition_id, message) = (%s, %s)",
                (partition_id, message),
            )
        return len(rows)
    finally:
        if not connection.broken:
            connection.execute("SELECT pg_advisory_unlock(%s, %s)", (SENDER_LOCK, partition_id))


def _place(connection: Connection, partition_id: int) -> None:
    """Give their positions to the messages that have none, in the order in which they were written."""
    connection.execute(
        """
        UPDATE book.outbox o SET position = p.position FROM (
            SELECT message, row_number() OVER (ORDER BY message)
                + coalesce((SELECT max(position) FROM book.outbox WHERE partition_id = %(partition_id)s), 0) AS position
            FROM book.outbox WHERE partition_id = %(partition_id)s AND position IS NULL
        ) p WHERE (o.partition_id, o.message) = (%(partition_id)s, p.message)
        """,
        {"partition_id": partition_id},
    )


def _event(client: redis.Redis, keys: Keys, value: bytes) -> bytes:
    fields: dict[str, Any] = _decode(value)
    return encode_compact(validate(fields | {"ts": stream_time_ms(client, keys)}))


def waiting_seconds(connection: Connection) -> float:
    """Return for how long the oldest message waits to be sent; 0 where none does."""
    (since,) = connection.execute(
        "SELECT extract(epoch FROM min(a.done_at))::float8 FROM book.outbox o JOIN book.actions a USING (action) "
        "WHERE o.sent_at IS NULL"
    ).fetchone() or (None,)
    return 0.0 if since is None else max(0.0, time.time() - since)
