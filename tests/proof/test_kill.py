"""
A process is killed at every step of a call: each statement, each commit, each phase of HTTP, each piece that is read.

The steps of a call are counted once; then for every k a child makes the same call and dies, without any cleaning up, when it
comes to step k. Afterwards its lease runs out, and nothing may be lost, doubled or stuck.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from metered_ai import AsyncMeteredOpenAI, Billing, MeteredOpenAI, per_token
from metered_ai.core.steps import Place
from metered_ai.ledger.sqlite import SqliteLedger
from tests.proof.children import HELLO, LONG, Child, warm_up

CREDITS = 1_000
COST = 10 + 9
"""What the provider's answer costs; the hold is larger."""
LIMIT = 100
"""Output tokens that a call may use."""

DIED = 77
POLICIES = ["release", "charge"]


class Points:
    """The steps of a call, numbered as they come. The process dies when it comes to the one it is to die at."""

    def __init__(self, die_at: int | None) -> None:
        self.names: list[str] = []
        self._die_at = die_at

    def __call__(self, name: str) -> None:
        if len(self.names) == self._die_at:
            os._exit(DIED)
        self.names.append(name)

    def trace(self, name: str, _: object) -> None:
        """Each step of HTTP, told by the transport: connecting, sending, receiving headers and body, closing."""
        self(name)

    async def atrace(self, name: str, _: object) -> None:
        self(name)


class Killable(SqliteLedger):
    """A ledger whose process may die before and after every statement."""

    points: Points

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        verb = statement.split(None, 1)[0]
        self.points(f"before {verb}")
        cursor = super()._execute(statement, parameters)
        self.points(f"after {verb}")
        return cursor


@dataclass
class Scene:
    """What a call needs: the provider's address, a name for the call, the billing, the points, and how to say that an answer was given."""

    base_url: str
    name: str
    billing: Billing
    points: Points
    answered: Callable[[str], None]

    def options(self) -> dict[str, Any]:
        return {
            "billing": self.billing,
            "customer": "ada",
            "pricing": per_token(input=1, output=1),
            "base_url": self.base_url,
            "api_key": "k",
            "max_retries": 0,
            "default_headers": {"x-call": self.name},
        }

    def client(self) -> MeteredOpenAI:
        def hook(request: Any) -> None:
            request.extensions["trace"] = self.points.trace

        # It verifies no certificate: loading them costs more than the call.
        http = openai.DefaultHttpxClient(verify=False, event_hooks={"request": [hook]})
        return MeteredOpenAI(http_client=http, **self.options())

    def async_client(self) -> AsyncMeteredOpenAI:
        async def hook(request: Any) -> None:
            request.extensions["trace"] = self.points.atrace

        http = openai.DefaultAsyncHttpxClient(verify=False, event_hooks={"request": [hook]})
        return AsyncMeteredOpenAI(http_client=http, **self.options())


def plain(scene: Scene) -> None:
    answer = scene.client().chat.completions.create(model="m", messages=HELLO, max_tokens=LIMIT)
    scene.answered(f"gen_{answer.id}")


def stream(scene: Scene) -> None:
    ids = set()
    for chunk in scene.client().chat.completions.create(model="m", messages=HELLO, max_tokens=LIMIT, stream=True):
        scene.points("piece")
        ids.add(chunk.id)
    scene.answered(f"gen_{ids.pop()}")


def async_plain(scene: Scene) -> None:
    async def call() -> None:
        answer = await scene.async_client().chat.completions.create(model="m", messages=HELLO, max_tokens=LIMIT)
        scene.answered(f"gen_{answer.id}")

    asyncio.run(call())


def async_stream(scene: Scene) -> None:
    async def call() -> None:
        ids = set()
        async for chunk in await scene.async_client().chat.completions.create(
            model="m", messages=HELLO, max_tokens=LIMIT, stream=True
        ):
            scene.points("piece")
            ids.add(chunk.id)
        scene.answered(f"gen_{ids.pop()}")

    asyncio.run(call())


def charge(scene: Scene) -> None:
    with scene.billing.charge("ada", "generations", amount=COST - 5, transaction_id="report_1") as charge:
        scene.points("inside")
        charge.raise_to(COST)
        scene.points("raised")
    scene.answered("report_1")


def covered(scene: Scene) -> None:
    """One price for a run of two calls. The second one finds everything open and connected."""
    with scene.billing.charge("ada", "generations", amount=COST, transaction_id="run_1", covers_calls=True):
        client = scene.client()
        for _ in range(2):
            answer = client.chat.completions.create(model="m", messages=HELLO, max_tokens=LIMIT)
            scene.answered(f"gen_{answer.id}")
    scene.answered("run_1")


