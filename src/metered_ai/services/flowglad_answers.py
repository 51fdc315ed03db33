"""What Flowglad's answers mean. Decides only: values in, values out, no I/O and no clock."""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import Delivery
from .bounded import Answer

__all__ = [
    "BalanceRow",
    "Balances",
    "Billing",
    "BulkRecorded",
    "CheckoutSession",
    "FeatureItem",
    "Recorded",
    "RecordedEvent",
    "Subscription",
    "charged_row",
    "classify",
    "compare",
    "estimate_limit",
    "parse",
    "reason_of",
    "retry_after",
]


class _Wire(BaseModel):
    """Fields that we use, under the names that Flowglad sends; whatever else comes is left out."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", populate_by_name=True)


class BalanceRow(_Wire):
    """A meter's balance on one subscription; `id` and `slug` are the meter's. A debt is below zero."""

    id: str
    slug: str
    available: int = Field(alias="availableBalance")
    subscription_id: str = Field(alias="subscriptionId", min_length=1)


class Balances(_Wire):
    rows: list[BalanceRow] = Field(alias="usageMeterBalances")


class FeatureItem(_Wire):
    """A feature of a subscription: credits that it grants on a meter, or a toggle."""

    type: str
    slug: str | None = None
    amount: int | None = None
    meter_id: str | None = Field(alias="usageMeterId", default=None)
    expired_at: int | None = Field(alias="expiredAt", default=None)
    detached_at: int | None = Field(alias="detachedAt", default=None)

    def is_live(self, now_ms: int) -> bool:
        return not any(at is not None and at <= now_ms for at in (self.expired_at, self.detached_at))


class _Experimental(_Wire):
    features: list[FeatureItem] = Field(alias="featureItems", default_factory=list[FeatureItem])
    rows: list[BalanceRow] = Field(alias="usageMeterBalances", default_factory=list[BalanceRow])


class Subscription(_Wire):
    id: str = Field(min_length=1)
    created_at: int = Field(alias="createdAt", default=0)
    experimental: _Experimental = Field(default_factory=_Experimental)

    def toggles(self, now_ms: int) -> set[str]:
        """The slugs of the toggle features that are on."""
        return {
            item.slug
            for item in self.experimental.features
            if item.type == "toggle" and item.slug is not None and item.is_live(now_ms)
        }


class Billing(_Wire):
    """The wide answer: of a customer's subscriptions only the current ones matter, and of these the newest leads."""

    current: Subscription | None = Field(alias="currentSubscription", default=None)
    all_current: list[Subscription] = Field(alias="currentSubscriptions", default_factory=list[Subscription])

    @property
    def newest_first(self) -> list[Subscription]:
        """The current subscriptions: Flowglad's own choice first, then by age. Its list has no order."""
        others = sorted(self.all_current, key=lambda each: (each.created_at, each.id), reverse=True)
        if self.current is None:
            return others
        chosen = self.current.id
        return [self.current, *(each for each in others if each.id != chosen)]


class RecordedEvent(_Wire):
    """A usage event as Flowglad has it, which on a repeated transaction id is the first one, whatever was sent."""

    id: str = Field(min_length=1)
    transaction_id: str = Field(alias="transactionId")
    amount: int
    subscription_id: str = Field(alias="subscriptionId")
    meter_id: str = Field(alias="usageMeterId")
    price_id: str | None = Field(alias="priceId", default=None)
    usage_date: int | None = Field(alias="usageDate", default=None)


class Recorded(_Wire):
    event: RecordedEvent = Field(alias="usageEvent")


class BulkRecorded(_Wire):
    events: list[RecordedEvent] = Field(alias="usageEvents")


class CheckoutSession(_Wire):
    url: str = Field(pattern=r"^https?://")


_M = TypeVar("_M", bound=BaseModel)


def parse(model: type[_M], answer: Answer) -> _M | None:
    """The answer as this model, or None if it is something else: a proxy's page, half a body, another shape."""
    try:
        return model.model_validate_json(answer.body)
    except ValidationError:
        return None


def charged_row(rows: Sequence[BalanceRow], billing: Billing | None) -> BalanceRow | None:
    """
    The row to check and to charge, where several subscriptions have one for the meter: that of the newest subscription.

    `billing` tells which that is; without it, only a single row can be chosen.
    """
    if len({row.subscription_id for row in rows}) == 1:
        return rows[0]
    for subscription in [] if billing is None else billing.newest_first:
        for row in rows:
            if row.subscription_id == subscription.id:
                return row
    return None


def estimate_limit(subscription: Subscription | None, meter_id: str, available: int, now_ms: int) -> int | None:
    """
    What the subscription gave in all, as Flowglad's own sample application reckons it; never below what is available.

    Credits that were topped up are not in it, hence an estimate. None where the subscription is not known.
    """
    if subscription is None:
        return None
    granted = sum(
        item.amount or 0
        for item in subscription.experimental.features
        if item.type == "usage_credit_grant" and item.meter_id == meter_id and item.is_live(now_ms)
    )
    return max(granted, available, 0)


