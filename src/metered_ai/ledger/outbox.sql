-- What a ledger that is bound to a service does besides: questions and answers, claims, and what became of what was sent.

-- name: service
SELECT name, answered_at FROM service

-- name: own_books
SELECT EXISTS (SELECT 1 FROM usage_event) OR EXISTS (SELECT 1 FROM credit_grant) OR EXISTS (SELECT 1 FROM open_hold)
    OR EXISTS (SELECT 1 FROM account WHERE is_unlimited)

-- name: bound
INSERT INTO service (one, name, bound_at) VALUES (1, ?1, ?2)

-- name: accounts_bound
INSERT INTO service_account (account_no) SELECT no FROM account

-- name: answered
UPDATE service SET answered_at = max(answered_at, ?1)

-- name: asked
UPDATE service_account SET asked = asked + 1
WHERE account_no = (SELECT no FROM account WHERE customer = ?1 AND meter = ?2)
RETURNING asked, acknowledged

-- name: service_account
SELECT acknowledged, corrected, heard, asked_at FROM service_account WHERE account_no = ?1

-- name: heard
UPDATE service_account SET heard = ?2, asked_at = ?3, limit_estimate = ?4 WHERE account_no = ?1

-- name: last_reference
SELECT since, reference FROM service_reference WHERE account_no = ?1 ORDER BY since DESC LIMIT 1

-- name: new_reference
INSERT INTO service_reference (account_no, since, reference) VALUES (?1, ?2, ?3)

-- name: last_placed
SELECT max(placed_at) FROM open_hold WHERE account_no = ?1

-- name: outbox_referred
UPDATE outbox SET reference = ?2 WHERE event_no BETWEEN ?1 * 4294967296 AND ?1 * 4294967296 + 4294967295 AND reference IS NULL

-- name: claimable
WITH RECURSIVE waiting (no) AS (
    SELECT min(o.account_no) FROM outbox AS o WHERE o.state = 'waiting' AND o.account_no > ?1
    UNION ALL
    SELECT (SELECT min(o.account_no) FROM outbox AS o WHERE o.state = 'waiting' AND o.account_no > w.no)
    FROM waiting AS w WHERE w.no IS NOT NULL
)
SELECT w.no, s.failures, s.heard IS NOT NULL, a.customer, a.meter
FROM waiting AS w
CROSS JOIN service_account AS s ON s.account_no = w.no
CROSS JOIN account AS a ON a.no = w.no
WHERE s.claimed_until <= ?2 AND s.next_try_at <= ?2
    AND EXISTS (SELECT 1 FROM outbox AS o WHERE o.state = 'waiting' AND o.account_no = w.no AND o.not_before <= ?2)
LIMIT 1

-- name: next_due
WITH RECURSIVE waiting (no) AS (
    SELECT min(o.account_no) FROM outbox AS o WHERE o.state = 'waiting'
    UNION ALL
    SELECT (SELECT min(o.account_no) FROM outbox AS o WHERE o.state = 'waiting' AND o.account_no > w.no)
    FROM waiting AS w WHERE w.no IS NOT NULL
)
SELECT min(
    max(
        s.claimed_until, s.next_try_at,
        (SELECT min(o.not_before) FROM outbox AS o WHERE o.state = 'waiting' AND o.account_no = w.no)
    )
)
FROM waiting AS w CROSS JOIN service_account AS s ON s.account_no = w.no

-- name: claimed
UPDATE service_account SET claimed_by = ?2, claimed_until = ?3 WHERE account_no = ?1

-- name: due
SELECT
    o.event_no, o.amount, o.attempts, o.reference, o.alone_as,
    u.created_at, u.transaction_id, u.amount, u.basis, u.kind, u.hold_id, u.is_unlimited, u.is_late, u.request_id, u.attempts,
    u.price_slug, u.parent, u.properties, u.has_usage, u.model, u.endpoint, u.service_tier, u.input_tokens, u.cached_input_tokens,
    u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.audio_tokens, u.seconds, u.images, u.characters
FROM outbox AS o
JOIN usage_event AS u ON u.no = o.event_no
WHERE o.event_no BETWEEN ?1 * 4294967296 AND ?1 * 4294967296 + 4294967295 AND +o.state = 'waiting' AND o.not_before <= ?2
ORDER BY o.event_no LIMIT ?3

-- name: tried
UPDATE outbox SET attempts = attempts + 1, first_tried_at = coalesce(first_tried_at, ?2) WHERE event_no = ?1

-- name: untried
UPDATE outbox SET attempts = attempts - 1, first_tried_at = CASE WHEN attempts > 1 THEN first_tried_at END
WHERE event_no = ?1 AND attempts > 0

-- name: unclaimed
UPDATE service_account SET claimed_by = NULL, claimed_until = 0 WHERE account_no = ?1 AND claimed_by = ?2

-- name: sent
DELETE FROM outbox WHERE event_no = ?1 RETURNING amount, reference

-- name: new_delivery
INSERT INTO delivery (event_no, amount, delivered_at, reference, details) VALUES (?1, ?2, ?3, ?4, ?5)

