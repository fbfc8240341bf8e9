"""The decoder: one compact event (SPEC section 7) checked against the table of section 1, and hashed."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from fastpath.msgpack cimport Reader
from fastpath.rules cimport Rules
from fastpath.siphash cimport SipKey, SipState
from fastpath.types cimport KEYS, Event

cdef enum:
    CACHE_BITS = 8
    CACHED_BYTES = 16

cdef struct Name:
    # A kind, category, city, tag or tier, and what it is to the rulebook as each of them. Up to 8 bytes are the first
    # word, up to 16 the first and the last 8.
    uint64_t first
    uint64_t second
    uint64_t hash              # 0 of the empty name
    int64_t weight             # as a category: parts of a point per fen
    int32_t kind               # numbers, or -1
    int32_t city
    int32_t tag
    uint32_t size

cdef struct Hashing:
    SipKey key
    SipState id_start          # what the hash of an id starts from, and of each key
    SipState key_starts[KEYS]
    uint64_t content_seed      # secrets of the hash of contents
    uint64_t content_factor
    Name empty
    Name long_name             # the last one of more than CACHED_BYTES
    Name names[1 << CACHE_BITS]

cdef void hashing_init(Hashing* hashing, SipKey key) noexcept nogil
# Names are looked up in the rulebook once, so another one has to be adopted here too.
cdef void hashing_adopt(Hashing* hashing, const Rules* rules) noexcept nogil
# Behind `data` there must be PADDING more readable bytes. Returns where the event ends, or NULL where it is not valid.
cdef const char* decode_event(const Rules* rules, Hashing* hashing, const char* data, const char* end,
                              Event* event) noexcept nogil
cdef bint open_batch(Reader* reader, uint64_t* count) noexcept nogil
cdef bint check_batch(Reader* reader, uint64_t count) noexcept nogil
