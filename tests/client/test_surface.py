"""A metered client is the SDK's client: what it takes, what it gives, what it sends, and what it owns."""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import threading

import openai
import pytest
from openai import AsyncStream, Stream
from openai._legacy_response import HttpxBinaryResponseContent, LegacyAPIResponse
from openai.types import Completion, CreateEmbeddingResponse, ImagesResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from openai.types.responses import Response

from metered_ai import (
    AsyncMeteredAzureOpenAI,
    AsyncMeteredOpenAI,
    Billing,
    ConfigurationError,
    MeteredAzureOpenAI,
    MeteredOpenAI,
    UnmeteredCallError,
    bill_to,
    connect,
    per_call,
    per_token,
)
from tests.client.shells import HELLO

PAIRS = [
    (MeteredOpenAI, openai.OpenAI),
    (AsyncMeteredOpenAI, openai.AsyncOpenAI),
    (MeteredAzureOpenAI, openai.AzureOpenAI),
    (AsyncMeteredAzureOpenAI, openai.AsyncAzureOpenAI),
]
pairs = pytest.mark.parametrize(("metered", "bare"), PAIRS, ids=[pair[0].__name__ for pair in PAIRS])

OURS = {"billing", "customer", "meter", "pricing", "unmetered"}
PER_CALL = {"customer", "meter", "amount", "pricing", "estimate", "price_slug", "transaction_id", "properties"}

AZURE = {"azure_endpoint": "http://127.0.0.1:1", "api_version": "2026-01-01"}


def build(kind, **options):
    azure = AZURE if "Azure" in kind.__name__ else {}
    return kind(**{"api_key": "k", **azure, **options})


def names(function):
    return {name for name in inspect.signature(function).parameters if name not in ("self", "kwargs", "options")}


# Signatures.


@pairs
def test_constructor(metered, bare):
    """The constructor takes all that the installed SDK's takes, and ours, all of them keywords with a default."""
    parameters = inspect.signature(metered.__init__).parameters

    assert names(bare.__init__) | OURS == names(metered.__init__)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OURS)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in OURS)


@pairs
@pytest.mark.parametrize("name", ["copy", "with_options"])
def test_copy_signature(metered, bare, name):
    """`copy` and `with_options` take all that the SDK's take, ours, and what `with_billing` takes."""
    assert names(getattr(bare, name)) | OURS | PER_CALL == names(getattr(metered, name))


@pairs
def test_constructor_in_copy(metered, bare):
    """Each parameter of the constructor is one of `copy`, as the SDK's own test demands of subclasses."""
    left_out = {"_strict_response_validation", "transport", "proxies"}

    assert set() == names(metered.__init__) - left_out - names(metered.copy) - (names(bare.__init__) - names(bare.copy))


@pairs
def test_no_names_taken(metered, bare):
    """No keyword of ours has the name of one of the SDK's, so that a new release of either changes nothing for the other."""
    assert set() == (OURS | PER_CALL) & (names(bare.__init__) | names(bare.copy))
    assert not hasattr(bare, "billing")
    assert not hasattr(bare, "with_billing")


@pairs
def test_isinstance(metered, bare):
    """A metered client is an instance of the SDK's class."""
    client = build(metered)

    assert isinstance(client, bare)
    assert type(client.with_billing(customer="ada")) is metered
    assert type(client.copy()) is type(client.with_options(timeout=1)) is metered


