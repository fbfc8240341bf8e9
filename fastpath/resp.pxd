"""The reply reader: bytes from the socket, scanned into stream entries without a Python object for any of them."""

from libc.stdint cimport uint64_t

from fastpath.types cimport RawEntry


cdef class ReplyReader:
    cdef char* buffer
    cdef uint64_t capacity
    cdef uint64_t received     # bytes
    cdef uint64_t position     # bytes scanned for good
    cdef uint64_t wanted       # bytes that the reply is known to need at least
    cdef int state
    cdef uint64_t remaining    # entries still to be scanned
    cdef RawEntry* raw
    cdef uint64_t raw_capacity
    cdef uint64_t raw_count
    cdef uint64_t value_at
    cdef uint64_t value_size

    cdef int scan(self) except -1
    cdef void forget(self) noexcept
    cdef int reserve(self, uint64_t size) except -1
