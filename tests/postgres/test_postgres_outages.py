"""The server stops in mid-work, or hangs: nothing is sent that is not held, and what was answered is billed when the server is back."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from metered_ai import AsyncMeteredOpenAI, Billing, BillingUnavailableError, MeteredOpenAI, connect
from metered_ai.core.steps import Place, Settle
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.testing.provider import Answer, FakeProvider
from tests.client.shells import HELLO, Shell
from tests.proof.children import LONG, http_clients, warm_up
from tests.proof.storm import CREDITS, CUSTOMERS, account_for, later, work

CALL = {"model": "m", "messages": HELLO}
ROUNDS = 30 if LONG else 3
AT_ONCE = 3


@pytest.fixture(params=["sync", "async"])
def is_async(request):
    return request.param == "async"


def until(holds, what, timeout=60.0):
    """Wait for something in another process, which has no other way to tell."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.timeout(3600)
def test_restarts(own_server, own_url, spool, tmp_path, say, fork):
    """
    The server is stopped at once, under load, and started again, three times; each time a client is killed while it is away. Nothing is
    lost, doubled or stuck, and while the server is away calls are refused as BillingUnavailableError and nothing is sent.
    """
    acks, log = tmp_path / "acks", tmp_path / "issued"
    policies = {"spool": spool, "hold_patience": 0.2, "settle_patience": 0.4}
    with connect(own_url, spool=spool) as billing:
        for customer in CUSTOMERS:
            billing.grant(customer, "generations", CREDITS, id="start")
    seed = random.randrange(1 << 30)
    refusals = 0

    with FakeProvider(default=Answer(pause=0.002), log=log) as provider:
        warm_up(provider.base_url, tmp_path / "warm")
        log.write_bytes(b"")

        def start(number):
            return fork(work, own_url, provider.base_url, policies, acks, seed + 100 * number)

        def wait_for(child, what, since):
            """Until it has told this, after so many things."""
            count = since
            while what not in child.hear(count)[since:]:
                count += 1

        running = [start(number) for number in range(AT_ONCE)]
        for child in running:
            wait_for(child, "answered", 0)
        for number in range(ROUNDS):
            before = [len(child.hear(0)) for child in running]
            own_server.stop_at_once()
            for child, since in zip(running, before, strict=True):
                wait_for(child, "refused", since)
            # Calls that had their hold when the server went have been sent; from here on there is none.
            for child, since in zip(running, before, strict=True):
                # Each of its callers has been refused, so that none is on its way from a hold to its request.
                child.hear(since + 18)
            until(lambda: len(provider.completed) == len(provider.requests), "calls under way end")
            sent, heard = len(provider.requests), [len(child.hear(0)) for child in running]
            for child, count in zip(running, heard, strict=True):
                child.hear(count + 6)
            assert sent == len(provider.requests)
            refusals += 6 * len(running)

            killed = running.pop(0)
            killed.signal(signal.SIGKILL)
            killed.wait()
            since = [len(child.hear(0)) for child in running]
            own_server.start()
            running.append(start(AT_ONCE + number))
            for child, count in zip(running, [*since, 0], strict=True):
                wait_for(child, "answered", count)
        for child in running:
            child.signal(signal.SIGKILL)
            child.wait()
            assert -signal.SIGKILL == child.status

    ledger = PostgresLedger(own_url, clock=later)
    account_for(
        ledger,
        acks,
        log,
        say,
        f"PostgreSQL stopped at once {ROUNDS} times (seed {seed}), {refusals} refusals",
        spool=spool,
    )
    ledger.close()


@pytest.mark.parametrize("is_killed", [False, True], ids=["lives", "killed"])
def test_settle_arrives(own_server, own_url, spool, fork, is_killed):
    """An answer that came while the server was away is billed when it is back, also when the client was killed in between."""
    with connect(own_url, spool=spool) as billing:
        billing.grant("ada", "generations", 5, id="order_1")

    def act(tell, base_url):
        http, _ = http_clients()
        billing = connect(own_url, spool=spool, hold_patience=0.2, settle_patience=0.2)
        client = MeteredOpenAI(billing=billing, customer="ada", base_url=base_url, api_key="k", http_client=http)
        answer = client.chat.completions.create(**CALL)
        tell(answer.id)
        try:
            client.chat.completions.create(**CALL)
        except BillingUnavailableError:
            tell("refused")
        until(lambda: not billing.readiness(), "the settle arrives")
        tell("ready")

    gate = threading.Event()
    with FakeProvider() as provider:
        provider.answer(gate=gate)
        child = fork(act, provider.base_url)
        provider.wait_for_requests(1)
        own_server.stop_at_once()
        gate.set()
        answer_id, refused = child.hear(2)[:2]
        assert ("refused", 1) == (refused, len(provider.requests))
        if is_killed:
            child.signal(signal.SIGKILL)
            child.wait()
        own_server.start()
        if not is_killed:
            assert "ready" == child.result()

    with connect(own_url, spool=spool) as billing:
        recovery = billing.recover()
        (event,) = billing.usage_events("ada")
        balance = billing.balance("ada", "generations")

        assert int(is_killed) == recovery.replayed
        assert (f"gen_{answer_id}", 1) == (event.transaction_id, event.amount)
        assert (1, 0, 4) == (balance.used, balance.held, balance.available)
        assert () == billing.verify().broken
    assert [] == [name for name in os.listdir(spool) if "spool-" in name]


