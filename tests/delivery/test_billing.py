"""`Billing` with a service: whose word counts, for how long, and when it is asked."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from metered_ai import AsyncMeteredOpenAI, Billing, MeteredOpenAI
from metered_ai.errors import (
    BillingUnavailableError,
    ConfigurationError,
    InsufficientCreditsError,
    NoSubscriptionError,
)
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.sqlite import SqliteLedger
from tests.delivery.tab import Tab

GEN = "generations"
HELLO = [{"role": "user", "content": "Hello"}]
SHELLS = ["sync", "async"]


def call(billing, shell, customer="ada", amount=1):
    """A charge of so much, from its hold to its event."""
    if shell == "sync":
        with billing.charge(customer, GEN, amount=amount) as charge:
            pass
        return charge.event

    async def acall():
        async with billing.charge(customer, GEN, amount=amount) as charge:
            pass
        return charge.event

    return asyncio.run(acall())


def at_once(count, billing, shell):
    """So many charges of 1 at the same moment, none of which ends before all were placed or refused; how many were placed."""
    results = []
    if shell == "sync":
        start, end = threading.Barrier(count), threading.Barrier(count)

        def work():
            start.wait()
            charge = billing.charge("ada", GEN, amount=1)
            try:
                charge.__enter__()
                results.append(charge)
            except InsufficientCreditsError as error:
                results.append(error)
            end.wait()

        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:

        async def main():
            charges = [billing.charge("ada", GEN, amount=1) for _ in range(count)]
            found = await asyncio.gather(*(charge.__aenter__() for charge in charges), return_exceptions=True)
            results.extend(found)

        asyncio.run(main())
    placed = [result for result in results if not isinstance(result, Exception)]
    assert all(isinstance(result, InsufficientCreditsError) for result in results if result not in placed), results
    for charge in placed:
        charge.commit()
    return len(placed)


def _run(function, *args, **kwargs):
    return asyncio.run(function(*args, **kwargs))


@pytest.mark.parametrize("shell", SHELLS)
def test_call(billing, tab, shell):
    """A customer's credits at the service are held here, and the service is told of the usage, with what it answers kept."""
    assert "hold_" == call(billing, shell, amount=7).transaction_id[:5]
    billing.deliver()

    (event,) = billing.usage_events("ada")
    assert {("ada", event.transaction_id): 7} == tab.events
    assert {"line": "1"} == event.delivered
    with pytest.raises(InsufficientCreditsError) as refusal:
        call(billing, shell, amount=4)
    assert (3, 4) == (refusal.value.available, refusal.value.required)


@pytest.mark.parametrize("shell", SHELLS)
def test_credits_for_ten(billing, tab, shell):
    """Fifty calls at once on 10 credits let exactly 10 through, although the service would let all; they share its answers."""
    assert 10 == at_once(50, billing, shell)

    billing.deliver()
    assert 10 == sum(tab.events.values())
    assert 0 == tab.credits["ada", GEN]


@pytest.mark.parametrize("shell", SHELLS)
def test_refusals_share_a_question(billing, tab, shell):
    """Fifty refusals at once ask the service once; once more at most for those whose call began after that question."""
    tab.give("ada", -10)
    billing.balance("ada", GEN)
    asked = tab.reads["ada"]
    release = threading.Event()
    tab.answering = lambda: release.wait(10)
    threading.Timer(0.3, release.set).start()

    assert 0 == at_once(50, billing, shell)
    assert 1 <= tab.reads["ada"] - asked <= 2


@pytest.mark.parametrize("shell", SHELLS)
def test_top_up(billing, tab, shell):
    """A top-up at the service is seen by the next call, however young the balance is."""
    call(billing, shell, amount=10)
    with pytest.raises(InsufficientCreditsError):
        call(billing, shell)
    tab.give("ada", 5)

    assert 5 == call(billing, shell, amount=5).amount


def test_top_up_during_a_question(billing, tab):
    """A refusal does not rest on a question that was asked before its call began: the top-up may have come in between."""
    call(billing, "sync", amount=10)
    asked, go_on = threading.Event(), threading.Event()

    def answering():
        asked.set()
        go_on.wait(10)

    tab.answering = answering
    refusals = []

    def ask_too_much():
        try:
            call(billing, "sync", amount=6)
        except InsufficientCreditsError as error:
            refusals.append(error.required)

    first = threading.Thread(target=ask_too_much)
    first.start()
    asked.wait(10)
    tab.give("ada", 5)
    tab.answering = lambda: None
    results = []
    second = threading.Thread(target=lambda: results.append(call(billing, "sync", amount=5)))
    second.start()
    go_on.set()
    first.join()
    second.join()

    assert [5] == [event.amount for event in results]
    assert [6] == refusals


