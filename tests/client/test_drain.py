"""`on_abort="drain"`: an answer that nobody reads any more is read on in the background for its usage, within bounds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from metered_ai import AsyncMeteredOpenAI, connect, per_token, taps
from metered_ai.ledger.memory import MemoryLedger
from tests.client.ledgers import Gated, wait_for_ends
from tests.client.shells import HELLO

CHAT: dict[str, Any] = {"model": "m", "messages": HELLO, "max_completion_tokens": 50}
TOKENS = per_token(input=1, output=10)
GOOD = 10 + 9 * 10


@pytest.fixture
def ledger():
    """A real ledger that can be waited for; sound when the test is over."""
    ledger = Gated(MemoryLedger())
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


@pytest.fixture
def client(shell, make_billing):
    """A client at a token price whose billing drains."""
    billing = make_billing(on_abort="drain")
    return shell.client(billing=billing, pricing=TOKENS)


def start(shell, client):
    """A stream of which two items were read."""
    stream = shell.run(client.chat.completions.create(**CHAT, stream=True))
    shell.take(stream)
    shell.take(stream)
    return stream


def bases(ledger):
    return [(event.basis, event.amount) for event in ledger.usage_events("ada")]


def test_usage(shell, client, ledger, provider):
    """Closing returns at once; the usage that comes later is what is charged, and the hold stays open until then."""
    resume = threading.Event()
    provider.answer(stall_after=4, resume=resume)

    shell.close(start(shell, client))

    assert ["place"] == ledger.kinds
    resume.set()
    wait_for_ends(shell, ledger, 1)
    assert [("reported", GOOD)] == bases(ledger)
    assert [f"gen_{provider.issued[0].id}"] == [event.transaction_id for event in ledger.usage_events("ada")]


def test_connection_is_free_again(shell, client, ledger, provider):
    """An answer that was drained leaves its connection to the next call."""
    resume = threading.Event()
    provider.answer(stall_after=4, resume=resume)
    shell.close(start(shell, client))
    resume.set()
    wait_for_ends(shell, ledger, 1)
    # The end is in the ledger just before the response is closed.
    drains = [thread for thread in threading.enumerate() if thread.name == "metered-ai-drain"]
    for thread in drains:
        thread.join(10)
    shell.pause(0.01)

    shell.run(client.with_options(timeout=5).chat.completions.create(**CHAT))

    assert [("reported", GOOD)] * 2 == bases(ledger)


def test_eight_at_once(shell, client, ledger, provider):
    """No more than eight are read on at once; the ninth is charged its hold."""
    resume = threading.Event()
    provider.answer(stall_after=4, resume=resume, times=9)
    streams = [start(shell, client) for _ in range(9)]

    for stream in streams:
        shell.close(stream)
    wait_for_ends(shell, ledger, 1)

    assert [("held", ledger.steps[0].amount)] == bases(ledger)
    resume.set()
    wait_for_ends(shell, ledger, 9)
    assert [("held", ledger.steps[0].amount), *[("reported", GOOD)] * 8] == bases(ledger)

    # The places are free again.
    resume.clear()
    provider.answer(stall_after=4, resume=resume)
    shell.close(start(shell, client))
    resume.set()
    wait_for_ends(shell, ledger, 10)
    assert ("reported", GOOD) == bases(ledger)[-1]


def test_too_slow(shell, client, ledger, provider, monkeypatch):
    """Reading on ends after DRAIN_SECONDS; then the hold is charged."""
    monkeypatch.setattr(taps, "DRAIN_SECONDS", 0.05)
    provider.answer(stall_after=4)

    shell.close(start(shell, client))
    wait_for_ends(shell, ledger, 1)

    assert [("held", ledger.steps[0].amount)] == bases(ledger)


def test_broken_off(shell, client, ledger, provider):
    """A provider that breaks off while we read on leaves the hold to be charged: the consumer had stopped before."""
    resume = threading.Event()
    provider.answer(stall_after=3, resume=resume, cut_after=5)

    shell.close(start(shell, client))
    resume.set()
    wait_for_ends(shell, ledger, 1)

    assert [("held", ledger.steps[0].amount)] == bases(ledger)
    assert 0 == ledger.balance("ada", "generations").held


def test_no_usage(shell, client, ledger, provider):
    """An answer that was read to its end and tells no usage is estimated, as any other."""
    provider.answer(usage="never")

    shell.close(start(shell, client))
    wait_for_ends(shell, ledger, 1)
    (event,) = ledger.usage_events("ada")

    assert ("estimated", 11) == (event.basis, event.usage.output_tokens)


def test_closed_twice(shell, client, ledger, provider):
    """Closing again while we read on changes nothing."""
    resume = threading.Event()
    provider.answer(stall_after=4, resume=resume)
    stream = start(shell, client)

    for _ in range(3):
        shell.close(stream)
    resume.set()
    wait_for_ends(shell, ledger, 1)
    shell.pause(0.01)

    assert ["place", "settle"] == ledger.kinds
    assert [("reported", GOOD)] == bases(ledger)


def test_fixed_price(shell, client, ledger, provider):
    """At a fixed price there is nothing to read on for."""
    provider.answer(stall_after=4)

    shell.close(start(shell, client.with_billing(amount=3)))
    wait_for_ends(shell, ledger, 1)

    assert [3] == [amount for _, amount in bases(ledger)]


def test_body(shell, client, ledger, provider):
    """A body that was read in part is read on for its usage, too."""
    with shell.within(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
        shell.take(response.iter_bytes(20))
    wait_for_ends(shell, ledger, 1)

    assert [("reported", GOOD)] == bases(ledger)


def test_cancelled(provider, ledger, make_billing):
    """A task that is cancelled in mid-read costs the hold: nobody is left to read on."""
    billing = make_billing(on_abort="drain")
    billing.grant("ada", "generations", 1_000_000, id="start")
    provider.answer(stall_after=4)

    async def main():
        client = AsyncMeteredOpenAI(
            billing=billing, customer="ada", base_url=provider.base_url, api_key="k", pricing=TOKENS
        )
        stream = await client.chat.completions.create(**CHAT, stream=True)
        for _ in range(4):
            await anext(stream)
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await asyncio.to_thread(ledger.wait_for_ends, 1)
        await client.close()

    asyncio.run(main())

    assert [("held", ledger.steps[0].amount)] == bases(ledger)


@pytest.mark.parametrize("close", [True, False], ids=["closed", "left to the loop"])
def test_loop_ends(close, provider, ledger, make_billing):
    """A loop that ends while we read on, or before we could begin, leaves no hold open: it is charged."""
    billing = make_billing(on_abort="drain")
    billing.grant("ada", "generations", 1_000_000, id="start")
    provider.answer(stall_after=4)

    async def main():
        client = AsyncMeteredOpenAI(
            billing=billing, customer="ada", base_url=provider.base_url, api_key="k", pricing=TOKENS
        )
        stream = await client.chat.completions.create(**CHAT, stream=True)
        async for _ in stream:
            break
        if close:
            await stream.close()
        return stream, client

    kept = asyncio.run(main())
    billing.flush()
    ledger.wait_for_ends(1)

    assert kept
    assert [("held", ledger.steps[0].amount)] == bases(ledger)


EXIT = """
import asyncio, sys
from metered_ai import AsyncMeteredOpenAI, MeteredOpenAI, connect, per_token

