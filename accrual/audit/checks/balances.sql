-- Balances are the sums of the postings: told from entries and postings, without the views of the book.
WITH moved AS (
    SELECT member, CASE outcome WHEN 'held' THEN 'held' ELSE 'pending' END AS account, points, day
    FROM book.entries WHERE outcome IN ('granted', 'held')
    UNION ALL SELECT member, to_account, points, day FROM book.postings
    UNION ALL SELECT member, from_account, -points, day FROM book.postings
)
SELECT NULL, NULL, coalesce(s.member, b.member), NULL,
    jsonb_build_object('pending', coalesce(s.pending, 0), 'available', coalesce(s.available, 0),
        'held', coalesce(s.held, 0)),
    jsonb_build_object('pending', coalesce(b.pending, 0), 'available', coalesce(b.available, 0),
        'held', coalesce(b.held, 0)), 'the balance is not the sum of the postings'
FROM (
    SELECT member, coalesce(sum(points) FILTER (WHERE account = 'pending'), 0) AS pending,
        coalesce(sum(points) FILTER (WHERE account = 'available'), 0) AS available,
        coalesce(sum(points) FILTER (WHERE account = 'held'), 0) AS held
    FROM moved GROUP BY member
) s FULL JOIN book.balances b USING (member)
WHERE (coalesce(s.pending, 0), coalesce(s.available, 0), coalesce(s.held, 0))
    <> (coalesce(b.pending, 0), coalesce(b.available, 0), coalesce(b.held, 0))
ORDER BY 3
