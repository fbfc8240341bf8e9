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
from accrual.events import ORDER_KIND
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

HELD, DEFERRED = (OUTCOMES.index(name) for name in ("held", "deferred"))
MASKED: Final = ("device", "ip", "phone")
TEXT_TYPE: Final = 25

# The columns that are copied; of the others, the number, which is drawn later, and `late` are their tables' defaults.
ENTRY_COLUMNS: Final = (
    *("day", "partition_id", "seq", "rulebook", "stream_id", "item", "ts_ms", "event", "kind", "member"),
    *("outcome", "cause", "frozen", "amount_fen", "order_id", "base", "uncapped", "points", "campaigns", "evidence"),
    *("device", "ip", "phone", "masked"),
)
DEFERRED_COLUMNS: Final = (
    *("partition_id", "seq", "rulebook", "stream_id", "item", "day", "ts_ms", "event", "kind", "member", "cause"),
    *("amount_fen", "order_id", "device", "ip", "phone", "payload"),
)
WAITING_COLUMNS: Final = ("partition_id", "seq", "cause")
IDENTITY_COLUMNS: Final = ("event", "paid_order", "payer", "day", "partition_id", "seq")
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
    balances: list[bytes]
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
    filled = [batch for batch in batches if isinstance(batch, EntriesBatch) and batch.header.counts.entries]
    if not filled:
        return Group(batches, links, controls, frozenset(), [], [], [], [], [])
    columns = _joined([_columns(batch, partition_id) for batch in filled])
    day, outcome, points, tripped = (_together(filled, name) for name in ("day", "outcome", "points", "tripped"))
    seq = np.concatenate([batch.header.first_seq + np.arange(batch.header.counts.entries) for batch in filled])
    identified = outcome != DEFERRED
    booked = identified & ~np.isin(seq, sorted(without))
    # What stands side by side in an index is written together, which spares a good part of the work on indexes. Rows
    # that say why a limit tripped are many times as wide as others, and are laid out on their own.
    by_event = np.argsort(columns["event"].padded(), kind="stable")
    by_member = np.argsort(columns["member"].padded(), kind="stable")
    moved = booked & (outcome <= HELD) & (points != 0)
    deferred = np.flatnonzero(~identified)
    payloads = copying.pieces([payload for batch in filled for payload in batch.payloads()])
    return Group(
        batches=batches,
        links=links,
        controls=controls,
        days=frozenset(np.unique(day[booked]).tolist()),
        identities=_rows(columns, IDENTITY_COLUMNS, by_event[identified[by_event]]),
        balances=_balances(columns["member"], by_member[moved[by_member]], outcome, points),
        entries=[
            *_rows(columns, ENTRY_COLUMNS, by_member[(booked & (tripped == 0))[by_member]]),
            *_rows(columns, ENTRY_COLUMNS, by_member[(booked & (tripped != 0))[by_member]]),
        ],
        deferred=copying.rows_of([*(columns[name].taken(deferred) for name in DEFERRED_COLUMNS[:-1]), payloads]),
        waiting=_rows(columns, WAITING_COLUMNS, deferred),
    )


def _joined(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    return {name: copying.joined([part[name] for part in parts]) for name in parts[0]}


def _together(batches: Sequence[EntriesBatch], name: str) -> NDArray[Any]:
    return np.concatenate([batch.integers(name) for batch in batches])


def _rows(columns: Mapping[str, Column], names: Sequence[str], places: NDArray[np.intp]) -> list[bytes]:
    """Return the rows at ``places``, in their order, with some of the columns."""
    return copying.rows_of([columns[name] for name in names], places)


def _balances(members: Column, moved: NDArray[np.intp], outcome: NDArray[Any], points: NDArray[Any]) -> list[bytes]:
    """Return what each member's balances grow or shrink by, as the entries ``moved``, in the order of members, say.

    An outcome is also the account: 0 granted, to pending; 1 held.
    """
    if not len(moved):
        return []
    names = members.padded()[moved]
    firsts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    sums = [np.add.reduceat(np.where(outcome[moved] == account, points[moved], 0), firsts) for account in (0, HELD)]
    return copying.rows_of([members.taken(moved[firsts]), *(copying.integers(column, 8) for column in sums)])


def _columns(batch: EntriesBatch, partition_id: int) -> dict[str, Column]:
    """Return the columns of all entries of a batch, by their names in the database."""
    count = batch.header.counts.entries
    integers = batch.integers
    amount = integers("amount")
    order = copying.texts(*batch.raw_texts("order"), empty_is_null=True)
    pays = np.array([kind == ORDER_KIND for kind in batch.kinds])[integers("kind")]
    paid_order = order if pays.all() else order.where(pays)
    member = copying.texts(*batch.raw_texts("member"))
    stream_id = (copying.decimals(integers("at")), copying.decimals(integers("at_seq")))
    return {
        "day": copying.dates(integers("day")),
        "partition_id": copying.repeated(partition_id.to_bytes(2), count),
        "seq": copying.integers(batch.header.first_seq + np.arange(count), 8),
        "rulebook": copying.repeated(batch.header.rulebook.to_bytes(8), count),
        "stream_id": copying.beside(*stream_id, between=b"-"),
        "item": copying.integers(integers("index"), 4),
        "ts_ms": copying.integers(integers("ts"), 8),
        "event": copying.texts(*batch.raw_texts("event")),
        "kind": copying.coded(integers("kind"), [stored(kind).encode() for kind in batch.kinds]),
        "member": member,
        "outcome": copying.coded(integers("outcome"), [outcome.encode() for outcome in OUTCOMES]),
        "cause": copying.coded(integers("cause"), [cause.encode() or None for cause in CAUSES]),
        "frozen": copying.booleans(integers("frozen")),
        "amount_fen": copying.integers(amount, 8, amount < 0),
        "order_id": order,
        "paid_order": paid_order,
        "payer": member.where(paid_order.sizes() != copying.NULL),
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
    encoded: list[bytes | None] = [None, *(b"\x01" + _json.encode(value) for value in values.values())]
    codes = np.zeros(count, np.intp)
    codes[list(values)] = np.arange(1, len(encoded))
    return copying.coded(codes, encoded)
