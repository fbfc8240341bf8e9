"""Reading and writing MessagePack, inline: a cursor for one, a growing buffer for the other."""

from libc.stdint cimport int16_t, int32_t, int64_t, int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy

cdef enum:
    TYPE_NONE = 0              # the bytes do not decode
    TYPE_INTEGER = 1
    TYPE_NIL = 2
    TYPE_TEXT = 3
    TYPE_ARRAY = 4
    TYPE_MAP = 5
    TYPE_OTHER = 6             # boolean, float, bin, ext: no field accepts them

cdef enum:
    MAXIMUM_DEPTH = 32

cdef struct Reader:
    const unsigned char* at
    const unsigned char* end

cdef struct Value:
    int type
    uint64_t size              # bytes of a text or other value, items of an array, pairs of a map
    int64_t number             # of an integer
    bint huge                  # an integer beyond int64


cdef extern from *:
    """
    static inline uint64_t accrual_big_endian(const unsigned char *data, int size) {
        uint64_t word;
        uint32_t half;
        if (size == 8) {
            memcpy(&word, data, 8);
            return __builtin_bswap64(word);
        }
        if (size == 4) {
            memcpy(&half, data, 4);
            return __builtin_bswap32(half);
        }
        return size == 2 ? (uint64_t)(data[0] << 8 | data[1]) : data[0];
    }
    """
    uint64_t big_endian "accrual_big_endian"(const unsigned char* data, int size) noexcept nogil


cdef inline int sized(Reader* reader, Value* value, int type, int width, int extra) noexcept nogil:
    if reader.end - reader.at < width:
        return TYPE_NONE
    value.size = big_endian(reader.at, width) + extra
    reader.at += width
    return type


cdef inline int integer(Reader* reader, Value* value, int width, bint signed) noexcept nogil:
    cdef uint64_t number
    if reader.end - reader.at < width:
        return TYPE_NONE
    number = big_endian(reader.at, width)
    reader.at += width
    if signed:
        if width == 1:
            value.number = <int8_t>number
        elif width == 2:
            value.number = <int16_t>number
        elif width == 4:
            value.number = <int32_t>number
        else:
            value.number = <int64_t>number
    else:
        value.number = <int64_t>number
        value.huge = width == 8 and (number >> 63) != 0
    return TYPE_INTEGER


cdef inline int read_long_head(Reader* reader, Value* value, uint8_t first) noexcept nogil:
    if first == 0xc0:
        return TYPE_NIL
    if first == 0xd9:
        return sized(reader, value, TYPE_TEXT, 1, 0)
    if 0xcc <= first <= 0xcf:
        return integer(reader, value, 1 << (first - 0xcc), False)
    if 0xd0 <= first <= 0xd3:
        return integer(reader, value, 1 << (first - 0xd0), True)
    if first == 0xda or first == 0xdb:
        return sized(reader, value, TYPE_TEXT, 2 if first == 0xda else 4, 0)
    if first == 0xdc or first == 0xdd:
        return sized(reader, value, TYPE_ARRAY, 2 if first == 0xdc else 4, 0)
    if first == 0xde or first == 0xdf:
        return sized(reader, value, TYPE_MAP, 2 if first == 0xde else 4, 0)
    if first == 0xc2 or first == 0xc3:
        return TYPE_OTHER
    if first == 0xca or first == 0xcb:
        value.size = 4 if first == 0xca else 8
        return TYPE_OTHER
    if 0xc4 <= first <= 0xc6:
        return sized(reader, value, TYPE_OTHER, 1 << (first - 0xc4), 0)
    if 0xc7 <= first <= 0xc9:
        return sized(reader, value, TYPE_OTHER, 1 << (first - 0xc7), 1)
    if 0xd4 <= first <= 0xd8:
        value.size = (1 << (first - 0xd4)) + 1
        return TYPE_OTHER
    return TYPE_NONE


cdef inline int read_head(Reader* reader, Value* value) noexcept nogil:
    """Read one type byte with its size or number; texts, bins and exts leave their bytes to be taken."""
    cdef uint8_t first
    if reader.at >= reader.end:
        value.type = TYPE_NONE
        return TYPE_NONE
    first = reader.at[0]
    reader.at += 1
    value.size = 0
    value.huge = False
    if first <= 0x7f:
        value.number = first
        value.type = TYPE_INTEGER
    elif 0xa0 <= first <= 0xbf:
        value.size = first & 0x1f
        value.type = TYPE_TEXT
    elif first >= 0xe0:
        value.number = <int8_t>first
        value.type = TYPE_INTEGER
    elif first <= 0x8f:
        value.size = first & 0x0f
        value.type = TYPE_MAP
    elif first <= 0x9f:
        value.size = first & 0x0f
        value.type = TYPE_ARRAY
    else:
        value.type = read_long_head(reader, value, first)
    if (value.type == TYPE_TEXT or value.type == TYPE_OTHER) and value.size > <uint64_t>(reader.end - reader.at):
        value.type = TYPE_NONE
    return value.type


