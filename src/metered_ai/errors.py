"""
What can go wrong, as a tree. A leaf exists only where a caller would act differently on it.

```
MeteringError
├── ConfigurationError          500  the wiring is wrong; nothing was sent
│   ├── CustomerRequiredError        nobody is named who pays
│   ├── PriceUnknownError            the pricing cannot price this call
│   └── GrantConflictError           the grant's id was used with another amount
├── InsufficientCreditsError    402  the hold does not fit; nothing was sent
│   └── NoSubscriptionError          the remote system knows no plan for the customer
├── AlreadyBilledError          409  this operation was billed before; nothing was sent
├── FeatureRequiredError        403  the customer's plan lacks a feature
├── BillingUnavailableError     503  the hold could not be placed; nothing was sent
│   ├── LedgerCorruptError           the ledger's file is damaged or not a ledger
│   └── SchemaTooNewError            the ledger was written by a newer release
├── UnmeteredCallError          501  this door cannot be metered; nothing was sent
└── UsageNotRecordedError       500  answered, not recorded yet (on_settle_failure="raise")
```

None of them is an `openai.OpenAIError`: code that retries or hides the provider's errors must not swallow a refusal.
All of them pickle. Messages carry names and numbers, never prompts, answers or keys.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .records import UsageEvent

__all__ = [
    "AlreadyBilledError",
    "BillingUnavailableError",
    "ConfigurationError",
    "CustomerRequiredError",
    "FeatureRequiredError",
    "GrantConflictError",
    "InsufficientCreditsError",
    "LedgerCorruptError",
    "MeteringError",
    "NoSubscriptionError",
    "PriceUnknownError",
    "SchemaTooNewError",
    "UnmeteredCallError",
    "UsageNotRecordedError",
]


def _rebuild(cls: type[MeteringError], message: str, state: dict[str, Any]) -> MeteringError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class MeteringError(Exception):
    """
    The root of everything this library raises itself.

    `http_status` is what a web application would answer with. `str(error)` is for the operator.
    """

    http_status: ClassVar[int] = 500

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self._state())

    def _state(self) -> dict[str, Any]:
        return dict(self.__dict__)


class ConfigurationError(MeteringError):
    """The client, the billing or the ledger is wired in a way that cannot work. Nothing was sent."""


class CustomerRequiredError(ConfigurationError):
    """No customer is named by `with_billing`, `bill_to` or the constructor. Nothing was sent."""


class PriceUnknownError(ConfigurationError):
    """The pricing has no price for this call: an unknown model, or a door that reports nothing it can use. Nothing was sent."""


class GrantConflictError(ConfigurationError):
    """A grant with this id exists with another amount. The first stands; nothing was changed."""


class InsufficientCreditsError(MeteringError):
    """
    The customer has fewer credits available than the call must hold. Nothing was sent and nothing was held.

    `available`, `required` and `held` are credits of the meter. `held` is what calls in flight keep at this moment.
    `is_transient` tells that the call would fit once those have ended. `to_dict()` is the body of a 402 answer, fit for an end user.
    """

    http_status: ClassVar[int] = 402

    def __init__(
        self,
        *,
        customer: str,
        meter: str,
        available: int,
        required: int,
        held: int = 0,
        is_transient: bool = False,
        upgrade_url: str | None = None,
        message: str | None = None,
    ) -> None:
        self.customer = customer
        self.meter = meter
        self.available = available
        self.required = required
        self.held = held
        self.is_transient = is_transient
        self.upgrade_url = upgrade_url
        if message is None:
            message = f"customer {customer!r} needs {required} on meter {meter!r} but has {available} available"
            if held:
                message += f" ({held} held by calls in flight)"
        super().__init__(message)

    def to_dict(self) -> dict[str, object]:
        """The refusal as JSON for the end user: `error`, `message`, `availableBalance`, `required`, `upgradeUrl`."""
        return {
            "error": "insufficient_credits",
            "message": f"Insufficient credits for {self.meter}. Available: {self.available}, Required: {self.required}",
            "availableBalance": self.available,
            "required": self.required,
            "upgradeUrl": self.upgrade_url,
        }


class NoSubscriptionError(InsufficientCreditsError):
    """The remote billing system knows no current subscription for the customer."""


class AlreadyBilledError(MeteringError):
    """
    This operation was billed before, or another attempt at it is running. Nothing was sent.

    `event` is the usage event of the first time, None while it is only held.
    """

    http_status: ClassVar[int] = 409

    def __init__(self, *, customer: str, meter: str, transaction_id: str, event: UsageEvent | None = None) -> None:
        self.customer = customer
        self.meter = meter
        self.transaction_id = transaction_id
        self.event = event
        state = "was billed before" if event is not None else "is held by another attempt that has not ended"
        super().__init__(f"transaction {transaction_id!r} of customer {customer!r} on meter {meter!r} {state}")


class FeatureRequiredError(MeteringError):
    """The customer's plan does not include a feature that the application asked for."""

    http_status: ClassVar[int] = 403

    def __init__(self, *, customer: str, feature: str) -> None:
        self.customer = customer
        self.feature = feature
        super().__init__(f"customer {customer!r} has no plan with the feature {feature!r}")


class BillingUnavailableError(MeteringError):
    """The ledger could not place the hold (locked, full, read-only, unreachable). Nothing was sent."""

    http_status: ClassVar[int] = 503


class LedgerCorruptError(BillingUnavailableError):
    """The ledger's file is damaged, or is no ledger of ours. It is never recreated or repaired by the library."""


class SchemaTooNewError(BillingUnavailableError):
    """The ledger was written by a newer release of metered_ai than this one."""


class UnmeteredCallError(MeteringError):
    """This door of the API cannot be metered, so it is refused. Nothing was sent; `unmetered="allow"` lets it pass unbilled."""

    http_status: ClassVar[int] = 501


class UsageNotRecordedError(MeteringError):
    """
    The provider answered, but the usage could not be written yet. Raised only with `on_settle_failure="raise"`.

    `result` is the answer (left out when pickled if it is a live stream), `event` what will be written. Settling goes on in the background.
    """

    def __init__(self, message: str, *, result: object = None, event: UsageEvent | None = None) -> None:
        self.result = result
        self.event = event
        super().__init__(message)

    def _state(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        try:
            pickle.dumps(self.result)
        except Exception:  # noqa: BLE001  a live answer holds sockets and locks, and each fails in its own way
            state["result"] = None
        return state
