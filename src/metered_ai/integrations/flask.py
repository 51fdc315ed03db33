"""
Billing for Flask: one call when the application is made.

```python
add_billing(app, customer=lambda: session.get("user"), billing=client.billing)
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flask import Flask, Response, g, jsonify, request

from ..context import bill_to
from ..core.checks import check_name
from ..errors import MeteringError
from .chunks import Chunks
from .refusals import CREDITS_HEADER, REQUEST_ID_HEADER, Refusal, credits_left, operation_of, refusal_of

if TYPE_CHECKING:
    from ..billing import Billing

__all__ = ["add_billing"]


def add_billing(
    app: Flask,
    *,
    customer: Callable[[], str | None],
    requires_request_id: bool | Callable[[], bool] = False,
    billing: Billing | None = None,
    meter: str = "generations",
) -> None:
    """
    Bill the calls of each request to a customer, and answer refusals.

    `customer` is asked once a request, after functions that were registered with `before_request` earlier: who pays, from what your
    application has made sure of (`session`, `g`). None bills nobody: calls are then refused, unless their client names a customer.

    - It holds for sync views, async views and streamed answers. Their first piece is made before the answer begins, so that a refusal
      there is a 402 and not a broken 200.
    - The receipt is `flask.g.bill`.
    - With `requires_request_id` (True, or a function) a request without `x-request-id` is a 400. `req_` and that id is the transaction
      id of its calls, so the same request again is a 409 once it was billed (`on_repeat="free"`: answered again, for nothing, as often
      as the client likes to send that id).
    - With `billing` every answer has `X-Credits-Remaining`: what is left on `meter` when the answer begins.
    """
    check_name(meter, "meter")

    def begin() -> Response | None:
        transaction_id = None
        if requires_request_id is True or (requires_request_id is not False and requires_request_id()):
            operation = operation_of(request.headers.get(REQUEST_ID_HEADER))
            if isinstance(operation, Refusal):
                return _json(operation)
            transaction_id = operation
        who = customer()
        if who is not None:
            g.metered_ai_customer = who
            g.metered_ai_block = bill_to(who, transaction_id=transaction_id)
            g.bill = g.metered_ai_block.__enter__()
        return None

    def finish(response: Response) -> Response:
        who: str | None = g.get("metered_ai_customer")
        if who is None:
            return response
        if response.is_streamed and not response.direct_passthrough:
            try:
                response.response = Chunks(response.response)
            except MeteringError as error:
                response.close()
                response = _json(refusal_of(error))
        if billing is not None:
            left = credits_left(billing, who, meter)
            if left is not None:
                response.headers[CREDITS_HEADER] = left
        return response

    def leave(_: BaseException | None) -> None:
        block = g.pop("metered_ai_block", None)
        if block is not None:
            block.__exit__(None, None, None)

    def refuse(error: MeteringError) -> Response:
        return _json(refusal_of(error))

    app.before_request(begin)
    app.after_request(finish)
    app.teardown_request(leave)
    app.register_error_handler(MeteringError, refuse)


def _json(refusal: Refusal) -> Response:
    response = jsonify(dict(refusal.body))
    response.status_code = refusal.status
    response.headers.update(dict(refusal.headers))
    return response
