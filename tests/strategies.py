"""Random rulebooks and random streams, as nasty as the specification allows."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import assume, note
from hypothesis import strategies as st

from accrual.engine import StreamEntry
from accrual.errors import InvalidEvent, RulebookError
from accrual.events.text import compact_from_mapping
from accrual.rulebook import Rulebook, parse

KINDS = ["order_paid", "checkin", "review", "group_opened", "vote"]
CATEGORIES = ["", "fresh", "dairy", "tobacco", "水果"]
CITIES = ["hangzhou", "北京", "chengdu"]
TIERS = ["silver", "gold", "diamond"]
WEEKDAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
TAGS = ["bad_weather", "storm"]
ZONES = ["Asia/Shanghai", "America/New_York", "UTC", "Pacific/Apia", "Australia/Lord_Howe", "America/St_Johns"]
MEMBERS = ["m1", "m2", "m3", "会员", "a-member-with-quite-a-long-name-0123456789-0123456789-0123456789"]

# New York's clocks go back on 1 November 2026 at 06:00 UTC; Apia and Lord Howe have odd rules of their own.
AROUND_MS = [1793491200000, 1794672000000, 1794283200000, 1796054400000]

# Where arrivals that may go anywhere go: days and months apart, and to the ends of time.
PLACES_MS = [AROUND_MS[1] + days * 86_400_000 for days in (0, 1, 2, 31, 32, 33, 34, 35, 70, 400)] + [1, 2**53 - 1]

decimals = st.one_of(
    st.sampled_from(["1", "2", "1.5", "1.3333", "0.5", "1.07", "1.1"]),
    st.builds(lambda whole, part: f"{whole}.{part:04d}", st.integers(0, 99), st.integers(0, 9999)),
)
multipliers = decimals.filter(lambda text: float(text) > 0)


def toml(value: Any) -> str:
    """Write a value as TOML; JSON's strings, numbers, booleans and lists of them are TOML too."""
    return msgspec.json.encode(value).decode()


@st.composite
def earning_rules(draw: st.DrawFn) -> str:
    tables = []
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5, unique=True))
    for kind in kinds:
        rows: dict[str, Any] = {"kind": kind}
        if kind == "order_paid" and draw(st.booleans()):
            rows["points_per_yuan"] = draw(decimals)
            rows["min_amount_fen"] = draw(st.sampled_from([0, 100, 5000]))
        else:
            rows["points"] = draw(st.sampled_from([0, 1, 5, 100, 2**40]))
            if draw(st.booleans()):
                rows["streak_days"] = draw(st.integers(1, 3))
                rows["streak_bonus"] = draw(st.sampled_from([0, 50]))
        if draw(st.booleans()):
            rows["max_per_day"] = draw(st.integers(1, 3))
        if draw(st.integers(0, 3)) == 0:
            rows["once"] = True
        lines = [f"{key} = {toml(value)}" for key, value in rows.items()]
        if "points_per_yuan" in rows:
            rates = draw(st.dictionaries(st.sampled_from(CATEGORIES), decimals, max_size=3))
            lines.append("category_rates = {" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in rates.items()) + "}")
        tables.append("[[earn]]\n" + "\n".join(lines))
    return "\n".join(tables)


@st.composite
def campaigns(draw: st.DrawFn, number: int) -> str:
    lines = [f'id = "campaign-{number}"', f"multiplier = {toml(draw(multipliers))}"]
    options = {
        "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
        "days_of_month": st.lists(st.integers(1, 31), min_size=1, max_size=20, unique=True),
        "weekdays": st.lists(st.sampled_from(WEEKDAYS), min_size=3, unique=True),
        "hours": st.sampled_from(["22:00-06:00", "00:00-12:00", "11:00-23:59", "01:30-01:29"]),
        "cities": st.lists(st.sampled_from(CITIES), min_size=1, max_size=2, unique=True),
        "tiers": st.lists(st.sampled_from(TIERS), min_size=1, max_size=2, unique=True),
        "card": st.just(True),
        "tags": st.lists(st.sampled_from(TAGS), min_size=1, max_size=2, unique=True),
        "percent": st.integers(0, 100),
    }
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True))
    lines.extend(f"{name} = {toml(draw(options[name]))}" for name in names)
    if draw(st.integers(0, 4)) == 0:
        lines.append(draw(st.sampled_from(["from = 2026-11-01", "until = 2026-11-14", "from = 2026-11-15"])))
    return "[[campaign]]\n" + "\n".join(lines)


