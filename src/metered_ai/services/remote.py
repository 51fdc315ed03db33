"""A remote billing service beside a ledger: what `Billing` asks of the two before a hold, before a refusal, and in the background."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BillingUnavailableError, NoSubscriptionError
from .balances import Balances
from .delivery import Sender

if TYPE_CHECKING:
    from ..core.steps import Enlarge, Place
    from ..ledger import ServiceLedger
    from . import BillingService

__all__ = ["Remote"]


class Remote:
    """
    Credits that a service owns and a ledger holds.

    `prepare` raises ValueError for what the service could never record, NoSubscriptionError as it does, and BillingUnavailableError where
    the balance is older than may be and cannot be read.
    """

    def __init__(
        self, service: BillingService, ledger: ServiceLedger, max_balance_age: float, upgrade_url: str | None = None
    ) -> None:
        self.service = service
        self._upgrade_url = upgrade_url
        self.balances = Balances(ledger, service, max_balance_age)
        self.sender = Sender(ledger, service, self.balances)

    def after_fork(self) -> None:
        self.balances.reset()
        self.sender.reset()

    # Sync and async, side by side.

    def prepare(self, step: Place | Enlarge) -> float:
        """Have a balance to hold against. The moment since which a question to the service counts as asked for this call."""
        began = self._check(step)
        if step.amount and not self.balances.is_fresh(step.customer, step.meter):
            try:
                self.balances.freshen(step.customer, step.meter)
            except NoSubscriptionError as error:
                raise self._required(error, step) from error
        return began

    async def aprepare(self, step: Place | Enlarge) -> float:
        """`prepare`, without blocking the loop."""
        began = self._check(step)
        if step.amount and not self.balances.is_fresh(step.customer, step.meter):
            try:
                await self.balances.afreshen(step.customer, step.meter)
            except NoSubscriptionError as error:
                raise self._required(error, step) from error
        return began

    def has_news(self, step: Place | Enlarge, since: float | None) -> bool:
        """Before a refusal: ask once more, so that a top-up is seen at once. False where that was done, or the service does not answer."""
        if since is None:
            return False
        try:
            self.balances.read(step.customer, step.meter, since=since)
        except NoSubscriptionError as error:
            raise self._required(error, step) from error
        except BillingUnavailableError:
            return False
        return True

    async def ahas_news(self, step: Place | Enlarge, since: float | None) -> bool:
        """`has_news`, without blocking the loop."""
        if since is None:
            return False
        try:
            await self.balances.aread(step.customer, step.meter, since=since)
        except NoSubscriptionError as error:
            raise self._required(error, step) from error
        except BillingUnavailableError:
            return False
        return True

    def refresh(self, customer: str, meter: str, *, is_forced: bool) -> None:
        """Have a balance to show: asked for now, or young enough."""
        if is_forced:
            self.balances.read(customer, meter)
        elif not self.balances.is_fresh(customer, meter):
            self.balances.freshen(customer, meter)

    def _check(self, step: Place | Enlarge) -> float:
        self.service.check(step.customer, step.meter, step.amount)
        return self.balances.now()

    def _required(self, error: NoSubscriptionError, step: Place | Enlarge) -> NoSubscriptionError:
        """The service's refusal, with what only we know."""
        error.required = step.amount
        error.upgrade_url = error.upgrade_url or self._upgrade_url
        return error
