from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import accrual.ledger
from accrual.engine import BatchHeader, Counts, Position
from accrual.errors import LedgerError
from accrual.ledger import (
    GENESIS,
    START,
    EntriesBatch,
    RulebookRecord,
    decode,
    decode_header,
    digest_of,
    encode_entries,
    entry_line,
)
from accrual.rulebook import parse
from ledgers import EXAMPLE_RULEBOOK, EXAMPLE_SECRET, edited, example_ledger, place_after

GOLDEN = Path(__file__).with_name("test_ledger_golden.hex")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "LEDGER.md"

RECORD, ENTRIES, NONE = example_ledger()
COLUMNS = list(msgspec.msgpack.decode(ENTRIES)["columns"])


def decoded(data: bytes) -> EntriesBatch:
    batch = decode(data)
    assert isinstance(batch, EntriesBatch)
    return batch


def test_the_golden_ledger_has_not_changed() -> None:
    assert [bytes.fromhex(line) for line in GOLDEN.read_text().splitlines()] == example_ledger()


def test_the_example_in_the_document_is_the_second_batch_of_the_golden_ledger() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    block = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if not line.startswith("#")]
    assert bytes.fromhex("".join(lines)) == ENTRIES
    assert digest_of(ENTRIES).hex() in text
    assert f"0x{EXAMPLE_SECRET.fingerprint('device', 'device-1001'):016x}" in text
    assert all(f"| `{name}` |" in text for name in COLUMNS)
    lines_of_entries = [entry_line(*row).decode() for row in decoded(ENTRIES).rows()]
    assert all(line in text for line in lines_of_entries)


def test_the_keys_are_in_the_order_that_the_format_fixes() -> None:
    first = ["format", "type", "batch", "previous", "after", "through", "first_seq"]
    counts = ["stream_entries", "events", "entries", "duplicates", "dead_letters"]
    names = ["rulebook", "kinds", "campaigns", "limits", "campaign_sets", "columns"]
    assert list(msgspec.msgpack.decode(ENTRIES)) == [*first, *counts, *names]
    about = ["version", "name", "sha256", "text", "zone_rules", "slack_days"]
    assert list(msgspec.msgpack.decode(RECORD)) == [*first, *about]


def test_a_batch_of_entries_says_where_it_stands_and_what_it_counts() -> None:
    header = decode_header(ENTRIES)
    assert header == decoded(ENTRIES).header
    assert (header.batch, header.type, header.rulebook) == (2, "entries", 1)
    assert (header.previous, header.digest) == (digest_of(RECORD), digest_of(ENTRIES))
    assert (header.after, header.through) == ((0, 0), (1_794_715_201_002, 0))
    assert header.counts == Counts(stream_entries=4, events=5, entries=3, duplicates=1, dead_letters=1)
    assert header.link.next_seq == 4


def test_rows_have_everything_that_was_decided() -> None:
    (first, second, third) = decoded(ENTRIES).rows()
    assert [seq for seq, _, _ in (first, second, third)] == [1, 2, 3]
    assert third[1] == Position(1_794_715_201_000, 0, 1)
    assert (first[2].order, first[2].amount, first[2].points, first[2].campaigns) == ("o1", 3000, 60, ("member-day",))
    assert (second[2].outcome, second[2].reasons, second[2].member) == ("held", ("device-burst",), "会员二")
    assert second[2].masked == ("dev****001", "", "139****002")
    assert (third[2].outcome, third[2].cause, third[2].masked) == ("deferred", "refund", ("", "", ""))
    assert third[2].payload
    assert first[2].fingerprints[0] == second[2].fingerprints[0] == EXAMPLE_SECRET.fingerprint("device", "device-1001")


def test_the_line_of_an_entry_is_that_of_the_specification_with_its_place() -> None:
    *_, last = decoded(ENTRIES).rows()
    assert entry_line(*last) == (
        b'{"event":"e3","index":1,"kind":"order_refunded","member":"m1","outcome":"deferred",'
        b'"reasons":["refund"],"seq":3,"stream_id":"1794715201000-0"}'
    )


def test_columns_are_read_only_numpy_arrays() -> None:
    batch = decoded(ENTRIES)
    assert batch.integers("points").tolist() == [60, 25, 0]
    assert batch.integers("points").dtype == np.int64
    assert batch.integers("device").dtype == np.uint64
    assert batch.integers("observed").tolist() == [2]
    assert batch.texts("order") == ["o1", "o2", "o1"]
    assert batch.texts("device_masked") == ["dev****001"]
    assert len(batch.payloads()) == 1
    for name in ("points", "day"):
        with pytest.raises(ValueError, match="read-only"):
            batch.integers(name)[0] = 1
    for name in ("event", "nonsense"):
        with pytest.raises(KeyError):
            batch.integers(name)
    for name in ("points", "payload", "nonsense"):
        with pytest.raises(KeyError):
            batch.texts(name)


def test_a_batch_without_entries() -> None:
    batch = decoded(NONE)
    assert list(batch.rows()) == []
    assert batch.header.link.next_seq == batch.header.first_seq == 4
    assert batch.integers("points").tolist() == []


