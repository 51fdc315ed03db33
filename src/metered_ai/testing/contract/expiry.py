"""Grants that expire."""

from __future__ import annotations

from datetime import datetime

import pytest

from ...errors import InsufficientCreditsError
from ...ledger import Ledger
from .common import (
    Clock,
    Contract,
    Numbers,
    grant,
    numbers,
    place,
    record,
    release,
    revoke,
    set_unlimited,
    settle,
    zone,
)

__all__ = ["Expiry"]


class Expiry(Contract):
    """Grants that expire."""

    def test_expiry_naive(self, ledger: Ledger) -> None:
        """An expiry without a time zone is a ValueError."""
        with pytest.raises(ValueError, match=r"expires_at"):
            grant(ledger, 10, expires_at=datetime(2027, 1, 1))  # noqa: DTZ001 - What is refused.

        assert 0 == ledger.verify().accounts

    def test_expiry_zones(self, ledger: Ledger, clock: Clock) -> None:
        """An expiry may come in any time zone; it is the moment that counts."""
        until = clock.at(60).astimezone(zone(5.5))
        grant(ledger, 10, expires_at=until)
        clock.advance(59.999999)
        assert 10 == numbers(ledger).available
        clock.advance(0.000001)

        assert 0 == numbers(ledger).available

    def test_expiry_expires(self, ledger: Ledger, clock: Clock) -> None:
        """At its expiry a grant is over: the balance shows it at once, without anybody writing."""
        grant(ledger, 10, expires_at=clock.at(60))
        clock.advance(59.999999)
        assert Numbers(10, available=10) == numbers(ledger)
        clock.advance(0.000001)

        assert Numbers(0) == numbers(ledger)
        assert [Numbers(0)] == [
            Numbers(b.limit or 0, b.used, b.held, b.available or 0, b.debt) for b in ledger.balances("ada")
        ]

    def test_expiry_refuses(self, ledger: Ledger, clock: Clock) -> None:
        """Expired credits cannot be held."""
        grant(ledger, 10, expires_at=clock.at(60))
        clock.advance(60)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h1", 1)

        assert (0, False) == (caught.value.available, caught.value.is_transient)
        assert Numbers(0) == numbers(ledger)

    def test_expiry_looking_changes_nothing(self, ledger: Ledger, clock: Clock) -> None:
        """It makes no difference whether anybody looked at the balance or tried a call between the expiry and the next step."""
        for number, customer in enumerate(["ada", "bob"]):
            grant(ledger, 10, customer=customer, expires_at=clock.at(60))
            grant(ledger, 5, "g2", customer=customer)
            place(ledger, f"h{number}", 4, customer=customer)
        clock.advance(61)
        numbers(ledger, "ada")
        place(ledger, "h9", 0, customer="ada")
        release(ledger, "h9", customer="ada")
        for number, customer in enumerate(["ada", "bob"]):
            settle(ledger, f"h{number}", 3, customer=customer)

        assert Numbers(8, used=3, available=5) == numbers(ledger, "ada") == numbers(ledger, "bob")

    def test_expiry_spent_cannot_expire(self, ledger: Ledger, clock: Clock) -> None:
        """What was spent before the expiry is not lost by it."""
        grant(ledger, 10, expires_at=clock.at(60))
        record(ledger, "rec_1", 4)
        clock.advance(60)

        assert Numbers(4, used=4) == numbers(ledger)

    @pytest.mark.parametrize(
        "order", [("soon", "later", "never"), ("never", "later", "soon"), ("later", "never", "soon")]
    )
    def test_expiry_soonest_first(self, ledger: Ledger, clock: Clock, order: tuple[str, ...]) -> None:
        """The grant that expires soonest is spent first, in whatever order they were given; one without an expiry last."""
        expiry = {"soon": clock.at(60), "later": clock.at(120), "never": None}
        for name in order:
            grant(ledger, 10, name, expires_at=expiry[name])
        record(ledger, "rec_1", 14)

        assert Numbers(30, used=14, available=16) == numbers(ledger)
        clock.advance(60)
        assert Numbers(30, used=14, available=16) == numbers(ledger)
        clock.advance(60)
        assert Numbers(24, used=14, available=10) == numbers(ledger)

    def test_expiry_already_spent(self, ledger: Ledger, clock: Clock) -> None:
        """A new grant that expires sooner does not take over what an earlier one has paid."""
        grant(ledger, 10, "never")
        record(ledger, "rec_1", 4)
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        clock.advance(60)

        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_expiry_spent_by_the_living(self, ledger: Ledger, clock: Clock) -> None:
        """What is used after an expiry is paid by the grants that are left."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 10, "never")
        clock.advance(61)
        record(ledger, "rec_1", 4)

        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_expiry_in_the_past(self, ledger: Ledger, clock: Clock) -> None:
        """A grant that has expired already pays the debt there is; the rest expires at once."""
        record(ledger, "rec_1", 4)
        grant(ledger, 10, expires_at=clock.at(-60))

        assert Numbers(4, used=4) == numbers(ledger)

    def test_expiry_paid_debt_cannot_expire(self, ledger: Ledger, clock: Clock) -> None:
        """What paid a debt is spent and cannot expire."""
        record(ledger, "rec_1", 4)
        grant(ledger, 10, expires_at=clock.at(60))
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        clock.advance(60)

        assert Numbers(4, used=4) == numbers(ledger)

    def test_expiry_expired_is_listed(self, ledger: Ledger, clock: Clock) -> None:
        """Once applied, an expiry shows on its grant: so much was spent, so much expired."""
        grant(ledger, 10, expires_at=clock.at(60))
        record(ledger, "rec_1", 4)
        clock.advance(60)
        place(ledger, "h1", 0)

        (given,) = ledger.grants()
        assert (10, 4, 6, 0) == (given.amount, given.spent, given.expired, given.revoked)

    def test_expiry_expired_is_over(self, ledger: Ledger, clock: Clock) -> None:
        """An expired grant is not given again under its id."""
        grant(ledger, 10, expires_at=clock.at(60))
        clock.advance(60)
        place(ledger, "h1", 0)

        assert 10 == grant(ledger, 10, expires_at=clock.at(60)).expired
        assert Numbers(0) == numbers(ledger)

    def test_expiry_revoked_after_the_expiry(self, ledger: Ledger, clock: Clock) -> None:
        """Revoking an expired grant takes back what it had paid; what expired is gone already."""
        grant(ledger, 10, expires_at=clock.at(60))
        record(ledger, "rec_1", 4)
        clock.advance(60)
        given = revoke(ledger)

        assert (4, 6, 0) == (given.revoked, given.expired, given.spent)
        assert Numbers(0, used=4, debt=4) == numbers(ledger)

    def test_expiry_serves_earlier_holds(self, ledger: Ledger, clock: Clock) -> None:
        """A hold placed before the expiry keeps its credits; the rest of the grant is gone, and nothing is free for others."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        assert Numbers(6, held=6) == numbers(ledger)
        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 1)

        settle(ledger, "h1", 6)
        assert Numbers(6, used=6) == numbers(ledger)

    def test_expiry_what_is_left_of_a_hold_is_gone(self, ledger: Ledger, clock: Clock) -> None:
        """What such a hold does not use is gone with the grant."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        settle(ledger, "h1", 4)

        assert Numbers(4, used=4) == numbers(ledger)

    @pytest.mark.parametrize("how", ["release", "orphan"])
    def test_expiry_a_hold_given_back_is_gone(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A hold given back after its grant expired gives nothing back."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        place(ledger, "h2", 0, owner="p2")
        if how == "release":
            release(ledger, "h1")
        else:
            clock.advance(60)
            ledger.recover()

        assert Numbers(0) == numbers(ledger)

    def test_expiry_placed_at_the_expiry(self, ledger: Ledger, clock: Clock) -> None:
        """A hold placed at the very moment of the expiry is not an earlier one."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 4, "never")
        clock.advance(60)
        place(ledger, "h1", 4)
        assert Numbers(4, held=4) == numbers(ledger)
        settle(ledger, "h1", 3)

        assert Numbers(4, used=3, available=1) == numbers(ledger)

    @pytest.mark.parametrize(("later", "kept"), [(-0.000001, 0), (0, 0), (0.000001, 4), (30, 4)])
    def test_expiry_in_the_past_of_a_hold(self, ledger: Ledger, clock: Clock, later: float, kept: int) -> None:
        """A grant that has expired already serves the open holds placed before its expiry, and no others."""
        grant(ledger, 4)
        place(ledger, "h1", 4)
        moment = clock.at(later)
        clock.advance(60)
        revoke(ledger)
        grant(ledger, 10, "g2", expires_at=moment)

        assert Numbers(kept, held=4, debt=4 - kept) == numbers(ledger)

    @pytest.mark.parametrize(("used", "limit"), [(6, 16), (2, 12), (None, 10)])
    def test_expiry_later_holds_take_nothing_kept(
        self, ledger: Ledger, clock: Clock, used: int | None, limit: int
    ) -> None:
        """What an expired grant keeps for an earlier hold is not spent by a later one."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 10, "never")
        place(ledger, "h1", 6)
        clock.advance(60)
        place(ledger, "h2", 5, owner="p2")
        assert Numbers(16, held=11, available=5) == numbers(ledger)

        settle(ledger, "h2", 5)
        assert Numbers(16, used=5, held=6, available=5) == numbers(ledger)
        if used is None:
            release(ledger, "h1")
        else:
            settle(ledger, "h1", used)
        assert Numbers(limit, used=5 + (used or 0), available=5) == numbers(ledger)

    @pytest.mark.parametrize("order", [("h1", "h2"), ("h2", "h1")])
    @pytest.mark.parametrize(
        ("first", "second"),
        [(6, 4), (0, 4), (6, 0), (3, 1), (None, 4), (6, None), (8, None), (None, 6), (9, 4), (9, 6)],
    )
    def test_expiry_order_of_ends(
        self, ledger: Ledger, clock: Clock, order: tuple[str, str], first: int | None, second: int | None
    ) -> None:
        """Earlier holds may end in any order: the customer loses only what none of them used, and each takes no more than it held."""
        grant(ledger, 10, "soon", expires_at=clock.at(60))
        grant(ledger, 10, "never")
        place(ledger, "h1", 6)
        place(ledger, "h2", 4)
        clock.advance(60)
        place(ledger, "h3", 0)
        ends = {"h1": first, "h2": second}
        for hold_id in order:
            used = ends[hold_id]
            if used is None:
                release(ledger, hold_id)
            else:
                settle(ledger, hold_id, used)

        used = (first or 0) + (second or 0)
        kept = min(first or 0, 6) + min(second or 0, 4)
        assert Numbers(10 + kept, used=used, available=10 + kept - used) == numbers(ledger)

    @pytest.mark.parametrize("order", [("h1", "h2"), ("h2", "h1")])
    def test_expiry_several_expiries(self, ledger: Ledger, clock: Clock, order: tuple[str, str]) -> None:
        """Each expired grant serves only the holds placed before its own expiry."""
        grant(ledger, 4, "soon", expires_at=clock.at(60))
        grant(ledger, 4, "later", expires_at=clock.at(90))
        place(ledger, "h1", 3)
        clock.advance(61)
        assert Numbers(7, held=3, available=4) == numbers(ledger)
        place(ledger, "h2", 2)
        clock.advance(30)
        assert Numbers(5, held=5) == numbers(ledger)
        for hold_id in order:
            settle(ledger, hold_id, 2)

        assert Numbers(4, used=4) == numbers(ledger)

    def test_expiry_debt_is_paid_by_the_next_grant(self, ledger: Ledger, clock: Clock) -> None:
        """A debt left by expired credits is paid by the next grant."""
        grant(ledger, 10, expires_at=clock.at(60))
        place(ledger, "h1", 6)
        clock.advance(60)
        settle(ledger, "h1", 9)
        grant(ledger, 10, "g2")

        balance = numbers(ledger)
        assert 9 == balance.used
        assert balance.limit - 9 == balance.available
        assert 0 == balance.debt

    def test_expiry_nothing_expires_while_unlimited(self, ledger: Ledger, clock: Clock) -> None:
        """Grants of an unlimited account expire all the same, and use counted as unlimited does not spend them."""
        grant(ledger, 10, expires_at=clock.at(60))
        grant(ledger, 10, "g2")
        set_unlimited(ledger)
        place(ledger, "h1", 4)
        settle(ledger, "h1", 4)
        clock.advance(60)
        set_unlimited(ledger, is_unlimited=False)

        assert Numbers(10, available=10) == numbers(ledger)
