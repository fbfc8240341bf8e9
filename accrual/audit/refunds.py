"""Every accepted refund computed again, in the order of booking (SPEC section 9)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final, NamedTuple

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown

__all__ = ["check_refunds"]

# With each refund, what had gone back of the order before it, what its postings moved, which is one, or none, and which
# posting undid the last of them, where none stands. What was undone counts until then.
QUERY: Final = """
    SELECT p.name, r.seq, d.member, d.event, o.day::text, r.order_partition_id, r.order_seq, r.order_late, o.member,
        o.outcome, o.amount_fen, o.uncapped, o.points, r.action, r.amount_fen, r.reversed, d.amount_fen,
        (SELECT coalesce(sum(x.points), 0)::bigint FROM book.postings x
            WHERE (x.partition_id, x.seq, x.late) = (r.order_partition_id, r.order_seq, r.order_late)
            AND x.to_account = 'issuance' AND x.number < r.action AND x.kind <> 'correct'
            AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number AND c.number < r.action)),
        ARRAY(SELECT ARRAY[x.number, x.points] FROM book.postings x
            WHERE (x.partition_id, x.seq, x.late) = (r.order_partition_id, r.order_seq, r.order_late)
            AND x.kind = 'refund' AND x.action = r.action AND x.cause_seq = r.seq
            AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number) ORDER BY x.number),
        (SELECT max(c.number) FROM book.postings x LEFT JOIN book.postings c ON c.corrects = x.number
            WHERE (x.partition_id, x.seq, x.late) = (r.order_partition_id, r.order_seq, r.order_late)
            AND x.kind = 'refund' AND x.action = r.action AND x.cause_seq = r.seq
            HAVING count(*) = count(c.number))
    FROM book.refunds r JOIN book.deferred d USING (partition_id, seq) JOIN book.partitions p USING (partition_id)
    LEFT JOIN book.identities i ON i.paid_order = d.order_id
        AND (i.partition_id, i.seq, i.late) = (r.order_partition_id, r.order_seq, r.order_late)
    LEFT JOIN book.entries o
        ON (o.day, o.member, o.partition_id, o.seq, o.late) = (i.day, i.payer, i.partition_id, i.seq, i.late)
    ORDER BY r.action, r.partition_id, r.seq
"""


def check_refunds(connection: Connection) -> Iterator[Finding]:
    """Yield the refunds that should not have been, and those that moved other points than they should have."""
    refunds: defaultdict[tuple[int, int, bool], list[tuple[int, int | None]]] = defaultdict(list)
    for row in connection.execute(QUERY):
        partition, seq, member, event, day, *key, owner, outcome, amount_fen, uncapped, points = row[:13]
        action, refund_fen, reversed_points, asked_fen, before, postings, undone = row[13:]
        order = key[0], key[1], key[2]
        about = _About(partition, seq, member, event, day)
        if amount_fen is None:
            yield about.finding("there is no order that it is of", None, list(order))
            continue
        refunds[order].append((refund_fen, undone))
        total = sum(fen for fen, undone_by in refunds[order] if undone_by is None or undone_by > action)
        if refund_fen != asked_fen:
            yield about.finding("another amount than the event has", asked_fen, refund_fen)
        if owner != member:
            yield about.finding("the order belongs to another member", shown(owner), shown(member))
        if total > amount_fen:
            yield about.finding("more was refunded than the order had", amount_fen, total)
            continue
        if undone is not None:
            continue
        held = points if outcome in ("granted", "held") else 0
        keep = min(points, uncapped * (amount_fen - total) // amount_fen) if amount_fen and points > 0 else held
        expected = max(0, held - before - keep)
        posted = sum(moved for _, moved in postings)
        if (reversed_points, posted) != (expected, expected):
            detail = "it reversed other points than it should have"
            too_many = [number for number, moved in postings if moved == posted - expected]
            owed = {"posting": too_many[-1]} if too_many else {"owed": posted - expected}
            yield about.finding(detail, expected, posted, **owed)


class _About(NamedTuple):
    """Which refund a finding is of."""

    partition: str
    seq: int
    member: str
    event: str
    day: str | None

    def finding(
        self, detail: str, expected: object, found: object, owed: int | None = None, posting: int | None = None
    ) -> Finding:
        return Finding(
            check="refunds",
            detail=f"refund {shown(self.event)}: {detail}",
            partition=self.partition,
            seq=self.seq,
            member=shown(self.member),
            day=self.day,
            expected=expected,
            found=found,
            owed=owed,
            posting=posting,
        )
