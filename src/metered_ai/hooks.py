"""Tells an application that a balance runs low and that a call was refused: after the fact, on a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from inspect import iscoroutine
from queue import SimpleQueue
from typing import TYPE_CHECKING

from .core.steps import Settled
from .errors import InsufficientCreditsError
from .records import Balance, UsageEvent

if TYPE_CHECKING:
    from .ledger import Ledger

__all__ = ["THRESHOLDS", "Hooks", "LowBalance", "Refusal", "crossed"]

_log = logging.getLogger(__name__)

THRESHOLDS = (80, 90, 100)
"""Per cent of the limit at which `on_low_balance` is told."""

WAITING = 10_000
"""So much may wait for a slow hook. What comes then is dropped, and that is logged."""

_REMEMBERED = 10_000
_CLOSING_SECONDS = 5.0
_TICK = timedelta(microseconds=1)
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class LowBalance:
    """A customer has used `threshold` (80, 90 or 100) per cent of the credits on a meter. `balance` is as of now, and may be further on."""

    customer: str
    meter: str
    threshold: int
    balance: Balance


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call or a charge was refused for want of credits: what was `available`, `required`, and `held` by calls in flight."""

    customer: str
    meter: str
    available: int
    required: int
    held: int
    is_transient: bool


def crossed(limit: int, before: int, after: int, *, is_first: bool) -> list[int]:
    """
    The thresholds that a usage event has reached which took `before` credits used to `after`.

    The first event of a period tells of all that are reached, because a new period begins with nothing told. Without any credits
    there is nothing to run low: only the end is told.
    """
    if limit <= 0:
        return [100] if is_first or before < limit else []
    return [
        threshold
        for threshold in THRESHOLDS
        if after * 100 // limit >= threshold and (is_first or before * 100 // limit < threshold)
    ]


