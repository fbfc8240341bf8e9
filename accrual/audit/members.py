"""The states of members, worked out again from what was booked of them: control events, freezes and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from accrual.audit.findings import Finding
from accrual.audit.recorded import Recorded
from accrual.book.database import Connection
from accrual.book.texts import shown, stored

__all__ = ["check_members"]

# The last verdict decides, and a freeze behind it where that was not to block. Whether the member was immune shows in
# what was held; where the event was rejected only the immunity that the book knows can say it.
QUERY: Final = """
    WITH freezing AS (
        SELECT * FROM unnest(%(partitions)s::smallint[], %(versions)s::bigint[], %(limits)s::text[])
            AS f (partition_id, rulebook, limit_id)
    ), changes AS (
        SELECT member, number, seq, CASE kind WHEN 'member_released' THEN 'active' WHEN 'member_blocked' THEN 'blocked'
            ELSE 'frozen' END AS state
        FROM book.entries
        WHERE outcome = 'applied' AND kind IN ('member_frozen', 'member_released', 'member_blocked')
        UNION ALL
        SELECT e.member, e.number, e.seq, 'frozen' FROM book.entries e LEFT JOIN book.members m USING (member)
        WHERE NOT e.late AND e.evidence IS NOT NULL
            AND (e.outcome = 'held' OR e.outcome = 'rejected'
                AND least(e.ts_ms, split_part(e.stream_id, '-', 1)::bigint) >= coalesce(m.immune_until_ms, 0))
            AND EXISTS (SELECT FROM freezing f, jsonb_array_elements(e.evidence) AS tripped
                WHERE (f.partition_id, f.rulebook) = (e.partition_id, e.rulebook) AND tripped ->> 'limit' = f.limit_id)
        UNION ALL
        SELECT details ->> 'member', action, 0, CASE kind WHEN 'release' THEN 'active' ELSE 'blocked' END
        FROM book.actions WHERE kind IN ('release', 'confirm')
    ), verdicts AS (
        SELECT DISTINCT ON (member) member, number, seq, state FROM changes WHERE state <> 'frozen'
        ORDER BY member, number DESC, seq DESC
    ), expected AS (
        SELECT c.member, CASE WHEN v.state = 'blocked' THEN 'blocked'
            WHEN bool_or(c.state = 'frozen' AND (c.number, c.seq) > (coalesce(v.number, -1), coalesce(v.seq, -1)))
                THEN 'frozen' ELSE 'active' END AS state
        FROM changes c LEFT JOIN verdicts v USING (member) GROUP BY c.member, v.state
    )
    SELECT coalesce(m.member, e.member), coalesce(e.state, 'active'), coalesce(m.state, 'active')
    FROM book.members m FULL JOIN expected e ON e.member = m.member
    WHERE coalesce(e.state, 'active') <> coalesce(m.state, 'active') ORDER BY 1
"""


def check_members(connection: Connection, recorded: Sequence[Recorded]) -> Iterator[Finding]:
    """Yield the members whose state is not what control events, freezes and verdicts have made of it."""
    freezing = [
        (record.partition_id, record.rulebook.version, stored(limit.id))
        for record in recorded
        for limit in record.rulebook.limits
        if limit.action == "freeze"
    ]
    partitions, versions, limits = map(list, zip(*freezing, strict=True)) if freezing else ([], [], [])
    about = {"partitions": partitions, "versions": versions, "limits": limits}
    for member, expected, found in connection.execute(QUERY, about):
        detail = "the state is not what was made of the member"
        yield Finding("members", detail, member=shown(member), expected=expected, found=found)
