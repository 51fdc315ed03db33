"""Every door of the SDK: what costs passes the ledger once, what is free never, what cannot be metered is never sent."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from contextlib import ExitStack

import openai
import pytest
from openai._models import FinalRequestOptions

from metered_ai import UnmeteredCallError
from metered_ai.core.endpoints import access, find, refusal
from tests.client.shells import HELLO, VERSION, Shell
from tests.sdk_walk import walk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ONCE = ["place", "settle"]


class Asked(Exception):
    pass


class Recorder(openai.OpenAI):
    """Tells what a method would ask for, without any of our code."""

    def request(self, cast_to, options, *, stream=False, **_):
        body = options.json_data if isinstance(options.json_data, dict) else {}
        self.asked.append((options.method, options.url, body, stream))
        raise Asked


@pytest.fixture(scope="module")
def expected():
    """For each method of the installed SDK: metered, free or refused."""
    client = Recorder(api_key="k", admin_api_key="k")
    expected = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, method, kwargs in walk(client):
            client.asked = []
            with pytest.raises(Asked):
                method(**kwargs).__enter__()
            ((verb, url, body, stream),) = client.asked
            door = find(verb, url)
            kind = access(door, verb)
            expected[name] = "refused" if kind == "metered" and refusal(door, body, stream) else kind
    return expected


def plain(method):
    return method


def raw(method):
    return getattr(method.__self__.with_raw_response, method.__name__, None)


def streaming(method):
    return getattr(method.__self__.with_streaming_response, method.__name__, None)


def use_up(shell: Shell, result):
    """Do with a result what a caller does: await it, enter it, read it to its end."""
    result = shell.run(result)
    with ExitStack() as stack:
        if hasattr(result, "__aenter__" if shell.is_async else "__enter__"):
            result = stack.enter_context(shell.within(result))
        if isinstance(result, openai.Stream | openai.AsyncStream) or type(result).__name__.endswith("Stream"):
            shell.read(result)
        elif hasattr(result, "iter_bytes") and not result.is_closed:
            shell.run(result.read())


def passed(shell, ledger, client, methods, view=plain):
    """What each method did: on the wire, and in the ledger."""
    done = {}
    for name, method, kwargs in methods:
        seen = view(method)
        if seen is None:
            continue
        sent = len(shell.provider.requests)
        ledger.forget()
        refused = False
        try:
            use_up(shell, seen(**kwargs))
        except UnmeteredCallError:
            refused = True
        except (openai.OpenAIError, ValueError, TypeError, KeyError, AttributeError):
            # The fake provider's answer to what is free does not always fit; it was sent all the same.
            assert len(shell.provider.requests) > sent, name
        shell.billing.flush()
        done[name] = (refused, len(shell.provider.requests) - sent, ledger.kinds)
    return done


OUTCOMES = {"metered": (False, 1, ONCE), "free": (False, 1, []), "refused": (True, 0, [])}
TWICE = dict.fromkeys(["vector_stores.files.upload", "beta.agents.environments.files.upload"], (False, 2, []))
"""They send a file, then ask for what became of it."""


def wrong(done, expected, outcomes=OUTCOMES):
    return {name: did for name, did in done.items() if did != TWICE.get(name, outcomes[expected[name]])}


def costly(client, expected):
    return [entry for entry in walk(client) if expected[entry[0]] != "free"]


@pytest.mark.timeout(120)
def test_every_method(shell, ledger, expected):
    """Each method of the SDK: metered is one hold and one end, free passes without a step, refused is never sent."""
    client = shell.client(admin_api_key="k")
    done = passed(shell, ledger, client, walk(client))

    assert {} == wrong(done, expected)
    assert len(done) == len(expected) >= 300
    assert {"metered", "free", "refused"} == set(expected.values())


@pytest.mark.parametrize("view", [raw, streaming], ids=lambda view: view.__name__)
def test_views(shell, ledger, expected, view):
    """`with_raw_response` and `with_streaming_response` are no way around."""
    client = shell.client(admin_api_key="k")
    done = passed(shell, ledger, client, costly(client, expected), view)

    assert {} == wrong(done, expected)
    assert Counter(expected[name] for name in done)["metered"] >= 16


@pytest.mark.parametrize(
    "derive",
    [
        lambda client: client.with_options(timeout=60),
        lambda client: client.copy(default_headers={"x-a": "b"}),
        lambda client: client.with_billing(customer="ada"),
        lambda client: client.with_options(max_retries=1).copy().with_billing(meter="generations"),
    ],
    ids=["with_options", "copy", "with_billing", "chain"],
)
def test_derived(shell, ledger, expected, derive):
    """Derived clients bill like the one they come from."""
    client = derive(shell.client(admin_api_key="k"))
    done = passed(shell, ledger, client, costly(client, expected))

    assert {} == wrong(done, expected)


def test_azure(shell, ledger, expected):
    """Azure's paths with deployments are the same doors."""
    client = shell.azure(admin_api_key="k")
    done = passed(shell, ledger, client, costly(client, expected))

    assert {} == wrong(done, expected)


