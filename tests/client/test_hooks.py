"""Hooks: told once when a balance runs low and at each refusal, and never in anybody's way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from queue import Queue

import pytest
from hypothesis import given
from hypothesis import strategies as st

import metered_ai
from metered_ai import ConfigurationError, InsufficientCreditsError, connect
from metered_ai import hooks as hooks_module
from metered_ai.billing import Billing
from metered_ai.hooks import THRESHOLDS, LowBalance, Refusal, crossed
from tests.client.shells import Shell

GEN = "generations"


class Told:
    """Keeps what hooks are told."""

    def __init__(self):
        self.low = []
        self.refused = []

    def hooks(self):
        return {"on_low_balance": self.low.append, "on_refused": self.refused.append}

    @property
    def thresholds(self):
        return [each.threshold for each in self.low]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'credits.db'}"


@pytest.fixture
def open_billing(url, told):
    """Opens billings on one file, each as another process would."""
    opened = []

    def make(**policies):
        opened.append(connect(url, **{"durability": "relaxed", **told.hooks(), **policies}))
        return opened[-1]

    yield make
    for billing in opened:
        billing.close()


@pytest.fixture(params=["sync", "async"])
def shell_of(request, provider, make_billing):
    """Makes the sync clients, then the async ones, on a billing with the policies that a test wants."""
    made = []

    def make(**policies):
        made.append(Shell(provider, make_billing(**policies), is_async=request.param == "async"))
        return made[-1]

    yield make
    for shell in made:
        shell.finish()


def wait(billing):
    """Until everything noted so far has been told."""
    done = threading.Event()
    billing._hooks._note(done.set)
    assert done.wait(30)


# ---- low balance ----


def test_calls(provider, shell_of, told):
    """Each threshold is told once, in order, with the balance; calls before and after say nothing."""
    shell = shell_of(**told.hooks())
    shell.billing.grant("ada", GEN, 10, id="order_1")
    client = shell.client()
    after = []
    for _ in range(10):
        shell.run(client.responses.create(model="gpt-5-mini", input="Hi"))
        shell.billing.flush()
        wait(shell.billing)
        after.append(told.thresholds)

    assert [[]] * 7 + [[80], [80, 90], [80, 90, 100]] == after
    assert LowBalance("ada", GEN, 80, told.low[0].balance) == told.low[0]
    assert [8, 9, 10] == [each.balance.used for each in told.low]
    assert [] == told.refused


def test_refused(provider, shell_of, told):
    """A refusal is told with its numbers, and raised all the same."""
    shell = shell_of(**told.hooks())
    shell.billing.grant("ada", GEN, 3, id="order_1")
    client = shell.client()
    with pytest.raises(InsufficientCreditsError):
        shell.run(client.with_billing(amount=5).responses.create(model="gpt-5-mini", input="Hi"))
    wait(shell.billing)

    assert [Refusal("ada", GEN, 3, 5, 0, False)] == told.refused
    assert [] == provider.requests


def test_jump(open_billing, told):
    """One event that passes several thresholds tells of each, the lowest first."""
    billing = open_billing()
    billing.grant("ada", GEN, 100, id="order_1")
    billing.record("ada", GEN, transaction_id="t1", amount=95)
    wait(billing)
    billing.record("ada", GEN, transaction_id="t2", amount=50)
    wait(billing)

    assert [80, 90, 100] == told.thresholds


def test_new_grant(open_billing, told):
    """A grant begins a new period: what is reached at the next use is told again, once."""
    billing = open_billing()
    billing.grant("ada", GEN, 100, id="order_1")
    billing.record("ada", GEN, transaction_id="t1", amount=85)
    wait(billing)
    billing.grant("ada", GEN, 1, id="order_2")
    billing.grant("ada", GEN, 1, id="order_2")
    for number in range(3):
        billing.record("ada", GEN, transaction_id=f"u{number}", amount=1)
    wait(billing)
    again = told.thresholds
    billing.grant("ada", GEN, 900, id="order_3")
    billing.record("ada", GEN, transaction_id="v", amount=1)
    wait(billing)

    assert [80, 80] == again == told.thresholds


def test_expiry(open_billing, told):
    """Credits that expire begin a new period, too: the rest may be nearly used up at once."""
    billing = open_billing()
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    billing.grant("ada", GEN, 100, id="order_1")
    billing.grant("ada", GEN, 900, id="trial", expires_at=soon)
    billing.record("ada", GEN, transaction_id="t1", amount=1)
    billing.record("ada", GEN, transaction_id="t2", amount=900)
    wait(billing)
    assert [80, 90] == told.thresholds
    while datetime.now(UTC) <= soon:
        threading.Event().wait(0.05)
    billing.record("ada", GEN, transaction_id="t3", amount=99)
    wait(billing)

    assert [80, 90, 80, 90, 100] == told.thresholds


def test_revoke(open_billing, told):
    """Taking credits back may bring an account low without any use."""
    billing = open_billing()
    billing.grant("ada", GEN, 100, id="order_1")
    billing.grant("ada", GEN, 100, id="order_2")
    billing.record("ada", GEN, transaction_id="t1", amount=92)
    wait(billing)
    before = told.thresholds
    for _ in range(2):
        billing.revoke("ada", GEN, "order_2")
    wait(billing)

    assert ([], [80, 90]) == (before, told.thresholds)


def test_repeats(open_billing, told):
    """An event that is recorded again tells nothing again; use without a limit or without credits tells nothing."""
    billing = open_billing()
    billing.grant("ada", GEN, 100, id="order_1")
    for _ in range(3):
        billing.record("ada", GEN, transaction_id="t1", amount=85)
    billing.record("ada", GEN, transaction_id="t2", amount=0)
    billing.set_unlimited("vip", GEN, True)
    billing.record("vip", GEN, transaction_id="t1", amount=85)
    wait(billing)

    assert [("ada", 80)] == [(each.customer, each.threshold) for each in told.low]


def test_accounts(open_billing, told):
    """Accounts are told apart; one that never had credits has reached its end."""
    billing = open_billing()
    for customer in ("ada", "bob"):
        billing.grant(customer, GEN, 10, id="order_1")
        billing.record(customer, GEN, transaction_id="t1", amount=8)
    billing.record("eve", GEN, transaction_id="t1", amount=1)
    wait(billing)

    assert [("ada", 80), ("bob", 80), ("eve", 100)] == [(each.customer, each.threshold) for each in told.low]


def test_restart(open_billing, told):
    """A program that starts again does not tell again what was told before."""
    for number in range(4):
        with open_billing() as billing:
            billing.grant("ada", GEN, 100, id="order_1")
            billing.record("ada", GEN, transaction_id=f"t{number}", amount=21)

    assert [80] == told.thresholds


def test_together(open_billing, told):
    """Many threads and several billings on one ledger: each threshold is told once among them all."""
    billings = [open_billing() for _ in range(3)]
    billings[0].grant("ada", GEN, 60, id="order_1")

    def work(billing, number):
        for step in range(10):
            with billing.charge("ada", GEN, amount=1, transaction_id=f"t{number}_{step}"):
                pass

    threads = [threading.Thread(target=work, args=(billings[n % 3], n)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for billing in billings:
        billing.flush()
        wait(billing)

    assert list(THRESHOLDS) == sorted(told.thresholds)


@given(limit=st.integers(1, 1000), steps=st.lists(st.integers(1, 300), max_size=20))
def test_crossed(limit, steps):
    """However use adds up, each threshold that is reached is told exactly once, at the event that reaches it."""
    used, told = 0, []
    for at, amount in enumerate(steps):
        told += crossed(limit, used, used + amount, is_first=at == 0)
        used += amount

    assert [each for each in THRESHOLDS if used * 100 // limit >= each] == told


# ---- charges and refusals ----


def test_charge(open_billing, told):
    """Charges tell as calls do: of a refused one, and of one that cannot be raised."""
    billing = open_billing()
    billing.grant("ada", GEN, 10, id="order_1")
    with pytest.raises(InsufficientCreditsError), billing.charge("ada", GEN, amount=11):
        pass
    with pytest.raises(InsufficientCreditsError), billing.charge("ada", GEN, amount=9) as charge:
        charge.raise_to(12)
    with billing.charge("ada", GEN, amount=9):
        pass
    wait(billing)

    assert [(10, 11), (1, 3)] == [(each.available, each.required) for each in told.refused]
    assert [80, 90] == told.thresholds


# ---- never in the way ----


def test_none(url):
    """Without hooks nothing of them is there: no thread, and their module is not even loaded."""
    code = f"""
