"""Ledgers that fail on demand, and that can be waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from metered_ai.core.steps import Release, Settle
from tests.client.shells import Shell, Watched


class Gated(Watched):
    """
    A watched ledger that refuses the steps which `refuse` gives an exception for, before they reach the real one.

    `shell.call(ledger.wait_for_ends, n)` waits until n calls have ended in it, however: by a settle or by a release.
    """

    def __init__(self, ledger: Any) -> None:
        super().__init__(ledger)
        self.refuse: Callable[[Any], Exception | None] = lambda step: None
        self.ends: list[Any] = []
        self._changed = threading.Condition()

    def run(self, step: Any) -> Any:
        self._note(step)
        self._check(step)
        result = self.inner.run(step)
        self._done(step)
        return result

    def submit(self, step: Any) -> Any:
        try:
            self._check(step)
        except Exception as error:
            self._note(step)
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed
        future = super().submit(step)
        future.add_done_callback(partial(self._done_if, step))
        return future

    def submit_all(self, steps: Any) -> Any:
        errors = [self.refuse(step) for step in steps]
        good = [step for step, error in zip(steps, errors, strict=True) if error is None]
        for step in steps:
            self._note(step)
        outcomes: Future[Any] = Future()

        def tell(inner: Future[Any]) -> None:
            results = iter(inner.result())
            told = [next(results) if error is None else error for error in errors]
            for step, outcome in zip(steps, told, strict=True):
                if not isinstance(outcome, Exception):
                    self._done(step)
            outcomes.set_result(told)

        self.inner.submit_all(good).add_done_callback(tell)
        return outcomes

    def _check(self, step: Any) -> None:
        error = self.refuse(step)
        if error is not None:
            raise error

    def _done(self, step: Any) -> None:
        if isinstance(step, Settle | Release):
            with self._changed:
                self.ends.append(step)
                self._changed.notify_all()

    def _done_if(self, step: Any, future: Future[Any]) -> None:
        if future.exception() is None:
            self._done(step)

    def wait_for_ends(self, count: int, timeout: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ends) >= count, timeout), self.kinds


def wait_for_ends(shell: Shell, ledger: Gated, count: int) -> None:
    """Wait until so many calls have ended, while the loop, if there is one, runs on."""
    if not shell.is_async:
        ledger.wait_for_ends(count)
        return

    import asyncio

    shell.run(asyncio.to_thread(ledger.wait_for_ends, count))
