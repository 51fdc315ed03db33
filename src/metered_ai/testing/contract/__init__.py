"""
`LedgerContract`: what every ledger promises, as tests.

Whoever writes a ledger subclasses it, says how one is made, and lets pytest run it:

```python
class TestMyLedger(LedgerContract):
    def make_ledger(self, tmp_path, clock):
        return MyLedger(tmp_path / "credits", clock=clock)
```

`SharedLedgerContract` adds what holds where a ledger is kept outside the process. Each test's docstring is the promise it keeps,
and after each test the ledger's own `verify` must find nothing broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ...core.steps import Settled
from ...errors import AlreadyBilledError, InsufficientCreditsError
from ...ledger import Ledger
from ...records import Hold, Usage
from .books import Closing, Listing, Together, Verifying
from .common import Clock, Numbers, at_once, billed, grant, numbers, operate, place, record, refused, release, settle
from .expiry import Expiry
from .grants import Grants, Recording, Unlimited
from .holds import Enlarging, Placing, Releasing
from .inputs import Inputs, Unknown
from .leases import Leases
from .operations import Operations
from .serving import ServiceLedgerContract
from .settles import Late, SameAnswer, Settling

__all__ = ["Clock", "LedgerContract", "ServiceLedgerContract", "SharedLedgerContract"]


class LedgerContract(
    Inputs,
    Unknown,
    Placing,
    Enlarging,
    Settling,
    SameAnswer,
    Late,
    Releasing,
    Operations,
    Leases,
    Grants,
    Expiry,
    Unlimited,
    Recording,
    Listing,
    Together,
    Verifying,
    Closing,
):
    """
    What every ledger promises. Subclass it and write `make_ledger`.

    A ledger under test reads the time from the clock it is given, and the clock moves only when a test moves it.
    """


class SharedLedgerContract(LedgerContract):
    """
    What is promised besides by a ledger that is kept outside the process: two that are made in one place are the same books.

    `make_ledger` is called twice with the same folder.
    """

    @pytest.fixture
    def other(self, ledger: Ledger, tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
        """The same books, opened a second time as another process would."""
        ledger.balance("ada", "calls")
        other = self.make_ledger(tmp_path, clock)
        yield other
        other.close()

    def test_shared_survives(self, tmp_path: Path, clock: Clock) -> None:
        """Everything is still there after closing and opening again; open holds stay open."""
        ledger = self.make_ledger(tmp_path, clock)
        grant(ledger, 10, expires_at=clock.at(3600))
        place(ledger, "h1", 2)
        place(ledger, "h2", 3)
        place(ledger, "h3", 1)
        settle(ledger, "h2", 3, usage=Usage(model="gpt-5-mini", output_tokens=5), properties={"team": "blue"})
        release(ledger, "h3")
        record(ledger, "rec_1", 1, customer="bob")

        def books(ledger: Ledger) -> list[object]:
            return [
                [*ledger.balances("ada"), *ledger.balances("bob")],
                list(ledger.usage_events()),
                list(ledger.holds()),
                list(ledger.grants()),
                ledger.verify(),
            ]

        before = books(ledger)
        ledger.close()
        again = self.make_ledger(tmp_path, clock)
        try:
            assert before == books(again)
            assert "settled" == settle(again, "h1", 2).outcome
            assert Numbers(10, used=5, available=5) == numbers(again)
        finally:
            again.close()

    def test_shared_at_once(self, ledger: Ledger, other: Ledger) -> None:
        """What one has done the other sees at once."""
        grant(ledger, 10)
        place(other, "h1", 4)
        assert Numbers(10, held=4, available=6) == numbers(ledger)
        settle(ledger, "h1", 3)

        assert Numbers(10, used=3, available=7) == numbers(other)
        assert "again" == settle(other, "h1", 4).outcome
        with pytest.raises(InsufficientCreditsError):
            place(other, "h2", 8)

    def test_shared_credits(self, ledger: Ledger, other: Ledger) -> None:
        """Two share a customer's 10 credits among 50 threads: exactly 10 get one."""
        grant(ledger, 10)
        results = at_once(
            50, lambda number: place(other if number % 2 else ledger, f"h{number}", 1, owner=f"p{number % 2}")
        )

        assert (10, 40) == (sum(isinstance(result, Hold) for result in results), refused(results))
        assert Numbers(10, held=10) == numbers(other)

    def test_shared_settle(self, ledger: Ledger, other: Ledger) -> None:
        """Two settle the same hold from 20 threads: one event."""
        grant(ledger, 10)
        place(ledger, "h1", 4)
        results = at_once(20, lambda number: settle(other if number % 2 else ledger, "h1", 3))

        assert 1 == sum(isinstance(result, Settled) and result.outcome == "settled" for result in results)
        assert [("gen_h1", 3)] == billed(other)

    def test_shared_operation(self, ledger: Ledger, other: Ledger) -> None:
        """Two run the same operation in 20 scopes at once: one is let through."""
        grant(ledger, 100)
        results = at_once(20, lambda number: operate(other if number % 2 else ledger, f"h{number}", scope=f"s{number}"))

        assert 1 == sum(isinstance(result, Hold) for result in results)
        assert 19 == sum(isinstance(result, AlreadyBilledError) for result in results)

    def test_shared_orphans(self, ledger: Ledger, other: Ledger, clock: Clock) -> None:
        """What one leaves behind when it dies the other resolves, and no orphan is resolved twice."""
        grant(ledger, 100)
        for number in range(20):
            place(ledger, f"h{number}", 1, owner="dead", on_unknown="charge")
        clock.advance(121)
        results = at_once(6, lambda number: (other if number % 2 else ledger).recover().charged)

        assert 20 == sum(result for result in results if isinstance(result, int))
        assert Numbers(100, used=20, available=80) == numbers(other)
