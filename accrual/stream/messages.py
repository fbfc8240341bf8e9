"""Messages of the book to a partition's streams, each appended once (outbox.lua)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import redis

from accrual.stream.checkpoint import parse_stream_id
from accrual.stream.keys import Keys
from accrual.stream.scripts import OUTBOX

__all__ = ["Message", "send_messages", "sent_position", "stream_time_ms"]


class Message(msgspec.Struct, frozen=True):
    """The message at ``position`` (from 1): an event in its compact form, or a notification in JSON."""

    position: int
    is_event: bool
    value: bytes


def send_messages(client: redis.Redis, keys: Keys, messages: Sequence[Message]) -> int:
    """Append ``messages``, in order of their positions, to their streams; return how many had not been sent before.

    With a message all those at lower positions count as sent.
    """
    script: Any = client.register_script(OUTBOX.text)
    arguments: list[int | str | bytes] = []
    for message in messages:
        # The numbers are those of the keys, from 1 as Lua counts.
        stream, field = (2, "e") if message.is_event else (3, "n")
        arguments += [message.position, stream, field, message.value]
    return int(script(keys=[keys.outbox, keys.events, keys.notifications], args=arguments))


def sent_position(client: redis.Redis, keys: Keys) -> int | None:
    """Return the position up to which the server has the messages; ``None`` where it has never had any."""
    sent: Any = client.hget(keys.outbox, "sent")
    return None if sent is None else int(sent)


def stream_time_ms(client: redis.Redis, keys: Keys) -> int:
    """Return the time that an event appended now arrives at: the server's, or the last entry's if that is later."""
    seconds, microseconds = client.time()
    page: Any = client.xrevrange(keys.events, "+", "-", 1)
    last_ms = parse_stream_id(page[0][0])[0] if page else 0
    return max(last_ms, seconds * 1000 + microseconds // 1000)
