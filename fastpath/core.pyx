"""The core: owns the state, takes stream entries, gives ledger batches."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport UINT32_MAX, int64_t, uint32_t, uint64_t
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
    state_reclaim,
    state_rules_changed,
)
from fastpath.decode cimport Hashing, check_batch, decode_event, hashing_adopt, hashing_init, open_batch
from fastpath.encode cimport write_campaign_sets, write_columns
from fastpath.image cimport StateImage, index_table, restore_state
from fastpath.msgpack cimport (
    Buffer,
    Reader,
    pass_over,
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
    data_of,
)

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
    CHUNK_EVENTS = 512         # events decoded at a stretch, where they are decided at once: as the cache can hold
    LONGEST_NAME = 64          # of a member, in bytes


cdef struct Work:
    # The events of a batch, and what was decided of them.
    Region region              # of the events, which stay where they are while their number grows
    Event* events
    Rows rows
    uint32_t event_count
    uint32_t decided_count
    uint32_t entry_count
    uint64_t through_ms
    uint64_t through_seq


cdef inline bytes bytes_of(const char* data, uint64_t size):
    return PyBytes_FromStringAndSize(data, size)


cdef class Batch:
    """The events of some stream entries, and what was decided of them. What they were decoded from must be kept until
    it is encoded. Of three batches one can be decoded, one decided and one encoded at a time, by three threads."""

    cdef Work work
    cdef Buffer sets           # encoded
    cdef Buffer buffer         # of the encoder, kept from batch to batch
    cdef bytes names
    cdef list kept             # Python bytes that events point into

    def __cinit__(self, bint huge=True):
        self.kept = []
        region_init(&self.work.region, huge)
        self.work.events = <Event*>self.work.region.base

    def __dealloc__(self):
        rows_free(&self.work.rows)
        region_free(&self.work.region)
        free(self.sets.data)
        free(self.buffer.data)

    cdef void clear(self, bytes names):
        cdef Rows* rows = &self.work.rows
        self.kept.clear()
        self.names = names
        self.work.event_count = self.work.decided_count = self.work.entry_count = 0
        rows.count = rows.observed_count = rows.sets_count = rows.duplicates = 0
        memset(rows.outcomes, 0, sizeof(rows.outcomes))
        memset(rows.points, 0, sizeof(rows.points))

    @property
    def counts(self):
        """``(stream entries, events, entries, duplicates)`` of the last batch; the rest are dead letters."""
        return self.work.entry_count, self.work.event_count, self.work.rows.count, self.work.rows.duplicates

    @property
    def through(self):
        """The ID of the last stream entry of the batch."""
        return self.work.through_ms, self.work.through_seq

    @property
    def outcomes(self):
        """How many entries of the batch have each outcome, in the order of the ledger's codes."""
        return tuple([self.work.rows.outcomes[i] for i in range(5)])

    @property
    def points(self):
        """The sums of the entries' points, by outcome likewise."""
        return tuple([self.work.rows.points[i] for i in range(5)])

    def statuses(self):
        """Return ``(entry number, ms, seq, index, status, id or None)`` for every event of the batch."""
        return [self.describe(i) for i in range(self.work.event_count)]

    def dead_letters(self):
        """Return ``(entry number, ms, seq, index, status, id or None, encoding, original)`` of each.

        ``encoding`` and ``original`` are those of an item of a batch; None where the entry as a whole is meant.
        """
        cdef uint32_t i
        cdef Event* event
        letters = []
        for i in range(self.work.event_count):
            event = &self.work.events[i]
            if event.status == STATUS_ENTRY or event.status == STATUS_DUPLICATE:
                continue
            letters.append((*self.describe(i), *self.original_of(i)))
        return letters

    cdef tuple describe(self, uint32_t number):
        cdef Event* event = &self.work.events[number]
        name = None if event.status == STATUS_INVALID else text_or_none(data_of(event, &event.id), event.id.size)
        return (event.entry, <uint64_t>event.arrival_ms, event.arrival_seq, event.index, STATUSES[event.status], name)

    cdef tuple original_of(self, uint32_t number):
        cdef Event* event = &self.work.events[number]
        if event.raw == NULL:
            return None, None
        return b"j" if event.from_json else b"e", bytes_of(event.raw, event.raw_size)

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
        self.put_position(buffer, b"through", self.work.through_ms, self.work.through_seq)
        self.put_number(buffer, b"first_seq", first_seq)
        self.put_number(buffer, b"stream_entries", stream_entries)
        self.put_number(buffer, b"events", events)
        self.put_number(buffer, b"entries", entries)
        self.put_number(buffer, b"duplicates", duplicates)
        self.put_number(buffer, b"dead_letters", events - entries - duplicates)
        write_bytes(buffer, PyBytes_AS_STRING(self.names), len(self.names))
        write_text(buffer, "campaign_sets", 13)
        write_bytes(buffer, self.sets.data, self.sets.size)
        with nogil:
            write_text(buffer, "columns", 7)
            write_columns(buffer, self.work.events, &self.work.rows)
        if buffer.failed or self.sets.failed:
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


