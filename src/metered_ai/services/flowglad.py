"""`Flowglad`: tells Flowglad of the usage and asks it for balances. Its answers are read as the real server gives them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from ..core.checks import check_name
from ..errors import BillingUnavailableError, ConfigurationError, FeatureRequiredError, NoSubscriptionError
from . import Delivery, ServiceBalance, ServiceRefusedError
from .bounded import Answer, BoundedClient, NoAnswerError
from .flowglad_answers import (
    BalanceRow,
    Balances,
    Billing,
    BulkRecorded,
    CheckoutSession,
    Recorded,
    Subscription,
    charged_row,
    classify,
    compare,
    estimate_limit,
    parse,
    reason_of,
    retry_after,
)
from .svix import check_signature

if TYPE_CHECKING:
    import httpx
    from pydantic import BaseModel

    from ..records import UsageEvent

__all__ = ["MAX_EVENT_AMOUNT", "Flowglad"]

MAX_EVENT_AMOUNT = 2**31 - 1
"""The largest amount of one usage event; the server keeps amounts in 32 bits, whatever its published description says."""

MAX_PARTS = 16
"""Into how many usage events one is split at most, when its amount is larger than `MAX_EVENT_AMOUNT`."""

MAX_BULK = 500
"""Usage events of one bulk request, so that its answer stays within bounds."""

_BASE_URL = "https://app.flowglad.com"
_WIDE_LIMIT = 8 << 20  # The wide answer has the catalog twice, and every invoice.
_NEGATIVE_AGE = 60.0
"""Seconds for which it is believed that a customer has no plan, or that their plans could not be read."""

_REFUSAL_AGE = 10.0
"""Seconds for which a feature's absence is believed before somebody is refused for it."""

_M = TypeVar("_M", bound="BaseModel")


@dataclass(frozen=True, slots=True)
class _Plans:
    """What is known of a customer's subscriptions, and since when. `billing` None: Flowglad does not know the customer."""

    billing: Billing | None
    asked_at: float

    @property
    def newest(self) -> Subscription | None:
        found = [] if self.billing is None else self.billing.newest_first
        return found[0] if found else None

    def find(self, subscription_id: str) -> Subscription | None:
        found = [] if self.billing is None else self.billing.newest_first
        return next((each for each in found if each.id == subscription_id), None)

    def toggles(self, now: float) -> set[str]:
        found = [] if self.billing is None else self.billing.newest_first
        return set().union(*(each.toggles(int(now * 1000)) for each in found))


