"""Who pays, and how: through real clients, in threads, tasks and generators; receipts; operations with ids of their own."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.responses import StreamingResponse

from metered_ai import (
    AlreadyBilledError,
    AsyncMeteredOpenAI,
    CustomerRequiredError,
    MeteredOpenAI,
    bill_to,
    operation_id,
    per_call,
    per_token,
)
from metered_ai.testing.provider import Answer
from tests.client.shells import HELLO

CUSTOMERS = ("ada", "bob", "eve")

RESPONSE = {"model": "m", "input": "Hi"}
CHAT = {"model": "m", "messages": HELLO}


@pytest.fixture
def billing(billing):
    """Everybody has credits on every meter."""
    for customer in CUSTOMERS:
        for meter in ("generations", "images", "tokens"):
            if (customer, meter) != ("ada", "generations"):
                billing.grant(customer, meter, 1_000_000, id="start")
    return billing


@pytest.fixture
def client(shell):
    """As in an app with many tenants: nobody pays by default."""
    return shell.client(customer=None)


@pytest.fixture
def sync_client(provider, billing):
    with MeteredOpenAI(billing=billing, base_url=provider.base_url, api_key="k", max_retries=0) as client:
        yield client


def events(billing, customer=None):
    return list(billing.usage_events(customer))


def payers(billing):
    return sorted(event.customer for event in events(billing))


# Precedence, through real clients.

FIELDS = ("customer", "meter", "amount", "transaction_id", "price_slug", "properties")


@pytest.mark.parametrize(
    ("constructor", "outer", "inner", "derived", "expected"),
    [
        pytest.param({"customer": "ada"}, None, None, None, ("ada", "generations", 1), id="constructor"),
        pytest.param({"customer": "ada"}, {"customer": "bob"}, None, None, ("bob", "generations", 1), id="bill_to"),
        pytest.param(
            {"customer": "ada"},
            {"customer": "bob"},
            {"customer": "eve"},
            None,
            ("eve", "generations", 1),
            id="inner bill_to",
        ),
        pytest.param(
            {"customer": "ada"},
            {"customer": "bob"},
            {"customer": "eve"},
            {"customer": "ada"},
            ("ada", "generations", 1),
            id="with_billing",
        ),
        pytest.param(
            {"customer": "ada", "meter": "images", "pricing": per_call(3)},
            None,
            None,
            None,
            ("ada", "images", 3),
            id="all",
        ),
        pytest.param(
            {"customer": "ada", "meter": "images", "pricing": per_call(3)},
            {"customer": "bob"},
            None,
            {"amount": 4},
            ("bob", "images", 4),
            id="field by field",
        ),
        pytest.param(
            {"pricing": per_call(3)},
            {"customer": "bob", "amount": 5},
            {"customer": "eve"},
            None,
            ("eve", "generations", 3),
            id="the inner customer hides the outer amount",
        ),
        pytest.param(
            {},
            {"customer": "bob", "amount": 5, "price_slug": "p"},
            None,
            {"meter": "images"},
            ("bob", "images", 1),
            id="a meter hides the amount below",
        ),
        pytest.param({}, {"customer": "bob"}, None, {"amount": 0}, ("bob", "generations", 0), id="an amount of 0"),
        pytest.param(
            {"pricing": per_token(input=0, output=10)},
            {"customer": "bob"},
            None,
            {"estimate": lambda request: 999},
            ("bob", "generations", 90),
            id="an estimate changes the hold only",
        ),
        pytest.param(
            {},
            {"customer": "bob", "transaction_id": "t", "price_slug": "p", "properties": {"a": 1, "b": 1}},
            None,
            {"properties": {"b": 2}},
            ("bob", "generations", 1, "t", "p", {"a": 1, "b": 2}),
            id="properties merge",
        ),
        pytest.param(
            {},
            {"customer": "bob", "transaction_id": "t", "price_slug": "p", "properties": {"a": 1}},
            None,
            {"customer": "bob"},
            ("bob", "generations", 1, None, None, None),
            id="a customer hides what belongs to the one below, also if it is the same",
        ),
    ],
)
def test_precedence(shell, constructor, outer, inner, derived, expected):
    """`with_billing`, then the innermost `bill_to`, outer ones, the constructor: field by field."""
    client = shell.client(**{"customer": None, **constructor})
    if derived:
        client = client.with_billing(**derived)

    async def scenario():
        blocks = [bill_to(given.pop("customer"), **given) for given in (dict(outer or {}), dict(inner or {})) if given]
        for block in blocks:
            block.__enter__()
        answer = await shell.wait(client.chat.completions.create(**CHAT))
        for block in reversed(blocks):
            block.__exit__(None, None, None)
        return answer

    answer = shell.play(scenario())
    (event,) = events(shell.billing)
    found = tuple(getattr(event, field) for field in FIELDS)
    if len(expected) > 3 and expected[3] is None:
        expected = (*expected[:3], f"gen_{answer.id}", *expected[4:])

    assert expected == found[: len(expected)]


def test_chain_of_derived_clients(shell, client):
    """A client derived from a derived one asks the newest first."""
    first = client.with_billing(customer="ada", amount=2)
    second = first.with_billing(amount=3)
    shell.run(second.responses.create(**RESPONSE))
    shell.run(second.with_options(customer="bob").responses.create(**RESPONSE))
    shell.run(first.responses.create(**RESPONSE))

    assert [("ada", 3), ("ada", 2), ("bob", 1)] == [(event.customer, event.amount) for event in events(shell.billing)]


def test_nobody(shell, client, ledger):
    """Without a customer the call is refused; nothing is held and nothing is sent."""
    with pytest.raises(CustomerRequiredError) as caught:
        shell.run(client.responses.create(**RESPONSE))

    assert 500 == caught.value.http_status
    assert ([], []) == (ledger.kinds, shell.provider.requests)


@pytest.mark.parametrize(
    "given",
    [
        {"user": "bob"},
        {"metadata": {"customer": "bob", "user_id": "bob"}},
        {"safety_identifier": "bob"},
        {"extra_headers": {"x-customer": "bob", "x-metered-customer": "bob"}},
        {"extra_body": {"customer": "bob", "metered": {"customer": "bob"}}},
        {"extra_query": {"customer": "bob"}},
        {"prompt_cache_key": "bob"},
    ],
)
def test_the_request_never_chooses(shell, client, given):
    """`user=`, metadata, headers and whatever else is sent never choose who pays."""
    with pytest.raises(CustomerRequiredError):
        shell.run(client.responses.create(**RESPONSE, **given))
    with bill_to("ada"):
        shell.run(client.responses.create(**RESPONSE, **given))

    assert ["ada"] == payers(shell.billing)


def test_nothing_goes_out(shell, client):
    """Who pays is no business of the provider."""
    with bill_to(
        "ada", meter="images", transaction_id="t_secret", properties={"secret": "p_secret"}, price_slug="s_secret"
    ):
        shell.run(client.responses.create(**RESPONSE))
    (request,) = shell.provider.requests
    text = f"{request.url} {request.headers} {request.content!r}"

    assert [] == [word for word in ("ada", "images", "secret", "generations") if word in text]


# When it is read.


def test_read_once(shell, client):
    """Who pays is decided when the call starts: a stream is billed to who was named then, wherever it is read."""

    async def scenario():
        async with shell.block(bill_to("ada")):
            stream = await shell.wait(client.chat.completions.create(**CHAT, stream=True))
        async with shell.block(bill_to("bob")):
            if shell.is_async:
                assert [chunk async for chunk in stream]
            else:
                assert list(stream)

    shell.play(scenario())
    assert ["ada"] == payers(shell.billing)


def test_restored(shell, client):
    """After a block what was before counts again, whether it ended well or not."""
    client = client.with_billing(meter="images")

    async def call():
        await shell.wait(client.responses.create(**RESPONSE))

    async def scenario():
        async with shell.block(bill_to("ada")):
            await call()
            async with shell.block(bill_to("bob")):
                await call()
            await call()
            with pytest.raises(ZeroDivisionError):
                async with shell.block(bill_to("eve")):
                    raise ZeroDivisionError
            await call()
        with pytest.raises(CustomerRequiredError):
            await call()

    shell.play(scenario())
    assert ["ada", "ada", "ada", "bob"] == payers(shell.billing)


def test_same_block_again(shell, client):
    """A `bill_to` can be entered again, also inside itself."""
    block = bill_to("ada")

    async def scenario():
        async with shell.block(block) as outer, shell.block(block) as inner:
            await shell.wait(client.responses.create(**RESPONSE))
        async with shell.block(block) as later:
            await shell.wait(client.responses.create(**RESPONSE))
        return outer, inner, later

    receipts = shell.play(scenario())
    assert [1, 1, 1] == [receipt.amount for receipt in receipts]
    assert ["ada", "ada"] == payers(shell.billing)


def test_one_block_in_many_threads(sync_client, billing):
    """A `bill_to` object may be entered by many threads at once: leaving in one ends its own block and no other's."""
    block = bill_to("ada")
    early_in, late_in, early_out = threading.Event(), threading.Event(), threading.Event()

    def early():
        with bill_to("bob"):
            with block:
                early_in.set()
                assert late_in.wait(5)
            sync_client.responses.create(**RESPONSE)
        early_out.set()

    def late():
        assert early_in.wait(5)
        with block as bill:
            late_in.set()
            assert early_out.wait(5)
            sync_client.responses.create(**RESPONSE)
        return bill.amount

    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(early), threads.submit(late)]
        assert [None, 1] == [one.result() for one in done]
    assert ["ada", "bob"] == payers(billing)


