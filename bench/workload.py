"""The standard workload: a member day of orders, as fast as an engine can eat them (15 November 2026, Shanghai).

Who: ``members`` members, 1.2 devices and 1 phone each, and 300 addresses for 1000 of them. How often a member comes is
Zipf-Mandelbrot with exponent 1 and an offset of a thousandth of all members, so the busiest 0.1 % bring 10 % of the
events and the busiest 10 % two thirds. What: 90 % orders with one to four lines; check-ins, reviews, votes, opened
groups, refunds and changes of tier are the rest. One event in 200 is an exact re-send, one in 1000 comes an hour late,
and three in 1000 are abuse: half from device farms (twelve accounts that share one device and one phone), half from
bots (one account that orders without a pause). Nothing is malformed, so that ``events = entries + duplicates``.

Time runs forward at ``rate_per_s``. An event is a pure function of the parameters and of its number: events are made
``CHUNK_EVENTS`` at a time, and each chunk has a generator of its own. Addresses are of a range for private use, and
phone numbers have twelve digits, so that they are nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from bench.rows import WORD_BYTES, Booleans, Integers, Packed, Piece, Rows, Table, beside, constant, decimal, numbered

__all__ = ["CHUNK_EVENTS", "DEFAULT_SEED", "Events", "Workload"]

CHUNK_EVENTS: Final = 8192
DEFAULT_SEED: Final = 20261115
MAXIMUM_MEMBERS: Final = 50_000_000

SECOND_MS: Final = 1_000
HOUR_MS: Final = 3_600 * SECOND_MS
DAY_START_MS: Final = int(datetime(2026, 11, 15, tzinfo=ZoneInfo("Asia/Shanghai")).timestamp()) * SECOND_MS
CARD_END_MS: Final = int(datetime(2027, 6, 30, tzinfo=ZoneInfo("Asia/Shanghai")).timestamp()) * SECOND_MS

# The census, which shows the engine every key once, ends before the events begin.
EVENTS_START_MS: Final = DAY_START_MS + 10 * HOUR_MS
CENSUS_START_MS: Final = DAY_START_MS + 4 * HOUR_MS
CENSUS_FIRST_NUMBER: Final = 9_000_000_000
CENSUS_RATE_PER_S: Final = 5_000

KINDS: Final = ("order_paid", "checkin", "review", "vote", "group_opened", "order_refunded", "member_updated")
KIND_SHARES: Final = (0.90, 0.05, 0.02, 0.01, 0.005, 0.005, 0.01)
ORDER, REFUND, UPDATE = KINDS.index("order_paid"), KINDS.index("order_refunded"), KINDS.index("member_updated")

CITIES: Final = ("hangzhou", "suzhou", "ningbo", "hefei", "wuxi", "lishui")
CITY_SHARES: Final = (0.30, 0.22, 0.18, 0.14, 0.11, 0.05)
CATEGORIES: Final = (
    *("fresh", "seafood", "dairy", "bakery", "frozen", "snacks", "drinks", "grain"),
    *("household", "care", "baby", "pets", "tobacco", "coupon", "kitchen", "textile"),
)
# Shops have price points; small ones are the common ones.
PRICES_FEN: Final = np.array([300 + 19_690 * step * step // (512 * 512) for step in range(512)])
LINE_VALUES: Final = [(category.encode(), int(fen)) for category in CATEGORIES for fen in PRICES_FEN]
NO_LINE: Final = len(LINE_VALUES)
LINE_FEN: Final = np.array([*(fen for _, fen in LINE_VALUES), 0])
MAXIMUM_LINES: Final = 4
LINE_COUNT_SHARES: Final = (0.35, 0.30, 0.20, 0.15)
TIERS: Final = ("normal", "silver", "gold", "diamond")
REWARDED_WEATHER_SHARE: Final = 0.08

MANDELBROT_OFFSET_SHARE: Final = 0.001
SECOND_DEVICE_EVERY: Final = 5
SECOND_DEVICE_SHARE: Final = 0.25
AWAY_SHARE: Final = 0.2
MAXIMUM_DELAY_MS: Final = 2 * SECOND_MS
LATE_SHARE: Final = 0.001
DUPLICATE_SHARE: Final = 0.005
ABUSE_SHARE: Final = 0.003
ABUSERS: Final = 16
FARM_ACCOUNTS: Final = 12

# A step through the members that visits each once, in an order that neighbours in rank do not share.
SCATTER: Final = 7_368_787


class Events(NamedTuple):
    """Events as columns: one row each, in the order of their arrival. Numbers stand for the texts."""

    arrival_ms: Integers
    seq: Integers
    number: Integers
    kind: Integers
    member: Integers
    ts_ms: Integers
    device: Integers
    ip: Integers
    phone: Integers
    city: Integers
    line_count: Integers
    line: Integers
    """``(rows, 4)``: a category and a price point; ``NO_LINE`` beyond ``line_count``."""
    weather: Booleans
    tier: Integers
    duplicates: int
    """How many rows are exact re-sends of an earlier row."""

    def __len__(self) -> int:
        """Return the number of events."""
        return len(self.arrival_ms)

    @property
    def amount_fen(self) -> Integers:
        """What was paid: the sum of the lines."""
        amount_fen: Integers = LINE_FEN[self.line].sum(axis=1)
        return amount_fen

    def compact(self) -> Packed:
        """Return the events in the compact form, canonical to the byte (SPEC section 7)."""
        return _compact(self).packed()

    def json(self) -> Packed:
        """Return the events as JSON objects (SPEC section 1)."""
        return _json(self).packed()


@dataclass(frozen=True)
class Workload:
    """The parameters; the same ones give the same bytes. Raises ``ValueError`` where they are out of range."""

    members: int = 1_000_000
    rate_per_s: int = 2_000
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        if not 1_000 <= self.members <= MAXIMUM_MEMBERS:
            raise ValueError(f"members: {self.members} is outside 1000..{MAXIMUM_MEMBERS}")
        if not 1 <= self.rate_per_s <= 10_000_000:
            raise ValueError(f"rate_per_s: {self.rate_per_s} is outside 1..10000000")

    @property
    def devices(self) -> int:
        """The number of devices: one for each member, a second one for every fifth."""
        return self.members + self.members // SECOND_DEVICE_EVERY

    @property
    def ips(self) -> int:
        """The number of addresses."""
        return self.members * 3 // 10

    @property
    def census_size(self) -> int:
        """How many events of the census show every member, device, phone and address at least once."""
        return self.devices

    def events(self, first: int, count: int) -> Events:
        """Return the events with the numbers ``first`` and following; both must be multiples of ``CHUNK_EVENTS``.

        They are made in one piece, so ``count`` should be a chunk or a few.
        """
        if first % CHUNK_EVENTS or count % CHUNK_EVENTS or count < 1:
            raise ValueError(f"{first} and {count} are not whole chunks of {CHUNK_EVENTS} events")
        chunks = [self._chunk(at // CHUNK_EVENTS) for at in range(first, first + count, CHUNK_EVENTS)]
        if len(chunks) == 1:
            return chunks[0]
        names = [name for name in Events._fields if name != "duplicates"]
        columns: dict[str, Any] = {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names}
        return Events(**columns, duplicates=sum(chunk.duplicates for chunk in chunks))

    def census(self, first: int, count: int) -> Events:
        """Return up to ``count`` events of the census: an order of one line from each device, in turn."""
        device = np.arange(first, min(first + count, self.census_size), dtype=np.int64)
        rows = len(device)
        zeros = np.zeros(rows, np.int64)
        owner = np.where(device < self.members, device, (device - self.members) * SECOND_DEVICE_EVERY)
        line = np.full((rows, MAXIMUM_LINES), NO_LINE)
        line[:, 0] = device % NO_LINE
        arrival_ms, seq = _clock(device, CENSUS_START_MS, max(CENSUS_RATE_PER_S, self.census_size // 18_000))
        return Events(
            arrival_ms=arrival_ms,
            seq=seq,
            number=CENSUS_FIRST_NUMBER + device,
            kind=zeros + ORDER,
            member=owner,
            ts_ms=arrival_ms,
            device=device,
            ip=owner % self.ips,
            phone=owner,
            city=_city(owner),
            line_count=zeros + 1,
            line=line,
            weather=zeros > 0,
            tier=zeros,
            duplicates=0,
        )

    def _chunk(self, chunk: int) -> Events:
        # Only `random` is used to draw: the other methods of numpy's generators may change from release to release.
        random = np.random.Generator(np.random.PCG64((self.seed, chunk))).random
        number = np.arange(chunk * CHUNK_EVENTS, (chunk + 1) * CHUNK_EVENTS, dtype=np.int64)
        arrival_ms, seq = _clock(number, EVENTS_START_MS, self.rate_per_s)
        kind = _shared(random(CHUNK_EVENTS), KIND_SHARES)
        late_ms = (random(CHUNK_EVENTS) < LATE_SHARE) * HOUR_MS
        delay_ms = (random(CHUNK_EVENTS) * MAXIMUM_DELAY_MS).astype(np.int64)
        member = self._popular(random(CHUNK_EVENTS))
        device = self._device(member, random(CHUNK_EVENTS))
        ip = self._address(member, random(CHUNK_EVENTS))
        phone = member
        member, device, phone, kind = self._abuse(random(CHUNK_EVENTS), number, member, device, phone, kind)
        line_count = 1 + _shared(random(CHUNK_EVENTS), LINE_COUNT_SHARES)
        line = (random((CHUNK_EVENTS, MAXIMUM_LINES)) * NO_LINE).astype(np.int64)
        line[np.arange(MAXIMUM_LINES) >= line_count[:, None]] = NO_LINE
        weather = (kind == ORDER) & (random(CHUNK_EVENTS) < REWARDED_WEATHER_SHARE)
        source, duplicates = _resent(random(CHUNK_EVENTS))
        return Events(
            arrival_ms=arrival_ms,
            seq=seq,
            number=number[source],
            kind=kind[source],
            member=member[source],
            ts_ms=(arrival_ms - delay_ms - late_ms)[source],
            device=device[source],
            ip=ip[source],
            phone=phone[source],
            city=_city(member[source]),
            line_count=line_count[source],
            line=line[source],
            weather=weather[source],
            tier=number[source] % len(TIERS),
            duplicates=duplicates,
        )

    def _popular(self, draws: npt.NDArray[np.float64]) -> Integers:
        """Return members, the popular ones more often: the closed inverse of the distribution, no table needed."""
        offset = max(1.0, self.members * MANDELBROT_OFFSET_SHARE)
        rank = (offset * np.expm1(draws * np.log1p(self.members / offset))).astype(np.int64)
        member: Integers = np.minimum(rank, self.members - 1) * SCATTER % self.members
        return member

    def _device(self, member: Integers, draws: npt.NDArray[np.float64]) -> Integers:
        has_second = (member % SECOND_DEVICE_EVERY == 0) & (member // SECOND_DEVICE_EVERY < self.devices - self.members)
        uses_second = has_second & (draws < SECOND_DEVICE_SHARE)
        return np.where(uses_second, self.members + member // SECOND_DEVICE_EVERY, member)

    def _address(self, member: Integers, draws: npt.NDArray[np.float64]) -> Integers:
        # Cubed, so that a few carriers' addresses have a crowd behind them.
        carrier = ((draws / AWAY_SHARE) ** 3 * self.ips).astype(np.int64)
        return np.where(draws < AWAY_SHARE, carrier, member % self.ips)

    def _abuse(
        self, draws: npt.NDArray[np.float64], number: Integers, *honest: Integers
    ) -> tuple[Integers, Integers, Integers, Integers]:
        """Put abusers in the place of some honest members: even ones run a farm, odd ones are a bot."""
        member, device, phone, kind = honest
        is_abuse = draws < ABUSE_SHARE
        abuser = number % ABUSERS
        account = np.where(abuser % 2 == 0, number // ABUSERS % FARM_ACCOUNTS, 0)
        return (
            np.where(is_abuse, abuser * FARM_ACCOUNTS % self.members + account, member) % self.members,
            np.where(is_abuse, abuser % self.devices, device),
            np.where(is_abuse, abuser % self.members, phone),
            np.where(is_abuse, ORDER, kind),
        )


def _clock(number: Integers, start_ms: int, rate_per_s: int) -> tuple[Integers, Integers]:
    """Return when the events with these numbers arrive, and which one of its millisecond each is."""
    since_ms = number * SECOND_MS // rate_per_s
    first_of_ms = -(-since_ms * rate_per_s // SECOND_MS)
    return start_ms + since_ms, number - first_of_ms


def _shared(draws: npt.NDArray[np.float64], shares: tuple[float, ...]) -> Integers:
    """Turn draws from 0..1 into numbers with these shares."""
    return np.searchsorted(np.cumsum(shares)[:-1], draws, side="right")


def _city(member: Integers) -> Integers:
    # A member lives in one city; which one follows from the number as if it had been drawn.
    return _shared((member * SCATTER % 10_007) / 10_007.0, CITY_SHARES)


def _resent(draws: npt.NDArray[np.float64]) -> tuple[Integers, int]:
    """Return for each row the row whose content it has: its own, or an earlier one's where it is a re-send.

    Only odd rows are re-sends and only even ones are sent again, so that what is sent again has been there.
    """
    rows = np.arange(len(draws), dtype=np.int64)
    resent = (rows % 2 == 1) & (draws < 2 * DUPLICATE_SHARE)
    earlier = 2 * (draws * (rows // 2 + 1) / (2 * DUPLICATE_SHARE)).astype(np.int64)
    return np.where(resent, earlier, rows), int(np.count_nonzero(resent))


# -------------------------------------------------------------------------------------------------- as bytes


# The texts that have a number in them: a prefix and so many digits. All are ASCII.
NAMES: Final = {
    "id": (b"e", 10),
    "member": (b"m", 8),
    "order": (b"o", 10),
    "device": (b"d", 9),
    "phone": (b"100", 9),
}


def _number_in(events: Events, name: str) -> Integers:
    return events.number if name in ("id", "order") else getattr(events, name)


OCTETS: Final = Table([b".%d" % octet for octet in range(256)])


def _address(numbers: Integers) -> Rows:
    octets = [OCTETS.pick(numbers >> shift & 0xFF) for shift in (16, 8, 0)]
    return beside(constant(b"10"), *octets)


def _presence(events: Events) -> dict[str, Booleans]:
    """Return which events have which of the optional fields."""
    order, refund, update = (events.kind == kind for kind in (ORDER, REFUND, UPDATE))
    has_keys = ~(refund | update)
    return {
        "amount": order | refund,
        "order": order | refund,
        "device": has_keys,
        "ip": has_keys,
        "phone": has_keys,
        "city": order,
        "lines": order,
        "tags": events.weather,
        "attributes": update,
    }


OPTIONAL: Final = ("amount", "order", "device", "ip", "phone", "city", "lines", "tags", "attributes")
REQUIRED_ITEMS: Final = 4
NIL: Final = b"\xc0"


def _text_head(size: int) -> bytes:
    assert size < 32, "the short form of a MessagePack text holds 31 bytes"
    return bytes([0xA0 + size])


def _packed_text(text: bytes) -> bytes:
    return _text_head(len(text)) + text


def _packed_integer(number: int) -> bytes:
    assert 1 << 8 <= number < 1 << 16, "a price takes two bytes"
    return b"\xcd" + number.to_bytes(2, "big")


TEXT_HEADS: Final = Table([_text_head(size) for size in range(32)])
ARRAY_HEADS: Final = Table([bytes([0x90 + size]) for size in range(16)])
KIND_TEXTS: Final = Table([_packed_text(kind.encode()) for kind in KINDS])
CITY_TEXTS: Final = Table([_packed_text(city.encode()) for city in CITIES])
LINES: Final = Table([b"\x92" + _packed_text(category) + _packed_integer(fen) for category, fen in LINE_VALUES] + [b""])
TAGS_PIECE: Final = b"\x91" + _packed_text(b"bad_weather")
ATTRIBUTES_PIECES: Final = Table(
    [
        b"\x82"
        + _packed_text(b"tier")
        + _packed_text(tier.encode())
        # Nine bytes of integer: every time of this century is beyond 2^32 ms.
        + _packed_text(b"card_until")
        + b"\xcf"
        + CARD_END_MS.to_bytes(8, "big")
        for tier in TIERS
    ]
)

# How a canonical unsigned integer is written, by size class: fixint, 8, 16 and 32 bits.
UNSIGNED_LIMITS: Final = (1 << 7, 1 << 8, 1 << 16)
UNSIGNED_HEADS: Final = np.array([0, 0xCC, 0xCD, 0xCE], np.uint64)
UNSIGNED_BYTES: Final = np.array([1, 2, 3, 5])


def _unsigned(numbers: Integers) -> Rows:
    """Return MessagePack integers in their shortest form; the numbers must be below 2^32."""
    size_class = np.searchsorted(UNSIGNED_LIMITS, numbers, side="right")
    size = UNSIGNED_BYTES[size_class]
    # The number's lowest bytes, highest first, behind its head if it has one.
    shift = (8 * (WORD_BYTES - size) + 8 * (size_class > 0)).astype(np.uint64)
    tail = (numbers.astype(np.uint64) << shift).byteswap()
    head = size_class > 0
    words = np.where(head, (tail << np.uint64(8)) | UNSIGNED_HEADS[size_class], tail)
    return Rows([Piece(words, size)])


def _time(times_ms: Integers) -> Rows:
    return beside(constant(b"\xcf"), Rows([Piece(times_ms.astype(np.uint64).byteswap(), np.array([WORD_BYTES]))]))


def _packed_name(events: Events, name: str) -> Rows:
    prefix, width = NAMES[name]
    return numbered(_text_head(len(prefix) + width) + prefix, _number_in(events, name), width)


def _packed_address(numbers: Integers) -> Rows:
    text = _address(numbers)
    return beside(TEXT_HEADS.pick(text.sizes), text)


def _line_pieces(events: Events) -> Rows:
    return beside(ARRAY_HEADS.pick(events.line_count), *(LINES.pick(line) for line in events.line.T))


def _compact(events: Events) -> Rows:
    pieces = {name: _packed_name(events, name) for name in NAMES} | {
        "ip": _packed_address(events.ip),
        "amount": _unsigned(events.amount_fen),
        "city": CITY_TEXTS.pick(events.city),
        "lines": _line_pieces(events),
        "tags": constant(TAGS_PIECE),
        "attributes": ATTRIBUTES_PIECES.pick(events.tier),
    }
    presence = _presence(events)
    items = np.full(len(events), REQUIRED_ITEMS)
    for position, name in enumerate(OPTIONAL, start=REQUIRED_ITEMS + 1):
        items[presence[name]] = position
    parts = [ARRAY_HEADS.pick(items), pieces["id"], KIND_TEXTS.pick(events.kind), pieces["member"]]
    parts.append(_time(events.ts_ms))
    for position, name in enumerate(OPTIONAL, start=REQUIRED_ITEMS + 1):
        # An absent item is nil where others follow, and nothing at the end.
        nil = constant(NIL).where(~presence[name] & (position < items))
        parts.append(pieces[name].where(presence[name]).either(nil))
    return beside(*parts)


JSON_KINDS: Final = Table([kind.encode() for kind in KINDS])
JSON_CITIES: Final = Table([city.encode() for city in CITIES])
JSON_TIERS: Final = Table([tier.encode() for tier in TIERS])
JSON_LINES: Final = Table([b',["%s",%d]' % value for value in LINE_VALUES] + [b""])
JSON_FIRST_LINES: Final = Table([b'[["%s",%d]' % value for value in LINE_VALUES] + [b"["])


def _json_lines(events: Events) -> Rows:
    first, *others = events.line.T
    return beside(JSON_FIRST_LINES.pick(first), *(JSON_LINES.pick(line) for line in others), constant(b"]"))


def _json(events: Events) -> Rows:
    def quoted(text: Rows) -> Rows:
        return beside(constant(b'"'), text, constant(b'"'))

    names = {
        name: numbered(b'"' + prefix, _number_in(events, name), width, b'"') for name, (prefix, width) in NAMES.items()
    }
    values = names | {
        "ip": quoted(_address(events.ip)),
        "amount": decimal(events.amount_fen),
        "city": quoted(JSON_CITIES.pick(events.city)),
        "lines": _json_lines(events),
        "tags": constant(b'["bad_weather"]'),
    }
    presence = _presence(events)
    parts = [constant(b'{"id":'), names["id"], constant(b',"kind":'), quoted(JSON_KINDS.pick(events.kind))]
    parts += [constant(b',"member":'), names["member"], constant(b',"ts":'), decimal(events.ts_ms)]
    for name in OPTIONAL[:-1]:
        parts.append(beside(constant(b',"%s":' % name.encode()), values[name]).where(presence[name]))
    attributes = beside(
        constant(b',"tier":'), quoted(JSON_TIERS.pick(events.tier)), constant(b',"card_until":%d' % CARD_END_MS)
    )
    return beside(*parts, attributes.where(presence["attributes"]), constant(b"}"))
