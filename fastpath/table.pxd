"""Tables: an extendible-hash index over an array of fixed-size records.

An index is a directory of *segments*; a segment is a small open-addressing table of 8-byte slots, each 32 bits of a
key's hash and the number of its record. A search starts at a cache line of eight slots and nearly always ends in it. A
full segment first drops what has expired and otherwise splits in two, so growth never moves more than one segment.
Records and segments lie in reserved address space that is committed as it fills, on huge pages where the system grants
them; a record's number never changes.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef enum:
    LINE_SLOTS = 8
    LINE_BYTES = 64

cdef struct Slot:
    uint32_t tag               # upper half of the key's hash
    uint32_t record            # number + 1; 0 is an empty slot

cdef struct Header:
    # What every record starts with. `day` says when it expires; members never do.
    uint64_t first             # the key's hash; 0 in a record that is free
    uint64_t second            # its second half
    int32_t day
    uint32_t next_free         # number + 1 of the next free record; of a record in use, its own

cdef struct Move:
    # A part of a record that keeps its content when the layout changes.
    uint32_t source
    uint32_t target
    uint32_t size

cdef enum:
    BLOCK_BYTES = 1 << 20

cdef struct Block:
    Block* next
    uint64_t size              # bytes written; they never change again
    char data[BLOCK_BYTES]

cdef struct Preimages:
    # While an image of a table is taken: what its records were before their first change. Each is a record's number
    # (4 bytes) and the record.
    uint32_t count             # records that the image has
    uint64_t* saved            # a bit for each
    Block* first
    Block* last
    uint64_t bytes             # memory that all of this takes
    bint failed                # there was no memory for one: the image is lost

cdef struct Region:
    char* base
    uint64_t reserved          # bytes of address space
    uint64_t committed         # bytes usable
    uint64_t resident          # bytes brought in ahead of their use, by another thread

cdef struct Table:
    Region slots
    Region records
    uint32_t* directory
    uint32_t* segment_counts
    uint8_t* segment_depths
    int32_t* segment_days      # no record of a segment is of an earlier day
    uint32_t depth
    uint32_t segments
    uint32_t segment_shift     # log2 of a segment's slots
    uint32_t stride            # bytes of a record
    uint32_t record_count      # records ever handed out, the free ones included
    uint32_t live
    uint32_t free_head         # number + 1 of the first free record
    int32_t lifetime_days      # a record expires when the latest day is past its day by more; -1: never
    int32_t latest_day
    bint huge
    Preimages* preimages       # NULL while no image is taken


cdef extern from *:
    """
    #include <stdint.h>
    #ifdef __SSE2__
    #include <emmintrin.h>
    #endif

    /* Into the second cache: an event may need more lines than the first can have under way at a time. */
    #define accrual_prefetch(address) __builtin_prefetch(address, 0, 2)
    #define accrual_lowest_bit(mask) __builtin_ctzll(mask)

    /* Of the eight slots of a line, those whose tag (part 0) or record (part 1) is the one wanted: bit i for slot i. */
    static inline __attribute__((always_inline)) uint32_t accrual_slots(const void *line, uint32_t value,
                                                                        const int part) {
    #ifdef __SSE2__
        const float *words = (const float *)line;
        const __m128i wanted = _mm_set1_epi32((int)value);
        const __m128 parts[4] = {
            _mm_load_ps(words), _mm_load_ps(words + 4), _mm_load_ps(words + 8), _mm_load_ps(words + 12)};
        const __m128i low = _mm_castps_si128(part ? _mm_shuffle_ps(parts[0], parts[1], _MM_SHUFFLE(3, 1, 3, 1))
                                                  : _mm_shuffle_ps(parts[0], parts[1], _MM_SHUFFLE(2, 0, 2, 0)));
        const __m128i high = _mm_castps_si128(part ? _mm_shuffle_ps(parts[2], parts[3], _MM_SHUFFLE(3, 1, 3, 1))
                                                   : _mm_shuffle_ps(parts[2], parts[3], _MM_SHUFFLE(2, 0, 2, 0)));
        const int first = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(low, wanted)));
        const int second = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(high, wanted)));
        return (uint32_t)(first | second << 4);
    #else
        const uint32_t *words = (const uint32_t *)line;
        uint32_t found = 0;
        for (int i = 0; i < 8; i++)
            found |= (uint32_t)(words[2 * i + part] == value) << i;
        return found;
    #endif
    }

    #define accrual_match(line, tag) accrual_slots(line, tag, 0)
    #define accrual_free(line) accrual_slots(line, 0, 1)
    """
    void prefetch "accrual_prefetch"(const void* address) noexcept nogil
    int lowest_bit "accrual_lowest_bit"(uint64_t mask) noexcept nogil
    # Bit i for slot i of the line: those with the tag, and those that are free.
    uint32_t match_line "accrual_match"(const Slot* line, uint32_t tag) noexcept nogil
    uint32_t free_in_line "accrual_free"(const Slot* line) noexcept nogil


cdef inline uint32_t tag_of(uint64_t hash) noexcept nogil:
    return <uint32_t>(hash >> 32)


cdef inline uint32_t segment_of(const Table* table, uint32_t tag) noexcept nogil:
    """Return the segment of a tag: the directory goes by its uppermost bits."""
    return table.directory[(tag >> 1) >> (31 - table.depth)]


cdef inline uint64_t line_in_segment(const Table* table, uint32_t tag) noexcept nogil:
    """Return the slot within its segment where a search for a tag starts: the lines go by its lowest bits."""
    return (<uint64_t>tag * LINE_SLOTS) & ((<uint64_t>1 << table.segment_shift) - 1)


cdef inline Slot* line_of(const Table* table, uint64_t hash) noexcept nogil:
    """Return the line of slots where a search for a key starts."""
    cdef uint32_t tag = tag_of(hash)
    return (<Slot*>table.slots.base) + (
        (<uint64_t>segment_of(table, tag) << table.segment_shift) + line_in_segment(table, tag))


cdef inline Slot* next_line(const Table* table, Slot* line) noexcept nogil:
    """Return the line after ``line``, wrapping within its segment."""
    cdef uint64_t offset = line - <Slot*>table.slots.base
    cdef uint64_t mask = (<uint64_t>1 << table.segment_shift) - 1
    return (<Slot*>table.slots.base) + ((offset & ~mask) | ((offset + LINE_SLOTS) & mask))


cdef inline char* record_at(const Table* table, uint32_t number) noexcept nogil:
    return table.records.base + <uint64_t>number * table.stride


cdef void save_preimage(Table* table, const char* record) noexcept nogil


cdef inline void touch(Table* table, const void* record) noexcept nogil:
    """Take note that a record is about to change."""
    if table.preimages != NULL:
        save_preimage(table, <const char*>record)


cdef inline char* candidate_in(const Table* table, const Slot* line, uint64_t hash) noexcept nogil:
    """Return the record of the first slot of a line that may be the one of ``hash``, or NULL."""
    cdef uint32_t found = match_line(line, tag_of(hash))
    cdef uint32_t record
    if found == 0:
        return NULL
    record = line[lowest_bit(found)].record
    return record_at(table, record - 1) if record else NULL


cdef inline char* find(const Table* table, uint64_t first, uint64_t second) noexcept nogil:
    """Return the record of a 128-bit key, or NULL."""
    cdef Slot* line = line_of(table, first)
    cdef uint32_t tag = tag_of(first)
    cdef uint32_t found
    cdef Slot* slot
    cdef Header* header
    while True:
        found = match_line(line, tag)
        while found:
            slot = &line[lowest_bit(found)]
            found &= found - 1
            if slot.record:
                header = <Header*>record_at(table, slot.record - 1)
                if header.first == first and header.second == second:
                    return <char*>header
        # A line fills up from its first slot, and only a full one goes on in the next.
        if line[LINE_SLOTS - 1].record == 0:
            return NULL
        line = next_line(table, line)


cdef inline uint64_t day_hash(uint64_t hash, int32_t day) noexcept nogil:
    """Spread a key's hash over its days; never 0."""
    cdef uint64_t spread = hash ^ (<uint64_t>(<uint32_t>day) * <uint64_t>0x9e3779b97f4a7c15)
    return spread if spread else 1


