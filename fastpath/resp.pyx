from cpython.buffer cimport PyBUF_WRITE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove

from fastpath.siphash cimport PADDING
from fastpath.types cimport RawEntry

cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char* memory, Py_ssize_t size, int flags)

cdef enum:
    # States of the scan.
    AT_START = 0
    IN_ENTRIES = 1
    HAVE_ENTRIES = 2
    HAVE_NOTHING = 3
    HAVE_ERROR = 4
    HAVE_STATUS = 5
    # What a step of the scan says.
    STEP_DONE = 0
    STEP_MORE = 1
    STEP_BAD = 2

cdef enum:
    ZERO = 48
    INITIAL_BYTES = 256 * 1024
    READ_BYTES = 64 * 1024
    MAXIMUM_LINE = 64 * 1024
    MAXIMUM_FIELDS = 1 << 20
    QUICK_ID_BYTES = 41        # two numbers of 64 bits
    QUICK_BYTES = 96           # more than an entry takes besides its value
    # No valid event has fewer bytes: an array of id, kind, member, ts, or an object of them.
    SMALLEST_COMPACT = 8
    SMALLEST_JSON = 40

KINDS = {HAVE_ENTRIES: "entries", HAVE_NOTHING: "nothing", HAVE_ERROR: "error", HAVE_STATUS: "status"}

cdef struct Cursor:
    const char* base
    uint64_t position
    uint64_t size
    uint64_t wanted


cdef inline int read_number(Cursor* cursor, char marker, int64_t* value) noexcept nogil:
    """Read ``<marker><number>\\r\\n``."""
    cdef uint64_t i = cursor.position + 1
    cdef int64_t number = 0
    cdef bint negative = False
    if cursor.position >= cursor.size:
        return STEP_MORE
    if cursor.base[cursor.position] != marker:
        return STEP_BAD
    if i < cursor.size and cursor.base[i] == b"-":
        negative = True
        i += 1
    while True:
        if i >= cursor.size:
            return STEP_MORE
        if not b"0" <= cursor.base[i] <= b"9":
            break
        if number > <int64_t>1 << 58:
            return STEP_BAD
        number = number * 10 + (cursor.base[i] - ZERO)
        i += 1
    if cursor.base[i] != b"\r":
        return STEP_BAD
    if i + 1 >= cursor.size:
        return STEP_MORE
    value[0] = -number if negative else number
    cursor.position = i + 2
    return STEP_DONE


cdef inline int read_bulk(Cursor* cursor, uint64_t* at, uint64_t* size) noexcept nogil:
    """Read ``$<size>\\r\\n<bytes>\\r\\n`` and leave where the bytes are."""
    cdef int64_t length
    cdef int step = read_number(cursor, b"$", &length)
    if step != STEP_DONE:
        return step
    if length < 0:
        return STEP_BAD
    if cursor.position + length + 2 > cursor.size:
        cursor.wanted = cursor.position + length + 2
        return STEP_MORE
    at[0] = cursor.position
    size[0] = length
    cursor.position += length + 2
    return STEP_DONE


cdef inline bint eight_digits(const char* data, uint64_t* number) noexcept nogil:
    """Parse eight digits at once, if that is what they are."""
    cdef uint64_t word
    memcpy(&word, data, 8)
    if ((word & <uint64_t>0xf0f0f0f0f0f0f0f0) != <uint64_t>0x3030303030303030
            or ((word + <uint64_t>0x0606060606060606) & <uint64_t>0xf0f0f0f0f0f0f0f0) != <uint64_t>0x3030303030303030):
        return False
    # Neighbours are joined to two, four and eight digits (after Johnny Lee's and Daniel Lemire's parsers).
    word = (word & <uint64_t>0x0f0f0f0f0f0f0f0f) * 2561 >> 8
    word = (word & <uint64_t>0x00ff00ff00ff00ff) * 6553601 >> 16
    number[0] = (word & <uint64_t>0x0000ffff0000ffff) * <uint64_t>42949672960001 >> 32
    return True


cdef inline bint read_stream_id(const char* data, uint64_t size, RawEntry* entry) noexcept nogil:
    """Parse ``<ms>-<seq>``."""
    cdef uint64_t i = 0, ms = 0, seq = 0
    if size >= 8 and eight_digits(data, &ms):
        i = 8
    while i < size and b"0" <= data[i] <= b"9":
        ms = ms * 10 + (data[i] - ZERO)
        i += 1
    if i == 0 or i >= size or data[i] != b"-":
        return False
    i += 1
    while i < size and b"0" <= data[i] <= b"9":
        seq = seq * 10 + (data[i] - ZERO)
        i += 1
    entry.ms = ms
    entry.seq = seq
    return i == size


