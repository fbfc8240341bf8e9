-- Entries of fewer points than none. With `stacking = "add"` several multipliers below 1 may make the points of an event
-- negative (SPEC section 4); what is granted or held then is the mirror image of any other entry, as is all that becomes of
-- it: its points go from pending or held to issuance, a settlement takes them out of what is available, and so on. No table
-- is written anew, and none is read.

-- The table of each day has the check as its own, beside the one that it has from `entries`.
DO $$
DECLARE
    table_name regclass;
BEGIN
    ALTER TABLE book.entries DROP CONSTRAINT entries_points_check;
    FOR table_name IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'book.entries'::regclass ORDER BY 1 LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS entries_points_check', table_name);
    END LOOP;
END $$;

ALTER TABLE book.balances DROP CONSTRAINT balances_pending_check, DROP CONSTRAINT balances_held_check;

-- As before, but what moves is never below zero: it goes the other way.
CREATE OR REPLACE VIEW book.movements AS
    SELECT number, seq, CASE WHEN late THEN 'late' ELSE 'accrue' END AS kind, member,
        CASE WHEN points >= 0 THEN 'issuance' WHEN outcome = 'held' THEN 'held' ELSE 'pending' END AS from_account,
        CASE WHEN points < 0 THEN 'issuance' WHEN outcome = 'held' THEN 'held' ELSE 'pending' END AS to_account,
        abs(points) AS points, day, partition_id, late, NULL::bigint AS action
    FROM book.entries WHERE outcome IN ('granted', 'held')
    UNION ALL
    SELECT number, seq, kind, member, from_account, to_account, points, day, partition_id, late, action FROM book.postings;

-- As before, but of an entry below zero what came back from issuance is what it holds no longer, and what was released went
-- to held.
CREATE OR REPLACE VIEW book.holdings AS
    SELECT e.day, e.partition_id, e.seq, e.late, e.number, e.event, e.kind, e.member, e.order_id, e.amount_fen, e.uncapped,
        e.points, e.points - coalesce(p.reversed, 0) AS points_left,
        CASE
            WHEN e.outcome = 'held' AND p.released IS NULL THEN 'held'
            WHEN p.released_to = 'available' OR s.is_settled THEN 'available'
            ELSE 'pending'
        END AS account
    FROM book.entries e
    LEFT JOIN LATERAL (
        SELECT sum(CASE 'issuance' WHEN to_account THEN points WHEN from_account THEN -points END)::bigint AS reversed,
            max(number) FILTER (WHERE kind = 'release') AS released,
            max(CASE to_account WHEN 'held' THEN from_account ELSE to_account END) FILTER (WHERE kind = 'release')
                AS released_to
        FROM book.standing
        WHERE (partition_id, seq, late) = (e.partition_id, e.seq, e.late)
    ) p ON true
    LEFT JOIN LATERAL (
        WITH RECURSIVE covering (settlement) AS (
            SELECT min(number) FROM book.postings
            WHERE (day, member) = (e.day, e.member) AND kind = 'settle' AND number > coalesce(p.released, e.number)
            UNION ALL
            SELECT (
                SELECT min(number) FROM book.postings
                WHERE (day, member) = (e.day, e.member) AND kind = 'settle' AND number > c.number
            )
            FROM covering v JOIN book.postings c ON c.corrects = v.settlement
        )
        SELECT true AS is_settled FROM covering v
        WHERE settlement IS NOT NULL AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = v.settlement)
    ) s ON true
    WHERE e.outcome IN ('granted', 'held');
