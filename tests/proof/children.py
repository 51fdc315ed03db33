"""Forked children that run a function and tell their parent, line by line, what they saw: what was told survives their death."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from metered_ai import AsyncMeteredOpenAI, Billing, MeteredOpenAI

__all__ = ["HELLO", "LONG", "Child", "http_clients", "reap", "warm_up"]

LONG = bool(os.environ.get("METERED_AI_LONG"))
"""Run the long forms."""

HELLO: Any = [{"role": "user", "content": "Hello"}]

_alive: set[Child] = set()


class Child:
    """
    A forked child that calls `act(tell, ...)`. `tell(*values)` writes a line of JSON that is the parent's once it has returned.

    The child ends without cleaning up, as a killed one does; what `act` raises ends it with status 1 and is the last line told.
    A fork instead of a fresh interpreter: it costs milliseconds, so that every point at which a call can be killed gets its own.
    """

    def __init__(self, act: Callable[..., None], *arguments: Any) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _run(act, writing, arguments)
        os.close(writing)
        self._reading = reading
        self._text = b""
        self.status: int | None = None
        """How it ended, as `os.waitstatus_to_exitcode` says it; None while it lives."""
        _alive.add(self)

    def hear(self, count: int = 1, timeout: float = 60.0) -> list[Any]:
        """Wait until it has told at least so many things, and give all it has told so far. What was cut in mid-line was not told."""
        deadline = time.monotonic() + timeout
        while self._text.count(b"\n") < count and self._read(deadline - time.monotonic()):
            pass
        told = [json.loads(line) for line in self._text.split(b"\n")[:-1]]
        assert len(told) >= count, f"told {told} and no more"
        return told

    def wait(self, timeout: float = 120.0) -> list[Any]:
        """Wait until it has ended; everything it has told."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
            os.close(self._reading)
            _alive.discard(self)
        return self.hear(0)

    def result(self, timeout: float = 120.0) -> Any:
        """Wait until it has ended well; the last thing it has told."""
        told = self.wait(timeout)
        assert self.status == 0, f"the child ended with {self.status} after {told[-1:]}"
        return told[-1] if told else None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _read(self, timeout: float) -> bool:
        """Take in what it says next; False when it has said its last."""
        if self.status is not None:
            return False
        ready, _, _ = select.select([self._reading], [], [], max(0.0, timeout))
        if not ready:
            raise TimeoutError(f"a child said nothing; so far {self._text!r}")
        data = os.read(self._reading, 1 << 16)
        self._text += data
        return bool(data)


def reap() -> None:
    """Kill and bury every child that is left."""
    for child in list(_alive):
        child.signal(signal.SIGKILL)
        child.wait()


def http_clients() -> tuple[Any, Any]:
    """A sync and an async HTTP client that verify no certificate: loading them costs a process more than its calls."""
    return openai.DefaultHttpxClient(verify=False), openai.DefaultAsyncHttpxClient(verify=False)


def warm_up(base_url: str, folder: Path) -> None:
    """Make each kind of call in this process, so that its children need not import what they need."""
    folder.mkdir()
    http, async_http = http_clients()
    with Billing(f"sqlite:///{folder}/warm.db", spool=folder) as billing:
        billing.grant("ada", "generations", 100, id="warm")
        options: Any = {"billing": billing, "customer": "ada", "base_url": base_url, "api_key": "k", "max_retries": 0}

        async def call() -> None:
            async with AsyncMeteredOpenAI(http_client=async_http, **options) as client:
                await client.chat.completions.create(model="m", messages=HELLO)
                async for _ in await client.chat.completions.create(model="m", messages=HELLO, stream=True):
                    pass

        with MeteredOpenAI(http_client=http, **options) as client, billing.charge("ada", "generations", amount=1):
            client.chat.completions.create(model="m", messages=HELLO)
            list(client.chat.completions.create(model="m", messages=HELLO, stream=True))
        asyncio.run(call())
        assert billing.verify().is_sound


def _run(act: Callable[..., None], writing: int, arguments: tuple[Any, ...]) -> None:
    def tell(*values: Any) -> None:
        # One write, and short: whole or not at all, whoever else writes and whenever it is killed.
        os.write(writing, json.dumps(values[0] if len(values) == 1 else values).encode() + b"\n")

    status = 1
    try:
        act(tell, *arguments)
        status = 0
    except BaseException:
        tell(traceback.format_exc())
    finally:
        os._exit(status)
