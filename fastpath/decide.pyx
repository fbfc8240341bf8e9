from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

from fastpath.calendar cimport day_of_month, day_of_week, earliest_day, local_day, local_minute
from fastpath.exact cimport floor_product, saturated_sum
from fastpath.rules cimport (
    ACTION_CLAMP,
    ACTION_FREEZE,
    ACTION_HOLD,
    ACTION_REJECT,
    MEASURE_EVENTS,
    Campaign,
    EarningRule,
    Limit,
    Rules,
    bucket_of,
    name_find,
)
from fastpath.table cimport (
    LINE_BYTES,
    LINE_SLOTS,
    Header,
    Slot,
    Table,
    candidate_in,
    day_hash,
    find,
    line_of,
    lowest_bit,
    match_line,
    next_line,
    prefetch,
    record_at,
    region_commit,
    region_free,
    region_init,
    table_free,
    table_init,
    table_insert,
    table_reclaim,
    tag_of,
    touch,
)
from fastpath.types cimport (
    CAUSE_LATE,
    CAUSE_MAX_PER_DAY,
    CAUSE_MEMBER_BLOCKED,
    CAUSE_NONE,
    CAUSE_ONCE,
    CAUSE_REFUND,
    KEY_DEVICE,
    KEY_IP,
    KEY_MEMBER,
    KEY_PHONE,
    KEYS,
    KIND_FROZEN,
    KIND_REFUNDED,
    KIND_RELEASED,
    KIND_UPDATED,
    MAXIMUM_WORDS,
    OUTCOME_APPLIED,
    OUTCOME_DEFERRED,
    OUTCOME_GRANTED,
    OUTCOME_HELD,
    OUTCOME_REJECTED,
    STATUS_DUPLICATE,
    STATUS_ENTRY,
    STATUS_ID_CONFLICT,
    STATUS_INVALID,
    STATUS_STALE_CONTROL,
    STATUS_TS_IN_FUTURE,
    STATUS_UNKNOWN_KIND,
    Event,
    Hash128,
    data_of,
)
from fastpath.window cimport add_points_sliding, count_sliding, points_sliding

cdef enum:
    FUTURE_TOLERANCE_MS = 600000
    INITIAL_SETS = 256         # a power of two
    KEPT_SETS = 65536          # more are forgotten before the next batch: to ask for one takes some microseconds
    # How many events before its decision what it will need is asked for: see below, "Looking ahead".
    EVENTS_AHEAD = 16          # before their slots
    SLOTS_AHEAD = 32
    MEMBER_AHEAD = 24
    USUAL_AHEAD = 16
    OTHERS_AHEAD = 10
    RECORDS_AHEAD = 5
    MISSED = 1 << 31           # in a member's usual key: the last time it was another one
    MARK_OF_DAY = 2            # added to a day in its slot, so that 0 is an empty slot: no day is before -1
    OFFLINE_SLACK_DAYS = 31    # from here on arrivals may go back, and only `state_reclaim` forgets

cdef uint32_t CRC_TABLE[256]


cdef void fill_crc_table() noexcept:
    cdef uint32_t number, value
    cdef int _bit
    for number in range(256):
        value = number
        for _bit in range(8):
            value = (value >> 1) ^ (<uint32_t>0xedb88320 if value & 1 else 0)
        CRC_TABLE[number] = value


fill_crc_table()


# What an event is thought to need: lines of slots and, once those have come, records; the id comes after the keys.
cdef struct Ahead:
    Slot* lines[KEYS + 1]      # where a search starts; NULL where none is needed
    char* candidates[KEYS + 1]
    uint32_t keys              # bit mask of the keys that the decision will look for

cdef struct Streak:
    int32_t last_day
    int32_t run

# One event while it is decided: what the steps hand to each other.
cdef struct Case:
    const EarningRule* rule
    Event* event
    Member* member
    int64_t time_ms
    int32_t day
    int32_t minute
    # What limits count in, by `Limit.place`: the records of the event's keys, then their slots of the day. NULL where
    # the event lacks the key, or no limit on it applies.
    char* places[2 * KEYS]
    uint64_t tripped
    uint32_t actions           # bit mask of the actions that tripped
    Streak streak


cdef int state_init(State* state, int32_t slack_days, uint32_t segment_shift) except -1:
    """Prepare an empty state. ``segment_shift`` is the log2 of the slots of a table's segment."""
    cdef int key
    memset(state, 0, sizeof(State))
    state.slack_days = slack_days
    state.first_day = -1
    sets_reserve(state, INITIAL_SETS)
    table_init(&state.tables[TABLE_IDS], sizeof(IdRecord), 1 + slack_days, segment_shift)
    table_init(&state.tables[TABLE_MEMBERS], MEMBER_BYTES, -1, segment_shift)
    for key in range(KEY_DEVICE, KEYS):
        # A window is at most a day long, and an event may be of the day before its arrival.
        table_init(keyed_table(state, key), sizeof(Header), 2 + slack_days, segment_shift)
    for key in range(KEYS):
        table_init(spilled_table(state, key), sizeof(Header), 1 + slack_days, segment_shift)
    region_init(&state.names, state.tables[TABLE_MEMBERS].huge)
    state_rules_changed(state, 1)
    return 0


cdef void state_free(State* state) noexcept:
    cdef int number
    for number in range(TABLES):
        table_free(&state.tables[number])
    region_free(&state.names)
    free(state.sets)
    free(state.sets_index)


