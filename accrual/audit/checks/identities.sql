-- Every booked event has its id, and no id is that of two events.
SELECT p.name, e.seq, e.member, e.day::text, NULL, to_jsonb(e.event),
    CASE WHEN i.event IS NULL THEN 'its event id is not among those that are booked'
        ELSE 'its event id is booked for seq ' || i.seq || ' too: the event counts twice' END
FROM book.entries e JOIN book.partitions p USING (partition_id) LEFT JOIN book.identities i USING (event)
WHERE (i.partition_id, i.seq, i.late) IS DISTINCT FROM (e.partition_id, e.seq, e.late)
UNION ALL
SELECT p.name, r.seq, d.member, d.day::text, NULL, to_jsonb(d.event), 'refunded, and its event id is booked for another'
FROM book.refunds r JOIN book.deferred d USING (partition_id, seq) JOIN book.partitions p USING (partition_id)
LEFT JOIN book.identities i ON i.event = d.event
WHERE (i.partition_id, i.seq) IS DISTINCT FROM (r.partition_id, r.seq)
UNION ALL
SELECT p.name, x.seq, x.member, NULL, NULL, to_jsonb(x.event), 'left out since its event id was taken, and nobody else has it'
FROM book.exceptions x JOIN book.partitions p USING (partition_id) LEFT JOIN book.identities i USING (event)
WHERE x.kind = 'id_taken' AND (i.event IS NULL OR (i.partition_id, i.seq) = (x.partition_id, x.seq))
