-- Locks, and the ways that take many steps at once. A transaction locks first and acts in its next statement, which therefore sees
-- everything that those it waited for have committed. Locks are taken in the order of accounts' numbers, so that no two wait for each other.
-- What is looked up for each step is asked for by LATERAL … LIMIT 1 or by a subselect in SELECT: so each is one probe of an index, whatever
-- the planner believes of a table that was empty a moment ago, or of a customer who has a million events.

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

-- name: hold_locks
-- All accounts of these customers, whose open holds are counted together. What was locked is noted for the next statement of the
-- transaction: an account that comes into being in between is none of it.
SELECT
    set_config('metered_ai_step.locked', coalesce(string_agg(l.no::text, ','), ''), true),
    set_config('synchronous_commit', CASE WHEN NOT $2::boolean THEN 'off' WHEN current_setting('synchronous_commit') = 'off' THEN 'on'
        ELSE current_setting('synchronous_commit') END, true)
FROM (
    SELECT a.no FROM metered_ai.account AS a WHERE a.customer = ANY ($1::text[]) ORDER BY a.no FOR NO KEY UPDATE
) AS l

-- name: hold_locks_free
-- The same, without those that somebody has locked.
SELECT
    set_config('metered_ai_step.locked', coalesce(string_agg(l.no::text, ','), ''), true),
    set_config('synchronous_commit', CASE WHEN NOT $2::boolean THEN 'off' WHEN current_setting('synchronous_commit') = 'off' THEN 'on'
        ELSE current_setting('synchronous_commit') END, true)
FROM (
    SELECT a.no FROM metered_ai.account AS a
    WHERE a.customer = ANY ($1::text[])
        -- One that is locked keeps all of its customer's out: their holds could not be counted.
        AND NOT EXISTS (
            SELECT 1 FROM metered_ai.account AS c WHERE c.customer = a.customer AND c.no <> a.no
        )
    ORDER BY a.no FOR NO KEY UPDATE SKIP LOCKED
) AS l

-- name: end_locks
SELECT
    set_config('metered_ai_step.locked', coalesce(string_agg(l.no::text, ','), ''), true),
    set_config('synchronous_commit', CASE WHEN NOT $3::boolean THEN 'off' WHEN current_setting('synchronous_commit') = 'off' THEN 'on'
        ELSE current_setting('synchronous_commit') END, true)
FROM (
    SELECT a.no FROM metered_ai.account AS a
    WHERE (a.customer, a.meter) IN (SELECT i.customer, i.meter FROM unnest($1::text[], $2::text[]) AS i (customer, meter))
    ORDER BY a.no FOR NO KEY UPDATE
) AS l

-- name: end_locks_free
-- The same, without those that somebody has locked.
SELECT
    set_config('metered_ai_step.locked', coalesce(string_agg(l.no::text, ','), ''), true),
    set_config('synchronous_commit', CASE WHEN NOT $3::boolean THEN 'off' WHEN current_setting('synchronous_commit') = 'off' THEN 'on'
        ELSE current_setting('synchronous_commit') END, true)
FROM (
    SELECT a.no FROM metered_ai.account AS a
    WHERE (a.customer, a.meter) IN (SELECT i.customer, i.meter FROM unnest($1::text[], $2::text[]) AS i (customer, meter))
    ORDER BY a.no FOR NO KEY UPDATE SKIP LOCKED
) AS l

-- name: all_locks
-- Those of ends ($1, $2) and those of holds ($4).
SELECT
    set_config('metered_ai_step.locked', coalesce(string_agg(l.no::text, ','), ''), true),
    set_config('synchronous_commit', CASE WHEN NOT $3::boolean THEN 'off' WHEN current_setting('synchronous_commit') = 'off' THEN 'on'
        ELSE current_setting('synchronous_commit') END, true)
FROM (
    SELECT a.no FROM metered_ai.account AS a
    WHERE a.no IN (
        SELECT e.no FROM unnest($1::text[], $2::text[]) AS i (customer, meter)
        JOIN metered_ai.account AS e ON e.customer = i.customer AND e.meter = i.meter
        UNION
        SELECT h.no FROM metered_ai.account AS h WHERE h.customer = ANY ($4::text[])
    )
    ORDER BY a.no FOR NO KEY UPDATE
) AS l