cdef int region_init(Region* region, bint huge) except -1 nogil
cdef int region_commit(Region* region, uint64_t size) except -1 nogil
cdef void region_free(Region* region) noexcept nogil
cdef int table_init(Table* table, uint32_t stride, int32_t lifetime_days, uint32_t segment_shift) except -1 nogil
cdef void table_free(Table* table) noexcept nogil
cdef char* table_insert(Table* table, uint64_t first, uint64_t second, int32_t day) except NULL nogil
cdef int table_index(Table* table, uint32_t number) except -1 nogil
cdef int preimages_start(Table* table) except -1 nogil
cdef Preimages* preimages_stop(Table* table) noexcept nogil
cdef void preimages_free(Preimages* preimages) noexcept nogil
cdef int table_relayout(Table* table, uint32_t stride, const Move* moves, uint32_t count) except -1 nogil
cdef uint64_t region_bytes(uint64_t used, bint huge) noexcept nogil
cdef uint64_t table_bytes(const Table* table) noexcept nogil
cdef uint64_t table_lines(const Table* table) noexcept nogil
cdef uint64_t table_growth(const Table* table, uint64_t inserts) noexcept nogil
cdef uint64_t preimages_growth(const Table* table, uint64_t events) noexcept nogil
cdef int table_reclaim(Table* table, int32_t day) except -1 nogil
cdef void table_prepare(Table* table) noexcept nogil
