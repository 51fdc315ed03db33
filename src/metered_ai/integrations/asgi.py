"""
Billing for any ASGI application: every call made for a request is billed to who asks.

```python
app = BillingMiddleware(app, customer=lambda scope: scope["session"].get("user"))
```

Starlette and FastAPI have modules of their own, which give `customer` a request instead of a scope.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from ..context import bill_to
from ..core.checks import check_name
from ..errors import MeteringError
from .refusals import CREDITS_HEADER, REQUEST_ID_HEADER, Refusal, acredits_left, operation_of, refusal_of

if TYPE_CHECKING:
    from ..billing import Billing

__all__ = ["BillingMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class BillingMiddleware:
    """
    Bills the calls of each request to a customer, and answers refusals.

    `customer` is asked once a request, with its scope, and may be async: who pays, from what your application has made sure of, never
    from what the user can choose. None bills nobody: calls are then refused, unless their client names a customer.

    - It holds for async endpoints, sync ones in a thread pool, streamed answers and background tasks.
    - A refusal becomes the answer of its `http_status`, also in a streamed answer: the status line is held back until the first byte
      of the body, so that a refusal before it is a 402 and not a broken 200. Later ones break the stream.
    - The receipt is in `scope["state"]["bill"]`.
    - With `requires_request_id` (True, or a function of the scope) a request without `x-request-id` is a 400. `req_` and that id is the
      transaction id of its calls, so the same request again is a 409 once it was billed (`on_repeat="free"`: answered again, for
      nothing, as often as the client likes to send that id).
    - With `billing` every answer has `X-Credits-Remaining`: what is left on `meter` when the answer begins.
    """

    def __init__(
        self,
        app: App,
        *,
        customer: Callable[[Any], str | Awaitable[str | None] | None] | None = None,
        requires_request_id: bool | Callable[[Any], bool] = False,
        billing: Billing | None = None,
        meter: str = "generations",
    ) -> None:
        self.app = app
        self._customer = customer
        self._requires_request_id = requires_request_id
        self._billing = billing
        self._meter = check_name(meter, "meter")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        asked = self._asked(scope)
        customer = None if self._customer is None else self._customer(asked)
        if isawaitable(customer):
            customer = await customer
        if scope["type"] == "websocket":
            await self._billed(customer, None, scope, receive, send)
            return

        response = _Response(send, self._billing, customer, self._meter)
        wanted = self._requires_request_id
        transaction_id = None
        if wanted is True or (wanted is not False and wanted(asked)):
            operation = operation_of(_header(scope, REQUEST_ID_HEADER))
            if isinstance(operation, Refusal):
                await response.refuse(operation)
                return
            transaction_id = operation
        try:
            await self._billed(customer, transaction_id, scope, receive, response.send)
        except Exception as error:
            refused = _refused(error)
            if refused is None or response.has_started:
                raise
            await response.refuse(refusal_of(refused))
        else:
            await response.start()

    def _asked(self, scope: Scope) -> Any:
        return scope

    async def _billed(
        self, customer: str | None, transaction_id: str | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if customer is None:
            await self.app(scope, receive, send)
            return
        with bill_to(customer, transaction_id=transaction_id) as bill:
            scope.setdefault("state", {})["bill"] = bill
            await self.app(scope, receive, send)


class _Response:
    """The way out of one answer, whose start is held back until something follows it."""

    def __init__(self, send: Send, billing: Billing | None, customer: str | None, meter: str) -> None:
        self._send = send
        self._billing = billing
        self._customer = customer
        self._meter = meter
        self._start: Message | None = None
        self._end: Message | None = None
        self.has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif self._start is not None and _is_bare_end(self._start, message):
            # Starlette's BaseHTTPMiddleware ends the answer first, and then raises what the stream has raised.
            self._end = message
        else:
            await self.start()
            await self._send(message)

    async def start(self) -> None:
        start, self._start = self._start, None
        if start is None:
            return
        if self._billing is not None and self._customer is not None:
            left = await acredits_left(self._billing, self._customer, self._meter)
            if left is not None:
                header = (CREDITS_HEADER.lower().encode(), left.encode())
                start = {**start, "headers": [*start.get("headers", ()), header]}
        self.has_started = True
        await self._send(start)
        if self._end is not None:
            await self._send(self._end)

    async def refuse(self, refusal: Refusal) -> None:
        body = json.dumps(refusal.body, separators=(",", ":")).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
        self._end = None
        self._start = {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
        await self.send({"type": "http.response.body", "body": body})


def _refused(error: BaseException) -> MeteringError | None:
    """The refusal that an application raised, also out of a task group, or as what a handler of its own could no longer answer."""
    if isinstance(error, MeteringError):
        return error
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        return _refused(error.exceptions[0])
    if type(error) is RuntimeError and isinstance(error.__cause__, MeteringError):
        # Starlette's word for an error that has a handler, after the application has begun its answer, which we hold back.
        return error.__cause__
    return None


def _is_bare_end(start: Message, message: Message) -> bool:
    """True for the end of a streamed answer that has said nothing."""
    return (
        message["type"] == "http.response.body"
        and not message.get("body")
        and not message.get("more_body")
        and start["status"] == 200
        and all(name.lower() != b"content-length" for name, _ in start.get("headers", ()))
    )


def _header(scope: Scope, name: str) -> str | None:
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == wanted), None)
