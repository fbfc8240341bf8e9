-- Corrections: a posting that undoes another one to the letter, lot by lot. One person asks for it, as for an adjustment,
-- and a second one approves. What was undone and what undoes it count for nothing together, and both stay to be seen.

ALTER TABLE book.postings
    ADD COLUMN corrects bigint,
    DROP CONSTRAINT postings_kind_check,
    ADD CONSTRAINT postings_kind_check CHECK (kind IN (
        'settle', 'release', 'confirm', 'refund', 'clawback', 'expire', 'adjust', 'redeem', 'correct')),
    ADD CONSTRAINT postings_corrects_check CHECK ((kind = 'correct') = (corrects IS NOT NULL));

CREATE UNIQUE INDEX postings_corrected ON book.postings (corrects) WHERE corrects IS NOT NULL;

-- The posting that is to be undone; `points` are its own then.
ALTER TABLE book.adjustments ADD COLUMN corrects bigint;

-- Postings that count: neither undone nor an undoing.
CREATE VIEW book.standing AS
    SELECT * FROM book.postings p
    WHERE kind <> 'correct' AND NOT EXISTS (SELECT FROM book.postings c WHERE c.corrects = p.number);

-- As before, but of the postings that count.
CREATE OR REPLACE VIEW book.holdings AS
    SELECT e.day, e.partition_id, e.seq, e.late, e.number, e.event, e.kind, e.member, e.order_id, e.amount_fen, e.uncapped,
        e.points, e.points - coalesce(p.reversed, 0) AS points_left,
        CASE
            WHEN e.outcome = 'held' AND p.released IS NULL THEN 'held'
            WHEN p.released_to = 'available' OR s.settled > coalesce(p.released, e.number) THEN 'available'
            ELSE 'pending'
        END AS account
    FROM book.entries e
    LEFT JOIN LATERAL (
        SELECT sum(points) FILTER (WHERE to_account = 'issuance')::bigint AS reversed,
            max(number) FILTER (WHERE kind = 'release') AS released,
            max(to_account) FILTER (WHERE kind = 'release') AS released_to
        FROM book.standing
        WHERE (partition_id, seq, late) = (e.partition_id, e.seq, e.late)
    ) p ON true
    LEFT JOIN LATERAL (
        SELECT max(number) AS settled FROM book.standing WHERE (day, member) = (e.day, e.member) AND kind = 'settle'
    ) s ON true
    WHERE e.outcome IN ('granted', 'held');