cdef void state_rules_changed(State* state, int32_t words) noexcept nogil:
    """Forget what was derived from the former rulebook. A campaign set of the new one has ``words`` words."""
    state.words = words
    memset(state.days, 0, sizeof(state.days))
    memset(&state.arrival_clock, 0, sizeof(state.arrival_clock))
    memset(&state.event_clock, 0, sizeof(state.event_clock))
    memset(state.sets_index, 0, 4 * state.sets_capacity * sizeof(uint32_t))
    state.sets_count = 0


cdef int rows_reserve(Rows* rows, uint32_t capacity) except -1 nogil:
    """Make room for ``capacity`` entries."""
    cdef int column
    if capacity <= rows.capacity:
        return 0
    capacity = max(capacity, 2 * rows.capacity)
    for column in range(COLUMNS):
        rows.columns[column] = <int64_t*>checked(realloc(rows.columns[column], capacity * sizeof(int64_t)))
    rows.events = <uint32_t*>checked(realloc(rows.events, capacity * sizeof(uint32_t)))
    rows.sets = <uint32_t*>checked(realloc(rows.sets, capacity * sizeof(uint32_t)))
    rows.capacity = capacity
    return 0


cdef void* checked(void* memory) except NULL nogil:
    if memory == NULL:
        with gil:
            raise MemoryError()
    return memory


cdef void rows_free(Rows* rows) noexcept:
    cdef int column
    for column in range(COLUMNS):
        free(rows.columns[column])
    free(rows.events)
    free(rows.observed)
    free(rows.sets)


# Members

cdef inline const char* member_name(const State* state, const Member* member) noexcept nogil:
    cdef uint64_t offset
    if member.name_size <= INLINE_NAME:
        return member.name
    memcpy(&offset, member.name, sizeof(offset))
    return state.names.base + offset


cdef inline bint is_member(const State* state, const Member* member, const Event* event) noexcept nogil:
    """Tell whether a record is that of the event's member, whatever their hashes."""
    return (member.hash == event.keys[KEY_MEMBER].first and member.name_size == event.member.size
            and memcmp(member_name(state, member), data_of(event, &event.member), event.member.size) == 0)


cdef Member* find_member(State* state, const Event* event) noexcept nogil:
    """Return the record of the event's member, compared by name, or NULL."""
    cdef Table* table = &state.tables[TABLE_MEMBERS]
    cdef uint32_t tag = tag_of(event.keys[KEY_MEMBER].first)
    cdef Slot* line = line_of(table, event.keys[KEY_MEMBER].first)
    cdef uint32_t found
    cdef uint32_t record
    while True:
        found = match_line(line, tag)
        while found:
            record = line[lowest_bit(found)].record
            found &= found - 1
            if record and is_member(state, <Member*>record_at(table, record - 1), event):
                return <Member*>record_at(table, record - 1)
        if line[LINE_SLOTS - 1].record == 0:
            return NULL
        line = next_line(table, line)


cdef Member* member_of(State* state, const Event* event, Member* candidate) except NULL nogil:
    """Return the record of the event's member, a new one if there is none; it may be ``candidate``."""
    cdef Member* member = candidate
    if member == NULL or not is_member(state, member, event):
        member = find_member(state, event)
    if member != NULL:
        touch(&state.tables[TABLE_MEMBERS], member)
        return member
    member = <Member*>table_insert(
        &state.tables[TABLE_MEMBERS], event.keys[KEY_MEMBER].first, 0, 0)
    member.name_size = <uint8_t>event.member.size
    if event.member.size <= INLINE_NAME:
        memcpy(member.name, data_of(event, &event.member), event.member.size)
    else:
        region_commit(&state.names, state.names_size + event.member.size)
        memcpy(state.names.base + state.names_size, data_of(event, &event.member), event.member.size)
        memcpy(member.name, &state.names_size, sizeof(uint64_t))
        state.names_size += event.member.size
    return member


# Counters: a limit's part of a record. Sliding totals are in window.pxd.

cdef int64_t see_sliding(char* at, const Limit* limit, uint32_t member, int64_t time_ms) noexcept nogil:
    """Note the sight of a member and return how many distinct ones are within the window."""
    cdef int64_t* latest = <int64_t*>at
    cdef int64_t* sights = latest + 1
    cdef uint32_t* members = <uint32_t*>(sights + limit.kept)
    cdef uint32_t i, oldest = 0
    cdef int64_t seen = 0
    latest[0] = max(latest[0], time_ms)
    for i in range(limit.kept):
        if members[i] == member:
            sights[i] = max(sights[i], time_ms)
            break
        if sights[i] < sights[oldest]:
            oldest = i
    else:
        # An empty place has sight 0 and is therefore the oldest.
        if time_ms > sights[oldest]:
            sights[oldest] = time_ms
            members[oldest] = member
    for i in range(limit.kept):
        seen += sights[i] > 0 and sights[i] > latest[0] - limit.duration_ms
    return seen


cdef int64_t see_on_day(char* at, const Limit* limit, uint32_t member) noexcept nogil:
    """Note the sight of a member and return how many distinct ones the day has."""
    cdef uint32_t* count = <uint32_t*>at
    cdef uint32_t* members = <uint32_t*>(at + 8)
    cdef uint32_t i
    for i in range(count[0]):
        if members[i] == member:
            return count[0]
    if count[0] < limit.kept:
        members[count[0]] = member
        count[0] += 1
    return count[0]


# The records of an event's keys

cdef inline Table* keyed_table(State* state, int key) noexcept nogil:
    """Return the table with a record for each member, device, IP or phone."""
    return &state.tables[TABLE_MEMBERS + key]


