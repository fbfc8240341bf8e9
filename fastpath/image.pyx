import threading

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from fastpath.decide cimport TABLES, State
from fastpath.table cimport (
    Block,
    Header,
    Preimages,
    Table,
    line_of,
    prefetch,
    preimages_free,
    preimages_start,
    preimages_stop,
    record_at,
    region_commit,
    table_index,
)

PIECE_BYTES = 1 << 20

cdef enum:
    SLOTS_AHEAD = 16           # records between the prefetch of a slot and its use


cdef class StateImage:
    """The state as it was when the image was begun. Made by ``Core.image``.

    ``shape`` is what ``restore`` needs to know beside the bytes: plain numbers and lists.
    """

    cdef int start(self, object core, State* state) except -1:
        cdef int number
        self.core = core
        self.state = state
        self.lock = threading.Lock()
        self.names_size = state.names_size
        self.shape = {
            "latest_day": state.latest_day,
            "first_day": state.first_day,
            "slack_days": state.slack_days,
            "names_size": state.names_size,
            "tables": [[state.tables[i].stride, state.tables[i].record_count] for i in range(TABLES)],
        }
        try:
            for number in range(TABLES):
                preimages_start(&state.tables[number])
        except MemoryError:
            for number in range(TABLES):
                preimages_free(preimages_stop(&state.tables[number]))
            raise
        self.open = True
        return 0

    def __dealloc__(self):
        cdef int number
        # The state lives as long as the core, which this image holds.
        self.stop()
        for number in range(TABLES):
            preimages_free(self.ended[number])

    cdef void stop(self) noexcept:
        cdef int number
        if self.open:
            self.open = False
            for number in range(TABLES):
                self.ended[number] = preimages_stop(&self.state.tables[number])

    @property
    def description(self):
        """What ``Core.restore`` needs to know beside the bytes, as plain numbers and lists."""
        return self.shape

    @property
    def kept_bytes(self):
        """The memory of what was saved for the image, until it is discarded."""
        cdef Preimages* kept
        cdef int number
        cdef uint64_t total = 0
        with self.lock:
            for number in range(TABLES):
                kept = self.state.tables[number].preimages if self.open else self.ended[number]
                if kept != NULL:
                    total += kept.bytes
        return total

    def close(self):
        """End the image; a ``write`` that is under way fails. To be called by the thread that decides."""
        with self.lock:
            self.stop()

    def discard(self):
        """Give back the memory of an image that was closed: for another thread, since there may be gigabytes of it."""
        cdef Preimages* ended
        cdef int number
        for number in range(TABLES):
            with self.lock:
                ended = self.ended[number]
                self.ended[number] = NULL
            with nogil:
                preimages_free(ended)

    def write(self, sink):
        """Hand all of the image to ``sink``, in pieces that last as long as the call. For another thread, once.

        Returns False if the image was closed before its end, or memory ran out for it: then it is worth nothing.
        """
        cdef int number
        cdef list blocks
        cdef bytearray place = bytearray(PIECE_BYTES)
        for number, (stride, count) in enumerate(self.shape["tables"]):
            if not self.write_stretch(sink, place, self.state.tables[number].records.base, stride * count):
                return False
        if not self.write_stretch(sink, place, self.state.names.base, self.names_size):
            return False
        for number in range(TABLES):
            blocks = self.preimage_blocks(number)
            if blocks is None:
                return False
            sink(memoryview(sum([size for _, size in blocks]).to_bytes(8, "little")))
            for data, size in blocks:
                if not self.write_stretch(sink, place, <const char*><uintptr_t>data, size):
                    return False
        return True

    cdef bint write_stretch(self, sink, bytearray place, const char* base, uint64_t size) except -1:
        """Hand ``size`` bytes to ``sink``, copied to ``place`` piece by piece. Returns False if the image was closed.

        Between two pieces, and while one is copied, the thread that decides can go on.
        """
        cdef char* target = PyByteArray_AS_STRING(place)
        cdef uint64_t offset = 0, length
        while offset < size:
            length = min(size - offset, <uint64_t>PIECE_BYTES)
            with self.lock:
                if not self.open:
                    return False
                with nogil:
                    memcpy(target, base + offset, length)
            sink(memoryview(place)[:length])
            offset += length
        return True

    cdef list preimage_blocks(self, int number):
        """Return where the records are that were saved of a table so far, and how many bytes of them.

        They are all that the pieces copied before need. None if the image was closed, or memory ran out for it.
        """
        cdef Block* block
        blocks = []
        with self.lock:
            if not self.open or self.state.tables[number].preimages.failed:
                return None
            block = self.state.tables[number].preimages.first
            while block != NULL:
                blocks.append((<uintptr_t>&block.data[0], block.size))
                block = block.next
        return blocks


cdef class Stretch:
    """Memory of a state that others may fill. It keeps the state alive."""

    cdef object core
    cdef char* base
    cdef Py_ssize_t size

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.base, self.size, False, flags)


cdef int fill(object core, object source, char* base, uint64_t size) except -1:
    """Read ``size`` bytes of the image into their place."""
    cdef uint64_t offset = 0
    cdef Stretch stretch
    while offset < size:
        stretch = Stretch()
        stretch.core = core
        stretch.base = base + offset
        stretch.size = min(size - offset, <uint64_t>PIECE_BYTES)
        if source.readinto(memoryview(stretch)) != stretch.size:
            raise ValueError("it is cut short")
        offset += stretch.size
    return 0


cdef int restore_state(object core, State* state, dict shape, object source) except -1:
    """Fill an empty state of the same layout, but for the index: ``index_table`` makes it."""
    cdef int number
    cdef uint64_t size, left
    cdef bytes piece
    for number, (stride, count) in enumerate(shape["tables"]):
        if stride != state.tables[number].stride or state.tables[number].record_count:
            raise ValueError(f"the records of table {number} have {stride} bytes in the image")
        size = stride * count
        region_commit(&state.tables[number].records, size)
        fill(core, source, state.tables[number].records.base, size)
        state.tables[number].record_count = count
    size = shape["names_size"]
    region_commit(&state.names, size)
    fill(core, source, state.names.base, size)
    state.names_size = size
    for number in range(TABLES):
        left = int.from_bytes(source.read(8), "little")
        while left:
            size = 4 + <uint64_t>state.tables[number].stride
            piece = source.read(min(left, size * (<uint64_t>PIECE_BYTES // size)))
            lay_over(&state.tables[number], piece)
            left -= len(piece)
    state.latest_day = shape["latest_day"]
    state.first_day = shape["first_day"]
    for number in range(TABLES):
        state.tables[number].latest_day = state.latest_day
    return 0


cdef int lay_over(Table* table, bytes preimages) except -1:
    """Put saved records back into their places."""
    cdef const char* at = PyBytes_AS_STRING(preimages)
    cdef const char* end = at + len(preimages)
    cdef uint32_t record
    if len(preimages) == 0 or len(preimages) % (4 + <uint64_t>table.stride):
        raise ValueError("a saved record is cut short")
    while at < end:
        memcpy(&record, at, 4)
        if record >= table.record_count:
            raise ValueError(f"record {record} was saved, but the image has only {table.record_count}")
        memcpy(record_at(table, record), at + 4, table.stride)
        at += 4 + table.stride
    return 0


cdef int index_table(Table* table) except -1 nogil:
    """Make the index of a table from its records."""
    cdef uint32_t record
    for record in range(table.record_count):
        if record + SLOTS_AHEAD < table.record_count:
            prefetch(line_of(table, (<Header*>record_at(table, record + SLOTS_AHEAD)).first))
        table_index(table, record)
    return 0
