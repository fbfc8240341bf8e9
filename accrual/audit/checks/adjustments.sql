-- What was posted of adjustments is what was asked for, and approved by somebody else.
SELECT NULL, NULL, coalesce(j.member, o.member), o.day::text, to_jsonb(j.points), to_jsonb(o.points),
    'adjustment ' || coalesce(j.adjustment, 'without a record') || ' is not what was posted'
FROM (
    SELECT action, member, day, sum(CASE to_account WHEN 'available' THEN points ELSE -points END)::bigint AS points
    FROM book.postings WHERE kind = 'adjust' GROUP BY 1, 2, 3
) o FULL JOIN (SELECT * FROM book.adjustments WHERE action IS NOT NULL) j USING (action)
WHERE (j.member, j.points) IS DISTINCT FROM (o.member, o.points) OR j.approved_by = j.asked_by
