-- No more went back to issuance than an entry was granted, from nobody else, and what a refund reversed is written down.
-- What took just as much as there was too much, the last of it, was one too many; of refunds another check says so. Where
-- negative points were granted, no more came back from issuance.
SELECT p.name, o.seq, o.member, o.day::text, to_jsonb(coalesce(e.points, 0)), to_jsonb(o.points),
    'more went back to issuance than the entry was granted', (
        SELECT max(number) FROM book.postings x
        WHERE (x.partition_id, x.seq, x.late, x.member) = (o.partition_id, o.seq, o.late, o.member)
            AND x.kind IN ('confirm', 'clawback')
            AND CASE 'issuance' WHEN x.to_account THEN x.points WHEN x.from_account THEN -x.points END
                = o.points - least(greatest(o.points, least(e.points, 0)), greatest(e.points, 0))
            AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number))
FROM (
    SELECT partition_id, seq, late, day, member,
        sum(CASE to_account WHEN 'issuance' THEN points ELSE -points END)::bigint AS points
    FROM book.postings x
    WHERE 'issuance' IN (from_account, to_account) AND seq IS NOT NULL AND kind <> 'correct'
        AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number)
    GROUP BY 1, 2, 3, 4, 5
) o LEFT JOIN book.entries e
    ON (e.day, e.member, e.partition_id, e.seq, e.late) = (o.day, o.member, o.partition_id, o.seq, o.late)
LEFT JOIN book.partitions p ON p.partition_id = o.partition_id
WHERE e.member IS NULL OR o.points NOT BETWEEN least(e.points, 0) AND greatest(e.points, 0)
UNION ALL
SELECT p.name, o.seq, o.member, o.day::text, NULL, to_jsonb(o.points),
    'posting ' || o.number || ': a reversal that no refund explains', o.number
FROM book.postings o LEFT JOIN book.partitions p USING (partition_id)
LEFT JOIN book.refunds r ON r.action = o.action AND r.seq = o.cause_seq
    AND (r.order_partition_id, r.order_seq, r.order_late) = (o.partition_id, o.seq, o.late)
WHERE o.kind = 'refund' AND r.action IS NULL AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = o.number)
