-- What a ledger that is bound to a service does besides: questions and answers, claims, and what became of what was sent. The names and
-- parameters are those of ledger/outbox.sql; those that lock, and claimable_free, are PostgreSQL's own.

-- name: service
SELECT name, answered_at FROM metered_ai.service

-- name: own_books
SELECT EXISTS (SELECT 1 FROM metered_ai.usage_event) OR EXISTS (SELECT 1 FROM metered_ai.credit_grant)
    OR EXISTS (SELECT 1 FROM metered_ai.open_hold) OR EXISTS (SELECT 1 FROM metered_ai.account WHERE is_unlimited = 1)

-- name: bound
INSERT INTO metered_ai.service (one, name, bound_at) VALUES (1, $1, $2)

-- name: accounts_bound
INSERT INTO metered_ai.service_account (account_no) SELECT no FROM metered_ai.account

-- name: lock_everything
SELECT metered_ai.lock_accounts()

-- name: kept
SELECT metered_ai.keep_outbox()

-- name: lock_account
SELECT a.no FROM metered_ai.account AS a WHERE a.no = $1 FOR NO KEY UPDATE

-- name: lock_put_aside
-- What was locked is noted for put_aside: an account that was put aside in between is none of it.
SELECT set_config('metered_ai_step.locked', coalesce(string_agg(l.no::text, ','), ''), true)
FROM (
    SELECT a.no FROM metered_ai.account AS a
    WHERE a.no IN (SELECT o.account_no FROM metered_ai.outbox AS o WHERE o.state <> 'waiting')
        AND ($1::text IS NULL OR a.customer = $1) AND ($2::text IS NULL OR a.meter = $2)
    ORDER BY a.no FOR NO KEY UPDATE
) AS l

-- name: answered
-- One row for everybody: not more often than it matters.
UPDATE metered_ai.service SET answered_at = $1 WHERE answered_at <= $1::bigint - 100000

-- name: asked
UPDATE metered_ai.service_account SET asked = asked + 1
WHERE account_no = (SELECT no FROM metered_ai.account WHERE customer = $1 AND meter = $2)
RETURNING asked, acknowledged

-- name: service_account
SELECT acknowledged, corrected, heard, asked_at FROM metered_ai.service_account WHERE account_no = $1

-- name: heard
UPDATE metered_ai.service_account SET heard = $2, asked_at = $3, limit_estimate = $4 WHERE account_no = $1

-- name: last_reference
SELECT since, reference FROM metered_ai.service_reference WHERE account_no = $1 ORDER BY since DESC LIMIT 1

-- name: new_reference
INSERT INTO metered_ai.service_reference (account_no, since, reference) VALUES ($1, $2, $3)

-- name: last_placed
SELECT max(placed_at) FROM metered_ai.open_hold WHERE account_no = $1

-- name: outbox_referred
UPDATE metered_ai.outbox SET reference = $2
WHERE event_no BETWEEN $1::bigint << 32 AND ($1::bigint << 32) + 4294967295 AND reference IS NULL

-- name: claimable
WITH RECURSIVE waiting (no) AS (
    SELECT min(o.account_no) FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no > $1
    UNION ALL
    SELECT (SELECT min(o.account_no) FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no > w.no)
    FROM waiting AS w WHERE w.no IS NOT NULL
)
SELECT a.no, s.failures, s.heard IS NOT NULL, a.customer, a.meter
FROM waiting AS w
JOIN metered_ai.service_account AS s ON s.account_no = w.no
JOIN metered_ai.account AS a ON a.no = w.no
WHERE s.claimed_until <= $2 AND s.next_try_at <= $2
    AND EXISTS (SELECT 1 FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no = w.no AND o.not_before <= $2)
ORDER BY a.no LIMIT 1

-- name: claimable_free
-- The same, of those that nobody has locked, and locks it. Both rows: the claim is noted in the one, and whoever changes the outbox has
-- the other. An account that was claimed while this statement ran is looked at once more, as it is now.
WITH RECURSIVE waiting (no) AS (
    SELECT min(o.account_no) FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no > $1
    UNION ALL
    SELECT (SELECT min(o.account_no) FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no > w.no)
    FROM waiting AS w WHERE w.no IS NOT NULL
)
SELECT a.no, s.failures, s.heard IS NOT NULL, a.customer, a.meter
FROM waiting AS w
JOIN metered_ai.service_account AS s ON s.account_no = w.no
JOIN metered_ai.account AS a ON a.no = w.no
WHERE s.claimed_until <= $2 AND s.next_try_at <= $2
    AND EXISTS (SELECT 1 FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no = w.no AND o.not_before <= $2)
