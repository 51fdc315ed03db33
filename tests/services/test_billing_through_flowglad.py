"""A ledger, its sender and Flowglad together: what Flowglad has in the end is what the ledger has, whatever went wrong on the way."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metered_ai import BillingUnavailableError, InsufficientCreditsError, NoSubscriptionError, connect
from metered_ai.services.delivery import Sender
from metered_ai.services.flowglad import Flowglad
from metered_ai.testing import FakeFlowglad
from metered_ai.testing.flowglad import FlowgladProcess

WORK = Path(__file__).with_name("storm_work.py")


@pytest.fixture
def flowglad():
    """Recording takes a while, so that two events at once would be at once: near zero they would block the meter."""
    with FakeFlowglad(pause=0.002) as flowglad:
        flowglad.add_meter("generations")
        yield flowglad


@pytest.fixture
def billing(flowglad, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWGLAD_SECRET_KEY", flowglad.key)
    monkeypatch.setenv("FLOWGLAD_BASE_URL", flowglad.url)
    with connect(f"flowglad://?ledger=sqlite:///{tmp_path}/credits.db&timeout=3") as billing:
        yield billing

        assert () == billing.verify().broken


def ledger_has(billing):
    return {(each.customer, each.transaction_id, each.amount) for each in billing.usage_events() if each.amount}


def flowglad_has(flowglad):
    names = {each.wire["id"]: name for name, each in flowglad.books.customers.items()}
    return {(names[each["customerId"]], each["transactionId"], each["amount"]) for each in flowglad.recorded()}


def deliver(billing, seconds=20.0):
    """Deliver until nothing waits."""
    until = time.monotonic() + seconds
    while (left := billing.deliver(timeout=2.0)).waiting:
        assert time.monotonic() < until, left
    return left


def charge(billing, customer, transaction_id, amount=1):
    with billing.charge(customer, "generations", amount=amount, transaction_id=transaction_id):
        pass


def test_fifty_at_once(flowglad, billing):
    """50 calls at once on 10 credits: 10 go through, although Flowglad would take all; no meter is blocked, and nobody is in debt."""
    flowglad.add_customer("ada", credits={"generations": 10})

    async def call(at):
        try:
            async with billing.charge("ada", "generations", amount=1, transaction_id=f"t{at}"):
                await asyncio.sleep(0.01)
        except InsufficientCreditsError:
            return 0
        return 1

    async def calls():
        return await asyncio.gather(*map(call, range(50)))

    assert 10 == sum(asyncio.run(calls()))
    deliver(billing)
    assert ledger_has(billing) == flowglad_has(flowglad)
    assert (0, False) == (flowglad.balance("ada", "generations"), flowglad.is_blocked("ada", "generations"))


def test_storm(flowglad, billing):
    """Half of all answers go wrong, some after the work was done: in the end Flowglad has each event of the ledger's once."""
    for customer in ("ada", "bob"):
        flowglad.add_customer(customer, credits={"generations": 40})
    flowglad.be_faulty(0.5, seed=11)
    refused = 0
    for at in range(60):
        try:
            charge(billing, random.Random(at).choice(["ada", "bob"]), f"t{at}", 1 + at % 3)
        except (InsufficientCreditsError, BillingUnavailableError):
            refused += 1
    flowglad.be_faulty(0.2, seed=12)
    left = deliver(billing, 40.0)

    assert (0, 0) == (left.parked, left.dead)
    assert 20 < len(ledger_has(billing))
    assert ledger_has(billing) == flowglad_has(flowglad)
    assert len(flowglad.recorded()) == len(flowglad_has(flowglad))
    for customer in ("ada", "bob"):
        assert flowglad.balance(customer, "generations") >= 0
    asked = [each["transactionId"] for each in sent(flowglad)]
    assert len(asked) > len(set(asked)), "nothing was delivered twice, so nothing was proved"


def sent(flowglad):
    """Every usage event that was posted, alone or in bulk."""
    bodies = [each.body for each in flowglad.asked("/usage-events") if isinstance(each.body, dict)]
    return [event for body in bodies for event in body.get("usageEvents", [body.get("usageEvent")])]


def test_upgrade(flowglad, billing):
    """An upgrade in the middle: each event is on the subscription that its call was checked against, and none is lost."""
    flowglad.add_plan("free", credits={"generations": 5}, is_default=True)
    flowglad.add_plan("pro", credits={"generations": 100}, unit_price=900)
    old = flowglad.add_customer("ada")
    with flowglad_held(flowglad):
        for at in range(4):
            charge(billing, "ada", f"old{at}")
        new = flowglad.upgrade("ada", "pro")
        charge_until_new(billing)
    deliver(billing)

    by_subscription = {each["transactionId"]: each["subscriptionId"] for each in flowglad.recorded()}
    assert ledger_has(billing) == flowglad_has(flowglad)
    assert {f"old{at}": old for at in range(4)}.items() <= by_subscription.items()
    assert new == by_subscription["new"]


