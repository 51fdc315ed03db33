"""
Record the cassettes again: HTTP exchanges with a server, which tests replay.

`make cassettes` records against a llama.cpp server that it starts; with OPENAI_API_KEY set, against OpenAI (or OPENAI_BASE_URL).
Flowglad is the fake one of `metered_ai.testing`; with FLOWGLAD_SECRET_KEY set to a test key, the real one (or FLOWGLAD_BASE_URL).
Requests hold a few harmless fixed words. Keys, cookies and whatever tells of the account or the machine are left out.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import openai
import vcr

from metered_ai.errors import ConfigurationError, NoSubscriptionError
from metered_ai.records import UsageEvent
from metered_ai.services.flowglad import Flowglad
from metered_ai.testing import FakeFlowglad
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
        # By which trace Flowglad's operators find the request, and where its customers pay.
        body = re.sub(rb'("(?:trace_id|billingPortalUrl)": ?)"[^"]+"', rb'\1"***"', body)
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


# Flowglad.

ADA, NOBODY = "cassette_ada", "cassette_nobody"


def _event(service: Flowglad, name: str, amount: int = 3, **fields: Any) -> UsageEvent:
    """A usage event whose transaction id is new with each new customer, and the same when it is replayed: from the subscription's."""
    reference = service.read_balance(ADA, "generations").reference or ""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    options = {"meter": "generations", **fields}
    return UsageEvent(
        ADA, options.pop("meter"), f"{name}_{reference[-8:]}", amount, at, "reported", reference=reference, **options
    )


def _expected(kind: type[Exception], ask: Callable[[], object]) -> str:
    try:
        ask()
    except kind as error:
        return str(error)
    raise SystemExit(f"{kind.__name__} was to be raised")


def _customer(service: Flowglad) -> list[Any]:
    return [service.ensure_customer(ADA, name="Ada", email="ada@example.com") for _ in range(2)]


def _balance(service: Flowglad) -> list[Any]:
    return [service.read_balance(ADA, "generations"), service.has_feature(ADA, "fast")]


def _no_customer(service: Flowglad) -> list[Any]:
    return [_expected(NoSubscriptionError, lambda: service.read_balance(NOBODY, "generations"))]


def _usage_event(service: Flowglad) -> list[Any]:
    event = _event(service, "one", properties={"feature": "hello"})
    again = _event(service, "one", amount=5)
    return [service.write_usage_event(each) for each in (event, event, again)]


def _usage_event_by_price(service: Flowglad) -> list[Any]:
    return [service.write_usage_event(_event(service, "price", price_slug="generations_no_charge"))]


def _usage_event_mistakes(service: Flowglad) -> list[Any]:
    good = _event(service, "bad")
    bad = (_event(service, "bad", meter="nope"), _event(service, "bad", price_slug="nope"))
    unknown = UsageEvent(ADA, "generations", good.transaction_id, 1, good.created_at, "reported", reference="sub_nope")
    return [service.write_usage_event(each) for each in (*bad, unknown)]


def _usage_events(service: Flowglad) -> list[Any]:
    first, second, third = (_event(service, name) for name in ("a", "b", "c"))
    return [service.write_usage_events([first, second]), service.write_usage_events([first, third])]


def _checkout(service: Flowglad) -> list[Any]:
    urls = {"success_url": "https://example.com/ok", "cancel_url": "https://example.com/no"}
    bad = _expected(ConfigurationError, lambda: service.checkout_url(ADA, price_slug="nope", **urls))
    return [service.checkout_url(ADA, price_slug="pro", **urls), bad]


def _wrong_key(service: Flowglad) -> list[Any]:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return [service.write_usage_event(UsageEvent(ADA, "generations", "key", 1, at, "reported", reference="sub_nope"))]


FLOWGLAD: dict[str, Callable[[Flowglad], list[Any]]] = {
    "customer": _customer,
    "balance": _balance,
    "no_customer": _no_customer,
    "usage_event": _usage_event,
    "usage_event_by_price": _usage_event_by_price,
    "usage_event_mistakes": _usage_event_mistakes,
    "usage_events": _usage_events,
    "checkout": _checkout,
    "wrong_key": _wrong_key,
}
"""What is asked of Flowglad for each cassette, in this order, and what came of it."""


def flowglad_service(name: str, base_url: str, key: str) -> Flowglad:
    # The wide answer, which the limit is read from, is recorded once.
    return Flowglad("sk_test_wrong" if name == "wrong_key" else key, base_url, estimate_limits=name == "balance")


@contextmanager
def flowglads() -> Iterator[tuple[str, str]]:
    """The address of a Flowglad and a key."""
    key = os.environ.get("FLOWGLAD_SECRET_KEY")
    if key:
        if not key.startswith("sk_test_"):
            raise SystemExit("FLOWGLAD_SECRET_KEY is no test key; nothing is recorded with another")
        yield os.environ.get("FLOWGLAD_BASE_URL", "https://app.flowglad.com"), key
        return

    with FakeFlowglad(key=f"sk_test_{secrets.token_hex(24)}") as fake:
        fake.add_meter("generations")
        fake.add_plan("free", credits={"generations": 100}, features=("fast",), is_default=True)
        fake.add_plan("pro", unit_price=1000, credits={"generations": 1000})
        yield fake.url, fake.key


def record_flowglad(folder: Path) -> None:
    """Ask a Flowglad everything and write what was said."""
    folder.mkdir(exist_ok=True)
    with flowglads() as (base_url, key):
        for name, ask in FLOWGLAD.items():
            path = folder / f"{name}.yaml"
            path.unlink(missing_ok=True)
            with recorder("once").use_cassette(str(path)):
                ask(flowglad_service(name, base_url, key))
            keep_secret(path, key)


def keep_secret(path: Path, key: str) -> None:
    """SystemExit, and the file is gone, if the key is in it."""
    if key in path.read_text():
        path.unlink()
        raise SystemExit(f"{path.stem}: the key was recorded; the file is gone")
    print(f"{path.parent.name}/{path.name}")


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
            keep_secret(path, key)
    record_flowglad(FOLDER / "flowglad")


if __name__ == "__main__":
    main()
