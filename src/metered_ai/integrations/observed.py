"""A ledger that tells somebody of every step: what metrics and logs stand on. A billing that nobody observes has none of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from ..billing import Billing
    from ..core.steps import Step, StepResult
    from ..ledger import Ledger, Outcomes, Recovery

__all__ = ["Observer", "observe"]

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who is told. It must be quick and must not ask the ledger anything: it may be called in the ledger's own thread."""

    def stepped(self, step: Step, outcome: StepResult | Exception, seconds: float, /) -> None:
        """A step was done, or failed as `outcome` says. With `seconds` of waiting for the ledger, its queue included."""
        ...

    def recovered(self, found: Recovery, /) -> None:
        """Holds of processes that died were resolved by this one."""
        ...


def observe(billing: Billing, observer: Observer) -> None:
    """Tell `observer` of every step of a billing's ledger from now on. What it raises is logged, and costs nobody an answer."""
    billing._observe(lambda ledger: cast("Ledger", _ObservedLedger(ledger, observer)))


class _ObservedLedger:
    """Passes everything on. Only what makes a step or resolves holds is watched."""

    def __init__(self, ledger: Ledger, observer: Observer) -> None:
        self._ledger = ledger
        self._observer = observer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    def run(self, step: Step, /) -> StepResult:
        started = perf_counter()
        try:
            result = self._ledger.run(step)
        except Exception as error:
            self._tell([step], [error], started)
            raise
        self._tell([step], [result], started)
        return result

    def submit(self, step: Step, /) -> Future[StepResult]:
        future = self._ledger.submit(step)
        future.add_done_callback(partial(self._submitted, step, perf_counter()))
        return future

    def submit_all(self, steps: Sequence[Step], /) -> Future[Outcomes]:
        future = self._ledger.submit_all(steps)
        future.add_done_callback(partial(self._all_submitted, steps, perf_counter()))
        return future

    def sweep(self, limit: int = 500) -> Recovery:
        return self._tell_of(self._ledger.sweep(limit))

    def recover(self) -> Recovery:
        return self._tell_of(self._ledger.recover())

    def _submitted(self, step: Step, started: float, future: Future[StepResult]) -> None:
        error = future.exception()
        self._tell([step], [future.result() if error is None else cast("Exception", error)], started)

    def _all_submitted(self, steps: Sequence[Step], started: float, future: Future[Outcomes]) -> None:
        if future.exception() is None:
            self._tell(steps, future.result(), started)

    def _tell(self, steps: Sequence[Step], outcomes: Sequence[StepResult | Exception], started: float) -> None:
        seconds = perf_counter() - started
        for step, outcome in zip(steps, outcomes, strict=True):
            try:
                self._observer.stepped(step, outcome, seconds)
            except Exception as error:  # noqa: BLE001  telemetry must never cost the caller the answer
                _log.error("a step could not be told of (%s)", type(error).__name__)

    def _tell_of(self, found: Recovery) -> Recovery:
        if found.resolved:
            try:
                self._observer.recovered(found)
            except Exception as error:  # noqa: BLE001  as above
                _log.error("a recovery could not be told of (%s)", type(error).__name__)
        return found
