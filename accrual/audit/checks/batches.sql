-- Batches follow each other, count rightly, and end where the book says that it stands.
SELECT p.name, NULL, NULL, NULL, to_jsonb(x.wanted), to_jsonb(x.got), 'batch ' || x.batch || ': ' || x.what
FROM (
    SELECT partition_id, batch, 'does not follow the one before' AS what,
        encode(lag(digest, 1, decode(repeat('00', 32), 'hex')) OVER w, 'hex') || ' ' || lag(through, 1, '0-0') OVER w
            || ' ' || lag(first_seq + entries, 1, 1::bigint) OVER w || ' ' || lag(batch, 1, 0::bigint) OVER w + 1 AS wanted,
        encode(previous, 'hex') || ' ' || after || ' ' || first_seq || ' ' || batch AS got
    FROM book.batches WINDOW w AS (PARTITION BY partition_id ORDER BY batch)
    UNION ALL
    SELECT partition_id, batch, 'events are not entries + duplicates + dead letters', events::text,
        (entries + duplicates + dead_letters)::text
    FROM book.batches
    UNION ALL
    SELECT partition_id, p.batch, 'is not where the book says that it stands',
        (SELECT encode(b.digest, 'hex') || ' ' || b.through || ' ' || b.first_seq + b.entries || ' ' || b.rulebook
            FROM book.batches b WHERE b.partition_id = p.partition_id ORDER BY b.batch DESC LIMIT 1),
        encode(p.digest, 'hex') || ' ' || p.through || ' ' || p.next_seq || ' ' || p.rulebook
    FROM book.partitions p WHERE p.batch > 0
) x JOIN book.partitions p USING (partition_id) WHERE x.wanted IS DISTINCT FROM x.got ORDER BY 1, x.batch
