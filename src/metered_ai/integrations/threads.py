"""A thread pool whose threads know who pays."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

__all__ = ["ContextThreadPoolExecutor"]

_T = TypeVar("_T")


class ContextThreadPoolExecutor(ThreadPoolExecutor):
    """
    A `ThreadPoolExecutor` that runs each piece of work in a copy of the context from which it was submitted.

    So a `bill_to` around `submit` and `map` holds in the pool's threads, also after the block was left. The standard library's own pool
    forgets it: a call there is a CustomerRequiredError. `asyncio.to_thread` needs nothing of this.
    """

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """As `ThreadPoolExecutor.submit`; `map` submits, too."""
        return super().submit(copy_context().run, fn, *args, **kwargs)
