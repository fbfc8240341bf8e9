"""Events: the table of SPEC section 1, its validation, and its two encodings. Free of I/O and clocks."""

from accrual.events.compact import decode_compact, encode_compact, split_batch, unpack
from accrual.events.model import (
    BUILT_IN_KINDS,
    CONTROL_KINDS,
    LIMIT_KEYS,
    MAXIMUM_AMOUNT_FEN,
    MAXIMUM_TIME_MS,
    ORDER_KIND,
    REFUND_KIND,
    Event,
    validate,
)
from accrual.events.stream_entry import Fields, StreamEntry
from accrual.events.text import arrival_of, items_of_json, mapping_from_json

__all__ = [
    "BUILT_IN_KINDS",
    "CONTROL_KINDS",
    "LIMIT_KEYS",
    "MAXIMUM_AMOUNT_FEN",
    "MAXIMUM_TIME_MS",
    "ORDER_KIND",
    "REFUND_KIND",
    "Event",
    "Fields",
    "StreamEntry",
    "arrival_of",
    "decode_compact",
    "encode_compact",
    "items_of_json",
    "mapping_from_json",
    "split_batch",
    "unpack",
    "validate",
]
