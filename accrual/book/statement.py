"""A member's statement: every posting that touches the member, newest first, each explained in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.book.words import Campaigns, Posting, explain

__all__ = ["statement"]

PAGE_ROWS: Final = 500

QUERY: Final = """
    SELECT m.number, m.seq, m.kind, m.from_account, m.to_account, m.points, m.day::text, p.name, e.event, e.order_id,
        e.kind, e.amount_fen, e.base, e.uncapped, e.points, e.campaigns, e.evidence, e.frozen, e.rulebook, a.by,
        a.reason, a.note, coalesce(a.done_at, b.booked_at, d.done_at), m.partition_id
    FROM book.movements m
    LEFT JOIN book.partitions p USING (partition_id)
    LEFT JOIN book.entries e ON (e.day, e.partition_id, e.seq, e.late) = (m.day, m.partition_id, m.seq, m.late)
    LEFT JOIN book.actions a ON a.action = m.action
    LEFT JOIN LATERAL (
        SELECT booked_at FROM book.batches b WHERE m.action IS NULL AND b.number = m.number LIMIT 1
    ) b ON true
    LEFT JOIN LATERAL (
        SELECT done_at FROM book.resolutions r JOIN book.actions USING (action)
        WHERE m.kind = 'late' AND (r.partition_id, r.seq) = (m.partition_id, m.seq)
    ) d ON true
    WHERE m.member = %(member)s AND (%(kind)s::text IS NULL OR m.kind = %(kind)s)
        AND (%(account)s::text IS NULL OR %(account)s IN (m.from_account, m.to_account))
        AND (%(first)s::date IS NULL OR m.day >= %(first)s) AND (%(last)s::date IS NULL OR m.day <= %(last)s)
    ORDER BY m.number DESC, m.seq DESC LIMIT %(limit)s
"""


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
    campaigns = Campaigns(connection)
    parameters = {"member": stored(member), "kind": kind, "account": account, "limit": limit}
    parameters |= {"first": first_day, "last": last_day}
    with connection.transaction(), connection.cursor(name="statement") as cursor:
        cursor.itersize = PAGE_ROWS
        cursor.execute(QUERY, parameters)
        for row in cursor:
            posting = _posting(row)
            yield _line(posting, explain(posting, campaigns.of(posting)))


def _posting(row: tuple[Any, ...]) -> Posting:
    values = dict(zip(Posting.__struct_fields__, row, strict=True))
    for name in ("event", "order", "event_kind", "by", "note"):
        values[name] = shown(values[name])
    values["campaigns"] = tuple(shown(campaign) for campaign in values["campaigns"] or ())
    values["evidence"] = tuple((item["limit"], item["observed"]) for item in values["evidence"] or ())
    return Posting(**values)


def _line(posting: Posting, words: str) -> dict[str, Any]:
    about = {
        "partition": posting.partition,
        "seq": posting.seq,
        "event": posting.event,
        "order": posting.order,
        "rulebook": posting.rulebook,
        "by": posting.by,
        "reason": posting.reason,
        "note": posting.note,
    }
    return {
        "number": posting.number,
        "kind": posting.kind,
        "day": posting.day,
        "from": posting.from_account,
        "to": posting.to_account,
        "points": posting.points,
        "booked_at": posting.booked_at.isoformat(),
        "words": words,
        **{name: value for name, value in about.items() if value not in (None, "")},
    }
