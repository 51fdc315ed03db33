"""What a ledger may be asked, and what it answers of what it does not know."""

from __future__ import annotations

import pytest

from ...core.steps import AddGrant, Place, Record
from ...errors import InsufficientCreditsError
from ...ledger import Ledger
from ...records import MAX_AMOUNT, MAX_TOTAL
from .common import (
    BAD_AMOUNTS,
    BAD_IDS,
    BAD_NAMES,
    GOOD_NAMES,
    Contract,
    Numbers,
    amount_steps,
    billed,
    grant,
    hold_of,
    id_steps,
    numbers,
    place,
    record,
    revoke,
    set_unlimited,
    settle,
    steps_for,
)

__all__ = ["Inputs", "Unknown"]


class Inputs(Contract):
    """What a ledger may be asked, and how it refuses the rest."""

    @pytest.mark.parametrize("bad", BAD_NAMES, ids=lambda bad: ascii(bad)[:12])
    def test_input_bad_names(self, ledger: Ledger, bad: str) -> None:
        """A name that is empty, too long, padded, unstorable or no text is a ValueError that names it, whatever the step."""
        for step in steps_for(bad, "calls"):
            with pytest.raises(ValueError, match="customer") as caught:
                ledger.run(step)

            assert len(repr(bad)) > 99 or repr(bad) in str(caught.value), step

        for step in steps_for("ada", bad):
            with pytest.raises(ValueError, match="meter") as caught:
                ledger.run(step)

            assert len(repr(bad)) > 99 or repr(bad) in str(caught.value), step

        assert 0 == ledger.verify().accounts

    @pytest.mark.parametrize("bad", BAD_NAMES, ids=lambda bad: ascii(bad)[:12])
    def test_input_bad_names_of_reports(self, ledger: Ledger, bad: str) -> None:
        """Asking for the balance of a name that cannot be is a ValueError, too: it would always be 0."""
        with pytest.raises(ValueError, match="customer"):
            ledger.balance(bad, "calls")
        with pytest.raises(ValueError, match="meter"):
            ledger.balance("ada", bad)
        with pytest.raises(ValueError, match="customer"):
            ledger.balances(bad)

    @pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: ascii(bad)[:12])
    def test_input_bad_ids(self, ledger: Ledger, bad: str) -> None:
        """A hold, transaction or grant id that breaks the rules of names, or is over 255 characters, is a ValueError that names it."""
        for step in id_steps(bad):
            if isinstance(step, Place) and step.operation is None and step.hold_id == "h1":
                continue  # None is no bad operation, it is none at all.
            with pytest.raises(ValueError, match=r"(?i)id|operation") as caught:
                ledger.run(step)

            assert len(repr(bad)) > 99 or repr(bad) in str(caught.value), step

        assert 0 == ledger.verify().accounts

    @pytest.mark.parametrize("bad", BAD_AMOUNTS, ids=repr)
    def test_input_bad_amounts(self, ledger: Ledger, bad: int) -> None:
        """An amount that is no whole number between 0 and 2^53 − 1 is a ValueError that names it, before anything else is looked at."""
        for step in amount_steps(bad):
            with pytest.raises(ValueError, match="amount") as caught:
                ledger.run(step)

            assert repr(bad) in str(caught.value), step

        assert 0 == ledger.verify().accounts

    def test_input_grant_of_nothing(self, ledger: Ledger) -> None:
        """A grant gives at least one credit."""
        with pytest.raises(ValueError, match="0"):
            grant(ledger, 0)

        assert 0 == ledger.verify().accounts

    def test_input_bad_input_leaves_the_hold(self, ledger: Ledger) -> None:
        """A settle with bad input leaves the hold as it was, and the corrected one settles it."""
        grant(ledger, 10)
        place(ledger, "h1", 4)

        with pytest.raises(ValueError, match="-1"):
            settle(ledger, "h1", -1)

        assert Numbers(10, held=4, available=6) == numbers(ledger)
        assert "settled" == settle(ledger, "h1", 3).outcome
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_input_names_are_kept_apart(self, ledger: Ledger) -> None:
        """Names are compared byte by byte: upper and lower case, composed and decomposed letters are different customers."""
        for number, name in enumerate(GOOD_NAMES, 1):
            grant(ledger, number, customer=name)
            place(ledger, f"h{number}", number, customer=name, meter="calls")

        assert list(range(1, len(GOOD_NAMES) + 1)) == [ledger.balance(name, "calls").held for name in GOOD_NAMES]

    def test_input_meters_are_kept_apart(self, ledger: Ledger) -> None:
        """What was granted on one meter pays for nothing on another."""
        for number, name in enumerate(GOOD_NAMES, 1):
            grant(ledger, number, meter=name)

        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h1", 2, meter=GOOD_NAMES[0])

        assert list(range(1, len(GOOD_NAMES) + 1)) == [ledger.balance("ada", name).available for name in GOOD_NAMES]
        assert set(GOOD_NAMES) == {balance.meter for balance in ledger.balances("ada")}

    def test_input_longest_ids(self, ledger: Ledger) -> None:
        """Ids of 255 characters work throughout."""
        long = "\U0001f600" * 255
        grant(ledger, 10, long)
        place(ledger, long, 4)
        settle(ledger, long, 3, long)
        revoke(ledger, long)

        assert [(long, 3)] == billed(ledger)

    def test_input_largest_amounts(self, ledger: Ledger) -> None:
        """The largest single amount, 2^53 − 1, can be granted, held, charged and recorded."""
        grant(ledger, MAX_AMOUNT)
        place(ledger, "h1", MAX_AMOUNT)
        settle(ledger, "h1", MAX_AMOUNT)
        record(ledger, "rec_1", MAX_AMOUNT)

        assert Numbers(MAX_AMOUNT, used=2 * MAX_AMOUNT, debt=MAX_AMOUNT) == numbers(ledger)

    def test_input_total_of_grants(self, ledger: Ledger) -> None:
        """An account's grants add up to 2^62 at most; one more is a ValueError and changes nothing."""
        ledger.submit_all([AddGrant("ada", "calls", MAX_AMOUNT, f"g{n}") for n in range(512)]).result()
        grant(ledger, MAX_TOTAL - 512 * MAX_AMOUNT, "last")

        with pytest.raises(ValueError, match="too large"):
            grant(ledger, 1, "one more")

        assert Numbers(MAX_TOTAL, available=MAX_TOTAL) == numbers(ledger)
        assert 513 == len(list(ledger.grants("ada")))

    def test_input_total_of_use(self, ledger: Ledger) -> None:
        """What an account used adds up to 2^62 at most; beyond that a settle is a ValueError, and its hold stays."""
        place(ledger, "h1", 0)
        ledger.submit_all([Record("ada", "calls", f"rec_{n}", MAX_AMOUNT) for n in range(512)]).result()
        record(ledger, "last", MAX_TOTAL - 512 * MAX_AMOUNT)

        with pytest.raises(ValueError, match="too large"):
            record(ledger, "one more", 1)
        with pytest.raises(ValueError, match="too large"):
            settle(ledger, "h1", 1)

        assert MAX_TOTAL == numbers(ledger).used
        assert "open" == hold_of(ledger, "h1").state
        assert "settled" == settle(ledger, "h1", 0).outcome

    def test_input_total_of_unlimited_use(self, ledger: Ledger) -> None:
        """What an unlimited account used adds up to 2^62 at most, too."""
        set_unlimited(ledger)
        ledger.submit_all([Record("ada", "calls", f"rec_{n}", MAX_AMOUNT) for n in range(512)]).result()
        record(ledger, "last", MAX_TOTAL - 512 * MAX_AMOUNT)

        with pytest.raises(ValueError, match="too large"):
            record(ledger, "one more", 1)

        assert MAX_TOTAL == ledger.balance("ada", "calls").unlimited_used

    def test_input_name_of_the_ledger(self, ledger: Ledger) -> None:
        """A ledger has a name to be shown in messages."""
        assert ledger.name
        assert ledger.name.isprintable()


