"""Processes that call a provider with threads and tasks until they are killed, and the account of what they left."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metered_ai import AsyncMeteredOpenAI, Billing, BillingUnavailableError, MeteredOpenAI, connect
from metered_ai.ledger import Ledger, Recovery
from tests.proof.children import HELLO, Child, http_clients

__all__ = ["CREDITS", "CUSTOMERS", "account_for", "kill_again_and_again", "later", "work"]

CUSTOMERS = ["ada", "bob", "eve"]
CREDITS = 10_000_000


def work(tell, url: str, base_url: str, policies: dict[str, Any], acks: Path, seed: int) -> None:
    """
    Call for ever; note each answer, with the customer, once the caller has all of it.

    Tells "answered" and "refused" when calls begin to be answered, and begin to be refused because the ledger is away.
    """
    noted = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    billing = connect(url, lease=9.0, heartbeat=3.0, **policies)
    options = {"billing": billing, "base_url": base_url, "api_key": "k", "max_retries": 0}
    http, async_http = http_clients()
    last = [""]

    def said(what: str) -> None:
        if last[0] != what or what == "refused":
            last[0] = what
            tell(what)

    def note(customer: str, answer_id: str, request_id: str) -> None:
        # One write: it is there whole or not at all, and outlives its process.
        os.write(noted, json.dumps([customer, answer_id, request_id]).encode() + b"\n")
        said("answered")

    def call_on(dice: random.Random) -> None:
        while True:
            customer = dice.choice(CUSTOMERS)
            paid = client.with_billing(customer=customer)
            try:
                if dice.random() < 0.5:
                    raw = paid.chat.completions.with_raw_response.create(model="m", messages=HELLO)
                    note(customer, raw.parse().id, raw.headers["x-request-id"])
                else:
                    with paid.chat.completions.create(model="m", messages=HELLO, stream=True) as stream:
                        ids = {chunk.id for chunk in stream}
                        note(customer, ids.pop(), stream.response.headers["x-request-id"])
            except BillingUnavailableError:
                said("refused")
                time.sleep(0.02)

    async def task(client: AsyncMeteredOpenAI, dice: random.Random) -> None:
        while True:
            customer = dice.choice(CUSTOMERS)
            paid = client.with_billing(customer=customer)
            try:
                if dice.random() < 0.5:
                    raw = await paid.chat.completions.with_raw_response.create(model="m", messages=HELLO)
                    note(customer, raw.parse().id, raw.headers["x-request-id"])
                else:
                    async with await paid.chat.completions.create(model="m", messages=HELLO, stream=True) as stream:
                        ids = {chunk.id async for chunk in stream}
                        note(customer, ids.pop(), stream.response.headers["x-request-id"])
            except BillingUnavailableError:
                said("refused")
                await asyncio.sleep(0.02)

    async def tasks() -> None:
        client = AsyncMeteredOpenAI(http_client=async_http, **options)
        await asyncio.gather(*(task(client, random.Random(seed + number)) for number in range(4)))

    def tell_of(thread: Any) -> None:
        tell(repr(thread.exc_value))
        os._exit(1)

    # What nobody expected ends the child: its status tells.
    threading.excepthook = tell_of
    client = MeteredOpenAI(http_client=http, **options)
    for number in range(2):
        threading.Thread(target=call_on, args=(random.Random(seed - number),), daemon=True).start()
    asyncio.run(tasks())


def kill_again_and_again(start: Callable[[int], Child], kills: int, at_once: int, dice: random.Random) -> None:
    """Keep `at_once` children running, and kill them at random moments until `kills` and those are dead."""

    def kill(child: Child) -> None:
        # One in three dies young, while it opens the ledger or makes its first calls.
        if dice.random() < 0.67:
            child.hear()
        # The moment of death is what this is about.
        time.sleep(dice.uniform(0, 0.3))
        child.signal(signal.SIGKILL)
        told = child.wait()
        assert -signal.SIGKILL == child.status, told[-1:]

    running = [start(number) for number in range(at_once)]
    for number in range(kills):
        kill(running.pop(dice.randrange(at_once)))
        running.append(start(at_once + number))
    for child in running:
        kill(child)


def later() -> int:
    """An hour past every lease."""
    return time.time_ns() // 1000 + 3 * 3600 * 1_000_000


def account_for(
    ledger: Ledger, acks: Path, log: Path, say: Callable[[str], None], title: str, **policies: Any
) -> Recovery:
    """
    Recover and check what was left: each answer that was acknowledged has its one event, each event an answer that was issued or a
    policy, and no credit is held or lost.
    """
    acknowledged = [tuple(json.loads(line)) for line in acks.read_text().splitlines()]
    issued = {line["id"]: line["request_id"] for line in map(json.loads, log.read_text().splitlines())}
    with Billing(ledger, **policies) as billing:
        recovery = billing.recover()
        verified = billing.verify()
        events = list(billing.usage_events())
        holds = list(billing.holds())
        balances = [billing.balance(customer, "generations") for customer in CUSTOMERS]

    kinds = Counter(event.kind for event in events)
    say(
        f"{title}: {len(issued)} answers issued, {len(acknowledged)} acknowledged, {dict(kinds)} recorded; "
        f"{recovery.released} holds released, {recovery.charged} charged at the end, {recovery.replayed} came from spools"
    )
    assert () == verified.broken
    assert acknowledged

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
    return recovery
