-- What a ledger gets when it is bound to a service. These triggers write the outbox in the same transaction as the usage event, whoever
-- writes that and from wherever, also a process that has had the ledger open since before; and a ledger without a service pays nothing
-- for it.

CREATE TRIGGER service_account_of_account AFTER INSERT ON account
BEGIN
    INSERT INTO service_account (account_no) VALUES (new.no);
END;

-- An orphan's charge waits for an hour, because the truth may come after all. Where the account is parked, the event is, too.
CREATE TRIGGER outbox_of_event AFTER INSERT ON usage_event WHEN new.amount > 0
BEGIN
    INSERT INTO outbox (event_no, account_no, amount, state, not_before, reference)
    SELECT
        new.no, new.account_no, new.amount, CASE WHEN s.parked_reason IS NULL THEN 'waiting' ELSE 'parked' END,
        CASE WHEN new.kind = 'expired' THEN new.created_at + 3600000000 ELSE 0 END,
        (
            SELECT r.reference FROM service_reference AS r
            WHERE r.account_no = new.account_no AND r.since <= coalesce(
                (SELECT h.placed_at FROM open_hold AS h WHERE h.account_no = new.account_no AND h.hold_id = new.hold_id),
                (SELECT e.placed_at FROM ended_hold AS e WHERE e.account_no = new.account_no AND e.hold_id = new.hold_id),
                new.created_at
            )
            ORDER BY r.since DESC LIMIT 1
        )
    FROM service_account AS s WHERE s.account_no = new.account_no;
END;
