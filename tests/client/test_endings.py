"""How calls end and what each end costs: every row of the design's table, through every kind of call, under every policy."""

from __future__ import annotations

import hashlib
import itertools
import threading
from typing import Any, NamedTuple

import openai
import pytest
from pydantic import BaseModel

from metered_ai import Receipt, UsageNotRecordedError, bill_to, per_call, per_token
from metered_ai.testing.provider import Answer
from tests.client.shells import HELLO

CHAT: dict[str, Any] = {"model": "m", "messages": HELLO, "max_completion_tokens": 50}
RESPONSE: dict[str, Any] = {"model": "m", "input": "Hello", "max_output_tokens": 50}
SPEECH: dict[str, Any] = {"model": "m", "voice": "alloy", "input": "Hello"}

PRICES = {"call": per_call(7), "token": per_token(input=1, output=10)}
GOOD = 10 + 9 * 10
"""What the provider's ordinary answer costs at the token price: 10 tokens read, 9 written."""

SEEN = 11
"""The tokens that its 44 characters are estimated as."""

NOBODY = "http://127.0.0.1:9/v1"

OTHERS: dict[str, Any] = {
    "on_unknown": "charge",
    "on_failure": "observed",
    "on_abort": "hold",
    "on_repeat": "free",
    "on_settle_failure": "raise",
}
"""The policies the other way round: those that have nothing to do with an ending must not change it."""


class Call(NamedTuple):
    """A way to call: `kind` tells who reads the body (the SDK at once; the caller; the caller as a stream)."""

    kind: str
    use: Any
    prices: tuple[str, ...] = ("call", "token")


def create(of, body, **more):
    return lambda shell, client: shell.run(of(client).create(**body, **more))


def parse(of, body):
    return lambda shell, client: shell.run(of(client).parse(**body))


def raw(of, body, *, is_parsed=True):
    def use(shell, client):
        response = shell.run(of(client).with_raw_response.create(**body))
        return response.parse() if is_parsed else response

    return use


def opened(of, body, read):
    def use(shell, client):
        with shell.within(of(client).with_streaming_response.create(**body)) as response:
            return read(shell, response)

    return use


def streamed(of, body):
    return lambda shell, client: shell.read(shell.run(of(client).create(**body, stream=True)))


def raw_streamed(of, body):
    return lambda shell, client: shell.read(shell.run(of(client).with_raw_response.create(**body, stream=True)).parse())


def helped(of, body):
    def use(shell, client):
        with shell.within(of(client).stream(**body)) as stream:
            return shell.read(stream)

    return use


def chat(client):
    return client.chat.completions


def responses(client):
    return client.responses


def speech(client):
    return client.audio.speech


CALLS = {
    "chat": Call("whole", create(chat, CHAT)),
    "chat parse": Call("whole", parse(chat, CHAT)),
    "chat raw": Call("whole", raw(chat, CHAT)),
    "chat raw, never parsed": Call("whole", raw(chat, CHAT, is_parsed=False)),
    "chat opened": Call("opened", opened(chat, CHAT, lambda shell, response: shell.run(response.read()))),
    "chat opened, parsed": Call("opened", opened(chat, CHAT, lambda shell, response: shell.run(response.parse()))),
    "chat stream": Call("stream", streamed(chat, CHAT)),
    "chat raw stream": Call("stream", raw_streamed(chat, CHAT)),
    "chat helper": Call("stream", helped(chat, CHAT)),
    "response": Call("whole", create(responses, RESPONSE)),
    "response parse": Call("whole", parse(responses, RESPONSE)),
    "response opened": Call("opened", opened(responses, RESPONSE, lambda shell, r: shell.read(r.iter_bytes(64)))),
    "response stream": Call("stream", streamed(responses, RESPONSE)),
    "response helper": Call("stream", helped(responses, RESPONSE)),
    "speech": Call("whole", create(speech, SPEECH), ("call",)),
    "speech opened": Call("opened", opened(speech, SPEECH, lambda shell, r: shell.read(r.iter_bytes(100))), ("call",)),
}

RELEASED = "provider_error", "yes"
UNKNOWN = "unknown", "unknown"
BROKEN = "stream_failed", "yes"


class Row(NamedTuple):
    """
    A row of the table: what the provider does, and the ending for each kind of call.

    An ending is the basis of a settle at a token price, or the reason and `sent` of a release.
    """

    answer: dict[str, Any]
    whole: Any
    opened: Any
    stream: Any


def every(answer: dict[str, Any], ending: Any) -> Row:
    return Row(answer, ending, ending, ending)


