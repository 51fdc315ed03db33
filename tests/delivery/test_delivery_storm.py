"""Processes that are killed while a faulty service is told of their usage: in the end it has exactly what the ledger has."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from metered_ai import Billing
from metered_ai.errors import InsufficientCreditsError
from metered_ai.ledger.sqlite import SqliteLedger
from tests.delivery.tab import RemoteTab, Tab, serving
from tests.proof.children import LONG, Child, reap

GEN = "generations"
CUSTOMERS = [f"c{number}" for number in range(4)]
HOUR = 3600 * 1_000_000


@pytest.fixture(autouse=True)
def bury():
    yield
    reap()


def use(tell, path, address, seed, calls):
    """Charges of customers at random, as fast as they go, until somebody ends it."""
    chance = random.Random(seed)
    ledger = SqliteLedger(path)
    policy = chance.choice(["release", "charge"])
    with Billing(ledger, service=RemoteTab(address), spool=path.parent, on_unknown=policy) as billing:
        for _ in range(calls):
            customer = chance.choice(CUSTOMERS)
            try:
                with billing.charge(customer, GEN, amount=chance.randint(1, 3)) as charge:
                    pass
            except InsufficientCreditsError:
                tell("refused")
            else:
                tell(charge.event.transaction_id)
    ledger.close()


def books(billing):
    return {(event.customer, event.transaction_id, event.amount) for event in billing.usage_events() if event.amount}


def told(tab):
    return {(customer, name, amount) for (customer, name), amount in tab.events.items()}


def test_killed(tmp_path):
    """Processes are killed again and again while answers are lost: the service's events equal the ledger's, though it was told some twice."""
    chance = random.Random(7)
    tab = Tab(credits=2_000)
    lock = threading.Lock()

    def fault(event):
        with lock:
            return chance.choices([None, "again", "lost"], [6, 1, 1])[0]

    tab.fault = fault
    path = tmp_path / "credits.db"
    acknowledged = set()
    with serving(tab) as address:
        for number in range(40 if LONG else 8):
            children = [Child(use, path, address, 100 * number + own, 10_000) for own in range(2)]
            for child in children:
                child.hear(chance.randint(1, 25))
                child.signal(signal.SIGKILL)
            for child in children:
                acknowledged |= {name for name in child.wait() if name != "refused"}

        offset = [3 * HOUR]
        ledger = SqliteLedger(path, clock=lambda: time.time_ns() // 1000 + offset[0])
        with Billing(ledger, service=RemoteTab(address), spool=tmp_path, max_balance_age=0) as billing:
            billing.recover()
            # What orphans were charged is told after an hour.
            offset[0] += 2 * HOUR
            tab.fault = lambda event: None
            done = billing.deliver(timeout=60)
            expected, found = books(billing), billing.verify()
            balances = {customer: billing.balance(customer, GEN, refresh=True).available for customer in CUSTOMERS}
        ledger.close()

    assert () == found.broken
    assert (0, 0, 0) == (done.waiting, done.parked, done.dead)
    assert expected == told(tab)
    assert acknowledged <= {name for _, name, _ in expected}
    assert len(tab.told) > len(tab.events)
    # One at a time, but for a request whose process was killed: the server works on it, and the next comes when its lease is out.
    assert {customer: tab.credits[customer, GEN] for customer in balances} == balances


def test_two_processes(tmp_path):
    """Two processes that send at once never have two requests in flight for an account, and leave nothing."""
    tab = Tab(credits=10_000)
    tab.writing = lambda event: threading.Event().wait(0.002)
    path = tmp_path / "credits.db"
    with serving(tab) as address:
        children = [Child(use, path, address, seed, 60) for seed in (1, 2, 3)]
        for child in children:
            child.wait()
        with Billing(f"sqlite:///{path}", service=RemoteTab(address)) as billing:
            billing.deliver(timeout=30)
            expected = books(billing)
            assert () == billing.verify().broken

    assert [0, 0, 0] == [child.status for child in children]
    assert {1} == set(tab.most_in_flight.values())
    assert expected == told(tab)
    assert len(expected) == 180
    assert len(tab.told) == len(tab.events)


def test_credits_of_several_processes(tmp_path):
    """Three processes on one customer's 100 credits let through what fits and not a credit more, while usage is delivered between."""
    tab = Tab(credits=100)
    path = tmp_path / "credits.db"

    def spend(tell, seed):
        chance = random.Random(seed)
        with Billing(f"sqlite:///{path}", service=RemoteTab(address), max_balance_age=0.01) as billing:
            for _ in range(60):
                try:
                    with billing.charge("ada", GEN, amount=chance.randint(1, 3)):
                        pass
                except InsufficientCreditsError:
                    tell("refused")
        tell("done")

    with serving(tab) as address:
        children = [Child(spend, seed) for seed in (1, 2, 3)]
        for child in children:
            child.result()
        with Billing(f"sqlite:///{path}", service=RemoteTab(address)) as billing:
            billing.deliver(timeout=30)
            assert () == billing.verify().broken

    assert 98 <= sum(tab.events.values()) <= 100
    assert {1} == set(tab.most_in_flight.values())
