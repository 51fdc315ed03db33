"""
`metered-ai demo`: the main job once, for real, in a terminal.

Each step is a function whose lines are shown and then run, so what is read is what was done. What a step returns is checked against
what it promised; a promise that does not hold ends the demonstration.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from .. import (
    AsyncMeteredOpenAI,
    Billing,
    InsufficientCreditsError,
    MeteredOpenAI,
    Receipt,
    bill_to,
    connect,
    per_token,
)
from ..errors import MeteringError
from ..ledger.reports import Recovery, Verification
from . import show

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

    from ..testing.llama import LlamaServer

__all__ = ["run_demo"]

MODEL = "gpt-5-mini"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello in five words."}]
NEXT = "What comes next: README.md, then `metered-ai --help` and the folder examples/."

_T = TypeVar("_T")


# ---- what is shown and run ----


def give_credits(billing: Billing) -> None:
    billing.grant("ada", "generations", 8, id="order_1")
    billing.grant("ada", "generations", 8, id="order_1")  # the same order again: nothing more is given


def call(client: MeteredOpenAI) -> Receipt:
    with bill_to("ada") as bill:
        client.chat.completions.create(model=MODEL, messages=QUESTION)
    return bill


def stream(client: MeteredOpenAI) -> tuple[Receipt, int]:
    count = 0
    with bill_to("ada") as bill:
        for _chunk in client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True):
            count += 1
    return bill, count


def override(client: MeteredOpenAI) -> None:
    client.with_billing(customer="ada", meter="premium", amount=3).responses.create(model=MODEL, input="Say hello.")


async def ten_at_once(client: AsyncMeteredOpenAI) -> list[object]:
    async def one() -> object:
        return await client.with_billing(customer="bob").chat.completions.create(model=MODEL, messages=QUESTION)

    return await asyncio.gather(*(one() for _ in range(10)), return_exceptions=True)


def refuse(client: MeteredOpenAI) -> InsufficientCreditsError | None:
    refusal = None
    try:
        client.with_billing(customer="bob").chat.completions.create(model=MODEL, messages=QUESTION)
    except InsufficientCreditsError as error:
        refusal = error
    return refusal


def pay_by_token(client: MeteredOpenAI) -> tuple[Receipt, int | None]:
    price = per_token(input=1, output=4)
    with bill_to("ada", meter="tokens", pricing=price) as bill:
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION)
    return bill, answer.usage.total_tokens if answer.usage else None


CHILD = """
import os, sys
from metered_ai import MeteredOpenAI, connect

billing = connect(sys.argv[1], lease=1.5, heartbeat=0.5)
client = MeteredOpenAI(billing=billing, customer="eve", timeout=30)
stream = client.chat.completions.create(model=sys.argv[2], messages=[{"role": "user", "content": "Go on."}], stream=True)
next(stream)                        # the first words have arrived
print("streaming", flush=True)
sys.stdin.read()                    # in mid-answer, until it is killed
"""


def after_the_kill(billing: Billing) -> Recovery:
    return billing.recover()


def prove(billing: Billing) -> Verification:
    return billing.verify()


# ---- the stage ----


class _BrokenPromiseError(Exception):
    """A step did not do what it says."""


class _NoServerError(Exception):
    """There is nothing here to call."""


@dataclass
class _Stage:
    """Where the steps are shown, and the figures they leave."""

    out: Console
    figures: dict[str, object] = field(default_factory=dict[str, object])
    _number: int = 0

    def title(self, text: str) -> None:
        self._number += 1
        self.out.print()
        title = Text(f"{self._number}. {text}", style="bold")
        self.out.print(Rule(title, align="left", style="bright_black"), width=min(self.out.width, 80))

    def code(self, step: Callable[..., object] | str) -> None:
        lines = _body(step) if callable(step) else step.strip("\n")
        self.out.print(Text(textwrap.indent(lines, "    "), style="cyan"), soft_wrap=True)

    def say(self, text: str) -> None:
        self.out.print(Text(f"  {text}"), soft_wrap=True)

    def expect(self, holds: bool, promise: str) -> None:
        if not holds:
            raise _BrokenPromiseError(promise)
        self.out.print(Text.assemble(("  ok ", "green"), promise), soft_wrap=True)


def _body(step: Callable[..., object]) -> str:
    """A function's lines without its head and without what it only returns for us to check."""
    _, *lines, last = textwrap.dedent(inspect.getsource(step)).splitlines()
    if last.startswith("    return "):
        last = last.replace("return ", "", 1) if "(" in last else ""
    return textwrap.dedent("\n".join([*lines, last])).rstrip()


