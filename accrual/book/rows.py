"""Batches of the ledger as the rows that the book gets of them: computed by column, and free of I/O."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual.book import copying
from accrual.book.copying import Column
from accrual.book.members import ControlEvent
from accrual.book.texts import stored
from accrual.ledger import EntriesBatch, Link, RulebookRecord
from accrual.outcomes import CAUSES, OUTCOMES

__all__ = [
    "BALANCE_COLUMNS",
    "DEFERRED_COLUMNS",
    "ENTRY_COLUMNS",
    "IDENTITY_COLUMNS",
    "WAITING_COLUMNS",
    "Group",
    "group_of",
]

ORDER_KIND: Final = "order_paid"
HELD, DEFERRED = (OUTCOMES.index(name) for name in ("held", "deferred"))
MASKED: Final = ("device", "ip", "phone")
TEXT_TYPE: Final = 25

# The columns that are copied; the number, which is drawn later, is their tables' default.
ENTRY_COLUMNS: Final = (
    *("day", "partition_id", "seq", "late", "rulebook", "stream_id", "item", "ts_ms", "event", "kind", "member"),
    *("outcome", "cause", "frozen", "amount_fen", "order_id", "base", "uncapped", "points", "campaigns", "evidence"),
    *("device", "ip", "phone", "masked"),
)
DEFERRED_COLUMNS: Final = (
    *("partition_id", "seq", "rulebook", "stream_id", "item", "day", "ts_ms", "event", "kind", "member", "cause"),
    *("amount_fen", "order_id", "device", "ip", "phone", "payload"),
)
WAITING_COLUMNS: Final = ("partition_id", "seq", "cause")
IDENTITY_COLUMNS: Final = ("event", "paid_order", "day", "partition_id", "seq", "late")
BALANCE_COLUMNS: Final = ("member", "pending", "held")

_json = msgspec.json.Encoder()


class Group(msgspec.Struct, frozen=True):
    """Batches that are posted together, and their rows of every table, as a binary ``COPY`` takes them.

    ``links`` is where each batch ends, ``days`` the day numbers of entries that are booked.
    """

    batches: Sequence[EntriesBatch | RulebookRecord]
    links: Sequence[Link]
    controls: Mapping[int, ControlEvent]
    days: frozenset[int]
    identities: list[bytes]
    balances: bytes
    entries: list[bytes]
    deferred: list[bytes]
    waiting: list[bytes]


def group_of(
    batches: Sequence[EntriesBatch | RulebookRecord],
    links: Sequence[Link],
    controls: Mapping[int, ControlEvent],
    partition_id: int,
    without: Collection[int] = frozenset(),
) -> Group:
    """Return the rows of ``batches``; entries whose seqs are in ``without`` are not booked and move nothing."""
    days: set[int] = set()
    rows: dict[str, list[bytes]] = {name: [] for name in ("identities", "entries", "deferred", "waiting")}
    raised: list[tuple[Column, NDArray[Any], NDArray[Any]]] = []
    for batch in batches:
        if not isinstance(batch, EntriesBatch) or not batch.header.counts.entries:
            continue
        columns = _columns(batch, partition_id)
        outcome = batch.integers("outcome")
        identified = outcome != DEFERRED
        booked = identified & ~np.isin(batch.header.first_seq + np.arange(len(outcome)), sorted(without))
        days.update(np.unique(batch.integers("day")[booked]).tolist())
        rows["identities"].append(_chosen(columns, IDENTITY_COLUMNS, identified))
        rows["entries"].append(_chosen(columns, ENTRY_COLUMNS, booked))
        if not identified.all():
            rows["deferred"].append(_deferred(batch, columns, ~identified))
            rows["waiting"].append(_chosen(columns, WAITING_COLUMNS, ~identified))
        moved = np.flatnonzero(booked & (outcome <= HELD) & (batch.integers("points") > 0))
        raised.append((columns["member"].taken(moved), outcome[moved], batch.integers("points")[moved]))
    return Group(
        batches=batches, links=links, controls=controls, days=frozenset(days), balances=_balances(raised), **rows
    )


def _chosen(columns: Mapping[str, Column], names: Sequence[str], wanted: NDArray[np.bool_]) -> bytes:
    """Return the ``wanted`` rows of some columns."""
    if wanted.all():
        return copying.rows_of([columns[name] for name in names])
    places = np.flatnonzero(wanted)
    return copying.rows_of([columns[name].taken(places) for name in names])


def _deferred(batch: EntriesBatch, columns: Mapping[str, Column], wanted: NDArray[np.bool_]) -> bytes:
    places = np.flatnonzero(wanted)
    taken = [columns[name].taken(places) for name in DEFERRED_COLUMNS[:-1]]
    return copying.rows_of([*taken, copying.pieces(batch.payloads())])


def _balances(raised: Sequence[tuple[Column, NDArray[Any], NDArray[Any]]]) -> bytes:
    """Return what each member's balances grow by, in the order of members.

    An outcome is also the account: 0 granted, to pending; 1 held.
    """
    members = copying.joined([column for column, _, _ in raised])
    if not len(members.lengths):
        return b""
    names, of_row = np.unique(copying.padded(members), return_inverse=True)
    sums = np.zeros((2, len(names)), np.int64)
    accounts = np.concatenate([account for _, account, _ in raised])
    np.add.at(sums, (accounts, of_row), np.concatenate([points for _, _, points in raised]))
    return copying.rows_of([copying.pieces(names.tolist()), *(copying.integers(column, 8) for column in sums)])


def _columns(batch: EntriesBatch, partition_id: int) -> dict[str, Column]:
    """Return the columns of all entries of a batch, by their names in the database."""
    count = batch.header.counts.entries
    integers = batch.integers
    amount = integers("amount")
    order = copying.texts(*batch.raw_texts("order"), empty_is_null=True)
    pays = np.array([kind == ORDER_KIND for kind in batch.kinds])[integers("kind")]
    ids = [f"{ms}-{seq}".encode() for ms, seq in zip(integers("at").tolist(), integers("at_seq").tolist(), strict=True)]
    return {
        "day": copying.dates(integers("day")),
        "partition_id": copying.integers(np.full(count, partition_id), 2),
        "seq": copying.integers(batch.header.first_seq + np.arange(count), 8),
        "late": copying.booleans(np.zeros(count)),
        "rulebook": copying.integers(np.full(count, batch.header.rulebook), 4),
        "stream_id": copying.pieces(ids),
        "item": copying.integers(integers("index"), 4),
        "ts_ms": copying.integers(integers("ts"), 8),
        "event": copying.texts(*batch.raw_texts("event")),
        "kind": copying.coded(integers("kind"), [stored(kind).encode() for kind in batch.kinds]),
        "member": copying.texts(*batch.raw_texts("member")),
        "outcome": copying.coded(integers("outcome"), [outcome.encode() for outcome in OUTCOMES]),
        "cause": copying.coded(integers("cause"), [cause.encode() or None for cause in CAUSES]),
        "frozen": copying.booleans(integers("frozen")),
        "amount_fen": copying.integers(amount, 8, amount < 0),
        "order_id": order,
        "paid_order": order if pays.all() else order.where(pays),
        **{name: copying.integers(integers(name), 8) for name in ("base", "uncapped", "points")},
        "campaigns": copying.coded(integers("campaign_set"), [_text_array(ids) for ids in batch.campaign_sets]),
        "evidence": _json_column(count, _evidence(batch)),
        **{name: copying.integers(integers(name), 8, integers(name) == 0) for name in MASKED},
        "masked": _json_column(count, _masked(batch)),
    }


def _text_array(values: Sequence[str]) -> bytes | None:
    """Return a ``text[]`` as a binary ``COPY`` has it; ``None``, for null, where it is empty."""
    if not values:
        return None
    head = struct.pack(">iiiii", 1, 0, TEXT_TYPE, len(values), 1)
    return head + b"".join(struct.pack(">i", len(data)) + data for data in (stored(value).encode() for value in values))


def _evidence(batch: EntriesBatch) -> dict[int, object]:
    """Return the evidence of SPEC section 5 of the entries that tripped a limit, by row."""
    tripped = batch.integers("tripped")
    observed = iter(batch.integers("observed").tolist())
    return {
        row: [
            {"limit": limit, "observed": next(observed)}
            for number, limit in enumerate(batch.limits)
            if int(tripped[row]) >> number & 1
        ]
        for row in np.flatnonzero(tripped).tolist()
    }


def _masked(batch: EntriesBatch) -> dict[int, object]:
    rows = np.flatnonzero(batch.integers("tripped")).tolist()
    texts = [batch.texts(f"{key}_masked") for key in MASKED]
    found = (
        {key: stored(text) for key, text in zip(MASKED, values, strict=True) if text}
        for values in zip(*texts, strict=True)
    )
    return {row: masked for row, masked in zip(rows, found, strict=True) if masked}


def _json_column(count: int, values: Mapping[int, object]) -> Column:
    """Return a ``jsonb`` column that is null but for the rows in ``values``."""
    lengths = np.full(count, copying.NULL)
    encoded = {row: b"\x01" + _json.encode(value) for row, value in sorted(values.items())}
    lengths[list(encoded)] = [len(data) for data in encoded.values()]
    return Column(lengths, np.frombuffer(b"".join(encoded.values()), np.uint8))
