"""A ledger that is watched, a billing on it in which "ada" has credits, and the two shells."""

from __future__ import annotations

import pytest

from metered_ai import Billing
from metered_ai.ledger.memory import MemoryLedger
from tests.client.shells import Shell, Watched


@pytest.fixture
def ledger():
    """A real ledger, in memory, that remembers the steps of calls; sound when the test is over."""
    ledger = Watched(MemoryLedger())
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


@pytest.fixture
def make_billing(ledger, tmp_path):
    """A `Billing` on the watched ledger with the policies that a test wants."""
    made = []

    def make(**policies):
        billing = Billing(ledger, **{"spool": tmp_path / "spool", **policies})
        made.append(billing)
        return billing

    yield make
    for billing in made:
        billing.close()


@pytest.fixture
def billing(make_billing):
    """A `Billing` with the default policies: "ada" has 1,000,000 generations."""
    billing = make_billing()
    billing.grant("ada", "generations", 1_000_000, id="start")
    return billing


@pytest.fixture(params=["sync", "async"])
def shell(request, provider, billing):
    """The sync clients, then the async ones."""
    shell = Shell(provider, billing, is_async=request.param == "async")
    yield shell
    shell.finish()
