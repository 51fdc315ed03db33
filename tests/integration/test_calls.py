"""Whole answers from a real server: the ledger's tokens are the server's own count."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

from metered_ai import bill_to, per_call, per_token
from tests.integration.truth import HI, PERSON, WEATHER, counted, tokens

TOKENS = per_token(input=1, output=2)

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
HISTORY = [
    *HI,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


class Person(pydantic.BaseModel):
    name: str
    age: int
    nice: bool


def chat(client, **options):
    return client.chat.completions.create(**{"model": "any", "messages": HI, **options})


DOORS = {
    "chat": chat,
    "completions": lambda client: client.completions.create(model="any", prompt="water and", max_tokens=20),
    "responses": lambda client: client.responses.create(model="any", input="Hi"),
    "tools": lambda client: chat(client, tools=[WEATHER], tool_choice="required", max_tokens=1500),
    "tool results": lambda client: chat(client, messages=HISTORY, tools=[WEATHER], max_tokens=5),
    "json_schema": lambda client: chat(
        client,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        max_tokens=1500,
    ),
    "parse": lambda client: client.chat.completions.parse(
        model="any", messages=HI, response_format=Person, max_tokens=1500
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_tokens(shell, llama, billing, door):
    """A call is one usage event, named after its answer, with exactly the tokens that the server worked for, at their price."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count:
        answer = shell.run(DOORS[door](client))
    [event] = billing.usage_events()

    assert count == tokens(billing)
    assert (f"gen_{answer.id}", "reported", count[0] + 2 * count[1]) == (
        event.transaction_id,
        event.basis,
        event.amount,
    )
    assert event.amount == billing.balance("ada", "generations").used


def test_answers_untouched(shell):
    """Tools are called, schemas fitted and models parsed as the SDK does it."""
    client = shell.client(pricing=TOKENS)
    called = shell.run(DOORS["tools"](client)).choices[0].message.tool_calls[0].function
    fitted = json.loads(shell.run(DOORS["json_schema"](client)).choices[0].message.content)
    parsed = shell.run(DOORS["parse"](client)).choices[0].message.parsed

    assert ("weather", ["city"]) == (called.name, list(json.loads(called.arguments)))
    assert list(PERSON["properties"]) == list(fitted)
    assert Person is type(parsed)


def test_call_price(shell, llama, billing):
    """At a price per call one credit is charged, and the tokens are told all the same."""
    with counted(llama) as count:
        shell.run(chat(shell.client()))

    assert 1 == billing.balance("ada", "generations").used
    assert count == tokens(billing)


def test_raw_response(shell, llama, billing):
    """An answer that is taken raw is billed once, however often it is parsed."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count:
        raw = shell.run(client.chat.completions.with_raw_response.create(model="any", messages=HI))
        answers = [raw.parse(), raw.parse()]

    assert [f"gen_{answers[0].id}"] == [event.transaction_id for event in billing.usage_events()]
    assert count == tokens(billing)


@pytest.mark.parametrize("how", ["read", "parse", "json", "iter_bytes"])
def test_streaming_response(shell, llama, billing, how):
    """A whole answer that the caller reads from its response is billed by its usage, whichever way it is read."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count:
        asked = client.chat.completions.with_streaming_response.create(model="any", messages=HI)
        with shell.within(asked) as response:
            if how == "iter_bytes":
                shell.read(response.iter_bytes())
            else:
                shell.run(getattr(response, how)())

    assert count == tokens(billing)
    assert ["reported"] == [event.basis for event in billing.usage_events()]


