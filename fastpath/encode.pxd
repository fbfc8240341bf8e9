"""The encoder: the entries of a batch as one ledger batch, format 1 (docs/LEDGER.md)."""

from libc.stdint cimport int64_t, uint64_t

from fastpath.decide cimport Rows, State
from fastpath.msgpack cimport Buffer
from fastpath.rules cimport Rules
from fastpath.types cimport Event

cdef int write_columns(Buffer* buffer, const Event* events, const Rows* rows) except -1 nogil
cdef void write_campaign_sets(Buffer* buffer, const Rules* rules, const State* state, const Rows* rows) noexcept nogil
