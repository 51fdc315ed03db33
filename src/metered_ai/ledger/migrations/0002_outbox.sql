-- What a ledger keeps for a remote billing service: what the service said, and what it has not been told yet. All of it stays empty in
-- a ledger that has none; outbox.sql adds triggers to one that is bound.

-- One row at most: the service that the ledger is bound to.
CREATE TABLE service (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    name TEXT NOT NULL,
    bound_at INTEGER NOT NULL,
    -- When it last answered as it should, a question or a usage event.
    answered_at INTEGER NOT NULL DEFAULT 0
);

CREATE TRIGGER service_no_update BEFORE UPDATE OF one, name, bound_at ON service
BEGIN
    SELECT RAISE(ABORT, 'a ledger is bound to its service for ever');
END;

CREATE TRIGGER service_no_delete BEFORE DELETE ON service
BEGIN
    SELECT RAISE(ABORT, 'a ledger is bound to its service for ever');
END;

CREATE TABLE service_account (
    account_no INTEGER PRIMARY KEY REFERENCES account (no),
    -- The sum of what the service has acknowledged, and of what it need not be told because a correction took it back before.
    acknowledged INTEGER NOT NULL DEFAULT 0 CHECK (acknowledged BETWEEN 0 AND 4611686018427387904),
    corrected INTEGER NOT NULL DEFAULT 0 CHECK (corrected BETWEEN 0 AND 4611686018427387904),
    -- How many questions were asked; which of them the balance answers, and when that one was asked. NULL: none yet.
    asked INTEGER NOT NULL DEFAULT 0,
    heard INTEGER,
    asked_at INTEGER,
    limit_estimate INTEGER,
    -- Who may send, and for how long.
    claimed_by TEXT,
    claimed_until INTEGER NOT NULL DEFAULT 0,
    next_try_at INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    parked_reason TEXT
);

-- The service's word for what was checked, and since when: an event belongs to the one in force when its hold was placed.
CREATE TABLE service_reference (
    account_no INTEGER NOT NULL REFERENCES account (no),
    since INTEGER NOT NULL,
    reference TEXT,
    PRIMARY KEY (account_no, since)
) WITHOUT ROWID;

-- Usage events that the service does not have yet, so that the table stays as small as what is under way.
CREATE TABLE outbox (
    event_no INTEGER PRIMARY KEY REFERENCES usage_event (no),
    -- Without a reference to the account: for want of an index each new account would search the whole outbox.
    account_no INTEGER NOT NULL,
    -- What the service is told: the event's amount, less what a correction has taken back.
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
    state TEXT NOT NULL CHECK (state = 'waiting' OR state = 'parked' OR state = 'dead'),
    not_before INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    first_tried_at INTEGER,
    -- Since when it fails although the service answers to others.
    failing_since INTEGER,
    -- NULL: it may go together with others. Else it goes by itself, under this transaction id.
    alone_as TEXT,
    reference TEXT,
    reason TEXT
);

CREATE INDEX outbox_waiting ON outbox (account_no, not_before) WHERE state = 'waiting';

CREATE TABLE delivery (
    event_no INTEGER PRIMARY KEY REFERENCES usage_event (no),
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
    delivered_at INTEGER NOT NULL,
    reference TEXT,
    -- The service's own findings, as JSON.
    details TEXT
);

CREATE TRIGGER delivery_no_update BEFORE UPDATE ON delivery
BEGIN
    SELECT RAISE(ABORT, 'deliveries are never changed');
END;

CREATE TRIGGER delivery_no_delete BEFORE DELETE ON delivery
BEGIN
    SELECT RAISE(ABORT, 'deliveries are never removed');
END;
