-- No more left `held` than was held, nothing was released twice, and the points were the member's own. What took just as
-- much as there was too much, the last of it, was one too many; where nothing was held of that member, all of it was.
SELECT p.name, o.seq, o.member, o.day::text, to_jsonb(e.points), to_jsonb(o.points),
    'more was released, confirmed and refunded out of held than was held',
    CASE WHEN (e.outcome, e.member) IS DISTINCT FROM ('held', o.member) THEN o.last ELSE (
        SELECT max(number) FROM book.postings x
        WHERE (x.partition_id, x.seq, x.late, x.member, x.from_account) = (o.partition_id, o.seq, o.late, o.member, 'held')
            AND x.kind <> 'refund' AND x.points = o.points - e.points
            AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number)) END
FROM (
    SELECT partition_id, seq, late, day, member, sum(points)::bigint AS points, max(number) AS last,
        count(*) FILTER (WHERE kind = 'release') AS releases
    FROM book.postings x
    WHERE from_account = 'held' AND kind <> 'correct' AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number)
    GROUP BY 1, 2, 3, 4, 5
) o LEFT JOIN book.entries e ON (e.day, e.partition_id, e.seq, e.late) = (o.day, o.partition_id, o.seq, o.late)
LEFT JOIN book.partitions p ON p.partition_id = o.partition_id
WHERE (e.outcome, e.member) IS DISTINCT FROM ('held', o.member) OR o.points > e.points OR o.releases > 1