def charge_until_new(billing):
    """More than the old plan has: refused, were it not asked once more before the refusal."""
    charge(billing, "ada", "new", 50)


class flowglad_held:  # noqa: N801  it reads as a block
    """Inside, usage events get no answer: 503, so that they are sent again."""

    def __init__(self, flowglad):
        self.flowglad = flowglad

    def __enter__(self):
        self.flowglad.fault(status=503, times=100_000, path="/usage-events")

    def __exit__(self, *_):
        self.flowglad._script.clear()


def test_blocked_meter(flowglad, billing):
    """A blocked meter parks its own account only; freed and replayed, its events are there as well."""
    for customer in ("ada", "bob"):
        flowglad.add_customer(customer, credits={"generations": 50})
    flowglad.block_meter("ada", "generations")
    for at in range(3):
        for customer in ("ada", "bob"):
            # Flowglad wants an id once for each meter, over all customers.
            charge(billing, customer, f"{customer}{at}")
    left = deliver(billing)

    assert 3 == left.parked + left.waiting
    assert {"bob"} == {customer for customer, *_ in flowglad_has(flowglad)}
    assert {"ada"} == {each.event.customer for each in billing.outbox()}
    flowglad.unblock_meter("ada", "generations")
    billing.replay()
    deliver(billing)
    assert ledger_has(billing) == flowglad_has(flowglad)


def test_one_id_for_all(flowglad, tmp_path, monkeypatch):
    """Ids that customers have in common, which Flowglad takes once for a meter: each event is there, under an id that names its customer."""
    monkeypatch.setattr(Sender, "wake", lambda self: None)
    customers = ("ada", "bob", "cy")
    with connect(f"sqlite:///{tmp_path}/credits.db", service=Flowglad(flowglad.key, flowglad.url)) as billing:
        for customer in customers:
            flowglad.add_customer(customer, credits={"generations": 40})
            for at in range(4):
                charge(billing, customer, f"export_{at}", 1 + at)
        left = deliver(billing)
        told = {each.delivered.get("transaction_id", each.transaction_id) for each in billing.usage_events()}

        assert (0, 0) == (left.parked, left.dead)
        assert [30, 30, 30] == [flowglad.balance(customer, "generations") for customer in customers]
        assert told == {name for _, name, _ in flowglad_has(flowglad)}
        assert 12 == len(told)
        assert [30, 30, 30] == [
            billing.balance(customer, "generations", refresh=True).available for customer in customers
        ]


def test_wrong_key(flowglad, tmp_path):
    """A key that is refused stops the sending, visibly, and nothing is lost: with the right key everything is there."""
    flowglad.add_customer("ada", credits={"generations": 50})
    url = f"sqlite:///{tmp_path}/credits.db"
    with connect(url, service=Flowglad(flowglad.key, flowglad.url)) as billing:
        charge(billing, "ada", "first")
        deliver(billing)
        right, flowglad.books.key = flowglad.books.key, "sk_test_another"
        for at in range(5):
            charge(billing, "ada", f"t{at}")
        left = billing.deliver(timeout=1.0)

        assert "API key invalid" in left.alarm
        assert 5 == left.waiting
        assert any("API key invalid" in reason for reason in billing.readiness())
        flowglad.books.key = right
        deliver(billing)
        assert ledger_has(billing) == flowglad_has(flowglad)


def test_wrong_key_at_once(flowglad, tmp_path):
    """A key that was never right is an alarm also where nothing asks for a balance: usage that is recorded after the fact waits."""
    flowglad.add_customer("ada", credits={"generations": 50})
    url = f"sqlite:///{tmp_path}/credits.db"
    with connect(url, service=Flowglad("sk_test_wrong", flowglad.url)) as billing:
        billing.record("ada", "generations", transaction_id="export_1", amount=1)
        left = billing.deliver(timeout=5.0)

        assert "API key invalid" in left.alarm
        assert (1, True) == (left.waiting, any("API key invalid" in reason for reason in billing.readiness()))


