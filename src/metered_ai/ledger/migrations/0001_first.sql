-- The first schema. Amounts are whole credits, times are microseconds since 1970 UTC, names are compared as bytes.
-- Checks of more than two values are chains of OR: a longer IN would build a table at each insert.

CREATE TABLE account (
    no INTEGER PRIMARY KEY,
    customer TEXT NOT NULL,
    meter TEXT NOT NULL,
    -- What grants amount to: given, less revoked, less expired unspent.
    credit_limit INTEGER NOT NULL DEFAULT 0 CHECK (credit_limit BETWEEN 0 AND 4611686018427387904),
    used INTEGER NOT NULL DEFAULT 0 CHECK (used BETWEEN 0 AND 4611686018427387904),
    held INTEGER NOT NULL DEFAULT 0 CHECK (held BETWEEN 0 AND 4611686018427387904),
    unlimited_used INTEGER NOT NULL DEFAULT 0 CHECK (unlimited_used BETWEEN 0 AND 4611686018427387904),
    unlimited_held INTEGER NOT NULL DEFAULT 0 CHECK (unlimited_held BETWEEN 0 AND 4611686018427387904),
    is_unlimited INTEGER NOT NULL DEFAULT 0 CHECK (is_unlimited IN (0, 1)),
    open_holds INTEGER NOT NULL DEFAULT 0 CHECK (open_holds >= 0),
    -- The sum of what grants know to have paid, and of what expired grants keep for holds placed before their expiry.
    allocated INTEGER NOT NULL DEFAULT 0 CHECK (allocated BETWEEN 0 AND used),
    kept INTEGER NOT NULL DEFAULT 0 CHECK (kept >= 0),
    -- The soonest expiry that has not been applied; NULL where nothing can expire.
    next_expiry INTEGER,
    events INTEGER NOT NULL DEFAULT 0 CHECK (events BETWEEN 0 AND 4294967295),
    last_event_at INTEGER NOT NULL DEFAULT 0,
    UNIQUE (customer, meter)
);

CREATE TABLE owner (
    no INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    lease_until INTEGER NOT NULL
);

-- Only open holds, so that the table stays as small as the traffic.
CREATE TABLE open_hold (
    account_no INTEGER NOT NULL REFERENCES account (no),
    hold_id TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
    is_unlimited INTEGER NOT NULL CHECK (is_unlimited IN (0, 1)),
    is_repeat INTEGER NOT NULL DEFAULT 0 CHECK (is_repeat IN (0, 1)),
    placed_at INTEGER NOT NULL,
    ends_at INTEGER NOT NULL,
    -- Who renews its lease; a hold whose owner is not there any more is an orphan.
    owner_no INTEGER,
    on_unknown TEXT NOT NULL CHECK (on_unknown IN ('release', 'charge')),
    -- An explicit transaction id with its number, and the operation, scope and number it was made of.
    transaction_id TEXT,
    operation TEXT,
    scope TEXT,
    number INTEGER,
    parent TEXT,
    endpoint TEXT,
    model TEXT,
    price_slug TEXT,
    properties TEXT,
    PRIMARY KEY (account_no, hold_id)
) WITHOUT ROWID;

CREATE INDEX open_hold_by_transaction ON open_hold (account_no, transaction_id) WHERE transaction_id IS NOT NULL;

-- Holds that ended without a plain settle: what may have cost the operator, tombstones of holds that never were, and late settles.
CREATE TABLE ended_hold (
    account_no INTEGER NOT NULL REFERENCES account (no),
    hold_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (
        state = 'released' OR state = 'expired' OR state = 'charged' OR state = 'settled' OR state = 'tombstone'
    ),
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
    is_unlimited INTEGER NOT NULL CHECK (is_unlimited IN (0, 1)),
    is_repeat INTEGER NOT NULL CHECK (is_repeat IN (0, 1)),
    placed_at INTEGER NOT NULL,
    ended_at INTEGER NOT NULL,
    reason TEXT,
    sent TEXT CHECK (sent = 'yes' OR sent = 'no' OR sent = 'unknown'),
    -- The usage event that a late settle wrote, or that a repeat repeated.
    event_id TEXT,
    transaction_id TEXT,
    operation TEXT,
    scope TEXT,
    number INTEGER,
    parent TEXT,
    endpoint TEXT,
    model TEXT,
    price_slug TEXT,
    properties TEXT,
    PRIMARY KEY (account_no, hold_id)
) WITHOUT ROWID;

CREATE INDEX tombstone ON ended_hold (ended_at) WHERE state = 'tombstone';

