-- What a ledger keeps for a remote billing service: what the service said, and what it has not been told yet. All of it stays empty in
-- a ledger that has none; keep_outbox adds triggers to one that is bound.
-- Whoever writes to these tables has the account's row locked; only a question does without.

-- One row at most: the service that the ledger is bound to.
CREATE TABLE metered_ai.service (
    one smallint PRIMARY KEY CHECK (one = 1),
    name text NOT NULL,
    bound_at bigint NOT NULL,
    -- When it last answered as it should, a question or a usage event.
    answered_at bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

CREATE TRIGGER service_fixed BEFORE UPDATE OF one, name, bound_at ON metered_ai.service
FOR EACH ROW EXECUTE FUNCTION metered_ai.refuse('a ledger is bound to its service for ever');

CREATE TRIGGER service_no_delete BEFORE DELETE ON metered_ai.service
FOR EACH ROW EXECUTE FUNCTION metered_ai.refuse('a ledger is bound to its service for ever');

CREATE TRIGGER service_no_truncate BEFORE TRUNCATE ON metered_ai.service
FOR EACH STATEMENT EXECUTE FUNCTION metered_ai.refuse('a ledger is bound to its service for ever');

CREATE TABLE metered_ai.service_account (
    account_no bigint PRIMARY KEY,
    -- The sum of what the service has acknowledged, and of what it need not be told because a correction took it back before.
    acknowledged bigint NOT NULL DEFAULT 0 CHECK (acknowledged BETWEEN 0 AND 4611686018427387904),
    corrected bigint NOT NULL DEFAULT 0 CHECK (corrected BETWEEN 0 AND 4611686018427387904),
    -- How many questions were asked; which of them the balance answers, and when that one was asked. NULL: none yet.
    asked bigint NOT NULL DEFAULT 0,
    heard bigint,
    asked_at bigint,
    limit_estimate bigint,
    -- Who may send, and for how long.
    claimed_by text,
    claimed_until bigint NOT NULL DEFAULT 0,
    next_try_at bigint NOT NULL DEFAULT 0,
    failures bigint NOT NULL DEFAULT 0,
    parked_reason text
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);

-- The service's word for what was checked, and since when: an event belongs to the one in force when its hold was placed.
CREATE TABLE metered_ai.service_reference (
    account_no bigint NOT NULL,
    since bigint NOT NULL,
    reference text,
    PRIMARY KEY (account_no, since)
);

-- Usage events that the service does not have yet, so that the table stays as small as what is under way.
CREATE TABLE metered_ai.outbox (
    event_no bigint PRIMARY KEY,
    account_no bigint NOT NULL,
    -- What the service is told: the event's amount, less what a correction has taken back.
    amount bigint NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
    state text NOT NULL CHECK (state IN ('waiting', 'parked', 'dead')),
    not_before bigint NOT NULL DEFAULT 0,
    attempts bigint NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    first_tried_at bigint,
    -- Since when it fails although the service answers to others.
    failing_since bigint,
    -- NULL: it may go together with others. Else it goes by itself, under this transaction id.
    alone_as text,
    reference text,
    reason text
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

CREATE INDEX outbox_waiting ON metered_ai.outbox (account_no, not_before) WHERE state = 'waiting';

CREATE TABLE metered_ai.delivery (
    event_no bigint PRIMARY KEY,
    amount bigint NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
    delivered_at bigint NOT NULL,
    reference text,
    -- The service's own findings, as JSON.
    details text
);

CREATE TRIGGER delivery_append_only BEFORE UPDATE OR DELETE ON metered_ai.delivery
FOR EACH ROW EXECUTE FUNCTION metered_ai.refuse('deliveries are never changed or removed');

CREATE TRIGGER delivery_no_truncate BEFORE TRUNCATE ON metered_ai.delivery
FOR EACH STATEMENT EXECUTE FUNCTION metered_ai.refuse('deliveries are never changed or removed');

CREATE FUNCTION metered_ai.service_account_of_account() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO metered_ai.service_account (account_no) VALUES (new.no);
    RETURN NULL;
END
$$;

-- An orphan's charge waits for an hour, because the truth may come after all. Where the account is parked, the event is, too.
-- Settles that come many at once have removed their holds already, and have written the outbox themselves.
CREATE FUNCTION metered_ai.outbox_of_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO metered_ai.outbox (event_no, account_no, amount, state, not_before, reference)
    SELECT
        new.no, new.account_no, new.amount, CASE WHEN s.parked_reason IS NULL THEN 'waiting' ELSE 'parked' END,
        CASE WHEN new.kind = 'expired' THEN new.created_at + 3600000000 ELSE 0 END,
        (
            SELECT r.reference FROM metered_ai.service_reference AS r
            WHERE r.account_no = new.account_no AND r.since <= coalesce(
                (SELECT h.placed_at FROM metered_ai.open_hold AS h WHERE h.account_no = new.account_no AND h.hold_id = new.hold_id),
                (SELECT e.placed_at FROM metered_ai.ended_hold AS e WHERE e.account_no = new.account_no AND e.hold_id = new.hold_id),
                new.created_at
            )
            ORDER BY r.since DESC LIMIT 1
        )
    FROM metered_ai.service_account AS s WHERE s.account_no = new.account_no
    ON CONFLICT (event_no) DO NOTHING;
    RETURN NULL;
END
$$;

-- The next two are run by whoever binds the ledger, with the rights of the schema's owner, because making a trigger takes an owner.

-- No step is under way while a ledger is bound, so that none is done half before and half after.
CREATE FUNCTION metered_ai.lock_accounts() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE metered_ai.account IN EXCLUSIVE MODE;
END
$$;

-- Gives a bound ledger its triggers, where they are missing: they write the outbox in the same transaction as the usage event, whoever
-- writes that and from wherever, also a process that has had the ledger open since before. A ledger without a service pays nothing for it.
CREATE FUNCTION metered_ai.keep_outbox() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT 1 FROM metered_ai.service) THEN
        RETURN;
    END IF;
    IF NOT EXISTS (
        SELECT 1 FROM pg_trigger AS t WHERE t.tgrelid = 'metered_ai.account'::regclass AND t.tgname = 'service_account_of_account'
    ) THEN
        CREATE TRIGGER service_account_of_account AFTER INSERT ON metered_ai.account
        FOR EACH ROW EXECUTE FUNCTION metered_ai.service_account_of_account();
    END IF;
    IF NOT EXISTS (
        SELECT 1 FROM pg_trigger AS t WHERE t.tgrelid = 'metered_ai.usage_event'::regclass AND t.tgname = 'outbox_of_event'
    ) THEN
        CREATE TRIGGER outbox_of_event AFTER INSERT ON metered_ai.usage_event
        FOR EACH ROW WHEN (new.amount > 0) EXECUTE FUNCTION metered_ai.outbox_of_event();
    END IF;
    -- A release that knows no services would give credits here.
    UPDATE metered_ai.migration SET works_for = 2 WHERE version = 2 AND works_for < 2;
END
$$;

REVOKE ALL ON FUNCTION metered_ai.lock_accounts(), metered_ai.keep_outbox() FROM PUBLIC;
