-- What was posted of adjustments is what was asked for, and approved by somebody else; so are corrections.
SELECT NULL, NULL, coalesce(j.member, o.member), o.day::text, to_jsonb(j.points), to_jsonb(o.points),
    'adjustment ' || coalesce(j.adjustment, 'without a record') || ' is not what was posted'
FROM (
    SELECT action, member, day, corrects, sum(
        CASE WHEN kind = 'correct' OR to_account = 'available' THEN points ELSE -points END)::bigint AS points
    FROM book.postings WHERE kind IN ('adjust', 'correct') GROUP BY 1, 2, 3, 4
) o FULL JOIN (SELECT * FROM book.adjustments WHERE action IS NOT NULL) j USING (action)
WHERE (j.member, j.points, j.corrects) IS DISTINCT FROM (o.member, o.points, o.corrects) OR j.approved_by = j.asked_by
    OR (j.corrects IS NOT NULL AND j.approved_by IS NULL)
