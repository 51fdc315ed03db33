-- What steps do one by one, inside a transaction that has locked their accounts. The names and parameters are those of ledger/steps.sql;
-- the ways that take many steps at once are in batches.sql. The schema's name stands for whichever was configured.
-- `account` locks once more, for one that was not there yet when accounts were locked: what is written back is the whole row.

-- name: release_fast
SELECT a.no, h.amount, h.is_unlimited, h.placed_at, h.parent, h.endpoint, h.model, h.price_slug, h.properties
FROM metered_ai.account AS a
JOIN metered_ai.open_hold AS h ON h.account_no = a.no AND h.hold_id = $3
WHERE a.customer = $1 AND a.meter = $2
    AND h.operation IS NULL
    AND a.kept = 0
    AND (a.next_expiry IS NULL OR a.next_expiry > $4)

-- name: given_back
UPDATE metered_ai.account SET held = held - $2, open_holds = open_holds - 1 WHERE no = $1

-- name: given_back_unlimited
UPDATE metered_ai.account SET unlimited_held = unlimited_held - $2, open_holds = open_holds - 1 WHERE no = $1

-- name: open_hold_taken
DELETE FROM metered_ai.open_hold WHERE account_no = $1 AND hold_id = $2

-- name: account
SELECT
    no, credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry,
    events, last_event_at
FROM metered_ai.account WHERE customer = $1 AND meter = $2 FOR NO KEY UPDATE

-- name: account_by_no
SELECT
    no, credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry,
    events, last_event_at, customer, meter
FROM metered_ai.account WHERE no = $1

-- name: accounts_of_customer
SELECT no, meter, open_holds FROM metered_ai.account WHERE customer = $1 ORDER BY meter

-- name: new_account
INSERT INTO metered_ai.account (customer, meter) VALUES ($1, $2) RETURNING no

-- name: account_saved
UPDATE metered_ai.account SET
    credit_limit = $2, used = $3, held = $4, unlimited_used = $5, unlimited_held = $6, is_unlimited = $7, open_holds = $8,
    allocated = $9, kept = $10, next_expiry = $11, events = $12, last_event_at = $13
WHERE no = $1

-- name: grants_with_remainder
SELECT no, amount, expires_at, spent, expired, revoked, kept, is_over
FROM metered_ai.credit_grant WHERE account_no = $1 AND has_remainder = 1 ORDER BY no

-- name: grant
SELECT no, amount, expires_at, spent, expired, revoked, kept, is_over, created_at
FROM metered_ai.credit_grant WHERE account_no = $1 AND grant_id = $2

-- name: new_grant
INSERT INTO metered_ai.credit_grant (account_no, grant_id, amount, created_at, expires_at, spent, expired, revoked, kept, is_over, has_remainder)
VALUES ($1, $2, $3, $4, $5, 0, 0, 0, 0, 0, 1) RETURNING no

-- name: grant_saved
UPDATE metered_ai.credit_grant SET spent = $2, expired = $3, revoked = $4, kept = $5, is_over = $6, has_remainder = $7 WHERE no = $1

-- name: limited_holds
SELECT placed_at, amount FROM metered_ai.open_hold WHERE account_no = $1 AND is_unlimited = 0 AND amount > 0

-- name: open_hold
SELECT
    h.hold_id, h.amount, h.is_unlimited, h.is_repeat, h.placed_at, h.ends_at, h.on_unknown, h.owner_no, h.transaction_id,
    h.operation, h.scope, h.number, h.parent, h.endpoint, h.model, h.price_slug, h.properties,
    (SELECT o.lease_until FROM metered_ai.owner AS o WHERE o.no = h.owner_no)
FROM metered_ai.open_hold AS h WHERE h.account_no = $1 AND h.hold_id = $2

-- name: new_open_hold
INSERT INTO metered_ai.open_hold (
    account_no, hold_id, amount, is_unlimited, is_repeat, placed_at, ends_at, on_unknown,
    owner_no, transaction_id, operation, scope, number, parent, endpoint, model, price_slug, properties
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)

-- name: open_hold_enlarged
UPDATE metered_ai.open_hold SET amount = $3 WHERE account_no = $1 AND hold_id = $2

-- name: open_hold_by_transaction
SELECT hold_id FROM metered_ai.open_hold WHERE account_no = $1 AND transaction_id = $2 AND transaction_id IS NOT NULL LIMIT 1

-- name: orphans_of_account
SELECT h.hold_id
FROM metered_ai.open_hold AS h
LEFT JOIN metered_ai.owner AS o ON o.no = h.owner_no
WHERE h.account_no = $1 AND h.hold_id > $2
    AND (h.ends_at <= $3 OR (h.owner_no IS NOT NULL AND coalesce(o.lease_until, 0) <= $3))
ORDER BY h.hold_id LIMIT $4

