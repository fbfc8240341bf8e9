-- Whoever did something is named, with the reason where there had to be one; an adjustment's deed is told as it was asked
-- for; and what was done is of the day or the member that the deed names.
SELECT NULL, NULL, NULL, NULL, NULL, to_jsonb(by), 'action ' || action || ': a ' || kind || ' by nobody, or without a reason'
FROM book.actions
WHERE btrim(by) = ''
    OR kind IN ('adjust', 'correct', 'release', 'confirm', 'close_exception', 'limit') AND coalesce(reason, '') = ''
UNION ALL
SELECT NULL, NULL, j.member, NULL,
    jsonb_build_object('by', j.asked_by, 'reason', j.reason, 'note', j.note, 'approved_by', j.approved_by),
    jsonb_build_object('by', a.by, 'reason', a.reason, 'note', a.note, 'approved_by', a.details ->> 'approved_by'),
    'action ' || a.action || ': not as adjustment ' || j.adjustment || ' was asked for'
FROM book.adjustments j JOIN book.actions a USING (action)
WHERE (j.asked_by, j.reason, j.note, j.approved_by, j.adjustment, j.corrects)
    IS DISTINCT FROM (a.by, a.reason, a.note, a.details ->> 'approved_by', a.details ->> 'adjustment',
        (a.details ->> 'corrects')::bigint)
UNION ALL
SELECT NULL, NULL, o.member, o.day::text, coalesce(a.details -> 'member', a.details -> 'day'), to_jsonb(o.kind),
    'posting ' || o.number || ': of another member or day than its action names'
FROM book.postings o JOIN book.actions a USING (action)
WHERE a.kind IN ('release', 'confirm') AND a.details ->> 'member' IS DISTINCT FROM o.member
    OR a.kind = 'settle' AND a.details ->> 'day' IS DISTINCT FROM o.day::text