def run_demo(*, as_json: bool) -> int:
    """Run every step; 0 if all did what they promise, 1 if one did not."""
    stage = _Stage(Console(quiet=True) if as_json else show.console())
    try:
        with (
            _server(stage) as (name, server, environment),
            tempfile.TemporaryDirectory(prefix="metered-ai-demo-") as folder,
        ):
            stage.figures["server"] = name
            _steps(stage, f"sqlite:///{Path(folder) / 'credits.db'}", server, environment)
    except _NoServerError as error:
        return _failed(str(error), 2)
    except _BrokenPromiseError as error:
        return _failed(f"this did not hold: {error}", 1)
    except Exception as error:  # noqa: BLE001 - whatever a step fails with, the demonstration has failed.
        return _failed(f"{type(error).__name__}: {error}", 1)

    if as_json:
        show.print_json({"is_sound": True, **stage.figures})
    stage.out.print()
    stage.out.print(NEXT, soft_wrap=True)
    return 0


def _failed(reason: str, code: int) -> int:
    print(f"metered-ai: the demonstration failed: {show.shown(' '.join(reason.split()))}", file=sys.stderr)
    return code


@contextmanager
def _server(stage: _Stage) -> Generator[tuple[str, LlamaServer | None, dict[str, str]]]:
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        stage.out.print(f"Metering real calls to {MODEL} with your OPENAI_API_KEY: about ten short answers.")
        base_url = os.environ.get("OPENAI_BASE_URL")
        yield "openai", None, {"OPENAI_API_KEY": key, **({"OPENAI_BASE_URL": base_url} if base_url else {})}
        return

    from ..testing.llama import LlamaServer

    stage.out.print("Starting a real inference server (llama.cpp, a tiny model that babbles) on loopback.")
    try:
        server = LlamaServer(mean_length=40)
    except RuntimeError as error:
        raise _NoServerError(str(error)) from error
    with server:
        yield "llama.cpp", server, {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": server.base_url}


def _steps(stage: _Stage, url: str, server: LlamaServer | None, environment: dict[str, str]) -> None:
    key, base_url = environment["OPENAI_API_KEY"], environment.get("OPENAI_BASE_URL")
    with (
        connect(url) as billing,
        MeteredOpenAI(billing=billing, api_key=key, base_url=base_url, timeout=30) as client,
    ):
        stage.title("Give credits")
        stage.code('billing = connect("sqlite:///credits.db")\nclient = MeteredOpenAI(billing=billing)\n')
        _run(stage, give_credits, billing)
        stage.expect(billing.balance("ada", "generations").limit == 8, "ada has 8 credits, not 16")

        stage.title("A call costs a credit")
        bill = _run(stage, call, client)
        stage.say(f"the receipt: {bill.events[0].transaction_id}, {show.count(bill.amount, 'credit')}")
        stage.expect(bill.amounts == {"generations": 1}, "one answer, one usage event, one credit")

        stage.title("So does a stream")
        bill, chunks = _run(stage, stream, client)
        stage.say(f"the receipt, after {show.count(chunks, 'chunk')}: {bill.events[0].transaction_id}")
        stage.expect(bill.amounts == {"generations": 1}, "one stream, one usage event, one credit")

        stage.title("Another meter and price, for one call")
        billing.grant("ada", "premium", 10, id="order_2")
        _run(stage, override, client)
        stage.expect(billing.balance("ada", "premium").used == 3, "3 credits on the meter premium, none on generations")

        _at_once(stage, billing, key, base_url)
        _refusal(stage, client)
        _tokens(stage, billing, client, server)
        _kill(stage, billing, url, environment)

        stage.title("What is left, and the proof")
        stage.out.print(show.balance_bars(billing.balances("ada"), is_wide=stage.out.width >= 80))
        verification = _run(stage, prove, billing)
        for sentence in show.verification_words(verification):
            stage.say(sentence)
        stage.figures["verify"] = show.plain(verification)
        stage.figures["balances"] = show.plain(billing.balances("ada"))
        stage.expect(verification.is_sound, "every invariant of the ledger holds")


def _run(stage: _Stage, step: Callable[..., _T], *arguments: Any) -> _T:
    stage.code(step)
    return step(*arguments)


def _at_once(stage: _Stage, billing: Billing, key: str, base_url: str | None) -> None:
    stage.title("Ten async calls at once on five credits")
    billing.grant("bob", "generations", 5, id="order_3")
    stage.code(ten_at_once)

    async def run() -> list[object]:
        async with AsyncMeteredOpenAI(billing=billing, api_key=key, base_url=base_url, timeout=30) as client:
            return await ten_at_once(client)

    results = asyncio.run(run())
    refused = [result for result in results if isinstance(result, InsufficientCreditsError)]
    failed = [result for result in results if isinstance(result, Exception) and not isinstance(result, MeteringError)]
    if failed:
        raise _BrokenPromiseError(f"10 calls are answered or refused, but one failed: {failed[0]}")
    answered = len(results) - len(refused)
    stage.figures["at_once"] = {"answered": answered, "refused": len(refused)}
    stage.expect((answered, len(refused)) == (5, 5), "5 were answered, 5 were refused before anything was sent")


def _refusal(stage: _Stage, client: MeteredOpenAI) -> None:
    stage.title("A refusal tells its numbers")
    error = _run(stage, refuse, client)
    if error is None:
        raise _BrokenPromiseError("a call without credits is refused")
    stage.say(f"str(error)        {error}")
    stage.say(f"error.to_dict()   {json.dumps(error.to_dict())}")
    stage.figures["refusal"] = error.to_dict()
    stage.expect(
        (error.available, error.required) == (0, 1), f"available 0, required 1: answer with HTTP {error.http_status}"
    )


def _tokens(stage: _Stage, billing: Billing, client: MeteredOpenAI, server: LlamaServer | None) -> None:
    stage.title("A price by tokens")
    billing.grant("ada", "tokens", 50_000, id="order_4")
    before = _counted(server)
    bill, told = _run(stage, pay_by_token, client)
    event = bill.events[0]
    usage = event.usage
    read, wrote = (usage.input_tokens or 0, usage.output_tokens or 0) if usage is not None else (0, 0)
    stage.say(f"{read} tokens in, {wrote} out: {show.count(event.amount, 'credit')}, {event.basis}")
    stage.figures["tokens"] = {"input": read, "output": wrote, "credits": event.amount}
    stage.expect(event.amount == read + 4 * wrote and event.basis == "reported", "charged for what was used, once")
    if server is None:
        stage.expect(read + wrote == told, f"the ledger's {read + wrote} tokens are the provider's own count")
        return

    deadline = time.monotonic() + 5
    while (after := _counted(server)) != (before[0] + read, before[1] + wrote) and time.monotonic() < deadline:
        time.sleep(0.05)
    worked = (after[0] - before[0], after[1] - before[1])
    stage.say(f"the server's own /metrics meanwhile: {worked[0]} in, {worked[1]} out")
    stage.expect(worked == (read, wrote), "the ledger and the server agree, token by token")


def _counted(server: LlamaServer | None) -> tuple[int, int]:
    if server is None:
        return 0, 0
    metrics = server.metrics()
    return metrics["prompt_tokens_total"], metrics["tokens_predicted_total"]


def _kill(stage: _Stage, billing: Billing, url: str, environment: dict[str, str]) -> None:
    stage.title("kill -9 in the middle of an answer")
    billing.grant("eve", "generations", 5, id="order_5")
    stage.say("another process runs this:")
    stage.code(CHILD)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, url, MODEL],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        line = child.stdout.readline()
        child.kill()
        child.wait()
    if line != "streaming\n":
        raise _BrokenPromiseError("another process starts a stream")
    stage.say(f"it was killed in mid-answer (exit code {child.returncode})")
    balance = billing.balance("eve", "generations")
    stage.expect((balance.used, balance.held) == (0, 1), "its hold has survived it: 1 of eve's 5 credits is held")

    stage.code(after_the_kill)
    # The lease of a living process is renewed all the time; that of a dead one runs out.
    until = next(billing.holds("eve", state="open")).expires_at or datetime.now(UTC)
    deadline = time.monotonic() + 15
    time.sleep(max(0.0, min(10.0, (until - datetime.now(UTC)).total_seconds())))
    while not (found := after_the_kill(billing)).resolved and time.monotonic() < deadline:
        time.sleep(0.1)
    for sentence in show.recovery_words(found, still_open=0):
        stage.say(sentence)
    stage.figures["recovery"] = show.plain(found)
    balance = billing.balance("eve", "generations")
    stage.expect(
        (found.released, balance.held, balance.available) == (1, 0, 5),
        "eve did not pay for an answer nobody got, and you know of it",
    )
