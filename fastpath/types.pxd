"""Structs and typedefs that the stages share."""

from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAXIMUM_WORDS = 4          # 64-bit words of a campaign set: 256 campaigns
    MAXIMUM_TABLES = 9

# What became of an event. ENTRY is the only one with a row in the ledger.
cdef enum:
    STATUS_ENTRY = 0
    STATUS_DUPLICATE = 1
    STATUS_INVALID = 2
    STATUS_ID_CONFLICT = 3
    STATUS_UNKNOWN_KIND = 4
    STATUS_TS_IN_FUTURE = 5
    STATUS_STALE_CONTROL = 6

cdef enum:
    OUTCOME_GRANTED = 0
    OUTCOME_HELD = 1
    OUTCOME_REJECTED = 2
    OUTCOME_DEFERRED = 3
    OUTCOME_APPLIED = 4

cdef enum:
    CAUSE_NONE = 0
    CAUSE_MEMBER_BLOCKED = 1
    CAUSE_ONCE = 2
    CAUSE_MAX_PER_DAY = 3
    CAUSE_REFUND = 4
    CAUSE_LATE = 5

# Kinds beyond the earning rules, counted from the number of rules on, as in the ledger's `kinds`.
cdef enum:
    KIND_REFUNDED = 0
    KIND_UPDATED = 1
    KIND_FROZEN = 2
    KIND_RELEASED = 3
    KIND_BLOCKED = 4
    BUILT_IN_KINDS = 5

cdef struct Text:
    # Bytes of a valid UTF-8 text in an event's value; size 0 means absent.
    uint32_t at                # from the event's `base`
    uint32_t size

cdef struct Hash128:
    uint64_t first
    uint64_t second

cdef struct RawEntry:
    # One stream entry: offsets into the reply's buffer, so that the buffer may move while it grows.
    uint64_t ms
    uint64_t seq
    uint64_t name
    uint64_t value
    uint64_t fields            # where the array of its fields starts
    uint32_t name_size
    uint32_t value_size
    uint32_t field_count       # pairs

cdef enum:
    # What limits count by. The member comes first: every event has one.
    KEY_MEMBER = 0
    KEY_DEVICE = 1
    KEY_IP = 2
    KEY_PHONE = 3
    KEYS = 4

cdef struct Event:
    # What nearly every decision needs comes first and fills four cache lines: where another core has decoded the event,
    # the decision waits for each of them.
    int64_t arrival_ms
    uint64_t arrival_seq
    uint32_t entry             # number of the raw entry
    uint32_t index             # index within it
    int32_t kind               # earning rule, or rules + BuiltInKind, or -1
    int32_t city               # number among those that campaigns name, or -1
    uint8_t status             # of an event that is invalid, nothing but the place and `raw` is set
    uint8_t from_json
    uint8_t line_count
    uint8_t tag_count
    uint32_t raw_size
    int64_t ts
    int64_t amount             # -1 where absent
    uint64_t content           # hash of every field but the arrival
    uint64_t base_high         # base in parts of a point: 128 bits
    uint64_t base_low
    Hash128 id_hash
    Hash128 keys[KEYS]         # of a member the first half counts: members are compared by name
    const char* base           # of the texts
    const char* raw            # its bytes in the stream entry; those of JSON are kept by the core
    Text id
    Text member
    Text order
    Text device
    Text ip
    Text phone
    Text kind_name
    Text city_name
    Text lines                 # MessagePack of the array's items, header excluded
    # What few events have.
    Text tags
    uint64_t tags_mask[MAXIMUM_WORDS]  # set where there are tags
    Text tier
    int64_t card_until         # 0 where absent
    int64_t immune_until       # 0 where absent
    uint64_t tier_hash         # 0 where absent


cdef inline const char* data_of(const Event* event, const Text* text) noexcept nogil:
    return event.base + text.at
