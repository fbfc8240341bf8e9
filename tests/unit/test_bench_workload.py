from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import hiredis
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# Benchmarks are no part of what gets installed. At the end, so that no build of another mode is shadowed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from accrual.engine import ReferenceEngine, StreamEntry
from accrual.events import decode_compact, encode_compact, split_batch, validate
from accrual.rulebook import load
from bench.rows import Packed, Rows, Table, beside, constant, decimal, numbered
from bench.wire import ENCODINGS, EVENTS_PER_BATCH, Encoding, Entries, reply_head, xread_command
from bench.workload import CHUNK_EVENTS, DAY_START_MS, Events, Workload

ROOT = Path(__file__).resolve().parents[2]
KEY = "accrual:{p}:events"
# Where the compact form has them.
KIND, LINES = 1, 10
WORKLOAD = Workload(members=100_000, rate_per_s=20_000)
CHUNK = WORKLOAD.events(CHUNK_EVENTS, CHUNK_EVENTS)
MANY = WORKLOAD.events(0, 8 * CHUNK_EVENTS)

# Every row starts with this, because rows must be long enough for no word to reach into its neighbour.
FIRST = b"sixteen bytes..."


def packed(texts: list[bytes]) -> Packed:
    return Packed(
        np.frombuffer(b"".join(texts), np.uint8), np.append(0, np.cumsum([*map(len, texts)])).astype(np.int64)
    )


# ------------------------------------------------------------------------------------------------------ rows


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20), st.booleans()), min_size=1, max_size=30))
def test_rows_stand_side_by_side(rows: list[tuple[bytes, bytes, bool]]) -> None:
    lefts, rights, kept = [row[0] for row in rows], [row[1] for row in rows], np.array([row[2] for row in rows])
    left, right = packed(lefts).rows(), packed(rights).rows()
    both = beside(constant(FIRST), left, right.where(kept), constant(b"!")).packed()
    assert both.strings() == [FIRST + a + (b if keep else b"") + b"!" for a, b, keep in rows]
    assert both.sizes.tolist() == [len(text) for text in both.strings()]


@given(st.lists(st.integers(0, 10**18 - 1), min_size=1, max_size=30))
def test_numbers_are_written_in_decimal(numbers: list[int]) -> None:
    written = beside(constant(FIRST), decimal(np.array(numbers))).packed()
    assert written.strings() == [FIRST + b"%d" % number for number in numbers]


def test_numbers_are_written_with_zeros_in_front() -> None:
    assert numbered(b"member <", np.array([7, 1_234_567_890]), 10, b">").packed().strings() == [
        b"member <0000000007>",
        b"member <1234567890>",
    ]


def test_texts_are_picked_from_a_table() -> None:
    table = Table([b"", b"a rather long text", b"short"])
    picked = beside(constant(FIRST), table.pick(np.array([1, 0, 2, 1]))).packed().strings()
    assert picked == [FIRST + text for text in (b"a rather long text", b"", b"short", b"a rather long text")]


def test_strings_are_grouped() -> None:
    assert packed([b"a", b"bb", b"", b"c", b"d"]).grouped(2).strings() == [b"abb", b"c", b"d"]


def test_rows_that_are_too_short_are_noticed() -> None:
    with pytest.raises(AssertionError, match="too short"):
        Rows.of(np.zeros((3, 2), np.uint8)).packed()


# -------------------------------------------------------------------------------------------------- workload


def test_compact_events_are_canonical() -> None:
    events = CHUNK.compact().strings()
    assert len(events) == CHUNK_EVENTS
    assert [encode_compact(decode_compact(event)) for event in events] == events


def test_json_says_the_same() -> None:
    decoded = [validate(msgspec.json.decode(text)) for text in CHUNK.json().strings()]
    assert [encode_compact(event) for event in decoded] == CHUNK.compact().strings()


def test_the_same_parameters_give_the_same_bytes() -> None:
    again = Workload(members=100_000, rate_per_s=20_000).events(CHUNK_EVENTS, CHUNK_EVENTS)
    other = Workload(members=100_000, rate_per_s=20_000, seed=1).events(CHUNK_EVENTS, CHUNK_EVENTS)
    assert again.compact().data.tobytes() == CHUNK.compact().data.tobytes()
    assert other.compact().data.tobytes() != CHUNK.compact().data.tobytes()


def test_events_do_not_depend_on_how_many_are_made_at_once() -> None:
    part = slice(CHUNK_EVENTS, 2 * CHUNK_EVENTS)
    for name in (name for name in Events._fields if name != "duplicates"):
        assert np.array_equal(getattr(MANY, name)[part], getattr(CHUNK, name)), name


def test_the_shares_are_those_that_are_promised() -> None:
    decoded = [msgspec.msgpack.decode(event) for event in MANY.compact().strings()]
    kinds = Counter(event[KIND] for event in decoded)
    assert kinds["order_paid"] / len(decoded) == pytest.approx(0.9, abs=0.01)
    assert all(
        kinds[kind] for kind in ("checkin", "review", "vote", "group_opened", "order_refunded", "member_updated")
    )
    assert {len(event[LINES]) for event in decoded if event[KIND] == "order_paid"} == {1, 2, 3, 4}
    assert any(event[LINES + 1 :] == [["bad_weather"]] for event in decoded)


