"""A small ledger for tests and for docs/LEDGER.md: a rulebook, five events and what is made of them, a duplicate."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from accrual.engine import BatchHeader, ReferenceEngine, Secret, StreamEntry
from accrual.engine.reference import STREAM_SLACK_DAYS
from accrual.events import encode_compact, validate
from accrual.ledger import START, Link, RulebookRecord, decode_header
from accrual.rulebook import parse

__all__ = ["EXAMPLE_ENTRIES", "EXAMPLE_RULEBOOK", "EXAMPLE_SECRET", "edited", "example_ledger", "place_after"]

EXAMPLE_RULEBOOK: Final = """\
[programme]
name = "example"
version = 1
timezone = "Asia/Shanghai"

[[earn]]
kind = "order_paid"
points_per_yuan = "1"

[[campaign]]
id = "member-day"
multiplier = "2"
days_of_month = [15]

[[limit]]
id = "device-burst"
key = "device"
measure = "events"
window = "60s"
max = 1
action = "hold"
"""

EXAMPLE_SECRET: Final = Secret(bytes(range(16)))
NOON_MS: Final = 1_794_715_200_000

ORDER: Final = encode_compact(
    validate(
        {
            "id": "e1",
            "kind": "order_paid",
            "member": "m1",
            "ts": NOON_MS,
            "amount": 3000,
            "order": "o1",
            "device": "device-1001",
            "ip": "10.0.0.7",
            "phone": "13800000001",
        }
    )
)
SAME_DEVICE: Final = encode_compact(
    validate(
        {
            "id": "e2",
            "kind": "order_paid",
            "member": "会员二",
            "ts": NOON_MS + 400,
            "amount": 1250,
            "order": "o2",
            "device": "device-1001",
            "phone": "13900000002",
        }
    )
)
REFUND: Final = encode_compact(
    validate(
        {
            "id": "e3",
            "kind": "order_refunded",
            "member": "m1",
            "ts": NOON_MS + 900,
            "amount": 500,
            "order": "o1",
            "device": "device-1001",
        }
    )
)

# One event, a batch of two, one that is invalid, one again; then one again in a batch of its own.
EXAMPLE_ENTRIES: Final = (
    (
        StreamEntry(NOON_MS + 3, 0, ((b"e", ORDER),)),
        StreamEntry(NOON_MS + 1000, 0, ((b"b", b"\x92" + SAME_DEVICE + REFUND),)),
        StreamEntry(NOON_MS + 1000, 1, ((b"j", b'{"id": "e4"}'),)),
        StreamEntry(NOON_MS + 1002, 0, ((b"e", ORDER),)),
    ),
    (StreamEntry(NOON_MS + 2000, 0, ((b"e", ORDER),)),),
)


def place_after(link: Link) -> BatchHeader:
    """Return the place of the batch that continues ``link``."""
    return BatchHeader(link.batch + 1, link.digest, link.through, link.next_seq)


def edited(data: bytes, **changes: Any) -> bytes:
    """Return a batch with other values for some keys, or for columns named ``column_*``; ``None`` takes one out."""
    fields = msgspec.msgpack.decode(data)
    for name, value in changes.items():
        column = name.removeprefix("column_")
        target = fields if column == name else fields["columns"]
        if value is None:
            del target[column]
        else:
            target[column] = value
    return msgspec.msgpack.encode(fields)


def example_ledger() -> list[bytes]:
    """Return the batches of the ledger: a rulebook record, three entries, none."""
    rulebook = parse(EXAMPLE_RULEBOOK)
    engine = ReferenceEngine(rulebook, EXAMPLE_SECRET, STREAM_SLACK_DAYS)
    record = RulebookRecord(
        **{name: getattr(place_after(START), name) for name in BatchHeader.__struct_fields__},
        version=rulebook.version,
        name=rulebook.name,
        text=rulebook.text,
        zone_rules="2025.2",
        slack_days=STREAM_SLACK_DAYS,
    )
    batches = [record.encode()]
    for entries in EXAMPLE_ENTRIES:
        batches.append(engine.decide_entries(entries).encode(place_after(decode_header(batches[-1]).link)))
    return batches
