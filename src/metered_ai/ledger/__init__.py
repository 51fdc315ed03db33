"""What keeps: the `Ledger` protocol and its promises. Each sentence has a test in `metered_ai.testing.LedgerContract`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Protocol

from ..core.steps import Step, StepResult
from ..records import Balance, Grant, Hold, UsageEvent, UsageSum
from .reports import Recovery, Verification

__all__ = ["Ledger", "Outcomes", "Recovery", "Verification"]

Outcomes = list[StepResult | Exception]
"""For each step its result, or the exception that `run` would have raised."""


class Ledger(Protocol):
    """
    Keeps accounts, holds and usage events.

    - A step is one transaction: all of it, or nothing. The same step again changes nothing and answers as before.
    - Place checks and reserves in one statement: whatever runs beside it, the sum of holds and charges never passes what was granted.
    - A hold ends once: settled, released, expired or charged. After that only a late settle adds to the record.
    - A settle that has returned survives kill -9, and power loss with `durability="full"`.
    - At most one usage event per customer, meter and transaction id, for ever.
    - Nothing done for one customer changes a row of another.
    - Threads, forks, several event loops and several processes on one ledger are allowed.
    - A storage failure is a BillingUnavailableError; bad input is a ValueError that names the value; neither leaves anything half done.
    """

    @property
    def name(self) -> str:
        """The ledger's address for messages, without secrets."""
        ...

    def run(self, step: Step, /) -> StepResult:
        """Do one step and return its result. A lone caller's step runs in its own thread; contended callers share a commit."""
        ...

    def submit(self, step: Step, /) -> Future[StepResult]:
        """Hand one step over and return at once. Never blocks; the step is done even if nobody waits for it."""
        ...

    def submit_all(self, steps: Sequence[Step], /) -> Future[Outcomes]:
        """Hand several steps over at once, in order. One step's failure never fails its neighbours."""
        ...

    def balance(self, customer: str, meter: str, /) -> Balance:
        """The balance now. An unknown customer has 0; reading writes nothing."""
        ...

    def balances(self, customer: str, /) -> list[Balance]:
        """The balances of all meters the customer has an account on, by meter."""
        ...

    def accounts(self, meter: str | None = None) -> Iterator[Balance]:
        """The balances of every account, in the order they were made. Read in pages: no long transaction."""
        ...

    def usage_events(
        self,
        customer: str | None = None,
        meter: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[UsageEvent]:
        """Usage events, oldest first within each account; `since` inclusive, `until` exclusive. Read in pages: no long transaction."""
        ...

    def usage_event(self, customer: str, meter: str, transaction_id: str, /) -> UsageEvent | None:
        """One usage event by its transaction id."""
        ...

    def usage(
        self,
        customer: str | None = None,
        meter: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        by: Sequence[str] = ("day", "meter", "model"),
    ) -> Iterator[UsageSum]:
        """Usage added up by any of customer, day (UTC), meter and model."""
        ...

    def holds(
        self, customer: str | None = None, meter: str | None = None, *, state: str | None = None
    ) -> Iterator[Hold]:
        """Open holds, and those that ended without being settled; `state` chooses one kind."""
        ...

    def grants(self, customer: str | None = None, meter: str | None = None) -> Iterator[Grant]:
        """Grants, oldest first within each account."""
        ...

    def sweep(self, limit: int = 500) -> Recovery:
        """Resolve up to `limit` holds whose owner's lease is out, by the policy each was placed with."""
        ...

    def recover(self) -> Recovery:
        """Sweep until nothing is left to resolve."""
        ...

    def verify(self) -> Verification:
        """Recompute every invariant from the records."""
        ...

    def sync(self) -> None:
        """Return when everything that has returned before survives power loss, whatever the durability."""
        ...

    def close(self) -> None:
        """Finish what was handed over and close. Open holds stay; closing twice changes nothing."""
        ...
