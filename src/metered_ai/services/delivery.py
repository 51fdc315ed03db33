"""
The sender: tells a remote billing service of every usage event in a ledger's outbox, until it has it.

At most one request is in flight for a customer and meter, over all threads and processes on the ledger: who sends has claimed the
account. What became of an event is noted in the ledger; a sender that dies leaves a claim whose lease runs out, and the event is sent
again under the same id.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from ..core.delivery import Claimed, Mark, Outgoing, mark_of
from ..errors import BillingUnavailableError, MeteringError
from . import BulkBillingService, Delivery, ServiceRefusedError

if TYPE_CHECKING:
    from ..ledger import ServiceLedger
    from . import BillingService
    from .balances import Balances

__all__ = ["LEASE", "Sender"]

_log = logging.getLogger(__name__)

LEASE = 180.0
"""Seconds of a claim. No method of a service may block for longer than that."""

_THREADS = 4
"""As many requests are in flight at once in a process, each for another account."""

_TOGETHER = 100
"""Events in one request to a service that takes many."""

_OPENS_AFTER = 5
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 60.0
_STOPPED_FOR = 300.0
_REFRESH_AFTER = 1.0
_OLD = 900.0


def _pause(failures: int) -> float:
    """Full jitter: anything between 0 and 0.2 s, doubled with every failure in a row up to 60 s."""
    from tenacity import RetryCallState, Retrying
    from tenacity.wait import wait_random_exponential

    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = failures
    return wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE)(state)


class _Circuit:
    """
    Lets requests through while the service answers. After five failures in a row it is open: one probe at a time, each after a pause.

    `alarm` says that the service refuses us, whatever is sent; then a probe goes every five minutes.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._failures = 0
        self._opens_at = 0.0
        self._is_probing = False
        self.alarm: str | None = None

    @property
    def is_open(self) -> bool:
        return self.alarm is not None or self._failures >= _OPENS_AFTER

    def admit(self) -> tuple[float, bool]:
        """The seconds to wait, 0 to go on; and whether this is a probe of an open circuit, which must say when it is over."""
        with self._lock:
            if not self.is_open:
                return 0.0, False
            wait = self._opens_at - time.monotonic()
            if wait > 0:
                return wait, False
            if self._is_probing:
                return _LONGEST_PAUSE, False
            self._is_probing = True
            return 0.0, True

    def probed(self) -> None:
        with self._lock:
            self._is_probing = False

    def succeeded(self) -> bool:
        """The service answered. True if it had not before."""
        with self._lock:
            was_open = self.is_open
            self._failures, self.alarm = 0, None
            return was_open

    def failed(self, pause: float) -> bool:
        """True if the circuit opens by it."""
        with self._lock:
            was_open = self.is_open
            self._failures += 1
            if self.is_open:
                beyond = max(1, self._failures - _OPENS_AFTER + 1)
                self._opens_at = time.monotonic() + max(pause, _pause(beyond))
            return self.is_open and not was_open

    def stopped(self, reason: str) -> bool:
        """True if this is news."""
        with self._lock:
            is_news = self.alarm is None
            self.alarm = reason
            self._opens_at = time.monotonic() + _STOPPED_FOR
            return is_news

    def retry_now(self) -> None:
        """Let a probe go at once."""
        with self._lock:
            self._opens_at = 0.0