-- name: acknowledged
UPDATE service_account SET acknowledged = acknowledged + ?2, failures = 0, next_try_at = 0 WHERE account_no = ?1

-- name: failed
UPDATE service_account SET failures = failures + 1, next_try_at = ?2 WHERE account_no = ?1

-- name: went_on
UPDATE service_account SET failures = 0, next_try_at = 0 WHERE account_no = ?1

-- name: failing
UPDATE outbox SET
    reason = ?2,
    failing_since = CASE
        WHEN failing_since IS NOT NULL THEN failing_since
        WHEN (SELECT s.answered_at FROM service AS s) > first_tried_at THEN ?3
    END
WHERE event_no = ?1
RETURNING failing_since

-- name: reasoned
UPDATE outbox SET reason = ?2 WHERE event_no = ?1

-- name: alone
UPDATE outbox SET alone_as = ?2, reason = ?3 WHERE event_no = ?1 AND state = 'waiting'

-- name: aside
UPDATE outbox SET state = 'parked', reason = ?2 WHERE event_no = ?1

-- name: namesake
SELECT EXISTS (
    SELECT 1 FROM account AS a
    CROSS JOIN usage_event AS u ON u.account_no = a.no AND u.transaction_id = ?3
    WHERE a.meter = ?2 AND a.customer <> ?1
)

-- name: dead
UPDATE outbox SET state = 'dead', reason = ?2 WHERE event_no = ?1

-- name: account_parked
UPDATE service_account SET parked_reason = ?2 WHERE account_no = ?1

-- name: outbox_parked
UPDATE outbox SET state = 'parked'
WHERE event_no BETWEEN ?1 * 4294967296 AND ?1 * 4294967296 + 4294967295 AND +state = 'waiting'

-- name: put_aside
SELECT o.event_no, o.account_no, o.state
FROM outbox AS o
JOIN account AS a ON a.no = o.account_no
JOIN usage_event AS u ON u.no = o.event_no
WHERE o.state <> 'waiting' AND (?1 IS NULL OR a.customer = ?1) AND (?2 IS NULL OR a.meter = ?2)
    AND (?3 IS NULL OR u.transaction_id = ?3)

-- name: revived
UPDATE outbox SET state = 'waiting', failing_since = NULL, not_before = 0 WHERE event_no = ?1

-- name: unparked
UPDATE outbox SET state = 'waiting', failing_since = NULL
WHERE event_no BETWEEN ?1 * 4294967296 AND ?1 * 4294967296 + 4294967295 AND state = 'parked'
RETURNING event_no

-- name: account_unparked
UPDATE service_account SET parked_reason = NULL, failures = 0, next_try_at = 0 WHERE account_no = ?1

-- name: netted
UPDATE outbox SET amount = amount - ?3, not_before = 0
WHERE event_no = (SELECT no FROM usage_event WHERE account_no = ?1 AND transaction_id = ?2) AND attempts = 0
RETURNING event_no, amount

-- name: corrected
UPDATE service_account SET corrected = corrected + ?2 WHERE account_no = ?1

-- name: known_now
UPDATE outbox SET not_before = 0
WHERE event_no = (SELECT no FROM usage_event WHERE account_no = ?1 AND transaction_id = ?2)

-- name: owed_back
INSERT INTO outbox (event_no, account_no, amount, state, attempts, first_tried_at, reason)
SELECT no, account_no, 0, 'dead', 1, ?3, ?4 FROM usage_event WHERE account_no = ?1 AND transaction_id = ?2

-- name: asked_at
SELECT s.asked_at FROM account AS a JOIN service_account AS s ON s.account_no = a.no WHERE a.customer = ?1 AND a.meter = ?2

-- name: undelivered
SELECT
    o.event_no, a.customer, a.meter, o.state, o.amount, o.attempts, o.reference,
    CASE WHEN o.state = 'parked' THEN coalesce(o.reason, s.parked_reason) ELSE o.reason END, max(o.not_before, s.next_try_at),
    u.created_at, u.transaction_id, u.amount, u.basis, u.kind, u.hold_id, u.is_unlimited, u.is_late, u.request_id, u.attempts,
    u.price_slug, u.parent, u.properties, u.has_usage, u.model, u.endpoint, u.service_tier, u.input_tokens, u.cached_input_tokens,
    u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.audio_tokens, u.seconds, u.images, u.characters
FROM outbox AS o
JOIN usage_event AS u ON u.no = o.event_no
JOIN account AS a ON a.no = o.account_no
JOIN service_account AS s ON s.account_no = o.account_no
WHERE o.event_no > ?1 AND (?2 IS NULL OR a.customer = ?2) AND (?3 IS NULL OR a.meter = ?3) AND (?4 IS NULL OR o.state = ?4)
ORDER BY o.event_no LIMIT ?5

-- name: undelivered_counts
SELECT o.state, count(*), min(u.created_at) FROM outbox AS o JOIN usage_event AS u ON u.no = o.event_no GROUP BY o.state
