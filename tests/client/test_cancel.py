"""Calls that are cancelled or interrupted, wherever that hits them: no hold stays open, and nothing is billed twice."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import sys
import threading
import types
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

import metered_ai
from metered_ai import AsyncMeteredOpenAI, MeteredOpenAI, per_token
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.testing.provider import Answer
from tests.client.ledgers import Gated
from tests.client.shells import HELLO

CHAT: dict[str, Any] = {"model": "m", "messages": HELLO, "max_completion_tokens": 50}
TOKENS = per_token(input=1, output=10)


@pytest.fixture(scope="module", autouse=True)
def _light_collections():
    """What is here before these tests is left out of the many collections that they ask for."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request, tmp_path):
    """A real ledger, in memory or in a file; sound when the test is over."""
    ledger = Gated(MemoryLedger() if request.param == "memory" else SqliteLedger(tmp_path / "credits.db"))
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


@types.coroutine
def cancelled_at(number, coroutine):
    """Run a coroutine and cancel its task while it waits for the `number`th time."""
    advance = partial(coroutine.send, None)
    for at in itertools.count(1):
        try:
            waits_for = advance()
        except StopIteration as stop:
            return stop.value
        if at == number:
            asyncio.current_task().cancel()
        try:
            yield waits_for
        except BaseException as error:
            advance = partial(coroutine.throw, error)
        else:
            advance = partial(coroutine.send, None)


async def plain(client):
    await client.chat.completions.create(**CHAT)


async def streamed(client):
    async for _ in await client.chat.completions.create(**CHAT, stream=True):
        pass


async def helped(client):
    async with client.chat.completions.stream(**CHAT) as stream:
        await stream.get_final_completion()


async def opened(client):
    async with client.chat.completions.with_streaming_response.create(**CHAT) as response:
        await response.read()


async def retried(client):
    await client.with_options(max_retries=1).chat.completions.create(**CHAT, extra_headers={"x-fail": "once"})


CALLS = {call.__name__: call for call in (plain, streamed, helped, opened, retried)}


def ends(ledger, customer):
    """How the calls of a customer ended: one word for each, "open" for those that have not."""
    states = [hold.state for hold in ledger.holds(customer)]
    return sorted(["settled" for _ in ledger.usage_events(customer)] + states)


@pytest.mark.parametrize("on_abort", ["observed", "hold", "drain"])
@pytest.mark.parametrize("call", CALLS)
def test_every_await(call, on_abort, provider, ledger, make_billing):
    """A task that is cancelled at any of its awaits leaves no hold open: it was settled or released, once, or never began."""
    billing = make_billing(on_abort=on_abort)
    seen = {}

    async def main():
        client = AsyncMeteredOpenAI(
            billing=billing, base_url=provider.base_url, api_key="k", pricing=TOKENS, max_retries=0
        )
        for number in itertools.count(1):
            customer = f"customer {number}"
            billing.grant(customer, "generations", 10_000, id="start")
            if call == "retried":
                provider.answer(status=500, headers={"retry-after-ms": "1"})

            async def cancelled(number=number, customer=customer):
                await cancelled_at(number, CALLS[call](client.with_billing(customer=customer)))

            task = asyncio.create_task(cancelled())
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            # What an attempt left unused of the script would answer the next one.
            provider._script.clear()
            await asyncio.to_thread(billing.flush)
            await asyncio.to_thread(settle_down, ledger, customer)
            seen[number] = ends(ledger, customer)
            if outcome is None:
                break
            assert isinstance(outcome, asyncio.CancelledError)
        await client.close()
        return number

    number = asyncio.run(main())

    assert ["settled"] == seen.pop(number)
    assert {()} < {tuple(states) for states in seen.values()} | {()}
    assert all(states in ([], ["settled"], ["released"]) for states in seen.values()), seen
    assert 0 == sum(ledger.balance(f"customer {at}", "generations").held for at in range(1, number + 1))
    assert number > 3