class _TemporaryError(Exception):
    """A read that may succeed the next time. `wait` seconds were asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Flowglad:
    """
    A `BillingService` on Flowglad, hosted or your own: https://docs.flowglad.com.

    Meters are Flowglad's usage meters by slug, or by id with `meters_by="id"`; an event's `price_slug` is a price's slug, or its id
    with `prices_by="id"`. Building one sends nothing.

    - `secret_key`, else FLOWGLAD_SECRET_KEY: begins with sk_test_ or sk_live_. `base_url`, else FLOWGLAD_BASE_URL, else the hosted
      service; without /api/v1.
    - `on_missing_meter`: Flowglad has no balance for a meter that a customer was never granted and never used. "refuse" calls that 0
      available, "allow" unlimited, for meters that are billed afterwards.
    - `unlimited_feature`: the slug of a toggle feature that makes every meter of its owner unlimited, or a mapping from meters to
      such slugs. Flowglad itself has no unlimited meter.
    - `plan_age`: seconds for which features and limits are believed, 3600 by default. They come with a large answer (70 KB and more),
      which is asked for at most so often for each customer, unless the customer has no balance or another subscription than
      was known. A webhook makes it forget. `estimate_limits=False` asks only where features matter.
    - `timeout`: seconds that a question may take in all, repeats included, and a request with usage events; 10 by default, 60 at
      most. A usage event whose subscription must be asked for, or that is sent in parts, may take twice as long.
    - `http_client`: an `httpx.Client` of yours, for proxies and certificates; you close it, and it cannot be used after a fork.

    Raises ConfigurationError naming what cannot be. No message, repr or log line carries the key.
    """

    def __init__(
        self,
        secret_key: str | None = None,
        base_url: str | None = None,
        *,
        on_missing_meter: Literal["refuse", "allow"] = "refuse",
        unlimited_feature: str | Mapping[str, str] | None = None,
        meters_by: Literal["slug", "id"] = "slug",
        prices_by: Literal["slug", "id"] = "slug",
        plan_age: float = 3600.0,
        estimate_limits: bool = True,
        timeout: float = 10.0,
        http_client: httpx.Client | None = None,
    ) -> None:
        self._key = _checked_key(os.environ.get("FLOWGLAD_SECRET_KEY") if secret_key is None else secret_key)
        self._base = _checked_base(base_url or os.environ.get("FLOWGLAD_BASE_URL") or _BASE_URL)
        _check_choice(on_missing_meter, "on_missing_meter", "refuse", "allow")
        _check_choice(meters_by, "meters_by", "slug", "id")
        _check_choice(prices_by, "prices_by", "slug", "id")
        for name, seconds, least, most in (("plan_age", plan_age, 0, 86400), ("timeout", timeout, 0.001, 60)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not least <= seconds <= most:
                raise ConfigurationError(f"{name} is a number of seconds from {least} to {most}, not {seconds!r}")
        if not isinstance(unlimited_feature, str | Mapping | None):
            raise ConfigurationError(
                f"unlimited_feature is a feature's slug, or a mapping from meters to such slugs, not {unlimited_feature!r}"
            )

        self._on_missing_meter = on_missing_meter
        self._unlimited_feature = unlimited_feature
        self._meters_by = meters_by
        self._prices_by = prices_by
        self._plan_age = plan_age
        self._estimate_limits = estimate_limits
        self._timeout = float(timeout)
        self._http = BoundedClient(
            f"{self._base}/api/v1", {"authorization": f"Bearer {self._key}"}, self._timeout, http_client
        )
        # Plain operations on dicts, each of which is whole: no lock that a fork could find taken.
        self._plans: OrderedDict[str, _Plans] = OrderedDict()
        self._meter_ids: dict[str, str] = {}
        self._found: OrderedDict[tuple[str, str, str], str] = OrderedDict()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name.removeprefix('flowglad ')}>"

    @property
    def name(self) -> str:
        """`flowglad`, the host, and test or live as the key says."""
        mode = "test" if self.is_test else "live"
        return f"flowglad {self._base.partition('://')[2]} {mode}"

    @property
    def is_test(self) -> bool:
        """True with a test key: no money moves."""
        return self._key.startswith("sk_test_")

    def close(self) -> None:
        """Give back connections. Closing twice changes nothing."""
        self._http.close()

    # What a ledger needs: the protocol.

    def check(self, customer: str, meter: str, amount: int, /) -> None:
        """Raise ValueError for a customer id that Flowglad could never find again, and for an amount that it cannot record."""
        _check_customer(customer)
        check_name(meter, "meter")
        if amount > MAX_EVENT_AMOUNT:
            raise ValueError(
                f"Flowglad records at most {MAX_EVENT_AMOUNT} (2^31-1) in one usage event, not {amount}; choose a larger unit"
            )

    def read_balance(self, customer: str, meter: str, /) -> ServiceBalance:
        """
        The balance as Flowglad has it now; below zero in debt. `reference` is the subscription that it belongs to.

        NoSubscriptionError for an unknown customer and one without a current subscription; BillingUnavailableError where no answer
        came, or the key is refused; ValueError for a customer id that cannot be asked for.
        """
        _check_customer(customer)
        deadline = time.monotonic() + self._timeout
        answer = self._get(f"/customers/{_quoted(customer)}/usage-balances", deadline, missing=True)
        if answer is None:
            self._plans.pop(customer, None)
            raise self._no_subscription(
                customer, meter, "Flowglad does not know the customer; ensure_customer makes one"
            )

        rows = [row for row in self._parsed(Balances, answer).rows if meter == getattr(row, self._meters_by)]
        for row in rows:
            self._meter_ids[meter] = row.id
        if not rows:
            return self._without_row(customer, meter, deadline)

        plans = self._plans_for(customer, meter, rows, deadline)
        charged = charged_row(rows, None if plans is None else plans.billing)
        if charged is None:
            raise BillingUnavailableError(
                f"customer {customer!r} has several subscriptions for meter {meter!r}, and Flowglad does not say which is current"
            )
        now = time.time()
        subscription = None if plans is None else plans.find(charged.subscription_id)
        if plans is not None and self._is_unlimited(meter, plans, now):
            return ServiceBalance(None, charged.subscription_id)
        limit = (
            estimate_limit(subscription, charged.id, charged.available, int(now * 1000))
            if self._estimate_limits
            else None
        )
        return ServiceBalance(charged.available, charged.subscription_id, limit)

    def write_usage_event(self, event: UsageEvent, /) -> Delivery:
        """
        Send one usage event, once; larger ones than Flowglad takes in several, with ids of their own that never change.

        An answer counts as recorded only if it is the event that was sent. `details` have Flowglad's `event_id`, `price_id` and
        `subscription_id`; where it was not recorded, often a `cause`.
        """
        if not event.amount:
            return Delivery("already_there", "0 credits are not sent")
        deadline = time.monotonic() + 2 * self._timeout
        try:
            subscription_id = event.reference or self._find_subscription(event)
            parts = _split(event)
            if len(parts) > MAX_PARTS:
                return Delivery("dead", f"{event.amount} credits are more than {MAX_PARTS} usage events can carry")
            said: list[Delivery] = []
            for transaction_id, amount in parts:
                body = self._event_body(event, transaction_id, amount, subscription_id)
                said.append(self._write_one(event, body, deadline - time.monotonic()))
                if said[-1].outcome == "taken" and len(said) > 1:
                    # Of this event Flowglad has a part already; under another id it would have that twice.
                    return Delivery("aside", said[-1].reason, details=said[-1].details)
                if said[-1].outcome not in ("recorded", "already_there"):
                    return said[-1]
        except NoSubscriptionError as error:
            return Delivery("dead", str(error), details={"cause": "no_subscription"})
        except BillingUnavailableError as error:
            return Delivery("stop" if isinstance(error, ServiceRefusedError) else "again", str(error))
        except ConfigurationError as error:
            return Delivery("stop", str(error))
        except ValueError as error:
            return Delivery("dead", str(error))
        return said[0] if len(said) == 1 else _together(said)

    def write_usage_events(self, events: Sequence[UsageEvent], /) -> list[Delivery]:
        """
        Send many usage events of one customer and meter at once. One answer for each, in order.

        Flowglad leaves out of its answer what it had already *or what belongs to somebody else*, without a word: those are `alone`,
        to be sent by themselves and looked at. If one of them is bad none is recorded, and all are `alone`, too.
        """
        answers = [Delivery("alone", "to be sent by itself")] * len(events)
        chosen: dict[str, tuple[int, dict[str, Any]]] = {}
        for at, event in enumerate(events):
            if not event.amount:
                answers[at] = Delivery("already_there", "0 credits are not sent")
            elif (
                event.reference
                and event.amount <= MAX_EVENT_AMOUNT
                and event.transaction_id not in chosen
                and len(chosen) < MAX_BULK
            ):
                try:
                    body = self._event_body(event, event.transaction_id, event.amount, event.reference)
                except ValueError:
                    continue
                chosen[event.transaction_id] = at, body
        if not chosen:
            return answers

        try:
            answer = self._http.request(
                "POST", "/usage-events/bulk", body={"usageEvents": [body for _, body in chosen.values()]}
            )
        except NoAnswerError as error:
            return [_unless(said, Delivery("again", str(error))) for said in answers]
        except ConfigurationError as error:
            return [_unless(said, Delivery("stop", str(error))) for said in answers]
        recorded = parse(BulkRecorded, answer) if answer.status == 200 else None
        if recorded is None:
            failed = self._failed(answer)
            if failed.outcome in ("dead", "taken"):
                # One of them is bad and none is recorded; alone, each gets an answer of its own.
                failed = Delivery("alone", failed.reason)
            return [_unless(said, failed) for said in answers]
        for had in recorded.events:
            if had.transaction_id in chosen:
                at, body = chosen[had.transaction_id]
                event = events[at]
                answers[at] = compare(
                    had,
                    event.transaction_id,
                    event.amount,
                    body["subscriptionId"],
                    self._expected_meter(event),
                    body["usageDate"],
                )
        return answers

    # What an application asks of Flowglad. Each has an async form that never blocks the loop.

    def ensure_customer(self, customer: str, *, name: str, email: str) -> bool:
        """
        Make the customer if Flowglad does not know them. True if it was made just now.

        With a default plan in its pricing model Flowglad also gives them that plan and its credits. Doing it twice, or at the same
        moment elsewhere, changes nothing. ValueError for a customer id with "/", and what Flowglad finds wrong with name or email.
        """
        _check_customer(customer)
        deadline = time.monotonic() + self._timeout
        path = f"/customers/{_quoted(customer)}"
        if self._get(path, deadline, missing=True) is not None:
            return False
        body = {"customer": {"externalId": customer, "name": name, "email": email}}
        answer = self._post("/customers", body, deadline)
        self._plans.pop(customer, None)
        if answer.status == 409:
            # Somebody else just did. Or they were archived, or another field is taken.
            if self._get(path, deadline, missing=True) is None:
                raise ConfigurationError(f"customer {customer!r} can be neither made nor found: {self._reason(answer)}")
            return False
        if answer.status == 400:
            raise ValueError(
                f"Flowglad takes no customer {customer!r} with this name and email: {self._reason(answer)}"
            )
        self._expect_ok(answer)
        return True

    async def aensure_customer(self, customer: str, *, name: str, email: str) -> bool:
        """`ensure_customer`, without blocking the loop."""
        return await asyncio.to_thread(self.ensure_customer, customer, name=name, email=email)

    def checkout_url(
        self,
        customer: str,
        *,
        success_url: str,
        cancel_url: str,
        price_slug: str | None = None,
        price_id: str | None = None,
        quantity: int | None = None,
    ) -> str:
        """
        The address of a page where the customer pays for a plan or a top-up: send them there.

        Exactly one of `price_slug` and `price_id`. ConfigurationError where Flowglad knows no such price or customer. Each call opens
        a session of its own, which costs nothing and ends by itself.
        """
        _check_customer(customer)
        if (price_slug is None) == (price_id is None):
            raise ValueError("checkout_url takes exactly one of price_slug and price_id")
        session: dict[str, Any] = {
            "type": "product",
            "customerExternalId": customer,
            "successUrl": success_url,
            "cancelUrl": cancel_url,
            **({"priceSlug": price_slug} if price_id is None else {"priceId": price_id}),
            **({} if quantity is None else {"quantity": quantity}),
        }
        answer = self._post("/checkout-sessions", {"checkoutSession": session}, time.monotonic() + self._timeout)
        if classify(answer, time.time()).outcome == "dead" and answer.status != 200:
            raise ConfigurationError(
                f"no checkout for customer {customer!r} and price {price_slug or price_id!r}: {self._reason(answer)}"
            )
        self._expect_ok(answer)
        return self._parsed(CheckoutSession, answer).url

    async def acheckout_url(
        self,
        customer: str,
        *,
        success_url: str,
        cancel_url: str,
        price_slug: str | None = None,
        price_id: str | None = None,
        quantity: int | None = None,
    ) -> str:
        """`checkout_url`, without blocking the loop."""
        return await asyncio.to_thread(
            self.checkout_url,
            customer,
            success_url=success_url,
            cancel_url=cancel_url,
            price_slug=price_slug,
            price_id=price_id,
            quantity=quantity,
        )

    def has_feature(self, customer: str, slug: str, /, *, refresh: bool = False) -> bool:
        """
        Whether a current subscription of the customer has this toggle feature. False for a customer that Flowglad does not know.

        Believed for `plan_age`; `refresh` asks anew.
        """
        return self._has_feature(customer, slug, 0.0 if refresh else self._plan_age)

    async def ahas_feature(self, customer: str, slug: str, /, *, refresh: bool = False) -> bool:
        """`has_feature`, without blocking the loop."""
        return await asyncio.to_thread(self.has_feature, customer, slug, refresh=refresh)

    def require_feature(self, customer: str, slug: str, /) -> None:
        """Raise FeatureRequiredError unless the customer has the feature. What was bought 10 s ago is seen."""
        if not self._has_feature(customer, slug, self._plan_age) and not self._has_feature(
            customer, slug, _REFUSAL_AGE
        ):
            raise FeatureRequiredError(customer=customer, feature=slug)

    async def arequire_feature(self, customer: str, slug: str, /) -> None:
        """`require_feature`, without blocking the loop."""
        await asyncio.to_thread(self.require_feature, customer, slug)

    def verify_webhook(
        self, body: bytes | str, headers: Mapping[str, str], secret: str | None = None
    ) -> dict[str, Any]:
        """
        The event of a webhook, if its signature is good; and forget what was believed of its customer's plans.

        `body` is the request's, as it came. `secret` (whsec_…), else FLOWGLAD_WEBHOOK_SECRET. ValueError for whatever is not signed
        with it, altered, or older than 300 s or newer than 60 s: answer that with 400. Does no I/O, so it may be called from a loop.
        """
        if secret is None:
            secret = os.environ.get("FLOWGLAD_WEBHOOK_SECRET", "")
        content = body.encode() if isinstance(body, str) else bytes(body)
        check_signature(content, headers, secret, time.time())
        try:
            event = json.loads(content)
        except ValueError:
            raise ValueError("the webhook is signed, but no JSON") from None
        if not isinstance(event, dict):
            raise ValueError("the webhook is signed, but no JSON object")
        self.forget(_customer_of(event))
        return event

    def forget(self, customer: str | None = None, /) -> None:
        """Believe nothing of the customer's plans any longer; without a customer, of anybody's."""
        if customer is None:
            self._plans.clear()
        else:
            self._plans.pop(customer, None)

    # Balances.

    def _without_row(self, customer: str, meter: str, deadline: float) -> ServiceBalance:
        """A meter that was never granted and never used. Is there a plan at all?"""
        # What is refused may be refused by what was known an hour ago; what is let through is charged to the plan of now.
        age = self._plan_age if self._on_missing_meter == "refuse" and self._feature_for(meter) is None else 0.0
        plans = self._read_plans(customer, deadline, age)
        newest = plans.newest
        if newest is None:
            raise self._no_subscription(customer, meter, "they have no current subscription")
        if self._on_missing_meter == "allow" or self._is_unlimited(meter, plans, time.time()):
            return ServiceBalance(None, newest.id)
        return ServiceBalance(0, newest.id, 0)

    def _plans_for(self, customer: str, meter: str, rows: Sequence[BalanceRow], deadline: float) -> _Plans | None:
        """The customer's plans, where rows alone do not tell enough; None where they are of no use, or only nice to have and not to be had."""
        must = len({row.subscription_id for row in rows}) > 1 or self._feature_for(meter) is not None
        if not must and not self._estimate_limits:
            return None
        known = self._plans.get(customer)
        # An upgrade brings a new subscription: then what was known is of the old one.
        is_known = known is not None and all(known.find(row.subscription_id) is not None for row in rows)
        age = self._plan_age if is_known else 0.0 if must else _NEGATIVE_AGE
        try:
            return self._read_plans(customer, deadline, min(age, self._plan_age))
        except BillingUnavailableError:
            if must:
                raise
            self._remember(customer, None)
            return None

    def _read_plans(self, customer: str, deadline: float, age: float) -> _Plans:
        known = self._plans.get(customer)
        if known is not None:
            good_for = age if known.newest is not None else min(age, _NEGATIVE_AGE)
            if time.monotonic() - known.asked_at < good_for:
                return known
        answer = self._get(f"/customers/{_quoted(customer)}/billing", deadline, missing=True, limit=_WIDE_LIMIT)
        return self._remember(customer, None if answer is None else self._parsed(Billing, answer))

    def _remember(self, customer: str, billing: Billing | None) -> _Plans:
        plans = _Plans(billing, time.monotonic())
        self._plans[customer] = plans
        while len(self._plans) > 10_000:
            self._plans.popitem(last=False)
        return plans

    def _has_feature(self, customer: str, slug: str, age: float) -> bool:
        _check_customer(customer)
        check_name(slug, "feature")
        plans = self._read_plans(customer, time.monotonic() + self._timeout, age)
        return slug in plans.toggles(time.time())

    def _feature_for(self, meter: str) -> str | None:
        wanted = self._unlimited_feature
        return wanted if wanted is None or isinstance(wanted, str) else wanted.get(meter)

    def _is_unlimited(self, meter: str, plans: _Plans, now: float) -> bool:
        return self._feature_for(meter) in plans.toggles(now)

    def _no_subscription(self, customer: str, meter: str, why: str) -> NoSubscriptionError:
        message = f"customer {customer!r} has no plan that meter {meter!r} could be charged to: {why}"
        return NoSubscriptionError(customer=customer, meter=meter, available=0, required=1, message=message)

    # Usage events.

    def _event_body(self, event: UsageEvent, transaction_id: str, amount: int, subscription_id: str) -> dict[str, Any]:
        # An empty one would be answered with a stranger's event, and lost.
        check_name(transaction_id, "transaction id", 300)
        if event.price_slug:
            by = {"priceSlug" if self._prices_by == "slug" else "priceId": event.price_slug}
        else:
            by = {"usageMeterSlug" if self._meters_by == "slug" else "usageMeterId": event.meter}
        body: dict[str, Any] = {
            **by,
            "amount": amount,
            "subscriptionId": subscription_id,
            "transactionId": transaction_id,
            "usageDate": int(event.created_at.timestamp() * 1000),
        }
        if event.properties:
            body["properties"] = dict(event.properties)
        return body

    def _write_one(self, event: UsageEvent, body: Mapping[str, Any], timeout: float) -> Delivery:
        try:
            answer = self._http.request("POST", "/usage-events", body={"usageEvent": body}, timeout=timeout)
        except NoAnswerError as error:
            return Delivery("again", str(error))
        if answer.status != 200:
            return self._failed(answer)
        recorded = parse(Recorded, answer)
        if recorded is None:
            return Delivery("again", "Flowglad answered 200 with something that is no usage event")
        return compare(
            recorded.event,
            body["transactionId"],
            body["amount"],
            body["subscriptionId"],
            self._expected_meter(event),
            body["usageDate"],
        )

    def _expected_meter(self, event: UsageEvent) -> str | None:
        """The id of the event's meter, where it is known: a price of another meter would leave this one's balance as it was."""
        return event.meter if self._meters_by == "id" else self._meter_ids.get(event.meter)

    def _find_subscription(self, event: UsageEvent) -> str:
        """The subscription of an event that was recorded before any was known; the same on every repeat in this process."""
        key = (event.customer, event.meter, event.transaction_id)
        found = self._found.get(key)
        if found is None:
            found = self.read_balance(event.customer, event.meter).reference
            assert found is not None
            # Another one on a repeat would make a conflict of it, if the first request arrived after all.
            self._found[key] = found
            while len(self._found) > 10_000:
                self._found.popitem(last=False)
        return found

    def _failed(self, answer: Answer) -> Delivery:
        return classify(answer, time.time(), self._key)

    # Requests.

    def _get(self, path: str, deadline: float, *, missing: bool = False, limit: int = 1 << 20) -> Answer | None:
        """The answer to a question, asked up to three times before the deadline. None for a 404 of Flowglad's own if it may be `missing`."""
        from tenacity import Retrying, retry_if_exception_type

        def wait(state: Any) -> float:
            error = state.outcome.exception()
            asked = error.wait if isinstance(error, _TemporaryError) else None
            return random.uniform(0.0, 0.1 * 2.0**state.attempt_number) if asked is None else asked  # noqa: S311  no secret

        def is_over(state: Any) -> bool:
            return state.attempt_number >= 3 or time.monotonic() + float(state.upcoming_sleep) >= deadline

        def ask() -> Answer:
            try:
                answer = self._http.request("GET", path, timeout=deadline - time.monotonic(), limit=limit)
            except NoAnswerError as error:
                raise (self._silent(error) if error.is_final else _TemporaryError(str(error))) from None
            if answer.status in (408, 425, 429) or answer.status >= 500:
                raise _TemporaryError(self._reason(answer), retry_after(answer, time.time()))
            return answer

        retrying: Callable[[Callable[[], Answer]], Answer] = Retrying(
            stop=is_over,
            wait=wait,
            retry=retry_if_exception_type(_TemporaryError),
            reraise=True,
        )
        try:
            answer = retrying(ask)
        except _TemporaryError as error:
            raise self._silent(error) from None
        if missing and answer.status == 404 and answer.is_json:
            return None
        self._expect_ok(answer)
        return answer

    def _post(self, path: str, body: object, deadline: float) -> Answer:
        try:
            return self._http.request("POST", path, body=body, timeout=deadline - time.monotonic())
        except NoAnswerError as error:
            raise self._silent(error) from None

    def _silent(self, error: Exception) -> BillingUnavailableError:
        return BillingUnavailableError(f"{self.name} did not answer: {error}")

    def _expect_ok(self, answer: Answer) -> None:
        if answer.status == 200:
            return
        refused = ServiceRefusedError if answer.status in (401, 403) else BillingUnavailableError
        raise refused(f"{self.name} refuses: {self._reason(answer)}")

    def _parsed(self, model: type[_M], answer: Answer) -> _M:
        parsed = parse(model, answer)
        if parsed is None:
            raise BillingUnavailableError(f"{self.name} answered with something else than {model.__name__}")
        return parsed

    def _reason(self, answer: Answer) -> str:
        return reason_of(answer, self._key)


