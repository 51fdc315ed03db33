"""Placing, enlarging and giving back."""

from __future__ import annotations

import pytest

from ...errors import BillingUnavailableError, InsufficientCreditsError
from ...ledger import Ledger
from ...records import MAX_AMOUNT
from .common import (
    Clock,
    Contract,
    Numbers,
    billed,
    enlarge,
    grant,
    hold_of,
    numbers,
    place,
    record,
    release,
    set_unlimited,
    settle,
)

__all__ = ["Enlarging", "Placing", "Releasing"]


class Placing(Contract):
    """Holds: credits that are set aside while a call runs."""

    def test_place_reserves(self, ledger: Ledger) -> None:
        """A hold sets its amount aside: held rises, available falls, nothing is used."""
        grant(ledger, 10)
        place(ledger, "h1", 4)

        assert Numbers(10, held=4, available=6) == numbers(ledger)
        assert [] == billed(ledger)

    def test_place_exactly(self, ledger: Ledger) -> None:
        """The last credit can be held; the one after it cannot."""
        grant(ledger, 10)
        place(ledger, "h1", 10)

        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 1)

        assert Numbers(10, held=10) == numbers(ledger)

    def test_place_refusal_has_numbers(self, ledger: Ledger) -> None:
        """A refusal says what is available, what is required and what calls in flight hold; nothing changes."""
        grant(ledger, 10)
        settle(ledger, place(ledger, "h1", 3).id, 3)
        place(ledger, "h2", 5)
        before = numbers(ledger)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h3", 4)

        error = caught.value
        assert ("ada", "calls") == (error.customer, error.meter)
        assert (2, 4, 5) == (error.available, error.required, error.held)
        assert before == numbers(ledger)
        assert ["h2"] == [hold.id for hold in ledger.holds()]

    @pytest.mark.parametrize(("amount", "is_transient"), [(3, True), (7, True), (8, False)])
    def test_place_transient(self, ledger: Ledger, amount: int, is_transient: bool) -> None:
        """A refusal is transient if the hold would fit once the calls in flight have ended."""
        grant(ledger, 10)
        record(ledger, "rec_1", 3)
        place(ledger, "h1", 5)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h2", amount)

        assert is_transient == caught.value.is_transient

    def test_place_refused_in_debt(self, ledger: Ledger) -> None:
        """In debt nothing is available, and a hold of 1 is refused."""
        grant(ledger, 10)
        record(ledger, "rec_1", 12)

        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h1", 1)

        assert 0 == caught.value.available
        assert not caught.value.is_transient

    def test_place_nothing_always_fits(self, ledger: Ledger) -> None:
        """A hold of 0 fits even in debt."""
        record(ledger, "rec_1", 12)
        place(ledger, "h1", 0)

        assert Numbers(0, used=12, debt=12) == numbers(ledger)

    def test_place_again(self, ledger: Ledger) -> None:
        """Placing an open hold again gives the same hold and sets nothing more aside, even where another would not fit."""
        grant(ledger, 10)
        first = place(ledger, "h1", 7)
        again = place(ledger, "h1", 7)

        assert first == again
        assert Numbers(10, held=7, available=3) == numbers(ledger)

    def test_place_again_with_another_amount(self, ledger: Ledger) -> None:
        """Placing an open hold again with another amount is a ValueError; the hold stays as it is."""
        grant(ledger, 10)
        place(ledger, "h1", 7)

        with pytest.raises(ValueError, match="h1"):
            place(ledger, "h1", 2)

        assert Numbers(10, held=7, available=3) == numbers(ledger)

    @pytest.mark.parametrize("end", ["settled", "released", "expired", "charged"])
    def test_place_again_after_the_end(self, ledger: Ledger, clock: Clock, end: str) -> None:
        """A hold that has ended cannot be placed again: BillingUnavailableError says how it ended, and nothing is set aside."""
        grant(ledger, 10)
        place(ledger, "h1", 2, on_unknown="charge" if end == "charged" else "release")
        if end == "settled":
            settle(ledger, "h1", 2)
        elif end == "released":
            release(ledger, "h1")
        else:
            clock.advance(121)
            ledger.recover()

        with pytest.raises(BillingUnavailableError, match=f"h1.* has ended .*{end}"):
            place(ledger, "h1", 2)

        assert 0 == numbers(ledger).held

    def test_place_refused_then_granted(self, ledger: Ledger) -> None:
        """A refused hold can be placed under the same id once there are credits."""
        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h1", 2)
        grant(ledger, 2)

        assert "open" == place(ledger, "h1", 2).state

    def test_place_what_a_hold_tells(self, ledger: Ledger, clock: Clock) -> None:
        """A hold remembers what it was placed with, and is listed as it was returned."""
        grant(ledger, 10)
        parent = place(ledger, "h1", 0)
        hold = place(ledger, "h2", 3, endpoint="responses", model="gpt-5-mini", parent=parent.id)

        assert ("h2", "ada", "calls", 3, "open") == (hold.id, hold.customer, hold.meter, hold.amount, hold.state)
        assert ("responses", "gpt-5-mini", "h1") == (hold.endpoint, hold.model, hold.parent)
        assert clock.at() == hold.placed_at
        assert (None, None, None) == (hold.ended_at, hold.reason, hold.sent)
        assert (False, False, False) == (hold.is_unlimited, hold.is_repeat, hold.is_in_doubt)
        assert [parent, hold] == sorted(ledger.holds(), key=lambda hold: hold.id)

    def test_place_too_many_holds(self, ledger: Ledger) -> None:
        """A customer has at most `max_holds` open holds over all meters; the next is BillingUnavailableError until one ends."""
        grant(ledger, 10)
        grant(ledger, 10, meter="images")
        place(ledger, "h1", 1, max_holds=3)
        place(ledger, "h2", 1, meter="images", max_holds=3)
        place(ledger, "h3", 1, max_holds=3)

        with pytest.raises(BillingUnavailableError, match="3"):
            place(ledger, "h4", 1, meter="images", max_holds=3)
        with pytest.raises(BillingUnavailableError, match="3"):
            place(ledger, "h4", 0, max_holds=3)

        assert 1 == numbers(ledger, meter="images").held
        release(ledger, "h1")
        place(ledger, "h4", 1, meter="images", max_holds=3)

    def test_place_too_many_holds_of_another(self, ledger: Ledger) -> None:
        """Other customers' holds do not count."""
        for number in range(3):
            place(ledger, f"h{number}", 0, customer="bob", max_holds=3)

        assert "open" == place(ledger, "h9", 0, max_holds=3).state

    def test_place_too_many_dead_holds(self, ledger: Ledger, clock: Clock) -> None:
        """Holds whose owner died do not count, on whichever meter they are."""
        for number in range(3):
            place(ledger, f"h{number}", 0, meter=f"m{number}", max_holds=3)
        clock.advance(121)

        assert "open" == place(ledger, "h9", 0, owner="p2", max_holds=3).state


