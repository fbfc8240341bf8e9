"""Whatever was decided comes back from the ledger; whatever was not a ledger does not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from accrual.engine import BatchHeader, Counts, Entry, Position
from accrual.errors import LedgerError
from accrual.events import BUILT_IN_KINDS, MAXIMUM_AMOUNT_FEN, MAXIMUM_TIME_MS
from accrual.ledger import Chain, EntriesBatch, Link, decode, decode_header, digest_of, encode_entries, entry_line
from accrual.outcomes import CAUSES, Outcome
from accrual.rulebook import Campaign, EarningRule, Limit, Rulebook, Window

Rows = list[tuple[Position, Entry]]

INT64 = st.integers(-(2**63), 2**63 - 1)
WORD = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=16)
SOME_TEXT = st.text(min_size=1, max_size=16)
DIGEST = st.binary(min_size=32, max_size=32)


def names(maximum: int) -> st.SearchStrategy[list[str]]:
    return st.lists(SOME_TEXT, max_size=maximum, unique=True)


@st.composite
def rulebooks(draw: st.DrawFn) -> Rulebook:
    kinds = [kind for kind in draw(names(5)) if kind not in BUILT_IN_KINDS]
    limit_ids = draw(st.one_of(names(5), st.just([f"limit-{number}" for number in range(63)])))
    return Rulebook(
        text="",
        name="random",
        version=draw(st.integers(1, 2**31)),
        timezone="Asia/Shanghai",
        stacking="multiply",
        earning_rules=tuple(EarningRule(kind, points=1) for kind in kinds),
        campaigns=tuple(Campaign(name, Fraction(2)) for name in draw(names(20))),
        limits=tuple(Limit(name, "member", "events", Window(None), 1, "hold") for name in limit_ids),
    )


@st.composite
def entries_of(draw: st.DrawFn, rulebook: Rulebook) -> Entry:
    def chosen(ids: Sequence[str]) -> list[str]:
        mask = draw(st.integers(0, 2 ** len(ids) - 1))
        return [name for number, name in enumerate(ids) if mask >> number & 1]

    outcome = draw(st.sampled_from(get_args(Outcome)))
    evidence = tuple((limit, draw(INT64)) for limit in chosen([limit.id for limit in rulebook.limits]))
    return Entry(
        event=draw(SOME_TEXT),
        kind=draw(st.sampled_from([*(rule.kind for rule in rulebook.earning_rules), *sorted(BUILT_IN_KINDS)])),
        member=draw(TEXT),
        outcome=outcome,
        ts=draw(st.integers(1, MAXIMUM_TIME_MS)),
        day=draw(st.integers(-1, MAXIMUM_TIME_MS // 86_400_000 + 1)),
        amount=draw(st.none() | st.integers(0, MAXIMUM_AMOUNT_FEN)),
        order=draw(TEXT),
        base=draw(INT64),
        uncapped=draw(INT64),
        points=draw(INT64),
        campaigns=tuple(chosen([campaign.id for campaign in rulebook.campaigns])),
        cause=draw(st.sampled_from(CAUSES)),
        frozen_before=draw(st.booleans()),
        evidence=evidence,
        fingerprints=draw(st.tuples(WORD, WORD, WORD)),
        masked=draw(st.tuples(TEXT, TEXT, TEXT)) if evidence else ("", "", ""),
        payload=draw(st.binary(max_size=40)) if outcome == "deferred" else b"",
    )


@st.composite
def many_rows(draw: st.DrawFn, rulebook: Rulebook) -> Rows:
    """Draw a few entries and positions, and repeat them in some order: 0 to 300 rows."""
    entries = draw(st.lists(entries_of(rulebook), max_size=6))
    positions = draw(st.lists(st.builds(Position, st.integers(0, 2**63 - 1), WORD, st.integers(0, 2**32)), min_size=1))
    count = draw(st.integers(0, 300)) if entries else 0
    choice = random.Random(draw(st.integers(0, 2**32)))
    return [(choice.choice(positions), choice.choice(entries)) for _ in range(count)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[bytes, Rows]:
    rulebook = draw(rulebooks())
    rows = draw(many_rows(rulebook))
    duplicates, dead_letters = draw(st.tuples(st.integers(0, 1000), st.integers(1, 1000)))
    events = len(rows) + duplicates + dead_letters
    after = draw(st.tuples(st.integers(0, 2**64 - 2), WORD))
    through = (draw(st.integers(after[0] + 1, 2**64 - 1)), draw(WORD))
    header = BatchHeader(draw(st.integers(1, 2**40)), draw(DIGEST), after, draw(st.integers(1, 2**60)))
    counts = Counts(draw(st.integers(1, events)), events, len(rows), duplicates, dead_letters)
    return encode_entries(header, through=through, counts=counts, rulebook=rulebook, rows=rows), rows


@given(batches())
def test_what_was_decided_comes_back(batch_and_rows: tuple[bytes, Rows]) -> None:
    data, rows = batch_and_rows
    batch = decode(data)
    assert isinstance(batch, EntriesBatch)
    assert batch.header == decode_header(data)
    back = list(batch.rows())
    assert [row[1:] for row in back] == rows
    assert [row[0] for row in back] == list(range(batch.header.first_seq, batch.header.first_seq + len(rows)))
    assert batch.integers("points").tolist() == [entry.points for _, entry in rows]
    assert batch.integers("device").tolist() == [entry.fingerprints[0] for _, entry in rows]
    for row in back:
        entry_line(*row)


@given(batches(), st.data())
def test_corrupted_bytes_are_refused_or_have_another_digest(
    batch_and_rows: tuple[bytes, Rows], data: st.DataObject
) -> None:
    whole, _ = batch_and_rows
    place = data.draw(st.integers(0, len(whole) - 1))
    size = data.draw(st.integers(0, 12))
    corrupted = (
        whole[:place] + data.draw(st.binary(max_size=12)) + data.draw(st.just(whole[place + size :]) | st.just(b""))
    )
    header = decode_header(whole)
    before = Link(header.batch - 1, header.previous, header.after, header.first_seq)
    chain = Chain(before)
    try:
        batch = chain.feed(corrupted)
        if isinstance(batch, EntriesBatch):
            for row in batch.rows():
                entry_line(*row)
    except LedgerError:
        return
    assert chain.link.digest == digest_of(corrupted)
    assert (corrupted == whole) == (chain.link.digest == header.digest)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_ledger(data: bytes) -> None:
    for read in (decode, decode_header):
        try:
            read(data)
        except LedgerError:
            continue
        raise AssertionError(f"{data.hex()} was taken for a ledger batch")
