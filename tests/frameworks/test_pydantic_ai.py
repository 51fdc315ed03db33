"""pydantic-ai on AsyncMeteredOpenAI: what the server served is what the ledger has, and a refusal reaches the caller."""

from __future__ import annotations

import asyncio

import openai
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from metered_ai import InsufficientCreditsError
from metered_ai.testing.provider import Answer
from tests.frameworks.conftest import WEATHER

FOX = Answer().text


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def model(request):
    def model(client):
        return request.param("gpt-5-mini", provider=OpenAIProvider(openai_client=client))

    return model


def with_tool(model):
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        return f"It rains in {city}."

    return agent


def test_sdk():
    """It pins the SDK to releases from 3 on, so this is where our clients are tried on one of those."""
    assert "3" == openai.__version__.partition(".")[0]


def test_plain(model, shop):
    """A run is one call."""
    assert FOX == Agent(model(shop.async_client)).run_sync("Hi").output
    shop.check(1)


def test_streamed(model, shop):
    """A streamed run is billed by the usage at its end."""

    async def main():
        async with Agent(model(shop.async_client)).run_stream("Hi") as result:
            return await result.get_output()

    assert FOX == asyncio.run(main())
    shop.check(1)


def test_structured(model, shop):
    """So is a structured one."""
    shop.provider.answer(text='{"name": "Ada", "age": 36}')
    result = Agent(model(shop.async_client), output_type=NativeOutput(Person)).run_sync("Who?")

    assert Person(name="Ada", age=36) == result.output
    shop.check(1)


def test_tools(model, shop):
    """Every step of a run with tools is a call."""
    shop.provider.answer(tool_calls=[WEATHER])

    assert FOX == with_tool(model(shop.async_client)).run_sync("Weather in Paris?").output
    shop.check(2)


def test_concurrent(model, shop):
    """Ten runs at once are ten calls."""

    async def main():
        agent = Agent(model(shop.async_client))
        return await asyncio.gather(*(agent.run("Hi") for _ in range(10)))

    assert [FOX] * 10 == [result.output for result in asyncio.run(main())]
    shop.check(10)


def test_refused(model, shop):
    """When credits run out in mid-run the caller sees our own error, with its numbers; the calls before are billed."""
    shop.provider.answer(tool_calls=[WEATHER], times=2)
    with pytest.raises(InsufficientCreditsError) as refused:
        with_tool(model(shop.poor(shop.async_client))).run_sync("Weather in Paris?")

    assert (0, 1) == (refused.value.available, refused.value.required)
    shop.check(1, customer="bob")


def test_covered(model, shop):
    """One price for a run, however many calls it makes."""
    shop.provider.answer(tool_calls=[WEATHER])
    with shop.charge():
        with_tool(model(shop.async_client)).run_sync("Weather in Paris?")

    shop.check_covered(2)
