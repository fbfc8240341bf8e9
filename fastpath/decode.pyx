from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
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
    pass_over,
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
from fastpath.siphash cimport (
    SipKey,
    SipState,
    hash_text,
    load_rest,
    load_word,
    rotated,
    sip_finish_128,
    sip_start,
    sip_text,
)
from fastpath.types cimport (
    KEY_DEVICE,
    KEY_IP,
    KEY_MEMBER,
    KEY_PHONE,
    KIND_REFUNDED,
    Event,
    Hash128,
    Text,
    data_of,
)

cdef extern from *:
    """
    typedef unsigned __int128 accrual_uint128;

    static inline uint64_t accrual_folded(uint64_t left, uint64_t right) {
        accrual_uint128 product = (accrual_uint128)left * right;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    """
    ctypedef unsigned long long uint128 "accrual_uint128"
    uint64_t folded "accrual_folded"(uint64_t left, uint64_t right) noexcept nogil

ctypedef const unsigned char* Place

cdef enum:
    IDENTITY_BYTES = 64
    NAME_BYTES = 32
    MAXIMUM_LINES = 64
    MAXIMUM_TAGS = 8
    REQUIRED_ITEMS = 4
    KNOWN_ITEMS = 13
    SHORT_TEXT = 0xa0          # the first byte of a text of 0 bytes; up to 31 are added to it
    SHORT_TEXTS = 32
    SHORT_ARRAY = 0x90         # likewise, up to 15 items
    SHORT_ARRAYS = 16
    PAIR = SHORT_ARRAY + 2
    NIL = 0xc0

cdef int64_t MAXIMUM_TIME_MS = (<int64_t>1 << 53) - 1
cdef int64_t MAXIMUM_AMOUNT_FEN = 1000000000000
cdef int64_t ABSENT = -1
cdef uint64_t HIGH_BITS = <uint64_t>0x8080808080808080


cdef void hashing_init(Hashing* hashing, SipKey key) noexcept nogil:
    """Derive all secrets from one key."""
    cdef const char* labels = "seed\0\0\0\0factor\0\0\0\0\0\0\0\0\0"
    memset(hashing, 0, sizeof(Hashing))
    hashing.key = key
    hashing.id_start = sip_start(key, DOMAIN_ID)
    hashing.key_starts[KEY_MEMBER] = sip_start(key, DOMAIN_MEMBER)
    hashing.key_starts[KEY_DEVICE] = sip_start(key, DOMAIN_DEVICE)
    hashing.key_starts[KEY_IP] = sip_start(key, DOMAIN_IP)
    hashing.key_starts[KEY_PHONE] = sip_start(key, DOMAIN_PHONE)
    hashing.content_seed = hash_text(key, DOMAIN_CONTENT, labels, 4)
    hashing.content_factor = hash_text(key, DOMAIN_CONTENT, labels + 8, 6)


cdef void hashing_adopt(Hashing* hashing, const Rules* rules) noexcept nogil:
    """Forget what names were to the former rulebook."""
    memset(hashing.names, 0, sizeof(hashing.names))
    memset(&hashing.empty, 0, sizeof(Name))
    look_up(rules, &hashing.empty)
    hashing.empty.weight = rules.blank_weight


cdef void look_up(const Rules* rules, Name* name) noexcept nogil:
    """Leave what a name is to the rulebook."""
    cdef int32_t category = name_find(&rules.categories, name.hash, -1)
    name.weight = 0
    name.kind = name_find(&rules.kinds, name.hash, -1)
    name.city = name_find(&rules.cities, name.hash, -1)
    name.tag = name_find(&rules.tags, name.hash, -1)
    if category >= 0:
        name.weight = rules.category_weights[category]
    elif rules.priced_kind >= 0:
        name.weight = rules.earning[rules.priced_kind].weight


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


# Reading. Each function takes the place where an item starts and returns where it ends, or NULL where it is not valid.
#
# An item in its shortest form, as nearly all are, is taken without asking whether the event goes on that far: behind
# the last event there is padding enough for all of them up to the lines. Who has read several asks then. And short
# texts are not checked for UTF-8 here: to tell that all of them are ASCII takes a few instructions while they are
# hashed.

cdef inline Reader reader_at(Place at, Place end) noexcept nogil:
    cdef Reader reader
    reader.at = at
    reader.end = end
    return reader