cdef inline Table* spilled_table(State* state, int key) noexcept nogil:
    """Return the table of days that lost their slot to another day but may be asked for again."""
    return &state.tables[TABLE_FIRST_SPILLED + key]


cdef char* spilled_slot(State* state, const Case* case, int key, int32_t day, bint wanted) except? NULL nogil:
    """Return the spilled slot of a key's day, a new one if ``wanted``, or NULL."""
    cdef uint64_t first = day_hash(case.event.keys[key].first, day)
    # Members are told apart exactly: by their number.
    cdef uint64_t second = case.member.number if key == KEY_MEMBER else case.event.keys[key].second
    cdef Table* table = spilled_table(state, key)
    cdef char* record = find(table, first, second)
    if record == NULL:
        if not wanted:
            return NULL
        record = table_insert(table, first, second, day)
    touch(table, record)
    return record + sizeof(Header)


cdef int turn_slot(State* state, const Rules* rules, Case* case, int key, char* slot) except -1 nogil:
    """Give a slot that holds another day to the day of the event.

    A record has two slots, one for even and one for odd days. On a stream arrivals never go back, so a day that is
    followed by the next but one is over. Offline they may, and the day is put aside.
    """
    cdef int32_t* mark = <int32_t*>slot
    cdef uint32_t size = rules.day_bytes[key]
    cdef int32_t former = mark[0] - MARK_OF_DAY
    cdef char* spilled = NULL
    if mark[0] and former >= state.first_day:
        memcpy(spilled_slot(state, case, key, former, True), slot, size)
    if spilled_table(state, key).live:
        spilled = spilled_slot(state, case, key, case.day, False)
    if spilled != NULL:
        memcpy(slot, spilled, size)
    else:
        memset(slot, 0, size)
        mark[0] = case.day + MARK_OF_DAY
    return 0


cdef void empty_slots(State* state, const Rules* rules, int key, int32_t first_day) noexcept nogil:
    """Empty the slots of days before ``first_day``."""
    cdef Table* table = keyed_table(state, key)
    cdef uint32_t size = rules.day_bytes[key]
    cdef uint32_t record
    cdef char* slot
    cdef int parity
    for record in range(table.record_count):
        for parity in range(2):
            slot = record_at(table, record) + rules.day_offsets[parity][key]
            if (<int32_t*>slot)[0] and (<int32_t*>slot)[0] - MARK_OF_DAY < first_day:
                touch(table, record_at(table, record))
                memset(slot, 0, size)


cdef int state_reclaim(State* state, const Rules* rules, int32_t day) except -1 nogil:
    """Drop what is expired on the arrival day ``day``."""
    cdef int number
    for number in range(TABLES):
        table_reclaim(&state.tables[number], day)
    # On a stream that is all: nothing asks for the days that are over.
    if state.slack_days >= OFFLINE_SLACK_DAYS:
        for number in range(TABLES):
            state.tables[number].latest_day = 0
        for number in range(KEYS):
            empty_slots(state, rules, number, day - 1 - state.slack_days)
    return 0


cdef inline int find_slot(State* state, const Rules* rules, Case* case, int key) except -1 nogil:
    """Leave where the key counts on the day of the event."""
    cdef char* slot = case.places[key] + rules.day_offsets[case.day & 1][key]
    if (<int32_t*>slot)[0] != case.day + MARK_OF_DAY:
        turn_slot(state, rules, case, key, slot)
    case.places[KEYS + key] = slot
    return 0


cdef inline int find_member_places(State* state, const Rules* rules, Case* case, char* candidate) except -1 nogil:
    """Leave the record of the event's member, and the slot of its day if the rule or a limit counts by it."""
    case.member = member_of(state, case.event, <Member*>candidate)
    case.places[KEY_MEMBER] = <char*>case.member
    case.places[KEYS + KEY_MEMBER] = NULL
    if case.rule.daily_keys & (1 << KEY_MEMBER):
        find_slot(state, rules, case, KEY_MEMBER)
    return 0


cdef inline int find_places(State* state, const Rules* rules, Case* case, char** candidates) except -1 nogil:
    """Leave the records of the event's other keys on which the rule has limits, and their slots of the day."""
    cdef int key
    cdef const Hash128* hash
    cdef Table* table
    cdef Header* header
    for key in range(KEY_DEVICE, KEYS):
        hash = &case.event.keys[key]
        case.places[key] = case.places[KEYS + key] = NULL
        if hash.first == 0 or not case.rule.keys & (1 << key):
            continue
        table = keyed_table(state, key)
        header = <Header*>candidates[key]
        if header == NULL or header.first != hash.first or header.second != hash.second:
            header = <Header*>find(table, hash.first, hash.second)
        if header == NULL:
            header = <Header*>table_insert(table, hash.first, hash.second, case.day)
        touch(table, header)
        header.day = max(header.day, case.day)
        case.places[key] = <char*>header
        case.member.usual[key - 1] = guess_after(case.member.usual[key - 1], header.next_free)
        if case.rule.daily_keys & (1 << key):
            find_slot(state, rules, case, key)
    return 0


cdef inline uint32_t guess_after(uint32_t usual, uint32_t number) noexcept nogil:
    """Return which key to guess next for a member who had ``usual`` and now has ``number``: a new one if it comes twice
    in a row that it is not the usual one."""
    if usual == number or number >= <uint32_t>MISSED:
        return usual
    if usual == 0 or (usual & MISSED and usual != number | MISSED):
        return number
    return usual ^ MISSED


# Step 9: the base and the campaigns