class Unknown(Contract):
    """Customers nobody has heard of."""

    def test_unknown_balance(self, ledger: Ledger) -> None:
        """An unknown customer has 0 of everything, and asking writes nothing."""
        assert Numbers(0) == numbers(ledger, "nobody")
        assert [] == ledger.balances("nobody")
        assert 0 == ledger.verify().accounts

    def test_unknown_refusal(self, ledger: Ledger) -> None:
        """An unknown customer is refused like one without credits, and the refusal leaves no trace."""
        with pytest.raises(InsufficientCreditsError) as caught:
            place(ledger, "h1", 1, customer="nobody")

        error = caught.value
        assert ("nobody", "calls", 0, 1, 0) == (
            error.customer,
            error.meter,
            error.available,
            error.required,
            error.held,
        )
        assert not error.is_transient
        assert [] == list(ledger.holds())
        assert 0 == ledger.verify().accounts

    def test_unknown_free_call(self, ledger: Ledger) -> None:
        """A hold of 0 fits an unknown customer, who is known from then on."""
        assert 0 == place(ledger, "h1", 0).amount
        assert ["calls"] == [balance.meter for balance in ledger.balances("ada")]

    def test_unknown_nothing_to_list(self, ledger: Ledger) -> None:
        """Listings of an unknown customer are empty."""
        grant(ledger, 10)
        record(ledger, "rec_1", 1)
        place(ledger, "h1", 1)

        assert [] == list(ledger.usage_events("nobody"))
        assert [] == list(ledger.holds("nobody"))
        assert [] == list(ledger.grants("nobody"))
        assert ledger.usage_event("nobody", "calls", "rec_1") is None