-- name: place
-- $1 is a test's clock, $16 the service that the ledger was opened for: where it is bound to another one, nothing is taken. Of each account's holds as many are taken as fit one after the other; what is left goes its way singly, and
-- is told there why. One UPDATE for each account decides, on the row as it is.
WITH clock AS MATERIALIZED (
    SELECT coalesce($1::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) AS now
),
asked AS (
    SELECT
        i.*, clock.now, a.no, a.is_unlimited, a.credit_limit - a.used - a.held AS free, a.unlimited_held,
        o.no AS owner_no, o.lease_until,
        (SELECT sum(c.open_holds) FROM metered_ai.account AS c WHERE c.customer = i.customer) AS open_holds,
        (SELECT h.hold_id FROM metered_ai.open_hold AS h WHERE h.account_no = a.no AND h.hold_id = i.hold_id) AS is_open,
        (SELECT e.hold_id FROM metered_ai.ended_hold AS e WHERE e.account_no = a.no AND e.hold_id = i.hold_id) AS has_ended,
        (SELECT k.hold_id FROM metered_ai.usage_key AS k WHERE k.hold_id = i.hold_id AND k.account_no = a.no) AS is_settled
    FROM unnest(
        $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::bigint[], $8::bigint[], $9::text[], $10::text[], $11::text[],
        $12::text[], $13::text[], $14::text[], $15::bigint[]
    ) WITH ORDINALITY AS i (
        customer, meter, hold_id, amount, owner, lease, max_call, on_unknown, parent, endpoint, model, price_slug, properties, max_holds,
        position
    )
    CROSS JOIN clock
    CROSS JOIN LATERAL (SELECT * FROM metered_ai.account AS c WHERE c.customer = i.customer AND c.meter = i.meter LIMIT 1) AS a
    LEFT JOIN LATERAL (SELECT * FROM metered_ai.owner AS c WHERE c.id = i.owner LIMIT 1) AS o ON true
    WHERE a.no = ANY (string_to_array(current_setting('metered_ai_step.locked'), ',')::bigint[])
        AND (a.next_expiry IS NULL OR a.next_expiry > clock.now)
        -- A lease of which a third is gone is extended first.
        AND (i.owner IS NULL OR o.lease_until >= clock.now + i.lease * 2 / 3)
        AND NOT EXISTS (SELECT 1 FROM metered_ai.service AS b WHERE b.name IS DISTINCT FROM $16::text)
),
counted AS (
    SELECT
        asked.*, sum(amount) OVER (PARTITION BY no ORDER BY position) AS wanted,
        row_number() OVER (PARTITION BY customer ORDER BY position) AS nth
    FROM asked WHERE is_open IS NULL AND has_ended IS NULL AND is_settled IS NULL
),
fitting AS (
    SELECT * FROM counted
    WHERE open_holds + nth <= max_holds
        AND (amount = 0 OR CASE WHEN is_unlimited = 1 THEN unlimited_held + wanted <= 4611686018427387904 ELSE wanted <= free END)
),
reserved AS (
    UPDATE metered_ai.account AS a SET
        held = a.held + s.limited, unlimited_held = a.unlimited_held + s.unlimited, open_holds = a.open_holds + s.holds
    FROM (
        SELECT
            no, coalesce(sum(amount) FILTER (WHERE is_unlimited = 0), 0)::bigint AS limited,
            coalesce(sum(amount) FILTER (WHERE is_unlimited = 1), 0)::bigint AS unlimited, count(*) AS holds
        FROM fitting GROUP BY no
    ) AS s
    WHERE a.no = s.no AND (s.limited = 0 OR a.credit_limit - a.used - a.held >= s.limited)
    RETURNING a.no
),
placed AS (
    INSERT INTO metered_ai.open_hold (
        account_no, hold_id, amount, is_unlimited, is_repeat, placed_at, ends_at, on_unknown, owner_no, parent, endpoint, model,
        price_slug, properties
    )
    SELECT
        f.no, f.hold_id, f.amount, f.is_unlimited, 0, f.now, f.now + f.max_call, f.on_unknown, f.owner_no, f.parent, f.endpoint, f.model,
        f.price_slug, f.properties
    FROM fitting AS f JOIN reserved AS r ON r.no = f.no
)
SELECT f.position, f.is_unlimited, f.now, f.lease_until FROM fitting AS f JOIN reserved AS r ON r.no = f.no

