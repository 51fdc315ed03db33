"""instructor on our clients: what the server served is what the ledger has, and a refusal reaches the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import instructor
import pytest
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel, field_validator

from metered_ai import InsufficientCreditsError
from metered_ai.integrations.refusals import refusal_behind

ADA = '{"name": "Ada", "age": 36}'
WHO = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "Who?"}]}


class Person(BaseModel):
    name: str
    age: int


class Adult(Person):
    @field_validator("age")
    @classmethod
    def is_of_age(cls, age):
        if age < 18:
            raise ValueError("too young")
        return age


PERSON = {"name": "Ada", "age": 36}


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON])
def test_structured(mode, shop):
    """A structured answer is one call, as a tool's arguments and as JSON."""
    shop.provider.answer(**({"text": ADA} if mode is instructor.Mode.JSON else {"tool_calls": [("Person", ADA)]}))

    person = instructor.from_openai(shop.client, mode=mode).chat.completions.create(response_model=Person, **WHO)

    assert PERSON == person.model_dump()
    shop.check(1)


def test_plain(shop):
    """Without a model it is the client's own answer."""
    answer = instructor.from_openai(shop.client).chat.completions.create(response_model=None, **WHO)

    assert answer.choices[0].message.content
    shop.check(1)


def test_streamed(shop):
    """A partial and an iterable answer are billed by the usage at the end of their stream."""
    shop.provider.answer(text=ADA)
    client = instructor.from_openai(shop.client, mode=instructor.Mode.JSON)
    partial = list(client.chat.completions.create_partial(response_model=Person, **WHO))
    shop.provider.answer(text=f'{{"tasks": [{ADA}, {ADA}]}}')
    several = list(client.chat.completions.create(response_model=Iterable[Person], stream=True, **WHO))

    assert [PERSON] * 3 == [person.model_dump() for person in (partial[-1], *several)]
    shop.check(2)


def test_asks_again(shop):
    """An answer that does not validate is billed, and so is the one that was asked for instead."""
    shop.provider.answer(tool_calls=[("Adult", '{"name": "Ada", "age": 3}')])
    shop.provider.answer(tool_calls=[("Adult", ADA)])
    instructor.from_openai(shop.client).chat.completions.create(response_model=Adult, max_retries=2, **WHO)

    shop.check(2)


def test_concurrent(shop):
    """Ten calls at once are billed each."""
    shop.provider.answer(tool_calls=[("Person", ADA)], times=10)

    async def main():
        create = instructor.from_openai(shop.async_client).chat.completions.create
        return await asyncio.gather(*(create(response_model=Person, **WHO) for _ in range(10)))

    assert [PERSON] * 10 == [person.model_dump() for person in asyncio.run(main())]
    shop.check(10)


def test_refused(shop):
    """When credits run out in mid-run the caller sees what instructor makes of it; our own error, with its numbers, is its cause."""
    shop.provider.answer(tool_calls=[("Adult", '{"name": "Ada", "age": 3}')], times=2)
    with pytest.raises(InstructorRetryException) as seen:
        instructor.from_openai(shop.poor(shop.client)).chat.completions.create(
            response_model=Adult, max_retries=2, **WHO
        )
    refused = refusal_behind(seen.value)

    assert isinstance(refused, InsufficientCreditsError)
    assert (0, 1) == (refused.available, refused.required)
    shop.check(1, customer="bob")


def test_covered(shop):
    """One price for a run, however many calls it makes."""
    shop.provider.answer(tool_calls=[("Adult", '{"name": "Ada", "age": 3}')])
    shop.provider.answer(tool_calls=[("Adult", ADA)])
    with shop.charge():
        instructor.from_openai(shop.client).chat.completions.create(response_model=Adult, max_retries=2, **WHO)

    shop.check_covered(2)
