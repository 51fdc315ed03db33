"""
Whether what several callers saw of one account could have happened one after the other: a search after Wing and Gong.

Each operation took place at one moment between its call and its return. `explain` looks for an order of such moments in which every
answer is the one that the account, alone and in that order, would have given; it gives that order, or None where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

UNKNOWN = "unknown"
"""The answer of an operation that failed without saying whether it was done."""

NEVER = 1 << 62
"""When such an operation returned: it may still be done at any later time."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of one caller: what was asked, when, what came back, and when."""

    kind: str
    arguments: tuple[Any, ...]
    answer: Any
    called: int
    returned: int


class State(NamedTuple):
    """One account, as plain as can be."""

    limit: int = 0
    used: int = 0
    grants: frozenset[str] = frozenset()
    holds: frozenset[tuple[str, int]] = frozenset()
    """Open ones, with their amounts."""
    ends: frozenset[tuple[str, str]] = frozenset()
    """Holds that have ended, and how."""

    @property
    def held(self) -> int:
        return sum(amount for _, amount in self.holds)

    def do(self, kind: str, arguments: tuple[Any, ...]) -> tuple[State, Any]:
        """What the account is after an operation, and what it answers."""
        match kind, arguments:
            case "balance", ():
                return self, (self.limit, self.used, self.held)
            case "grant", (name, amount):
                if name in self.grants:
                    return self, "granted"
                return self._replace(limit=self.limit + amount, grants=self.grants | {name}), "granted"
            case "place", (hold, amount):
                available = max(0, self.limit - self.used - self.held)
                if amount > available:
                    return self, ("refused", available)
                return self._replace(holds=self.holds | {(hold, amount)}), "placed"
            case "settle", (hold, amount):
                return self._settle(hold, amount)
            case "release", (hold,):
                found = self._open(hold)
                if found is None:
                    return self, "again"
                return self._replace(holds=self.holds - {found}, ends=self.ends | {(hold, "released")}), "released"
        raise AssertionError(f"no such operation: {kind} {arguments}")

    def _settle(self, hold: str, amount: int) -> tuple[State, str]:
        found = self._open(hold)
        if found is not None:
            ends = self.ends | {(hold, "settled")}
            return self._replace(used=self.used + amount, holds=self.holds - {found}, ends=ends), "settled"
        if (hold, "settled") in self.ends:
            return self, "again"
        ends = (self.ends - {(hold, "released")}) | {(hold, "settled")}
        return self._replace(used=self.used + amount, ends=ends), "late"

    def _open(self, hold: str) -> tuple[str, int] | None:
        return next((found for found in self.holds if found[0] == hold), None)


def explain(history: Sequence[Operation], start: State | None = None) -> list[Operation] | None:
    """An order in which these operations could have been done one by one; None if there is none."""
    operations = sorted(history, key=lambda operation: operation.called)
    # What is not known to have been done need not have been.
    must = sum(1 << at for at, operation in enumerate(operations) if operation.answer != UNKNOWN)
    state = State() if start is None else start
    # Done so far, the state after it, and how it came to that; a pair that led nowhere is not tried again.
    stack: list[tuple[int, State, tuple[int, ...]]] = [(0, state, ())]
    seen = {(0, state)}
    while stack:
        done, state, order = stack.pop()
        if done & must == must:
            return [operations[at] for at in order]
        left = [at for at in range(len(operations)) if not done >> at & 1]
        # Nothing can come before something that had returned before it was called.
        soonest = min(operations[at].returned for at in left)
        for at in reversed(left):
            operation = operations[at]
            if operation.called > soonest:
                continue
            after, answer = state.do(operation.kind, operation.arguments)
            if operation.answer not in (UNKNOWN, answer):
                continue
            key = (done | 1 << at, after)
            if key not in seen:
                seen.add(key)
                stack.append((*key, (*order, at)))
    return None
