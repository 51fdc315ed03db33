"""LiteLLM on our clients: what the server served is what the ledger has, and a refusal reaches the caller."""

from __future__ import annotations

import asyncio

import litellm
import pytest
from pydantic import BaseModel

from metered_ai import InsufficientCreditsError
from metered_ai.integrations.refusals import refusal_behind
from metered_ai.testing.provider import Answer
from tests.frameworks.conftest import WEATHER

FOX = Answer().text
# Of its own use of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ASK = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Weather in Paris?"}]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


class Person(BaseModel):
    name: str
    age: int


def text_of(answer):
    return answer.choices[0].message.content


def test_plain(shop):
    """A completion is one call, and so is an embedding."""
    assert FOX == text_of(litellm.completion(client=shop.client, **ASK))
    litellm.embedding(model="openai/text-embedding-3-small", input=["Hi"], client=shop.client)
    shop.check(2)


def test_streamed(shop):
    """Streamed ones, sync or async, are billed by the usage at their end."""

    async def main():
        stream = await litellm.acompletion(client=shop.async_client, stream=True, **ASK)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    chunks = litellm.completion(client=shop.client, stream=True, **ASK)
    assert [FOX, FOX] == ["".join(chunk.choices[0].delta.content or "" for chunk in chunks), asyncio.run(main())]
    shop.check(2)


def test_structured(shop):
    """So is a structured one."""
    shop.provider.answer(text='{"name": "Ada", "age": 36}')
    answer = litellm.completion(client=shop.client, response_format=Person, **ASK)

    assert Person(name="Ada", age=36) == Person.model_validate_json(text_of(answer))
    shop.check(1)


def run(client):
    """An agent's loop as one writes it around LiteLLM."""
    messages = list(ASK["messages"])
    while True:
        answer = litellm.completion(client=client, tools=TOOLS, **{**ASK, "messages": messages})
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": "It rains in Paris."} for call in message.tool_calls
        ]


def test_tools(shop):
    """Every step of a run with tools is a call."""
    shop.provider.answer(tool_calls=[WEATHER])

    assert FOX == run(shop.client)
    shop.check(2)


def test_concurrent(shop):
    """Ten calls at once are billed each."""

    async def main():
        return await asyncio.gather(*(litellm.acompletion(client=shop.async_client, **ASK) for _ in range(10)))

    assert [FOX] * 10 == [text_of(answer) for answer in asyncio.run(main())]
    shop.check(10)


def test_refused(shop):
    """When credits run out in mid-run the caller sees what LiteLLM makes of it; our own error, with its numbers, is its cause."""
    shop.provider.answer(tool_calls=[WEATHER], times=2)
    with pytest.raises(litellm.InternalServerError) as seen:
        run(shop.poor(shop.client))
    refused = refusal_behind(seen.value)

    assert isinstance(refused, InsufficientCreditsError)
    assert (0, 1) == (refused.available, refused.required)
    shop.check(1, customer="bob")


@pytest.mark.parametrize("stream", [False, True])
def test_refused_async(stream, shop):
    """So does the caller of an async completion, streamed or not; nothing is sent."""
    client = shop.async_client.with_billing(customer="nobody")
    with pytest.raises(litellm.InternalServerError) as seen:
        asyncio.run(litellm.acompletion(client=client, stream=stream, **ASK))

    assert isinstance(refusal_behind(seen.value), InsufficientCreditsError)
    assert [] == shop.provider.requests


def test_covered(shop):
    """One price for a run, however many calls it makes."""
    shop.provider.answer(tool_calls=[WEATHER])
    with shop.charge():
        run(shop.client)

    shop.check_covered(2)
