-- What verify recomputes, per account.

-- name: file
-- Pages are the server's to check; what a failed CREATE INDEX CONCURRENTLY leaves behind is not.
SELECT 'the index ' || i.indexrelid::regclass || ' is invalid'
FROM pg_index AS i WHERE NOT i.indisvalid AND i.indrelid = 'metered_ai.usage_event'::regclass LIMIT 10

-- name: references
SELECT 'usage_event' WHERE EXISTS (
    SELECT 1 FROM metered_ai.usage_event AS u WHERE NOT EXISTS (SELECT 1 FROM metered_ai.account AS a WHERE a.no = u.account_no)
)
UNION ALL
SELECT 'open_hold' WHERE EXISTS (
    SELECT 1 FROM metered_ai.open_hold AS h WHERE NOT EXISTS (SELECT 1 FROM metered_ai.account AS a WHERE a.no = h.account_no)
)
UNION ALL
SELECT 'ended_hold' WHERE EXISTS (
    SELECT 1 FROM metered_ai.ended_hold AS h WHERE NOT EXISTS (SELECT 1 FROM metered_ai.account AS a WHERE a.no = h.account_no)
)

-- name: accounts
SELECT no FROM metered_ai.account WHERE no > $1 ORDER BY no LIMIT $2

-- name: account
SELECT
    no, credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry,
    events, last_event_at, customer, meter
FROM metered_ai.account WHERE no = $1

-- name: event_sums
SELECT
    coalesce(sum(amount) FILTER (WHERE is_unlimited = 0), 0)::bigint, coalesce(sum(amount) FILTER (WHERE is_unlimited = 1), 0)::bigint,
    count(*), max(created_at)
FROM metered_ai.usage_event WHERE no BETWEEN $1 AND $2

-- name: hold_sums
SELECT
    coalesce(sum(amount) FILTER (WHERE is_unlimited = 0), 0)::bigint, coalesce(sum(amount) FILTER (WHERE is_unlimited = 1), 0)::bigint, count(*)
FROM metered_ai.open_hold WHERE account_no = $1

-- name: doubt
SELECT count(*), coalesce(sum(amount), 0)::bigint FROM metered_ai.ended_hold WHERE account_no = $1 AND sent = 'unknown' AND state IN ('released', 'expired')

-- name: grants
SELECT no, amount, expires_at, spent, expired, revoked, kept, is_over, grant_id FROM metered_ai.credit_grant WHERE account_no = $1 ORDER BY no

-- name: doubled_events
-- Every event has its own name in usage_key, and every name its event.
SELECT transaction_id FROM metered_ai.usage_event WHERE no BETWEEN ($1::bigint << 32) + 1 AND ($1::bigint << 32) + 4294967295
GROUP BY transaction_id HAVING count(*) > 1
UNION ALL
SELECT coalesce(u.transaction_id, k.transaction_id)
FROM (
    SELECT no, transaction_id, created_at FROM metered_ai.usage_event
    WHERE no BETWEEN ($1::bigint << 32) + 1 AND ($1::bigint << 32) + 4294967295
) AS u
FULL JOIN (SELECT * FROM metered_ai.usage_key WHERE account_no = $1) AS k
    ON (k.event_no, k.created_at, k.transaction_id) = (u.no, u.created_at, u.transaction_id)
WHERE u.no IS NULL OR k.event_no IS NULL

-- name: events_without_hold
SELECT transaction_id, kind FROM metered_ai.usage_event WHERE no BETWEEN $1 AND $2 AND hold_id IS NULL AND kind <> 'record'

-- name: events_out_of_order
SELECT e.transaction_id FROM metered_ai.usage_event AS e JOIN metered_ai.usage_event AS p ON p.no = e.no - 1
WHERE e.no BETWEEN $1 + 1 AND $2 AND e.created_at <= p.created_at

-- name: holds_open_and_ended
SELECT h.hold_id FROM metered_ai.open_hold AS h JOIN metered_ai.ended_hold AS e ON e.account_no = h.account_no AND e.hold_id = h.hold_id WHERE h.account_no = $1

-- name: open_holds_with_events
SELECT h.hold_id, 'open', count(*)
FROM metered_ai.open_hold AS h
JOIN metered_ai.usage_key AS k ON k.hold_id = h.hold_id AND k.account_no = h.account_no
WHERE h.account_no = $1 GROUP BY h.hold_id

-- name: ended_holds_with_wrong_events
SELECT e.hold_id, e.state, count(k.event_no) AS events
FROM metered_ai.ended_hold AS e
LEFT JOIN metered_ai.usage_key AS k ON k.hold_id = e.hold_id AND k.account_no = e.account_no
WHERE e.account_no = $1
GROUP BY e.hold_id, e.state HAVING count(k.event_no) <> (e.state IN ('charged', 'settled'))::int

-- name: service_sums
SELECT
    s.acknowledged, s.corrected,
    (SELECT coalesce(sum(d.amount), 0)::bigint FROM metered_ai.delivery AS d WHERE d.event_no BETWEEN $2 AND $3),
    (SELECT coalesce(sum(o.amount), 0)::bigint FROM metered_ai.outbox AS o WHERE o.event_no BETWEEN $2 AND $3)
FROM metered_ai.service_account AS s WHERE s.account_no = $1

-- name: events_untold
SELECT u.transaction_id FROM metered_ai.usage_event AS u
WHERE u.no BETWEEN $1 AND $2 AND u.amount > 0
    AND NOT EXISTS (SELECT 1 FROM metered_ai.outbox AS o WHERE o.event_no = u.no)
    AND NOT EXISTS (SELECT 1 FROM metered_ai.delivery AS d WHERE d.event_no = u.no)

-- name: events_told_and_untold
SELECT u.transaction_id
FROM metered_ai.outbox AS o
JOIN metered_ai.delivery AS d ON d.event_no = o.event_no
JOIN metered_ai.usage_event AS u ON u.no = o.event_no
WHERE o.event_no BETWEEN $1 AND $2
