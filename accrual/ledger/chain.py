"""The chain: every batch names its predecessor's digest and continues where that one ended, or it is refused."""

from __future__ import annotations

import numpy as np

from accrual.errors import LedgerError
from accrual.ledger.entries import EntriesBatch
from accrual.ledger.format import LedgerBatch, decode, decode_header
from accrual.ledger.records import START, Header, Link
from accrual.outcomes import BatchHeader

__all__ = ["Chain"]


class Chain:
    """Verifies batches that are fed to it in order. ``link`` is where it stands, and all that it keeps.

    A chain that starts from a stored ``link`` goes on as if it had seen everything before. Free of I/O.
    """

    def __init__(self, link: Link = START) -> None:
        self.link = link

    def feed(self, data: bytes) -> LedgerBatch:
        """Decode and verify the next batch, with the order of its entries. Raises ``LedgerError`` and stays put."""
        batch = decode(data)
        header = batch.header if isinstance(batch, EntriesBatch) else decode_header(data)
        self._verify(header)
        if isinstance(batch, EntriesBatch):
            _verify_order(batch)
        self.link = header.link
        return batch

    def feed_header(self, data: bytes) -> Header:
        """Verify the next batch without looking at its columns. Raises ``LedgerError`` and stays put."""
        header = decode_header(data)
        self._verify(header)
        self.link = header.link
        return header

    def _verify(self, header: Header) -> None:
        link = self.link
        place = f"batch {header.batch}"
        if header.batch != link.batch + 1:
            raise LedgerError(f"{place}: stands where batch {link.batch + 1} should be")
        if header.previous != link.digest:
            raise LedgerError(
                f"{place}: names {header.previous.hex()} as the digest of its predecessor, "
                f"but that of batch {link.batch} is {link.digest.hex()}"
            )
        _verify_continuation(header, link)
        if header.type == "entries" and link.batch == 0:
            raise LedgerError(f"{place}: a ledger begins with a rulebook, not with entries")
        if header.type == "entries" and link.rulebook not in (0, header.rulebook):
            raise LedgerError(
                f"{place}: decided by rulebook version {header.rulebook}, but {link.rulebook} is in force"
            )


def _verify_continuation(header: BatchHeader, link: Link) -> None:
    if header.after != link.through:
        raise LedgerError(
            f"batch {header.batch}: continues the stream after {_text(header.after)}, but batch {link.batch} ends at "
            f"{_text(link.through)}"
        )
    if header.first_seq != link.next_seq:
        raise LedgerError(f"batch {header.batch}: starts at seq {header.first_seq}, but {link.next_seq} is next")


def _verify_order(batch: EntriesBatch) -> None:
    """Refuse entries that are not in stream order, or outside the stretch that the batch says it consumed."""
    header = batch.header
    if header.counts.entries == 0:
        return
    ms, seq, index = (batch.integers(name) for name in ("at", "at_seq", "index"))
    same_ms = ms[1:] == ms[:-1]
    same_entry = same_ms & (seq[1:] == seq[:-1])
    ascending = (ms[1:] > ms[:-1]) | (same_ms & (seq[1:] > seq[:-1])) | (same_entry & (index[1:] > index[:-1]))
    if not ascending.all():
        number = header.first_seq + 1 + int(np.argmin(ascending))
        raise LedgerError(f"batch {header.batch}: entry {number} does not come after the one before it in the stream")
    first, last = ((int(ms[row]), int(seq[row])) for row in (0, -1))
    if not header.after < first or not last <= header.through:
        raise LedgerError(
            f"batch {header.batch}: has entries from {_text(first)} to {_text(last)}, but consumed what is after "
            f"{_text(header.after)} through {_text(header.through)}"
        )


def _text(stream_id: tuple[int, int]) -> str:
    return f"{stream_id[0]}-{stream_id[1]}"
