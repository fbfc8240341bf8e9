"""What waits for a reviewer: members who are frozen or have points held, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from accrual.book.database import Connection
from accrual.book.programme import rulebooks_of
from accrual.book.texts import shown, stored
from accrual.book.words import BookedEntry, explain_held, utc
from accrual.rulebook import Rulebook

__all__ = ["held"]

PAGE_MEMBERS: Final = 100

# An entry says why where its points are held, or where it came with what froze the member: as the control event that
# did, or with a limit that tripped; such an entry may be worth nothing, or rejected.
QUERY: Final = """
    SELECT c.member, coalesce(m.state, 'active'), coalesce(b.held, 0), x.entries
    FROM (
        SELECT member FROM book.balances WHERE held <> 0 UNION SELECT member FROM book.members WHERE state = 'frozen'
    ) c
    LEFT JOIN book.balances b USING (member)
    LEFT JOIN book.members m USING (member)
    CROSS JOIN LATERAL (
        SELECT max(e.ts_ms) AS ts_ms, array_agg(
            jsonb_build_object('partition_id', p.partition_id, 'partition', p.name, 'seq', e.seq,
                'late', nullif(e.late, false), 'day', e.day, 'event', e.event, 'kind', e.kind,
                'order', e.order_id, 'amount', e.amount_fen, 'ts', e.ts_ms, 'outcome', e.outcome,
                'held', coalesce(h.points_left, 0), 'frozen', e.frozen, 'evidence', e.evidence, 'masked', e.masked,
                'rulebook', e.rulebook)
            ORDER BY e.number DESC, e.seq DESC) AS entries
        FROM book.entries e
        JOIN book.partitions p USING (partition_id)
        LEFT JOIN LATERAL (
            SELECT points_left FROM book.holdings h
            WHERE (h.day, h.member, h.partition_id, h.seq, h.late) = (e.day, e.member, e.partition_id, e.seq, e.late)
                AND e.outcome = 'held' AND h.account = 'held' AND h.points_left <> 0
        ) h ON true
        WHERE e.member = c.member AND e.outcome <> 'granted'
            AND (h.points_left <> 0 OR m.state = 'frozen' AND e.number = m.number
                AND (e.kind = 'member_frozen' OR e.evidence IS NOT NULL))
    ) x
    WHERE %(member)s::text IS NULL OR c.member = %(member)s
    ORDER BY x.ts_ms DESC NULLS LAST, c.member
"""


def held(connection: Connection, member: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a line for each member who is frozen or has points held, whoever has the newest such entry first.

    Its ``entries``, newest first, say why: in words, reasons as in SPEC section 5, evidence, and the keys of limits,
    masked.
    """
    rulebook_of = rulebooks_of(connection)
    with connection.transaction(), connection.cursor(name="held") as cursor:
        cursor.itersize = PAGE_MEMBERS
        cursor.execute(QUERY, {"member": None if member is None else stored(member)})
        for name, state, points, found in cursor:
            entries = [
                _entry(fields, rulebook_of(fields["partition_id"], fields["rulebook"])) for fields in found or ()
            ]
            since = {"since": entries[-1]["at"]} if entries else {}
            yield {"member": shown(name), "state": state, "held": points, **since, "entries": entries}


def _entry(fields: Mapping[str, Any], rulebook: Rulebook | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        name: shown(value) if isinstance(value, str) else value for name, value in fields.items() if value is not None
    }
    del line["partition_id"]
    line["at"] = utc(line.pop("ts"))
    if "evidence" in line:
        line["evidence"] = [tripped | {"limit": shown(tripped["limit"])} for tripped in line["evidence"]]
    entry = BookedEntry(
        kind=line["kind"],
        event=line["event"],
        outcome=line["outcome"],
        rulebook=line["rulebook"],
        frozen=line.pop("frozen"),
        evidence=[(tripped["limit"], tripped["observed"]) for tripped in line.get("evidence", ())],
        order=line.get("order"),
        amount_fen=line.get("amount"),
    )
    limits = [limit for limit, _ in entry.evidence]
    line["reasons"] = ["member_frozen", *limits] if entry.frozen else limits
    line["words"] = explain_held(entry, line["held"], rulebook)
    if "masked" in line:
        line["masked"] = {key: shown(text) for key, text in line["masked"].items()}
    return line
