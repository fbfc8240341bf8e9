"""Batches of the ledger as the rows that the book gets of them: computed by column, and free of I/O."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual.book import copying
from accrual.book.copying import Coded, Column
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

# Columns that are laid out together, since every row has them and they are chosen together.
TOGETHER: Final[Mapping[str, tuple[str, ...]]] = {
    "place": ("partition_id", "seq"),
    "origin": ("rulebook", "item", "ts_ms"),
    "result": ("frozen", "base", "uncapped", "points"),
    "reason": ("kind", "outcome", "cause", "campaigns", "evidence", "masked"),
}
EVENT_PARTS: Final = (
    *("day", "place", "origin", "stream_id", "event", "member"),
    *("amount_fen", "order_id", "device", "ip", "phone"),
)
ENTRY_PARTS: Final = (*EVENT_PARTS, "result", "reason")
DEFERRED_PARTS: Final = (*EVENT_PARTS, "kind", "cause", "payload")
WAITING_PARTS: Final = ("place", "cause")
IDENTITY_PARTS: Final = ("event", "paid_order", "payer", "day", "place")


def _names(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for part in parts for name in TOGETHER.get(part, (part,)))


# The columns that are copied; the number, which is drawn later, and that an entry is not late are defaults.
ENTRY_COLUMNS: Final = _names(ENTRY_PARTS)
DEFERRED_COLUMNS: Final = _names(DEFERRED_PARTS)
IDENTITY_COLUMNS: Final = _names(IDENTITY_PARTS)
WAITING_COLUMNS: Final = _names(WAITING_PARTS)
BALANCE_COLUMNS: Final = ("member", "pending", "held")

_json = msgspec.json.Encoder()


class Group(msgspec.Struct, frozen=True):
    """Batches that are posted together, and their rows of every table, as a binary ``COPY`` takes them.

    ``links`` is where each batch ends, ``days`` has the day numbers of entries that are booked, each with its last seq.
    """

    batches: Sequence[EntriesBatch | RulebookRecord]
    links: Sequence[Link]
    controls: Mapping[int, ControlEvent]
    days: Mapping[int, int]
    identities: list[memoryview]
    balances: list[memoryview]
    entries: list[memoryview]
    deferred: list[memoryview]
    waiting: list[memoryview]


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
        return Group(batches, links, controls, {}, [], [], [], [], [])
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
    payloads = {"payload": copying.pieces([payload for batch in filled for payload in batch.payloads()])}
    of_deferred = {name: columns[name].taken(deferred) for name in DEFERRED_PARTS if name in columns} | payloads
    return Group(
        batches=batches,
        links=links,
        controls=controls,
        days={number: int(seq[booked & (day == number)].max()) for number in np.unique(day[booked]).tolist()},
        identities=_rows(columns, IDENTITY_PARTS, by_event[identified[by_event]]),
        balances=_balances(columns["member"], by_member[moved[by_member]], outcome, points),
        entries=[
            *_rows(columns, ENTRY_PARTS, by_member[(booked & (tripped == 0))[by_member]]),
            *_rows(columns, ENTRY_PARTS, by_member[(booked & (tripped != 0))[by_member]]),
        ],
        deferred=copying.rows_of([of_deferred[name] for name in DEFERRED_PARTS]),
        waiting=_rows(columns, WAITING_PARTS, deferred),
    )


def _joined(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    return {name: copying.joined([part[name] for part in parts]) for name in parts[0]}


def _together(batches: Sequence[EntriesBatch], name: str) -> NDArray[Any]:
    return np.concatenate([batch.integers(name) for batch in batches])


def _rows(columns: Mapping[str, Column], names: Sequence[str], places: NDArray[np.intp]) -> list[memoryview]:
    """Return the rows at ``places``, in their order, with some of the columns."""
    return copying.rows_of([columns[name] for name in names], places)


def _balances(
    members: Column, moved: NDArray[np.intp], outcome: NDArray[Any], points: NDArray[Any]
) -> list[memoryview]:
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
    """Return the columns of all entries of a batch, by the names of the parts of rows."""
    count = batch.header.counts.entries
    integers = batch.integers
    amount = integers("amount")
    member = copying.texts(*batch.raw_texts("member"))
    order = copying.texts(*batch.raw_texts("order"), empty_is_null=True)
    pays = np.array([kind == ORDER_KIND for kind in batch.kinds])[integers("kind")]
    paid_order = order if pays.all() else order.where(pays)
    stream_id = (copying.decimals(integers("at")), copying.decimals(integers("at_seq")))
    kind: Coded = (integers("kind"), [stored(kind).encode() for kind in batch.kinds])
    cause: Coded = (integers("cause"), [cause.encode() or None for cause in CAUSES])
    evidence, masked = _evidence(batch), _masked(batch)
    place = [
        copying.repeated(partition_id.to_bytes(2), count),
        copying.integers(batch.header.first_seq + np.arange(count), 8),
    ]
    origin = [
        copying.repeated(batch.header.rulebook.to_bytes(8), count),
        copying.integers(integers("index"), 4),
        copying.integers(integers("ts"), 8),
    ]
    result = [
        copying.booleans(integers("frozen")),
        *(copying.integers(integers(name), 8) for name in ("base", "uncapped", "points")),
    ]
    reason = [
        *(kind, (integers("outcome"), [outcome.encode() for outcome in OUTCOMES]), cause),
        (integers("campaign_set"), [_text_array(ids) for ids in batch.campaign_sets]),
        *(_json_values(count, evidence), _json_values(count, masked)),
    ]
    return {
        "day": copying.dates(integers("day")),
        "place": copying.together(place),
        "origin": copying.together(origin),
        "stream_id": copying.beside(*stream_id, between=b"-"),
        "event": copying.texts(*batch.raw_texts("event")),
        "member": member,
        "amount_fen": copying.integers(amount, 8, amount < 0),
        "order_id": order,
        "paid_order": paid_order,
        "payer": member.where(paid_order.sizes() != copying.NULL),
        **{name: copying.integers(integers(name), 8, integers(name) == 0) for name in MASKED},
        "result": copying.together(result),
        "reason": copying.coded_together(reason),
        "kind": copying.coded(*kind),
        "cause": copying.coded(*cause),
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
            {"limit": stored(limit), "observed": next(observed)}
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


def _json_values(count: int, values: Mapping[int, object]) -> Coded:
    """Return a ``jsonb`` column that is null but for the rows in ``values``: codes, and what they stand for."""
    encoded: list[bytes | None] = [None, *(b"\x01" + _json.encode(value) for value in values.values())]
    codes = np.zeros(count, np.intp)
    codes[list(values)] = np.arange(1, len(encoded))
    return codes, encoded
