"""Ledger batches to bytes and back: format 1 (docs/LEDGER.md). Plain; the compiled core writes the same bytes.

What is decoded may be torn or foreign: it either comes out whole or raises ``LedgerError``, which names the batch where
its number can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, TypeVar

import msgspec

from accrual.errors import LedgerError
from accrual.events import BUILT_IN_KINDS
from accrual.ledger.columns import BytesColumn, IntegerColumn, pack_bytes, pack_integers, signed
from accrual.ledger.entries import EntriesBatch
from accrual.ledger.records import Header, RulebookRecord
from accrual.ledger.wire import (
    FORMAT,
    WireColumns,
    WireEntries,
    WireEntriesHeader,
    WireLink,
    WireRulebook,
    WireStart,
    digest_of,
)
from accrual.outcomes import CAUSES, OUTCOMES, BatchHeader, Counts, Entry, Position
from accrual.rulebook import Rulebook

__all__ = ["LedgerBatch", "decode", "decode_header", "encode_entries"]

LedgerBatch = EntriesBatch | RulebookRecord
ValueT = TypeVar("ValueT")

_encode = msgspec.msgpack.Encoder().encode
_decode_start: Final = msgspec.msgpack.Decoder(WireStart).decode
_decode_entries_header: Final = msgspec.msgpack.Decoder(WireEntriesHeader).decode
_decode_entries: Final = msgspec.msgpack.Decoder(WireEntries).decode
_decode_rulebook: Final = msgspec.msgpack.Decoder(WireRulebook).decode


def encode_entries(
    header: BatchHeader,
    *,
    through: tuple[int, int],
    counts: Counts,
    rulebook: Rulebook,
    rows: Sequence[tuple[Position, Entry]],
) -> bytes:
    """Return the ledger batch that holds ``rows``, in their order; the first has the seq ``header.first_seq``.

    Raises ``LedgerError`` where the counts contradict each other or the rows.
    """
    kinds = (*(rule.kind for rule in rulebook.earning_rules), *BUILT_IN_KINDS)
    limits = tuple(limit.id for limit in rulebook.limits)
    campaigns = {campaign.id: number for number, campaign in enumerate(rulebook.campaigns)}
    sets: dict[tuple[str, ...], int] = {}
    for _, entry in rows:
        sets.setdefault(entry.campaigns, len(sets))
    wire = WireEntries(
        format=FORMAT,
        type="entries",
        batch=header.batch,
        previous=header.previous,
        after=header.after,
        through=through,
        first_seq=header.first_seq,
        **msgspec.structs.asdict(counts),
        rulebook=rulebook.version,
        kinds=kinds,
        campaigns=tuple(campaigns),
        limits=limits,
        campaign_sets=tuple(tuple(campaigns[campaign] for campaign in chosen) for chosen in sets),
        columns=_packed(rows, kinds, sets, limits),
    )
    _check_counts(wire)
    if counts.entries != len(rows):
        raise LedgerError(f"batch {header.batch}: counts {counts.entries} entries, but has {len(rows)}")
    return _encode(wire)


def _packed(
    rows: Sequence[tuple[Position, Entry]],
    kinds: tuple[str, ...],
    sets: dict[tuple[str, ...], int],
    limits: tuple[str, ...],
) -> WireColumns:
    """Turn rows into columns. Masked forms are kept where a limit tripped, payloads where the entry is deferred."""
    positions = [position for position, _ in rows]
    entries = [entry for _, entry in rows]
    kind_codes = {kind: code for code, kind in enumerate(kinds)}
    limit_bits = {limit: 1 << number for number, limit in enumerate(limits)}
    tripping = [entry for entry in entries if entry.evidence]

    def integers(value: Callable[[Entry], int]) -> IntegerColumn:
        return pack_integers([value(entry) for entry in entries])

    def texts(value: Callable[[Entry], str], of: Sequence[Entry] = entries) -> BytesColumn:
        return pack_bytes([value(entry).encode() for entry in of])

    return WireColumns(
        at=pack_integers([position.ms for position in positions]),
        at_seq=pack_integers([signed(position.seq) for position in positions]),
        index=pack_integers([position.index for position in positions]),
        ts=integers(lambda entry: entry.ts),
        day=integers(lambda entry: entry.day),
        kind=integers(lambda entry: kind_codes[entry.kind]),
        outcome=integers(lambda entry: OUTCOMES.index(entry.outcome)),
        cause=integers(lambda entry: CAUSES.index(entry.cause)),
        frozen=integers(lambda entry: entry.frozen_before),
        amount=integers(lambda entry: -1 if entry.amount is None else entry.amount),
        base=integers(lambda entry: entry.base),
        uncapped=integers(lambda entry: entry.uncapped),
        points=integers(lambda entry: entry.points),
        campaign_set=integers(lambda entry: sets[entry.campaigns]),
        tripped=integers(lambda entry: sum(limit_bits[limit] for limit, _ in entry.evidence)),
        device=integers(lambda entry: signed(entry.fingerprints[0])),
        ip=integers(lambda entry: signed(entry.fingerprints[1])),
        phone=integers(lambda entry: signed(entry.fingerprints[2])),
        event=texts(lambda entry: entry.event),
        member=texts(lambda entry: entry.member),
        order=texts(lambda entry: entry.order),
        observed=pack_integers([observed for entry in tripping for _, observed in entry.evidence]),
        device_masked=texts(lambda entry: entry.masked[0], tripping),
        ip_masked=texts(lambda entry: entry.masked[1], tripping),
        phone_masked=texts(lambda entry: entry.masked[2], tripping),
        payload=pack_bytes([entry.payload for entry in entries if entry.outcome == "deferred"]),
    )


def decode(data: bytes) -> LedgerBatch:
    """Decode a ledger batch. Raises ``LedgerError``."""
    start = _start(data)
    if start.type == "rulebook":
        return _record(_guarded(_decode_rulebook, data, start))
    wire = _guarded(_decode_entries, data, start)
    _check_counts(wire)
    _check_codes(wire)
    return EntriesBatch(_header(wire, _counts(wire), wire.rulebook, data), wire)


def decode_header(data: bytes) -> Header:
    """Decode what a batch says of itself, without looking at its columns. Raises ``LedgerError``."""
    start = _start(data)
    if start.type == "rulebook":
        record = _guarded(_decode_rulebook, data, start)
        _record(record)
        return _header(record, Counts(), record.version, data)
    wire = _guarded(_decode_entries_header, data, start)
    _check_counts(wire)
    return _header(wire, _counts(wire), wire.rulebook, data)


def _start(data: bytes) -> WireStart:
    """Read the keys that every format has, and refuse what this version does not know."""
    start = _guarded(_decode_start, data, None)
    if start.format != FORMAT:
        known = f"this version of accrual reads format {FORMAT}"
        raise LedgerError(f"batch {start.batch}: has format {start.format}; {known}")
    if start.type not in ("entries", "rulebook"):
        raise LedgerError(f"batch {start.batch}: has the unknown type {start.type!r}")
    return start


def _guarded(decoder: Callable[[bytes], ValueT], data: bytes, start: WireStart | None) -> ValueT:
    try:
        return decoder(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = "this is no ledger batch" if start is None else f"batch {start.batch}"
        raise LedgerError(f"{name}: {error}") from None


def _check_counts(wire: WireEntriesHeader) -> None:
    """Refuse counts and positions that contradict each other."""
    counted = wire.entries + wire.duplicates + wire.dead_letters
    if wire.events != counted:
        raise LedgerError(
            f"batch {wire.batch}: has {wire.events} events, but {wire.entries} entries, "
            f"{wire.duplicates} duplicates and {wire.dead_letters} dead letters"
        )
    if wire.events < wire.stream_entries:
        raise LedgerError(f"batch {wire.batch}: has {wire.events} events from {wire.stream_entries} stream entries")
    if (wire.through > wire.after) != (wire.stream_entries > 0) or wire.through < wire.after:
        places = f"after {_stream_id(wire.after)} through {_stream_id(wire.through)}"
        raise LedgerError(f"batch {wire.batch}: has {wire.stream_entries} stream entries {places}")


def _stream_id(place: tuple[int, int]) -> str:
    return f"{place[0]}-{place[1]}"


def _check_codes(wire: WireEntries) -> None:
    """Refuse campaign sets that name none of the campaigns, and more entries than there can be."""
    # Every id has at least a byte, so no count can ask for more memory than the batch itself takes.
    id_bytes = len(wire.columns.event[1])
    if wire.entries > id_bytes:
        raise LedgerError(f"batch {wire.batch}: has {wire.entries} entries, but only {id_bytes} bytes of event ids")
    for chosen in wire.campaign_sets:
        ascending = all(earlier < later for earlier, later in pairwise(chosen))
        if not ascending or any(number >= len(wire.campaigns) for number in chosen):
            raise LedgerError(
                f"batch {wire.batch}: campaign_sets: {list(chosen)} is no set of {len(wire.campaigns)} campaigns"
            )


def _counts(wire: WireEntriesHeader) -> Counts:
    return Counts(wire.stream_entries, wire.events, wire.entries, wire.duplicates, wire.dead_letters)


def _header(wire: WireLink, counts: Counts, rulebook: int, data: bytes) -> Header:
    return Header(
        batch=wire.batch,
        previous=wire.previous,
        after=wire.after,
        first_seq=wire.first_seq,
        type="rulebook" if isinstance(wire, WireRulebook) else "entries",
        through=wire.through,
        counts=counts,
        rulebook=rulebook,
        digest=digest_of(data),
    )


def _record(wire: WireRulebook) -> RulebookRecord:
    record = RulebookRecord(
        batch=wire.batch,
        previous=wire.previous,
        after=wire.after,
        first_seq=wire.first_seq,
        version=wire.version,
        name=wire.name,
        text=wire.text,
        zone_rules=wire.zone_rules,
        slack_days=wire.slack_days,
    )
    if wire.through != wire.after:
        raise LedgerError(f"batch {wire.batch}: a rulebook record that consumes stream entries")
    if wire.sha256 != record.sha256:
        raise LedgerError(f"batch {wire.batch}: the rulebook's text does not have the SHA-256 recorded with it")
    return record
