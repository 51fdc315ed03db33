from __future__ import annotations

import re
import warnings
from urllib.parse import quote

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai.core.endpoints import DOORS, SOCKET, access, find, refusal
from metered_ai.records import Usage
from tests.sdk_walk import walk

VERSION = tuple(int(part) for part in openai.__version__.split(".")[:2])

ONLY_OLD = {"/evals/{}/runs/{}"}
"""Doors of the oldest SDK that the newest has no more."""

METERED = sorted(path for path, door in DOORS.items() if door.access == "metered")


class AskedError(Exception):
    pass


class Recorder(openai.OpenAI):
    def request(self, cast_to, options, **_):
        self.asked.append((options.method, options.url))
        raise AskedError


@pytest.fixture(scope="module")
def asked():
    client = Recorder(api_key="k", admin_api_key="k")
    asked = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, method, kwargs in walk(client):
            client.asked = []
            with pytest.raises(AskedError):
                method(**kwargs).__enter__()
            (asked[name],) = client.asked
    return asked


def filled(path):
    return path.replace("{}", "x1")


def template(url):
    return re.sub(r"(?<=/)x1(?=/|$)", "{}", url.partition("?")[0])


def test_walk(asked):
    """Every endpoint of the installed SDK that creates or changes something is in the table, under its own path."""
    unknown = {
        name: url
        for name, (method, url) in asked.items()
        if method not in ("get", "delete") and getattr(find(method, url), "path", None) != template(url)
    }

    assert {} == unknown
    assert len(asked) >= 300


def test_no_dead_entries(asked):
    """The table has no door that neither the oldest nor the newest SDK knows."""
    paths = {template(url) for method, url in asked.values() if method == "post"}

    assert (set(DOORS) - paths if VERSION >= (3, 54) else ONLY_OLD - paths) == (
        ONLY_OLD if VERSION >= (3, 54) else set()
    )


def test_reading_is_free(asked):
    """What the SDK reads or deletes costs nothing."""
    kinds = {access(find(method, url), method) for method, url in asked.values() if method in ("get", "delete")}

    assert {"free"} == kinds


def test_other_methods(asked):
    """The SDK changes things by POST only, which is why the table holds nothing else."""
    assert {"get", "post", "delete"} == {method for method, _ in asked.values()}


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/chat/completions", "chat.completions"),
        ("chat/completions", "chat.completions"),
        ("/chat/completions/", "chat.completions"),
        ("/chat//completions", "chat.completions"),
        ("//chat//completions", "completions"),
        ("/chat/completions?api-version=2025", "chat.completions"),
        ("/chat/completions#x", "chat.completions"),
        ("/v1/chat/completions", "chat.completions"),
        ("/openai/chat/completions", "chat.completions"),
        ("/openai/v1/chat/completions", "chat.completions"),
        ("/openai/deployments/gpt/chat/completions", "chat.completions"),
        ("/deployments/gpt/chat/completions", "chat.completions"),
        ("https://host/v1/chat/completions", "chat.completions"),
        ("https://host/gateway/v7/chat/completions", "chat.completions"),
        ("https://host/gateway/v7/v1/chat/completions?x=/files", "chat.completions"),
        ("/responses?beta=true", "responses"),
        ("/responses/compact?beta=true", "responses.compact"),
        ("/vector_stores/vs_1/search", "vector_stores.search"),
        ("/threads/runs", "threads.create_and_run"),
        ("/threads/thread_1/runs", "threads.runs"),
        ("/files/../chat/completions", "chat.completions"),
        ("/./responses", "responses"),
        ("/chat/completions/x/..", "chat.completions"),
        ("//agents/responses", "responses"),
    ],
)
def test_metered(url, name):
    """However a metered path is written, it is metered."""
    door = find("POST", url, "https://host/gateway/v7/")

    assert door is not None
    assert (name, "metered") == (door.name, access(door, "post"))


@pytest.mark.parametrize(
    "url",
    [
        "/chat/completions/chatcmpl-1",
        "/responses/resp_1/cancel",
        "/responses/input_tokens",
        "/threads/thread_1",
        "/evals/eval:1/runs/run%3A1/cancel",
        "/files",
        "https://host/v1/files?purpose=x",
    ],
)
def test_free(url):
    """What looks like a metered path but costs nothing is free."""
    assert "free" == access(find("post", url), "post")