def test_down(flowglad, tmp_path):
    """Flowglad is down: calls go on from the last known balance for max_balance_age, then they are refused; nothing is lost."""
    flowglad.add_customer("ada", credits={"generations": 50})
    service = Flowglad(flowglad.key, flowglad.url, timeout=1)
    with connect(f"sqlite:///{tmp_path}/credits.db", service=service, max_balance_age=1.5) as billing:
        charge(billing, "ada", "before")
        with flowglad.down():
            charge(billing, "ada", "during")
            time.sleep(1.6)  # The age of a balance is the clock's.
            with pytest.raises(BillingUnavailableError):
                charge(billing, "ada", "too_late")
        deliver(billing)
        charge(billing, "ada", "after")
        deliver(billing)

        assert {"before", "during", "after"} == {transaction_id for _, transaction_id, _ in flowglad_has(flowglad)}


def test_crossing(flowglad, billing):
    """A balance that was read before a delivery and arrives after it does not let the delivered credits be spent twice."""
    flowglad.add_customer("ada", credits={"generations": 10})
    charge(billing, "ada", "first", 6)
    gate = threading.Event()
    # The answer says what is there now, and waits.
    flowglad.fault(gate=gate, is_done=True, path="/customers/ada/usage-balances")
    before = len(flowglad.asked("/customers/ada/usage-balances"))
    reading = threading.Thread(target=lambda: billing.balance("ada", "generations", refresh=True))
    reading.start()
    flowglad.wait_for_requests(before + 1, path="/customers/ada/usage-balances")
    deadline = time.monotonic() + 10
    while not flowglad.recorded():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.set()
    reading.join()

    with pytest.raises(InsufficientCreditsError):
        charge(billing, "ada", "second", 5)
    charge(billing, "ada", "third", 4)
    deliver(billing)
    assert 0 == flowglad.balance("ada", "generations")


def test_no_subscription(flowglad, billing):
    """A customer without a plan is refused with what was required."""
    with pytest.raises(NoSubscriptionError) as refused:
        charge(billing, "nobody", "t", 3)

    assert 3 == refused.value.required


def test_large_and_slashed(flowglad, billing):
    """What Flowglad could never record is refused before the call; a true amount above it arrives in parts."""
    flowglad.add_customer("ada", credits={"generations": 2**40})
    for customer, amount in (("a/b", 1), ("ada", 2**31)):
        with pytest.raises(ValueError, match=r"find it again|2147483648"):
            charge(billing, customer, "t", amount)
    billing.record("ada", "generations", transaction_id="big", amount=2**31)
    deliver(billing)

    assert {("big.part1of2", 2**31 - 1), ("big.part2of2", 1)} == {
        (each["transactionId"], each["amount"]) for each in flowglad.recorded()
    }
    assert {"price_id", "event_id"} < next(iter(billing.usage_events())).delivered.keys()


def test_kill(tmp_path):
    """
    Processes that bill on one ledger through a faulty Flowglad are killed again and again: in the end Flowglad has the ledger's events,
    as sets of customer, id and amount.
    """
    customers = {"ada": 100_000, "bob": 100_000}
    ledger = tmp_path / "credits.db"
    with FlowgladProcess(customers, faults=0.1, seed=5, pause=0.001) as server:
        environment = {**os.environ, "FLOWGLAD_SECRET_KEY": server.key, "FLOWGLAD_BASE_URL": server.base_url}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        chance = random.Random(5)
        for life in range(2):
            workers = [
                subprocess.Popen(
                    [sys.executable, WORK, ledger, customer, f"{customer}{life}"],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                for customer in customers
            ]
            for worker in workers:
                assert b"READY\n" == worker.stdout.readline()
            time.sleep(chance.uniform(0.1, 0.5))
            for worker in workers:
                worker.kill()
                worker.wait()
                worker.stdout.close()

        service = Flowglad(server.key, server.base_url, timeout=2)
        with connect(f"sqlite:///{ledger}", service=service, lease=3.0, heartbeat=1.0) as billing:
            billing.recover()
            left = deliver(billing, 60.0)
            mine = ledger_has(billing)
            assert () == billing.verify().broken
        theirs = all_recorded(server)

    assert (0, 0) == (left.parked, left.dead)
    assert len(mine) >= 4 * len(customers) * 2
    assert {(transaction_id, amount) for _, transaction_id, amount in mine} == {
        (each["transactionId"], each["amount"]) for each in theirs
    }
    assert len(mine) == len(theirs)


def all_recorded(server):
    """Every usage event of a Flowglad in another process, page by page, however faulty it is."""
    import httpx

    found, cursor = [], None
    with httpx.Client(headers={"authorization": server.key}) as client:
        while True:
            params = {"limit": 100, **({"cursor": cursor} if cursor else {})}
            try:
                answer = client.get(f"{server.base_url}/api/v1/usage-events", params=params)
                page = answer.json()
                found += page["data"]
            except (httpx.HTTPError, ValueError, KeyError):
                continue
            if not page["hasMore"]:
                return found
            cursor = page["nextCursor"]
