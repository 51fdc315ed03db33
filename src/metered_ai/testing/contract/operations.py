"""Explicit transaction ids: their numbers, and who may have them."""

from __future__ import annotations

import pytest

from ...errors import AlreadyBilledError, InsufficientCreditsError
from ...ledger import Ledger
from .common import (
    Clock,
    Contract,
    Numbers,
    billed,
    grant,
    hold_of,
    numbers,
    operate,
    operate_often,
    place,
    record,
    release,
    settle,
)

__all__ = ["Operations"]


class Operations(Contract):
    """Explicit transaction ids: they name an operation, and a scope may run it several times."""

    def test_operation_numbers(self, ledger: Ledger) -> None:
        """The calls of one operation are numbered: the plain id first, then .2, .3 and so on."""
        grant(ledger, 10)

        assert ["req_1", "req_1.2", "req_1.3"] == operate_often(ledger, 3)

    def test_operation_names_the_event(self, ledger: Ledger) -> None:
        """A hold of an operation is billed under the operation's id, whatever id the answer has."""
        grant(ledger, 10)
        operate_often(ledger, 2)
        second = settle(ledger, "s1-1", 1, "gen_2")
        first = settle(ledger, "s1-0", 1, "gen_1")

        assert ("req_1", "req_1.2") == (first.event.transaction_id, second.event.transaction_id)
        assert ("settled", "settled") == (first.outcome, second.outcome)

    def test_operation_after_a_settle(self, ledger: Ledger) -> None:
        """A number that was billed is taken for ever; the scope's next call has the next one."""
        grant(ledger, 10)
        operate(ledger, "h1")
        settle(ledger, "h1", 1)

        assert "req_1.2" == operate(ledger, "h2").transaction_id

    def test_operation_after_a_release(self, ledger: Ledger) -> None:
        """A release frees the number again: running a failed call once more repeats its id."""
        grant(ledger, 10)
        operate_often(ledger, 3)
        release(ledger, "s1-1")

        assert "req_1.2" == operate(ledger, "h8").transaction_id
        release(ledger, "s1-0")
        assert "req_1" == operate(ledger, "h9").transaction_id

    def test_operation_after_the_owner_died(self, ledger: Ledger, clock: Clock) -> None:
        """A hold whose owner died frees its number as well."""
        grant(ledger, 10)
        operate(ledger, "h1")
        clock.advance(121)
        ledger.recover()

        assert "req_1" == operate(ledger, "h2").transaction_id

    def test_operation_after_a_refusal(self, ledger: Ledger) -> None:
        """A refused call takes no number."""
        grant(ledger, 10)
        with pytest.raises(InsufficientCreditsError):
            operate(ledger, "h1", 11)

        assert "req_1" == operate(ledger, "h2", 10).transaction_id

    def test_operation_again(self, ledger: Ledger) -> None:
        """Placing the same hold again keeps its number."""
        grant(ledger, 10)
        first = operate(ledger, "h1")

        assert first == operate(ledger, "h1")
        assert "req_1.2" == operate(ledger, "h2").transaction_id

    def test_operation_of_another(self, ledger: Ledger) -> None:
        """The same operation of another customer or on another meter is another operation."""
        for number, (customer, meter) in enumerate([("ada", "calls"), ("ada", "images"), ("bob", "calls")]):
            grant(ledger, 10, customer=customer, meter=meter)
            hold = operate(ledger, f"h{number}", customer=customer, meter=meter, scope=f"s{number}")

            assert "req_1" == hold.transaction_id
            assert "settled" == settle(ledger, hold.id, 1, customer=customer, meter=meter).outcome

    def test_operation_too_long(self, ledger: Ledger) -> None:
        """A number that would make the id longer than 255 characters is a ValueError; nothing is held."""
        grant(ledger, 10)
        assert "x" * 254 == operate(ledger, "h1", operation="x" * 254).transaction_id

        with pytest.raises(ValueError, match="255"):
            operate(ledger, "h2", operation="x" * 254)

        assert Numbers(10, held=1, available=9) == numbers(ledger)

    def test_operation_refused_when_billed(self, ledger: Ledger) -> None:
        """An operation that another scope has billed is refused before anything is sent, with the event of the first time."""
        grant(ledger, 10)
        operate(ledger, "h1")
        event = settle(ledger, "h1", 1).event

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2", scope="s2")

        error = caught.value
        assert ("ada", "calls", "req_1", event) == (error.customer, error.meter, error.transaction_id, error.event)
        assert Numbers(10, used=1, available=9) == numbers(ledger)
        assert [] == list(ledger.holds())

    def test_operation_refused_when_held(self, ledger: Ledger) -> None:
        """An operation that another scope holds is refused; there is no event yet."""
        grant(ledger, 10)
        operate(ledger, "h1")

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2", scope="s2")

        assert caught.value.event is None
        assert Numbers(10, held=1, available=9) == numbers(ledger)

    def test_operation_refused_when_recorded(self, ledger: Ledger) -> None:
        """An id that was recorded by hand is billed for every scope."""
        grant(ledger, 10)
        event = record(ledger, "req_1", 1)

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h1")

        assert event == caught.value.event

    def test_operation_refused_when_a_charge_was_called_so(self, ledger: Ledger) -> None:
        """An id that was given to a hold late, when it settled, is billed for every scope."""
        grant(ledger, 10)
        place(ledger, "h1", 1)
        event = settle(ledger, "h1", 1, "req_1", is_explicit=True).event

        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2")

        assert event == caught.value.event

    def test_operation_free_after_a_release(self, ledger: Ledger) -> None:
        """An operation that another scope tried and released can be run."""
        grant(ledger, 10)
        operate(ledger, "h1")
        release(ledger, "h1")

        assert "req_1" == operate(ledger, "h2", scope="s2").transaction_id

    def test_operation_not_refused_by_the_dead(self, ledger: Ledger, clock: Clock) -> None:
        """An operation that is held by a process that died can be run: its hold is resolved first."""
        grant(ledger, 10)
        operate(ledger, "h1", owner="dead")
        clock.advance(121)

        assert "req_1" == operate(ledger, "h2", scope="s2").transaction_id
        assert Numbers(10, held=1, available=9) == numbers(ledger)

    def test_operation_charged_orphan(self, ledger: Ledger, clock: Clock) -> None:
        """An orphan that is charged is billed under its operation's id, which is then taken."""
        grant(ledger, 10)
        operate(ledger, "h1", 4, on_unknown="charge")
        clock.advance(121)
        ledger.recover()

        assert [("req_1", 4)] == billed(ledger)
        with pytest.raises(AlreadyBilledError) as caught:
            operate(ledger, "h2", scope="s2")
        assert caught.value.event == ledger.usage_event("ada", "calls", "req_1")

    def test_operation_free_when_billed(self, ledger: Ledger) -> None:
        """With on_repeat="free" an operation that another scope has billed is answered again and charged nothing, even in debt."""
        grant(ledger, 10)
        operate(ledger, "h1", 4)
        event = settle(ledger, "h1", 12).event
        hold = operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert (True, 0, "req_1") == (hold.is_repeat, hold.amount, hold.transaction_id)
        settled = settle(ledger, "h2", 4, "gen_2")
        assert ("repeat", event) == (settled.outcome, settled.event)
        assert Numbers(10, used=12, debt=2) == numbers(ledger)
        ended = hold_of(ledger, "h2")
        assert ("released", "repeat") == (ended.state, ended.reason)

    def test_operation_free_again(self, ledger: Ledger) -> None:
        """A free repeat settled twice is still free."""
        grant(ledger, 10)
        operate(ledger, "h1")
        event = settle(ledger, "h1", 1).event
        operate(ledger, "h2", scope="s2", on_repeat="free")
        settle(ledger, "h2", 1)
        again = settle(ledger, "h2", 1)

        assert ("repeat", event) == (again.outcome, again.event)
        assert [("req_1", 1)] == billed(ledger)

    def test_operation_free_place_again(self, ledger: Ledger) -> None:
        """Placing a free repeat again gives the same hold, although it holds less than was asked for."""
        grant(ledger, 10)
        operate(ledger, "h1", 4)
        settle(ledger, "h1", 4)
        first = operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert first == operate(ledger, "h2", 4, scope="s2", on_repeat="free")

    def test_operation_free_runs_along(self, ledger: Ledger) -> None:
        """The second call of a repeated operation repeats the second call of the first time; the third, which is new, is charged."""
        grant(ledger, 10)
        for hold in [operate(ledger, "a1"), operate(ledger, "a2")]:
            settle(ledger, hold.id, 1)
        repeats: list[tuple[str | None, bool, str]] = []
        for number in range(3):
            hold = operate(ledger, f"b{number}", scope="s2", on_repeat="free")
            repeats.append((hold.transaction_id, hold.is_repeat, settle(ledger, hold.id, 1).outcome))

        assert [("req_1", True, "repeat"), ("req_1.2", True, "repeat"), ("req_1.3", False, "settled")] == repeats
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_operation_free_at_once(self, ledger: Ledger) -> None:
        """A repeat that is still open counts: the scope's next call looks at the next number."""
        grant(ledger, 10)
        operate(ledger, "a1")
        settle(ledger, "a1", 1)
        operate(ledger, "b1", scope="s2", on_repeat="free")
        hold = operate(ledger, "b2", scope="s2", on_repeat="free")

        assert ("req_1.2", False) == (hold.transaction_id, hold.is_repeat)

    def test_operation_free_failed(self, ledger: Ledger) -> None:
        """A free repeat that the provider refused frees its number: the next try is a repeat again."""
        grant(ledger, 10)
        operate(ledger, "a1")
        settle(ledger, "a1", 1)
        operate(ledger, "b1", scope="s2", on_repeat="free")
        release(ledger, "b1")
        hold = operate(ledger, "b2", scope="s2", on_repeat="free")

        assert ("req_1", True) == (hold.transaction_id, hold.is_repeat)

    def test_operation_free_when_held(self, ledger: Ledger) -> None:
        """With on_repeat="free" an operation that is only held is held twice; the first to settle is charged, the other released."""
        grant(ledger, 10)
        operate(ledger, "h1", 4)
        hold = operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert (False, 4, "req_1") == (hold.is_repeat, hold.amount, hold.transaction_id)
        assert Numbers(10, held=8, available=2) == numbers(ledger)
        second = settle(ledger, "h2", 3, "gen_2")
        first = settle(ledger, "h1", 4, "gen_1")
        assert ("settled", "repeat", second.event) == (second.outcome, first.outcome, first.event)
        assert [("req_1", 3)] == billed(ledger)
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_operation_free_must_fit(self, ledger: Ledger) -> None:
        """A second hold of an operation must fit like any other."""
        grant(ledger, 6)
        operate(ledger, "h1", 4)

        with pytest.raises(InsufficientCreditsError):
            operate(ledger, "h2", 4, scope="s2", on_repeat="free")

        assert Numbers(6, held=4, available=2) == numbers(ledger)

    def test_operation_number_of_a_repeat_is_kept(self, ledger: Ledger) -> None:
        """A call that lost the race and was released as a repeat keeps its number: the scope's next call has the next one."""
        grant(ledger, 10)
        operate(ledger, "h1")
        operate(ledger, "h2", scope="s2", on_repeat="free")
        settle(ledger, "h2", 1)
        settle(ledger, "h1", 1)

        assert "req_1.2" == operate(ledger, "h3").transaction_id

    def test_operation_number_of_a_late_repeat(self, ledger: Ledger, clock: Clock) -> None:
        """A repeat that was given up for dead and settles late is charged nothing, and keeps its number like any other."""
        grant(ledger, 10)
        operate(ledger, "h1")
        settle(ledger, "h1", 1)
        operate(ledger, "h2", scope="s2", on_repeat="free")
        clock.advance(121)
        ledger.recover()

        assert "repeat" == settle(ledger, "h2", 1).outcome
        assert "req_1.2" == operate(ledger, "h3", scope="s2", on_repeat="free").transaction_id
        assert Numbers(10, used=1, held=1, available=8) == numbers(ledger)

    def test_operation_number_billed_late(self, ledger: Ledger, clock: Clock) -> None:
        """A number that was billed late stays taken, although a later hold that had it is released."""
        grant(ledger, 10)
        operate(ledger, "h1", owner="dead")
        clock.advance(121)
        ledger.recover()
        assert "req_1" == operate(ledger, "h2").transaction_id
        assert "late" == settle(ledger, "h1", 1).outcome
        release(ledger, "h2")

        assert "req_1.2" == operate(ledger, "h3").transaction_id
