from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strlen

from fastpath.decide cimport COLUMN_OUTCOME, COLUMN_TRIPPED, COLUMNS, CampaignSet, Rows, State
from fastpath.msgpack cimport (
    Buffer,
    Reader,
    Value,
    read_head,
    room,
    write_array,
    write_bin_head,
    write_bytes,
    write_head,
    write_integer,
    write_map,
    write_text,
    write_unsigned,
)
from fastpath.rules cimport Rules
from fastpath.siphash cimport PADDING
from fastpath.types cimport OUTCOME_DEFERRED, Event, Text, data_of

cdef enum:
    BYTES_COLUMNS = 3          # event, member, order: one value per entry
    SPARSE_COLUMNS = 5         # observed, three masked forms, payload
    MASK_BYTES = 96
    NIL = 0xc0

cdef const char** INTEGER_NAMES = [
    "at", "at_seq", "index", "ts", "day", "kind", "outcome", "cause", "frozen", "amount", "base", "uncapped", "points",
    "campaign_set", "tripped", "device", "ip", "phone",
]


cdef extern from *:
    """
    /* Copy a text of up to PADDING bytes, and then some: source and target have room for that. */
    static inline void accrual_copy_text(unsigned char *target, const char *source, uint32_t size) {
        if (size == 0)
            return;
        if (size <= 16)
            memcpy(target, source, 16);
        else if (size <= 32)
            memcpy(target, source, 32);
        else
            memcpy(target, source, size);
    }
    """
    void copy_text "accrual_copy_text"(unsigned char* target, const char* source, uint32_t size) noexcept nogil

cdef extern from *:
    """
    /* 64-bit comparisons of several numbers at once came with later processors; glibc picks what this one has. */
    #if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
    #define ACCRUAL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
    #else
    #define ACCRUAL_CLONES
    #endif

    ACCRUAL_CLONES static void accrual_bounds(const int64_t *values, uint32_t count, int64_t *low, int64_t *high) {
        int64_t least = count ? values[0] : 0;
        int64_t most = least;
        for (uint32_t i = 1; i < count; i++) {
            least = values[i] < least ? values[i] : least;
            most = values[i] > most ? values[i] : most;
        }
        *low = least;
        *high = most;
    }
    """
    void bounds "accrual_bounds"(const int64_t* values, uint32_t count, int64_t* low, int64_t* high) noexcept nogil


cdef inline void write_name(Buffer* buffer, const char* name) noexcept nogil:
    write_text(buffer, name, strlen(name))


cdef void write_narrowed(unsigned char* target, const int64_t* values, uint32_t count, int64_t base,
                         int width) noexcept nogil:
    """Write the differences from ``base``, little-endian, ``width`` bytes each."""
    cdef uint32_t i
    cdef uint16_t* target_2 = <uint16_t*>target
    cdef uint32_t* target_4 = <uint32_t*>target
    cdef uint64_t* target_8 = <uint64_t*>target
    cdef uint64_t start = <uint64_t>base
    cdef uint16_t narrow_2
    cdef uint32_t narrow_4
    cdef uint64_t narrow_8
    if width == 1:
        for i in range(count):
            target[i] = <uint8_t>(<uint64_t>values[i] - start)
    elif width == 2:
        for i in range(count):
            narrow_2 = <uint16_t>(<uint64_t>values[i] - start)
            memcpy(target_2 + i, &narrow_2, 2)
    elif width == 4:
        for i in range(count):
            narrow_4 = <uint32_t>(<uint64_t>values[i] - start)
            memcpy(target_4 + i, &narrow_4, 4)
    elif width == 8:
        for i in range(count):
            narrow_8 = <uint64_t>values[i] - start
            memcpy(target_8 + i, &narrow_8, 8)


cdef void write_integers(Buffer* buffer, const int64_t* values, uint32_t count) noexcept nogil:
    """Write an integer column: ``[base, width, bytes]``."""
    cdef int64_t low, high
    cdef uint64_t spread
    cdef int width
    cdef unsigned char* target
    bounds(values, count, &low, &high)
    spread = <uint64_t>high - <uint64_t>low
    if spread == 0:
        width = 0
    elif spread < 0x100:
        width = 1
    elif spread < 0x10000:
        width = 2
    elif spread < <uint64_t>0x100000000:
        width = 4
    else:
        width = 8
    write_array(buffer, 3)
    write_integer(buffer, low)
    write_unsigned(buffer, width)
    write_bin_head(buffer, <uint64_t>count * width)
    target = room(buffer, <uint64_t>count * width)
    if target != NULL:
        write_narrowed(target, values, count, low, width)


cdef inline const Text* text_of(const Event* event, int column) noexcept nogil:
    if column == 0:
        return &event.id
    return &event.member if column == 1 else &event.order


