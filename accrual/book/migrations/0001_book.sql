-- The book: docs/BOOK.md says what each table is for. Every change to it is a new numbered file beside this one.
--
-- Facts are append-only: the database itself refuses to change or delete them, to whoever asks. Projections (balances,
-- lots, members) can be made anew from the facts; work lists (waiting, exceptions, adjustments, outbox) change as they
-- are worked off.

-- Orders facts among themselves: a posting with a larger number was booked later. What a transaction of the ingester books
-- has one number, which it draws when it has its locks and leaves in the setting `book.number`.
CREATE SEQUENCE book.numbers;

-- ---------------------------------------------------------------------------------------------------- the ledger

-- Where the book stands in the ledger of each partition.
CREATE TABLE book.partitions (
    partition_id smallint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE,
    batch bigint NOT NULL DEFAULT 0,
    digest bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex'),
    through text COLLATE "C" NOT NULL DEFAULT '0-0',
    next_seq bigint NOT NULL DEFAULT 1,
    rulebook integer NOT NULL DEFAULT 0
);

CREATE TABLE book.batches (
    partition_id smallint NOT NULL REFERENCES book.partitions,
    batch bigint NOT NULL,
    number bigint NOT NULL DEFAULT current_setting('book.number')::bigint,
    digest bytea NOT NULL,
    previous bytea NOT NULL,
    after text COLLATE "C" NOT NULL,
    through text COLLATE "C" NOT NULL,
    first_seq bigint NOT NULL,
    stream_entries bigint NOT NULL,
    events bigint NOT NULL,
    entries bigint NOT NULL,
    duplicates bigint NOT NULL,
    dead_letters bigint NOT NULL,
    rulebook integer NOT NULL,
    booked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (partition_id, batch),
    CHECK (events = entries + duplicates + dead_letters)
);

CREATE INDEX batches_by_number ON book.batches (number);

CREATE TABLE book.rulebooks (
    partition_id smallint NOT NULL REFERENCES book.partitions,
    batch bigint NOT NULL,
    version integer NOT NULL,
    name text NOT NULL,
    text text NOT NULL,
    zone_rules text NOT NULL,
    slack_days integer NOT NULL,
    PRIMARY KEY (partition_id, batch)
);

-- A decided event. One that is granted or held is at the same time its own posting: issuance to pending, or to held.
-- `late` entries were decided by the book from an event that the ledger had deferred, whose seq they share.
CREATE TABLE book.entries (
    day date NOT NULL,
    partition_id smallint NOT NULL,
    seq bigint NOT NULL,
    late boolean NOT NULL,
    number bigint NOT NULL DEFAULT current_setting('book.number')::bigint,
    rulebook integer NOT NULL,
    stream_id text COLLATE "C" NOT NULL,
    item integer NOT NULL,
    ts_ms bigint NOT NULL,
    event text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    member text COLLATE "C" NOT NULL,
    outcome text COLLATE "C" NOT NULL CHECK (outcome IN ('granted', 'held', 'rejected', 'applied')),
    cause text COLLATE "C",
    frozen boolean NOT NULL,
    amount_fen bigint,
    order_id text COLLATE "C",
    base bigint NOT NULL,
    uncapped bigint NOT NULL,
    points bigint NOT NULL CHECK (points >= 0),
    campaigns text[],
    evidence jsonb,
    device bigint,
    ip bigint,
    phone bigint,
    masked jsonb,
    PRIMARY KEY (day, partition_id, seq, late)
) PARTITION BY RANGE (day);

CREATE INDEX entries_by_member ON book.entries (member);

-- Days that nobody keeps apart: those of late events from long ago.
CREATE TABLE book.entries_other PARTITION OF book.entries DEFAULT;

-- Every event id that was ever booked, and the order that it paid.
CREATE TABLE book.identities (
    event text COLLATE "C" PRIMARY KEY,
    paid_order text COLLATE "C",
    day date NOT NULL,
    partition_id smallint NOT NULL,
    seq bigint NOT NULL,
    late boolean NOT NULL
);

CREATE INDEX identities_by_order ON book.identities (paid_order) WHERE paid_order IS NOT NULL;