CUT_BODY = {"cut_bytes": 150}
ROWS = {
    "a good answer": every({}, "reported"),
    "a good answer, compressed": every({"gzip": True}, "reported"),
    "no usage": every({"usage": "never"}, "estimated"),
    "usage 0 beside text": every({"usage": "zero"}, "estimated"),
    "a malformed usage": every({"usage": "malformed"}, "estimated"),
    "a provider's error": every({"status": 500}, RELEASED),
    "a refused request": every({"status": 400}, RELEASED),
    "a page with status 200": every({"body": "<html><h1>Sign in</h1></html>"}, RELEASED),
    "an error with status 200": every({"body": {"error": {"message": "No", "type": "x", "code": "y"}}}, RELEASED),
    "broken JSON": every({"body": '{"id": "x", "choi'}, RELEASED),
    "an empty body": every({"body": b""}, RELEASED),
    "a reset connection": every({"reset": True}, UNKNOWN),
    "nobody there": every({}, ("not_sent", "no")),
    "the body cut off": Row(CUT_BODY, UNKNOWN, BROKEN, BROKEN),
    "an error event": Row({"error_after": 4}, "reported", "reported", BROKEN),
}
DECIDES = {UNKNOWN: ("on_unknown", ("release", "charge")), BROKEN: ("on_failure", ("release", "observed"))}


def policies_of(ending):
    """Each value of the policy that decides this ending, with the others as they are by default and the other way round."""
    name, values = DECIDES.get(ending, ("", ("",)))
    for value, others in itertools.product(values, ({}, OTHERS)):
        yield {key: given for key, given in {**others, name: value}.items() if key}


class Ended(NamedTuple):
    """What the ledger says when a call is over."""

    kinds: list[str]
    amount: int
    basis: str | None
    transaction_id: str | None
    reason: str | None
    sent: str | None
    used: int
    held: int


def ended(ledger, customer="ada"):
    events = list(ledger.usage_events(customer))
    holds = list(ledger.holds(customer))
    balance = ledger.balance(customer, "generations")
    event = events[0] if events else None
    hold = holds[0] if holds else None
    assert len(events) + len(holds) == 1
    return Ended(
        ledger.kinds,
        event.amount if event else 0,
        event.basis if event else None,
        event.transaction_id if event else None,
        hold.reason if hold else None,
        hold.sent if hold else None,
        balance.used,
        balance.held,
    )


def expected(ending, row, price, policies, call, ledger, provider, event):
    """The same, as the table says."""
    if ending == UNKNOWN and policies.get("on_unknown") == "charge":
        place = ledger.steps[0]
        return Ended(["place", "settle"], place.amount, "held", f"hold_{place.hold_id}", None, None, place.amount, 0)
    if ending == BROKEN and policies.get("on_failure") == "observed":
        ending = "observed"
    if not isinstance(ending, str):
        return Ended(["place", "release"], 0, None, None, *ending, 0, 0)

    issued = provider.issued[-1]
    transaction_id = f"gen_{issued.id or issued.request_id}"
    if price == "call":
        basis = "reported" if event.usage is not None else "held"
        return Ended(["place", "settle"], 7, basis, transaction_id, None, None, 7, 0)
    amount = GOOD if ending == "reported" else event.usage.input_tokens + 10 * event.usage.output_tokens
    return Ended(["place", "settle"], amount, ending, transaction_id, None, None, amount, 0)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("call", CALLS)
def test_table(row, call, shell, ledger, make_billing, provider):
    """An ending costs what the table says, however the call was made and whatever the policies that do not concern it."""
    answer, kind, ending = ROWS[row].answer, CALLS[call].kind, getattr(ROWS[row], CALLS[call].kind)
    if row == "the body cut off" and kind == "stream":
        answer = {"cut_after": 4}
    if kind == "opened" and call.startswith("speech") and ending == "estimated":
        answer = {}
    client = shell.client(base_url=NOBODY) if row == "nobody there" else shell.client()

    for number, (price, policies) in enumerate(itertools.product(CALLS[call].prices, policies_of(ending))):
        customer = f"{price} {number}"
        billing = make_billing(**policies)
        billing.grant(customer, "generations", 10_000, id="start")
        ledger.forget()
        provider.answer(**answer)
        try:
            CALLS[call].use(shell, client.copy(billing=billing, customer=customer, pricing=PRICES[price]))
        except UsageNotRecordedError:
            raise
        except Exception as error:
            assert not isinstance(error, AssertionError)
        billing.flush()
        event = next(ledger.usage_events(customer), None)

        assert expected(ending, row, price, policies, call, ledger, provider, event) == ended(ledger, customer)


