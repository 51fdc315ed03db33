"""
Record the cassettes again: HTTP exchanges with a real server, which tests replay.

`make cassettes` records against a llama.cpp server that it starts; with OPENAI_API_KEY set, against OpenAI (or OPENAI_BASE_URL).
Requests hold a few harmless fixed words. Keys, cookies and whatever tells of the account or the machine are left out.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import openai
import vcr

from metered_ai.testing.llama import LlamaServer

FOLDER = Path(__file__).parent


class Call(NamedTuple):
    """A call by its place in the client ("chat.completions") and its fields; `fails` is the status of one that is refused."""

    door: str
    body: dict[str, Any]
    fails: int | None = None
    bad_key: bool = False


class Models(NamedTuple):
    chat: str
    embedding: str


MODELS = {
    "llama": Models("words", "words"),
    "openai": Models("gpt-4.1-nano", "text-embedding-3-small"),
}
"""The folder of a server's cassettes, and the models that are asked for."""


def script(models: Models) -> dict[str, list[Call]]:
    """What is recorded into each cassette. Names that end in `_async` are recorded by the async client, all at once."""
    hello = {"model": models.chat, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
    bye = {"model": models.chat, "messages": [{"role": "user", "content": "Say goodbye."}], "max_tokens": 16}
    respond = {"model": models.chat, "input": "Say hello.", "max_output_tokens": 16}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "chat": [Call("chat.completions", hello), Call("chat.completions", bye)],
        "chat_async": [Call("chat.completions", hello), Call("chat.completions", bye)],
        "chat_stream": [Call("chat.completions", {**hello, **streamed}), Call("chat.completions", {**bye, **streamed})],
        "chat_stream_async": [Call("chat.completions", {**hello, **streamed})],
        "chat_stream_without_usage": [Call("chat.completions", {**hello, "stream": True})],
        "responses": [Call("responses", respond)],
        "responses_stream": [Call("responses", {**respond, "stream": True})],
        "responses_stream_async": [Call("responses", {**respond, "stream": True})],
        # As numbers: the SDK's own choice, base64, cannot be told from a secret.
        "embeddings": [
            Call(
                "embeddings",
                {"model": models.embedding, "input": ["hello"], "encoding_format": "float", "dimensions": 64},
            )
        ],
        "errors": [
            Call("chat.completions", {**hello, "messages": "Say hello."}, fails=400),
            Call("responses", {**respond, "input": 3}, fails=400),
            Call("chat.completions", bye, fails=401, bad_key=True),
        ],
    }


# All else tells of the account, the machine or the moment.
_REQUEST_HEADERS = {"accept", "content-type"}
_RESPONSE_HEADERS = {"content-type", "x-request-id"}


def recorder(mode: str) -> vcr.VCR:
    """A VCR that keeps no secret, and that finds an exchange by its method, path and body, wherever the server was."""

    def request_kept(request: Any) -> Any:
        request.headers = {name: value for name, value in request.headers.items() if name.lower() in _REQUEST_HEADERS}
        parts = urlsplit(request.uri)
        if parts.hostname == "127.0.0.1":
            request.uri = urlunsplit(parts._replace(netloc="127.0.0.1"))
        return request

    def response_kept(response: Any) -> Any:
        headers = {name: value for name, value in response["headers"].items() if name.lower() in _RESPONSE_HEADERS}
        # OpenAI repeats the key, or most of it, when it refuses one.
        body = re.sub(rb"(?<=provided: )[^.\"]+", b"***", response["body"]["string"])
        return {**response, "headers": headers, "body": {"string": body}}

    return vcr.VCR(
        record_mode=mode,
        match_on=("method", "path", "body"),
        decode_compressed_response=True,
        before_record_request=request_kept,
        before_record_response=response_kept,
    )


def make(client: Any, call: Call) -> Any:
    """Start a call. For an async client the result is to be awaited."""
    owner = client
    for name in call.door.split("."):
        owner = getattr(owner, name)
    return owner.create(**call.body)


def record(path: Path, calls: list[Call], base_url: str, key: str) -> None:
    """Make the calls against a server and write what was said. SystemExit if it does not refuse what it should."""
    path.unlink(missing_ok=True)

    def options(call: Call) -> dict[str, Any]:
        return {"base_url": base_url, "api_key": "wrong" if call.bad_key else key, "max_retries": 0}

    def record_sync(call: Call) -> None:
        with openai.OpenAI(**options(call)) as client:
            answer = make(client, call)
            if call.body.get("stream"):
                list(answer)

    async def record_async(call: Call) -> None:
        async with openai.AsyncOpenAI(**options(call)) as client:
            answer = await make(client, call)
            if call.body.get("stream"):
                async for _ in answer:
                    pass

    async def record_all() -> None:
        await asyncio.gather(*map(record_async, calls))

    with recorder("once").use_cassette(str(path)):
        if path.stem.endswith("_async"):
            asyncio.run(record_all())
            return
        for call in calls:
            try:
                record_sync(call)
            except openai.APIStatusError as error:
                if error.status_code != call.fails:
                    raise
                continue
            if call.fails:
                raise SystemExit(f"{path.stem}: {call.door} was to be refused with {call.fails}, and was answered")


@contextmanager
def servers() -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """The folder to record into, and for chat and for embeddings the address of a server and its key."""
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        address = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
        yield "openai", {"chat": (address, key), "embeddings": (address, key)}
        return

    # With a key, so that leaving it out is proved on every recording.
    key = secrets.token_hex(24)
    with LlamaServer(api_key=key) as chat, LlamaServer(embedding=True, api_key=key) as embeddings:
        yield "llama", {"chat": (chat.base_url, key), "embeddings": (embeddings.base_url, key)}


def main() -> None:
    with servers() as (server, addresses):
        folder = FOLDER / server
        folder.mkdir(exist_ok=True)
        for name, calls in script(MODELS[server]).items():
            address, key = addresses.get(name, addresses["chat"])
            path = folder / f"{name}.yaml"
            try:
                record(path, calls, address, key)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            if key in path.read_text():
                path.unlink()
                raise SystemExit(f"{name}: the key was recorded; the file is gone")
            print(f"{server}/{path.name}")


if __name__ == "__main__":
    main()