ORDER BY a.no LIMIT 1 FOR NO KEY UPDATE OF a, s SKIP LOCKED

-- name: next_due
WITH RECURSIVE waiting (no) AS (
    SELECT min(o.account_no) FROM metered_ai.outbox AS o WHERE o.state = 'waiting'
    UNION ALL
    SELECT (SELECT min(o.account_no) FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no > w.no)
    FROM waiting AS w WHERE w.no IS NOT NULL
)
SELECT min(
    greatest(
        s.claimed_until, s.next_try_at,
        (SELECT min(o.not_before) FROM metered_ai.outbox AS o WHERE o.state = 'waiting' AND o.account_no = w.no)
    )
)
FROM waiting AS w JOIN metered_ai.service_account AS s ON s.account_no = w.no

-- name: claimed
UPDATE metered_ai.service_account SET claimed_by = $2, claimed_until = $3 WHERE account_no = $1

-- name: due
SELECT
    o.event_no, o.amount, o.attempts, o.reference, o.alone_as,
    u.created_at, u.transaction_id, u.amount, u.basis, u.kind, u.hold_id, u.is_unlimited, u.is_late, u.request_id, u.attempts,
    u.price_slug, u.parent, u.properties, u.has_usage, u.model, u.endpoint, u.service_tier, u.input_tokens, u.cached_input_tokens,
    u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.audio_tokens, u.seconds, u.images, u.characters
FROM metered_ai.outbox AS o
JOIN metered_ai.usage_event AS u ON u.no = o.event_no
WHERE o.event_no BETWEEN $1::bigint << 32 AND ($1::bigint << 32) + 4294967295 AND o.state = 'waiting' AND o.not_before <= $2
ORDER BY o.event_no LIMIT $3

-- name: tried
UPDATE metered_ai.outbox SET attempts = attempts + 1, first_tried_at = coalesce(first_tried_at, $2) WHERE event_no = $1

-- name: untried
UPDATE metered_ai.outbox SET attempts = attempts - 1, first_tried_at = CASE WHEN attempts > 1 THEN first_tried_at END
WHERE event_no = $1 AND attempts > 0

-- name: unclaimed
UPDATE metered_ai.service_account SET claimed_by = NULL, claimed_until = 0 WHERE account_no = $1 AND claimed_by = $2

-- name: sent
DELETE FROM metered_ai.outbox WHERE event_no = $1 RETURNING amount, reference

-- name: new_delivery
INSERT INTO metered_ai.delivery (event_no, amount, delivered_at, reference, details) VALUES ($1, $2, $3, $4, $5)

-- name: acknowledged
UPDATE metered_ai.service_account SET acknowledged = acknowledged + $2, failures = 0, next_try_at = 0 WHERE account_no = $1

-- name: failed
UPDATE metered_ai.service_account SET failures = failures + 1, next_try_at = $2 WHERE account_no = $1

-- name: went_on
UPDATE metered_ai.service_account SET failures = 0, next_try_at = 0 WHERE account_no = $1

-- name: failing
UPDATE metered_ai.outbox SET
    reason = $2,
    failing_since = CASE
        WHEN failing_since IS NOT NULL THEN failing_since
        WHEN (SELECT s.answered_at FROM metered_ai.service AS s) > first_tried_at THEN $3::bigint
    END
WHERE event_no = $1
RETURNING failing_since

-- name: reasoned
UPDATE metered_ai.outbox SET reason = $2 WHERE event_no = $1

-- name: alone
UPDATE metered_ai.outbox SET alone_as = $2, reason = $3 WHERE event_no = $1 AND state = 'waiting'

-- name: aside
UPDATE metered_ai.outbox SET state = 'parked', reason = $2 WHERE event_no = $1

-- name: namesake
SELECT EXISTS (
    SELECT 1 FROM metered_ai.account AS a
    JOIN metered_ai.usage_key AS k ON k.account_no = a.no AND k.transaction_id = $3
    WHERE a.meter = $2 AND a.customer <> $1
)