@pytest.mark.parametrize("call", [name for name in CALLS if not name.startswith("speech")])
def test_estimate(call, shell, ledger, provider, billing):
    """A text without usage is charged as one token for four letters, of the request and of the answer."""
    provider.answer(usage="never")

    CALLS[call].use(shell, shell.client(pricing=PRICES["token"]))
    billing.flush()
    event = next(ledger.usage_events("ada"))

    assert (SEEN, "estimated") == (event.usage.output_tokens, event.basis)
    assert 0 < event.usage.input_tokens < 30


@pytest.mark.parametrize(
    "call", ["response", "response parse", "response opened", "response stream", "response helper"]
)
@pytest.mark.parametrize("price", PRICES)
def test_failed(call, price, shell, ledger, provider, billing):
    """An answer that calls itself failed is released, although it came with status 200."""
    provider.answer(finish="failed")

    CALLS[call].use(shell, shell.client(pricing=PRICES[price]))
    billing.flush()

    assert Ended(["place", "release"], 0, None, None, *RELEASED, 0, 0) == ended(ledger)


def test_estimate_above_hold(shell, ledger, provider, billing):
    """An estimate is never charged above the hold; a reported usage is, and the rest becomes debt."""
    estimate = shell.client(pricing=PRICES["token"]).with_billing(estimate=lambda request: 3)
    billing.grant("bob", "generations", 3, id="start")
    provider.answer(usage="never")
    shell.run(chat(estimate).create(**CHAT))

    assert ("estimated", 3) == (ended(ledger).basis, ended(ledger).amount)

    # The estimate alone would choose one credit a call: the nearest source of a price wins.
    dear = shell.client(customer="bob", pricing=PRICES["token"]).with_billing(
        pricing=PRICES["token"], estimate=lambda request: 3
    )
    shell.run(chat(dear).create(**CHAT))
    balance = billing.balance("bob", "generations")

    assert (GOOD, GOOD - 3) == (balance.used, balance.debt)


def test_failing_price(shell, ledger, provider, billing):
    """A price function that fails after the answer charges the hold: the answer was given."""
    asked = []

    def price(usage):
        asked.append(usage)
        if len(asked) > 1:
            raise RuntimeError("no price")
        return 9

    shell.run(chat(shell.client(pricing=price)).create(**CHAT))

    assert (["place", "settle"], 9, "held") == ended(ledger)[:3]


# What is raised after a good answer.


class Fox(BaseModel):
    color: str


def fails_in_stream(shell, client):
    stream = shell.run(client.responses.create(**RESPONSE, stream=True))
    with shell.within(stream):
        shell.read(stream)
        raise ZeroDivisionError


RAISES = {
    "the answer was too long": (
        {"finish": "length"},
        openai.LengthFinishReasonError,
        lambda shell, client: shell.run(chat(client).parse(**CHAT, response_format=Fox)),
    ),
    "the answer was filtered": (
        {"finish": "content_filter"},
        openai.ContentFilterFinishReasonError,
        lambda shell, client: shell.run(chat(client).parse(**CHAT, response_format=Fox)),
    ),
    "the text is not the caller's model": (
        {},
        ValueError,
        lambda shell, client: shell.run(chat(client).parse(**CHAT, response_format=Fox)),
    ),
    "strict validation": (
        {"extra": {"created": "yesterday"}},
        openai.APIResponseValidationError,
        lambda shell, client: shell.run(chat(client).create(**CHAT)),
    ),
    "the caller's cast": (
        {},
        Exception,
        lambda shell, client: shell.run(client.post("/chat/completions", body=CHAT, cast_to=int)),
    ),
    "the caller's code in a stream": ({}, ZeroDivisionError, fails_in_stream),
}


@pytest.mark.parametrize("case", RAISES)
@pytest.mark.parametrize("price", PRICES)
def test_raised_after_answer(case, price, shell, ledger, provider, billing):
    """Whatever is raised after a good answer, the answer was given: it is settled, once."""
    answer, error, use = RAISES[case]
    provider.answer(**answer)
    client = shell.client(pricing=PRICES[price], _strict_response_validation=True)

    with pytest.raises(error):
        use(shell, client)
    billing.flush()

    assert (["place", "settle"], {"call": 7, "token": GOOD}[price]) == ended(ledger)[:2]
    assert f"gen_{provider.issued[0].id}" == ended(ledger).transaction_id


