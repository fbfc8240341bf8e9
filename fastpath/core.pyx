"""The core: owns the state, takes stream entries, gives ledger batches."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastpath.decide cimport (
    TABLE_MEMBERS,
    TABLES,
    Rows,
    State,
    begin_batch,
    decide_events,
    rows_free,
    rows_reserve,
    state_free,
    state_init,
    state_rules_changed,
)
from fastpath.decode cimport Hashing, check_batch, decode_event, hashing_init, open_batch
from fastpath.encode cimport write_campaign_sets, write_columns
from fastpath.image cimport StateImage, index_table, restore_state
from fastpath.msgpack cimport (
    Buffer,
    Reader,
    skip,
    write_array,
    write_bin_head,
    write_bytes,
    write_map,
    write_text,
    write_unsigned,
)
from fastpath.resp cimport ReplyReader
from fastpath.rules cimport FlatRulebook
from fastpath.siphash cimport PADDING, SipKey
from fastpath.table cimport (
    Move,
    Region,
    Table,
    preimages_growth,
    region_bytes,
    region_commit,
    region_free,
    region_init,
    table_bytes,
    table_growth,
    table_lines,
    table_prepare,
    table_reclaim,
    table_relayout,
)
from fastpath.types cimport (
    STATUS_DUPLICATE,
    STATUS_ENTRY,
    STATUS_ID_CONFLICT,
    STATUS_INVALID,
    STATUS_STALE_CONTROL,
    STATUS_TS_IN_FUTURE,
    STATUS_UNKNOWN_KIND,
    Event,
    RawEntry,
    Text,
)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* mutex, const void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)
    int pthread_cond_init(pthread_cond_t* condition, const void* attributes)
    int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex)
    int pthread_cond_broadcast(pthread_cond_t* condition)
    int pthread_cond_destroy(pthread_cond_t* condition)

cdef uint64_t MAXIMUM_TIME_MS = (<uint64_t>1 << 53) - 1

STATUSES = {
    STATUS_ENTRY: "entry",
    STATUS_DUPLICATE: "duplicate",
    STATUS_INVALID: "invalid",
    STATUS_ID_CONFLICT: "id_conflict",
    STATUS_UNKNOWN_KIND: "unknown_kind",
    STATUS_TS_IN_FUTURE: "ts_in_future",
    STATUS_STALE_CONTROL: "stale_control",
}
DEFAULT_SEGMENT_SHIFT = 16
PADDING_BYTES = bytes(PADDING)
HEADER_KEYS = 18

cdef enum:
    CHUNK_EVENTS = 512         # events decoded at a stretch: they should still be in the cache when they are decided
    LONGEST_NAME = 64          # of a member, in bytes


cdef struct Decoding:
    # The reply at hand, and how far it is decoded. One thread at a time decodes the next entries, in order: the one
    # that decides, when there is nothing left for it to decide, or one that helps it. Both hold `turn` to read or write
    # what is here; who has set `taken` may append events, and touch what decoding needs, without holding it.
    pthread_mutex_t turn
    pthread_cond_t moved
    const char* base
    const RawEntry* raw
    uint64_t raw_count
    uint64_t next
    uint32_t events            # decoded so far
    bint taken
    bint failed


cdef inline bytes bytes_of(const char* data, uint64_t size):
    return PyBytes_FromStringAndSize(data, size)


# Not a constant, for which the compiler would choose an instruction that takes longer than the library's function.
cdef size_t EVENT_BYTES = sizeof(Event)


cdef class Core:
    """The state machine. ``compact_json`` turns the value of a JSON entry into the compact form of its one event, or
    returns None where it is not as simple as that. Then ``split_json`` turns it into a list of ``(original, compact)``
    bytes, ``compact`` being None where an item does not encode; it raises ``ValueError`` where the whole does not
    decode."""

    cdef State state
    cdef Hashing hashing
    cdef Rows rows
    cdef Buffer buffer         # of the encoder, kept from batch to batch
    cdef Region region         # of the events, which stay where they are while their number grows
    cdef Event* events
    cdef uint32_t event_count
    cdef uint32_t decided_count
    cdef Decoding decoding
    cdef FlatRulebook rulebook
    cdef bytes names
    cdef object compact_json
    cdef object split_json
    cdef bytes key
    cdef list kept             # Python bytes that events point into
    cdef uint32_t entry_count
    cdef uint64_t through_ms
    cdef uint64_t through_seq
    cdef bint undecided        # a batch failed half-way: the state is not to be trusted

    def __cinit__(self, bytes key, int slack_days, compact_json, split_json,
                  uint32_t segment_shift=DEFAULT_SEGMENT_SHIFT):
        cdef SipKey sip
        if len(key) != 16:
            raise ValueError("the key must have 16 bytes")
        if not 3 <= segment_shift <= 20:
            raise ValueError("segment_shift must be within 3..20")
        sip.first = int.from_bytes(key[:8], "little")
        sip.second = int.from_bytes(key[8:], "little")
        self.key = key
        self.compact_json = compact_json
        self.split_json = split_json
        self.kept = []
        hashing_init(&self.hashing, sip)
        pthread_mutex_init(&self.decoding.turn, NULL)
        pthread_cond_init(&self.decoding.moved, NULL)
        state_init(&self.state, slack_days, segment_shift)
        region_init(&self.region, self.state.tables[TABLE_MEMBERS].huge)
        self.events = <Event*>self.region.base

    def __dealloc__(self):
        state_free(&self.state)
        rows_free(&self.rows)
        free(self.buffer.data)
        region_free(&self.region)
        pthread_mutex_destroy(&self.decoding.turn)
        pthread_cond_destroy(&self.decoding.moved)

    def adopt(self, dict description, multiplier, bytes names, list moves):
        """Decide by another rulebook from now on.

        ``names`` is the part of a batch's header that names it; ``moves`` gives for each table but the ids
        ``(stride, [(source, target, size), ...])``, or None where its records stay as they are.
        """
        cdef FlatRulebook rulebook = FlatRulebook(description, multiplier, self.key)
        for number, change in enumerate(moves):
            if change is not None:
                self.relayout(TABLE_MEMBERS + number, change[0], change[1])
        self.rulebook = rulebook
        self.names = names
        self.state.multiplier = <void*>multiplier
        state_rules_changed(&self.state, rulebook.rules.words)

    cdef int relayout(self, int table, uint32_t stride, list moves) except -1:
        cdef uint32_t count = len(moves)
        cdef Move* rows = <Move*>malloc((count + 1) * sizeof(Move))
        if rows == NULL:
            raise MemoryError()
        try:
            for number, (source, target, size) in enumerate(moves):
                rows[<int>number].source = source
                rows[<int>number].target = target
                rows[<int>number].size = size
            with nogil:
                table_relayout(&self.state.tables[table], stride, rows, count)
        finally:
            free(rows)
        return 0

    def decide_reply(self, ReplyReader reply):
        """Decide every event of a reply's entries. The reply must be kept until the batch is encoded."""
        cdef RawEntry* last
        if reply.raw_count == 0:
            raise ValueError("the reply has no entries")
        self.start()
        with nogil:
            self.begin_decoding(reply.buffer, reply.raw, reply.raw_count)
            try:
                self.decide_decoded()
            finally:
                self.end_decoding()
        last = &reply.raw[reply.raw_count - 1]
        self.finish(last.ms, last.seq)

    def assist(self):
        """Decode what ``decide_reply``, which another thread is at, has not come to yet; return when all is decoded."""
        with nogil:
            pthread_mutex_lock(&self.decoding.turn)
            try:
                while self.is_decoding():
                    if self.decoding.taken:
                        pthread_cond_wait(&self.decoding.moved, &self.decoding.turn)
                    else:
                        self.decode_some()
            finally:
                pthread_mutex_unlock(&self.decoding.turn)

    cdef void begin_decoding(self, const char* base, const RawEntry* raw, uint64_t raw_count) noexcept nogil:
        pthread_mutex_lock(&self.decoding.turn)
        self.decoding.base = base
        self.decoding.raw = raw
        self.decoding.raw_count = raw_count
        self.decoding.next = 0
        self.decoding.events = 0
        self.decoding.failed = False
        pthread_mutex_unlock(&self.decoding.turn)

    cdef void end_decoding(self) noexcept nogil:
        """Forget the reply, once nobody decodes it any more."""
        pthread_mutex_lock(&self.decoding.turn)
        self.decoding.raw_count = 0
        while self.decoding.taken:
            pthread_cond_wait(&self.decoding.moved, &self.decoding.turn)
        pthread_mutex_unlock(&self.decoding.turn)

    cdef int decode_some(self) except -1 nogil:
        """Take the turn, which nobody has, and decode a chunk of events. The lock is held before and after."""
        cdef uint32_t end = self.event_count + CHUNK_EVENTS
        cdef uint64_t count = self.decoding.raw_count
        cdef uint64_t next = self.decoding.next
        cdef bint done = False
        self.decoding.taken = True
        pthread_mutex_unlock(&self.decoding.turn)
        try:
            while next < count and self.event_count < end:
                self.take_entry(self.decoding.base, &self.decoding.raw[next])
                next += 1
            done = True
        finally:
            pthread_mutex_lock(&self.decoding.turn)
            self.decoding.taken = False
            self.decoding.failed = not done
            self.decoding.next = next
            self.decoding.events = self.event_count
            pthread_cond_broadcast(&self.decoding.moved)
        return 0

    cdef int decide_decoded(self) except -1 nogil:
        """Decide what is decoded, again and again, and decode where there is nothing to decide."""
        cdef uint32_t decoded
        cdef bint failed
        while True:
            pthread_mutex_lock(&self.decoding.turn)
            try:
                while self.decoding.events == self.decided_count and self.is_decoding():
                    if self.decoding.taken:
                        pthread_cond_wait(&self.decoding.moved, &self.decoding.turn)
                    else:
                        self.decode_some()
                decoded = self.decoding.events
                failed = self.decoding.failed
            finally:
                pthread_mutex_unlock(&self.decoding.turn)
            if failed:
                with gil:
                    raise RuntimeError("the thread that helps to decode has failed")
            if decoded == self.decided_count:
                return 0
            self.decide_until(decoded)

    cdef inline bint is_decoding(self) noexcept nogil:
        """Tell whether there is more to decode, or somebody is at it. For who holds the lock."""
        return self.decoding.taken or (self.decoding.next < self.decoding.raw_count and not self.decoding.failed)

    def decide_entries(self, entries):
        """Decide every event of ``(ms, seq, ((name, value), ...))`` tuples."""
        cdef RawEntry raw
        cdef bytes value, name, padded
        if not entries:
            raise ValueError("there are no entries")
        self.start()
        memset(&raw, 0, sizeof(raw))
        for ms, seq, fields in entries:
            raw.ms = ms
            raw.seq = seq
            raw.field_count = len(fields)
            name, value = fields[0]
            # The decoder wants readable bytes behind a value.
            padded = value + PADDING_BYTES
            self.kept.append(padded)
            # Offsets count from the value itself; the name is looked at only here.
            raw.value = 0
            raw.value_size = len(value)
            self.take_named(PyBytes_AS_STRING(padded), &raw, PyBytes_AS_STRING(name), len(name))
            if self.event_count - self.decided_count >= CHUNK_EVENTS:
                self.decide_until(self.event_count)
        self.decide_until(self.event_count)
        self.finish(ms, seq)

    cdef int check_usable(self) except -1:
        if self.undecided:
            raise ValueError("a batch failed half-way; the state cannot be used any more")
        return 0

    cdef int start(self) except -1:
        if self.rulebook is None:
            raise ValueError("no rulebook was adopted")
        self.check_usable()
        self.kept.clear()
        self.undecided = True
        self.event_count = 0
        self.decided_count = 0
        self.entry_count = 0
        begin_batch(&self.state)
        self.rows.count = 0
        self.rows.observed_count = 0
        self.rows.sets_count = 0
        self.rows.duplicates = 0
        memset(self.rows.outcomes, 0, sizeof(self.rows.outcomes))
        memset(self.rows.points, 0, sizeof(self.rows.points))
        return 0

    cdef inline Event* new_event(self, const RawEntry* raw, uint32_t index) except NULL nogil:
        """Append an event that is invalid until it has been decoded."""
        cdef Event* event = &self.events[self.event_count]
        region_commit(&self.region, (self.event_count + <uint64_t>1) * sizeof(Event))
        memset(event, 0, EVENT_BYTES)
        event.arrival_ms = <int64_t>raw.ms
        event.arrival_seq = raw.seq
        event.entry = self.entry_count
        event.index = index
        event.status = STATUS_INVALID
        self.event_count += 1
        return event

    cdef inline int take_entry(self, const char* base, const RawEntry* raw) except -1 nogil:
        return self.take_named(base, raw, base + raw.name, raw.name_size)

    cdef int take_named(self, const char* base, const RawEntry* raw, const char* name,
                        uint32_t name_size) except -1 nogil:
        """Decode the events of one stream entry."""
        cdef const char* value = base + raw.value
        cdef char encoding = 0
        cdef Event* event
        if name_size == 1 and raw.field_count == 1 and 0 < raw.ms <= MAXIMUM_TIME_MS:
            encoding = name[0]
        if encoding == b"e":
            event = self.new_event(raw, 0)
            self.decode(value, raw.value_size, event)
        elif encoding == b"b":
            self.take_batch(value, raw)
        elif encoding == b"j":
            self.take_json(value, raw)
        else:
            self.new_event(raw, 0)
        self.entry_count += 1
        return 0

    cdef inline void decode(self, const char* data, uint64_t size, Event* event) noexcept nogil:
        """Decode an event that fills ``size`` bytes."""
        event.raw.data = data
        event.raw.size = <uint32_t>size
        if decode_event(&self.rulebook.rules, &self.hashing, data, data + size, event, 0) == data + size:
            event.status = STATUS_ENTRY

    cdef int take_batch(self, const char* value, const RawEntry* raw) except -1 nogil:
        cdef Reader reader
        cdef uint64_t count = 0
        reader.at = <const unsigned char*>value
        reader.end = reader.at + raw.value_size
        if not open_batch(&reader, &count):
            self.new_event(raw, 0)
        elif not self.take_good_batch(reader, count, raw):
            # A batch that does not decode is one dead letter; if it does, its bad items are.
            if check_batch(&reader, count):
                self.take_items(reader, count, raw)
            else:
                self.new_event(raw, 0)
        return 0

    cdef bint take_good_batch(self, Reader reader, uint64_t count, const RawEntry* raw) except -1 nogil:
        """Decode a batch whose events are all valid, as nearly always; otherwise nothing has happened."""
        cdef uint32_t before = self.event_count
        cdef const char* at = <const char*>reader.at
        cdef const char* end = <const char*>reader.end
        cdef const char* after
        cdef Event* event
        cdef uint64_t index
        if count > raw.value_size:
            return False
        for index in range(count):
            event = self.new_event(raw, <uint32_t>index)
            after = decode_event(&self.rulebook.rules, &self.hashing, at, end, event, 1)
            if after == NULL:
                break
            event.raw.data = at
            event.raw.size = <uint32_t>(after - at)
            event.status = STATUS_ENTRY
            at = after
        else:
            if at == end:
                return True
        self.event_count = before
        return False

    cdef int take_items(self, Reader reader, uint64_t count, const RawEntry* raw) except -1 nogil:
        """Decode the items of a batch one by one."""
        cdef const unsigned char* item
        cdef uint64_t index
        for index in range(count):
            item = reader.at
            skip(&reader, 1)
            self.decode(<const char*>item, reader.at - item, self.new_event(raw, <uint32_t>index))
        return 0

    cdef int take_json(self, const char* value, const RawEntry* raw) except -1 with gil:
        cdef bytes whole = bytes_of(value, raw.value_size)
        cdef uint32_t index = 0
        compact = self.compact_json(whole)
        if compact is not None:
            self.take_json_item(whole, compact, raw, 0)
            return 0
        try:
            items = self.split_json(whole)
        except ValueError:
            self.new_event(raw, 0)
            return 0
        for original, compact in items:
            self.take_json_item(original, compact, raw, index)
            index += 1
        return 0

    cdef int take_json_item(self, bytes original, bytes compact, const RawEntry* raw, uint32_t index) except -1:
        """Decode an event from its compact form, or none if that is None; a dead letter keeps the item as it came."""
        cdef Event* event = self.new_event(raw, index)
        cdef bytes padded
        if compact is not None:
            padded = compact + PADDING_BYTES
            self.kept.append(padded)
            self.decode(PyBytes_AS_STRING(padded), len(compact), event)
        self.kept.append(original)
        event.from_json = True
        event.raw.data = PyBytes_AS_STRING(original)
        event.raw.size = <uint32_t>len(original)
        return 0

    cdef int decide_until(self, uint32_t end) except -1 nogil:
        """Decide the events before ``end`` that are not decided yet."""
        cdef uint32_t first = self.decided_count
        rows_reserve(&self.rows, end)
        decide_events(&self.state, &self.rulebook.rules, self.events, first, end, &self.rows)
        self.decided_count = end
        return 0

    cdef int finish(self, uint64_t ms, uint64_t seq) except -1:
        self.through_ms = ms
        self.through_seq = seq
        self.undecided = False
        return 0

    @property
    def counts(self):
        """``(stream entries, events, entries, duplicates)`` of the last batch; the rest are dead letters."""
        return self.entry_count, self.event_count, self.rows.count, self.rows.duplicates

    @property
    def through(self):
        """The ID of the last stream entry of the batch."""
        return self.through_ms, self.through_seq

    @property
    def outcomes(self):
        """How many entries of the batch have each outcome, in the order of the ledger's codes."""
        return tuple([self.rows.outcomes[i] for i in range(5)])

    @property
    def points(self):
        """The sums of the entries' points, by outcome likewise."""
        return tuple([self.rows.points[i] for i in range(5)])

    def statuses(self):
        """Return ``(entry number, ms, seq, index, status, id or None)`` for every event of the batch."""
        return [self.describe(i) for i in range(self.event_count)]

    def dead_letters(self):
        """Return ``(entry number, ms, seq, index, status, id or None, encoding, original)`` of each.

        ``encoding`` and ``original`` are those of an item of a batch; None where the entry as a whole is meant.
        """
        cdef uint32_t i
        cdef Event* event
        letters = []
        for i in range(self.event_count):
            event = &self.events[i]
            if event.status == STATUS_ENTRY or event.status == STATUS_DUPLICATE:
                continue
            letters.append((*self.describe(i), *self.original_of(i)))
        return letters

    cdef tuple describe(self, uint32_t number):
        cdef Event* event = &self.events[number]
        name = None if event.status == STATUS_INVALID else text_or_none(&event.id)
        return (event.entry, <uint64_t>event.arrival_ms, event.arrival_seq, event.index, STATUSES[event.status], name)

    cdef tuple original_of(self, uint32_t number):
        cdef Event* event = &self.events[number]
        if event.raw.data == NULL:
            return None, None
        return b"j" if event.from_json else b"e", bytes_of(event.raw.data, event.raw.size)

    def encode(self, uint64_t batch, bytes previous, tuple after, uint64_t first_seq):
        """Return the ledger batch: docs/LEDGER.md."""
        cdef Buffer* buffer = &self.buffer
        cdef uint64_t after_ms = after[0], after_seq = after[1]
        stream_entries, events, entries, duplicates = self.counts
        buffer.size = 0
        buffer.failed = False
        write_map(buffer, HEADER_KEYS)
        self.put_number(buffer, b"format", 1)
        write_text(buffer, "type", 4)
        write_text(buffer, "entries", 7)
        self.put_number(buffer, b"batch", batch)
        write_text(buffer, "previous", 8)
        write_bin_head(buffer, len(previous))
        write_bytes(buffer, PyBytes_AS_STRING(previous), len(previous))
        self.put_position(buffer, b"after", after_ms, after_seq)
        self.put_position(buffer, b"through", self.through_ms, self.through_seq)
        self.put_number(buffer, b"first_seq", first_seq)
        self.put_number(buffer, b"stream_entries", stream_entries)
        self.put_number(buffer, b"events", events)
        self.put_number(buffer, b"entries", entries)
        self.put_number(buffer, b"duplicates", duplicates)
        self.put_number(buffer, b"dead_letters", events - entries - duplicates)
        write_bytes(buffer, PyBytes_AS_STRING(self.names), len(self.names))
        write_text(buffer, "campaign_sets", 13)
        with nogil:
            write_campaign_sets(buffer, &self.rulebook.rules, &self.state, &self.rows)
            write_text(buffer, "columns", 7)
            write_columns(buffer, &self.rulebook.rules, self.events, &self.rows)
        if buffer.failed:
            raise MemoryError()
        return bytes_of(<char*>buffer.data, buffer.size)

    cdef void put_number(self, Buffer* buffer, bytes name, uint64_t number) noexcept:
        write_text(buffer, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        write_unsigned(buffer, number)

    cdef void put_position(self, Buffer* buffer, bytes name, uint64_t ms, uint64_t seq) noexcept:
        write_text(buffer, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        write_array(buffer, 2)
        write_unsigned(buffer, ms)
        write_unsigned(buffer, seq)

    def image(self):
        """Begin an image of the state as it is now, between two batches. There can be one at a time."""
        cdef StateImage image = StateImage()
        self.check_usable()
        if self.state.tables[0].preimages != NULL:
            raise ValueError("an image is taken already")
        image.start(self, &self.state)
        return image

    def restore(self, dict shape, source, each):
        """Take on the state of an image: ``shape`` is its description, ``source`` a file with its bytes.

        What ``source.readinto`` has filled stays as it is until the next ``source.read``. ``each`` is ``map``, or does
        the same in several threads. The rulebook must have been adopted, and nothing decided. Raises ``ValueError``
        where the image does not fit; the core is of no use then.
        """
        self.undecided = True
        restore_state(self, &self.state, shape, source)
        for _ in each(self.index, range(TABLES)):
            pass
        self.undecided = False

    def index(self, int number):
        """Make the index of a table whose records are in place. Other threads may do the same for other tables."""
        with nogil:
            index_table(&self.state.tables[number])

    def reclaim(self, int day):
        """Drop what is expired on the arrival day ``day``, from which arrivals may not go back."""
        cdef int number
        with nogil:
            for number in range(TABLES):
                table_reclaim(&self.state.tables[number], day)

    def headroom_bytes(self, uint64_t events, bint imaging):
        """Return the most by which ``memory_bytes`` can grow when so many events are decided.

        ``imaging``: also where an image is begun before them.
        """
        cdef int number
        cdef uint64_t names = self.state.names_size + events * LONGEST_NAME
        cdef uint64_t total = region_bytes(names, self.is_huge()) - self.name_bytes()
        cdef Table* table
        for number in range(TABLES):
            table = &self.state.tables[number]
            total += table_growth(table, events)
            if imaging or table.preimages != NULL:
                total += preimages_growth(table, events)
        return total

    def adoption_bytes(self, list moves):
        """Return the most by which ``memory_bytes`` can grow, for a moment too, in an ``adopt`` with these moves."""
        cdef uint64_t total = 0
        cdef Table* table
        cdef uint64_t stride
        for number, change in enumerate(moves):
            if change is not None:
                table = &self.state.tables[TABLE_MEMBERS + <int>number]
                stride = change[0]
                total += region_bytes(table.record_count * stride, table.huge)
        return total

    cdef inline bint is_huge(self) noexcept:
        return self.state.tables[TABLE_MEMBERS].huge

    cdef inline uint64_t name_bytes(self) noexcept:
        return region_bytes(self.state.names_size, self.is_huge())

    def prepare(self):
        """Bring in the memory that the tables will grow into. Another thread may do this, but not during ``adopt``."""
        cdef int number
        with nogil:
            for number in range(TABLES):
                table_prepare(&self.state.tables[number])

    @property
    def memory_bytes(self):
        """The memory that the state has in use, with what is brought in ahead; an image's own is the image's."""
        cdef int number
        cdef uint64_t total = self.name_bytes()
        for number in range(TABLES):
            total += table_bytes(&self.state.tables[number])
        return total

    @property
    def lines_searched(self):
        """How many lines of slots are looked at in each table if every key is searched for once."""
        cdef int number
        return tuple([table_lines(&self.state.tables[number]) for number in range(TABLES)])

    @property
    def sizes(self):
        """The number of live records of each table: ids, members, devices, IPs, phones, then the spilled days of the
        last four."""
        cdef int number
        return tuple([self.state.tables[number].live for number in range(TABLES)])


cdef text_or_none(const Text* text):
    return text.data[:text.size].decode() if text.size else None
