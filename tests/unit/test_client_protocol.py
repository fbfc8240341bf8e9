"""docs/PROTOCOL.md tells the truth: its dumps, its JSON, its tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from accrual.client import Confirmation, Options
from accrual.engine import Entry, ReferenceEngine, StreamEntry
from accrual.errors import InvalidEvent
from accrual.events import (
    CONTROL_KINDS,
    Event,
    decode_compact,
    encode_compact,
    items_of_json,
    mapping_from_json,
    split_batch,
    validate,
)
from accrual.outcomes import DeadLetterReason
from accrual.rulebook import parse
from accrual.stream import Checkpoint

DOCUMENT = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
RULEBOOK = """
[programme]
name = "protocol"
version = 1
timezone = "Asia/Shanghai"
[[earn]]
kind = "order_paid"
points_per_yuan = "1"
[[earn]]
kind = "checkin"
points = 5
"""
LEAST: dict[str, Any] = {"id": "i", "kind": "checkin", "member": "m", "ts": 1}


def blocks(info: str) -> list[str]:
    """Return the code blocks whose fence says ``info``."""
    return re.findall(rf"^```{info}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def dumps(info: str) -> list[bytes]:
    """Return what the hex dumps say: on each line the pairs up to the comment."""
    found = []
    for block in blocks(info):
        pairs = [re.match(r"\s*((?:[0-9a-f]{2}(?: |$))+)", line) for line in block.splitlines()]
        assert all(pairs), block
        found.append(b"".join(bytes.fromhex(match[1]) for match in pairs if match))
    return found


def table_rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table under ``heading``, without its head."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def commented_values(info: str) -> list[str]:
    """Return the texts and integers that the comments of the dumps name."""
    comments = [re.sub(r"^\s*(?:[0-9a-f]{2} )+", "", line) for block in blocks(info) for line in block.splitlines()]
    return [value for comment in comments for value in re.findall(r'"[^"]+"|\b\d{3,}\b', comment)]


def test_the_dump_is_the_event_of_the_json_example() -> None:
    order, _ = dumps("hex e")
    (item,) = items_of_json(blocks("json j")[0].encode())
    assert decode_compact(order) == validate(mapping_from_json(item))


def test_the_dump_of_the_control_event_is_its_json() -> None:
    _, control = dumps("hex e")
    (item,) = items_of_json(blocks("json j")[1].encode())
    assert decode_compact(control) == validate(mapping_from_json(item))


def test_the_dump_of_the_batch_has_the_order_and_the_check_in() -> None:
    (batch,) = dumps("hex b")
    order, checkin = split_batch(batch)
    assert order == dumps("hex e")[0]
    assert decode_compact(checkin) == validate({**LEAST, "id": "c-7-1115", "member": "m-7", "ts": 1794715201000})
    assert f"{len(order)} bytes, as it is" in DOCUMENT


def test_the_dumps_are_canonical() -> None:
    for item in [*dumps("hex e"), *split_batch(dumps("hex b")[0])]:
        assert encode_compact(decode_compact(item)) == item


@pytest.mark.parametrize("info", ["hex e", "hex b"])
def test_the_comments_name_what_the_bytes_say(info: str) -> None:
    said = "".join(repr(msgspec.msgpack.decode(value)) for value in dumps(info))
    for value in commented_values(info):
        assert value.replace('"', "'") in said or value.strip('"') in said


def test_the_examples_are_decided() -> None:
    engine = ReferenceEngine(parse(RULEBOOK))
    values = [(b"e", value) for value in dumps("hex e")]
    values += [(b"b", value) for value in dumps("hex b")]
    values += [(b"j", value.encode()) for value in blocks("json j")]
    entries = [StreamEntry(1794715203000, number, (field,)) for number, field in enumerate(values)]
    batch = engine.decide_entries(entries)
    assert batch.counts.events == 6
    assert batch.counts.dead_letters == 0
    assert batch.counts.duplicates == 3
    outcomes = {decision.event: decision.outcome for _, decision in batch.decisions() if isinstance(decision, Entry)}
    assert outcomes == {"o-1001": "granted", "u-1": "applied", "c-7-1115": "granted"}


def test_json_takes_more_than_twice_the_bytes() -> None:
    assert len(blocks("json j")[0].encode()) > 2 * len(dumps("hex e")[0])


def test_the_table_of_positions_is_the_order_of_the_array() -> None:
    rows = table_rows("An event")
    assert [int(row[0]) for row in rows] == list(range(13))
    names = [row[1].strip("`") for row in rows]
    assert names == [*(name for name in Event.__struct_fields__[:12]), "attributes"]


@pytest.mark.parametrize("row", [row for row in table_rows("An event") if row[2] == "string"], ids=lambda row: row[1])
def test_the_table_tells_the_limits_of_strings(row: list[str]) -> None:
    name, limit_bytes = row[1].strip("`"), int(re.findall(r"\d+", row[3])[-1])
    validate({**LEAST, name: "x" * limit_bytes})
    with pytest.raises(InvalidEvent, match=name):
        validate({**LEAST, name: "x" * (limit_bytes + 1)})
    with pytest.raises(InvalidEvent, match=name):
        validate({**LEAST, name: "上" * (limit_bytes // 3 + 1)})


@pytest.mark.parametrize(
    ("name", "low", "high", "text"), [("ts", 1, 2**53 - 1, "2^53 − 1"), ("amount", 0, 10**12, "10^12")]
)
def test_the_table_tells_the_limits_of_integers(name: str, low: int, high: int, text: str) -> None:
    (row,) = [row for row in table_rows("An event") if row[1] == f"`{name}`"]
    assert row[3] == f"{low} … {text}"
    for value in (low, high):
        validate({**LEAST, name: value})
    for refused in (low - 1, high + 1, float(low + 1), True):
        with pytest.raises(InvalidEvent, match=name):
            validate({**LEAST, name: refused})


@pytest.mark.parametrize(("name", "item"), [("lines", ("", 0)), ("tags", "x")])
def test_the_table_tells_the_limits_of_lists(name: str, item: object) -> None:
    (row,) = [row for row in table_rows("An event") if row[1] == f"`{name}`"]
    limit = int(re.findall(r"\d+", row[3])[0])
    validate({**LEAST, "amount": 0, name: [item] * limit})
    with pytest.raises(InvalidEvent, match=name):
        validate({**LEAST, "amount": 0, name: [item] * (limit + 1)})


def test_the_rules_for_encoders() -> None:
    least = ["i", "checkin", "m", 1]
    event = decode_compact(msgspec.msgpack.encode(least))
    same = [[*least, None, "", "", None, "", "", [], None, {}], [*least, *[None] * 9, "later"]]
    for items in same:
        assert decode_compact(msgspec.msgpack.encode(items)) == event
    for items in ([b"i", "checkin", "m", 1], ["i", "checkin", "m", 1.0], [*least, *[None] * 6, [["fresh", 1, 2]]]):
        with pytest.raises(InvalidEvent):
            decode_compact(msgspec.msgpack.encode(items))
    with pytest.raises(InvalidEvent, match="follow"):
        decode_compact(msgspec.msgpack.encode(least) + b"\xc0")
    with pytest.raises(InvalidEvent, match="empty"):
        split_batch(b"\x90")


def test_the_reasons_of_dead_letters() -> None:
    assert {row[0].strip("`") for row in table_rows("Dead letters")} == set(get_args(DeadLetterReason))


def test_the_control_kinds() -> None:
    assert {row[0].strip("`") for row in table_rows("Control events")} == CONTROL_KINDS


def test_the_fields_of_the_checkpoint() -> None:
    assert {"position", "stream_entries"} <= set(Checkpoint.__struct_fields__)


def test_what_it_says_of_the_producer() -> None:
    options = Options()
    said = f"**{options.batch_events} events, {options.batch_bytes >> 10} KiB or {options.linger_ms} ms**"
    assert said in DOCUMENT
    for confirmation in get_args(Confirmation):
        assert f'"{confirmation}"' in DOCUMENT
