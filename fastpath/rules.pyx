from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from fastpath.siphash cimport PADDING, SipKey, hash_text
from fastpath.types cimport KEYS, MAXIMUM_WORDS

WORD = (1 << 64) - 1


cdef uint64_t hash_of_name(SipKey key, bytes name):
    cdef bytes padded = name + bytes(PADDING)
    return hash_text(key, DOMAIN_NAME, PyBytes_AS_STRING(padded), len(name))


cdef class FlatRulebook:
    """A rulebook's tables. ``description`` is the plain dictionary that accrual.engine.compile makes of a rulebook;
    ``multiplier`` returns the numerator and denominator of M for a list of campaign numbers."""

    def __cinit__(self, dict description, multiplier, bytes key):
        cdef SipKey sip
        self.description = description
        self.multiplier = multiplier
        self.arrays = []
        sip.first = int.from_bytes(key[:8], "little")
        sip.second = int.from_bytes(key[8:], "little")
        self.rules.words = max(1, (len(description["campaigns"]) + 63) // 64)
        if self.rules.words > MAXIMUM_WORDS:
            raise ValueError("a rulebook has too many campaigns")
        self.load_earning(sip)
        for number in range(KEYS):
            for parity in range(2):
                self.rules.day_offsets[<int>parity][<int>number] = description["day_offsets"][parity][number]
            self.rules.day_bytes[<int>number] = description["day_bytes"][number]
        self.load_campaigns(sip)
        self.load_calendar()

    def __dealloc__(self):
        for address in self.arrays or ():
            free(<void*><size_t>address)

    cdef void* array(self, size_t size) except NULL:
        """Return zeroed memory that lives as long as the rulebook."""
        cdef void* memory = calloc(1, size if size else 1)
        if memory == NULL:
            raise MemoryError()
        self.arrays.append(<size_t>memory)
        return memory

    cdef int name_map(self, NameMap* names, SipKey key, list texts) except -1:
        """Map each text to its position in ``texts``."""
        cdef uint32_t size = 4
        cdef uint64_t hash
        cdef uint32_t i
        while size < 2 * len(texts) + 2:
            size *= 2
        names.keys = <uint64_t*>self.array(size * sizeof(uint64_t))
        names.values = <int32_t*>self.array(size * sizeof(int32_t))
        names.mask = size - 1
        for number, text in enumerate(texts):
            hash = hash_of_name(key, text.encode())
            i = <uint32_t>hash & names.mask
            while names.keys[i]:
                i = (i + 1) & names.mask
            names.keys[i] = hash
            names.values[i] = number
        return 0

    cdef int set_words(self, uint64_t* words, object mask) except -1:
        for word in range(self.rules.words):
            words[word] = (mask >> (64 * word)) & WORD
        return 0

    cdef uint64_t* masks(self, list rows) except NULL:
        """Return rows of campaign sets."""
        cdef uint64_t* memory = <uint64_t*>self.array(len(rows) * self.rules.words * sizeof(uint64_t))
        for number, mask in enumerate(rows):
            self.set_words(memory + <int>number * self.rules.words, mask)
        return memory

    cdef int load_earning(self, SipKey key) except -1:
        cdef EarningRule* rule
        rows = self.description["earning"]
        self.rules.earning_count = len(rows)
        self.rules.earning = <EarningRule*>self.array(len(rows) * sizeof(EarningRule))
        self.rules.priced_kind = -1
        self.rules.order_paid = hash_of_name(key, b"order_paid")
        for number, row in enumerate(rows):
            rule = &self.rules.earning[<int>number]
            rule.per_yuan = row["per_yuan"]
            rule.once = row["once"]
            rule.points = row["points"]
            rule.streak_bonus = row["streak_bonus"]
            rule.min_amount_fen = row["min_amount_fen"]
            rule.streak_days = row["streak_days"]
            rule.max_per_day = row["max_per_day"]
            rule.scale = row["scale"]
            rule.weight = row["weight"]
            rule.once_offset = row["once_offset"]
            rule.once_bit = 1 << row["once_bit"]
            rule.streak_offset = row["streak_offset"]
            rule.daily_offset = row["daily_offset"]
            rule.keys = row["keys"]
            rule.daily_keys = row["daily_keys"]
            rule.counting = self.limits(row["counting"])
            rule.counting_end = rule.counting + <size_t>len(row["counting"])
            rule.pointing = self.limits(row["pointing"])
            rule.pointing_end = rule.pointing + <size_t>len(row["pointing"])
            self.set_words(rule.campaigns, row["campaigns"])
            if row["per_yuan"]:
                self.rules.priced_kind = number
        self.name_map(&self.rules.kinds, key, self.description["kinds"])
        categories = self.description["category_weights"]
        self.name_map(&self.rules.categories, key, list(categories))
        self.rules.category_weights = <int64_t*>self.array(len(categories) * sizeof(int64_t))
        for number, weight in enumerate(categories.values()):
            self.rules.category_weights[<int>number] = weight
        self.rules.blank_weight = self.description["blank_weight"]
        return 0

    cdef Limit* limits(self, list rows) except NULL:
        """Return an array of limits."""
        cdef Limit* memory = <Limit*>self.array(len(rows) * sizeof(Limit))
        cdef Limit* limit = memory
        for row in rows:
            limit.number = row["number"]
            limit.place = row["place"]
            limit.measure = row["measure"]
            limit.action = row["action"]
            limit.sliding = row["duration_ms"] > 0
            limit.max = row["max"]
            limit.duration_ms = row["duration_ms"]
            limit.bucket_factor = row["bucket_factor"]
            limit.bucket_shift = row["bucket_shift"]
            limit.offset = row["offset"]
            limit.kept = row["kept"]
            limit += 1
        return memory

    cdef int load_campaigns(self, SipKey key) except -1:
        cdef Campaign* campaign
        rows = self.description["campaigns"]
        self.rules.campaign_count = len(rows)
        self.rules.campaigns = <Campaign*>self.array(len(rows) * sizeof(Campaign))
        for number, row in enumerate(rows):
            campaign = &self.rules.campaigns[<int>number]
            campaign.days_of_month = row["days_of_month"]
            campaign.weekdays = row["weekdays"]
            campaign.from_day = row["from_day"]
            campaign.until_day = row["until_day"]
            campaign.percent = row["percent"]
            campaign.crc = row["crc"]
        self.name_map(&self.rules.cities, key, self.description["cities"])
        self.rules.city_count = len(self.description["cities"])
        self.rules.city_masks = self.masks(self.description["city_masks"])
        self.name_map(&self.rules.tiers, key, self.description["tiers"])
        self.rules.tier_count = len(self.description["tiers"])
        self.rules.tier_masks = self.masks(self.description["tier_masks"])
        self.name_map(&self.rules.tags, key, self.description["tags"])
        self.rules.tag_masks = self.masks(self.description["tag_masks"])
        self.set_words(self.rules.untagged, self.description["untagged"])
        self.set_words(self.rules.carded, self.description["carded"])
        self.set_words(self.rules.drawn, self.description["drawn"])
        self.rules.minute_masks = self.masks(self.description["minute_masks"])
        return 0

    cdef int load_calendar(self) except -1:
        rows = self.description["transitions"]
        self.rules.transition_count = len(rows)
        self.rules.transition_ms = <int64_t*>self.array(len(rows) * sizeof(int64_t))
        self.rules.transition_offset_ms = <int64_t*>self.array(len(rows) * sizeof(int64_t))
        for number, (from_ms, offset_ms) in enumerate(rows):
            self.rules.transition_ms[<int>number] = from_ms
            self.rules.transition_offset_ms[<int>number] = offset_ms
        return 0
