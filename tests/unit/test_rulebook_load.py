"""Every refusal of the rulebook loader names the file, the line and the key (SPEC section 2)."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from accrual.errors import RulebookError
from accrual.rulebook import Rulebook, Window, advice, load, parse
from accrual.rulebook.lines import LineIndex

PROGRAMME = '[programme]\nname = "shop"\nversion = 1\ntimezone = "Asia/Shanghai"\n'
ORDER = '[[earn]]\nkind = "order_paid"\npoints_per_yuan = "1"\n'
CHECKIN = '[[earn]]\nkind = "checkin"\npoints = 5\n'
CAMPAIGN = '[[campaign]]\nid = "c"\nmultiplier = "2"\n'
LIMIT = '[[limit]]\nid = "l"\nkey = "device"\nmeasure = "events"\nwindow = "60s"\nmax = 20\naction = "reject"\n'

DECIMAL = 'must be a decimal string with at most 4 places, such as "1.25"'
INTEGER = "must be an integer"
WINDOW = 'must be "day", or a number followed by s, m or h'
HOURS = 'must be "hh:mm-hh:mm" within 00:00 and 23:59'
DATE = "must be a date such as 2026-11-15, without quotes"
EMPTY = "is empty, so nothing would ever match"

# What stands in the file, with "# !" on the line that the finding must name; the key, and the reason.
REFUSED = {
    # Unknown keys and tables
    "unknown top-level key": ("loose = 1  # !\n" + PROGRAMME, "loose", "unknown key"),
    "unknown table": (PROGRAMME + "[earning]  # !\nrate = 2\n", "earning", "unknown key"),
    "unknown array of tables": (PROGRAMME + "[[earning]]  # !\nrate = 2\n[[earning]]\n", "earning", "unknown key"),
    "unknown table in an array of tables": (
        PROGRAMME + ORDER + CHECKIN + "[earn.rates]  # !\nfresh = 2\n" + LIMIT,
        "earn[2].rates",
        "unknown key",
    ),
    "unknown programme key": (PROGRAMME + 'zone = "UTC"  # !\n', "programme.zone", "unknown key"),
    "unknown earn key": (PROGRAMME + ORDER + CHECKIN + "limit = 3  # !\n", "earn[2].limit", "unknown key"),
    "unknown earn table": (PROGRAMME + ORDER + "rates = {}  # !\n", "earn[1].rates", "unknown key"),
    "unknown campaign key": (PROGRAMME + CAMPAIGN + 'city = "a"  # !\n', "campaign[1].city", "unknown key"),
    "unknown limit key": (PROGRAMME + LIMIT + 'kind = "a"  # !\n', "limit[1].kind", "unknown key"),
    # Shape
    "earn is one table": (PROGRAMME + "[earn]  # !\n", "earn", "must be an array of tables, [[earn]]"),
    "campaign is a number": ("campaign = 3  # !\n" + PROGRAMME, "campaign", "must be an array of tables, [[campaign]]"),
    "limit has a number": ("limit = [3]  # !\n" + PROGRAMME, "limit", "must be an array of tables, [[limit]]"),
    # Duplicates
    "duplicate kind": (
        PROGRAMME + ORDER + CHECKIN + '[[earn]]\nkind = "order_paid"  # !\npoints = 1\n',
        "earn[3].kind",
        "duplicate kind 'order_paid'",
    ),
    "duplicate campaign": (
        PROGRAMME + CAMPAIGN + '[[campaign]]\nid = "c"  # !\nmultiplier = "3"\n',
        "campaign[2].id",
        "duplicate id 'c'",
    ),
    "duplicate limit": (
        PROGRAMME + LIMIT + LIMIT.replace('id = "l"', 'id = "l"  # !'),
        "limit[2].id",
        "duplicate id 'l'",
    ),
    # The key that is missing stands on the line of its table
    "no name": (PROGRAMME.replace('name = "shop"\n', "").replace("]", "]  # !"), "programme.name", "missing"),
    "no kind": (PROGRAMME + "[[earn]]  # !\npoints = 5\n", "earn[1].kind", "missing"),
    "no multiplier": (PROGRAMME + '[[campaign]]  # !\nid = "c"\n', "campaign[1].multiplier", "missing"),
    "no window": (
        PROGRAMME + LIMIT.replace('window = "60s"\n', "").replace("]]", "]]  # !"),
        "limit[1].window",
        "missing",
    ),
    # Earning rules that contradict themselves
    "points twice": (
        PROGRAMME + ORDER + "points = 5  # !\n",
        "earn[1].points",
        "exactly one of points and points_per_yuan must be given",
    ),
    "no points": (
        PROGRAMME + '[[earn]]  # !\nkind = "vote"\n',
        "earn[1].points",
        "exactly one of points and points_per_yuan must be given",
    ),
    "another kind per yuan": (
        PROGRAMME + '[[earn]]\nkind = "vote"\npoints_per_yuan = "1"  # !\n',
        "earn[1].points_per_yuan",
        "only order_paid may be priced per yuan",
    ),
    "rates without a price": (
        PROGRAMME + CHECKIN + 'category_rates = { fresh = "2" }  # !\n',
        "earn[1].category_rates",
        "needs points_per_yuan",
    ),
    "minimum without a price": (
        PROGRAMME + CHECKIN + "min_amount_fen = 5  # !\n",
        "earn[1].min_amount_fen",
        "needs points_per_yuan",
    ),
    "streak without bonus": (
        PROGRAMME + CHECKIN + "streak_days = 7  # !\n",
        "earn[1].streak_days",
        "streak_days and streak_bonus must be given together",
    ),
    "bonus without streak": (
        PROGRAMME + CHECKIN.replace("]]", "]]  # !") + "streak_bonus = 7\n",
        "earn[1].streak_days",
        "streak_days and streak_bonus must be given together",
    ),
    "streak of a price": (
        PROGRAMME + ORDER + "streak_days = 7  # !\nstreak_bonus = 7\n",
        "earn[1].streak_days",
        "a streak needs fixed points",
    ),
    # Campaigns and limits that contradict themselves
    "until before from": (
        PROGRAMME + CAMPAIGN + "from = 2026-11-30\nuntil = 2026-11-29  # !\n",
        "campaign[1].until",
        "is before from, so the campaign would never match",
    ),
    "clamp on events": (
        PROGRAMME + LIMIT.replace('"reject"', '"clamp"  # !'),
        "limit[1].action",
        "clamp is for limits on points only",
    ),
    "clamp on members": (
        PROGRAMME + LIMIT.replace('"events"', '"members"').replace("20", "15").replace('"reject"', '"clamp"  # !'),
        "limit[1].action",
        "clamp is for limits on points only",
    ),
    "sixteen members": (
        PROGRAMME + LIMIT.replace('"events"', '"members"').replace("20", "16  # !"),
        "limit[1].max",
        "a limit on members goes up to 15",
    ),
}

PROGRAMME_VALUES = {
    "name": [
        ("3", "must be a string"),
        ('""', "must have 1 to 64 bytes"),
        (f'"{"店" * 22}"', "must have 1 to 64 bytes"),
    ],
    "version": [
        ("true", INTEGER),
        ("1.0", INTEGER),
        ('"1"', INTEGER),
        ("0", f"0 is outside 1..{2**53 - 1}"),
        ("9007199254740992", f"9007199254740992 is outside 1..{2**53 - 1}"),
    ],
    "timezone": [
        ('"Asia/Peking"', "'Asia/Peking' is not an IANA time zone"),
        ('"../UTC"', "'../UTC' is not an IANA time zone"),
        ('"Factory"', "'Factory' is not an IANA time zone"),
        ("8", "8 is not an IANA time zone"),
    ],
    "stacking": [('"sum"', "must be one of multiply, add, max"), ("[]", "must be one of multiply, add, max")],
    "point_value_fen": [("1", DECIMAL), ('"1.00001"', DECIMAL), ('"-1"', DECIMAL)],
    "settlement_days": [("-1", "-1 is outside 0..365"), ("366", "366 is outside 0..365"), ("false", INTEGER)],
    "expiry_months": [("0", "0 is outside 1..1200"), ("1201", "1201 is outside 1..1200")],
    "expiry_reminder_days": [
        ("15", "must be a list"),
        ("[15, true]", INTEGER),
        ("[367]", "367 is outside 0..366"),
    ],
}

EARN_VALUES = {
    "kind": [
        ("5", "must be a string"),
        ('""', "must have 1 to 32 bytes"),
        (f'"{"k" * 33}"', "must have 1 to 32 bytes"),
        *(
            (f'"{kind}"', f"{kind} is a built-in kind and earns nothing")
            for kind in ("order_refunded", "member_updated", "member_frozen", "member_released", "member_blocked")
        ),
    ],
    "points": [
        ("true", INTEGER),
        ("5.0", INTEGER),
        ("-1", f"-1 is outside 0..{2**63 - 1}"),
        (str(2**63), f"{2**63} is outside 0..{2**63 - 1}"),
    ],
    "max_per_day": [("0", f"0 is outside 1..{2**31 - 1}"), (str(2**31), f"{2**31} is outside 1..{2**31 - 1}")],
    "once": [("1", "must be true or false"), ('"true"', "must be true or false")],
}

ORDER_VALUES = {
    "points_per_yuan": [
        ("1", DECIMAL),
        ("1.5", DECIMAL),
        ('"1.00001"', DECIMAL),
        ('"-1"', DECIMAL),
        ('"+1"', DECIMAL),
        ('".5"', DECIMAL),
        ('"1."', DECIMAL),
        ('"1e3"', DECIMAL),
        ('" 1"', DECIMAL),
        ('"1\\n"', DECIMAL),
        ('"١"', DECIMAL),
        ('"nan"', DECIMAL),
        (f'"{"9" * 21}"', DECIMAL),
    ],
    "category_rates": [
        ("[]", "must be a table"),
        ("{ fresh = 2 }", f"fresh: {DECIMAL}"),
        ('{ fresh = "0.12345" }', f"fresh: {DECIMAL}"),
        (f'{{ {"f" * 33} = "2" }}', f"category '{'f' * 33}' has more than 32 bytes"),
    ],
    "min_amount_fen": [("-1", f"-1 is outside 0..{10**12}"), (str(10**12 + 1), f"{10**12 + 1} is outside 0..{10**12}")],
}

STREAK_VALUES = {
    "streak_days": [("0", f"0 is outside 1..{2**31 - 1}"), ("true", INTEGER)],
    "streak_bonus": [("-1", f"-1 is outside 0..{2**63 - 1}"), ("5.5", INTEGER)],
}

CAMPAIGN_VALUES = {
    "id": [("1", "must be a string"), ('""', "must have 1 to 64 bytes"), (f'"{"i" * 65}"', "must have 1 to 64 bytes")],
    "multiplier": [("2", DECIMAL), ('"0"', "must be above 0"), ('"0.0000"', "must be above 0"), ('"1.00001"', DECIMAL)],
    "kinds": [('"order_paid"', "must be a list"), ("[]", EMPTY), ("[1]", "must be a string")],
    "days_of_month": [
        ("15", "must be a list"),
        ("[]", EMPTY),
        ("[0]", "0 is outside 1..31"),
        ("[32]", "32 is outside 1..31"),
        ("[true]", INTEGER),
    ],
    "weekdays": [
        ('["Mon"]', "'Mon' is not one of mon, tue, wed, thu, fri, sat, sun"),
        ("[1]", "1 is not one of mon, tue, wed, thu, fri, sat, sun"),
        ("[]", EMPTY),
    ],
    "from": [('"2026-11-01"', DATE), ("2026-11-01T00:00:00", DATE), ("2026-11-01T00:00:00Z", DATE), ("07:00:00", DATE)],
    "until": [("20261101", DATE)],
    "hours": [
        ('"22:00-22:00"', "must start and end at different times"),
        ('"22:00-24:00"', HOURS),
        ('"22:60-23:00"', HOURS),
        ('"9:00-10:00"', HOURS),
        ('"09:00–10:00"', HOURS),
        ('"09:00-10:00\\n"', HOURS),
        ("22", HOURS),
    ],
    "cities": [("[]", EMPTY), ('[""]', "must have 1 to 32 bytes"), (f'["{"京" * 11}"]', "must have 1 to 32 bytes")],
    "tiers": [('"gold"', "must be a list"), ("[1]", "must be a string")],
    "card": [
        ("false", "can only be true; leave it out otherwise"),
        ("1", "can only be true; leave it out otherwise"),
    ],
    "tags": [("[]", EMPTY), (f'["{"t" * 33}"]', "must have 1 to 32 bytes")],
    "percent": [("-1", "-1 is outside 0..100"), ("101", "101 is outside 0..100"), ("10.0", INTEGER), ("true", INTEGER)],
}

LIMIT_VALUES = {
    "id": [('""', "must have 1 to 64 bytes")],
    "key": [('"city"', "must be one of member, device, ip, phone"), ("1", "must be one of member, device, ip, phone")],
    "measure": [('"orders"', "must be one of events, members, points")],
    "window": [
        ('"0s"', WINDOW),
        ('"25h"', "a sliding window is at most 24 hours"),
        ('"1441m"', "a sliding window is at most 24 hours"),
        ('"86401s"', "a sliding window is at most 24 hours"),
        ('"1d"', WINDOW),
        ('"1.5h"', WINDOW),
        ('"60"', WINDOW),
        ('"5m\\n"', WINDOW),
        ('"60 s"', WINDOW),
        ("60", WINDOW),
    ],
    "max": [
        ("true", INTEGER),
        ("20.0", INTEGER),
        ("-1", f"-1 is outside 0..{2**63 - 1}"),
        (str(2**63), f"{2**63} is outside 0..{2**63 - 1}"),
    ],
    "action": [('"block"', "must be one of reject, hold, freeze, clamp")],
    "kinds": [("[]", EMPTY), ('"order_paid"', "must be a list")],
}

TABLES = {
    "programme": ("", PROGRAMME, PROGRAMME_VALUES),
    "earn[1]": (PROGRAMME, CHECKIN, EARN_VALUES),
    "earn[1] of orders": (PROGRAMME, ORDER, ORDER_VALUES),
    "earn[1] with a streak": (PROGRAMME, CHECKIN + "streak_days = 7\nstreak_bonus = 50\n", STREAK_VALUES),
    "campaign[1]": (PROGRAMME, CAMPAIGN, CAMPAIGN_VALUES),
    "limit[1]": (PROGRAMME, LIMIT, LIMIT_VALUES),
}


def with_value(table: str, key: str, value: str) -> str:
    """Set ``key`` of the only table in ``table``, on a line that is marked."""
    others = [line for line in table.splitlines() if not line.startswith(f"{key} =")]
    return "\n".join([*others, f"{key} = {value}  # !"]) + "\n"


VALUES = [
    pytest.param(before + with_value(table, key, value), f"{name.split()[0]}.{key}", reason, id=f"{name}-{key}-{value}")
    for name, (before, table, keys) in TABLES.items()
    for key, values in keys.items()
    for value, reason in values
]


def findings(text: str, name: str = "shop.toml") -> list[str]:
    with pytest.raises(RulebookError) as caught:
        parse(text, name)
    assert str(caught.value) == "\n".join(caught.value.findings)
    return caught.value.findings


def marked_line(text: str) -> int:
    [number] = [number for number, line in enumerate(text.split("\n"), start=1) if "# !" in line]
    return number


@pytest.mark.parametrize(("text", "key", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(text: str, key: str, reason: str) -> None:
    assert findings(text) == [f"shop.toml:{marked_line(text)}: {key}: {reason}"]


@pytest.mark.parametrize(("text", "key", "reason"), VALUES)
def test_refused_value(text: str, key: str, reason: str) -> None:
    assert findings(text) == [f"shop.toml:{marked_line(text)}: {key}: {reason}"]


@pytest.mark.parametrize(("text", "key", "reason"), VALUES[::7])
def test_refused_with_windows_line_ends(text: str, key: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    with pytest.raises(RulebookError) as caught:
        load(path)
    assert caught.value.findings == [f"{path}:{marked_line(text)}: {key}: {reason}"]


@pytest.mark.parametrize(
    "rates",
    [
        '[earn.category_rates]\ndairy = "1"\nfresh = 2  # !\n',
        '[ "earn" . category_rates ]\n"fresh" = 2  # !\n',
        'category_rates.dairy = "1"\ncategory_rates.fresh = 2  # !\n',
        "category_rates = { fresh = 2 }  # !\n",
    ],
)
def test_a_value_in_a_table_of_its_own(rates: str) -> None:
    text = PROGRAMME + CHECKIN + ORDER + rates + CHECKIN.replace("checkin", "vote")
    [finding] = findings(text)
    assert finding == f"shop.toml:{marked_line(text)}: earn[2].category_rates: fresh: {DECIMAL}"


def test_an_array_in_an_array_is_found_in_its_own_table() -> None:
    index = LineIndex("[[a]]\n[[a.b]]\nx = 1\n[[a.b]]\nx = 2\n[[a]]\n[[a.b]]\n[a.b.c]\nx = 3\n")
    assert [index.line_of(("a", 0, "b", number, "x")) for number in (0, 1)] == [3, 5]
    assert index.line_of(("a", 1, "b", 0, "c", "x")) == 9
    assert index.line_of(("a", 1, "b", 0, "d")) == 7
    assert index.line_of(("c",)) is None


def test_kinds_that_nothing_earns_are_told_but_not_refused() -> None:
    named = LIMIT + 'kinds = ["checkin", "order_paid", "order_refunded"]\n'
    rulebook = parse(PROGRAMME + ORDER + CAMPAIGN + named)
    line = rulebook.text.count("\n")
    assert advice(rulebook, "shop.toml") == [
        f"shop.toml:{line}: limit[1].kinds: no earning rule is for {kind!r}, so 'l' never applies to it"
        for kind in ("checkin", "order_refunded")
    ]
    # What a campaign is for where it does not say.
    rulebook = parse(PROGRAMME + CHECKIN + CAMPAIGN + LIMIT)
    assert advice(rulebook, "shop.toml") == [
        "shop.toml:8: campaign[1].kinds: no earning rule is for 'order_paid', so 'c' never applies to it"
    ]


def test_campaigns_that_make_points_negative_are_told_but_not_refused() -> None:
    added = PROGRAMME.replace("version = 1", 'version = 1\nstacking = "add"') + ORDER
    lowering = [CAMPAIGN.replace('"c"', f'"c{number}"').replace('"2"', '"0.4"') for number in (1, 2)]
    rulebook = parse(added + CAMPAIGN + "".join(lowering))
    line = max(number for number, text in enumerate(rulebook.text.splitlines(), 1) if text.startswith("multiplier"))
    reason = "campaigns c1, c2 added up make the points of 'order_paid' negative: members lose some"
    assert advice(rulebook, "shop.toml") == [f"shop.toml:{line}: campaign[3].multiplier: {reason}"]
    apart = [text + f'cities = ["{number}"]\n' for number, text in enumerate(lowering)]
    assert not advice(parse(added + "".join(apart)))
    assert not advice(parse(PROGRAMME + ORDER + "".join(lowering)))


def test_several_findings_at_once() -> None:
    text = PROGRAMME.replace("version = 1", "version = 0") + (
        '[[earn]]\nkind = "vote"\npoints = true\nmax = 3\n'
        + CAMPAIGN.replace('"2"', '"0"')
        + LIMIT.replace("60s", "0s")
        + LIMIT.replace("reject", "clamp")
    )
    assert findings(text) == [
        f"shop.toml:7: earn[1].points: {INTEGER}",
        "shop.toml:8: earn[1].max: unknown key",
        "shop.toml:11: campaign[1].multiplier: must be above 0",
        f"shop.toml:16: limit[1].window: {WINDOW}",
        "shop.toml:25: limit[2].action: clamp is for limits on points only",
        f"shop.toml:3: programme.version: 0 is outside 1..{2**53 - 1}",
    ]


def test_an_empty_file() -> None:
    assert findings("") == [
        "shop.toml: programme: missing",
        "shop.toml: programme.name: missing",
        "shop.toml: programme.version: missing",
        "shop.toml: programme.timezone: missing",
    ]


@pytest.mark.parametrize(
    ("what", "table", "limit"),
    [
        ("earn", '[[earn]]\nkind = "k{}"\npoints = 1\n', 256),
        ("campaign", '[[campaign]]\nid = "c{}"\nmultiplier = "1"\n', 256),
        ("limit", LIMIT.replace('"l"', '"l{}"'), 63),
    ],
)
def test_too_many_tables(what: str, table: str, limit: int) -> None:
    tables = [table.format(number) for number in range(limit + 1)]
    parse(PROGRAMME + "".join(tables[:-1]))
    [finding] = findings(PROGRAMME + "".join(tables))
    line = 5 + limit * table.count("\n")
    assert finding == f"shop.toml:{line}: {what}[{limit + 1}]: more than {limit} [[{what}]] tables"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[programme", ":1"),
        ("version = 1\nversion = 2\n", ":2"),
        ("version = 1\r\n\r\nversion = = 2\r\n", ":3"),
        ("from = 2026-02-30\n", ":1"),
        ('a = 1\nb = """\n\n', ":2"),
        ("a = " + "[" * 3000, ""),
        ("\ufeff" + PROGRAMME, ":1"),
        ("a = 1\r", ":1"),
    ],
)
def test_not_toml(text: str, place: str) -> None:
    [finding] = findings(text)
    assert finding.startswith(f"shop.toml{place}: is not valid TOML: ")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(PROGRAMME.encode() + b"# caf\xe9\n")
    with pytest.raises(RulebookError) as caught:
        load(path)
    assert caught.value.findings == [
        f"{path}: is not UTF-8 text: invalid continuation byte at byte {len(PROGRAMME) + 5}"
    ]


