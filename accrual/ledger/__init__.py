"""The ledger: batches of entries, columnar and chained by digest (docs/LEDGER.md), in the order they are made of.

::

    columns    integers and byte strings, packed
    wire       the keys of format 1
    records    what a batch says of its place, and the rulebooks
    entries    a batch of entries, as columns or one by one
    format     batches to bytes and back
    chain      what ties them together
    read       the ledger stream of a partition

All but ``read`` is free of I/O.
"""

from accrual.ledger.chain import Chain
from accrual.ledger.entries import EntriesBatch
from accrual.ledger.format import LedgerBatch, decode, decode_header, encode_entries
from accrual.ledger.read import LedgerReader, entry_line
from accrual.ledger.records import START, Header, Link, RulebookRecord
from accrual.ledger.wire import FORMAT, GENESIS, digest_of

__all__ = [
    "FORMAT",
    "GENESIS",
    "START",
    "Chain",
    "EntriesBatch",
    "Header",
    "LedgerBatch",
    "LedgerReader",
    "Link",
    "RulebookRecord",
    "decode",
    "decode_header",
    "digest_of",
    "encode_entries",
    "entry_line",
]