cdef inline void day_words(State* state, const Rules* rules, int32_t day, uint64_t* words) noexcept nogil:
    """Leave the campaigns whose conditions on the date hold on ``day``."""
    cdef DayMask* known = &state.days[day & (DAY_CACHE - 1)]
    cdef const Campaign* campaign
    cdef uint32_t month_bit, week_bit
    cdef int32_t i
    if not known.known or known.day != day:
        memset(known, 0, sizeof(DayMask))
        known.day = day
        known.known = True
        month_bit = <uint32_t>1 << day_of_month(day)
        week_bit = <uint32_t>1 << day_of_week(day)
        for i in range(rules.campaign_count):
            campaign = &rules.campaigns[i]
            if ((campaign.days_of_month == 0 or campaign.days_of_month & month_bit)
                    and (campaign.weekdays == 0 or campaign.weekdays & week_bit)
                    and campaign.from_day <= day <= campaign.until_day):
                known.words[i >> 6] |= <uint64_t>1 << (i & 63)
    for i in range(rules.words):
        words[i] = known.words[i]


cdef bint is_drawn(const Campaign* campaign, const Event* event) noexcept nogil:
    """Tell whether the member belongs to the campaign's percentage."""
    cdef const char* member = data_of(event, &event.member)
    cdef uint32_t value = ~campaign.crc
    cdef uint32_t i
    for i in range(event.member.size):
        value = CRC_TABLE[(value ^ <uint8_t>member[i]) & 0xff] ^ (value >> 8)
    return <int32_t>(~value % 100) < campaign.percent


cdef void match_campaigns(State* state, const Rules* rules, const Case* case, uint64_t* words) noexcept nogil:
    """Leave the set of campaigns of which every condition holds."""
    cdef const Event* event = case.event
    cdef int32_t city = event.city
    cdef int32_t tier = name_find(&rules.tiers, case.member.tier_hash, -1) if case.member.tier_hash else -1
    cdef bint has_card = case.time_ms < case.member.card_until
    cdef int32_t i, campaign
    cdef uint64_t drawn
    # The last row of the masks is for names that no campaign has.
    if city < 0:
        city = rules.city_count
    if tier < 0:
        tier = rules.tier_count
    memset(words, 0, MAXIMUM_WORDS * sizeof(uint64_t))
    day_words(state, rules, case.day, words)
    for i in range(rules.words):
        words[i] &= case.rule.campaigns[i] & rules.minute_masks[case.minute * rules.words + i]
        words[i] &= rules.city_masks[city * rules.words + i] & rules.tier_masks[tier * rules.words + i]
        words[i] &= rules.untagged[i] | event.tags_mask[i] if event.tag_count else rules.untagged[i]
        if not has_card:
            words[i] &= ~rules.carded[i]
        drawn = words[i] & rules.drawn[i]
        while drawn:
            campaign = 64 * i + lowest_bit(drawn)
            if not is_drawn(&rules.campaigns[campaign], event):
                words[i] &= ~(<uint64_t>1 << (campaign & 63))
            drawn &= drawn - 1


cdef int sets_reserve(State* state, uint32_t capacity) except -1:
    """Make room for ``capacity`` sets, a power of two, and index those there are anew."""
    cdef uint32_t* index = <uint32_t*>checked(calloc(4 * capacity, sizeof(uint32_t)))
    cdef uint32_t number, position
    free(state.sets_index)
    state.sets_index = index
    state.sets_capacity = capacity
    state.sets = <CampaignSet*>checked(realloc(state.sets, capacity * sizeof(CampaignSet)))
    for number in range(state.sets_count):
        position = set_position(state, state.sets[number].words)
        while index[position]:
            position = (position + 1) & (4 * capacity - 1)
        index[position] = number + 1
    return 0


cdef inline uint32_t set_position(const State* state, const uint64_t* words) noexcept nogil:
    """Return where the search for a set starts."""
    cdef uint64_t hash = 0
    cdef int i
    for i in range(state.words):
        hash = (hash ^ words[i]) * <uint64_t>0x9e3779b97f4a7c15
        hash ^= hash >> 29
    return <uint32_t>hash & (4 * state.sets_capacity - 1)


cdef inline CampaignSet* campaign_set(State* state, const Rules* rules, const uint64_t* words) except NULL nogil:
    """Return the multiplier of a set of campaigns."""
    cdef uint32_t position = set_position(state, words)
    cdef CampaignSet* known
    while state.sets_index[position]:
        known = &state.sets[state.sets_index[position] - 1]
        if known.words[0] == words[0] and (state.words == 1 or memcmp(known.words, words, sizeof(known.words)) == 0):
            return known
        position = (position + 1) & (4 * state.sets_capacity - 1)
    return new_campaign_set(state, rules, words)


cdef CampaignSet* new_campaign_set(State* state, const Rules* rules, const uint64_t* words) except NULL with gil:
    """Ask Python for the multiplier of a set that was not seen before, and keep it."""
    cdef CampaignSet* known
    cdef uint32_t position
    if state.sets_count == state.sets_capacity:
        sets_reserve(state, 2 * state.sets_capacity)
    known = &state.sets[state.sets_count]
    memset(known, 0, sizeof(CampaignSet))
    memcpy(known.words, words, MAXIMUM_WORDS * sizeof(uint64_t))
    load_multiplier(state, rules, known)
    position = set_position(state, words)
    while state.sets_index[position]:
        position = (position + 1) & (4 * state.sets_capacity - 1)
    state.sets_count += 1
    state.sets_index[position] = state.sets_count
    return known


