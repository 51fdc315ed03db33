"""Who lives, and what becomes of the holds of those who do not."""

from __future__ import annotations

import pytest

from ...errors import InsufficientCreditsError
from ...ledger import Ledger
from .common import (
    Clock,
    Contract,
    Numbers,
    billed,
    grant,
    hold_of,
    numbers,
    place,
    release,
    renew,
    set_unlimited,
    settle,
)

__all__ = ["Leases"]


class Leases(Contract):
    """How a hold shows that its owner lives, and what becomes of orphans."""

    def test_lease_alive(self, ledger: Ledger, clock: Clock) -> None:
        """A hold stays while its owner's lease runs."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        clock.advance(119.999999)

        assert 0 == ledger.sweep().resolved
        assert 0 == ledger.recover().resolved
        assert Numbers(10, held=4, available=6) == numbers(ledger)

    def test_lease_orphan(self, ledger: Ledger, clock: Clock) -> None:
        """Once the lease is out the hold is given back, and stays on record as in doubt."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        clock.advance(120)
        recovery = ledger.sweep()

        assert (1, 0, 1, 0) == (recovery.released, recovery.charged, recovery.in_doubt, recovery.charged_amount)
        assert Numbers(10, available=10) == numbers(ledger)
        hold = hold_of(ledger, "h1")
        assert ("expired", "unknown", "unknown") == (hold.state, hold.reason, hold.sent)
        assert hold.is_in_doubt
        assert [] == billed(ledger)

    def test_lease_charged_orphan(self, ledger: Ledger, clock: Clock) -> None:
        """With on_unknown="charge" the orphan's hold is charged, under the hold's id."""
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(120)
        recovery = ledger.sweep()

        assert (0, 1, 4) == (recovery.released, recovery.charged, recovery.charged_amount)
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        (event,) = ledger.usage_events()
        assert ("hold_h1", 4, "expired", "held") == (event.transaction_id, event.amount, event.kind, event.basis)
        assert "h1" == event.hold_id
        assert "charged" == hold_of(ledger, "h1").state

    def test_lease_charged_orphan_of_an_unlimited_account(self, ledger: Ledger, clock: Clock) -> None:
        """An unlimited hold that is charged is counted as unlimited use."""
        set_unlimited(ledger)
        place(ledger, "h1", 4, on_unknown="charge")
        set_unlimited(ledger, is_unlimited=False)
        clock.advance(120)
        ledger.sweep()

        assert Numbers(0) == numbers(ledger)
        assert 4 == ledger.balance("ada", "calls").unlimited_used

    def test_lease_resolved_once(self, ledger: Ledger, clock: Clock) -> None:
        """An orphan is resolved once."""
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(500)
        ledger.sweep()

        assert 0 == ledger.sweep().resolved
        assert 0 == ledger.recover().resolved
        assert [("hold_h1", 4)] == billed(ledger)

    def test_lease_renewed(self, ledger: Ledger, clock: Clock) -> None:
        """One renewal keeps all of its owner's holds, and says how many there are."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        place(ledger, "h2", 0, customer="bob", meter="images")
        place(ledger, "h3", 1)
        release(ledger, "h3")
        place(ledger, "h4", 1, owner="p2")
        clock.advance(100)

        assert 2 == renew(ledger, "p1")
        clock.advance(119)
        recovery = ledger.sweep()
        assert 1 == recovery.resolved
        assert ["h1", "h2"] == sorted(hold.id for hold in ledger.holds(state="open"))
        clock.advance(1)
        assert 2 == ledger.sweep().resolved

    def test_lease_renewed_before_the_first_place(self, ledger: Ledger) -> None:
        """An owner without holds may renew."""
        assert 0 == renew(ledger, "p9")

    def test_lease_placing_renews(self, ledger: Ledger, clock: Clock) -> None:
        """A process that keeps placing holds keeps its earlier ones: a place renews a lease of which a third is gone."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        for number in range(2, 8):
            clock.advance(60)
            place(ledger, f"h{number}", 1)
            clock.advance(65)
            assert 0 == ledger.sweep().resolved
            clock.advance(-65)

        clock.advance(119)
        assert 0 == ledger.sweep().resolved
        assert Numbers(10, held=7, available=3) == numbers(ledger)

    def test_lease_longest_call(self, ledger: Ledger, clock: Clock) -> None:
        """No hold is renewed past `max_call`."""
        grant(ledger, 10)
        place(ledger, "h1", 4, max_call=150)
        clock.advance(100)
        renew(ledger, "p1")
        clock.advance(49)
        assert 0 == ledger.sweep().resolved
        clock.advance(1)

        assert 1 == ledger.sweep().resolved

    def test_lease_without_an_owner(self, ledger: Ledger, clock: Clock) -> None:
        """A hold without an owner needs no renewal and lives as long as `max_call` allows."""
        grant(ledger, 10)
        place(ledger, "h1", 4, owner=None)
        clock.advance(7199)
        assert 0 == ledger.sweep().resolved
        clock.advance(1)

        assert 1 == ledger.sweep().resolved

    @pytest.mark.parametrize(("owner", "max_call", "seconds"), [("p1", 7200, 120), ("p1", 60, 60), (None, 600, 600)])
    def test_lease_shown(self, ledger: Ledger, clock: Clock, owner: str | None, max_call: int, seconds: int) -> None:
        """A hold shows until when it lives: its owner's lease or `max_call`, whichever is sooner."""
        grant(ledger, 10)
        hold = place(ledger, "h1", 4, owner=owner, lease=120, max_call=max_call)

        assert clock.at(seconds) == hold.expires_at == hold_of(ledger, "h1").expires_at

    def test_lease_in_portions(self, ledger: Ledger, clock: Clock) -> None:
        """A sweep resolves at most `limit` holds, so that no transaction is long; what is left is left for the next."""
        grant(ledger, 10)
        for number in range(5):
            place(ledger, f"h{number}", 1)
        clock.advance(121)

        assert [2, 2, 1, 0] == [ledger.sweep(limit=2).resolved for _ in range(4)]

    def test_lease_recover(self, ledger: Ledger, clock: Clock) -> None:
        """`recover` resolves all orphans of all customers, and leaves the living alone."""
        for number in range(7):
            grant(ledger, 10, customer=f"c{number}")
            place(ledger, f"h{number}", number, customer=f"c{number}", on_unknown="charge" if number % 2 else "release")
        clock.advance(121)
        grant(ledger, 10)
        place(ledger, "h9", 5, owner="p2")
        recovery = ledger.recover()

        assert (4, 3, 9) == (recovery.released, recovery.charged, recovery.charged_amount)
        assert ["h9"] == [hold.id for hold in ledger.holds(state="open")]
        assert 3 == len(list(ledger.usage_events()))

    def test_lease_dead_holds_give_way(self, ledger: Ledger, clock: Clock) -> None:
        """A customer is never refused because of a process that died: orphans are resolved before the refusal."""
        grant(ledger, 10)
        place(ledger, "h1", 8, owner="dead")
        clock.advance(121)
        place(ledger, "h2", 10)

        assert Numbers(10, held=10) == numbers(ledger)
        assert "expired" == hold_of(ledger, "h1").state

    def test_lease_charged_orphans_do_not_give_way(self, ledger: Ledger, clock: Clock) -> None:
        """With on_unknown="charge" what a dead process held is charged, so the next hold must fit beside it."""
        grant(ledger, 10)
        place(ledger, "h1", 8, owner="dead", on_unknown="charge")
        clock.advance(121)

        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 3)
        assert "open" == place(ledger, "h3", 2).state

    def test_lease_settled_before_the_sweep(self, ledger: Ledger, clock: Clock) -> None:
        """A process that slept past its lease and settles before anybody swept settles as always."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        clock.advance(500)

        assert "settled" == settle(ledger, "h1", 4).outcome
        assert 0 == ledger.sweep().resolved
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_lease_renewed_before_the_sweep(self, ledger: Ledger, clock: Clock) -> None:
        """A process that slept past its lease and renews before anybody swept keeps its holds."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        clock.advance(500)

        assert 1 == renew(ledger, "p1")
        assert 0 == ledger.sweep().resolved
