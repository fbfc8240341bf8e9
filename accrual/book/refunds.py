"""Refunds: what an order's points shrink to when part of its money goes back (SPEC section 9).

A refund whose order is unknown waits for it. After the configured wait a person is asked, once; should the order come
nevertheless, the refund is dealt with and the question withdrawn. Once the person has closed it, the refund is theirs:
nothing more is done about it, even if the order comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import psycopg

from accrual.book.chunks import Done
from accrual.book.posting import act, lock_members, plan, post
from accrual.book.settle import settle_again
from accrual.book.texts import stored
from accrual.book.waiting import Deferred, claim, held_ids, open_exception, refunds_to_judge, resolve

__all__ = ["judge_refunds"]

CHUNK_EVENTS: Final = 1000

ORDERS: Final = """
    SELECT i.paid_order, e.day::text, e.partition_id, e.seq, e.late, e.member, e.outcome, e.amount_fen, e.uncapped,
        e.points
    FROM book.identities i
    JOIN book.entries e
        ON (e.day, e.member, e.partition_id, e.seq, e.late) = (i.day, i.payer, i.partition_id, i.seq, i.late)
    WHERE i.paid_order = ANY(%s) ORDER BY e.number, e.seq
"""

# What is known of the orders under their members' locks: what was refunded before, where their points are, and whether
# their day is settled. A refund whose reversal was undone does not count; one that had nothing to reverse has no
# posting.
STANDING: Final = """
    SELECT o.partition_id, o.seq, o.late,
        (SELECT coalesce(sum(amount_fen), 0)::bigint FROM book.refunds r
            WHERE (r.order_partition_id, r.order_seq, r.order_late) = (o.partition_id, o.seq, o.late)
            AND (r.reversed = 0 OR EXISTS (
                SELECT FROM book.standing s
                WHERE (s.partition_id, s.seq, s.late) = (o.partition_id, o.seq, o.late)
                    AND (s.kind, s.action, s.cause_seq) = ('refund', r.action, r.seq)))),
        h.points_left, h.account, EXISTS (SELECT FROM book.settled_days s WHERE s.day = o.day)
    FROM unnest(%(days)s::date[], %(members)s::text[], %(partitions)s::smallint[], %(seqs)s::bigint[],
        %(lates)s::boolean[]) AS o (day, member, partition_id, seq, late)
    LEFT JOIN book.holdings h
        ON (h.day, h.member, h.partition_id, h.seq, h.late) = (o.day, o.member, o.partition_id, o.seq, o.late)
"""

REVERSALS: Final = """
    SELECT member, 'refund', account, 'issuance', points, day, NULL::date, account = 'available', partition_id, seq,
        late, cause_seq
    FROM unnest(%(members)s::text[], %(accounts)s::text[], %(points)s::bigint[], %(days)s::date[],
        %(partitions)s::smallint[], %(seqs)s::bigint[], %(lates)s::boolean[], %(causes)s::bigint[])
        WITH ORDINALITY AS r (member, account, points, day, partition_id, seq, late, cause_seq, place)
    ORDER BY place
