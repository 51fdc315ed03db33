"""
Billing for FastAPI: the client of who asks as a dependency, or a middleware for everything, and answers for refusals.

```python
add_refusals(app)
Client = Annotated[AsyncMeteredOpenAI, Depends(billed_client(client, current_user))]


@app.post("/answer")
async def answer(question: str, client: Client): ...
```

`BillingMiddleware`, `add_refusals` and `answer_refusal` are those of Starlette.
"""
# Without `from __future__ import annotations`: FastAPI reads the annotations of dependencies, which name arguments here.

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Header, HTTPException

from ..client import AsyncMeteredAzureOpenAI, AsyncMeteredOpenAI, MeteredAzureOpenAI, MeteredOpenAI
from ..context import Receipt, bill_to
from .refusals import Refusal, operation_of
from .starlette import BillingMiddleware, add_refusals, answer_refusal

__all__ = ["BillingMiddleware", "add_refusals", "answer_refusal", "billed", "billed_client"]

_ClientT = TypeVar("_ClientT", bound=MeteredOpenAI | AsyncMeteredOpenAI | MeteredAzureOpenAI | AsyncMeteredAzureOpenAI)

_RequestId = Annotated[str | None, Header(alias="x-request-id", description="Names the request: it is billed once.")]


def billed_client(
    client: _ClientT, customer: Callable[..., Any], *, requires_request_id: bool = False
) -> Callable[..., Awaitable[_ClientT]]:
    """
    A dependency: `client`, billed to whom the dependency `customer` names, for the length of one request.

    With `requires_request_id` a request without `x-request-id` is a 400; `req_` and that id is the transaction id of its calls, so the
    same request again is an AlreadyBilledError, a 409, once it was billed.
    """
    if not requires_request_id:

        async def billed_to(customer: Annotated[str, Depends(customer)]) -> _ClientT:
            return cast("_ClientT", client.with_billing(customer=customer))

        return billed_to

    async def billed_once(customer: Annotated[str, Depends(customer)], request_id: _RequestId = None) -> _ClientT:
        return cast("_ClientT", client.with_billing(customer=customer, transaction_id=_operation(request_id)))

    return billed_once


def billed(customer: Callable[..., Any], *, requires_request_id: bool = False) -> Callable[..., AsyncIterator[Receipt]]:
    """
    A dependency: the receipt of a request, all of whose calls are billed to whom the dependency `customer` names.

    As `BillingMiddleware`, for an application that knows its users in a dependency. It reaches calls deep in other people's code, in
    async and sync endpoints, streamed answers and background tasks. `requires_request_id` as for `billed_client`.
    """
    if not requires_request_id:

        async def bill(customer: Annotated[str, Depends(customer)]) -> AsyncIterator[Receipt]:
            with bill_to(customer) as receipt:
                yield receipt

        return bill

    async def bill_once(
        customer: Annotated[str, Depends(customer)], request_id: _RequestId = None
    ) -> AsyncIterator[Receipt]:
        with bill_to(customer, transaction_id=_operation(request_id)) as receipt:
            yield receipt

    return bill_once


def _operation(request_id: str | None) -> str:
    operation = operation_of(request_id)
    if isinstance(operation, Refusal):
        raise HTTPException(operation.status, operation.body["message"])
    return operation