@pytest.mark.parametrize(
    "url",
    [
        "/batches",
        "/videos/v1/remix",
        "/realtime/client_secrets",
        "/live/sessions",
        "/agents/sessions/s1/events",
        "/engines/x/completions",
        "/nothing",
        "",
        "/",
        "/chat/completions/%2e",
        "/chat/completions/%252e%252e",
        "/chat/completions/;x",
        "/chat/completions/%3F",
        "/chat/completions/%00",
        "/files/%2e%2e/chat/completions",
        "/threads\\..\\responses",
        "/agents/x%2f..%2f..%2fresponses",
        "https://other/v2/chat/completions",
    ],
)
def test_refused(url):
    """What hands out cost for later, is unknown, or can be read in more than one way, is refused."""
    assert "refused" == access(find("POST", url, "https://host/v1"), "POST")


@pytest.mark.parametrize("method", ["PUT", "patch", "POST", "QUERY"])
def test_unknown_methods(method):
    """A method that may change something is refused where the table knows nothing."""
    assert "refused" == access(find(method, "/unheard/of"), method)


@pytest.mark.parametrize("method", ["GET", "head", "DELETE", "options"])
def test_reading(method):
    """Reading and deleting are free, known or not."""
    assert "free" == access(find(method, "/unheard/of"), method)


@pytest.mark.parametrize("url", ["wss://host/v1/responses", "ws://host/v1/realtime?model=x", "WSS://host/"])
def test_sockets(url):
    """A WebSocket is refused, whatever its path."""
    assert SOCKET == find("GET", url)
    assert "refused" == access(SOCKET, "GET")


@given(st.sampled_from(METERED), st.data())
def test_no_smuggling(path, data):
    """No spelling that a server may read as a metered path is free: encodings, dots, slashes, prefixes."""
    mangled = []
    for letter in filled(path):
        coded = f"%{ord(letter):02x}"
        mangled.append(data.draw(st.sampled_from([letter, letter, letter, letter, coded, coded.replace("%", "%25")])))
    text = "".join(mangled)
    before = data.draw(
        st.sampled_from(["", "/", "/.", "/x/..", "/x/%2e%2e", "/v1", "//files", "/files/..", "\\", "/%2e"])
    )
    after = data.draw(
        st.sampled_from(
            ["", "/", "/.", "/%2e", "/x/..", "/x%2f..", "?a", "#a", "/%2e%2e/" + quote(path.split("/")[-1])]
        )
    )

    assert "free" != access(find("POST", before + text + after), "POST")


@pytest.mark.parametrize("path", sorted(DOORS))
def test_prefixes(path):
    """The prefixes of hand-written paths change nothing."""
    found = {
        find("post", prefix + filled(path)) for prefix in ("", "/v1", "/openai", "/openai/v1", "/openai/deployments/d")
    }

    assert {DOORS[path]} == found


def test_doors():
    """Doors have names of their own; metered ones tell how they are read and report fields of Usage, refused ones say why."""
    metered = [door for door in DOORS.values() if door.access == "metered"]

    assert len({door.name for door in metered}) == len(metered)
    assert all(door.reads and door.reports <= set(Usage.__slots__) for door in metered)
    assert all(bool(door.reason) == (door.access == "refused") for door in DOORS.values())


@pytest.mark.parametrize(
    ("path", "body", "stream", "is_refused"),
    [
        ("/responses", {"background": True}, False, True),
        ("/responses", {"background": True}, True, True),
        ("/responses", {"background": False}, False, False),
        ("/responses", {"background": None}, False, False),
        ("/threads/runs", {}, False, True),
        ("/threads/{}/runs", {}, True, False),
        ("/chat/completions", {"background": True}, False, False),
    ],
)
def test_refusal(path, body, stream, is_refused):
    """A request that is answered before its cost is known is refused, and says so."""
    reason = refusal(DOORS[path], body, stream)

    assert is_refused == (reason is not None)
