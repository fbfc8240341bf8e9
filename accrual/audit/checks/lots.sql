-- Lots are what their postings left of them, and expire when the first posting of each said.
WITH parts AS (
    SELECT p.number, p.kind, p.member, part.day, p.lot_expires_on, p.action,
        CASE p.to_account WHEN 'available' THEN part.points ELSE -part.points END AS points
    FROM book.postings p, unnest(p.lot_days, p.lot_points) AS part (day, points)
)
SELECT NULL, NULL, coalesce(s.member, l.member), coalesce(s.day, l.day)::text,
    jsonb_build_object('points', coalesce(s.points, 0), 'expires_on', s.expires_on),
    jsonb_build_object('points', coalesce(l.points, 0), 'expires_on', l.expires_on),
    'the lot is not what its postings left of it'
FROM (
    SELECT member, day, sum(points)::bigint AS points, min(lot_expires_on) AS expires_on
    FROM parts WHERE day IS NOT NULL GROUP BY 1, 2
) s FULL JOIN book.lots l ON (l.member, l.day) = (s.member, s.day)
WHERE coalesce(s.points, 0) <> coalesce(l.points, 0) OR s.expires_on IS DISTINCT FROM l.expires_on ORDER BY 3, 4
