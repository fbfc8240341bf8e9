from libc.stdint cimport INT32_MAX, int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* address, size_t size, int protection, int flags, int file, long offset)
    int munmap(void* address, size_t size)
    int mprotect(void* address, size_t size, int protection)
    int madvise(void* address, size_t size, int advice)
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MADV_HUGEPAGE
    void* MAP_FAILED

cdef extern from *:
    """
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23    /* Linux 5.14; an older kernel refuses it, and nothing is lost. */
    #endif
    """
    int MADV_POPULATE_WRITE

cdef extern from *:
    """
    #define accrual_memory_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    void memory_fence "accrual_memory_fence"() noexcept nogil

cdef extern from "<unistd.h>" nogil:
    long sysconf(int name)
    int _SC_PAGESIZE, _SC_PHYS_PAGES

cdef enum:
    HUGE_PAGE = 2 * 1024 * 1024
    MAXIMUM_DEPTH = 18
    HUGE_SEGMENT_SHIFT = 12
    # Memory is made usable in such steps, and of that up to so much is brought in ahead.
    COMMIT_STEP = 32 * 1024 * 1024
    AHEAD_MAXIMUM = 16 * 1024 * 1024

# Address space costs nothing until it is touched, and no region can outgrow the machine's memory. Tables with small
# segments are for tests and tools, some of which (valgrind) cannot give out that much of it.
cdef uint64_t RESERVED_BYTES = (
    (<uint64_t>sysconf(_SC_PHYS_PAGES) * <uint64_t>sysconf(_SC_PAGESIZE) + HUGE_PAGE) & ~<uint64_t>(HUGE_PAGE - 1))
cdef uint64_t RESERVED_BYTES_SMALL = <uint64_t>1 << 30


cdef int region_init(Region* region, bint huge) except -1 nogil:
    cdef uint64_t reserved = RESERVED_BYTES if huge else RESERVED_BYTES_SMALL
    cdef char* base = <char*>mmap(
        NULL, reserved + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef size_t before
    if <void*>base == MAP_FAILED:
        with gil:
            raise MemoryError(f"cannot reserve {reserved} bytes of address space")
    # Only what covers a whole aligned stretch of two megabytes can become a huge page.
    before = (HUGE_PAGE - <size_t>base % HUGE_PAGE) % HUGE_PAGE
    if before:
        munmap(base, before)
    munmap(base + before + reserved, HUGE_PAGE - before)
    base += before
    region.base = base
    region.reserved = reserved
    region.committed = region.resident = 0
    if huge:
        madvise(base, reserved, MADV_HUGEPAGE)
    return 0


cdef void region_free(Region* region) noexcept nogil:
    if region.base != NULL:
        munmap(region.base, region.reserved)
        region.base = NULL


cdef int region_commit(Region* region, uint64_t size) except -1 nogil:
    """Make the first ``size`` bytes usable; new bytes are zero."""
    cdef uint64_t target
    if size <= region.committed:
        return 0
    target = min((size + COMMIT_STEP - 1) & ~<uint64_t>(COMMIT_STEP - 1), region.reserved)
    if size > target or mprotect(
            region.base + region.committed, target - region.committed, PROT_READ | PROT_WRITE) != 0:
        with gil:
            raise MemoryError(f"cannot commit {size} bytes of memory for a table")
    region.committed = target
    return 0


cdef inline uint64_t slot_bytes(const Table* table) noexcept nogil:
    return (<uint64_t>table.segments << table.segment_shift) * sizeof(Slot)


cdef inline uint64_t record_bytes(const Table* table) noexcept nogil:
    return <uint64_t>table.record_count * table.stride


cdef void region_prepare(Region* region, uint64_t used) noexcept nogil:
    """Bring in what comes after the ``used`` bytes, so that the first touch of a page finds it there.

    To clear a page of two megabytes takes a good part of a millisecond, more where a hypervisor has to find it first.
    Another thread than the one that grows the region may do this; it must not meet the end of the region.
    """
    cdef uint64_t wanted = min(used + HUGE_PAGE + min(used // 8, <uint64_t>AHEAD_MAXIMUM), region.committed)
    cdef uint64_t start = max(region.resident, used & ~<uint64_t>(HUGE_PAGE - 1))
    while start < wanted:
        if madvise(region.base + start, HUGE_PAGE, MADV_POPULATE_WRITE) != 0:
            break
        start += HUGE_PAGE
    region.resident = start


cdef void table_prepare(Table* table) noexcept nogil:
    """Bring in the memory that the table will grow into."""
    if table.huge:
        region_prepare(&table.slots, slot_bytes(table))
        region_prepare(&table.records, record_bytes(table))


cdef int table_init(Table* table, uint32_t stride, int32_t lifetime_days, uint32_t segment_shift) except -1 nogil:
    """Prepare an empty table whose records have ``stride`` bytes, the header included."""
    memset(table, 0, sizeof(Table))
    table.stride = stride
    table.lifetime_days = lifetime_days
    table.segment_shift = segment_shift
    # Small segments are for tests, which have no use for large pages and the time it takes to clear them.
    table.huge = segment_shift >= HUGE_SEGMENT_SHIFT
    region_init(&table.slots, table.huge)
    region_init(&table.records, table.huge)
    table.directory = <uint32_t*>calloc(1, sizeof(uint32_t))
    if table.directory == NULL:
        with gil:
            raise MemoryError()
    new_segment(table, 0)
    return 0


cdef void table_free(Table* table) noexcept nogil:
    preimages_free(preimages_stop(table))
    region_free(&table.slots)
    region_free(&table.records)
    free(table.directory)
    free(table.segment_counts)
    free(table.segment_depths)
    free(table.segment_days)
    memset(table, 0, sizeof(Table))


cdef uint64_t region_bytes(uint64_t used, bint huge) noexcept nogil:
    """Return the most memory that a region takes of which so many bytes are used, with what is brought in ahead.

    It depends on nothing else, least of all on how far a thread has come: who decides the same again finds the same.
    """
    cdef uint64_t ahead
    if not huge:
        return used
    ahead = used + HUGE_PAGE + min(used // 8, <uint64_t>AHEAD_MAXIMUM)
    return min((ahead + HUGE_PAGE - 1) & ~<uint64_t>(HUGE_PAGE - 1),
               (used + COMMIT_STEP - 1) & ~<uint64_t>(COMMIT_STEP - 1))


cdef uint64_t table_bytes(const Table* table) noexcept nogil:
    """Return the bytes of memory in use, or brought in for it."""
    return region_bytes(slot_bytes(table), table.huge) + region_bytes(record_bytes(table), table.huge)


cdef uint64_t table_lines(const Table* table) noexcept nogil:
    """Return how many lines are looked at if every key is searched for once."""
    cdef const Slot* slot = <const Slot*>table.slots.base
    cdef uint64_t mask = (<uint64_t>1 << table.segment_shift) - 1
    cdef uint64_t total = 0, i, line
    for i in range(<uint64_t>table.segments << table.segment_shift):
        if slot[i].record:
            line = i & mask & ~<uint64_t>(LINE_SLOTS - 1)
            total += 1 + ((line - line_in_segment(table, slot[i].tag)) & mask) // LINE_SLOTS
    return total


cdef inline uint64_t filling_segments(const Table* table, uint64_t inserts) noexcept nogil:
    """Return how many segments may fill up while so many records are added.

    Their capacities are spread evenly over a quarter of their slots, so of all that fill up while they grow by that
    much, each insertion brings its share. Twice that, because keys fall where they like.
    """
    return 1 + (2 * inserts >> (table.segment_shift - 2))


cdef uint64_t table_growth(const Table* table, uint64_t inserts) noexcept nogil:
    """Return the most by which ``table_bytes`` can grow when so many records are added."""
    # Another thread may be deciding.
    cdef uint64_t unused = table.record_count - min(table.live, table.record_count)
    cdef uint64_t records = record_bytes(table) + table.stride * (inserts - min(inserts, unused))
    cdef uint64_t slots = slot_bytes(table) + (filling_segments(table, inserts) << table.segment_shift) * sizeof(Slot)
    return region_bytes(slots, table.huge) + region_bytes(records, table.huge) - table_bytes(table)


cdef uint64_t preimages_growth(const Table* table, uint64_t events) noexcept nogil:
    """Return the most memory that it takes to save what so many events change, and to begin to do so.

    An event changes two records of a table at the most, a spilled day and the one that takes its slot. A segment that
    is full gives up what has expired in it.
    """
    cdef uint64_t size = sizeof(uint32_t) + <uint64_t>table.stride
    cdef uint64_t changes = 2 * events + (filling_segments(table, events) * 3 << (table.segment_shift - 2))
    cdef uint64_t count = table.record_count
    cdef uint64_t begin = 0
    if table.preimages != NULL:
        count = table.preimages.count
    else:
        begin = sizeof(Preimages) + (count // 64 + 1) * sizeof(uint64_t) + sizeof(Block)
    return begin + (min(changes, count) * size // (BLOCK_BYTES - size) + 1) * sizeof(Block)


cdef int new_segment(Table* table, uint8_t depth) except -1 nogil:
    """Append an empty segment."""
    cdef uint32_t count = table.segments + 1
    cdef uint32_t* counts = <uint32_t*>realloc(table.segment_counts, count * sizeof(uint32_t))
    if counts != NULL:
        table.segment_counts = counts
    cdef uint8_t* depths = <uint8_t*>realloc(table.segment_depths, count)
    if depths != NULL:
        table.segment_depths = depths
    cdef int32_t* days = <int32_t*>realloc(table.segment_days, count * sizeof(int32_t))
    if days != NULL:
        table.segment_days = days
    if counts == NULL or depths == NULL or days == NULL:
        with gil:
            raise MemoryError()
    region_commit(&table.slots, (<uint64_t>count << table.segment_shift) * sizeof(Slot))
    counts[table.segments] = 0
    depths[table.segments] = depth
    days[table.segments] = INT32_MAX
    table.segments = count
    return 0


cdef inline void place(Table* table, uint32_t segment, uint32_t tag, uint32_t record) noexcept nogil:
    """Put a slot into a segment that has room."""
    cdef uint64_t mask = (<uint64_t>1 << table.segment_shift) - 1
    cdef Slot* slots = (<Slot*>table.slots.base) + (<uint64_t>segment << table.segment_shift)
    cdef uint64_t position = line_in_segment(table, tag)
    cdef uint32_t vacant = free_in_line(&slots[position])
    while vacant == 0:
        position = (position + LINE_SLOTS) & mask
        vacant = free_in_line(&slots[position])
    position += lowest_bit(vacant)
    slots[position].tag = tag
    slots[position].record = record
    table.segment_counts[segment] += 1


cdef inline uint32_t capacity_of(const Table* table, uint32_t segment) noexcept nogil:
    """Return how many slots a segment may fill: half to three quarters of them.

    Hashes fill all segments evenly, so with one capacity for all they would split all at the same time.
    """
    cdef uint32_t spread = (segment * <uint32_t>0x9e3779b1) >> (34 - table.segment_shift)
    return (<uint32_t>1 << (table.segment_shift - 1)) + spread


cdef inline bint is_expired(const Table* table, int32_t day) noexcept nogil:
    return table.lifetime_days >= 0 and day < table.latest_day - table.lifetime_days


cdef int make_room(Table* table, uint32_t tag) except -1 nogil:
    """Drop what has expired from the full segment of ``tag``; split it unless that freed a quarter."""
    cdef uint32_t segment = segment_of(table, tag)
    cdef uint32_t before = table.segment_counts[segment]
    cdef Slot* scratch = <Slot*>malloc(sizeof(Slot) << table.segment_shift)
    if scratch == NULL:
        with gil:
            raise MemoryError()
    try:
        # To ask a record for its day is a cache miss, so a segment that is too young to have expired ones is not asked.
        if is_expired(table, table.segment_days[segment]):
            drop_expired(table, segment, scratch)
        if table.segment_counts[segment] > before - before // 4:
            split(table, segment, tag, scratch)
    finally:
        free(scratch)
    return 0


cdef void drop_expired(Table* table, uint32_t segment, Slot* scratch) noexcept nogil:
    """Free the expired records of a segment."""
    cdef uint32_t size = <uint32_t>1 << table.segment_shift
    cdef Slot* slots = (<Slot*>table.slots.base) + (<uint64_t>segment << table.segment_shift)
    cdef uint32_t i
    cdef int32_t day, oldest = INT32_MAX
    memcpy(scratch, slots, size * sizeof(Slot))
    memset(slots, 0, size * sizeof(Slot))
    table.segment_counts[segment] = 0
    for i in range(size):
        if scratch[i].record:
            day = (<Header*>record_at(table, scratch[i].record - 1)).day
            if is_expired(table, day):
                release(table, scratch[i].record)
            else:
                oldest = min(oldest, day)
                place(table, segment, scratch[i].tag, scratch[i].record)
    table.segment_days[segment] = oldest


cdef int table_reclaim(Table* table, int32_t day) except -1 nogil:
    """Free every record that is expired on ``day``."""
    cdef Slot* scratch
    cdef uint32_t segment
    table.latest_day = max(table.latest_day, day)
    scratch = <Slot*>malloc(sizeof(Slot) << table.segment_shift)
    if scratch == NULL:
        with gil:
            raise MemoryError()
    for segment in range(table.segments):
        if is_expired(table, table.segment_days[segment]):
            drop_expired(table, segment, scratch)
    free(scratch)
    return 0


cdef inline void release(Table* table, uint32_t record) noexcept nogil:
    """Put a record (number + 1) on the free list."""
    cdef Header* header = <Header*>record_at(table, record - 1)
    touch(table, header)
    header.first = 0
    header.next_free = table.free_head
    table.free_head = record
    table.live -= 1


cdef int split(Table* table, uint32_t segment, uint32_t tag, Slot* scratch) except -1 nogil:
    """Move the half of a segment whose next tag bit is set into a new one."""
    cdef uint32_t size = <uint32_t>1 << table.segment_shift
    cdef uint8_t depth = table.segment_depths[segment]
    cdef Slot* slots
    cdef uint32_t i, half
    cdef uint64_t first
    if depth == table.depth:
        double_directory(table)
    new_segment(table, depth + 1)
    half = table.segments - 1
    table.segment_depths[segment] = depth + 1
    table.segment_days[half] = table.segment_days[segment]
    # Of the directory's entries for this segment, the upper half now belongs to the new one.
    first = <uint64_t>((tag >> 1) >> (31 - depth)) << (table.depth - depth)
    for i in range(1 << (table.depth - depth - 1)):
        table.directory[first + (<uint64_t>1 << (table.depth - depth - 1)) + i] = half
    slots = (<Slot*>table.slots.base) + (<uint64_t>segment << table.segment_shift)
    memcpy(scratch, slots, size * sizeof(Slot))
    memset(slots, 0, size * sizeof(Slot))
    table.segment_counts[segment] = 0
    for i in range(size):
        if scratch[i].record:
            place(table, half if (scratch[i].tag >> (31 - depth)) & 1 else segment, scratch[i].tag, scratch[i].record)
    return 0


cdef int double_directory(Table* table) except -1 nogil:
    cdef uint64_t size = <uint64_t>1 << table.depth
    cdef uint32_t* doubled
    cdef uint64_t i
    if table.depth == MAXIMUM_DEPTH:
        with gil:
            raise MemoryError("a table cannot have more segments")
    doubled = <uint32_t*>malloc(2 * size * sizeof(uint32_t))
    if doubled == NULL:
        with gil:
            raise MemoryError()
    for i in range(2 * size):
        doubled[i] = table.directory[i >> 1]
    free(table.directory)
    table.directory = doubled
    table.depth += 1
    return 0


cdef char* table_insert(Table* table, uint64_t first, uint64_t second, int32_t day) except NULL nogil:
    """Add a record for a key that is not there; but for its header it is zero."""
    cdef uint32_t tag = tag_of(first)
    cdef uint32_t segment, record
    cdef char* memory
    while True:
        segment = segment_of(table, tag)
        if table.segment_counts[segment] < capacity_of(table, segment):
            break
        make_room(table, tag)
    if table.free_head:
        record = table.free_head
        memory = record_at(table, record - 1)
        touch(table, memory)
        table.free_head = (<Header*>memory).next_free
        memset(memory, 0, table.stride)
    else:
        region_commit(&table.records, <uint64_t>(table.record_count + 1) * table.stride)
        table.record_count += 1
        record = table.record_count
        memory = record_at(table, record - 1)
    table.live += 1
    (<Header*>memory).first = first
    (<Header*>memory).second = second
    (<Header*>memory).day = day
    (<Header*>memory).next_free = record
    table.segment_days[segment] = min(table.segment_days[segment], day)
    place(table, segment, tag, record)
    return memory


cdef int table_index(Table* table, uint32_t number) except -1 nogil:
    """Take a record that was put into place into the index, or the free list if it is free."""
    cdef Header* header = <Header*>record_at(table, number)
    cdef uint32_t tag = tag_of(header.first)
    cdef uint32_t segment
    table.live += 1
    if header.first == 0:
        release(table, number + 1)
        return 0
    while True:
        segment = segment_of(table, tag)
        if table.segment_counts[segment] < capacity_of(table, segment):
            break
        make_room(table, tag)
    table.segment_days[segment] = min(table.segment_days[segment], header.day)
    place(table, segment, tag, number + 1)
    return 0


# Images: see image.pyx.

cdef int preimages_start(Table* table) except -1 nogil:
    """Save every record from now on before its first change."""
    cdef Preimages* preimages = <Preimages*>calloc(1, sizeof(Preimages))
    if preimages != NULL:
        preimages.count = table.record_count
        preimages.saved = <uint64_t*>calloc(table.record_count // 64 + 1, sizeof(uint64_t))
        preimages.first = preimages.last = <Block*>malloc(sizeof(Block))
        if preimages.saved == NULL or preimages.first == NULL:
            free(preimages.saved)
            free(preimages.first)
            free(preimages)
            preimages = NULL
    if preimages == NULL:
        with gil:
            raise MemoryError("there is no memory to take an image of the state")
    preimages.first.next = NULL
    preimages.first.size = 0
    preimages.bytes = sizeof(Preimages) + (preimages.count // 64 + 1) * sizeof(uint64_t) + sizeof(Block)
    table.preimages = preimages
    return 0


cdef Preimages* preimages_stop(Table* table) noexcept nogil:
    """End an image, if one is taken, and return what was saved for it, which is to be freed."""
    cdef Preimages* preimages = table.preimages
    table.preimages = NULL
    return preimages


cdef void preimages_free(Preimages* preimages) noexcept nogil:
    """Give back the memory of an image that has ended: any thread may, and it can take a tenth of a second."""
    cdef Block* block
    if preimages == NULL:
        return
    while preimages.first != NULL:
        block = preimages.first
        preimages.first = block.next
        free(block)
    free(preimages.saved)
    free(preimages)


cdef void save_preimage(Table* table, const char* record) noexcept nogil:
    cdef Preimages* preimages = table.preimages
    cdef uint32_t number = <uint32_t>((record - table.records.base) // table.stride)
    cdef uint64_t bit = <uint64_t>1 << (number & 63)
    cdef Block* block
    cdef uint64_t size = sizeof(number) + table.stride
    if number >= preimages.count or preimages.saved[number >> 6] & bit:
        return
    preimages.saved[number >> 6] |= bit
    block = preimages.last
    if block.size + size > BLOCK_BYTES:
        block = <Block*>malloc(sizeof(Block))
        if block == NULL:
            preimages.failed = True
            return
        block.next = NULL
        block.size = 0
        preimages.bytes += sizeof(Block)
        # Whoever reads this list from another thread must not see a block before it is empty.
        memory_fence()
        preimages.last.next = block
        preimages.last = block
    memcpy(block.data + block.size, &number, sizeof(number))
    memcpy(block.data + block.size + sizeof(number), record, table.stride)
    # The copy must be seen before its size, and both before the change that it is taken for.
    memory_fence()
    block.size += size
    memory_fence()


cdef int table_relayout(Table* table, uint32_t stride, const Move* moves, uint32_t count) except -1 nogil:
    """Give every record ``stride`` bytes: the header and the parts named by ``moves`` are kept, the rest is zero."""
    cdef Region records
    cdef uint32_t number, i
    cdef char* before
    cdef char* after
    memset(&records, 0, sizeof(Region))
    region_init(&records, table.huge)
    region_commit(&records, <uint64_t>table.record_count * stride)
    for number in range(table.record_count):
        before = record_at(table, number)
        after = records.base + <uint64_t>number * stride
        memcpy(after, before, sizeof(Header))
        for i in range(count):
            memcpy(after + moves[i].target, before + moves[i].source, moves[i].size)
    region_free(&table.records)
    table.records = records
    table.stride = stride
    return 0