ledger, base_url, kind = sys.argv[1:]
billing = connect(ledger, on_abort="drain")
billing.grant("ada", "generations", 1_000_000, id="start")
options = dict(billing=billing, customer="ada", base_url=base_url, api_key="k", pricing=per_token(input=1, output=10))
ask = dict(model="m", messages=[{"role": "user", "content": "Hello"}], stream=True)

def read():
    stream = MeteredOpenAI(**options).chat.completions.create(**ask)
    next(stream)
    stream.close()

async def aread():
    stream = await AsyncMeteredOpenAI(**options).chat.completions.create(**ask)
    await anext(stream)
    await stream.close()
    await asyncio.sleep(0.01)

if kind == "sync":
    read()
else:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(aread())
print("held", billing.balance("ada", "generations").held > 0)
"""


@pytest.mark.parametrize("kind", ["sync", "loop abandoned"])
def test_program_ends(kind, provider, tmp_path):
    """A program that ends while we read on charges the hold."""
    url = f"sqlite:///{tmp_path / 'credits.db'}"
    provider.answer(stall_after=3)
    done = subprocess.run(
        [sys.executable, "-c", EXIT, url, provider.base_url, kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (0, "held True\n") == (done.returncode, done.stdout), done.stderr
    with connect(url) as billing:
        assert ["held"] == [event.basis for event in billing.usage_events("ada")]
        assert 0 == billing.balance("ada", "generations").held