def settle_down(ledger, customer):
    """A step that is done after everything that was handed over before it."""
    ledger.inner.submit(metered_ai.core.steps.Renew("nobody", 1.0)).result(10)


# Time-outs. The clock of each starts when the call is where the test wants it.


async def limited(kind, work, begun):
    """`work` under a time limit that ends as soon as `begun` is done."""
    watcher = asyncio.ensure_future(begun)
    if kind == "asyncio":
        async with asyncio.timeout(None) as limit:
            watcher.add_done_callback(lambda _: limit.reschedule(asyncio.get_running_loop().time()))
            await work
    else:
        with anyio.fail_after(None) as scope:
            watcher.add_done_callback(lambda _: setattr(scope, "deadline", asyncio.get_running_loop().time()))
            await work


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
@pytest.mark.parametrize("on_unknown", ["release", "charge"])
def test_time_limit(on_unknown, kind, provider, ledger, make_billing):
    """A time limit around a call that has no answer yet goes the way of on_unknown."""
    billing = make_billing(on_unknown=on_unknown)
    billing.grant("ada", "generations", 10, id="start")
    provider.answer(gate=threading.Event())

    async def main():
        client = AsyncMeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k")
        with pytest.raises(TimeoutError):
            await limited(kind, plain(client), asyncio.to_thread(provider.wait_for_requests, 1))
        await asyncio.to_thread(ledger.wait_for_ends, 1)
        await client.close()

    asyncio.run(main())

    assert ["place", "release" if on_unknown == "release" else "settle"] == ledger.kinds
    assert [] == list(ledger.holds("ada", state="open"))
    assert [on_unknown == "release"] == [hold.is_in_doubt for hold in ledger.holds("ada")] or on_unknown == "charge"


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
@pytest.mark.parametrize("on_abort", ["observed", "hold", "drain"])
def test_time_limit_in_stream(on_abort, kind, provider, ledger, make_billing):
    """A time limit in mid-read is the consumer's stop; with "drain", too, it costs the hold."""
    billing = make_billing(on_abort=on_abort)
    billing.grant("ada", "generations", 10_000, id="start")
    provider.answer(stall_after=4)

    async def main():
        client = AsyncMeteredOpenAI(
            billing=billing, customer="ada", base_url=provider.base_url, api_key="k", pricing=TOKENS
        )
        waits = asyncio.Event()

        async def read():
            stream = await client.chat.completions.create(**CHAT, stream=True)
            for _ in range(4):
                await anext(stream)
            waits.set()
            await anext(stream)

        with pytest.raises(TimeoutError):
            await limited(kind, read(), waits.wait())
        await asyncio.to_thread(ledger.wait_for_ends, 1)
        await client.close()

    asyncio.run(main())
    (event,) = ledger.usage_events("ada")

    assert ["place", "settle"] == ledger.kinds
    if on_abort == "observed":
        assert ("observed", event.usage.input_tokens + 10 * 4) == (event.basis, event.amount)
    else:
        assert ("held", ledger.steps[0].amount) == (event.basis, event.amount)


def test_cancelled_group(provider, ledger, make_billing):
    """Of twenty calls that are cancelled together each ends, and no step takes another one's result."""
    billing = make_billing()
    billing.grant("ada", "generations", 100, id="start")
    gate = threading.Event()
    provider.answer(gate=gate, times=20)

    async def main():
        client = AsyncMeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k")
        tasks = [asyncio.create_task(plain(client)) for _ in range(20)]
        await asyncio.to_thread(provider.wait_for_requests, 20)
        for task in tasks[::2]:
            task.cancel()
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(ledger.wait_for_ends, 20)
        await client.close()

    asyncio.run(main())

    assert (10, ["released"] * 10) == (
        len(list(ledger.usage_events("ada"))),
        [hold.state for hold in ledger.holds("ada")],
    )
    assert (10, 0) == (ledger.balance("ada", "generations").used, ledger.balance("ada", "generations").held)


