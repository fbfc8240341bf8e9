-- The last entry that the book has of each day in each ledger is the one that it knows of, by which days are settled.
SELECT p.name, NULL, NULL, day::text, to_jsonb(e.last_seq), to_jsonb(d.last_seq),
    'the last entry of the day is another one than the book knows of'
FROM (SELECT day, partition_id, max(seq) AS last_seq FROM book.entries GROUP BY 1, 2) e
FULL JOIN book.days d USING (day, partition_id) LEFT JOIN book.partitions p USING (partition_id)
WHERE e.last_seq IS DISTINCT FROM d.last_seq ORDER BY 4, 1
