"""Frozen records: what is read from a ledger, and what a pricing is given. Amounts are whole credits of the meter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from typing import Any, Literal, TypeVar

__all__ = [
    "MAX_AMOUNT",
    "MAX_TOTAL",
    "Balance",
    "Basis",
    "Deliveries",
    "Grant",
    "Hold",
    "OutboxSummary",
    "Request",
    "Undelivered",
    "Usage",
    "UsageEvent",
    "UsageSum",
]

MAX_AMOUNT = 2**53 - 1
"""The largest single amount, so that it survives JSON readers that know only doubles."""

MAX_TOTAL = 2**62
"""The largest total of an account, so that sums stay inside 64 bits."""

Basis = Literal["reported", "observed", "estimated", "held"]
"""
How the amount of a usage event came about: from the provider's usage, from what was seen of a broken answer,
from an estimate, or because the hold itself was charged.
"""


_T = TypeVar("_T")


def quick(kind: type[_T]) -> type[_T]:
    """
    A frozen dataclass with slots whose instances are made in a third of the time: a call makes seven of them.

    Frozen dataclasses set each field by a call of `object.__setattr__`. Here an instance is of a twin class, which has the same
    layout and is not frozen, until its fields are set.
    """
    slots = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # it is a dataclass
    twin = type(kind.__name__, (), {"__slots__": slots})
    # An underscore in front, which no field has.
    names: dict[str, Any] = {"_kind": kind, "_twin": twin, "_slow": kind.__init__, "_become": object.__setattr__}
    parameters: list[str] = []
    for field in fields(kind):  # type: ignore[arg-type]  # as above
        if field.default is MISSING:
            parameters.append(field.name)
        else:
            names[f"_default_{field.name}"] = field.default
            parameters.append(f"{field.name}=_default_{field.name}")
    lines = [
        f"def __init__(self, {', '.join(parameters)}):",
        # A subclass has a layout of its own.
        f" if self.__class__ is not _kind: return _slow(self, {', '.join(slots)})",
        " _become(self, '__class__', _twin)",
        *(f" self.{name} = {name}" for name in slots),
        " self.__class__ = _kind",
    ]
    exec("\n".join(lines), names)  # noqa: S102  as dataclasses make theirs
    made = names["__init__"]
    made.__annotations__, made.__qualname__ = kind.__init__.__annotations__, kind.__init__.__qualname__
    kind.__init__ = made  # type: ignore[method-assign]  # the same signature
    return kind


@quick
@dataclass(frozen=True, slots=True)
class Usage:
    """
    What the provider says a call used. None where it did not say.

    `input_tokens` includes `cached_input_tokens` and `cache_write_tokens`; `output_tokens` includes `reasoning_tokens`;
    `audio_tokens` are part of input and output together. `seconds` is the length of audio, `characters` the length of a text
    to be spoken.
    """

    model: str | None = None
    endpoint: str | None = None
    service_tier: str | None = None
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None
    seconds: float | None = None
    images: int | None = None
    characters: int | None = None


@quick
@dataclass(frozen=True, slots=True)
class Request:
    """A call before it is sent, as an `estimate` function sees it: the door's name, the model, the body with `extra_body` merged."""

    endpoint: str
    model: str | None
    body: Mapping[str, Any]
    stream: bool


