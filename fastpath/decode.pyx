from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

from fastpath.msgpack cimport (
    TYPE_ARRAY,
    TYPE_INTEGER,
    TYPE_MAP,
    TYPE_NIL,
    TYPE_TEXT,
    Reader,
    Value,
    big_endian,
    read_head,
    skip,
)
from fastpath.rules cimport (
    DOMAIN_CONTENT,
    DOMAIN_DEVICE,
    DOMAIN_ID,
    DOMAIN_IP,
    DOMAIN_MEMBER,
    DOMAIN_NAME,
    DOMAIN_PHONE,
    Rules,
    name_find,
)
from fastpath.siphash cimport SipKey, hash_text, hash_text_128, load_rest, load_word, rotated
from fastpath.types cimport KEY_DEVICE, KEY_IP, KEY_MEMBER, KEY_PHONE, KIND_REFUNDED, Event, Hash128, Text

cdef extern from *:
    """
    #ifdef __SSE2__
    #include <emmintrin.h>
    #endif

    typedef unsigned __int128 accrual_uint128;

    /* Whether at most 31 bytes are ASCII; 32 are readable. */
    static inline int accrual_is_ascii(const char *data, uint32_t size) {
    #ifdef __SSE2__
        const uint32_t low = (uint32_t)_mm_movemask_epi8(_mm_loadu_si128((const __m128i *)data));
        const uint32_t high = (uint32_t)_mm_movemask_epi8(_mm_loadu_si128((const __m128i *)(data + 16)));
        return ((low | high << 16) & ((1u << size) - 1)) == 0;
    #else
        unsigned char seen = 0;
        for (uint32_t i = 0; i < size; i++)
            seen |= (unsigned char)data[i];
        return seen < 0x80;
    #endif
    }

    static inline uint64_t accrual_folded(uint64_t left, uint64_t right) {
        accrual_uint128 product = (accrual_uint128)left * right;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    """
    ctypedef unsigned long long uint128 "accrual_uint128"
    bint is_ascii "accrual_is_ascii"(const char* data, uint32_t size) noexcept nogil
    uint64_t folded "accrual_folded"(uint64_t left, uint64_t right) noexcept nogil

cdef enum:
    IDENTITY_BYTES = 64
    NAME_BYTES = 32
    MAXIMUM_LINES = 64
    MAXIMUM_TAGS = 8
    REQUIRED_ITEMS = 4
    KNOWN_ITEMS = 13
    PAIR = 0x92                # an array of two

cdef int64_t MAXIMUM_TIME_MS = (<int64_t>1 << 53) - 1
cdef int64_t MAXIMUM_AMOUNT_FEN = 1000000000000
cdef int64_t ABSENT = -1


cdef void hashing_init(Hashing* hashing, SipKey key) noexcept nogil:
    """Derive all secrets from one key."""
    cdef const char* labels = "seed\0\0\0\0factor\0\0\0\0\0\0\0\0\0"
    memset(hashing, 0, sizeof(Hashing))
    hashing.key = key
    hashing.content_seed = hash_text(key, DOMAIN_CONTENT, labels, 4)
    hashing.content_factor = hash_text(key, DOMAIN_CONTENT, labels + 8, 6)


cdef bint is_utf8(const unsigned char* at, uint64_t size) noexcept nogil:
    """Tell whether the bytes are well-formed UTF-8, surrogates excluded."""
    cdef const unsigned char* end = at + size
    cdef uint32_t first, second
    cdef int following
    while end - at >= 8:
        if load_word(<const char*>at) & <uint64_t>0x8080808080808080:
            break
        at += 8
    while at < end:
        first = at[0]
        if first < 0x80:
            at += 1
            continue
        following = 0
        if 0xc2 <= first <= 0xdf:
            following = 1
        elif (first & 0xf0) == 0xe0:
            following = 2
        elif 0xf0 <= first <= 0xf4:
            following = 3
        if following == 0 or end - at <= following:
            return False
        second = at[1]
        if (second & 0xc0) != 0x80:
            return False
        if (first == 0xe0 and second < 0xa0) or (first == 0xed and second > 0x9f):
            return False
        if (first == 0xf0 and second < 0x90) or (first == 0xf4 and second > 0x8f):
            return False
        if following > 1 and (at[2] & 0xc0) != 0x80:
            return False
        if following > 2 and (at[3] & 0xc0) != 0x80:
            return False
        at += following + 1
    return True


