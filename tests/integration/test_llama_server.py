"""The llama.cpp server itself, with the bare SDK: real answers, real token counts, and its own count of them."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from metered_ai.testing.llama import LlamaServer
from tests.integration.truth import HI, PERSON, WEATHER, counted


def chat(client, **options):
    return client.chat.completions.create(model="any", messages=HI, **options)


def used(*usages):
    return [sum(usage.prompt_tokens for usage in usages), sum(usage.completion_tokens for usage in usages)]


def test_chat(llama, bare):
    """A plain answer is words, and its usage is what the server worked for."""
    with counted(llama) as count:
        answer = chat(bare)

    assert answer.choices[0].message.content.isprintable()
    assert answer.choices[0].message.content
    assert used(answer.usage) == count


def test_stream(llama, bare):
    """A stream tells the same usage when asked, in a last chunk without choices."""
    with counted(llama) as count:
        chunks = list(chat(bare, stream=True, stream_options={"include_usage": True}))

    assert [] == chunks[-1].choices
    assert used(chunks[-1].usage) == count
    assert not any(chunk.usage for chunk in chat(bare, stream=True))


def test_forty_at_once(llama, bare):
    """40 callers at once get 40 answers, none of them empty, and every token is accounted for."""
    with counted(llama) as count, ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: chat(bare), range(40)))

    assert 40 == len({answer.id for answer in answers})
    assert all(answer.choices[0].message.content for answer in answers)
    assert used(*(answer.usage for answer in answers)) == count


def test_several_choices(llama, bare):
    """With n=3 the server reports less than it generated: a truth about weak servers that a ledger has to live with."""
    with counted(llama) as count:
        answer = chat(bare, n=3, max_tokens=20)

    assert 3 == len(answer.choices)
    assert answer.usage.completion_tokens < count[1]


def test_response(llama, bare):
    """Responses, plain and streamed, report what the server worked for."""
    with counted(llama) as count:
        plain = bare.responses.create(model="any", input="Hi")
        # Not `responses.stream`: the SDK's helper needs a content index on each delta, and llama.cpp sends none.
        streamed = list(bare.responses.create(model="any", input="Hi", stream=True))[-1].response

    assert plain.output_text
    usages = (plain.usage, streamed.usage)
    assert [sum(usage.input_tokens for usage in usages), sum(usage.output_tokens for usage in usages)] == count


def test_completion(llama, bare):
    """The old completions endpoint works as well."""
    with counted(llama) as count:
        answer = bare.completions.create(model="any", prompt="water and", max_tokens=20)

    assert used(answer.usage) == count


def test_tools(bare):
    """A required tool is called, with arguments that fit its schema."""
    answer = chat(bare, tools=[WEATHER], tool_choice="required", max_tokens=1500)
    call = answer.choices[0].message.tool_calls[0].function

    assert ("tool_calls", "weather") == (answer.choices[0].finish_reason, call.name)
    assert ["city"] == list(json.loads(call.arguments))


def test_tool_results(bare):
    """A conversation with calls and results in it goes on."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    history = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    answer = bare.chat.completions.create(model="any", messages=[*HI, *history], tools=[WEATHER], max_tokens=5)

    assert 5 >= answer.usage.completion_tokens > 0


def test_json_schema(bare):
    """An answer under a JSON schema fits it."""
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    person = json.loads(chat(bare, response_format=schema, max_tokens=1500).choices[0].message.content)

    assert {"name": str, "age": int, "nice": bool} == {name: type(value) for name, value in person.items()}


def test_embeddings(llama_embedding):
    """Embeddings have a vector for each text, equal for equal texts, and a usage."""
    with (
        openai.OpenAI(base_url=llama_embedding.base_url, api_key="none", max_retries=0) as client,
        counted(llama_embedding) as count,
    ):
        answer = client.embeddings.create(model="any", input=["water", "wind and rain", "water"])

    vectors = [item.embedding for item in answer.data]
    assert vectors[0] == pytest.approx(vectors[2])
    assert vectors[0] != pytest.approx(vectors[1])
    assert [answer.usage.prompt_tokens, 0] == count


def test_key_and_length():
    """A server with a key refuses others; mean_length=0 answers until the limit."""
    with (
        LlamaServer(mean_length=0, parallel=1, api_key="right") as server,
        openai.OpenAI(base_url=server.base_url, api_key="right", max_retries=0) as client,
    ):
        assert 300 == chat(client, max_tokens=300).usage.completion_tokens
        assert 300 == server.metrics()["tokens_predicted_total"]
        with pytest.raises(openai.AuthenticationError):
            chat(client.copy(api_key="wrong"))

    assert server.process.returncode is not None


def test_never_empty():
    """However short the answers are, none is empty."""
    with (
        LlamaServer(mean_length=2) as server,
        openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client,
    ):
        answers = [chat(client) for _ in range(25)]

    assert all(answer.choices[0].message.content for answer in answers)


def test_missing_package(monkeypatch):
    """Without its packages it says what to install."""
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(RuntimeError, match=r"gguf is not installed: pip install 'metered-ai\[demo\]'"):
        LlamaServer()
