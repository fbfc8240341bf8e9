"""The proof against overflow refuses what could overflow, and both engines decide alike what it lets through."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from fractions import Fraction
from random import Random
from typing import Any

import pytest

from accrual.cli.replay import outcome_lines
from accrual.engine import OFFLINE_SLACK_DAYS, open_engine
from accrual.errors import RulebookError
from accrual.rulebook import MAXIMUM_POINTS, Rulebook, parse

START_MS = 1794672000000
LARGEST_FEN = 10**12


def programme(stacking: str = "multiply") -> str:
    return f'[programme]\nname = "shop"\nversion = 1\ntimezone = "UTC"\nstacking = "{stacking}"\n'


def order(rate: str = "1", more: str = "") -> str:
    return f'[[earn]]\nkind = "order_paid"\npoints_per_yuan = "{rate}"\n{more}'


def campaigns(multipliers: Iterable[str], condition: str = "") -> str:
    """Write one campaign for each multiplier; ``{}`` in the condition is its number."""
    return "".join(
        f'[[campaign]]\nid = "c{number}"\nmultiplier = "{multiplier}"\n{condition.format(number)}\n'
        for number, multiplier in enumerate(multipliers)
    )


def finding(text: str) -> str:
    with pytest.raises(RulebookError) as caught:
        parse(text, "shop.toml")
    [only] = caught.value.findings
    return only


def decide(rulebook: Rulebook, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the outcomes of ``events``, on which both engines must agree to the byte."""
    lines = [json.dumps({"id": f"e{number}", **event}).encode() for number, event in enumerate(events)]
    fast, reference = (
        list(outcome_lines(open_engine(name, rulebook, slack_days=OFFLINE_SLACK_DAYS), lines))
        for name in ("fast", "reference")
    )
    assert fast == reference
    return [json.loads(line) for line in fast]


def paid(number: int, amount_fen: int, **more: object) -> dict[str, Any]:
    return {"kind": "order_paid", "member": "m1", "ts": START_MS + number * 1000, "amount": amount_fen, **more}


def test_the_largest_rate() -> None:
    rate = MAXIMUM_POINTS // (LARGEST_FEN // 100)
    [outcome] = decide(parse(programme() + order(str(rate))), [paid(0, LARGEST_FEN)])
    assert outcome["points"] == rate * LARGEST_FEN // 100
    assert finding(programme() + order(str(rate + 1))) == (
        "shop.toml:7: earn[1].kind: order_paid: an event could be worth about 10^18 points, beyond the exact arithmetic"
    )


def test_a_huge_category_rate() -> None:
    text = programme() + order("1", 'category_rates = { gold = "99999999999999999999" }\n')
    assert finding(text) == (
        "shop.toml:7: earn[1].kind: order_paid: an event could be worth about 10^29 points, beyond the exact arithmetic"
    )


def test_a_huge_streak_bonus() -> None:
    rule = f'[[earn]]\nkind = "checkin"\npoints = 1\nstreak_days = 1\nstreak_bonus = {MAXIMUM_POINTS - 1}\n'
    [outcome] = decide(parse(programme() + rule), [{"kind": "checkin", "member": "m1", "ts": START_MS}])
    assert outcome["points"] == MAXIMUM_POINTS
    assert "beyond the exact arithmetic" in finding(programme() + rule.replace("points = 1\n", "points = 2\n"))


def test_a_campaign_too_many_for_the_points() -> None:
    rule = f'[[earn]]\nkind = "checkin"\npoints = {2**62 - 1}\n'
    parse(programme() + rule + campaigns(["2"], 'kinds = ["checkin"]'))
    assert finding(programme() + order() + rule + campaigns(["2", "1.5"], 'kinds = ["checkin"]')) == (
        "shop.toml:10: earn[2].kind: checkin: with campaigns c0, c1 an event could be worth about 10^19 points, "
        "beyond 2^63 - 1"
    )


def test_many_campaigns_with_four_decimals() -> None:
    nine = campaigns(["1.0001"] * 9)
    parse(programme() + order() + nine)
    refused = finding(programme() + order() + campaigns(["1.0001"] * 10))
    assert refused.startswith("shop.toml:7: earn[1].kind: order_paid: the product of campaigns c0, c1, ")
    assert refused.endswith("c9 needs more than the 127 bits of the exact arithmetic")


@pytest.mark.parametrize(
    "condition", ['cities = ["city-{}"]', 'tiers = ["tier-{}"]', 'cities = ["city-{0}", "other-{0}"]']
)
def test_what_excludes_each_other_is_not_multiplied(condition: str) -> None:
    many = ["1.0001"] * 40
    parse(programme() + order() + campaigns(many, condition))
    finding(programme() + order() + campaigns(many, condition.replace("{", "same").replace("}", "")))
    finding(programme() + order() + campaigns(many, "percent = 1"))


def test_a_city_and_a_tier_do_not_exclude_each_other() -> None:
    mixed = campaigns(["1.0001"] * 5, 'cities = ["hangzhou"]') + campaigns(["1.0001"] * 5, 'tiers = ["gold"]').replace(
        'id = "c', 'id = "d'
    )
    assert "c4, d0" in finding(programme() + order() + mixed)


def test_campaigns_of_another_kind_are_not_multiplied() -> None:
    parse(programme() + order() + campaigns(["1.0001"] * 40, 'kinds = ["review"]'))


@pytest.mark.parametrize("stacking", ["add", "max"])
def test_sums_and_maxima_do_not_grow(stacking: str) -> None:
    rulebook = parse(programme(stacking) + order() + campaigns(["1.0001"] * 256))
    [outcome] = decide(rulebook, [paid(0, LARGEST_FEN)])
    assert outcome["points"] == (10_256_000_000 if stacking == "add" else 10_001_000_000)