# Refusals.


def reason_of(answer: Answer, key: str = "") -> str:
    """The status and what the server says of it, at most 500 characters, without the key and without the values of its SQL."""
    text = answer.text
    if answer.is_json:
        try:
            body = answer.json()
        except ValueError:
            body = None
        if isinstance(body, dict) and "error" in body:
            text = _said(body["error"])
    elif "<" in text[:100]:
        text = "a page instead of an answer"
    # The query's parameters follow it: properties, ids of other customers.
    text = re.sub(r"Failed query:.*", "Failed query: …", text, flags=re.DOTALL)
    if key:
        text = text.replace(key, "***")
    text = re.sub(r"\b(?:sk_(?:test|live)_|whsec_)[^\s\"']+|(?i:bearer)\s+\S+", "***", text)
    return f"HTTP {answer.status}: {' '.join(text.split())}"[:500].rstrip(": ")


def _said(error: object) -> str:
    if not isinstance(error, list):
        return str(error)
    issues = [issue for issue in error if isinstance(issue, dict)]
    return "; ".join(f"{'.'.join(map(str, issue.get('path') or ()))}: {issue.get('message')}" for issue in issues)


def retry_after(answer: Answer, now: float) -> float | None:
    """The seconds of a Retry-After header, a number or a date, 300 at most; None without one that can be read."""
    given = answer.headers.get("retry-after", "").strip()
    try:
        seconds = float(given) if given.replace(".", "", 1).isdigit() else _seconds_to(given, now)
    except (TypeError, ValueError):
        return None
    return min(max(0.0, seconds), 300.0)


def _seconds_to(date: str, now: float) -> float:
    return parsedate_to_datetime(date).timestamp() - now


_PERMANENT = ("NotFoundError", "not found", "ValidationError", "Invalid ", "archived")


def classify(answer: Answer, now: float, key: str = "") -> Delivery:
    """
    What became of a usage event that was not answered with itself. Status alone does not tell: client mistakes are 500 here.

    `details["cause"]` is "conflict" where the transaction id belongs to another subscription, "blocked" where the meter is.
    """
    reason, after = reason_of(answer, key), retry_after(answer, now)
    status, said = answer.status, answer.text

    if status in (401, 403):
        return Delivery("stop", reason)
    if 300 <= status < 400:
        return Delivery("stop", f"HTTP {status}: Flowglad is not at this address; is FLOWGLAD_BASE_URL right?")
    if status in (408, 425, 429):
        return Delivery("again", reason, after)
    if not answer.is_json:
        # In its own words Flowglad says nothing but 401 and "Not Found" of a path; the rest is of whoever stands in front of it.
        is_path = status == 404
        return Delivery("stop" if is_path else "again", reason, None if is_path else after)
    if "usage_credit_applications" in said:
        return Delivery("park", reason, details={"cause": "blocked"})
    if "UsageEvent conflict" in said:
        return Delivery("taken", reason, details={"cause": "conflict"})
    if "Failed to insert item into usage_events" in said:
        # Most likely the same event, sent at the same moment by somebody whose claim had run out.
        return Delivery("again", reason, after)
    if status == 500 and any(text in said for text in _PERMANENT):
        return Delivery("dead", reason)
    if 400 <= status < 500:
        return Delivery("dead", reason)
    return Delivery("again", reason, after)


def compare(
    event: RecordedEvent, transaction_id: str, amount: int, subscription_id: str, meter_id: str | None, usage_date: int
) -> Delivery:
    """
    What a 200 means: recorded only if the event that came back is the one that was sent.

    A repeated transaction id is answered with the first event, an empty one with a stranger's, both without a sign.
    """
    details = {
        "event_id": event.id,
        "subscription_id": event.subscription_id,
        **({} if event.price_id is None else {"price_id": event.price_id}),
    }
    expected = {
        "transaction id": (transaction_id, event.transaction_id),
        "amount": (amount, event.amount),
        "subscription": (subscription_id, event.subscription_id),
        "meter": (event.meter_id if meter_id is None else meter_id, event.meter_id),
    }
    different = [f"{what} {had!r} instead of {sent!r}" for what, (sent, had) in expected.items() if sent != had]
    if different:
        reason = f"Flowglad answered with another event, {event.id}: {', '.join(different)}"
        return Delivery("aside", reason, details={**details, "cause": "mismatch"})
    # Ours carries our own time, so another one is somebody else's event under this id, with the same amount.
    is_ours = event.usage_date is None or event.usage_date == usage_date
    return Delivery("recorded" if is_ours else "already_there", details=details)
