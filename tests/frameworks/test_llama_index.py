"""LlamaIndex on our clients: what the server served is what the ledger has, and a refusal reaches the caller."""

from __future__ import annotations

import asyncio

import openai
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAI
from pydantic import BaseModel

from metered_ai import InsufficientCreditsError
from metered_ai.testing.provider import Answer
from tests.frameworks.conftest import WEATHER

FOX = Answer().text
# Of its own use of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Person(BaseModel):
    name: str
    age: int


def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


def model(client, async_client):
    return OpenAI(model="gpt-4o-mini", openai_client=client, async_openai_client=async_client)


@pytest.fixture
def llm(shop):
    return model(shop.client, shop.async_client)


def test_sdk():
    """It pins the SDK to releases before 3, so this is where our clients are tried on one of those."""
    assert "2" == openai.__version__.partition(".")[0]


def test_plain(llm, shop):
    """A completion and a chat are a call each."""
    assert [FOX, FOX] == [llm.complete("Hi").text, llm.chat([ChatMessage("Hi")]).message.content]
    shop.check(2)


def test_streamed(llm, shop):
    """Streamed ones, sync or async, are billed by the usage at their end."""

    async def main():
        return [piece async for piece in await llm.astream_complete("Hi")][-1].text

    assert [FOX, FOX] == [list(llm.stream_complete("Hi"))[-1].text, asyncio.run(main())]
    shop.check(2)


def test_structured(llm, shop):
    """So is a structured one."""
    shop.provider.answer(text='{"name": "Ada", "age": 36}')

    answer = llm.as_structured_llm(Person).chat([ChatMessage("Who?")])
    assert Person(name="Ada", age=36) == answer.raw
    shop.check(1)


async def ask(llm):
    agent = FunctionAgent(tools=[FunctionTool.from_defaults(get_weather)], llm=llm, streaming=False)
    return str(await agent.run("Weather in Paris?"))


def test_tools(llm, shop):
    """Every step of an agent is a call."""
    shop.provider.answer(tool_calls=[WEATHER])

    assert FOX == asyncio.run(ask(llm))
    shop.check(2)


def test_concurrent(llm, shop):
    """Ten calls at once are billed each."""

    async def main():
        return await asyncio.gather(*(llm.acomplete("Hi") for _ in range(10)))

    assert [FOX] * 10 == [answer.text for answer in asyncio.run(main())]
    shop.check(10)


def test_refused(shop):
    """When credits run out in mid-run the caller sees our own error, with its numbers; the calls before are billed."""
    shop.provider.answer(tool_calls=[WEATHER], times=2)
    llm = model(shop.client, shop.poor(shop.async_client))
    with pytest.raises(InsufficientCreditsError) as refused:
        asyncio.run(ask(llm))

    assert (0, 1) == (refused.value.available, refused.value.required)
    shop.check(1, customer="bob")


def test_covered(llm, shop):
    """One price for a run, however many calls it makes."""

    async def main():
        async with shop.charge():
            await ask(llm)

    shop.provider.answer(tool_calls=[WEATHER])
    asyncio.run(main())
    shop.check_covered(2)