cdef inline const char* quick_size(const char* at, uint64_t* size) noexcept nogil:
    """Read one to four digits and CRLF; NULL for anything else."""
    cdef uint64_t number = 0
    cdef int i
    for i in range(5):
        if <unsigned char>(at[i] - ZERO) > 9:
            break
        number = number * 10 + <unsigned char>(at[i] - ZERO)
    if i == 0 or i > 4 or at[i] != b"\r" or at[i + 1] != b"\n":
        return NULL
    size[0] = number
    return at + i + 2


cdef inline bint read_quickly(Cursor* cursor, RawEntry* entry) noexcept nogil:
    """Read one stream entry in the form that nearly all have, one field with a name of one byte, if all of it is there.

    Returns False, leaving the cursor where it was, for whatever else it may be: ``read_entry`` says what.
    """
    cdef const char* at = cursor.base + cursor.position
    cdef const char* end = cursor.base + cursor.size
    cdef uint64_t size = 0
    if end - at < QUICK_BYTES or memcmp(at, <const char*>"*2\r\n$", 5) != 0:
        return False
    at = quick_size(at + 5, &size)
    if at == NULL or size > QUICK_ID_BYTES or not read_stream_id(at, size, entry):
        return False
    at += size
    if memcmp(at, <const char*>"\r\n*2\r\n$1\r\n", 10) != 0:
        return False
    entry.fields = at + 2 - cursor.base
    entry.field_count = 1
    entry.name = at + 10 - cursor.base
    entry.name_size = 1
    if memcmp(at + 11, <const char*>"\r\n$", 3) != 0:
        return False
    at = quick_size(at + 14, &size)
    if at == NULL or size + 2 > <uint64_t>(end - at):
        return False
    entry.value = at - cursor.base
    entry.value_size = <uint32_t>size
    cursor.position = entry.value + size + 2
    return True


