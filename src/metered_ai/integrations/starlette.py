"""
Billing for Starlette: `BillingMiddleware`, whose `customer` is asked with an `HTTPConnection`, and answers for refusals.

```python
app.add_middleware(BillingMiddleware, customer=lambda connection: connection.session.get("user"))
```

An application that says in other ways who pays answers refusals with `add_refusals(app)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse

from ..errors import MeteringError
from .asgi import BillingMiddleware as _AnyBillingMiddleware
from .asgi import Scope
from .refusals import refusal_of

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["BillingMiddleware", "add_refusals", "answer_refusal"]


class BillingMiddleware(_AnyBillingMiddleware):
    """
    As `metered_ai.integrations.asgi.BillingMiddleware`; `customer` is asked with an `HTTPConnection` instead of a scope.

    The same goes for a `requires_request_id` that is a function. The receipt is `request.state.bill`.
    """

    def _asked(self, scope: Scope) -> Any:
        return HTTPConnection(scope)


async def answer_refusal(_: Request, error: Exception) -> JSONResponse:
    """An exception handler for `MeteringError`: the answer that its `http_status` asks for, with the body of a 402 from `to_dict()`."""
    if not isinstance(error, MeteringError):
        raise error
    refusal = refusal_of(error)
    return JSONResponse(dict(refusal.body), refusal.status, dict(refusal.headers))


def add_refusals(app: Starlette) -> None:
    """
    Have an application answer every `MeteringError` with its `http_status`, also one that a streamed answer raises before its first byte.

    `BillingMiddleware` does so by itself.
    """
    app.add_middleware(BillingMiddleware)
    # For an application with a middleware of its own that would make an error of ours into a bare 500 on the way out.
    app.add_exception_handler(MeteringError, answer_refusal)