class Sender:
    """
    Sends what is due, in threads that start with the first need, end with `close`, and sleep while nothing is due.

    Events of an account go in order, one request at a time. What fails is tried again after a pause, the account's own; five failures in a row
    over the whole service stop everything but one probe at a time. Nothing is dropped: what the service will never take stays in the outbox.
    After a fork the child starts its own threads.
    """

    def __init__(
        self, ledger: ServiceLedger, service: BillingService, balances: Balances, *, lease: float = LEASE
    ) -> None:
        self._ledger = ledger
        self._service = service
        self._balances = balances
        self._lease = lease
        self._is_bulk = isinstance(service, BulkBillingService)
        self._is_old = False
        self.reset()

    def reset(self) -> None:
        """In a child after a fork: no threads, nothing in flight; the parent's requests are the parent's."""
        self._changed = threading.Condition()
        self._circuit = _Circuit()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._signals = 0
        # For who delivers beside the threads: how many of them are at it, and how often one has ended a turn.
        self._ended = threading.Condition()
        self._busy = 0
        self._turns = 0
        self._behind = 0
        self._closes_at: float | None = None
        # Accounts of which something was delivered since their balance was read, and since when.
        self._outdated: dict[tuple[str, str], float] = {}

    @property
    def alarm(self) -> str | None:
        """Why nothing is sent at all: the service refuses us. None while all is well."""
        return self._circuit.alarm

    # When to send

    def wake(self) -> None:
        """There is something in the outbox. Safe in any thread; never waits for the service or the ledger."""
        with self._changed:
            self._signals += 1
            if not self._threads:
                self._start_thread()
            else:
                self._changed.notify()

    def look(self) -> None:
        """Find what other processes have left, and warn of what has waited for too long."""
        found = self._ledger.undelivered_summary()
        if found.waiting:
            self.wake()
        is_old = found.oldest is not None and found.oldest > _OLD
        if is_old and not self._is_old:
            _log.warning(
                "%s lacks usage events, the oldest of %.0f minutes ago: %d waiting, %d parked, %d dead",
                self._service.name,
                (found.oldest or 0.0) / 60,
                found.waiting,
                found.parked,
                found.dead,
            )
        self._is_old = is_old

    def deliver(self, timeout: float) -> int:
        """Send in this thread what is due, and what becomes due, for at most `timeout` seconds. How many events were acknowledged."""
        until = time.monotonic() + timeout
        self._circuit.retry_now()
        delivered = 0
        while True:
            seen = self._turns
            pause, count = self._turn()
            delivered += count
            left = until - time.monotonic()
            if pause is None or left <= 0:
                break
            if pause == 0:
                continue
            if self.alarm is not None:
                break
            with self._ended:
                if self._turns != seen:
                    continue
                if pause > left and not self._busy:
                    break
                self._ended.wait(min(pause, left))
        self._refresh(all_of_them=True)
        return delivered

    def close(self, timeout: float) -> None:
        """Try what is due now, for at most `timeout` seconds, and end. What is left then stays in the outbox for the next start."""
        with self._changed:
            if self._closes_at is not None:
                return
            self._closes_at = until = time.monotonic() + timeout
            threads, is_owed = list(self._threads), bool(self._signals)
            self._changed.notify_all()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        if is_owed and not threads:
            # There was no thread to be had.
            self._work()

    def abandon(self) -> None:
        """End without trying anything more. Safe in finalizers."""
        with self._changed:
            self._closes_at = time.monotonic()
            self._changed.notify_all()

    # The threads

    def _start_thread(self) -> None:
        if self._closes_at is not None:
            return
        thread = threading.Thread(target=self._work, name="metered-ai-sender", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The program ends, or the system has no thread left: the next event, the next look or `close` tries again.
            return
        self._threads.append(thread)

    def _work(self) -> None:
        failures = 0
        while True:
            seen = self._signals
            with self._ended:
                self._busy += 1
            try:
                pause, _ = self._turn()
                failures = 0
            except Exception as error:  # noqa: BLE001  the thread serves every account
                failures += 1
                pause = _pause(failures)
                if self._closes_at is None and failures == 1:
                    _log.warning("the outbox could not be worked on and will be tried again: %s", error)
            finally:
                with self._ended:
                    self._busy -= 1
                    self._turns += 1
                    self._ended.notify_all()
            if self._closes_at is not None and (pause != 0 or time.monotonic() >= self._closes_at):
                return
            self._refresh(all_of_them=pause != 0)
            if pause != 0:
                with self._changed:
                    if self._signals == seen and self._closes_at is None:
                        self._idle += 1
                        self._changed.wait(pause)
                        self._idle -= 1

    def _more_hands(self) -> None:
        """Another thread for another account, if there is none to spare."""
        with self._changed:
            if self._idle:
                self._changed.notify()
            elif 0 < len(self._threads) < _THREADS:
                self._start_thread()

    # One request

    def _turn(self) -> tuple[float | None, int]:
        """
        Send what is due of one account. The seconds until the next turn (0: there may be more; None: nothing waits), and how many events
        were acknowledged.
        """
        pause, is_probe = self._circuit.admit()
        if pause > 0:
            return pause, 0
        try:
            return self._claim_and_send(is_probe)
        finally:
            if is_probe:
                self._circuit.probed()

    def _claim_and_send(self, is_probe: bool) -> tuple[float | None, int]:
        limit = _TOGETHER if self._is_bulk and not is_probe else 1
        found = self._ledger.claim(os.urandom(12).hex(), self._lease, limit=limit, behind=self._behind)
        if not isinstance(found, Claimed):
            return found, 0
        self._behind = found.account_no
        if not is_probe and self._circuit.is_open:
            # It opened a moment ago; another thread has the news.
            self._ledger.mark(found, ())
            return 0.0, 0
        if self._closes_at is None and not is_probe:
            self._more_hands()
        try:
            return 0.0, self._send(found)
        finally:
            with self._changed:
                # An account is free, or a probe is over: whoever waits looks again.
                self._signals += 1
                self._changed.notify_all()

    def _send(self, claimed: Claimed) -> int:
        began = time.monotonic()
        deliveries = self._write(claimed)
        if deliveries is None:
            # The balance was heard for the first time, and with it the reference that belongs to these events.
            self._ledger.mark(claimed, ())
            return 0

        marks = [
            mark_of(
                outgoing,
                delivery.outcome,
                delivery.reason,
                delivery.details,
                back_off=_pause(claimed.failures + 1),
                retry_after=delivery.retry_after,
                has_namesake=delivery.outcome == "taken"
                and self._ledger.has_namesake(claimed.customer, claimed.meter, outgoing.own_id),
            )
            for outgoing, delivery in zip(claimed.events, deliveries, strict=True)
        ]
        self._note(marks)
        if time.monotonic() - began > self._lease:
            _log.error(
                "%s took longer than the lease of a claim (%g s): usage may have been sent twice at once",
                self._service.name,
                self._lease,
            )
        came_to = self._ledger.mark(claimed, marks)
        self._tell(claimed, marks, came_to)
        delivered = came_to.count("delivered")
        if delivered:
            with self._changed:
                self._outdated.setdefault((claimed.customer, claimed.meter), time.monotonic())
        return delivered

    def _write(self, claimed: Claimed) -> list[Delivery] | None:
        """What the service says of each event; None where they are to be claimed anew."""
        if not claimed.is_heard:
            try:
                self._balances.read(claimed.customer, claimed.meter)
            except ServiceRefusedError as error:
                return [Delivery("stop", str(error))] * len(claimed.events)
            except BillingUnavailableError as error:
                return [Delivery("again", str(error))] * len(claimed.events)
            except MeteringError as error:
                _log.debug("no balance of %r: %s; the service decides what its usage is worth", claimed.customer, error)
            else:
                return None
        # Of 0 there is nothing to tell: what was to be given back has been, or nobody would have replayed it.
        due = [outgoing for outgoing in claimed.events if outgoing.event.amount]
        said = dict(zip((outgoing.no for outgoing in due), self._request(due), strict=True))
        return [said.get(outgoing.no) or Delivery("recorded") for outgoing in claimed.events]

    def _request(self, due: list[Outgoing]) -> list[Delivery]:
        if not due:
            return []
        service, events = self._service, [outgoing.event for outgoing in due]
        try:
            if len(events) == 1:
                return [service.write_usage_event(events[0])]
            assert isinstance(service, BulkBillingService)
            deliveries = service.write_usage_events(events)
        except Exception as error:  # noqa: BLE001  whatever it is, the events are kept
            # Without its text, which nobody has looked through for secrets.
            _log.error("%s raised %s instead of saying what became of an event", service.name, type(error).__name__)
            return [Delivery("again", f"{type(error).__name__} in the service's own code")] * len(events)
        if len(deliveries) != len(events):
            return [Delivery("again", f"{len(deliveries)} answers for {len(events)} events")] * len(events)
        return deliveries

    def _note(self, marks: list[Mark]) -> None:
        """What the answers say about the service as a whole."""
        stop = next((mark for mark in marks if mark.outcome == "stop"), None)
        name = self._service.name
        if stop is not None:
            if self._circuit.stopped(
                f"{name} refuses us: {stop.reason or 'no reason given'}; usage waits in the outbox"
            ):
                _log.error("%s", self._circuit.alarm)
        elif all(mark.outcome == "again" for mark in marks):
            if self._circuit.failed(max(mark.pause for mark in marks)):
                _log.warning("%s does not take usage events (%s); they wait", name, marks[0].reason)
        elif self._circuit.succeeded():
            _log.info("%s takes usage events again", name)

    @staticmethod
    def _tell(claimed: Claimed, marks: list[Mark], came_to: tuple[str, ...]) -> None:
        for outgoing, mark, outcome in zip(claimed.events, marks, came_to, strict=True):
            what = {"park": "parked with all that follows it", "aside": "parked", "dead": "dead-lettered"}.get(outcome)
            if what is not None:
                _log.error(
                    "usage event %r of customer %r on meter %r is %s: %s",
                    outgoing.own_id,
                    claimed.customer,
                    claimed.meter,
                    what,
                    mark.reason,
                )

    def _refresh(self, *, all_of_them: bool) -> None:
        """Read the balances of accounts whose usage was delivered: when nothing is due, or a second after the first."""
        if self._closes_at is not None or self._circuit.is_open:
            return
        now = time.monotonic()
        with self._changed:
            keys = [key for key, since in self._outdated.items() if all_of_them or now - since >= _REFRESH_AFTER]
            for key in keys:
                del self._outdated[key]
        for customer, meter in keys:
            try:
                self._balances.read(customer, meter)
            except MeteringError as error:
                # Nothing is lost: before the next hold it is asked for again, if it has grown too old.
                _log.debug("the balance of %r on %r was not refreshed: %s", customer, meter, error)
