"""Several processes with one file: the same answer twice, and everything at once while somebody reads."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections import Counter
from typing import Any

import openai
import pytest

from metered_ai import InsufficientCreditsError, MeteredOpenAI, connect
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.testing.provider import Answer, FakeProvider
from tests.proof.children import HELLO, LONG, http_clients, warm_up

CUSTOMERS = ["ada", "bob", "eve", "zoe"]
SECONDS = 300.0 if LONG else 4.0
ROUNDS = 500 if LONG else 20


def options(billing: Any, base_url: str) -> Any:
    return {
        "billing": billing,
        "base_url": base_url,
        "api_key": "k",
        "max_retries": 0,
        "http_client": http_clients()[0],
    }


def test_one_answer_two_processes(tmp_path, provider, say, fork):
    """An answer that a cache gives to two processes at once is billed once, and the other's hold is given back."""
    url = f"sqlite:///{tmp_path}/credits.db"
    warm_up(provider.base_url, tmp_path / "warm")
    with connect(url) as billing:
        billing.grant("ada", "generations", 2 * ROUNDS, id="start")
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def work(tell: Any) -> None:
        with connect(url) as billing, MeteredOpenAI(customer="ada", **options(billing, provider.base_url)) as client:
            tell("ready")
            for number in range(ROUNDS):
                with FakeProvider(default=Answer(id=f"chatcmpl-{number}", created=7, model="m")) as cache:
                    barrier.wait(60)
                    client.with_options(base_url=cache.base_url).chat.completions.create(model="m", messages=HELLO)
        tell("done")

    children = [fork(work), fork(work)]
    assert ["done", "done"] == [child.result() for child in children]
    with connect(url) as billing:
        events = sorted(event.transaction_id for event in billing.usage_events())
        holds = Counter((hold.state, hold.reason) for hold in billing.holds())
        balance = billing.balance("ada", "generations")
        verified = billing.verify()

    say(f"one answer for two processes, {ROUNDS} times: {len(events)} events, {dict(holds)}")
    assert sorted(f"gen_chatcmpl-{number}" for number in range(ROUNDS)) == events
    assert {("released", "repeat"): ROUNDS} == holds
    assert (ROUNDS, 0) == (balance.used, balance.held)
    assert () == verified.broken


@pytest.mark.timeout(3600)
def test_everything_at_once(tmp_path, provider, say, fork):
    """
    While four processes call, stream, charge, record and fail for mixed customers, every state that another process reads
    adds up; and at the end every customer has paid what the processes say.
    """
    url = f"sqlite:///{tmp_path}/credits.db"
    warm_up(provider.base_url, tmp_path / "warm")
    acts = ["call", "stream", "left", "fail", "charge", "record", "grant", "call"]
    seed = random.randrange(1 << 30)
    with connect(url) as billing:
        for customer in CUSTOMERS:
            billing.grant(customer, "generations", 5, id="start")
    is_over = multiprocessing.get_context("fork").Event()

    def work(tell: Any, number: int) -> None:
        # Of each customer: what was charged and what was granted, as this process sees it.
        paid, given, done = Counter[str](), Counter[str](), Counter[str]()
        lock = threading.Lock()
        billing = connect(url)
        client = MeteredOpenAI(**options(billing, provider.base_url))

        def act(name: str, dice: random.Random) -> None:
            turn = 0
            while not is_over.is_set():
                turn += 1
                customer, what, cost, gift = dice.choice(CUSTOMERS), dice.choice(acts), 1, 0
                mine = client.with_billing(customer=customer)
                try:
                    match what:
                        case "call":
                            mine.chat.completions.create(model="m", messages=HELLO)
                        case "stream":
                            list(mine.chat.completions.create(model="m", messages=HELLO, stream=True))
                        case "left":
                            with mine.chat.completions.create(model="m", messages=HELLO, stream=True) as stream:
                                next(iter(stream))
                        case "fail":
                            cost = 0
                            mine.with_options(base_url=failing.base_url).embeddings.create(model="m", input="x")
                        case "charge":
                            with billing.charge(customer, "generations", amount=1) as charge:
                                cost = 3
                                charge.raise_to(cost)
                        case "record":
                            billing.record(customer, "generations", transaction_id=f"{name}-{turn}", amount=1)
                        case _:
                            gift, cost = dice.randint(1, 3), 0
                            billing.grant(customer, "generations", gift, id=f"{name}-{turn}")
                except InsufficientCreditsError:
                    cost, what = 0, "refused"
                except openai.APIStatusError:
                    what = "failed"
                with lock:
                    paid[customer] += cost
                    given[customer] += gift
                    done[what] += 1

        threads = [
            threading.Thread(target=act, args=(f"{number}-{thread}", random.Random(seed + 10 * number + thread)))
            for thread in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        billing.close()
        tell(paid, given, done)

    def read(tell: Any) -> None:
        ledger = SqliteLedger(tmp_path / "credits.db")
        balances = verifications = 0
        while not is_over.is_set():
            for customer in CUSTOMERS:
                balance = ledger.balance(customer, "generations")
                limit, available = balance.limit or 0, balance.available or 0
                assert limit + balance.debt == balance.used + balance.held + available, balance
                assert min(limit, balance.used, balance.held, available, balance.debt) >= 0, balance
                assert not (available and balance.debt), balance
                balances += 1
            found = ledger.verify()
            assert () == found.broken
            verifications += 1
        tell(balances, verifications)

    with FakeProvider(default=Answer(status=429)) as failing:
        workers = [fork(work, number) for number in range(4)]
        reader = fork(read)
        # A bounded time of load is what this test is made of.
        time.sleep(SECONDS)
        is_over.set()
        balances, verifications = reader.result(300)
        told = [worker.result(300) for worker in workers]

    with connect(url) as billing:
        verified = billing.verify()
        found = {customer: billing.balance(customer, "generations") for customer in CUSTOMERS}
        open_holds = list(billing.holds(state="open"))
    paid, given, done = (sum((Counter(each[part]) for each in told), Counter[str]()) for part in range(3))

    say(
        f"4 processes × 3 threads for {SECONDS:g} s (seed {seed}): {dict(done)}; meanwhile {balances} balances and "
        f"{verifications} whole verifications read, all sound"
    )
    assert () == verified.broken
    assert [] == open_holds
    assert {customer: paid[customer] for customer in CUSTOMERS} == {name: each.used for name, each in found.items()}
    assert {name: 5 + given[name] for name in CUSTOMERS} == {name: each.limit for name, each in found.items()}
    assert {*acts, "refused", "failed"} - {"fail"} == set(done)
    assert min(balances, verifications) > 0