def first_ever(scene: Scene) -> None:
    """The ledger does not exist yet: it is made, given credits, and used."""
    scene.billing.grant("ada", "generations", CREDITS, id="start")
    scene.answered("granted")
    plain(scene)


CALLS = [plain, stream, async_plain, async_stream, charge, covered, first_ever]


def die_in(
    tell: Callable[..., None], call: Callable[[Scene], None], folder: Path, url: str, policy: Any, die_at: int | None
) -> None:
    ledger = Killable(folder / "credits.db")
    ledger.points = points = Points(die_at)
    billing = Billing(ledger, on_unknown=policy, spool=folder)
    call(Scene(url, f"at {die_at}", billing, points, lambda name: tell("answered", name)))
    points("returned")
    tell("points", points.names)


def later() -> int:
    """An hour past the lease of whoever died."""
    return time.time_ns() // 1000 + 3 * 3600 * 1_000_000


def leftovers(folder: Path, policy: str, told: list[Any], issued: set[str]) -> tuple[Counter[str], int]:
    """Recover and check what a child has left. How its calls and holds ended, and how many requests they account for."""
    acknowledged = {name for _, name in told}
    ledger = SqliteLedger(folder / "credits.db", clock=later)
    with Billing(ledger, on_unknown=policy, spool=folder) as billing:
        billing.recover()
        verified = billing.verify()
        events = list(billing.usage_events())
        holds = list(billing.holds())
        balance = billing.balance("ada", "generations")
        granted = sum(grant.amount for grant in billing.grants())
        # Nothing is stuck: all that is left can be held.
        ledger.run(Place("all", "ada", "generations", balance.available or 0, None))
    ledger.close()

    assert () == verified.broken
    assert [] == [hold for hold in holds if hold.state == "open"]

    # Nothing lost: what was acknowledged is there.
    names = {event.transaction_id for event in events}
    if "granted" in acknowledged:
        acknowledged.remove("granted")
        assert granted == CREDITS
    assert acknowledged <= names

    # Nothing doubled, nothing invented: an event is an answer that was issued, a charge, or the policy's.
    calls = [event for event in events if event.kind == "call"]
    expired = [event for event in events if event.kind == "expired"]
    assert {event.transaction_id.removeprefix("gen_") for event in calls} <= issued
    assert policy == "charge" or not expired
    in_doubt = [hold for hold in holds if hold.is_in_doubt]
    assert len(in_doubt) <= 2 + 1
    assert policy == "release" or len(in_doubt) == len(expired)
    assert len(names) == len(events)
    assert len({event.hold_id for event in events}) == len(events)

    assert (0, 0) == (balance.held, balance.debt)
    assert balance.used == sum(event.amount for event in events)
    assert balance.available == granted - balance.used
    ends = Counter(event.kind for event in events) + Counter(hold.state for hold in holds)
    return ends, len(calls) + sum(hold.endpoint is not None for hold in in_doubt)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("call", CALLS)
def test_kill(call, policy, provider, memory_folder, say):
    """Wherever a process is killed, nothing is lost, doubled or stuck once its lease is out."""
    template = memory_folder / "template"
    template.mkdir()
    if call is not first_ever:
        with Billing(f"sqlite:///{template}/credits.db") as billing:
            billing.grant("ada", "generations", CREDITS, id="start")

    warm_up(provider.base_url, memory_folder / "warm")

    def run(name: str, die_at: int | None) -> int:
        folder = memory_folder / name
        shutil.copytree(template, folder)
        child = Child(die_in, call, folder, provider.base_url, policy, die_at)
        told = child.wait()
        issued = {str(issued.id) for issued in provider.issued}
        acknowledged = [line for line in told if line[0] == "answered"]
        assert child.status == (0 if die_at is None else DIED), told
        if die_at is None:
            points.extend(told[-1][1])
        ended, accounted[f"at {die_at}"] = leftovers(folder, policy, acknowledged, issued)
        ends.update(ended)
        shutil.rmtree(folder)
        return len(acknowledged)

    points: list[str] = []
    ends: Counter[str] = Counter()
    accounted: dict[str, int] = {}
    run("whole", None)
    # The short form shares the points between the two policies: each is died at in every run of the suite.
    chosen = range(len(points)) if LONG else range(POLICIES.index(policy), len(points), 2)
    told = [run(str(k), k) for k in chosen]

    say(
        f"{call.__name__}, on_unknown={policy}: killed at {len(told)} of {len(points)} points ({len(set(points))} kinds), "
        f"{told.count(0)} times before anything was acknowledged; left {dict(ends)}"
    )
    assert told == sorted(told)

    # No byte was sent without a hold: every request has an event, or a hold that is in doubt.
    requests = Counter(request.headers.get("x-call", "warm") for request in provider.requests)
    assert {} == {name: count for name, count in requests.items() if name != "warm" and count > accounted[name]}
