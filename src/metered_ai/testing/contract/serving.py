"""What a ledger promises that is bound to a remote billing service. No service is asked: what one would say is said here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from ...core.delivery import Claimed, Mark, Outgoing
from ...core.steps import AddGrant, Revoke, SetUnlimited, Step
from ...errors import ConfigurationError, InsufficientCreditsError
from ...ledger import ServiceLedger
from ...records import MAX_TOTAL, UsageEvent
from .common import Clock, Contract, at_once, billed, enlarge, place, record, refused, release, settle

__all__ = ["ServiceLedgerContract"]

SERVICE = "billing of acme (test)"
LEASE = 60.0


def hear(ledger: ServiceLedger, available: int | None, customer: str = "ada", **more: Any) -> bool:
    """Ask and hear at once."""
    return ledger.hear(ledger.ask(customer, "calls"), available, **more)


def use(ledger: ServiceLedger, hold_id: str, amount: int, **more: Any) -> UsageEvent:
    """A call from its hold to its event."""
    place(ledger, hold_id, amount, **more)
    account = {name: more[name] for name in ("customer", "meter") if name in more}
    return settle(ledger, hold_id, amount, **account).event


def available(ledger: ServiceLedger, customer: str = "ada") -> int | None:
    return ledger.balance(customer, "calls").available


def claim(ledger: ServiceLedger, name: str = "c1", **more: Any) -> Claimed:
    claimed = ledger.claim(name, LEASE, **more)
    assert isinstance(claimed, Claimed), f"there is nothing to claim: {claimed!r}"
    return claimed


def told(events: Sequence[Outgoing]) -> list[tuple[str, int]]:
    return [(outgoing.event.transaction_id, outgoing.event.amount) for outgoing in events]


def mark(ledger: ServiceLedger, claimed: Claimed, outcome: str = "delivered", **more: Any) -> tuple[str, ...]:
    """The same mark for every event of a claim."""
    marks = [Mark(outgoing.no, cast("Any", outcome), **more) for outgoing in claimed.events]
    return ledger.mark(claimed, marks)


def deliver(ledger: ServiceLedger) -> list[tuple[str, int]]:
    """Everything that is due is acknowledged."""
    sent: list[tuple[str, int]] = []
    while isinstance(claimed := ledger.claim("all", LEASE), Claimed):
        sent += told(claimed.events)
        mark(ledger, claimed)
    return sent


def waiting(ledger: ServiceLedger, state: str | None = None) -> list[tuple[str, int, str, int]]:
    """Transaction id, amount to be told, state and attempts of what is not delivered."""
    return [
        (found.event.transaction_id, found.amount, found.state, found.attempts)
        for found in ledger.undelivered(state=state)
    ]


class ServiceLedgerContract(Contract):
    """
    What a ledger promises besides where a remote billing service owns the balances. Subclass it and write `make_ledger`.

    Its `ledger` is bound to a service, and must be a `ServiceLedger`.
    """

    @pytest.fixture
    def unbound(self, tmp_path: Path, clock: Clock) -> Iterator[ServiceLedger]:
        (tmp_path / "unbound").mkdir()
        ledger = self.make_ledger(tmp_path / "unbound", clock)
        assert isinstance(ledger, ServiceLedger)
        try:
            yield ledger

            assert () == ledger.verify().broken
        finally:
            ledger.close()

    @pytest.fixture
    def ledger(self, tmp_path: Path, clock: Clock) -> Iterator[ServiceLedger]:
        ledger = self.make_ledger(tmp_path, clock)
        assert isinstance(ledger, ServiceLedger)
        try:
            ledger.bind(SERVICE)
            yield ledger

            assert () == ledger.verify().broken
        finally:
            ledger.close()

    # Binding

    def test_bound(self, unbound: ServiceLedger) -> None:
        """A new ledger is bound to a service by its name; a second time changes nothing."""
        assert None is unbound.service
        unbound.bind(SERVICE)
        unbound.bind(SERVICE)

        assert SERVICE == unbound.service

    def test_bound_to_another(self, ledger: ServiceLedger) -> None:
        """A ledger that is bound to one service refuses every other, such as the live one beside the test one, and names both."""
        with pytest.raises(ConfigurationError, match=r"acme \(test\).*acme \(live\)"):
            ledger.bind("billing of acme (live)")

        assert SERVICE == ledger.service
        hear(ledger, 1)
        assert "open" == place(ledger, "h1", 1).state

    @pytest.mark.parametrize(
        "step",
        [AddGrant("ada", "calls", 1, "g1"), SetUnlimited("ada", "calls", is_unlimited=True)],
        ids=["grant", "unlimited"],
    )
    def test_bound_too_late(self, unbound: ServiceLedger, step: Step) -> None:
        """A ledger that keeps credits of its own cannot be bound any more, and goes on as before."""
        unbound.run(step)
        with pytest.raises(ConfigurationError, match="of its own"):
            unbound.bind(SERVICE)

        assert None is unbound.service
        assert "open" == place(unbound, "h1", 1).state
        release(unbound, "h1")

    def test_bound_after_a_record(self, unbound: ServiceLedger) -> None:
        """Nor can one that has usage which the service was never told."""
        record(unbound, "rec_1", 1)
        with pytest.raises(ConfigurationError, match="of its own"):
            unbound.bind(SERVICE)

    def test_bound_grants(self, ledger: ServiceLedger) -> None:
        """Where a service owns the balances, credits are not given, taken back or lifted here."""
        for step in (
            AddGrant("ada", "calls", 1, "g1"),
            Revoke("ada", "calls", "g1"),
            SetUnlimited("ada", "calls", is_unlimited=True),
        ):
            with pytest.raises(ConfigurationError, match="kept by"):
                ledger.run(step)

        assert [] == ledger.balances("ada")

    # Balances

    def test_heard(self, ledger: ServiceLedger) -> None:
        """What the service says can be held, and not more."""
        hear(ledger, 10)
        place(ledger, "h1", 7)
        with pytest.raises(InsufficientCreditsError) as refusal:
            place(ledger, "h2", 4)

        assert (3, 4) == (refusal.value.available, refusal.value.required)
        assert "open" == place(ledger, "h3", 3).state

    def test_heard_nothing(self, ledger: ServiceLedger) -> None:
        """Whom the service has said nothing of has no credits; asking leaves no account behind."""
        ledger.ask("ada", "calls")

        assert [] == ledger.balances("ada")
        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h1", 1)
        assert None is ledger.heard_ago("ada", "calls")

    def test_heard_while_held(self, ledger: ServiceLedger) -> None:
        """An answer lets nobody spend what calls in flight hold."""
        hear(ledger, 10)
        place(ledger, "h1", 7)
        hear(ledger, 10)

        assert 3 == available(ledger)

    def test_heard_before_it_was_told(self, ledger: ServiceLedger) -> None:
        """Usage that the service has not acknowledged when it is asked is subtracted from its answer."""
        hear(ledger, 10)
        use(ledger, "h1", 7)
        hear(ledger, 10)

        assert 3 == available(ledger)

    def test_heard_after_it_was_told(self, ledger: ServiceLedger) -> None:
        """Usage that it had acknowledged when it was asked is in its answer, and subtracted once."""
        hear(ledger, 10)
        use(ledger, "h1", 7)
        deliver(ledger)
        assert 3 == available(ledger)
        hear(ledger, 3)

        assert 3 == available(ledger)

    def test_heard_across_a_delivery(self, ledger: ServiceLedger) -> None:
        """An answer that was on its way while usage was acknowledged lets nobody spend that twice, whichever number it brings."""
        hear(ledger, 10)
        use(ledger, "h1", 7)
        question = ledger.ask("ada", "calls")
        deliver(ledger)
        ledger.hear(question, 10)
        assert 3 == available(ledger)
        hear(ledger, 3)
        assert 3 == available(ledger)

        use(ledger, "h2", 2)
        question = ledger.ask("ada", "calls")
        deliver(ledger)
        ledger.hear(question, 1)
        assert 0 == available(ledger)
        hear(ledger, 1)
        assert 1 == available(ledger)

    def test_heard_out_of_order(self, ledger: ServiceLedger) -> None:
        """Of two answers the one that was asked for later counts, in whatever order they come."""
        hear(ledger, 1)
        earlier = ledger.ask("ada", "calls")
        later = ledger.ask("ada", "calls")

        assert ledger.hear(later, 50)
        assert not ledger.hear(earlier, 10)
        assert not ledger.hear(later, 90)
        assert 50 == available(ledger)

    def test_heard_clock_set_back(self, ledger: ServiceLedger, clock: Clock) -> None:
        """A clock that is set back does not make new answers old."""
        hear(ledger, 1)
        clock.advance(-7200)

        assert None is ledger.heard_ago("ada", "calls")
        assert hear(ledger, 5)
        assert 5 == available(ledger)
        assert 0 == ledger.heard_ago("ada", "calls")

    def test_heard_first_of_a_customer(self, ledger: ServiceLedger) -> None:
        """Two who ask for a customer that nobody has heard of yet are both answered."""
        first, second = ledger.ask("ada", "calls"), ledger.ask("ada", "calls")
        ledger.hear(first, 10)
        ledger.hear(second, 10)

        assert 10 == available(ledger)

    def test_heard_age(self, ledger: ServiceLedger, clock: Clock) -> None:
        """A balance is as old as its question, not as its answer."""
        question = ledger.ask("ada", "calls")
        clock.advance(7)
        ledger.hear(question, 10)

        assert 7 == ledger.heard_ago("ada", "calls")
        assert None is ledger.heard_ago("bob", "calls")

    def test_heard_debt(self, ledger: ServiceLedger) -> None:
        """A customer in debt at the service has nothing, and what is paid in there pays the debt first."""
        hear(ledger, 5)
        use(ledger, "h1", 5)
        deliver(ledger)
        hear(ledger, -9)
        assert 0 == available(ledger)
        assert ledger.balance("ada", "calls").debt
        hear(ledger, 41)

        assert 41 == available(ledger)

    def test_heard_unlimited(self, ledger: ServiceLedger) -> None:
        """A service that names no number refuses nothing; back to numbers, what was used meanwhile is counted once."""
        hear(ledger, None)
        use(ledger, "h1", 1_000)
        place(ledger, "h2", 30)
        assert None is available(ledger)
        hear(ledger, 2_000)
        assert 2_000 - 1_000 - 30 == available(ledger)
        settle(ledger, "h2", 30)
        deliver(ledger)
        hear(ledger, 970)

        assert 970 == available(ledger)
        use(ledger, "h3", 70)
        assert 900 == available(ledger)

    @pytest.mark.parametrize("bad", [1.5, "10", True, MAX_TOTAL + 1, -MAX_TOTAL - 1])
    def test_heard_nonsense(self, ledger: ServiceLedger, bad: Any) -> None:
        """What is no number of credits is refused, naming it, and changes nothing."""
        hear(ledger, 10)
        with pytest.raises(ValueError, match="available must be"):
            hear(ledger, bad)

        assert 10 == available(ledger)

    def test_heard_estimate(self, ledger: ServiceLedger) -> None:
        """Limit and use are the service's own figures, never below what is available, and marked as estimates."""
        hear(ledger, 30, limit=100)
        place(ledger, "h1", 10)
        balance = ledger.balance("ada", "calls")
        assert (100, 70, 10, 20, True) == (
            balance.limit,
            balance.used,
            balance.held,
            balance.available,
            balance.is_estimate,
        )
        assert [balance] == ledger.balances("ada")
        hear(ledger, 130, limit=100)

        balance = ledger.balance("ada", "calls")
        assert (130, 0, 10, 120) == (balance.limit, balance.used, balance.held, balance.available)

    def test_heard_others(self, ledger: ServiceLedger) -> None:
        """An answer about one customer changes nothing of another."""
        hear(ledger, 10)
        hear(ledger, 20, "bob")
        hear(ledger, 0)

        assert (0, 20) == (available(ledger), available(ledger, "bob"))

    # Races

    def test_serve_fifty(self, ledger: ServiceLedger) -> None:
        """Fifty threads that all hear 10 and then place 1 let exactly 10 through."""

        def call(number: int) -> object:
            hear(ledger, 10)
            return place(ledger, f"h{number}", 1)

        results = at_once(50, call)

        assert (50, 40) == (len(results), refused(results))
        assert 0 == available(ledger)

    def test_serve_one_claim(self, ledger: ServiceLedger) -> None:
        """Of twenty that claim at the same moment one gets the account."""
        hear(ledger, 10)
        use(ledger, "h1", 1)
        results = at_once(20, lambda number: ledger.claim(f"c{number}", LEASE))

        assert 1 == sum(isinstance(result, Claimed) for result in results)
        assert 20 == sum(isinstance(result, Claimed) or result == LEASE for result in results)

    # The outbox

    def test_outbox(self, ledger: ServiceLedger, clock: Clock) -> None:
        """Every usage event waits until the service has acknowledged it, and is told with its amount and id, in order."""
        hear(ledger, 10)
        use(ledger, "h1", 4)
        clock.advance(2)
        record(ledger, "rec_1", 5)
        assert [("gen_h1", 4, "waiting", 0), ("rec_1", 5, "waiting", 0)] == waiting(ledger)
        summary = ledger.undelivered_summary()
        assert (2, 0, 0, 2) == (summary.waiting, summary.parked, summary.dead, summary.oldest)

        assert [("gen_h1", 4), ("rec_1", 5)] == deliver(ledger)
        assert [] == waiting(ledger)
        summary = ledger.undelivered_summary()
        assert (0, 0, 0, None) == (summary.waiting, summary.parked, summary.dead, summary.oldest)

    def test_outbox_nothing(self, ledger: ServiceLedger) -> None:
        """An event of 0 is kept and never told; a settle that is repeated is told once."""
        hear(ledger, 10)
        use(ledger, "h1", 0)
        use(ledger, "h2", 3)
        settle(ledger, "h2", 3)

        assert [("gen_h1", 0), ("gen_h2", 3)] == billed(ledger)
        assert [("gen_h2", 3)] == deliver(ledger)

    def test_outbox_late(self, ledger: ServiceLedger) -> None:
        """A late settle is told, too; so is that of a hold that nobody knows."""
        hear(ledger, 10)
        place(ledger, "h1", 4)
        release(ledger, "h1")
        settle(ledger, "h1", 4)
        settle(ledger, "h2", 2)

        assert [("gen_h1", 4), ("gen_h2", 2)] == deliver(ledger)

    def test_outbox_unbound(self, unbound: ServiceLedger) -> None:
        """A ledger without a service keeps no outbox."""
        record(unbound, "rec_1", 5)

        assert [] == waiting(unbound)
        assert None is unbound.claim("c1", LEASE)
        assert 0 == unbound.replay()
        (event,) = unbound.usage_events()
        assert (None, None) == (event.reference, event.delivered)

    def test_outbox_details(self, ledger: ServiceLedger) -> None:
        """What the service answered comes back with the usage event, and its reference; before that only the reference does."""
        hear(ledger, 10, reference="sub_1")
        use(ledger, "h1", 4)
        (event,) = ledger.usage_events("ada")
        assert ("sub_1", None) == (event.reference, event.delivered)
        mark(ledger, claim(ledger), details={"price": "price_9"})

        (event,) = ledger.usage_events("ada")
        assert ("sub_1", {"price": "price_9"}) == (event.reference, event.delivered)
        assert event == ledger.usage_event("ada", "calls", "gen_h1")

    def test_reference_of_the_hold(self, ledger: ServiceLedger, clock: Clock) -> None:
        """An event belongs to the reference that was in force when its hold was placed; a record to the present one."""
        hear(ledger, 10, reference="sub_1")
        place(ledger, "h1", 1)
        place(ledger, "h2", 1)
        place(ledger, "h3", 1, owner="dead", on_unknown="charge")
        release(ledger, "h2")
        hear(ledger, 10, reference="sub_2")
        clock.advance(1)
        place(ledger, "h4", 1)
        hear(ledger, 10, reference="sub_2")
        for hold_id in ("h1", "h2", "h4"):
            settle(ledger, hold_id, 1)
        record(ledger, "rec_1", 1)
        clock.advance(121)
        ledger.recover()

        assert {"gen_h1": "sub_1", "gen_h2": "sub_1", "gen_h4": "sub_2", "rec_1": "sub_2", "hold_h3": "sub_1"} == {
            event.transaction_id: event.reference for event in ledger.usage_events()
        }

    def test_reference_of_the_operation(self, ledger: ServiceLedger, clock: Clock) -> None:
        """So does the event of a hold that was placed for an operation."""
        hear(ledger, 10, reference="sub_1")
        place(ledger, "h1", 1, operation="req_1", scope="s1")
        clock.advance(1)
        hear(ledger, 10, reference="sub_2")
        settle(ledger, "h1", 1)

        assert ["sub_1"] == [event.reference for event in ledger.usage_events()]

    def test_reference_found_later(self, ledger: ServiceLedger) -> None:
        """What was recorded before anything was heard of the customer gets the first reference that is heard."""
        record(ledger, "rec_1", 1)
        hear(ledger, 10, reference="sub_1")

        assert ["sub_1"] == [outgoing.event.reference for outgoing in claim(ledger).events]
        assert 9 == available(ledger)

    # Claims

    def test_claim_excludes(self, ledger: ServiceLedger, clock: Clock) -> None:
        """While one has claimed an account nobody else gets its events; once the lease is out or it is marked, the next one does."""
        hear(ledger, 10)
        use(ledger, "h1", 1)
        use(ledger, "h2", 1)
        first = claim(ledger, "c1")
        assert [("gen_h1", 1)] == told(first.events)
        assert LEASE == ledger.claim("c2", LEASE)
        clock.advance(LEASE)
        second = claim(ledger, "c2")
        assert [("gen_h1", 1)] == told(second.events)
        assert (1, 2) == (first.events[0].attempts, second.events[0].attempts)
        mark(ledger, second)

        assert [("gen_h2", 1)] == told(claim(ledger, "c3").events)

    def test_claim_lost(self, ledger: ServiceLedger, clock: Clock) -> None:
        """Who comes back after its lease has told the truth all the same: delivered once, and the other's claim stays."""
        hear(ledger, 10)
        use(ledger, "h1", 4)
        use(ledger, "h2", 1)
        late = claim(ledger, "late")
        clock.advance(LEASE)
        other = claim(ledger, "other")
        mark(ledger, late, details={"by": "late"})
        assert isinstance(ledger.claim("third", LEASE), float)
        mark(ledger, other, details={"by": "other"})
        mark(ledger, other)

        assert [("gen_h2", 1, "waiting", 0)] == waiting(ledger)
        assert [{"by": "late"}, None] == [event.delivered for event in ledger.usage_events()]

    def test_claim_in_turn(self, ledger: ServiceLedger) -> None:
        """Claims go round the accounts, so that one with much to tell does not hold up the others."""
        for customer in ("ada", "bob", "cy"):
            hear(ledger, 10, customer)
            use(ledger, f"h_{customer}", 1, customer=customer)
        seen: list[str] = []
        behind = 0
        for number in range(3):
            claimed = claim(ledger, f"c{number}", behind=behind)
            behind = claimed.account_no
            seen.append(claimed.customer)

        assert ["ada", "bob", "cy"] == seen
        assert isinstance(ledger.claim("c9", LEASE, behind=behind), float)

    def test_claim_several(self, ledger: ServiceLedger) -> None:
        """Several events go together only where none of them was tried before; one that was goes alone."""
        hear(ledger, 10)
        for number in range(4):
            use(ledger, f"h{number}", 1)
        claimed = claim(ledger, limit=2)
        assert [("gen_h0", 1), ("gen_h1", 1)] == told(claimed.events)
        ledger.mark(claimed, [Mark(claimed.events[0].no, "delivered"), Mark(claimed.events[1].no, "again")])

        claimed = claim(ledger, limit=9)
        assert [("gen_h1", 1)] == told(claimed.events)
        mark(ledger, claimed)
        assert [("gen_h2", 1), ("gen_h3", 1)] == told(claim(ledger, limit=9).events)

    def test_claim_unused(self, ledger: ServiceLedger) -> None:
        """A claim that comes back without marks was never tried."""
        hear(ledger, 10)
        use(ledger, "h1", 1)
        use(ledger, "h2", 1)
        claimed = claim(ledger, limit=2)
        ledger.mark(claimed, [])
        ledger.mark(claimed, [])
        assert [("gen_h1", 1, "waiting", 0), ("gen_h2", 1, "waiting", 0)] == waiting(ledger)

        assert [("gen_h1", 1), ("gen_h2", 1)] == told(claim(ledger, limit=2).events)

    # What becomes of what was sent

    def test_again(self, ledger: ServiceLedger, clock: Clock) -> None:
        """What shall be tried again waits for its pause, first in its account, and its failures in a row are counted."""
        hear(ledger, 10)
        use(ledger, "h1", 1)
        use(ledger, "h2", 1)
        mark(ledger, claim(ledger), "again", reason="busy", pause=5.0)
        assert 5.0 == ledger.claim("c2", LEASE)
        (first, _) = ledger.undelivered()
        assert ("waiting", 1, "busy", clock.at(5)) == (first.state, first.attempts, first.reason, first.not_before)
        clock.advance(5)

        claimed = claim(ledger)
        assert ([("gen_h1", 1)], 1) == (told(claimed.events), claimed.failures)
        mark(ledger, claimed)
        assert 0 == claim(ledger).failures

    def test_again_for_a_day(self, ledger: ServiceLedger, clock: Clock) -> None:
        """An event that has failed for a day while the service answered to others is dead; nothing is dropped, and the next one goes."""
        hear(ledger, 10)
        use(ledger, "h1", 1)
        use(ledger, "h2", 1)
        outcomes: list[str] = []
        for _ in range(26):
            claimed = claim(ledger)
            clock.advance(1)
            hear(ledger, 10)
            outcomes += mark(ledger, claimed, "again", reason="500 what")
            clock.advance(3599)

        assert [*["again"] * 24, "dead"] == outcomes[:25]
        assert [("gen_h1", 1, "dead", 25)] == waiting(ledger, "dead")
        assert "500 what" == next(ledger.undelivered(state="dead")).reason
        assert ["gen_h2"] == [name for name, *_ in waiting(ledger, "waiting")]

    def test_again_while_it_is_down(self, ledger: ServiceLedger, clock: Clock) -> None:
        """While the service answers to nobody no event is given up, however long that lasts."""
        hear(ledger, 10)
        clock.advance(1)
        use(ledger, "h1", 1)
        for _ in range(72):
            assert ("again",) == mark(ledger, claim(ledger), "again")
            clock.advance(3600)

        assert [("gen_h1", 1)] == deliver(ledger)

    def test_park(self, ledger: ServiceLedger) -> None:
        """A parked account waits as a whole, what comes later, too; nobody else's does. Replayed, it goes in order."""
        for customer in ("ada", "bob"):
            hear(ledger, 10, customer)
        for number in range(2):
            use(ledger, f"h{number}", 1)
        mark(ledger, claim(ledger), "park", reason="the meter is blocked")
        use(ledger, "h2", 1)
        use(ledger, "h3", 1, customer="bob")
        assert [("gen_h3", 1)] == deliver(ledger)
        assert ["the meter is blocked"] * 3 == [found.reason for found in ledger.undelivered(state="parked")]
        summary = ledger.undelivered_summary()
        assert (0, 3, 0) == (summary.waiting, summary.parked, summary.dead)
        assert None is ledger.claim("c2", LEASE)

        assert 3 == ledger.replay("ada")
        assert [("gen_h0", 1), ("gen_h1", 1), ("gen_h2", 1)] == deliver(ledger)

    def test_dead(self, ledger: ServiceLedger) -> None:
        """A dead event stays, with its reason, and lets the next one go. Replayed by its id, it is told after all."""
        hear(ledger, 10)
        use(ledger, "h1", 3)
        use(ledger, "h2", 1)
        mark(ledger, claim(ledger), "dead", reason="no such price")
        assert [("gen_h2", 1)] == deliver(ledger)
        assert [("gen_h1", 3, "dead", 1)] == waiting(ledger)
        hear(ledger, 9)
        assert 6 == available(ledger)

        assert 0 == ledger.replay("ada", "calls", "gen_h2")
        assert 1 == ledger.replay("ada", "calls", "gen_h1")
        assert [("gen_h1", 3)] == deliver(ledger)

    def test_alone(self, ledger: ServiceLedger) -> None:
        """What shall go alone goes next, by itself, under the id that was noted, and as if it had never been tried; its own id stays."""
        hear(ledger, 10)
        for number in range(3):
            use(ledger, f"h{number}", 1)
        first, second, third = (claimed := claim(ledger, limit=3)).events
        marks = [
            Mark(first.no, "alone", "left out", send_as="gen_h0"),
            Mark(second.no, "alone", "taken", send_as="gen_h1.b0b"),
            Mark(third.no, "delivered"),
        ]
        assert ("alone", "alone", "delivered") == ledger.mark(claimed, marks)
        assert [("gen_h0", 1, "waiting", 0), ("gen_h1", 1, "waiting", 0)] == waiting(ledger)

        for own_id, sent_as in (("gen_h0", "gen_h0"), ("gen_h1", "gen_h1.b0b")):
            for attempts in (1, 2):
                (outgoing,) = (claimed := claim(ledger, limit=3)).events
                assert (own_id, sent_as) == (outgoing.own_id, outgoing.event.transaction_id)
                assert (attempts, 0) == (outgoing.attempts, claimed.failures)
                mark(ledger, claimed, "stop" if attempts == 1 else "delivered")
        assert ["gen_h0", "gen_h1", "gen_h2"] == [event.transaction_id for event in ledger.usage_events()]

    def test_aside(self, ledger: ServiceLedger) -> None:
        """An event that was put aside is parked by itself: what follows goes. Replayed, it is told after all."""
        hear(ledger, 10)
        use(ledger, "h1", 3)
        use(ledger, "h2", 1)
        mark(ledger, claim(ledger), "aside", reason="another event")
        use(ledger, "h3", 1)
        assert [("gen_h2", 1), ("gen_h3", 1)] == deliver(ledger)
        assert [("gen_h1", 3, "parked", 1)] == waiting(ledger)
        assert "another event" == next(ledger.undelivered(state="parked")).reason

        assert 1 == ledger.replay("ada", "calls", "gen_h1")
        assert [("gen_h1", 3)] == deliver(ledger)

    def test_namesake(self, ledger: ServiceLedger) -> None:
        """Only another customer's event on the same meter is a namesake."""
        for customer in ("ada", "bob"):
            hear(ledger, 10, customer)
        use(ledger, "h1", 1)
        assert not ledger.has_namesake("ada", "calls", "gen_h1")
        assert ledger.has_namesake("bob", "calls", "gen_h1")
        assert not ledger.has_namesake("bob", "images", "gen_h1")
        assert not ledger.has_namesake("bob", "calls", "gen_h2")

    def test_stop(self, ledger: ServiceLedger) -> None:
        """What a service refused because of us waits on, unchanged."""
        hear(ledger, 10)
        use(ledger, "h1", 3)
        mark(ledger, claim(ledger), "stop", reason="401")

        assert [("gen_h1", 3, "waiting", 1)] == waiting(ledger)
        assert [("gen_h1", 3)] == deliver(ledger)

    def test_replay_filters(self, ledger: ServiceLedger) -> None:
        """A replay reaches the customer, meter and id that it names, or everything."""
        for customer in ("ada", "bob"):
            hear(ledger, 10, customer)
            use(ledger, f"h_{customer}", 1, customer=customer)
            mark(ledger, claim(ledger), "dead")

        assert 0 == ledger.replay("cy")
        assert 0 == ledger.replay("ada", "images")
        assert 1 == ledger.replay("ada")
        assert 1 == ledger.replay()
        assert 0 == ledger.replay()

    # Orphans that were charged

    def orphan(self, ledger: ServiceLedger, clock: Clock, amount: int = 8) -> None:
        """Hold h1 was charged because its owner died."""
        hear(ledger, 10)
        place(ledger, "h1", amount, owner="dead", on_unknown="charge")
        clock.advance(121)
        ledger.recover()

    def test_orphan_told_later(self, ledger: ServiceLedger, clock: Clock) -> None:
        """An orphan's charge is told after an hour; meanwhile later events go, and the credits are gone here."""
        self.orphan(ledger, clock)
        use(ledger, "h2", 1)
        assert [("gen_h2", 1)] == deliver(ledger)
        assert 1 == available(ledger)
        assert 3600 == ledger.claim("c1", LEASE)
        clock.advance(3600)

        assert [("hold_h1", 8)] == deliver(ledger)

    def test_orphan_cost_less(self, ledger: ServiceLedger, clock: Clock) -> None:
        """Where the truth was less, and comes before the service was told, only the truth is told; the rest is available at once."""
        self.orphan(ledger, clock)
        settle(ledger, "h1", 3)
        assert 7 == available(ledger)
        hear(ledger, 10)
        assert 7 == available(ledger)
        assert [("hold_h1", 3)] == deliver(ledger)
        hear(ledger, 7)

        assert 7 == available(ledger)
        assert [("hold_h1", 8), ("hold_h1.c1", 0)] == billed(ledger)

    def test_orphan_cost_nothing(self, ledger: ServiceLedger, clock: Clock) -> None:
        """Where the truth was nothing, nothing is told."""
        self.orphan(ledger, clock)
        settle(ledger, "h1", 0)

        assert [] == deliver(ledger)
        assert [] == waiting(ledger)
        assert 10 == available(ledger)

    def test_orphan_cost_more(self, ledger: ServiceLedger, clock: Clock) -> None:
        """Where the truth was more, both events are told at once."""
        self.orphan(ledger, clock)
        settle(ledger, "h1", 9)

        assert [("hold_h1", 8), ("hold_h1.c1", 1)] == deliver(ledger)
        assert 1 == available(ledger)

    @pytest.mark.parametrize("is_delivered", [True, False], ids=["delivered", "on its way"])
    def test_orphan_told_too_much(self, ledger: ServiceLedger, clock: Clock, is_delivered: bool) -> None:
        """Where the service was told already, or may have been, nothing is available that it does not say; what to give back there is shown."""
        self.orphan(ledger, clock)
        clock.advance(3600)
        claimed = claim(ledger)
        if is_delivered:
            mark(ledger, claimed)
        settle(ledger, "h1", 3)
        mark(ledger, claimed)
        assert 2 == available(ledger)
        hear(ledger, 2)
        assert 2 == available(ledger)

        (owed,) = ledger.undelivered()
        assert ("hold_h1.c1", 0, "dead") == (owed.event.transaction_id, owed.amount, owed.state)
        assert "give 5 back" in (owed.reason or "")

    def test_orphan_unlimited(self, ledger: ServiceLedger, clock: Clock) -> None:
        """An unlimited account's orphan is told the truth, too."""
        hear(ledger, None)
        place(ledger, "h1", 8, owner="dead", on_unknown="charge")
        clock.advance(121)
        ledger.recover()
        settle(ledger, "h1", 3)
        hear(ledger, 10)

        assert 7 == available(ledger)
        assert [("hold_h1", 3)] == deliver(ledger)

    # The rest

    def test_serve_enlarged(self, ledger: ServiceLedger) -> None:
        """A hold is enlarged against what the service said."""
        hear(ledger, 10)
        place(ledger, "h1", 4)
        enlarge(ledger, "h1", 10)

        assert 0 == available(ledger)

    def test_serve_summary_by_state(self, ledger: ServiceLedger) -> None:
        """What is not delivered is listed by customer, meter and state, and a state that is none is refused, naming it."""
        for customer in ("ada", "bob"):
            hear(ledger, 10, customer)
            use(ledger, f"h_{customer}", 1, customer=customer)

        assert ["gen_h_bob"] == [found.event.transaction_id for found in ledger.undelivered("bob", "calls")]
        assert [] == list(ledger.undelivered("bob", "images"))
        assert [] == list(ledger.undelivered(state="parked"))
        with pytest.raises(ValueError, match="'lost'"):
            ledger.undelivered(state="lost")
