"""What keeps: the `Ledger` protocol and its promises. Each sentence has a test in `metered_ai.testing.LedgerContract`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Protocol, runtime_checkable

from ..core.delivery import Claimed, Mark, Question
from ..core.steps import Step, StepResult
from ..records import Balance, Grant, Hold, OutboxSummary, Undelivered, UsageEvent, UsageSum
from .reports import Recovery, Verification

__all__ = ["Ledger", "Outcomes", "Recovery", "ServiceLedger", "Verification"]

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


@runtime_checkable
class ServiceLedger(Ledger, Protocol):
    """
    A ledger that can hold credits which a remote billing service owns, and remember what that service must still be told.

    - It is bound to one service by name, for ever, and only while it is empty. From then on credits are given there: grants, their
      revocation and unlimited accounts are refused with a ConfigurationError, and so are the holds of whoever opened it without the service.
    - Available is what the service said, less every usage event that it had not acknowledged when it was asked, less open holds: in one
      transaction with the hold. An answer counts only if it was asked for after the one that is known.
    - A usage event and its place in the outbox are one transaction, whoever writes it. An event of 0 is kept and never told.
    - An event carries the service's reference that was in force when its hold was placed.
    - Only who has claimed an account sends its events: one claim at a time over all processes, for the time of a lease by the ledger's clock.
    - Nothing leaves the outbox but by an acknowledgement. A parked account waits as a whole; an event that was put aside, or is dead, waits
      alone.
    - An orphan that was charged is told after an hour, less what a correction took back meanwhile; where the service has it already, the
      outbox shows what is to be given back there.
    - The usage events that are read carry `reference` and `delivered`; a balance is marked as an estimate.
    """

    @property
    def service(self) -> str | None:
        """The name of the service that the ledger is bound to; None if it keeps its own credits."""
        ...

    def bind(self, service: str, /) -> None:
        """Open for this service and no other, for ever. ConfigurationError, naming both, where the ledger belongs to another."""
        ...

    def ask(self, customer: str, meter: str, /) -> Question:
        """Note that a balance is about to be asked for, before the request is sent. An unknown customer leaves no row."""
        ...

    def hear(
        self, question: Question, available: int | None, /, *, reference: str | None = None, limit: int | None = None
    ) -> bool:
        """
        Take in the answer; `available` None refuses nothing, below 0 is a debt. False, and nothing changed, where the answer to a later
        question is known already.
        """
        ...

    def heard_ago(self, customer: str, meter: str, /) -> float | None:
        """Seconds since the balance in use was asked for; None where there is none, or the clock has been set back behind it."""
        ...

    def claim(self, claim: str, lease: float, /, *, limit: int = 1, behind: int = 0) -> Claimed | float | None:
        """
        Claim what is due of one account for `lease` seconds, of the next account behind the number `behind` or else the first.

        One event, or up to `limit` where none of them was tried before. Else the seconds until something is due; None if nothing waits.
        An event counts as tried from then on.
        """
        ...

    def mark(self, claimed: Claimed, marks: Sequence[Mark], /, *, give_up_after: float = 86400.0) -> tuple[str, ...]:
        """
        Note what became of a claim's events and end the claim; one without a mark was not sent. Twice changes nothing.

        What each mark came to: its outcome, or `dead` where an `again` has failed for `give_up_after` seconds while the service answered
        to others. Who marks after the lease is out still tells the truth of what was delivered.
        """
        ...

    def has_namesake(self, customer: str, meter: str, transaction_id: str, /) -> bool:
        """Whether another customer has a usage event of this transaction id on the meter. It may look into every account."""
        ...

    def replay(
        self, customer: str | None = None, meter: str | None = None, transaction_id: str | None = None, /
    ) -> int:
        """Let parked and dead events wait again, and tell how many. A parked account is replayed as a whole, in order."""
        ...

    def undelivered(
        self, customer: str | None = None, meter: str | None = None, /, *, state: str | None = None
    ) -> Iterator[Undelivered]:
        """What the service does not have yet, in order within each account; `state` waiting, parked or dead. Read in pages."""
        ...

    def undelivered_summary(self) -> OutboxSummary:
        """How much the service does not have yet, by state, and how old the oldest of it is."""
        ...