@st.composite
def limits(draw: st.DrawFn, number: int) -> str:
    measure = draw(st.sampled_from(["events", "members", "points"]))
    actions = ["reject", "hold", "freeze"] + (["clamp"] if measure == "points" else [])
    maximum = st.sampled_from([0, 1, 5, 100, 3000, 2**50]) if measure == "points" else st.integers(0, 5)
    lines = [
        f'id = "limit-{number}"',
        f"key = {toml(draw(st.sampled_from(['member', 'device', 'ip', 'phone'])))}",
        f'measure = "{measure}"',
        f"window = {toml(draw(st.sampled_from(['1s', '80s', '5m', '1h', '24h', 'day'])))}",
        f"max = {draw(maximum)}",
        f"action = {toml(draw(st.sampled_from(actions)))}",
    ]
    if draw(st.integers(0, 3)) == 0:
        lines.append(f"kinds = {toml(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True)))}")
    return "[[limit]]\n" + "\n".join(lines)


@st.composite
def rulebook_texts(draw: st.DrawFn, version: int = 1, zone: str | None = None) -> str:
    """Draw the text of a valid rulebook (one in a few is refused for its products; the caller skips it)."""
    parts = [
        f'[programme]\nname = "random"\nversion = {version}',
        f"timezone = {toml(zone or draw(st.sampled_from(ZONES)))}",
        f"stacking = {toml(draw(st.sampled_from(['multiply', 'add', 'max'])))}",
        draw(earning_rules()),
        *(draw(campaigns(number)) for number in range(draw(st.integers(0, 5)))),
        *(draw(limits(number)) for number in range(draw(st.integers(0, 8)))),
    ]
    return "\n".join(parts)


def rulebook_or_skip(text: str) -> Rulebook:
    """Return the rulebook that ``text`` is, or give the example up where it is refused."""
    note(text)
    try:
        return parse(text)
    except RulebookError as error:
        note(str(error))
        assume(False)
        raise


amounts = st.one_of(st.integers(0, 30_000), st.sampled_from([0, 1, 99, 100, 10**12, 10**12 - 1, 123_456_789_012]))
# Malformed values: a field with one of these makes its event invalid, or is as good as absent.
odd_values: st.SearchStrategy[Any] = st.sampled_from(
    [None, "", [], {}, -1, 0, 2**53, 2**63, 2**64, 1.5, True, "x" * 65, "x" * 33, [[]], [["a", 1]], [1], {"a": 1}]
)


@st.composite
def event_mappings(draw: st.DrawFn, number: int, arrival_ms: int) -> dict[str, Any]:
    """Draw an event that arrives at ``arrival_ms``; now and then a malformed one."""
    controls = ["member_updated", "member_frozen", "member_released", "member_blocked", "order_refunded", "nonsense"]
    kind = draw(st.sampled_from(KINDS * 3 + controls))
    late_ms = draw(st.one_of(st.just(0), st.integers(0, 120_000), st.integers(-700_000, 3 * 86_400_000)))
    event: dict[str, Any] = {
        "id": f"e{draw(st.one_of(st.just(number), st.integers(0, max(0, number - 1))))}",
        "kind": kind,
        "member": draw(st.sampled_from(MEMBERS)),
        "ts": max(1, arrival_ms - late_ms),
    }
    if kind in ("order_paid", "order_refunded") or draw(st.booleans()):
        event["amount"] = draw(amounts)
    choices: dict[str, list[Any]] = {
        "order": ["o1", "o2"],
        "device": ["d1", "d2", "设备一二三四五六"],
        "ip": ["10.0.0.1", "2001:db8::1", "nonsense"],
        "phone": ["13800000001", "1"],
        "city": [*CITIES, "nowhere"],
        "tags": [[TAGS[0]], TAGS, ["other"], [""]],
    }
    for name, values in choices.items():
        if draw(st.integers(0, 2)):
            event[name] = draw(st.sampled_from(values))
    if "amount" in event and draw(st.booleans()):
        event["lines"] = draw(line_lists(event["amount"]))
    if kind.startswith("member_"):
        for name, times in {"card_until": 3_600_000, "immune_until": 600_000}.items():
            if draw(st.booleans()):
                event[name] = arrival_ms + draw(st.integers(-times, times))
        if draw(st.booleans()):
            event["tier"] = draw(st.sampled_from(TIERS))
    if draw(st.integers(0, 14)) == 0:
        event[draw(st.sampled_from([*event, "lines", "tier", "card_until"]))] = draw(odd_values)
    return event


