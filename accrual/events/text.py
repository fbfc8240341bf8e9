"""The JSON form of an event (SPEC sections 1, 5 and 7)."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

import msgspec

from accrual.errors import InvalidEvent
from accrual.events.compact import MAXIMUM_DEPTH
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


WHITESPACE: Final = b" \t\r\n"
INTEGER_DIGITS: Final = 20
BEYOND_INTEGERS: Final = 1 << 64

_encode = msgspec.msgpack.Encoder().encode
_astuple = msgspec.structs.astuple
_decode = msgspec.json.Decoder().decode
_decode_plain = msgspec.json.Decoder(_PlainEvent).decode
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode

_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_TOKENS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)


def _integer(text: str) -> int:
    """Convert an integer, whatever the interpreter's limit on digits; beyond 64 bits one is as good as another."""
    return int(text) if len(text) <= INTEGER_DIGITS else BEYOND_INTEGERS


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_decode_any = json.JSONDecoder(parse_int=_integer, parse_constant=_refuse_constant).decode


def mapping_from_json(data: bytes) -> dict[str, Any]:
    """Decode one JSON object. Raises ``InvalidEvent`` where ``data`` is anything else, or nests too deep."""
    if _nests_too_deep(data):
        raise InvalidEvent(f"containers nest deeper than {MAXIMUM_DEPTH}, or their brackets do not match")
    try:
        value = _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        value = _decode_leniently(data)
    if not isinstance(value, dict):
        raise InvalidEvent(f"must be a JSON object, not {type(value).__name__}")
    return value


def _nests_too_deep(data: bytes) -> bool:
    """Tell whether a JSON value has more than ``MAXIMUM_DEPTH`` containers in each other, itself included.

    A property of the bytes, so that an event is as valid in a deep call stack as in a shallow one: what passes can be
    decoded in either. Brackets that do not match count as too deep where there are many of them.
    """
    if data.count(b"[") + data.count(b"{") <= MAXIMUM_DEPTH:
        return False
    outside_texts = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    brackets = b"".join(outside_texts).translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(MAXIMUM_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _decode_leniently(data: bytes) -> Any:
    """Decode what is JSON by its grammar: texts with lone surrogates and numbers of any size are, and may be ignored.

    Raises ``InvalidEvent`` where it is not. Slower than ``_decode``, which refuses them.
    """
    try:
        return _decode_any(data.decode())
    except ValueError as error:
        raise InvalidEvent(f"does not decode as JSON: {error}") from None


def is_json_array(data: bytes) -> bool:
    """Tell whether ``data``, if it is JSON at all, is an array."""
    return data.lstrip(WHITESPACE)[:1] == b"["


def items_of_json(data: bytes) -> list[bytes]:
    """Split the value of a stream entry's `j` field into the bytes of its events: an object, or an array's items.

    Raises ``InvalidEvent`` where the value as a whole does not decode, or is an empty array.
    """
    if not is_json_array(data):
        mapping_from_json(data)
        return [data]
    try:
        items = [bytes(item) for item in _split(data)]
        data.decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _split_leniently(data)
    if not items:
        raise InvalidEvent("the batch is empty")
    return items


def _split_leniently(data: bytes) -> list[bytes]:
    """Split an array by its brackets and commas, whatever is wrong with its items, if only they are JSON.

    An item that nests too deep is not looked into: to be refused, it need not be JSON.
    """
    items, depth, start = [], 0, 0
    for token in _TOKENS.finditer(data):
        mark, place = token[0], token.start()
        if mark in (b"[", b"{"):
            depth += 1
            start = start if depth > 1 else place + 1
        elif mark in (b"]", b"}"):
            depth -= 1
        if depth == 0 or (depth == 1 and mark == b","):
            items.append(data[start:place].strip(WHITESPACE))
            start = place + 1
        if depth == 0:
            break
    if depth or data[start - 1 :].rstrip(WHITESPACE) != b"]":
        raise InvalidEvent("does not decode as JSON: the array does not end with the value")
    for item in items:
        if not _nests_too_deep(item):
            _decode_leniently(item)
    return items


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
    except (msgspec.MsgspecError, ValueError, OverflowError):
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
    except (OverflowError, UnicodeEncodeError) as error:
        raise InvalidEvent(f"does not encode: {error}") from None