def _split(event: UsageEvent) -> list[tuple[str, int]]:
    """Transaction ids and amounts of what is sent for an event: itself, or its parts. The ids depend on nothing but the event."""
    if event.amount <= MAX_EVENT_AMOUNT:
        return [(event.transaction_id, event.amount)]
    count = -(-event.amount // MAX_EVENT_AMOUNT)
    return [
        (f"{event.transaction_id}.part{at}of{count}", min(MAX_EVENT_AMOUNT, event.amount - (at - 1) * MAX_EVENT_AMOUNT))
        for at in range(1, min(count, MAX_PARTS + 1) + 1)
    ]


def _together(parts: Sequence[Delivery]) -> Delivery:
    details = {**parts[0].details, "event_id": " ".join(part.details["event_id"] for part in parts)}
    return Delivery("recorded", details=details)


def _unless(said: Delivery, failed: Delivery) -> Delivery:
    """What was decided without asking stands."""
    return said if said.outcome == "already_there" else failed


def _checked_key(key: str | None) -> str:
    if not key:
        raise ConfigurationError("Flowglad needs a secret key: secret_key=, or FLOWGLAD_SECRET_KEY")
    if not isinstance(key, str) or not key.startswith(("sk_test_", "sk_live_")):
        raise ConfigurationError("a Flowglad secret key begins with sk_test_ or sk_live_; this one does not")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "the Flowglad secret key has characters that no key has, such as a space or a line break"
        )
    return key