def test_left_out_of_order(sync_client, billing):
    """Blocks that are left in the wrong order raise nothing, and a block that is over bills nobody."""
    ada, bob = bill_to("ada"), bill_to("bob")
    ada.__enter__()
    bob.__enter__()
    ada.__exit__(None, None, None)
    sync_client.responses.create(**RESPONSE)
    bob.__exit__(None, None, None)

    assert ["bob"] == payers(billing)
    with pytest.raises(CustomerRequiredError):
        sync_client.responses.create(**RESPONSE)


# Threads.


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function, *args).result()


def test_thread_loses_it(sync_client, billing, provider):
    """A thread does not see the block around its start: the call is refused and not sent, never billed to somebody else."""
    with bill_to("ada"), pytest.raises(CustomerRequiredError):
        in_thread(lambda: sync_client.responses.create(**RESPONSE))

    assert [] == provider.requests
    assert [] == events(billing)


def test_thread_with_context(sync_client, billing):
    """With a copied context it does, and `with_billing` needs no context."""
    with bill_to("ada"):
        context = contextvars.copy_context()
        in_thread(context.run, lambda: sync_client.responses.create(**RESPONSE))
        derived = sync_client.with_billing(customer="bob")
        in_thread(lambda: derived.responses.create(**RESPONSE))

    assert ["ada", "bob"] == payers(billing)