class Enlarging(Contract):
    """Raising a hold while the call runs."""

    def test_enlarge_holds_the_difference(self, ledger: Ledger) -> None:
        """Raising a hold sets the difference aside, and a settle gives all of it back."""
        grant(ledger, 10)
        place(ledger, "h1", 4)

        assert 7 == enlarge(ledger, "h1", 7).amount
        assert Numbers(10, held=7, available=3) == numbers(ledger)
        settle(ledger, "h1", 5)
        assert Numbers(10, used=5, available=5) == numbers(ledger)

    def test_enlarge_refused(self, ledger: Ledger) -> None:
        """Where the difference does not fit it is refused with the difference as `required`, and the hold stays as it was."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        place(ledger, "h2", 3)

        with pytest.raises(InsufficientCreditsError) as caught:
            enlarge(ledger, "h1", 8)

        error = caught.value
        assert (3, 4, 7) == (error.available, error.required, error.held)
        assert Numbers(10, held=7, available=3) == numbers(ledger)
        assert 4 == hold_of(ledger, "h1").amount

    @pytest.mark.parametrize("amount", [0, 3, 4])
    def test_enlarge_not_more(self, ledger: Ledger, amount: int) -> None:
        """Raising a hold to what it has already, or less, changes nothing and returns the hold."""
        grant(ledger, 4)
        place(ledger, "h1", 4)

        assert 4 == enlarge(ledger, "h1", amount).amount
        assert Numbers(4, held=4) == numbers(ledger)

    def test_enlarge_again(self, ledger: Ledger) -> None:
        """Raising a hold twice to the same amount is raising it once."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        enlarge(ledger, "h1", 8)

        assert 8 == enlarge(ledger, "h1", 8).amount
        assert Numbers(10, held=8, available=2) == numbers(ledger)

    @pytest.mark.parametrize("end", ["settled", "released", "expired"])
    def test_enlarge_after_the_end(self, ledger: Ledger, clock: Clock, end: str) -> None:
        """A hold that has ended cannot be raised: BillingUnavailableError says how it ended."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        if end == "settled":
            settle(ledger, "h1", 4)
        elif end == "released":
            release(ledger, "h1")
        else:
            clock.advance(121)
            ledger.recover()
        before = numbers(ledger)

        with pytest.raises(BillingUnavailableError, match=end):
            enlarge(ledger, "h1", 8)

        assert before == numbers(ledger)

    def test_enlarge_never_placed(self, ledger: Ledger) -> None:
        """A hold that was never placed cannot be raised."""
        grant(ledger, 10)

        with pytest.raises(BillingUnavailableError, match="h1"):
            enlarge(ledger, "h1", 8)

        assert Numbers(10, available=10) == numbers(ledger)

    def test_enlarge_unlimited(self, ledger: Ledger) -> None:
        """The hold of an unlimited account can always be raised."""
        set_unlimited(ledger)
        place(ledger, "h1", 4)

        assert MAX_AMOUNT == enlarge(ledger, "h1", MAX_AMOUNT).amount

    def test_enlarge_dead_holds_give_way(self, ledger: Ledger, clock: Clock) -> None:
        """Credits held by a process that died are given back before raising a hold is refused."""
        grant(ledger, 10)
        place(ledger, "h1", 6, owner="dead")
        clock.advance(100)
        place(ledger, "h2", 4)
        clock.advance(21)

        assert 10 == enlarge(ledger, "h2", 10).amount
        assert Numbers(10, held=10) == numbers(ledger)


class Releasing(Contract):
    """Giving a hold back."""

    def test_release_gives_back(self, ledger: Ledger) -> None:
        """A released hold is available again, and nothing was billed."""
        grant(ledger, 10)
        place(ledger, "h1", 6)

        assert "released" == release(ledger, "h1").outcome
        assert Numbers(10, available=10) == numbers(ledger)
        assert [] == billed(ledger)

    def test_release_is_kept(self, ledger: Ledger, clock: Clock) -> None:
        """A released hold stays on record with its reason and whether the provider may have worked: calls that may have cost us."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        clock.advance(5)
        release(ledger, "h1", reason="stream_failed", sent="unknown")

        hold = hold_of(ledger, "h1")
        assert ("released", 6, "stream_failed", "unknown") == (hold.state, hold.amount, hold.reason, hold.sent)
        assert clock.at() == hold.ended_at
        assert hold.is_in_doubt
        found = ledger.verify()
        assert (1, 6) == (found.in_doubt, found.in_doubt_amount)

    @pytest.mark.parametrize("sent", ["yes", "no"])
    def test_release_not_in_doubt(self, ledger: Ledger, sent: str) -> None:
        """A hold that was released although the provider answered, or was never asked, is not in doubt."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        release(ledger, "h1", sent=sent)

        assert not hold_of(ledger, "h1").is_in_doubt
        assert 0 == ledger.verify().in_doubt

    def test_release_again(self, ledger: Ledger) -> None:
        """Releasing twice gives back once, and the first reason stands."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        release(ledger, "h1", reason="cancelled", sent="unknown")

        assert "again" == release(ledger, "h1", reason="not_sent", sent="no").outcome
        assert Numbers(10, available=10) == numbers(ledger)
        assert ("cancelled", "unknown") == (hold_of(ledger, "h1").reason, hold_of(ledger, "h1").sent)

    def test_release_after_a_settle(self, ledger: Ledger) -> None:
        """Releasing a settled hold changes nothing."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        settle(ledger, "h1", 4)

        assert "again" == release(ledger, "h1").outcome
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        assert "again" == settle(ledger, "h1", 4).outcome

    @pytest.mark.parametrize("on_unknown", ["release", "charge"])
    def test_release_after_the_owner_died(self, ledger: Ledger, clock: Clock, on_unknown: str) -> None:
        """Releasing an orphan that was resolved changes nothing."""
        grant(ledger, 10)
        place(ledger, "h1", 6, on_unknown=on_unknown)
        clock.advance(121)
        ledger.recover()
        before = numbers(ledger)

        assert "again" == release(ledger, "h1").outcome
        assert before == numbers(ledger)

    def test_release_before_the_place(self, ledger: Ledger) -> None:
        """Releasing a hold that is not there yet makes the late place fail and set nothing aside."""
        grant(ledger, 10)

        assert "tombstone" == release(ledger, "h1", reason="cancelled", sent="no").outcome
        with pytest.raises(BillingUnavailableError, match=r"h1.* has ended"):
            place(ledger, "h1", 6)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_release_before_the_place_again(self, ledger: Ledger) -> None:
        """Releasing such a hold twice changes nothing, and it still cannot be placed."""
        grant(ledger, 10)
        release(ledger, "h1")
        release(ledger, "h1")

        with pytest.raises(BillingUnavailableError, match="has ended"):
            place(ledger, "h1", 6)
        assert Numbers(10, available=10) == numbers(ledger)