cdef inline int read_entry(Cursor* cursor, RawEntry* entry) noexcept nogil:
    """Read one stream entry: ``*2 <id> *<2n> <name> <value> ...``."""
    cdef int64_t number
    cdef uint64_t at, size, pair
    cdef int step = read_number(cursor, b"*", &number)
    if step != STEP_DONE:
        return step
    if number != 2:
        return STEP_BAD
    step = read_bulk(cursor, &at, &size)
    if step != STEP_DONE:
        return step
    if not read_stream_id(cursor.base + at, size, entry):
        return STEP_BAD
    entry.fields = cursor.position
    step = read_number(cursor, b"*", &number)
    if step != STEP_DONE:
        return step
    if number < 2 or number % 2 or number > 2 * MAXIMUM_FIELDS:
        return STEP_BAD
    entry.field_count = <uint32_t>(number // 2)
    for pair in range(<uint64_t>number // 2):
        step = read_bulk(cursor, &at, &size)
        if step != STEP_DONE:
            return step
        if pair == 0:
            entry.name = at
            entry.name_size = <uint32_t>size
        step = read_bulk(cursor, &at, &size)
        if step != STEP_DONE:
            return step
        if pair == 0:
            entry.value = at
            entry.value_size = <uint32_t>size
    return STEP_DONE


cdef inline uint64_t most_events_of(const char* base, const RawEntry* entry) noexcept nogil:
    """Return the most valid events that a stream entry can hold."""
    cdef const unsigned char* value = <const unsigned char*>base + entry.value
    cdef uint64_t size = entry.value_size
    cdef uint64_t items = 1
    if entry.name_size != 1 or size == 0:
        return 1
    if base[entry.name] == b"j":
        return 1 + size // SMALLEST_JSON
    if base[entry.name] == b"b":
        # The head of an array of MessagePack; there are readable bytes behind the value.
        if value[0] >> 4 == 9:
            items = value[0] & 15
        elif value[0] == 0xdc:
            items = <uint64_t>value[1] << 8 | value[2]
        elif value[0] == 0xdd:
            items = <uint64_t>value[1] << 24 | <uint64_t>value[2] << 16 | <uint64_t>value[3] << 8 | value[4]
    return max(<uint64_t>1, min(items, size // SMALLEST_COMPACT))


cdef class ReplyReader:
    """Receives replies through the buffered-protocol calls of asyncio and scans them as they come.

    One reply is held at a time; ``clear`` makes room for the next. It understands what XREAD of one stream and XRANGE
    answer (kind ``entries``), a nil reply (``nothing``), an error, and simple values (``status``). Raises
    ``ValueError`` for bytes that are none of these.
    """

    def __cinit__(self):
        self.buffer = <char*>malloc(INITIAL_BYTES + PADDING)
        self.raw_capacity = 1024
        self.raw = <RawEntry*>malloc(self.raw_capacity * sizeof(RawEntry))
        if self.buffer == NULL or self.raw == NULL:
            raise MemoryError()
        self.capacity = INITIAL_BYTES

    def __dealloc__(self):
        free(self.buffer)
        free(self.raw)

    def get_buffer(self, size_hint):
        """Return writable memory for the next bytes."""
        cdef uint64_t free_bytes = READ_BYTES
        if self.wanted > self.received + free_bytes:
            free_bytes = self.wanted - self.received
        self.reserve(self.received + free_bytes)
        return PyMemoryView_FromMemory(self.buffer + self.received, self.capacity - self.received, PyBUF_WRITE)

    def buffer_updated(self, size):
        """Take note of ``size`` new bytes; return whether a complete reply is there."""
        self.received += <uint64_t>size
        self.scan()
        return self.state > IN_ENTRIES

    def feed(self, bytes data):
        """Append ``data`` as if it had been received; return whether a complete reply is there."""
        cdef const char* source = data
        self.reserve(self.received + len(data))
        memcpy(self.buffer + self.received, source, len(data))
        return self.buffer_updated(len(data))

    def clear(self):
        """Forget the reply; return whether another complete one was received behind it."""
        if self.state <= IN_ENTRIES:
            if self.received == 0:
                return False
            raise ValueError("the reply is not complete")
        self.received -= self.position
        memmove(self.buffer, self.buffer + self.position, self.received)
        self.forget()
        self.scan()
        return self.state > IN_ENTRIES

    def pass_on(self, ReplyReader other not None):
        """Keep the reply, and let ``other`` have what was received behind it, which receives from now on."""
        cdef uint64_t size = self.received - self.position
        if self.state <= IN_ENTRIES:
            raise ValueError("the reply is not complete")
        other.abandon()
        other.reserve(size)
        memcpy(other.buffer, self.buffer + self.position, size)
        other.received = size
        self.received = self.position
        other.scan()

    def abandon(self):
        """Forget everything received, complete or not: for a new connection."""
        self.received = 0
        self.forget()

    @property
    def kind(self):
        """``entries``, ``nothing``, ``error`` or ``status``; None while the reply is not complete."""
        return KINDS.get(self.state)

    @property
    def error(self):
        """The server's error message, or an empty string."""
        if self.state != HAVE_ERROR:
            return ""
        return self.buffer[self.value_at:self.value_at + self.value_size].decode(errors="replace")

    @property
    def value(self):
        """The bytes of a status reply."""
        return self.buffer[self.value_at:self.value_at + self.value_size] if self.state == HAVE_STATUS else b""

    @property
    def size(self):
        """The bytes of the reply."""
        return self.position

    @property
    def entries(self):
        """The number of stream entries."""
        return self.raw_count

    @property
    def most_events(self):
        """The most valid events that the entries can hold: as many as they say, and as their bytes have room for."""
        cdef uint64_t i, total = 0
        for i in range(self.raw_count if self.state == HAVE_ENTRIES else 0):
            total += most_events_of(self.buffer, &self.raw[i])
        return total

    @property
    def first(self):
        """The ID of the first entry as ``(ms, seq)``."""
        if self.raw_count == 0:
            raise ValueError("the reply has no entries")
        return self.raw[0].ms, self.raw[0].seq

    @property
    def last(self):
        """The ID of the last entry as ``(ms, seq)``."""
        if self.raw_count == 0:
            raise ValueError("the reply has no entries")
        return self.raw[self.raw_count - 1].ms, self.raw[self.raw_count - 1].seq

    def fields(self, number):
        """Return the names and values of entry ``number`` as pairs of bytes: for the few entries that need it."""
        cdef Cursor cursor
        cdef int64_t count = 0
        cdef uint64_t at = 0, size = 0
        if not 0 <= number < self.raw_count:
            raise IndexError(number)
        cursor.base = self.buffer
        cursor.size = self.received
        cursor.position = self.raw[<uint64_t>number].fields
        read_number(&cursor, b"*", &count)
        texts = []
        for _ in range(count):
            read_bulk(&cursor, &at, &size)
            texts.append(self.buffer[at:at + size])
        return tuple(zip(texts[::2], texts[1::2], strict=True))

    cdef void forget(self) noexcept:
        self.position = 0
        self.wanted = 0
        self.raw_count = 0
        self.remaining = 0
        self.state = AT_START

    cdef int reserve(self, uint64_t size) except -1:
        cdef uint64_t capacity = self.capacity
        cdef char* grown
        if size <= capacity:
            return 0
        while capacity < size:
            capacity *= 2
        grown = <char*>realloc(self.buffer, capacity + PADDING)
        if grown == NULL:
            raise MemoryError()
        self.buffer = grown
        self.capacity = capacity
        return 0

    cdef int scan(self) except -1:
        cdef int step = STEP_DONE
        cdef Cursor cursor
        cdef RawEntry* grown
        cursor.base = self.buffer
        cursor.position = self.position
        cursor.size = self.received
        cursor.wanted = 0
        if self.state == AT_START:
            step = read_head(self, &cursor)
        while step == STEP_DONE and self.state == IN_ENTRIES:
            if self.remaining == 0:
                self.state = HAVE_ENTRIES
                break
            if self.raw_count == self.raw_capacity:
                grown = <RawEntry*>realloc(self.raw, 2 * self.raw_capacity * sizeof(RawEntry))
                if grown == NULL:
                    raise MemoryError()
                self.raw = grown
                self.raw_capacity *= 2
            if not read_quickly(&cursor, &self.raw[self.raw_count]):
                step = read_entry(&cursor, &self.raw[self.raw_count])
            if step == STEP_DONE:
                self.raw_count += 1
                self.remaining -= 1
                self.position = cursor.position
        self.wanted = cursor.wanted
        if step == STEP_BAD:
            raise ValueError(f"the server's reply makes no sense at byte {cursor.position}")
        return 0


cdef int read_head(ReplyReader reader, Cursor* cursor) except -1:
    """Read what comes before the entries, or a whole reply of another kind."""
    cdef int64_t count, number
    cdef uint64_t at, size
    cdef uint64_t start = cursor.position
    cdef int step
    if cursor.position >= cursor.size:
        return STEP_MORE
    marker = cursor.base[cursor.position]
    if marker == b"+" or marker == b"-" or marker == b":" or marker == b"_":
        return read_line(reader, cursor, marker)
    if marker == b"$":
        return read_bulk_reply(reader, cursor)
    step = read_number(cursor, b"*", &count)
    if step != STEP_DONE:
        cursor.position = start
        return step
    if count < 0:
        return finish(reader, cursor, HAVE_NOTHING)
    if count == 1:
        # One stream of XREAD starts *2 <key> *<entries> *2; one entry of XRANGE starts *2 <id> *<fields> $.
        step = read_number(cursor, b"*", &number)
        if step == STEP_DONE:
            step = read_bulk(cursor, &at, &size)
        if step == STEP_DONE:
            step = read_number(cursor, b"*", &number)
        if step == STEP_DONE and cursor.position >= cursor.size:
            step = STEP_MORE
        if step != STEP_DONE:
            cursor.position = start
            return step
        if cursor.base[cursor.position] == b"*":
            count = number
        else:
            cursor.position = start
            read_number(cursor, b"*", &count)
    reader.state = IN_ENTRIES
    reader.remaining = count
    reader.position = cursor.position
    return STEP_DONE


cdef int finish(ReplyReader reader, Cursor* cursor, int state) except -1:
    reader.state = state
    reader.position = cursor.position
    return STEP_DONE


cdef int read_line(ReplyReader reader, Cursor* cursor, char marker) except -1:
    cdef const char* start = cursor.base + cursor.position + 1
    cdef const char* end = <const char*>memchr(start, b"\n", cursor.size - cursor.position - 1)
    if end == NULL:
        return STEP_BAD if cursor.size - cursor.position > MAXIMUM_LINE else STEP_MORE
    reader.value_at = cursor.position + 1
    reader.value_size = max(0, end - start - 1)
    cursor.position = end + 1 - cursor.base
    if marker == b"_":
        return finish(reader, cursor, HAVE_NOTHING)
    return finish(reader, cursor, HAVE_ERROR if marker == b"-" else HAVE_STATUS)


cdef int read_bulk_reply(ReplyReader reader, Cursor* cursor) except -1:
    cdef uint64_t start = cursor.position
    cdef uint64_t at = 0, size = 0
    cdef int64_t length
    cdef int step = read_number(cursor, b"$", &length)
    if step == STEP_DONE and length < 0:
        return finish(reader, cursor, HAVE_NOTHING)
    if step == STEP_DONE:
        cursor.position = start
        step = read_bulk(cursor, &at, &size)
    if step != STEP_DONE:
        cursor.position = start
        return step
    reader.value_at = at
    reader.value_size = size
    return finish(reader, cursor, HAVE_STATUS)
