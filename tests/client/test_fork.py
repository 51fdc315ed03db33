"""Forks: every answer reaches its own process, and every call is ended once, by the process that made it."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import multiprocessing
import os
import threading
import traceback
from typing import Any

import openai
import pytest

from metered_ai import AsyncMeteredOpenAI, ConfigurationError, MeteredOpenAI, connect, per_token
from metered_ai.ledger.leases import heartbeat
from tests.client.shells import HELLO, Shell

CHAT: dict[str, Any] = {"model": "m", "messages": HELLO, "max_completion_tokens": 50}
RESPONSE: dict[str, Any] = {"model": "m", "input": "Hello"}


@pytest.fixture
def credits(tmp_path):
    """A SQLite ledger on which "ada" has credits."""
    with connect(f"sqlite:///{tmp_path / 'credits.db'}") as billing:
        billing.grant("ada", "generations", 1_000_000, id="start")
        yield billing
        assert () == billing.verify().broken


@pytest.fixture(params=["sync", "async"])
def real(request, provider, credits):
    """The shells on that ledger."""
    shell = Shell(provider, credits, is_async=request.param == "async")
    yield shell
    shell.finish()


def forked(function):
    """Run a function in a forked child, which ends without any clean-up; gives its result, or fails with what it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        # A child that hangs shows where, and ends.
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            told = {"result": function()}
        except BaseException:
            told = {"error": traceback.format_exc()}
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)

    def wait():
        with open(read, "rb") as pipe:
            content = pipe.read()
        os.waitpid(pid, 0)
        assert content, "the child ended without a word"
        told = json.loads(content)
        assert "error" not in told, told["error"]
        return told["result"]

    return wait


def ask(shell, client):
    return shell.run(client.chat.completions.create(**CHAT)).choices[0].message.content


def answers(*clients):
    """What each client is told, in a child: an async program runs a loop of its own there."""
    if isinstance(clients[0], MeteredOpenAI):
        return [client.responses.create(**RESPONSE).output_text for client in clients]

    async def main():
        return [(await client.responses.create(**RESPONSE)).output_text for client in clients]

    return asyncio.run(main())


@pytest.mark.parametrize("is_warm", [True, False], ids=["after a call", "before any call"])
def test_own_answers(is_warm, real, provider, credits):
    """Parent and child ask at once over what was one pool of connections: each gets its own answer, and each is billed."""
    client = real.client()
    if is_warm:
        ask(real, client)
    gate = threading.Event()
    before = len(provider.requests)
    provider.answer(path="/chat/completions", text="parent", gate=gate, times=3)
    provider.answer(path="/responses", text="child", gate=gate, times=3)

    wait = forked(lambda: answers(client, client, client))
    opens = threading.Thread(target=lambda: (provider.wait_for_requests(before + 2), gate.set()))
    opens.start()
    own = [ask(real, client) for _ in range(3)]
    opens.join(10)

    assert (["parent"] * 3, ["child"] * 3) == (own, wait())
    assert {f"gen_{issued.id}" for issued in provider.issued} == {
        event.transaction_id for event in credits.usage_events("ada")
    }
    assert len(provider.issued) == credits.balance("ada", "generations").used
    assert 0 == credits.balance("ada", "generations").held


def test_own_owner(real, provider, credits):
    """A child has an owner, a heartbeat and a ledger handle of its own."""
    client = real.client()
    ask(real, client)
    parent = credits._owner

    def child():
        before = credits._owner
        answers(client)
        return [before, credits._owner, heartbeat._thread.is_alive(), list(heartbeat._jobs) == [credits._owner]]

    before, own, beats, is_only = forked(child)()

    assert (None, True, True) == (before, beats, is_only)
    assert own not in (None, parent)
    assert parent == credits._owner


def test_users_http_client(real, provider, credits):
    """A client on the user's own http_client cannot work in a child, and says so before anything is sent or held."""
    http = openai.DefaultAsyncHttpxClient() if real.is_async else openai.DefaultHttpxClient()
    client = real.client(http_client=http)
    ask(real, client)

    def child():
        errors = []
        for metered in (client, client.with_billing(customer="ada"), client.with_options(timeout=3)):
            try:
                answers(metered)
            except ConfigurationError as error:
                errors.append("http_client" in str(error))
        return errors

    assert [True, True, True] == forked(child)()
    assert 1 == len(provider.requests)
    assert [] == list(credits.holds("ada"))
    ask(real, client)


def test_copies(real, provider, credits):
    """Copies that were made before a fork share the child's new connections."""
    client = real.client()
    copies = [client.with_billing(meter="generations"), client.with_options(timeout=5)]
    ask(real, client)

    def child():
        return [len(answers(*copies)), len({id(copy._http.client) for copy in copies})]

    assert [2, 1] == forked(child)()


