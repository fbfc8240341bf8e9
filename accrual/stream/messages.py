"""Messages of the book to a partition's streams, each appended once (outbox.lua)."""

from __future__ import annotations

from typing import Any

import redis

from accrual.stream.checkpoint import parse_stream_id
from accrual.stream.keys import Keys
from accrual.stream.scripts import OUTBOX

__all__ = ["send_message", "stream_time_ms"]


def send_message(client: redis.Redis, keys: Keys, stream: str, position: int, field: str, value: bytes) -> str | None:
    """Append the message at ``position`` (from 1) to ``stream``; return its ID, ``None`` where it had been sent.

    Positions must come in order: with one, all before it count as sent.
    """
    script: Any = client.register_script(OUTBOX.text)
    added = script(keys=[stream, keys.outbox], args=[position, field, value])
    return None if added is None else added.decode()


def stream_time_ms(client: redis.Redis, keys: Keys) -> int:
    """Return the time that an event appended now arrives at: the server's, or the last entry's if that is later."""
    seconds, microseconds = client.time()
    page: Any = client.xrevrange(keys.events, "+", "-", 1)
    last_ms = parse_stream_id(page[0][0])[0] if page else 0
    return max(last_ms, seconds * 1000 + microseconds // 1000)
