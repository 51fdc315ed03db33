"""
What a ledger can be asked to do, one step at a time, and what it answers.

Every step is written so that doing it twice is doing it once: its ids are made before the first attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ..records import Basis, Grant, Hold, Usage, UsageEvent, quick

__all__ = [
    "AddGrant",
    "Enlarge",
    "Place",
    "Record",
    "Release",
    "Released",
    "Renew",
    "Revoke",
    "SetUnlimited",
    "Settle",
    "Settled",
    "Step",
    "StepResult",
]


@quick
@dataclass(frozen=True, slots=True)
class Place:
    """
    Check the balance and reserve `amount`, in one: or raise and change nothing.

    `owner` is the process that renews its lease (None: only `max_call` ends the hold). `operation` is an explicit transaction id:
    the lowest number of it that `scope` does not use yet is taken, and decided by `on_repeat` where another scope has it.
    `parent` is the hold of a covering charge. `amount` 0 always fits, even in debt.
    """

    hold_id: str
    customer: str
    meter: str
    amount: int
    owner: str | None
    lease: float = 120.0
    max_call: float = 7200.0
    on_unknown: Literal["release", "charge"] = "release"
    operation: str | None = None
    scope: str | None = None
    on_repeat: Literal["refuse", "free"] = "refuse"
    parent: str | None = None
    endpoint: str | None = None
    model: str | None = None
    price_slug: str | None = None
    properties: Mapping[str, Any] | None = None
    max_holds: int = 1000


@dataclass(frozen=True, slots=True)
class Enlarge:
    """Raise an open hold to `amount` in all: the difference is checked and reserved, or InsufficientCreditsError and nothing changed."""

    hold_id: str
    customer: str
    meter: str
    amount: int


@quick
@dataclass(frozen=True, slots=True)
class Settle:
    """
    End a hold with a usage event of `amount`.

    `transaction_id` is what the event is called unless the hold was placed with an operation. With `is_explicit` an event that has the id
    already ends this hold as a repeat; otherwise an equal `fingerprint` means a replayed answer (no second event) and another
    fingerprint another answer (a deterministic suffix, a second event).
    `held`, `is_unlimited` and the rest describe the call, so that a hold that is gone can still be recorded.
    """

    hold_id: str
    customer: str
    meter: str
    amount: int
    transaction_id: str
    basis: Basis
    is_explicit: bool = False
    fingerprint: str | None = None
    usage: Usage | None = None
    request_id: str | None = None
    attempts: int | None = None
    kind: str = "call"
    properties: Mapping[str, Any] | None = None
    price_slug: str | None = None
    parent: str | None = None
    is_unlimited: bool = False


@quick
@dataclass(frozen=True, slots=True)
class Release:
    """Give a hold back. On a hold that is not there yet it leaves a tombstone, on one that has ended it changes nothing."""

    hold_id: str
    customer: str
    meter: str
    reason: Literal["provider_error", "not_sent", "cancelled", "stream_failed", "repeat", "unknown", "error"]
    sent: Literal["yes", "no", "unknown"]


@dataclass(frozen=True, slots=True)
class Renew:
    """Extend the lease of every open hold of `owner` to `lease` seconds from now, by the ledger's clock."""

    owner: str
    lease: float


@dataclass(frozen=True, slots=True)
class Record:
    """Usage after the fact, without a hold; it may go into debt. The same id again returns the first event."""

    customer: str
    meter: str
    transaction_id: str
    amount: int
    usage: Usage | None = None
    properties: Mapping[str, Any] | None = None
    price_slug: str | None = None


@dataclass(frozen=True, slots=True)
class AddGrant:
    """Give credits. Idempotent by customer, meter and `id`; another amount under the id is a GrantConflictError."""

    customer: str
    meter: str
    amount: int
    id: str
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Revoke:
    """Take a grant back: what is unspent leaves the balance, the rest becomes debt. Idempotent."""

    customer: str
    meter: str
    id: str


@dataclass(frozen=True, slots=True)
class SetUnlimited:
    """Switch an account to unlimited or back. Usage is counted either way; open holds keep the mode they were placed under."""

    customer: str
    meter: str
    is_unlimited: bool


@quick
@dataclass(frozen=True, slots=True)
class Settled:
    """
    How a settle went. `outcome`: settled; again (this hold was settled before: the first event); replay (a cached answer, own hold
    released); repeat (the operation was billed by another, own hold released); late (the hold had ended or was gone: the truth was
    recorded); corrected (an orphan had been charged: `event` holds the difference).
    """

    event: UsageEvent
    outcome: Literal["settled", "again", "replay", "repeat", "late", "corrected"]


@dataclass(frozen=True, slots=True)
class Released:
    """How a release went: released, again (it had ended before; nothing changed), or tombstone (it was never there)."""

    outcome: Literal["released", "again", "tombstone"]


Step = Place | Enlarge | Settle | Release | Renew | Record | AddGrant | Revoke | SetUnlimited
StepResult = Hold | Settled | Released | UsageEvent | Grant | int | None
"""Place and Enlarge give a Hold, Settle a Settled, Release a Released, Record a UsageEvent, AddGrant and Revoke a Grant, Renew the number of open holds."""