@dataclass(frozen=True, slots=True)
class Balance:
    """
    A customer's credits on one meter at one moment.

    limit = grants − revoked − what expired unspent; used is what was charged while limited; available = max(0, limit − used − held);
    debt = max(0, used + held − limit). For an unlimited account `limit` and `available` are None and `unlimited_used` counts.
    """

    customer: str
    meter: str
    limit: int | None
    used: int
    held: int
    available: int | None
    debt: int
    unlimited_used: int = 0
    is_estimate: bool = False

    @property
    def percent_used(self) -> int | None:
        """How much of the limit is used, in whole per cent, rounded down; over 100 in debt, None when unlimited."""
        if self.limit is None:
            return None
        if self.limit <= 0:
            return 100
        return self.used * 100 // self.limit

    @property
    def level(self) -> Literal["ok", "high", "critical", "exhausted", "unlimited"]:
        """`high` over 75 %, `critical` over 90 %, `exhausted` when nothing is available."""
        percent = self.percent_used
        if percent is None:
            return "unlimited"
        if not self.available:
            return "exhausted"
        if percent > 90:
            return "critical"
        if percent > 75:
            return "high"
        return "ok"

    @property
    def show_upgrade(self) -> bool:
        """True from 80 % used: the moment to offer more credits."""
        percent = self.percent_used
        return percent is not None and percent >= 80

    @property
    def is_exhausted(self) -> bool:
        """True when nothing is available."""
        return self.available == 0


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits given to a customer. `spent`, `expired` and `revoked` tell where they went; `spent` is brought up to date lazily."""

    customer: str
    meter: str
    id: str
    amount: int
    created_at: datetime
    expires_at: datetime | None = None
    spent: int = 0
    expired: int = 0
    revoked: int = 0


@quick
@dataclass(frozen=True, slots=True)
class Hold:
    """
    Credits set aside while a call runs, or how that ended.

    `state` is open, settled, released, expired (its owner died; nothing charged) or charged (its owner died; charged by policy).
    `sent` tells whether the provider may have worked: "yes", "no" or "unknown". `is_in_doubt` marks answers nobody got.
    """

    id: str
    customer: str
    meter: str
    amount: int
    state: Literal["open", "settled", "released", "expired", "charged"]
    placed_at: datetime
    expires_at: datetime | None = None
    ended_at: datetime | None = None
    reason: str | None = None
    sent: Literal["yes", "no", "unknown"] | None = None
    transaction_id: str | None = None
    endpoint: str | None = None
    model: str | None = None
    parent: str | None = None
    is_unlimited: bool = False
    is_repeat: bool = False

    @property
    def is_in_doubt(self) -> bool:
        """The provider may have worked for nothing: no answer came, and nobody can know."""
        return self.sent == "unknown" and self.state != "open"


@quick
@dataclass(frozen=True, slots=True)
class UsageEvent:
    """
    One immutable record of use. Unique by customer, meter and `transaction_id`, for ever.

    `kind` is call, charge, record, expired (an orphaned hold that was charged) or correction. `parent` is the hold of the
    covering charge, `attempts` how often the SDK tried, `price_slug` what a remote service bills by. Only with a service: `reference`
    is its word for the plan that the call was checked against, `delivered` what it answered once it had the event (None before).
    """

    customer: str
    meter: str
    transaction_id: str
    amount: int
    created_at: datetime
    basis: Basis
    kind: str = "call"
    hold_id: str | None = None
    usage: Usage | None = None
    request_id: str | None = None
    attempts: int | None = None
    properties: Mapping[str, Any] | None = None
    price_slug: str | None = None
    parent: str | None = None
    is_unlimited: bool = False
    is_late: bool = False
    reference: str | None = None
    delivered: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Usage added up over a day, a meter, a model or any combination; None where it was not asked to be told apart."""

    customer: str | None
    meter: str
    day: str | None
    model: str | None
    amount: int
    calls: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Undelivered:
    """
    A usage event that the remote service does not have yet.

    `state` is waiting, parked (this customer's meter is stuck there, or the service has something else under this id) or dead (it can
    never be recorded as it is); `reason` says why, or how the last of the `attempts` went. `amount` is what the service is told: the
    event's, less what a correction took back.
    `age` is seconds since the event, `not_before` when it is tried again, None where that is now or never.
    """

    event: UsageEvent
    state: Literal["waiting", "parked", "dead"]
    amount: int
    attempts: int
    reason: str | None
    age: float
    not_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class OutboxSummary:
    """How many usage events the remote service does not have yet, by state; `oldest` is the age of the oldest one in seconds."""

    waiting: int = 0
    parked: int = 0
    dead: int = 0
    oldest: float | None = None


@dataclass(frozen=True, slots=True)
class Deliveries:
    """What a `deliver` has done: `delivered` events were acknowledged, the rest is left. `alarm` says why nothing is sent at all."""

    delivered: int
    waiting: int
    parked: int
    dead: int
    alarm: str | None = None