"""


class Order(msgspec.Struct, frozen=True):
    """An order's entry. ``day`` is a date as text; ``amount_fen`` is never absent, since an order has one."""

    day: str
    partition_id: int
    seq: int
    late: bool
    member: str
    outcome: str
    amount_fen: int
    uncapped: int
    points: int

    @property
    def key(self) -> tuple[int, int, bool]:
        """What names the entry."""
        return self.partition_id, self.seq, self.late

    def keep(self, refunded_fen: int) -> int:
        """Return the points that the order keeps when ``refunded_fen`` of its amount, above 0, went back."""
        return min(self.points, self.uncapped * (self.amount_fen - refunded_fen) // self.amount_fen)


class Accepted(msgspec.Struct, frozen=True):
    """A refund that is accepted: how many points of the order, whose day may be settled, are reversed out of where."""

    refund: Deferred
    order: Order
    reversed: int
    account: str | None
    is_settled: bool


def judge_refunds(cursor: psycopg.Cursor[Any], wait_s: float, by: str) -> Done | None:
    """Deal with a chunk of the refunds that wait, within the cursor's transaction and turn.

    Return what was done; ``None`` where nothing can be.
    """
    waiting = refunds_to_judge(cursor, CHUNK_EVENTS, wait_s)
    if not waiting:
        return None
    held = held_ids(cursor, waiting)
    refunds = _first_ones(waiting)
    duplicates = [refund for refund in refunds if refund.event in held]
    given_up = [refund for refund in refunds if refund.given_up and refund.event not in held]
    to_judge = [refund for refund in refunds if not refund.given_up and refund.event not in held]
    accepted, refused, unknown = _judge(cursor, {refund.order_id or "": refund for refund in to_judge})
    for refund in unknown:
        open_exception(cursor, "order_unknown", refund, f"there is no order {refund.order_id}")
    if len(unknown) == len(refunds):
        return Done()
    # After the locks: what was booked of an order before this refund of it has a smaller number.
    action = act(cursor, "refund", by=stored(by))
    refused += given_up
    claim(cursor, [item.refund for item in accepted] + refused)
    resolve(cursor, duplicates, "duplicate", action)
    resolve(cursor, refused, "exception", action)
    done = _reverse(cursor, accepted, action)
    resolve(cursor, [item.refund for item in accepted], "refund", action)
    return done


def _first_ones(waiting: Sequence[Deferred]) -> list[Deferred]:
    """Return the refunds that can be dealt with together: no two of one order, or with one event id.

    The others are left to the next chunk, and with them what their members have behind them: the points of a member
    move in the order in which the refunds came, since each meets the lots that the one before has left.
    """
    chosen: list[Deferred] = []
    taken: set[tuple[str, str | None]] = set()
    left: set[str] = set()
    for refund in waiting:
        names = {("order", refund.order_id), ("event", refund.event)}
        if refund.member in left or names & taken:
            left.add(refund.member)
        else:
            chosen.append(refund)
            taken |= names
    return chosen


def _judge(
    cursor: psycopg.Cursor[Any], refunds: dict[str, Deferred]
) -> tuple[list[Accepted], list[Deferred], list[Deferred]]:
    """Return which refunds, by order id, are accepted, which are left to a person, and whose order is unknown."""
    orders = _orders(cursor, list(refunds))
    found = {order_id: order for order_id in refunds if (order := _order_of(orders[order_id])) is not None}
    lock_members(cursor, [order.member for order in found.values()])
    standing = _standing(cursor, list(found.values()))
    accepted, refused = [], []
    for order_id, order in found.items():
        refund = refunds[order_id]
        refunded_fen, left, account, is_settled = standing[order.key]
        fault = _fault(refund, order, orders[order_id], refunded_fen)
        if fault is not None:
            open_exception(cursor, fault[0], refund, fault[1], {"order": order_id})
            refused.append(refund)
            continue
        assert refund.amount_fen is not None
        # What an order has taken from its member it does not give back.
        has_points = order.amount_fen > 0 and order.points > 0
        keep = order.keep(refunded_fen + refund.amount_fen) if has_points else left
        accepted.append(Accepted(refund, order, max(0, left - keep), account, is_settled))
    return accepted, refused, [refund for order_id, refund in refunds.items() if order_id not in found]


def _orders(cursor: psycopg.Cursor[Any], order_ids: list[str]) -> defaultdict[str, list[Order]]:
    cursor.execute(ORDERS, (order_ids,))
    orders: defaultdict[str, list[Order]] = defaultdict(list)
    for order_id, *fields in cursor.fetchall():
        orders[order_id].append(Order(*fields))
    return orders


def _order_of(candidates: Sequence[Order]) -> Order | None:
    """Return the entry of an order that was booked under several event ids: the first that has points, or the first."""
    with_points = [order for order in candidates if order.outcome in ("granted", "held")]
    return next(iter(with_points or candidates), None)


def _standing(
    cursor: psycopg.Cursor[Any], orders: Sequence[Order]
) -> dict[tuple[int, int, bool], tuple[int, int, str | None, bool]]:
    cursor.execute(
        STANDING,
        {
            "days": [order.day for order in orders],
            "members": [order.member for order in orders],
            "partitions": [order.partition_id for order in orders],
            "seqs": [order.seq for order in orders],
            "lates": [order.late for order in orders],
        },
    )
    return {(row[0], row[1], row[2]): (row[3], row[4] or 0, row[5], row[6]) for row in cursor.fetchall()}


def _fault(refund: Deferred, order: Order, candidates: Sequence[Order], refunded_fen: int) -> tuple[str, str] | None:
    """Return the kind and the words of what a person must look at; ``None`` where the refund is in order."""
    name, amount_fen = refund.order_id, refund.amount_fen or 0
    if sum(candidate.outcome in ("granted", "held") for candidate in candidates) > 1:
        return "order_ambiguous", f"order {name} was booked {len(candidates)} times under different event ids"
    if refund.member != order.member:
        return "refund_of_another_member", f"order {name} belongs to {order.member}, not to {refund.member}"
    if refunded_fen + amount_fen > order.amount_fen:
        said = f"{refunded_fen} fen were refunded before, and {amount_fen} more"
        return "refund_exceeds_order", f"order {name} has {order.amount_fen} fen; {said} are too much"
    return None


def _reverse(cursor: psycopg.Cursor[Any], accepted: Sequence[Accepted], action: int) -> Done:
    """Note the refunds, and move the points back."""
    cursor.executemany(
        "INSERT INTO book.refunds (partition_id, seq, order_partition_id, order_seq, order_late, amount_fen, reversed, "
        "action) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
        [
            (item.refund.partition_id, item.refund.seq, *item.order.key, item.refund.amount_fen, item.reversed, action)
            for item in accepted
        ],
    )
    moving = [item for item in accepted if item.reversed]
    parameters = {
        "members": [item.order.member for item in moving],
        "accounts": [item.account for item in moving],
        "points": [item.reversed for item in moving],
        "days": [item.order.day for item in moving],
        "partitions": [item.order.partition_id for item in moving],
        "seqs": [item.order.seq for item in moving],
        "lates": [item.order.late for item in moving],
        "causes": [item.refund.seq for item in moving],
    }
    postings = plan(cursor, REVERSALS, parameters, of_entries=True)
    done = Done(len({item.order.member for item in moving}), postings, post(cursor, action))
    if any(item.is_settled and item.account == "pending" for item in moving):
        settle_again(cursor)
    return done
