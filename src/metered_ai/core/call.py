"""One metered call: what it needs before it is sent, how it ended, and what to record of it. Decides; does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from ..errors import ConfigurationError, CustomerRequiredError, MeteringError, PriceUnknownError
from ..records import Basis, Request, Usage
from .checks import check_amount
from .endpoints import Door
from .observe import Observation, believable_usage, fingerprint
from .payer import Payer
from .pricing import Pricing, as_pricing, bound_usage, capped_body, estimated_usage, per_call
from .steps import Place, Release, Settle

__all__ = ["Ended", "Plan", "Policies", "ending", "place_step", "plan", "wants_drain"]

_ONE_CREDIT = per_call(1)
_NO_USAGE = Usage()

Ended = Literal["answered", "stopped", "held", "broken", "refused", "not_sent", "unknown", "priceless"]
"""
answered: a whole answer came; stopped: the consumer left early or never read; held: the same, but the hold is to be charged (a drain
that did not reach the usage); broken: the provider broke off in mid-answer; refused: a provider's error after all retries;
not_sent: no byte went out; unknown: no answer and no refusal; priceless: answered, but its price could not be worked out.
"""


class Policies(NamedTuple):
    """The policies that decide endings, checked where they are given."""

    on_unknown: Literal["release", "charge"] = "release"
    on_failure: Literal["release", "observed"] = "release"
    on_abort: Literal["observed", "hold", "drain"] = "observed"
    on_repeat: Literal["refuse", "free"] = "refuse"
    default_max_output_tokens: int = 4096


class Plan(NamedTuple):
    """What a call needs: who pays, the credits to hold, and what to add to its body."""

    door: Door
    request: Request
    payer: Payer
    customer: str
    meter: str
    pricing: Pricing
    amount: int
    policies: Policies
    add_to_body: Mapping[str, Any]
    hides_usage: bool


def plan(
    door: Door,
    request: Request,
    payer: Payer,
    policies: Policies,
    default_meter: str,
    *,
    reads_raw: bool,
) -> Plan:
    """
    Decide who pays and how much to hold. `reads_raw`: the caller reads the stream's bytes, so nothing may be added or hidden.

    CustomerRequiredError without a customer, PriceUnknownError where the pricing cannot price the call.
    """
    if payer.customer is None:
        raise CustomerRequiredError(
            f"no customer for {door.name}: name one with bill_to(), with_billing(customer=) or the client's customer="
        )

    if payer.amount is not None:
        pricing = per_call(payer.amount)
    elif payer.pricing is not None:
        pricing = as_pricing(payer.pricing)
    else:
        pricing = _ONE_CREDIT
    if not pricing.can_price(door):
        raise PriceUnknownError(
            f"{door.name} reports nothing that {pricing!r} can price; give it an amount= or per_call pricing"
        )

    amount = _hold(door, request, payer, pricing, policies)

    add_to_body: dict[str, Any] = {}
    hides_usage = False
    if not pricing.is_fixed:
        if pricing.cap_output:
            add_to_body.update(capped_body(door, request, policies.default_max_output_tokens))
        if request.stream and door.reads in ("chat", "completion") and not reads_raw:
            options = request.body.get("stream_options")
            if not isinstance(options, Mapping) or not options.get("include_usage"):
                add_to_body["stream_options"] = {
                    **(options if isinstance(options, Mapping) else {}),
                    "include_usage": True,
                }
                hides_usage = True

    return Plan(
        door,
        request,
        payer,
        payer.customer,
        payer.meter or default_meter,
        pricing,
        amount,
        policies,
        add_to_body,
        hides_usage,
    )


def _hold(door: Door, request: Request, payer: Payer, pricing: Pricing, policies: Policies) -> int:
    try:
        if payer.estimate is not None and not payer.parent:
            return _estimated(door, payer.estimate, request)
        if pricing.is_fixed:
            return pricing.hold(_NO_USAGE)
        return pricing.hold(bound_usage(door, request, policies.default_max_output_tokens))
    except MeteringError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"no valid hold for {door.name}: {error}") from error
    except Exception as error:
        raise PriceUnknownError(
            f"the pricing or estimate failed for {door.name}, model {request.model!r}: {type(error).__name__}"
        ) from error


def _estimated(door: Door, estimate: Callable[[Request], int], request: Request) -> int:
    try:
        amount = estimate(request)
    except MeteringError:
        raise
    except Exception as error:  # noqa: BLE001  a user's function may raise anything
        # By its name only: the function has seen the prompt, and so may what it says of its failure.
        raise PriceUnknownError(f"the estimate for {door.name} failed: {type(error).__name__}") from None
    if not isinstance(amount, int | float):
        raise ConfigurationError(f"the estimate for {door.name} must be an int, not a {type(amount).__name__}")
    return check_amount(amount, f"the estimate for {door.name}")


def place_step(plan: Plan, hold_id: str, owner: str | None, lease: float, max_call: float, max_holds: int) -> Place:
    """The step that checks and reserves."""
    payer = plan.payer
    return Place(
        hold_id,
        plan.customer,
        plan.meter,
        plan.amount,
        owner,
        lease,
        max_call,
        plan.policies.on_unknown,
        payer.transaction_id,
        payer.scope,
        plan.policies.on_repeat,
        payer.parent,
        plan.door.name,
        plan.request.model,
        payer.price_slug,
        payer.properties,
        max_holds,
    )


def wants_drain(plan: Plan) -> bool:
    """True when an early stop is to be read on in the background, because only the usage at the end says what it cost."""
    return plan.policies.on_abort == "drain" and not plan.pricing.is_fixed


def ending(
    plan: Plan,
    ended: Ended,
    seen: Observation | None,
    hold_id: str,
    *,
    operation: str | None,
    is_unlimited: bool,
    request_id: str | None,
    attempts: int,
) -> Settle | Release:
    """
    Decide what an ended call costs. `operation` is the transaction id that the hold was placed with, if any.

    Never raises: a pricing that fails after the answer charges the hold, because the answer was given.
    """
    charge: tuple[int, Basis, Usage | None] | None = None
    if ended == "answered":
        if seen is not None and (not seen.is_answer or seen.failed):
            return _release(plan, hold_id, "provider_error", "yes")
        charge = _answered(plan, seen)
    if ended in ("answered", "stopped", "held") and seen is not None and seen.error and not _has_usage(plan, seen):
        # The SDK raises at an error event, and closes: the provider broke off, not the consumer.
        ended = "broken"
    if ended == "broken":
        if plan.policies.on_failure == "release":
            return _release(plan, hold_id, "stream_failed", "yes")
        charge = _observed(plan, seen)
    elif ended == "stopped":
        # With "drain", whoever read on has ended the call with "answered" or "held"; nobody could read on here.
        charge = _observed(plan, seen) if plan.policies.on_abort == "observed" else _as_held(plan, seen)
    elif ended == "held":
        charge = _as_held(plan, seen)
    elif ended == "unknown":
        if plan.policies.on_unknown == "release":
            return _release(plan, hold_id, "unknown", "unknown")
        charge = plan.amount, "held", None
        # Nobody has an answer whose id could name it.
        seen, request_id = None, None
    elif ended == "priceless":
        charge = plan.amount, "held", seen.usage if seen is not None else None
    elif ended == "refused":
        return _release(plan, hold_id, "provider_error", "yes")
    elif ended == "not_sent":
        return _release(plan, hold_id, "not_sent", "no")
    assert charge is not None, ended

    amount, basis, usage = charge
    payer = plan.payer
    return Settle(
        hold_id,
        plan.customer,
        plan.meter,
        amount,
        operation or transaction_id(seen.id if seen is not None else None, request_id, hold_id),
        basis,
        operation is not None,
        fingerprint(seen) if seen is not None and seen.id else None,
        usage,
        request_id[:255] if request_id else None,
        attempts,
        "call",
        payer.properties,
        payer.price_slug,
        payer.parent,
        is_unlimited,
    )


def transaction_id(result_id: str | None, request_id: str | None, hold_id: str) -> str:
    """`gen_` and the result's id, else the provider's request id, else the hold's id. A wild id is hashed: it must fit a key."""
    for provider_id in (result_id, request_id):
        if not provider_id:
            continue
        if len(provider_id) <= 200 and provider_id.isascii() and provider_id.isprintable() and " " not in provider_id:
            return f"gen_{provider_id}"
        return f"gen_{sha256(provider_id.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return f"hold_{hold_id}"


