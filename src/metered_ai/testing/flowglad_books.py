"""What `FakeFlowglad` knows, and what it answers: the behaviour that was seen on the real server, wrinkles included. No I/O."""

from __future__ import annotations

import base64
import json
import secrets
import string
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

__all__ = ["FlowgladBooks", "Reply", "SubscriptionBooks", "new_id"]

Json = dict[str, Any]

CURRENT = ("active", "past_due", "trialing", "cancellation_scheduled", "unpaid", "credit_trial")
MAX_INT32 = 2**31 - 1
_LETTERS = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """An id as the server makes them: a prefix and 21 letters or digits."""
    return f"{prefix}_{''.join(secrets.choice(_LETTERS) for _ in range(21))}"


class Reply(NamedTuple):
    """A status, and a JSON body or a text."""

    status: int
    body: Json | str


class _RefusalError(Exception):
    """The request ends here. `code` None: an answer of the framework, which carries none."""

    def __init__(self, status: int, error: object, code: str | None = None) -> None:
        super().__init__(str(error))
        names = {400: "BAD_REQUEST", 404: "NOT_FOUND", 409: "CONFLICT", 500: "INTERNAL_SERVER_ERROR"}
        body: Json = {"error": error, "code": names[status] if code is None else code}
        if code == "":
            del body["code"]
        self.reply = Reply(status, {**body, "request_id": secrets.token_hex(4), "trace_id": secrets.token_hex(16)})


@dataclass(eq=False)
class SubscriptionBooks:
    """A subscription, its features and its balances by meter id. A meter that is not in `balances` was never granted and never used."""

    wire: Json
    items: list[Json]
    features: list[Json]
    balances: dict[str, int] = field(default_factory=dict[str, int])
    blocked: set[str] = field(default_factory=set[str])
    granted: set[str] = field(default_factory=set[str])
    period_id: str = field(default_factory=lambda: new_id("billing_period"))

    @property
    def id(self) -> str:
        return str(self.wire["id"])

    @property
    def is_current(self) -> bool:
        return self.wire["status"] in CURRENT and self.wire["replacedBySubscriptionId"] is None


@dataclass(eq=False)
class _Customer:
    wire: Json
    subscriptions: list[SubscriptionBooks] = field(default_factory=list[SubscriptionBooks])

    @property
    def current(self) -> list[SubscriptionBooks]:
        return [each for each in self.subscriptions if each.is_current]


