"""The transactional outbox: messages are written with what they tell of, and sent afterwards, each exactly once.

A message is sent in three steps, and whoever sends may die between any two of them:

1. it gets its position, the next one of its partition, and that is committed;
2. a script on the server appends it unless that position was sent before, and notes the position (outbox.lua);
3. it is marked as sent.

An event gets its ``ts`` when it is sent, so that it is never too old to be applied. What the stream server loses under
its durability setting (docs/DURABILITY.md) it loses together with the note of it, since both are in one hash slot: so
whoever sends next sees that it is gone, and sends it again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import psycopg
import redis

from accrual.book.chunks import is_stopped
from accrual.book.database import Connection
from accrual.events import encode_compact, validate
from accrual.stream import Keys, Message, send_messages, sent_position, stream_time_ms

__all__ = ["NOTIFICATIONS", "send_outbox", "write_event"]

EVENTS: Final = "events"
NOTIFICATIONS: Final = "notifications"

# Of the senders of a partition, one at a time.
SENDER_LOCK: Final = 0x6F75_7462  # "outb"
# So many in one command: the server does nothing else meanwhile.
PAGE_MESSAGES: Final = 100

# Whether anything of a partition waits, and the last position that is marked as sent.
STANDING: Final = """
    SELECT EXISTS (SELECT FROM book.outbox WHERE partition_id = %(partition_id)s AND sent_at IS NULL),
        (SELECT max(position) FROM book.outbox WHERE partition_id = %(partition_id)s AND sent_at IS NOT NULL)
"""

# Positions go on behind what the server has, of which a database restored from a backup may not know. The order is that
# of the index, in which those without a position are sorted already.
PLACE: Final = """
    UPDATE book.outbox o SET position = p.next FROM (
        SELECT message, row_number() OVER (ORDER BY position, message) + greatest(%(sent)s,
            (SELECT max(position) FROM book.outbox WHERE partition_id = %(partition_id)s)) AS next
        FROM book.outbox WHERE partition_id = %(partition_id)s AND sent_at IS NULL AND position IS NULL
        ORDER BY position, message LIMIT %(limit)s
    ) p WHERE (o.partition_id, o.message) = (%(partition_id)s, p.message)
"""

PAGE: Final = """
    SELECT position, stream, value FROM book.outbox
    WHERE partition_id = %(partition_id)s AND sent_at IS NULL AND position IS NOT NULL ORDER BY position LIMIT %(limit)s
"""

MARK: Final = """
    UPDATE book.outbox SET sent_at = now()
    WHERE partition_id = %(partition_id)s AND position BETWEEN %(first)s AND %(last)s AND sent_at IS NULL
"""

RECALL: Final = """
    UPDATE book.outbox SET sent_at = NULL
    WHERE partition_id = %(partition_id)s AND position > %(sent)s AND sent_at IS NOT NULL
"""

log = logging.getLogger("accrual.book")

_encode = msgspec.json.Encoder(order="sorted").encode
_decode = msgspec.json.decode


def write_event(cursor: psycopg.Cursor[Any], partition_id: int, event: Mapping[str, object], action: int) -> str:
    """Write an event, without ``id`` and ``ts``, into the outbox, and return the id that it will have.

    Raises ``InvalidEvent`` for one that could never be sent.
    """
    cursor.execute("SELECT nextval('book.numbers')")
    message: int = (cursor.fetchone() or (0,))[0]
    event_id = f"book-{message}"
    validate({"id": event_id, **event, "ts": 1})
    cursor.execute(
        "INSERT INTO book.outbox (partition_id, message, stream, value, action) VALUES (%s, %s, %s, %s, %s)",
        (partition_id, message, EVENTS, _encode({"id": event_id, **event}), action),
    )
    return event_id


def send_outbox(connection: Connection, client: redis.Redis, stopping: threading.Event | None = None) -> int:
    """Send what is in the outbox and return how many messages were sent. Errors of the client pass through.

    A partition that somebody else is sending is left to them. Once ``stopping`` is set, what is left is for the next
    sender.
    """
    rows = connection.execute(
        "SELECT partition_id, name FROM book.partitions p "
        "WHERE EXISTS (SELECT FROM book.outbox WHERE partition_id = p.partition_id) ORDER BY name"
    ).fetchall()
    return sum(_send_partition(connection, client, partition_id, Keys(name), stopping) for partition_id, name in rows)


def _send_partition(
    connection: Connection, client: redis.Redis, partition_id: int, keys: Keys, stopping: threading.Event | None
) -> int:
    sent = 0
    # Who finds the partition taken leaves what they wrote to whoever has it, who therefore looks again afterwards.
    while not is_stopped(stopping) and _is_behind(connection, client, partition_id, keys):
        if not _take(connection, partition_id):
            break
        try:
            _recall(connection, client, partition_id, keys)
            while not is_stopped(stopping) and (count := _send_page(connection, client, partition_id, keys)):
                sent += count
        finally:
            if not connection.broken:
                connection.execute("SELECT pg_advisory_unlock(%s, %s)", (SENDER_LOCK, partition_id))
    return sent


def _is_behind(connection: Connection, client: redis.Redis, partition_id: int, keys: Keys) -> bool:
    """Tell whether the server lacks a message, be it that it has not been sent or that it was lost."""
    waiting, marked = connection.execute(STANDING, {"partition_id": partition_id}).fetchone() or (False, None)
    if waiting or marked is None:
        return bool(waiting)
    sent = sent_position(client, keys)
    return sent is not None and sent < marked


def _take(connection: Connection, partition_id: int) -> bool:
    row = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", (SENDER_LOCK, partition_id)).fetchone()
    return row == (True,)


def _recall(connection: Connection, client: redis.Redis, partition_id: int, keys: Keys) -> None:
    """Take back the marks of messages that the server has lost, unless it has lost everything and begins anew."""
    sent = sent_position(client, keys)
    if sent is None:
        return
    lost = connection.execute(RECALL, {"partition_id": partition_id, "sent": sent}).rowcount
    if lost:
        log.warning("partition %s: the server has lost %d messages of the book; sending again", keys.partition, lost)


def _send_page(connection: Connection, client: redis.Redis, partition_id: int, keys: Keys) -> int:
    """Send the next messages and return how many they were; some of them may have been sent before."""
    parameters = {"partition_id": partition_id, "limit": PAGE_MESSAGES}
    connection.execute(PLACE, parameters | {"sent": sent_position(client, keys) or 0})
    rows = connection.execute(PAGE, parameters).fetchall()
    if rows:
        now_ms = stream_time_ms(client, keys)
        messages = [_message(position, stream, value, now_ms) for position, stream, value in rows]
        send_messages(client, keys, messages)
        connection.execute(MARK, {"partition_id": partition_id, "first": rows[0][0], "last": rows[-1][0]})
    return len(rows)


def _message(position: int, stream: str, value: bytes, now_ms: int) -> Message:
    if stream != EVENTS:
        return Message(position, is_event=False, value=value)
    fields: dict[str, Any] = _decode(value)
    return Message(position, is_event=True, value=encode_compact(validate(fields | {"ts": now_ms})))