-- name: ended_hold
SELECT
    state, amount, is_unlimited, is_repeat, reason, event_id, transaction_id, operation, scope, number
FROM metered_ai.ended_hold WHERE account_no = $1 AND hold_id = $2

-- name: new_ended_hold
INSERT INTO metered_ai.ended_hold (
    account_no, hold_id, state, amount, is_unlimited, is_repeat, placed_at, ended_at, reason, sent,
    event_id, transaction_id, operation, scope, number, parent, endpoint, model, price_slug, properties
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)

-- name: ended_hold_settled
UPDATE metered_ai.ended_hold SET state = 'settled', event_id = $3 WHERE account_no = $1 AND hold_id = $2

-- name: ended_hold_repeated
UPDATE metered_ai.ended_hold SET state = 'released', reason = 'repeat', event_id = $3 WHERE account_no = $1 AND hold_id = $2

-- name: lowest_freed_number
SELECT min(number) FROM metered_ai.operation_number WHERE account_no = $1 AND operation = $2 AND scope = $3 AND is_free = 1

-- name: highest_number
SELECT max(number) FROM metered_ai.operation_number WHERE account_no = $1 AND operation = $2 AND scope = $3 AND is_free = 0

-- name: number_removed
DELETE FROM metered_ai.operation_number
WHERE account_no = $1 AND operation = $2 AND scope = $3 AND is_free = $4 AND number = $5 AND is_kept = 0

-- name: number_added
INSERT INTO metered_ai.operation_number (account_no, operation, scope, is_free, number, is_kept) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (account_no, operation, scope, is_free, number)
DO UPDATE SET is_kept = greatest(operation_number.is_kept, excluded.is_kept)

-- name: new_event
WITH named AS (
    INSERT INTO metered_ai.usage_key (account_no, transaction_id, hold_id, event_no, created_at)
    VALUES ($2, $4, CASE WHEN $7 = 'correction' THEN NULL ELSE $11 END, $1, $3)
)
INSERT INTO metered_ai.usage_event (
    no, account_no, created_at, transaction_id, amount, basis, kind, is_unlimited, is_late, has_usage,
    hold_id, fingerprint, request_id, attempts, price_slug, parent, properties,
    model, endpoint, service_tier, input_tokens, cached_input_tokens, cache_write_tokens,
    output_tokens, reasoning_tokens, audio_tokens, seconds, images, characters
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29)

-- name: event_by_transaction
SELECT
    created_at, transaction_id, amount, basis, kind, hold_id, is_unlimited, is_late, request_id, attempts, price_slug, parent,
    properties, has_usage, model, endpoint, service_tier, input_tokens, cached_input_tokens, cache_write_tokens,
    output_tokens, reasoning_tokens, audio_tokens, seconds, images, characters, fingerprint
FROM metered_ai.usage_event WHERE (no, created_at) = (
    SELECT k.event_no, k.created_at FROM metered_ai.usage_key AS k WHERE k.account_no = $1 AND k.transaction_id = $2
)

-- name: event_by_hold
SELECT
    created_at, transaction_id, amount, basis, kind, hold_id, is_unlimited, is_late, request_id, attempts, price_slug, parent,
    properties, has_usage, model, endpoint, service_tier, input_tokens, cached_input_tokens, cache_write_tokens,
    output_tokens, reasoning_tokens, audio_tokens, seconds, images, characters, fingerprint
FROM metered_ai.usage_event WHERE (no, created_at) = (
    SELECT k.event_no, k.created_at FROM metered_ai.usage_key AS k WHERE k.hold_id = $2 AND k.account_no = $1
)

-- name: owner
SELECT no, lease_until FROM metered_ai.owner WHERE id = $1

-- name: owner_renewed
INSERT INTO metered_ai.owner (id, lease_until) VALUES ($1, $2)
ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until
RETURNING no

-- name: holds_of_owner
SELECT count(*) FROM metered_ai.open_hold WHERE owner_no = $1

-- name: tombstones_pruned
-- One that somebody is at may become a late settle's, so that it is looked at again, and by the next sweep.
WITH old AS MATERIALIZED (
    SELECT account_no, hold_id FROM metered_ai.ended_hold WHERE state = 'tombstone' AND ended_at < $1 ORDER BY ended_at LIMIT $2
    FOR UPDATE SKIP LOCKED
)
DELETE FROM metered_ai.ended_hold AS h USING old WHERE h.account_no = old.account_no AND h.hold_id = old.hold_id

-- name: owners_pruned
WITH old AS MATERIALIZED (
    SELECT no FROM metered_ai.owner
    WHERE lease_until < $1 AND no NOT IN (SELECT owner_no FROM metered_ai.open_hold WHERE owner_no IS NOT NULL)
    FOR UPDATE SKIP LOCKED
)
DELETE FROM metered_ai.owner AS o USING old WHERE o.no = old.no