cdef inline bint is_absent(const Value* value) noexcept nogil:
    return value.type == TYPE_NIL or ((value.type == TYPE_TEXT or value.type == TYPE_ARRAY) and value.size == 0)


cdef inline bint take_text(Reader* reader, const Value* value, uint32_t limit, Text* text) noexcept nogil:
    """Take the bytes of a text whose head was read."""
    if value.type != TYPE_TEXT or value.size > limit or not is_utf8(reader.at, value.size):
        return False
    text.data = <const char*>reader.at
    text.size = <uint32_t>value.size
    reader.at += value.size
    return True


cdef bint read_any_text(Reader* reader, uint32_t limit, Text* text) noexcept nogil:
    """Read an optional text, whatever its form."""
    cdef Value value
    read_head(reader, &value)
    if is_absent(&value):
        return True
    return take_text(reader, &value, limit, text)


cdef inline bint read_text(Reader* reader, uint32_t limit, Text* text) noexcept nogil:
    """Read an optional text."""
    cdef const unsigned char* at = reader.at
    cdef uint32_t size
    if at < reader.end and 0xa0 <= at[0] <= 0xbf:
        # Nearly every text is a short one of ASCII.
        size = at[0] & 0x1f
        if size <= limit and size < reader.end - at and is_ascii(<const char*>at + 1, size):
            text.data = <const char*>at + 1
            text.size = size
            reader.at = at + 1 + size
            return True
    return read_any_text(reader, limit, text)


cdef inline bint read_name(Reader* reader, Text* text) noexcept nogil:
    """Read a category or tag: a text that may be empty, but not absent in another way."""
    cdef Reader start = reader[0]
    cdef Value value
    text.size = 0
    if not read_text(reader, NAME_BYTES, text):
        return False
    return text.size != 0 or read_head(&start, &value) == TYPE_TEXT


cdef bint read_any_integer(Reader* reader, int64_t low, int64_t high, int64_t* number) noexcept nogil:
    """Read an optional integer, whatever its form."""
    cdef Value value
    read_head(reader, &value)
    if is_absent(&value):
        return True
    if value.type != TYPE_INTEGER or value.huge or not low <= value.number <= high:
        return False
    number[0] = value.number
    return True


cdef inline bint read_integer(Reader* reader, int64_t low, int64_t high, int64_t* number) noexcept nogil:
    """Read an optional integer."""
    cdef const unsigned char* at = reader.at
    cdef uint64_t value
    cdef int width
    if at < reader.end and 0xcc <= at[0] <= 0xcf:
        # Nearly every number is one of these, 1 to 8 bytes.
        width = 1 << (at[0] - 0xcc)
        if reader.end - at > width:
            value = big_endian(at + 1, 8) >> (64 - 8 * width)
            reader.at = at + 1 + width
            number[0] = <int64_t>value
            return <uint64_t>low <= value <= <uint64_t>high
    return read_any_integer(reader, low, high, number)


cdef inline CachedName* cached_name(Hashing* hashing, uint64_t word, uint32_t size) noexcept nogil:
    return &hashing.names[((word + size) * <uint64_t>0x9e3779b97f4a7c15) >> (64 - CACHE_BITS)]