@st.composite
def line_lists(draw: st.DrawFn, amount: int) -> list[list[Any]]:
    """Split ``amount`` over a few lines."""
    cuts = sorted(draw(st.lists(st.integers(0, amount), max_size=3)))
    parts = [end - start for start, end in zip([0, *cuts], [*cuts, amount], strict=True)]
    return [[draw(st.sampled_from(CATEGORIES)), part] for part in parts]


@st.composite
def encoded(draw: st.DrawFn, events: list[dict[str, Any]]) -> tuple[tuple[bytes, bytes], ...]:
    """Encode events as the fields of one stream entry."""
    compact = [bytes(compact_or_nil(event)) for event in events]
    form = draw(st.sampled_from("ebj" if len(events) == 1 else "bj"))
    if form == "e":
        return ((b"e", compact[0]),)
    if form == "b":
        return ((b"b", array_header(len(compact)) + b"".join(compact)),)
    return ((b"j", msgspec.json.encode(events if len(events) > 1 else draw(st.sampled_from([events, events[0]])))),)


def compact_or_nil(event: dict[str, Any]) -> bytes:
    """Encode an event, or a nil in place of one that MessagePack cannot hold."""
    try:
        return compact_from_mapping(event)
    except InvalidEvent:
        return b"\xc0"


def array_header(count: int) -> bytes:
    return bytes([0x90 | count]) if count < 16 else b"\xdc" + count.to_bytes(2, "big")


junk_fields = st.one_of(
    st.tuples(st.tuples(st.sampled_from([b"e", b"b", b"j", b"x", b""]), st.binary(max_size=40))),
    st.just(((b"e", b"\x90"), (b"j", b"{}"))),
)


@st.composite
def streams(draw: st.DrawFn, longest: int = 40, *, jumps: bool = False) -> list[StreamEntry]:
    """Draw the entries of a stream: arrivals never go back, and cross a few midnights. With ``jumps`` they may."""
    arrival_ms = draw(st.sampled_from(AROUND_MS)) + draw(st.integers(-7_200_000, 7_200_000))
    entries: list[StreamEntry] = []
    number = 0
    steps = st.one_of(st.integers(0, 3000), st.integers(0, 90_000), st.integers(0, 30 * 3_600_000))
    for sequence in range(draw(st.integers(1, longest))):
        arrival_ms += draw(steps)
        if jumps:
            if draw(st.integers(0, 2)) == 0:
                arrival_ms = draw(st.sampled_from(PLACES_MS)) + draw(st.integers(0, 7_200_000))
            arrival_ms = min(arrival_ms, 2**53 - 1)
        if draw(st.integers(0, 19)) == 0:
            entries.append(StreamEntry(arrival_ms, sequence, draw(junk_fields)))
            continue
        if draw(st.integers(0, 199)) == 0 and sequence == 0:
            entries.append(StreamEntry(0, 1, ((b"e", b"\x90"),)))
        events = []
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 5]))):
            events.append(draw(event_mappings(number, arrival_ms)))
            number += 1
        entries.append(StreamEntry(arrival_ms, sequence, draw(encoded(events))))
    return entries
