"""The ledger of a partition, read from its stream in bounded memory and verified on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import redis

from accrual.errors import LedgerError, UsageError
from accrual.ledger.chain import Chain
from accrual.ledger.entries import EntriesBatch
from accrual.ledger.format import LedgerBatch, decode, decode_header
from accrual.ledger.records import Header, Link, RulebookRecord
from accrual.outcomes import Entry, Position, outcome_line
from accrual.stream.checkpoint import Checkpoint
from accrual.stream.keys import Keys

__all__ = ["LedgerReader", "entry_line"]

# The server does nothing else while it puts a reply together. That takes a tenth of a millisecond at 256 KiB and ten at
# 8 MiB, for which it gets fresh memory from the system every time; readers are as fast either way.
CHUNK_BYTES: Final = 256 << 10
MAXIMUM_CHUNK_BATCHES: Final = 256


class LedgerReader:
    """Reads the ledger of ``partition`` through a synchronous redis-py client (``decode_responses`` off).

    Unless ``verified`` is switched off, batches go through a ``Chain``, and what is read must reach the checkpoint and
    have its digest there, so that neither a changed nor a missing batch goes unnoticed. It reads up to the end found at
    start. About ``chunk_bytes`` are fetched at a time. Raises ``LedgerError``; errors of the client pass through.
    """

    def __init__(
        self, client: redis.Redis, partition: str, *, verified: bool = True, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._client = client
        self._keys = Keys(partition)
        self._verified = verified
        self._chunk_bytes = chunk_bytes

    def last_batch(self) -> int:
        """Return the number of the last batch, 0 for an empty ledger."""
        page: Any = self._client.xrevrange(self._keys.ledger, "+", "-", 1)
        return _number(page[0][0]) if page else 0

    def batches(self, from_batch: int = 1, chain: Chain | None = None) -> Iterator[LedgerBatch]:
        """Yield the batches in order, from number ``from_batch`` on.

        A ``chain`` that is given is continued from where it stands, and ``from_batch`` is ignored: after each batch its
        ``link`` is what to keep for going on from there another day.
        """
        if chain is None:
            chain = self._chain_before(from_batch)
        # The checkpoint is read first: batches that land afterwards only make the ledger longer than it says.
        checkpoint = self._checkpoint() if self._verified else Checkpoint()
        last = self.last_batch()
        if last < max(checkpoint.batch, chain.link.batch):
            raise LedgerError(
                f"the ledger ends at batch {last}, but the checkpoint is at batch {checkpoint.batch} and batch "
                f"{chain.link.batch} was read before"
            )
        _compare(chain.link, checkpoint)
        for number, data in self.values(chain.link.batch + 1, last):
            if not self._verified:
                yield _decoded(number, data, chain)
                continue
            batch = chain.feed(data)
            _compare(chain.link, checkpoint)
            yield batch
        if chain.link.batch < last:
            raise LedgerError(f"batch {chain.link.batch + 1}: is missing")

    def entries(self, from_batch: int = 1, chain: Chain | None = None) -> Iterator[tuple[int, Position, Entry]]:
        """Yield ``(seq, position, entry)`` of all entries, in order, as ``batches`` yields the batches."""
        for batch in self.batches(from_batch, chain):
            if isinstance(batch, EntriesBatch):
                yield from batch.rows()

    def rulebook_at(self, batch: int) -> RulebookRecord:
        """Return the rulebook that was in force at ``batch``: the last one recorded up to and including it.

        It is looked for backwards, so the time grows with the distance; nothing but the record itself is verified.
        """
        upper, size = batch, 1
        while upper >= 1:
            page: Any = self._client.xrevrange(self._keys.ledger, f"{upper}-0", "-", size)
            if not page:
                break
            for entry_id, fields in page:
                data = _value(_number(entry_id), fields)
                if decode_header(data).type == "rulebook":
                    record = decode(data)
                    assert isinstance(record, RulebookRecord)
                    return record
            upper = _number(page[-1][0]) - 1
            size = self._page_size(size, page)
        raise LedgerError(f"the ledger has no rulebook up to batch {batch}")

    def _chain_before(self, batch: int) -> Chain:
        """Return a chain that ``batch`` continues, which takes its predecessor's word for all that was before."""
        if batch < 1:
            raise UsageError(f"batch {batch}: batches are numbered from 1")
        if batch == 1:
            return Chain()
        for _, data in self.values(batch - 1, batch - 1):
            return Chain(_placed(batch - 1, decode_header(data)).link)
        raise LedgerError(f"batch {batch - 1}: is missing")

    def _checkpoint(self) -> Checkpoint:
        names = (b"batch", b"digest")
        values: Any = self._client.hmget(self._keys.checkpoint, names)
        return Checkpoint.from_hash({name: value for name, value in zip(names, values, strict=True) if value})

    def values(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Yield the numbers and bytes of batches ``first`` to ``last``, as far as they are there."""
        size = 1
        while first <= last:
            page: Any = self._client.xrange(self._keys.ledger, f"{first}-0", f"{last}-0", size)
            if not page:
                return
            for entry_id, fields in page:
                number = _number(entry_id)
                yield number, _value(number, fields)
            first = _number(page[-1][0]) + 1
            size = self._page_size(size, page)

    def _page_size(self, size: int, page: Any) -> int:
        """Return how many batches to ask for next, from the largest one seen in the page before."""
        largest = max(len(value) for _, fields in page for value in fields.values())
        return max(1, min(2 * size, self._chunk_bytes // max(1, largest), MAXIMUM_CHUNK_BATCHES))


def _number(entry_id: bytes) -> int:
    number, _, rest = entry_id.partition(b"-")
    if rest != b"0":
        raise LedgerError(f"the ledger stream has the entry {entry_id.decode()}, which is no batch number")
    return int(number)


def _value(number: int, fields: dict[bytes, bytes]) -> bytes:
    value = fields.get(b"batch")
    if value is None:
        raise LedgerError(f"batch {number}: its stream entry has no field `batch`")
    return value


def _placed(number: int, header: Header) -> Header:
    if header.batch != number:
        raise LedgerError(f"batch {number}: its stream entry holds batch {header.batch}")
    return header


def _decoded(number: int, data: bytes, chain: Chain) -> LedgerBatch:
    """Decode without verifying, but keep the chain where the reader stands."""
    chain.link = _placed(number, decode_header(data)).link
    return decode(data)


def _compare(link: Link, checkpoint: Checkpoint) -> None:
    if link.batch == checkpoint.batch and link.digest != checkpoint.digest:
        raise LedgerError(
            f"batch {link.batch}: its digest is {link.digest.hex()}, but the checkpoint says {checkpoint.digest.hex()}"
        )


def entry_line(seq: int, position: Position, entry: Entry) -> bytes:
    """Return the line of JSON (no newline) that ``accrual ledger`` prints for an entry (SPEC section 8)."""
    return outcome_line(entry, seq=seq, stream_id=position.stream_id, index=position.index)
