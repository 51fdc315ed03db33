"""The cassettes are public: no key, cookie, account, machine or private word is in any of them."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from cassettes.record import FOLDER

FILES = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".yaml", ".yml", ".json"))

# The places are what must not be found in a recording; nothing is looked for at them.
SECRET = re.compile(
    r"\bsk-\w|\bbearer\b|authorization|api-?key\s*:|cookie|openai-organization|openai-project|cf-ray|x-stainless|user-agent"
    r"|/tmp/|/home/|/root/|/Users/|[A-Za-z]:\\\\Users",
    re.IGNORECASE,
)
"""Names of headers that must not be there, beginnings of keys, and places on somebody's disk."""

TOKEN = re.compile(r"[A-Za-z0-9_\-+/=.~]{32,}")
"""Whatever is long and unbroken."""

IDS = re.compile(
    r"\b(?:chatcmpl|resp|msg|rs|fc|call|req)[-_][A-Za-z0-9]{16,64}\b"
    r"|\b(?:usage_event|usage_meter|pricing_model|billing_period|product_feature|sub_feature|chckt_session)_[A-Za-z0-9]{21}\b"
    # A field of Flowglad's.
    r"|\bautomaticallyUpdateSubscriptions\b"
    # Its address, and whom and what is asked for there.
    r"|/api/v1/[a-z-]+(?:/cassette_[a-z]+(?:/[a-z-]+)?|/bulk)?(?=$|\s)",
    re.MULTILINE,
)
"""The ids of answers and requests, which are long and no secret: the ledger is compared with them. And paths."""

SPOKEN = [path for path in FILES if path.parent.name != "flowglad"]
"""Those in which something is said to a model."""

SAID = {
    *(
        "cassette_ada",
        "cassette_nobody",
        "Ada",
        "ada@example.com",
        "product",
        "pro",
        "nope",
        "sub_nope",
        "key",
        "hello",
    ),
    *("generations", "generations_no_charge", "https://example.com/ok", "https://example.com/no"),
}
"""All that is said to Flowglad, but for the ids of subscriptions and the ends of them."""

WORDS = {"Say hello.", "Say goodbye.", "hello"}
"""All that a request may say."""


def strings(value):
    """Every text in a document, put together again where YAML has broken its lines."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from strings(name)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    else:
        yield str(value)


def secrets(text):
    """What in a file looks like a secret."""
    whole = "\n".join([text, *strings(yaml.safe_load(text))])
    return sorted({*SECRET.findall(whole), *TOKEN.findall(IDS.sub("", whole))})


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_secrets(path):
    """Nothing in a cassette looks like a secret."""
    assert [] == secrets(path.read_text())


@pytest.mark.parametrize("path", sorted({*FILES} - {*SPOKEN}), ids=lambda path: path.stem)
def test_harmless_data(path):
    """Flowglad is told of made-up customers only, and the headers say nothing but how it is written."""

    def values(data):
        if isinstance(data, dict | list):
            return [each for value in (data.values() if isinstance(data, dict) else data) for each in values(value)]
        return [data] if isinstance(data, str) else []

    for exchange in yaml.safe_load(path.read_text())["interactions"]:
        body = exchange["request"]["body"]
        said = values(json.loads(body)) if body else []

        assert [] == [
            each for each in said if each not in SAID and not re.fullmatch(r"(sub|[a-z]+)_[A-Za-z0-9]{8,21}", each)
        ]
        assert {"accept", "content-type"} >= set(exchange["request"]["headers"])


@pytest.mark.parametrize("path", SPOKEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_harmless_words(path):
    """A request says nothing but the fixed words, and its headers nothing but how it is written."""
    for exchange in yaml.safe_load(path.read_text())["interactions"]:
        body = json.loads(exchange["request"]["body"])
        said = body.get("messages", body.get("input"))
        parts = said if isinstance(said, list) else [said]

        assert {part["content"] if isinstance(part, dict) else part for part in parts} - {3} <= WORDS
        assert {"accept", "content-type"} >= set(exchange["request"]["headers"])


@pytest.mark.parametrize(
    "planted",
    [
        "Authorization: [Bearer x]",
        "note: sk-proj-abc",
        "Set-Cookie: [a=b]",
        "api-key: [x]",
        "key: " + "a1B2" * 8,
        'key: "' + "a1B2" * 4 + "\\\n  " + "a1B2" * 4 + '"',
        "path: /tmp/model.gguf",
        "key: chatcmpl-" + "a" * 80,
        "key: usage_event_" + "a" * 40,
        "uri: /api/v1/customers/" + "a" * 40,
    ],
)
def test_search_finds(planted):
    """The search is not blind: each of these would be found."""
    assert secrets(planted)


def test_all_searched():
    """Every file that was recorded is searched."""
    assert {path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts} == {
        *FILES,
        FOLDER / "README.md",
        FOLDER / "record.py",
    }