def test_response_that_does_not_parse(shell, llama, billing):
    """The server ignores the format of a response, so that the SDK cannot parse it: the answer was given, and is billed."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count, pytest.raises(pydantic.ValidationError):
        shell.run(client.responses.parse(model="any", input="Hi", text_format=Person))

    assert 0 < count[1]
    assert count == tokens(billing)


@pytest.mark.parametrize("n", [2, 3])
def test_several_choices(make_shell, endless, billing, n):
    """With n=3 this server reports the tokens of one choice. The ledger believes it, and held enough for all of them."""
    shell = make_shell(endless, billing)
    bounds = []

    def price(usage):
        bounds.append(TOKENS.hold(usage))
        return TOKENS.charge(usage)

    with counted(endless) as count:
        answer = shell.run(chat(shell.client(pricing=TOKENS), n=n, max_tokens=200))
        shell.run(chat(shell.client(pricing=price), n=n, max_tokens=200))

    [first, _] = sorted(billing.usage_events(), key=lambda event: event.transaction_id != f"gen_{answer.id}")
    assert n == len(answer.choices)
    assert (answer.usage.prompt_tokens, 200) == (first.usage.input_tokens, first.usage.output_tokens)
    assert 2 * n * 200 == count[1]
    assert 2 * n * 200 <= bounds[0]


def test_embeddings(make_shell, llama_embedding, billing):
    """Embeddings cost the tokens read. Their answers have no id, and this server numbers no requests: the hold names the event."""
    shell = make_shell(llama_embedding, billing)
    client = shell.client(pricing=TOKENS)
    with counted(llama_embedding) as count:
        answer = shell.run(client.embeddings.create(model="any", input=["water", "wind and rain", "water"]))
    [event] = billing.usage_events()

    assert 3 == len(answer.data)
    assert [count[0], 0] == [event.usage.input_tokens, event.usage.output_tokens or 0]
    assert (count[0], f"hold_{event.hold_id}") == (event.amount, event.transaction_id)


LONG = [{"role": "user", "content": "word " * 5000}]

REFUSED = {
    "bad body": (400, {"messages": "x"}),
    "too long": (400, {"messages": LONG}),
    "too long, streamed": (400, {"messages": LONG, "stream": True}),
    "bad schema": (400, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}),
}


@pytest.mark.parametrize("style", ["plain", "raw", "streaming"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(shell, llama, billing, case, style):
    """What the server refuses costs nothing and leaves nothing held, whichever way the answer would have been read."""
    status, body = REFUSED[case]
    completions = shell.client(pricing=TOKENS).chat.completions
    surfaces = {
        "plain": completions,
        "raw": completions.with_raw_response,
        "streaming": completions.with_streaming_response,
    }
    asked = surfaces[style].create

    def call():
        started = asked(**{"model": "any", "messages": HI, **body})
        if style != "streaming":
            return shell.run(started)
        with shell.within(started):
            raise AssertionError("it was answered")

    with counted(llama) as count, pytest.raises(openai.APIStatusError) as refused:
        call()

    assert status == refused.value.status_code
    assert [0, 0] == count
    assert [] == list(billing.usage_events())
    assert [("released", "provider_error", "yes")] == [(hold.state, hold.reason, hold.sent) for hold in billing.holds()]
    assert 10_000_000 == billing.balance("ada", "generations").available


def test_missing_door(shell, billing):
    """An endpoint that the server does not have (404), or not in this mode (501), costs nothing."""
    client = shell.client(pricing=per_call(5))
    with pytest.raises(openai.NotFoundError):
        shell.run(client.moderations.create(input="Hi"))
    with pytest.raises(openai.InternalServerError):
        shell.run(client.embeddings.create(model="any", input="Hi"))

    assert [] == list(billing.usage_events())
    assert ["provider_error"] * 2 == [hold.reason for hold in billing.holds()]


def test_no_server(shell, billing):
    """Nobody listens: the request was never sent, and the hold goes back without a doubt."""
    client = shell.client(pricing=TOKENS, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(openai.APIConnectionError):
        shell.run(chat(client))

    assert [("released", "no", False)] == [(hold.state, hold.sent, hold.is_in_doubt) for hold in billing.holds()]


def test_receipt(shell, llama):
    """A receipt tells what the server counted in its block."""
    client = shell.client(pricing=TOKENS, customer=None)

    async def scenario():
        async with shell.block(bill_to("ada")) as bill:
            await shell.wait(chat(client))
            await shell.wait(chat(client))
        return bill

    with counted(llama) as count:
        bill = shell.play(scenario())

    assert 2 == len(bill.events)
    assert count[0] + 2 * count[1] == bill.amount