-- An event that the ledger leaves to the book: a refund, or one that came late. `waiting` says what became of it.
CREATE TABLE book.deferred (
    partition_id smallint NOT NULL,
    seq bigint NOT NULL,
    number bigint NOT NULL DEFAULT current_setting('book.number')::bigint,
    rulebook integer NOT NULL,
    stream_id text COLLATE "C" NOT NULL,
    item integer NOT NULL,
    day date NOT NULL,
    ts_ms bigint NOT NULL,
    event text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    member text COLLATE "C" NOT NULL,
    cause text COLLATE "C" NOT NULL CHECK (cause IN ('refund', 'late')),
    amount_fen bigint,
    order_id text COLLATE "C",
    device bigint,
    ip bigint,
    phone bigint,
    payload bytea NOT NULL,
    booked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (partition_id, seq)
);

-- ------------------------------------------------------------------------------------------------------ postings

-- What a person or a job did, who, why and when. Postings and outgoing messages name it.
CREATE TABLE book.actions (
    action bigint PRIMARY KEY DEFAULT nextval('book.numbers'),
    kind text COLLATE "C" NOT NULL,
    by text NOT NULL,
    reason text COLLATE "C",
    note text,
    details jsonb NOT NULL DEFAULT '{}',
    done_at timestamptz NOT NULL DEFAULT now()
);

-- Points that moved from one account to another, but for the entries, which are postings themselves. `day` is the business
-- day of the points. `lot_days` and `lot_points` say how the part that touches `available` is spread over the member's
-- lots; a day that is null is the hole that no lot covers. `seq` names the entry whose points moved, `cause_seq` the
-- deferred event that made them.
CREATE TABLE book.postings (
    number bigint PRIMARY KEY,
    action bigint NOT NULL REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    kind text COLLATE "C" NOT NULL
        CHECK (kind IN ('settle', 'release', 'confirm', 'refund', 'clawback', 'expire', 'adjust', 'redeem')),
    member text COLLATE "C" NOT NULL,
    from_account text COLLATE "C" NOT NULL
        CHECK (from_account IN ('issuance', 'pending', 'available', 'held', 'redeemed', 'expired')),
    to_account text COLLATE "C" NOT NULL
        CHECK (to_account IN ('issuance', 'pending', 'available', 'held', 'redeemed', 'expired')),
    points bigint NOT NULL CHECK (points > 0),
    day date NOT NULL,
    lot_days date[],
    lot_points bigint[],
    lot_expires_on date,
    partition_id smallint,
    seq bigint,
    late boolean,
    cause_seq bigint,
    booked_at timestamptz NOT NULL DEFAULT now(),
    CHECK (from_account <> to_account),
    CHECK ((lot_days IS NULL) = (from_account <> 'available' AND to_account <> 'available'))
);

CREATE INDEX postings_by_member ON book.postings (member, number);
CREATE INDEX postings_by_day ON book.postings (day, member);
CREATE INDEX postings_by_entry ON book.postings (partition_id, seq) WHERE seq IS NOT NULL;
CREATE INDEX postings_by_action ON book.postings (action);

-- What became of a deferred event when it was dealt with, once.
CREATE TABLE book.resolutions (
    partition_id smallint NOT NULL,
    seq bigint NOT NULL,
    result text COLLATE "C" NOT NULL CHECK (result IN ('refund', 'late', 'duplicate', 'exception')),
    action bigint NOT NULL REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    PRIMARY KEY (partition_id, seq)
);

-- A refund that was accepted: what the sum of an order's refunds is made of. `order_seq` is the order's entry.
CREATE TABLE book.refunds (
    partition_id smallint NOT NULL,
    seq bigint NOT NULL,
    order_partition_id smallint NOT NULL,
    order_seq bigint NOT NULL,
    order_late boolean NOT NULL,
    amount_fen bigint NOT NULL,
    reversed bigint NOT NULL,
    action bigint NOT NULL REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    PRIMARY KEY (partition_id, seq)
);

CREATE INDEX refunds_by_order ON book.refunds (order_partition_id, order_seq);

-- A lot that members were warned about, so many days ahead.
CREATE TABLE book.reminders (
    member text COLLATE "C" NOT NULL,
    lot_day date NOT NULL,
    days_ahead integer NOT NULL,
    action bigint NOT NULL REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    PRIMARY KEY (member, lot_day, days_ahead)
);

-- --------------------------------------------------------------------------------------------------- projections

