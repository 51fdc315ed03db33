"""Credits for 10 let exactly 10 of 50 calls through, over real HTTP, whoever makes them at the same moment."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from metered_ai import AsyncMeteredOpenAI, MeteredOpenAI, connect
from tests.proof.children import HELLO


@pytest.fixture
def url(tmp_path):
    """A ledger in which "ada" has credits for 10 calls."""
    url = f"sqlite:///{tmp_path}/credits.db"
    with connect(url) as billing:
        billing.grant("ada", "generations", 10, id="ten")
    return url


def from_threads(url: str, base_url: str, count: int, start: Callable[[], None] = lambda: None) -> Counter[str]:
    """One sync client in so many threads, each with one call: how they went."""
    went: list[str] = []
    with (
        connect(url) as billing,
        MeteredOpenAI(billing=billing, customer="ada", base_url=base_url, api_key="k", max_retries=0) as client,
    ):
        barrier = threading.Barrier(count)

        def call(number: int) -> None:
            start()
            barrier.wait()
            try:
                if number % 2:
                    client.chat.completions.create(model="m", messages=HELLO)
                else:
                    list(client.chat.completions.create(model="m", messages=HELLO, stream=True))
            except Exception as error:
                went.append(type(error).__name__)
            else:
                went.append("answered")

        threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Counter(went)


def from_tasks(url: str, base_url: str, count: int, start: Callable[[], None] = lambda: None) -> Counter[str]:
    """One async client in so many tasks, each with one call: how they went."""

    async def call(client: AsyncMeteredOpenAI, number: int) -> str:
        try:
            if number % 2:
                await client.chat.completions.create(model="m", messages=HELLO)
            else:
                stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
                assert [chunk async for chunk in stream]
        except Exception as error:
            return type(error).__name__
        return "answered"

    async def call_all() -> list[str]:
        start()
        async with (
            connect(url) as billing,
            AsyncMeteredOpenAI(
                billing=billing, customer="ada", base_url=base_url, api_key="k", max_retries=0
            ) as client,
        ):
            return await asyncio.gather(*(call(client, number) for number in range(count)))

    return Counter(asyncio.run(call_all()))


def check(went: Counter[str], url: str, provider) -> None:
    with connect(url) as billing:
        balance = billing.balance("ada", "generations")
        events = [event.transaction_id for event in billing.usage_events("ada")]
        broken = billing.verify().broken

    assert {"answered": 10, "InsufficientCreditsError": 40} == went
    assert 10 == len(provider.requests)
    assert {f"gen_{issued.id}" for issued in provider.issued} == set(events)
    assert 10 == len(events)
    assert (10, 0, 0, 0) == (balance.used, balance.held, balance.available, balance.debt)
    assert () == broken


def test_threads(url, provider, say):
    """Of 50 threads with one client exactly 10 are answered, and the provider hears of no other."""
    went = from_threads(url, provider.base_url, 50)

    say(f"50 threads on credits for 10: {dict(went)}, {len(provider.requests)} requests")
    check(went, url, provider)


def test_tasks(url, provider, say):
    """Of 50 tasks with one client exactly 10 are answered, and the provider hears of no other."""
    went = from_tasks(url, provider.base_url, 50)

    say(f"50 tasks on credits for 10: {dict(went)}, {len(provider.requests)} requests")
    check(went, url, provider)


def test_processes(url, provider, say, fork):
    """Of 50 calls of 4 processes on one file, two with threads and two with tasks, exactly 10 are answered."""

    def work(tell, calls, count):
        tell("ready")
        tell(calls(url, provider.base_url, count, lambda: start.wait(60)))

    start = multiprocessing.get_context("fork").Event()
    shapes = [(from_threads, 13), (from_threads, 12), (from_tasks, 13), (from_tasks, 12)]
    children = [fork(work, calls, count) for calls, count in shapes]
    for child in children:
        child.hear()
    start.set()
    went = sum((Counter(child.result()) for child in children), Counter[str]())

    say(f"4 processes × threads or tasks on credits for 10: {dict(went)}, {len(provider.requests)} requests")
    check(went, url, provider)
