"""The decoder: one compact event (SPEC section 7) checked against the table of section 1, and hashed."""

from libc.stdint cimport uint32_t, uint64_t

from fastpath.msgpack cimport Reader
from fastpath.rules cimport Rules
from fastpath.siphash cimport SipKey
from fastpath.types cimport Event

cdef enum:
    CACHE_BITS = 8
    CACHED_BYTES = 32

cdef struct CachedName:
    # Up to 8 bytes are the first word; up to 16 the first and the last 8 bytes; up to 32 the first and the last 16.
    uint64_t words[4]
    uint64_t hash
    uint32_t size

cdef struct Hashing:
    SipKey key
    uint64_t content_seed      # secrets of the hash of contents
    uint64_t content_factor
    CachedName names[1 << CACHE_BITS]

cdef void hashing_init(Hashing* hashing, SipKey key) noexcept nogil
# Behind `data` there must be PADDING more readable bytes. Returns where the event ends, or NULL where it is not valid.
cdef const char* decode_event(const Rules* rules, Hashing* hashing, const char* data, const char* end,
                              Event* event, int depth) noexcept nogil
cdef bint open_batch(Reader* reader, uint64_t* count) noexcept nogil
cdef bint check_batch(Reader* reader, uint64_t count) noexcept nogil