cdef Place any_text(Place base, Place at, Place end, uint32_t limit, Text* text) noexcept nogil:
    """Read an optional text, whatever its form."""
    cdef Reader reader = reader_at(at, end)
    cdef Value value
    text.size = 0
    read_head(&reader, &value)
    if is_absent(&value):
        return reader.at
    if value.type != TYPE_TEXT or value.size > limit or not is_utf8(reader.at, value.size):
        return NULL
    text.at = <uint32_t>(reader.at - base)
    text.size = <uint32_t>value.size
    return reader.at + value.size


cdef inline Place text_at(Place base, Place at, Place end, uint32_t limit, Text* text) noexcept nogil:
    """Read an optional text."""
    cdef uint32_t size = at[0] ^ <uint32_t>SHORT_TEXT
    if size < SHORT_TEXTS:
        text.at = <uint32_t>(at + 1 - base)
        text.size = size
        return at + 1 + size
    if at[0] == NIL:
        text.size = 0
        return at + 1
    return any_text(base, at, end, limit, text)


cdef Place any_name(Place base, Place at, Place end, Text* text) noexcept nogil:
    cdef Reader start = reader_at(at, end)
    cdef Value value
    return any_text(base, at, end, NAME_BYTES, text) if read_head(&start, &value) == TYPE_TEXT else NULL


cdef inline Place name_at(Place base, Place at, Place end, Text* text) noexcept nogil:
    """Read a category or tag: a text that may be empty, but not absent in another way."""
    cdef uint32_t size = at[0] ^ <uint32_t>SHORT_TEXT
    if size < SHORT_TEXTS:
        text.at = <uint32_t>(at + 1 - base)
        text.size = size
        return at + 1 + size
    return any_name(base, at, end, text)


cdef Place any_integer(Place at, Place end, int64_t low, int64_t high, int64_t* number) noexcept nogil:
    """Read an optional integer, whatever its form."""
    cdef Reader reader = reader_at(at, end)
    cdef Value value
    read_head(&reader, &value)
    if is_absent(&value):
        return reader.at
    if value.type != TYPE_INTEGER or value.huge or not low <= value.number <= high:
        return NULL
    number[0] = value.number
    return reader.at


cdef inline Place integer_at(Place at, Place end, int64_t low, int64_t high, int64_t* number) noexcept nogil:
    """Read an optional integer; ``number`` stays as it is where there is none."""
    cdef uint32_t form = at[0] - <uint32_t>0xcc
    cdef uint64_t value
    cdef int width
    if form > 3:
        return any_integer(at, end, low, high, number)
    # Nearly every number is one of 1 to 8 bytes without a sign.
    width = 1 << form
    value = big_endian(at + 1, 8) >> (64 - 8 * width)
    number[0] = <int64_t>value
    return at + 1 + width if value - <uint64_t>low <= <uint64_t>(high - low) else NULL


cdef const Name* new_name(const Rules* rules, Hashing* hashing, const char* data, uint32_t size,
                          Name* name) noexcept nogil:
    """Look a name up in the rulebook and keep it in place of another; return NULL where it is not UTF-8."""
    cdef Name found
    if not is_utf8(<Place>data, size):
        return NULL
    found.first = load_rest(data, min(size, <uint32_t>8))
    found.second = load_word(data + size - 8) if size > 8 else 0
    found.size = size
    found.hash = hash_text(hashing.key, DOMAIN_NAME, data, size)
    look_up(rules, &found)
    name[0] = found
    return name


cdef inline const Name* name_of(const Rules* rules, Hashing* hashing, const Event* event,
                                const Text* text) noexcept nogil:
    """Return what a kind, category, city, tag or tier is to the rulebook; NULL where it is not UTF-8.

    There are few of them, so the last ones are kept; a name that pushes out another costs time and nothing else.
    """
    cdef uint64_t first, second = 0
    cdef const char* data = data_of(event, text)
    cdef uint32_t size = text.size
    cdef Name* known
    if size <= 8:
        if size == 0:
            return &hashing.empty
        first = load_rest(data, size)
    elif size <= CACHED_BYTES:
        first = load_word(data)
        second = load_word(data + size - 8)
    else:
        return new_name(rules, hashing, data, size, &hashing.long_name)
    known = &hashing.names[((first ^ second * 31) + size) * <uint64_t>0x9e3779b97f4a7c15 >> (64 - CACHE_BITS)]
    if known.first == first and known.second == second and known.size == size:
        return known
    return new_name(rules, hashing, data, size, known)


