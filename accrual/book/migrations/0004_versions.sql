-- The version of a rulebook goes up to 2^53 - 1, as in the rulebook itself: one that is made of a date and a time is more than an
-- integer holds. This writes the tables of all entries anew: it takes the time of a scan of the book, in which nobody can read them.

ALTER TABLE book.partitions ALTER COLUMN rulebook TYPE bigint;
ALTER TABLE book.batches ALTER COLUMN rulebook TYPE bigint;
ALTER TABLE book.rulebooks ALTER COLUMN version TYPE bigint;
ALTER TABLE book.entries ALTER COLUMN rulebook TYPE bigint;
ALTER TABLE book.deferred ALTER COLUMN rulebook TYPE bigint;