@pairs
def test_misspelled(metered, bare):
    """A misspelled keyword is a TypeError, wherever it is given."""
    client = build(metered)

    for function in (metered, client.copy, client.with_options, client.with_billing):
        with pytest.raises(TypeError, match="custommer"):
            function(custommer="ada")
    with pytest.raises(TypeError, match="ammount"):
        bill_to("ada", ammount=1)
    with pytest.raises(TypeError, match="on_unknow"):
        connect("memory://", on_unknow="charge")


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"billing": 7}, ConfigurationError, "billing.*7"),
        ({"billing": "mysql://x"}, ConfigurationError, "mysql"),
        ({"billing": "mysql://user:secret@x"}, ConfigurationError, "mysql://…"),
        ({"customer": ""}, ValueError, "customer"),
        ({"customer": 7}, ValueError, "customer.*7"),
        ({"meter": " m"}, ValueError, "meter"),
        ({"pricing": 7}, ValueError, "pricing.*7"),
        ({"unmetered": "perhaps"}, ConfigurationError, "perhaps"),
    ],
)
def test_bad_values(given, error, match):
    """A value that cannot be is refused at construction and by `copy`, with its name; a URL's password is not shown."""
    with pytest.raises(error, match=match):
        build(MeteredOpenAI, **given)
    client = build(MeteredOpenAI)
    with pytest.raises(error, match=match) as caught:
        client.copy(**given)
    assert "secret" not in str(caught.value)


def test_amount_and_pricing():
    """A fixed amount and a pricing at once say two things."""
    with pytest.raises(ConfigurationError, match="not both"):
        build(MeteredOpenAI).with_billing(amount=1, pricing=per_call(2))


# Copies.


def test_copy_keeps(shell):
    """A copy keeps what the SDK's keeps, and strict validation, which the SDK's loses."""
    client = shell.client(_strict_response_validation=True, max_retries=7, default_headers={"x-a": "b"})
    copied = client.with_options(timeout=3).with_billing(amount=2).copy()

    assert copied._strict_response_validation
    assert (7, 3, "b") == (copied.max_retries, copied.timeout, copied.default_headers["x-a"])
    assert not shell.client().copy()._strict_response_validation


def test_strict_copy(shell):
    """Strict validation is not only remembered by a copy but done."""
    shell.provider.answer(
        body={"id": "chatcmpl-1", "choices": "none", "usage": None, "object": "chat.completion"}, times=2
    )
    create = shell.client(_strict_response_validation=True).copy().chat.completions.create

    with pytest.raises(openai.APIResponseValidationError):
        shell.run(create(model="m", messages=HELLO))


def test_copy_keeps_billing(shell, make_billing):
    """A copy bills through the same `Billing`, or through the one it is given."""
    client, other = shell.client(), make_billing()

    assert client.billing is client.copy().billing is client.with_billing(amount=2).billing
    assert other is client.copy(billing=other).billing
    assert other is client.copy(billing=other).with_options(timeout=1).billing


def test_copy_ignores_the_environment(shell, monkeypatch):
    """A copy never looks for a billing of its own: it has one."""
    client = shell.client()
    monkeypatch.setenv("METERED_AI_BILLING", "nonsense://x")

    assert client.billing is client.with_billing(amount=2).billing


def test_pool_is_shared(shell):
    """Derived clients use the connection pool of the client they come from."""
    client = shell.client()
    shell.run(client.responses.create(model="m", input="Hi"))
    derived = [
        client.with_billing(amount=2),
        client.copy(),
        client.with_options(timeout=3).with_billing(meter="n", amount=0),
    ]

    assert [client._client] * 3 == [one._client for one in derived]
    for one in derived:
        shell.run(one.responses.create(model="m", input="Hi"))
        assert client._client is one._client


def test_derived_closes_nothing(shell):
    """Closing or leaving a derived client leaves the connections to the client that made them."""
    client = shell.client()
    shell.close(client.with_billing(amount=2))
    with shell.within(client.with_options(timeout=3)):
        pass
    derived = client.copy()
    del derived
    gc.collect()

    assert not client.is_closed()
    shell.run(client.responses.create(model="m", input="Hi"))


def test_leaving_closes_http(shell):
    """`with` closes HTTP, as the SDK's does; a given `Billing` stays open."""
    client = shell.client()
    with shell.within(client) as entered:
        assert entered is client
        shell.run(client.responses.create(model="m", input="Hi"))

    assert client.is_closed()
    assert 999_999 == shell.billing.balance("ada", "generations").available


