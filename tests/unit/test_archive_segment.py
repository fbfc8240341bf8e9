"""One segment of an archive: what is written is read, and nothing else is believed."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from accrual.archive.keys import NO_KEYS, ArchiveKeys
from accrual.archive.segment import HEAD, Segment, make_segment, read_header
from accrual.errors import ArchiveError, UsageError
from accrual.events import StreamEntry
from accrual.settings import Settings
from accrual.stream import Archived

KEY, OTHER = bytes(range(32)), bytes(32)
KEYS = ArchiveKeys([KEY])
BEFORE = Archived(segments=6, digest=b"d" * 32, position=(5, 7), entries=41)
ENTRIES = [
    StreamEntry(5, 8, ((b"e", b"\x93\x01\xff"),)),
    StreamEntry(5, (1 << 64) - 1, ((b"e", b""), (b"e", b"again"), (b"", b"\x00"))),
    StreamEntry((1 << 64) - 1, 0, ((b"j", b'{"member": "13800000001"}'),)),
]


def made(key: bytes | None = KEY, before: Archived = BEFORE) -> bytes:
    return make_segment("p", before, ENTRIES, key, 1_794_715_200_000)


def rewritten(data: bytes, *, version: int = 1, **changes: Any) -> bytes:
    """Return a segment with another header and digests that are right for it."""
    _, _, size = HEAD.unpack_from(data)
    header = msgspec.msgpack.decode(data[HEAD.size : HEAD.size + size]) | changes
    encoded = msgspec.msgpack.encode(header)
    head = HEAD.pack(b"ACCRSEGM", version, len(encoded)) + encoded
    head += hashlib.sha256(head).digest()
    body = head + data[HEAD.size + size + 32 : -32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize("key", [KEY, None])
def test_what_is_written_is_read(key: bytes | None) -> None:
    segment = Segment.parse(made(key), "s")
    assert list(segment.entries(KEYS)) == ENTRIES
    header = segment.header
    assert (header.partition, header.number, header.count) == ("p", 7, 3)
    assert (header.previous_digest, header.previous_last, header.entries_before) == (b"d" * 32, (5, 7), 41)
    assert (header.first, header.last) == ((5, 8), ((1 << 64) - 1, 0))
    assert segment.standing == Archived(7, made_digest(segment), header.last, 44)


def made_digest(segment: Segment) -> bytes:
    head = segment.head + hashlib.sha256(segment.head).digest()
    return hashlib.sha256(head + segment.sealed).digest()


def test_without_the_key_nothing_of_the_entries_is_to_be_seen() -> None:
    plain, encrypted = (Segment.parse(made(key), "s").sealed for key in (None, KEY))
    assert b"13800000001" in zstandard.ZstdDecompressor().decompress(plain)
    assert zstandard.FRAME_HEADER in plain
    assert not any(plain[at : at + 4] in encrypted for at in range(len(plain) - 4))


def test_the_same_entries_are_encrypted_differently_each_time() -> None:
    assert Segment.parse(made(), "s").sealed != Segment.parse(made(), "s").sealed


def test_every_flipped_bit_is_noticed() -> None:
    data = made()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        with pytest.raises(ArchiveError, match=r"^s: "):
            list(Segment.parse(bytes(flipped), "s").entries(KEYS))


def test_every_torn_end_is_noticed() -> None:
    data = made()
    for end in range(len(data)):
        with pytest.raises(ArchiveError, match=r"^s: "):
            Segment.parse(data[:end], "s")
    with pytest.raises(ArchiveError, match="damaged"):
        Segment.parse(data + b"x", "s")


def test_the_header_is_read_from_the_first_pieces() -> None:
    data = made()
    expected = Segment.parse(data, "s").header
    assert read_header(iter([data[:5], data[5:40], data[40:]]), "s") == expected
    assert read_header(iter([data[:-40]]), "s") == expected


def test_what_is_no_segment_and_a_newer_format_are_told_apart() -> None:
    with pytest.raises(ArchiveError, match="s: is not a segment of an archive"):
        Segment.parse(b"ACCRSNAP" + made()[8:], "s")
    with pytest.raises(ArchiveError, match="s: has format 2; this version reads format 1"):
        Segment.parse(rewritten(made(), version=2), "s")


def test_another_key_and_none_are_refused() -> None:
    for keys in (NO_KEYS, ArchiveKeys([OTHER])):
        with pytest.raises(ArchiveError, match="s: is encrypted, and none of the keys"):
            list(Segment.parse(made(), "s").entries(keys))
    assert list(Segment.parse(made(), "s").entries(ArchiveKeys([OTHER, KEY]))) == ENTRIES


@pytest.mark.parametrize(
    "changes",
    [
        {"previous_digest": bytes(32)},
        {"previous_last": (5, 6)},
        {"number": 8},
        {"partition": "q"},
        {"nonce": bytes(12)},
        {"nonce": b""},
        {"created_ms": 1},
    ],
)
def test_a_header_changed_without_the_key_is_noticed(changes: dict[str, Any]) -> None:
    with pytest.raises(ArchiveError, match="s: was changed by somebody who does not have the key"):
        list(Segment.parse(rewritten(made(), **changes), "s").entries(KEYS))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"count": 2}, "does not have the entries"),
        ({"count": 0}, "does not have the entries"),
        ({"first": (5, 9)}, "does not have the entries"),
        ({"last": (6, 0)}, "does not have the entries"),
        ({"previous_last": (5, 8)}, "not in order"),
        ({"packed_bytes": 1}, "does not decompress"),
        ({"packed_bytes": 1 << 60}, "does not decompress"),
        ({"key_check": b"x" * 8}, "is encrypted"),
        ({"count": "many"}, "header does not decode"),
    ],
)
def test_a_header_that_lies_is_noticed(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ArchiveError, match=f"^s: .*{why}"):
        list(Segment.parse(rewritten(made(None), **changes), "s").entries(KEYS))


def test_entries_that_are_none_are_noticed() -> None:
    with pytest.raises(ArchiveError, match="s: its entries are not in order"):
        list(Segment.parse(make_segment("p", BEFORE, [ENTRIES[0], ENTRIES[0]], None, 1), "s").entries())


FIELDS = st.lists(st.tuples(st.binary(max_size=5), st.binary(max_size=50)), min_size=1, max_size=4).map(tuple)
IDS = st.lists(st.tuples(st.integers(1, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)), min_size=1, unique=True)


@given(ids=IDS, fields=st.lists(FIELDS, min_size=1), key=st.sampled_from([None, KEY]))
def test_any_entries_come_back_as_they_were(
    ids: list[tuple[int, int]], fields: list[tuple[tuple[bytes, bytes], ...]], key: bytes | None
) -> None:
    entries = [StreamEntry(*at, fields[number % len(fields)]) for number, at in enumerate(sorted(ids))]
    data = make_segment("p", Archived(), entries, key, 1)
    assert list(Segment.parse(data, "s").entries(KEYS)) == entries


def test_keys_come_from_the_setting_or_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{KEY.hex()}\n{OTHER.hex()}\n")
    assert ArchiveKeys.of(Settings()).newest is None
    assert ArchiveKeys.of(Settings(archive_key=KEY.hex())).newest == KEY
    assert ArchiveKeys.of(Settings(archive_key_file=str(path))).newest == KEY
    with pytest.raises(UsageError, match="give one of them"):
        ArchiveKeys.of(Settings(archive_key=KEY.hex(), archive_key_file=str(path)))


@pytest.mark.parametrize("text", ["", "abc", KEY.hex() + "0", "钥匙", KEY.hex()[:-1] + "g"])
def test_a_file_of_other_things_is_refused_without_showing_it(tmp_path: Any, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        ArchiveKeys.of(Settings(archive_key_file=str(path)))
    assert str(path) in str(refused.value)
    assert not text or text not in str(refused.value)
