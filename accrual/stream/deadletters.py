"""Dead letters on their stream: what is kept of each, and the way back.

An entry has the ID ``<number>-0`` (numbered from 1, as the checkpoint counts them) and the fields ``stream_id``,
``index``, ``reason``, ``detail`` and ``event`` (empty where the event is invalid), then the original: ``field:e`` (or
``b``, ``j``, whatever it was called) with the original bytes. Of a batch only the item is kept, under ``e`` or ``j``.
An original of very many fields is kept in one field ``fields``, a MessagePack array of names and values in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import redis

from accrual.outcomes import DeadLetter, Position, RejectedItem
from accrual.stream.checkpoint import parse_stream_id
from accrual.stream.keys import Keys
from accrual.stream.scripts import REDRIVE
from accrual.stream.server import with_fields_in_order

__all__ = ["StoredLetter", "last_letter", "letter_fields", "read_letters", "redrive"]

PAGE_ENTRIES: Final = 500
ORIGINAL: Final = b"field:"
PACKED: Final = b"fields"
# A script hands the fields to one command, and Lua's stack has room for some 8 000 values.
MAXIMUM_PLAIN_FIELDS: Final = 1_000

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[bytes]).decode
_line = msgspec.json.Encoder(order="sorted").encode


class StoredLetter(msgspec.Struct, frozen=True):
    """A dead letter as it is stored: ``number`` counts from 1, ``item`` is what the engine rejected."""

    number: int
    item: RejectedItem

    @property
    def entry_id(self) -> str:
        """The ID of its entry in the stream of dead letters."""
        return f"{self.number}-0"

    @property
    def can_be_redriven(self) -> bool:
        """Whether its original fits a script's call; an entry of so many fields would be invalid again anyway."""
        return len(self.item.original) <= MAXIMUM_PLAIN_FIELDS

    def line(self, **more: str) -> bytes:
        """Return it, and ``more`` if given, as a line of JSON (no newline): keys sorted, no spaces."""
        position, letter = self.item.position, self.item.letter
        return _line(
            {
                "detail": letter.detail,
                "event": letter.event,
                "id": self.entry_id,
                "index": position.index,
                "reason": letter.reason,
                "stream_id": position.stream_id,
                **more,
            }
        )


def letter_fields(item: RejectedItem) -> list[bytes]:
    """Return the field names and values of the entry that keeps ``item``."""
    letter = item.letter
    about = {
        "stream_id": item.position.stream_id,
        "index": str(item.position.index),
        "reason": letter.reason,
        "detail": letter.detail,
        "event": letter.event or "",
    }
    fields = [text.encode(errors="replace") for pair in about.items() for text in pair]
    if len(item.original) > MAXIMUM_PLAIN_FIELDS:
        return [*fields, PACKED, _pack([part for pair in item.original for part in pair])]
    for name, value in item.original:
        fields += [ORIGINAL + name, value]
    return fields


def last_letter(client: redis.Redis, keys: Keys) -> int:
    """Return the number of the last dead letter, 0 where there is none."""
    page: Any = client.xrevrange(keys.deadletters, "+", "-", 1)
    return parse_stream_id(page[0][0])[0] if page else 0


def read_letters(client: redis.Redis, keys: Keys, last: int, reason: str | None = None) -> Iterator[StoredLetter]:
    """Yield the dead letters up to number ``last``, oldest first; only those of ``reason`` where one is given."""
    plain = with_fields_in_order(client)
    first = 1
    while first <= last:
        page: Any = plain.xrange(keys.deadletters, f"{first}-0", f"{last}-0", PAGE_ENTRIES)
        for entry_id, values in page:
            stored = _stored(entry_id, values)
            if reason is None or stored.item.letter.reason == reason:
                yield stored
        if len(page) < PAGE_ENTRIES:
            return
        first = parse_stream_id(page[-1][0])[0] + 1


def redrive(client: redis.Redis, keys: Keys, letter: StoredLetter) -> str | None:
    """Move a dead letter back into the events stream; return its new stream ID, ``None`` where it is gone already."""
    script: Any = client.register_script(REDRIVE.text)
    added = script(keys=[keys.deadletters, keys.events, keys.checkpoint], args=[letter.entry_id])
    return None if added is None else added.decode()


def _stored(entry_id: bytes, values: list[bytes]) -> StoredLetter:
    number, _ = parse_stream_id(entry_id)
    pairs = list(zip(values[::2], values[1::2], strict=True))
    about = dict(pairs[:5])
    if pairs[5:] and pairs[5][0] == PACKED:
        parts = _unpack(pairs[5][1])
        original = list(zip(parts[::2], parts[1::2], strict=True))
    else:
        original = [(name.removeprefix(ORIGINAL), value) for name, value in pairs[5:]]
    ms, seq = parse_stream_id(about[b"stream_id"])
    letter = msgspec.convert(
        {
            "event": about[b"event"].decode() or None,
            "reason": about[b"reason"].decode(),
            "detail": about[b"detail"].decode(),
        },
        DeadLetter,
    )
    return StoredLetter(number, RejectedItem(Position(ms, seq, int(about[b"index"])), letter, tuple(original)))