cdef bint skip(Reader* reader, int depth) noexcept nogil
cdef bint pass_over(Reader* reader, uint64_t count) noexcept nogil


# Writing. A buffer that cannot grow remembers that it failed; the caller asks once at the end.

cdef struct Buffer:
    unsigned char* data
    uint64_t size
    uint64_t capacity
    bint failed


cdef inline unsigned char* room(Buffer* buffer, uint64_t size) noexcept nogil:
    """Return memory for ``size`` more bytes and count them as written; NULL where there is none."""
    cdef uint64_t capacity = buffer.capacity
    cdef unsigned char* grown
    if buffer.size + size > capacity:
        if capacity < 4096:
            capacity = 4096
        while capacity < buffer.size + size:
            capacity *= 2
        grown = <unsigned char*>realloc(buffer.data, capacity)
        if grown == NULL:
            buffer.failed = True
            return NULL
        buffer.data = grown
        buffer.capacity = capacity
    grown = buffer.data + buffer.size
    buffer.size += size
    return grown


cdef inline void write_bytes(Buffer* buffer, const void* data, uint64_t size) noexcept nogil:
    cdef unsigned char* target = room(buffer, size)
    if target != NULL and size:
        memcpy(target, data, size)


cdef inline void write_head(Buffer* buffer, uint8_t first, uint64_t number, int width) noexcept nogil:
    cdef unsigned char* target = room(buffer, 1 + width)
    cdef int i
    if target == NULL:
        return
    target[0] = first
    for i in range(width):
        target[1 + i] = <unsigned char>(number >> (8 * (width - 1 - i)))


cdef inline void write_unsigned(Buffer* buffer, uint64_t number) noexcept nogil:
    if number < 0x80:
        write_head(buffer, <uint8_t>number, 0, 0)
    elif number < 0x100:
        write_head(buffer, 0xcc, number, 1)
    elif number < 0x10000:
        write_head(buffer, 0xcd, number, 2)
    elif number < <uint64_t>0x100000000:
        write_head(buffer, 0xce, number, 4)
    else:
        write_head(buffer, 0xcf, number, 8)


cdef inline void write_integer(Buffer* buffer, int64_t number) noexcept nogil:
    if number >= 0:
        write_unsigned(buffer, <uint64_t>number)
    elif number >= -32:
        write_head(buffer, <uint8_t>(0x100 + number), 0, 0)
    elif number >= -0x80:
        write_head(buffer, 0xd0, <uint64_t>number, 1)
    elif number >= -0x8000:
        write_head(buffer, 0xd1, <uint64_t>number, 2)
    elif number >= -<int64_t>0x80000000:
        write_head(buffer, 0xd2, <uint64_t>number, 4)
    else:
        write_head(buffer, 0xd3, <uint64_t>number, 8)


cdef inline void write_array(Buffer* buffer, uint64_t count) noexcept nogil:
    if count < 16:
        write_head(buffer, <uint8_t>(0x90 | count), 0, 0)
    elif count < 0x10000:
        write_head(buffer, 0xdc, count, 2)
    else:
        write_head(buffer, 0xdd, count, 4)


cdef inline void write_map(Buffer* buffer, uint64_t count) noexcept nogil:
    if count < 16:
        write_head(buffer, <uint8_t>(0x80 | count), 0, 0)
    else:
        write_head(buffer, 0xde, count, 2)


cdef inline void write_text(Buffer* buffer, const char* data, uint64_t size) noexcept nogil:
    if size < 32:
        write_head(buffer, <uint8_t>(0xa0 | size), 0, 0)
    elif size < 0x100:
        write_head(buffer, 0xd9, size, 1)
    elif size < 0x10000:
        write_head(buffer, 0xda, size, 2)
    else:
        write_head(buffer, 0xdb, size, 4)
    write_bytes(buffer, data, size)


cdef inline void write_bin_head(Buffer* buffer, uint64_t size) noexcept nogil:
    if size < 0x100:
        write_head(buffer, 0xc4, size, 1)
    elif size < 0x10000:
        write_head(buffer, 0xc5, size, 2)
    else:
        write_head(buffer, 0xc6, size, 4)
