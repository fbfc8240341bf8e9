"""Entries of the ledger and rows of the book in the same words, and where they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown
from accrual.ledger import EntriesBatch
from accrual.ledger.columns import signed
from accrual.outcomes import Entry, Position
from accrual.rulebook import day_text

__all__ = ["KEYS", "booked_evidence", "compare_rows", "told"]

KEYS: Final = ("device", "ip", "phone")

ROWS: Final = """
    SELECT seq, number, rulebook, stream_id, item, ts_ms, day::text, event, kind, member, cause, amount_fen,
        order_id, device, ip, phone, outcome, frozen, base, uncapped, points, campaigns, evidence, masked
    FROM book.entries
    WHERE NOT late AND partition_id = %(partition_id)s AND seq BETWEEN %(first)s AND %(last)s
        AND day = ANY(%(days)s::date[])
"""

# How many columns the rows of both tables begin with.
OF_BOTH: Final = 16

DEFERRED: Final = """
    SELECT seq, number, rulebook, stream_id, item, ts_ms, day::text, event, kind, member, cause, amount_fen,
        order_id, device, ip, phone, payload
    FROM book.deferred WHERE partition_id = %(partition_id)s AND seq BETWEEN %(first)s AND %(last)s
"""

# What was booked together has one number, by which it stands among postings.
NUMBER: Final = "SELECT number FROM book.batches WHERE (partition_id, batch) = (%s, %s)"

TAKEN: Final = """
    SELECT seq, event FROM book.exceptions
    WHERE kind = 'id_taken' AND partition_id = %(partition_id)s AND seq BETWEEN %(first)s AND %(last)s
"""


def compare_rows(
    connection: Connection,
    partition: str,
    partition_id: int,
    batch: EntriesBatch,
    rows: Sequence[tuple[int, Position, Entry]],
) -> Iterator[Finding]:
    """Yield the entries of ``batch`` that the book does not have, or has otherwise."""
    if not rows:
        return
    days = sorted({day_text(entry.day) for _, _, entry in rows})
    about = {"partition_id": partition_id, "first": rows[0][0], "last": rows[-1][0], "days": days}
    booked: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in connection.execute(ROWS, about):
        booked[row[0]].append(_booked(row))
    for row in connection.execute(DEFERRED, about):
        booked[row[0]].append(_booked_deferred(row))
    (number,) = connection.execute(NUMBER, (partition_id, batch.batch)).fetchone() or (None,)
    taken = {(seq, shown(event)) for seq, event in connection.execute(TAKEN, about)}
    for seq, position, entry in rows:
        ledger = {"number": number, "rulebook": batch.header.rulebook} | _of_ledger(position, entry)
        of_seq = booked[seq]
        if of_seq == [ledger] or (not of_seq and (seq, entry.event) in taken):
            continue
        found = next((one for one in of_seq if one != ledger), None)
        names = [name for name in ledger if found is None or found.get(name) != ledger[name]]
        yield Finding(
            "rows",
            "the book does not have the entry"
            if found is None
            else "the book has another entry beside that of the ledger"
            if ledger in of_seq
            else "the book has another entry than the ledger",
            partition,
            batch.batch,
            seq=seq,
            member=entry.member,
            day=day_text(entry.day),
            expected={name: _plain(ledger[name]) for name in names},
            found=None if found is None else {name: _plain(found.get(name)) for name in names},
        )


def told(position: Position, entry: Entry) -> dict[str, Any]:
    """Return an entry as a finding tells it."""
    return {name: _plain(value) for name, value in _of_ledger(position, entry).items()}


def booked_evidence(evidence: Any) -> tuple[tuple[str, int], ...]:
    """Return the evidence of a row as an entry has it."""
    return tuple((shown(item["limit"]), item["observed"]) for item in evidence or ())


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _keys(values: Sequence[int | None]) -> tuple[int | None, ...]:
    return tuple(signed(value) if value else None for value in values)


def _of_ledger(position: Position, entry: Entry) -> dict[str, Any]:
    """Return an entry of the ledger in the words that both sides are compared in."""
    of_both: dict[str, Any] = {
        "stream_id": position.stream_id,
        "item": position.index,
        "ts_ms": entry.ts,
        "day": day_text(entry.day),
        "event": entry.event,
        "kind": entry.kind,
        "member": entry.member,
        "outcome": entry.outcome,
        "cause": entry.cause,
        "amount_fen": entry.amount,
        "order": entry.order,
        "keys": _keys(entry.fingerprints),
    }
    if entry.outcome == "deferred":
        return of_both | {"payload": entry.payload}
    return of_both | {
        "frozen": entry.frozen_before,
        "base": entry.base,
        "uncapped": entry.uncapped,
        "points": entry.points,
        "campaigns": entry.campaigns,
        "evidence": entry.evidence,
        "masked": {key: text for key, text in zip(KEYS, entry.masked, strict=True) if text},
    }


def _booked(row: tuple[Any, ...]) -> dict[str, Any]:
    outcome, frozen, base, uncapped, points, campaigns, evidence, masked = row[OF_BOTH:]
    return _booked_of_both(row) | {
        "outcome": outcome,
        "frozen": frozen,
        "base": base,
        "uncapped": uncapped,
        "points": points,
        "campaigns": tuple(shown(campaign) for campaign in campaigns or ()),
        "evidence": booked_evidence(evidence),
        "masked": {key: shown(text) for key, text in (masked or {}).items()},
    }


def _booked_deferred(row: tuple[Any, ...]) -> dict[str, Any]:
    (payload,) = row[OF_BOTH:]
    return _booked_of_both(row) | {"outcome": "deferred", "payload": bytes(payload)}


def _booked_of_both(row: tuple[Any, ...]) -> dict[str, Any]:
    """Return what the rows of both tables begin with."""
    _, number, rulebook, stream_id, item, ts_ms, day, event, kind, member, cause, amount, order, *keys = row[:OF_BOTH]
    return {
        "number": number,
        "rulebook": rulebook,
        "stream_id": stream_id,
        "item": item,
        "ts_ms": ts_ms,
        "day": day,
        "event": shown(event),
        "kind": shown(kind),
        "member": shown(member),
        "cause": cause or "",
        "amount_fen": amount,
        "order": shown(order) or "",
        "keys": tuple(keys),
    }
