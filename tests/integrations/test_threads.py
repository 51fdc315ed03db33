"""Thread pools and processes: who pays is known there, or the call is refused."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from metered_ai import CustomerRequiredError, MeteredOpenAI, bill_to, connect
from metered_ai.integrations.threads import ContextThreadPoolExecutor

ASK = {"model": "gpt-5-mini", "input": "Hi"}


def test_map(client, shop):
    """Who submits pays, from `submit` and `map` alike, for several customers in one pool, also after the block was left."""
    shop.grant("ada", 20)
    shop.grant("bob", 20)

    def ask(_=None):
        return client.responses.create(**ASK).output_text

    with ContextThreadPoolExecutor(4) as pool:
        with bill_to("ada") as adas:
            texts = pool.map(ask, range(10))
        with bill_to("bob") as bobs:
            future = pool.submit(ask)

    assert 10 == len(list(texts))
    assert future.result()
    assert [10, 1] == [adas.amount, bobs.amount]
    assert {"ada": 10, "bob": 1} == {who: len(shop.events(who)) for who in ("ada", "bob")}


def test_plain_pool(client, shop):
    """The standard library's own pool loses the block; its calls are refused and land on nobody's bill, nor on the wrong one."""
    shop.grant("ada", 2)
    with ThreadPoolExecutor(1) as pool, bill_to("ada"):
        future = pool.submit(client.responses.create, **ASK)

    with pytest.raises(CustomerRequiredError):
        future.result()
    assert [] == shop.provider.requests


def work(arguments):
    """In a process of its own: the customer came with the work."""
    customer, url, base_url = arguments
    client = MeteredOpenAI(billing=url, base_url=base_url, api_key="test", max_retries=0)
    with client, bill_to(customer) as bill:
        client.responses.create(**ASK)
    return bill.amount, os.getpid()


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes(method, provider, tmp_path):
    """Processes started in each way bill the customer they are told; together they never spend more than there is."""
    url = f"sqlite:///{tmp_path}/credits.db"
    with connect(url) as billing:
        for customer in ("ada", "bob"):
            billing.grant(customer, "generations", 3, id="order_1")
        with multiprocessing.get_context(method).Pool(2) as pool:
            done = pool.map(work, [(customer, url, provider.base_url) for customer in ("ada", "bob") for _ in range(3)])
            pool.close()
            pool.join()

        assert [1] * 6 == [amount for amount, _ in done]
        assert os.getpid() not in {pid for _, pid in done}
        assert [0, 0] == [billing.balance(customer, "generations").available for customer in ("ada", "bob")]
        assert () == billing.verify().broken
