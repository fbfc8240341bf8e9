-- One B-tree of the entries instead of two: to keep one up to date is a good part of what it takes to book an entry. The key
-- begins with the member, by whom jobs and statements look entries up; who has only an entry's place knows its member too.
-- Stretches of a ledger are found by what the blocks of the table have, which costs next to nothing to keep: entries come in
-- the order of their seqs. Several stretches are kept of each range of blocks (`multi`), since ledgers that are booked side
-- by side share it, each at seqs of its own.
--
-- This takes the time of building one index of all entries and of writing the identities of all orders, in which nobody can
-- read or write entries. Until they are vacuumed, identities take twice their room.

ALTER TABLE book.entries ALTER COLUMN late SET DEFAULT false;
DROP INDEX book.entries_by_member;
ALTER TABLE book.entries DROP CONSTRAINT entries_pkey;
ALTER TABLE book.entries ADD PRIMARY KEY (member, seq, partition_id, late, day);
CREATE INDEX entries_by_seq ON book.entries
    USING brin (partition_id, seq int8_minmax_multi_ops) WITH (autosummarize = on);

-- The member who paid the order, by whom its entry is found.
ALTER TABLE book.identities ALTER COLUMN late SET DEFAULT false, ADD COLUMN payer text COLLATE "C";
ALTER TABLE book.identities DISABLE TRIGGER append_only;
UPDATE book.identities i SET payer = e.member FROM book.entries e
    WHERE i.paid_order IS NOT NULL AND (e.day, e.partition_id, e.seq, e.late) = (i.day, i.partition_id, i.seq, i.late);
ALTER TABLE book.identities ENABLE TRIGGER append_only;

-- Hardly two events pay one order, so it is idle to look for equal keys whenever a page is full.
ALTER INDEX book.identities_by_order SET (deduplicate_items = off);

-- The last entry of each business day in each ledger: which days there are, and which have got entries since. A projection.
CREATE TABLE book.days (
    day date NOT NULL,
    partition_id smallint NOT NULL,
    last_seq bigint NOT NULL,
    PRIMARY KEY (day, partition_id)
) WITH (fillfactor = 70);

INSERT INTO book.days (day, partition_id, last_seq) SELECT day, partition_id, max(seq) FROM book.entries GROUP BY 1, 2;