class TestHanging:
    """A backend that stands still ends no statement by itself, and no time-out of the server's fires in it."""

    @pytest.mark.parametrize("is_handed_over", [False, True], ids=["run", "submit"])
    def test_hold(self, own_server, own_url, spool, is_handed_over):
        """
        A hold goes by another connection or is refused, within its patience and not a settle's. One that was refused leaves nothing
        behind, whatever the backend does when it goes on.
        """
        with connect(own_url, spool=spool, hold_patience=0.5, settle_patience=20.0) as billing:
            billing.grant("ada", "generations", 5, id="order_1")
            ledger = billing.ledger
            for step in (Place("first", "ada", "generations", 1, None), Place("other", "eve", "generations", 0, None)):
                ledger.run(step)
            assert own_server.stand_still()

            began = time.monotonic()
            step = Place("second", "ada", "generations", 1, None)
            try:
                ledger.submit(step).result() if is_handed_over else ledger.run(step)
                held = 2
            except BillingUnavailableError:
                held = 1
            took = time.monotonic() - began
            until(lambda: _is_placed(billing), "holds go by another connection")
            own_server.go_on()
            until(lambda: not _is_asked(own_server), "the backends come to their end")
            until(lambda: billing.balance("ada", "generations").held == held, "the hold that nobody waited for ends")
            # Half a second is allowed; a busy machine may take longer, but not as long as a settle may.
            assert took < 10
            assert () == billing.verify().broken

    def test_settle(self, own_server, own_url, spool, provider, is_async):
        """An answer whose settle hangs is returned, and billed once, whatever the backend does when it goes on."""
        gate = threading.Event()
        provider.answer(gate=gate)
        with connect(own_url, spool=spool, hold_patience=0.5, settle_patience=0.5) as billing:
            billing.grant("ada", "generations", 5, id="order_1")
            shell = Shell(provider, billing, is_async=is_async)
            client = shell.client(max_retries=0)
            threading.Thread(target=self._stand_still, args=(own_server, provider, gate)).start()

            answer = shell.run(client.chat.completions.create(**CALL))
            until(lambda: not billing.readiness(), "the settle arrives")
            own_server.go_on()
            until(lambda: billing.balance("ada", "generations").held == 0, "the hold ends")
            shell.finish()
            (event,) = billing.usage_events("ada")
            assert (f"gen_{answer.id}", 1) == (event.transaction_id, event.amount)
            assert 4 == billing.balance("ada", "generations").available
            assert () == billing.verify().broken

    @pytest.mark.parametrize("way", ["pool", "function"])
    def test_lent(self, own_server, own_url, spool, way):
        """
        So it is with connections of the application's own: no step and no reading waits for one for ever. What its pool gets back is as it
        was, or closed.
        """
        server = own_url.rpartition("schema=")[0].rstrip("?&")
        named = {"application_name": "metered_ai"}
        with ConnectionPool(server, min_size=2, max_size=4, kwargs=named, open=True) as pool:
            pool.wait()
            lender = pool if way == "pool" else lambda: psycopg.connect(server, **named)
            ledger = PostgresLedger(own_url, pool=lender, hold_patience=0.5, settle_patience=1.0)
            with Billing(ledger, spool=spool) as billing:
                billing.grant("ada", "generations", 5, id="order_1")
                ledger.run(Place("first", "ada", "generations", 1, None))
                ledger.run(Settle("first", "ada", "generations", 1, "gen_first", "reported"))
                for use in (
                    lambda: ledger.run(Place("second", "ada", "generations", 1, None)),
                    lambda: ledger.run(Settle("second", "ada", "generations", 1, "gen_second", "reported")),
                    lambda: ledger.balance("ada", "generations"),
                ):
                    assert own_server.stand_still()
                    began = time.monotonic()
                    with suppress(BillingUnavailableError):
                        use()
                    assert time.monotonic() - began < 15
                    own_server.go_on()
                until(lambda: _is_placed(billing), "the ledger works again")
                until(lambda: not _is_asked(own_server), "the backends come to their end")
                until(lambda: not billing.readiness(), "nothing waits")
                assert () == billing.verify().broken
            ledger.close()
            if way == "pool":
                lent = [pool.getconn(timeout=10) for _ in range(4)]
                assert {(False, 5, False, False)} == {
                    (each.autocommit, each.prepare_threshold, each.closed, "wait" in vars(each)) for each in lent
                }
                for each in lent:
                    pool.putconn(each)

    @staticmethod
    def _stand_still(own_server, provider, gate):
        provider.wait_for_requests(1)
        own_server.stand_still()
        gate.set()


def _is_asked(own_server) -> bool:
    """Some backend is at work for a ledger."""
    return bool(
        own_server.rows(
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'metered_ai' AND state IN ('active', 'idle in transaction')"
        )
    )


def _is_placed(billing) -> bool:
    try:
        billing.ledger.run(Place("next", "eve", "generations", 0, None))
    except BillingUnavailableError:
        return False
    return True


def test_loop_goes_on(own_server, own_url, spool, provider):
    """While the server hangs the event loop of the async client does not."""
    import asyncio

    async def call(billing):
        client = AsyncMeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k")
        await client.chat.completions.create(**CALL)
        own_server.stand_still()
        waiting = asyncio.ensure_future(client.chat.completions.create(**CALL))
        lags = []
        while not waiting.done():
            began = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - began)
        return waiting.exception(), lags

    with connect(own_url, spool=spool, hold_patience=1.0, settle_patience=1.0) as billing:
        billing.grant("ada", "generations", 5, id="order_1")
        error, lags = asyncio.run(call(billing))
        own_server.go_on()

    assert isinstance(error, BillingUnavailableError)
    assert len(lags) > 5
    # A loop that waited for the database would have one lag as long as the patience.
    assert max(lags) < 0.9
