"""SipHash-1-3 (Aumasson and Bernstein): the keyed hash of everything an attacker may choose."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from fastpath.types cimport Hash128

cdef struct SipState:
    uint64_t v0
    uint64_t v1
    uint64_t v2
    uint64_t v3

cdef struct SipKey:
    uint64_t first
    uint64_t second


cdef inline uint64_t rotated(uint64_t value, int bits) noexcept nogil:
    return (value << bits) | (value >> (64 - bits))


cdef inline void sip_round(SipState* s) noexcept nogil:
    s.v0 += s.v1
    s.v1 = rotated(s.v1, 13) ^ s.v0
    s.v0 = rotated(s.v0, 32)
    s.v2 += s.v3
    s.v3 = rotated(s.v3, 16) ^ s.v2
    s.v0 += s.v3
    s.v3 = rotated(s.v3, 21) ^ s.v0
    s.v2 += s.v1
    s.v1 = rotated(s.v1, 17) ^ s.v2
    s.v2 = rotated(s.v2, 32)


cdef inline SipState sip_start(SipKey key, uint64_t domain) noexcept nogil:
    """Start a hash. Different domains of one key are independent hash functions."""
    cdef SipState s
    cdef uint64_t first = key.first ^ domain
    s.v0 = first ^ <uint64_t>0x736f6d6570736575
    s.v1 = key.second ^ <uint64_t>0x646f72616e646f6d
    s.v2 = first ^ <uint64_t>0x6c7967656e657261
    s.v3 = key.second ^ <uint64_t>0x7465646279746573
    return s


cdef inline void sip_word(SipState* s, uint64_t word) noexcept nogil:
    s.v3 ^= word
    sip_round(s)
    s.v0 ^= word


cdef inline uint64_t sip_finish(SipState* s) noexcept nogil:
    s.v2 ^= 0xff
    sip_round(s)
    sip_round(s)
    sip_round(s)
    return s.v0 ^ s.v1 ^ s.v2 ^ s.v3


cdef inline uint64_t load_word(const char* data) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, data, 8)
    return word


# The decoder's values lie in buffers that go on for PADDING bytes after their end: a short text can be loaded in whole
# words, of which what is not of the text is masked out, and several short items can be read before it is asked whether
# they were there (decode.pyx).
cdef enum:
    PADDING = 384

cdef extern from *:
    """
    static const uint64_t accrual_masks[9] = {
        0, 0xff, 0xffff, 0xffffff, 0xffffffff, 0xffffffffff, 0xffffffffffff, 0xffffffffffffff, 0xffffffffffffffff};
    """
    const uint64_t* MASKS "accrual_masks"


cdef inline uint64_t load_rest(const char* data, uint32_t rest) noexcept nogil:
    """Load ``rest`` (0..8) bytes."""
    return load_word(data) & MASKS[rest]


cdef inline uint64_t sip_text(SipState* s, const char* data, uint32_t size) noexcept nogil:
    """Take in a text, and return a word in which bit 7 of some byte is set if it is in the text."""
    cdef const char* last = data + (size & ~<uint32_t>7)
    cdef uint64_t word, seen = 0
    while data < last:
        word = load_word(data)
        seen |= word
        sip_word(s, word)
        data += 8
    word = load_rest(data, size & 7)
    sip_word(s, word | (<uint64_t>(size & 0xff) << 56))
    return seen | word


cdef inline uint64_t hash_text(SipKey key, uint64_t domain, const char* data, uint32_t size) noexcept nogil:
    """Return 64 bits that are never 0."""
    cdef SipState s = sip_start(key, domain)
    cdef uint64_t value
    sip_text(&s, data, size)
    value = sip_finish(&s)
    return value if value else 1


cdef inline Hash128 sip_finish_128(SipState* s) noexcept nogil:
    """Return 128 bits: the 64 of ``hash_text``, never 0, and as many more of the final state."""
    cdef Hash128 value
    value.first = sip_finish(s)
    value.second = s.v1 ^ s.v2
    if value.first == 0:
        value.first = 1
    return value
