"""How a hold shows that its owner lives: ids of owners and holds, and the one thread that renews leases."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable

__all__ = ["Heartbeat", "heartbeat", "new_hold_id", "new_owner"]

_log = logging.getLogger(__name__)


class _Made:
    """What ids of holds are made of: the last time in milliseconds, and a count from a random start."""

    ms = 0

    def __init__(self) -> None:
        self.reseed()

    def reseed(self) -> None:
        # The highest of the 72 bits starts as 0, so that counting up never overflows.
        self.count = itertools.count(int.from_bytes(os.urandom(9)) >> 1)


_made = _Made()


def new_owner() -> str:
    """
    A new id for a process that owns holds: `o` and 80 random bits. It says nothing about the machine.

    Each call gives another one. A process keeps one, and asks for a new one after a fork.
    """
    return "o" + os.urandom(10).hex()


def new_hold_id() -> str:
    """
    A new id for a hold: `h`, the time in milliseconds and 72 bits more, in hexadecimal digits that sort by the time.

    Ids of one thread only grow, also when the clock is set back. Threads and forks never get the same one.
    """
    ms = time.time_ns() // 1_000_000
    if ms < _made.ms:
        ms = _made.ms
    else:
        _made.ms = ms
    # One C call that no other thread can interrupt: there is no lock that a signal handler or a fork could find taken.
    return f"h{ms:011x}{next(_made.count):018x}"


class _Job:
    """What one ledger wants done, when it is due next, and which failures were logged since it last went well."""

    __slots__ = ("beat", "beat_at", "every", "failures", "is_renewed", "key", "sweep", "sweep_at", "sweep_every")

    def __init__(
        self, key: object, beat: Callable[[], None], every: float, sweep: Callable[[], None] | None, sweep_every: float
    ) -> None:
        now = time.monotonic()
        self.key = key
        self.beat = beat
        self.every = every
        self.beat_at = now + every
        self.sweep = sweep
        self.sweep_every = sweep_every
        self.sweep_at = now + sweep_every if sweep is not None else float("inf")
        self.is_renewed = False
        self.failures: set[tuple[str, type[Exception]]] = set()

    @property
    def due_at(self) -> float:
        return min(self.beat_at, self.sweep_at)


class Heartbeat:
    """
    Renews leases for all ledgers of a process, in one daemon thread that exists only while something is watched.

    A sweep runs only right after a beat of the same ledger that went well, so that a machine that slept, or a process that
    was stopped, renews its own lease before it looks for holds whose owner is gone.
    Beats run one after another: a beat that blocks delays the others by that long, so the time all beats may block, added up,
    must stay well below the shortest lease. After a fork the child watches nothing.
    """

    _jobs: dict[object, _Job]
    _thread: threading.Thread | None

    def __init__(self) -> None:
        self._reset()

    def watch(
        self,
        key: object,
        beat: Callable[[], None],
        every: float,
        *,
        sweep: Callable[[], None] | None = None,
        sweep_every: float = 60.0,
    ) -> None:
        """
        Call `beat` every `every` seconds, and `sweep` every `sweep_every`, from now on; the first time after that long.

        Watching a key again replaces what it had. What they raise is logged, once for each kind until it goes well again.
        `beat` and `sweep`, and what they are bound to, are kept alive until `forget`.
        """
        if not every > 0 or not sweep_every > 0:
            raise ValueError(f"a heartbeat needs times above 0, not every={every!r}, sweep_every={sweep_every!r}")
        with self._changed:
            self._jobs[key] = _Job(key, beat, every, sweep, sweep_every)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="metered-ai-heartbeat", daemon=True)
                self._thread.start()
            self._changed.notify()

    def forget(self, key: object) -> None:
        """Stop watching. A beat that is running is not waited for, but what it raises is no longer logged. Twice changes nothing."""
        with self._changed:
            self._jobs.pop(key, None)
            self._changed.notify()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._jobs = {}
        self._thread = None

    def _run(self) -> None:
        while due := self._wait():
            now = time.monotonic()
            for job in due:
                self._beat(job)
            for job in due:
                if job.sweep is not None and job.sweep_at <= now:
                    self._sweep(job, job.sweep)

    def _wait(self) -> list[_Job]:
        """Sleep until something is due. Nothing left to watch ends the thread: empty."""
        with self._changed:
            while self._jobs:
                now = time.monotonic()
                due = [job for job in self._jobs.values() if job.due_at <= now]
                if due:
                    return due
                self._changed.wait(min(job.due_at for job in self._jobs.values()) - now)
            self._thread = None
            return []

    def _beat(self, job: _Job) -> None:
        job.is_renewed = self._do(job, "beat", job.beat)
        job.beat_at = time.monotonic() + job.every

    def _sweep(self, job: _Job, sweep: Callable[[], None]) -> None:
        # The others' beats and sweeps may have taken so long that this lease needs renewing once more.
        if job.beat_at <= time.monotonic():
            self._beat(job)
        if job.is_renewed:
            self._do(job, "sweep", sweep)
            job.sweep_at = time.monotonic() + job.sweep_every
        else:
            job.sweep_at = job.beat_at

    def _do(self, job: _Job, what: str, action: Callable[[], None]) -> bool:
        if self._jobs.get(job.key) is not job:
            return False
        try:
            action()
        except Exception as error:  # noqa: BLE001  # Whatever it is, the other ledgers' leases must be renewed.
            kind = (what, type(error))
            if kind not in job.failures and self._jobs.get(job.key) is job:
                job.failures.add(kind)
                _log.warning("The %s of a ledger failed and will be tried again: %s", what, error, exc_info=True)
            return False
        job.failures = {kind for kind in job.failures if kind[0] != what}
        return True


heartbeat = Heartbeat()
"""The one of this process."""


def _after_fork() -> None:
    _made.reseed()
    heartbeat._reset()


os.register_at_fork(after_in_child=_after_fork)
