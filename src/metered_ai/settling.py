"""Brings the end of every call into the ledger: at once, from a queue that finalizers may use, or later from the spool."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from .core.steps import Release, Settle, Settled, Step, StepResult
from .errors import BillingUnavailableError, ConfigurationError, MeteringError
from .ledger.spool import Spool
from .records import UsageEvent

if TYPE_CHECKING:
    from .hooks import Hooks
    from .ledger import Ledger, Outcomes

__all__ = ["End", "Settler", "unrecorded"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PASSING = (BillingUnavailableError, ConfigurationError)
"""What is wrong with the ledger or the way there, and not with the step: it waits until that is mended."""


class End(NamedTuple):
    """How a call ended, and who wants to know how that was settled."""

    step: Settle | Release
    told: tuple[Callable[[Settled], None], ...] = ()


def unrecorded(end: End) -> UsageEvent | None:
    """The usage event as it will be written, dated now; None where the end is a release."""
    step = end.step
    if not isinstance(step, Settle):
        return None
    return UsageEvent(
        customer=step.customer,
        meter=step.meter,
        transaction_id=step.transaction_id,
        amount=step.amount,
        created_at=datetime.now(UTC),
        basis=step.basis,
        kind=step.kind,
        hold_id=step.hold_id,
        usage=step.usage,
        request_id=step.request_id,
        attempts=step.attempts,
        properties=step.properties,
        price_slug=step.price_slug,
        parent=step.parent,
        is_unlimited=step.is_unlimited,
    )


class _Kept(NamedTuple):
    end: End
    key: str | None


class Settler:
    """
    Every end is brought in once, whatever fails on the way.

    An end that the ledger cannot take now is written to the spool and tried again in the background; while a settle waits there,
    `is_waiting` is true and no new hold may be placed. One that it will never take is parked in the spool, logged, and blocks nobody.
    """

    def __init__(self, ledger: Ledger, spool: Spool) -> None:
        self._ledger = ledger
        self._spool = spool
        self.after_settle: Callable[[], None] | None = None
        """Told after each settle that the ledger took."""
        self.hooks: Hooks | None = None
        self._reset()

    def _reset(self) -> None:
        # SimpleQueue.put is reentrant: it is the one thing a finalizer may call.
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._retrier: threading.Thread | None = None
        self._kept: list[_Kept] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._ticks: dict[int, _Tick] = {}
        self._under_way: set[Future[Any]] = set()
        self._arrived = threading.Condition()

    def after_fork(self) -> None:
        """In the child: what the parent has not brought in yet stays the parent's."""
        self._reset()

    @property
    def is_waiting(self) -> bool:
        """True while a settle waits for the ledger."""
        return bool(self._kept) and any(isinstance(kept.end.step, Settle) for kept in self._kept)

    # Sync: in the caller's thread.

    def finish(self, end: End) -> Exception | None:
        """Bring an end in and wait for it. Gives what failed, after it was kept; never raises for a failing ledger."""
        try:
            result = self._ledger.run(end.step)
        except Exception as error:  # noqa: BLE001  whatever it was, the end is kept
            return self._failed(end, error)
        except BaseException:
            self._put_back(end)
            raise
        self._succeeded(end, result)
        return None

    def _put_back(self, end: End) -> None:
        self.start()
        self._queue.put(partial(self.finish, end))

    # Async: handed over to the ledger's thread, once per turn of the loop.

    async def run(self, step: Step) -> StepResult:
        """Do a step without blocking the loop. A cancellation leaves it running: it was handed over before the first await."""
        outcome = await self._tick().hand_over(step, None)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def afinish(self, end: End) -> Exception | None:
        """`finish`, without blocking the loop."""
        outcome = await self._tick().hand_over(end.step, end)
        return outcome if isinstance(outcome, Exception) else None

    def submit(self, end: End) -> None:
        """Bring an end in without waiting, from any thread or a loop that may stop before its next turn."""
        self.follow(self._ledger.submit(end.step), partial(self._submitted, end))

    def _submitted(self, end: End, future: Future[StepResult]) -> None:
        error = future.exception()
        self._arrived_with(end, future.result() if error is None else cast("Exception", error))

    def _arrived_with(self, end: End, outcome: StepResult | Exception) -> None:
        """In the ledger's thread, which serves everybody: one end that cannot be kept must not take others with it."""
        try:
            if isinstance(outcome, Exception):
                self._failed(end, outcome)
            else:
                self._succeeded(end, outcome)
        except Exception as error:  # noqa: BLE001  as above
            _log.error("the end of hold %s could not be worked out (%s)", end.step.hold_id, type(error).__name__)

    def follow(self, future: Future[_T], then: Callable[[Future[_T]], None]) -> None:
        """Call `then` once the future is done. `flush` waits for both: a caller that was cancelled waits for neither."""

        def arrived(future: Future[_T]) -> None:
            try:
                then(future)
            finally:
                with self._arrived:
                    self._under_way.discard(future)
                    self._arrived.notify_all()

        self._under_way.add(future)
        future.add_done_callback(arrived)

    def _tick(self) -> _Tick:
        loop = asyncio.get_running_loop()
        tick = self._ticks.get(id(loop))
        if tick is None or tick.loop is not loop:
            for key, old in list(self._ticks.items()):
                if old.loop.is_closed():
                    # A loop that was stopped in the very turn of a step: nobody waits for it, but it was handed over.
                    self._ticks.pop(key, None)
                    old.flush()
            tick = self._ticks[id(loop)] = _Tick(loop, self)
        return tick

    # The queue: for closes and finalizers.

    def start(self) -> None:
        """Start the thread that empties the queue. Must have been called before anything is enqueued: a finalizer cannot start threads."""
        if self._worker is None:
            with self._lock:
                if self._worker is None:
                    worker = threading.Thread(
                        target=self._work, args=(self._queue,), name="metered-ai-settler", daemon=True
                    )
                    try:
                        worker.start()
                    except RuntimeError:
                        # No thread is to be had (the program is ending): `flush` empties the queue itself.
                        return
                    self._worker = worker

    def enqueue(self, bring_in: Callable[[], object]) -> None:
        """Have something brought in by the queue's thread. Safe in finalizers and in any thread."""
        self._queue.put(bring_in)

    def _work(self, queue: SimpleQueue[Callable[[], object] | None]) -> None:
        while (bring_in := queue.get()) is not None:
            self._bring_in(bring_in)
        # A start that was interrupted may have left a twin, which waits, too.
        queue.put(None)

    def _work_off(self) -> None:
        """Do what the queue's thread would, where there is none."""
        while True:
            try:
                bring_in = self._queue.get_nowait()
            except Empty:
                return
            if bring_in is not None:
                self._bring_in(bring_in)

    @staticmethod
    def _bring_in(bring_in: Callable[[], object]) -> None:
        try:
            bring_in()
        except Exception as error:  # noqa: BLE001  the thread serves every call
            _log.error(
                "the end of a call could not be worked out (%s); its hold stays until its lease is out",
                type(error).__name__,
            )

    def flush(self, timeout: float) -> bool:
        """Wait until what is in the queue or handed over now has been brought in. False when `timeout` seconds were not enough."""
        until = time.monotonic() + timeout
        for tick in list(self._ticks.values()):
            if not tick.loop.is_running():
                tick.flush()
        if self._worker is None:
            self._work_off()
        else:
            if threading.current_thread() is self._worker:
                return True
            reached = threading.Event()
            self._queue.put(reached.set)
            if not reached.wait(timeout):
                return False
        under_way = set(self._under_way)
        with self._arrived:
            return self._arrived.wait_for(lambda: not under_way & self._under_way, until - time.monotonic())

    # What came of it.

    def _succeeded(self, end: End, result: StepResult) -> None:
        if isinstance(result, Settled):
            for tell in end.told:
                tell(result)
            if self.after_settle is not None:
                self.after_settle()
            if self.hooks is not None:
                self.hooks.settled(self._ledger, result)

    def _failed(self, end: End, error: Exception) -> Exception:
        step = end.step
        if isinstance(step, Release):
            # A release needs no disk: if this process dies, the lease gives the hold back.
            if isinstance(error, _PASSING):
                self._keep(_Kept(end, None))
            else:
                _log.error("hold %s of %r could not be released: %s", step.hold_id, step.customer, error)
            return error

        try:
            key = self._spool.write(step)
        except (OSError, ValueError) as spool_error:
            _log.error(
                "usage %s (%d on %r) of customer %r could be written neither to the ledger (%s) nor to the spool (%s); hold %s stays",
                step.transaction_id,
                step.amount,
                step.meter,
                step.customer,
                error,
                spool_error,
                step.hold_id,
            )
            self._keep(_Kept(end, None))
            return error
        if isinstance(error, ValueError | MeteringError) and not isinstance(error, _PASSING):
            self._park(key, error)
        else:
            _log.warning("usage %s waits in the spool for the ledger: %s", step.transaction_id, error)
            self._keep(_Kept(end, key))
        return error

    def _park(self, key: str, error: Exception) -> None:
        _log.error("a step for the ledger can never succeed and was parked: %s", error)
        try:
            self._spool.park(key, str(error))
        except OSError as spool_error:
            _log.error("parking failed, it stays in the spool: %s", spool_error)

    # The spool, again and again.

    def adopt(self) -> int:
        """Take over what dead processes left in the spool. Gives how many steps now wait."""
        found = [_Kept(End(step), key) for key, step in self._spool.adopt() if isinstance(step, Settle | Release)]
        with self._lock:
            self._kept.extend(found)
        return len(found)

    def replay(self) -> tuple[int, int]:
        """Try everything that waits, once. Gives how many the ledger took, and how many were parked."""
        taken = parked = 0
        done: list[str] = []
        for kept in list(self._kept):
            try:
                result = self._ledger.run(kept.end.step)
            except _PASSING:
                break
            except (ValueError, MeteringError) as error:
                if kept.key is not None:
                    self._park(kept.key, error)
                parked += 1
            except Exception as error:  # noqa: BLE001  it waits on, and so does the thread that tries again
                _log.error("a step that waits could not be tried (%s)", type(error).__name__)
                break
            else:
                self._succeeded(kept.end, result)
                if kept.key is not None:
                    done.append(kept.key)
                taken += 1
            with self._lock:
                if kept in self._kept:
                    self._kept.remove(kept)
        self._forget(done)
        return taken, parked

    def _forget(self, keys: list[str]) -> None:
        """The spool lets go of what the ledger has, once that is as safe there as it was in the spool."""
        if not keys:
            return
        try:
            self._ledger.sync()
        except OSError as error:
            _log.warning("the spool keeps %d steps that the ledger has, but not synced: %s", len(keys), error)
            return
        for key in keys:
            self._spool.done(key)

    def _keep(self, kept: _Kept) -> None:
        with self._lock:
            self._kept.append(kept)
        self.start_retrying()

    def start_retrying(self) -> None:
        """Bring in what waits, in the background, until nothing does."""
        with self._lock:
            if self._kept and (self._retrier is None or not self._retrier.is_alive()) and not self._closing.is_set():
                retrier = threading.Thread(target=self._retry, name="metered-ai-retry", daemon=True)
                try:
                    retrier.start()
                except RuntimeError:
                    # No thread is to be had now: the next sweep, the next end that fails, or `close` tries again.
                    return
                self._retrier = retrier

    def _retry(self) -> None:
        from tenacity import RetryError, Retrying, retry_if_result, sleep_using_event, stop_when_event_set
        from tenacity.wait import wait_random_exponential

        def waits() -> bool:
            self.replay()
            return bool(self._kept)

        retrying = Retrying(
            retry=retry_if_result(bool),
            wait=wait_random_exponential(multiplier=0.2, max=30),
            stop=stop_when_event_set(self._closing),
            sleep=sleep_using_event(self._closing),
        )
        while True:
            try:
                retrying(waits)
            except RetryError:
                return
            with self._lock:
                if not self._kept:
                    self._retrier = None
                    return

    def close(self, timeout: float) -> bool:
        """Bring in what is under way, for at most `timeout` seconds. What still waits then stays in the spool for the next start."""
        for tick in list(self._ticks.values()):
            tick.flush()
        is_done = self.flush(timeout)
        self._closing.set()
        retrier = self._retrier
        if retrier is not None:
            retrier.join(timeout)
        if self._kept:
            self.replay()
        if self._worker is not None:
            self._queue.put(None)
            if threading.current_thread() is not self._worker:
                self._worker.join(timeout)
        self._spool.close()
        return is_done and not self._kept