def _checked_base(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_good, parts = False, urlsplit("")
    if not is_good or parts.username or parts.password or parts.query or parts.fragment:
        # Not shown: a password may be in it.
        raise ConfigurationError(
            f"FLOWGLAD_BASE_URL is http(s)://host without user, query or fragment, as in {_BASE_URL}"
        )
    path = parts.path.rstrip("/").removesuffix("/api/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def _check_choice(value: object, name: str, *choices: str) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} is {' or '.join(map(repr, choices))}, not {value!r}")


def _check_customer(customer: str) -> None:
    check_name(customer, "customer")
    if "/" in customer or customer in (".", ".."):
        # Percent-encoded or not, the server answers 404.
        raise ValueError(
            f"Flowglad can store a customer {customer!r}, and never find it again: no '/', '.' or '..' in a path"
        )


def _quoted(customer: str) -> str:
    return quote(customer, safe="")


def _customer_of(event: Mapping[str, Any]) -> str | None:
    """The customer's own id in a webhook, wherever it is kept; None if it is not there."""
    for place in (event, event.get("payload"), event.get("data")):
        if not isinstance(place, Mapping):
            continue
        customer = place.get("customer")
        for owner in (customer, place):
            if isinstance(owner, Mapping) and isinstance(owner.get("externalId"), str):
                return str(owner["externalId"])
    return None
