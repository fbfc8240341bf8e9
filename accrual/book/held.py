"""What waits for a reviewer: members who are frozen or have points held, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from accrual.book.database import Connection
from accrual.book.texts import shown, stored

__all__ = ["held"]

PAGE_MEMBERS: Final = 100

# An entry says why where its points are held, or where it came with what froze the member: as the control event that
# did, or with a limit that tripped; such an entry may be worth nothing, or rejected.
QUERY: Final = """
    SELECT c.member, coalesce(m.state, 'active'), coalesce(b.held, 0), x.entries
    FROM (
        SELECT member FROM book.balances WHERE held > 0 UNION SELECT member FROM book.members WHERE state = 'frozen'
    ) c
    LEFT JOIN book.balances b USING (member)
    LEFT JOIN book.members m USING (member)
    CROSS JOIN LATERAL (
        SELECT max(e.ts_ms) AS ts_ms, array_agg(
            jsonb_build_object('partition', p.name, 'seq', e.seq, 'late', nullif(e.late, false), 'day', e.day,
                'event', e.event, 'kind', e.kind, 'order', e.order_id, 'amount', e.amount_fen, 'ts', e.ts_ms,
                'outcome', e.outcome, 'held', coalesce(h.points_left, 0), 'frozen', e.frozen, 'evidence', e.evidence,
                'masked', e.masked, 'rulebook', e.rulebook)
            ORDER BY e.number DESC, e.seq DESC) AS entries
        FROM book.entries e
        JOIN book.partitions p USING (partition_id)
        LEFT JOIN LATERAL (
            SELECT points_left FROM book.holdings h
            WHERE (h.day, h.partition_id, h.seq, h.late) = (e.day, e.partition_id, e.seq, e.late)
                AND e.outcome = 'held' AND h.account = 'held' AND h.points_left > 0
        ) h ON true
        WHERE e.member = c.member AND e.outcome <> 'granted'
            AND (h.points_left > 0 OR m.state = 'frozen' AND e.number = m.number
                AND (e.kind = 'member_frozen' OR e.evidence IS NOT NULL))
    ) x
    WHERE %(member)s::text IS NULL OR c.member = %(member)s
    ORDER BY x.ts_ms DESC NULLS LAST, c.member
"""


def held(connection: Connection, member: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a line for each member who is frozen or has points held, whoever has the newest such entry first.

    Its ``entries``, newest first, say why: reasons as in SPEC section 5, evidence, and the keys of limits, masked.
    """
    with connection.transaction(), connection.cursor(name="held") as cursor:
        cursor.itersize = PAGE_MEMBERS
        cursor.execute(QUERY, {"member": None if member is None else stored(member)})
        for name, state, points, found in cursor:
            entries = [_entry(fields) for fields in found or ()]
            since = {"since": entries[-1]["at"]} if entries else {}
            yield {"member": shown(name), "state": state, "held": points, **since, "entries": entries}


def _entry(fields: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {
        name: shown(value) if isinstance(value, str) else value for name, value in fields.items() if value is not None
    }
    line["at"] = datetime.fromtimestamp(line.pop("ts") / 1000, UTC).isoformat(timespec="milliseconds")
    limits = [item["limit"] for item in line.get("evidence", ())]
    line["reasons"] = ["member_frozen", *limits] if line.pop("frozen") else limits
    if "masked" in line:
        line["masked"] = {key: shown(text) for key, text in line["masked"].items()}
    return line
