"""From TOML to a checked ``Rulebook``. Every fault is reported, with file, line and key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from datetime import date, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from accrual.errors import RulebookError
from accrual.events import BUILT_IN_KINDS, LIMIT_KEYS, ORDER_KIND
from accrual.events.model import IDENTITY_BYTES, NAME_BYTES
from accrual.rulebook.bounds import MAXIMUM_POINTS, overflow_findings
from accrual.rulebook.calendar import day_number, is_zone
from accrual.rulebook.lines import KeyPath, LineIndex, path_text
from accrual.rulebook.model import Campaign, EarningRule, Limit, Rulebook, Window

__all__ = ["load", "parse"]

STACKINGS: Final = ("multiply", "add", "max")
MEASURES: Final = ("events", "members", "points")
ACTIONS: Final = ("reject", "hold", "freeze", "clamp")
WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAXIMUM_WINDOW_SECONDS: Final = 24 * 3600
MAXIMUM_DISTINCT_MEMBERS: Final = 15
MAXIMUM_CAMPAIGNS: Final = 256
MAXIMUM_LIMITS: Final = 63
MAXIMUM_EARNING_RULES: Final = 256
MAXIMUM_COUNT: Final = 2**31 - 1

_HOURS: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")

T = TypeVar("T")


def load(path: str | Path) -> Rulebook:
    """Read and check the rulebook at ``path``. Raises ``RulebookError`` with every finding, ``OSError`` as it comes."""
    data = Path(path).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RulebookError([f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}"]) from None
    return parse(text, str(path))


def parse(text: str, name: str = "rulebook") -> Rulebook:
    """Check the rulebook ``text``; ``name`` stands for the file in findings. Raises ``RulebookError``."""
    try:
        document = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:
        raise RulebookError([f"{name}{_line_in(str(error), text)}: is not valid TOML: {error}"]) from None
    findings = Findings(name, LineIndex(text))
    rulebook = _rulebook(Table(document, (), findings), text)
    if rulebook is not None and not findings.lines:
        for kind, reason in overflow_findings(rulebook):
            index = [rule.kind for rule in rulebook.earning_rules].index(kind)
            findings.add(("earn", index, "kind"), f"{kind}: {reason}")
    if rulebook is None or findings.lines:
        raise RulebookError(findings.lines)
    return rulebook


def _line_in(error: str, text: str) -> str:
    """Return the line that an error of ``tomllib`` names, as findings give it; empty where it names none."""
    if found := re.search(r"\(at line (\d+), column \d+\)$", error):
        return f":{found[1]}"
    return f":{text.rstrip().count(chr(10)) + 1}" if error.endswith("(at end of document)") else ""


class Findings:
    """Collects what is wrong with a rulebook, one line per fault."""

    def __init__(self, name: str, index: LineIndex) -> None:
        self.name = name
        self.index = index
        self.lines: list[str] = []

    def add(self, path: KeyPath, reason: str, within: KeyPath = ()) -> None:
        """Report ``path``, on the line of what is at fault ``within`` its value."""
        line = self.index.line_of((*path, *within))
        where = self.name if line is None else f"{self.name}:{line}"
        self.lines.append(f"{where}: {path_text(path)}: {reason}")


class Refused(Exception):
    """A value is refused, or something ``within`` it: carried from a converter to the table that reports it."""

    def __init__(self, reason: str, within: KeyPath) -> None:
        super().__init__(reason)
        self.within = within


def refuse(reason: str, within: KeyPath = ()) -> NoReturn:
    raise Refused(reason, within)


class Table:
    """One TOML table while it is read: hands out each key once, and reports what nobody asked for."""

    def __init__(self, values: dict[str, Any], path: KeyPath, findings: Findings) -> None:
        self.values = dict(values)
        self.path = path
        self.findings = findings
        self.failed = False

    def fault(self, key: str, reason: str, within: KeyPath = ()) -> None:
        self.findings.add((*self.path, key), reason, within)
        self.failed = True

    def has(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, convert: Callable[[Any], Any], default: Any = None, *, required: bool = False) -> Any:
        """Return ``key`` converted, or ``default``; a refusal is reported and yields ``default`` too."""
        if key not in self.values:
            if required:
                self.fault(key, "missing")
            return default
        try:
            return convert(self.values.pop(key))
        except Refused as refusal:
            self.fault(key, str(refusal), refusal.within)
            return default

    def tables(self, key: str) -> list[Table]:
        """Return the tables of an array of tables."""
        values = self.values.pop(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.fault(key, f"must be an array of tables, [[{key}]]")
            return []
        return [Table(value, (*self.path, key, index), self.findings) for index, value in enumerate(values)]

    def close(self) -> None:
        """Report every key that nobody asked for."""
        for key in self.values:
            self.fault(key, "unknown key")


def _rulebook(root: Table, text: str) -> Rulebook | None:
    programme = Table(root.take("programme", _mapping, {}, required=True), ("programme",), root.findings)
    earning_rules = [_earning_rule(table) for table in root.tables("earn")]
    campaigns = [_campaign(table) for table in root.tables("campaign")]
    limits = [_limit(table) for table in root.tables("limit")]
    _refuse_repeated(
        root, "earn", "kind", [rule.kind if rule else None for rule in earning_rules], MAXIMUM_EARNING_RULES
    )
    _refuse_repeated(
        root, "campaign", "id", [campaign.id if campaign else None for campaign in campaigns], MAXIMUM_CAMPAIGNS
    )
    _refuse_repeated(root, "limit", "id", [limit.id if limit else None for limit in limits], MAXIMUM_LIMITS)
    values = {
        "name": programme.take("name", _name(IDENTITY_BYTES), required=True),
        "version": programme.take("version", _integer(1, 2**53 - 1), required=True),
        "timezone": programme.take("timezone", _timezone, required=True),
        "stacking": programme.take("stacking", _choice(STACKINGS), "multiply"),
        "point_value_fen": programme.take("point_value_fen", _decimal(Fraction(0)), Fraction(1)),
        "settlement_days": programme.take("settlement_days", _integer(0, 365), 1),
        "expiry_months": programme.take("expiry_months", _integer(1, 1200), 12),
        "expiry_reminder_days": programme.take("expiry_reminder_days", _list_of(_integer(0, 366), empty=True), (15, 3)),
    }
    programme.close()
    root.close()
    if root.findings.lines:
        return None
    return Rulebook(
        text=text,
        earning_rules=tuple(rule for rule in earning_rules if rule),
        campaigns=tuple(campaign for campaign in campaigns if campaign),
        limits=tuple(limit for limit in limits if limit),
        **values,
    )


def _refuse_repeated(root: Table, array: str, key: str, names: list[str | None], limit: int) -> None:
    for index, name in enumerate(names):
        if name is not None and name in names[:index]:
            root.findings.add((array, index, key), f"duplicate {key} {name!r}")
    if len(names) > limit:
        root.findings.add((array, limit), f"more than {limit} [[{array}]] tables")


def _earning_rule(table: Table) -> EarningRule | None:
    kind = table.take("kind", _earning_kind, required=True)
    per_yuan = table.has("points_per_yuan")
    if per_yuan == table.has("points"):
        table.fault("points", "exactly one of points and points_per_yuan must be given")
    if per_yuan and kind not in (None, ORDER_KIND):
        table.fault("points_per_yuan", f"only {ORDER_KIND} may be priced per yuan")
    if not per_yuan:
        for key in ("category_rates", "min_amount_fen"):
            if table.has(key):
                table.fault(key, "needs points_per_yuan")
    if table.has("streak_days") != table.has("streak_bonus"):
        table.fault("streak_days", "streak_days and streak_bonus must be given together")
    elif table.has("streak_days") and per_yuan:
        table.fault("streak_days", "a streak needs fixed points")
    values = {
        "points_per_yuan": table.take("points_per_yuan", _decimal(Fraction(0))),
        "category_rates": table.take("category_rates", _category_rates, {}),
        "min_amount_fen": table.take("min_amount_fen", _integer(0, 10**12), 0),
        "points": table.take("points", _integer(0, MAXIMUM_POINTS), 0),
        "max_per_day": table.take("max_per_day", _integer(1, MAXIMUM_COUNT)),
        "streak_days": table.take("streak_days", _integer(1, MAXIMUM_COUNT)),
        "streak_bonus": table.take("streak_bonus", _integer(0, MAXIMUM_POINTS), 0),
        "once": table.take("once", _boolean, False),
    }
    table.close()
    return None if table.failed else EarningRule(kind=kind, **values)


def _campaign(table: Table) -> Campaign | None:
    values = {
        "id": table.take("id", _name(IDENTITY_BYTES), required=True),
        "multiplier": table.take("multiplier", _multiplier, required=True),
        "kinds": table.take("kinds", _list_of(_name(NAME_BYTES)), (ORDER_KIND,)),
        "days_of_month": table.take("days_of_month", _set_of(_integer(1, 31))),
        "weekdays": table.take("weekdays", _set_of(_weekday)),
        "from_day": table.take("from", _date),
        "until_day": table.take("until", _date),
        "hours": table.take("hours", _hours),
        "cities": table.take("cities", _set_of(_name(NAME_BYTES))),
        "tiers": table.take("tiers", _set_of(_name(NAME_BYTES))),
        "card": table.take("card", _card, False),
        "tags": table.take("tags", _set_of(_name(NAME_BYTES))),
        "percent": table.take("percent", _integer(0, 100)),
    }
    if None not in (values["from_day"], values["until_day"]) and values["from_day"] > values["until_day"]:
        table.fault("until", "is before from, so the campaign would never match")
    table.close()
    return None if table.failed else Campaign(**values)


def _limit(table: Table) -> Limit | None:
    values = {
        "id": table.take("id", _name(IDENTITY_BYTES), required=True),
        "key": table.take("key", _choice(LIMIT_KEYS), required=True),
        "measure": table.take("measure", _choice(MEASURES), required=True),
        "window": table.take("window", _window, required=True),
        "max": table.take("max", _integer(0, MAXIMUM_POINTS), required=True),
        "action": table.take("action", _choice(ACTIONS), required=True),
        "kinds": table.take("kinds", _list_of(_name(NAME_BYTES))),
    }
    if values["action"] == "clamp" and values["measure"] not in (None, "points"):
        table.fault("action", "clamp is for limits on points only")
    if values["measure"] == "members" and values["max"] is not None and values["max"] > MAXIMUM_DISTINCT_MEMBERS:
        table.fault("max", f"a limit on members goes up to {MAXIMUM_DISTINCT_MEMBERS}")
    table.close()
    return None if table.failed else Limit(**values)


# Converters: each takes a TOML value and returns what the model holds, or refuses it with a reason.


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else refuse("must be a table")


def _boolean(value: Any) -> bool:
    return value if isinstance(value, bool) else refuse("must be true or false")


def _card(value: Any) -> bool:
    return True if value is True else refuse("can only be true; leave it out otherwise")


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if type(value) is not int:
            refuse("must be an integer")
        if not low <= value <= high:
            shown = value if abs(value) < 10**30 else "a number of more than 30 digits"
            refuse(f"{shown} is outside {low}..{high}")
        return value

    return convert


def _name(limit_bytes: int) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if not isinstance(value, str):
            refuse("must be a string")
        if not 1 <= len(value.encode()) <= limit_bytes:
            refuse(f"must have 1 to {limit_bytes} bytes")
        return value

    return convert


def _choice(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        return str(value) if value in choices else refuse(f"must be one of {', '.join(choices)}")

    return convert


def _list_of(item: Callable[[Any], T], *, empty: bool = False) -> Callable[[Any], tuple[T, ...]]:
    def convert(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            refuse("must be a list")
        if not value and not empty:
            refuse("is empty, so nothing would ever match")
        return tuple(item(element) for element in value)

    return convert


def _set_of(item: Callable[[Any], T]) -> Callable[[Any], frozenset[T]]:
    convert_list = _list_of(item)
    return lambda value: frozenset(convert_list(value))


def _decimal(low: Fraction) -> Callable[[Any], Fraction]:
    def convert(value: Any) -> Fraction:
        if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,4})?", value):
            refuse('must be a decimal string with at most 4 places, such as "1.25"')
        number = Fraction(value)
        return number if number >= low else refuse(f"must be at least {low}")

    return convert


def _multiplier(value: Any) -> Fraction:
    number = _decimal(Fraction(0))(value)
    return number if number > 0 else refuse("must be above 0")


def _category_rates(value: Any) -> dict[str, Fraction]:
    rates = {}
    for category, rate in _mapping(value).items():
        if len(category.encode()) > NAME_BYTES:
            refuse(f"category {category!r} has more than {NAME_BYTES} bytes", (category,))
        try:
            rates[category] = _decimal(Fraction(0))(rate)
        except Refused as refusal:
            refuse(f"{category}: {refusal}", (category,))
    return rates


def _earning_kind(value: Any) -> str:
    kind = _name(NAME_BYTES)(value)
    return refuse(f"{kind} is a built-in kind and earns nothing") if kind in BUILT_IN_KINDS else kind


def _timezone(value: Any) -> str:
    return value if isinstance(value, str) and is_zone(value) else refuse(f"{value!r} is not an IANA time zone")


def _weekday(value: Any) -> int:
    return WEEKDAYS.index(value) if value in WEEKDAYS else refuse(f"{value!r} is not one of {', '.join(WEEKDAYS)}")


def _date(value: Any) -> int:
    if not isinstance(value, date) or isinstance(value, datetime):
        refuse("must be a date such as 2026-11-15, without quotes")
    return day_number(value)


def _hours(value: Any) -> tuple[int, int]:
    match = _HOURS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        refuse('must be "hh:mm-hh:mm" within 00:00 and 23:59')
    start, end = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
    return (start, end) if start != end else refuse("must start and end at different times")


def _window(value: Any) -> Window:
    if value == "day":
        return Window(None)
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smh])", value) if isinstance(value, str) else None
    if match is None:
        refuse('must be "day", or a number followed by s, m or h')
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    if seconds > MAXIMUM_WINDOW_SECONDS:
        refuse("a sliding window is at most 24 hours")
    return Window(seconds * 1000)