cdef int load_multiplier(State* state, const Rules* rules, CampaignSet* known) except -1:
    numbers = [i for i in range(rules.campaign_count) if (known.words[i >> 6] >> (i & 63)) & 1]
    numerator, denominator = (<object>state.multiplier)(numbers)
    known.negative = numerator < 0
    known.numerator_high = abs(numerator) >> 64
    known.numerator_low = abs(numerator) & 0xffffffffffffffff
    known.denominator_high = denominator >> 64
    known.denominator_low = denominator & 0xffffffffffffffff
    return 0


cdef inline bint compute_streak(Case* case) noexcept nogil:
    """Leave the streak as the event makes it; return whether it earns the bonus."""
    cdef Streak* kept = <Streak*>((<char*>case.member) + case.rule.streak_offset)
    case.streak = kept[0]
    if kept.run == 0:
        case.streak.last_day = case.day
        case.streak.run = 1
    elif case.day > kept.last_day:
        case.streak.run = kept.run + 1 if case.day == kept.last_day + 1 else 1
        case.streak.last_day = case.day
    else:
        return False
    return case.streak.run % case.rule.streak_days == 0


cdef inline void compute_base(Case* case, uint64_t* high, uint64_t* low) noexcept nogil:
    """Leave the exact base, in parts of a point."""
    high[0] = low[0] = 0
    if case.rule.per_yuan:
        if case.event.amount >= case.rule.min_amount_fen:
            high[0] = case.event.base_high
            low[0] = case.event.base_low
        return
    low[0] = case.rule.points
    if case.rule.streak_days and compute_streak(case):
        low[0] += case.rule.streak_bonus


# Steps 10 to 12

cdef inline void trip(Case* case, const Limit* limit, int64_t* observed, int64_t value) noexcept nogil:
    case.tripped |= <uint64_t>1 << limit.number
    case.actions |= <uint32_t>1 << limit.action
    observed[limit.number] = value


cdef inline void count_event(Case* case, int64_t* observed) noexcept nogil:
    """Step 10: count the event on the limits on events and members."""
    cdef const Limit* limit = case.rule.counting
    cdef const Limit* end = case.rule.counting_end
    cdef int64_t total
    cdef char* at
    while limit < end:
        at = case.places[limit.place]
        if at != NULL:
            at += limit.offset
            if limit.measure == MEASURE_EVENTS:
                if limit.sliding:
                    total = count_sliding(at, bucket_of(limit, case.time_ms))
                else:
                    (<int64_t*>at)[0] += 1
                    total = (<int64_t*>at)[0]
            elif limit.sliding:
                total = see_sliding(at, limit, case.member.number, case.time_ms)
            else:
                total = see_on_day(at, limit, case.member.number)
            if total > limit.max:
                trip(case, limit, observed, total)
        limit += 1


cdef inline int64_t test_points(Case* case, int64_t* observed, int64_t points) noexcept nogil:
    """Step 11: return what the limits on points leave; clamps come first."""
    cdef const Limit* limit = case.rule.pointing
    cdef const Limit* end = case.rule.pointing_end
    cdef int64_t used, total
    cdef char* at
    while limit < end:
        at = case.places[limit.place]
        if at != NULL:
            at += limit.offset
            used = points_sliding(at, bucket_of(limit, case.time_ms)) if limit.sliding else (<int64_t*>at)[0]
            total = saturated_sum(used, points)
            if total > limit.max:
                trip(case, limit, observed, total)
                if limit.action == ACTION_CLAMP:
                    points = max(<int64_t>0, limit.max - used)
        limit += 1
    return points


cdef inline void keep(Case* case, int64_t points) noexcept nogil:
    """Step 12: keep what an event that was not rejected leaves behind."""
    cdef const Limit* limit = case.rule.pointing
    cdef const Limit* end = case.rule.pointing_end
    cdef int64_t* total
    cdef char* at
    while limit < end:
        at = case.places[limit.place]
        if at != NULL:
            at += limit.offset
            if limit.sliding:
                add_points_sliding(at, bucket_of(limit, case.time_ms), points)
            else:
                total = <int64_t*>at
                total[0] = saturated_sum(total[0], points)
        limit += 1
    if case.rule.max_per_day:
        total = <int64_t*>(case.places[KEYS + KEY_MEMBER] + case.rule.daily_offset)
        total[0] += 1
    if case.rule.once:
        (<uint64_t*>((<char*>case.member) + case.rule.once_offset))[0] |= case.rule.once_bit
    if case.rule.streak_days:
        (<Streak*>((<char*>case.member) + case.rule.streak_offset))[0] = case.streak


cdef inline int refusal(const Case* case) noexcept nogil:
    """Step 8: return the cause of an early rejection."""
    cdef const char* member = <const char*>case.member
    if case.member.state == MEMBER_BLOCKED:
        return CAUSE_MEMBER_BLOCKED
    if case.rule.once and (<const uint64_t*>(member + case.rule.once_offset))[0] & case.rule.once_bit:
        return CAUSE_ONCE
    if (case.rule.max_per_day
            and (<const int64_t*>(case.places[KEYS + KEY_MEMBER] + case.rule.daily_offset))[0]
            >= case.rule.max_per_day):
        return CAUSE_MAX_PER_DAY
    return CAUSE_NONE


# Rows

