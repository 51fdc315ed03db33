"""The API as a user writes it. Only type-checked, never run: mypy --strict and pyright must find nothing here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, assert_type

import httpx2
from openai import AsyncAzureOpenAI, AsyncOpenAI, AsyncStream, AzureOpenAI, OpenAI, Stream
from openai.types import CreateEmbeddingResponse, ImagesResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest

from metered_ai import (
    AlreadyBilledError,
    AsyncMeteredAzureOpenAI,
    AsyncMeteredOpenAI,
    Balance,
    Billing,
    Grant,
    Hold,
    InsufficientCreditsError,
    MeteredAzureOpenAI,
    MeteredOpenAI,
    MeteringError,
    Receipt,
    Request,
    Usage,
    UsageEvent,
    UsageSum,
    bill_to,
    connect,
    operation_id,
    per_call,
    per_token,
)
from metered_ai.hooks import LowBalance, Refusal
from metered_ai.web import credits_headers, usage_page


class Answer(BaseModel):
    text: str


def takes_openai(client: OpenAI) -> None: ...


def takes_async_openai(client: AsyncOpenAI) -> None: ...


# Building.

client = MeteredOpenAI()
client = MeteredOpenAI(meter="generations", customer="ada", pricing=per_call(2), unmetered="allow")
client = MeteredOpenAI(
    billing="sqlite:///credits.db", api_key="k", base_url="http://localhost/v1", timeout=3.0, max_retries=0
)
client = MeteredOpenAI(billing=connect("memory://"), http_client=httpx2.Client(), default_headers={"x-a": "b"})
client = MeteredOpenAI(api_key=lambda: "k", _strict_response_validation=True)
aclient = AsyncMeteredOpenAI(customer="ada", http_client=httpx2.AsyncClient())
azure = MeteredAzureOpenAI(azure_endpoint="https://x", azure_deployment="gpt", api_version="2026-01-01", customer="ada")
aazure = AsyncMeteredAzureOpenAI(azure_ad_token="t", azure_endpoint="https://x", api_version="2026-01-01")

takes_openai(client)
takes_openai(azure)
takes_async_openai(aclient)
takes_async_openai(aazure)
old_style: AzureOpenAI = azure
old_style_async: AsyncAzureOpenAI = aazure

# Deriving keeps the type.

assert_type(client.with_billing(customer="ada", meter="images", amount=2), MeteredOpenAI)
assert_type(client.with_billing(transaction_id="t", properties={"a": 1}, price_slug="p"), MeteredOpenAI)
assert_type(client.with_options(timeout=3), MeteredOpenAI)
assert_type(client.copy(max_retries=1), MeteredOpenAI)
assert_type(aclient.with_billing(customer="ada"), AsyncMeteredOpenAI)
assert_type(aclient.with_options(timeout=3).with_billing(amount=0), AsyncMeteredOpenAI)
assert_type(azure.with_billing(customer="ada").with_options(timeout=3), MeteredAzureOpenAI)
assert_type(aazure.with_billing(customer="ada"), AsyncMeteredAzureOpenAI)
assert_type(client.billing, Billing)


class Own(MeteredOpenAI):
    """A subclass of ours keeps its own type, too."""


assert_type(Own().with_billing(customer="ada"), Own)


# Calls keep the SDK's overloads.


def calls(stream: bool) -> None:
    assert_type(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}]), ChatCompletion)
    assert_type(
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], stream=True),
        Stream[ChatCompletionChunk],
    )
    assert_type(
        client.with_billing(customer="ada").chat.completions.create(model="m", messages=[], stream=stream),
        ChatCompletion | Stream[ChatCompletionChunk],
    )
    assert_type(
        client.chat.completions.parse(model="m", messages=[], response_format=Answer), ParsedChatCompletion[Answer]
    )
    assert_type(client.responses.create(model="m", input="Hi"), Response)
    assert_type(client.responses.create(model="m", input="Hi", stream=True), Stream[ResponseStreamEvent])
    assert_type(client.embeddings.create(model="m", input="Hi"), CreateEmbeddingResponse)
    assert_type(client.with_billing(meter="images", amount=4).images.generate(prompt="A fox"), ImagesResponse)
    assert_type(client.chat.completions.with_raw_response.create(model="m", messages=[]).parse(), ChatCompletion)
    with client.chat.completions.stream(model="m", messages=[]) as events:
        for event in events:
            print(event.type)
    for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
        assert_type(chunk, ChatCompletionChunk)
    with MeteredOpenAI() as entered:
        assert_type(entered, MeteredOpenAI)


async def acalls() -> None:
    assert_type(await aclient.chat.completions.create(model="m", messages=[]), ChatCompletion)
    stream = await aclient.chat.completions.create(model="m", messages=[], stream=True)
    assert_type(stream, AsyncStream[ChatCompletionChunk])
    async for chunk in stream:
        assert_type(chunk, ChatCompletionChunk)
    assert_type(await aclient.with_billing(amount=2).responses.create(model="m", input="Hi"), Response)
    assert_type(await aazure.with_billing(customer="ada").responses.create(model="m", input="Hi"), Response)
    async with AsyncMeteredOpenAI() as entered:
        assert_type(entered, AsyncMeteredOpenAI)


# Who pays.


def blocks() -> None:
    with bill_to("ada") as bill:
        assert_type(bill, Receipt)
    with bill_to(
        "ada",
        meter="images",
        amount=2,
        estimate=lambda request: len(request.body),
        price_slug="p",
        transaction_id=operation_id("ada", day="2026-11-23", pages=[1, 2]),
        properties={"a": [1]},
    ) as bill:
        client.responses.create(model="m", input="Hi")
    assert_type(bill.events, list[UsageEvent])
    assert_type(bill.amounts, dict[str, int])
    assert_type(bill.amount, int)
    assert_type(operation_id("ada"), str)


async def ablocks() -> int:
    async with bill_to("ada", pricing=per_call(2)) as bill:
        assert_type(bill, Receipt)
        await aclient.responses.create(model="m", input="Hi")
    return bill.amount


def refusals() -> dict[str, object]:
    try:
        client.responses.create(model="m", input="Hi")
    except InsufficientCreditsError as error:
        assert_type(error.available, int)
        assert_type(error.required, int)
        assert_type(error.upgrade_url, str | None)
        return error.to_dict()
    except AlreadyBilledError as error:
        assert_type(error.event, UsageEvent | None)
    except MeteringError as error:
        assert_type(error.http_status, int)
    return {}


# Prices.


def price(usage: Usage) -> int:
    return (usage.output_tokens or 0) * 2 + (usage.input_tokens or 0)


def estimate(request: Request) -> int:
    assert_type(request.model, str | None)
    return 100 if request.stream else len(request.endpoint)


priced = MeteredOpenAI(pricing=price)
priced = MeteredOpenAI(pricing=per_token(input=1, output=Decimal("1.5"), cached_input=0, per=1000, cap_output=True))
priced.with_billing(pricing=price, estimate=estimate)


# Billing.


def accounts() -> None:
    with connect(
        "sqlite:///credits.db", on_unknown="charge", on_abort="drain", lease=300, max_holds=10, spool=None
    ) as billing:
        assert_type(billing, Billing)
        assert_type(billing.grant("ada", "generations", 5, id="order_1", expires_at=datetime.now(UTC)), Grant)
        assert_type(billing.revoke("ada", "generations", "order_1"), Grant)
        assert_type(billing.balance("ada", "generations"), Balance)
        assert_type(billing.balance("ada", "generations").available, int | None)
        assert_type(billing.balances("ada"), list[Balance])
        assert_type(billing.record("ada", "exports", transaction_id="export_9", amount=1), UsageEvent)
        assert_type(billing.usage_events("ada", since=datetime.now(UTC)), Iterator[UsageEvent])
        assert_type(billing.usage(by=("day", "meter")), Iterator[UsageSum])
        assert_type(billing.holds("ada", state="open"), Iterator[Hold])
        assert_type(billing.grants(), Iterator[Grant])
        assert_type(billing.verify().is_sound, bool)
        assert_type(billing.recover().resolved, int)
        assert_type(billing.flush(timeout=3), bool)
        billing.set_unlimited("vip", "generations", True)
        with billing.charge("ada", "reports", amount=5, covers_calls=True) as charge:
            charge.transaction_id = "report_1"
            charge.raise_to(8)
            charge.amount = 3
            assert_type(charge.commit(), UsageEvent | None)
        assert_type(charge.event, UsageEvent | None)
        assert_type(charge.receipt, Receipt | None)


async def aaccounts() -> None:
    async with connect() as billing:
        assert_type(billing, Billing)
        assert_type(await billing.agrant("ada", "generations", 5, id="order_1"), Grant)
        assert_type(await billing.abalance("ada", "generations"), Balance)
        assert_type(await billing.arecord("ada", "exports", transaction_id="export_9"), UsageEvent)
        assert_type(billing.ausage_events("ada"), AsyncIterator[UsageEvent])
        async for hold in billing.aholds("ada"):
            assert_type(hold, Hold)
        async with billing.charge("ada", "reports", amount=5) as charge:
            await charge.araise_to(8)
            assert_type(await charge.acommit(), UsageEvent | None)


def record_fields(event: UsageEvent, balance: Balance) -> list[Any]:
    assert_type(event.amount, int)
    assert_type(event.created_at, datetime)
    assert_type(event.usage, Usage | None)
    assert_type(balance.percent_used, int | None)
    return [event.properties, balance.level]


# What cannot be is found before the program runs.

MeteredOpenAI(custommer="ada")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MeteredOpenAI(unmetered="perhaps")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
client.with_billing(ammount=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
client.with_billing(amount="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
client.responses.create(model="m", input="Hi", meter="images")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
bill_to()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
connect("memory://", on_unknow="charge")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
connect("memory://", on_unknown="perhaps")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
per_token(input=0.1, output=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
client.billing.charge("ada", "reports")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# Showing usage.


def shown(billing: Billing, refusal: InsufficientCreditsError) -> None:
    def who_asks(request: HttpRequest) -> str | None:
        return request.headers.get("x-user")

    async def later(request: HttpRequest) -> str | None:
        return request.headers.get("x-user")

    async def checkout(customer: str, meter: str) -> str:
        return f"/checkout/{meter}?for={customer}"

    app = Starlette()
    app.mount("/usage", usage_page(billing, customer=who_asks))
    app.mount("/other", usage_page(billing, customer=later, meters={"images": "Pictures"}, upgrade_url=checkout))
    assert_type(credits_headers(billing.balance("ada", "images")), dict[str, str])
    assert_type(credits_headers(refusal), dict[str, str])


def hooks(low: LowBalance, refusal: Refusal) -> None:
    assert_type(low.balance.available, int | None)
    assert_type(refusal.required, int)


def tell(low: LowBalance) -> None:
    print(low.threshold)


connect("memory://", on_low_balance=tell, on_refused=lambda refusal: print(refusal.available))