class FlowgladBooks:
    """
    An organisation with one pricing model, its customers, and what happens to their credits.

    It enforces nothing, as the real one: events go through whatever the balance is. `work` is called in the middle of recording,
    outside every lock: the real server takes none, so two events at once can do harm here as they can there.
    """

    def __init__(self, key: str, url: str, work: Callable[[], None] = lambda: None) -> None:
        self.key = key
        self.url = url
        self.lock = threading.RLock()
        self.customers: dict[str, _Customer] = {}
        self.archived: list[_Customer] = []
        self.events: list[Json] = []
        self.sessions: list[Json] = []
        self.features: dict[str, Json] = {}
        self._work = work
        self._in_flight: list[_Flight] = []
        self._product_features: dict[tuple[str, str], str] = {}
        self.organization_id = new_id("org")
        self.model: Json = self.made(
            "pricing_model",
            organizationId=self.organization_id,
            isDefault=True,
            name="Test",
            products=[],
            usageMeters=[],
            defaultProduct=None,
        )

    @property
    def is_live(self) -> bool:
        return self.key.startswith("sk_live_")

    def made(self, prefix: str, id: str | None = None, **fields: Any) -> Json:
        """A new record with the fields that all have."""
        now = now_ms()
        return {
            "id": id or new_id(prefix),
            "createdAt": now,
            "updatedAt": now,
            "livemode": self.is_live,
            **fields,
        }

    # The catalog.

    @property
    def model_id(self) -> str:
        return str(self.model["id"])

    def add_meter(self, slug: str, name: str, aggregation: str, id: str | None) -> Json:
        meter = self.made(
            "usage_meter",
            id,
            organizationId=self.organization_id,
            name=name,
            pricingModelId=self.model_id,
            slug=slug,
            aggregationType=aggregation,
        )
        self.model["usageMeters"].append({**meter, "prices": [], "defaultPrice": None})
        self.add_usage_price(slug, f"{slug}_no_charge", f"{name} - No Charge", 0, is_default=True)
        return meter

    def add_usage_price(
        self, meter: str, slug: str, name: str, unit_price: int, *, is_default: bool, id: str | None = None
    ) -> Json:
        owner = next(each for each in self.model["usageMeters"] if each["slug"] == meter)
        price = self._price("usage", slug, name, unit_price, usageMeterId=owner["id"], usageEventsPerUnit=1, id=id)
        if is_default:
            for other in owner["prices"]:
                other["isDefault"] = False
            owner["defaultPrice"] = price
        owner["prices"].append({**price, "isDefault": is_default})
        return price

    def add_product(
        self,
        slug: str,
        name: str,
        *,
        kind: str,
        unit_price: int,
        features: list[Json],
        is_default: bool,
    ) -> Json:
        price = self._price(kind, slug, name, unit_price, productId=new_id("prod"))
        product = self.made(
            "prod",
            price["productId"],
            name=name,
            description=None,
            imageURL=None,
            organizationId=self.organization_id,
            active=True,
            singularQuantityLabel=None,
            pluralQuantityLabel=None,
            pricingModelId=self.model_id,
            default=is_default,
            slug=slug,
            prices=[price],
            defaultPrice=price,
            features=features,
        )
        self.model["products"].append(product)
        if is_default:
            self.model["defaultProduct"] = product
        return product

    def add_feature(
        self,
        slug: str,
        name: str,
        *,
        kind: str = "toggle",
        description: str = "",
        amount: int | None = None,
        meter_id: str | None = None,
        renewal: str | None = None,
    ) -> Json:
        feature = self.made(
            "feature",
            organizationId=self.organization_id,
            type=kind,
            slug=slug,
            name=name,
            description=description,
            amount=amount,
            usageMeterId=meter_id,
            renewalFrequency=renewal,
            pricingModelId=self.model_id,
            resourceId=None,
            active=True,
        )
        self.features[feature["id"]] = feature
        return feature

    def _price(self, kind: str, slug: str, name: str, unit_price: int, id: str | None = None, **fields: Any) -> Json:
        is_periodic = kind != "single_payment"
        price = self.made(
            "price",
            id,
            intervalUnit="month" if is_periodic else None,
            name=name,
            intervalCount=1 if is_periodic else None,
            type=kind,
            trialPeriodDays=None,
            isDefault=True,
            unitPrice=unit_price,
            usageEventsPerUnit=None,
            productId=None,
            active=True,
            currency="USD",
            slug=slug,
            usageMeterId=None,
            pricingModelId=self.model_id,
        )
        return {**price, **fields}

    def meter(self, slug_or_id: str) -> Json:
        """A meter by slug or id; LookupError if there is none."""
        for each in self.model["usageMeters"]:
            if slug_or_id in (each["slug"], each["id"]):
                return dict(each)
        raise LookupError(f"there is no meter {slug_or_id!r}")

    def product(self, slug: str) -> Json:
        """A product by its slug or its price's; LookupError if there is none."""
        for each in self.model["products"]:
            if slug == each["slug"] or any(slug == price["slug"] for price in each["prices"]):
                return dict(each)
        raise LookupError(f"there is no product {slug!r}")

    # Customers and their subscriptions.

    def add_customer(
        self,
        external_id: str,
        name: str,
        email: str,
        *,
        id: str | None = None,
        subscription_id: str | None = None,
    ) -> _Customer:
        customer = _Customer(
            self.made(
                "cust",
                id,
                organizationId=self.organization_id,
                email=email,
                name=name,
                invoiceNumberBase=secrets.token_hex(4)[:7].upper(),
                archived=False,
                logoURL=None,
                iconURL=None,
                domain=None,
                billingAddress=None,
                externalId=external_id,
                userId=None,
                pricingModelId=self.model_id,
            )
        )
        self.customers[external_id] = customer
        if self.model["defaultProduct"] is not None:
            self.subscribe(customer, self.model["defaultProduct"], id=subscription_id)
        return customer

    def subscribe(
        self,
        customer: _Customer,
        product: Json,
        *,
        id: str | None = None,
        status: str = "active",
        do_not_charge: bool = False,
        grants: bool = True,
    ) -> SubscriptionBooks:
        """A new subscription. One to a free plan that was current is canceled for it; its balance stays behind."""
        price, now = product["prices"][0], now_ms()
        is_free = price["unitPrice"] == 0
        wire = self.made(
            "sub",
            id,
            startDate=now,
            customerId=customer.wire["id"],
            organizationId=self.organization_id,
            status=status,
            defaultPaymentMethodId=None,
            backupPaymentMethodId=None,
            trialEnd=None,
            currentBillingPeriodStart=now,
            currentBillingPeriodEnd=now + 30 * 86_400_000,
            metadata=None,
            canceledAt=None,
            cancelScheduledAt=None,
            cancellationReason=None,
            replacedBySubscriptionId=None,
            isFreePlan=is_free,
            doNotCharge=do_not_charge,
            priceId=price["id"],
            runBillingAtPeriodStart=True,
            interval="month",
            intervalCount=1,
            billingCycleAnchorDate=now,
            name=f"{product['name']} Subscription" if is_free else f"{product['name']} - {price['name']}",
            renews=True,
            pricingModelId=self.model_id,
            scheduledAdjustmentAt=None,
        )
        item = self.made(
            "si",
            subscriptionId=wire["id"],
            name=price["name"],
            addedDate=now,
            priceId=price["id"],
            unitPrice=price["unitPrice"],
            quantity=1,
            metadata=None,
            type="static",
            externalId=None,
            expiredAt=None,
            manuallyCreated=False,
            pricingModelId=self.model_id,
        )
        features = [
            self._feature_item(feature, item["id"], self._product_feature(product, feature), is_manual=False)
            for feature in product["features"]
        ]
        made = SubscriptionBooks(wire, [item], features)
        for old in customer.current:
            if old.wire["isFreePlan"]:
                old.wire |= {
                    "status": "canceled",
                    "canceledAt": now,
                    "cancellationReason": "upgraded_to_paid",
                    "replacedBySubscriptionId": made.id,
                    "updatedAt": now,
                }
        if grants:
            for feature in product["features"]:
                if feature["type"] == "usage_credit_grant":
                    self.grant(made, feature["usageMeterId"], feature["amount"])
        customer.subscriptions.append(made)
        return made

    def grant(self, subscription: SubscriptionBooks, meter_id: str, amount: int) -> None:
        subscription.balances[meter_id] = subscription.balances.get(meter_id, 0) + amount

    def _product_feature(self, product: Json, feature: Json) -> str:
        return self._product_features.setdefault((product["id"], feature["id"]), new_id("product_feature"))

    def _feature_item(self, feature: Json, item_id: str, product_feature: str | None, *, is_manual: bool) -> Json:
        return self.made(
            "sub_feature",
            subscriptionItemId=item_id,
            featureId=feature["id"],
            productFeatureId=product_feature,
            type=feature["type"],
            amount=feature["amount"],
            usageMeterId=feature["usageMeterId"],
            renewalFrequency=feature["renewalFrequency"],
            expiredAt=None,
            detachedAt=None,
            detachedReason=None,
            manuallyCreated=is_manual,
            pricingModelId=self.model_id,
            resourceId=None,
            name=feature["name"],
            slug=feature["slug"],
        )

    def find_subscription(self, subscription_id: object) -> tuple[_Customer, SubscriptionBooks] | None:
        for customer in [*self.customers.values(), *self.archived]:
            for subscription in customer.subscriptions:
                if subscription.id == subscription_id:
                    return customer, subscription
        return None

    # Requests.

    def answer(self, method: str, target: str, headers: Mapping[str, str], content: bytes) -> Reply:
        """What the server says to a request."""
        path, _, query = target.partition("?")
        refused = self._refuse_key(headers)
        if refused is not None:
            return refused
        segments = path.removeprefix("/api/v1").strip("/").split("/")
        if not path.startswith("/api/v1/"):
            return Reply(404, "Not Found")
        try:
            body = self._body(content) if method in ("POST", "PUT") else {}
            return self._route(method, [unquote(each) for each in segments], query, body)
        except _RefusalError as error:
            return error.reply

    def _refuse_key(self, headers: Mapping[str, str]) -> Reply | None:
        given = headers.get("authorization", "")
        if not given or given.lower().startswith("basic "):
            return Reply(401, "Unauthorized. Authorization header is required.")
        if given.startswith("bearer "):
            # The first parser takes it, the second does not.
            return _RefusalError(500, "Unwrap called on Err: NotFoundError: API key not found").reply
        if given.removeprefix("Bearer ") != self.key:
            return Reply(401, "API key invalid. Key not found in local database.")
        return None

    def _body(self, content: bytes) -> Json:
        try:
            body = json.loads(content)
        except ValueError:
            raise _RefusalError(400, "Invalid JSON in request body", "") from None
        return body if isinstance(body, dict) else {}

    def _route(self, method: str, path: list[str], query: str, body: Json) -> Reply:
        match method, path:
            case "POST", ["usage-events"]:
                _expect(body, ["usageEvent"], "object")
                return Reply(200, {"usageEvent": self._record(body["usageEvent"])})
            case "POST", ["usage-events", "bulk"]:
                _expect(body, ["usageEvents"], "array")
                return Reply(200, {"usageEvents": self._record_bulk(body["usageEvents"])})
            case "GET", ["usage-events"]:
                return self._page(self.events, query)
            case "GET", ["usage-events", event_id]:
                found = next((each for each in self.events if each["id"] == event_id), None)
                if found is None:
                    raise _not_found(f"No usage events found with id: {event_id}")
                return Reply(200, {"usageEvent": found})
            case "GET", ["usage-meters"]:
                return self._page(
                    [_without(each, "prices", "defaultPrice") for each in self.model["usageMeters"]], query
                )
            case "GET", ["usage-meters", meter_id]:
                return Reply(200, {"usageMeter": _without(self._meter_by_id(meter_id), "prices", "defaultPrice")})
            case "POST", ["usage-meters"]:
                _expect(body, ["usageMeter"], "object")
                return self._make_meter(body["usageMeter"])
            case "GET", ["pricing-models", "default"]:
                return Reply(200, {"pricingModel": self.model})
            case "POST", ["features"]:
                _expect(body, ["feature"], "object")
                return self._make_feature(body["feature"])
            case "POST", ["customers"]:
                _expect(body, ["customer"], "object")
                return self._make_customer(body["customer"])
            case "GET", ["customers", external_id]:
                return Reply(200, {"customer": self._customer(external_id).wire})
            case "GET", ["customers", external_id, "billing"]:
                return Reply(200, self._billing(self._customer(external_id)))
            case "GET", ["customers", external_id, "usage-balances"]:
                return self._balances(external_id, query)
            case "POST", ["customers", external_id, "archive"]:
                return self._archive(external_id)
            case "POST", ["checkout-sessions"]:
                _expect(body, ["checkoutSession"], "object")
                return self._checkout(body["checkoutSession"])
            case "POST", ["subscriptions"]:
                return self._make_subscription(body)
            case "POST", ["subscriptions", subscription_id, "add-feature"]:
                return self._add_feature(subscription_id, body)
            case _:
                return Reply(404, "Not Found")

    # Usage events.

    def _record(self, event: Json) -> Json:
        _check_event(event, ["usageEvent"])
        with self.lock:
            customer, subscription = self._charged(event)
            meter, price = self._resolve(event, "Unwrap called on Err: NotFoundError: ")
            earlier = self._earlier(event["transactionId"], meter["id"])
            if earlier is not None:
                return self._repeat(earlier, event)
            self._check_properties(event, meter)
            flight = _Flight(subscription.id, meter["id"], subscription.balances.get(meter["id"], 0))
            for other in self._in_flight:
                if (other.subscription_id, other.meter_id) == (flight.subscription_id, flight.meter_id):
                    other.is_raced = flight.is_raced = True
            self._in_flight.append(flight)
        try:
            self._work()
        finally:
            with self.lock:
                self._in_flight.remove(flight)
        with self.lock:
            if event["amount"] > MAX_INT32 or self._earlier(event["transactionId"], meter["id"]) is not None:
                raise _RefusalError(500, _insert_failed(event))
            left = subscription.balances.get(meter["id"], 0) - event["amount"]
            if flight.is_raced and left < 0 < flight.seen:
                # Two took the last credit at once. From now on nothing goes through on this meter.
                subscription.blocked.add(meter["id"])
            if meter["id"] in subscription.blocked:
                raise _RefusalError(500, _BLOCKED)
            return self._book(event, customer, subscription, meter, price)

    def _record_bulk(self, events: list[Json]) -> list[Json]:
        for at, event in enumerate(events):
            _check_event(event, ["usageEvents", at])
        with self.lock:
            wanted: list[tuple[Json, _Customer, SubscriptionBooks, Json, Json]] = []
            for event in events:
                found = self.find_subscription(event["subscriptionId"])
                if found is None:
                    raise _RefusalError(500, f"Subscription not found: {event['subscriptionId']}")
                if found[0].wire["archived"]:
                    raise _RefusalError(500, "Cannot create usage event for archived customer")
                wanted.append((event, *found, *self._resolve(event, "")))
            for event, _, subscription, meter, _ in wanted:
                if event["amount"] > MAX_INT32:
                    raise _RefusalError(500, _insert_failed(event))
                if meter["id"] in subscription.blocked:
                    raise _RefusalError(500, _BLOCKED)
            return [
                self._book(event, customer, subscription, meter, price)
                for event, customer, subscription, meter, price in wanted
                if self._earlier(event["transactionId"], meter["id"]) is None
            ]

    def _charged(self, event: Json) -> tuple[_Customer, SubscriptionBooks]:
        found = self.find_subscription(event["subscriptionId"])
        if found is None:
            raise _not_found(f"No subscriptions found with id: {event['subscriptionId']}")
        if found[0].wire["archived"]:
            raise _RefusalError(500, "Cannot create usage event for archived customer")
        return found

    def _resolve(self, event: Json, prefix: str) -> tuple[Json, Json]:
        """The meter and the price that an event names, by whichever of the four it does."""
        by = next(name for name in _IDENTIFIERS if event.get(name))
        value, where = event[by], " (not in customer's pricing model)"
        meters: list[Json] = self.model["usageMeters"]
        if by in ("usageMeterSlug", "usageMeterId"):
            field_name = "slug" if by == "usageMeterSlug" else "id"
            meter = next((each for each in meters if each[field_name] == value), None)
            if meter is None:
                said = f"with slug {value}" if by == "usageMeterSlug" else value
                said = f"{said}{where}" if prefix else f'slug "{value}"' if by == "usageMeterSlug" else value
                raise _RefusalError(500, f"{prefix}UsageMeter not found: {said}")
            return meter, next(each for each in meter["prices"] if each["isDefault"])

        field_name = "slug" if by == "priceSlug" else "id"
        products: list[Json] = self.model["products"]
        prices = [price for owner in [*products, *meters] for price in owner["prices"]]
        price = next((each for each in prices if each[field_name] == value and each["active"]), None)
        if price is None:
            said = f"with slug {value}{where}" if by == "priceSlug" else value
            raise _RefusalError(500, f"{prefix}Price not found: {said}")
        if price["usageMeterId"] is None:
            said = f"Invalid priceId: Price {price['id']} does not have a usage meter associated with it."
            raise _RefusalError(500, f"Unwrap called on Err: ValidationError: {said}")
        return self._meter_by_id(price["usageMeterId"]), price

    def _earlier(self, transaction_id: str, meter_id: str) -> Json | None:
        # An empty id matches whatever came first on the meter.
        return next(
            (
                each
                for each in self.events
                if each["usageMeterId"] == meter_id and transaction_id in ("", each["transactionId"])
            ),
            None,
        )

    def _repeat(self, earlier: Json, event: Json) -> Json:
        """The first event again, whatever the new one says; another's only under an empty id."""
        if event["transactionId"] and earlier["subscriptionId"] != event["subscriptionId"]:
            raise _RefusalError(
                500,
                f"UsageEvent conflict: A usage event already exists for transactionid {event['transactionId']}, but does not belong"
                f" to subscription {event['subscriptionId']}. Please provide a unique transactionId to create a new usage event.",
            )
        return earlier

    def _check_properties(self, event: Json, meter: Json) -> None:
        if meter["aggregationType"] == "count_distinct_properties" and not event.get("properties"):
            raise _RefusalError(500, f"Invalid properties: required on the usage meter {meter['slug']}")

    def _book(
        self, event: Json, customer: _Customer, subscription: SubscriptionBooks, meter: Json, price: Json
    ) -> Json:
        properties = event.get("properties") or {}
        is_counted = meter["aggregationType"] == "sum" or not any(
            each["subscriptionId"] == subscription.id
            and each["usageMeterId"] == meter["id"]
            and each["properties"] == properties
            for each in self.events
        )
        recorded = self.made(
            "usage_event",
            customerId=customer.wire["id"],
            subscriptionId=subscription.id,
            usageMeterId=meter["id"],
            billingPeriodId=subscription.period_id if subscription.is_current else None,
            amount=int(event["amount"]),
            usageDate=event.get("usageDate", now_ms()),
            transactionId=event["transactionId"],
            priceId=price["id"],
            properties=properties,
            pricingModelId=self.model_id,
        )
        self.events.append(recorded)
        if is_counted:
            self.grant(subscription, meter["id"], -int(event["amount"]))
        else:
            subscription.balances.setdefault(meter["id"], 0)
        return recorded

    def _meter_by_id(self, meter_id: str) -> Json:
        meters: list[Json] = self.model["usageMeters"]
        for each in meters:
            if each["id"] == meter_id:
                return each
        raise _not_found(f"No usage meters found with id: {meter_id}")

    # What else is asked for.

    def _customer(self, external_id: str) -> _Customer:
        # One with a "/" is stored, and not found again: its path has a segment too many.
        found = self.customers.get(external_id)
        if found is None or "/" in external_id:
            raise _RefusalError(404, f"Customer with externalId {external_id} not found")
        return found

    def _rows(self, subscription: SubscriptionBooks) -> list[Json]:
        return [
            {
                **_without(self._meter_by_id(meter_id), "prices", "defaultPrice"),
                "availableBalance": balance,
                "subscriptionId": subscription.id,
            }
            for meter_id, balance in subscription.balances.items()
        ]

    def _balances(self, external_id: str, query: str) -> Reply:
        with self.lock:
            customer = self._customer(external_id)
            wanted = parse_qs(query).get("subscriptionId", [""])[0]
            chosen = [each for each in customer.subscriptions if each.id == wanted] if wanted else customer.current
            if wanted and not chosen:
                raise _RefusalError(404, f"Subscription with id {wanted} not found for customer {external_id}")
            return Reply(200, {"usageMeterBalances": [row for each in chosen for row in self._rows(each)]})

    def _billing(self, customer: _Customer) -> Json:
        with self.lock:
            told = {each.id: self._told(each) for each in customer.subscriptions}
            current = sorted(customer.current, key=lambda each: each.wire["createdAt"])
            return {
                "customer": customer.wire,
                "subscriptions": [told[each.id] for each in reversed(customer.subscriptions)],
                "invoices": [],
                "paymentMethods": [],
                "purchases": [],
                "currentSubscriptions": [told[each.id] for each in current],
                "currentSubscription": told[current[-1].id] if current else None,
                "catalog": self.model,
                "pricingModel": self.model,
                "billingPortalUrl": f"{self.url}/billing-portal/{self.organization_id}",
            }

    def _told(self, subscription: SubscriptionBooks) -> Json:
        products: list[Json] = self.model["products"]
        prices = {price["id"]: price for product in products for price in product["prices"]}
        return {
            **subscription.wire,
            "current": subscription.is_current,
            "subscriptionItems": [{**item, "price": prices[item["priceId"]]} for item in subscription.items],
            "experimental": {"featureItems": subscription.features, "usageMeterBalances": self._rows(subscription)},
        }

    def _make_customer(self, wanted: Json) -> Reply:
        for name in ("externalId", "name", "email"):
            _expect(wanted, ["customer", name], "string")
        with self.lock:
            if wanted["externalId"] in self.customers:
                said = "This pricing model id external id unique idx already exists. Please choose a different value."
                raise _RefusalError(409, said)
            made = self.add_customer(wanted["externalId"], wanted["name"], wanted["email"])
            data: Json = {"customer": made.wire}
            for subscription in made.subscriptions:
                data |= {
                    "subscription": {**subscription.wire, "current": True},
                    "subscriptionItems": subscription.items,
                }
            return Reply(200, {"data": data})

    def _archive(self, external_id: str) -> Reply:
        with self.lock:
            customer = self._customer(external_id)
            del self.customers[external_id]
            self.archived.append(customer)
            customer.wire |= {"archived": True, "updatedAt": now_ms()}
            for subscription in customer.current:
                subscription.wire |= {"status": "canceled", "cancellationReason": "customer_archived"}
            return Reply(200, {"customer": customer.wire})

    def _make_meter(self, wanted: Json) -> Reply:
        with self.lock:
            if any(each["slug"] == wanted["slug"] for each in self.model["usageMeters"]):
                raise _RefusalError(409, "A usage meter with this slug already exists in this pricing model.")
            made = self.add_meter(wanted["slug"], wanted["name"], wanted.get("aggregationType", "sum"), None)
            return Reply(200, {"usageMeter": made})

    def _make_feature(self, wanted: Json) -> Reply:
        with self.lock:
            made = self.add_feature(
                wanted["slug"],
                wanted["name"],
                kind=wanted["type"],
                description=wanted["description"],
                amount=wanted.get("amount"),
                meter_id=wanted.get("usageMeterId"),
                renewal=wanted.get("renewalFrequency"),
            )
            return Reply(200, {"feature": made})

    def _make_subscription(self, wanted: Json) -> Reply:
        with self.lock:
            customers = self.customers.values()
            customer = next((each for each in customers if each.wire["id"] == wanted.get("customerId")), None)
            if customer is None:
                raise _not_found(f"No customers found with id: {wanted.get('customerId')}")
            try:
                product = self.product(str(wanted.get("priceSlug")))
            except LookupError:
                raise _not_found(f"Price not found: with slug {wanted.get('priceSlug')}") from None
            is_free_of_charge = bool(wanted.get("doNotCharge"))
            # Its credits wait for the billing run, which never comes here.
            made = self.subscribe(
                customer,
                product,
                status="active" if is_free_of_charge else "incomplete",
                do_not_charge=is_free_of_charge,
                grants=False,
            )
            return Reply(200, {"subscription": {**made.wire, "current": made.is_current}})

    def _add_feature(self, subscription_id: str, wanted: Json) -> Reply:
        with self.lock:
            found = self.find_subscription(subscription_id)
            feature = self.features.get(str(wanted.get("featureId")))
            if found is None or feature is None:
                raise _not_found(f"No subscriptions found with id: {subscription_id}")
            _, subscription = found
            item = next((each for each in subscription.features if each["featureId"] == feature["id"]), None)
            if item is None:
                item = self._feature_item(feature, subscription.items[0]["id"], None, is_manual=True)
                subscription.features.append(item)
            else:
                # What is shown grows; what is there does not.
                item |= {"amount": (item["amount"] or 0) + (feature["amount"] or 0), "updatedAt": now_ms()}
            if wanted.get("grantCreditsImmediately") and feature["id"] not in subscription.granted:
                subscription.granted.add(feature["id"])
                self.grant(subscription, feature["usageMeterId"], feature["amount"])
            return Reply(200, {"subscriptionItemFeature": item})

    def _checkout(self, wanted: Json) -> Reply:
        for name in ("successUrl", "cancelUrl"):
            _expect(wanted, ["checkoutSession", name], "string")
        with self.lock:
            customer = self.customers.get(str(wanted.get("customerExternalId")))
            slug, price_id = wanted.get("priceSlug"), wanted.get("priceId")
            if customer is None:
                said = "Customer is required to resolve price slug for identified checkout sessions"
                raise _RefusalError(500, f"Invalid customer: {said}")
            products: list[Json] = self.model["products"]
            prices = [price for product in products for price in product["prices"]]
            price = next((each for each in prices if slug == each["slug"] or price_id == each["id"]), None)
            if price is None:
                said = f'Price with slug "{slug}" not found for customer\'s pricing model'
                raise _RefusalError(500, f"Invalid priceSlug: {said}" if slug else f"Invalid priceId: {price_id}")
            session = self.made(
                "chckt_session",
                pricingModelId=self.model_id,
                status="open",
                billingAddress=None,
                priceId=price["id"],
                purchaseId=None,
                invoiceId=None,
                quantity=wanted.get("quantity", 1),
                organizationId=self.organization_id,
                customerName=customer.wire["name"],
                customerEmail=customer.wire["email"],
                customerId=customer.wire["id"],
                paymentMethodType=None,
                discountId=None,
                successUrl=wanted["successUrl"],
                cancelUrl=wanted["cancelUrl"],
                type="product",
                preserveBillingCycleAnchor=False,
                outputMetadata=wanted.get("outputMetadata"),
                outputName=wanted.get("outputName"),
                targetSubscriptionId=None,
                automaticallyUpdateSubscriptions=None,
                expires=now_ms() + 86_400_000,
            )
            self.sessions.append(session)
            return Reply(200, {"checkoutSession": session, "url": f"{self.url}/checkout/{session['id']}"})

    def _page(self, rows: list[Json], query: str) -> Reply:
        """A page, oldest first. Filters are ignored; a cursor is the place where the page before ended."""
        asked = parse_qs(query)
        limit = int(asked.get("limit", ["10"])[0])
        start = _place(asked["cursor"][0]) if "cursor" in asked else 0
        for is_bad, issue in (
            (limit > 100, ("too_big", "maximum", 100, "Too big: expected number to be <=100")),
            (limit < 1, ("too_small", "minimum", 1, "Too small: expected number to be >=1")),
        ):
            if is_bad:
                code, bound, value, message = issue
                said = {
                    "origin": "number",
                    "code": code,
                    bound: value,
                    "inclusive": True,
                    "path": ["limit"],
                    "message": message,
                }
                raise _RefusalError(400, json.dumps([said], indent=2), "")
        with self.lock:
            page = rows[start : start + limit]
            has_more = start + limit < len(rows)
            return Reply(
                200,
                {
                    "data": page,
                    "currentCursor": _cursor(start) if start else None,
                    "nextCursor": _cursor(start + limit) if has_more else None,
                    "hasMore": has_more,
                    "total": len(rows),
                },
            )


