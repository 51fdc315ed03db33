-- Locks, and the ways that take many steps at once. A transaction locks first and acts in its next statement, which therefore sees
-- everything that those it waited for have committed. Locks are taken in the order of accounts' numbers, so that no two wait for each other.

-- name: settings
-- $1: whether what is committed must survive a power loss. A session or server that is set to less does not lower that. $2 and $3: how
-- long to wait for a lock, and for a statement; of a session of our own they are known.
SELECT
    set_config(
        'synchronous_commit',
        CASE
            WHEN NOT $1::boolean THEN 'off'
            WHEN current_setting('synchronous_commit') = 'off' THEN 'on'
            ELSE current_setting('synchronous_commit')
        END,
        true
    ),
    CASE WHEN $2::text IS NOT NULL THEN set_config('lock_timeout', $2, true) END,
    CASE WHEN $3::text IS NOT NULL THEN set_config('statement_timeout', $3, true) END

-- name: lock_accounts
SELECT a.no, a.customer, a.meter FROM metered_ai.account AS a
WHERE (a.customer, a.meter) IN (SELECT i.customer, i.meter FROM unnest($1::text[], $2::text[]) AS i (customer, meter))
ORDER BY a.no FOR NO KEY UPDATE

-- name: lock_customers
SELECT a.no, a.customer, a.meter FROM metered_ai.account AS a WHERE a.customer = ANY ($1::text[])
ORDER BY a.no FOR NO KEY UPDATE

-- name: lock_numbers
SELECT a.no, a.customer, a.meter FROM metered_ai.account AS a WHERE a.no = ANY ($1::bigint[])
ORDER BY a.no FOR NO KEY UPDATE SKIP LOCKED
