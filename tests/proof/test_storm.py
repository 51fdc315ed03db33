"""Processes that call a provider with threads and tasks are killed at random times, again and again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from metered_ai import AsyncMeteredOpenAI, Billing, MeteredOpenAI, connect
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.testing.provider import ProviderProcess
from tests.proof.children import HELLO, LONG, Child, http_clients, warm_up

CUSTOMERS = ["ada", "bob", "eve"]
CREDITS = 10_000_000
KILLS = 3_000 if LONG else 24
AT_ONCE = 3


def work(tell, url: str, base_url: str, policy: str, acks: Path, seed: int) -> None:
    """Call for ever; note each answer, with the customer, once the caller has all of it."""
    noted = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    billing = connect(url, on_unknown=policy, lease=9.0, heartbeat=3.0)
    options = {"billing": billing, "base_url": base_url, "api_key": "k", "max_retries": 0}
    http, async_http = http_clients()
    is_first = [True]

    def note(customer: str, answer_id: str, request_id: str) -> None:
        # One write: it is there whole or not at all, and outlives its process.
        os.write(noted, json.dumps([customer, answer_id, request_id]).encode() + b"\n")
        if is_first:
            is_first.clear()
            tell("answered")

    def call_on(dice: random.Random) -> None:
        while True:
            customer = dice.choice(CUSTOMERS)
            paid = client.with_billing(customer=customer)
            if dice.random() < 0.5:
                raw = paid.chat.completions.with_raw_response.create(model="m", messages=HELLO)
                note(customer, raw.parse().id, raw.headers["x-request-id"])
            else:
                with paid.chat.completions.create(model="m", messages=HELLO, stream=True) as stream:
                    ids = {chunk.id for chunk in stream}
                    note(customer, ids.pop(), stream.response.headers["x-request-id"])

    async def task(client: AsyncMeteredOpenAI, dice: random.Random) -> None:
        while True:
            customer = dice.choice(CUSTOMERS)
            paid = client.with_billing(customer=customer)
            if dice.random() < 0.5:
                raw = await paid.chat.completions.with_raw_response.create(model="m", messages=HELLO)
                note(customer, raw.parse().id, raw.headers["x-request-id"])
            else:
                async with await paid.chat.completions.create(model="m", messages=HELLO, stream=True) as stream:
                    ids = {chunk.id async for chunk in stream}
                    note(customer, ids.pop(), stream.response.headers["x-request-id"])

    async def tasks() -> None:
        client = AsyncMeteredOpenAI(http_client=async_http, **options)
        await asyncio.gather(*(task(client, random.Random(seed + number)) for number in range(4)))

    client = MeteredOpenAI(http_client=http, **options)
    for number in range(2):
        threading.Thread(target=call_on, args=(random.Random(seed - number),), daemon=True).start()
    asyncio.run(tasks())


def later() -> int:
    """An hour past every lease."""
    return time.time_ns() // 1000 + 3 * 3600 * 1_000_000


@pytest.mark.timeout(3600)
def test_storm(tmp_path, provider, say):
    """
    Whoever is killed whenever: each answer that was acknowledged has its one event, each event an answer that was issued or a
    policy, and no credit is held or lost.
    """
    url, acks, log = f"sqlite:///{tmp_path}/credits.db", tmp_path / "acks", tmp_path / "issued"
    with connect(url) as billing:
        for customer in CUSTOMERS:
            billing.grant(customer, "generations", CREDITS, id="start")
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)

    warm_up(provider.base_url, tmp_path / "warm")
    with ProviderProcess(log=log, pause=0.001) as outliving:

        def start(number: int) -> Child:
            return Child(work, url, outliving.base_url, dice.choice(["release", "charge"]), acks, seed + 100 * number)

        def kill(child: Child) -> None:
            # One in three dies young, while it opens the ledger or makes its first calls.
            if dice.random() < 0.67:
                child.hear()
            # The moment of death is what this test is about.
            time.sleep(dice.uniform(0, 0.3))
            child.signal(signal.SIGKILL)
            child.wait()
            assert -signal.SIGKILL == child.status

        running = [start(number) for number in range(AT_ONCE)]
        for number in range(KILLS):
            kill(running.pop(dice.randrange(AT_ONCE)))
            running.append(start(AT_ONCE + number))
        for child in running:
            kill(child)

    acknowledged = [tuple(json.loads(line)) for line in acks.read_text().splitlines()]
    issued = {line["id"]: line["request_id"] for line in map(json.loads, log.read_text().splitlines())}
    ledger = SqliteLedger(tmp_path / "credits.db", clock=later)
    with Billing(ledger) as billing:
        recovery = billing.recover()
        verified = billing.verify()
        events = list(billing.usage_events())
        holds = list(billing.holds())
        balances = [billing.balance(customer, "generations") for customer in CUSTOMERS]
    ledger.close()

    kinds = Counter(event.kind for event in events)
    say(
        f"storm (seed {seed}): {KILLS + AT_ONCE} killed; {len(issued)} answers issued, {len(acknowledged)} acknowledged, "
        f"{dict(kinds)} recorded; {recovery.released} holds released, {recovery.charged} charged at the end"
    )
    assert () == verified.broken
    assert acknowledged
    assert recovery.resolved

    # Nothing lost, nothing doubled. An answer whose hold was charged before it was settled has its truth as a correction.
    found = Counter((event.customer, event.request_id) for event in events if event.kind in ("call", "correction"))
    assert [1] * len(acknowledged) == [found[customer, request_id] for customer, _, request_id in acknowledged]
    assert len(acknowledged) == len({answer_id for _, answer_id, _ in acknowledged})
    assert {1} == set(found.values())

    # Nothing invented.
    charged = {hold.id for hold in holds if hold.state == "charged"}
    for event in events:
        if event.kind == "call":
            assert issued[event.transaction_id.removeprefix("gen_")] == event.request_id
        else:
            assert event.hold_id in charged
    calls = [event.transaction_id for event in events if event.kind == "call"]
    assert len(calls) == len(set(calls))

    # Nothing was sent without a hold: each answer that was issued has its event, or a hold that is in doubt.
    assert len(issued) <= len(calls) + sum(hold.is_in_doubt for hold in holds)

    # Nothing stuck.
    assert [] == [hold for hold in holds if hold.state == "open"]
    for balance in balances:
        assert (0, 0) == (balance.held, balance.debt)
        assert balance.used + (balance.available or 0) == CREDITS
        assert balance.used == sum(event.amount for event in events if event.customer == balance.customer)