def test_a_rulebook_record_has_the_text_and_its_place() -> None:
    record = decode(RECORD)
    assert isinstance(record, RulebookRecord)
    assert record.text == EXAMPLE_RULEBOOK
    assert record.sha256 == parse(EXAMPLE_RULEBOOK).digest
    assert (record.batch, record.previous, record.through) == (1, GENESIS, (0, 0))
    assert record.encode() == RECORD
    header = decode_header(RECORD)
    assert (header.type, header.rulebook, header.link.next_seq, header.digest) == ("rulebook", 1, 1, digest_of(RECORD))
    made = RulebookRecord.of(place_after(START), parse(EXAMPLE_RULEBOOK), record.slack_days)
    assert msgspec.structs.replace(made, zone_rules=record.zone_rules) == record


def test_unknown_keys_and_columns_are_passed_over() -> None:
    batch = decoded(edited(ENTRIES, later=[{"any": 1.5}, b"\xff", None], column_shop=[0, 0, b""]))
    assert list(batch.rows()) == list(decoded(ENTRIES).rows())
    record = decode(edited(RECORD, later={"1": 2}))
    assert record == decode(RECORD)


@pytest.mark.parametrize("name", [*msgspec.msgpack.decode(ENTRIES), *(f"column_{name}" for name in COLUMNS)])
def test_a_missing_key_or_column_is_named(name: str) -> None:
    with pytest.raises(LedgerError, match=f"missing required field `{name.removeprefix('column_')}`"):
        decode(edited(ENTRIES, **{name: None}))


@pytest.mark.parametrize("name", list(msgspec.msgpack.decode(RECORD)))
def test_a_missing_key_of_a_rulebook_record_is_named(name: str) -> None:
    with pytest.raises(LedgerError, match=f"missing required field `{name}`"):
        decode(edited(RECORD, **{name: None}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, "batch 2: has format 2; this version of accrual reads format 1"),
        ({"format": 2, "columns": None, "kinds": None}, "batch 2: has format 2"),
        ({"type": "snapshot"}, "batch 2: has the unknown type 'snapshot'"),
        ({"batch": 0}, "no ledger batch"),
        ({"previous": b"short"}, "batch 2: .*previous"),
        ({"after": [1, 2, 3]}, "batch 2: .*after"),
        ({"after": [-1, 0]}, "batch 2: .*after"),
        ({"through": [0, 0]}, "batch 2: has 4 stream entries after 0-0 through 0-0"),
        ({"after": [1_794_715_201_002, 1]}, "batch 2: has 4 stream entries after"),
        ({"stream_entries": 0}, "batch 2: has 0 stream entries after"),
        ({"stream_entries": 6}, "batch 2: has 5 events from 6 stream entries"),
        ({"events": 6}, "batch 2: has 6 events, but 3 entries, 1 duplicates and 1 dead letters"),
        ({"entries": -1}, "batch 2: .*entries"),
        ({"first_seq": "1"}, "batch 2: .*first_seq"),
        ({"kinds": "order_paid"}, "batch 2: .*kinds"),
        ({"campaign_sets": [[0], [1]]}, r"batch 2: campaign_sets: \[1\] is no set of 1 campaigns"),
        ({"campaign_sets": [[0, 0], []]}, r"batch 2: campaign_sets: \[0, 0\] is no set"),
        ({"columns": {}}, "batch 2: .*columns"),
        ({"column_points": [0, 3, b""]}, r"batch 2: .*columns\.points"),
        ({"column_points": [0, 1]}, r"batch 2: .*columns\.points"),
        ({"column_points": [2**63, 0, b""]}, r"batch 2: .*columns\.points"),
        ({"column_points": [0, 1, "abc"]}, r"batch 2: .*columns\.points"),
    ],
)
def test_what_contradicts_itself_is_refused_whole(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LedgerError, match=complaint):
        decode(edited(ENTRIES, **changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"column_points": [0, 1, b"ab"]}, "points: 2 bytes, where 3 values of 1 bytes need 3"),
        ({"column_points": [2**63 - 1, 1, b"\x00\x01\x00"]}, "points: a value is beyond 64 bits"),
        ({"column_points": [1, 8, b"\xff" * 24]}, "points: a value is beyond 64 bits"),
        ({"column_kind": [6, 0, b""]}, "kind: values from 6 to 6, where 0 to 5 are possible"),
        ({"column_kind": [-1, 0, b""]}, "kind: values from -1"),
        ({"column_outcome": [5, 0, b""]}, "outcome: values"),
        ({"column_cause": [6, 0, b""]}, "cause: values"),
        ({"column_frozen": [2, 0, b""]}, "frozen: values"),
        ({"column_amount": [-2, 0, b""]}, "amount: values"),
        ({"column_ts": [0, 0, b""]}, "ts: values"),
        ({"column_day": [2**40, 0, b""]}, "day: values"),
        ({"column_campaign_set": [2, 0, b""]}, "campaign_set: values"),
        ({"column_tripped": [2, 0, b""]}, "tripped: values"),
        ({"column_tripped": [-1, 0, b""]}, "tripped: values"),
        ({"column_event": [[0, 1, b"\x02\x02"], b"e1e2e3"]}, "event: lengths: 2 bytes, where 3 values"),
        ({"column_event": [[2, 0, b""], b"e1e2e"]}, "event: 5 bytes, where the lengths add up to 6"),
        ({"column_event": [[-1, 1, b"\x00\x04\x04"], b"e1e2e"]}, "event: a length from -1 to 3 in 5 bytes"),
        ({"column_event": [[2**62, 0, b""], b"e1e2e3"]}, "event: a length from"),
        ({"column_member": [[1, 0, b""], b"a\xffb"]}, "member: .*utf-8"),
        ({"column_member": [[1, 0, b""], "€".encode()]}, "member: .*utf-8"),
        ({"column_observed": [0, 1, b""]}, "observed: 0 bytes, where 1 values"),
        ({"column_ip_masked": [[0, 0, b""], b"x"]}, "ip_masked: 1 bytes, where the lengths add up to 0"),
        ({"column_payload": [[0, 1, b""], b""]}, "payload: lengths: 0 bytes, where 1 values"),
    ],
)
def test_what_a_column_cannot_hold_is_refused_before_the_first_row(changes: dict[str, Any], complaint: str) -> None:
    batch = decoded(edited(ENTRIES, **changes))
    with pytest.raises(LedgerError, match=f"batch 2: column {complaint}"):
        batch.rows()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"text": EXAMPLE_RULEBOOK + "\n"}, "batch 1: the rulebook's text does not have the SHA-256"),
        ({"sha256": bytes(32)}, "batch 1: the rulebook's text does not have the SHA-256"),
        ({"through": [1, 0]}, "batch 1: a rulebook record that consumes"),
        ({"version": 0}, "batch 1: .*version"),
        ({"slack_days": -1}, "batch 1: .*slack_days"),
        ({"format": 7}, "batch 1: has format 7"),
    ],
)
def test_a_false_rulebook_record_is_refused(changes: dict[str, Any], complaint: str) -> None:
    for reader in (decode, decode_header):
        with pytest.raises(LedgerError, match=complaint):
            reader(edited(RECORD, **changes))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"{}",
        b"\x80",
        b"\x91" * 100_000,
        b"\x82\xa1x" + b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa6format\x01",
        b"hello, world",
        RECORD + b"\x00",
        ENTRIES + ENTRIES,
    ],
)
def test_foreign_bytes_are_refused(data: bytes) -> None:
    for reader in (decode, decode_header):
        with pytest.raises(LedgerError):
            reader(data)