cdef uint32_t add_row(Rows* rows, const Event* event, uint32_t number, int32_t day, int outcome,
                      int cause) noexcept nogil:
    """Append an entry without points and return its number."""
    cdef uint32_t row = rows.count
    rows.count += 1
    rows.events[row] = number
    rows.columns[COLUMN_AT][row] = event.arrival_ms
    rows.columns[COLUMN_AT_SEQ][row] = <int64_t>event.arrival_seq
    rows.columns[COLUMN_INDEX][row] = event.index
    rows.columns[COLUMN_TS][row] = event.ts
    rows.columns[COLUMN_DAY][row] = day
    rows.columns[COLUMN_KIND][row] = event.kind
    rows.columns[COLUMN_OUTCOME][row] = outcome
    rows.columns[COLUMN_CAUSE][row] = cause
    rows.columns[COLUMN_FROZEN][row] = 0
    rows.columns[COLUMN_AMOUNT][row] = event.amount
    rows.columns[COLUMN_BASE][row] = 0
    rows.columns[COLUMN_UNCAPPED][row] = 0
    rows.columns[COLUMN_POINTS][row] = 0
    rows.columns[COLUMN_TRIPPED][row] = 0
    rows.columns[COLUMN_DEVICE][row] = <int64_t>event.keys[KEY_DEVICE].first
    rows.columns[COLUMN_IP][row] = <int64_t>event.keys[KEY_IP].first
    rows.columns[COLUMN_PHONE][row] = <int64_t>event.keys[KEY_PHONE].first
    rows.outcomes[outcome] += 1
    return row


cdef inline void put_set(State* state, Rows* rows, uint32_t row, CampaignSet* chosen) noexcept nogil:
    """Name the entry's campaigns by their number among the sets of the batch."""
    if chosen.batch != state.batch:
        chosen.batch = state.batch
        chosen.code = rows.sets_count
        rows.sets[rows.sets_count] = <uint32_t>(chosen - state.sets)
        rows.sets_count += 1
    rows.columns[COLUMN_CAMPAIGN_SET][row] = chosen.code


cdef int put_plain_row(State* state, const Rules* rules, Rows* rows, const Event* event, uint32_t number, int32_t day,
                       int outcome, int cause) except -1 nogil:
    """Append an entry to which no campaign applied."""
    cdef uint64_t none[MAXIMUM_WORDS]
    memset(none, 0, sizeof(none))
    put_set(state, rows, add_row(rows, event, number, day, outcome, cause), campaign_set(state, rules, none))
    return 0


cdef int put_observed(Rows* rows, const Case* case, const int64_t* observed) except -1 nogil:
    """Append what the tripped limits observed, in rulebook order."""
    cdef uint64_t mask = case.tripped
    cdef int64_t* grown
    if rows.observed_count + 64 > rows.observed_capacity:
        grown = <int64_t*>realloc(rows.observed, (2 * rows.observed_capacity + 1024) * sizeof(int64_t))
        if grown == NULL:
            with gil:
                raise MemoryError()
        rows.observed = grown
        rows.observed_capacity = 2 * rows.observed_capacity + 1024
    while mask:
        rows.observed[rows.observed_count] = observed[lowest_bit(mask)]
        rows.observed_count += 1
        mask &= mask - 1
    return 0


# The decision

cdef int accrue(State* state, const Rules* rules, Event* event, uint32_t number, int64_t time_ms, int32_t day,
                char** candidates, Rows* rows) except -1 nogil:
    """Steps 8 to 12."""
    cdef Case case
    cdef int64_t observed[64]
    cdef uint64_t words[MAXIMUM_WORDS]
    cdef uint64_t base_high, base_low
    cdef CampaignSet* chosen
    cdef int64_t uncapped, points
    cdef int cause, outcome
    cdef bint frozen_before, immune
    cdef uint32_t row
    case.rule = &rules.earning[event.kind]
    case.event = event
    case.time_ms = time_ms
    case.day = day
    case.minute = local_minute(&state.event_clock, time_ms)
    case.tripped = 0
    case.actions = 0
    case.streak.last_day = case.streak.run = 0
    find_member_places(state, rules, &case, candidates[KEY_MEMBER])
    cause = refusal(&case)
    if cause != CAUSE_NONE:
        return put_plain_row(state, rules, rows, event, number, day, OUTCOME_REJECTED, cause)
    frozen_before = case.member.state == MEMBER_FROZEN
    find_places(state, rules, &case, candidates)

    compute_base(&case, &base_high, &base_low)
    match_campaigns(state, rules, &case, words)
    chosen = campaign_set(state, rules, words)
    uncapped = floor_product(
        base_high, base_low, chosen.numerator_high, chosen.numerator_low, chosen.negative,
        case.rule.scale, chosen.denominator_high, chosen.denominator_low)

    count_event(&case, observed)
    points = uncapped
    if not case.actions & (1 << ACTION_REJECT):
        points = test_points(&case, observed, uncapped)

    immune = time_ms < case.member.immune_until
    if case.actions & (1 << ACTION_FREEZE) and not immune:
        case.member.state = MEMBER_FROZEN
    if case.actions & (1 << ACTION_REJECT):
        outcome = OUTCOME_REJECTED
        points = 0
    else:
        keep(&case, points)
        outcome = OUTCOME_GRANTED
        if case.member.state == MEMBER_FROZEN or (case.actions & (1 << ACTION_HOLD) and not immune):
            outcome = OUTCOME_HELD

    row = add_row(rows, event, number, day, outcome, CAUSE_NONE)
    rows.columns[COLUMN_FROZEN][row] = frozen_before
    rows.columns[COLUMN_BASE][row] = floor_product(base_high, base_low, 0, 1, False, case.rule.scale, 0, 1)
    rows.columns[COLUMN_UNCAPPED][row] = uncapped
    rows.columns[COLUMN_POINTS][row] = points
    rows.columns[COLUMN_TRIPPED][row] = <int64_t>case.tripped
    rows.points[outcome] = saturated_sum(rows.points[outcome], points)
    put_set(state, rows, row, chosen)
    if case.tripped:
        put_observed(rows, &case, observed)
    return 0


