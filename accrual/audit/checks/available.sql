-- A member's lots add up to what is available; where that is below zero, there are none left.
SELECT NULL, NULL, b.member, NULL, to_jsonb(greatest(b.available, 0)), to_jsonb(coalesce(l.points, 0)),
    'the lots do not add up to what is available'
FROM book.balances b LEFT JOIN (SELECT member, sum(points)::bigint AS points FROM book.lots GROUP BY 1) l USING (member)
WHERE greatest(b.available, 0) <> coalesce(l.points, 0) ORDER BY 3