@dataclass(eq=False)
class _Flight:
    """
    An event that is just being recorded, on the balance that was seen when it began. `is_raced`: another one of the same subscription
    and meter was recorded at the same time.
    """

    subscription_id: str
    meter_id: str
    seen: int
    is_raced: bool = False


_IDENTIFIERS = ("usageMeterSlug", "usageMeterId", "priceSlug", "priceId")
_BLOCKED = 'Failed to bulk insert into usage_credit_applications: Failed query: insert into "usage_credit_applications"'


def now_ms() -> int:
    return int(time.time() * 1000)


def _cursor(at: int) -> str:
    return base64.b64encode(json.dumps({"at": at}).encode()).decode()


def _place(cursor: str) -> int:
    try:
        return int(json.loads(base64.b64decode(cursor))["at"])
    except (ValueError, KeyError, TypeError):
        raise _RefusalError(400, "Invalid cursor", "") from None


def _without(record: Json, *names: str) -> Json:
    return {name: value for name, value in record.items() if name not in names}


def _not_found(what: str) -> _RefusalError:
    return _RefusalError(500, f"Unwrap called on Err: NotFoundError: {what}")


def _insert_failed(event: Json) -> str:
    query = 'insert into "usage_events" (…) values (…)'
    values = f"{event['subscriptionId']},{event['amount']},{event['transactionId']}"
    said = "Failed to insert item into usage_events: Failed to insert items into usage_events"
    return f"{said}: Failed query: {query}\nparams: {values}"


