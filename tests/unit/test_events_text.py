"""The shortcut for plain JSON events does what the long way does, or nothing."""

from __future__ import annotations

import msgspec
import pytest

from accrual.errors import InvalidEvent
from accrual.events import mapping_from_json
from accrual.events.text import compact_from_mapping, compact_if_plain

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
