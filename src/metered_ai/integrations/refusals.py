"""What a web application answers when a call was refused: status, body and headers, the same for every framework."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..core.checks import check_name
from ..errors import (
    AlreadyBilledError,
    BillingUnavailableError,
    FeatureRequiredError,
    InsufficientCreditsError,
    MeteringError,
    UnmeteredCallError,
)

if TYPE_CHECKING:
    from ..billing import Billing
    from ..records import Balance

__all__ = [
    "CREDITS_HEADER",
    "REQUEST_ID_HEADER",
    "Refusal",
    "acredits_left",
    "credits_left",
    "operation_of",
    "refusal_behind",
    "refusal_of",
]

_log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
CREDITS_HEADER = "X-Credits-Remaining"


class Refusal(NamedTuple):
    """An HTTP answer. `body` is JSON and fit for an end user: what an operator needs is logged and never sent."""

    status: int
    body: Mapping[str, object]
    headers: Mapping[str, str]


def refusal_of(error: MeteringError) -> Refusal:
    """
    How to answer an error of ours: `http_status`, and for a 402 the body of `error.to_dict()`.

    402 and 503 carry `Retry-After` where waiting helps. What the application's owner must mend (500, 501) is logged as an error.
    """
    headers: dict[str, str] = {}
    if isinstance(error, InsufficientCreditsError):
        body = error.to_dict()
        if error.is_transient:
            # It would fit once the calls in flight have ended.
            headers["Retry-After"] = "1"
    elif isinstance(error, AlreadyBilledError):
        body = _body("already_billed", "This request was made before. It was not run again.")
        body["transactionId"] = error.transaction_id
    elif isinstance(error, FeatureRequiredError):
        body = _body("feature_required", "Your plan does not include this feature.")
    elif isinstance(error, BillingUnavailableError):
        _log.error("a call was refused: %s", error)
        body = _body("billing_unavailable", "Credits cannot be checked at the moment. Nothing was charged.")
        headers["Retry-After"] = "5"
    elif isinstance(error, UnmeteredCallError):
        _log.error("a call was refused: %s", error)
        body = _body("unmetered_call", "This is not available.")
    else:
        _log.error("a call was refused: %s", error)
        body = _body("billing_error", "Something is wrong on our side.")
    return Refusal(error.http_status, body, headers)


def refusal_behind(error: BaseException) -> MeteringError | None:
    """
    The error of ours that a framework has wrapped into one of its own (LiteLLM, instructor), or None.

    Looks along `__cause__` and `__context__`, and into groups of exceptions. For handlers of the framework's errors, whose cause you know;
    do not ask it of every exception: one that was raised while a refusal was handled is no refusal.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        if isinstance(found, MeteringError):
            return found
        seen.add(id(found))
        waiting += [found.__context__, found.__cause__]
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions
    return None


def operation_of(request_id: str | None) -> str | Refusal:
    """`req_` and the request's id, which names it as an operation that is billed once; a 400 where there is none, or one that cannot be."""
    if request_id is None:
        return Refusal(400, _body("request_id_required", "The header x-request-id is required."), {})
    try:
        return "req_" + check_name(request_id, REQUEST_ID_HEADER, 200)
    except ValueError:
        return Refusal(400, _body("request_id_invalid", "The header x-request-id must have 1 to 200 characters."), {})


def credits_left(billing: Billing, customer: str, meter: str) -> str | None:
    """What `X-Credits-Remaining` says: the credits available; None for an unlimited account, and where the ledger does not answer."""
    try:
        return shown(billing.balance(customer, meter))
    except BillingUnavailableError as error:
        _log.warning("no %s: %s", CREDITS_HEADER, error)
        return None


async def acredits_left(billing: Billing, customer: str, meter: str) -> str | None:
    """`credits_left`, without blocking the loop."""
    try:
        return shown(await billing.abalance(customer, meter))
    except BillingUnavailableError as error:
        _log.warning("no %s: %s", CREDITS_HEADER, error)
        return None


def shown(balance: Balance) -> str | None:
    """A balance as the header says it."""
    return None if balance.available is None else str(balance.available)


def _body(error: str, message: str) -> dict[str, object]:
    return {"error": error, "message": message}
