"""A member day made from grocery baskets: 15 November 2026 in Shanghai, seeded, with abusers in the crowd.

What is taken from the data: when people shop, what they buy and for how much, in which store, and who of them
are the big spenders (their tiers). All 155 848 baskets of the year are folded onto the one day by their time
of day. A *member* is one household in one week of the year: folded whole, a household would shop 63 times in
that day and look like a bot; one week of it shops once or twice (the median is two), as a member does when
points are doubled.

What is made up: devices, addresses and phone numbers, the actions besides orders, late and repeated
deliveries, and the abusers. Addresses are of ranges for private use and for documentation, and phone numbers
have twelve digits, so that they are nobody's.

The planted abusers (DOMAIN, "Abuse"), in every district:

=================  ==========================================================================================
``device_farm``    12 accounts on each of 6 devices check in, vote, open groups and buy something small
``phone_pool``     10 accounts on each of 5 phone numbers of an SMS-receiving service claim invites
``burst_bot``      4 devices place 60 orders each within a minute, when a sale opens
``wash_orders``    4 accounts order for large sums all day, slowly, and have almost everything refunded
``points_rush``    3 devices place 8 of the largest orders within ten minutes, to be away with the points
``review_mill``    3 accounts post 60 reviews each within three quarters of an hour
``proxy_crowd``    800 accounts behind each of 2 proxies, every one with a device and a phone of its own
=================  ==========================================================================================

And one kind of honest members who look like abusers: ``leader_device``, neighbours for whom a group leader
orders on the leader's own device. They are why such limits hold points for a reviewer and do not take them.

The day also has what a real stream has: events that come hours late, tills that report from two days ago,
exact re-sends, ids used twice, clocks that run ahead, kinds that no rule knows, and events that break the
table. It begins with the check-ins of the six days before, for streaks, and on the evening before with the
members' tiers and cards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate, chain, pairwise, starmap
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import numpy.typing as npt

from accrual.demo.baskets import Baskets, load

__all__ = ["DAY_START_MS", "MAXIMUM_SCALE", "MemberDay", "Truth", "generate"]

Integers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.void]

SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60 * SECOND_MS
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS

SHANGHAI: Final = ZoneInfo("Asia/Shanghai")
DAY_START_MS: Final = int(datetime(2026, 11, 15, tzinfo=SHANGHAI).timestamp()) * SECOND_MS
CARD_END_MS: Final = int(datetime(2027, 6, 30, tzinfo=SHANGHAI).timestamp()) * SECOND_MS

# Stores are shared out to cities of very different size: new rules are tried first in a small one.
CITIES: Final = {
    "hangzhou": 0.30,
    "suzhou": 0.22,
    "ningbo": 0.18,
    "hefei": 0.14,
    "wuxi": 0.11,
    "lishui": 0.05,
}
RAIN_HOURS: Final = {"ningbo": (7, 10), "suzhou": (17, 20)}
TAGS: Final = (["bad_weather"],)

# A tier follows from what the household spends in the year.
TIERS: Final = ("normal", "silver", "gold", "diamond")
TIER_SPENT_FEN: Final = (50_000, 200_000, 500_000)

# Most paid cards outlast the day; some end at noon, and with them the extra points.
CARD_ENDS_MS: Final = (None, CARD_END_MS, DAY_START_MS + 12 * HOUR_MS)
ATTRIBUTES: Final = tuple(
    {"tier": tier} if end is None else {"tier": tier, "card_until": end} for tier in TIERS for end in CARD_ENDS_MS
)

KINDS: Final = (
    "order_paid",
    "order_refunded",
    "checkin",
    "review",
    "invite_completed",
    "group_opened",
    "vote",
    "member_updated",
    "lottery_played",
)

# The items of the compact form, and the columns of a row that say what they are.
COLUMNS: Final = {
    "id": "number",
    "kind": "kind",
    "member": "member",
    "ts": "ts_ms",
    "amount": "amount_fen",
    "order": "order",
    "device": "device",
    "ip": "ip",
    "phone": "phone",
    "city": "city",
    "lines": "basket",
    "tags": "tags",
    "attributes": "attributes",
}
FIELDS: Final = tuple(COLUMNS)

# An event is encoded once, with these marks where a district's code goes. They have as many bytes as what
# takes their place, four and five. These bytes occur nowhere else: none of them begins an item of an event,
# and the only numbers long enough for them, the times of those days, have others in those places.
CODE_MARK: Final = "\U0010fffd"
OCTETS_MARK: Final = "\U0010fffc."
FIRST_CODE: Final = 10
CODES: Final = 90
MAXIMUM_SCALE: Final = CODES * CODES

CARRIER_SHARE: Final = 0.7
MEMBERS_BEHIND_CARRIER_ADDRESS: Final = 300
MAXIMUM_CARRIER_ADDRESSES: Final = 240

CHUNK_EVENTS: Final = 8192

# Where the pieces of absent items stand, counted from the end of a table of pieces.
NIL_PIECE: Final = -1
NO_PIECE: Final = -2

# One row per event of a district; -1 is absent. ``number`` identifies the event, ``basket`` says whose lines
# it has, ``planted`` what is odd about it; texts are indices.
ROW: Final = np.dtype(
    [
        ("arrival_ms", "i8"),
        ("ts_ms", "i8"),
        ("number", "i4"),
        ("kind", "i1"),
        ("member", "i4"),
        ("amount_fen", "i4"),
        ("order", "i4"),
        ("device", "i4"),
        ("ip", "i4"),
        ("phone", "i4"),
        ("city", "i1"),
        ("basket", "i4"),
        ("tags", "i1"),
        ("attributes", "i1"),
        ("planted", "i1"),
    ]
)
ACCOUNT_KEYS: Final = ("device", "ip", "phone", "city")


def _replace(name: str, change: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    position = FIELDS.index(name)

    def spoil(items: list[Any]) -> None:
        items[position] = change(items[position])

    return spoil


# Each breaks the table of SPEC section 1 in another way. All start from an order with lines.
MALFORMED: Final = (
    _replace("member", lambda _: None),
    _replace("amount", lambda _: None),
    _replace("amount", lambda _: -1),
    _replace("amount", lambda amount: amount + 0.5),
    _replace("amount", lambda amount: amount + 1),
    _replace("lines", lambda lines: [line[:1] for line in lines]),
    _replace("tags", lambda _: "bad_weather"),
    _replace("phone", lambda _: 120_000_000_000),
    _replace("id", lambda text: text.ljust(65, "-")),
    _replace("ts", str),
)

# The values of ``planted``.
DEAD_LETTERS: Final = ("id_conflict", "unknown_kind", "ts_in_future", "stale_control")
DUPLICATE: Final = len(DEAD_LETTERS)
LATE: Final = DUPLICATE + 1
FIRST_MALFORMED: Final = LATE + 1


@dataclass(frozen=True)
class Truth:
    """What was put into the day, in all districts together: what outcomes can be held against."""

    events: int
    """All events, re-sends and malformed ones included."""
    kinds: Mapping[str, int]
    """Events by kind, re-sends included, malformed ones left out."""
    duplicates: int
    """Exact re-sends."""
    dead_letters: Mapping[str, int]
    """By reason: ``invalid``, ``id_conflict``, ``unknown_kind``, ``ts_in_future``, ``stale_control``."""
    deferred: Mapping[str, int]
    """By reason: ``refund`` and ``late``, re-sends left out."""
    members: int
    """Members who shop; abusers are not among them."""
    abusers: Mapping[str, frozenset[str]]
    """The members who abuse, by kind of abuse (named in the module's docstring)."""
    lookalikes: Mapping[str, frozenset[str]]
    """Honest members whose events look like abuse."""


@dataclass(frozen=True, eq=False)
class MemberDay:
    """The events of the day in the order of their arrival. Both forms can be walked any number of times.

    Every district lives the same day at the same moments; but all that its events name (ids, members, orders,
    devices, addresses, phones) is its own.
    """

    scale: int
    truth: Truth
    _patterns: _Patterns = field(repr=False)

    def __len__(self) -> int:
        return self.truth.events

    def compact(self) -> Iterator[tuple[int, bytes]]:
        """Yield ``(arrival_ms, event)``: arrivals never go back, events are compact (SPEC section 7)."""
        for arrivals_ms, events in self.compact_chunks():
            yield from zip(arrivals_ms, events, strict=True)

    def compact_chunks(self) -> Iterator[tuple[list[int], list[bytes]]]:
        """Yield the same as two lists of equal length, some thousands of events at a time."""
        districts = [tuple(name.encode() for name in _district(number)) for number in range(self.scale)]
        code_mark, octets_mark = CODE_MARK.encode(), OCTETS_MARK.encode()
        for arrivals_ms, patterns in self._patterns.chunks(max(64, CHUNK_EVENTS // self.scale)):
            # Replacing in one long text and cutting it up again is several times faster than event by event.
            text = b"".join(patterns)
            cuts = list(starmap(slice, pairwise(accumulate(map(len, patterns), initial=0))))
            named = []
            for code, octets in districts:
                district_text = text.replace(code_mark, code).replace(octets_mark, octets)
                named.append([district_text[cut] for cut in cuts])
            events = list(chain.from_iterable(zip(*named, strict=True)))
            yield np.repeat(arrivals_ms, self.scale).tolist(), events

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the same events as fields (SPEC section 1), arrival as ``at``: the slow, readable form."""
        for arrival_ms, event in self.compact():
            fields = dict(zip(FIELDS, msgspec.msgpack.decode(event), strict=False))
            attributes = fields.pop("attributes", None) or {}
            present = {name: value for name, value in fields.items() if value is not None}
            yield {**present, **attributes, "at": arrival_ms}


def generate(scale: int = 1, seed: int = 20261115, baskets: Baskets | None = None) -> MemberDay:
    """Make a member day of ``scale`` districts (1..8100), each with all ``baskets`` (default: the package's).

    The same arguments give the same bytes. Raises ``ValueError`` where ``scale`` is out of range.
    """
    if not 1 <= scale <= MAXIMUM_SCALE:
        raise ValueError(f"scale: {scale} is outside 1..{MAXIMUM_SCALE}")
    plan = _Plan(load() if baskets is None else baskets, seed)
    _plan_shoppers(plan)
    _plan_abusers(plan)
    _plan_accidents(plan)
    rows = plan.rows()
    return MemberDay(scale, _truth(plan, rows, scale), _Patterns(plan, rows))


def _district(number: int) -> tuple[str, str]:
    """Return what a district's marks stand for: four digits, and the same as two octets of an address."""
    high, low = divmod(number, CODES)
    return f"{FIRST_CODE + high}{FIRST_CODE + low}", f"{FIRST_CODE + high}.{FIRST_CODE + low}"


def _truth(plan: _Plan, rows: Rows, scale: int) -> Truth:
    planted, kinds = rows["planted"], rows["kind"]
    by_kind = Counter(kinds[planted < FIRST_MALFORMED].tolist())
    refunds = (kinds == KINDS.index("order_refunded")) & (planted != DUPLICATE)

    def count(chosen: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(chosen)) * scale

    def names(groups: Mapping[str, Integers]) -> dict[str, frozenset[str]]:
        codes = [_district(number)[0] for number in range(scale)]
        members = plan.members
        return {
            group: frozenset(members[index].replace(CODE_MARK, code) for index in indices for code in codes)
            for group, indices in groups.items()
        }

    return Truth(
        events=len(rows) * scale,
        kinds={KINDS[kind]: number * scale for kind, number in sorted(by_kind.items())},
        duplicates=count(planted == DUPLICATE),
        dead_letters={
            "invalid": count(planted >= FIRST_MALFORMED),
            **{reason: count(planted == code) for code, reason in enumerate(DEAD_LETTERS)},
        },
        deferred={"refund": count(refunds), "late": count(planted == LATE)},
        members=plan.shopper_count * scale,
        abusers=names(plan.abusers),
        lookalikes=names(plan.lookalikes),
    )


class _Patterns:
    """The events of one district in the compact form, with marks where the district's code goes.

    An event is put together from pieces that were encoded before, one look-up an item.
    """

    def __init__(self, plan: _Plan, rows: Rows) -> None:
        self._arrival_ms = rows["arrival_ms"]
        self._planted = rows["planted"]
        columns = {name: rows[COLUMNS[name]] for name in FIELDS}
        columns["ts"] = np.arange(len(rows))
        # What follows the last item that is present is left out, so that its piece is empty.
        size = np.zeros(len(rows), np.int64)
        for position, name in enumerate(FIELDS):
            size[columns[name] >= 0] = position + 1
        headers = [bytes([0x90 + count]) for count in range(len(FIELDS) + 1)]
        self._columns = [(size, np.array(headers, dtype=object))]
        pieces = _pieces(plan, rows)
        for position, name in enumerate(FIELDS):
            absent = np.where(position < size, NIL_PIECE, NO_PIECE)
            self._columns.append((np.where(columns[name] < 0, absent, columns[name]), pieces[name]))

    def chunks(self, rows: int) -> Iterator[tuple[Integers, list[bytes]]]:
        """Yield the arrivals in ms and the patterns of up to ``rows`` events at a time."""
        for start in range(0, len(self._arrival_ms), rows):
            part = slice(start, start + rows)
            pieces = [table[index[part]].tolist() for index, table in self._columns]
            patterns = list(map(b"".join, zip(*pieces, strict=True)))
            for position in np.flatnonzero(self._planted[part] >= FIRST_MALFORMED):
                spoil = MALFORMED[self._planted[start + position] - FIRST_MALFORMED]
                patterns[position] = _spoilt(patterns[position], spoil)
            yield self._arrival_ms[part], patterns


def _pieces(plan: _Plan, rows: Rows) -> dict[str, npt.NDArray[np.object_]]:
    """Encode, field by field, what the indices in rows stand for; then ``b""`` and nil for an absent item."""
    starts = plan.baskets.line_start.tolist()
    categories = [plan.baskets.categories[index] for index in plan.baskets.category.tolist()]
    lines = list(zip(categories, plan.baskets.amount_fen.tolist(), strict=True))
    values: dict[str, Iterable[Any]] = {
        "id": (f"e{CODE_MARK}{number:07d}" for number in range(plan.event_count)),
        "kind": KINDS,
        "member": plan.members,
        "ts": rows["ts_ms"].tolist(),
        "amount": range(int(rows["amount_fen"].max()) + 1),
        "order": (f"o{CODE_MARK}{number:07d}" for number in range(plan.order_count)),
        "device": plan.devices,
        "ip": plan.ips,
        "phone": plan.phones,
        "city": CITIES,
        "lines": (lines[start:end] for start, end in pairwise(starts)),
        "tags": TAGS,
        "attributes": ATTRIBUTES,
    }
    encode = msgspec.msgpack.Encoder().encode
    return {name: np.array([*map(encode, items), b"", encode(None)], object) for name, items in values.items()}


def _spoilt(pattern: bytes, spoil: Callable[[list[Any]], None]) -> bytes:
    items: list[Any] = msgspec.msgpack.decode(pattern)
    items += [None] * (len(FIELDS) - len(items))
    spoil(items)
    while items[-1] is None:
        items.pop()
    return msgspec.msgpack.encode(items)


class _Plan:
    """The day while it is drawn up: the accounts, and rows of events block by block.

    Only ``Generator.random`` is used to draw: the other methods of numpy's generators may change from release
    to release, and with them the day.
    """

    def __init__(self, baskets: Baskets, seed: int) -> None:
        self.baskets = baskets
        self.basket_fen = baskets.total_fen
        self.baskets_by_size = np.argsort(self.basket_fen, kind="stable")
        self.random = np.random.Generator(np.random.PCG64(seed)).random
        self.members: list[str] = []
        self.devices: list[str] = []
        self.ips: list[str] = []
        self.phones: list[str] = []
        self.accounts = {key: np.empty(0, np.int64) for key in ACCOUNT_KEYS}
        self.blocks: list[Rows] = []
        self.event_count = 0
        self.order_count = 0
        self.shopper_count = 0
        self.abusers: dict[str, Integers] = {}
        self.lookalikes: dict[str, Integers] = {}

    def rows(self) -> Rows:
        """Return all rows so far, by arrival; of the same millisecond, those planned first come first."""
        rows = np.concatenate(self.blocks)
        return rows[np.argsort(rows["arrival_ms"], kind="stable")]

    # Draws.

    def between(self, low: int, high: int, count: int) -> Integers:
        """Draw ``count`` integers of ``low`` up to, not including, ``high``."""
        return low + np.floor(self.random(count) * (high - low)).astype(np.int64)

    def some(self, indices: Integers, share: float) -> Integers:
        """Draw about ``share`` of ``indices``, in their order."""
        return indices[self.random(len(indices)) < share]

    def few(self, indices: Integers, count: int) -> Integers:
        """Draw ``count`` of ``indices``, all different."""
        return indices[np.argsort(self.random(len(indices)), kind="stable")[:count]]

    def moments(self, count: int) -> Integers:
        """Draw ``count`` times of the day in ms since the epoch, from those at which people shop."""
        seconds = self.baskets.second[self.between(0, len(self.baskets), count)].astype(np.int64)
        return DAY_START_MS + seconds * SECOND_MS + self.between(0, SECOND_MS, count)

    def baskets_of_size(self, low: float, high: float, count: int) -> Integers:
        """Draw ``count`` baskets of the quantiles ``low``..``high`` by amount."""
        size = len(self.baskets_by_size)
        return self.baskets_by_size[self.between(int(low * size), int(high * size), count)]

    # Names and accounts.

    @staticmethod
    def add_names(names: list[str], pattern: str, count: int) -> Integers:
        """Append ``count`` new names and return their indices; the field in ``pattern`` becomes the index."""
        indices = np.arange(len(names), len(names) + count)
        names.extend(pattern.format(index) for index in indices.tolist())
        return indices

    def new_devices(self, count: int) -> Integers:
        return self.add_names(self.devices, "d" + CODE_MARK + "{:06d}", count)

    def new_phones(self, count: int) -> Integers:
        return self.add_names(self.phones, "12" + CODE_MARK + "{:06d}", count)

    def new_homes(self, count: int) -> Integers:
        """Return addresses that one home has for itself."""
        return self.add_names(self.ips, "2001:db8:" + CODE_MARK + ":{:x}::1", count)

    def enrol(self, names: Iterable[str], **keys: Integers) -> Integers:
        """Open an account for each name, with its usual device, ip, phone and city; return the members."""
        first = len(self.members)
        self.members.extend(names)
        self.accounts = {key: np.concatenate((self.accounts[key], keys[key])) for key in ACCOUNT_KEYS}
        return np.arange(first, len(self.members))

    def enrol_newcomers(self, count: int, **keys: Integers) -> Integers:
        """Open ``count`` accounts; those of device, address and phone that are not given are theirs alone."""
        first = len(self.members)
        own = {
            "device": keys.get("device", self.new_devices(0 if "device" in keys else count)),
            "ip": keys.get("ip", self.new_homes(0 if "ip" in keys else count)),
            "phone": keys.get("phone", self.new_phones(0 if "phone" in keys else count)),
            "city": self.between(0, len(CITIES), count),
        }
        return self.enrol((f"m{CODE_MARK}n{index:06d}" for index in range(first, first + count)), **own)

    # Events.

    def add(self, kind: str, member: Integers, ts_ms: Integers, **columns: Integers | int) -> Rows:
        """Plan one event of each member, arriving within 30 s of when it happened, mostly within one."""
        rows = np.empty(len(member), ROW)
        rows[...] = -1
        rows["kind"], rows["member"], rows["ts_ms"] = KINDS.index(kind), member, ts_ms
        rows["number"] = self.event_count + np.arange(len(rows))
        rows["arrival_ms"] = ts_ms + 40 + np.floor(29_960 * self.random(len(rows)) ** 12).astype(np.int64)
        for name, values in columns.items():
            rows[name] = values
        self.event_count += len(rows)
        self.blocks.append(rows)
        return rows

    def act(self, kind: str, member: Integers, ts_ms: Integers, **columns: Integers | int) -> Rows:
        """Plan one event of each member in the app: with the account's device, address, phone and city."""
        usual: dict[str, Integers | int] = {key: values[member] for key, values in self.accounts.items()}
        return self.add(kind, member, ts_ms, **(usual | columns))

    def buy(self, member: Integers, ts_ms: Integers, basket: Integers, **columns: Integers | int) -> Rows:
        """Plan one order of each member: the content of ``basket``."""
        order = self.order_count + np.arange(len(member))
        self.order_count += len(member)
        amount_fen = self.basket_fen[basket]
        columns |= {"order": order, "amount_fen": amount_fen, "basket": np.where(amount_fen > 0, basket, -1)}
        rows = self.act("order_paid", member, ts_ms, **columns)
        for city, (start, end) in RAIN_HOURS.items():
            hour = (rows["ts_ms"] - DAY_START_MS) // HOUR_MS
            rows["tags"][(rows["city"] == list(CITIES).index(city)) & (start <= hour) & (hour < end)] = 0
        return rows

    def refund(self, orders: Rows, amount_fen: Integers) -> None:
        """Plan the refund of ``orders``, minutes to hours later."""
        ts_ms = orders["ts_ms"] + self.between(10 * MINUTE_MS, 8 * HOUR_MS, len(orders))
        self.add("order_refunded", orders["member"], ts_ms, order=orders["order"], amount_fen=amount_fen)

    def repeat(self, originals: Rows, delay_ms: Integers, planted: int) -> Rows:
        """Plan the same events, with the same ids, once more."""
        rows = originals.copy()
        rows["arrival_ms"] += delay_ms
        rows["planted"] = planted
        self.blocks.append(rows)
        return rows


# The shoppers.


def _plan_shoppers(plan: _Plan) -> None:
    member_of_basket = _enrol_shoppers(plan)
    shoppers = np.arange(plan.shopper_count)
    orders = _plan_orders(plan, member_of_basket)
    _plan_check_ins(plan, shoppers)
    _plan_other_actions(plan, shoppers, orders)


def _enrol_shoppers(plan: _Plan) -> Integers:
    """Open the shoppers' accounts, announce tiers and paid cards, and return for each basket its member."""
    baskets = plan.baskets
    week = (baskets.day.astype(np.int64) + 6) // 7  # From Monday to Sunday; the year begins on a Sunday.
    keys = baskets.household.astype(np.int64) * 100 + week
    member_of_basket: Integers
    members, first_basket, member_of_basket = np.unique(keys, return_index=True, return_inverse=True)
    household, count = members // 100, len(members)
    plan.shopper_count = count

    names = (f"m{CODE_MARK}h{key // 100:04d}w{key % 100:02d}" for key in members.tolist())
    city = _city_of_store(baskets)[first_basket]
    device = _shopper_devices(plan, household)
    address = _shopper_addresses(plan, count)
    plan.enrol(names, device=device, ip=address, phone=plan.new_phones(count), city=city)

    spent_fen = np.bincount(baskets.household, plan.basket_fen)
    tier = np.digitize(spent_fen, TIER_SPENT_FEN)
    card = np.searchsorted((0.85, 0.985), plan.random(len(spent_fen)), side="right")
    attributes = (tier * len(CARD_ENDS_MS) + card)[household]
    told = np.flatnonzero(attributes > 0)  # A normal member without a card needs no telling.
    evening_ms = DAY_START_MS - plan.between(0, 4 * HOUR_MS, len(told))
    plan.add("member_updated", told, evening_ms - MINUTE_MS, attributes=attributes[told])
    return member_of_basket


def _city_of_store(baskets: Baskets) -> Integers:
    """Return for each basket its city: stores, largest first, go where most of a share is missing."""
    _, store, sizes = np.unique(baskets.store, return_inverse=True, return_counts=True)
    missing = np.array(list(CITIES.values())) * len(baskets)
    city_of_store: Integers = np.empty(len(sizes), np.int64)
    for index in np.argsort(-sizes, kind="stable"):
        city_of_store[index] = np.argmax(missing)
        missing[city_of_store[index]] -= sizes[index]
    return city_of_store[store]


def _shopper_devices(plan: _Plan, household: Integers) -> Integers:
    """Give each shopper a device; some share one in the household, or have a leader who orders for them."""
    count = len(household)
    device = plan.new_devices(count)
    shares = (plan.random(count) < 0.06) & (household == np.roll(household, 1)) & (np.arange(count) > 0)
    shares[1:] &= ~shares[:-1]
    device[shares] -= 1
    leaders = plan.new_devices(6)
    neighbours = plan.few(np.arange(count), 6 * len(leaders))
    device[neighbours] = np.resize(leaders, len(neighbours))
    plan.lookalikes["leader_device"] = neighbours
    return device


def _shopper_addresses(plan: _Plan, count: int) -> Integers:
    """Put most shoppers behind the addresses of carriers, hundreds behind each; the others are at home."""
    size = int(np.clip(count * CARRIER_SHARE / MEMBERS_BEHIND_CARRIER_ADDRESS, 1, MAXIMUM_CARRIER_ADDRESSES))
    carriers = plan.add_names(plan.ips, "10." + OCTETS_MARK + ".{}", size)
    address = carriers[plan.between(0, size, count)]
    at_home = plan.some(np.arange(count), 1 - CARRIER_SHARE)
    address[at_home] = plan.new_homes(len(at_home))
    return address


def _plan_orders(plan: _Plan, member_of_basket: Integers) -> Rows:
    """Plan the order of each basket at its time of day, and the refunds of some; return the orders."""
    baskets, count = plan.baskets, len(plan.baskets)
    everyone = np.arange(count)
    ts_ms = DAY_START_MS + baskets.second.astype(np.int64) * SECOND_MS + plan.between(0, SECOND_MS, count)
    orders = plan.buy(member_of_basket, ts_ms, everyone, city=_city_of_store(baskets))
    borrowed = plan.some(everyone, 0.02)
    orders["device"][borrowed] = plan.new_devices(len(borrowed))
    delayed = plan.some(everyone, 0.003)
    orders["arrival_ms"][delayed] += plan.between(10 * MINUTE_MS, 12 * HOUR_MS, len(delayed))

    refunded = orders[plan.some(np.flatnonzero(plan.basket_fen > 1), 0.015)]
    paid_fen = refunded["amount_fen"].astype(np.int64)
    part_fen = 1 + np.floor(plan.random(len(refunded)) * (paid_fen - 1)).astype(np.int64)
    plan.refund(refunded, np.where(plan.random(len(refunded)) < 0.6, paid_fen, part_fen))
    return orders


def _plan_check_ins(plan: _Plan, shoppers: Integers) -> None:
    """Plan check-ins; for some members also those of the six days before, which make a streak of seven."""
    present = plan.some(shoppers, 0.4)
    plan.act("checkin", present, plan.moments(len(present)))
    faithful = plan.some(present, 0.05)
    for days in range(6, 0, -1):
        plan.act("checkin", faithful, plan.moments(len(faithful)) - days * DAY_MS)
    forgetful = plan.some(present, 0.02)  # They tap again, which earns nothing.
    plan.act("checkin", forgetful, plan.moments(len(forgetful)))


def _plan_other_actions(plan: _Plan, shoppers: Integers, orders: Rows) -> None:
    """Plan reviews of orders, votes, groups and invites; a few members try a second time."""
    reviewed = orders[plan.some(np.arange(len(orders)), 0.1)]
    later_ms = plan.between(20 * MINUTE_MS, 6 * HOUR_MS, len(reviewed))
    plan.act("review", reviewed["member"], reviewed["ts_ms"] + later_ms, order=reviewed["order"])
    for kind, share in (("vote", 0.06), ("group_opened", 0.03), ("invite_completed", 0.015)):
        first = plan.some(shoppers, share)
        again = plan.some(first, 0.05)
        for members in (first, again):
            plan.act(kind, members, plan.moments(len(members)))


# The abusers: each function returns the members it has planted.


def _plan_abusers(plan: _Plan) -> None:
    plan.abusers["device_farm"] = _device_farm(plan, devices=6, accounts=12)
    plan.abusers["phone_pool"] = _phone_pool(plan, phones=5, accounts=10)
    plan.abusers["burst_bot"] = _burst_bot(plan, bots=4, orders=60)
    plan.abusers["wash_orders"] = _wash_orders(plan, accounts=4, orders=24)
    plan.abusers["points_rush"] = _points_rush(plan, accounts=3, orders=8)
    plan.abusers["review_mill"] = _review_mill(plan, accounts=3, reviews=60)
    plan.abusers["proxy_crowd"] = _proxy_crowd(plan, proxies=2, accounts=800)


def _hour(hour: float) -> int:
    return DAY_START_MS + int(hour * HOUR_MS)


def _device_farm(plan: _Plan, devices: int, accounts: int) -> Integers:
    """Walk each device through its accounts, one in 100 s, with four actions each."""
    device = np.repeat(plan.new_devices(devices), accounts)
    ip = np.repeat(plan.new_homes(devices), accounts)
    members = plan.enrol_newcomers(devices * accounts, device=device, ip=ip)
    start_ms = np.repeat(plan.between(_hour(9), _hour(21), devices), accounts)
    ts_ms = start_ms + np.tile(np.arange(accounts) * 100 * SECOND_MS, devices)
    for step, kind in enumerate(("checkin", "vote", "group_opened")):
        plan.act(kind, members, ts_ms + step * 20 * SECOND_MS)
    plan.buy(members, ts_ms + MINUTE_MS, plan.baskets_of_size(0.1, 0.2, len(members)))
    return members


def _phone_pool(plan: _Plan, phones: int, accounts: int) -> Integers:
    """Register accounts with few phone numbers, each on an emulated device, and claim an invite for each."""
    phone = np.repeat(plan.new_phones(phones), accounts)
    members = plan.enrol_newcomers(phones * accounts, phone=phone)
    start_ms = np.repeat(plan.between(_hour(8), _hour(20), phones), accounts)
    ts_ms = start_ms + np.tile(np.arange(accounts) * 10 * MINUTE_MS, phones)
    plan.act("checkin", members, ts_ms)
    plan.act("invite_completed", members, ts_ms + 2 * MINUTE_MS)
    return members


def _burst_bot(plan: _Plan, bots: int, orders: int) -> Integers:
    """Order every second from the moment at which a sale opens, at eight in the evening."""
    members = plan.enrol_newcomers(bots)
    buyer = np.repeat(members, orders)
    ts_ms = _hour(20) + np.tile(np.arange(orders) * 980, bots) + plan.between(0, 20, len(buyer))
    plan.buy(buyer, ts_ms, plan.baskets_of_size(0.1, 0.3, len(buyer)))
    return members


def _wash_orders(plan: _Plan, accounts: int, orders: int) -> Integers:
    """Order for large sums from 8:00 on, too slowly for limits on orders; have nine in ten refunded."""
    members = plan.enrol_newcomers(accounts)
    buyer = np.repeat(members, orders)
    ts_ms = _hour(8) + np.tile(np.arange(orders) * 38 * MINUTE_MS, accounts)
    ts_ms += plan.between(0, MINUTE_MS, len(buyer))
    bought = plan.buy(buyer, ts_ms, plan.baskets_of_size(0.995, 1, len(buyer)))
    refunded = bought[plan.some(np.arange(len(bought)), 0.9)]
    plan.refund(refunded, refunded["amount_fen"])
    return members


def _points_rush(plan: _Plan, accounts: int, orders: int) -> Integers:
    """Place the largest orders there are, one in 70 s."""
    members = plan.enrol_newcomers(accounts)
    buyer = np.repeat(members, orders)
    start_ms = np.repeat(plan.between(_hour(12), _hour(22), accounts), orders)
    ts_ms = start_ms + np.tile(np.arange(orders) * 70 * SECOND_MS, accounts)
    plan.buy(buyer, ts_ms, plan.baskets_of_size(0.999, 1, len(buyer)))
    return members


def _review_mill(plan: _Plan, accounts: int, reviews: int) -> Integers:
    """Post reviews, one in 40 s, of orders that nobody placed."""
    members = plan.enrol_newcomers(accounts)
    author = np.repeat(members, reviews)
    start_ms = np.repeat(plan.between(_hour(9), _hour(21), accounts), reviews)
    ts_ms = start_ms + np.tile(np.arange(reviews) * 40 * SECOND_MS, accounts)
    order = plan.order_count + np.arange(len(author))
    plan.order_count += len(author)
    plan.act("review", author, ts_ms, order=order)
    return members


def _proxy_crowd(plan: _Plan, proxies: int, accounts: int) -> Integers:
    """Send a crowd through each proxy, all day; only the address has them in common, which proves nothing."""
    address = np.repeat(plan.add_names(plan.ips, "2001:db8:" + CODE_MARK + ":{:x}::2", proxies), accounts)
    members = plan.enrol_newcomers(proxies * accounts, ip=address)
    for kind in ("checkin", "group_opened", "invite_completed"):
        plan.act(kind, members, plan.moments(len(members)))
    plan.buy(members, plan.moments(len(members)), plan.baskets_of_size(0.4, 0.8, len(members)))
    return members


# What goes wrong without anyone's intent.


def _plan_accidents(plan: _Plan) -> None:
    rows = np.concatenate(plan.blocks)
    orders = rows[(rows["kind"] == KINDS.index("order_paid")) & (rows["basket"] >= 0)]
    _plan_second_deliveries(plan, rows, orders)
    _plan_clocks_astray(plan)
    _plan_unusable_events(plan, orders)


def _plan_second_deliveries(plan: _Plan, rows: Rows, orders: Rows) -> None:
    """Send one event in 200 again as it was, and a few orders under an id that is taken."""
    again = rows[plan.some(np.arange(len(rows)), 0.005)]
    delay_ms = 500 + np.floor(10 * MINUTE_MS * plan.random(len(again)) ** 4).astype(np.int64)
    plan.repeat(again, delay_ms, DUPLICATE)

    confused = orders[plan.few(np.arange(len(orders)), 12)]
    delay_ms = plan.between(SECOND_MS, 5 * MINUTE_MS, len(confused))
    conflicts = plan.repeat(confused, delay_ms, _dead_letter("id_conflict"))
    conflicts["amount_fen"] += 100
    conflicts["basket"] = -1


def _plan_clocks_astray(plan: _Plan) -> None:
    """Report orders from two days ago, and from an hour ahead; tell a tier two days late."""
    shoppers = np.arange(plan.shopper_count)
    for count, off_ms, planted in ((25, -2 * DAY_MS, LATE), (10, HOUR_MS, _dead_letter("ts_in_future"))):
        buyers = plan.few(shoppers, count)
        arrival_ms = plan.moments(len(buyers))
        basket = plan.baskets_of_size(0.2, 0.8, len(buyers))
        plan.buy(buyers, arrival_ms + off_ms, basket, arrival_ms=arrival_ms, planted=planted)
    told = plan.few(shoppers, 5)
    arrival_ms = plan.moments(len(told))
    rows = plan.add("member_updated", told, arrival_ms - 2 * DAY_MS, arrival_ms=arrival_ms, attributes=0)
    rows["planted"] = _dead_letter("stale_control")


def _plan_unusable_events(plan: _Plan, orders: Rows) -> None:
    """Plan events of a kind that no rule knows, and five of each way to break the table."""
    players = plan.few(np.arange(plan.shopper_count), 10)
    plan.act("lottery_played", players, plan.moments(len(players)), planted=_dead_letter("unknown_kind"))
    for number in range(len(MALFORMED)):
        models = orders[plan.few(np.arange(len(orders)), 5)]
        spoilt = plan.repeat(models, plan.between(0, HOUR_MS, len(models)), FIRST_MALFORMED + number)
        spoilt["number"] = plan.event_count + np.arange(len(spoilt))
        plan.event_count += len(spoilt)


def _dead_letter(reason: str) -> int:
    return DEAD_LETTERS.index(reason)
