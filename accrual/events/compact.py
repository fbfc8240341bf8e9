"""The compact form of an event: a MessagePack array (SPEC section 7).

The reader here is plain and strict on purpose: it is the twin against which the compiled decoder is tested, so it must
say exactly which bytes decode. It reads the MessagePack types that an event can hold; everything else it only skips.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from accrual.errors import InvalidEvent
from accrual.events.model import Event, is_absent, validate

__all__ = ["MAXIMUM_DEPTH", "decode_compact", "encode_compact", "split_batch", "unpack"]

MAXIMUM_DEPTH: Final = 32
POSITIONS: Final = (
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
    "attributes",
)
ATTRIBUTES: Final = ("tier", "card_until", "immune_until")

_encoder = msgspec.msgpack.Encoder()


class Opaque:
    """A value that decodes but has a type no field accepts: bin, ext, float, a map that is not `attributes`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


def encode_compact(event: Event) -> bytes:
    """Return the canonical compact form: shortest MessagePack encodings, trailing absent items left out."""
    attributes = None
    if event.tier or event.card_until or event.immune_until:
        values = (event.tier, event.card_until, event.immune_until)
        attributes = {name: value for name, value in zip(ATTRIBUTES, values, strict=True) if value}
    items = [
        event.id,
        event.kind,
        event.member,
        event.ts,
        event.amount,
        event.order or None,
        event.device or None,
        event.ip or None,
        event.phone or None,
        event.city or None,
        event.lines or None,
        event.tags or None,
        attributes,
    ]
    while items[-1] is None:
        items.pop()
    return _encoder.encode(items)


def decode_compact(data: bytes) -> Event:
    """Decode one compact event. Raises ``InvalidEvent`` where ``data`` does not decode or breaks the table."""
    value = unpack(data)
    if not isinstance(value, list):
        raise InvalidEvent("a compact event must be a MessagePack array")
    fields = dict(zip(POSITIONS, value, strict=False))
    attributes = fields.pop("attributes", None)
    if not is_absent(attributes):
        if not isinstance(attributes, dict):
            raise InvalidEvent("attributes: must be a map")
        fields.update({name: attributes[name] for name in ATTRIBUTES if name in attributes})
    return validate(fields)


def split_batch(data: bytes) -> list[bytes]:
    """Split a MessagePack array into the bytes of its items, undecoded and however deep they nest.

    Raises ``InvalidEvent`` where ``data`` as a whole does not decode, is not an array, or is an empty one.
    """
    reader = _Reader(data)
    count = reader.array_header()
    if count is None:
        raise InvalidEvent("a batch must be a MessagePack array")
    if count == 0:
        raise InvalidEvent("the batch is empty")
    items = []
    for _ in range(count):
        start = reader.position
        reader.pass_over()
        items.append(data[start : reader.position])
    reader.finish()
    return items


def unpack(data: bytes) -> Any:
    """Decode one MessagePack value that fills ``data`` exactly.

    Maps keep only their text keys. Raises ``InvalidEvent`` where the bytes do not decode, a text that is looked at is
    not UTF-8, or containers nest deeper than ``MAXIMUM_DEPTH``.
    """
    structure = _Reader(data)
    structure.skip(0)
    structure.finish()
    return _Reader(data).value()


class _Reader:
    """A cursor over MessagePack bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def finish(self) -> None:
        if self.position != len(self.data):
            raise InvalidEvent(f"{len(self.data) - self.position} bytes follow the MessagePack value")

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise InvalidEvent("the MessagePack value is cut short")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(">" + layout, self.take(struct.calcsize(layout)))
        return int(value)

    def array_header(self) -> int | None:
        """Read an array's header and return its count, or ``None`` where the value is not an array."""
        kind, size = self.header()
        return size if kind == "array" else None

    def header(self) -> tuple[str, int]:
        """Read one type byte with its size: for arrays and maps the count, for text, bin and ext the bytes."""
        first = self.take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return "integer", first if first <= 0x7F else first - 0x100
        if first <= 0x8F:
            return "map", first & 0x0F
        if first <= 0x9F:
            return "array", first & 0x0F
        if first <= 0xBF:
            return "text", first & 0x1F
        return self.long_header(first)

    def long_header(self, first: int) -> tuple[str, int]:
        integers = {0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
        sized = {
            0xC4: ("bin", "B"),
            0xC5: ("bin", "H"),
            0xC6: ("bin", "I"),
            0xC7: ("ext", "B"),
            0xC8: ("ext", "H"),
            0xC9: ("ext", "I"),
            0xD9: ("text", "B"),
            0xDA: ("text", "H"),
            0xDB: ("text", "I"),
            0xDC: ("array", "H"),
            0xDD: ("array", "I"),
            0xDE: ("map", "H"),
            0xDF: ("map", "I"),
        }
        plain = {0xC0: ("nil", 0), 0xC2: ("boolean", 0), 0xC3: ("boolean", 0), 0xCA: ("float", 4), 0xCB: ("float", 8)}
        if first in integers:
            return "integer", self.number(integers[first])
        if first in sized:
            kind, layout = sized[first]
            return kind, self.number(layout)
        if first in plain:
            return plain[first]
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        raise InvalidEvent(f"byte 0x{first:02x} starts no MessagePack value")

    def skip(self, depth: int) -> None:
        """Move past one value of an event, within ``depth`` containers."""
        if depth > MAXIMUM_DEPTH:
            raise InvalidEvent(f"containers nest deeper than {MAXIMUM_DEPTH}")
        for _ in range(self.skip_head()):
            self.skip(depth + 1)

    def pass_over(self) -> None:
        """Move past one value, however deep it nests."""
        left = 1
        while left:
            left += self.skip_head() - 1

    def skip_head(self) -> int:
        """Move past one value but for the values that it contains, and return how many those are."""
        kind, size = self.header()
        if kind in ("array", "map"):
            return size if kind == "array" else 2 * size
        if kind in ("text", "bin", "float"):
            self.take(size)
        elif kind == "ext":
            self.take(size + 1)
        return 0

    def value(self) -> Any:
        """Decode one value whose structure has been checked."""
        kind, size = self.header()
        if kind == "integer":
            return size
        if kind == "nil":
            return None
        if kind == "text":
            return _Text(self.take(size)).decode()
        if kind == "array":
            return [self.value() for _ in range(size)]
        if kind == "map":
            return self.mapping(size)
        if kind != "boolean":
            self.take(size + 1 if kind == "ext" else size)
        return Opaque(kind)

    def mapping(self, size: int) -> dict[str, Any]:
        entries = {}
        for _ in range(size):
            key = self.value()
            value = self.value()
            if isinstance(key, str):
                entries[key] = value
        return entries


class _Text(bytes):
    """Text whose UTF-8 is checked only if it is looked at, so that ignored items cannot spoil an event."""

    def decode(self, *_: Any) -> Any:
        try:
            return super().decode()
        except UnicodeDecodeError:
            return Opaque("text that is not valid Unicode")
