"""Streams and bodies that the caller reads: every way in which that can end, and what the caller sees of our watching."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from typing import Any, NamedTuple

import openai
import pytest
from openai import AsyncStream, Stream
from openai.types.chat import ChatCompletionChunk

from metered_ai import connect, per_call, per_token
from metered_ai.ledger.memory import MemoryLedger
from tests.client.ledgers import Gated, wait_for_ends
from tests.client.shells import HELLO

CHAT: dict[str, Any] = {"model": "m", "messages": HELLO, "max_completion_tokens": 50}
RESPONSE: dict[str, Any] = {"model": "m", "input": "Hello", "max_output_tokens": 50}
PRICES = {"call": per_call(7), "token": per_token(input=1, output=10)}
GOOD = 10 + 9 * 10
SEEN = 4
"""The tokens that "The quick brown" is estimated as: what is seen of an answer that stops there."""


class Kind(NamedTuple):
    """A door that streams, and after how many events "The quick brown" was said."""

    resource: Any
    body: dict[str, Any]
    events: int


KINDS = {
    "chat": Kind(lambda client: client.chat.completions, CHAT, 4),
    "responses": Kind(lambda client: client.responses, RESPONSE, 7),
}


@pytest.fixture(scope="module", autouse=True)
def _light_collections():
    """What is here before these tests is left out of the many collections that they ask for."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ledger():
    """A real ledger that can be waited for; sound when the test is over."""
    ledger = Gated(MemoryLedger())
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


def events(ledger, customer="ada"):
    return list(ledger.usage_events(customer))


def start(shell, client, kind):
    return shell.run(KINDS[kind].resource(client).create(**KINDS[kind].body, stream=True))


def take(shell, stream, count):
    """So many items, each read by itself."""
    return [shell.take(stream) for _ in range(count)]


def drop(shell):
    """What nobody refers to any more is collected, and the loop finalizes its generators."""
    for _ in range(3):
        gc.collect()
        shell.pause()


# Ways of stopping early. `count` items come before the provider stalls.


def closes(shell, client, kind, count):
    stream = start(shell, client, kind)
    take(shell, stream, count)
    shell.close(stream)


def closes_response(shell, client, kind, count):
    stream = start(shell, client, kind)
    take(shell, stream, count)
    shell.run(stream.response.aclose() if shell.is_async else stream.response.close())


def leaves(shell, client, kind, count):
    with shell.within(start(shell, client, kind)) as stream:
        take(shell, stream, count)


def raises(shell, client, kind, count):
    def use():
        with shell.within(start(shell, client, kind)) as stream:
            take(shell, stream, count)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()


def breaks(shell, client, kind, count, then=None):
    stream = start(shell, client, kind)

    async def read():
        left = count
        async for _ in stream:
            left -= 1
            if not left:
                break

    if shell.is_async:
        shell.run(read())
    else:
        left = count
        for _ in stream:
            left -= 1
            if not left:
                break
    if then is not None:
        then(stream)


def breaks_and_closes(shell, client, kind, count):
    breaks(shell, client, kind, count, then=shell.close)


def breaks_and_drops(shell, client, kind, count):
    breaks(shell, client, kind, count)
    drop(shell)


def leaves_helper(shell, client, kind, count):
    # The helper of chat gives several events for one chunk; what it was sent is what counts.
    with shell.within(KINDS[kind].resource(client).stream(**KINDS[kind].body)) as stream:
        said = ""
        while "brown" not in said:
            event = shell.take(stream)
            said += getattr(event, "delta", "") if event.type in ("content.delta", "response.output_text.delta") else ""


def closes_raw(shell, client, kind, count):
    raw = shell.run(KINDS[kind].resource(client).with_raw_response.create(**KINDS[kind].body, stream=True))
    stream = raw.parse()
    take(shell, stream, count)
    shell.close(stream)


def leaves_opened(shell, client, kind, count):
    opened = KINDS[kind].resource(client).with_streaming_response.create(**KINDS[kind].body, stream=True)
    with shell.within(opened) as response:
        lines = response.iter_lines()
        seen = ""
        while "brown" not in seen:
            seen = shell.take(lines)


READ = {
    function.__name__.replace("_", " "): function
    for function in (
        closes,
        closes_response,
        leaves,
        raises,
        breaks_and_closes,
        breaks_and_drops,
        leaves_helper,
        closes_raw,
        leaves_opened,
    )
}


