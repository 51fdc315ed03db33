"""What the client tests drive: the two kinds of client behind the same few verbs, and a ledger that remembers what it was asked."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import openai

import metered_ai
from metered_ai import Billing
from metered_ai.core.steps import Enlarge, Place, Release, Settle
from metered_ai.testing.provider import FakeProvider

HELLO = [{"role": "user", "content": "Hello"}]

VERSION = tuple(int(part) for part in openai.__version__.split(".")[:2])

_KINDS = {Place: "place", Enlarge: "enlarge", Settle: "settle", Release: "release"}


class Watched:
    """A ledger, and the steps that it was asked for, in order. Grants, records and heartbeats are left out."""

    def __init__(self, ledger: Any) -> None:
        self.inner = ledger
        self.steps: list[Any] = []

    @property
    def kinds(self) -> list[str]:
        """Such as ["place", "settle"]."""
        return [_KINDS[type(step)] for step in self.steps]

    def forget(self) -> None:
        self.steps.clear()

    def run(self, step: Any) -> Any:
        self._note(step)
        return self.inner.run(step)

    def submit(self, step: Any) -> Any:
        self._note(step)
        return self.inner.submit(step)

    def submit_all(self, steps: Any) -> Any:
        for step in steps:
            self._note(step)
        return self.inner.submit_all(steps)

    def _note(self, step: Any) -> None:
        if type(step) in _KINDS:
            self.steps.append(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Shell:
    """
    Sync or async clients of one provider and one billing.

    `run(client.responses.create(...))` is the answer either way: what is awaitable is awaited, in the context of the caller.
    """

    def __init__(self, provider: FakeProvider, billing: Billing, *, is_async: bool) -> None:
        self.provider = provider
        self.billing = billing
        self.is_async = is_async
        self.metered_type: Any = metered_ai.AsyncMeteredOpenAI if is_async else metered_ai.MeteredOpenAI
        self.azure_type: Any = metered_ai.AsyncMeteredAzureOpenAI if is_async else metered_ai.MeteredAzureOpenAI
        self.bare_type: Any = openai.AsyncOpenAI if is_async else openai.OpenAI
        self.bare_azure_type: Any = openai.AsyncAzureOpenAI if is_async else openai.AzureOpenAI
        self._clients: list[Any] = []
        self._runner = asyncio.Runner() if is_async else None

    # Clients.

    def client(self, **options: Any) -> Any:
        """A metered client on this provider and billing; `customer` is "ada" unless it is given."""
        return self.keep(self.metered_type(**{"customer": "ada", **self._ours(), **self._sdk(), **options}))

    def azure(self, **options: Any) -> Any:
        """The same for Azure, with a deployment."""
        return self.keep(self.azure_type(**{"customer": "ada", **self._ours(), **self._azure(), **options}))

    def bare(self, **options: Any) -> Any:
        """The SDK's own client, to compare with."""
        return self.keep(self.bare_type(**{**self._sdk(), **options}))

    def bare_azure(self, **options: Any) -> Any:
        return self.keep(self.bare_azure_type(**{**self._azure(), **options}))

    def keep(self, client: Any) -> Any:
        """Close this client when the test is over."""
        self._clients.append(client)
        return client

    def _ours(self) -> dict[str, Any]:
        return {"billing": self.billing}

    def _sdk(self) -> dict[str, Any]:
        return {"base_url": self.provider.base_url, "api_key": "k", "max_retries": 0}

    def _azure(self) -> dict[str, Any]:
        return {
            "azure_endpoint": self.provider.url,
            "azure_deployment": "gpt",
            "api_version": "2026-01-01",
            "api_key": "k",
            "max_retries": 0,
        }

    # Verbs.

    def run(self, value: Any) -> Any:
        """The value, or what awaiting it gives."""
        if not inspect.isawaitable(value):
            return value
        assert self._runner is not None

        async def wait() -> Any:
            return await value

        return self._runner.run(wait(), context=contextvars.copy_context())

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a sync or an async function, inside the loop if there is one."""

        async def inside() -> Any:
            result = function(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return self.run(inside()) if self.is_async else function(*args, **kwargs)

    def read(self, stream: Any) -> list[Any]:
        """Everything that a stream, a page or an iterator gives."""
        if not hasattr(stream, "__aiter__"):
            return list(stream)

        async def read() -> list[Any]:
            return [item async for item in stream]

        return self.run(read())

    def take(self, iterator: Any) -> Any:
        """The next item of a stream."""
        return self.run(anext(iterator)) if hasattr(iterator, "__anext__") else next(iterator)

    @contextmanager
    def within(self, manager: Any) -> Iterator[Any]:
        """`with` or `async with`. The block's exception is given to the manager, which may not swallow it."""
        if not hasattr(manager, "__aenter__") or not self.is_async:
            with manager as value:
                yield value
            return

        value = self.run(manager.__aenter__())
        try:
            yield value
        except BaseException as error:
            self.run(manager.__aexit__(type(error), error, error.__traceback__))
            raise
        self.run(manager.__aexit__(None, None, None))

    # Scenarios: one coroutine that says what happens, for both shells. What it awaits is done at once in the sync one.

    def play(self, scenario: Coroutine[Any, Any, Any]) -> Any:
        """Run a scenario from its start to its end, in one context."""
        if self.is_async:
            return self.run(scenario)
        try:
            scenario.send(None)
        except StopIteration as ended:
            return ended.value
        raise AssertionError("a sync scenario waited for something")

    async def wait(self, value: Any) -> Any:
        return await value if inspect.isawaitable(value) else value

    @asynccontextmanager
    async def block(self, manager: Any) -> AsyncIterator[Any]:
        """`with` in the sync shell, `async with` in the async one."""
        if self.is_async:
            async with manager as value:
                yield value
        else:
            with manager as value:
                yield value

    async def ask(self, owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """`owner.name(...)`, or its async form, which is called `aname`."""
        return await self.wait(getattr(owner, f"a{name}" if self.is_async else name)(*args, **kwargs))

    def close(self, closeable: Any) -> None:
        self.run(closeable.aclose() if hasattr(closeable, "aclose") else closeable.close())

    def pause(self, seconds: float = 0.0) -> None:
        """Give the loop, if there is one, a turn."""
        if self.is_async:
            self.run(asyncio.sleep(seconds))

    def finish(self) -> None:
        for client in self._clients:
            self.close(client)
        if self._runner is not None:
            self._runner.close()