def test_a_missing_file_is_an_ordinary_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.toml")


def test_windows_line_ends_change_nothing_but_the_text(tmp_path: Path) -> None:
    text = PROGRAMME + ORDER + CHECKIN + CAMPAIGN + LIMIT
    path = tmp_path / "windows.toml"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    windows, plain = load(path), parse(text)
    assert windows.text.encode() == path.read_bytes()
    assert windows.digest != plain.digest
    assert (windows.earning_rules, windows.campaigns, windows.limits) == (
        plain.earning_rules,
        plain.campaigns,
        plain.limits,
    )


def test_defaults() -> None:
    rulebook = parse(PROGRAMME + ORDER + CHECKIN + CAMPAIGN + LIMIT)
    assert rulebook.stacking == "multiply"
    assert (rulebook.point_value_fen, rulebook.settlement_days, rulebook.expiry_months) == (Fraction(1), 1, 12)
    assert rulebook.expiry_reminder_days == (15, 3)
    order, checkin = rulebook.earning_rules
    assert (order.category_rates, order.min_amount_fen, order.once, order.max_per_day) == ({}, 0, False, None)
    assert (checkin.points_per_yuan, checkin.streak_days, checkin.streak_bonus) == (None, None, 0)
    [campaign] = rulebook.campaigns
    assert campaign.kinds == ("order_paid",)
    assert (campaign.card, campaign.percent, campaign.hours, campaign.cities) == (False, None, None, None)
    assert rulebook.limits[0].kinds is None


