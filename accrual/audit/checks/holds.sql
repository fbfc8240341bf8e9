-- No more left `held` than was held, nothing was released twice, and the points were the member's own.
SELECT p.name, o.seq, o.member, o.day::text, to_jsonb(e.points), to_jsonb(o.points),
    'more was released, confirmed and refunded out of held than was held'
FROM (
    SELECT partition_id, seq, late, day, member, sum(points)::bigint AS points, count(*) FILTER (WHERE kind = 'release') AS releases
    FROM book.postings WHERE from_account = 'held' GROUP BY 1, 2, 3, 4, 5
) o LEFT JOIN book.entries e ON (e.day, e.partition_id, e.seq, e.late) = (o.day, o.partition_id, o.seq, o.late)
LEFT JOIN book.partitions p ON p.partition_id = o.partition_id
WHERE (e.outcome, e.member) IS DISTINCT FROM ('held', o.member) OR o.points > e.points OR o.releases > 1