def test_threads_side_by_side(sync_client, billing):
    """Blocks of threads that run at the same time do not see each other."""
    at_once = threading.Barrier(3)

    def work(customer):
        with bill_to(customer) as bill:
            at_once.wait(5)
            for _ in range(3):
                sync_client.responses.create(**RESPONSE)
            at_once.wait(5)
        return [event.customer for event in bill.events]

    with ThreadPoolExecutor(3) as threads:
        assert [[customer] * 3 for customer in CUSTOMERS] == list(threads.map(work, CUSTOMERS))


# Tasks.


@pytest.fixture
def in_loop(provider, billing):
    """Runs a function of an async client in a loop of its own."""

    def run(scenario, **options):
        async def inside():
            given = {"billing": billing, "base_url": provider.base_url, "api_key": "k", "max_retries": 0, **options}
            async with AsyncMeteredOpenAI(**given) as client:
                return await scenario(client)

        return asyncio.run(inside())

    return run


def test_gather(in_loop, billing):
    """Tasks inside a block see it, tasks side by side have each their own."""

    async def work(client, customer):
        async with bill_to(customer) as bill:
            await asyncio.gather(*(client.responses.create(**RESPONSE) for _ in range(3)))
            async with asyncio.TaskGroup() as group:
                group.create_task(client.chat.completions.create(**CHAT))
        return {event.customer for event in bill.events}, bill.amount

    async def scenario(client):
        return await asyncio.gather(*(work(client, customer) for customer in CUSTOMERS))

    assert [({customer}, 4) for customer in CUSTOMERS] == in_loop(scenario)
    assert sorted(CUSTOMERS * 4) == payers(billing)


def test_to_thread(in_loop, sync_client, billing):
    """`asyncio.to_thread` carries the block, `run_in_executor` does not: there the call is refused."""

    async def scenario(client):
        with bill_to("ada"):
            await asyncio.to_thread(lambda: sync_client.responses.create(**RESPONSE))
            with pytest.raises(CustomerRequiredError):
                await asyncio.get_running_loop().run_in_executor(None, lambda: sync_client.responses.create(**RESPONSE))

    in_loop(scenario)
    assert ["ada"] == payers(billing)


