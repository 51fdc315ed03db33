"""Credits given and taken back, unlimited accounts, usage without a hold."""

from __future__ import annotations

import pytest

from ...errors import GrantConflictError
from ...ledger import Ledger
from ...records import MAX_AMOUNT, Grant, Usage
from .common import (
    Clock,
    Contract,
    Numbers,
    billed,
    grant,
    numbers,
    place,
    record,
    release,
    revoke,
    set_unlimited,
    settle,
)

__all__ = ["Grants", "Recording", "Unlimited"]


class Grants(Contract):
    """Giving credits, and taking them back."""

    def test_grant_gives(self, ledger: Ledger, clock: Clock) -> None:
        """A grant raises the limit and is listed as it was returned."""
        until = clock.at(3600)
        first = grant(ledger, 10, "order_42", expires_at=until)

        assert Grant("ada", "calls", "order_42", 10, clock.at(), until) == first
        assert [first] == list(ledger.grants("ada"))
        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_again(self, ledger: Ledger, clock: Clock) -> None:
        """The same grant again gives nothing and returns the first, even if it asks for another expiry."""
        first = grant(ledger, 10)
        clock.advance(5)

        assert first == grant(ledger, 10, expires_at=clock.at(60))
        assert Numbers(10, available=10) == numbers(ledger)
        assert 1 == len(list(ledger.grants()))

    def test_grant_conflict(self, ledger: Ledger) -> None:
        """Another amount under the same id is a GrantConflictError; the first stands."""
        grant(ledger, 10)

        with pytest.raises(GrantConflictError, match="g1"):
            grant(ledger, 11)

        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_ids_belong_to_an_account(self, ledger: Ledger) -> None:
        """The same id for another customer, or on another meter, is another grant."""
        grant(ledger, 1)
        grant(ledger, 2, customer="bob")
        grant(ledger, 3, meter="images")

        assert [1, 2, 3] == sorted(given.amount for given in ledger.grants())

    def test_grant_pays_debt(self, ledger: Ledger) -> None:
        """A debt is paid by the next grant first."""
        record(ledger, "rec_1", 12)
        grant(ledger, 10)
        assert Numbers(10, used=12, debt=2) == numbers(ledger)
        grant(ledger, 5, "g2")

        assert Numbers(15, used=12, available=3) == numbers(ledger)

    def test_grant_revoked(self, ledger: Ledger) -> None:
        """Revoking takes back what is unspent; what was spent becomes debt."""
        grant(ledger, 10)
        record(ledger, "rec_1", 4)
        given = revoke(ledger)

        assert (10, 0) == (given.revoked, given.spent)
        assert Numbers(0, used=4, debt=4) == numbers(ledger)
        assert [given] == list(ledger.grants())

    def test_grant_revoked_unspent(self, ledger: Ledger) -> None:
        """Revoking a grant nobody spent leaves the balance as it was before."""
        grant(ledger, 10)
        grant(ledger, 5, "g2")
        revoke(ledger, "g2")

        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_revoked_twice(self, ledger: Ledger) -> None:
        """Revoking twice takes back once."""
        grant(ledger, 10)
        grant(ledger, 10, "g2")
        first = revoke(ledger)

        assert first == revoke(ledger)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_revoked_is_over(self, ledger: Ledger) -> None:
        """A revoked grant is not given again under its id."""
        grant(ledger, 10)
        revoke(ledger)

        assert 10 == grant(ledger, 10).revoked
        assert Numbers(0) == numbers(ledger)

    def test_grant_revoked_unknown(self, ledger: Ledger) -> None:
        """Revoking a grant that was never given is a ValueError naming it."""
        grant(ledger, 10)

        with pytest.raises(ValueError, match="order_43"):
            revoke(ledger, "order_43")
        with pytest.raises(ValueError, match="g1"):
            revoke(ledger, "g1", customer="bob")

        assert Numbers(10, available=10) == numbers(ledger)

    def test_grant_revoked_while_held(self, ledger: Ledger) -> None:
        """Revoking what a call in flight holds leaves the hold; what it lacks is debt, gone if the hold is released."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        revoke(ledger)
        assert Numbers(0, held=4, debt=4) == numbers(ledger)

        release(ledger, "h1")
        assert Numbers(0) == numbers(ledger)

    def test_grant_revoked_others_take_over(self, ledger: Ledger, clock: Clock) -> None:
        """What a revoked grant had paid is paid by the others, soonest expiry first."""
        grant(ledger, 10, "soon", expires_at=clock.at(50))
        record(ledger, "rec_1", 6)
        grant(ledger, 10, "later", expires_at=clock.at(100))
        grant(ledger, 10, "never")
        revoke(ledger, "soon")
        assert Numbers(20, used=6, available=14) == numbers(ledger)

        clock.advance(100)
        assert Numbers(16, used=6, available=10) == numbers(ledger)

    def test_grant_revoked_with_a_debt(self, ledger: Ledger) -> None:
        """A debt that a revoked grant leaves is paid by the next grant."""
        grant(ledger, 10)
        record(ledger, "rec_1", 10)
        revoke(ledger)
        grant(ledger, 25, "g2")

        assert Numbers(25, used=10, available=15) == numbers(ledger)


class Unlimited(Contract):
    """Accounts that are counted and never refused."""

    def test_unlimited_never_refused(self, ledger: Ledger) -> None:
        """An unlimited account is never refused; its limit and available are None."""
        set_unlimited(ledger)
        hold = place(ledger, "h1", MAX_AMOUNT)

        balance = ledger.balance("ada", "calls")
        assert hold.is_unlimited
        assert (None, None, "unlimited") == (balance.limit, balance.available, balance.level)

    def test_unlimited_counted(self, ledger: Ledger) -> None:
        """What it uses has a counter of its own and spends none of its grants."""
        grant(ledger, 10)
        set_unlimited(ledger)
        place(ledger, "h1", 40)
        event = settle(ledger, "h1", 30, is_unlimited=True).event
        recorded = record(ledger, "rec_1", 5)

        assert event.is_unlimited
        assert recorded.is_unlimited
        assert 35 == ledger.balance("ada", "calls").unlimited_used
        set_unlimited(ledger, is_unlimited=False)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_unlimited_holds_keep_their_mode(self, ledger: Ledger) -> None:
        """A hold is settled in the mode it was placed under, whatever the account is by then."""
        grant(ledger, 10)
        place(ledger, "limited", 4)
        set_unlimited(ledger)
        place(ledger, "unlimited", 50)
        settle(ledger, "limited", 3)
        set_unlimited(ledger, is_unlimited=False)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        settle(ledger, "unlimited", 50, is_unlimited=True)

        assert Numbers(10, used=3, available=7) == numbers(ledger)
        assert 50 == ledger.balance("ada", "calls").unlimited_used

    def test_unlimited_release(self, ledger: Ledger) -> None:
        """Releasing a hold of an unlimited account gives nothing to the limited one."""
        grant(ledger, 10)
        set_unlimited(ledger)
        place(ledger, "h1", 4)
        set_unlimited(ledger, is_unlimited=False)
        release(ledger, "h1")

        assert Numbers(10, available=10) == numbers(ledger)

    def test_unlimited_again(self, ledger: Ledger) -> None:
        """Switching twice is switching once, and other accounts are not switched."""
        set_unlimited(ledger)
        set_unlimited(ledger)

        assert Numbers(0) == numbers(ledger, meter="images")
        assert Numbers(0) == numbers(ledger, customer="bob")
        set_unlimited(ledger, is_unlimited=False)
        set_unlimited(ledger, is_unlimited=False)
        assert Numbers(0) == numbers(ledger)


class Recording(Contract):
    """Usage after the fact."""

    def test_record_charges(self, ledger: Ledger, clock: Clock) -> None:
        """A record is charged without a hold."""
        grant(ledger, 10)
        usage = Usage(model="gpt-5-mini", images=2)
        event = record(ledger, "export_9", 4, usage=usage, properties={"rows": 7}, price_slug="exports")

        assert ("ada", "calls", "export_9", 4) == (event.customer, event.meter, event.transaction_id, event.amount)
        assert ("record", None, usage, {"rows": 7}, "exports") == (
            event.kind,
            event.hold_id,
            event.usage,
            event.properties,
            event.price_slug,
        )
        assert clock.at() == event.created_at
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        assert [event] == list(ledger.usage_events())

    def test_record_debt(self, ledger: Ledger) -> None:
        """A record is never refused; what is not there becomes debt."""
        grant(ledger, 10)
        record(ledger, "export_9", 14)

        assert Numbers(10, used=14, debt=4) == numbers(ledger)

    def test_record_again(self, ledger: Ledger) -> None:
        """The same record again charges nothing and returns the first event, whatever amount it says."""
        first = record(ledger, "export_9", 4)

        assert first == record(ledger, "export_9", 4)
        assert first == record(ledger, "export_9", 5)
        assert Numbers(0, used=4, debt=4) == numbers(ledger)

    def test_record_nothing(self, ledger: Ledger) -> None:
        """A record of 0 leaves an event."""
        record(ledger, "export_9", 0)

        assert [("export_9", 0)] == billed(ledger)

    def test_record_billed_as_a_call(self, ledger: Ledger) -> None:
        """An id that a call was billed under is billed: the record returns the call's event."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        event = settle(ledger, "h1", 3, "gen_1").event

        assert event == record(ledger, "gen_1", 9)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
