"""Streams from a real server: read to their end they are billed by its own count; left early, by what was seen or by policy."""

from __future__ import annotations

import pytest

from metered_ai import per_token
from tests.integration.truth import HI, all_ended, counted, idle, tokens

TOKENS = per_token(input=1, output=2)

CHAT = {"model": "any", "messages": HI, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
DOORS = {
    "chat": lambda client: client.chat.completions.create(**CHAT),
    "chat, usage asked": lambda client: client.chat.completions.create(**CHAT, **USAGE),
    "completions": lambda client: client.completions.create(model="any", prompt="water", max_tokens=20, stream=True),
    "responses": lambda client: client.responses.create(model="any", input="Hi", stream=True),
}


@pytest.mark.parametrize("door", DOORS)
def test_to_the_end(shell, llama, billing, door):
    """A stream read to its end is one event with the server's own tokens, whether or not the caller asked for usage."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count:
        shell.read(shell.run(DOORS[door](client)))
    [event] = billing.usage_events()

    assert count == tokens(billing)
    assert ("reported", count[0] + 2 * count[1]) == (event.basis, event.amount)


@pytest.mark.parametrize("door", ["chat", "chat, usage asked"])
def test_same_chunks(shell, llama, billing, door):
    """The chunk with the usage is shown to whoever asked for it and to nobody else, as the bare client shows it."""
    seen = []
    for client in (shell.bare(), shell.client(pricing=TOKENS)):
        chunks = shell.read(shell.run(DOORS[door](client)))
        seen.append((sum(not chunk.choices for chunk in chunks), sum(chunk.usage is not None for chunk in chunks)))

    assert [seen[0]] * 2 == seen
    assert (int(door != "chat"),) * 2 == seen[0]


def test_call_price(shell, billing):
    """At a price per call nothing is asked of the server, and a stream is one credit."""
    chunks = shell.read(shell.run(DOORS["chat"](shell.client())))
    [event] = billing.usage_events()

    assert {f"gen_{chunk.id}" for chunk in chunks} == {event.transaction_id}
    assert (1, None) == (event.amount, event.usage)


def test_helper(shell, llama, billing):
    """The SDK's stream helper builds its completion from chunks, and the call is billed by the server's count."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count, shell.within(client.chat.completions.stream(model="any", messages=HI)) as stream:
        events = shell.read(stream)
        final = shell.run(stream.get_final_completion())

    assert events
    assert [f"gen_{final.id}"] == [event.transaction_id for event in billing.usage_events()]
    assert count == tokens(billing)


def test_raw_response(shell, llama, billing):
    """A stream that is parsed out of a raw response is billed when it has been read."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count:
        raw = shell.run(client.chat.completions.with_raw_response.create(**CHAT))
        before = list(billing.usage_events())
        shell.read(raw.parse())

    assert [] == before
    assert count == tokens(billing)


@pytest.mark.parametrize("how", ["parse", "iter_lines", "iter_bytes"])
def test_streaming_response(shell, llama, billing, how):
    """What the caller reads raw is billed by the usage that the caller asked for."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count:
        asked = client.chat.completions.with_streaming_response.create(**CHAT, **USAGE)
        with shell.within(asked) as response:
            shell.read(shell.run(response.parse()) if how == "parse" else getattr(response, how)())

    assert count == tokens(billing)
    assert ["reported"] == [event.basis for event in billing.usage_events()]


def test_streaming_response_without_usage(shell, llama, billing):
    """Nothing is added to what the caller reads raw, so without usage an estimate is charged, and says so."""
    client = shell.client(pricing=TOKENS)
    asked = client.chat.completions.with_streaming_response.create(**CHAT)
    with counted(llama) as count, shell.within(asked) as response:
        lines = shell.read(response.iter_lines())
    [event] = billing.usage_events()

    assert not any('"usage"' in line for line in lines)
    assert "estimated" == event.basis
    # One token for four characters, where this model's are words: near, and never free.
    assert count[1] / 3 <= event.usage.output_tokens <= 3 * count[1]


def test_several_choices(shell, llama, billing):
    """With n=3 this server tells a usage for each choice. One of them is believed: they are never added up, and never lost."""
    client = shell.client(pricing=TOKENS)
    with counted(llama) as count:
        chunks = shell.read(shell.run(client.chat.completions.create(**CHAT, **USAGE, n=3, max_tokens=200)))

    usages = [[chunk.usage.prompt_tokens, chunk.usage.completion_tokens] for chunk in chunks if chunk.usage]
    assert 1 < len(usages)
    assert max(usages, key=sum) == tokens(billing)
    assert max(usages)[1] < count[1]


@pytest.fixture(params=["close", "with"])
def leave(request, make_shell, endless, make_billing):
    """Take five chunks of a stream and leave it; then what the server counted in all, and the one usage event."""

    def leave(limit, **policies):
        billing = make_billing(**policies)
        shell = make_shell(endless, billing)
        client = shell.client(pricing=TOKENS)
        with counted(endless) as count:
            stream = shell.run(client.chat.completions.create(**CHAT, max_tokens=limit))
            if request.param == "with":
                with shell.within(stream):
                    taken = [shell.take(stream) for _ in range(5)]
            else:
                taken = [shell.take(stream) for _ in range(5)]
                shell.run(stream.close())
            all_ended(shell, billing)
        [event] = billing.usage_events()
        assert {f"gen_{chunk.id}" for chunk in taken} == {event.transaction_id}
        assert event.amount == billing.balance("ada", "generations").used
        return count, event

    return leave


def test_left_early(leave):
    """A stream that is left early costs what was seen of it. The server worked on for a while: what is seen is what can be known."""
    count, event = leave(2000)
    print(f"left after 5 chunks: charged for {event.usage.output_tokens} tokens, the server had worked for {count[1]}")

    assert "observed" == event.basis
    assert 4 <= count[1] < 2000
    assert 0 < event.usage.output_tokens <= 2 * count[1]


def test_left_early_drained(leave):
    """With on_abort="drain" it is read on in the background, and costs exactly what the server counted."""
    count, event = leave(300, on_abort="drain")

    assert 300 == count[1]
    assert ("reported", count) == (event.basis, [event.usage.input_tokens, event.usage.output_tokens])


def test_left_early_held(leave):
    """With on_abort="hold" it costs the hold, which covers whatever the server did."""
    count, event = leave(2000, on_abort="hold")

    assert "held" == event.basis
    assert count[0] + 2 * 2000 <= event.amount


def test_left_early_at_a_call_price(make_shell, endless, billing):
    """At a price per call an early end costs the call."""
    shell = make_shell(endless, billing)
    stream = shell.run(shell.client().chat.completions.create(**CHAT, max_tokens=2000))
    shell.take(stream)
    shell.run(stream.close())
    idle(endless)

    assert [1] == [event.amount for event in billing.usage_events()]