def test_tasks_outlive_the_block(in_loop, billing):
    """A task that was started inside keeps billing after the block was left, and is on its receipt."""

    async def scenario(client):
        go = asyncio.Event()

        async def later():
            await go.wait()
            await client.responses.create(**RESPONSE)

        async with bill_to("ada") as bill:
            task = asyncio.create_task(later())
        async with bill_to("bob"):
            go.set()
            await task
        return bill.amount

    assert 1 == in_loop(scenario)
    assert ["ada"] == payers(billing)


def test_awaited_outside(in_loop, provider):
    """What is only built inside a block, and awaited outside, was not started inside: it is refused."""

    async def scenario(client):
        async with bill_to("ada"):
            call = client.responses.create(**RESPONSE)
            stream = client.chat.completions.stream(**CHAT)
        with pytest.raises(CustomerRequiredError):
            await call
        with pytest.raises(CustomerRequiredError):
            async with stream:
                raise AssertionError

    in_loop(scenario)
    assert [] == provider.requests


# Generators that a framework drives.


async def served(*responses):
    """Serve responses side by side as an ASGI server does, and give their bodies."""

    async def serve(response):
        body = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "GET",
            "path": "/",
            "headers": [],
        }

        async def send(message):
            body.append(message.get("body", b""))

        async def receive():
            return await asyncio.Event().wait()

        await response(scope, receive, send)
        return b"".join(body).decode().split()

    return await asyncio.gather(*(serve(response) for response in responses))


def test_streaming_response_with_billing(sync_client, billing):
    """A generator that Starlette drives in its thread pool bills by `with_billing`."""

    def page(customer):
        client = sync_client.with_billing(customer=customer)
        for _ in range(3):
            client.responses.create(**RESPONSE)
            yield f"{customer} "

    bodies = asyncio.run(served(*(StreamingResponse(page(customer)) for customer in CUSTOMERS)))

    assert [[customer] * 3 for customer in CUSTOMERS] == bodies
    assert sorted(CUSTOMERS * 3) == payers(billing)


def test_streaming_response_bill_to(sync_client, billing):
    """`bill_to` in such a generator may lose its customer, but never bills a stranger, and leaving it never raises."""
    receipts = {}

    def page(customer):
        with bill_to(customer) as receipts[customer]:
            for _ in range(3):
                try:
                    sync_client.responses.create(**RESPONSE)
                    yield "billed "
                except CustomerRequiredError:
                    yield "refused "

    bodies = asyncio.run(served(*(StreamingResponse(page(customer)) for customer in CUSTOMERS)))

    for customer, body in zip(CUSTOMERS, bodies, strict=True):
        assert 3 == len(body)
        assert body.count("billed") == len(events(billing, customer))
        assert {customer} >= {event.customer for event in receipts[customer].events}
    # The context is another one at each step, so only the first can know.
    assert [["billed", "refused", "refused"]] * 3 == bodies
    with pytest.raises(CustomerRequiredError):
        sync_client.responses.create(**RESPONSE)


def test_streaming_response_bill_to_outside(sync_client, billing):
    """A block around the response's own run reaches into its generator, whatever thread drives it."""

    def page():
        for _ in range(2):
            sync_client.responses.create(**RESPONSE)
            yield "billed "

    async def serve(customer):
        async with bill_to(customer) as bill:
            await served(StreamingResponse(page()))
        return bill.amount

    async def all_at_once():
        return await asyncio.gather(*(serve(customer) for customer in CUSTOMERS))

    assert [2, 2, 2] == asyncio.run(all_at_once())
    assert sorted(CUSTOMERS * 2) == payers(billing)


def test_async_streaming_response(in_loop, billing):
    """An async generator runs in the response's own task; there `bill_to` works."""

    async def scenario(client):
        async def page(customer):
            async with bill_to(customer) as bill:
                for _ in range(2):
                    await client.responses.create(**RESPONSE)
                    yield "billed "
                yield f"{bill.amount} "

        return await served(*(StreamingResponse(page(customer)) for customer in CUSTOMERS))

    assert [["billed", "billed", "2"]] * 3 == in_loop(scenario)
    assert sorted(CUSTOMERS * 2) == payers(billing)


