-- No more of a lot was used than it had, and nothing expired before its time.
WITH parts AS (
    SELECT p.number, p.kind, p.member, part.day, p.lot_expires_on, p.action,
        CASE p.to_account WHEN 'available' THEN part.points ELSE -part.points END AS points
    FROM book.postings p, unnest(p.lot_days, p.lot_points) AS part (day, points)
)
SELECT NULL, NULL, member, day::text, NULL, to_jsonb(sum(points)), 'more was used of the lot than it had'
FROM parts WHERE day IS NOT NULL GROUP BY member, day HAVING sum(points) < 0
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, to_jsonb(l.expires_on), a.details -> 'day',
    'posting ' || o.number || ': expired before its time'
FROM book.postings o JOIN book.actions a USING (action) JOIN book.lots l ON (l.member, l.day) = (o.member, o.day)
WHERE o.kind = 'expire' AND l.expires_on > (a.details ->> 'day')::date