def never_reads_and_closes(shell, client, kind):
    shell.close(start(shell, client, kind))


def never_reads_and_drops(shell, client, kind):
    start(shell, client, kind)
    drop(shell)


def never_parses_and_drops(shell, client, kind):
    shell.run(KINDS[kind].resource(client).with_raw_response.create(**KINDS[kind].body, stream=True))
    drop(shell)


def never_reads_opened(shell, client, kind):
    opened = KINDS[kind].resource(client).with_streaming_response.create(**KINDS[kind].body, stream=True)
    with shell.within(opened):
        pass


def never_reads_helper(shell, client, kind):
    with shell.within(KINDS[kind].resource(client).stream(**KINDS[kind].body)):
        pass


UNREAD = {
    function.__name__.replace("_", " "): function
    for function in (
        never_reads_and_closes,
        never_reads_and_drops,
        never_parses_and_drops,
        never_reads_opened,
        never_reads_helper,
    )
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", READ | UNREAD)
def test_stops_early(stop, kind, shell, ledger, make_billing, provider):
    """A consumer who stops early pays what was seen, or what on_abort says; a fixed price is paid; each exactly once."""
    client = shell.client()
    count = KINDS[kind].events

    for price, pricing in PRICES.items():
        for on_abort in ("observed", "hold", "drain"):
            for others in ({}, {"on_failure": "observed", "on_unknown": "charge"}):
                customer = f"{price} {on_abort} {len(others)}"
                billing = make_billing(on_abort=on_abort, **others)
                billing.grant(customer, "generations", 10_000, id="start")
                ledger.forget()
                ledger.ends.clear()
                resume = threading.Event()
                provider.answer(stall_after=count, resume=resume)
                metered = client.copy(billing=billing, customer=customer, pricing=pricing)

                if stop in READ:
                    READ[stop](shell, metered, kind, count)
                else:
                    UNREAD[stop](shell, metered, kind)
                if on_abort != "drain":
                    billing.flush()
                    assert ["place", "settle"] == ledger.kinds
                resume.set()
                wait_for_ends(shell, ledger, 1)
                (event,) = events(ledger, customer)
                usage = event.usage
                amount = {
                    "call": 7,
                    "observed": usage and usage.input_tokens + 10 * (SEEN if stop in READ else 0),
                    "hold": ledger.steps[0].amount,
                    "drain": GOOD,
                }["call" if price == "call" else on_abort]
                if amount == GOOD and "drops" in stop:
                    # What was dropped is gone: nobody can read on.
                    amount = ledger.steps[0].amount
                if amount == GOOD and "opened" in stop and kind == "chat":
                    # What the caller reads raw was not asked for its usage: the whole answer is estimated.
                    amount = usage.input_tokens + 10 * 11

                assert (customer, ["place", "settle"], amount) == (customer, ledger.kinds, event.amount)
                assert (amount, 0) == (
                    billing.balance(customer, "generations").used,
                    billing.balance(customer, "generations").held,
                )
                if price == "token" and on_abort != "drain":
                    assert {"observed": "observed", "hold": "held"}[on_abort] == event.basis
                issued = provider.issued[-1]
                was_seen = stop in READ or event.basis in ("reported", "estimated")
                assert f"gen_{issued.id if was_seen else issued.request_id}" == event.transaction_id


EXIT = """
import asyncio, sys
from metered_ai import AsyncMeteredOpenAI, MeteredOpenAI, connect

ledger, base_url, kind = sys.argv[1:]
billing = connect(ledger)
billing.grant("ada", "generations", 5, id="start")
options = dict(billing=billing, customer="ada", base_url=base_url, api_key="k", max_retries=0)
ask = dict(model="m", messages=[{"role": "user", "content": "Hello"}], stream=True)
kept = []

def read():
    stream = MeteredOpenAI(**options).chat.completions.create(**ask)
    kept.extend((stream, next(stream)))

async def aread():
    stream = await AsyncMeteredOpenAI(**options).chat.completions.create(**ask)
    kept.extend((stream, await anext(stream)))
    if kind == "async, loop abandoned":
        kept.append(asyncio.get_running_loop())

if kind == "sync":
    read()
elif kind == "async":
    asyncio.run(aread())
else:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(aread())
print("held", billing.balance("ada", "generations").held + billing.balance("ada", "generations").used)
"""


@pytest.mark.parametrize("kind", ["sync", "async", "async, loop abandoned"])
def test_open_at_exit(kind, provider, tmp_path):
    """A stream that is still open when the program ends is settled then."""
    url = f"sqlite:///{tmp_path / 'credits.db'}"
    provider.answer(stall_after=3)
    done = subprocess.run(
        [sys.executable, "-c", EXIT, url, provider.base_url, kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    # Python 3.13.0 crashes where it finalizes the SDK's own generator at exit, with the bare SDK just the same.
    crashes = -signal.SIGSEGV if sys.version_info[:3] == (3, 13, 0) and kind == "sync" else 0
    assert done.returncode in {0, crashes}, done.stderr
    assert done.stdout == "held 1\n"
    # What asyncio says of the SDK's generators when their loop ends is the SDK's affair.
    assert kind != "sync" or done.stderr == ""
    with connect(url) as billing:
        assert [f"gen_{provider.issued[0].id}"] == [event.transaction_id for event in billing.usage_events("ada")]
        assert 0 == billing.balance("ada", "generations").held


# What the provider does in mid-stream.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("on_failure", ["release", "observed"])
@pytest.mark.parametrize("how", ["cut", "cut opened", "error event", "error event, then dropped", "timeout"])
def test_broken(how, on_failure, price, kind, shell, ledger, make_billing, provider):
    """A provider that breaks off in mid-answer goes the way of on_failure, also when on_abort says otherwise."""
    count = KINDS[kind].events
    billing = make_billing(on_failure=on_failure, on_abort="hold")
    billing.grant("ada", "generations", 10_000, id="more")
    client = shell.client(billing=billing, pricing=PRICES[price], timeout=0.1 if how == "timeout" else 10)
    provider.answer(
        **({"stall_after": count} if how == "timeout" else {f"{'error' if 'error' in how else 'cut'}_after": count})
    )

    try:
        if how == "cut opened":
            opened = KINDS[kind].resource(client).with_streaming_response.create(**KINDS[kind].body, stream=True)
            with shell.within(opened) as response:
                shell.run(response.read())
        else:
            shell.read(start(shell, client, kind))
    except Exception as error:
        assert not isinstance(error, AssertionError)
    else:
        assert (kind, how.startswith("error")) == ("responses", True)
    drop(shell)
    billing.flush()

    if on_failure == "release":
        assert ["place", "release"] == ledger.kinds
        assert [("stream_failed", "yes")] == [(hold.reason, hold.sent) for hold in ledger.holds("ada")]
    else:
        (event,) = events(ledger)
        assert ["place", "settle"] == ledger.kinds
        assert (7 if price == "call" else event.usage.input_tokens + 10 * SEEN) == event.amount
        assert f"gen_{provider.issued[0].id}" == event.transaction_id
    assert 0 == billing.balance("ada", "generations").held


def test_no_end(shell, ledger, provider, billing):
    """A chat that said why it finished is whole, although its terminal marker is missing."""
    provider.answer(done=False)

    shell.read(start(shell, shell.client(pricing=PRICES["token"]), "chat"))

    assert [("reported", GOOD)] == [(event.basis, event.amount) for event in events(ledger)]


def test_no_end_of_response(shell, ledger, provider, billing):
    """A response whose last event is missing was broken off."""
    provider.answer(done=False)

    shell.read(start(shell, shell.client(pricing=PRICES["token"]), "responses"))
    billing.flush()

    assert ["place", "release"] == ledger.kinds


USAGES = {
    "unasked, beside a choice": ({"usage": "unasked"}, {}, GOOD, "reported"),
    "on every chunk": ({"usage": "every"}, {}, GOOD, "reported"),
    "three times, once for each choice": ({"usage": "repeated"}, {"n": 3}, GOOD, "reported"),
    "one total for three choices": ({}, {"n": 3}, 10 + 270, "reported"),
    "never": ({"usage": "never"}, {}, None, "estimated"),
    "zero beside text": ({"usage": "zero"}, {}, None, "estimated"),
    "not as numbers": ({"usage": "malformed"}, {}, None, "estimated"),
}


@pytest.mark.parametrize("case", USAGES)
def test_usage(case, shell, ledger, provider, billing):
    """Of several usages the largest total counts; one that says nothing is no usage; nothing but the extra chunk is hidden."""
    answer, more, amount, basis = USAGES[case]
    bare = shell.bare()
    for _ in range(2):
        provider.answer(id="chatcmpl-1", created=1, **answer)
    expected = shell.read(shell.run(bare.chat.completions.create(**CHAT, **more, stream=True)))

    items = shell.read(
        shell.run(shell.client(pricing=PRICES["token"]).chat.completions.create(**CHAT, **more, stream=True))
    )
    (event,) = events(ledger)

    # Servers add `usage: null` to every chunk where usage was asked for.
    assert [item.model_dump(exclude_none=True) for item in expected] == [
        item.model_dump(exclude_none=True) for item in items
    ]
    assert basis == event.basis
    assert (event.usage.input_tokens + 10 * 11 if amount is None else amount) == event.amount


# What the caller reads himself.


def reads(shell, response):
    return shell.run(response.read())


def parses(shell, response):
    return shell.run(response.parse())


def parses_twice(shell, response):
    return shell.run(response.parse()), shell.run(response.parse())


def iterates(method, *arguments):
    return lambda shell, response: shell.read(getattr(response, method)(*arguments))


def iterates_raw(shell, response):
    inner = response.http_response
    return shell.read(inner.aiter_raw() if shell.is_async else inner.iter_raw())


def reads_twice(shell, response):
    return shell.run(response.read()), shell.run(response.read()), shell.run(response.text())


READERS = {
    "read": reads,
    "read twice": reads_twice,
    "parse": parses,
    "parse twice": parses_twice,
    "json": lambda shell, response: shell.run(response.json()),
    "text": lambda shell, response: shell.run(response.text()),
    "lines": iterates("iter_lines"),
    "bytes": iterates("iter_bytes"),
    "bytes in large pieces": iterates("iter_bytes", 4096),
    "bytes in small pieces": iterates("iter_bytes", 3),
    "text in pieces": iterates("iter_text", 7),
    "raw": iterates_raw,
}


@pytest.mark.parametrize("gzip", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("how", READERS)
def test_reader(how, gzip, shell, ledger, provider, billing):
    """However a body is read to its end, it is an answer that is settled, at once."""
    provider.answer(gzip=gzip)
    client = shell.client(pricing=PRICES["token"])

    with shell.within(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
        assert READERS[how](shell, response)
        (event,) = events(ledger)

    assert ["place", "settle"] == ledger.kinds
    if how == "raw" and gzip:
        # Compressed bytes tell nothing to somebody who does not unpack them.
        assert ("estimated", f"gen_{provider.issued[0].request_id}") == (event.basis, event.transaction_id)
    else:
        assert ("reported", GOOD, f"gen_{provider.issued[0].id}") == (event.basis, event.amount, event.transaction_id)


@pytest.mark.parametrize("gzip", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("how", [name for name in READERS if name not in ("parse", "parse twice", "json")])
def test_stream_reader(how, gzip, shell, ledger, provider, billing):
    """The same for an event stream that the caller reads as bytes or lines; nothing is added to it."""
    provider.answer(gzip=gzip)
    ask = {**RESPONSE, "stream": True}
    client = shell.client(pricing=PRICES["token"])

    with shell.within(client.responses.with_streaming_response.create(**ask)) as response:
        assert READERS[how](shell, response)
        (event,) = events(ledger)

    assert ["place", "settle"] == ledger.kinds
    if how == "raw" and gzip:
        assert ("estimated", f"gen_{provider.issued[0].request_id}") == (event.basis, event.transaction_id)
    else:
        assert ("reported", GOOD, f"gen_{provider.issued[0].id}") == (event.basis, event.amount, event.transaction_id)


def test_parsed_stream(shell, ledger, provider, billing):
    """A streaming response that is parsed gives the SDK's stream, and its end is settled."""
    client = shell.client(pricing=PRICES["token"])

    with shell.within(client.responses.with_streaming_response.create(**RESPONSE, stream=True)) as response:
        items = shell.read(shell.run(response.parse()))
        (event,) = events(ledger)

    assert ("response.completed", GOOD) == (items[-1].type, event.amount)


@pytest.mark.parametrize("price", PRICES)
def test_partly_read(price, shell, ledger, provider, billing):
    """A body that is read in part was given up early: it is settled by what was seen of it."""
    client = shell.client(pricing=PRICES[price])

    with shell.within(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
        shell.take(response.iter_bytes(20))
    billing.flush()
    (event,) = events(ledger)

    assert ["place", "settle"] == ledger.kinds
    assert (7 if price == "call" else event.usage.input_tokens + 10 * (event.usage.output_tokens or 0)) == event.amount


def test_unread_body(shell, ledger, provider, billing):
    """A body that nobody reads was made and paid for all the same."""
    client = shell.client(pricing=PRICES["token"])

    with shell.within(client.chat.completions.with_streaming_response.create(**CHAT)):
        pass
    billing.flush()
    (event,) = events(ledger)

    assert ("observed", f"gen_{provider.issued[0].request_id}") == (event.basis, event.transaction_id)


def test_sound(shell, ledger, provider, billing, tmp_path):
    """Sound that is written to a file is settled when its last byte is there."""
    client = shell.client()
    ask = {"model": "m", "voice": "alloy", "input": "Hello"}

    with shell.within(client.audio.speech.with_streaming_response.create(**ask)) as response:
        shell.run(response.stream_to_file(tmp_path / "a.mp3"))
        (event,) = events(ledger)

    assert (1, 4106) == (event.amount, (tmp_path / "a.mp3").stat().st_size)


# What we add, and what the caller sees of it.


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize(
    "asks", [None, {"include_usage": True}, {"include_usage": False}, {}, {"include_obfuscation": False}]
)
@pytest.mark.parametrize("door", ["chat", "completion"])
def test_include_usage(door, asks, price, shell, ledger, provider, billing):
    """Usage is asked for at token prices only, and its chunk shown only to a caller who asked for it."""
    more = {} if asks is None else {"stream_options": asks}
    client = shell.client(pricing=PRICES[price])
    create = (
        client.chat.completions.create(**CHAT, **more, stream=True)
        if door == "chat"
        else client.completions.create(model="m", prompt="Hello", max_tokens=50, **more, stream=True)
    )

    items = shell.read(shell.run(create))
    (event,) = events(ledger)

    is_asked = bool(asks and asks.get("include_usage"))
    sent = {**(asks or {}), "include_usage": True} if price == "token" and not is_asked else asks
    assert sent == provider.requests[0].body.get("stream_options")
    assert [is_asked] == [not items[-1].choices]
    assert (7 if price == "call" else GOOD) == event.amount


def test_body_is_not_changed(shell, ledger, provider, billing):
    """What the caller gave stays as it was; what he put into extra_body still wins."""
    options: dict[str, Any] = {"include_obfuscation": False}
    extra = {"stream_options": {"include_usage": False, "x": 1}}

    shell.read(
        shell.run(
            shell.client(pricing=PRICES["token"]).chat.completions.create(
                **CHAT, stream=True, stream_options=options, extra_body=extra
            )
        )
    )

    assert {"include_usage": True, "x": 1} == provider.requests[0].body["stream_options"]
    assert ({"include_obfuscation": False}, {"stream_options": {"include_usage": False, "x": 1}}) == (options, extra)


@pytest.mark.parametrize("door", ["chat", "responses"])
def test_nothing_added(door, shell, ledger, provider, billing):
    """Nothing is added to a stream that the caller reads raw, nor to doors that tell their usage anyway."""
    client = shell.client(pricing=PRICES["token"])
    if door == "chat":
        with shell.within(client.chat.completions.with_streaming_response.create(**CHAT, stream=True)) as response:
            shell.read(response.iter_lines())
    else:
        shell.read(start(shell, client, "responses"))

    assert not provider.requests[0].body.get("stream_options")


def test_types(shell, ledger, provider, billing):
    """A stream and its items are exactly the SDK's, also where a chunk is hidden."""
    stream = start(shell, shell.client(pricing=PRICES["token"]), "chat")
    items = shell.read(stream)

    assert (AsyncStream if shell.is_async else Stream) is type(stream)
    assert {ChatCompletionChunk} == {type(item) for item in items}
    assert 11 == len(items)


@pytest.mark.parametrize("price", PRICES)
def test_same_as_bare(price, shell, ledger, provider, billing):
    """A metered stream gives item for item what the SDK's own client gives."""
    provider.answer(id="chatcmpl-1", created=1, times=2)
    seen = [shell.read(start(shell, client, "chat")) for client in (shell.bare(), shell.client(pricing=PRICES[price]))]

    assert json.dumps([item.model_dump(exclude_none=True) for item in seen[0]]) == json.dumps(
        [item.model_dump(exclude_none=True) for item in seen[1]]
    )


# When it is written.


@pytest.mark.parametrize("price", PRICES)
def test_committed_at_the_end(price, shell, ledger, provider, billing):
    """The event is in the ledger before the consumer sees the last event of a response, or the end of a chat."""
    client = shell.client(pricing=PRICES[price])
    counts = []

    def seen(item):
        if item is None or item.type == "response.completed":
            counts.append(len(events(ledger)))

    async def aread(stream):
        async for item in stream:
            seen(item)

    for kind in KINDS:
        stream = start(shell, client, kind)
        if kind == "chat":
            shell.read(stream)
            seen(None)
        elif shell.is_async:
            shell.run(aread(stream))
        else:
            for item in stream:
                seen(item)

    assert [1, 2] == counts


def test_helper_committed(shell, ledger, provider, billing):
    """A helper's final answer is in the ledger when it is given."""
    with shell.within(shell.client().responses.stream(**RESPONSE)) as stream:
        shell.run(stream.get_final_response())

        assert 1 == len(events(ledger))


# Whoever reads.


def test_other_thread(shell, ledger, provider, billing):
    """A stream that is read in another thread is settled there, for the customer who started it."""
    stream = start(shell, shell.client(pricing=PRICES["token"]), "responses")
    thread = threading.Thread(target=shell.read, args=(stream,))
    thread.start()
    thread.join(10)

    assert [("ada", GOOD)] == [(event.customer, event.amount) for event in events(ledger)]


def test_two_readers(provider, ledger, billing, shell):
    """Two readers at once: the SDK refuses one of them, and the stream is settled once."""
    if shell.is_async:
        two_tasks(shell)
    else:
        two_threads(shell)
    drop(shell)
    billing.flush()

    assert {"place": 1, "settle": 1} == Counter(ledger.kinds)
    assert 0 == billing.balance("ada", "generations").held


def two_threads(shell):
    stream = start(shell, shell.client(pricing=PRICES["token"]), "chat")

    def read():
        try:
            list(stream)
        except ValueError as error:
            assert "already executing" in str(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


def two_tasks(shell):
    import asyncio

    stream = start(shell, shell.client(pricing=PRICES["token"]), "chat")

    async def read():
        return [item async for item in stream]

    async def both():
        return await asyncio.gather(read(), read(), return_exceptions=True)

    shell.run(both())


@pytest.mark.parametrize("on_abort", ["observed", "hold", "drain"])
def test_closed_by_other_thread(on_abort, provider, ledger, make_billing):
    """A response that another thread closes in mid-read was given up by us: the provider did not fail."""
    from metered_ai import MeteredOpenAI

    billing = make_billing(on_abort=on_abort)
    billing.grant("ada", "generations", 10_000, id="more")
    resume, is_read = threading.Event(), threading.Event()
    provider.answer(stall_after=4, resume=resume)
    with MeteredOpenAI(
        billing=billing, customer="ada", base_url=provider.base_url, api_key="k", pricing=PRICES["token"]
    ) as client:
        stream = client.chat.completions.create(**CHAT, stream=True)

        def read():
            try:
                for number, _ in enumerate(stream, 1):
                    if number == 4:
                        is_read.set()
            except Exception as error:
                errors.append(error)

        errors: list[Exception] = []
        thread = threading.Thread(target=read)
        thread.start()
        assert is_read.wait(10)
        stream.response.close()
        resume.set()
        thread.join(10)
        ledger.wait_for_ends(1)

    assert ["place", "settle"] == ledger.kinds
    assert [hold.state for hold in ledger.holds("ada")] == []
    assert all(
        isinstance(error, (openai.APIError, OSError, ValueError)) or "http" in type(error).__module__
        for error in errors
    )


@pytest.mark.parametrize("on_abort", ["observed", "hold"])
def test_closed_by_other_task(on_abort, provider, ledger, make_billing):
    """The same for another task that closes what a task is reading."""
    import asyncio

    from metered_ai import AsyncMeteredOpenAI

    billing = make_billing(on_abort=on_abort)
    billing.grant("ada", "generations", 10_000, id="more")
    provider.answer(stall_after=4)

    async def main():
        client = AsyncMeteredOpenAI(
            billing=billing, customer="ada", base_url=provider.base_url, api_key="k", pricing=PRICES["token"]
        )
        stream = await client.chat.completions.create(**CHAT, stream=True)
        for _ in range(4):
            await anext(stream)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.01)
        await stream.response.aclose()
        await asyncio.to_thread(ledger.wait_for_ends, 1)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await client.close()

    asyncio.run(main())
    (event,) = events(ledger)

    assert ["place", "settle"] == ledger.kinds
    assert {"observed": "observed", "hold": "held"}[on_abort] == event.basis