cdef void write_texts(Buffer* buffer, const Event* events, const Rows* rows, int column,
                      int64_t* scratch) noexcept nogil:
    """Write a bytes column of the entries' ids, members or orders."""
    cdef uint64_t total = 0
    cdef uint32_t i
    cdef const Text* text
    cdef unsigned char* target
    for i in range(rows.count):
        scratch[i] = text_of(&events[rows.events[i]], column).size
        total += scratch[i]
    write_array(buffer, 2)
    write_integers(buffer, scratch, rows.count)
    write_bin_head(buffer, total)
    target = room(buffer, total + PADDING)
    if target == NULL:
        return
    buffer.size -= PADDING
    for i in range(rows.count):
        text = text_of(&events[rows.events[i]], column)
        copy_text(target, data_of(&events[rows.events[i]], text), text.size)
        target += text.size


cdef uint32_t cut_characters(const char* data, uint32_t size, uint32_t count, bint at_end) noexcept nogil:
    """Return the bytes of the first (or last) ``count`` characters of a UTF-8 text."""
    cdef uint32_t i = 0
    if not at_end:
        while i < size and (count or (data[i] & 0xc0) == 0x80):
            if (data[i] & 0xc0) != 0x80:
                count -= 1
            i += 1
        return i
    while count and i < size:
        i += 1
        if (data[size - i] & 0xc0) != 0x80:
            count -= 1
    return i


