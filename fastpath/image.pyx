import threading

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from fastpath.decide cimport TABLES, State
from fastpath.table cimport (
    Block,
    Table,
    preimages_start,
    preimages_stop,
    record_at,
    region_commit,
    table_index,
)

PIECE_BYTES = 4 << 20


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
                preimages_stop(&state.tables[number])
            raise
        self.open = True
        return 0

    def __dealloc__(self):
        # The state lives as long as the core, which this image holds.
        self.stop()

    cdef void stop(self) noexcept:
        cdef int number
        if self.open:
            self.open = False
            for number in range(TABLES):
                preimages_stop(&self.state.tables[number])

    @property
    def description(self):
        """What ``Core.restore`` needs to know beside the bytes, as plain numbers and lists."""
        return self.shape

    def close(self):
        """End the image; a ``write`` that is under way fails. To be called by the thread that decides."""
        with self.lock:
            self.stop()

    def write(self, sink):
        """Hand all of the image to ``sink``, in pieces of ``bytes``. To be called by another thread, once.

        Returns False if the image was closed before its end, or memory ran out for it: then it is worth nothing.
        """
        cdef int number
        cdef uint64_t offset, size
        for number, (stride, count) in enumerate(self.shape["tables"]):
            size = stride * count
            offset = 0
            while offset < size:
                piece = self.records_piece(number, offset, min(size - offset, <uint64_t>PIECE_BYTES))
                if piece is None:
                    return False
                sink(piece)
                offset += len(piece)
        if self.names_size:
            piece = self.names_piece()
            if piece is None:
                return False
            sink(piece)
        for number in range(TABLES):
            blocks = self.preimage_blocks(number)
            if blocks is None:
                return False
            sink(sum(map(len, blocks)).to_bytes(8, "little"))
            for block in blocks:
                sink(block)
        return True

    cdef bytes records_piece(self, int number, uint64_t offset, uint64_t size):
        """Return a piece of a table's records as they are now, or None if the image was closed."""
        cdef bytes piece = PyBytes_FromStringAndSize(NULL, size)
        cdef char* target = PyBytes_AS_STRING(piece)
        with self.lock:
            if not self.open:
                return None
            with nogil:
                memcpy(target, self.state.tables[number].records.base + offset, size)
        return piece

    cdef bytes names_piece(self):
        with self.lock:
            return self.state.names.base[:self.names_size] if self.open else None

    cdef list preimage_blocks(self, int number):
        """Return what was saved of a table's records so far, which is all that the pieces copied before need."""
        cdef Block* block
        blocks = []
        with self.lock:
            if not self.open or self.state.tables[number].preimages.failed:
                return None
            block = self.state.tables[number].preimages.first
            while block != NULL:
                blocks.append(block.data[:block.size])
                block = block.next
        return blocks


cdef int restore_state(State* state, dict shape, object read) except -1:
    """Fill an empty state of the same layout. ``read(n)`` returns the next ``n`` bytes of the image."""
    cdef int number
    cdef uint64_t offset, size, left
    cdef bytes piece
    for number, (stride, count) in enumerate(shape["tables"]):
        if stride != state.tables[number].stride or state.tables[number].record_count:
            raise ValueError(f"the records of table {number} have {stride} bytes in the image")
        size = stride * count
        region_commit(&state.tables[number].records, size)
        offset = 0
        while offset < size:
            piece = read(min(size - offset, <uint64_t>PIECE_BYTES))
            memcpy(state.tables[number].records.base + offset, PyBytes_AS_STRING(piece), len(piece))
            offset += len(piece)
        state.tables[number].record_count = count
    if shape["names_size"]:
        size = shape["names_size"]
        region_commit(&state.names, size)
        piece = read(size)
        memcpy(state.names.base, PyBytes_AS_STRING(piece), size)
        state.names_size = size
    for number in range(TABLES):
        left = int.from_bytes(read(8), "little")
        while left:
            size = 4 + <uint64_t>state.tables[number].stride
            piece = read(min(left, size * (<uint64_t>PIECE_BYTES // size)))
            lay_over(&state.tables[number], piece)
            left -= len(piece)
        index_table(&state.tables[number])
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
    if len(preimages) % (4 + <uint64_t>table.stride):
        raise ValueError("a saved record is cut short")
    while at < end:
        memcpy(&record, at, 4)
        if record >= table.record_count:
            raise ValueError(f"record {record} was saved, but the image has only {table.record_count}")
        memcpy(record_at(table, record), at + 4, table.stride)
        at += 4 + table.stride
    return 0


cdef int index_table(Table* table) except -1:
    cdef uint32_t record
    with nogil:
        for record in range(table.record_count):
            table_index(table, record)
    return 0
