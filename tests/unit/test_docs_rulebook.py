"""The rulebook guide is true: its worked day is replayed, and its examples are checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from accrual.cli.replay import outcome_lines
from accrual.engine import OFFLINE_SLACK_DAYS, open_engine
from accrual.rulebook import load, parse

DOCUMENTS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCUMENTS / "RULEBOOK.md").read_text(encoding="utf-8")
EXAMPLES = sorted((DOCUMENTS / "examples").glob("*.toml"))
MINIMAL = '[programme]\nname = "guide"\nversion = 1\ntimezone = "Asia/Shanghai"\n'

KEYS = {
    "[programme]": [
        "name",
        "version",
        "timezone",
        "stacking",
        "point_value_fen",
        "settlement_days",
        "expiry_months",
        "expiry_reminder_days",
    ],
    "[[earn]]": [
        "kind",
        "points_per_yuan",
        "points",
        "category_rates",
        "min_amount_fen",
        "max_per_day",
        "streak_days",
        "streak_bonus",
        "once",
    ],
    "[[campaign]]": [
        "id",
        "multiplier",
        "kinds",
        "days_of_month",
        "weekdays",
        "from",
        "until",
        "hours",
        "cities",
        "tiers",
        "card",
        "tags",
        "percent",
    ],
    "[[limit]]": ["id", "key", "measure", "window", "max", "action", "kinds"],
}


def section(title: str) -> str:
    """Return the text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_the_worked_day_is_true(engine: str) -> None:
    day = section("A worked member day")
    [rulebook] = blocks(day, "toml")
    pairs = [block.encode().splitlines() for block in blocks(day, "json")]
    assert all(len(pair) == 2 for pair in pairs)
    opened = open_engine(engine, parse(rulebook), slack_days=OFFLINE_SLACK_DAYS)
    assert list(outcome_lines(opened, [event for event, _ in pairs])) == [outcome for _, outcome in pairs]


def test_the_worked_day_shows_every_outcome_and_action() -> None:
    day = section("A worked member day")
    outcomes = set(re.findall(r'"outcome":"(\w+)"', day))
    assert outcomes == {"granted", "held", "rejected", "deferred", "applied", "duplicate"}
    assert set(re.findall(r'^action = "(\w+)"', day, re.MULTILINE)) == {"reject", "hold", "freeze", "clamp"}
    assert len(blocks(day, "json")) >= 12


@pytest.mark.parametrize("fragment", blocks(GUIDE, "toml"))
def test_fragments_are_valid(fragment: str) -> None:
    parse(fragment if "[programme]" in fragment else MINIMAL + fragment)


@pytest.mark.parametrize(("table", "keys"), KEYS.items(), ids=KEYS)
def test_every_key_is_explained(table: str, keys: list[str]) -> None:
    found = re.search(rf"^### `{re.escape(table)}`.*?\n(.*?)(?=^##|\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found is not None
    rows = re.findall(r"^\| (`.*?) \|", found[1], re.MULTILINE)
    explained = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert explained == [key for key in keys if key in explained]
    assert set(explained) == set(keys)


def test_there_are_four_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["community", "errands", "grocery", "second-world"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_heed_the_guide(path: Path) -> None:
    rulebook = load(path)
    assert f"examples/{path.name}" in GUIDE
    assert all(limit.action == "clamp" for limit in rulebook.limits if limit.key == "ip")
    assert {name for limit in rulebook.limits for name in limit.kinds or ()} <= {
        rule.kind for rule in rulebook.earning_rules
    }
    frozen = [limit.max for limit in rulebook.limits if limit.action == "freeze" and limit.measure == "points"]
    clamped = [limit.max for limit in rulebook.limits if limit.action == "clamp"]
    assert all(cap > threshold for cap in clamped for threshold in frozen)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_both_engines_decide_the_examples_alike(path: Path) -> None:
    rulebook = load(path)
    kinds = [rule.kind for rule in rulebook.earning_rules]
    lines = [
        b'{"id":"%d","kind":"%s","member":"m%d","ts":%d,"amount":%d,"device":"d%d","phone":"p","ip":"i","tags":["%s"],"city":"lishui"}'
        % (
            number,
            kinds[number % len(kinds)].encode(),
            number % 7,
            1794672000000 + number * 997_000,
            number * 1237,
            number % 3,
            b"bad_weather" if number % 2 else b"neighbourhood_member_day",
        )
        for number in range(400)
    ]
    fast, reference = (
        list(outcome_lines(open_engine(name, rulebook, slack_days=OFFLINE_SLACK_DAYS), lines))
        for name in ("fast", "reference")
    )
    assert fast == reference
    assert any(b'"granted"' in line for line in fast)
    assert any(b'"held"' in line for line in fast)