def read_everything(data: bytes) -> None:
    """Read whatever there is to read; nothing but ``LedgerError`` may come out."""
    try:
        decode_header(data)
        batch = decode(data)
        if isinstance(batch, EntriesBatch):
            for row in batch.rows():
                entry_line(*row)
    except LedgerError:
        pass


@pytest.mark.parametrize("data", [RECORD, ENTRIES, NONE], ids=["record", "entries", "none"])
def test_any_byte_may_be_wrong_and_any_end_torn(data: bytes) -> None:
    for place in range(len(data)):
        read_everything(data[:place])
        for bit in range(8):
            read_everything(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])


def test_a_wrong_byte_asks_for_no_memory() -> None:
    tracemalloc.start()
    try:
        for place in range(len(ENTRIES)):
            for length_of_32_bits in (b"\xc6", b"\xdb", b"\xdd", b"\xdf"):
                read_everything(ENTRIES[:place] + length_of_32_bits + ENTRIES[place + 1 :])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_false_count_asks_for_no_memory() -> None:
    count = 10**12
    constant = [0, 0, b""]
    false = edited(
        ENTRIES,
        entries=count,
        events=count + 2,
        **{f"column_{name}": constant for name in ("at", "points", "kind", "outcome", "tripped")},
    )
    with pytest.raises(LedgerError, match="has 1000000000000 entries, but only 6 bytes of event ids"):
        decode(false)


def test_what_is_encoded_must_add_up() -> None:
    rows = [(position, entry) for _, position, entry in decoded(ENTRIES).rows()]
    rulebook = parse(EXAMPLE_RULEBOOK)
    place = BatchHeader(2, digest_of(RECORD), (0, 0), 1)
    through = (1_794_715_201_002, 0)
    assert encode_entries(place, through=through, counts=Counts(4, 5, 3, 1, 1), rulebook=rulebook, rows=rows) == ENTRIES
    with pytest.raises(LedgerError, match="batch 2: has 6 events, but 3 entries"):
        encode_entries(place, through=through, counts=Counts(4, 6, 3, 1, 1), rulebook=rulebook, rows=rows)
    with pytest.raises(LedgerError, match="batch 2: counts 3 entries, but has 2"):
        encode_entries(place, through=through, counts=Counts(4, 5, 3, 1, 1), rulebook=rulebook, rows=rows[:2])


def test_the_public_surface_is_what_the_package_says() -> None:
    public = {name for name, value in vars(accrual.ledger).items() if not name.startswith("_")}
    submodules = {"chain", "columns", "entries", "format", "read", "records", "wire"}
    assert public - submodules == set(accrual.ledger.__all__)
