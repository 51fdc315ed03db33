"""The sender: in order, one request at a time for an account, again until the service has it, and nothing dropped."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import weakref

import pytest

from metered_ai import Billing
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.services import Delivery, ServiceRefusedError, delivery
from metered_ai.services.delivery import Sender, _Circuit, _pause
from metered_ai.testing import Clock
from tests.delivery.tab import BulkTab, Tab, soon
from tests.proof.children import Child

GEN = "generations"


def record(billing, count, customer="ada", first=0):
    for number in range(first, first + count):
        billing.record(customer, GEN, transaction_id=f"{customer}_{number}", amount=number + 1)


def names(tab, customer="ada"):
    return [name for who, name, *_ in tab.told if who == customer]


@pytest.fixture
def quick(monkeypatch):
    """Pauses are over at once, and counted."""
    asked = []

    def pause(failures):
        asked.append(failures)
        return 0.001

    monkeypatch.setattr(delivery, "_pause", pause)
    return asked


@pytest.fixture
def quiet(monkeypatch):
    """No thread sends; only `deliver` does."""
    monkeypatch.setattr(Sender, "wake", lambda self: None)


def test_background(billing, tab):
    """Usage is told by itself, soon after it was recorded, in order."""
    record(billing, 5)
    tab.wait(lambda: len(tab.events) == 5)

    assert [f"ada_{number}" for number in range(5)] == names(tab)
    soon(lambda: billing.outbox_summary().waiting == 0)


def test_no_thread_without_need(tab, tmp_path):
    """No thread is started before there is anything to tell."""
    with Billing(f"sqlite:///{tmp_path}/credits.db", service=tab) as billing:
        billing.balance("ada", GEN)
        assert [] == billing._remote.sender._threads
        record(billing, 1)
        assert [] != billing._remote.sender._threads


def test_left_behind(tab, tmp_path, quiet, monkeypatch):
    """What another process could not tell any more is found at the start."""
    path = tmp_path / "credits.db"
    ledger = SqliteLedger(path)
    billing = Billing(ledger, service=tab, spool=tmp_path)
    record(billing, 2)
    billing.close()
    ledger.close()
    assert {} == tab.events
    monkeypatch.undo()

    with Billing(f"sqlite:///{path}", service=tab) as billing:
        billing.balance("ada", GEN)
        tab.wait(lambda: len(tab.events) == 2)


def test_one_in_flight(billing, tab):
    """However many threads there are, one request is in flight for an account; for several accounts several are."""
    together = threading.Barrier(3)
    customers = ("ada", "bob", "cy")
    for customer in customers[1:]:
        tab.give(customer, 10)
    tab.writing = lambda event: event.transaction_id.endswith("_0") and together.wait(10)
    for customer in customers:
        record(billing, 6, customer)
    tab.wait(lambda: len(tab.events) == 18)

    assert {1} == set(tab.most_in_flight.values())
    for customer in customers:
        assert [f"{customer}_{number}" for number in range(6)] == names(tab, customer)


def test_again(make_billing, tab, quick):
    """What failed is sent again with its id and amount before anything later, after a pause that grows; then the count begins anew."""
    billing = make_billing()
    left = iter(["again", "lost", "again"])
    tab.fault = lambda event: next(left, None)
    record(billing, 2)
    tab.wait(lambda: len(tab.events) == 2)
    soon(lambda: billing.outbox_summary().waiting == 0)

    # The second attempt was recorded and its answer lost, so that the last two were told what is there already.
    assert ["ada_0"] * 4 + ["ada_1"] == names(tab)
    assert {("ada", "ada_0"): 1, ("ada", "ada_1"): 2} == tab.events
    assert [1, 2, 3] == [count for count in quick if count > 0][:3]


def test_pauses():
    """A pause is anything between 0 and 0.2 s, doubled with each failure in a row, up to 60 s."""
    for failures, most in ((1, 0.2), (2, 0.4), (5, 3.2), (9, 51.2), (10, 60), (5000, 60)):
        pauses = [_pause(failures) for _ in range(300)]

        assert max(pauses) <= most
        assert min(pauses) < most / 5
        assert max(pauses) > most * 4 / 5


@pytest.mark.parametrize(("asked", "waited"), [(7.0, 7.0), (9999.0, 300.0)])
def test_retry_after(tab, tmp_path, quiet, asked, waited):
    """A service that says when to come back is obeyed, for 300 seconds at most."""
    clock = Clock()
    ledger = MemoryLedger(clock=clock)
    billing = Billing(ledger, service=tab, spool=tmp_path)
    tab.fault = lambda event: Delivery("again", "slow down", asked)
    record(billing, 1)
    billing.deliver(timeout=0.5)
    (found,) = billing.outbox()

    assert (clock.at(waited), "slow down", 1) == (found.not_before, found.reason, found.attempts)
    billing.close()
    ledger.close()


def test_circuit(monkeypatch):
    """After five failures in a row one probe goes after each pause, and nobody else; one success lets everybody go on."""
    now = [1000.0]
    monkeypatch.setattr(delivery.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(delivery, "_pause", lambda failures: 0.1 * 2**failures)
    circuit = _Circuit()
    assert [False] * 4 + [True] == [circuit.failed(0.0) for _ in range(5)]
    assert (pytest.approx(0.2), False) == circuit.admit()
    now[0] += 0.2
    assert (0, True) == circuit.admit()
    assert circuit.admit()[0] > 0
    circuit.failed(0.0)
    circuit.probed()
    assert (pytest.approx(0.4), False) == circuit.admit()
    now[0] += 0.4
    assert (0, True) == circuit.admit()
    circuit.probed()
    assert (0, True) == circuit.admit()
    assert circuit.succeeded()
    circuit.probed()

    assert [(0, False)] * 2 == [circuit.admit(), circuit.admit()]


def test_down_is_no_hot_loop(make_billing, tab, caplog):
    """A service that is down for many accounts gets a few probes and no storm, and everything once it is back."""
    tab.is_down = True
    for number in range(20):
        tab.give(f"c{number}", 5)
    billing = make_billing()
    # Their balances were heard before.
    tab.is_down = False
    for number in range(20):
        billing.balance(f"c{number}", GEN)
    tab.is_down = True
    for number in range(20):
        record(billing, 1, f"c{number}")
    tab.wait(lambda: tab.requests >= 6)
    requests = tab.requests
    threading.Event().wait(0.3)

    assert tab.requests - requests <= 8
    assert 1 == sum("does not take usage events" in line for line in caplog.messages)
    tab.is_down = False
    soon(lambda: billing.deliver(timeout=20).waiting == 0)
    assert 20 == len(tab.events)


def test_stop(make_billing, tab, caplog):
    """A wrong key stops all sending: one request, an error in the log, readiness says so, and nothing is lost; `deliver` tries again."""
    tab.give("bob", 5)
    billing = make_billing()
    for customer in ("ada", "bob"):
        billing.balance(customer, GEN)
    tab.fault = lambda event: Delivery("stop", "401 API key invalid")
    record(billing, 3)
    soon(billing.readiness)
    record(billing, 3, "bob")

    assert ["tab (test) refuses us: 401 API key invalid; usage waits in the outbox"] == billing.readiness()
    assert 1 == len([one for one in caplog.records if one.levelno == logging.ERROR])
    done = billing.deliver(timeout=5)
    assert (0, 6) == (done.delivered, done.waiting)
    assert "refuses us" in done.alarm
    assert 2 == tab.requests

    tab.fault = lambda event: None
    assert 0 == billing.deliver(timeout=5).waiting
    assert [] == billing.readiness()
    assert 6 == len(tab.events)


def test_park(billing, tab, caplog):
    """A blocked meter parks its own account only, with what comes later; replayed it goes in order."""
    tab.give("bob", 10)
    tab.fault = lambda event: Delivery("park", "the meter is blocked") if event.customer == "ada" else None
    record(billing, 3)
    soon(lambda: billing.outbox_summary().parked == 3)
    record(billing, 1, first=3)
    record(billing, 2, "bob")
    tab.wait(lambda: len(tab.events) == 2)

    assert (4, "the meter is blocked") == (billing.outbox_summary().parked, next(billing.outbox("ada")).reason)
    assert ["ada_0"] == names(tab)
    assert any("parked" in line and "ada_0" in line for line in caplog.messages)
    tab.fault = lambda event: None
    assert 4 == billing.replay("ada")
    tab.wait(lambda: len(tab.events) == 6)
    assert ["ada_0", "ada_0", "ada_1", "ada_2", "ada_3"] == names(tab)


def has_all_ids(tab):
    """The service has one set of ids for all customers, as some do."""

    def fault(event):
        return (
            Delivery("taken", "it is another's") if event.transaction_id in {name for _, name in tab.events} else None
        )

    tab.fault = fault


def share(billing, tab, count=1):
    """Ada's events are there, and bob's under the same ids wait."""
    tab.give("bob", 50)
    has_all_ids(tab)
    for customer in ("ada", "bob"):
        billing.balance(customer, GEN)
        for number in range(count):
            billing.record(customer, GEN, transaction_id=f"export_{number}", amount=1)
        if customer == "ada":
            billing.deliver()


def test_taken(make_billing, tab, quiet):
    """An id that the service has of another customer, as the ledger has, is sent once more under one that names the customer."""
    billing = make_billing()
    share(billing, tab)
    assert (1, 0) == ((done := billing.deliver()).delivered, done.parked)

    # The first 8 digits of SHA-256 of "bob".
    other = "export_0.81b637d8"
    assert ["export_0", other] == names(tab, "bob")
    assert {("ada", "export_0"): 1, ("bob", other): 1} == tab.events
    ada, bob = billing.usage_events()
    assert ("export_0", other) == (bob.transaction_id, bob.delivered["transaction_id"])
    assert "transaction_id" not in ada.delivered


def test_taken_in_bulk(make_billing, quiet):
    """What a service leaves out of an answer to many is sent alone, and counts as never tried."""
    tab = BulkTab(credits=1000)
    billing = make_billing(service=tab)
    tab.writing = lambda event: None
    share(billing, tab, 3)
    inner, tab.write_usage_events = (
        tab.write_usage_events,
        lambda events: [Delivery("alone", "left out") if each.outcome == "taken" else each for each in inner(events)],
    )
    done = billing.deliver(timeout=20)

    assert (3, 0, 0) == (done.delivered, done.waiting, done.parked)
    assert {"export_0", "export_1", "export_2"} == {name for who, name in tab.events if who == "ada"}
    assert 3 == sum(name.endswith(".81b637d8") for who, name in tab.events if who == "bob")


def test_taken_twice(make_billing, tab, quiet, caplog):
    """Once: where the other id is taken as well the event is parked, with its reason, and the next one goes."""
    billing = make_billing()
    tab.events["cy", "export_0.81b637d8"] = 1
    share(billing, tab, 2)
    done = billing.deliver()

    assert (1, 1) == (done.delivered, done.parked)
    assert ["export_0", "export_0.81b637d8", "export_1", "export_1.81b637d8"] == names(tab, "bob")
    assert ("export_0", "it is another's") == ((found := next(billing.outbox())).event.transaction_id, found.reason)
    assert ["usage event 'export_0' of customer 'bob' on meter 'generations' is parked: it is another's"] == [
        line.getMessage() for line in caplog.records if line.levelno == logging.ERROR
    ]


def test_taken_by_a_stranger(make_billing, tab, quiet):
    """An id that the service has of somebody whom the ledger does not know is parked: under another id it might be told twice."""
    billing = make_billing()
    has_all_ids(tab)
    tab.events["cy", "ada_0"] = 1
    record(billing, 2)
    done = billing.deliver()

    assert (1, 1) == (done.delivered, done.parked)
    assert ["ada_0", "ada_1"] == names(tab)


def test_taken_after_a_lost_answer(make_billing, tab, quiet, quick):
    """After a try of unknown outcome an id that is taken is parked, whoever else has it: the first try may have arrived."""
    billing = make_billing()
    share(billing, tab)
    taken = tab.fault
    lost = iter(["again"])
    tab.fault = lambda event: next(lost, None) or taken(event)
    soon(lambda: billing.deliver().parked == 1)

    assert ["export_0", "export_0"] == names(tab, "bob")
    assert 1 == billing.replay("bob")
    assert 1 == billing.deliver().parked


def test_wrong_key_at_the_first_question(make_billing, tab, quiet):
    """A service that refuses the very first question for a balance stops all sending, and readiness says so."""
    billing = make_billing()
    tab.answering = raising(ServiceRefusedError("tab (test) refuses: 401 API key invalid"))
    record(billing, 2)
    done = billing.deliver()

    assert (0, 2) == (done.delivered, done.waiting)
    assert "401 API key invalid" in done.alarm
    assert ["refuses us" in line for line in billing.readiness()] == [True]
    tab.answering = lambda: None
    assert 2 == billing.deliver().delivered


def raising(error):
    """A function that raises it."""

    def answer():
        raise error

    return answer


def test_dead(billing, tab, caplog):
    """An event that can never be recorded is kept with its reason, and the next one goes; replayed by its id it goes, too."""
    tab.fault = lambda event: Delivery("dead", "no such price") if event.transaction_id == "ada_1" else None
    record(billing, 3)
    soon(lambda: billing.outbox_summary().dead == 1 and len(tab.events) == 2)
    (found,) = billing.outbox(state="dead")

    assert ("ada_1", "no such price", 1) == (found.event.transaction_id, found.reason, found.attempts)
    assert any("dead-lettered: no such price" in line for line in caplog.messages)
    tab.fault = lambda event: None
    assert 1 == billing.replay(transaction_id="ada_1")
    tab.wait(lambda: len(tab.events) == 3)


def test_given_back(tab, tmp_path, quiet):
    """What the service was told too much of stands in the outbox until a person has given it back there and replays it."""
    clock = Clock()
    ledger = MemoryLedger(clock=clock)
    from metered_ai.core.steps import Place, Settle

    billing = Billing(ledger, service=tab, spool=tmp_path)
    billing.balance("ada", GEN)
    ledger.run(Place("h1", "ada", GEN, 8, "dead", on_unknown="charge"))
    clock.advance(130)
    billing.recover()
    clock.advance(3601)
    billing.deliver()
    ledger.run(Settle("h1", "ada", GEN, 3, "gen_1", "reported"))
    billing.deliver()
    assert {("ada", "hold_h1"): 8} == tab.events
    (owed,) = billing.outbox(state="dead")
    assert "give 5 back" in owed.reason
    billing.replay("ada")
    billing.deliver()

    assert [] == list(billing.outbox())
    assert {("ada", "hold_h1"): 8} == tab.events
    billing.close()
    assert () == ledger.verify().broken
    ledger.close()


def test_bulk(make_billing, quiet):
    """A service that takes many gets many that nobody has tried; one that failed goes alone, and in order."""
    tab = BulkTab(credits=1000)
    billing = make_billing(service=tab)
    record(billing, 5)
    failed = iter([True])
    tab.fault = lambda event: "again" if event.transaction_id == "ada_1" and next(failed, False) else None
    soon(lambda: billing.deliver(timeout=5).waiting == 0)

    assert [5] == tab.batches
    assert 5 == len(tab.events)
    assert ["ada_0", "ada_1", "ada_2", "ada_3", "ada_4", "ada_1"] == names(tab)
    assert 1 == max(tab.most_in_flight.values())
    assert all(event.delivered for event in billing.usage_events())


@pytest.mark.parametrize(
    "answer", [[], [Delivery("recorded")] * 7, ValueError("a secret")], ids=["none", "many", "raises"]
)
def test_bulk_nonsense(make_billing, quiet, caplog, answer):
    """Answers that do not fit the events, and what a service raises, are no acknowledgement; nothing of it is logged but its kind."""
    tab = BulkTab(credits=1000)
    billing = make_billing(service=tab)
    record(billing, 2)

    def write_usage_events(events):
        if isinstance(answer, Exception):
            raise answer
        return answer

    tab.write_usage_events = write_usage_events
    billing._remote.sender._is_bulk = True
    billing.balance("ada", GEN)
    billing._remote.sender._turn()

    assert 2 == billing.outbox_summary().waiting
    assert "secret" not in caplog.text
    assert 0 == billing.deliver(timeout=10).waiting
    assert 2 == len(tab.events)


def test_deliver(make_billing, tab, quiet):
    """`deliver` sends what is due and what becomes due within its time, and tells how many; the async form, too."""
    billing = make_billing()
    record(billing, 3)
    failed = iter([True])
    tab.fault = lambda event: "again" if next(failed, False) else None
    done = billing.deliver(timeout=10)
    assert (3, 0, 0, 0, None) == (done.delivered, done.waiting, done.parked, done.dead, done.alarm)
    record(billing, 1, first=3)

    assert 1 == asyncio.run(billing.adeliver()).delivered
    assert 0 == billing.deliver().delivered


def test_deliver_beside_the_threads(billing, tab):
    """`deliver` returns only when what the process's own threads are at is done, too."""
    record(billing, 30)

    assert 0 == billing.deliver(timeout=20).waiting
    assert 30 == len(tab.events)