-- Which numbers of an operation a scope has used (is_free 0), and which it gave back (1): T, T.2, T.3 …
-- One that is kept came to something although its hold had ended: no other hold that had it gives it back.
CREATE TABLE operation_number (
    account_no INTEGER NOT NULL REFERENCES account (no),
    operation TEXT NOT NULL,
    scope TEXT NOT NULL,
    is_free INTEGER NOT NULL CHECK (is_free IN (0, 1)),
    number INTEGER NOT NULL CHECK (number >= 1),
    is_kept INTEGER NOT NULL CHECK (is_kept IN (0, 1)),
    PRIMARY KEY (account_no, operation, scope, is_free, number)
) WITHOUT ROWID;

-- no = account_no * 2^32 + 1, 2, 3 … in the order of created_at, which grows strictly within an account. So an account's events
-- lie together, and its events of a time are found by bisection, without one more index to write at each settle.
CREATE TABLE usage_event (
    no INTEGER PRIMARY KEY,
    account_no INTEGER NOT NULL REFERENCES account (no),
    created_at INTEGER NOT NULL,
    transaction_id TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
    basis TEXT NOT NULL CHECK (basis = 'reported' OR basis = 'observed' OR basis = 'estimated' OR basis = 'held'),
    kind TEXT NOT NULL CHECK (kind = 'call' OR kind = 'charge' OR kind = 'record' OR kind = 'expired' OR kind = 'correction'),
    hold_id TEXT,
    is_unlimited INTEGER NOT NULL CHECK (is_unlimited IN (0, 1)),
    is_late INTEGER NOT NULL CHECK (is_late IN (0, 1)),
    fingerprint TEXT,
    request_id TEXT,
    attempts INTEGER,
    price_slug TEXT,
    parent TEXT,
    properties TEXT,
    has_usage INTEGER NOT NULL CHECK (has_usage IN (0, 1)),
    model TEXT,
    endpoint TEXT,
    service_tier TEXT,
    input_tokens INTEGER,
    cached_input_tokens INTEGER,
    cache_write_tokens INTEGER,
    output_tokens INTEGER,
    reasoning_tokens INTEGER,
    audio_tokens INTEGER,
    seconds REAL,
    images INTEGER,
    characters INTEGER
);

CREATE UNIQUE INDEX usage_event_by_transaction ON usage_event (account_no, transaction_id);

-- The hold first: hold ids grow with time, so that this index grows at its end.
CREATE UNIQUE INDEX usage_event_by_hold ON usage_event (hold_id, account_no) WHERE hold_id IS NOT NULL AND kind <> 'correction';

CREATE TRIGGER usage_event_no_update BEFORE UPDATE ON usage_event
BEGIN
    SELECT RAISE(ABORT, 'usage events are never changed');
END;

CREATE TRIGGER usage_event_no_delete BEFORE DELETE ON usage_event
BEGIN
    SELECT RAISE(ABORT, 'usage events are never removed');
END;

CREATE TABLE credit_grant (
    no INTEGER PRIMARY KEY AUTOINCREMENT,
    account_no INTEGER NOT NULL REFERENCES account (no),
    grant_id TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 1 AND 9007199254740991),
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    spent INTEGER NOT NULL CHECK (spent >= 0),
    expired INTEGER NOT NULL CHECK (expired >= 0),
    revoked INTEGER NOT NULL CHECK (revoked >= 0),
    -- Left over after the expiry for holds placed before it.
    kept INTEGER NOT NULL CHECK (kept BETWEEN 0 AND amount - spent - expired - revoked),
    is_over INTEGER NOT NULL CHECK (is_over IN (0, 1)),
    has_remainder INTEGER NOT NULL CHECK (has_remainder IN (0, 1)),
    UNIQUE (account_no, grant_id),
    CHECK (spent + expired + revoked <= amount)
);

CREATE INDEX credit_grant_by_account ON credit_grant (account_no);

CREATE INDEX credit_grant_with_remainder ON credit_grant (account_no) WHERE has_remainder = 1;

CREATE TRIGGER credit_grant_no_update BEFORE UPDATE OF no, account_no, grant_id, amount, created_at, expires_at ON credit_grant
BEGIN
    SELECT RAISE(ABORT, 'a grant''s id, amount and times are never changed');
END;

CREATE TRIGGER credit_grant_no_delete BEFORE DELETE ON credit_grant
BEGIN
    SELECT RAISE(ABORT, 'grants are never removed; they are revoked');
END;