class Hooks:
    """
    Calls the application's functions, one at a time, in the order of what happened.

    - Nothing of it runs in a call: a call only notes what happened. A hook that is slow, fails or never returns is nobody else's matter.
    - Each threshold is told once in a period, by the process that recorded the usage event which reached it, whatever others do. A period of an
      account begins when credits are granted to it, and when some expire.
    - At most once: what waits when a process is killed is not told any more.
    """

    def __init__(
        self,
        on_low_balance: Callable[[LowBalance], object] | None,
        on_refused: Callable[[Refusal], object] | None,
    ) -> None:
        self._on_low_balance = on_low_balance
        self._on_refused = on_refused
        # What this process has told: an event that is recorded again must not be told again.
        self._told: OrderedDict[tuple[str, str], tuple[datetime, set[int]]] = OrderedDict()
        self._reset()

    def _reset(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._dropped = 0
        self._is_closed = False

    def after_fork(self) -> None:
        """In the child: what waits in the parent is the parent's to tell."""
        self._reset()

    # In the call: only a note.

    def settled(self, ledger: Ledger, settled: Settled) -> None:
        """Note how a call ended. What was recorded before is no news."""
        if settled.outcome in ("settled", "late", "corrected"):
            self.used(ledger, settled.event)

    def used(self, ledger: Ledger, event: UsageEvent) -> None:
        """Note that credits were used."""
        if self._on_low_balance is not None and event.amount and not event.is_unlimited:
            self._note(lambda: self._look(ledger, event))

    def revoked(self, ledger: Ledger, customer: str, meter: str) -> None:
        """Note that an account has fewer credits than before."""
        if self._on_low_balance is not None:
            self._note(lambda: self._look_anew(ledger, customer, meter))

    def refused(self, error: InsufficientCreditsError) -> None:
        """Note a refusal. Its numbers only: the error holds on to the call that it came from."""
        tell = self._on_refused
        if tell is not None:
            refusal = Refusal(
                error.customer, error.meter, error.available, error.required, error.held, error.is_transient
            )
            self._note(lambda: self._call(tell, refusal, "on_refused"))

    def _note(self, tell: Callable[[], None]) -> None:
        if self._is_closed or self._waiting.qsize() >= WAITING:
            self._drop()
            return
        self._waiting.put(tell)
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._start()

    def _drop(self) -> None:
        self._dropped += 1
        if self._dropped == 1:
            _log.error("hooks are too slow or closed: from now on some of what happens is not told to them")

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            thread = threading.Thread(target=self._work, args=(self._waiting,), name="metered-ai-hooks", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # It stays in the queue; the next one tries again.
                _log.error("hooks cannot be told now: %s", error)
                return
            self._thread = thread

    # On the hooks' own thread.

    def _work(self, waiting: SimpleQueue[Callable[[], None] | None]) -> None:
        while (tell := waiting.get()) is not None:
            try:
                tell()
            except Exception as error:  # noqa: BLE001  the thread serves every account
                _log.error("whether a balance runs low could not be found out (%s)", type(error).__name__)

    def _look(self, ledger: Ledger, event: UsageEvent) -> None:
        customer, meter = event.customer, event.meter
        balance = ledger.balance(customer, meter)
        if not _is_low(balance):
            return
        # Others go on meanwhile. Balance and sum belong together where no use came between two looks at the balance.
        after = balance.used
        for _ in range(20):
            later = ledger.usage(customer, meter, event.created_at + _TICK, None, ("meter",))
            after = balance.used - sum(each.amount for each in later)
            again = ledger.balance(customer, meter)
            if again.used == balance.used:
                break
            balance = again

        period = _period(ledger, customer, meter, event.created_at)
        if period is None or balance.limit is None:
            return
        since = ledger.usage_events(customer, meter, period, event.created_at)
        is_first = not any(earlier.amount and not earlier.is_unlimited for earlier in since)
        self._tell(balance, period, crossed(balance.limit, after - event.amount, after, is_first=is_first))

    def _look_anew(self, ledger: Ledger, customer: str, meter: str) -> None:
        balance = ledger.balance(customer, meter)
        period = _period(ledger, customer, meter, datetime.now(UTC))
        if balance.limit is not None and period is not None and _is_low(balance):
            self._tell(balance, period, crossed(balance.limit, 0, balance.used, is_first=True))

    def _tell(self, balance: Balance, period: datetime, thresholds: list[int]) -> None:
        tell = self._on_low_balance
        account = (balance.customer, balance.meter)
        begun, told = self._told.get(account, (period, set[int]()))
        if begun != period:
            told = set[int]()
        self._told[account] = (period, told)
        self._told.move_to_end(account)
        if len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        for threshold in thresholds:
            if tell is not None and threshold not in told:
                told.add(threshold)
                self._call(tell, LowBalance(*account, threshold, balance), "on_low_balance")

    def _call(self, tell: Callable[..., object], what: LowBalance | Refusal, name: str) -> None:
        try:
            result = tell(what)
            if iscoroutine(result):
                result.close()
                raise TypeError("a hook is called on a thread without an event loop and must not be async")
        except Exception as error:  # noqa: BLE001  it is the application's, and may raise anything
            # Its words may be about the customer's call.
            _log.error(
                "%s failed for customer %r on meter %r (%s)", name, what.customer, what.meter, type(error).__name__
            )

    def close(self) -> None:
        """Tell what waits, for a few seconds at most."""
        self._is_closed = True
        # Also where no thread is known yet: a hook may close its own billing before its thread's start has returned.
        self._waiting.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSING_SECONDS)
            if thread.is_alive():
                _log.warning("a hook does not return; what waits for it is not told")


def _is_low(balance: Balance) -> bool:
    percent = balance.percent_used
    return percent is not None and percent >= THRESHOLDS[0]


def _period(ledger: Ledger, customer: str, meter: str, at: datetime) -> datetime | None:
    """When the account's period began that `at` lies in; None where another has begun since."""
    begun = _BEGINNING
    for grant in ledger.grants(customer, meter):
        # A correction gives back what was charged too much: no credits were bought.
        if not grant.id.startswith("correction_"):
            begun = max(begun, grant.created_at)
        if grant.expires_at is not None and grant.expires_at <= at:
            begun = max(begun, grant.expires_at)
    return begun if begun <= at else None
