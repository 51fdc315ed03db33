"""
What a ledger and the sender of an outbox tell each other, and what is decided about an event that was sent.

A ledger that is bound to a remote service hands out claims: events of one account that only the claimant may send for the time of a
lease. What became of each goes back as a `Mark`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

from ..records import UsageEvent

__all__ = ["LONGEST_PAUSE", "Claimed", "Mark", "Outgoing", "Question", "id_beside_namesake", "mark_of"]

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
    """
    One event to be sent: `event` as the service is told it, and how often that was tried, this time included.

    `own_id` is its transaction id in the ledger; `event` has another one where the service knows that one as somebody else's.
    """

    no: int
    event: UsageEvent
    attempts: int
    own_id: str


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
    """
    What became of one event of a claim. `pause`: seconds before the account is tried again, for `again`.

    `alone`: the service has not recorded it, and is to be asked again, about nothing else and under the transaction id `send_as`.
    `aside` parks this event, `park` its whole account.
    """

    no: int
    outcome: Literal["delivered", "again", "alone", "aside", "park", "dead", "stop"]
    reason: str | None = None
    pause: float = 0.0
    details: Mapping[str, str] = field(default_factory=dict[str, str])
    send_as: str | None = None


def id_beside_namesake(transaction_id: str, customer: str) -> str:
    """The id for a service that knows `transaction_id` as another customer's: the same for this customer at each try."""
    return f"{transaction_id}.{sha256(customer.encode()).hexdigest()[:8]}"


def mark_of(
    outgoing: Outgoing,
    outcome: Literal["recorded", "already_there", "again", "alone", "taken", "aside", "park", "dead", "stop"],
    reason: str | None,
    details: Mapping[str, str],
    *,
    back_off: float,
    retry_after: float | None,
    has_namesake: bool = False,
) -> Mark:
    """
    The mark for an answer. A service that says when to come back is obeyed, up to `LONGEST_PAUSE`, and never hurried.

    An id that is taken by another customer's event, which the ledger knows (`has_namesake`), is sent under another id, once; not after a
    try of unknown outcome, which may have been recorded.
    """
    no, sent_as = outgoing.no, outgoing.event.transaction_id
    if outcome == "recorded" or outcome == "already_there":  # noqa: PLR1714  mypy narrows this
        return Mark(
            no, "delivered", details=details if sent_as == outgoing.own_id else {**details, "transaction_id": sent_as}
        )
    if outcome == "again":
        return Mark(no, "again", reason, max(back_off, min(retry_after or 0.0, LONGEST_PAUSE)))
    if outcome == "alone":
        return Mark(no, "alone", reason, send_as=sent_as)
    if outcome == "taken":
        if has_namesake and outgoing.attempts == 1 and sent_as == outgoing.own_id:
            return Mark(no, "alone", reason, send_as=id_beside_namesake(sent_as, outgoing.event.customer))
        return Mark(no, "aside", reason)
    return Mark(no, outcome, reason)
