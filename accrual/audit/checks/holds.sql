-- No more left `held` than was held, nothing was released twice, and the points were the member's own. What took just as
-- much as there was too much, the last of it, was one too many; where nothing was held of that member, all of it was. Where
-- negative points were held, as much came to `held`.
SELECT p.name, o.seq, o.member, o.day::text, to_jsonb(e.points), to_jsonb(o.points),
    'more was released, confirmed and refunded out of held than was held',
    CASE WHEN e.outcome IS DISTINCT FROM 'held' THEN o.last ELSE (
        SELECT max(number) FROM book.postings x
        WHERE (x.partition_id, x.seq, x.late, x.member) = (o.partition_id, o.seq, o.late, o.member)
            AND x.kind <> 'refund' AND CASE 'held' WHEN x.from_account THEN x.points WHEN x.to_account THEN -x.points END
                = o.points - least(greatest(o.points, least(e.points, 0)), greatest(e.points, 0))
            AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number)) END
FROM (
    SELECT partition_id, seq, late, day, member, max(number) AS last, count(*) FILTER (WHERE kind = 'release') AS releases,
        sum(CASE from_account WHEN 'held' THEN points ELSE -points END)::bigint AS points
    FROM book.postings x
    WHERE 'held' IN (from_account, to_account) AND kind <> 'correct' AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number)
    GROUP BY 1, 2, 3, 4, 5
) o LEFT JOIN book.entries e
    ON (e.day, e.member, e.partition_id, e.seq, e.late) = (o.day, o.member, o.partition_id, o.seq, o.late)
LEFT JOIN book.partitions p ON p.partition_id = o.partition_id
WHERE e.outcome IS DISTINCT FROM 'held' OR o.releases > 1
    OR o.points NOT BETWEEN least(e.points, 0) AND greatest(e.points, 0)