def test_leaving_waits_for_settles(shell, tmp_path):
    """Leaving a client that was built from a URL waits until what has ended is in the ledger."""
    url = f"sqlite:///{tmp_path}/credits.db"
    with connect(url) as billing:
        billing.grant("ada", "generations", 5, id="a")
    client = shell.client(billing=url)
    gate = threading.Event()
    with shell.within(client):
        stream = shell.run(client.chat.completions.create(model="m", messages=HELLO, stream=True))
        shell.take(stream)
        # The thread that brings in what was closed is busy until the client has long begun to wait for it.
        client.billing._settler.enqueue(gate.wait)
        shell.close(stream)
        threading.Timer(0.1, gate.set).start()

    assert 1 == client.billing.ledger.balance("ada", "generations").used
    client.billing.close()


# Building.


@pairs
def test_building_opens_nothing(metered, bare, tmp_path, monkeypatch):
    """Building and deriving clients opens nothing: no file, no thread; the ledger opens at the first metered call."""
    monkeypatch.chdir(tmp_path)
    before = threading.active_count()
    client = build(metered, customer="ada")
    client.with_billing(amount=2).copy(meter="n")

    assert client.billing._opened is None
    assert [] == list(tmp_path.iterdir())
    assert before == threading.active_count()


def test_free_calls_open_nothing(shell, tmp_path):
    """Nor does a call that costs nothing, or one that is refused."""
    client = shell.client(billing=f"sqlite:///{tmp_path}/credits.db")
    shell.run(client.models.retrieve("m"))
    with pytest.raises(UnmeteredCallError):
        shell.run(client.batches.create(input_file_id="f", endpoint="/v1/responses", completion_window="24h"))

    assert [] == list(tmp_path.iterdir())


