"""
What a ledger and the sender of an outbox tell each other, and what is decided about an event that was sent.

A ledger that is bound to a remote service hands out claims: events of one account that only the claimant may send for the time of a
lease. What became of each goes back as a `Mark`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..records import UsageEvent

__all__ = ["LONGEST_PAUSE", "Claimed", "Mark", "Outgoing", "Question", "mark_of"]

LONGEST_PAUSE = 300.0
"""Seconds that a service may ask us to wait (its Retry-After) and is obeyed."""


@dataclass(frozen=True, slots=True)
class Question:
    """
    A balance is asked for: what the service had acknowledged at that moment, and which question this is.

    Made before the request is sent. Whatever is acknowledged after that may or may not be in the answer, so it does not count as
    known: at worst it is subtracted twice until the next answer.
    """

    customer: str
    meter: str
    number: int
    acknowledged: int
    asked_at: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One event to be sent: `event` as the service is told it, and how often that was tried, this time included."""

    no: int
    event: UsageEvent
    attempts: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """
    The events of one customer and meter that whoever made `claim` may send, in order, until its lease is out.

    `failures` of this account came in a row before. `is_heard`: a balance of it was heard at least once.
    """

    claim: str
    account_no: int
    customer: str
    meter: str
    failures: int
    is_heard: bool
    events: tuple[Outgoing, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """What became of one event of a claim. `pause`: seconds before the account is tried again, for `again`."""

    no: int
    outcome: Literal["delivered", "again", "park", "dead", "stop"]
    reason: str | None = None
    pause: float = 0.0
    details: Mapping[str, str] = field(default_factory=dict[str, str])


def mark_of(
    no: int,
    outcome: Literal["recorded", "already_there", "again", "park", "dead", "stop"],
    reason: str | None,
    details: Mapping[str, str],
    *,
    back_off: float,
    retry_after: float | None,
) -> Mark:
    """The mark for an answer. A service that says when to come back is obeyed, up to `LONGEST_PAUSE`, and never hurried."""
    if outcome == "recorded" or outcome == "already_there":  # noqa: PLR1714  mypy narrows this
        return Mark(no, "delivered", details=details)
    if outcome == "again":
        return Mark(no, "again", reason, max(back_off, min(retry_after or 0.0, LONGEST_PAUSE)))
    return Mark(no, outcome, reason)
