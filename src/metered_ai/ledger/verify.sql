-- What verify recomputes, per account.

-- name: file
PRAGMA quick_check(10)

-- name: references
PRAGMA foreign_key_check

-- name: accounts
SELECT no FROM account WHERE no > ?1 ORDER BY no LIMIT ?2

-- name: account
SELECT
    no, credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry,
    events, last_event_at, customer, meter
FROM account WHERE no = ?1

-- name: event_sums
SELECT
    coalesce(sum(amount) FILTER (WHERE NOT is_unlimited), 0), coalesce(sum(amount) FILTER (WHERE is_unlimited), 0),
    count(*), max(created_at)
FROM usage_event WHERE no BETWEEN ?1 AND ?2

-- name: hold_sums
SELECT
    coalesce(sum(amount) FILTER (WHERE NOT is_unlimited), 0), coalesce(sum(amount) FILTER (WHERE is_unlimited), 0), count(*)
FROM open_hold WHERE account_no = ?1

-- name: doubt
SELECT count(*), coalesce(sum(amount), 0) FROM ended_hold WHERE account_no = ?1 AND sent = 'unknown' AND state IN ('released', 'expired')

-- name: grants
SELECT no, amount, expires_at, spent, expired, revoked, kept, is_over, grant_id FROM credit_grant WHERE account_no = ?1 ORDER BY no

-- name: doubled_events
SELECT transaction_id FROM usage_event WHERE account_no = ?1 GROUP BY transaction_id HAVING count(*) > 1

-- name: events_without_hold
SELECT transaction_id, kind FROM usage_event WHERE no BETWEEN ?1 AND ?2 AND hold_id IS NULL AND kind <> 'record'

-- name: events_out_of_order
SELECT e.transaction_id FROM usage_event AS e JOIN usage_event AS p ON p.no = e.no - 1
WHERE e.no BETWEEN ?1 + 1 AND ?2 AND e.created_at <= p.created_at

-- name: holds_open_and_ended
SELECT h.hold_id FROM open_hold AS h JOIN ended_hold AS e ON e.account_no = h.account_no AND e.hold_id = h.hold_id WHERE h.account_no = ?1

-- name: open_holds_with_events
SELECT h.hold_id, 'open', count(*)
FROM open_hold AS h
JOIN usage_event AS u ON u.hold_id = h.hold_id AND u.account_no = h.account_no AND u.hold_id IS NOT NULL AND u.kind <> 'correction'
WHERE h.account_no = ?1 GROUP BY h.hold_id

-- name: ended_holds_with_wrong_events
SELECT e.hold_id, e.state, count(u.no) AS events
FROM ended_hold AS e
LEFT JOIN usage_event AS u ON u.hold_id = e.hold_id AND u.account_no = e.account_no AND u.hold_id IS NOT NULL AND u.kind <> 'correction'
WHERE e.account_no = ?1
GROUP BY e.hold_id HAVING events <> (e.state IN ('charged', 'settled'))

-- name: service_sums
SELECT
    s.acknowledged, s.corrected,
    (SELECT coalesce(sum(d.amount), 0) FROM delivery AS d WHERE d.event_no BETWEEN ?2 AND ?3),
    (SELECT coalesce(sum(o.amount), 0) FROM outbox AS o WHERE o.event_no BETWEEN ?2 AND ?3)
FROM service_account AS s WHERE s.account_no = ?1

-- name: events_untold
SELECT u.transaction_id FROM usage_event AS u
WHERE u.no BETWEEN ?1 AND ?2 AND u.amount > 0
    AND NOT EXISTS (SELECT 1 FROM outbox AS o WHERE o.event_no = u.no) AND NOT EXISTS (SELECT 1 FROM delivery AS d WHERE d.event_no = u.no)

-- name: events_told_and_untold
SELECT u.transaction_id FROM outbox AS o JOIN delivery AS d ON d.event_no = o.event_no JOIN usage_event AS u ON u.no = o.event_no
WHERE o.event_no BETWEEN ?1 AND ?2