def accepted(table: str, key: str, value: str) -> Rulebook:
    return parse(PROGRAMME + with_value(table, key, value))


@pytest.mark.parametrize(
    ("window", "duration_ms"),
    [("1s", 1000), ("86400s", 86_400_000), ("1440m", 86_400_000), ("24h", 86_400_000), ("day", None)],
)
def test_extreme_windows(window: str, duration_ms: int | None) -> None:
    assert accepted(LIMIT, "window", f'"{window}"').limits[0].window == Window(duration_ms)


def test_extremes_are_accepted() -> None:
    assert accepted(CHECKIN, "points", str(2**63 - 1)).earning_rules[0].points == 2**63 - 1
    assert accepted(CHECKIN, "points", "0").earning_rules[0].points == 0
    assert accepted(ORDER, "points_per_yuan", '"0"').earning_rules[0].points_per_yuan == 0
    assert accepted(ORDER, "category_rates", '{ "" = "0.0001" }').earning_rules[0].line_rate("") == Fraction(1, 10**6)
    assert accepted(CAMPAIGN, "multiplier", '"0.0001"').campaigns[0].multiplier == Fraction(1, 10_000)
    assert accepted(CAMPAIGN, "hours", '"00:00-23:59"').campaigns[0].hours == (0, 1439)
    assert accepted(CAMPAIGN, "percent", "0").campaigns[0].percent == 0
    assert accepted(LIMIT, "max", str(2**63 - 1)).limits[0].max == 2**63 - 1
    assert accepted(LIMIT.replace('"events"', '"members"'), "max", "15").limits[0].max == 15
    assert parse(with_value(PROGRAMME, "expiry_reminder_days", "[]")).expiry_reminder_days == ()
    assert parse(with_value(PROGRAMME, "version", str(2**53 - 1))).version == 2**53 - 1
    assert parse(with_value(PROGRAMME, "name", f'"{"店" * 21}a"')).name == "店" * 21 + "a"


def test_a_day_is_a_campaign() -> None:
    [campaign] = parse(PROGRAMME + CAMPAIGN + "from = 2026-11-15\nuntil = 2026-11-15\n").campaigns
    assert campaign.from_day == campaign.until_day
    assert campaign.from_day is not None
    assert [campaign.on_day(campaign.from_day + step) for step in (-1, 0, 1)] == [False, True, False]


@pytest.mark.parametrize("number", ["1" + "0" * 5000, "0x" + "F" * 5000])
def test_endless_numbers_are_findings(number: str) -> None:
    with pytest.raises(RulebookError):
        parse(f'[programme]\nname = "a"\nversion = {number}\ntimezone = "UTC"\n')
