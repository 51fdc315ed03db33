"""LangChain on our clients: what the server served is what the ledger has, and a refusal reaches the caller."""

from __future__ import annotations

import asyncio

import pytest
from langchain.agents import create_agent
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from metered_ai import InsufficientCreditsError
from metered_ai.testing.provider import Answer
from tests.frameworks.conftest import WEATHER

FOX = Answer().text


class Person(BaseModel):
    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(request):
    def model(client, async_client):
        return ChatOpenAI(
            model="gpt-5-mini",
            use_responses_api=request.param,
            client=client.chat.completions,
            root_client=client,
            async_client=async_client.chat.completions,
            root_async_client=async_client,
        )

    return model


def test_plain(model, shop):
    """A chain is one call."""
    chain = ChatPromptTemplate.from_template("Say {what}") | model(shop.client, shop.async_client) | StrOutputParser()

    assert FOX == chain.invoke({"what": "hi"})
    shop.check(1)


def test_streamed(model, shop):
    """A streamed chain, sync or async, is billed by the usage at its end."""
    chain = model(shop.client, shop.async_client) | StrOutputParser()

    async def main():
        return "".join([word async for word in chain.astream("Hi")])

    assert [FOX, FOX] == ["".join(chain.stream("Hi")), asyncio.run(main())]
    shop.check(2)


def test_structured(model, shop):
    """So is a structured one."""
    shop.provider.answer(text='{"name": "Ada", "age": 36}')

    assert Person(name="Ada", age=36) == model(shop.client, shop.async_client).with_structured_output(Person).invoke(
        "Who?"
    )
    shop.check(1)


def ask(model):
    return create_agent(model, [get_weather]).invoke({"messages": [("user", "Weather in Paris?")]})


def test_tools(model, shop):
    """Every step of an agent is a call."""
    shop.provider.answer(tool_calls=[WEATHER])

    assert FOX == ask(model(shop.client, shop.async_client))["messages"][-1].text
    shop.check(2)


def test_concurrent(model, shop):
    """Ten calls at once, in a batch's threads and in tasks, are billed each."""
    chat = model(shop.client, shop.async_client)

    async def main():
        return await asyncio.gather(*(chat.ainvoke("Hi") for _ in range(10)))

    assert [FOX] * 20 == [answer.text for answer in chat.batch(["Hi"] * 10) + asyncio.run(main())]
    shop.check(20)


def test_refused(model, shop):
    """When credits run out in mid-run the caller sees our own error, with its numbers; the calls before are billed."""
    shop.provider.answer(tool_calls=[WEATHER], times=2)
    client = shop.poor(shop.client)
    with pytest.raises(InsufficientCreditsError) as refused:
        ask(model(client, shop.async_client))

    assert (0, 1) == (refused.value.available, refused.value.required)
    shop.check(1, customer="bob")


def test_refused_stream(model, shop):
    """A streamed chain raises it from its first piece; nothing is sent."""
    nobody = {"customer": "nobody"}
    chat = model(shop.client.with_billing(**nobody), shop.async_client.with_billing(**nobody))

    async def main():
        return [word async for word in chat.astream("Hi")]

    for stream in (lambda: list(chat.stream("Hi")), lambda: asyncio.run(main())):
        with pytest.raises(InsufficientCreditsError):
            stream()
    assert [] == shop.provider.requests


def test_covered(model, shop):
    """One price for a run, however many calls it makes."""
    shop.provider.answer(tool_calls=[WEATHER])
    with shop.charge():
        ask(model(shop.client, shop.async_client))

    shop.check_covered(2)
