"""What the `metered` fixture gives to a test. pytest finds the fixture itself in `_metered_ai_pytest`, which costs nothing to import."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .provider import FakeProvider

if TYPE_CHECKING:
    from metered_ai import AsyncMeteredOpenAI, Balance, Billing, Grant, Hold, MeteredOpenAI, UsageEvent

__all__ = ["Metered", "start"]


class Metered:
    """A ledger in memory, a scripted provider on loopback, and clients that use both. Nothing leaves the machine."""

    def __init__(self, provider: FakeProvider, billing: Billing) -> None:
        self.provider = provider
        """Answers every request; `provider.answer(...)` scripts what comes next, `provider.requests` tells what arrived."""
        self.billing = billing
        """A real `Billing` on memory://; give it to the clients that your application builds."""
        self._grants = itertools.count(1)

    def client(self, **options: Any) -> MeteredOpenAI:
        """A `MeteredOpenAI` on this ledger and this provider; `options` are its constructor's."""
        from metered_ai import MeteredOpenAI

        return MeteredOpenAI(**self._options(options))

    def async_client(self, **options: Any) -> AsyncMeteredOpenAI:
        """The async twin of `client`."""
        from metered_ai import AsyncMeteredOpenAI

        return AsyncMeteredOpenAI(**self._options(options))

    def grant(self, customer: str, amount: int, meter: str = "generations", *, id: str | None = None) -> Grant:
        """Give credits; without an `id` each call is another grant."""
        return self.billing.grant(customer, meter, amount, id=id or f"test_grant_{next(self._grants)}")

    def balance(self, customer: str, meter: str = "generations") -> Balance:
        """The customer's balance, with every call that has ended."""
        return self.billing.balance(customer, meter)

    def events(self, customer: str | None = None, meter: str | None = None) -> list[UsageEvent]:
        """The usage events so far, with every call that has ended."""
        return list(self.billing.usage_events(customer, meter))

    def holds(self, customer: str | None = None, meter: str | None = None) -> list[Hold]:
        """Holds of calls in flight, and those that were released."""
        return list(self.billing.holds(customer, meter))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "billing": self.billing,
            "base_url": self.provider.base_url,
            "api_key": "test",
            "max_retries": 0,
            **options,
        }


@contextmanager
def start() -> Generator[Metered]:
    """What the fixture is: an empty ledger and a provider of their own, until the block is left."""
    from metered_ai import connect

    with FakeProvider() as provider, connect("memory://") as billing:
        yield Metered(provider, billing)