@pytest.mark.timeout(120)
def test_allow(shell, ledger, expected):
    """unmetered="allow" lets through what cannot be metered, unbilled; what can be is metered as ever."""
    client = shell.client(admin_api_key="k", unmetered="allow")
    done = passed(shell, ledger, client, costly(client, expected))

    assert {} == wrong(done, expected, OUTCOMES | {"refused": (False, 1, [])})


def test_allow_is_inherited(shell, ledger, expected):
    """Derived clients keep unmetered="allow", and can take it back."""
    client = shell.client(unmetered="allow")
    use_up(shell, client.with_billing(customer="bob").batches.create(**BATCH))

    assert [] == ledger.kinds
    with pytest.raises(UnmeteredCallError):
        use_up(shell, client.with_options(unmetered="refuse").batches.create(**BATCH))


BATCH = {"input_file_id": "f", "endpoint": "/v1/responses", "completion_window": "24h"}
FILE = ("x.mp3", b"x")

STREAMS = {
    "chat": lambda client: client.chat.completions.create(model="m", messages=HELLO, stream=True),
    "completions": lambda client: client.completions.create(model="m", prompt="Hello", stream=True),
    "responses": lambda client: client.responses.create(model="m", input="Hello", stream=True),
    "beta.responses": lambda client: client.beta.responses.create(model="m", input="Hello", stream=True),
    "images.generate": lambda client: client.images.generate(model="m", prompt="A fox", stream=True, partial_images=2),
    "images.edit": lambda client: client.images.edit(model="m", image=FILE, prompt="A fox", stream=True),
    "transcriptions": lambda client: client.audio.transcriptions.create(model="m", file=FILE, stream=True),
    "threads": lambda client: client.beta.threads.create_and_run(assistant_id="a", stream=True),
    "runs": lambda client: client.beta.threads.runs.create("t", assistant_id="a", stream=True),
    "submit": lambda client: client.beta.threads.runs.submit_tool_outputs(
        "r", thread_id="t", tool_outputs=[], stream=True
    ),
    "chat.stream": lambda client: client.chat.completions.stream(model="m", messages=HELLO),
    "responses.stream": lambda client: client.responses.stream(model="m", input="Hello"),
    "raw": lambda client: client.chat.completions.with_raw_response.create(model="m", messages=HELLO, stream=True),
    "streaming": lambda client: client.responses.with_streaming_response.create(model="m", input="Hello", stream=True),
}
if VERSION < (3,):
    # There is none in the oldest SDK.
    del STREAMS["beta.responses"]


@pytest.mark.parametrize("name", STREAMS)
def test_streams(shell, ledger, name):
    """A stream read to its end is one hold and one end."""
    result = shell.run(STREAMS[name](shell.client()))
    if name == "raw":
        result = shell.run(result.parse())
    use_up(shell, result)
    shell.billing.flush()

    assert ONCE == ledger.kinds
    assert 1 == len(shell.provider.requests)


@pytest.fixture
def chat_body(provider):
    """A chat completion as the provider sends it."""
    answer = openai.OpenAI(base_url=provider.base_url, api_key="k").chat.completions.with_raw_response.create(
        model="m", messages=HELLO
    )
    provider.requests.clear()
    return answer.http_response.content


CHAT = {"model": "m", "messages": HELLO}

WAYS = [
    "/chat/completions",
    "chat/completions",
    "{url}/v1/chat/completions",
    "/chat//completions",
    "/chat/completions/",
    "//chat//completions",
    "//anything/chat/completions",
    "/files/../chat/completions",
    "/./chat/completions",
    "/chat/completions?x=1",
    "/chat/completions#x",
    "{url}/v1//chat/./completions?x=/files",
]


@pytest.mark.parametrize("way", WAYS)
def test_by_hand(shell, ledger, chat_body, way):
    """However a path is written, a request that reaches what costs is metered, once."""
    shell.provider.answer(body=chat_body)
    shell.run(shell.client().post(way.format(url=shell.provider.url), body=CHAT, cast_to=object))

    assert ONCE == ledger.kinds
    assert 1 == len(shell.provider.requests)


@pytest.mark.parametrize(
    "way", ["/files?purpose=/../chat/completions", "/chat/completions/chatcmpl-1", "/responses/input_tokens"]
)
def test_free_by_hand(shell, ledger, chat_body, way):
    """What only looks as if it cost is free, even where the answer shows a usage."""
    shell.provider.answer(body=chat_body)
    shell.run(shell.client().post(way, body=CHAT, cast_to=object))

    assert [] == ledger.kinds
    assert 1 == len(shell.provider.requests)


def test_update_is_free(shell, ledger, chat_body):
    """Changing the metadata of a paid answer returns it with its usage, and costs nothing."""
    shell.provider.answer(body=chat_body)
    answer = shell.run(shell.client().chat.completions.update("chatcmpl-1", metadata={"a": "b"}))

    assert answer.usage.total_tokens > 0
    assert [] == ledger.kinds


@pytest.mark.parametrize("verb", ["get", "delete"])
def test_reading_by_hand(shell, ledger, verb):
    """Reading and deleting are free, known or not."""
    shell.run(getattr(shell.client(), verb)("/unheard/of", cast_to=object))

    assert [] == ledger.kinds
    assert 1 == len(shell.provider.requests)


