"""Images: the state at a batch boundary, written by another thread while the engine goes on.

The writer copies the arrays of records as they are at that moment, which is any mixture of before and after. What makes
the copy whole is that the engine saves each record before its first change (`Preimages`): laid over the copy, they give
the state as it was when the image was begun. The index is not written; it is made anew from the records.
"""

from libc.stdint cimport uint64_t

from fastpath.decide cimport TABLES, State
from fastpath.table cimport Preimages, Table


cdef class StateImage:
    cdef object core           # keeps the state alive
    cdef State* state
    cdef object lock           # held while a piece is copied, and while the image ends
    cdef bint open
    cdef dict shape
    cdef uint64_t names_size
    cdef Preimages* ended[TABLES]
    cdef int start(self, object core, State* state) except -1
    cdef void stop(self) noexcept
    cdef bint write_stretch(self, sink, bytearray place, const char* base, uint64_t size) except -1
    cdef list preimage_blocks(self, int number)


cdef int restore_state(object core, State* state, dict shape, object source) except -1
cdef int index_table(Table* table) except -1 nogil
