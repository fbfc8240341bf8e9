"""The event and the table it must obey (SPEC section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

import msgspec

from accrual.errors import InvalidEvent

__all__ = [
    "BUILT_IN_KINDS",
    "CONTROL_KINDS",
    "FIELDS",
    "LIMIT_KEYS",
    "MAXIMUM_AMOUNT_FEN",
    "MAXIMUM_TIME_MS",
    "ORDER_KIND",
    "REFUND_KIND",
    "Event",
    "is_absent",
    "time_of",
    "validate",
]

MAXIMUM_TIME_MS: Final = 2**53 - 1
MAXIMUM_AMOUNT_FEN: Final = 10**12
MAXIMUM_LINES: Final = 64
MAXIMUM_TAGS: Final = 8
IDENTITY_BYTES: Final = 64
NAME_BYTES: Final = 32

ORDER_KIND: Final = "order_paid"
REFUND_KIND: Final = "order_refunded"
# In the order in which the ledger numbers them (docs/LEDGER.md).
BUILT_IN_KINDS: Final = (REFUND_KIND, "member_updated", "member_frozen", "member_released", "member_blocked")
CONTROL_KINDS: Final = frozenset(BUILT_IN_KINDS) - {REFUND_KIND}
KINDS_WITH_AMOUNT: Final = frozenset({ORDER_KIND, REFUND_KIND})

LIMIT_KEYS: Final = ("member", "device", "ip", "phone")

# The order of the compact form (SPEC section 7); the last three travel in its `attributes` map.
FIELDS: Final = (
    "id",
    "kind",
    "member",
    "ts",
    "amount",
    "order",
    "device",
    "ip",
    "phone",
    "city",
    "lines",
    "tags",
    "tier",
    "card_until",
    "immune_until",
)


class Event(msgspec.Struct, frozen=True):
    """A valid event. Absent text is ``""``, an absent list ``()``, an absent number ``None``.

    ``ts``, ``card_until`` and ``immune_until`` are milliseconds since the epoch; amounts are fen. The arrival is not
    part of an event's content: it belongs to the stream entry that brought it.
    """

    id: str
    kind: str
    member: str
    ts: int
    amount: int | None = None
    order: str = ""
    device: str = ""
    ip: str = ""
    phone: str = ""
    city: str = ""
    lines: tuple[tuple[str, int], ...] = ()
    tags: tuple[str, ...] = ()
    tier: str = ""
    card_until: int | None = None
    immune_until: int | None = None


def is_absent(value: object) -> bool:
    """Tell whether ``value`` means *absent*: ``None``, an empty string or an empty list (SPEC section 1)."""
    return value is None or (isinstance(value, (str, list, tuple)) and not value)


def validate(fields: Mapping[str, Any]) -> Event:
    """Check decoded ``fields`` against the table and return the event they describe.

    Unknown fields, and ``at``, are ignored. Raises ``InvalidEvent`` naming the first offending field.
    """
    event = Event(
        id=_text(fields, "id", IDENTITY_BYTES, required=True),
        kind=_text(fields, "kind", NAME_BYTES, required=True),
        member=_text(fields, "member", IDENTITY_BYTES, required=True),
        ts=_required(time_of(fields, "ts"), "ts"),
        amount=_integer(fields, "amount", 0, MAXIMUM_AMOUNT_FEN),
        order=_text(fields, "order", IDENTITY_BYTES),
        device=_text(fields, "device", IDENTITY_BYTES),
        ip=_text(fields, "ip", IDENTITY_BYTES),
        phone=_text(fields, "phone", IDENTITY_BYTES),
        city=_text(fields, "city", NAME_BYTES),
        lines=_lines(fields.get("lines")),
        tags=_tags(fields.get("tags")),
        tier=_text(fields, "tier", NAME_BYTES),
        card_until=time_of(fields, "card_until"),
        immune_until=time_of(fields, "immune_until"),
    )
    if event.kind in KINDS_WITH_AMOUNT and event.amount is None:
        _refuse("amount", f"missing, and required for {event.kind}")
    if event.kind == REFUND_KIND and not event.order:
        _refuse("order", f"missing, and required for {event.kind}")
    if event.lines:
        total = sum(amount for _, amount in event.lines)
        if total != event.amount:
            _refuse("lines", f"sum to {total}, but amount is {event.amount}")
    return event


def time_of(fields: Mapping[str, Any], name: str) -> int | None:
    """Return the time in field ``name`` in ms since the epoch, or ``None`` where it is absent."""
    return _integer(fields, name, 1, MAXIMUM_TIME_MS)


def _refuse(name: str, why: str) -> NoReturn:
    raise InvalidEvent(f"{name}: {why}")


def _required(value: int | None, name: str) -> int:
    if value is None:
        _refuse(name, "missing")
    return value


def _check_text(value: object, name: str, limit_bytes: int) -> str:
    if not isinstance(value, str):
        _refuse(name, f"must be text, not {type(value).__name__}")
    try:
        size_bytes = len(value.encode())
    except UnicodeEncodeError:
        _refuse(name, "is not valid Unicode text")
    if size_bytes > limit_bytes:
        _refuse(name, f"has {size_bytes} bytes, more than {limit_bytes}")
    return value


def _text(fields: Mapping[str, Any], name: str, limit_bytes: int, *, required: bool = False) -> str:
    value = fields.get(name)
    if is_absent(value):
        if required:
            _refuse(name, "missing")
        return ""
    return _check_text(value, name, limit_bytes)


def _check_integer(value: object, name: str, low: int, high: int) -> int:
    if type(value) is not int:
        _refuse(name, f"must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        _refuse(name, f"{value if value.bit_length() <= 64 else 'an integer beyond 64 bits'} is outside {low}..{high}")
    return value


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    return None if is_absent(value) else _check_integer(value, name, low, high)


def _list(value: object, name: str, limit: int) -> list[Any] | tuple[Any, ...]:
    if is_absent(value):
        return ()
    if not isinstance(value, (list, tuple)):
        _refuse(name, f"must be a list, not {type(value).__name__}")
    if len(value) > limit:
        _refuse(name, f"has {len(value)} items, more than {limit}")
    return value


def _lines(value: object) -> tuple[tuple[str, int], ...]:
    lines = []
    for number, pair in enumerate(_list(value, "lines", MAXIMUM_LINES)):
        name = f"lines[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            _refuse(name, "must be a pair of category and amount")
        category = _check_text(pair[0], f"{name} category", NAME_BYTES)
        lines.append((category, _check_integer(pair[1], f"{name} amount", 0, MAXIMUM_AMOUNT_FEN)))
    return tuple(lines)


def _tags(value: object) -> tuple[str, ...]:
    items = _list(value, "tags", MAXIMUM_TAGS)
    return tuple(_check_text(tag, f"tags[{number}]", NAME_BYTES) for number, tag in enumerate(items))