def test_generator_left_in_another_context(sync_client, billing):
    """A generator that is entered in one context and left in another raises nothing, and its block is over everywhere."""

    def page():
        with bill_to("ada"):
            yield 1
            yield 2

    one, other = contextvars.copy_context(), contextvars.copy_context()
    generator = page()
    one.run(next, generator)
    other.run(next, generator)
    other.run(generator.close)

    for context in (one, other):
        with pytest.raises(CustomerRequiredError):
            context.run(sync_client.responses.create, **RESPONSE)
    assert [] == events(billing)


def test_generator_left_in_a_copy(sync_client):
    """So does one that is left in a copy of the context in which it was entered, as the thread pool of a framework does."""

    def page():
        with bill_to("ada"):
            yield

    context, generator = contextvars.copy_context(), page()
    context.run(next, generator)
    copy = context.run(contextvars.copy_context)
    copy.run(generator.close)

    for one in (context, copy):
        with pytest.raises(CustomerRequiredError):
            one.run(sync_client.responses.create, **RESPONSE)


def test_generator_collected(sync_client):
    """A generator that is dropped inside its block leaves it quietly, in whatever context that happens."""

    def page():
        with bill_to("ada"):
            yield 1

    generator = page()
    contextvars.copy_context().run(next, generator)
    del generator

    with pytest.raises(CustomerRequiredError):
        sync_client.responses.create(**RESPONSE)


def test_async_generator_closed_by_another_task(in_loop, billing):
    """An async generator that another task closes leaves its block quietly."""

    async def scenario(client):
        async def page():
            async with bill_to("ada"):
                yield 1

        generator = page()
        await asyncio.create_task(_first(generator))
        await asyncio.create_task(generator.aclose())
        with pytest.raises(CustomerRequiredError):
            await client.responses.create(**RESPONSE)

    in_loop(scenario)


async def _first(generator):
    return await anext(generator)


# Receipts.


def test_receipt(shell, client):
    """A receipt lists the events of its block and of inner blocks, as they settle."""

    async def scenario():
        async with shell.block(bill_to("ada")) as outer:
            first = await shell.wait(client.responses.create(**RESPONSE))
            async with shell.block(bill_to("bob", amount=3)) as inner:
                second = await shell.wait(client.responses.create(**RESPONSE))
            assert [f"gen_{first.id}", f"gen_{second.id}"] == [event.transaction_id for event in outer.events]
            assert [f"gen_{second.id}"] == [event.transaction_id for event in inner.events]
            third = await shell.wait(client.responses.create(**RESPONSE))
        return outer, inner, third

    outer, inner, third = shell.play(scenario())
    assert ({"generations": 5}, 5) == (outer.amounts, outer.amount)
    assert ({"generations": 3}, 3) == (inner.amounts, inner.amount)
    assert f"gen_{third.id}" == outer.events[-1].transaction_id
    assert (
        outer.events
        == events(shell.billing, "ada")[:1] + events(shell.billing, "bob") + events(shell.billing, "ada")[1:]
    )


def test_receipt_is_a_copy(shell, client):
    """What a receipt gives can be changed without changing the receipt."""
    with bill_to("ada") as bill:
        shell.run(client.responses.create(**RESPONSE))
    bill.events.clear()
    bill.amounts.clear()

    assert 1 == bill.amount == len(bill.events)


def test_receipt_of_nothing(shell, client):
    """A block without a settled call cost nothing; a failed call is not on the receipt."""
    shell.provider.answer(status=400)
    with bill_to("ada") as bill:
        with pytest.raises(Exception, match="400"):
            shell.run(client.responses.create(**RESPONSE))
        shell.run(client.models.retrieve("m"))

    assert ([], {}, 0) == (bill.events, bill.amounts, bill.amount)
    assert "<Receipt {}>" == repr(bill)


def test_receipt_with_several_meters(shell, client):
    """Credits of several meters are never added: `amount` is a ValueError, `amounts` tells."""
    with bill_to("ada") as bill:
        shell.run(client.responses.create(**RESPONSE))
        shell.run(client.with_billing(meter="images", amount=4).images.generate(model="m", prompt="A fox"))
        with pytest.raises(ValueError, match="generations, images"):
            _ = bill.amount

    assert {"generations": 1, "images": 4} == bill.amounts


