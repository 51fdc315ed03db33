"""
Streamed answers whose first piece is made before the answer begins.

A generator that calls the provider does so when a server asks it for its first piece: after the status line, and outside the block
that says who pays. Here the first piece is asked for at once, and every piece in the context of that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Any

__all__ = ["AsyncChunks", "Chunks"]

_END: Any = object()
_TAKEN: Any = object()


class Chunks(Iterator[Any]):
    """The pieces of `source`, the first of which is made while this is built: what goes wrong there is raised there."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = iter(source)
        self._context = copy_context()
        self._first = self._context.run(next, self._source, _END)

    def __next__(self) -> Any:
        first, self._first = self._first, _TAKEN
        if first is _END:
            raise StopIteration
        return self._context.run(next, self._source) if first is _TAKEN else first

    def close(self) -> None:
        """End a generator that nobody reads to its end, so that its call is settled now."""
        close = getattr(self._source, "close", None)
        if close is not None:
            self._context.run(close)


class AsyncChunks(AsyncIterator[Any]):
    """As `Chunks`, of an async source: `await chunks.begin()` makes the first piece."""

    def __init__(self, source: AsyncIterable[Any]) -> None:
        self._source = aiter(source)
        self._context = copy_context()
        self._first = _TAKEN

    async def begin(self) -> None:
        """Make the first piece. Raises what goes wrong there."""
        self._first = await self._next()

    async def __anext__(self) -> Any:
        first, self._first = self._first, _TAKEN
        piece = await self._next() if first is _TAKEN else first
        if piece is _END:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """End a generator that nobody reads to its end, so that its call is settled now."""
        aclose = getattr(self._source, "aclose", None)
        if aclose is not None:
            await self._step(aclose)

    async def _next(self) -> Any:
        return await self._step(lambda: anext(self._source, _END))

    async def _step(self, start: Callable[[], Awaitable[Any]]) -> Any:
        async def step() -> Any:
            return await start()

        # A task, because only a task can be given a context; cancelling who waits for it cancels it.
        return await asyncio.create_task(step(), context=self._context)