def test_async_forms(make_billing, tab, quiet):
    """The outbox is listed, counted and replayed without blocking the loop, too."""
    billing = make_billing()
    record(billing, 2)
    tab.fault = lambda event: "dead"
    billing.deliver()

    async def main():
        found = [one.event.transaction_id async for one in billing.aoutbox("ada", state="dead")]
        summary = await billing.aoutbox_summary()
        return found, summary.dead, await billing.areplay("ada", GEN, transaction_id="ada_0")

    assert (["ada_0", "ada_1"], 2, 1) == asyncio.run(main())


def test_reference_in_mid_run(make_billing, tab, clock, quiet):
    """After an upgrade that changes the plan, events of holds from before keep the old reference, also when they are sent again."""
    ledger = MemoryLedger(clock=clock)
    billing = make_billing(ledger)
    tab.references["ada"] = "sub_free"
    with billing.charge("ada", GEN, amount=1, transaction_id="before"):
        tab.references["ada"] = "sub_pro"
        clock.advance(1)
        billing.balance("ada", GEN, refresh=True)
    failed = iter([True])
    tab.fault = lambda event: "again" if next(failed, False) else None
    clock.advance(1)
    with billing.charge("ada", GEN, amount=1, transaction_id="after"):
        pass
    billing.deliver(timeout=0.3)
    clock.advance(60)
    billing.deliver(timeout=0.3)

    references = {
        name: {reference for _, other, _, reference in tab.told if other == name} for name in ("before", "after")
    }
    assert {"before": {"sub_free"}, "after": {"sub_pro"}} == references
    assert 3 == len(tab.told)
    billing.close()
    ledger.close()


