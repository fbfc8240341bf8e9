"""Format 1 of a ledger batch: the fields of these structures are the keys of its MessagePack maps, in their order.

docs/LEDGER.md says what each means. The compiled core writes the same bytes.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from accrual.ledger.columns import BytesColumn, IntegerColumn
from accrual.outcomes import OUTCOMES

__all__ = [
    "BYTES_COLUMNS",
    "DEFERRED",
    "FORMAT",
    "GENESIS",
    "INTEGER_COLUMNS",
    "WireColumns",
    "WireEntries",
    "WireEntriesHeader",
    "WireLink",
    "WireRulebook",
    "WireStart",
    "digest_of",
]

FORMAT: Final = 1
DIGEST_BYTES: Final = 32
GENESIS: Final = bytes(DIGEST_BYTES)
DEFERRED: Final = OUTCOMES.index("deferred")

Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Natural = Annotated[int, Meta(ge=0)]
Ordinal = Annotated[int, Meta(ge=1)]
StreamId = tuple[Natural, Natural]


class WireStart(msgspec.Struct):
    """The keys that a batch of every format has."""

    format: int
    type: str
    batch: Ordinal


class WireLink(WireStart):
    """The keys that tie a batch to its predecessor and to the events stream."""

    previous: Digest
    after: StreamId
    through: StreamId
    first_seq: Ordinal


class WireEntriesHeader(WireLink):
    """The keys of a batch of entries that can be read without its columns."""

    stream_entries: Natural
    events: Natural
    entries: Natural
    duplicates: Natural
    dead_letters: Natural
    rulebook: Ordinal


class WireColumns(msgspec.Struct):
    """The columns of a batch of entries."""

    at: IntegerColumn
    at_seq: IntegerColumn
    index: IntegerColumn
    ts: IntegerColumn
    day: IntegerColumn
    kind: IntegerColumn
    outcome: IntegerColumn
    cause: IntegerColumn
    frozen: IntegerColumn
    amount: IntegerColumn
    base: IntegerColumn
    uncapped: IntegerColumn
    points: IntegerColumn
    campaign_set: IntegerColumn
    tripped: IntegerColumn
    device: IntegerColumn
    ip: IntegerColumn
    phone: IntegerColumn
    event: BytesColumn
    member: BytesColumn
    order: BytesColumn
    observed: IntegerColumn
    device_masked: BytesColumn
    ip_masked: BytesColumn
    phone_masked: BytesColumn
    payload: BytesColumn


class WireEntries(WireEntriesHeader):
    """A batch of entries."""

    kinds: tuple[str, ...]
    campaigns: tuple[str, ...]
    limits: tuple[str, ...]
    campaign_sets: tuple[tuple[Natural, ...], ...]
    columns: WireColumns


class WireRulebook(WireLink):
    """A rulebook record."""

    version: Ordinal
    name: str
    sha256: Digest
    text: str
    zone_rules: str
    slack_days: Natural


_columns: Final = msgspec.structs.fields(WireColumns)
INTEGER_COLUMNS: Final = frozenset(column.name for column in _columns if column.type == IntegerColumn)
BYTES_COLUMNS: Final = frozenset(column.name for column in _columns if column.type == BytesColumn)


def digest_of(data: bytes) -> bytes:
    """Return the digest of a batch: the SHA-256 of its bytes, which the next batch names."""
    return hashlib.sha256(data).digest()