-- name: settle
-- What is usual: the hold is open, its event is new, nothing expires. The rest goes its way singly.
WITH clock AS MATERIALIZED (
    SELECT coalesce($1::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) AS now
),
asked AS (
    SELECT
        i.*, clock.now, a.no, a.used, a.unlimited_used, a.events, a.last_event_at, h.amount AS held, h.is_unlimited,
        h.placed_at, h.place AS hold_place, coalesce(h.transaction_id, i.transaction_id) AS name,
        (
            SELECT k.event_no FROM metered_ai.usage_key AS k
            WHERE k.account_no = a.no AND k.transaction_id = coalesce(h.transaction_id, i.transaction_id)
        ) AS twin_no
    FROM unnest(
        $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[], $11::bigint[],
        $12::text[], $13::text[], $14::text[], $15::smallint[], $16::text[], $17::text[], $18::text[], $19::bigint[], $20::bigint[],
        $21::bigint[], $22::bigint[], $23::bigint[], $24::bigint[], $25::double precision[], $26::bigint[], $27::bigint[]
    ) WITH ORDINALITY AS i (
        customer, meter, hold_id, amount, transaction_id, basis, kind, fingerprint, request_id, attempts,
        price_slug, parent, properties, has_usage, model, endpoint, service_tier, input_tokens, cached_input_tokens,
        cache_write_tokens, output_tokens, reasoning_tokens, audio_tokens, seconds, images, characters, position
    )
    CROSS JOIN clock
    CROSS JOIN LATERAL (SELECT * FROM metered_ai.account AS c WHERE c.customer = i.customer AND c.meter = i.meter LIMIT 1) AS a
    CROSS JOIN LATERAL (
        SELECT c.ctid AS place, c.* FROM metered_ai.open_hold AS c WHERE c.account_no = a.no AND c.hold_id = i.hold_id LIMIT 1
    ) AS h
    WHERE a.no = ANY (string_to_array(current_setting('metered_ai_step.locked'), ',')::bigint[])
        AND h.is_repeat = 0
        AND a.kept = 0
        AND (a.next_expiry IS NULL OR a.next_expiry > clock.now)
),
counted AS (
    SELECT
        asked.*, row_number() OVER (PARTITION BY no, name ORDER BY position) AS twin,
        sum(amount) OVER (PARTITION BY no ORDER BY position) AS more
    FROM asked WHERE twin_no IS NULL
),
-- Of two settles under one name the second is not usual. Times grow strictly within an account.
fitting AS (
    SELECT
        counted.*, row_number() OVER (PARTITION BY no ORDER BY position) AS nth,
        greatest(now, last_event_at + 1) + row_number() OVER (PARTITION BY no ORDER BY position) - 1 AS created_at
    FROM counted WHERE twin = 1 AND greatest(used, unlimited_used) + more <= 4611686018427387904
),
-- By where the row lies, which nothing changes while its account is locked.
ended AS (
    DELETE FROM metered_ai.open_hold AS h USING fitting AS f WHERE h.ctid = f.hold_place AND h.account_no = f.no
),
named AS (
    INSERT INTO metered_ai.usage_key (account_no, transaction_id, hold_id, event_no, created_at)
    SELECT no, name, hold_id, (no << 32) + events + nth, created_at FROM fitting
),
written AS (
    INSERT INTO metered_ai.usage_event (
        no, account_no, created_at, transaction_id, amount, basis, kind, is_unlimited, is_late, has_usage,
        hold_id, fingerprint, request_id, attempts, price_slug, parent, properties,
        model, endpoint, service_tier, input_tokens, cached_input_tokens, cache_write_tokens,
        output_tokens, reasoning_tokens, audio_tokens, seconds, images, characters
    )
    SELECT
        (no << 32) + events + nth, no, created_at, name, amount, basis, kind, is_unlimited, 0, has_usage,
        hold_id, fingerprint, request_id, attempts, price_slug, parent, properties,
        model, endpoint, service_tier, input_tokens, cached_input_tokens, cache_write_tokens,
        output_tokens, reasoning_tokens, audio_tokens, seconds, images, characters
    FROM fitting
),
-- Here and not by the trigger, for which the hold is gone already. Without a service nobody has a row there.
told AS (
    INSERT INTO metered_ai.outbox (event_no, account_no, amount, state, reference)
    SELECT
        (f.no << 32) + f.events + f.nth, f.no, f.amount, CASE WHEN s.parked_reason IS NULL THEN 'waiting' ELSE 'parked' END,
        (
            SELECT r.reference FROM metered_ai.service_reference AS r
            WHERE r.account_no = f.no AND r.since <= f.placed_at ORDER BY r.since DESC LIMIT 1
        )
    FROM fitting AS f
    CROSS JOIN LATERAL (SELECT * FROM metered_ai.service_account AS c WHERE c.account_no = f.no LIMIT 1) AS s
    WHERE f.amount > 0
),
used AS (
    UPDATE metered_ai.account AS a SET
        used = a.used + s.limited_used, held = a.held - s.limited_held, unlimited_used = a.unlimited_used + s.unlimited_used,
        unlimited_held = a.unlimited_held - s.unlimited_held, open_holds = a.open_holds - s.holds, events = a.events + s.holds,
        last_event_at = s.last_event_at
    FROM (
        SELECT
            no, coalesce(sum(amount) FILTER (WHERE is_unlimited = 0), 0)::bigint AS limited_used,
            coalesce(sum(held) FILTER (WHERE is_unlimited = 0), 0)::bigint AS limited_held,
            coalesce(sum(amount) FILTER (WHERE is_unlimited = 1), 0)::bigint AS unlimited_used,
            coalesce(sum(held) FILTER (WHERE is_unlimited = 1), 0)::bigint AS unlimited_held,
            count(*) AS holds, max(created_at) AS last_event_at
        FROM fitting GROUP BY no
    ) AS s
    WHERE a.no = s.no
)
SELECT position, name, created_at, is_unlimited FROM fitting

