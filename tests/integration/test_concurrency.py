"""40 callers at once on a real server: every token of theirs is in the ledger, none twice, and none for those who cannot pay."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from metered_ai import AsyncMeteredOpenAI, InsufficientCreditsError, MeteredOpenAI, bill_to, per_token
from tests.integration.truth import HI, counted, idle, tokens

TOKENS = per_token(input=1, output=2)
AT_ONCE = 40
CUSTOMERS = ["ada", "bob", "cem", "dee"]


@pytest.fixture(params=["threads", "tasks"])
def at_once(request, llama, billing):
    """Make 40 calls at once, the i-th one as `what(client, i)` says, and give their results or their errors."""
    options = {"base_url": llama.base_url, "api_key": "none", "max_retries": 0, "timeout": 60, "billing": billing}

    def threads(what, **more):
        def one(i):
            try:
                with bill_to(CUSTOMERS[i % len(CUSTOMERS)]):
                    return what(client, i, list)
            except InsufficientCreditsError as error:
                return error

        with MeteredOpenAI(**options, **more) as client, ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(one, range(AT_ONCE)))

    def tasks(what, **more):
        async def read(stream):
            return [chunk async for chunk in await stream]

        async def one(client, i):
            async with bill_to(CUSTOMERS[i % len(CUSTOMERS)]):
                return await what(client, i, read)

        async def main():
            async with AsyncMeteredOpenAI(**options, **more) as client:
                calls = (one(client, i) for i in range(AT_ONCE))
                return await asyncio.gather(*calls, return_exceptions=True)

        return asyncio.run(main())

    return threads if request.param == "threads" else tasks


def chat(client, i, read):
    """A plain call, or a stream that is read to its end."""
    if i % 2:
        return client.chat.completions.create(model="any", messages=HI)
    return read(client.chat.completions.create(model="any", messages=HI, stream=True))


def grant(billing, amount):
    for customer in CUSTOMERS:
        billing.grant(customer, "generations", amount, id="order_1")


def test_every_token(at_once, llama, billing):
    """Plain and streamed, for four customers: 40 events, whose tokens are the server's own count, each with who asked for it."""
    grant(billing, 1_000_000)
    with counted(llama) as count:
        answers = at_once(chat, pricing=TOKENS)
    ids = {
        (CUSTOMERS[i % 4], f"gen_{(answer[0] if isinstance(answer, list) else answer).id}")
        for i, answer in enumerate(answers)
    }

    assert AT_ONCE == len(ids)
    assert ids == {(event.customer, event.transaction_id) for event in billing.usage_events()}
    assert {"reported"} == {event.basis for event in billing.usage_events()}
    assert count == tokens(billing)
    for customer in CUSTOMERS:
        read, wrote = tokens(billing, customer)
        assert read + 2 * wrote == billing.balance(customer, "generations").used


def test_credits_for_some(at_once, llama, billing):
    """Credits for six calls each let exactly six of a customer's ten pass, and the server hears of no other."""
    for customer in CUSTOMERS[1:]:
        billing.grant(customer, "generations", 6, id="order_1")
    with counted(llama) as count:
        answers = at_once(lambda client, i, read: client.chat.completions.create(model="any", messages=HI))
    refused = [answer for answer in answers if isinstance(answer, InsufficientCreditsError)]

    assert [6, 6, 6] == [sum(1 for _ in billing.usage_events(customer)) for customer in CUSTOMERS[1:]]
    assert 12 == len(refused)
    assert count == tokens(billing)
    assert {0} == {billing.balance(customer, "generations").available for customer in CUSTOMERS[1:]}


def test_cancelled(llama, billing):
    """Tasks that are cancelled at any moment hold nothing, and no answer is billed twice; nothing is lost but what nobody got."""

    async def main():
        options = {"base_url": llama.base_url, "api_key": "none", "max_retries": 0, "billing": billing}
        async with AsyncMeteredOpenAI(**options, customer="ada") as client:
            calls = [
                asyncio.ensure_future(client.chat.completions.create(model="any", messages=HI)) for _ in range(AT_ONCE)
            ]
            for i, call in enumerate(calls):
                asyncio.get_running_loop().call_later(0.005 * i, call.cancel)
            ends = await asyncio.gather(*calls, return_exceptions=True)
        return [f"gen_{end.id}" for end in ends if not isinstance(end, BaseException)]

    answered = asyncio.run(main())
    idle(llama)
    billing.flush()
    billed = [event.transaction_id for event in billing.usage_events()]
    print(f"{len(answered)} of {AT_ONCE} answered, {len(billed)} billed")

    assert len(billed) == len(set(billed))
    assert set(answered) <= set(billed)
    assert AT_ONCE == len(billed) + sum(1 for _ in billing.holds(state="released"))
