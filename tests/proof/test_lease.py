"""How long a hold lasts: as long as its owner lives, up to `max_call`; and what a settle after that records."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from metered_ai import AsyncMeteredOpenAI, Billing, MeteredOpenAI, connect, per_token
from metered_ai.core.steps import Renew
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.testing import Clock
from tests.proof.children import HELLO, http_clients, warm_up

COST = 10 + 9
LIMIT = 100
"""Output tokens that a call may use, so that its hold is larger than its cost."""


class Beating(SqliteLedger):
    """A ledger that can be waited for: until its owner's lease has been renewed once more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._beats = 0
        self._changed = threading.Condition()

    def run(self, step: Any, /) -> Any:
        result = super().run(step)
        if isinstance(step, Renew):
            with self._changed:
                self._beats += 1
                self._changed.notify_all()
        return result

    def wait_for_beat(self) -> None:
        """Wait for a beat that has begun and ended after this was called."""
        with self._changed:
            beats = self._beats
            assert self._changed.wait_for(lambda: self._beats >= beats + 2, 30)


def call(billing: Billing, base_url: str, is_async: bool) -> str:
    http, async_http = http_clients()
    options: Any = {"billing": billing, "customer": "ada", "base_url": base_url, "api_key": "k", "max_retries": 0}
    request: Any = {"model": "m", "messages": HELLO, "max_tokens": LIMIT}
    options["pricing"] = per_token(input=1, output=1)
    if not is_async:
        with MeteredOpenAI(http_client=http, **options) as client:
            return f"gen_{client.chat.completions.create(**request).id}"

    async def acall() -> str:
        async with AsyncMeteredOpenAI(http_client=async_http, **options) as client:
            return f"gen_{(await client.chat.completions.create(**request)).id}"

    return asyncio.run(acall())


def truth(billing: Billing, policy: str, answer: str) -> str:
    """Check that a call that outlived its hold has cost what it cost, once; the story in words."""
    events = list(billing.usage_events("ada"))
    balance = billing.balance("ada", "generations")
    grants = list(billing.grants("ada"))
    paid = balance.used - sum(grant.amount for grant in grants if grant.id.startswith("correction_"))

    assert paid == COST
    assert (0, 0) == (balance.held, balance.debt)
    assert billing.verify().is_sound
    if policy == "release":
        (event,) = events
        assert (answer, COST, "call", True) == (event.transaction_id, event.amount, event.kind, event.is_late)
        return f"released, then recorded late as {event.amount}"

    expired, correction = events
    hold = expired.amount
    assert ("expired", "correction", 0) == (expired.kind, correction.kind, correction.amount)
    assert (f"hold_{expired.hold_id}", f"hold_{expired.hold_id}.c1") == (
        expired.transaction_id,
        correction.transaction_id,
    )
    assert [hold - COST] == [grant.amount for grant in grants if grant.id == f"correction_{expired.hold_id}"]
    return f"charged {hold}, then {hold - COST} given back"


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["release", "charge"])
def test_long_call(policy, is_async, tmp_path, provider, say):
    """The hold of a call whose process lives lasts until `max_call`, and not longer; the answer after that is recorded as it is."""
    clock, gate = Clock(), threading.Event()
    provider.answer(gate=gate)
    ledger, other = Beating(tmp_path / "credits.db", clock=clock), SqliteLedger(tmp_path / "credits.db", clock=clock)
    answers: list[str] = []
    with Billing(ledger, on_unknown=policy, lease=120, heartbeat=0.01, max_call=7200, spool=tmp_path) as billing:
        billing.grant("ada", "generations", 1_000, id="start")
        caller = threading.Thread(target=lambda: answers.append(call(billing, provider.base_url, is_async)))
        caller.start()
        provider.wait_for_requests(1)

        # Another process looks for orphans every 100 s of the ledger's clock, which is less than a lease, for two hours.
        looks = 0
        (hold,) = billing.holds(state="open")
        while clock.at(100) < hold.placed_at + timedelta(hours=2):
            clock.advance(100)
            looks += 1
            ledger.wait_for_beat()
            assert 0 == other.recover().resolved
        ledger.wait_for_beat()
        clock.advance(99.9)
        assert 0 == other.recover().resolved
        clock.advance(0.1)
        ledger.wait_for_beat()
        recovery = other.recover()
        gate.set()
        caller.join()
        story = truth(billing, policy, answers[0])

    say(
        f"a call of 7200 s, on_unknown={policy}: its hold outlived {looks} searches for orphans; at 7200 s it was {story}"
    )
    assert (1, 71) == (recovery.resolved, looks)
    other.close()
    ledger.close()


@pytest.mark.parametrize("policy", ["release", "charge"])
def test_stopped_owner(policy, tmp_path, provider, say, fork):
    """A process that is stopped for longer than its lease loses its hold; continued, it records its answer late, and once."""
    url = f"sqlite:///{tmp_path}/credits.db"
    gate = threading.Event()
    warm_up(provider.base_url, tmp_path / "warm")
    provider.answer(gate=gate)
    seen = len(provider.requests)

    def work(tell: Any) -> None:
        billing = connect(url, on_unknown=policy, lease=0.9, heartbeat=0.3)
        tell(call(billing, provider.base_url, is_async=False))
        # Its heartbeat and its sweep go on.
        tell(call(billing, provider.base_url, is_async=False))
        billing.close()

    with connect(url, on_unknown=policy) as billing:
        billing.grant("ada", "generations", 1_000, id="start")
        child = fork(work)
        provider.wait_for_requests(seen + 1)
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            # It lives, for longer than its lease.
            assert 0 == billing.recover().resolved
            time.sleep(0.05)
        child.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        while not (recovery := billing.recover()).resolved:
            assert time.monotonic() - stopped < 30
            time.sleep(0.05)
        lasted = time.monotonic() - stopped
        gate.set()
        child.signal(signal.SIGCONT)
        child.hear(1)
        child.result()
        told = child.wait()

        events = [event for event in billing.usage_events("ada") if event.transaction_id != told[1]]
        balance = billing.balance("ada", "generations")
        given_back = sum(grant.amount for grant in billing.grants("ada") if grant.id.startswith("correction_"))
        verified = billing.verify()

    say(
        f"an owner stopped for longer than its lease of 0.9 s, on_unknown={policy}: its hold lasted {lasted:.2f} s more, "
        f"its answer became {[(event.kind, event.amount) for event in events]}, {given_back} given back"
    )
    assert 1 == recovery.resolved
    assert () == verified.broken
    assert lasted <= 5
    assert (["call"] if policy == "release" else ["expired", "correction"]) == [event.kind for event in events]
    assert (2 * COST, 0, 0) == (balance.used - given_back, balance.held, balance.debt)