def test_opens_at_the_first_call(shell, tmp_path, monkeypatch):
    """The file is where it was said to be when the client was built, whatever folder the program is in later."""
    monkeypatch.chdir(tmp_path)
    client = shell.client(billing="sqlite:///credits.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    client.billing.grant("ada", "generations", 1, id="a")
    shell.run(client.responses.create(model="m", input="Hi"))

    assert (tmp_path / "credits.db").exists()
    assert [] == list((tmp_path / "elsewhere").iterdir())
    client.billing.close()


@pairs
def test_same_url_same_billing(metered, bare, tmp_path, monkeypatch):
    """Clients given the same file share one `Billing`, however they name it; another file is another."""
    monkeypatch.chdir(tmp_path)
    one = build(metered, billing="sqlite:///credits.db").billing

    assert one is build(metered, billing=f"sqlite:///{tmp_path}/credits.db").billing
    assert one is build(MeteredOpenAI, billing="sqlite:///./x/../credits.db").billing
    assert one is not build(metered, billing="sqlite:///other.db").billing
    assert one is not connect("sqlite:///credits.db")


def test_default_url(tmp_path, monkeypatch):
    """Without a billing it is METERED_AI_BILLING, else metered_ai.db in this folder."""
    monkeypatch.chdir(tmp_path)
    default = build(MeteredOpenAI).billing
    monkeypatch.setenv("METERED_AI_BILLING", "sqlite:///mine.db")

    assert default is build(MeteredOpenAI, billing="sqlite:///metered_ai.db").billing
    assert build(MeteredOpenAI).billing is build(MeteredOpenAI, billing=f"sqlite:///{tmp_path}/mine.db").billing


def test_memory_is_never_shared():
    """Two clients on memory:// have two ledgers; a client's copies have its own."""
    one, two = build(MeteredOpenAI, billing="memory://"), build(MeteredOpenAI, billing="memory://")

    assert one.billing is not two.billing
    assert one.billing is one.billing is one.with_billing(amount=2).billing


def test_connect_is_never_shared(tmp_path):
    """`connect` always makes a new `Billing`."""
    url = f"sqlite:///{tmp_path}/credits.db"

    assert connect(url) is not connect(url)


def test_closed_shared_billing_is_made_anew(shell, tmp_path):
    """A shared `Billing` that somebody closed does not stay in the way of clients that are built later."""
    url = f"sqlite:///{tmp_path}/credits.db"
    build(MeteredOpenAI, billing=url).billing.close()
    later = shell.client(billing=url)
    later.billing.grant("ada", "generations", 1, id="a")
    shell.run(later.responses.create(model="m", input="Hi"))

    assert 0 == later.billing.balance("ada", "generations").available
    later.billing.close()


def test_given_billing_is_never_closed(shell):
    """A client never closes a `Billing` it was given."""
    for _ in range(2):
        with shell.within(shell.client()) as client:
            shell.run(client.responses.create(model="m", input="Hi"))
        shell.close(client)

    assert isinstance(shell.billing, Billing)
    assert 999_998 == shell.billing.balance("ada", "generations").available


# What goes out.

CALLS = {
    "chat": lambda client: client.chat.completions.create(model="m", messages=HELLO, user="u", metadata={"a": "b"}),
    "responses": lambda client: client.responses.create(model="m", input="Héllo", extra_headers={"x-a": "b"}),
    "extra body": lambda client: client.responses.create(
        model="m", input="Hi", extra_body={"x": 1}, extra_query={"q": "1"}
    ),
    "embeddings": lambda client: client.embeddings.create(model="m", input=["a", "b"]),
    "images": lambda client: client.images.generate(model="m", prompt="A fox"),
    "speech": lambda client: client.audio.speech.create(model="m", input="Hi", voice="alloy"),
    "search": lambda client: client.vector_stores.search("v", query="fox"),
    "stream": lambda client: client.chat.completions.create(model="m", messages=HELLO, stream=True),
    "stream with usage": lambda client: client.chat.completions.create(
        model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
    ),
    "responses stream": lambda client: client.responses.create(model="m", input="Hi", stream=True),
    "raw": lambda client: client.responses.with_raw_response.create(model="m", input="Hi"),
    "models": lambda client: client.models.list(),
    "by hand": lambda client: client.post("/responses", body={"model": "m", "input": "Hi"}, cast_to=object),
}


def sent(shell, client, name):
    result = shell.run(CALLS[name](client))
    if "stream" in name or name == "models":
        shell.read(result)
    (request,) = shell.provider.requests
    shell.provider.requests.clear()
    return request


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("azure", [False, True], ids=["openai", "azure"])
def test_wire(shell, name, azure):
    """Byte for byte the bare SDK's request: path, query, headers (also the User-Agent, and in their order) and body."""
    metered = (shell.azure if azure else shell.client)()
    bare = (shell.bare_azure if azure else shell.bare)()
    ours, theirs = (
        sent(shell, metered.with_billing(meter="generations", properties={"secret": 1}), name),
        sent(shell, bare, name),
    )

    assert (theirs.method, theirs.url, theirs.content) == (ours.method, ours.url, ours.content)
    assert list(theirs.headers.items()) == list(ours.headers.items())


def test_wire_uploads(shell):
    """Uploads too, but for the boundary that is drawn anew for each form."""

    def form(client):
        shell.run(client.audio.transcriptions.create(model="m", file=("a.mp3", b"sound"), response_format="json"))
        request = shell.provider.requests.pop()
        boundary = request.headers["content-type"].partition("boundary=")[2].encode()
        left_out = ("content-type",)
        return request.content.replace(boundary, b"-"), {
            name: value for name, value in request.headers.items() if name not in left_out
        }

    assert form(shell.bare()) == form(shell.client())


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_obfuscation": False}])
def test_wire_at_a_token_price(shell, options):
    """A token price adds `include_usage` to a chat stream and nothing else; the caller's own body is not touched."""
    given = {"stream": True} if options is None else {"stream": True, "stream_options": options}
    create = {"model": "m", "messages": HELLO, **given}
    bodies = []
    for client in (shell.bare(), shell.client(pricing=per_token(input=1, output=1))):
        shell.read(shell.run(client.chat.completions.create(**create)))
        bodies.append(shell.provider.requests.pop().body)
    theirs, ours = bodies

    assert {**theirs, "stream_options": {**(options or {}), "include_usage": True}} == ours
    assert {"model": "m", "messages": HELLO, **given} == create


def test_wire_with_capped_output(shell):
    """`cap_output` adds the output limit that is held for, where the caller set none, and nothing else."""
    client = shell.client(pricing=per_token(input=1, output=1, cap_output=True))
    shell.run(client.responses.create(model="m", input="Hi"))
    shell.run(client.responses.create(model="m", input="Hi", max_output_tokens=9))

    assert [4096, 9] == [request.body.pop("max_output_tokens") for request in shell.provider.requests]
    assert [{"model": "m", "input": "Hi"}] * 2 == [request.body for request in shell.provider.requests]


def test_extra_body_wins(shell):
    """What is added goes together with `extra_body`, of which nothing is lost."""
    client = shell.client(pricing=per_token(input=1, output=1))
    extra = {"stream_options": {"include_obfuscation": False}, "x": 1}
    shell.read(shell.run(client.chat.completions.create(model="m", messages=HELLO, stream=True, extra_body=extra)))

    (request,) = shell.provider.requests
    assert {"include_obfuscation": False, "include_usage": True} == request.body["stream_options"]
    assert 1 == request.body["x"]
    assert {"stream_options": {"include_obfuscation": False}, "x": 1} == extra


# What comes back.


def test_types(shell):
    """Results have exactly the SDK's types."""
    client = shell.client(pricing=per_token(input=1, output=1))
    run = shell.run

    assert type(run(client.chat.completions.create(model="m", messages=HELLO))) is ChatCompletion
    assert type(run(client.responses.create(model="m", input="Hi"))) is Response
    assert type(run(client.completions.create(model="m", prompt="Hi"))) is Completion
    assert type(run(client.embeddings.create(model="m", input="Hi"))) is CreateEmbeddingResponse
    assert type(run(client.images.generate(model="m", prompt="Hi"))) is ImagesResponse
    assert type(run(client.chat.completions.with_raw_response.create(model="m", messages=HELLO))) is LegacyAPIResponse
    assert isinstance(run(client.chat.completions.parse(model="m", messages=HELLO)), ParsedChatCompletion)
    spoken = run(client.with_billing(amount=1).audio.speech.create(model="m", input="Hi", voice="alloy"))
    assert type(spoken) is HttpxBinaryResponseContent


def test_stream_types(shell):
    """Streams are exactly the SDK's, and so is what they give; the usage that we asked for is not shown."""
    client = shell.client(pricing=per_token(input=1, output=1))
    stream = shell.run(client.chat.completions.create(model="m", messages=HELLO, stream=True))
    chunks = shell.read(stream)

    assert type(stream) is (AsyncStream if shell.is_async else Stream)
    assert {ChatCompletionChunk} == {type(chunk) for chunk in chunks}
    assert [1] * len(chunks) == [len(chunk.choices) for chunk in chunks]


def test_results_equal(shell):
    """A result says what the bare SDK's says, its request id and all."""
    answers = itertools.cycle([shell.bare(), shell.client()])
    shell.provider.answer(id="chatcmpl-1", created=7, headers={"x-request-id": "req_1"}, times=2)
    theirs, ours = (shell.run(next(answers).chat.completions.create(model="m", messages=HELLO)) for _ in range(2))

    assert theirs.to_dict() == ours.to_dict()
    assert ("req_1", "req_1") == (theirs._request_id, ours._request_id)


def test_provider_errors_pass(shell):
    """The provider's own errors pass through untouched: a 429 is a RateLimitError and never a 402."""
    shell.provider.answer(status=429)

    with pytest.raises(openai.RateLimitError) as caught:
        shell.run(shell.client().responses.create(model="m", input="Hi"))
    assert 429 == caught.value.status_code


def test_sdk_environment(shell, monkeypatch):
    """The SDK's own settings from the environment work as ever."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", shell.provider.base_url)
    client = shell.keep(shell.metered_type(billing=shell.billing, customer="ada"))

    assert shell.run(client.responses.create(model="m", input="Hi")).id.startswith("resp_")


def test_deleted_folder(shell, tmp_path, monkeypatch):
    """A client with a billing of its own can be copied in a folder that is gone."""
    client = shell.client()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    os.rmdir(gone)

    assert client.billing is client.with_billing(amount=2).billing
