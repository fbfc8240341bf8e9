"""The plain reply reader and the compiled one see the same entries, however the bytes come in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.engine import StreamEntry
from accrual.stream import PlainReplyReader, Reader, command, open_reader
from accrual.stream.resp import command_around
from replies import reply_of

words = st.binary(max_size=20)
entries = st.builds(
    StreamEntry,
    st.integers(0, 2**53),
    st.integers(0, 2**64 - 1),
    st.lists(st.tuples(words, words), min_size=1, max_size=4).map(tuple),
)
plain_replies = st.sampled_from(
    [b"*-1\r\n", b"$-1\r\n", b"*0\r\n", b"+OK\r\n", b":7\r\n", b"-OOM no room\r\n", b"$2\r\nhi\r\n"]
)


replies = st.one_of(
    plain_replies,
    st.builds(reply_of, st.lists(entries, min_size=1, max_size=6), st.sampled_from([None, b"key"])),
)


def receive(reader: Reader, data: bytes, sizes: list[int]) -> list[Any]:
    """Feed ``data`` in pieces of the given sizes, in turn, and return what the reader held, reply by reply."""
    seen = []
    at = number = 0
    while at < len(data):
        piece = data[at : at + sizes[number % len(sizes)]]
        target = reader.get_buffer(len(piece))
        piece = piece[: len(target)]
        target[: len(piece)] = piece
        at, number = at + len(piece), number + 1
        complete = reader.buffer_updated(len(piece))
        while complete:
            seen.append(held(reader))
            complete = reader.clear()
        assert reader.kind is None
    return seen


def held(reader: Any) -> Any:
    rows = reader.rows if isinstance(reader, PlainReplyReader) else None
    fields = [row.fields for row in rows] if rows is not None else [reader.fields(n) for n in range(reader.entries)]
    last = reader.last if reader.entries else None
    value = reader.value if reader.kind == "status" and reader.value != b"7" else b""
    return reader.kind, reader.entries, last, fields, reader.error, value


@given(st.lists(replies, min_size=1, max_size=5), st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_both_readers_see_the_same(sent: list[bytes], sizes: list[int]) -> None:
    data = b"".join(sent)
    plain = receive(open_reader("reference"), data, sizes)
    compiled = receive(open_reader("fast"), data, sizes)
    assert len(plain) == len(sent)
    assert plain == compiled


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_what_was_received_before_a_new_connection_is_forgotten(engine: str) -> None:
    reader = open_reader(engine)
    whole = reply_of([StreamEntry(1, 2, ((b"e", b"x"),))], b"key")
    target = reader.get_buffer(100)
    target[:10] = whole[:10]
    assert not reader.buffer_updated(10)
    reader.abandon()
    assert receive(reader, whole, [1000])[0][:3] == ("entries", 1, (1, 2))


@given(st.lists(st.one_of(words, st.integers(), st.text(max_size=5)), min_size=1, max_size=5), words)
def test_a_command_in_pieces_is_the_command(arguments: list[bytes | int | str], value: bytes) -> None:
    for split in range(len(arguments) + 1):
        pieces = command_around(arguments[:split], value, arguments[split:])
        assert pieces[1] is value
        assert b"".join(pieces) == command(*arguments[:split], value, *arguments[split:])
