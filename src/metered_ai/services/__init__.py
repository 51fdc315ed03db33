"""What tells: the `BillingService` protocol, all that a remote billing system must offer. It holds nothing and enforces nothing; a ledger does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from ..errors import BillingUnavailableError
from ..records import UsageEvent

__all__ = ["BillingService", "BulkBillingService", "Delivery", "ServiceBalance", "ServiceRefusedError"]


class ServiceRefusedError(BillingUnavailableError):
    """The billing service refuses us, whatever is asked: a wrong key. Nothing is sent until a person has looked."""


@dataclass(frozen=True, slots=True)
class ServiceBalance:
    """
    What a service says of one customer and meter. `available` None: it refuses nothing, the account is unlimited.

    `reference` is the service's own word for what was checked (a subscription, a plan, a wallet). It is kept with every usage event
    of a call that was admitted on it, and comes back as `UsageEvent.reference`. `limit` is what the service gave in all, where it can
    tell, and an estimate in any case.
    """

    available: int | None
    reference: str | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """
    What became of one usage event that was sent.

    - `recorded`, `already_there`: the service has it, with this id and amount. It is never sent again.
    - `again`: nobody knows, or not now; the same id again later, not before `retry_after` seconds.
    - `alone`: it is certainly not recorded by this request, and is to be sent by itself.
    - `taken`: the service has this transaction id of another customer's event, and refuses it. Where the ledger has it of another, too,
      it is sent once more under an id that names the customer; else as `aside`.
    - `aside`: the service took something else for this event. It is parked for a person; the next one may go.
    - `park`: this customer's meter is stuck at the service. Its other events wait, too; nobody else's do.
    - `dead`: this event can never be recorded as it is. It is kept for a person; the next one may go.
    - `stop`: the service refuses us, whatever is sent (a wrong key). Everything waits.

    `reason` says why, without secrets. `details` are the service's own findings, such as the price it took; they come back as
    `UsageEvent.delivered`.
    """

    outcome: Literal["recorded", "already_there", "again", "alone", "taken", "aside", "park", "dead", "stop"]
    reason: str | None = None
    retry_after: float | None = None
    details: Mapping[str, str] = field(default_factory=dict[str, str])


class BillingService(Protocol):
    """
    A remote billing system that owns the balances and is told of the usage.

    - Methods block for a bounded time, may be called from any thread and after a fork, and never from an event loop.
    - Nothing is decided here about credits: the ledger holds, against what `read_balance` said.
    - The same event again, after whatever happened to the first request, records it once.
    - No method raises what an HTTP library raises, and no message carries a key.
    """

    @property
    def name(self) -> str:
        """Which system, which account of it and which mode (test or live), without secrets. A ledger is bound to one name for ever."""
        ...

    def check(self, customer: str, meter: str, amount: int, /) -> None:
        """Raise ValueError naming the value that this service could never record. Asked before each hold; does no I/O."""
        ...

    def read_balance(self, customer: str, meter: str, /) -> ServiceBalance:
        """
        The balance as the service has it now.

        NoSubscriptionError where the customer has no plan at all; BillingUnavailableError where the service did not answer,
        ServiceRefusedError where it refuses our key.
        """
        ...

    def write_usage_event(self, event: UsageEvent, /) -> Delivery:
        """Send one usage event, with `event.reference`. Never raises for what the service or the network does: the answer says it."""
        ...

    def close(self) -> None:
        """Give back connections. Closing twice changes nothing."""
        ...


@runtime_checkable
class BulkBillingService(BillingService, Protocol):
    """A service that also takes many usage events of one customer and meter at once."""

    def write_usage_events(self, events: Sequence[UsageEvent], /) -> list[Delivery]:
        """One answer for each event, in order. What the service left unsaid of an event is `alone`: it is then sent by itself."""
        ...