@pytest.mark.parametrize("shell", SHELLS)
def test_asked_seldom(make_billing, tab, clock, shell):
    """The service is asked once, and again when its answer is older than `max_balance_age`."""
    ledger = MemoryLedger(clock=clock)
    billing = make_billing(ledger, max_balance_age=300)
    # After a delivery it is asked, too, in the background; nothing of that here.
    tab.fault = lambda event: "again"
    for _ in range(3):
        call(billing, shell, amount=0)
        call(billing, shell)
    clock.advance(299)
    call(billing, shell)
    assert 1 == tab.reads["ada"]
    clock.advance(1)
    call(billing, shell)

    assert 2 == tab.reads["ada"]
    billing.close()
    ledger.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_down(make_billing, tab, clock, shell, provider):
    """While the service is down calls go on from its last word, until that is too old; then nothing is sent to the provider."""
    ledger = MemoryLedger(clock=clock)
    billing = make_billing(ledger, max_balance_age=300)
    client_type = MeteredOpenAI if shell == "sync" else AsyncMeteredOpenAI
    call(billing, shell)
    tab.is_down = True

    def chat():
        client = client_type(billing=billing, customer="ada", base_url=provider.base_url, api_key="k", max_retries=0)
        if shell == "sync":
            with client:
                return client.chat.completions.create(model="m", messages=HELLO)

        async def run():
            async with client:
                return await client.chat.completions.create(model="m", messages=HELLO)

        return asyncio.run(run())

    clock.advance(200)
    chat()
    assert 1 == len(provider.requests)
    clock.advance(101)
    with pytest.raises(BillingUnavailableError, match="does not answer"):
        chat()

    assert 1 == len(provider.requests)
    assert 2 == sum(1 for _ in billing.usage_events())
    billing.close()
    assert () == ledger.verify().broken
    ledger.close()


def test_down_refusal(billing, tab):
    """A refusal by the service's last word stands while it does not answer."""
    call(billing, "sync", amount=10)
    tab.is_down = True
    with pytest.raises(InsufficientCreditsError) as refusal:
        call(billing, "sync")

    assert (0, 1) == (refusal.value.available, refusal.value.required)


@pytest.mark.parametrize("shell", SHELLS)
def test_no_subscription(make_billing, shell):
    """A customer whom the service does not know is refused in its own words, with what was required and where to upgrade."""
    billing = make_billing(upgrade_url="https://acme.example/plans")
    with pytest.raises(NoSubscriptionError) as refusal:
        call(billing, shell, customer="bob", amount=3)

    assert (3, "https://acme.example/plans") == (refusal.value.required, refusal.value.upgrade_url)
    assert [] == billing.balances("bob")


def test_subscription_lost(billing, tab):
    """One who has no plan any more is refused so when more is needed than was known."""
    call(billing, "sync", amount=10)
    del tab.credits["ada", GEN]
    tab.fault = lambda event: "again"
    with pytest.raises(NoSubscriptionError):
        call(billing, "sync")


@pytest.mark.parametrize("shell", SHELLS)
def test_check(billing, tab, shell):
    """What the service could never record is refused before anything is asked."""
    with pytest.raises(ValueError, match="no slashes"):
        call(billing, shell, customer="a/b")
    with pytest.raises(ValueError, match="does not fit"):
        call(billing, shell, amount=10**9 + 1)

    assert {} == tab.reads


@pytest.mark.parametrize("shell", SHELLS)
def test_raise_to(billing, tab, shell):
    """Raising a charge sees a top-up at once, too, and is refused where there is none."""

    async def araise():
        async with billing.charge("ada", GEN, amount=10) as charge:
            tab.give("ada", 5)
            await charge.araise_to(15)
            with pytest.raises(InsufficientCreditsError):
                await charge.araise_to(16)

    if shell == "async":
        asyncio.run(araise())
    else:
        with billing.charge("ada", GEN, amount=10) as charge:
            tab.give("ada", 5)
            charge.raise_to(15)
            with pytest.raises(InsufficientCreditsError):
                charge.raise_to(16)

    assert [15] == [event.amount for event in billing.usage_events()]


def test_loop_runs_on(billing, tab):
    """The loop runs on while the service takes its time; a cancelled call leaves the question to the others."""
    release = threading.Event()
    tab.answering = lambda: release.wait(10)

    async def main():
        charges = [billing.charge("ada", GEN, amount=1) for _ in range(3)]
        tasks = [asyncio.ensure_future(charge.__aenter__()) for charge in charges]
        await asyncio.to_thread(tab.wait, lambda: tab.reads["ada"])
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        release.set()
        await asyncio.gather(*tasks[1:])
        reads = tab.reads["ada"]
        for charge in charges[1:]:
            await charge.acommit()
        return reads

    assert 1 == asyncio.run(main())
    assert 2 == sum(1 for _ in billing.usage_events())


