"""A ledger in memory, a tab, and a billing on the two."""

from __future__ import annotations

import pytest

from metered_ai import Billing
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.services import balances
from metered_ai.testing import Clock
from tests.delivery.tab import Tab


@pytest.fixture
def tab():
    """Ada has 10 credits there."""
    tab = Tab()
    tab.give("ada", 10)
    return tab


@pytest.fixture
def ledger():
    """A real ledger in memory; sound when the test is over."""
    ledger = MemoryLedger()
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


@pytest.fixture
def make_billing(ledger, tab, tmp_path):
    made = []

    def make(ledger=ledger, service=tab, **policies):
        billing = Billing(ledger, service=service, **{"spool": tmp_path / "spool", **policies})
        made.append(billing)
        return billing

    yield make
    for billing in made:
        billing.close()


@pytest.fixture
def billing(make_billing):
    return make_billing()


@pytest.fixture
def clock(monkeypatch):
    """One clock for the ledger and for the age of balances."""
    clock = Clock()

    class Time:
        @staticmethod
        def monotonic():
            return clock.now / 1_000_000

    monkeypatch.setattr(balances, "time", Time)
    return clock