import sys, threading
from metered_ai import connect
with connect({url!r}) as billing:
    billing.grant("ada", "g", 1, id="o")
    with billing.charge("ada", "g", amount=1): pass
    print(billing._hooks, "metered_ai.hooks" in sys.modules, [t.name for t in threading.enumerate() if "hooks" in t.name])
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(metered_ai.__file__))}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)

    assert ("None False []\n", "") == (ran.stdout, ran.stderr)


def test_failing(provider, shell_of, caplog):
    """A hook that fails fails alone: calls go on, and the log names the account and the kind of failure, not its words."""

    def fail(_):
        raise RuntimeError("the customer's own words")

    shell = shell_of(on_low_balance=fail, on_refused=fail)
    shell.billing.grant("ada", GEN, 1, id="order_1")
    client = shell.client()
    answer = shell.run(client.responses.create(model="gpt-5-mini", input="Hi"))
    with pytest.raises(InsufficientCreditsError):
        shell.run(client.responses.create(model="gpt-5-mini", input="Hi"))
    wait(shell.billing)

    assert answer.output_text
    assert 4 == len([record for record in caplog.records if "'ada'" in record.getMessage()])
    assert "RuntimeError" in caplog.text
    assert "own words" not in caplog.text


def test_slow(provider, shell_of):
    """A hook that does not return delays no call; what waits for it is told when it goes on."""
    gate, seen = threading.Event(), Queue()

    def slow(low):
        gate.wait(30)
        seen.put(low.threshold)

    shell = shell_of(on_low_balance=slow)
    shell.billing.grant("ada", GEN, 10, id="order_1")
    client = shell.client()
    for _ in range(10):
        shell.run(client.responses.create(model="gpt-5-mini", input="Hi"))

    assert seen.empty()
    assert 10 == shell.billing.balance("ada", GEN).used
    gate.set()
    assert [80, 90, 100] == [seen.get(timeout=30) for _ in range(3)]


