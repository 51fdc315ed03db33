"""
Who does a step, and when: a lone caller in its own thread at once, contended callers together in one transaction.

There is one turn. Who finds it free takes it and does its own step. Who finds it taken leaves the step in a queue; a writer
thread then does all that is queued as one transaction, and its one fsync serves them all. Nothing here blocks but a caller
who waits for its own result.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

__all__ = ["Commits", "Handed", "Job", "Locked", "OneOfSeveral", "Several"]

_log = logging.getLogger("metered_ai.ledger")

AT_ONCE = 256
"""Steps in one transaction at most."""

_FIRST_WAIT = 0.0005
_LONGEST_WAIT = 0.005


class Locked(Exception):  # noqa: N818  It is no failure: the step waits.
    """Another process has the ledger; nothing was done."""


class Job:
    """One step, how long it may wait for a lock, and in the end its result or error."""

    __slots__ = ("error", "is_done", "lock", "patience", "result", "since", "step")

    def __init__(self, step: Any, patience: float) -> None:
        self.step = step
        self.patience = patience
        self.since = 0.0
        self.result: Any = None
        self.error: Exception | None = None
        self.is_done = False
        self.lock: Any = None

    def note(self, outcome: object) -> None:
        """Keep what the step came to, a result or an error."""
        if isinstance(outcome, Exception):
            self.result, self.error = None, outcome
        else:
            self.result, self.error = outcome, None

    def finish(self) -> None:
        """Tell whoever waits. The result or the error is set."""
        self.is_done = True
        if self.lock is not None:
            self.lock.release()

    def is_out_of_patience(self) -> bool:
        return time.monotonic() - self.since >= self.patience


class Handed(Job):
    """A step that somebody handed over and went on."""

    __slots__ = ("future",)

    def __init__(self, step: Any, patience: float) -> None:
        super().__init__(step, patience)
        self.future: Future[Any] = Future()
        # A step, once handed over, cannot be taken back: `cancel` of the future changes nothing.
        self.future.set_running_or_notify_cancel()

    def finish(self) -> None:
        self.is_done = True
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Several:
    """Steps that were handed over together, with one future for all."""

    __slots__ = ("future", "others", "outcomes")

    def __init__(self, count: int) -> None:
        self.future: Future[list[Any]] = Future()
        self.future.set_running_or_notify_cancel()
        self.outcomes: list[Any] = [None] * count
        # Counted by single operations, because two threads may note at once.
        self.others = iter(range(count - 1))

    def note(self, index: int, outcome: Any) -> None:
        self.outcomes[index] = outcome
        if next(self.others, None) is None:
            self.future.set_result(self.outcomes)


class OneOfSeveral(Job):
    __slots__ = ("group", "index")

    def __init__(self, step: Any, patience: float, group: Several, index: int) -> None:
        super().__init__(step, patience)
        self.group = group
        self.index = index

    def finish(self) -> None:
        self.is_done = True
        self.group.note(self.index, self.error if self.error is not None else self.result)


class Commits:
    """
    Gives steps to `work`, which does jobs as one transaction and sets their results, or one step to `alone`, which returns its result.

    Where somebody else has the ledger locked, `work` returns the jobs it could not begin, and `alone` raises Locked; `locked` makes
    the error of a job that has waited long enough for that; tries are `longest_wait` apart at most. A job that `work` takes out of its list
    is finished by somebody else. Where nothing is gained by sharing a transaction (`shares` False),
    every caller who waits anyway does its own step, one after another by `alone`'s own lock.
    """

    def __init__(
        self,
        alone: Callable[[Any], Any],
        work: Callable[[list[Job]], list[Job]],
        locked: Callable[[Job], Exception],
        name: str,
        *,
        shares: bool,
        longest_wait: float = _LONGEST_WAIT,
    ) -> None:
        self._alone = alone
        self._work = work
        self._locked = locked
        self._name = name
        self._shares = shares
        self._longest_wait = longest_wait
        self.reset()

    def reset(self) -> None:
        """Forget threads, locks and steps: after a fork they are the parent's."""
        self._queue: deque[Job] = deque()
        # The turn is taken by `setdefault` and given back by `pop`: single operations that no signal handler can split.
        self._turn: dict[int, object] = {}
        self._wakeup: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._is_over = False

    def run(self, step: Any, patience: float) -> Any:
        """Do one step and return its result, or raise its error."""
        try:
            if not self._shares:
                # Not past those who wait in the queue: the lock is not a fair one.
                return self._share(step, patience) if self._queue else self._alone(step)
            holder = object()
            try:
                if not self._queue and self._turn.setdefault(0, holder) is holder:
                    return self._alone(step)
            finally:
                # Twice, so that a second KeyboardInterrupt in the middle of this cannot keep the turn for ever.
                try:
                    self._leave(holder)
                finally:
                    self._leave(holder)
        except Locked:
            _log.debug("another process has the ledger; the step waits in the queue")
        return self._share(step, patience)

    def _share(self, step: Any, patience: float) -> Any:
        """Leave a step to the writer thread and wait for it."""
        job = Job(step, patience)
        job.lock = _thread.allocate_lock()
        job.lock.acquire()
        self.hand_over(job)
        return self.wait(job)

    def wait(self, job: Job) -> Any:
        """Wait for a job with a lock that was handed over; its result, or raise its error."""
        if self._thread is not None and self._thread.ident == _thread.get_ident():
            # A callback of a future, run by the writer itself: nobody else would do the step.
            self._serve(job)
        else:
            job.lock.acquire()
        if job.error is not None:
            raise job.error
        return job.result

    def submit(self, step: Any, patience: float) -> Future[Any]:
        job = Handed(step, patience)
        self.hand_over(job)
        return job.future

    def submit_all(self, steps: Sequence[tuple[Any, float, Exception | None]]) -> Future[list[Any]]:
        """Hand over steps with their patience; one that comes with an error has failed already."""
        group = Several(len(steps))
        if not steps:
            group.future.set_result([])
        now = time.monotonic()
        for index, (step, patience, error) in enumerate(steps):
            if error is None:
                job = OneOfSeveral(step, patience, group, index)
                job.since = now
                self._queue.append(job)
            else:
                group.note(index, error)
        self._wake()
        return group.future

    @property
    def is_mine(self) -> bool:
        """True in the writer thread itself, where a callback runs."""
        return self._thread is not None and self._thread.ident == _thread.get_ident()

    def drain(self) -> None:
        """Wait until everything handed over so far has been done."""
        while self._queue or self._turn:
            barrier = Job(None, float("inf"))
            barrier.lock = _thread.allocate_lock()
            barrier.lock.acquire()
            self.hand_over(barrier)
            barrier.lock.acquire()

    def stop(self) -> None:
        """End the writer thread, after `drain`. Who comes later is served in its own thread."""
        self._is_over = True
        thread = self._thread
        if thread is not None and thread.ident != _thread.get_ident():
            self._wakeup.put(False)
            thread.join()
        self._thread = None
        # From a caller that found the ledger locked and woke the thread at its end.
        self._do_all()

    def hand_over(self, job: Job) -> None:
        """Leave a job to the writer thread."""
        job.since = time.monotonic()
        self._queue.append(job)
        self._wake()

    def _leave(self, holder: object) -> None:
        if self._turn.get(0) is holder:
            self._turn.pop(0)
        if self._queue:
            self._wake()

    def _wake(self) -> None:
        # Whoever has the turn looks at the queue when it leaves, so that a step appended before this look is never forgotten.
        if not self._queue or self._turn:
            return
        if self._thread is None and (self._is_over or not self._start()):
            # Better late here than never; and with no lock held, because a callback may come with a step of its own.
            self._do_all()
            return
        # One token wakes it, however many have come; no flag, because an interrupt could leave that in the wrong state.
        if self._wakeup.empty():
            self._wakeup.put(True)

    def _start(self) -> bool:
        """Start the writer thread; False where the interpreter shuts down, or the system has no thread left."""
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name=f"{self._name} writer", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return False
                self._thread = thread
        return True

    def _serve(self, until: Job | None = None) -> None:
        """Do what is queued whenever somebody wakes this thread; with `until`, return as soon as that job is done."""
        while until is None or not until.is_done:
            if not self._wakeup.get():
                # For the next one: an interrupt at the start of this thread may have led to a second.
                self._wakeup.put(False)
                return
            self._do_all()

    def _do_all(self) -> None:
        """Do what is queued, unless somebody else has the turn, who wakes us when it leaves."""
        holder = object()
        wait = _FIRST_WAIT
        while self._queue and self._turn.setdefault(0, holder) is holder:
            try:
                done, is_locked = self._do_queued()
            finally:
                self._turn.pop(0)
            # After the turn has been given back: a callback may come with a step of its own.
            for job in done:
                try:
                    job.finish()
                except BaseException:  # noqa: BLE001  A callback's, and the others are waiting.
                    _log.exception("a callback of a step failed")
            if is_locked:
                time.sleep(wait)
            wait = min(wait * 1.5, self._longest_wait) if is_locked else _FIRST_WAIT

    def _do_queued(self) -> tuple[list[Job], bool]:
        """Do what is queued in one transaction; return what is done or has waited too long, and whether the ledger was locked."""
        batch: list[Job] = []
        while self._queue and len(batch) < AT_ONCE:
            batch.append(self._queue.popleft())
        steps = [job for job in batch if job.step is not None]
        count = len(steps)
        try:
            left = self._work(steps) if steps else steps
        except Exception as error:  # noqa: BLE001  Whatever it is, nobody may wait for ever.
            left = []
            for job in steps:
                job.error = job.error or error
        if len(steps) != count:
            kept = set(map(id, steps))
            batch = [job for job in batch if job.step is None or id(job) in kept]
        if not left:
            return batch, False

        undone = set(map(id, left))
        done = [job for job in batch if job.step is not None and id(job) not in undone]
        queued = [job for job in batch if job.step is None or id(job) in undone]
        while self._queue:
            queued.append(self._queue.popleft())
        waiting: list[Job] = []
        for job in queued:
            if job.is_out_of_patience():
                job.error = self._locked(job)
                done.append(job)
            else:
                waiting.append(job)
        self._queue.extendleft(reversed(waiting))
        return done, True
