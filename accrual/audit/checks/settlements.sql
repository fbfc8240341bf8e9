-- No more became available than was pending, and only of days that were settled.
WITH moved AS (
    SELECT member, CASE outcome WHEN 'held' THEN 'held' ELSE 'pending' END AS account, points, day
    FROM book.entries WHERE outcome IN ('granted', 'held')
    UNION ALL SELECT member, to_account, points, day FROM book.postings
    UNION ALL SELECT member, from_account, -points, day FROM book.postings
)
SELECT NULL, NULL, member, day::text, NULL, to_jsonb(sum(points)), 'more became available than was pending of that day'
FROM moved WHERE account = 'pending' GROUP BY member, day HAVING sum(points) < 0
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, NULL, to_jsonb(o.points),
    'posting ' || o.number || ': settled, and the day is not among those that were'
FROM book.postings o LEFT JOIN book.settled_days s USING (day)
WHERE s.day IS NULL AND (o.kind = 'settle' OR (o.kind = 'release' AND o.to_account = 'available'))