CREATE TABLE book.balances (
    member text COLLATE "C" PRIMARY KEY,
    pending bigint NOT NULL DEFAULT 0 CHECK (pending >= 0),
    available bigint NOT NULL DEFAULT 0,
    held bigint NOT NULL DEFAULT 0 CHECK (held >= 0)
) WITH (fillfactor = 70);

-- Available points by the business day that they were earned on. A member's lots add up to `available`, or all are used
-- up and `available` is not above zero.
CREATE TABLE book.lots (
    member text COLLATE "C" NOT NULL,
    day date NOT NULL,
    expires_on date NOT NULL,
    points bigint NOT NULL CHECK (points >= 0),
    PRIMARY KEY (member, day)
) WITH (fillfactor = 80);

CREATE INDEX lots_by_expiry ON book.lots (expires_on, member) WHERE points > 0;

-- What the book knows of a member beside points, from control events, freezes and releases; no row: active, and nothing.
CREATE TABLE book.members (
    member text COLLATE "C" PRIMARY KEY,
    partition_id smallint NOT NULL,
    state text COLLATE "C" NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'frozen', 'blocked')),
    tier text,
    card_until_ms bigint,
    immune_until_ms bigint,
    -- Whether an attribute could not be learnt because its event had left the stream.
    incomplete boolean NOT NULL DEFAULT false,
    number bigint NOT NULL
);

-- ---------------------------------------------------------------------------------------------------- work lists

-- Days whose pending points have become available; a day is here from the beginning of its first settlement on.
-- `through` has the last seq of the day in each partition before the scheduler settled it: it does so again when one grew.
CREATE TABLE book.settled_days (
    day date PRIMARY KEY,
    action bigint NOT NULL REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    finished boolean NOT NULL DEFAULT false,
    through jsonb
);

-- What is left to do of the deferred events, in the order in which they came.
CREATE TABLE book.waiting (
    partition_id smallint NOT NULL,
    seq bigint NOT NULL,
    cause text COLLATE "C" NOT NULL,
    number bigint NOT NULL DEFAULT current_setting('book.number')::bigint,
    PRIMARY KEY (partition_id, seq)
);

CREATE INDEX waiting_in_order ON book.waiting (cause, number, partition_id, seq);

-- What waits for a person, and what the person made of it.
CREATE TABLE book.exceptions (
    exception bigint PRIMARY KEY DEFAULT nextval('book.numbers'),
    kind text COLLATE "C" NOT NULL,
    member text COLLATE "C",
    partition_id smallint,
    seq bigint,
    event text COLLATE "C",
    detail text NOT NULL,
    data jsonb NOT NULL DEFAULT '{}',
    opened_at timestamptz NOT NULL DEFAULT now(),
    closed_at timestamptz,
    closed_by bigint REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    UNIQUE NULLS NOT DISTINCT (kind, partition_id, seq, event)
);

CREATE INDEX exceptions_open ON book.exceptions (exception) WHERE closed_at IS NULL;

-- Adjustments, by the key that makes each of them unique. One that is large waits for a second person.
CREATE TABLE book.adjustments (
    adjustment text COLLATE "C" PRIMARY KEY,
    member text COLLATE "C" NOT NULL,
    points bigint NOT NULL CHECK (points <> 0),
    reason text COLLATE "C" NOT NULL,
    note text NOT NULL,
    asked_by text NOT NULL,
    asked_at timestamptz NOT NULL DEFAULT now(),
    approved_by text,
    rejected_by text,
    action bigint REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    CHECK (approved_by IS NULL OR approved_by <> asked_by),
    CHECK (rejected_by IS NULL OR action IS NULL)
);

-- Messages for the stream server, each sent once, in the order of `position`, which a message gets when it is first about
-- to be sent, so that one whose transaction ended late is not overtaken for good. `value` is JSON; an event gets its `ts` when it is sent.
CREATE TABLE book.outbox (
    partition_id smallint NOT NULL REFERENCES book.partitions,
    message bigint NOT NULL DEFAULT nextval('book.numbers'),
    stream text COLLATE "C" NOT NULL CHECK (stream IN ('events', 'notifications')),
    value bytea NOT NULL,
    action bigint NOT NULL REFERENCES book.actions DEFERRABLE INITIALLY DEFERRED,
    position bigint,
    sent_at timestamptz,
    PRIMARY KEY (partition_id, message),
    UNIQUE (partition_id, position)
);

