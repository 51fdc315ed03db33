"""
A web application that bills through Flowglad: 401, 402, 403, 400 and 200, each where it belongs, and usage recorded once.

Run it with `uvicorn flowglad_app:app` (pip install fastapi uvicorn). Needs OPENAI_API_KEY, FLOWGLAD_SECRET_KEY (sk_test_… is enough) and, for
webhooks, FLOWGLAD_WEBHOOK_SECRET. In Flowglad: a usage meter `generations`, a plan that grants credits on it, and a price `top_up`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse

from metered_ai import (
    AsyncMeteredOpenAI,
    InsufficientCreditsError,
    MeteringError,
    NoSubscriptionError,
    bill_to,
    connect,
)
from metered_ai.services.flowglad import Flowglad

flowglad = Flowglad()
# The ledger, a SQLite file, holds and remembers; Flowglad owns the balances and is told of the usage in the background.
# A request that is repeated is answered again, and not charged again.
billing = connect(service=flowglad, on_repeat="free", upgrade_url="/top-up")
client = AsyncMeteredOpenAI(billing=billing)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await billing.aclose()
    flowglad.close()


app = FastAPI(lifespan=lifespan)


def logged_in(x_user: Annotated[str | None, Header()] = None) -> str:
    """Your application's own way to know who asks; never a value that the user can choose."""
    if x_user is None:
        raise HTTPException(401, "log in first")
    return x_user


def operation(x_request_id: Annotated[str | None, Header()] = None) -> str:
    """What the browser calls this request, the same when it sends it again."""
    if not x_request_id:
        raise HTTPException(400, "x-request-id is required: the same one for each repeat of a request")
    return f"req_{x_request_id}"


Customer = Annotated[str, Depends(logged_in)]
Operation = Annotated[str, Depends(operation)]


@app.exception_handler(MeteringError)
async def refused(_: Request, error: MeteringError) -> JSONResponse:
    if isinstance(error, NoSubscriptionError):
        body = {**error.to_dict(), "error": "no_subscription"}
    elif isinstance(error, InsufficientCreditsError):
        body = error.to_dict()
    else:
        body = {"error": "billing"}
    return JSONResponse(body, status_code=error.http_status)


@app.post("/generate")
async def generate(question: str, customer: Customer, transaction_id: Operation) -> dict[str, object]:
    with bill_to(customer, transaction_id=transaction_id) as bill:
        response = await client.responses.create(model="gpt-5-mini", input=question)
    return {"answer": response.output_text, "credits": bill.amount}


@app.post("/export")
async def export(name: str, customer: Customer, transaction_id: Operation) -> dict[str, object]:
    """Costs two credits and calls no model; only with a plan that has the feature."""
    await flowglad.arequire_feature(customer, "exports")
    async with billing.charge(customer, "generations", amount=2, transaction_id=transaction_id):
        return {"exported": name}


@app.get("/balance")
async def balance(customer: Customer) -> dict[str, object]:
    credits = await billing.abalance(customer, "generations")
    return {"available": credits.available, "percentUsed": credits.percent_used, "showUpgrade": credits.show_upgrade}


@app.get("/top-up")
async def top_up(request: Request, customer: Customer) -> RedirectResponse:
    back = str(request.base_url)
    url = await flowglad.acheckout_url(customer, price_slug="top_up", success_url=back, cancel_url=back)
    return RedirectResponse(url, status_code=303)


@app.post("/webhooks/flowglad")
async def webhook(request: Request) -> dict[str, object]:
    """So that a plan just bought is known at once."""
    try:
        event = flowglad.verify_webhook(await request.body(), request.headers)
    except ValueError as error:
        raise HTTPException(400, "not signed by Flowglad") from error
    return {"received": event.get("id")}