@pytest.mark.parametrize("how", ["dropped", "closed", "billing closed"])
def test_open_stream(how, real, provider, credits):
    """A stream that is open at a fork is the parent's: whatever the child does with it, the parent settles it, once."""
    resume = threading.Event()
    provider.answer(stall_after=4, resume=resume)
    client = real.client(pricing=per_token(input=1, output=10))
    box = [real.run(client.chat.completions.create(**CHAT, stream=True))]
    for _ in range(4):
        real.take(box[0])

    async def read_own():
        return [event async for event in await client.responses.create(**RESPONSE, stream=True)]

    def child():
        # A stream of its own, so that everything that could end the parent's runs here, too.
        if real.is_async:
            asyncio.run(read_own())
        else:
            list(client.responses.create(**RESPONSE, stream=True))
        if how == "billing closed":
            credits.close()
        elif how == "closed" and not real.is_async:
            box[0].response.close()
        box.clear()
        for _ in range(3):
            gc.collect()
        return credits.flush()

    assert forked(child)()
    assert 1 == len(list(credits.holds("ada", state="open")))
    resume.set()
    real.read(box[0])

    assert [("reported", 100)] * 2 == [(event.basis, event.amount) for event in credits.usage_events("ada")]
    assert {f"gen_{issued.id}" for issued in provider.issued} == {
        event.transaction_id for event in credits.usage_events("ada")
    }
    assert 0 == credits.balance("ada", "generations").held


def test_exit_of_child(provider, credits):
    """A child that ends in order (atexit and all) leaves the parent's open stream alone and settles its own."""
    resume = threading.Event()
    provider.answer(stall_after=2, resume=resume, path="/chat/completions")
    provider.answer(stall_after=2, path="/responses")
    with MeteredOpenAI(billing=credits, customer="ada", base_url=provider.base_url, api_key="k") as client:
        stream = client.chat.completions.create(**CHAT, stream=True)
        next(stream)

        process = multiprocessing.get_context("fork").Process(target=leave_open, args=(client,))
        process.start()
        process.join(20)
        assert 0 == process.exitcode
        (event,) = credits.usage_events("ada")
        (hold,) = credits.holds("ada", state="open")
        resume.set()
        list(stream)

    assert ("gen_", "chat.completions") == (event.transaction_id[:4], hold.endpoint)
    assert {f"gen_{issued.id}" for issued in provider.issued} == {
        event.transaction_id for event in credits.usage_events("ada")
    }
    assert (2, 0) == (credits.balance("ada", "generations").used, credits.balance("ada", "generations").held)


def leave_open(client):
    # multiprocessing ends a child without atexit, so the end is asked for.
    stream = client.responses.create(**RESPONSE, stream=True)
    next(stream)
    client.billing.close()


def test_workers(provider, credits):
    """Forked workers on one ledger bill every answer once, and never overspend."""
    credits.grant("bob", "generations", 12, id="start")
    client = MeteredOpenAI(billing=credits, customer="bob", base_url=provider.base_url, api_key="k", max_retries=0)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=work, args=(client, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    ids = [queue.get() for _ in range(3)]
    for worker in workers:
        worker.join(20)
    client.close()

    given = [answer for told in ids for answer in told if answer is not None]

    assert (12, 6) == (len(given), sum(answer is None for told in ids for answer in told))
    assert {f"gen_{answer}" for answer in given} == {event.transaction_id for event in credits.usage_events("bob")}
    assert {issued.id for issued in provider.issued} == set(given)
    assert (12, 0) == (credits.balance("bob", "generations").used, credits.balance("bob", "generations").available)


def work(client, queue):
    from metered_ai import InsufficientCreditsError

    ids = []
    for _ in range(6):
        try:
            ids.append(client.responses.create(**RESPONSE).id)
        except InsufficientCreditsError:
            ids.append(None)
    queue.put(ids)


def test_fork_in_mid_settle(provider, credits):
    """A fork while other threads hold and settle finds no lock taken for ever in the child."""
    is_over = threading.Event()
    client = MeteredOpenAI(billing=credits, customer="ada", base_url=provider.base_url, api_key="k", max_retries=0)

    # The SDK imports its resources when they are first used; a fork in mid-import is Python's own trap.
    client.responses.create(**RESPONSE)
    client.chat.completions.create(**CHAT)

    def busy():
        while not is_over.is_set():
            client.responses.create(**RESPONSE)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert forked(lambda: client.chat.completions.create(**CHAT).object)() == "chat.completion"
    finally:
        is_over.set()
        for thread in threads:
            thread.join(10)
    client.close()

    assert len(provider.issued) == credits.balance("ada", "generations").used
    assert 0 == credits.balance("ada", "generations").held


def test_async_after_fork(provider, credits):
    """A child that forks out of a running loop may run a loop of its own."""

    async def main():
        client = AsyncMeteredOpenAI(billing=credits, customer="ada", base_url=provider.base_url, api_key="k")
        await client.responses.create(**RESPONSE)
        return client

    client = asyncio.run(main())

    assert ["The quick brown fox jumps over the lazy dog."] == forked(lambda: answers(client))()
    assert 2 == credits.balance("ada", "generations").used