def test_the_busiest_members_bring_what_is_promised() -> None:
    counts = np.sort(np.bincount(MANY.member, minlength=WORKLOAD.members))[::-1]
    shares = np.cumsum(counts) / counts.sum()
    assert shares[WORKLOAD.members // 1000] == pytest.approx(0.10, abs=0.03)
    assert shares[WORKLOAD.members // 10] == pytest.approx(0.67, abs=0.15)


def test_duplicates_repeat_an_earlier_event_exactly_and_are_counted() -> None:
    seen: dict[str, bytes] = {}
    repeated = 0
    for event in MANY.compact().strings():
        earlier = seen.setdefault(msgspec.msgpack.decode(event)[0], event)
        assert earlier == event
        repeated += earlier is not event
    assert repeated == MANY.duplicates
    assert repeated / len(MANY) == pytest.approx(0.005, abs=0.002)


@pytest.mark.parametrize("rate_per_s", [3, 2_000, 1_000_000])
def test_time_runs_forward_at_the_rate(rate_per_s: int) -> None:
    events = Workload(members=1_000, rate_per_s=rate_per_s).events(0, 2 * CHUNK_EVENTS)
    ids = list(zip(events.arrival_ms.tolist(), events.seq.tolist(), strict=True))
    assert all(earlier < later for earlier, later in pairwise(ids))
    assert ids[-1][0] - ids[0][0] == (len(events) - 1) * 1000 // rate_per_s
    assert (events.ts_ms <= events.arrival_ms).all()
    assert events.ts_ms.min() > DAY_START_MS


def test_the_census_shows_every_key_before_the_events_begin() -> None:
    census = WORKLOAD.census(0, WORKLOAD.census_size)
    assert len(np.unique(census.device)) == WORKLOAD.devices == 120_000
    assert len(np.unique(census.member)) == len(np.unique(census.phone)) == WORKLOAD.members
    assert len(np.unique(census.ip)) == WORKLOAD.ips == 30_000
    assert census.arrival_ms.max() < MANY.arrival_ms.min()
    assert set(census.compact().strings()).isdisjoint(MANY.compact().strings())
    for name, number in (("device", WORKLOAD.devices), ("ip", WORKLOAD.ips), ("phone", WORKLOAD.members)):
        assert getattr(MANY, name).max() < number


def test_a_census_ends_within_its_hours_even_for_ten_million_members() -> None:
    large = Workload(members=10_000_000)
    last = large.census(large.census_size - 100, CHUNK_EVENTS)
    assert len(last) == 100
    assert last.arrival_ms.max() < large.events(0, CHUNK_EVENTS).arrival_ms.min()


def test_some_devices_are_farms() -> None:
    pairs = np.unique(np.stack([MANY.device, MANY.member]), axis=1)
    assert np.bincount(pairs[0]).max() >= 12


@pytest.mark.parametrize("wrong", [{"members": 999}, {"rate_per_s": 0}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Workload(**wrong)


def test_events_come_in_whole_chunks() -> None:
    with pytest.raises(ValueError, match="whole chunks"):
        WORKLOAD.events(1, CHUNK_EVENTS)


def test_the_rulebook_grants_most_and_refuses_some() -> None:
    rulebook = load(ROOT / "bench" / "rulebook.toml")
    assert (len(rulebook.earning_rules), len(rulebook.campaigns), len(rulebook.limits)) == (5, 6, 10)
    entries = [
        StreamEntry(ms, seq, ((b"e", event),))
        for ms, seq, event in zip(
            *(column[:1000].tolist() for column in CHUNK[:2]), CHUNK.compact().strings(), strict=False
        )
    ]
    batch = ReferenceEngine(rulebook).decide_entries(entries)
    assert batch.counts.dead_letters == 0
    assert batch.outcomes["granted"] > 900


# ------------------------------------------------------------------------------------------------------ wire


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_reply_and_the_commands_hold_the_same_entries(encoding: Encoding) -> None:
    entries = Entries.of(CHUNK, encoding)
    assert len(entries) == CHUNK_EVENTS // (EVENTS_PER_BATCH if encoding == "b" else 1)
    parser = hiredis.Reader()
    parser.feed(entries.reply(KEY))
    ((key, rows),) = parser.gets()
    assert key == KEY.encode()
    names = [f"{ms}-{seq}".encode() for ms, seq in zip(entries.ms.tolist(), entries.seq.tolist(), strict=True)]
    assert rows == [
        [name, [encoding.encode(), value]] for name, value in zip(names, entries.values.strings(), strict=True)
    ]
    commands = []
    for text in entries.xadd(KEY).strings():
        parser.feed(text)
        commands.append(parser.gets())
    assert commands == [[b"XADD", KEY.encode(), name, *fields] for name, fields in rows]
    assert entries.last == tuple(map(int, names[-1].split(b"-")))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_length_of_a_reply_is_known_before_it_is_made(encoding: Encoding) -> None:
    entries = Entries.of(CHUNK, encoding)
    expected = len(reply_head(KEY, len(entries))) + int(entries.reply_sizes().sum())
    assert len(entries.reply(KEY)) == expected


def test_a_batch_holds_its_events_in_order() -> None:
    batches = Entries.of(CHUNK, "b")
    assert [event for batch in batches.values.strings() for event in split_batch(batch)] == CHUNK.compact().strings()
    assert (batches.ms >= CHUNK.ts_ms.reshape(-1, EVENTS_PER_BATCH).max(axis=1)).all()


def test_a_read_is_one_command() -> None:
    parser = hiredis.Reader()
    parser.feed(xread_command(KEY, 4096, (5, 6)))
    assert parser.gets() == [b"XREAD", b"COUNT", b"4096", b"STREAMS", KEY.encode(), b"5-6"]