def test_old(make_billing, tab, clock, quiet, caplog):
    """What has waited for a quarter of an hour is warned of, once."""
    ledger = MemoryLedger(clock=clock)
    billing = make_billing(ledger)
    record(billing, 1)
    sender = billing._remote.sender
    clock.advance(899)
    sender.look()
    assert [] == caplog.messages
    clock.advance(2)
    sender.look()
    sender.look()

    assert 1 == sum("15 minutes" in line for line in caplog.messages)
    assert 901 == billing.outbox_summary().oldest
    billing.close()
    ledger.close()


def test_locked_out(billing, tab, quick, caplog, monkeypatch):
    """A ledger that fails for a while stops nothing for good: the sender tries again, and warns once."""
    failures = iter([True] * 3)
    claim = MemoryLedger.claim

    def failing(self, *args, **kwargs):
        if next(failures, False):
            raise OSError("no disk")
        return claim(self, *args, **kwargs)

    monkeypatch.setattr(MemoryLedger, "claim", failing)
    record(billing, 1)
    tab.wait(lambda: len(tab.events) == 1)

    assert 1 == sum("could not be worked on" in line for line in caplog.messages)


def test_close_in_time(tab, tmp_path, monkeypatch):
    """Closing waits a bounded time for a service that hangs; what it does not have stays for the next start."""
    from metered_ai import billing as module

    monkeypatch.setattr(module, "DELIVER_AT_CLOSE", 0.2)
    hang = threading.Event()
    tab.writing = lambda event: hang.wait(20)
    ledger = SqliteLedger(tmp_path / "credits.db")
    billing = Billing(ledger, service=tab, spool=tmp_path)
    record(billing, 2)
    tab.wait(lambda: tab.requests == 1)
    threads = billing._remote.sender._threads
    billing.close()

    assert 2 == ledger.undelivered_summary().waiting
    hang.set()
    for thread in threads:
        thread.join(10)
    assert 1 == ledger.undelivered_summary().waiting
    ledger.close()


