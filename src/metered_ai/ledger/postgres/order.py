"""
Which steps must wait for which: what one thread hands over is done in the order it was handed over, on whatever connection.

Steps of different accounts never wait for each other. Of one account a hold's end waits for its place only, so that holds can never
keep a settle waiting; a place waits for the ends before it, which may make room for it; everything else waits for all before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ...core.steps import Enlarge, Place, Release, Renew, Settle
from ..book import Sweep
from ..commits import Commits, Job
from ..serving import ServiceStep

__all__ = ["Order", "Ticket"]

_LOOKS_EVERY = 0.1
_OF_NO_ACCOUNT = Renew | Sweep | ServiceStep


class Ticket:
    """A step under way. `start` hands it over once nothing is before it."""

    __slots__ = (
        "account",
        "goes_on",
        "is_aside",
        "is_in_doubt",
        "job",
        "lane",
        "step",
        "then",
        "trouble",
        "waits",
        "where",
    )

    def __init__(self, step: Any) -> None:
        self.step = step
        # Nobody waits for a service's steps, and whoever hears does not go on before it has heard.
        self.account = None if isinstance(step, _OF_NO_ACCOUNT) else (step.customer, step.meter)
        # What is handed over, and where to, once nothing is before it; None when that is done.
        self.job: Job | None = None
        self.lane: Commits | None = None
        # The lane that it is in now, and the one that it goes on in.
        self.where: Commits | None = None
        self.goes_on: Commits | None = None
        self.then: list[Ticket] = []
        self.waits = 0
        # Its account is locked by somebody else, so that it waits where it holds up nobody.
        self.is_aside = False
        # Why it has not been done yet.
        self.trouble: Exception | None = None
        # An answer was lost: it may have been done, or be done yet.
        self.is_in_doubt = False


class Order:
    """
    Keeps the steps under way, by account.

    One that has to wait longer than its patience is given to `expire`, and is under way no more.
    """

    def __init__(self, expire: Callable[[Job], None], ends: Commits) -> None:
        self._expire = expire
        self._ends = ends
        self._lock = threading.Lock()
        self._accounts: dict[tuple[str, str], dict[Ticket, None]] = {}
        self._aside: dict[tuple[str, str], int] = {}
        self._waiting: dict[Ticket, None] = {}
        self._has_waiting = threading.Event()
        self._watcher: threading.Thread | None = None
        self._is_over = False

    def enter(self, ticket: Ticket, job: Job, lane: Commits) -> Commits | None:
        """Note a step; where it may go at once. None if it has to wait: then its job is handed to the lane when it may."""
        ticket.where = lane
        if ticket.account is None:
            return lane
        with self._lock:
            others = self._accounts.get(ticket.account)
            if others is None:
                self._accounts[ticket.account] = {ticket: None}
                return lane
            before = [other for other in others if _waits_for(ticket.step, other.step)]
            if type(ticket.step) is Place and self._may_follow(others, before):
                # Behind the ends of its account, in their lane, it neither waits for them nor meets them at the account's row.
                before = []
                lane = ticket.where = self._ends
            others[ticket] = None
            if not before:
                return lane
            for other in before:
                other.then.append(ticket)
            ticket.waits = len(before)
            ticket.where = None
            job.since = time.monotonic()
            ticket.job, ticket.lane = job, lane
            self._waiting[ticket] = None
        self._watch()
        return None

    def _may_follow(self, others: Iterable[Ticket], before: list[Ticket]) -> bool:
        ends = self._ends
        return any(other.where is ends for other in others) and all(other.where is ends for other in before)

    @property
    def is_idle(self) -> bool:
        """Nothing is under way."""
        return not self._accounts

    def put_aside(self, ticket: Ticket) -> None:
        """Note that a step's account is locked by somebody else: until it has ended, others of the account go the same way."""
        if ticket.account is not None and not ticket.is_aside:
            with self._lock:
                ticket.is_aside = True
                ticket.where = None
                self._aside[ticket.account] = self._aside.get(ticket.account, 0) + 1

    def is_aside(self, ticket: Ticket) -> bool:
        """True where an earlier step of the account waits for somebody else's lock."""
        return bool(self._aside) and ticket.account in self._aside

    def hurry(self, ticket: Ticket) -> bool:
        """Let a step go that waits; False if it has gone already."""
        with self._lock:
            is_here = ticket.job is not None
            ticket.job = ticket.lane = None
            self._waiting.pop(ticket, None)
        return is_here

    def leave(self, tickets: Iterable[Ticket]) -> None:
        """Steps have ended: hand over what waited for them."""
        with self._lock:
            free = [waiting for ticket in tickets for waiting in self._remove(ticket)]
        _hand_over(free)

    def _remove(self, ticket: Ticket) -> list[tuple[Job, Commits]]:
        """Forget a step; what waited for nothing else, and where that goes."""
        others = None if ticket.account is None else self._accounts.get(ticket.account)
        if ticket.account is None or others is None or ticket not in others:
            return []
        del others[ticket]
        if ticket.is_aside:
            self._aside[ticket.account] -= 1
            if not self._aside[ticket.account]:
                del self._aside[ticket.account]
        if not others:
            del self._accounts[ticket.account]
        free: list[tuple[Job, Commits]] = []
        for waiting in ticket.then:
            waiting.waits -= 1
            if waiting.waits == 0 and waiting.job is not None and waiting.lane is not None:
                free.append((waiting.job, waiting.lane))
                waiting.where = waiting.lane
                waiting.job = waiting.lane = None
                self._waiting.pop(waiting, None)
        ticket.then = []
        return free

    def _watch(self) -> None:
        """Have somebody look after those that wait. That takes a thread, because whom they wait for may hang."""
        if self._watcher is None:
            with self._lock:
                if self._watcher is None:
                    watcher = threading.Thread(target=self._look_after, name="metered_ai order", daemon=True)
                    try:
                        watcher.start()
                    except RuntimeError:
                        # The interpreter shuts down: whom they wait for ends, well or not.
                        return
                    self._watcher = watcher
        if not self._has_waiting.is_set():
            self._has_waiting.set()

    def _look_after(self) -> None:
        while True:
            self._has_waiting.wait()
            self._has_waiting.clear()
            if self._is_over:
                return
            while self._waiting:
                time.sleep(_LOOKS_EVERY)
                for job in self._overdue():
                    self._expire(job)

    def _overdue(self) -> list[Job]:
        overdue: list[Job] = []
        free: list[tuple[Job, Commits]] = []
        with self._lock:
            for ticket in list(self._waiting):
                if ticket.job is not None and ticket.job.is_out_of_patience():
                    overdue.append(ticket.job)
                    ticket.job = ticket.lane = None
                    del self._waiting[ticket]
                    free += self._remove(ticket)
        _hand_over(free)
        return overdue

    def stop(self) -> None:
        """End the thread, if there is one. Nothing is under way any more."""
        self._is_over = True
        self._has_waiting.set()


def _hand_over(free: Iterable[tuple[Job, Commits]]) -> None:
    for job, lane in free:
        lane.hand_over(job)


def _waits_for(step: Any, other: Any) -> bool:
    kind, before = type(step), type(other)
    if kind is Settle or kind is Release:
        if before is Place or before is Enlarge or before is Settle or before is Release:
            return bool(step.hold_id == other.hold_id)
        return True
    if kind is Place and before is Place:
        return bool(step.hold_id == other.hold_id or (step.operation is not None and step.operation == other.operation))
    return True
