"""A year of real grocery baskets, day by day: accrued, settled, a share of them refunded, expired, and audited."""

from __future__ import annotations

import random
from datetime import date
from typing import Any

import pytest

from accrual.audit import Audit, AuditReport
from accrual.book import connect, expire, rebuild, settle, slow
from accrual.demo.baskets import Baskets, load
from accrual.rulebook import day_number
from accrual.settings import Settings
from books import DAY_MS, Partition, ingest
from servers import Server
from workers import SECRET

FIRST_DAY = day_number(date(2026, 1, 1))
FIRST_MS = FIRST_DAY * DAY_MS - 8 * 3_600_000
REFUNDED_SHARE = 0.04
LATE_SHARE = 0.01

RULEBOOK = """\
[programme]
name = "year"
version = 1
timezone = "Asia/Shanghai"
expiry_months = 3

[[earn]]
kind = "order_paid"
points_per_yuan = "1"
category_rates = { PRODUCE = "2" }

[[campaign]]
id = "member-day"
multiplier = "2"
days_of_month = [15]

[[limit]]
id = "day"
key = "member"
measure = "points"
window = "day"
max = 400
action = "clamp"

[[limit]]
id = "orders"
key = "member"
measure = "events"
window = "day"
max = 4
action = "hold"
"""


def order(baskets: Baskets, row: int) -> dict[str, Any]:
    lines = range(int(baskets.line_start[row]), int(baskets.line_start[row + 1]))
    priced = [[baskets.categories[baskets.category[line]], int(baskets.amount_fen[line])] for line in lines]
    return {
        "id": f"e{row}",
        "kind": "order_paid",
        "member": f"h{baskets.household[row]}",
        "ts": FIRST_MS + int(baskets.day[row]) * DAY_MS + int(baskets.second[row]) * 1000 + 1,
        "amount": sum(amount for _, amount in priced),
        "order": f"o{row}",
        "lines": priced,
    }


def refund(paid: dict[str, Any], day: int, rng: random.Random) -> dict[str, Any]:
    amount = rng.choice([paid["amount"], rng.randrange(paid["amount"] + 1)])
    ts = FIRST_MS + day * DAY_MS + DAY_MS - 1000
    about = {"id": f"r{paid['id']}-{day}", "kind": "order_refunded", "member": paid["member"], "ts": ts}
    return about | {"amount": amount, "order": paid["order"]}


@pytest.mark.parametrize(
    ("households", "days"), [(12, 120), pytest.param(2500, 365, marks=pytest.mark.slow)], ids=["a sample", "the year"]
)
def test_a_year_of_baskets(valkey: Server, book: str, households: int, days: int) -> None:
    rng = random.Random(20261115)
    baskets = load().first_households(households)
    rows_of_day: dict[int, list[int]] = {}
    for row in sorted(range(len(baskets)), key=lambda row: (int(baskets.day[row]), int(baskets.second[row]))):
        rows_of_day.setdefault(int(baskets.day[row]), []).append(row)
    partition = Partition(valkey.client(), rulebook=RULEBOOK)
    late: list[tuple[int, dict[str, Any]]] = []
    paid: list[dict[str, Any]] = []
    with connect(book) as connection:
        for day in range(days):
            orders = [order(baskets, row) for row in rows_of_day.get(day, [])]
            come_late = [event for event in orders if rng.random() < LATE_SHARE]
            late += [(day + rng.randrange(3, 9), event) for event in come_late]
            events = [event for event in orders if event not in come_late]
            paid += orders
            arrival = FIRST_MS + day * DAY_MS + DAY_MS - 500
            events += [refund(known, day, rng) for known in paid[-200:] if rng.random() < REFUNDED_SHARE / 10]
            events += [event | {"at": arrival} for due, event in late if due == day]
            if events:
                partition.send(*events)
            ingest(connection, partition)
            slow(connection, partition.rulebook, refund_wait_hours=0)
            if day:
                settle(connection, partition.rulebook, FIRST_DAY + day - 1)
            expire(connection, FIRST_DAY + day)
        kinds: dict[str, int] = dict(
            connection.execute("SELECT kind, count(*) FROM book.movements GROUP BY kind").fetchall()
        )
        assert set(kinds) >= {"accrue", "late", "settle", "refund", "expire"}
        assert list(rebuild(connection)) == []
    report = AuditReport()
    audit = Audit(settings=Settings(redis=valkey.url, database=book, secret=SECRET.key.hex()))
    assert [finding.line() for finding in audit.run(report)] == []
    assert report.notes == []