cdef inline Place array_at(Place at, Place end, uint64_t* count) noexcept nogil:
    """Read the head of an optional array."""
    cdef Reader reader
    cdef Value value
    cdef uint32_t size = at[0] ^ <uint32_t>SHORT_ARRAY
    if size < SHORT_ARRAYS:
        count[0] = size
        return at + 1
    reader = reader_at(at, end)
    read_head(&reader, &value)
    count[0] = value.size if value.type == TYPE_ARRAY else 0
    return reader.at if value.type == TYPE_ARRAY or is_absent(&value) else NULL


cdef inline Place line_at(const Rules* rules, Hashing* hashing, Place at, Place end, Event* event,
                          int64_t* sum_fen, uint128* base) noexcept nogil:
    """Read one line and add it up."""
    cdef const Name* name
    cdef Text category
    cdef int64_t amount = ABSENT
    cdef uint64_t count = 2
    if at[0] == PAIR:
        at += 1
    else:
        at = array_at(at, end, &count)
        if at == NULL or count != 2:
            return NULL
    at = name_at(<Place>event.base, at, end, &category)
    if at == NULL:
        return NULL
    at = integer_at(at, end, 0, MAXIMUM_AMOUNT_FEN, &amount)
    if at == NULL or at > end or amount == ABSENT:
        return NULL
    name = name_of(rules, hashing, event, &category)
    if name == NULL:
        return NULL
    sum_fen[0] += amount
    event.content = folded(event.content ^ name.hash, hashing.content_factor + <uint64_t>amount)
    base[0] += <uint128>amount * <uint128>name.weight
    return at


cdef Place lines_at(const Rules* rules, Hashing* hashing, Place at, Place end, Event* event) noexcept nogil:
    """Read the lines, add them to the base where the kind is priced per yuan, and check their sum."""
    cdef int64_t sum_fen = 0
    cdef uint64_t count, _i
    cdef uint128 base = 0
    at = array_at(at, end, &count)
    if at == NULL or count > MAXIMUM_LINES:
        return NULL
    if count == 0:
        return at
    event.line_count = <uint8_t>count
    event.lines.at = <uint32_t>(<const char*>at - event.base)
    for _i in range(count):
        at = line_at(rules, hashing, at, end, event, &sum_fen, &base)
        if at == NULL:
            return NULL
    event.lines.size = <uint32_t>(<const char*>at - data_of(event, &event.lines))
    event.base_high = <uint64_t>(base >> 64)
    event.base_low = <uint64_t>base
    return at if sum_fen == event.amount else NULL


cdef Place tags_at(const Rules* rules, Hashing* hashing, Place at, Place end, Event* event) noexcept nogil:
    """Read the tags and unite the campaigns that name them."""
    cdef const Name* name
    cdef Text tag
    cdef uint64_t count, _i
    cdef int32_t word
    at = array_at(at, end, &count)
    if at == NULL or count > MAXIMUM_TAGS:
        return NULL
    if count == 0:
        return at
    event.tag_count = <uint8_t>count
    event.tags.at = <uint32_t>(<const char*>at - event.base)
    for word in range(rules.words):
        event.tags_mask[word] = 0
    for _i in range(count):
        at = name_at(<Place>event.base, at, end, &tag)
        if at == NULL or at > end:
            return NULL
        name = name_of(rules, hashing, event, &tag)
        if name == NULL:
            return NULL
        event.content = folded(event.content ^ name.hash, hashing.content_factor)
        if name.tag >= 0:
            for word in range(rules.words):
                event.tags_mask[word] |= rules.tag_masks[name.tag * rules.words + word]
    event.tags.size = <uint32_t>(<const char*>at - data_of(event, &event.tags))
    return at


cdef inline bint is_key(const Reader* text, const char* name, uint32_t size) noexcept nogil:
    return text.end - text.at == size and memcmp(text.at, name, size) == 0


