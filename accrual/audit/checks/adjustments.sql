-- What was posted of adjustments is what was asked for; so are corrections. What is large, undoes something or was proposed
-- by the audit was approved by somebody else: neither case nor spaces make another person of anybody. From how many points
-- on an adjustment is large, the book said when it was asked for, and no more could be asked for.
WITH posted AS (
    SELECT j.*, lower(btrim(regexp_replace(asked_by, '[[:space:]]+', ' ', 'g'))) AS asking,
        lower(btrim(regexp_replace(coalesce(approved_by, ''), '[[:space:]]+', ' ', 'g'))) AS approving
    FROM book.adjustments j WHERE action IS NOT NULL
)
SELECT NULL, NULL, coalesce(j.member, o.member), o.day::text, to_jsonb(j.points), to_jsonb(o.points),
    'adjustment ' || coalesce(j.adjustment, 'without a record') || ' is not what was posted'
FROM (
    SELECT action, member, day, corrects, sum(
        CASE WHEN kind = 'correct' OR to_account = 'available' THEN points ELSE -points END)::bigint AS points
    FROM book.postings WHERE kind IN ('adjust', 'correct') GROUP BY 1, 2, 3, 4
) o FULL JOIN posted j USING (action)
WHERE (j.member, j.points, j.corrects) IS DISTINCT FROM (o.member, o.points, o.corrects)
UNION ALL
SELECT NULL, NULL, member, NULL, NULL, to_jsonb(approved_by), 'adjustment ' || adjustment || ': nobody else approved it'
FROM posted
WHERE asking = '' OR approving = asking OR approving = ''
    AND (corrects IS NOT NULL OR starts_with(adjustment, 'audit-') OR abs(points) > approval_points)
UNION ALL
SELECT NULL, NULL, j.member, NULL, to_jsonb(l.points), to_jsonb(j.approval_points),
    'adjustment ' || j.adjustment || ': more needs a second person than the book said'
FROM posted j CROSS JOIN LATERAL (
    SELECT coalesce((
        SELECT points FROM book.approval_limits x JOIN book.actions a USING (action)
        WHERE a.done_at <= j.asked_at ORDER BY x.action DESC LIMIT 1
    ), 10000) AS points
) l
WHERE j.approval_points > l.points AND j.asked_at > (SELECT max(applied_at) FROM book.migrations WHERE name LIKE '0003%')