def _release(plan: Plan, hold_id: str, reason: Any, sent: Literal["yes", "no", "unknown"]) -> Release:
    return Release(hold_id, plan.customer, plan.meter, reason, sent)


def _has_usage(plan: Plan, seen: Observation) -> bool:
    usage = believable_usage(plan.door, seen)
    return usage is not None and plan.pricing.can_charge(usage)


def _answered(plan: Plan, seen: Observation | None) -> tuple[int, Basis, Usage | None]:
    usage = seen.usage if seen is not None else None
    if plan.pricing.is_fixed:
        return plan.pricing.charge(_NO_USAGE), "reported" if usage else "held", usage
    if seen is not None and usage is not None and _has_usage(plan, seen):
        return _priced(plan, usage, "reported")

    amount, basis, usage = _priced(plan, estimated_usage(plan.door, plan.request, seen), "estimated")
    return min(amount, plan.amount), basis, usage


def _observed(plan: Plan, seen: Observation | None) -> tuple[int, Basis, Usage | None]:
    if plan.pricing.is_fixed:
        return _answered(plan, seen)
    if seen is not None and seen.usage is not None and _has_usage(plan, seen):
        return _priced(plan, seen.usage, "reported")

    amount, basis, usage = _priced(plan, estimated_usage(plan.door, plan.request, seen), "observed")
    return min(amount, plan.amount), basis, usage


def _as_held(plan: Plan, seen: Observation | None) -> tuple[int, Basis, Usage | None]:
    if plan.pricing.is_fixed or (seen is not None and _has_usage(plan, seen)):
        return _observed(plan, seen)
    return plan.amount, "held", None


def _priced(plan: Plan, usage: Usage, basis: Basis) -> tuple[int, Basis, Usage]:
    try:
        return plan.pricing.charge(usage), basis, usage
    except Exception:  # noqa: BLE001  a user's function may raise anything, and the answer was given: charge what was held
        return plan.amount, "held", usage
