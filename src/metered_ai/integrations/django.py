"""
Billing for Django, sync and async: one line in a module of yours, one in `MIDDLEWARE`.

```python
# shop/billing.py
middleware = BillingMiddleware(customer=lambda request: request.user.get_username() or None, billing=client.billing)

# settings.py
MIDDLEWARE = ["django.contrib.auth.middleware.AuthenticationMiddleware", ..., "shop.billing.middleware"]
```
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from asgiref.sync import (
    iscoroutinefunction,  # pyright: ignore[reportDeprecated]  # Django's own word, until it needs Python 3.12
    markcoroutinefunction,
    sync_to_async,
)
from django.http import FileResponse, HttpRequest, HttpResponseBase, JsonResponse

from ..context import bill_to
from ..core.checks import check_name
from ..errors import MeteringError
from .chunks import AsyncChunks, Chunks
from .refusals import (
    CREDITS_HEADER,
    REQUEST_ID_HEADER,
    Refusal,
    acredits_left,
    credits_left,
    operation_of,
    refusal_of,
)

if TYPE_CHECKING:
    from ..billing import Billing

__all__ = ["BillingMiddleware"]


class BillingMiddleware:
    """
    Bills the calls of each request to a customer, and answers refusals. Put it below the middleware that knows the user.

    `customer` is asked once a request: who pays, from what your application has made sure of. None bills nobody: calls are then refused,
    unless their client names a customer. For async views it runs in a thread, so it may use the database.

    - It holds for sync views, async views and streamed answers. Their first piece is made before the answer begins, so that a refusal
      there is a 402 and not a broken 200.
    - The receipt is `request.bill`.
    - With `requires_request_id` (True, or a function of the request) a request without `x-request-id` is a 400. `req_` and that id is the
      transaction id of its calls, so the same request again is a 409 once it was billed (`on_repeat="free"`: answered again, for
      nothing, as often as the client likes to send that id).
    - With `billing` every answer has `X-Credits-Remaining`: what is left on `meter` when the answer begins.
    """

    sync_capable = True
    async_capable = True

    def __init__(
        self,
        *,
        customer: Callable[[HttpRequest], str | None],
        requires_request_id: bool | Callable[[HttpRequest], bool] = False,
        billing: Billing | None = None,
        meter: str = "generations",
    ) -> None:
        self.customer = customer
        self.requires_request_id = requires_request_id
        self.billing = billing
        self.meter = check_name(meter, "meter")

    def __call__(self, get_response: Callable[[HttpRequest], Any]) -> _Middleware:
        """What Django asks of a middleware: wrap the next one."""
        return _Middleware(self, get_response)


class _Middleware:
    """The middleware in a chain. Two shells, side by side."""

    def __init__(self, keeps: BillingMiddleware, get_response: Callable[[HttpRequest], Any]) -> None:
        self._keeps = keeps
        self._get_response = get_response
        self._is_async: bool = iscoroutinefunction(get_response)  # pyright: ignore[reportDeprecated]  # as above
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        return self._aserve(request) if self._is_async else self._serve(request)

    def _serve(self, request: HttpRequest) -> HttpResponseBase:
        keeps = self._keeps
        customer = keeps.customer(request)
        operation = self._operation(request)
        if isinstance(operation, Refusal):
            return _json(operation)
        if customer is None:
            return self._get_response(request)

        with bill_to(customer, transaction_id=operation) as bill:
            cast("Any", request).bill = bill
            response = self._get_response(request)
            try:
                self._begin(response)
            except MeteringError as error:
                response.close()
                response = _json(refusal_of(error))
        if keeps.billing is not None:
            _say(response, credits_left(keeps.billing, customer, keeps.meter))
        return response

    async def _aserve(self, request: HttpRequest) -> HttpResponseBase:
        keeps = self._keeps
        customer = await sync_to_async(keeps.customer)(request)
        operation = self._operation(request)
        if isinstance(operation, Refusal):
            return _json(operation)
        if customer is None:
            return await self._get_response(request)

        with bill_to(customer, transaction_id=operation) as bill:
            cast("Any", request).bill = bill
            response = await self._get_response(request)
            try:
                await self._abegin(response)
            except MeteringError as error:
                response.close()
                response = _json(refusal_of(error))
        if keeps.billing is not None:
            _say(response, await acredits_left(keeps.billing, customer, keeps.meter))
        return response

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:  # noqa: ARG002  Django's signature
        """What Django asks when a view has raised."""
        return _json(refusal_of(error)) if isinstance(error, MeteringError) else None

    def _operation(self, request: HttpRequest) -> str | Refusal | None:
        wanted = self._keeps.requires_request_id
        if wanted is True or (wanted is not False and wanted(request)):
            return operation_of(cast("Any", request).headers.get(REQUEST_ID_HEADER))
        return None

    def _begin(self, response: Any) -> None:
        if not response.streaming or isinstance(response, FileResponse):
            return
        if response.is_async:
            # Its first piece would be made in an event loop that is gone when the second is asked for.
            response.streaming_content = AsyncChunks(response.streaming_content)
        else:
            response.streaming_content = Chunks(response.streaming_content)

    async def _abegin(self, response: Any) -> None:
        if response.streaming and response.is_async:
            chunks = AsyncChunks(response.streaming_content)
            await chunks.begin()
            response.streaming_content = chunks
        elif response.streaming:
            await sync_to_async(self._begin)(response)


def _json(refusal: Refusal) -> JsonResponse:
    return JsonResponse(dict(refusal.body), status=refusal.status, headers=dict(refusal.headers))


def _say(response: Any, left: str | None) -> None:
    if left is not None:
        response.headers[CREDITS_HEADER] = left