cdef Place attributes_at(const Rules* rules, Hashing* hashing, Place at, Place end, Event* event) noexcept nogil:
    """Read the map of attributes. Of a key that repeats the last value counts; unknown keys are ignored."""
    cdef Reader reader = reader_at(at, end), key
    cdef Value value
    cdef Reader name
    cdef Place tier = NULL, card_until = NULL, immune_until = NULL
    cdef uint64_t _i
    read_head(&reader, &value)
    if is_absent(&value):
        return reader.at
    if value.type != TYPE_MAP:
        return NULL
    for _i in range(value.size):
        key = reader
        if not skip(&reader, 2):
            return NULL
        read_head(&key, &value)
        name = reader_at(key.at, key.at + value.size if value.type == TYPE_TEXT else key.at)
        if is_key(&name, "tier", 4):
            tier = reader.at
        elif is_key(&name, "card_until", 10):
            card_until = reader.at
        elif is_key(&name, "immune_until", 12):
            immune_until = reader.at
        if not skip(&reader, 2):
            return NULL
    if tier != NULL:
        if any_text(<Place>event.base, tier, end, NAME_BYTES, &event.tier) == NULL:
            return NULL
        event.tier_hash = name_of(rules, hashing, event, &event.tier).hash
    if card_until != NULL and any_integer(card_until, end, 1, MAXIMUM_TIME_MS, &event.card_until) == NULL:
        return NULL
    if immune_until != NULL and any_integer(immune_until, end, 1, MAXIMUM_TIME_MS, &event.immune_until) == NULL:
        return NULL
    return reader.at


cdef inline void set_absent(Event* event) noexcept nogil:
    """Leave what the items that may follow the time are where they do not: an event's memory has held others before."""
    event.amount = ABSENT
    event.order.size = event.device.size = event.ip.size = event.phone.size = event.city_name.size = 0
    event.tier.size = event.lines.size = event.tags.size = 0
    event.line_count = event.tag_count = 0
    event.card_until = event.immune_until = 0
    event.tier_hash = 0
    event.base_high = event.base_low = 0


cdef inline Place identity_at(Place at, Place end, Event* event) noexcept nogil:
    """Read the required items."""
    at = text_at(<Place>event.base, at, end, IDENTITY_BYTES, &event.id)
    if at != NULL:
        at = text_at(<Place>event.base, at, end, NAME_BYTES, &event.kind_name)
    if at != NULL:
        at = text_at(<Place>event.base, at, end, IDENTITY_BYTES, &event.member)
    event.ts = 0
    if at != NULL:
        at = integer_at(at, end, 1, MAXIMUM_TIME_MS, &event.ts)
    if at == NULL or event.id.size == 0 or event.kind_name.size == 0 or event.member.size == 0 or event.ts == 0:
        return NULL
    return at


cdef inline Place keys_at(Place at, Place end, uint64_t count, Event* event) noexcept nogil:
    """Read the items before the lines."""
    if count > 4:
        at = integer_at(at, end, 0, MAXIMUM_AMOUNT_FEN, &event.amount)
    if count > 5 and at != NULL:
        at = text_at(<Place>event.base, at, end, IDENTITY_BYTES, &event.order)
    if count > 6 and at != NULL:
        at = text_at(<Place>event.base, at, end, IDENTITY_BYTES, &event.device)
    if count > 7 and at != NULL:
        at = text_at(<Place>event.base, at, end, IDENTITY_BYTES, &event.ip)
    if count > 8 and at != NULL:
        at = text_at(<Place>event.base, at, end, IDENTITY_BYTES, &event.phone)
    if count > 9 and at != NULL:
        at = text_at(<Place>event.base, at, end, NAME_BYTES, &event.city_name)
    return at


cdef inline Place rest_at(const Rules* rules, Hashing* hashing, Place at, Place end, uint64_t count,
                          Event* event) noexcept nogil:
    """Read the items from the lines on."""
    cdef Reader reader
    cdef uint64_t _item
    if count > 10:
        at = lines_at(rules, hashing, at, end, event)
    if count > 11 and at != NULL:
        at = tags_at(rules, hashing, at, end, event)
    if count > 12 and at != NULL:
        at = attributes_at(rules, hashing, at, end, event)
    if count > KNOWN_ITEMS and at != NULL:
        reader = reader_at(at, end)
        for _item in range(KNOWN_ITEMS, count):
            if not skip(&reader, 1):
                return NULL
        at = reader.at
    return at


cdef inline Hash128 key_hash(const SipState* start, const Event* event, const Text* text,
                             uint64_t* seen) noexcept nogil:
    """Hash an id or key. Its bytes are united in ``seen``, whose highest bits show whether there was but ASCII."""
    cdef SipState s
    cdef Hash128 none
    if text.size == 0:
        none.first = none.second = 0
        return none
    s = start[0]
    seen[0] |= sip_text(&s, data_of(event, text), text.size)
    return sip_finish_128(&s)