def test_receipt_of_a_stream(shell, client):
    """A stream that is read after the block is added to its receipt when it settles."""

    async def scenario():
        async with shell.block(bill_to("ada")) as bill:
            stream = await shell.wait(client.chat.completions.create(**CHAT, stream=True))
        assert [] == bill.events
        if shell.is_async:
            async for _ in stream:
                pass
        else:
            for _ in stream:
                pass
        return bill

    assert 1 == shell.play(scenario()).amount


def test_receipt_of_a_closed_stream(shell, client):
    """So is a stream that is left early, once its end has been brought in."""
    client = client.with_billing(pricing=per_token(input=0, output=10))
    with bill_to("ada") as bill:
        stream = shell.run(client.chat.completions.create(**CHAT, stream=True))
    shell.take(stream)
    shell.close(stream)
    shell.billing.flush()

    assert ["observed"] == [event.basis for event in bill.events]


def test_replay_is_not_on_the_receipt(shell, client):
    """An answer that was billed before (a cache's) cost nothing and is not on a second receipt."""
    shell.provider.answer(id="resp_1", created=7, times=2)
    bills = []
    for _ in range(2):
        with bill_to("ada") as bill:
            shell.run(client.responses.create(**RESPONSE))
        bills.append(bill.amount)

    assert [1, 0] == bills
    assert 1 == len(events(shell.billing))


# Operations.


def ids(billing, customer="ada"):
    return [event.transaction_id for event in events(billing, customer)]


def test_numbers(shell, client):
    """The calls of one block are numbered: the plain id first, then .2, .3."""
    with bill_to("ada", transaction_id="order_7") as bill:
        for _ in range(3):
            shell.run(client.responses.create(**RESPONSE))

    assert ["order_7", "order_7.2", "order_7.3"] == ids(shell.billing)
    assert 3 == bill.amount


def test_numbers_over_copies(shell, client):
    """A `with_billing` client and its copies count together."""
    derived = client.with_billing(customer="ada", transaction_id="order_7")
    for one in (derived, derived.copy(), derived.with_options(timeout=3), derived.with_billing(amount=2), derived):
        shell.run(one.responses.create(**RESPONSE))

    assert ["order_7", *(f"order_7.{n}" for n in (2, 3, 4, 5))] == ids(shell.billing)


def test_numbers_over_threads(sync_client, billing):
    """So do threads: each call has a number, none has two."""
    derived = sync_client.with_billing(customer="ada", transaction_id="order_7")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: derived.responses.create(**RESPONSE), range(8)))

    assert {"order_7", *(f"order_7.{n}" for n in range(2, 9))} == set(ids(billing))


def test_release_frees_the_number(shell, client, ledger):
    """A call that failed gives its number back, so that running the operation once more repeats the same ids."""
    shell.provider.answer(status=400)
    with bill_to("ada", transaction_id="order_7"):
        with pytest.raises(Exception, match="400"):
            shell.run(client.responses.create(**RESPONSE))
        shell.run(client.responses.create(**RESPONSE))

    assert ["place", "release", "place", "settle"] == ledger.kinds
    assert ["order_7"] == ids(shell.billing)


def test_refuse(shell, client, ledger):
    """The operation once more, in another block or client: refused before anything is sent, with the event of the first time."""
    with bill_to("ada", transaction_id="order_7"):
        shell.run(client.responses.create(**RESPONSE))
    ledger.forget()
    shell.provider.requests.clear()
    (event,) = events(shell.billing)

    async def again():
        async with shell.block(bill_to("ada", transaction_id="order_7")):
            await shell.wait(client.responses.create(**RESPONSE))

    for attempt in (
        lambda: shell.play(again()),
        lambda: shell.run(client.with_billing(customer="ada", transaction_id="order_7").responses.create(**RESPONSE)),
    ):
        with pytest.raises(AlreadyBilledError) as caught:
            attempt()
        assert (event, "order_7", 409) == (caught.value.event, caught.value.transaction_id, caught.value.http_status)

    assert ["place", "place"] == ledger.kinds
    assert [] == shell.provider.requests
    assert 999_999 == shell.billing.balance("ada", "generations").available


