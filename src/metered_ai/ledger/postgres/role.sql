-- What a role of an application needs, and no more: it adds usage events and grants, and can change or remove neither.
-- Run by the schema's owner, after each migration; a second time changes nothing. The names stand for the real ones.
GRANT USAGE ON SCHEMA metered_ai TO metered_ai_application;
GRANT SELECT ON metered_ai.migration TO metered_ai_application;
GRANT SELECT, INSERT ON metered_ai.usage_event, metered_ai.usage_key TO metered_ai_application;
GRANT SELECT, INSERT, UPDATE (spent, expired, revoked, kept, is_over, has_remainder) ON metered_ai.credit_grant TO metered_ai_application;
GRANT SELECT, INSERT (customer, meter),
    UPDATE (
        credit_limit, used, held, unlimited_used, unlimited_held, is_unlimited, open_holds, allocated, kept, next_expiry, events,
        last_event_at
    )
    ON metered_ai.account TO metered_ai_application;
GRANT SELECT, INSERT, UPDATE, DELETE
    ON metered_ai.owner, metered_ai.open_hold, metered_ai.ended_hold, metered_ai.operation_number TO metered_ai_application;
GRANT SELECT, INSERT, UPDATE (answered_at) ON metered_ai.service TO metered_ai_application;
GRANT SELECT, INSERT, UPDATE ON metered_ai.service_account TO metered_ai_application;
GRANT SELECT, INSERT ON metered_ai.service_reference, metered_ai.delivery TO metered_ai_application;
GRANT SELECT, INSERT, UPDATE, DELETE ON metered_ai.outbox TO metered_ai_application;
GRANT EXECUTE ON FUNCTION metered_ai.lock_accounts(), metered_ai.keep_outbox() TO metered_ai_application;
