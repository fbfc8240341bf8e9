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
    uint32_t size
    char text[CACHED_BYTES]
    uint64_t hash

cdef struct NameCache:
    # Hashes of the names seen last.
    CachedName names[1 << CACHE_BITS]

cdef bint decode_event(const Rules* rules, NameCache* cache, SipKey key, const char* data, uint64_t size,
                       Event* event) noexcept nogil
cdef bint open_batch(Reader* reader, uint64_t* count) noexcept nogil
