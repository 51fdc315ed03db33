"""What a service says of balances: asked as seldom as may be, and told to the ledger, which decides."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from copy import copy
from typing import TYPE_CHECKING

from ..errors import BillingUnavailableError, MeteringError, NoSubscriptionError

if TYPE_CHECKING:
    from ..ledger import ServiceLedger
    from . import BillingService

__all__ = ["Balances"]

_KNOWN_AT_MOST = 10_000

_ANY = float("-inf")

_Key = tuple[str, str]


class _Read:
    """One question to the service that several may wait for; `future` gives what failed, or None."""

    __slots__ = ("began", "behind", "following", "future")

    def __init__(self, behind: _Read | None) -> None:
        # One that waits for another will begin later than anybody who can find it now.
        self.began = time.monotonic() if behind is None else float("inf")
        self.behind = behind
        self.following: _Read | None = None
        self.future: Future[Exception | None] = Future()
        # Whoever waits may be cancelled; the others wait on.
        self.future.set_running_or_notify_cancel()


class Balances:
    """
    Keeps balances younger than `max_age` seconds, and reads each account at most once at a time in a process.

    The age counts from the question. What another process has heard counts, too: it is in the ledger.
    """

    def __init__(self, ledger: ServiceLedger, service: BillingService, max_age: float) -> None:
        self._ledger = ledger
        self._service = service
        self._max_age = max_age
        self.reset()

    def reset(self) -> None:
        """In a child after a fork: nobody waits for anything."""
        self._lock = threading.Lock()
        self._reads: dict[_Key, _Read] = {}
        self._fresh_until: dict[_Key, float] = {}
        self._answered: dict[_Key, float] = {}

    def now(self) -> float:
        """The clock that `since` is read from."""
        return time.monotonic()

    def is_fresh(self, customer: str, meter: str) -> bool:
        """The balance in the ledger was heard within `max_age`, as far as this process knows without looking."""
        return time.monotonic() < self._fresh_until.get((customer, meter), 0.0)

    def forget(self, customer: str, meter: str) -> None:
        """Ask anew before the next hold."""
        self._fresh_until.pop((customer, meter), None)

    def freshen(self, customer: str, meter: str) -> None:
        """Have a balance that is young enough; the service is asked only if need be. Raises what `read` does."""
        if not self._is_heard(customer, meter):
            self.read(customer, meter, since=_ANY)

    async def afreshen(self, customer: str, meter: str) -> None:
        """`freshen`, without blocking the loop."""
        if not await asyncio.to_thread(self._is_heard, customer, meter):
            await self.aread(customer, meter, since=_ANY)

    def read(self, customer: str, meter: str, *, since: float | None = None) -> None:
        """
        Have the service's answer in the ledger to a question that was asked after `since` (now); any that is under way will do for `_ANY`.

        Raises NoSubscriptionError as the service does, BillingUnavailableError where it could not be asked.
        """
        key = (customer, meter)
        read, is_first = self._join(key, time.monotonic() if since is None else since)
        if read is None:
            return
        if is_first:
            self._carry_out(read, key)
        _raise(read.future.result())

    async def aread(self, customer: str, meter: str, *, since: float | None = None) -> None:
        """`read`, in a thread. A cancellation leaves it running for the others that wait."""
        key = (customer, meter)
        read, is_first = self._join(key, time.monotonic() if since is None else since)
        if read is None:
            return
        if is_first:
            asyncio.get_running_loop().run_in_executor(None, self._carry_out, read, key)
        _raise(await asyncio.wrap_future(read.future))

    def _is_heard(self, customer: str, meter: str) -> bool:
        """Another process may have asked."""
        ago = self._ledger.heard_ago(customer, meter)
        if ago is None or ago >= self._max_age:
            return False
        self._note((customer, meter), time.monotonic() + self._max_age - ago)
        return True

    def _note(self, key: _Key, until: float) -> None:
        if len(self._fresh_until) >= _KNOWN_AT_MOST:
            self._fresh_until.clear()
            self._answered.clear()
        self._fresh_until[key] = until

    def _join(self, key: _Key, since: float) -> tuple[_Read | None, bool]:
        """A read to wait for, and whether it is to be carried out by who asks; None where it has been."""
        with self._lock:
            running = self._reads.get(key)
            if since == _ANY:
                # Somebody else's answer may have come since this caller looked.
                is_known = self.is_fresh(*key)
            else:
                is_known = since < self._answered.get(key, _ANY)
            if is_known:
                return None, False
            if running is None:
                running = self._reads[key] = _Read(None)
                return running, True
            if running.began > since:
                return running, False
            if running.following is None:
                # The one under way may not know yet what happened before this call: a top-up.
                running.following = _Read(running)
                return running.following, True
            return running.following, False

    def _carry_out(self, read: _Read, key: _Key) -> None:
        outcome: Exception | None = BillingUnavailableError("the question for the balance was interrupted")
        try:
            if read.behind is not None:
                read.behind.future.result()
                read.behind = None
                read.began = time.monotonic()
            self._ask(key)
            self._answered[key] = read.began
            outcome = None
        except Exception as error:  # noqa: BLE001  everybody who waits is told
            outcome = error
        finally:
            with self._lock:
                if self._reads.get(key) is read:
                    if read.following is None:
                        del self._reads[key]
                    else:
                        self._reads[key] = read.following
                elif read.behind is not None:
                    # Interrupted while it waited for its turn.
                    read.behind.following = None
            read.future.set_result(outcome)

    def _ask(self, key: _Key) -> None:
        customer, meter = key
        asked = time.monotonic()
        question = self._ledger.ask(customer, meter)
        try:
            found = self._service.read_balance(customer, meter)
        except NoSubscriptionError:
            self.forget(customer, meter)
            raise
        except MeteringError:
            raise
        except Exception as error:
            raise BillingUnavailableError(
                f"the balance of customer {customer!r} on meter {meter!r} could not be read from {self._service.name}: {error}"
            ) from error
        self._ledger.hear(question, found.available, reference=found.reference, limit=found.limit)
        self._note(key, asked + self._max_age)


def _raise(failed: Exception | None) -> None:
    if failed is not None:
        # One for each, because each caller's traceback is written into its own.
        raise copy(failed) from failed
