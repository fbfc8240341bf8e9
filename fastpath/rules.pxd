"""A rulebook as flat tables: what the decoder and the decision loop look things up in."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fastpath.siphash cimport SipKey
from fastpath.types cimport KEYS, MAXIMUM_WORDS

cdef enum:
    MEASURE_EVENTS = 0
    MEASURE_MEMBERS = 1
    MEASURE_POINTS = 2

cdef enum:
    ACTION_REJECT = 0
    ACTION_HOLD = 1
    ACTION_FREEZE = 2
    ACTION_CLAMP = 3

cdef enum:
    MINUTES = 1440
    # Domains of the keyed hash. The first three are those of the ledger's fingerprints.
    DOMAIN_DEVICE = 1
    DOMAIN_IP = 2
    DOMAIN_PHONE = 3
    DOMAIN_ID = 4
    DOMAIN_MEMBER = 5
    DOMAIN_NAME = 6
    DOMAIN_CONTENT = 7

cdef struct NameMap:
    # Keyed hashes of names to small numbers; open addressing, never full.
    uint64_t* keys
    int32_t* values
    uint32_t mask

cdef struct Limit:
    int64_t max
    int64_t duration_ms
    uint64_t bucket_factor     # see bucket_of
    uint32_t bucket_shift
    uint32_t offset            # in the record of its key, or in its slot of the day
    uint32_t kept              # distinct members remembered
    uint8_t place              # its key, or KEYS + key where it counts by day
    uint8_t measure
    uint8_t action
    uint8_t number             # in the rulebook
    bint sliding

cdef struct EarningRule:
    bint per_yuan
    bint once
    int64_t points
    int64_t streak_bonus
    int64_t min_amount_fen
    int32_t streak_days        # 0: no streak
    int32_t max_per_day        # 0: no maximum
    uint64_t scale             # parts of a point in which the base is counted
    int64_t weight             # parts of a point per fen, for a category without a rate of its own
    uint32_t once_offset       # where a member's record keeps the mark
    uint64_t once_bit
    uint32_t streak_offset     # in a member's record
    uint32_t daily_offset      # in the slot of a member's day
    uint32_t keys              # bit mask of the keys on which limits apply, the member always
    uint32_t daily_keys        # and of those that count by day
    uint64_t campaigns[MAXIMUM_WORDS]
    Limit* counting            # the limits on events and members that apply, in rulebook order
    Limit* counting_end
    Limit* pointing            # those on points: clamps first, then the others, each in rulebook order
    Limit* pointing_end

cdef struct Campaign:
    uint32_t days_of_month     # bit 1..31; 0: any
    uint32_t weekdays          # bit 0 (Monday)..6; 0: any
    int32_t from_day
    int32_t until_day
    int32_t percent            # -1: everybody
    uint32_t crc               # CRC-32 of "<campaign id>:"

cdef struct Rules:
    EarningRule* earning
    int32_t earning_count
    Campaign* campaigns
    int32_t campaign_count
    int32_t words              # 64-bit words of a campaign set
    NameMap kinds              # earning rules, then built-in kinds
    NameMap categories
    int64_t* category_weights
    int64_t blank_weight       # of the category ""
    int32_t priced_kind        # the earning rule of order_paid, or -1
    uint64_t order_paid        # hash of the kind's name
    NameMap cities
    int32_t city_count
    uint64_t* city_masks       # the last row is for cities that no campaign names; tiers alike
    NameMap tiers
    int32_t tier_count
    uint64_t* tier_masks
    NameMap tags
    uint64_t* tag_masks        # campaigns that name the tag
    uint64_t untagged[MAXIMUM_WORDS]
    uint64_t carded[MAXIMUM_WORDS]
    uint64_t drawn[MAXIMUM_WORDS]
    uint64_t* minute_masks     # MINUTES rows
    int64_t* transition_ms
    int64_t* transition_offset_ms
    int32_t transition_count
    uint32_t day_offsets[2][KEYS]  # where a record has its slots of even and odd days
    uint32_t day_bytes[KEYS]   # and how many bytes each has


cdef inline int32_t name_find(const NameMap* names, uint64_t hash, int32_t default) noexcept nogil:
    cdef uint32_t i = <uint32_t>hash & names.mask
    while names.keys[i]:
        if names.keys[i] == hash:
            return names.values[i]
        i = (i + 1) & names.mask
    return default


cdef extern from *:
    """
    #define accrual_high_product(left, right) ((uint64_t)(((unsigned __int128)(left) * (right)) >> 64))
    """
    uint64_t high_product "accrual_high_product"(uint64_t left, uint64_t right) noexcept nogil


cdef inline int64_t bucket_of(const Limit* limit, int64_t time_ms) noexcept nogil:
    """Return the index of a time's bucket plus one, so that 0 can mean that nothing was counted yet.

    The factor is 2^(64 + shift) over the milliseconds of a bucket, rounded up: exact for times below 2^53
    (Granlund and Montgomery, Division by invariant integers using multiplication).
    """
    return <int64_t>(high_product(<uint64_t>time_ms, limit.bucket_factor) >> limit.bucket_shift) + 1


cdef class FlatRulebook:
    cdef Rules rules
    cdef readonly dict description
    cdef readonly object multiplier
    cdef list arrays
    cdef void* array(self, size_t size) except NULL
    cdef int name_map(self, NameMap* names, SipKey key, list texts) except -1
    cdef uint64_t* masks(self, list rows) except NULL
    cdef int set_words(self, uint64_t* words, object mask) except -1
    cdef int load_earning(self, SipKey key) except -1
    cdef Limit* limits(self, list rows) except NULL
    cdef int load_campaigns(self, SipKey key) except -1
    cdef int load_calendar(self) except -1