cdef uint64_t any_name_hash(Hashing* hashing, const char* data, uint32_t size) noexcept nogil:
    """Return the hash of a name of at least one byte, whether it was seen before or not."""
    cdef CachedName name
    cdef CachedName* known
    if size > CACHED_BYTES:
        return hash_text(hashing.key, DOMAIN_NAME, data, size)
    name.words[1] = name.words[2] = name.words[3] = 0
    if size <= 8:
        name.words[0] = load_rest(data, size)
    else:
        name.words[0] = load_word(data)
        name.words[1] = load_word(data + size - 8)
        if size > 16:
            name.words[2] = load_word(data + 8)
            name.words[3] = load_word(data + size - 16)
    known = cached_name(hashing, name.words[0] + 31 * name.words[1], size)
    if (known.size != size or known.words[0] != name.words[0] or known.words[1] != name.words[1]
            or known.words[2] != name.words[2] or known.words[3] != name.words[3]):
        name.size = size
        name.hash = hash_text(hashing.key, DOMAIN_NAME, data, size)
        known[0] = name
    return known.hash


cdef inline uint64_t name_hash(Hashing* hashing, const Text* text) noexcept nogil:
    """Return the hash of a kind, city, category, tag or tier; 0 where it is absent.

    There are few of them, so the last ones are kept; a name that pushes out another costs time and nothing else.
    """
    cdef uint64_t word
    cdef CachedName* known
    if text.size == 0:
        return 0
    if text.size <= 8:
        # Most names are short ones that were seen before. Of those the other words are 0.
        word = load_rest(text.data, text.size)
        known = cached_name(hashing, word, text.size)
        if known.size == text.size and known.words[0] == word:
            return known.hash
    return any_name_hash(hashing, text.data, text.size)


cdef inline bint read_line(const Rules* rules, Hashing* hashing, Reader* reader, Event* event,
                           int64_t* sum_fen, uint128* base) noexcept nogil:
    """Read one line and add it up."""
    cdef Value value
    cdef Text category
    cdef int64_t amount = ABSENT, weight
    cdef uint64_t hash
    cdef int32_t known
    if reader.at < reader.end and reader.at[0] == PAIR:
        reader.at += 1
    else:
        read_head(reader, &value)
        if value.type != TYPE_ARRAY or value.size != 2:
            return False
    if not read_name(reader, &category):
        return False
    if not read_integer(reader, 0, MAXIMUM_AMOUNT_FEN, &amount) or amount == ABSENT:
        return False
    sum_fen[0] += amount
    hash = name_hash(hashing, &category)
    event.content = folded(event.content ^ hash, hashing.content_factor + <uint64_t>amount)
    if rules.priced_kind >= 0 and event.kind == rules.priced_kind:
        if hash == 0:
            weight = rules.blank_weight
        else:
            known = name_find(&rules.categories, hash, -1)
            weight = rules.earning[event.kind].weight if known < 0 else rules.category_weights[known]
        base[0] += <uint128>amount * <uint128>weight
    return True


cdef bint read_lines(const Rules* rules, Hashing* hashing, Reader* reader, Event* event) noexcept nogil:
    """Read the lines, add them to the base where the kind is priced per yuan, and check their sum."""
    cdef Value value
    cdef int64_t sum_fen = 0
    cdef uint64_t _i
    cdef uint128 base = 0
    cdef const unsigned char* start
    read_head(reader, &value)
    if is_absent(&value):
        return True
    if value.type != TYPE_ARRAY or value.size > MAXIMUM_LINES:
        return False
    event.line_count = value.size
    start = reader.at
    for _i in range(event.line_count):
        if not read_line(rules, hashing, reader, event, &sum_fen, &base):
            return False
    event.lines.data = <const char*>start
    event.lines.size = <uint32_t>(reader.at - start)
    event.base_high = <uint64_t>(base >> 64)
    event.base_low = <uint64_t>base
    return sum_fen == event.amount


cdef bint read_tags(const Rules* rules, Hashing* hashing, Reader* reader, Event* event) noexcept nogil:
    """Read the tags and unite the campaigns that name them."""
    cdef Value value
    cdef Text tag
    cdef uint64_t _i, hash
    cdef int32_t known, word
    cdef const unsigned char* start
    read_head(reader, &value)
    if is_absent(&value):
        return True
    if value.type != TYPE_ARRAY or value.size > MAXIMUM_TAGS:
        return False
    event.tag_count = value.size
    start = reader.at
    for _i in range(event.tag_count):
        if not read_name(reader, &tag):
            return False
        hash = name_hash(hashing, &tag)
        event.content = folded(event.content ^ hash, hashing.content_factor)
        known = name_find(&rules.tags, hash, -1)
        if known >= 0:
            for word in range(rules.words):
                event.tags_mask[word] |= rules.tag_masks[known * rules.words + word]
    event.tags.data = <const char*>start
    event.tags.size = <uint32_t>(reader.at - start)
    return True


