-- No more became available than was pending, and only of days that were settled; of those, nothing is pending that was so
-- before the last settlement of the day. A settlement of just as much was one too many.
WITH moved AS (
    SELECT member, CASE outcome WHEN 'held' THEN 'held' ELSE 'pending' END AS account, points, day
    FROM book.entries WHERE outcome IN ('granted', 'held')
    UNION ALL SELECT member, to_account, points, day FROM book.postings
    UNION ALL SELECT member, from_account, -points, day FROM book.postings
)
SELECT NULL, NULL, m.member, m.day::text, NULL, to_jsonb(m.points), 'more became available than was pending of that day', (
        SELECT max(number) FROM book.postings o WHERE (o.member, o.day, o.kind) = (m.member, m.day, 'settle')
            AND o.points = -m.points AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = o.number))
FROM (SELECT member, day, sum(points) AS points FROM moved WHERE account = 'pending' GROUP BY 1, 2) m WHERE m.points < 0
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, NULL, to_jsonb(o.points),
    'posting ' || o.number || ': settled, and the day is not among those that were', NULL
FROM book.postings o LEFT JOIN book.settled_days s USING (day)
WHERE s.day IS NULL AND (o.kind = 'settle' OR (o.kind = 'release' AND o.to_account = 'available'))
UNION ALL
SELECT NULL, NULL, m.member, m.day::text, '0', to_jsonb(sum(m.points)), 'the day is settled, and points of it are pending', NULL
FROM (
    SELECT member, day, number, points FROM book.entries WHERE outcome = 'granted'
    UNION ALL SELECT member, day, number, points FROM book.postings WHERE to_account = 'pending'
    UNION ALL SELECT member, day, 0, -points FROM book.postings WHERE from_account = 'pending'
) m JOIN book.settled_days s USING (day) JOIN (
    SELECT (details ->> 'day')::date AS day, max(action) AS action FROM book.actions WHERE kind = 'settle' GROUP BY 1
) a USING (day)
WHERE s.finished AND m.number < a.action GROUP BY m.member, m.day HAVING sum(m.points) > 0
