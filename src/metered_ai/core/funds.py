"""
The arithmetic of grants: which grant pays for what, what expires, what a revoked grant leaves.

An account's `used` is one number; grants learn lazily what they paid (`fold`), soonest expiry first. An expired grant still
serves the holds that were placed before it expired: that part is `kept`, and what such a hold does not use is gone.
Times are microseconds since 1970; nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Funds", "GrantFunds", "OldHold", "add", "end_hold", "expire", "fold", "next_expiry", "revoke"]


class OldHold(NamedTuple):
    """An open hold of a limited account: when it was placed, and what it holds."""

    placed_at: int
    amount: int


@dataclass(slots=True)
class GrantFunds:
    """One grant: amount = spent + expired + revoked + remainder. `kept` is a remainder after the expiry, for old holds only."""

    key: int
    amount: int
    expires_at: int | None = None
    spent: int = 0
    expired: int = 0
    revoked: int = 0
    kept: int = 0
    is_over: bool = False

    @property
    def remainder(self) -> int:
        return self.amount - self.spent - self.expired - self.revoked


@dataclass(slots=True)
class Funds:
    """
    An account's limited credits. `limit` is what grants amount to now, `allocated` what they know to have paid, `kept` the sum
    of theirs. `grants` are in the order they were given; those with nothing left may be missing.
    """

    limit: int = 0
    used: int = 0
    held: int = 0
    allocated: int = 0
    kept: int = 0
    grants: list[GrantFunds] = field(default_factory=list)

    @property
    def free(self) -> int:
        """What a new hold may take; negative in debt."""
        return self.limit - self.used - self.held


def fold(funds: Funds) -> None:
    """Tell the live grants, soonest expiry first, what has been used. What none can pay is debt and stays unallocated."""
    unallocated = funds.used - funds.allocated
    if unallocated <= 0:
        return
    for grant in _by_expiry(grant for grant in funds.grants if not grant.is_over):
        part = min(unallocated, grant.remainder)
        grant.spent += part
        funds.allocated += part
        unallocated -= part


def expire(funds: Funds, holds: Sequence[OldHold], now: int) -> bool:
    """
    Apply every expiry that is due at `now`; tell whether there was one.

    Of what is left of a grant, open holds placed before its expiry keep what they may need; the rest leaves the limit.
    """
    due = [
        grant
        for grant in funds.grants
        if not grant.is_over and grant.expires_at is not None and grant.expires_at <= now
    ]
    if not due:
        return False
    fold(funds)
    for grant in due:
        grant.is_over = True
        grant.kept = grant.remainder
        funds.kept += grant.kept
    _trim(funds, holds)
    return True


def end_hold(funds: Funds, holds: Sequence[OldHold], hold: OldHold, spent: int) -> None:
    """
    Settle `spent` (0: released) of a hold out of what expired grants kept for it: what it overran is not theirs to pay.

    `funds.used` and `funds.held` have been changed already, and `holds` are those that stay open.
    """
    spent = min(spent, hold.amount)
    for grant in _by_expiry(grant for grant in funds.grants if grant.kept):
        if grant.expires_at is not None and grant.expires_at > hold.placed_at:
            part = min(spent, grant.kept)
            grant.kept -= part
            grant.spent += part
            funds.kept -= part
            funds.allocated += part
            spent -= part
    _trim(funds, holds)


def add(funds: Funds, grant: GrantFunds, holds: Sequence[OldHold], now: int) -> None:
    """Give a grant: it pays the debt first, and what paid a debt cannot expire any more; one in the past then expires at once."""
    expire(funds, holds, now)
    fold(funds)
    funds.grants.append(grant)
    funds.limit += grant.amount
    fold(funds)
    expire(funds, holds, now)


def revoke(funds: Funds, grant: GrantFunds, holds: Sequence[OldHold], now: int) -> None:
    """Take back a grant of `funds`: other grants pay for what it had paid, and what they cannot pay becomes debt."""
    expire(funds, holds, now)
    fold(funds)
    revoked = grant.amount - grant.expired
    funds.limit -= revoked - grant.revoked
    funds.allocated -= grant.spent
    funds.kept -= grant.kept
    grant.revoked, grant.spent, grant.kept = revoked, 0, 0
    fold(funds)


def next_expiry(grants: Iterable[GrantFunds]) -> int | None:
    """When the next grant with something left expires."""
    return min(
        (
            grant.expires_at
            for grant in grants
            if not grant.is_over and grant.expires_at is not None and grant.remainder
        ),
        default=None,
    )


def _trim(funds: Funds, holds: Sequence[OldHold]) -> None:
    """Expire what no old hold can use: up to each expiry, kept parts together never exceed the holds placed before it."""
    earlier = 0
    for grant in _by_expiry(grant for grant in funds.grants if grant.kept):
        old = sum(hold.amount for hold in holds if grant.expires_at is not None and hold.placed_at < grant.expires_at)
        gone = grant.kept - max(0, min(grant.kept, old - earlier))
        grant.kept -= gone
        grant.expired += gone
        funds.kept -= gone
        funds.limit -= gone
        earlier += grant.kept


def _by_expiry(grants: Iterable[GrantFunds]) -> list[GrantFunds]:
    return sorted(grants, key=lambda grant: (grant.expires_at is None, grant.expires_at or 0))