def test_refuse_same_object(shell, client):
    """Entering the same `bill_to` once more is another block."""
    block = bill_to("ada", transaction_id="order_7")
    with block:
        shell.run(client.responses.create(**RESPONSE))

    with block, pytest.raises(AlreadyBilledError):
        shell.run(client.responses.create(**RESPONSE))


def test_refuse_while_held(shell, client):
    """While the first attempt is only held the event is None; once it was released, another may have the id."""
    first = client.with_billing(customer="ada", transaction_id="order_7")
    second = client.with_billing(customer="ada", transaction_id="order_7")
    shell.provider.answer(cut_after=2)
    stream = shell.run(first.chat.completions.create(**CHAT, stream=True))

    with pytest.raises(AlreadyBilledError) as caught:
        shell.run(second.responses.create(**RESPONSE))
    assert None is caught.value.event
    with pytest.raises(Exception, match=r"closed|incomplete|Connection"):
        shell.read(stream)
    shell.billing.flush()
    shell.run(second.responses.create(**RESPONSE))
    assert ["order_7"] == ids(shell.billing)


def test_other_accounts(shell, client):
    """An operation's id belongs to one customer and meter."""
    for customer, meter in (("ada", "generations"), ("ada", "images"), ("bob", "generations")):
        with bill_to(customer, meter=meter, transaction_id="order_7"):
            shell.run(client.responses.create(**RESPONSE))

    assert ["order_7"] * 3 == [event.transaction_id for event in events(shell.billing)]


@pytest.fixture
def free(shell, make_billing):
    """A client on a billing with on_repeat="free"."""
    return shell.client(customer=None, billing=make_billing(on_repeat="free"))


def test_free(shell, free, ledger):
    """on_repeat="free": the operation once more is answered again, number for number, and not charged again."""
    for _ in range(2):
        with bill_to("ada", transaction_id="order_7") as bill:
            for _ in range(2):
                assert shell.run(free.responses.create(**RESPONSE)).id

    assert 4 == len(shell.provider.requests)
    assert ["order_7", "order_7.2"] == ids(shell.billing)
    assert 0 == bill.amount
    assert ["repeat", "repeat"] == [hold.reason for hold in shell.billing.holds("ada", state="released")]
    assert 999_998 == shell.billing.balance("ada", "generations").available


def test_free_while_held(shell, free, ledger):
    """If the first attempt is only held, both are answered and the first to settle is charged."""
    first = free.with_billing(customer="ada", transaction_id="order_7", amount=5)
    second = free.with_billing(customer="ada", transaction_id="order_7", amount=5)
    stream = shell.run(first.chat.completions.create(**CHAT, stream=True))
    assert 5 == shell.billing.balance("ada", "generations").held
    answer = shell.run(second.responses.create(**RESPONSE))
    shell.read(stream)

    (event,) = events(shell.billing)
    assert ("order_7", 5, "responses") == (event.transaction_id, event.amount, event.usage.endpoint)
    assert answer.id
    assert (0, 999_995) == (
        shell.billing.balance("ada", "generations").held,
        shell.billing.balance("ada", "generations").available,
    )


def test_operation_id(shell, client):
    """`operation_id` names an operation by who asked for what: asking again is refused, asking for something else is not."""

    def ask(**params):
        with bill_to("ada", transaction_id=operation_id("ada", **params)):
            shell.run(client.responses.create(**RESPONSE))

    ask(day="2026-11-23", kind="summary")
    ask(day="2026-11-24", kind="summary")
    with pytest.raises(AlreadyBilledError):
        ask(kind="summary", day="2026-11-23")
    assert 2 == len(events(shell.billing))


def test_long_id(shell, client, ledger):
    """An id that has no room for its number is refused by name, and nothing is sent."""
    with bill_to("ada", transaction_id="x" * 255):
        shell.run(client.responses.create(**RESPONSE))
        with pytest.raises(ValueError, match="255"):
            shell.run(client.responses.create(**RESPONSE))

    assert 1 == len(shell.provider.requests)


def test_explicit_id_names_the_event(shell, client):
    """The provider's ids are kept beside it: the request's id, and whatever the usage says."""
    shell.provider.answer(Answer(headers={"x-request-id": "req_9"}))
    with bill_to("ada", transaction_id="order_7"):
        shell.run(client.responses.create(**RESPONSE))
    (event,) = events(shell.billing)

    assert ("order_7", "req_9", "responses") == (event.transaction_id, event.request_id, event.usage.endpoint)