-- name: dead
UPDATE metered_ai.outbox SET state = 'dead', reason = $2 WHERE event_no = $1

-- name: account_parked
UPDATE metered_ai.service_account SET parked_reason = $2 WHERE account_no = $1

-- name: outbox_parked
UPDATE metered_ai.outbox SET state = 'parked'
WHERE event_no BETWEEN $1::bigint << 32 AND ($1::bigint << 32) + 4294967295 AND state = 'waiting'

-- name: put_aside
SELECT o.event_no, o.account_no, o.state
FROM metered_ai.outbox AS o
JOIN metered_ai.account AS a ON a.no = o.account_no
JOIN metered_ai.usage_event AS u ON u.no = o.event_no
WHERE o.state <> 'waiting' AND ($1::text IS NULL OR a.customer = $1) AND ($2::text IS NULL OR a.meter = $2)
    AND ($3::text IS NULL OR u.transaction_id = $3)
    AND o.account_no = ANY (string_to_array(current_setting('metered_ai_step.locked'), ',')::bigint[])

-- name: revived
UPDATE metered_ai.outbox SET state = 'waiting', failing_since = NULL, not_before = 0 WHERE event_no = $1

-- name: unparked
UPDATE metered_ai.outbox SET state = 'waiting', failing_since = NULL
WHERE event_no BETWEEN $1::bigint << 32 AND ($1::bigint << 32) + 4294967295 AND state = 'parked'
RETURNING event_no

-- name: account_unparked
UPDATE metered_ai.service_account SET parked_reason = NULL, failures = 0, next_try_at = 0 WHERE account_no = $1

-- name: netted
UPDATE metered_ai.outbox SET amount = amount - $3, not_before = 0
WHERE event_no = (SELECT k.event_no FROM metered_ai.usage_key AS k WHERE k.account_no = $1 AND k.transaction_id = $2) AND attempts = 0
RETURNING event_no, amount

-- name: corrected
UPDATE metered_ai.service_account SET corrected = corrected + $2 WHERE account_no = $1

-- name: known_now
UPDATE metered_ai.outbox SET not_before = 0
WHERE event_no = (SELECT k.event_no FROM metered_ai.usage_key AS k WHERE k.account_no = $1 AND k.transaction_id = $2)

-- name: owed_back
INSERT INTO metered_ai.outbox (event_no, account_no, amount, state, attempts, first_tried_at, reason)
SELECT k.event_no, k.account_no, 0, 'dead', 1, $3, $4 FROM metered_ai.usage_key AS k WHERE k.account_no = $1 AND k.transaction_id = $2

-- name: asked_at
SELECT s.asked_at FROM metered_ai.account AS a JOIN metered_ai.service_account AS s ON s.account_no = a.no
WHERE a.customer = $1 AND a.meter = $2

-- name: undelivered
SELECT
    o.event_no, a.customer, a.meter, o.state, o.amount, o.attempts, o.reference,
    CASE WHEN o.state = 'parked' THEN coalesce(o.reason, s.parked_reason) ELSE o.reason END, greatest(o.not_before, s.next_try_at),
    u.created_at, u.transaction_id, u.amount, u.basis, u.kind, u.hold_id, u.is_unlimited, u.is_late, u.request_id, u.attempts,
    u.price_slug, u.parent, u.properties, u.has_usage, u.model, u.endpoint, u.service_tier, u.input_tokens, u.cached_input_tokens,
    u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.audio_tokens, u.seconds, u.images, u.characters
FROM metered_ai.outbox AS o
JOIN metered_ai.usage_event AS u ON u.no = o.event_no
JOIN metered_ai.account AS a ON a.no = o.account_no
JOIN metered_ai.service_account AS s ON s.account_no = o.account_no
WHERE o.event_no > $1 AND ($2::text IS NULL OR a.customer = $2) AND ($3::text IS NULL OR a.meter = $3)
    AND ($4::text IS NULL OR o.state = $4)
ORDER BY o.event_no LIMIT $5

-- name: undelivered_counts
SELECT o.state, count(*), min(u.created_at)
FROM metered_ai.outbox AS o JOIN metered_ai.usage_event AS u ON u.no = o.event_no GROUP BY o.state
