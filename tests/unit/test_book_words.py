"""Statements in words: what every kind of posting says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from accrual.book.words import BookedEntry, Posting, Refund, explain, explain_held
from accrual.rulebook import Rulebook, parse

RULEBOOK = """\
[programme]
name = "beans"
version = 3
timezone = "Asia/Shanghai"
stacking = "{stacking}"

[[earn]]
kind = "order_paid"
points_per_yuan = "1.5"
category_rates = {{ fresh = "2" }}
min_amount_fen = 2000

[[earn]]
kind = "checkin"
points = 5
streak_days = 7
streak_bonus = 50

[[campaign]]
id = "member-day"
multiplier = "2"

[[campaign]]
id = "rain"
multiplier = "1.25"
tags = ["bad_weather"]

[[limit]]
id = "cap"
key = "member"
measure = "points"
window = "day"
max = 100
action = "clamp"

[[limit]]
id = "farm"
key = "device"
measure = "members"
window = "5m"
max = 2
action = "freeze"

[[limit]]
id = "burst"
key = "ip"
measure = "events"
window = "90s"
max = 20
action = "hold"
"""
BEANS = parse(RULEBOOK.format(stacking="multiply"))
ORDER = BookedEntry(
    kind="order_paid",
    event="e1",
    outcome="granted",
    rulebook=3,
    frozen=False,
    base=45,
    uncapped=45,
    points=45,
    campaigns=(),
    evidence=(),
    order="o1",
    amount_fen=3000,
    arrived="2026-11-13T00:00:00.000+00:00",
)
CHECKIN = msgspec.structs.replace(ORDER, kind="checkin", order=None, amount_fen=None, base=5, uncapped=5, points=5)
NAMED = "decided by rulebook beans version 3."
BASE = (
    "Order o1 of 30.00 yuan (event e1) on 2026-11-10: base 45 points at 1.5 per yuan, times the rates of its categories"
)


def accrued(entry: BookedEntry, rulebook: Rulebook | None = BEANS, kind: str = "accrue", **changes: object) -> str:
    entry = msgspec.structs.replace(entry, **changes)
    account = "held" if entry.outcome == "held" else "pending"
    return explain(Posting(kind, "2026-11-10", "issuance", account, entry.points, entry=entry), rulebook)


def moved(kind: str, from_account: str, to_account: str, points: int = 45, **fields: Any) -> str:
    posting = Posting(kind, "2026-11-10", from_account, to_account, points, **fields)
    return explain(posting, None)


def test_a_plain_order() -> None:
    assert accrued(ORDER) == f"{BASE}. 45 points granted, {NAMED}"
    assert accrued(ORDER, rulebook=None) == (
        "Order o1 of 30.00 yuan (event e1) on 2026-11-10: base 45 points. 45 points granted, decided by rulebook "
        "version 3."
    )


def test_an_order_below_the_least_amount() -> None:
    assert accrued(ORDER, amount_fen=1999, base=0, points=0) == (
        "Order o1 of 19.99 yuan (event e1) on 2026-11-10: base 0 points, as less than 20.00 yuan earns nothing. "
        f"0 points granted, {NAMED}"
    )


def test_what_is_no_order() -> None:
    assert accrued(CHECKIN) == f"Checkin (event e1) on 2026-11-10: base 5 points. 5 points granted, {NAMED}"
    assert accrued(CHECKIN, base=55, points=55) == (
        f"Checkin (event e1) on 2026-11-10: base 55 points, 5 and 50 for 7 days in a row. 55 points granted, {NAMED}"
    )


@pytest.mark.parametrize(
    ("stacking", "said"), [("multiply", "multiplied"), ("add", "added"), ("max", "the largest counts")]
)
def test_campaigns(stacking: str, said: str) -> None:
    rulebook = parse(RULEBOOK.format(stacking=stacking))
    assert accrued(ORDER, rulebook, campaigns=("member-day",), uncapped=90, points=90) == (
        f"{BASE}; campaign member-day ×2 makes it 90. 90 points granted, {NAMED}"
    )
    assert accrued(ORDER, rulebook, campaigns=("member-day", "rain"), uncapped=112, points=112) == (
        f"{BASE}; campaigns member-day ×2 and rain ×1.25 ({said}) make it 112. 112 points granted, {NAMED}"
    )


def test_campaigns_and_limits_that_no_rulebook_explains() -> None:
    said = accrued(ORDER, None, campaigns=("rain", "sun"), uncapped=90, evidence=(("cap", 110),), points=35)
    assert said.endswith(
        "; campaigns rain and sun make it 90; limit cap tripped at 110. 35 points granted, decided by rulebook "
        "version 3."
    )


def test_a_clamp() -> None:
    assert accrued(ORDER, evidence=(("cap", 110),), points=35) == (
        f"{BASE}; limit cap clamps it, as it would make 110 points per member and business day where 100 are allowed. "
        f"35 points granted, {NAMED}"
    )


def test_what_holds() -> None:
    farm = "limit farm, which freezes, tripped with 3 or more members per device in 5 min where 2 are allowed"
    burst = "limit burst, which holds, tripped with 21 events per ip in 90 s where 20 are allowed"
    evidence = (("farm", 3), ("burst", 21))
    assert accrued(ORDER, outcome="held", evidence=evidence, frozen=True) == (
        f"{BASE}; {farm}; {burst}; the member was frozen. 45 points held, {NAMED}"
    )
    assert accrued(ORDER, evidence=evidence) == (
        f"{BASE}; {farm}, but the member was immune; {burst}, but the member was immune. 45 points granted, {NAMED}"
    )


def test_a_late_one_says_when_it_came() -> None:
    assert " on 2026-11-10, which came late, at 2026-11-13T00:00:00.000+00:00: base" in accrued(ORDER, kind="late")


def test_settlement() -> None:
    lots = [("2026-11-10", 45)]
    assert moved("settle", "pending", "available", lots=lots, lot_expires_on="2027-11-10") == (
        "Business day 2026-11-10 was settled: 45 points became available; 45 are in the lot of 2026-11-10, which "
        "expires on 2027-11-10."
    )
    assert moved(
        "settle", "pending", "available", lots=[(None, 44), *[("2026-11-10", 1)]], lot_expires_on="2027-11-10"
    ) == (
        "Business day 2026-11-10 was settled: 45 points became available; 44 made up for a balance below zero and 1 is "
        "in the lot of 2026-11-10, which expires on 2027-11-10."
    )


def test_what_a_reviewer_does() -> None:
    who: dict[str, Any] = {"by": "alice", "reason": "checked", "note": "a family", "entry": ORDER}
    order = "order o1 of 30.00 yuan (event e1)"
    assert moved("release", "held", "pending", **who) == (
        f"45 points, held for {order}, were released to pending by alice (checked: a family)."
    )
    assert moved("confirm", "held", "issuance", **who) == (
        f"45 points, held for {order}, were taken back by alice (checked: a family)."
    )
    assert moved("clawback", "available", "issuance", lots=[("2026-11-10", 45)], **who) == (
        f"45 points, earned by {order}, were taken back out of available by alice (checked: a family); "
        "45 came from the lot of 2026-11-10."
    )


def test_a_refund_names_its_event() -> None:
    lots = [("2026-11-10", 1), (None, 44)]
    assert moved("refund", "available", "issuance", entry=ORDER, refund=Refund("r1", 905), lots=lots) == (
        "Refund r1 of 9.05 yuan for order o1 of 30.00 yuan (event e1): 45 points were taken back out of available; "
        "1 came from the lot of 2026-11-10 and 44 left the balance below zero."
    )


def test_expiry_adjustment_and_redemption() -> None:
    assert moved("expire", "available", "expired", 1, lots=[("2026-11-10", 1)], by="scheduler") == (
        "1 point of the lot of 2026-11-10 expired."
    )
    approved = {"approved_by": "bob"}
    assert moved("adjust", "issuance", "available", by="alice", reason="goodwill", details=approved) == (
        "45 points were given by alice, approved by bob (goodwill)."
    )
    assert moved("adjust", "available", "issuance", by="alice") == "45 points were taken by alice."
    assert moved("redeem", "available", "redeemed", 1) == "1 point was redeemed."


def test_a_correction_names_what_it_undoes() -> None:
    who: dict[str, Any] = {
        "by": "alice",
        "reason": "audit",
        "details": {"approved_by": "bob", "corrects": 7, "kind": "expire"},
    }
    assert moved("correct", "expired", "available", lots=[("2026-11-10", 45)], **who) == (
        "Posting 7, expire, was undone: 45 points went back from expired to available by alice, approved by bob "
        "(audit); 45 are in the lot of 2026-11-10."
    )


def test_why_points_are_held() -> None:
    held = msgspec.structs.replace(ORDER, outcome="held", evidence=(("farm", 3), ("burst", 21)))
    assert explain_held(held, 45, BEANS) == (
        "Order o1 of 30.00 yuan (event e1): limit farm, which freezes, tripped with 3 or more members per device in "
        "5 min where 2 are allowed; limit burst, which holds, tripped with 21 events per ip in 90 s where 20 are "
        "allowed; 45 points held."
    )
    assert explain_held(held, 45, None) == (
        "Order o1 of 30.00 yuan (event e1): limit farm tripped at 3; limit burst tripped at 21; 45 points held."
    )
    assert explain_held(msgspec.structs.replace(CHECKIN, outcome="held", frozen=True), 1, BEANS) == (
        "Checkin (event e1): the member had been frozen before; 1 point held."
    )


def test_what_froze_a_member_without_points() -> None:
    rejected = msgspec.structs.replace(ORDER, outcome="rejected", evidence=(("farm", 3),))
    assert explain_held(rejected, 0, None).endswith("limit farm tripped at 3; it was rejected.")
    control = msgspec.structs.replace(CHECKIN, kind="member_frozen", event="f1", outcome="applied")
    assert explain_held(control, 0, BEANS) == "Control event f1 froze the member."


@pytest.mark.parametrize(
    ("until_ms", "said"),
    [
        (1_794_672_000_000, "2026-11-14T16:00:00.000+00:00"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999+00:00"),
        (2**53 - 1, "287396-10-12T08:59:00.991+00:00"),
    ],
)
def test_a_release_says_how_long_the_member_is_immune(until_ms: int, said: str) -> None:
    words = moved("release", "held", "pending", entry=ORDER, by="alice", details={"immune_until_ms": until_ms})
    assert words.endswith(
        f"released to pending by alice; no limit freezes the member or holds their points until {said}."
    )


def test_what_takes_points_from_a_member() -> None:
    assert accrued(ORDER, uncapped=-45, points=-45) == f"{BASE}. 45 points taken, {NAMED}"
    held = msgspec.structs.replace(ORDER, outcome="held", frozen=True, points=-1)
    assert accrued(held) == f"{BASE}; the member was frozen. 1 point to be taken, and held, {NAMED}"
    assert explain_held(held, -1, BEANS) == (
        "Order o1 of 30.00 yuan (event e1): the member had been frozen before; 1 point to be taken, and held."
    )
    assert moved("settle", "available", "pending", lots=[("2026-11-09", 44), (None, 1)]) == (
        "Business day 2026-11-10 was settled: 45 points were taken; 44 came from the lot of 2026-11-09 and 1 left the "
        "balance below zero."
    )
    order = "to be taken for order o1 of 30.00 yuan (event e1)"
    assert moved("release", "pending", "held", 1, entry=ORDER, by="alice") == (
        f"1 point, {order}, was taken out of pending by alice."
    )
    assert moved("release", "available", "held", entry=ORDER, by="alice", lots=[(None, 45)]) == (
        f"45 points, {order}, were taken out of available by alice; 45 left the balance below zero."
    )
    assert moved("confirm", "issuance", "held", entry=ORDER, by="alice") == (
        f"45 points, {order}, were left to the member by alice."
    )
