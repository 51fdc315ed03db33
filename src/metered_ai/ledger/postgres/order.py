"""
Which steps must wait for which: what one thread hands over is done in the order it was handed over, on whatever connection.

Steps of different accounts never wait for each other. Of one account a hold's end waits for its place only, so that holds can never
keep a settle waiting; a place waits for the ends before it, which may make room for it; everything else waits for all before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from ...core.steps import Enlarge, Place, Release, Renew, Settle
from ..book import Sweep

__all__ = ["Order", "Ticket"]


class Ticket:
    """A step under way. `start` hands it over once nothing is before it."""

    __slots__ = ("account", "is_aside", "start", "step", "then", "waits")

    def __init__(self, step: Any) -> None:
        self.step = step
        self.account = None if isinstance(step, Renew | Sweep) else (step.customer, step.meter)
        self.start: Callable[[], None] | None = None
        self.then: list[Ticket] = []
        self.waits = 0
        self.is_aside = False


class Order:
    """Keeps the steps under way, by account."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accounts: dict[tuple[str, str], dict[Ticket, None]] = {}

    def enter(self, ticket: Ticket, start: Callable[[], None] | None = None) -> bool:
        """Note a step; True if it may go at once. Else `start` is called when it may, if one is given."""
        if ticket.account is None:
            return True
        with self._lock:
            others = self._accounts.get(ticket.account)
            if others is None:
                self._accounts[ticket.account] = {ticket: None}
                return True
            for other in others:
                if _waits_for(ticket.step, other.step):
                    other.then.append(ticket)
                    ticket.waits += 1
            others[ticket] = None
            ticket.start = start
            return ticket.waits == 0

    def is_under_way(self, account: tuple[str, str] | None) -> bool:
        """Some step of this account has not ended."""
        return account in self._accounts

    def leave(self, tickets: Iterable[Ticket]) -> None:
        """Steps have ended: hand over what waited for them."""
        free: list[Ticket] = []
        with self._lock:
            for ticket in tickets:
                if ticket.account is None:
                    continue
                others = self._accounts.get(ticket.account)
                if others is None or ticket not in others:
                    continue
                del others[ticket]
                if not others:
                    del self._accounts[ticket.account]
                for waiting in ticket.then:
                    waiting.waits -= 1
                    if waiting.waits == 0:
                        free.append(waiting)
                ticket.then = []
        for ticket in free:
            if ticket.start is not None:
                ticket.start()


def _waits_for(step: Any, other: Any) -> bool:
    kind, before = type(step), type(other)
    if kind is Settle or kind is Release:
        if before is Place or before is Enlarge or before is Settle or before is Release:
            return bool(step.hold_id == other.hold_id)
        return True
    if kind is Place and before is Place:
        return bool(step.hold_id == other.hold_id or (step.operation is not None and step.operation == other.operation))
    return True