# Bad requests, in the words of the schema's own checker.


def _kind(value: object) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return "null" if value is None else next(name for kind, name in kinds.items() if isinstance(value, kind))


def _issue(path: list[str | int], **fields: object) -> _RefusalError:
    return _RefusalError(400, [{**fields, "path": path}])


def _expect(owner: Json, path: list[str | int], wanted: str) -> None:
    name = str(path[-1])
    kind = _kind(owner[name]) if name in owner else "undefined"
    if kind != wanted:
        message = f"Invalid input: expected {wanted}, received {kind}"
        raise _issue(path, expected=wanted, code="invalid_type", message=message)


def _check_event(event: Any, path: list[str | int]) -> None:
    _expect(event, [*path, "amount"], "number")
    amount = event["amount"]
    if amount != int(amount):
        message = "Invalid input: expected int, received number"
        raise _issue([*path, "amount"], expected="int", format="safeint", code="invalid_type", message=message)
    if amount <= 0:
        message = "Too small: expected number to be >0"
        raise _issue([*path, "amount"], origin="number", code="too_small", minimum=0, inclusive=False, message=message)
    for name in ("subscriptionId", "transactionId"):
        _expect(event, [*path, name], "string")
    for name in _IDENTIFIERS:
        if name in event:
            _expect(event, [*path, name], "string")
    if sum(bool(event.get(name)) for name in _IDENTIFIERS) != 1:
        message = "Exactly one of priceId, priceSlug, usageMeterId, or usageMeterSlug must be provided"
        raise _issue([*path, "priceId"], code="custom", message=message)