@pytest.mark.parametrize(
    ("verb", "way"),
    [
        ("post", "/unheard/of"),
        ("put", "/unheard/of"),
        ("patch", "/chat/completions"),
        ("post", "/chat/completions/%2e"),
        ("post", "/chat/%63ompletions"),
        ("post", "/v2/chat/completions/x"),
        ("post", "/realtime/sessions"),
        ("post", "/threads/runs"),
    ],
)
def test_refused_by_hand(shell, ledger, verb, way):
    """What is not in the table, or cannot be metered, is refused and not sent; the error says which door and why."""
    with pytest.raises(UnmeteredCallError, match="Nothing was sent") as caught:
        shell.run(getattr(shell.client(), verb)(way, body={}, cast_to=object))

    assert 501 == caught.value.http_status
    assert [] == ledger.kinds
    assert [] == shell.provider.requests


def test_beta_responses(shell, ledger):
    """`/responses?beta=true` is the door of responses."""
    shell.run(shell.client().post("/responses?beta=true", body={"model": "m", "input": "Hi"}, cast_to=object))

    assert ["responses"] == [step.endpoint for step in ledger.steps if hasattr(step, "endpoint")]
    assert ONCE == ledger.kinds


REFUSED = {
    "background": lambda client: client.responses.create(model="m", input="Hi", background=True),
    "background in extra_body": lambda client: client.responses.create(
        model="m", input="Hi", extra_body={"background": True}
    ),
    "background stream": lambda client: client.responses.create(model="m", input="Hi", background=True, stream=True),
    "background helper": lambda client: client.responses.stream(model="m", input="Hi", background=True),
    "unstreamed run": lambda client: client.beta.threads.runs.create("t", assistant_id="a"),
    "unstreamed thread": lambda client: client.beta.threads.create_and_run(assistant_id="a"),
    "polled run": lambda client: client.beta.threads.runs.create_and_poll(thread_id="t", assistant_id="a"),
    "unstreamed tool outputs": lambda client: client.beta.threads.runs.submit_tool_outputs(
        "r", thread_id="t", tool_outputs=[]
    ),
    "batch": lambda client: client.batches.create(**BATCH),
    "video": lambda client: client.videos.create(prompt="A fox"),
    "video, polled": lambda client: client.videos.create_and_poll(prompt="A fox"),
    "realtime secret": lambda client: client.realtime.client_secrets.create(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(shell, ledger, name):
    """What is answered before its cost is known is refused, and not sent."""
    with pytest.raises(UnmeteredCallError, match="cannot be metered"):
        use_up(shell, REFUSED[name](shell.client()))

    assert [] == ledger.kinds
    assert [] == shell.provider.requests


@pytest.mark.parametrize("background", [False, None])
def test_foreground(shell, ledger, background):
    """background=False and None are ordinary calls."""
    shell.run(shell.client().responses.create(model="m", input="Hi", background=background))

    assert ONCE == ledger.kinds


SOCKETS = ["responses", "realtime", "live", "beta.realtime", "beta.responses"]


def connect(shell, client, name):
    """Open a socket in the way of one resource; AttributeError if this SDK has none there."""
    resource = client
    for part in name.split("."):
        resource = getattr(resource, part)
    method = resource.connect
    kwargs = {"model": "m"} if "realtime" in name else {}
    with shell.within(method(**kwargs)):
        raise AssertionError("a socket was opened")


@pytest.mark.parametrize("name", SOCKETS)
@pytest.mark.parametrize(
    "derive", [lambda client: client, lambda client: client.with_billing(customer="bob")], ids=["own", "derived"]
)
def test_sockets(shell, ledger, name, derive):
    """WebSockets are refused before any socket opens, by every resource that has them, on every SDK."""
    url = shell.provider.url.replace("http", "ws")
    client = derive(shell.client(websocket_base_url=url))
    present = False
    with contextlib.suppress(AttributeError):
        present = bool(connect_of(shell.bare(), name))
    if not present:
        # This SDK has no such socket.
        assert name not in ("responses", "realtime")
        return

    with pytest.raises(UnmeteredCallError, match="websocket"):
        connect(shell, client, name)
    assert [] == shell.provider.requests
    assert [] == ledger.kinds


def connect_of(client, name):
    for part in name.split("."):
        client = getattr(client, part)
    return client.connect


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_socket_hook(shell, scheme):
    """A socket that the SDK prepares in the way of a newer release is refused by its URL, whatever resource it comes from."""
    options = FinalRequestOptions.construct(method="get", url=f"{scheme}://127.0.0.1/v1/responses")

    with pytest.raises(UnmeteredCallError, match="websocket"):
        shell.run(shell.client()._prepare_options(options))
    assert options == shell.run(shell.client(unmetered="allow")._prepare_options(options))


def test_sockets_allowed(shell):
    """unmetered="allow" leaves the sockets as the SDK has them."""
    client = shell.client(unmetered="allow")

    assert client.responses.connect.__func__ is type(client.responses).connect