cdef class Core:
    """The state machine. ``compact_json`` turns the value of a JSON entry into the compact form of its one event, or
    returns None where it is not as simple as that. Then ``split_json`` turns it into a list of ``(original, compact)``
    bytes, ``compact`` being None where an item does not encode; it raises ``ValueError`` where the whole does not
    decode."""

    cdef State state
    cdef Hashing hashing
    cdef Batch batch           # the one that is decoded
    cdef Work* work            # and its events
    cdef FlatRulebook rulebook
    cdef bytes names
    cdef object compact_json
    cdef object split_json
    cdef bytes key
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
        hashing_init(&self.hashing, sip)
        state_init(&self.state, slack_days, segment_shift)

    def __dealloc__(self):
        state_free(&self.state)

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
        hashing_adopt(&self.hashing, &rulebook.rules)
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

    def decode_reply(self, ReplyReader reply, Batch batch not None):
        """Decode every event of a reply's entries into ``batch``."""
        self.begin(batch)
        with nogil:
            self.take_entries(reply.buffer, reply.raw, reply.raw_count)
        self.end_at_last(reply)

    def decide(self, Batch batch not None):
        """Decide the events of a batch that was decoded."""
        self.check_usable()
        self.undecided = True
        begin_batch(&self.state)
        with nogil:
            self.decide_all(&batch.work)
        self.finish(batch)

    def decide_reply(self, ReplyReader reply, Batch batch not None):
        """Decode and decide every event of a reply's entries, by turns."""
        cdef const RawEntry* raw = reply.raw
        cdef const RawEntry* end = raw + reply.raw_count
        self.check_usable()
        self.begin(batch)
        self.undecided = True
        begin_batch(&self.state)
        with nogil:
            while raw < end:
                raw += self.take_entries(reply.buffer, raw, end - raw, CHUNK_EVENTS)
                self.decide_all(self.work)
        self.end_at_last(reply)
        self.finish(batch)

    cdef uint64_t take_entries(self, const char* base, const RawEntry* raw, uint64_t count,
                               uint32_t events=UINT32_MAX) except? 0 nogil:
        """Decode ``count`` entries, or as many as ``events`` events take, and return how many there were."""
        cdef uint64_t taken = 0
        cdef uint32_t before = self.work.event_count
        while taken < count and self.work.event_count - before < events:
            self.take_entry(base, &raw[taken])
            taken += 1
        return taken

    cdef int end_at_last(self, ReplyReader reply) except -1:
        cdef const RawEntry* last = &reply.raw[reply.raw_count - 1]
        if reply.raw_count == 0:
            raise ValueError("the reply has no entries")
        self.work.through_ms = last.ms
        self.work.through_seq = last.seq
        return 0

    def decode_entries(self, entries, Batch batch not None):
        """Decode every event of ``(ms, seq, ((name, value), ...))`` tuples into ``batch``."""
        cdef RawEntry raw
        cdef bytes value, name, padded
        if not entries:
            raise ValueError("there are no entries")
        self.begin(batch)
        memset(&raw, 0, sizeof(raw))
        for ms, seq, fields in entries:
            raw.ms = ms
            raw.seq = seq
            raw.field_count = len(fields)
            name, value = fields[0]
            # The decoder wants readable bytes behind a value.
            padded = value + PADDING_BYTES
            batch.kept.append(padded)
            # Offsets count from the value itself; the name is looked at only here.
            raw.value = 0
            raw.value_size = len(value)
            self.take_named(PyBytes_AS_STRING(padded), &raw, PyBytes_AS_STRING(name), len(name))
        self.work.through_ms = ms
        self.work.through_seq = seq

    cdef int check_usable(self) except -1:
        if self.undecided:
            raise ValueError("a batch failed half-way; the state cannot be used any more")
        return 0

    cdef int begin(self, Batch batch) except -1:
        if self.rulebook is None:
            raise ValueError("no rulebook was adopted")
        batch.clear(self.names)
        self.batch = batch
        self.work = &batch.work
        return 0

    cdef inline Event* new_event(self, const RawEntry* raw, uint32_t index) except NULL nogil:
        """Append an event that is invalid until it has been decoded."""
        cdef Event* event = &self.work.events[self.work.event_count]
        region_commit(&self.work.region, (self.work.event_count + <uint64_t>1) * sizeof(Event))
        event.arrival_ms = <int64_t>raw.ms
        event.arrival_seq = raw.seq
        event.entry = self.work.entry_count
        event.index = index
        event.status = STATUS_INVALID
        event.from_json = False
        event.raw = NULL
        event.raw_size = 0
        # In place, Cython asks for the GIL where BUILD=debug has it look out for None.
        self.work.event_count = self.work.event_count + 1
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
        self.work.entry_count = self.work.entry_count + 1
        return 0

    cdef inline void decode(self, const char* data, uint64_t size, Event* event) noexcept nogil:
        """Decode an event that fills ``size`` bytes."""
        event.raw = data
        event.raw_size = <uint32_t>size
        if decode_event(&self.rulebook.rules, &self.hashing, data, data + size, event) == data + size:
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
        cdef uint32_t before = self.work.event_count
        cdef const char* at = <const char*>reader.at
        cdef const char* end = <const char*>reader.end
        cdef const char* after
        cdef Event* event
        cdef uint64_t index
        if count > raw.value_size:
            return False
        for index in range(count):
            event = self.new_event(raw, <uint32_t>index)
            after = decode_event(&self.rulebook.rules, &self.hashing, at, end, event)
            if after == NULL:
                break
            event.raw = at
            event.raw_size = <uint32_t>(after - at)
            event.status = STATUS_ENTRY
            at = after
        else:
            if at == end:
                return True
        self.work.event_count = before
        return False

    cdef int take_items(self, Reader reader, uint64_t count, const RawEntry* raw) except -1 nogil:
        """Decode the items of a batch one by one."""
        cdef const unsigned char* item
        cdef uint64_t index
        for index in range(count):
            item = reader.at
            pass_over(&reader, 1)
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
            self.batch.kept.append(padded)
            self.decode(PyBytes_AS_STRING(padded), len(compact), event)
        self.batch.kept.append(original)
        event.from_json = True
        event.raw = PyBytes_AS_STRING(original)
        event.raw_size = <uint32_t>len(original)
        return 0

    cdef int decide_all(self, Work* work) except -1 nogil:
        """Decide the events that are not decided yet."""
        rows_reserve(&work.rows, work.event_count)
        decide_events(
            &self.state, &self.rulebook.rules, work.events, work.decided_count, work.event_count, &work.rows)
        work.decided_count = work.event_count
        return 0

    cdef void finish(self, Batch batch):
        batch.sets.size = 0
        batch.sets.failed = False
        write_campaign_sets(&batch.sets, &self.rulebook.rules, &self.state, &batch.work.rows)
        self.undecided = False

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
        """Drop what is expired on the arrival day ``day``."""
        if self.rulebook is None:
            raise ValueError("no rulebook was adopted")
        with nogil:
            state_reclaim(&self.state, &self.rulebook.rules, day)

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


cdef text_or_none(const char* data, uint32_t size):
    return data[:size].decode() if size else None
