"""The OpenAI Agents SDK on AsyncMeteredOpenAI: what the server served is what the ledger has, and a refusal reaches the caller."""

from __future__ import annotations

import asyncio

import pytest
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from pydantic import BaseModel

from metered_ai import InsufficientCreditsError
from metered_ai.testing.provider import Answer
from tests.frameworks.conftest import WEATHER

FOX = Answer().text
# It would send traces to OpenAI.
set_tracing_disabled(True)


class Person(BaseModel):
    name: str
    age: int


@function_tool
def get_weather(city: str) -> str:
    return f"It rains in {city}."


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def agent(request):
    def agent(client, **options):
        return Agent(name="guide", model=request.param(model="gpt-5-mini", openai_client=client), **options)

    return agent


def test_plain(agent, shop):
    """A run is one call."""
    assert FOX == Runner.run_sync(agent(shop.async_client), "Hi").final_output
    shop.check(1)


def test_streamed(agent, shop):
    """A streamed run is billed by the usage at its end."""

    async def main():
        result = Runner.run_streamed(agent(shop.async_client), "Hi")
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert FOX == asyncio.run(main())
    shop.check(1)


def test_structured(agent, shop):
    """So is a structured one."""
    shop.provider.answer(text='{"name": "Ada", "age": 36}')

    assert (
        Person(name="Ada", age=36) == Runner.run_sync(agent(shop.async_client, output_type=Person), "Who?").final_output
    )
    shop.check(1)


def test_tools(agent, shop):
    """Every step of a run with tools is a call."""
    shop.provider.answer(tool_calls=[WEATHER])

    assert FOX == Runner.run_sync(agent(shop.async_client, tools=[get_weather]), "Weather in Paris?").final_output
    shop.check(2)


def test_concurrent(agent, shop):
    """Ten runs at once are ten calls."""

    async def main():
        guide = agent(shop.async_client)
        return await asyncio.gather(*(Runner.run(guide, "Hi") for _ in range(10)))

    assert [FOX] * 10 == [result.final_output for result in asyncio.run(main())]
    shop.check(10)


def test_refused(agent, shop):
    """When credits run out in mid-run the caller sees our own error, with its numbers; the calls before are billed."""
    shop.provider.answer(tool_calls=[WEATHER], times=2)
    with pytest.raises(InsufficientCreditsError) as refused:
        Runner.run_sync(agent(shop.poor(shop.async_client), tools=[get_weather]), "Weather in Paris?")

    assert (0, 1) == (refused.value.available, refused.value.required)
    shop.check(1, customer="bob")


def test_refused_stream(agent, shop):
    """A streamed run raises it from its events."""

    async def main():
        result = Runner.run_streamed(agent(shop.poor(shop.async_client), tools=[get_weather]), "Weather in Paris?")
        async for _ in result.stream_events():
            pass

    shop.provider.answer(tool_calls=[WEATHER], times=2)
    with pytest.raises(InsufficientCreditsError):
        asyncio.run(main())
    assert 1 == len(shop.provider.requests)


def test_covered(agent, shop):
    """One price for a run, however many calls it makes."""
    shop.provider.answer(tool_calls=[WEATHER])
    with shop.charge():
        Runner.run_sync(agent(shop.async_client, tools=[get_weather]), "Weather in Paris?")

    shop.check_covered(2)
