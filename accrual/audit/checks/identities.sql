-- Every booked event has its id, with the order that it paid and who paid it, and no id is that of two events, or of none.
SELECT p.name, e.seq, e.member, e.day::text, NULL, to_jsonb(e.event),
    CASE WHEN i.event IS NULL THEN 'its event id is not among those that are booked'
        ELSE 'its event id is booked for seq ' || i.seq || ' too: the event counts twice' END
FROM book.entries e JOIN book.partitions p USING (partition_id) LEFT JOIN book.identities i USING (event)
WHERE (i.partition_id, i.seq, i.late) IS DISTINCT FROM (e.partition_id, e.seq, e.late)
UNION ALL
SELECT p.name, e.seq, e.member, e.day::text,
    jsonb_build_object('day', e.day, 'order', w.paid_order, 'payer', w.payer),
    jsonb_build_object('day', i.day, 'order', i.paid_order, 'payer', i.payer),
    'its event id is booked for another day or order than it has, or for one that another member paid'
FROM book.entries e JOIN book.partitions p USING (partition_id) JOIN book.identities i USING (event)
CROSS JOIN LATERAL (
    SELECT CASE WHEN pays THEN e.order_id END AS paid_order, CASE WHEN pays THEN e.member END AS payer
    FROM (SELECT e.kind = 'order_paid' AND e.order_id IS NOT NULL AS pays) k
) w
WHERE (i.partition_id, i.seq, i.late) = (e.partition_id, e.seq, e.late)
    AND (i.paid_order, i.payer, i.day) IS DISTINCT FROM (w.paid_order, w.payer, e.day)
UNION ALL
SELECT p.name, i.seq, NULL, i.day::text, NULL, to_jsonb(i.event), 'an event id is booked that no event has'
FROM book.identities i LEFT JOIN book.partitions p USING (partition_id)
LEFT JOIN book.entries e
    ON (e.day, e.partition_id, e.seq, e.late, e.event) = (i.day, i.partition_id, i.seq, i.late, i.event)
LEFT JOIN (book.deferred d JOIN book.resolutions r USING (partition_id, seq))
    ON (d.partition_id, d.seq, d.event, d.day) = (i.partition_id, i.seq, i.event, i.day) AND NOT i.late
        AND i.paid_order IS NULL AND i.payer IS NULL AND r.result IN ('refund', 'exception')
WHERE e.event IS NULL AND d.event IS NULL
UNION ALL
SELECT p.name, r.seq, d.member, d.day::text, NULL, to_jsonb(d.event), 'refunded, and its event id is booked for another'
FROM book.refunds r JOIN book.deferred d USING (partition_id, seq) JOIN book.partitions p USING (partition_id)
LEFT JOIN book.identities i ON i.event = d.event
WHERE (i.partition_id, i.seq) IS DISTINCT FROM (r.partition_id, r.seq)
UNION ALL
SELECT p.name, x.seq, x.member, NULL, NULL, to_jsonb(x.event), 'left out since its event id was taken, and nobody else has it'
FROM book.exceptions x JOIN book.partitions p USING (partition_id) LEFT JOIN book.identities i USING (event)
WHERE x.kind = 'id_taken' AND (i.event IS NULL OR (i.partition_id, i.seq) = (x.partition_id, x.seq))
