"""The decision (SPEC section 4): one loop over a batch of decoded events."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fastpath.calendar cimport Clock
from fastpath.rules cimport Rules
from fastpath.table cimport Header, Region, Table
from fastpath.types cimport KEYS, MAXIMUM_WORDS, Event

cdef enum:
    # Devices, IPs and phones follow the members, in the order of the keys; and so do the spilled days of all four.
    TABLE_IDS = 0
    TABLE_MEMBERS = 1
    TABLE_FIRST_SPILLED = 5
    TABLES = 9

cdef enum:
    MEMBER_ACTIVE = 0
    MEMBER_FROZEN = 1
    MEMBER_BLOCKED = 2

cdef enum:
    INLINE_NAME = 14
    MEMBER_BYTES = 64
    DAY_CACHE = 8

# The integer columns of the ledger, one value per entry, in its order.
cdef enum:
    COLUMN_AT = 0
    COLUMN_AT_SEQ = 1
    COLUMN_INDEX = 2
    COLUMN_TS = 3
    COLUMN_DAY = 4
    COLUMN_KIND = 5
    COLUMN_OUTCOME = 6
    COLUMN_CAUSE = 7
    COLUMN_FROZEN = 8
    COLUMN_AMOUNT = 9
    COLUMN_BASE = 10
    COLUMN_UNCAPPED = 11
    COLUMN_POINTS = 12
    COLUMN_CAMPAIGN_SET = 13
    COLUMN_TRIPPED = 14
    COLUMN_DEVICE = 15
    COLUMN_IP = 16
    COLUMN_PHONE = 17
    COLUMNS = 18

cdef struct IdRecord:
    Header header              # day: the business day of arrival
    uint64_t content

cdef struct Member:
    # It starts as every record does; but for what a Header says after the hash there is a use of its own.
    uint64_t hash
    uint32_t usual[KEYS - 1]   # numbers + 1 of the device, IP and phone that were seen with the member, as a guess
    uint32_t number            # the member's own + 1
    int64_t card_until
    int64_t immune_until
    uint64_t tier_hash
    uint8_t state
    uint8_t name_size
    char name[INLINE_NAME]     # a longer name's offset in the names region

cdef struct CampaignSet:
    uint64_t words[MAXIMUM_WORDS]
    uint64_t numerator_high
    uint64_t numerator_low
    uint64_t denominator_high
    uint64_t denominator_low
    bint negative
    uint32_t batch             # the batch that used it last, and its number there
    uint32_t code

cdef struct DayMask:
    int32_t day
    bint known
    uint64_t words[MAXIMUM_WORDS]

cdef struct Rows:
    int64_t* columns[COLUMNS]
    uint32_t* events           # number of the event of each entry
    uint32_t capacity
    uint32_t count
    int64_t* observed
    uint32_t observed_capacity
    uint32_t observed_count
    uint32_t* sets             # campaign sets by their number in the batch
    uint32_t sets_count
    uint32_t duplicates        # events without an entry, because they have one already
    uint64_t outcomes[5]
    int64_t points[5]

cdef struct State:
    Table tables[TABLES]
    Region names
    uint64_t names_size
    int32_t slack_days
    int32_t latest_day
    int32_t first_day          # no event from now on can be of an earlier day
    Clock arrival_clock
    Clock event_clock
    DayMask days[DAY_CACHE]
    CampaignSet* sets
    uint32_t sets_count
    uint32_t sets_capacity     # a power of two
    uint32_t* sets_index       # open addressing over sets, four places for each: number + 1
    int32_t words              # 64-bit words of a set that count; the others are zero
    uint32_t batch
    void* multiplier           # callable: campaign numbers to (numerator, denominator)

cdef int state_init(State* state, int32_t slack_days, uint32_t segment_shift) except -1
cdef void state_free(State* state) noexcept
cdef void state_rules_changed(State* state, int32_t words) noexcept nogil
cdef int state_reclaim(State* state, const Rules* rules, int32_t day) except -1 nogil
cdef void begin_batch(State* state) noexcept nogil
cdef int decide_events(State* state, const Rules* rules, Event* events, uint32_t first, uint32_t end,
                       Rows* rows) except -1 nogil
cdef int rows_reserve(Rows* rows, uint32_t capacity) except -1 nogil
cdef void rows_free(Rows* rows) noexcept
