"""Who pays and how, from several sources: the rule of precedence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigurationError
from .checks import check_amount, check_name

if TYPE_CHECKING:
    from ..records import Request, Usage
    from .pricing import Pricing

__all__ = ["NOTHING", "Payer", "Terms", "operation_id", "resolve", "terms"]


class Terms(NamedTuple):
    """What one source says about who pays and how. None says nothing."""

    customer: str | None = None
    meter: str | None = None
    amount: int | None = None
    pricing: Pricing | Callable[[Usage], int] | None = None
    estimate: Callable[[Request], int] | None = None
    price_slug: str | None = None
    transaction_id: str | None = None
    scope: str | None = None
    properties: Mapping[str, Any] | None = None


NOTHING = Terms()


class Payer(NamedTuple):
    """What a call was told when it started. Settling never looks anywhere else."""

    customer: str | None
    meter: str | None
    amount: int | None
    pricing: Pricing | Callable[[Usage], int] | None
    estimate: Callable[[Request], int] | None
    price_slug: str | None
    transaction_id: str | None
    scope: str | None
    properties: Mapping[str, Any] | None
    parent: str | None = None


def terms(
    *,
    customer: str | None = None,
    meter: str | None = None,
    amount: int | None = None,
    pricing: Pricing | Callable[[Usage], int] | None = None,
    estimate: Callable[[Request], int] | None = None,
    price_slug: str | None = None,
    transaction_id: str | None = None,
    properties: Mapping[str, Any] | None = None,
    scope: str | None = None,
) -> Terms:
    """Check what a user gave and make it a source. Raises ValueError or ConfigurationError naming the value."""
    if amount is not None and pricing is not None:
        raise ConfigurationError(f"give amount or pricing, not both (amount={amount!r})")

    if customer is not None:
        check_name(customer, "customer")
    if meter is not None:
        check_name(meter, "meter")
    if amount is not None:
        check_amount(amount, "amount")
    if price_slug is not None:
        check_name(price_slug, "price_slug")
    if transaction_id is not None:
        check_name(transaction_id, "transaction_id", 255)
    if pricing is not None:
        from .pricing import as_pricing

        pricing = as_pricing(pricing)
    if estimate is not None and not callable(estimate):
        raise ConfigurationError(f"estimate must be a function of a Request, not {estimate!r}")
    if properties is not None:
        properties = _checked_properties(properties)

    return Terms(
        customer,
        meter,
        amount,
        pricing,
        estimate,
        price_slug,
        transaction_id,
        scope if transaction_id is not None else None,
        properties,
    )


def _checked_properties(properties: Mapping[str, Any]) -> Mapping[str, Any]:
    import json

    try:
        return dict(json.loads(json.dumps(dict(properties), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"properties must be plain JSON values: {error}") from error


def resolve(sources: Iterable[Terms]) -> Payer:
    """
    Ask the sources field by field, the nearest first.

    A source that names a customer hides the transaction id, amount, price slug and properties of the sources below it; naming a
    meter hides the amount and price slug below it. The nearest source that gives a price wins, and hides estimates below it.
    """
    customer = meter = amount = pricing = estimate = price_slug = transaction_id = scope = None
    properties: Mapping[str, Any] | None = None
    is_priced = False
    for source in sources:
        if source is NOTHING:
            continue
        its_customer, its_meter, its_amount, its_pricing, its_estimate, its_slug, its_id, its_scope, its_properties = (
            source
        )
        is_same_customer = customer is None
        is_same_meter = meter is None
        if is_same_customer:
            if transaction_id is None:
                transaction_id, scope = its_id, its_scope
            if its_properties:
                properties = {**its_properties, **(properties or {})}
        if is_same_customer and is_same_meter and price_slug is None:
            price_slug = its_slug
        if not is_priced:
            if estimate is None:
                estimate = its_estimate
            if its_amount is not None and is_same_customer and is_same_meter:
                amount, is_priced = its_amount, True
            elif its_pricing is not None:
                pricing, is_priced = its_pricing, True
        if is_same_customer:
            customer = its_customer
        if is_same_meter:
            meter = its_meter

    return Payer(customer, meter, amount, pricing, estimate, price_slug, transaction_id, scope, properties)


def operation_id(customer: str, /, **params: Any) -> str:
    """
    A transaction id for an operation that has no id of its own: the same customer and parameters give the same one, in every process.

    Parameters are plain JSON values. Two operations that should both be charged need a parameter that tells them apart.
    """
    import json
    from hashlib import sha256

    try:
        text = json.dumps([customer, params], sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"operation_id needs plain JSON values: {error}") from error
    return f"op_{sha256(text.encode()).hexdigest()[:40]}"
