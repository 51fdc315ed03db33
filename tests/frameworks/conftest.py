"""
Agents and chains on our clients. Each framework pins its own openai, so each has an environment of its own: `make test-frameworks`.

Where a framework is not installed its tests are not collected. The provider is a scripted server on loopback, which knows what it served.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from metered_ai import per_token
from metered_ai.testing.plugin import start

NEEDS = {
    "test_instructor.py": "instructor",
    "test_langchain.py": "langchain_openai",
    "test_litellm.py": "litellm",
    "test_llama_index.py": "llama_index",
    "test_openai_agents.py": "agents",
    "test_pydantic_ai.py": "pydantic_ai",
}
collect_ignore = [test for test, module in NEEDS.items() if find_spec(module) is None]

WEATHER = ("get_weather", '{"city": "Paris"}')
"""A scripted call of the tool that every framework is given."""


class Shop:
    """Clients at a token price, on which ada has plenty of credits, and what came of their calls."""

    def __init__(self, shop):
        self.provider = shop.provider
        self.billing = shop.billing
        priced = {"pricing": per_token(input=1, output=2)}
        self.client = shop.client(customer="ada", **priced)
        self.async_client = shop.async_client(customer="ada", **priced)
        shop.grant("ada", 10_000_000)
        self.meter = "generations"

    def poor(self, client, credits=1):
        """The client of somebody who can pay for so many calls, at one credit each."""
        self.billing.grant("bob", self.meter, credits, id="order_1")
        return client.with_billing(customer="bob", amount=1)

    def served(self):
        """What the server would bill: the tokens of each answer."""
        return {
            f"gen_{issued.id or issued.request_id}": (
                issued.input_tokens,
                0 if issued.path == "/embeddings" else issued.output_tokens,
            )
            for issued in self.provider.issued
        }

    def recorded(self, customer="ada"):
        """What the ledger has of it."""
        self.billing.flush()
        return {
            event.transaction_id: (event.usage.input_tokens, event.usage.output_tokens or 0)
            for event in self.billing.usage_events(customer)
            if event.kind == "call"
        }

    def check(self, calls, *, customer="ada"):
        """So many calls were made, and the ledger's calls and tokens are the server's; nothing is held, nothing is broken."""
        assert calls == len(self.provider.requests) == len(self.served())
        assert self.served() == self.recorded(customer)
        assert [] == list(self.billing.holds(state="open"))
        assert () == self.billing.verify().broken

    def check_covered(self, calls):
        """One price for the run: so many calls, recorded at 0 and linked to the charge of 7."""
        events = list(self.billing.usage_events("ada"))
        charge = next(event for event in events if event.kind == "charge")
        covered = [event for event in events if event.kind == "call"]

        assert 7 == charge.amount
        assert [(0, charge.hold_id)] * calls == [(event.amount, event.parent) for event in covered]
        self.check(calls)

    def charge(self):
        """A charge of 7 that covers the calls inside."""
        return self.billing.charge("ada", self.meter, amount=7, covers_calls=True)


@pytest.fixture
def shop():
    with start() as shop:
        yield Shop(shop)
