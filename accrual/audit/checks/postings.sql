-- Every posting moves its points between accounts that its kind knows, by an action that does so, spread over lots without
-- a rest; a correction undoes another posting to the letter. What has to do with negative points moves the other way: other
-- checks say where it had to.
SELECT p.name, o.seq, o.member, o.day::text, to_jsonb(o.points), to_jsonb(o.lots),
    'posting ' || o.number || ': its lots do not add up to its points'
FROM (
    SELECT *, (SELECT coalesce(sum(n), 0) FROM unnest(lot_points) AS n) AS lots FROM book.postings
    WHERE 'available' IN (from_account, to_account)
) o LEFT JOIN book.partitions p USING (partition_id)
WHERE o.points <> o.lots OR cardinality(o.lot_days) <> cardinality(o.lot_points)
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, NULL, to_jsonb(o.kind),
    'posting ' || o.number || ': moves points from ' || o.from_account || ' to ' || o.to_account
FROM book.postings o
WHERE o.kind <> 'correct' AND (o.kind, o.from_account, o.to_account) NOT IN (
    ('settle', 'pending', 'available'), ('settle', 'available', 'pending'), ('release', 'pending', 'held'),
    ('release', 'available', 'held'), ('confirm', 'issuance', 'held'), ('release', 'held', 'pending'), ('release', 'held', 'available'),
    ('confirm', 'held', 'issuance'), ('refund', 'held', 'issuance'), ('refund', 'pending', 'issuance'),
    ('refund', 'available', 'issuance'), ('clawback', 'pending', 'issuance'),
    ('clawback', 'available', 'issuance'), ('expire', 'available', 'expired'),
    ('adjust', 'issuance', 'available'), ('adjust', 'available', 'issuance'), ('redeem', 'available', 'redeemed'))
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, NULL, to_jsonb(a.kind),
    'posting ' || o.number || ': a ' || o.kind || ' that its action does not make'
FROM book.postings o LEFT JOIN book.actions a USING (action)
WHERE (o.kind, a.kind) NOT IN (('settle', 'settle'), ('settle', 'late'), ('release', 'release'), ('confirm', 'confirm'),
    ('clawback', 'confirm'), ('refund', 'refund'), ('expire', 'expire'), ('adjust', 'adjust'), ('redeem', 'redeem'),
    ('correct', 'correct'))
    OR a.kind IS NULL
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, to_jsonb(x.points), to_jsonb(o.points),
    'posting ' || o.number || ': does not undo posting ' || o.corrects || ' to the letter'
FROM book.postings o LEFT JOIN book.postings x ON x.number = o.corrects
WHERE o.kind = 'correct' AND (x.kind <> 'correct' AND (x.member, x.from_account, x.to_account, x.points, x.day, x.lot_days,
        x.lot_points) IS NOT DISTINCT FROM (o.member, o.to_account, o.from_account, o.points, o.day, o.lot_days, o.lot_points))
    IS NOT TRUE
