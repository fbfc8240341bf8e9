-- Every deferred event waits or was dealt with once, as it is written; every late entry is of one, to the letter.
SELECT p.name, d.seq, d.member, d.day::text, NULL, to_jsonb(coalesce(r.result, 'nothing')),
    CASE WHEN r.seq IS NULL AND w.seq IS NULL THEN 'neither waits nor was dealt with'
        WHEN r.seq IS NOT NULL AND w.seq IS NOT NULL THEN 'was dealt with and still waits'
        ELSE 'was dealt with in another way than is written' END
FROM book.deferred d JOIN book.partitions p USING (partition_id)
LEFT JOIN book.resolutions r USING (partition_id, seq) LEFT JOIN book.waiting w USING (partition_id, seq)
LEFT JOIN book.refunds f USING (partition_id, seq)
LEFT JOIN book.entries e
    ON (e.day, e.member, e.partition_id, e.seq, e.late) = (d.day, d.member, d.partition_id, d.seq, true)
WHERE (r.seq IS NULL) = (w.seq IS NULL) OR coalesce(r.result = 'refund', false) <> (f.seq IS NOT NULL)
    OR coalesce(r.result = 'late', false) <> (e.seq IS NOT NULL)
UNION ALL
SELECT p.name, e.seq, e.member, e.day::text, NULL, to_jsonb(e.event), 'a late entry that no deferred event explains'
FROM book.entries e JOIN book.partitions p USING (partition_id) LEFT JOIN book.deferred d USING (partition_id, seq)
WHERE e.late AND (d.cause, d.event, d.kind, d.member, d.day, d.ts_ms, d.stream_id, d.item, d.amount_fen, d.order_id,
        d.device, d.ip, d.phone)
    IS DISTINCT FROM ('late', e.event, e.kind, e.member, e.day, e.ts_ms, e.stream_id, e.item, e.amount_fen, e.order_id,
        e.device, e.ip, e.phone)
UNION ALL
SELECT p.name, d.seq, d.member, d.day::text, NULL, to_jsonb(r.result), CASE r.result
    WHEN 'duplicate' THEN 'was a duplicate, and no other event has its id' ELSE 'was left to a person, who was not told' END
FROM book.resolutions r JOIN book.deferred d USING (partition_id, seq) JOIN book.partitions p USING (partition_id)
WHERE r.result = 'duplicate' AND NOT EXISTS (
        SELECT FROM book.identities i WHERE i.event = d.event AND (i.partition_id, i.seq) <> (d.partition_id, d.seq))
    OR r.result = 'exception' AND NOT EXISTS (
        SELECT FROM book.exceptions x WHERE (x.partition_id, x.seq) = (d.partition_id, d.seq))