cdef int control(State* state, const Rules* rules, const Event* event, char* candidate) except -1 nogil:
    """Step 5: apply a control event."""
    cdef Member* member = member_of(state, event, <Member*>candidate)
    cdef int kind = event.kind - rules.earning_count
    if kind == KIND_UPDATED:
        if event.tier_hash:
            member.tier_hash = event.tier_hash
        if event.card_until:
            member.card_until = event.card_until
    elif kind == KIND_FROZEN:
        if member.state != MEMBER_BLOCKED:
            member.state = MEMBER_FROZEN
    elif kind == KIND_RELEASED:
        member.state = MEMBER_ACTIVE
        member.immune_until = event.immune_until
    else:
        member.state = MEMBER_BLOCKED
    return 0


cdef int decide_new(State* state, const Rules* rules, Event* event, uint32_t number, int32_t arrival_day,
                    char** candidates, Rows* rows) except -1 nogil:
    """Steps 3 to 12, for an id that is not decided yet."""
    cdef int64_t time_ms = min(event.ts, event.arrival_ms)
    cdef int32_t day
    cdef bint late
    if event.kind < 0:
        event.status = STATUS_UNKNOWN_KIND
        return 0
    if event.ts > event.arrival_ms + FUTURE_TOLERANCE_MS:
        event.status = STATUS_TS_IN_FUTURE
        return 0
    day = local_day(&state.event_clock, rules, time_ms)
    late = day < arrival_day - 1
    event.status = STATUS_ENTRY
    if event.kind > rules.earning_count + KIND_REFUNDED:
        if late:
            event.status = STATUS_STALE_CONTROL
            return 0
        control(state, rules, event, candidates[KEY_MEMBER])
        return put_plain_row(state, rules, rows, event, number, day, OUTCOME_APPLIED, CAUSE_NONE)
    if event.kind == rules.earning_count + KIND_REFUNDED:
        return put_plain_row(state, rules, rows, event, number, day, OUTCOME_DEFERRED, CAUSE_REFUND)
    if late:
        return put_plain_row(state, rules, rows, event, number, day, OUTCOME_DEFERRED, CAUSE_LATE)
    return accrue(state, rules, event, number, time_ms, day, candidates, rows)


cdef void next_day(State* state, const Rules* rules, int64_t arrival_ms, int32_t arrival_day) noexcept nogil:
    """Take note that arrivals have reached a new business day, where none will be of an earlier one."""
    cdef int i
    if state.slack_days >= OFFLINE_SLACK_DAYS:
        return
    state.latest_day = arrival_day
    state.first_day = earliest_day(rules, arrival_ms, arrival_day) - state.slack_days
    for i in range(TABLES):
        state.tables[i].latest_day = arrival_day


cdef int decide_event(State* state, const Rules* rules, Event* event, uint32_t number, char** candidates,
                      Rows* rows) except -1 nogil:
    """Steps 1 to 12. ``candidates`` may be the records of the event's keys and, last, of its id; or NULL, or stale."""
    cdef Table* ids = &state.tables[TABLE_IDS]
    cdef IdRecord* known = <IdRecord*>candidates[KEYS]
    cdef int32_t arrival_day
    if event.status == STATUS_INVALID:
        return 0
    arrival_day = local_day(&state.arrival_clock, rules, event.arrival_ms)
    if arrival_day > state.latest_day:
        next_day(state, rules, event.arrival_ms, arrival_day)
    if known == NULL or known.header.first != event.id_hash.first or known.header.second != event.id_hash.second:
        known = <IdRecord*>find(ids, event.id_hash.first, event.id_hash.second)
    if known != NULL and arrival_day <= known.header.day + 1 + state.slack_days:
        event.status = STATUS_DUPLICATE if known.content == event.content else STATUS_ID_CONFLICT
        rows.duplicates += event.status == STATUS_DUPLICATE
        return 0
    decide_new(state, rules, event, number, arrival_day, candidates, rows)
    if event.status == STATUS_ENTRY:
        if known == NULL:
            known = <IdRecord*>table_insert(ids, event.id_hash.first, event.id_hash.second, arrival_day)
        touch(ids, known)
        known.header.day = arrival_day
        known.content = event.content
    return 0


# Looking ahead. What an event needs lies in some ten places, each of which is a cache miss and, worse, one of the
# address translation; so all of it is asked for some events before the decision, step by step, because each step needs
# what the one before has brought:
#
#   slots     the lines of slots where the searches for the id and the member start
#   member    the member's record; and that of the id, should it be known
#   usual     the records of the device, IP and phone that the member had before: nearly always they are the ones, and
#             their slots are not looked at; for a member who is not known yet, the slots
#   others    of a device, IP or phone that is another one, the slots
#   records   and what was found there

cdef inline void ask_for_record(const Table* table, const char* record) noexcept nogil:
    cdef uint32_t offset = 0
    while offset < table.stride:
        prefetch(record + offset)
        offset += LINE_BYTES


cdef inline void ask_for_event(const Event* event) noexcept nogil:
    """Ask for what nearly every decision needs of an event: another core may have decoded it."""
    cdef const char* at = <const char*>event
    prefetch(at)
    prefetch(at + LINE_BYTES)
    prefetch(at + 2 * LINE_BYTES)
    prefetch(at + 3 * LINE_BYTES)


cdef inline Slot* ask_for_line(const Table* table, uint64_t hash) noexcept nogil:
    cdef Slot* line = line_of(table, hash)
    prefetch(line)
    return line


