"""Recorded exchanges with real servers, replayed through the metered clients: the ledger agrees with what the server reported."""

from __future__ import annotations

import json
from types import SimpleNamespace

import openai
import pytest
import yaml
from vcr.errors import CannotOverwriteExistingCassetteException

from cassettes.record import FOLDER, MODELS, make, recorder, script
from metered_ai import connect, per_call, per_token
from tests.client.shells import Shell

TOKENS = per_token(input=1, output=2)

# Nobody listens there: whatever is not in a cassette fails.
NOWHERE = SimpleNamespace(base_url="http://127.0.0.1:9/v1")

PATHS = sorted(path for path in FOLDER.glob("*/*.yaml") if path.parent.name in MODELS)


def title(path):
    return f"{path.parent.name}-{path.stem}"


def calls(path):
    return script(MODELS[path.parent.name])[path.stem]


def documents(text):
    """The JSON of a body, or of each event of a stream."""
    if not text.startswith(("data:", "event:", ":")):
        return [json.loads(text)]
    lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def reported(path):
    """What the server reported for each answer, read without the library: (id, input tokens, output tokens)."""
    found = []
    for exchange in yaml.safe_load(path.read_text())["interactions"]:
        if exchange["response"]["status"]["code"] != 200:
            continue
        answers = [each.get("response", each) for each in documents(exchange["response"]["body"]["string"])]
        answer_id = next((answer["id"] for answer in answers if "id" in answer), None)
        usage = next((answer["usage"] for answer in reversed(answers) if answer.get("usage")), None)
        if usage is None:
            found.append((answer_id, None, None))
            continue
        read = usage.get("prompt_tokens", usage.get("input_tokens"))
        # Embeddings write nothing, and do not say so.
        found.append((answer_id, read, usage.get("completion_tokens", usage.get("output_tokens", 0))))
    return sorted(found, key=str)


def told(billing):
    """The same, as the ledger has it."""
    found = []
    for event in billing.usage_events():
        answer_id = event.transaction_id.removeprefix("gen_") if event.transaction_id.startswith("gen_") else None
        usage = event.usage
        found.append((answer_id, usage and usage.input_tokens, usage and usage.output_tokens))
    return sorted(found, key=str)


@pytest.fixture
def billing():
    """A ledger in memory in which "ada" has credits; sound when the test is over, with nothing held."""
    with connect("memory://") as billing:
        billing.grant("ada", "generations", 1_000_000, id="start")
        yield billing

        assert () == billing.verify().broken
        assert [] == list(billing.holds(state="open"))


@pytest.fixture(params=["sync", "async"])
def shell(request, billing):
    shell = Shell(NOWHERE, billing, is_async=request.param == "async")
    yield shell
    shell.finish()


def replay(shell, path, calls, pricing=TOKENS):
    """Make these calls against a cassette and nothing else. How often it was played."""
    client = shell.client(pricing=pricing)
    with recorder("none").use_cassette(str(path)) as cassette:
        for call in calls:
            if call.fails:
                with pytest.raises(openai.APIStatusError) as refused:
                    shell.run(make(client, call))
                assert call.fails == refused.value.status_code
                continue
            answer = shell.run(make(client, call))
            if call.body.get("stream"):
                shell.read(answer)
    return cassette.play_count


def without(body, name):
    return {key: value for key, value in body.items() if key != name}


def price(path):
    # At a token price usage would be asked for, which is another request than the one that was recorded.
    return per_call(1) if path.stem == "chat_stream_without_usage" else TOKENS


@pytest.mark.parametrize("path", PATHS, ids=title)
def test_replay(shell, billing, path):
    """Every answer is one usage event with the tokens that the server reported; what it refused is none."""
    played = replay(shell, path, calls(path), price(path))

    assert len(calls(path)) == played
    assert reported(path) == told(billing)
    assert sum(call.fails is not None for call in calls(path)) == sum(1 for _ in billing.holds())


@pytest.mark.parametrize("path", PATHS, ids=title)
def test_price(shell, billing, path):
    """What is charged is the price of what was reported."""
    replay(shell, path, calls(path), price(path))

    charged = sum((read or 0) + 2 * (wrote or 0) for _, read, wrote in reported(path))
    expected = 1 if price(path) is not TOKENS else charged
    assert expected == billing.balance("ada", "generations").used


@pytest.mark.parametrize(
    "path", [path for path in PATHS if any(answer_id for answer_id, *_ in reported(path))], ids=title
)
def test_twice(shell, billing, path):
    """An answer that a cache gives again, with the same id, is billed once: the second call's own hold goes back."""
    replay(shell, path, calls(path), price(path))
    once = list(billing.usage_events())
    replay(shell, path, calls(path), price(path))

    assert once == list(billing.usage_events())
    assert len(once) == sum(hold.reason == "repeat" for hold in billing.holds(state="released"))


def test_twice_without_id(shell, billing):
    """Answers that nothing names cannot be told to be the same: each is billed."""
    path = FOLDER / "llama" / "embeddings.yaml"
    replay(shell, path, calls(path))
    replay(shell, path, calls(path))

    assert 2 * reported(path) == told(billing)
    assert 2 == len({event.transaction_id for event in billing.usage_events()})


def test_usage_is_asked_for(shell, billing):
    """A stream whose caller asks for no usage is, on the wire, the recorded one that asked, and is billed by it."""
    path = FOLDER / "llama" / "chat_stream.yaml"
    played = replay(shell, path, [call._replace(body=without(call.body, "stream_options")) for call in calls(path)])

    assert 2 == played
    assert reported(path) == told(billing)


def test_without_usage(shell, billing):
    """A stream that reports nothing, read raw at a token price, is charged by an estimate that says so."""
    path = FOLDER / "llama" / "chat_stream_without_usage.yaml"
    client = shell.client(pricing=TOKENS)
    with recorder("none").use_cassette(str(path)):
        asked = client.chat.completions.with_streaming_response.create(**calls(path)[0].body)
        with shell.within(asked) as response:
            shell.read(response.iter_bytes())
    [event] = billing.usage_events()

    assert ("estimated", f"gen_{reported(path)[0][0]}") == (event.basis, event.transaction_id)
    assert 0 < event.usage.input_tokens
    assert 0 < event.usage.output_tokens


def test_unrecorded(shell, billing):
    """A request that was never recorded is refused by the replay, never sent, and bills nothing."""
    path = FOLDER / "llama" / "chat.yaml"
    call = calls(path)[0]
    # Releases of the SDK differ in what they wrap.
    with pytest.raises((openai.APIConnectionError, CannotOverwriteExistingCassetteException)):
        replay(shell, path, [call._replace(body={**call.body, "max_tokens": 17})])

    assert [] == list(billing.usage_events())


@pytest.mark.parametrize("server", sorted({path.parent.name for path in PATHS}))
def test_all_recorded(server):
    """The folder holds what the script says, and nothing else."""
    assert set(script(MODELS[server])) == {path.stem for path in (FOLDER / server).glob("*")}