class _Tick:
    """Collects the steps of one turn of a loop and hands them over together; wakes their futures together."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settler: Settler) -> None:
        self.loop = loop
        self._settler = settler
        # One entry a step: `close` may empty it from another thread while the loop fills it.
        self._handed: deque[tuple[Step, End | None, asyncio.Future[StepResult | Exception]]] = deque()
        self._is_scheduled = False

    def hand_over(self, step: Step, end: End | None) -> asyncio.Future[StepResult | Exception]:
        # The future only tells of the step, so that cancelling it takes nothing back and it needs no shield.
        future: asyncio.Future[StepResult | Exception] = self.loop.create_future()
        self._handed.append((step, end, future))
        if not self._is_scheduled:
            self._is_scheduled = True
            self.loop.call_soon(self._flush_scheduled)
        return future

    def _flush_scheduled(self) -> None:
        self._is_scheduled = False
        self.flush()

    def flush(self) -> None:
        """Hand over what was collected. Safe from any thread."""
        steps: list[Step] = []
        waiting: list[tuple[End | None, asyncio.Future[StepResult | Exception]]] = []
        while self._handed:
            try:
                step, end, future = self._handed.popleft()
            except IndexError:
                # Another thread was faster.
                break
            steps.append(step)
            waiting.append((end, future))
        if steps:
            self._settler.follow(self._settler._ledger.submit_all(steps), partial(self._done, waiting))

    def _done(
        self, waiting: list[tuple[End | None, asyncio.Future[StepResult | Exception]]], future: Future[Outcomes]
    ) -> None:
        # In the ledger's thread. What failed is kept before anybody is told.
        outcomes = future.result()
        for (end, _), outcome in zip(waiting, outcomes, strict=True):
            if end is not None:
                self._settler._arrived_with(end, outcome)
        try:
            self.loop.call_soon_threadsafe(self._wake, waiting, outcomes)
        except RuntimeError:
            # The loop is closed: nobody waits any more, and everything was brought in.
            _log.debug("an event loop closed before its steps came back")

    @staticmethod
    def _wake(waiting: list[tuple[End | None, asyncio.Future[StepResult | Exception]]], outcomes: Outcomes) -> None:
        for (_, future), outcome in zip(waiting, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)