def test_what_raises_a_sum_and_what_lowers_it_do_not_add_up() -> None:
    rule = f'[[earn]]\nkind = "checkin"\npoints = {2**62}\n'
    for multipliers, allowed in [
        (["1.9", "0.1"], True),
        (["1.9", "1.1", "0.1"], False),
        (["0.0001"] * 3, True),
        (["0.0001"] * 4, False),
    ]:
        text = programme("add") + rule + campaigns(multipliers, 'kinds = ["checkin"]\ntags = ["t{}"]')
        if not allowed:
            assert finding(text).endswith("beyond 2^63 - 1")
            continue
        for chosen in ([], [0], [1], list(range(len(multipliers)))):
            tags = [f"t{number}" for number in chosen]
            [outcome] = decide(parse(text), [{"kind": "checkin", "member": "m1", "ts": START_MS, "tags": tags}])
            factor = 1 + sum(Fraction(multipliers[number]) - 1 for number in chosen)
            assert outcome["uncapped"] == math.floor(2**62 * factor)


def test_wide_products_are_exact() -> None:
    """Base and numerator above 64 bits each: the product is computed in 256."""
    multipliers = ["1.0001", "1.0003", "2.0007", "1.9999", "0.9973", "3.3331", "1.2347"]
    text = programme() + order("1.0007", 'category_rates = { fresh = "2.0003" }\n')
    rulebook = parse(text + campaigns(multipliers, 'tags = ["t{}"]'))
    random = Random(7)
    events, expected = [], []
    for number in range(300):
        chosen = sorted(random.sample(range(7), random.choice([0, 1, 5, 6, 7, 7])))
        fresh = random.choice([0, 1, 99, random.randrange(LARGEST_FEN // 2), LARGEST_FEN // 2])
        plain = random.choice([0, 1, random.randrange(LARGEST_FEN // 2), LARGEST_FEN // 2])
        lines = [["fresh", fresh], ["", plain]]
        events.append(paid(number, fresh + plain, lines=lines, tags=[f"t{index}" for index in chosen]))
        base = (fresh * Fraction("2.0003") + plain) * Fraction("1.0007") / 100
        product = math.prod((Fraction(multipliers[index]) for index in chosen), start=Fraction(1))
        expected.append((math.floor(base), math.floor(base * product)))
    assert [(outcome["base"], outcome["uncapped"]) for outcome in decide(rulebook, events)] == expected


def test_negative_multipliers_round_down() -> None:
    limits = "".join(
        f'[[limit]]\nid = "{action}-{window}"\nkey = "member"\nmeasure = "points"\nwindow = "{window}"\n'
        f'max = 5\naction = "{action}"\n'
        for action, window in (("clamp", "day"), ("hold", "10s"))
    )
    text = programme("add") + order("1.0007") + campaigns(["0.2", "0.3", "0.0001"], 'tags = ["t{}"]')
    events = [
        paid(number, amount, tags=[f"t{index}" for index in range(count)])
        for number, (amount, count) in enumerate(
            [(1, 3), (100, 3), (3333, 3), (0, 3), (LARGEST_FEN, 3), (1, 2), (5000, 0), (LARGEST_FEN, 0), (700, 1)]
        )
    ]
    outcomes = decide(parse(text + limits), events)
    multipliers = [Fraction(1), Fraction("0.2"), Fraction("-0.5"), Fraction("-1.4999")]
    for event, outcome in zip(events, outcomes, strict=True):
        base = event["amount"] * Fraction("1.0007") / 100
        assert outcome["uncapped"] == math.floor(base * multipliers[len(event["tags"])])
    assert outcomes[0]["points"] == -1


def test_totals_of_the_largest_points_saturate_alike() -> None:
    rule = f'[[earn]]\nkind = "checkin"\npoints = {MAXIMUM_POINTS}\n'
    limits = "".join(
        f'[[limit]]\nid = "{window}-{action}"\nkey = "member"\nmeasure = "points"\nwindow = "{window}"\n'
        f'max = {maximum}\naction = "{action}"\n'
        for window in ("day", "80s")
        for action, maximum in (("hold", MAXIMUM_POINTS), ("freeze", MAXIMUM_POINTS - 1))
    )
    events = [{"kind": "checkin", "member": "m1", "ts": START_MS + number * 15_000} for number in range(12)]
    outcomes = decide(parse(programme() + rule + limits), events)
    assert {outcome["points"] for outcome in outcomes} == {MAXIMUM_POINTS}
    assert {outcome["outcome"] for outcome in outcomes} == {"held"}


def test_all_campaigns_at_once_are_told_apart() -> None:
    """The largest number of campaigns fills every word of the compiled sets."""
    text = programme("max") + order() + campaigns((f"1.{number:04d}" for number in range(256)), "days_of_month = [{}]")
    days = text.replace("days_of_month = [0]", "days_of_month = [31]")
    for number in range(32, 256):
        days = days.replace(f"days_of_month = [{number}]", f"days_of_month = [{number % 31 + 1}]")
    rulebook = parse(days)
    events = [paid(0, 10_000_000) | {"ts": START_MS + day * 86_400_000} for day in range(20)]
    for outcome in decide(rulebook, events):
        day = int(outcome["day"][-2:])
        matching = [campaign.id for campaign in rulebook.campaigns if day in (campaign.days_of_month or ())]
        assert outcome["campaigns"] == matching
        assert len(matching) >= 8
