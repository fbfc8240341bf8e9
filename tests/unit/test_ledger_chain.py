from __future__ import annotations

from typing import Any

import pytest

from accrual.errors import LedgerError
from accrual.ledger import START, Chain, EntriesBatch, RulebookRecord, decode, decode_header, digest_of
from ledgers import edited, example_ledger

LEDGER = example_ledger()
RECORD, ENTRIES, NONE = LEDGER


def chain_through(count: int) -> Chain:
    chain = Chain()
    for data in LEDGER[:count]:
        chain.feed(data)
    return chain


def test_a_whole_ledger_passes_and_leaves_its_end() -> None:
    chain = Chain()
    kinds = [type(chain.feed(data)) for data in LEDGER]
    assert kinds == [RulebookRecord, EntriesBatch, EntriesBatch]
    link = chain.link
    assert (link.batch, link.digest, link.next_seq, link.rulebook) == (3, digest_of(NONE), 4, 1)
    assert link.through == (1_794_715_202_000, 0)


def test_headers_alone_are_chained_in_the_same_way() -> None:
    chain = Chain()
    assert [chain.feed_header(data) for data in LEDGER] == [decode_header(data) for data in LEDGER]
    assert chain.link == chain_through(3).link


def test_a_chain_goes_on_from_a_stored_link() -> None:
    chain = Chain(chain_through(1).link)
    chain.feed(ENTRIES)
    assert chain.link == chain_through(2).link


def test_an_altered_batch_is_found_by_the_one_after_it() -> None:
    altered = ENTRIES.replace(b"o1o2o1", b"o1o2o9")
    decode(altered)
    chain = chain_through(1)
    chain.feed(altered)
    with pytest.raises(LedgerError, match=f"batch 3: names {digest_of(ENTRIES).hex()}.*{digest_of(altered).hex()}"):
        chain.feed(NONE)


@pytest.mark.parametrize(
    ("before", "data", "complaint"),
    [
        (0, ENTRIES, "batch 2: stands where batch 1 should be"),
        (1, NONE, "batch 3: stands where batch 2 should be"),
        (2, ENTRIES, "batch 2: stands where batch 3 should be"),
        (1, edited(ENTRIES, previous=bytes(32)), "batch 2: names 0000"),
        (1, edited(ENTRIES, after=[7, 0]), "batch 2: continues the stream after 7-0, but batch 1 ends at 0-0"),
        (1, edited(ENTRIES, first_seq=2), "batch 2: starts at seq 2, but 1 is next"),
        (1, edited(ENTRIES, rulebook=2), "batch 2: decided by rulebook version 2, but 1 is in force"),
        (0, edited(ENTRIES, batch=1, previous=bytes(32)), "batch 1: a ledger begins with a rulebook"),
    ],
)
def test_what_does_not_continue_the_ledger_is_refused(before: int, data: bytes, complaint: str) -> None:
    for feed in ("feed", "feed_header"):
        chain = chain_through(before)
        link = chain.link
        with pytest.raises(LedgerError, match=complaint):
            getattr(chain, feed)(data)
        assert chain.link == link


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"column_index": [0, 0, b""]}, "batch 2: entry 3 does not come after the one before it"),
        ({"column_at": [1_794_715_200_003, 2, b"\x00\x00\xe5\x03\x00\x00"]}, "batch 2: entry 3 does not come after"),
        ({"column_at_seq": [0, 1, b"\x00\x02\x01"]}, "batch 2: entry 3 does not come after"),
        ({"through": [1_794_715_200_999, 0]}, "batch 2: has entries from 1794715200003-0 to 1794715201000-0"),
        ({"column_at": [0, 8, bytes(8) + b"\x01" + bytes(7) + b"\x01" + bytes(7)]}, "batch 2: has entries from 0-0"),
    ],
)
def test_entries_out_of_stream_order_are_refused(changes: dict[str, Any], complaint: str) -> None:
    chain = chain_through(1)
    with pytest.raises(LedgerError, match=complaint):
        chain.feed(edited(ENTRIES, **changes))


def test_rulebooks_change_only_by_their_records() -> None:
    chain = chain_through(3)
    link = chain.link
    place = {"batch": 4, "previous": link.digest, "first_seq": link.next_seq, "version": 2}
    chain.feed(edited(RECORD, **place, after=list(link.through), through=list(link.through)))
    assert (chain.link.rulebook, chain.link.through, chain.link.next_seq) == (2, link.through, link.next_seq)


def test_the_beginning_names_nothing() -> None:
    assert (START.batch, START.digest, START.through, START.next_seq, START.rulebook) == (0, bytes(32), (0, 0), 1, 0)
