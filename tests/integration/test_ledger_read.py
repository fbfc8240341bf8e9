"""The ledger read back from a real server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import redis

from accrual.engine import BatchHeader, Counts
from accrual.errors import LedgerError, UsageError
from accrual.ledger import Chain, EntriesBatch, LedgerReader, RulebookRecord, decode_header, encode_entries
from accrual.rulebook import parse
from accrual.stream import Keys
from ledgers import EXAMPLE_RULEBOOK, edited, example_ledger, place_after
from servers import Server

pytestmark = pytest.mark.both_servers

KEYS = Keys("test")
LEDGER = example_ledger()
RECORD, ENTRIES, NONE = LEDGER


def write(client: redis.Redis, batches: Sequence[bytes], checkpoint: bytes | None = None) -> None:
    """Write ``batches`` as a worker would, and the checkpoint at the last of them, or at the one given."""
    for number, data in enumerate(batches, start=1):
        client.xadd(KEYS.ledger, {"batch": data}, f"{number}-0")
    header = decode_header(checkpoint or batches[-1])
    client.hset(KEYS.checkpoint, mapping={"batch": header.batch, "digest": header.digest.hex()})


def long_ledger(length: int) -> list[bytes]:
    """Return the example, continued by batches without entries, with a second rulebook on the way."""
    batches = list(LEDGER)
    rulebook = parse(EXAMPLE_RULEBOOK)
    second = parse(EXAMPLE_RULEBOOK.replace("version = 1", "version = 2"))
    while len(batches) < length:
        place: BatchHeader = place_after(decode_header(batches[-1]).link)
        if len(batches) == length // 2:
            rulebook = second
            batches.append(RulebookRecord.of(place, second, 1).encode())
        else:
            through = (place.after[0] + 1, 0)
            batches.append(
                encode_entries(place, through=through, counts=Counts(1, 1, 0, 1, 0), rulebook=rulebook, rows=[])
            )
    return batches


def test_a_ledger_comes_back_verified(server: Server) -> None:
    client = server.client()
    write(client, LEDGER)
    reader = LedgerReader(client, "test")
    assert [batch.batch for batch in reader.batches()] == [1, 2, 3]
    assert [(seq, position.index, entry.event) for seq, position, entry in reader.entries()] == [
        (1, 0, "e1"),
        (2, 0, "e2"),
        (3, 1, "e3"),
    ]
    assert reader.last_batch() == 3


def test_an_empty_ledger_has_nothing(valkey: Server) -> None:
    reader = LedgerReader(valkey.client(), "test")
    assert list(reader.entries()) == []
    assert reader.last_batch() == 0
    with pytest.raises(LedgerError, match="no rulebook"):
        reader.rulebook_at(1)


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 8 << 20])
def test_pages_of_any_size_give_the_same(valkey: Server, chunk_bytes: int) -> None:
    client = valkey.client()
    batches = long_ledger(300)
    write(client, batches)
    reader = LedgerReader(client, "test", chunk_bytes=chunk_bytes)
    assert [batch.batch for batch in reader.batches()] == list(range(1, 301))
    assert [batch.batch for batch in reader.batches(from_batch=298)] == [298, 299, 300]
    assert list(reader.batches(from_batch=301)) == []
    assert [reader.rulebook_at(batch).version for batch in (1, 2, 150, 151, 152, 300, 999)] == [1, 1, 1, 2, 2, 2, 2]


def test_the_server_never_stands_still_for_a_large_answer(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client = valkey.client()
    for number in range(1, 101):
        client.xadd(KEYS.ledger, {"batch": bytes(20_000)}, f"{number}-0")
    answered: list[int] = []
    xrange = client.xrange

    def measured(*arguments: Any) -> Any:
        page: Any = xrange(*arguments)
        answered.append(sum(len(fields[b"batch"]) for _, fields in page))
        return page

    monkeypatch.setattr(client, "xrange", measured)
    assert [number for number, _ in LedgerReader(client, "test").values(1, 100)] == list(range(1, 101))
    assert max(answered) <= 256 << 10
    assert len(answered) < 15


def test_a_chain_is_continued_where_it_stands(valkey: Server) -> None:
    client = valkey.client()
    write(client, LEDGER[:2])
    reader, chain = LedgerReader(client, "test"), Chain()
    seen = []
    for batch in reader.batches(chain=chain):
        assert chain.link.batch == batch.batch
        seen.append(chain.link)
    client.xadd(KEYS.ledger, {"batch": NONE}, "3-0")
    assert [batch.batch for batch in reader.batches(chain=chain)] == [3]
    assert [batch.batch for batch in reader.batches(chain=Chain(seen[0]))] == [2, 3]
    assert list(reader.entries(chain=chain)) == []


def test_reading_ends_where_the_ledger_ended_at_the_start(valkey: Server) -> None:
    client = valkey.client()
    write(client, LEDGER[:2])
    batches = LedgerReader(client, "test").batches()
    next(batches)
    client.xadd(KEYS.ledger, {"batch": NONE}, "3-0")
    assert [batch.batch for batch in batches] == [2]


@pytest.mark.parametrize(
    ("gone", "from_batch", "complaint"),
    [
        ("1-0", 1, "batch 2: stands where batch 1 should be"),
        ("2-0", 1, "batch 3: stands where batch 2 should be"),
        ("2-0", 3, "batch 2: is missing"),
        ("3-0", 1, "the ledger ends at batch 2, but the checkpoint is at batch 3"),
    ],
)
def test_a_missing_batch_is_named(valkey: Server, gone: str, from_batch: int, complaint: str) -> None:
    client = valkey.client()
    write(client, LEDGER)
    client.xdel(KEYS.ledger, gone)
    with pytest.raises(LedgerError, match=complaint):
        list(LedgerReader(client, "test").batches(from_batch))


def test_an_altered_batch_is_found_even_at_the_end(valkey: Server) -> None:
    client = valkey.client()
    altered = ENTRIES.replace(b"o1o2o1", b"o1o2o9")
    write(client, [RECORD, altered], checkpoint=ENTRIES)
    reader = LedgerReader(client, "test")
    with pytest.raises(LedgerError, match=r"batch 2: its digest is .*, but the checkpoint says"):
        list(reader.entries())
    unverified = LedgerReader(client, "test", verified=False)
    assert [entry.order for _, _, entry in unverified.entries()] == ["o1", "o2", "o9"]


def test_a_ledger_that_went_back_behind_what_was_read_is_refused(valkey: Server) -> None:
    client = valkey.client()
    write(client, LEDGER[:1])
    chain = Chain()
    for data in LEDGER:
        chain.feed(data)
    with pytest.raises(LedgerError, match=r"ends at batch 1, .* batch 3 was read before"):
        list(LedgerReader(client, "test").batches(chain=chain))


def test_strangers_in_the_stream_are_refused(valkey: Server) -> None:
    client = valkey.client()
    client.xadd(KEYS.ledger, {"batch": edited(RECORD, batch=5)}, "1-0")
    for verified in (True, False):
        with pytest.raises(LedgerError, match="batch"):
            list(LedgerReader(client, "test", verified=verified).batches())
    client.xadd(KEYS.ledger, {"other": b"x"}, "2-0")
    with pytest.raises(LedgerError, match=r"batch 2: its stream entry has no field `batch`"):
        list(LedgerReader(client, "test").batches(from_batch=3))
    client.xadd(KEYS.ledger, {"batch": ENTRIES}, "3-1")
    with pytest.raises(LedgerError, match="3-1, which is no batch number"):
        LedgerReader(client, "test").last_batch()


def test_what_cannot_be_asked_for(valkey: Server) -> None:
    client = valkey.client()
    with pytest.raises(UsageError, match="numbered from 1"):
        list(LedgerReader(client, "test").batches(from_batch=0))
    with pytest.raises(UsageError, match="partition"):
        LedgerReader(client, "no such name")


def test_an_order_is_found_by_its_column(valkey: Server) -> None:
    client = valkey.client()
    write(client, LEDGER)
    found = [
        (seq, entry.event)
        for batch in LedgerReader(client, "test").batches()
        if isinstance(batch, EntriesBatch) and "o1" in batch.texts("order")
        for seq, _, entry in batch.rows()
        if entry.order == "o1"
    ]
    assert found == [(1, "e1"), (3, "e3")]
