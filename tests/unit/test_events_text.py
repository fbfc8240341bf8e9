"""JSON events: the shortcut for plain ones does what the long way does or nothing, and only the bytes decide."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest

from accrual.engine import Decision, ReferenceEngine, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.errors import InvalidEvent
from accrual.events import items_of_json, mapping_from_json
from accrual.events.text import compact_from_mapping, compact_if_plain
from accrual.rulebook import parse
from workers import NOON_MS, RULEBOOK

T = TypeVar("T")

PLAIN = b'"id":"a","kind":"k","member":"m","ts":1'


def decoded(compact: bytes) -> list[object]:
    items: list[object] = msgspec.msgpack.decode(compact)
    return items if items[-1] is not None or len(items) < 13 else items[:-1]


@pytest.mark.parametrize(
    "data",
    [
        b"{" + PLAIN + b"}",
        b" {" + PLAIN + b"} ",
        b"{" + PLAIN + b',"id":"b"}',
        b"{" + PLAIN + b',"amount":0,"order":"","lines":[],"tags":[]}',
        b"{" + PLAIN + b',"amount":null,"lines":[["fresh",1],["",2]],"tags":["bad_weather"]}',
        b"{" + PLAIN + b',"city":"\xe6\xb8\xa9\xe5\xb7\x9e","device":"\\u6e29"}',
        b'{"id":"a","kind":"k","member":"m","ts":-5}',
        b'{"member":"m"}',
        b"{}",
    ],
)
def test_a_plain_event_comes_out_as_on_the_long_way(data: bytes) -> None:
    compact = compact_if_plain(data)
    assert compact is not None
    assert decoded(compact) == decoded(compact_from_mapping(mapping_from_json(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[{" + PLAIN + b"}]",
        b"{" + PLAIN + b',"at":7}',
        b"{" + PLAIN + b"}x",
        b"{" + PLAIN + b',"colour":"red"}',
        b"{" + PLAIN + b',"colour":"\xff"}',
        b"{" + PLAIN + b',"tier":"gold"}',
        b"{" + PLAIN + b',"amount":1.0}',
        b"{" + PLAIN + b',"amount":true}',
        b"{" + PLAIN + b',"amount":123456789012345678901234567890}',
        b"{" + PLAIN + b',"lines":[["x",1,2]]}',
        b"{" + PLAIN + b',"lines":{"x":1}}',
        b"{" + PLAIN + b',"city":"\\ud800"}',
        b"{" + PLAIN + b',"city":"\xff"}',
    ],
)
def test_everything_else_is_left_to_the_long_way(data: bytes) -> None:
    assert compact_if_plain(data) is None


def test_the_long_way_still_refuses_what_is_no_object() -> None:
    with pytest.raises(InvalidEvent):
        mapping_from_json(b"[]")


def event(name: str, rest: str = "") -> bytes:
    return b'{"id":"%s","kind":"checkin","member":"%s","ts":%d%s}' % (
        name.encode(),
        name.encode(),
        NOON_MS,
        rest.encode(),
    )


def decided(value: bytes) -> list[Decision]:
    """Return what both engines say of a stream entry with JSON."""
    entries = [StreamEntry(NOON_MS, 1, ((b"j", value),))]
    fast, reference = FastEngine(parse(RULEBOOK), segment_shift=3), ReferenceEngine(parse(RULEBOOK))
    batch, expected = fast.decide_entries(entries), reference.decide_entries(entries)
    assert batch.rejected == expected.rejected
    decisions = list(batch.decisions())
    assert decisions == list(expected.decisions())
    return [decision for _, decision in decisions]


def outcomes(value: bytes) -> list[str]:
    return [getattr(decision, "outcome", "invalid") for decision in decided(value)]


def below(frames: int, call: Callable[[], T]) -> T:
    """Call from that much deeper in the stack."""
    return call() if frames == 0 else below(frames - 1, call)


@pytest.mark.parametrize(
    ("rest", "is_valid"),
    [
        (',"x":' + "[" * 31 + "]" * 31, True),
        (',"x":' + "[" * 32 + "]" * 32, False),
        (',"x":' + '{"a":' * 31 + "1" + "}" * 31, True),
        (',"x":' + '{"a":' * 32 + "1" + "}" * 32, False),
        (',"x":[' + "[]," * 99 + "[]]", True),
        (',"x":"' + "[" * 99 + '"', True),
        (',"x":["' + '\\\\\\"[' * 99 + '\\\\"]', True),
        (',"x":' + '["]",' * 40 + "1" + ',"["]' * 40, False),
        (',"x":' + "[" * 990 + "]" * 990, False),
        (',"x":' + "[" * 100_000 + "]" * 100_000, False),
    ],
)
def test_how_deep_an_event_may_nest_depends_on_its_bytes_alone(rest: str, is_valid: bool) -> None:
    json_text = event("a", rest)
    wanted = "granted" if is_valid else "invalid"
    batch = b"[" + event("b") + b", " + json_text + b" ," + event("c") + b"]"
    for frames in (0, 300, 600):
        assert below(frames, lambda: outcomes(json_text)) == [wanted]
        assert below(frames, lambda: outcomes(batch)) == ["granted", wanted, "granted"]


@pytest.mark.parametrize("digits", [20, 30, 641, 5000])
def test_how_long_a_number_may_be_does_not_depend_on_the_interpreter(digits: int) -> None:
    long = "9" * digits
    values = [event("a", f',"x":{long}'), event("a", f',"x":-{long}'), event("a", f',"amount":{long}')]
    values += [event("a", f',"lines":[["x",{long}]]'), event("a", f',"x":0.{long}'), event("a", f',"x":1e{long}')]
    before = sys.get_int_max_str_digits()
    try:
        said = []
        for limit in (640, 0):
            sys.set_int_max_str_digits(limit)
            said.append([decided(value) for value in values])
    finally:
        sys.set_int_max_str_digits(before)
    assert said[0] == said[1]
    names = [[getattr(decision, "outcome", "invalid") for decision in decisions] for decisions in said[0]]
    assert names == [["granted"], ["granted"], ["invalid"], ["invalid"], ["granted"], ["granted"]]


@pytest.mark.parametrize(
    "rest",
    [
        ',"x":"\\ud800"',
        ',"\\udc00":1',
        ',"x":{"\\ud800":[1e999,-1e999]}',
        ',"x":1e999',
        ',"x":"\\ud83d\\u0041"',
        ',"id ":5',
    ],
)
def test_unknown_fields_are_ignored_whatever_they_hold(rest: str) -> None:
    assert outcomes(event("a", rest)) == ["granted"]
    assert outcomes(b"[" + event("a", rest) + b"," + event("b") + b"]") == ["granted", "granted"]


@pytest.mark.parametrize(
    "bad",
    [
        event("\\ud800"),
        event("a", ',"city":"\\udc00\\ud800"'),
        event("a", ',"tags":["\\ud800"]'),
        event("a", ',"lines":[["\\ud800",0]],"amount":0'),
        event("a", ',"amount":1e999'),
        event("a", ',"x":' + "[" * 2000 + "]" * 2000),
        b'"\\ud800"',
        b"1e999",
        b"[" * 2000 + b"]" * 2000,
    ],
)
def test_a_bad_item_is_a_dead_letter_and_its_neighbours_stand(bad: bytes) -> None:
    value = b" [ " + event("a") + b",\t" + bad + b" ," + event("b") + b"\n] "
    assert outcomes(value) == ["granted", "invalid", "granted"]
    assert items_of_json(value) == [event("a"), bad, event("b")]
    entries = [StreamEntry(NOON_MS, 1, ((b"j", value),))]
    (letter,) = FastEngine(parse(RULEBOOK), segment_shift=3).decide_entries(entries).rejected
    assert (letter.position.index, letter.original) == (1, ((b"j", bad),))


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("close", ["]", "}", "", "],", "] 1", "]]"])
def test_what_is_no_json_is_one_dead_letter(close: str) -> None:
    """Beside a lone surrogate too, for which there is another way to split a batch."""
    rests = [
        ",",
        "]",
        "1",
        "}",
        "[",
        '"',
        "\\",
        "nul",
        "0x1p0",
        "01",
        "\x01",
        '"a" 1',
        '"\\x"',
        "[1}",
        "{1:2}",
        '{"a"}',
    ]
    for rest in rests:
        for first in (event("a").decode(), '"\\ud800"'):
            value = f"[{first},{event('b').decode()},{rest}{close}"
            assert (outcomes(value.encode()) == ["invalid"]) != is_json(value), value
    for constant in ("NaN", "Infinity", "-Infinity"):
        assert outcomes(f'["\\ud800",{constant}]'.encode()) == ["invalid"]


def test_bytes_that_are_no_text_are_no_json() -> None:
    assert outcomes(event("a")[:-1] + b',"x":"\xff"}') == ["invalid"]
    assert outcomes(b"[" + event("a") + b"," + event("b")[:-1] + b',"x":"\xed\xa0\x80"}]') == ["invalid"]
