-- No more became available than was pending, and only of days that were settled; of those, nothing is pending that was so
-- before the last settlement of the day. A settlement of just as much was one too many. Where negative points are among a
-- member's of a day, pending may be below zero: there each settlement must have left nothing.
WITH moved AS (
    SELECT member, CASE outcome WHEN 'held' THEN 'held' ELSE 'pending' END AS account, points, day, points < 0 AS is_negative
    FROM book.entries WHERE outcome IN ('granted', 'held')
    UNION ALL SELECT member, to_account, points, day, kind = 'settle' FROM book.postings
    UNION ALL SELECT member, from_account, -points, day, kind = 'release' FROM book.postings
), left_over AS (
    SELECT member, day, sum(points) AS points, bool_or(is_negative) AS has_negative
    FROM moved WHERE account = 'pending' GROUP BY 1, 2
)
SELECT NULL, NULL, m.member, m.day::text, NULL, to_jsonb(m.points), 'more became available than was pending of that day', (
        SELECT max(number) FROM book.postings o WHERE (o.member, o.day, o.kind) = (m.member, m.day, 'settle')
            AND o.points = -m.points AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = o.number))
FROM left_over m WHERE m.points < 0 AND NOT m.has_negative
UNION ALL
SELECT NULL, NULL, m.member, m.day::text, '0', to_jsonb(l.points),
    'posting ' || o.number || ': settled something else than was pending of that day', o.number
FROM left_over m JOIN book.postings o ON (o.day, o.member, o.kind) = (m.day, m.member, 'settle') CROSS JOIN LATERAL (
    SELECT sum(points) AS points FROM (
        SELECT points FROM book.entries e
        WHERE (e.day, e.member, e.outcome) = (m.day, m.member, 'granted') AND e.number <= o.number
        UNION ALL
        SELECT CASE 'pending' WHEN p.to_account THEN p.points WHEN p.from_account THEN -p.points END FROM book.postings p
        WHERE (p.day, p.member) = (m.day, m.member) AND p.number <= o.number
    ) e
) l
WHERE m.has_negative AND l.points <> 0 AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = o.number)
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, NULL, to_jsonb(o.points),
    'posting ' || o.number || ': settled, and the day is not among those that were', NULL
FROM book.postings o LEFT JOIN book.settled_days s USING (day)
WHERE s.day IS NULL AND (o.kind = 'settle' OR (o.kind = 'release' AND 'available' IN (o.from_account, o.to_account)))
UNION ALL
SELECT NULL, NULL, m.member, m.day::text, '0', to_jsonb(sum(m.points)), 'the day is settled, and points of it are pending', NULL
FROM (
    SELECT member, day, number, points FROM book.entries WHERE outcome = 'granted'
    UNION ALL SELECT member, day, number, points FROM book.postings WHERE to_account = 'pending'
    UNION ALL SELECT member, day, number, -points FROM book.postings WHERE from_account = 'pending'
) m JOIN book.settled_days s USING (day) JOIN (
    SELECT (details ->> 'day')::date AS day, max(action) AS action FROM book.actions WHERE kind = 'settle' GROUP BY 1
) a USING (day)
WHERE s.finished GROUP BY m.member, m.day
HAVING coalesce(sum(points) FILTER (WHERE points > 0 AND number < a.action), 0) + coalesce(sum(points) FILTER (WHERE points < 0), 0) > 0
    OR coalesce(sum(points) FILTER (WHERE points < 0 AND number < a.action), 0) + coalesce(sum(points) FILTER (WHERE points > 0), 0) < 0
