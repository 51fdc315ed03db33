"""Streamed answers whose first piece is made at once."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

from metered_ai.integrations.chunks import AsyncChunks, Chunks

_word = ContextVar("word", default="none")


class Source:
    """A generator of either kind, which somebody else holds as well, and whether it has ended."""

    def __init__(self):
        self.has_ended = False

    def pieces(self):
        try:
            yield _word.get()
            yield _word.get()
        finally:
            self.has_ended = True

    async def apieces(self):
        try:
            yield _word.get()
            yield _word.get()
        finally:
            self.has_ended = True


def test_chunks():
    """Every piece is made in the context of the beginning; closing ends the generator, whoever else holds it."""
    source = Source()
    pieces = source.pieces()
    token = _word.set("begun")
    chunks = Chunks(pieces)
    _word.reset(token)

    assert ["begun", "begun"] == [next(chunks), next(chunks)]
    assert not source.has_ended
    chunks.close()
    assert source.has_ended
    assert [] == list(Chunks([]))


def test_async_chunks():
    """The same of an async generator."""

    async def read():
        source = Source()
        pieces = source.apieces()
        token = _word.set("begun")
        chunks = AsyncChunks(pieces)
        await chunks.begin()
        _word.reset(token)

        assert ["begun", "begun"] == [await anext(chunks), await anext(chunks)]
        assert not source.has_ended
        await chunks.aclose()
        assert source.has_ended
        empty = AsyncChunks(Source().apieces())
        assert ["none", "none"] == [piece async for piece in empty]

    asyncio.run(read())
