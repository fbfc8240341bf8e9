"""The JSON form of an event (SPEC sections 1, 5 and 7)."""

from __future__ import annotations

from typing import Any

import msgspec

from accrual.errors import InvalidEvent
from accrual.events.model import time_of

__all__ = [
    "arrival_of",
    "compact_from_mapping",
    "compact_if_plain",
    "is_json_array",
    "items_of_json",
    "mapping_from_json",
]


class _PlainEvent(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """An event with nothing unusual about it: no unknown field, every type the one of the table.

    Its fields are the items of a compact array in their order, but for the attributes, which few events have.
    """

    id: str | None = None
    kind: str | None = None
    member: str | None = None
    ts: int | None = None
    amount: int | None = None
    order: str | None = None
    device: str | None = None
    ip: str | None = None
    phone: str | None = None
    city: str | None = None
    lines: list[tuple[str, int]] | None = None
    tags: list[str] | None = None


_encode = msgspec.msgpack.Encoder().encode
_astuple = msgspec.structs.astuple
_decoder = msgspec.json.Decoder()
_decode_plain = msgspec.json.Decoder(_PlainEvent).decode
_item_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def mapping_from_json(data: bytes) -> dict[str, Any]:
    """Decode one JSON object. Raises ``InvalidEvent`` where ``data`` is anything else."""
    try:
        value = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent(f"does not decode as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidEvent(f"must be a JSON object, not {type(value).__name__}")
    return value


def is_json_array(data: bytes) -> bool:
    """Tell whether ``data``, if it is JSON at all, is an array."""
    return data.lstrip(b" \t\r\n")[:1] == b"["


def items_of_json(data: bytes) -> list[bytes]:
    """Split the value of a stream entry's `j` field into the bytes of its events: an object, or an array's items.

    Raises ``InvalidEvent`` where the value as a whole does not decode, or is an empty array.
    """
    if not is_json_array(data):
        mapping_from_json(data)
        return [data]
    try:
        items = _item_decoder.decode(data)
        data.decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent(f"does not decode as JSON: {error}") from None
    if not items:
        raise InvalidEvent("the batch is empty")
    return [bytes(item) for item in items]


def arrival_of(fields: dict[str, Any]) -> int:
    """Return the arrival of an offline event in ms since the epoch: ``at``, or ``ts`` where there is none."""
    at = time_of(fields, "at")
    if at is None:
        at = time_of(fields, "ts")
    if at is None:
        raise InvalidEvent("ts: missing")
    return at


def compact_if_plain(data: bytes) -> bytes | None:
    """Re-encode one JSON object with nothing unusual about it as a compact array, or return ``None``.

    A shortcut for nearly all events past ``mapping_from_json`` and ``compact_from_mapping``, with the same result.
    """
    try:
        return _encode(_astuple(_decode_plain(data)))
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return None


def compact_from_mapping(fields: dict[str, Any]) -> bytes:
    """Re-encode decoded JSON ``fields`` as a compact array without judging them: the decoder of that form will.

    Raises ``InvalidEvent`` for what MessagePack cannot hold (an integer beyond 64 bits).
    """
    get = fields.get
    attributes = None
    if "tier" in fields or "card_until" in fields or "immune_until" in fields:
        attributes = {"tier": get("tier"), "card_until": get("card_until"), "immune_until": get("immune_until")}
    try:
        return _encode(
            (
                *(get("id"), get("kind"), get("member"), get("ts"), get("amount"), get("order")),
                *(get("device"), get("ip"), get("phone"), get("city"), get("lines"), get("tags")),
                attributes,
            )
        )
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidEvent(f"does not encode: {error}") from None