-- name: release
WITH clock AS MATERIALIZED (
    SELECT coalesce($1::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) AS now
),
fitting AS (
    SELECT
        i.*, clock.now, a.no, h.place AS hold_place, h.amount, h.is_unlimited, h.placed_at, h.parent, h.endpoint, h.model, h.price_slug, h.properties
    FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
        WITH ORDINALITY AS i (customer, meter, hold_id, reason, sent, position)
    CROSS JOIN clock
    CROSS JOIN LATERAL (SELECT * FROM metered_ai.account AS c WHERE c.customer = i.customer AND c.meter = i.meter LIMIT 1) AS a
    CROSS JOIN LATERAL (
        SELECT c.ctid AS place, c.* FROM metered_ai.open_hold AS c WHERE c.account_no = a.no AND c.hold_id = i.hold_id LIMIT 1
    ) AS h
    WHERE a.no = ANY (string_to_array(current_setting('metered_ai_step.locked'), ',')::bigint[])
        -- The number of an operation is given back with more care.
        AND h.operation IS NULL
        AND a.kept = 0
        AND (a.next_expiry IS NULL OR a.next_expiry > clock.now)
),
taken AS (
    DELETE FROM metered_ai.open_hold AS h USING fitting AS f WHERE h.ctid = f.hold_place AND h.account_no = f.no
),
ended AS (
    INSERT INTO metered_ai.ended_hold (
        account_no, hold_id, state, amount, is_unlimited, is_repeat, placed_at, ended_at, reason, sent,
        parent, endpoint, model, price_slug, properties
    )
    SELECT
        no, hold_id, 'released', amount, is_unlimited, 0, placed_at, now, reason, sent, parent, endpoint, model, price_slug, properties
    FROM fitting
),
given_back AS (
    UPDATE metered_ai.account AS a SET
        held = a.held - s.limited, unlimited_held = a.unlimited_held - s.unlimited, open_holds = a.open_holds - s.holds
    FROM (
        SELECT
            no, coalesce(sum(amount) FILTER (WHERE is_unlimited = 0), 0)::bigint AS limited,
            coalesce(sum(amount) FILTER (WHERE is_unlimited = 1), 0)::bigint AS unlimited, count(*) AS holds
        FROM fitting GROUP BY no
    ) AS s
    WHERE a.no = s.no
)
SELECT position FROM fitting