CREATE INDEX outbox_unsent ON book.outbox (partition_id, position, message) WHERE sent_at IS NULL;

-- ------------------------------------------------------------------------------------------------- what may not be

CREATE FUNCTION book.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'book.% is append-only: % is refused', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'restrict_violation', HINT = 'A correction is a posting of its own.';
END $$;

DO $$
DECLARE
    fact text;
BEGIN
    FOREACH fact IN ARRAY ARRAY[
        'batches', 'rulebooks', 'entries', 'identities', 'deferred', 'actions', 'postings', 'refunds', 'reminders',
        'resolutions'
    ] LOOP
        EXECUTE format(
            'CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON book.%I FOR EACH ROW EXECUTE FUNCTION book.refuse_change()',
            fact);
        EXECUTE format(
            'CREATE TRIGGER never_emptied BEFORE TRUNCATE ON book.%I EXECUTE FUNCTION book.refuse_change()', fact);
    END LOOP;
END $$;

CREATE TRIGGER never_emptied BEFORE TRUNCATE ON book.entries_other EXECUTE FUNCTION book.refuse_change();

-- Makes the partition of a business day. It is attached rather than created in place, so that readers and jobs go on. It
-- runs with the rights of the owner, since an application's role may not create tables.
CREATE FUNCTION book.ensure_day(wanted date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    name text := 'entries_' || to_char(wanted, 'YYYYMMDD');
BEGIN
    IF to_regclass('book.' || quote_ident(name)) IS NOT NULL THEN
        RETURN;
    END IF;
    -- One at a time: two may want the same day.
    PERFORM pg_advisory_xact_lock(hashtext('book.ensure_day'));
    IF to_regclass('book.' || quote_ident(name)) IS NOT NULL
        OR EXISTS (SELECT FROM book.entries_other WHERE day = wanted) THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE book.%I (LIKE book.entries INCLUDING ALL)', name);
    EXECUTE format('ALTER TABLE book.%I ADD CONSTRAINT %I CHECK (day >= %L AND day < %L)', name, name || '_day', wanted, wanted + 1);
    EXECUTE format(
        'CREATE TRIGGER never_emptied BEFORE TRUNCATE ON book.%I EXECUTE FUNCTION book.refuse_change()', name);
    EXECUTE format(
        'ALTER TABLE book.entries ATTACH PARTITION book.%I FOR VALUES FROM (%L) TO (%L)', name, wanted, wanted + 1);
    EXECUTE format('ALTER TABLE book.%I DROP CONSTRAINT %I', name, name || '_day');
END $$;

-- ---------------------------------------------------------------------------------------------- for those who read

-- Everything that moved points, one row each, oldest first by (number, seq).
CREATE VIEW book.movements AS
    SELECT number, seq, CASE WHEN late THEN 'late' ELSE 'accrue' END AS kind, member, 'issuance' AS from_account,
        CASE outcome WHEN 'held' THEN 'held' ELSE 'pending' END AS to_account, points, day, partition_id, late,
        NULL::bigint AS action
    FROM book.entries WHERE outcome IN ('granted', 'held')
    UNION ALL
    SELECT number, seq, kind, member, from_account, to_account, points, day, partition_id, late, action FROM book.postings;

-- Both sides of every movement. The programme's accounts have no member.
CREATE VIEW book.legs AS
    SELECT m.number, m.seq, m.kind, side.account,
        CASE WHEN side.account IN ('pending', 'available', 'held') THEN m.member END AS member, side.points, m.day
    FROM book.movements m,
        LATERAL (VALUES (m.from_account, -m.points), (m.to_account, m.points)) AS side (account, points);

-- Where the points of every entry are, and how many of them it still holds.
CREATE VIEW book.holdings AS
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
        FROM book.postings
        WHERE (partition_id, seq, late) = (e.partition_id, e.seq, e.late)
    ) p ON true
    LEFT JOIN LATERAL (
        SELECT max(number) AS settled FROM book.postings WHERE (day, member) = (e.day, e.member) AND kind = 'settle'
    ) s ON true
    WHERE e.outcome IN ('granted', 'held');

-- The chart of accounts with its balances; they add up to zero.
CREATE VIEW book.accounts AS SELECT account, sum(points) AS points FROM book.legs GROUP BY account;