cdef inline void ask_for_slots(State* state, const Rules* rules, const Event* event, Ahead* ahead) noexcept nogil:
    ahead.keys = 0
    if event.status == STATUS_INVALID:
        return
    ahead.keys = rules.earning[event.kind].keys if 0 <= event.kind < rules.earning_count else 1 << KEY_MEMBER
    ahead.lines[KEYS] = ask_for_line(&state.tables[TABLE_IDS], event.id_hash.first)
    ahead.lines[KEY_MEMBER] = ask_for_line(&state.tables[TABLE_MEMBERS], event.keys[KEY_MEMBER].first)


cdef inline void ask_for_member(State* state, const Event* event, Ahead* ahead) noexcept nogil:
    cdef char* record
    if ahead.keys == 0:
        return
    record = candidate_in(&state.tables[TABLE_IDS], ahead.lines[KEYS], event.id_hash.first)
    ahead.candidates[KEYS] = record
    if record != NULL:
        prefetch(record)
    record = candidate_in(&state.tables[TABLE_MEMBERS], ahead.lines[KEY_MEMBER], event.keys[KEY_MEMBER].first)
    ahead.candidates[KEY_MEMBER] = record
    if record != NULL:
        ask_for_record(&state.tables[TABLE_MEMBERS], record)


cdef inline void ask_for_usual(State* state, const Event* event, Ahead* ahead) noexcept nogil:
    cdef const Member* member = <const Member*>ahead.candidates[KEY_MEMBER]
    cdef const Table* table
    cdef uint32_t number
    cdef bint known
    cdef int key
    if ahead.keys == 0:
        return
    known = member != NULL and member.hash == event.keys[KEY_MEMBER].first
    for key in range(KEY_DEVICE, KEYS):
        ahead.lines[key] = NULL
        ahead.candidates[key] = NULL
        if event.keys[key].first == 0 or not ahead.keys & (1 << key):
            continue
        table = keyed_table(state, key)
        number = member.usual[key - 1] & ~<uint32_t>MISSED if known else 0
        if 0 < number <= table.record_count:
            ahead.candidates[key] = record_at(table, number - 1)
            ask_for_record(table, ahead.candidates[key])
        else:
            ahead.lines[key] = ask_for_line(table, event.keys[key].first)


cdef inline void ask_for_others(State* state, const Event* event, Ahead* ahead) noexcept nogil:
    cdef const Header* header
    cdef int key
    if ahead.keys == 0:
        return
    for key in range(KEY_DEVICE, KEYS):
        header = <const Header*>ahead.candidates[key]
        if header != NULL and header.first != event.keys[key].first:
            ahead.candidates[key] = NULL
            ahead.lines[key] = ask_for_line(keyed_table(state, key), event.keys[key].first)


cdef inline void ask_for_records(State* state, const Event* event, Ahead* ahead) noexcept nogil:
    cdef char* record
    cdef int key
    if ahead.keys == 0:
        return
    for key in range(KEY_DEVICE, KEYS):
        if ahead.lines[key] != NULL:
            record = candidate_in(keyed_table(state, key), ahead.lines[key], event.keys[key].first)
            ahead.candidates[key] = record
            if record != NULL:
                ask_for_record(keyed_table(state, key), record)


cdef void begin_batch(State* state) noexcept nogil:
    """Start a new batch: campaign sets are numbered afresh."""
    if state.sets_count > KEPT_SETS:
        state_rules_changed(state, state.words)
    state.batch += 1


cdef int decide_events(State* state, const Rules* rules, Event* events, uint32_t first, uint32_t end,
                       Rows* rows) except -1 nogil:
    """Decide the events from ``first`` up to ``end``, in order, leaving their status and appending entries to ``rows``.

    ``rows`` must have room for ``end`` entries.
    """
    cdef Ahead ahead[SLOTS_AHEAD]
    cdef Ahead* place
    cdef uint32_t step, count = end - first
    # Whatever is below the first event is, without a sign, beyond the last. A ring is enough: an event's place is free
    # once it is decided.
    for step in range(count + SLOTS_AHEAD):
        place = &ahead[step % SLOTS_AHEAD]
        if step >= SLOTS_AHEAD:
            decide_event(state, rules, &events[first + step - SLOTS_AHEAD], first + step - SLOTS_AHEAD,
                         place.candidates, rows)
        if step + EVENTS_AHEAD < count:
            ask_for_event(&events[first + step + EVENTS_AHEAD])
        if step < count:
            ask_for_slots(state, rules, &events[first + step], place)
        if step - (SLOTS_AHEAD - MEMBER_AHEAD) < count:
            ask_for_member(state, &events[first + step - (SLOTS_AHEAD - MEMBER_AHEAD)],
                           &ahead[(step + MEMBER_AHEAD) % SLOTS_AHEAD])
        if step - (SLOTS_AHEAD - USUAL_AHEAD) < count:
            ask_for_usual(state, &events[first + step - (SLOTS_AHEAD - USUAL_AHEAD)],
                          &ahead[(step + USUAL_AHEAD) % SLOTS_AHEAD])
        if step - (SLOTS_AHEAD - OTHERS_AHEAD) < count:
            ask_for_others(state, &events[first + step - (SLOTS_AHEAD - OTHERS_AHEAD)],
                           &ahead[(step + OTHERS_AHEAD) % SLOTS_AHEAD])
        if step - (SLOTS_AHEAD - RECORDS_AHEAD) < count:
            ask_for_records(state, &events[first + step - (SLOTS_AHEAD - RECORDS_AHEAD)],
                            &ahead[(step + RECORDS_AHEAD) % SLOTS_AHEAD])
    return 0