cdef inline bint is_key(const Text* text, const char* name, uint32_t size) noexcept nogil:
    return text.size == size and memcmp(text.data, name, size) == 0


cdef bint read_attributes(Reader* reader, Event* event, int depth) noexcept nogil:
    """Read the map of attributes. Of a key that repeats the last value counts; unknown keys are ignored."""
    cdef Value value
    cdef Text name
    cdef Reader tier, card_until, immune_until, key
    cdef uint64_t _i
    read_head(reader, &value)
    if is_absent(&value):
        return True
    if value.type != TYPE_MAP:
        return False
    tier.at = card_until.at = immune_until.at = NULL
    tier.end = card_until.end = immune_until.end = reader.end
    for _i in range(value.size):
        key = reader[0]
        if not skip(reader, depth + 2):
            return False
        read_head(&key, &value)
        name.size = 0
        if value.type == TYPE_TEXT:
            name.data = <const char*>key.at
            name.size = <uint32_t>min(value.size, <uint64_t>1024)
        if is_key(&name, "tier", 4):
            tier.at = reader.at
        elif is_key(&name, "card_until", 10):
            card_until.at = reader.at
        elif is_key(&name, "immune_until", 12):
            immune_until.at = reader.at
        if not skip(reader, depth + 2):
            return False
    if tier.at != NULL and not read_text(&tier, NAME_BYTES, &event.tier):
        return False
    if card_until.at != NULL and not read_integer(&card_until, 1, MAXIMUM_TIME_MS, &event.card_until):
        return False
    if immune_until.at != NULL and not read_integer(&immune_until, 1, MAXIMUM_TIME_MS, &event.immune_until):
        return False
    return True


cdef inline bint read_items(const Rules* rules, Hashing* hashing, Reader* reader, uint64_t count,
                            Event* event, int depth) noexcept nogil:
    """Read the array's items in their order."""
    cdef uint64_t kind_hash, _item
    if not (read_text(reader, IDENTITY_BYTES, &event.id) and read_text(reader, NAME_BYTES, &event.kind_name)
            and read_text(reader, IDENTITY_BYTES, &event.member)
            and read_integer(reader, 1, MAXIMUM_TIME_MS, &event.ts)):
        return False
    if event.id.size == 0 or event.kind_name.size == 0 or event.member.size == 0 or event.ts == 0:
        return False
    kind_hash = name_hash(hashing, &event.kind_name)
    event.kind = name_find(&rules.kinds, kind_hash, -1)
    event.content = folded(hashing.content_seed ^ kind_hash, hashing.content_factor)
    if count > 4 and not read_integer(reader, 0, MAXIMUM_AMOUNT_FEN, &event.amount):
        return False
    if count > 5 and not read_text(reader, IDENTITY_BYTES, &event.order):
        return False
    if count > 6 and not read_text(reader, IDENTITY_BYTES, &event.device):
        return False
    if count > 7 and not read_text(reader, IDENTITY_BYTES, &event.ip):
        return False
    if count > 8 and not read_text(reader, IDENTITY_BYTES, &event.phone):
        return False
    if count > 9 and not read_text(reader, NAME_BYTES, &event.city):
        return False
    if count > 10 and not read_lines(rules, hashing, reader, event):
        return False
    if count > 11 and not read_tags(rules, hashing, reader, event):
        return False
    if count > 12 and not read_attributes(reader, event, depth):
        return False
    for _item in range(KNOWN_ITEMS, max(count, <uint64_t>KNOWN_ITEMS)):
        if not skip(reader, depth + 1):
            return False
    if event.amount == ABSENT and (kind_hash == rules.order_paid or event.kind == rules.earning_count + KIND_REFUNDED):
        return False
    return event.order.size != 0 or event.kind != rules.earning_count + KIND_REFUNDED


