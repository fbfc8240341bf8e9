-- ------------------------------------------------------------------------------------- days without a default partition

-- Makes the table of the entries of the days from `lower` (null: from the beginning) to before `upper`. To attach it, empty as
-- it is, takes no lock on `book.entries` that readers or writers wait for, as long as no other partition is the default one.
CREATE FUNCTION book.add_entries(name text, lower date, upper date) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    EXECUTE format('CREATE TABLE book.%I (LIKE book.entries INCLUDING ALL)', name);
    EXECUTE format(
        'CREATE TRIGGER never_emptied BEFORE TRUNCATE ON book.%I EXECUTE FUNCTION book.refuse_change()', name);
    EXECUTE format(
        'ALTER TABLE book.entries ATTACH PARTITION book.%I FOR VALUES FROM (%s) TO (%L)', name,
        coalesce(quote_literal(lower), 'MINVALUE'), upper);
END $$;

-- Makes the table of a business day, before a row of it is written: a row of a day without one is refused. What comes late
-- from more than a year before the first day of the book shares one table, so that there are never more than the book has
-- days, whatever times events claim. It runs with the rights of the owner, since an application's role may not create
-- tables. What 0001 says of readers is true only without its default partition, whose lock kept them waiting.
CREATE OR REPLACE FUNCTION book.ensure_day(wanted date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog SET datestyle = 'ISO' AS $$
DECLARE
    name text := 'entries_' || to_char(wanted, 'YYYYMMDD');
    shared_before date;
BEGIN
    IF to_regclass('book.' || quote_ident(name)) IS NOT NULL THEN
        RETURN;
    END IF;
    -- One at a time: two may want the same day.
    PERFORM pg_advisory_xact_lock(hashtext('book.ensure_day'));
    IF to_regclass('book.entries_other') IS NULL THEN
        PERFORM book.add_entries('entries_other', NULL, wanted - 366);
    END IF;
    SELECT substring(pg_get_expr(relpartbound, oid) FROM 'TO \(''(.*)''\)')::date INTO shared_before
    FROM pg_class WHERE oid = 'book.entries_other'::regclass;
    IF wanted >= shared_before AND to_regclass('book.' || quote_ident(name)) IS NULL THEN
        PERFORM book.add_entries(name, wanted, wanted + 1);
    END IF;
END $$;

-- The rows of the default partition, which are few, go to the tables of their days. The first day of the book is one that
-- has a table: late events claimed all the others.
DO $$
DECLARE
    first_day date;
BEGIN
    CREATE TEMP TABLE unsorted ON COMMIT DROP AS SELECT * FROM book.entries_other;
    ALTER TABLE book.entries DETACH PARTITION book.entries_other;
    DROP TABLE book.entries_other;
    SELECT coalesce((SELECT min(day) FROM book.entries), max(day)) INTO first_day FROM unsorted;
    IF first_day IS NOT NULL THEN
        PERFORM book.add_entries('entries_other', NULL, first_day - 366);
        PERFORM book.ensure_day(day) FROM (SELECT DISTINCT day FROM unsorted) days;
        INSERT INTO book.entries SELECT * FROM unsorted;
    END IF;
END $$;

-- ------------------------------------------------------------------------------------------- where points of entries are

-- As before, but settled is only what a settlement covered that stands: the first one behind the moment at which the points
-- became pending, or, where that one was undone, the first one behind its undoing.
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
        SELECT sum(points) FILTER (WHERE to_account = 'issuance')::bigint AS reversed,
            max(number) FILTER (WHERE kind = 'release') AS released,
            max(to_account) FILTER (WHERE kind = 'release') AS released_to
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

-- --------------------------------------------------------------------------------------------- adjustments by two persons

-- From how many points on an adjustment needs a second person; the newest action counts. That one sets it is for the owner.
CREATE TABLE book.approval_limits (
    action bigint PRIMARY KEY REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    points bigint NOT NULL CHECK (points >= 0)
);

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON book.approval_limits
    FOR EACH ROW EXECUTE FUNCTION book.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON book.approval_limits EXECUTE FUNCTION book.refuse_change();

-- With the rights of the owner, so that whoever asks for an adjustment need not be able to read the table.
CREATE FUNCTION book.approval_points() RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT coalesce((SELECT points FROM book.approval_limits ORDER BY action DESC LIMIT 1), 10000)
$$;

-- Who a name means: neither case nor spaces make another person of anybody.
CREATE FUNCTION book.person(name text) RETURNS text LANGUAGE sql IMMUTABLE SET search_path = pg_catalog AS $$
    SELECT lower(btrim(regexp_replace(name, '\s+', ' ', 'g')))
$$;

-- `approval_points` is the limit that applied when it was asked for. What one person has posted before there was this
-- column was within it; what waited was not.
ALTER TABLE book.adjustments ADD COLUMN approval_points bigint;
UPDATE book.adjustments SET approval_points = CASE WHEN action IS NOT NULL AND approved_by IS NULL THEN abs(points) ELSE 0 END;
ALTER TABLE book.adjustments
    ALTER COLUMN approval_points SET DEFAULT book.approval_points(),
    ALTER COLUMN approval_points SET NOT NULL;
CREATE UNIQUE INDEX adjustments_by_action ON book.adjustments (action) WHERE action IS NOT NULL;

-- Whoever asks may choose a lower limit, and no higher one.
CREATE FUNCTION book.bound_limit() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    NEW.approval_points := least(NEW.approval_points, book.approval_points());
    RETURN NEW;
END $$;

CREATE TRIGGER bound_limit BEFORE INSERT ON book.adjustments FOR EACH ROW EXECUTE FUNCTION book.bound_limit();

-- What was asked for stays as it was, and so does what was decided.
CREATE TRIGGER asked_once BEFORE UPDATE ON book.adjustments FOR EACH ROW
    WHEN (OLD.action IS NOT NULL OR OLD.rejected_by IS NOT NULL
        OR (OLD.adjustment, OLD.member, OLD.points, OLD.reason, OLD.note, OLD.asked_by, OLD.asked_at, OLD.corrects,
            OLD.approval_points) IS DISTINCT FROM (NEW.adjustment, NEW.member, NEW.points, NEW.reason, NEW.note, NEW.asked_by,
            NEW.asked_at, NEW.corrects, NEW.approval_points))
    EXECUTE FUNCTION book.refuse_change();
CREATE TRIGGER never_deleted BEFORE DELETE ON book.adjustments FOR EACH ROW EXECUTE FUNCTION book.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON book.adjustments EXECUTE FUNCTION book.refuse_change();

-- No adjustment and no correction is posted but as it was asked for, once, and by two persons where it needs them: above the
-- limit, to undo a posting, and for what the audit proposes, whose keys begin with `audit-`.
CREATE FUNCTION book.refuse_unapproved() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    asked book.adjustments;
    points bigint := CASE WHEN NEW.kind = 'correct' OR NEW.to_account = 'available' THEN NEW.points ELSE -NEW.points END;
    is_approved boolean;
BEGIN
    SELECT * INTO asked FROM book.adjustments WHERE action = NEW.action;
    IF (asked.member, asked.points, asked.corrects) IS DISTINCT FROM (NEW.member, points, NEW.corrects)
        OR (SELECT count(*) FROM book.postings WHERE action = NEW.action) <> 1 THEN
        RAISE EXCEPTION 'posting % is not what an adjustment asks for', NEW.number USING ERRCODE = 'restrict_violation';
    END IF;
    is_approved := book.person(asked.approved_by) NOT IN ('', book.person(asked.asked_by));
    IF book.person(asked.asked_by) = '' OR is_approved IS FALSE OR is_approved IS NULL AND (
        asked.corrects IS NOT NULL OR asked.adjustment LIKE 'audit-%' OR abs(asked.points) > asked.approval_points
    ) THEN
        RAISE EXCEPTION 'adjustment % needs somebody else to approve it', asked.adjustment
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER approved AFTER INSERT ON book.postings DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.kind IN ('adjust', 'correct')) EXECUTE FUNCTION book.refuse_unapproved();