# KeyboardInterrupt.


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt in this thread, as in any program; once, however often it comes."""
    is_raised = threading.Event()

    def handle(number, frame):
        if not is_raised.is_set():
            is_raised.set()
            signal.default_int_handler(number, frame)

    def interrupt():
        # Again, like a person: a signal right before a system call wakes nobody from it.
        while not is_raised.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            is_raised.wait(0.05)

    before = signal.signal(signal.SIGINT, handle)
    yield interrupt
    signal.signal(signal.SIGINT, before)


def read_until(where, client, is_reading):
    """Read what comes, and say so when all that will come was read."""
    if where == "in a body":
        with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as response:
            for _ in response.iter_bytes():
                is_reading.set()
    else:
        for number, _ in enumerate(client.chat.completions.create(**CHAT, stream=where == "in a stream"), 1):
            if number == 4:
                is_reading.set()


@pytest.mark.parametrize("where", ["before the answer", "in a stream", "in a body"])
def test_interrupted(where, interrupts, provider, ledger, make_billing):
    """Ctrl-C leaves no hold open: in doubt before the answer, what was seen after it began."""
    billing = make_billing()
    billing.grant("ada", "generations", 10_000, id="start")
    provider.answer(**({"gate": threading.Event()} if where == "before the answer" else {"stall_after": 4}))
    is_reading = threading.Event()

    def interrupt():
        provider.wait_for_requests(1)
        assert where == "before the answer" or is_reading.wait(10)
        interrupts()

    thread = threading.Thread(target=interrupt)
    thread.start()
    client = MeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k", pricing=TOKENS)
    with client, pytest.raises(KeyboardInterrupt):
        read_until(where, client, is_reading)
    thread.join(10)
    billing.flush()

    assert ["place", "release" if where == "before the answer" else "settle"] == ledger.kinds
    assert [] == list(ledger.holds("ada", state="open"))
    assert [("unknown", "unknown")] * (where == "before the answer") == [
        (hold.reason, hold.sent) for hold in ledger.holds("ada")
    ]


OURS = {str(Path(metered_ai.__file__).parent / name) for name in ("client.py", "taps.py", "billing.py", "settling.py")}


# An interrupt that hits a generator while it is dropped is printed and lost, as always in Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ledger", ["memory"], indirect=True)
@pytest.mark.parametrize("call", ["plain", "streamed"])
def test_every_line(call, provider, ledger, make_billing):
    """An interrupt at any line of ours leaves no hold open, once the queue is empty, and bills nothing twice."""
    billing = make_billing()
    provider.default = Answer(text="Hi")
    outcomes = {}
    client = MeteredOpenAI(billing=billing, base_url=provider.base_url, api_key="k", max_retries=0)
    for warm in ("a", "b"):
        billing.grant(warm, "generations", 10, id="start")
        client.with_billing(customer=warm).chat.completions.create(**CHAT)

    for number in itertools.count(1):
        customer = f"customer {number}"
        billing.grant(customer, "generations", 10, id="start")
        metered = client.with_billing(customer=customer)
        left = number
        where = None

        def trace(frame, event, argument):
            return line if frame.f_code.co_filename in OURS else None

        def line(frame, event, argument):
            nonlocal left, where
            if event == "line":
                left -= 1
                if left == 0:
                    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                    raise KeyboardInterrupt
            return line

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            result = metered.chat.completions.create(**CHAT, stream=call == "streamed")
            if call == "streamed":
                for _ in result:
                    pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        result = None
        if "open" in ends(ledger, customer):
            gc.collect()
        billing.flush()
        settle_down(ledger, customer)
        outcomes[number] = (where, ends(ledger, customer))
        if where is None:
            break
    client.close()

    assert (None, ["settled"]) == outcomes.pop(number)
    lost = [where for where, states in outcomes.values() if states not in ([], ["settled"], ["released"])]
    assert [] == lost
