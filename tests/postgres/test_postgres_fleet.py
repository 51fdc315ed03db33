"""Many processes, threads and tasks on one balance of a real server: nothing is overspent, lost, doubled or stuck, whoever is killed."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections import Counter

import pytest

from metered_ai import connect
from metered_ai.core.steps import AddGrant, Place
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.testing.provider import ProviderProcess
from tests.proof.children import LONG, Child, warm_up
from tests.proof.storm import CREDITS, CUSTOMERS, account_for, kill_again_and_again, later, work
from tests.proof.test_credits_for_ten import check, from_tasks, from_threads

KILLS = 1_000 if LONG else 12
AT_ONCE = 3


@pytest.fixture
def state(tmp_path, monkeypatch):
    """Everything that is kept beside a ledger goes here."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_credits_for_ten(postgres, state, provider, say, fork):
    """Of 50 calls of 4 processes on one balance, two with threads and two with tasks, exactly 10 are answered."""
    with connect(postgres) as billing:
        billing.grant("ada", "generations", 10, id="ten")

    def act(tell, calls, count):
        tell("ready")
        tell(calls(postgres, provider.base_url, count, lambda: start.wait(60)))

    start = multiprocessing.get_context("fork").Event()
    shapes = [(from_threads, 13), (from_threads, 12), (from_tasks, 13), (from_tasks, 12)]
    children = [fork(act, calls, count) for calls, count in shapes]
    for child in children:
        child.hear()
    start.set()
    went = sum((Counter(child.result()) for child in children), Counter[str]())

    say(
        f"PostgreSQL, 4 processes × threads or tasks on credits for 10: {dict(went)}, {len(provider.requests)} requests"
    )
    check(went, postgres, provider)


@pytest.mark.timeout(3600)
def test_storm(postgres, state, tmp_path, provider, say):
    """
    Whoever is killed whenever: each answer that was acknowledged has its one event, each event an answer that was issued or a
    policy, and no credit is held or lost.
    """
    acks, log = tmp_path / "acks", tmp_path / "issued"
    with connect(postgres) as billing:
        for customer in CUSTOMERS:
            billing.grant(customer, "generations", CREDITS, id="start")
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)

    warm_up(provider.base_url, tmp_path / "warm")
    with ProviderProcess(log=log, pause=0.001) as outliving:

        def start(number: int) -> Child:
            policies = {"on_unknown": dice.choice(["release", "charge"])}
            return Child(work, postgres, outliving.base_url, policies, acks, seed + 100 * number)

        kill_again_and_again(start, KILLS, AT_ONCE, dice)

    ledger = PostgresLedger(postgres, clock=later)
    recovery = account_for(ledger, acks, log, say, f"PostgreSQL storm (seed {seed}), {KILLS + AT_ONCE} killed")
    ledger.close()

    assert recovery.resolved


def test_new_accounts(postgres):
    """Whoever is first on an account: grants and holds that make it at the same moment all count, and nothing is written over."""
    ledgers = [PostgresLedger(postgres) for _ in range(4)]
    ledgers[0].balance("ada", "generations")
    customers = [f"customer_{number}" for number in range(60)]
    barrier = threading.Barrier(len(ledgers))
    errors = []

    def work(number, ledger):
        for customer in customers:
            barrier.wait(60)
            try:
                ledger.run(AddGrant(customer, "generations", 5, f"g{number}"))
                for hold in range(3):
                    ledger.run(Place(f"h{number}.{hold}", customer, "generations", 1, None))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(number, ledger)) for number, ledger in enumerate(ledgers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = ledgers[0].verify().broken
    balances = [ledgers[0].balance(customer, "generations") for customer in customers]
    for ledger in ledgers:
        ledger.close()

    assert [] == errors
    assert () == broken
    assert {(20, 12, 0)} == {(balance.limit, balance.held, balance.used) for balance in balances}