# Retries.

HURRY = {"retry-after-ms": "1"}


@pytest.mark.parametrize("call", ["chat", "chat opened", "chat stream", "response helper"])
def test_retries(call, shell, ledger, provider, billing):
    """Two failures that the SDK repeats are one hold and one event, which tells how often it tried."""
    provider.answer(status=500, headers=HURRY, times=2)

    CALLS[call].use(shell, shell.client(max_retries=2))
    billing.flush()
    (event,) = ledger.usage_events("ada")

    assert (["place", "settle"], 3, 3) == (ledger.kinds, event.attempts, len(provider.requests))


WORST = {
    "refused three times": ([{"status": 500}] * 3, RELEASED),
    "reset, then refused": ([{"reset": True}, {"status": 400}], UNKNOWN),
    "refused, then reset": ([{"status": 500}, {"reset": True}, {"reset": True}], UNKNOWN),
    "cut in the body, then refused": ([{"cut_bytes": 30}, {"status": 400}], UNKNOWN),
}


@pytest.mark.parametrize("case", WORST)
def test_worst_attempt(case, shell, ledger, provider, billing):
    """The worst attempt decides: a refusal after a lost attempt does not tell what the lost one cost."""
    answers, ending = WORST[case]
    for answer in answers:
        provider.answer(headers=HURRY, **answer)

    with pytest.raises(openai.APIError):
        shell.run(chat(shell.client(max_retries=2, timeout=5)).create(**CHAT))

    assert (["place", "release"], *ending) == (ended(ledger).kinds, ended(ledger).reason, ended(ledger).sent)


@pytest.mark.parametrize("on_unknown", ["release", "charge"])
def test_time_out(on_unknown, shell, ledger, provider, make_billing):
    """A time-out tells nothing: it goes the way of on_unknown, and is counted in doubt where it is released."""
    billing = make_billing(on_unknown=on_unknown)
    billing.grant("ada", "generations", 100, id="more")
    provider.answer(gate=threading.Event())

    with pytest.raises(openai.APITimeoutError):
        shell.run(chat(shell.client(billing=billing, timeout=0.05)).create(**CHAT))

    assert (on_unknown == "charge") == (ended(ledger).amount == 1)
    assert [on_unknown == "release"] == [hold.is_in_doubt for hold in billing.holds("ada")] or on_unknown == "charge"


def test_time_out_then_refusal(shell, ledger, provider, billing):
    """A time-out that a refusal follows is still unknown."""
    provider.answer(gate=threading.Event())
    provider.answer(status=400)

    with pytest.raises(openai.BadRequestError):
        shell.run(chat(shell.client(max_retries=1, timeout=0.05)).create(**CHAT))

    assert UNKNOWN == (ended(ledger).reason, ended(ledger).sent)


# Nothing sent.


def test_key_raises(shell, ledger, provider, billing):
    """A key that cannot be had, before anything goes out, releases the hold as not sent."""

    def no_key():
        raise openai.OpenAIError("no key today")

    async def async_no_key():
        no_key()

    with pytest.raises(openai.OpenAIError):
        shell.run(chat(shell.client(api_key=async_no_key if shell.is_async else no_key)).create(**CHAT))

    assert Ended(["place", "release"], 0, None, None, "not_sent", "no", 0, 0) == ended(ledger)
    assert [] == provider.requests


def test_key_costs(shell, ledger, provider, billing):
    """A key callable that calls a metered client itself is a call of its own: both are billed, neither as the other."""
    billing.grant("bob", "generations", 10, id="start")
    inner = shell.client(customer="bob")

    def key():
        return inner.responses.create(**RESPONSE).id

    async def async_key():
        return (await inner.responses.create(**RESPONSE)).id

    shell.run(chat(shell.client(api_key=async_key if shell.is_async else key)).create(**CHAT))

    assert ["place", "place", "settle", "settle"] == ledger.kinds
    assert ["/responses", "/chat/completions"] == [issued.path for issued in provider.issued]
    for customer, issued in zip(("bob", "ada"), provider.issued, strict=True):
        assert [f"gen_{issued.id}"] == [event.transaction_id for event in ledger.usage_events(customer)]


# Transaction ids.

LONG = "x" * 3000


def hashed(text):
    return f"gen_{hashlib.sha256(text.encode()).hexdigest()}"


