-- What reports read. Each statement stands under its name; pages begin behind the key that the last one ended with.

-- name: accounts
SELECT
    no, credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry,
    events, last_event_at, customer, meter, s.heard IS NOT NULL, s.limit_estimate
FROM metered_ai.account LEFT JOIN metered_ai.service_account AS s ON s.account_no = no WHERE no > $1 ORDER BY no LIMIT $2

-- name: accounts_of_customer
SELECT
    no, credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry,
    events, last_event_at, customer, meter, s.heard IS NOT NULL, s.limit_estimate
FROM metered_ai.account LEFT JOIN metered_ai.service_account AS s ON s.account_no = no WHERE customer = $1 AND meter > $2 ORDER BY meter LIMIT $3

-- name: account
SELECT
    no, credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry,
    events, last_event_at, customer, meter, s.heard IS NOT NULL, s.limit_estimate
FROM metered_ai.account LEFT JOIN metered_ai.service_account AS s ON s.account_no = no WHERE customer = $1 AND meter = $2

-- name: grants_with_remainder
SELECT no, amount, expires_at, spent, expired, revoked, kept, is_over
FROM metered_ai.credit_grant WHERE account_no = $1 AND has_remainder = 1 ORDER BY no

-- name: limited_holds
SELECT placed_at, amount FROM metered_ai.open_hold WHERE account_no = $1 AND is_unlimited = 0 AND amount > 0

-- name: event
SELECT
    u.created_at, u.transaction_id, u.amount, u.basis, u.kind, u.hold_id, u.is_unlimited, u.is_late, u.request_id, u.attempts,
    u.price_slug, u.parent, u.properties, u.has_usage, u.model, u.endpoint, u.service_tier, u.input_tokens, u.cached_input_tokens,
    u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.audio_tokens, u.seconds, u.images, u.characters,
    coalesce(o.reference, d.reference), d.details
FROM metered_ai.usage_event AS u
LEFT JOIN metered_ai.outbox AS o ON o.event_no = u.no
LEFT JOIN metered_ai.delivery AS d ON d.event_no = u.no
WHERE (u.no, u.created_at) = (
    SELECT k.event_no, k.created_at
    FROM metered_ai.account AS a
    JOIN metered_ai.usage_key AS k ON k.account_no = a.no
    WHERE a.customer = $1 AND a.meter = $2 AND k.transaction_id = $3
)

-- name: event_time
SELECT created_at FROM metered_ai.usage_event WHERE no = $1

-- name: events
SELECT
    u.created_at, u.transaction_id, u.amount, u.basis, u.kind, u.hold_id, u.is_unlimited, u.is_late, u.request_id, u.attempts,
    u.price_slug, u.parent, u.properties, u.has_usage, u.model, u.endpoint, u.service_tier, u.input_tokens, u.cached_input_tokens,
    u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.audio_tokens, u.seconds, u.images, u.characters,
    coalesce(o.reference, d.reference), d.details
FROM metered_ai.usage_event AS u
LEFT JOIN metered_ai.outbox AS o ON o.event_no = u.no
LEFT JOIN metered_ai.delivery AS d ON d.event_no = u.no
WHERE u.no BETWEEN $1 AND $2 ORDER BY u.no

-- name: usage
SELECT
    CASE WHEN $3::boolean THEN to_char(to_timestamp(created_at / 1000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD') END AS day,
    CASE WHEN $4::boolean THEN model END AS model,
    count(*) FILTER (WHERE kind <> 'correction'),
    -- In halves, because a sum beyond 64 bits would be an error.
    sum(amount >> 32)::bigint, sum(amount & 4294967295)::bigint,
    sum(input_tokens >> 32)::bigint, sum(input_tokens & 4294967295)::bigint,
    sum(output_tokens >> 32)::bigint, sum(output_tokens & 4294967295)::bigint
FROM metered_ai.usage_event WHERE no BETWEEN $1 AND $2 GROUP BY 1, 2

-- name: open_holds
SELECT
    h.hold_id, h.amount, 'open', h.placed_at,
    CASE WHEN o.lease_until IS NULL THEN h.ends_at ELSE least(h.ends_at, o.lease_until) END, NULL, NULL, NULL,
    h.transaction_id, h.endpoint, h.model, h.parent, h.is_unlimited, h.is_repeat
FROM metered_ai.open_hold AS h
LEFT JOIN metered_ai.owner AS o ON o.no = h.owner_no
WHERE h.account_no = $1 AND h.hold_id > $2 ORDER BY h.hold_id LIMIT $3

-- name: ended_holds
SELECT
    hold_id, amount, state, placed_at, NULL, ended_at, reason, sent,
    transaction_id, endpoint, model, parent, is_unlimited, is_repeat
FROM metered_ai.ended_hold WHERE account_no = $1 AND hold_id > $2 AND state IN ('released', 'expired', 'charged') ORDER BY hold_id LIMIT $3

-- name: grants
SELECT no, grant_id, amount, created_at, expires_at, spent, expired, revoked
FROM metered_ai.credit_grant WHERE account_no = $1 AND no > $2 ORDER BY no LIMIT $3

-- name: orphans
SELECT h.account_no, h.hold_id
FROM metered_ai.open_hold AS h
LEFT JOIN metered_ai.owner AS o ON o.no = h.owner_no
WHERE (h.account_no, h.hold_id) > ($1, $2)
    AND (h.ends_at <= $3 OR (h.owner_no IS NOT NULL AND coalesce(o.lease_until, 0) <= $3))
ORDER BY h.account_no, h.hold_id LIMIT $4

-- name: old_tombstone
SELECT 1 FROM metered_ai.ended_hold WHERE state = 'tombstone' AND ended_at < $1 LIMIT 1

-- name: clock
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