cdef inline void hash_event(Hashing* hashing, Event* event, uint64_t city_hash, uint64_t* seen) noexcept nogil:
    """Hash the keys, and finish the hash of the content: all fields but the arrival.

    Where an id comes again, the content only tells a re-send from a conflict. So it is worth a secret, but not SipHash:
    products with it, folded.
    """
    cdef uint64_t content = event.content, word
    cdef const char* order = data_of(event, &event.order)
    cdef uint32_t rest = event.order.size
    event.id_hash = key_hash(&hashing.id_start, event, &event.id, seen)
    event.keys[KEY_MEMBER] = key_hash(&hashing.key_starts[KEY_MEMBER], event, &event.member, seen)
    event.keys[KEY_DEVICE] = key_hash(&hashing.key_starts[KEY_DEVICE], event, &event.device, seen)
    event.keys[KEY_IP] = key_hash(&hashing.key_starts[KEY_IP], event, &event.ip, seen)
    event.keys[KEY_PHONE] = key_hash(&hashing.key_starts[KEY_PHONE], event, &event.phone, seen)
    while rest > 8:
        word = load_word(order)
        seen[0] |= word
        content = folded(content ^ word, hashing.content_factor)
        order += 8
        rest -= 8
    if rest:
        word = load_rest(order, rest)
        seen[0] |= word
        content = folded(content ^ word, hashing.content_factor)
    content = folded(content ^ event.keys[KEY_MEMBER].first, hashing.content_factor + event.keys[KEY_DEVICE].first)
    content = folded(content ^ event.keys[KEY_IP].first, hashing.content_factor + event.keys[KEY_PHONE].first)
    content = folded(content ^ <uint64_t>event.ts, hashing.content_factor + <uint64_t>event.amount)
    content = folded(content ^ city_hash, hashing.content_factor + event.tier_hash)
    content = folded(content ^ rotated(event.card_until, 1), hashing.content_factor + <uint64_t>event.immune_until)
    event.content = folded(
        content ^ (<uint64_t>event.line_count << 8) ^ event.tag_count, hashing.content_factor + event.order.size)


cdef bint are_utf8(const Event* event) noexcept nogil:
    """Tell whether the texts that were not looked up as names are UTF-8."""
    return (is_valid(event, &event.id) and is_valid(event, &event.member) and is_valid(event, &event.order)
            and is_valid(event, &event.device) and is_valid(event, &event.ip) and is_valid(event, &event.phone))


cdef inline bint is_valid(const Event* event, const Text* text) noexcept nogil:
    return is_utf8(<Place>data_of(event, text), text.size)


cdef const char* decode_event(const Rules* rules, Hashing* hashing, const char* data, const char* end,
                              Event* event) noexcept nogil:
    """Decode the compact event at ``data`` and return where it ends; NULL where it is not valid.

    The caller sets the arrival and the place in the stream, and the status.
    """
    cdef Place at = <Place>data, last = <Place>end
    cdef const Name* name
    cdef uint64_t kind_hash, city_hash, count = 0, seen = 0
    cdef uint128 base
    event.base = data
    set_absent(event)
    if at < last:
        at = array_at(at, last, &count)
    if at == NULL or count < REQUIRED_ITEMS:
        return NULL
    at = identity_at(at, last, event)
    if at == NULL:
        return NULL
    at = keys_at(at, last, count, event)
    # Nothing that was read may be looked at before it is known to be there.
    if at == NULL or at > last:
        return NULL
    name = name_of(rules, hashing, event, &event.kind_name)
    if name == NULL:
        return NULL
    kind_hash = name.hash
    event.kind = name.kind
    event.content = folded(hashing.content_seed ^ kind_hash, hashing.content_factor)
    name = name_of(rules, hashing, event, &event.city_name)
    if name == NULL:
        return NULL
    city_hash = name.hash
    event.city = name.city
    at = rest_at(rules, hashing, at, last, count, event)
    if at == NULL:
        return NULL
    if event.amount == ABSENT and (kind_hash == rules.order_paid or event.kind == rules.earning_count + KIND_REFUNDED):
        return NULL
    if event.order.size == 0 and event.kind == rules.earning_count + KIND_REFUNDED:
        return NULL
    if event.line_count == 0 and rules.priced_kind >= 0 and event.kind == rules.priced_kind:
        base = <uint128>event.amount * <uint128>rules.blank_weight
        event.base_high = <uint64_t>(base >> 64)
        event.base_low = <uint64_t>base
    hash_event(hashing, event, city_hash, &seen)
    if seen & HIGH_BITS and not are_utf8(event):
        return NULL
    return <const char*>at


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
    return pass_over(&items, count) and items.at == items.end