IDS = {
    "ordinary": ("chatcmpl-1", "gen_chatcmpl-1"),
    "no ASCII": ("résumé", hashed("résumé")),
    "with line ends": ("a\nb", hashed("a\nb")),
    "with markup": ("<script>alert(1)</script>", "gen_<script>alert(1)</script>"),
    "long": (LONG, hashed(LONG)),
}


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("call", ["chat", "chat stream", "chat opened"])
def test_wild_id(case, call, shell, ledger, provider, billing):
    """An id that no key can be is hashed: always the same, never a stranger's."""
    given, expected_id = IDS[case]
    provider.answer(id=given)

    CALLS[call].use(shell, shell.client())
    billing.flush()

    assert expected_id == ended(ledger).transaction_id


@pytest.mark.parametrize("given", ["", " ", {"a": 1}, [], 3.5, True, "y" * 5000], ids=lambda given: repr(given)[:8])
@pytest.mark.parametrize("call", ["chat", "chat stream"])
def test_no_id(given, call, shell, ledger, provider, billing):
    """An answer without a usable id is named by the provider's request id, and without that by its hold."""
    provider.answer(extra={"id": given})
    provider.answer(extra={"id": given}, headers={"x-request-id": None})
    client = shell.client()

    CALLS[call].use(shell, client)
    CALLS[call].use(shell, client)
    billing.flush()
    places = [step for step, kind in zip(ledger.steps, ledger.kinds, strict=True) if kind == "place"]

    assert {f"gen_{provider.issued[0].request_id}", f"hold_{places[1].hold_id}"} == {
        event.transaction_id for event in ledger.usage_events("ada")
    }


def test_embedding_id(shell, ledger, provider, billing):
    """Answers whose kind has no id are named by the provider's request id."""
    shell.run(shell.client().embeddings.create(model="m", input="Hello"))

    assert f"gen_{provider.issued[0].request_id}" == ended(ledger).transaction_id


@pytest.mark.parametrize("call", ["chat", "chat stream", "chat opened", "response", "response stream"])
def test_replay(call, shell, ledger, provider, billing):
    """The same answer again, out of somebody's cache, is billed once; its own hold is given back."""
    provider.answer(id="same", created=1_700_000_000, times=2)
    client = shell.client(pricing=PRICES["token"])

    with bill_to("ada") as bill:
        CALLS[call].use(shell, client)
        CALLS[call].use(shell, client)
    billing.flush()

    assert ["gen_same"] == [event.transaction_id for event in ledger.usage_events("ada")]
    assert (GOOD, 0) == (billing.balance("ada", "generations").used, billing.balance("ada", "generations").held)
    assert GOOD == bill.amount


@pytest.mark.parametrize("call", ["chat", "chat stream", "response"])
def test_weak_id(call, shell, ledger, provider, billing):
    """One id for different answers, as weak servers send it: two events, the second with a suffix."""
    provider.answer(id="chatcmpl-424", created=1_700_000_000)
    provider.answer(id="chatcmpl-424", created=1_700_000_001)
    client = shell.client()

    CALLS[call].use(shell, client)
    CALLS[call].use(shell, client)
    billing.flush()
    first, second = ledger.usage_events("ada")

    assert ("gen_chatcmpl-424", True) == (
        first.transaction_id,
        second.transaction_id.startswith("gen_chatcmpl-424."),
    )
    assert 2 == billing.balance("ada", "generations").used


# Repeats.


def test_repeat_free(shell, ledger, provider, make_billing):
    """A repeat with on_repeat="free" is answered again and its hold released."""
    billing = make_billing(on_repeat="free")
    billing.grant("ada", "generations", 100, id="more")
    client = shell.client(billing=billing)

    for _ in range(2):
        shell.run(chat(client.with_billing(transaction_id="job")).create(**CHAT))
    (event,) = ledger.usage_events("ada")

    assert ("job", 1, 2) == (
        event.transaction_id,
        billing.balance("ada", "generations").used,
        len(provider.issued),
    )
    assert ["repeat"] == [hold.reason for hold in billing.holds("ada")]
    assert 0 == billing.balance("ada", "generations").held


# What a receipt says.


def test_receipt(shell, ledger, provider, billing):
    """The receipt of a block has what was billed in it, and nothing of what was released."""
    provider.answer(Answer(status=500))
    client = shell.client(customer=None)

    with bill_to("ada") as bill:
        with pytest.raises(openai.InternalServerError):
            shell.run(chat(client).create(**CHAT))
        shell.run(chat(client).create(**CHAT))

    assert isinstance(bill, Receipt)
    assert [f"gen_{provider.issued[0].id}"] == [event.transaction_id for event in bill.events]
