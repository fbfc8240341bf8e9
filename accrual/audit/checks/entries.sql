-- There are as many entries, deferred events and ids that were taken as the ledger has entries.
SELECT p.name, NULL, NULL, NULL, to_jsonb(p.next_seq - 1), to_jsonb(coalesce(r.rows, 0)),
    'rows of entries, deferred events and ids that were taken: as many as the ledger has entries'
FROM book.partitions p LEFT JOIN (
    SELECT partition_id, count(*) AS rows FROM (
        SELECT partition_id, seq FROM book.entries WHERE NOT late
        UNION ALL SELECT partition_id, seq FROM book.deferred
        UNION ALL SELECT partition_id, seq FROM book.exceptions WHERE kind = 'id_taken'
    ) e GROUP BY 1
) r USING (partition_id) WHERE p.next_seq - 1 <> coalesce(r.rows, 0)