cdef uint32_t mask_text(const char* data, uint32_t size, bint is_ip, char* masked) noexcept nogil:
    """Write the form for people of a device, IP or phone, as accrual.outcomes.privacy does; return its bytes."""
    cdef uint32_t i, characters = 0, kept, head, tail
    if size == 0:
        return 0
    if is_ip:
        i = size
        while i and data[i - 1] != b"." and data[i - 1] != b":":
            i -= 1
        if i:
            memcpy(masked, data, i)
            masked[i] = b"*"
            return i + 1
    for i in range(size):
        characters += (data[i] & 0xc0) != 0x80
    kept = min(<uint32_t>3, characters // 3)
    head = cut_characters(data, size, kept, False)
    tail = cut_characters(data, size, kept, True)
    memcpy(masked, data, head)
    memcpy(masked + head, <const char*>"****", 4)
    memcpy(masked + head + 4, data + size - tail, tail)
    return head + 4 + tail


cdef void write_masked(Buffer* buffer, const Event* events, const Rows* rows, int key, int64_t* scratch) noexcept nogil:
    """Write a bytes column of masked forms, one for each entry that tripped a limit."""
    cdef Buffer texts
    cdef const Event* event
    cdef const Text* text
    cdef char masked[MASK_BYTES]
    cdef uint32_t i, count = 0
    texts.data = NULL
    texts.size = texts.capacity = 0
    texts.failed = False
    for i in range(rows.count):
        if rows.columns[COLUMN_TRIPPED][i]:
            event = &events[rows.events[i]]
            text = &event.device if key == 0 else (&event.ip if key == 1 else &event.phone)
            scratch[count] = mask_text(data_of(event, text), text.size, key == 1, masked)
            write_bytes(&texts, masked, scratch[count])
            count += 1
    write_blob_column(buffer, &texts, scratch, count)


cdef void write_blob_column(Buffer* buffer, Buffer* blobs, const int64_t* sizes, uint32_t count) noexcept nogil:
    """Write a bytes column from its concatenated values, and free them."""
    write_array(buffer, 2)
    write_integers(buffer, sizes, count)
    write_bin_head(buffer, blobs.size)
    write_bytes(buffer, blobs.data, blobs.size)
    buffer.failed = buffer.failed or blobs.failed
    free(blobs.data)


cdef inline void write_optional(Buffer* buffer, const Event* event, const Text* text) noexcept nogil:
    if text.size:
        write_text(buffer, data_of(event, text), text.size)
    else:
        write_head(buffer, NIL, 0, 0)


cdef void write_list(Buffer* buffer, const char* items, uint32_t size, uint32_t count, bint pairs) noexcept nogil:
    """Write lines or tags again, in their shortest encoding."""
    cdef Reader reader
    cdef Value value
    cdef uint32_t _i
    if count == 0:
        write_head(buffer, NIL, 0, 0)
        return
    reader.at = <const unsigned char*>items
    reader.end = reader.at + size
    write_array(buffer, count)
    for _i in range(count):
        if pairs:
            read_head(&reader, &value)
            write_array(buffer, 2)
        read_head(&reader, &value)
        write_text(buffer, <const char*>reader.at, value.size)
        reader.at += value.size
        if pairs:
            read_head(&reader, &value)
            write_integer(buffer, value.number)


cdef void write_attributes(Buffer* buffer, const Event* event) noexcept nogil:
    write_map(buffer, (event.tier.size != 0) + (event.card_until != 0) + (event.immune_until != 0))
    if event.tier.size:
        write_name(buffer, "tier")
        write_text(buffer, data_of(event, &event.tier), event.tier.size)
    if event.card_until:
        write_name(buffer, "card_until")
        write_integer(buffer, event.card_until)
    if event.immune_until:
        write_name(buffer, "immune_until")
        write_integer(buffer, event.immune_until)


cdef inline int items_of_payload(const Event* event) noexcept nogil:
    """Return how many items of the compact array are written; trailing absent ones are not."""
    if event.tier.size or event.card_until or event.immune_until:
        return 13
    if event.tag_count:
        return 12
    if event.line_count:
        return 11
    if event.city_name.size:
        return 10
    if event.order.size:
        return 6
    return 5 if event.amount >= 0 else 4


cdef void write_payload(Buffer* buffer, const Event* event) noexcept nogil:
    """Write the canonical compact form of a deferred event, without device, IP and phone."""
    cdef int items = items_of_payload(event)
    cdef int item
    write_array(buffer, items)
    write_text(buffer, data_of(event, &event.id), event.id.size)
    write_text(buffer, data_of(event, &event.kind_name), event.kind_name.size)
    write_text(buffer, data_of(event, &event.member), event.member.size)
    write_integer(buffer, event.ts)
    for item in range(4, items):
        if item == 4 and event.amount >= 0:
            write_integer(buffer, event.amount)
        elif item == 5:
            write_optional(buffer, event, &event.order)
        elif item == 9:
            write_optional(buffer, event, &event.city_name)
        elif item == 10:
            write_list(buffer, data_of(event, &event.lines), event.lines.size, event.line_count, True)
        elif item == 11:
            write_list(buffer, data_of(event, &event.tags), event.tags.size, event.tag_count, False)
        elif item == 12:
            write_attributes(buffer, event)
        else:
            write_head(buffer, NIL, 0, 0)


cdef void write_payloads(Buffer* buffer, const Event* events, const Rows* rows, int64_t* scratch) noexcept nogil:
    """Write a bytes column of payloads, one for each deferred entry."""
    cdef Buffer payloads
    cdef uint64_t before
    cdef uint32_t i, count = 0
    payloads.data = NULL
    payloads.size = payloads.capacity = 0
    payloads.failed = False
    for i in range(rows.count):
        if rows.columns[COLUMN_OUTCOME][i] == OUTCOME_DEFERRED:
            before = payloads.size
            write_payload(&payloads, &events[rows.events[i]])
            scratch[count] = payloads.size - before
            count += 1
    write_blob_column(buffer, &payloads, scratch, count)


cdef int write_columns(Buffer* buffer, const Event* events, const Rows* rows) except -1 nogil:
    """Write the map of all columns."""
    cdef int64_t* scratch = <int64_t*>malloc((rows.count + 1) * sizeof(int64_t))
    cdef int column
    if scratch == NULL:
        with gil:
            raise MemoryError()
    write_map(buffer, COLUMNS + BYTES_COLUMNS + SPARSE_COLUMNS)
    for column in range(COLUMNS):
        write_name(buffer, INTEGER_NAMES[column])
        write_integers(buffer, rows.columns[column], rows.count)
    write_name(buffer, "event")
    write_texts(buffer, events, rows, 0, scratch)
    write_name(buffer, "member")
    write_texts(buffer, events, rows, 1, scratch)
    write_name(buffer, "order")
    write_texts(buffer, events, rows, 2, scratch)
    write_name(buffer, "observed")
    write_integers(buffer, rows.observed, rows.observed_count)
    write_name(buffer, "device_masked")
    write_masked(buffer, events, rows, 0, scratch)
    write_name(buffer, "ip_masked")
    write_masked(buffer, events, rows, 1, scratch)
    write_name(buffer, "phone_masked")
    write_masked(buffer, events, rows, 2, scratch)
    write_name(buffer, "payload")
    write_payloads(buffer, events, rows, scratch)
    free(scratch)
    return 0


cdef void write_campaign_sets(Buffer* buffer, const Rules* rules, const State* state, const Rows* rows) noexcept nogil:
    """Write the sets of campaign numbers that the entries name, in order of first use."""
    cdef const CampaignSet* chosen
    cdef uint32_t i, count
    cdef int32_t campaign
    write_array(buffer, rows.sets_count)
    for i in range(rows.sets_count):
        chosen = &state.sets[rows.sets[i]]
        count = 0
        for campaign in range(rules.campaign_count):
            count += (chosen.words[campaign >> 6] >> (campaign & 63)) & 1
        write_array(buffer, count)
        for campaign in range(rules.campaign_count):
            if (chosen.words[campaign >> 6] >> (campaign & 63)) & 1:
                write_unsigned(buffer, campaign)