def test_dropped(tab, tmp_path):
    """The threads of a billing that nobody has any more end."""
    ledger = MemoryLedger()
    billing = Billing(ledger, service=tab, spool=tmp_path)
    record(billing, 1)
    tab.wait(lambda: len(tab.events) == 1)
    threads = list(billing._remote.sender._threads)
    alive = weakref.ref(billing)
    del billing
    gc.collect()

    assert None is alive()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    ledger.close()


def test_fork(tab, tmp_path):
    """A child that is forked while the parent sends starts its own sender, and neither waits for the other's requests."""
    billing = Billing(f"sqlite:///{tmp_path}/credits.db", service=tab)
    billing.balance("ada", GEN)
    record(billing, 3)

    def work(tell):
        # The child's copy of the tab: what it is told there the parent never sees.
        tab.events.clear()
        tab._changed = threading.Condition()
        record(billing, 2, "ada", first=10)
        soon(lambda: billing.outbox_summary().waiting == 0)
        tell(sorted(name for _, name in tab.events))
        billing.close()

    child = Child(work)
    told = child.result()
    billing.close()

    # Whoever was at it sent it.
    assert {"ada_0", "ada_1", "ada_2", "ada_10", "ada_11"} == {*told, *names(tab)}
    with Billing(f"sqlite:///{tmp_path}/credits.db", service=tab) as again:
        assert () == again.verify().broken
        assert 0 == again.outbox_summary().waiting


def test_a_pid_is_no_owner(tab, tmp_path):
    """Claims of one process never pass for another's."""
    seen = set()
    sender_claim = MemoryLedger.claim
    ledger = MemoryLedger()

    def claim(self, name, *args, **kwargs):
        seen.add(name)
        return sender_claim(self, name, *args, **kwargs)

    ledger.claim = claim.__get__(ledger)
    billing = Billing(ledger, service=Tab(credits=5), spool=tmp_path)
    record(billing, 3)
    soon(lambda: billing.outbox_summary().waiting == 0)
    billing.close()
    ledger.close()

    assert len(seen) >= 3
    assert not any(str(os.getpid()) == name for name in seen)