cdef inline Hash128 key_hash(SipKey key, uint64_t domain, const Text* text) noexcept nogil:
    cdef Hash128 none
    if text.size == 0:
        none.first = none.second = 0
        return none
    return hash_text_128(key, domain, text.data, text.size)


cdef inline void hash_event(Hashing* hashing, Event* event) noexcept nogil:
    """Hash the keys, and finish the hash of the content: all fields but the arrival.

    Where an id comes again, the content only tells a re-send from a conflict. So it is worth a secret, but not SipHash:
    products with it, folded.
    """
    cdef uint64_t content = event.content
    cdef const char* order = event.order.data
    cdef uint32_t rest = event.order.size
    event.id_hash = hash_text_128(hashing.key, DOMAIN_ID, event.id.data, event.id.size)
    event.keys[KEY_MEMBER] = hash_text_128(hashing.key, DOMAIN_MEMBER, event.member.data, event.member.size)
    event.keys[KEY_DEVICE] = key_hash(hashing.key, DOMAIN_DEVICE, &event.device)
    event.keys[KEY_IP] = key_hash(hashing.key, DOMAIN_IP, &event.ip)
    event.keys[KEY_PHONE] = key_hash(hashing.key, DOMAIN_PHONE, &event.phone)
    event.city_hash = name_hash(hashing, &event.city)
    event.tier_hash = name_hash(hashing, &event.tier)
    while rest > 8:
        content = folded(content ^ load_word(order), hashing.content_factor)
        order += 8
        rest -= 8
    if rest:
        content = folded(content ^ load_rest(order, rest), hashing.content_factor)
    content = folded(content ^ event.keys[KEY_MEMBER].first, hashing.content_factor + event.keys[KEY_DEVICE].first)
    content = folded(content ^ event.keys[KEY_IP].first, hashing.content_factor + event.keys[KEY_PHONE].first)
    content = folded(content ^ <uint64_t>event.ts, hashing.content_factor + <uint64_t>event.amount)
    content = folded(content ^ event.city_hash, hashing.content_factor + event.tier_hash)
    content = folded(content ^ rotated(event.card_until, 1), hashing.content_factor + <uint64_t>event.immune_until)
    event.content = folded(
        content ^ (<uint64_t>event.line_count << 8) ^ event.tag_count, hashing.content_factor + event.order.size)


cdef const char* decode_event(const Rules* rules, Hashing* hashing, const char* data, const char* end,
                              Event* event, int depth) noexcept nogil:
    """Decode the compact event at ``data`` and return where it ends; NULL where it is not valid.

    ``depth`` is the number of containers around it. The caller sets the arrival and the place in the stream, and the
    status.
    """
    cdef Reader reader
    cdef Value value
    cdef uint128 base
    reader.at = <const unsigned char*>data
    reader.end = <const unsigned char*>end
    event.amount = ABSENT
    if read_head(&reader, &value) != TYPE_ARRAY or value.size < REQUIRED_ITEMS:
        return NULL
    if not read_items(rules, hashing, &reader, value.size, event, depth):
        return NULL
    if event.line_count == 0 and rules.priced_kind >= 0 and event.kind == rules.priced_kind:
        base = <uint128>event.amount * <uint128>rules.blank_weight
        event.base_high = <uint64_t>(base >> 64)
        event.base_low = <uint64_t>base
    hash_event(hashing, event)
    return <const char*>reader.at


cdef bint open_batch(Reader* reader, uint64_t* count) noexcept nogil:
    """Read the head of a batch and leave ``reader`` at its first item; False where it is not one."""
    cdef Value value
    if read_head(reader, &value) != TYPE_ARRAY or value.size == 0:
        return False
    count[0] = value.size
    return True


cdef bint check_batch(Reader* reader, uint64_t count) noexcept nogil:
    """Tell whether ``count`` values, and nothing else, follow."""
    cdef Reader items = reader[0]
    cdef uint64_t _i
    for _i in range(count):
        if not skip(&items, 1):
            return False
    return items.at == items.end
