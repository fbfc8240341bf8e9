-- No more of a lot was used than it had, and nothing expired before its time. What used just as much as there was too much,
-- the last of it, was one too many.
WITH parts AS (
    SELECT p.number, p.kind, p.member, part.day, p.lot_expires_on, p.action,
        CASE p.to_account WHEN 'available' THEN part.points ELSE -part.points END AS points
    FROM book.postings p, unnest(p.lot_days, p.lot_points) AS part (day, points)
)
SELECT NULL, NULL, s.member, s.day::text, NULL, to_jsonb(s.points), 'more was used of the lot than it had', (
        SELECT max(x.number) FROM book.postings x
        WHERE x.member = s.member AND x.kind IN ('expire', 'confirm', 'clawback', 'redeem')
            AND x.lot_days = ARRAY[s.day] AND x.points = -s.points
            AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = x.number))
FROM (SELECT member, day, sum(points) AS points FROM parts WHERE day IS NOT NULL GROUP BY 1, 2) s WHERE s.points < 0
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, to_jsonb(l.expires_on), a.details -> 'day',
    'posting ' || o.number || ': expired before its time', o.number
FROM book.postings o JOIN book.actions a USING (action) JOIN book.lots l ON (l.member, l.day) = (o.member, o.day)
WHERE o.kind = 'expire' AND (l.expires_on <= (a.details ->> 'day')::date) IS NOT TRUE
    AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = o.number)