def test_balance(billing, tab):
    """`balance` shows the service's figures as estimates; `refresh` asks anew."""
    tab.limit = 40
    balance = billing.balance("ada", GEN)
    assert (40, 30, 10, True) == (balance.limit, balance.used, balance.available, balance.is_estimate)
    tab.give("ada", 1)

    assert 10 == billing.balance("ada", GEN).available
    assert 11 == billing.balance("ada", GEN, refresh=True).available
    assert 11 == asyncio.run(billing.abalance("ada", GEN)).available


def test_unlimited(billing, tab):
    """A service that names no number refuses nothing."""
    tab.give("vip", None)

    assert 10**6 == call(billing, "sync", customer="vip", amount=10**6).amount
    assert None is billing.balance("vip", GEN).available


def test_refreshed_after_delivery(billing, tab):
    """After usage was delivered the balance is asked for again, by itself."""
    read = threading.Event()
    call(billing, "sync")

    def answering():
        if tab.events:
            read.set()

    tab.answering = answering
    call(billing, "sync")

    assert read.wait(10)


@pytest.mark.parametrize("shell", SHELLS)
def test_grants_are_refused(billing, shell):
    """Where a service owns the balances, credits are not given, taken back or lifted here."""
    asks = [
        ("grant", ("ada", GEN, 5), {"id": "g1"}),
        ("revoke", ("ada", GEN, "g1"), {}),
        ("set_unlimited", ("ada", GEN, True), {}),
    ]
    for name, args, kwargs in asks:
        asked = getattr(billing, name) if shell == "sync" else partial(_run, getattr(billing, f"a{name}"))
        with pytest.raises(ConfigurationError, match=r"kept by 'tab \(test\)'"):
            asked(*args, **kwargs)


def test_record(billing, tab):
    """Usage after the fact is told, too, also of a customer of whom nothing was heard before; its reference is found."""
    tab.give("bob", 3)
    tab.references["bob"] = "sub_7"
    billing.record("bob", GEN, transaction_id="export_1", amount=2)
    assert 0 == billing.deliver().waiting

    assert [("bob", "export_1", 2, "sub_7")] == tab.told
    (event,) = billing.usage_events("bob")
    assert ("sub_7", {"line": "1"}) == (event.reference, event.delivered)
    assert 1 == billing.balance("bob", GEN).available


def test_bound(tmp_path, tab):
    """A file that served a test service refuses the live one, and one that keeps credits of its own refuses every service."""
    path = f"sqlite:///{tmp_path}/credits.db"
    with Billing(path, service=tab) as billing:
        call(billing, "sync")
    live = Billing(path, service=Tab("tab (live)"))
    with pytest.raises(ConfigurationError, match=r"tab \(test\).*tab \(live\)"):
        live.balance("ada", GEN)

    own = f"sqlite:///{tmp_path}/own.db"
    with Billing(own) as billing:
        billing.grant("ada", GEN, 5, id="g1")
    with pytest.raises(ConfigurationError, match="of its own"):
        Billing(own, service=tab).balance("ada", GEN)


def test_opened_without_the_service(tmp_path, tab):
    """A ledger of a service that is opened without it can be read, but lets no call through: its balances would grow old unseen."""
    path = f"sqlite:///{tmp_path}/credits.db"
    with Billing(path, service=tab) as billing:
        call(billing, "sync")
    with Billing(path) as billing:
        assert 1 == sum(1 for _ in billing.usage_events())
        assert billing.verify().is_sound
        with pytest.raises(ConfigurationError, match="give Billing its service="):
            call(billing, "sync")


def test_no_service():
    """What is no service is refused where it is given, saying what it lacks; a ledger without an outbox cannot have one."""
    with pytest.raises(ConfigurationError, match="read_balance"):
        Billing("memory://", service=object())
    with pytest.raises(ConfigurationError, match="max_balance_age"):
        Billing("memory://", max_balance_age=-1)
    with Billing("memory://") as billing, pytest.raises(ConfigurationError, match="no service"):
        billing.deliver()


def test_several_machines_age(tmp_path, tab):
    """What one process has heard another one does not ask for again: it is in the ledger."""
    for _ in range(2):
        with Billing(SqliteLedger(tmp_path / "credits.db"), service=tab, spool=tmp_path) as billing:
            tab.fault = lambda event: "again"
            call(billing, "sync")
            billing.ledger.close()

    assert 1 == tab.reads["ada"]


def test_closing(tmp_path, tab):
    """Closing tells the service what it does not have yet, and leaves it open: it is its owner's."""
    with Billing(f"sqlite:///{tmp_path}/credits.db", service=tab) as billing:
        for _ in range(3):
            call(billing, "sync")

    assert 3 == len(tab.events)
    assert not tab.is_closed
