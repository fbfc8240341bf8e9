"""A member's statement: every posting that touches the member, newest first, each explained in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from accrual.book.database import Connection
from accrual.book.programme import rulebooks_of
from accrual.book.texts import shown, stored
from accrual.book.words import BookedEntry, Posting, Refund, explain, utc

__all__ = ["statement"]

PAGE_ROWS: Final = 500

# The movements are chosen first; what explains them is looked up for those alone, by key.
QUERY: Final = """
    SELECT m.number, m.seq, m.kind, m.day::text, m.from_account, m.to_account, m.points, m.partition_id,
        p.name AS partition, a.by, a.reason, a.note, a.details, q.lot_days::text[], q.lot_points,
        q.lot_expires_on::text, e.kind AS event_kind, e.event, e.outcome, e.rulebook, e.frozen, e.base, e.uncapped,
        e.points AS entry_points, e.campaigns, e.evidence, e.order_id, e.amount_fen, e.stream_id, r.event AS refund,
        r.amount_fen AS refund_fen,
        coalesce(q.booked_at, CASE m.kind
            WHEN 'accrue' THEN (SELECT booked_at FROM book.batches b WHERE b.number = m.number LIMIT 1)
            ELSE (
                SELECT done_at FROM book.resolutions s JOIN book.actions USING (action)
                WHERE (s.partition_id, s.seq) = (m.partition_id, m.seq)
            )
        END) AS booked_at
    FROM (
        SELECT * FROM book.movements
        WHERE member = %(member)s AND (%(kind)s::text IS NULL OR kind = %(kind)s)
            AND (%(account)s::text IS NULL OR %(account)s IN (from_account, to_account))
            AND (%(first)s::date IS NULL OR day >= %(first)s::date)
            AND (%(last)s::date IS NULL OR day <= %(last)s::date)
        ORDER BY number DESC, partition_id, seq DESC LIMIT %(limit)s
    ) m
    LEFT JOIN book.partitions p ON p.partition_id = m.partition_id
    LEFT JOIN book.actions a ON a.action = m.action
    LEFT JOIN book.postings q ON m.action IS NOT NULL AND q.number = m.number
    LEFT JOIN LATERAL (
        SELECT * FROM book.entries e
        WHERE (e.day, e.member, e.partition_id, e.seq, e.late) = (m.day, m.member, m.partition_id, m.seq, m.late)
        LIMIT 1
    ) e ON true
    LEFT JOIN LATERAL (
        SELECT d.event, d.amount_fen FROM book.refunds f JOIN book.deferred d USING (partition_id, seq)
        WHERE m.kind = 'refund' AND (f.order_partition_id, f.order_seq, f.order_late) = (m.partition_id, m.seq, m.late)
            AND f.seq = q.cause_seq AND f.action = m.action LIMIT 1
    ) r ON true
    ORDER BY m.number DESC, m.partition_id, m.seq DESC
"""

# What a line says of the entry whose points moved, and of whoever moved them, where there is one.
ABOUT: Final = {
    **{
        name: name for name in ("partition", "seq", "event", "event_kind", "refund", "rulebook", "by", "reason", "note")
    },
    "order_id": "order",
}
TEXTS: Final = frozenset({"event", "event_kind", "refund", "order_id", "by", "note"})


def statement(
    connection: Connection,
    member: str,
    *,
    kind: str | None = None,
    account: str | None = None,
    first_day: str | None = None,
    last_day: str | None = None,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a statement, in bounded memory.

    ``kind`` is that of a posting, or ``accrue`` or ``late`` for an entry; ``account`` keeps the lines whose points came
    from it or went to it; days are business days of the points, as dates. A granted or held entry is a posting too,
    also where it came to no points.
    """
    parameters = {"member": stored(member), "kind": kind, "account": account, "limit": limit}
    parameters |= {"first": first_day, "last": last_day}
    rulebook_of = rulebooks_of(connection)
    with connection.transaction(), connection.cursor(name="statement") as cursor:
        cursor.itersize = PAGE_ROWS
        cursor.execute(QUERY, parameters)
        names = [column.name for column in cursor.description or ()]
        for values in cursor:
            row = _shown(dict(zip(names, values, strict=True)))
            rulebook = None if row["rulebook"] is None else rulebook_of(row["partition_id"], row["rulebook"])
            yield _line(row, explain(_posting(row), rulebook))


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: shown(value) if name in TEXTS else value for name, value in row.items()}


def _line(row: Mapping[str, Any], words: str) -> dict[str, Any]:
    return {
        "number": row["number"],
        "kind": row["kind"],
        "day": row["day"],
        "from": row["from_account"],
        "to": row["to_account"],
        "points": row["points"],
        "booked_at": row["booked_at"].isoformat(),
        "words": words,
        **{name: row[column] for column, name in ABOUT.items() if row[column] not in (None, "")},
    }


def _posting(row: Mapping[str, Any]) -> Posting:
    details = row["details"] or {}
    return Posting(
        kind=row["kind"],
        day=row["day"],
        from_account=row["from_account"],
        to_account=row["to_account"],
        points=row["points"],
        lots=list(zip(row["lot_days"] or (), row["lot_points"] or (), strict=True)),
        lot_expires_on=row["lot_expires_on"],
        by=row["by"],
        reason=row["reason"],
        note=row["note"],
        details={name: shown(value) if isinstance(value, str) else value for name, value in details.items()},
        entry=None if row["event"] is None else _entry(row),
        refund=None if row["refund"] is None else Refund(row["refund"], row["refund_fen"]),
    )


def _entry(row: Mapping[str, Any]) -> BookedEntry:
    arrived_ms = int(row["stream_id"].partition("-")[0])
    return BookedEntry(
        kind=row["event_kind"],
        event=row["event"],
        outcome=row["outcome"],
        rulebook=row["rulebook"],
        frozen=row["frozen"],
        base=row["base"],
        uncapped=row["uncapped"],
        points=row["entry_points"],
        campaigns=[shown(campaign) for campaign in row["campaigns"] or ()],
        evidence=[(shown(tripped["limit"]), tripped["observed"]) for tripped in row["evidence"] or ()],
        order=row["order_id"],
        amount_fen=row["amount_fen"],
        arrived=utc(arrived_ms),
    )