def test_bounded(open_billing, told, monkeypatch, caplog):
    """What waits for a slow hook is bounded; what is dropped is logged once."""
    monkeypatch.setattr(hooks_module, "WAITING", 3)
    gate, started = threading.Event(), threading.Event()

    def slow(_):
        started.set()
        gate.wait(30)

    billing = open_billing(on_refused=slow)
    for number in range(20):
        with pytest.raises(InsufficientCreditsError):
            billing.charge("ada", GEN, amount=1).__enter__()
        if number == 0:
            assert started.wait(30)

    assert 3 == billing._hooks._waiting.qsize()
    assert 1 == caplog.text.count("hooks are too slow")
    gate.set()


def test_top_up(open_billing):
    """A hook may use the billing itself: credits are bought when they run low."""

    def top_up(low):
        billing.grant(low.customer, low.meter, 10, id=f"auto_{low.balance.limit}")

    billing = open_billing(on_low_balance=top_up)
    billing.grant("ada", GEN, 10, id="order_1")
    for number in range(18):
        with billing.charge("ada", GEN, amount=1, transaction_id=f"t{number}"):
            pass
        wait(billing)

    assert (30, 18) == (billing.balance("ada", GEN).limit, billing.balance("ada", GEN).used)


def test_close(open_billing, told):
    """What happened before the close is told; a hook that closes the billing itself does not hang."""
    billing = open_billing()
    billing.grant("ada", GEN, 1, id="order_1")
    billing.record("ada", GEN, transaction_id="t", amount=1)
    billing.close()
    closing = open_billing(on_refused=lambda _: closing.close())
    with pytest.raises(InsufficientCreditsError):
        closing.charge("ada", GEN, amount=1).__enter__()
    closing._hooks._thread.join(30)

    assert [80, 90, 100] == told.thresholds
    assert not closing._hooks._thread.is_alive()


def test_fork(open_billing, tmp_path):
    """A child tells by itself, on a thread of its own, and nothing of what waits in its parent."""
    out, parent, gate, started = tmp_path / "told", os.getpid(), threading.Event(), threading.Event()

    def tell(low):
        if os.getpid() == parent and low.threshold == 80:
            started.set()
            gate.wait(30)
        with out.open("a") as file:
            file.write(f"{os.getpid()} {low.customer} {low.threshold}\n")

    billing = open_billing(on_low_balance=tell)
    for customer in ("ada", "bob"):
        billing.grant(customer, GEN, 10, id="order_1")
    billing.record("ada", GEN, transaction_id="t1", amount=8)
    assert started.wait(30)
    billing.record("ada", GEN, transaction_id="t2", amount=1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            billing.record("bob", GEN, transaction_id="t1", amount=8)
            wait(billing)
            status = 0
        finally:
            os._exit(status)
    assert 0 == os.waitpid(child, 0)[1]
    gate.set()
    wait(billing)

    assert [f"{child} bob 80", f"{parent} ada 80", f"{parent} ada 90"] == out.read_text().splitlines()


# ---- mistakes ----


async def later(_):
    pass


class AsyncCall:
    async def __call__(self, _):
        pass


@pytest.mark.parametrize("hook", ["print", 7, later])
@pytest.mark.parametrize("name", ["on_low_balance", "on_refused"])
def test_mistakes(name, hook):
    """What cannot be called, or would never be awaited, is refused at once, by name."""
    with pytest.raises(ConfigurationError, match=name):
        Billing("memory://", **{name: hook})


def test_hidden_coroutine(open_billing, caplog):
    """A hook that turns out to be async is logged, not silently forgotten."""
    billing = open_billing(on_refused=AsyncCall())
    with pytest.raises(InsufficientCreditsError):
        billing.charge("ada", GEN, amount=1).__enter__()
    wait(billing)

    assert "on_refused failed for customer 'ada' on meter 'generations' (TypeError)" in caplog.text
