"""`connect("postgresql://…")` is all that changes: calls, forks and failures on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from metered_ai import BillingUnavailableError, ConfigurationError, InsufficientCreditsError, MeteredOpenAI, connect
from tests.client.shells import HELLO, Shell

CALL: dict[str, Any] = {"model": "m", "messages": HELLO}


@pytest.fixture
def billing(postgres, tmp_path):
    """A ledger on PostgreSQL where ada has three credits."""
    with connect(postgres, spool=str(tmp_path)) as billing:
        billing.grant("ada", "generations", 3, id="order_1")
        yield billing
        assert () == billing.verify().broken


@pytest.fixture(params=["sync", "async"])
def shell(request, provider, billing):
    shell = Shell(provider, billing, is_async=request.param == "async")
    yield shell
    shell.finish()


def chat(shell, **more):
    return shell.run(shell.client().chat.completions.create(**CALL, **more))


class TestCalls:
    def test_answered(self, shell, provider, billing):
        """A call holds a credit, is answered and billed once, under the answer's id."""
        answer = chat(shell)

        (event,) = billing.usage_events("ada")
        assert (f"gen_{answer.id}", 1, "reported") == (event.transaction_id, event.amount, event.basis)
        assert (2, 0) == (billing.balance("ada", "generations").available, billing.balance("ada", "generations").held)

    def test_refused(self, shell, provider, billing):
        """Without credits nothing is sent, and the refusal says what there is."""
        for _ in range(3):
            chat(shell)
        before = len(provider.requests)

        with pytest.raises(InsufficientCreditsError) as caught:
            chat(shell)
        assert (0, 1) == (caught.value.available, caught.value.required)
        assert before == len(provider.requests)

    def test_failed(self, shell, provider, billing):
        """A refusal of the provider's gives the hold back."""
        provider.answer(status=400)

        with pytest.raises(Exception, match="400"):
            chat(shell)
        assert 3 == billing.balance("ada", "generations").available

    def test_stream(self, shell, provider, billing):
        """A stream is billed when it has come to its end."""

        async def aread():
            return [chunk async for chunk in await shell.client().chat.completions.create(stream=True, **CALL)]

        if shell.is_async:
            shell.run(aread())
        else:
            list(shell.client().chat.completions.create(stream=True, **CALL))

        assert 1 == len(list(billing.usage_events("ada")))
        assert 2 == billing.balance("ada", "generations").available


def test_many_tasks(provider, postgres, tmp_path):
    """Forty tasks of one loop share a customer's 25 credits: 25 calls are sent, the rest refused, all settled."""
    with connect(postgres, spool=str(tmp_path)) as billing:
        billing.grant("ada", "generations", 25, id="order_1")
        shell = Shell(provider, billing, is_async=True)

        async def ask():
            client = shell.client()
            return await asyncio.gather(
                *(client.chat.completions.create(**CALL) for _ in range(40)), return_exceptions=True
            )

        results = shell.run(ask())
        shell.finish()

        assert 25 == sum(not isinstance(result, Exception) for result in results)
        assert 15 == sum(isinstance(result, InsufficientCreditsError) for result in results)
        assert 25 == billing.balance("ada", "generations").used
        assert () == billing.verify().broken


def test_fork(billing, provider):
    """Parent and child go on with connections of their own; each call is billed once."""
    client = MeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k")
    client.chat.completions.create(**CALL)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client.chat.completions.create(**CALL)
            told = {"left": billing.balance("ada", "generations").available}
        except BaseException as error:
            told = {"error": repr(error)}
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        told = json.loads(pipe.read())
    os.waitpid(pid, 0)
    client.chat.completions.create(**CALL)

    assert {"left": 1} == told
    assert 0 == billing.balance("ada", "generations").available
    assert 3 == len({event.transaction_id for event in billing.usage_events("ada")})


class TestAway:
    """A server that is not there."""

    URL = "postgresql://ada:s3cret%21@127.0.0.1:1/credits"

    def test_nothing_sent(self, provider):
        """Calls are refused as BillingUnavailableError and nothing is sent; no message, repr or traceback shows the password."""
        import traceback

        with connect(self.URL, hold_patience=0.3) as billing:
            client = MeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k")
            with pytest.raises(BillingUnavailableError, match=r"127\.0\.0\.1") as caught:
                client.chat.completions.create(**CALL)

            shown = [
                *traceback.format_exception(caught.value),
                repr(billing),
                billing.ledger.name,
                repr(billing.ledger),
            ]
        assert [] == [text for text in shown if "s3cret" in text]
        assert [] == provider.requests

    def test_readiness(self):
        """A readiness probe says so, without the password."""
        with connect(self.URL, hold_patience=0.3) as billing:
            (reason,) = billing.readiness()

        assert "cannot be reached" in reason
        assert "s3cret" not in reason

    def test_closed(self):
        """What a closed billing says holds no password either."""
        billing = connect(self.URL)
        billing.close()

        with pytest.raises(BillingUnavailableError, match=r"postgresql://127\.0\.0\.1:1/credits is closed"):
            billing.balance("ada", "calls")

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://ada:s3cret:x@host@host/db?schema=a",
            "postgresql://ada:s3cret@host:port/db",
            "postgresql://ada@host/db?password=s3cret&nonsense=1",
            "postgresql://ada:s3/cret?@host/db#s3cret",
        ],
    )
    def test_malformed(self, url):
        """A URL that cannot be read is refused without repeating any of its secrets."""
        import traceback

        billing = connect(url, hold_patience=0.1)
        with pytest.raises((ConfigurationError, BillingUnavailableError)) as caught:
            billing.balance("ada", "calls")

        assert "s3" not in "".join(traceback.format_exception(caught.value)).replace(url, "") + repr(billing)


def test_without_the_driver():
    """Without psycopg the error says what to install; importing the library needs no driver."""
    code = (
        "import sys; sys.modules['psycopg'] = None\n"
        "import metered_ai\n"
        "billing = metered_ai.connect('postgresql://host/db')\n"
        "try: billing.balance('ada', 'calls')\n"
        "except metered_ai.ConfigurationError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "pip install 'metered-ai[postgres]'" in done.stdout


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_schemes(scheme, postgres, monkeypatch):
    """postgres:// means the same, and METERED_AI_BILLING may name the database."""
    monkeypatch.setenv("METERED_AI_BILLING", f"{scheme}://{postgres.partition('://')[2]}")

    with connect() as billing:
        assert 1 == billing.grant("ada", "calls", 1, id="g1").amount
