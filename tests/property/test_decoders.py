"""The decoders meet raw bytes: whatever comes in, they say the same as their plain twins, and never read beyond it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accrual.engine import ReferenceEngine, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.errors import InvalidEvent
from accrual.events import decode_compact, encode_compact, validate
from accrual.events.text import compact_from_mapping
from accrual.outcomes import Decision
from accrual.rulebook import parse
from fastpath.resp import ReplyReader
from replies import reply_of
from strategies import array_header, event_mappings

RULEBOOK = parse(
    """
    [programme]
    name = "fuzz"
    version = 1
    timezone = "Asia/Shanghai"
    [[earn]]
    kind = "order_paid"
    points_per_yuan = "1.5"
    category_rates = { fresh = "2", "" = "3" }
    [[limit]]
    id = "burst"
    key = "device"
    measure = "events"
    window = "60s"
    max = 1
    action = "hold"
    """
)
ARRIVAL_MS = 1794672000000
ATTRIBUTES = {"tier": "gold", "card_until": ARRIVAL_MS, "immune_until": 5, "other": [1, {"x": None}]}
LINES = [["fresh", 100], ["", 200]]
GOOD_ITEMS = [
    "e1",
    "order_paid",
    "m1",
    ARRIVAL_MS,
    300,
    "o1",
    "d1",
    "10.0.0.1",
    "138",
    "杭州",
    LINES,
    ["a"],
    ATTRIBUTES,
]
GOOD = msgspec.msgpack.encode([*GOOD_ITEMS, 7, [[]]])

keys = st.one_of(st.sampled_from(["tier", "card_until", "immune_until", "x"]), st.integers(-5, 5), st.text(max_size=5))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=70),
    st.binary(max_size=10),
    st.sampled_from(["order_paid", "order_refunded", "", "gold", 100, 300]),
)
values = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=3)), max_leaves=8
)


def decided(entries: list[StreamEntry]) -> list[Decision]:
    return [decision for _, decision in ReferenceEngine(RULEBOOK).decide_entries(entries).decisions()]


def agree(fields: tuple[tuple[bytes, bytes], ...]) -> None:
    entry = StreamEntry(ARRIVAL_MS, 1, fields)
    expected = list(ReferenceEngine(RULEBOOK).decide_entries([entry]).decisions())
    fast = FastEngine(RULEBOOK, segment_shift=3).decide_entries([entry])
    assert list(fast.decisions()) == expected


@given(st.sampled_from([b"e", b"b", b"j"]), st.binary(max_size=200))
@example(b"e", GOOD)
@example(b"e", b"\x94" + b"\x91" * 40 + b"\x90")
@example(b"b", b"\xdd\xff\xff\xff\xff")
@example(b"e", b"\xdf\xff\xff\xff\xff")
@example(b"b", b"\x91" * 34 + b"\x90")
@example(b"b", b"\x91" * 33 + b"\x90")
@example(b"b", b"\x91" * 100_000 + b"\x90")
@example(b"b", b"\x91" * 100_000)
@example(b"b", b"\x92" + b"\xdf\xff\xff\xff\xff" * 100)
@example(b"j", b"[" * 100_000)
def test_any_bytes(encoding: bytes, value: bytes) -> None:
    agree(((encoding, value),))


json_leaves = st.sampled_from(
    [
        b"1",
        b"-0",
        b"1.5",
        b"1e999",
        b"9" * 700,
        b'"a"',
        b'"[{,"',
        rb'"\\\""',
        rb'"\ud800"',
        rb'"\ud83d\ude00"',
        b" null\n",
    ]
)
json_values = st.recursive(
    json_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: b"[" + b",".join(items) + b"]"),
        st.lists(st.tuples(json_leaves.filter(lambda leaf: leaf[0] == 34), inner), max_size=2).map(
            lambda pairs: b"{" + b",".join(name + b":" + value for name, value in pairs) + b"}"
        ),
        st.tuples(st.integers(25, 40), inner).map(lambda deep: b"[" * deep[0] + deep[1] + b"]" * deep[0]),
    ),
    max_leaves=6,
)
json_fields = st.sampled_from([b"id", b"kind", b"amount", b"city", b"lines", b"tags", b"tier", b"x", b"at", rb"\ud800"])


@given(
    st.lists(st.one_of(json_values, st.lists(st.tuples(json_fields, json_values), max_size=2)), min_size=1, max_size=4)
)
def test_a_json_batch_is_its_items(items: list[bytes | list[tuple[bytes, bytes]]]) -> None:
    """Whatever an item is, if only it is JSON: what is decided on it is what is decided on it alone."""
    start = b'{"id":"e%d","kind":"order_paid","member":"m1","ts":%d,"amount":300'
    encoded = [
        item.strip()
        if isinstance(item, bytes)
        else start % (number, ARRIVAL_MS) + b"".join(b',"' + name + b'":' + value for name, value in item) + b"}"
        for number, item in enumerate(items)
    ]
    batch = StreamEntry(ARRIVAL_MS, 1, ((b"j", b"[" + b" , ".join(encoded) + b"]"),))
    alone = [StreamEntry(ARRIVAL_MS, 1, ((b"j", b"[" + item + b"]"),)) for item in encoded]
    agree(batch.fields)
    assert decided([batch]) == decided(alone)


TOO_DEEP = b"\x91" * 100_000 + b"\x90"
compact_values = values.map(msgspec.msgpack.encode)
deep_values = st.builds(
    lambda container, depth, value: container * depth + value,
    st.sampled_from([b"\x91", b"\x81\x01", b"\xdc\x00\x01"]),
    st.integers(28, 36),
    compact_values,
)
compact_items = st.one_of(
    compact_values,
    deep_values,
    st.sampled_from([GOOD, TOO_DEEP, b"\xa1\xff", b"\xd4\x01x"]),
    st.builds(
        lambda number, value: b"\x9e" + b"".join(map(msgspec.msgpack.encode, [f"x{number}", *GOOD_ITEMS[1:]])) + value,
        st.integers(0, 2),
        deep_values,
    ),
)


@given(st.lists(compact_items, min_size=1, max_size=5))
def test_a_compact_batch_is_its_items(items: list[bytes]) -> None:
    """Whatever an item is, if only its end can be found: what is decided on it is what is decided on it alone."""
    batch = StreamEntry(ARRIVAL_MS, 1, ((b"b", array_header(len(items)) + b"".join(items)),))
    agree(batch.fields)
    assert decided([batch]) == decided([StreamEntry(ARRIVAL_MS, 1, ((b"e", item),)) for item in items])


@pytest.mark.parametrize(
    ("bad", "outcomes"),
    [
        (TOO_DEEP, ["Entry", "DeadLetter", "Entry"]),
        (TOO_DEEP[:-1], ["DeadLetter"]),
        (TOO_DEEP[:-1] + b"\xc1", ["DeadLetter"]),
        (b"\xc1", ["DeadLetter"]),
        (b"\xd9\xff", ["DeadLetter"]),
        (b"\xc0\xc0", ["DeadLetter"]),
        (b"", ["DeadLetter"]),
    ],
)
def test_neighbours_of_a_bad_item_stand_where_its_end_can_be_found(bad: bytes, outcomes: list[str]) -> None:
    first, second = (msgspec.msgpack.encode([name, *GOOD_ITEMS[1:]]) for name in ("e1", "e2"))
    entry = StreamEntry(ARRIVAL_MS, 1, ((b"b", b"\x93" + first + bad + second),))
    agree(entry.fields)
    assert [type(decision).__name__ for decision in decided([entry])] == outcomes
    rejected = FastEngine(RULEBOOK, segment_shift=3).decide_entries([entry]).rejected
    assert [(item.position.index, item.original) for item in rejected] == (
        [(1, ((b"e", bad),))] if len(outcomes) == 3 else [(0, entry.fields)]
    )


@given(st.data())
def test_damaged_events(data: st.DataObject) -> None:
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(GOOD)))
    for value in (bytes(damaged), bytes(damaged[:cut]), bytes(damaged) + GOOD[:cut]):
        agree(((b"e", value),))
        agree(((b"b", b"\x92" + value + GOOD),))


@given(st.lists(values, min_size=4, max_size=15))
def test_any_items(items: list[Any]) -> None:
    good = msgspec.msgpack.decode(GOOD)
    for position, value in enumerate(items):
        mixed = [*good[:position], value, *good[position + 1 :]]
        agree(((b"e", msgspec.msgpack.encode(mixed)),))
    agree(((b"e", msgspec.msgpack.encode(items)),))


@given(st.sampled_from(range(4)), st.data())
def test_every_encoding_of_a_number(width: int, data: st.DataObject) -> None:
    """A number may be written longer than it needs to be; the event stays the same event."""
    size = 1 << width
    amount = data.draw(st.integers(0, min(2 ** (8 * size - 1) - 1, 10**12)))
    marker = data.draw(st.sampled_from([0xCC, 0xD0])) + width
    written = bytes([marker]) + amount.to_bytes(size, "big")
    head = b"".join(msgspec.msgpack.encode(item) for item in ("e1", "order_paid", "m1", ARRIVAL_MS))
    long, short = b"\x95" + head + written, b"\x95" + head + msgspec.msgpack.encode(amount)
    assert decode_compact(long) == decode_compact(short)
    batch = FastEngine(RULEBOOK, segment_shift=3).decide_entries(
        [StreamEntry(ARRIVAL_MS, 1, ((b"e", long),)), StreamEntry(ARRIVAL_MS, 2, ((b"e", short),))]
    )
    assert batch.counts.duplicates == 1


@given(event_mappings(1, ARRIVAL_MS))
def test_compact_forms_hold_the_event(mapping: dict[str, Any]) -> None:
    try:
        event = validate(mapping)
    except InvalidEvent:
        return
    assert decode_compact(encode_compact(event)) == event
    assert decode_compact(compact_from_mapping(mapping)) == event


stream_entries = st.builds(
    StreamEntry,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.lists(st.tuples(st.binary(max_size=3), st.binary(max_size=40)), min_size=1, max_size=3).map(tuple),
)


@given(
    st.lists(stream_entries, min_size=1, max_size=6),
    st.sampled_from([None, b"key"]),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_replies_in_any_pieces(entries: list[StreamEntry], key: bytes | None, pieces: list[int]) -> None:
    data = reply_of(entries, key)
    reader = ReplyReader()
    position, turn = 0, 0
    while position < len(data):
        size = pieces[turn % len(pieces)]
        complete = reader.feed(data[position : position + size])
        position, turn = position + size, turn + 1
        assert complete == (position >= len(data))
    assert reader.kind == "entries"
    assert (reader.first, reader.last) == (entries[0][:2], entries[-1][:2])
    assert [reader.fields(number) for number in range(reader.entries)] == [entry.fields for entry in entries]
    assert not reader.clear()


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=8))
def test_nonsense_from_the_server(pieces: list[bytes]) -> None:
    reader = ReplyReader()
    try:
        for piece in pieces:
            if reader.feed(piece):
                assert reader.kind in {"entries", "nothing", "error", "status"}
                assert isinstance(reader.error, str)
                assert isinstance(reader.value, bytes)
                while reader.clear():
                    pass
    except ValueError:
        # Bytes that are no reply are refused; that they are not read beyond is for the sanitizer to say.
        return


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"+OK\r\n", "status"),
        (b":12\r\n", "status"),
        (b"$3\r\nabc\r\n", "status"),
        (b"-ERR no\r\n", "error"),
        (b"*-1\r\n", "nothing"),
        (b"$-1\r\n", "nothing"),
        (b"_\r\n", "nothing"),
        (b"*0\r\n", "entries"),
    ],
)
def test_other_replies(data: bytes, kind: str) -> None:
    reader = ReplyReader()
    assert [reader.feed(data[i : i + 1]) for i in range(len(data))] == [False] * (len(data) - 1) + [True]
    assert reader.kind == kind
    assert reader.error == ("ERR no" if kind == "error" else "")
    assert reader.feed(b"+NEXT\r\n")
    assert reader.clear()
    assert reader.value == b"NEXT"


@pytest.mark.parametrize("depth", range(28, 35))
@pytest.mark.parametrize("in_batch", [False, True])
def test_nesting_is_limited_alike(depth: int, in_batch: bool) -> None:
    nested: object = 1
    for _ in range(depth):
        nested = [nested]
    start = [f"e{depth}", "order_paid", "m1", ARRIVAL_MS, 100]
    for event in ([*start, *[None] * 8, nested], [*start, *[None] * 7, {"x": nested}]):
        field = (b"b", msgspec.msgpack.encode([event])) if in_batch else (b"e", msgspec.msgpack.encode(event))
        entries = [StreamEntry(ARRIVAL_MS, 1, (field,))]
        fast, reference = (
            FastEngine(RULEBOOK).decide_entries(entries),
            ReferenceEngine(RULEBOOK).decide_entries(entries),
        )
        assert list(fast.decisions()) == list(reference.decisions())
