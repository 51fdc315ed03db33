"""One call, decided: what it needs before it is sent, and what each ending costs under each policy."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai import ConfigurationError, CustomerRequiredError, PriceUnknownError, Usage, per_call, per_token
from metered_ai.core.call import Policies, ending, place_step, plan, transaction_id, wants_drain
from metered_ai.core.endpoints import DOORS, find
from metered_ai.core.observe import Observation
from metered_ai.core.payer import Payer, resolve, terms
from metered_ai.core.steps import Place, Release, Settle
from metered_ai.records import Request

CHAT = DOORS["/chat/completions"]

# Ten credits for a token of output: at most 6 tokens are asked for, so 60 credits are held.
TOKENS = per_token(input=0, output=10)
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 6}
THREE = per_call(3)


def planned(door=CHAT, body=BODY, *, stream=False, policies=None, reads_raw=False, **given):
    payer = resolve([terms(**{"customer": "ada", **given})])
    return planned_for(payer, door, body, stream=stream, policies=policies, reads_raw=reads_raw)


def planned_for(payer, door=CHAT, body=BODY, *, stream=False, policies=None, reads_raw=False):
    request = Request(door.name, "m", body, stream)
    return plan(door, request, payer, policies or Policies(), default_meter="generations", reads_raw=reads_raw)


def seen(text="", usage=None, **facts):
    """What was observed of an answer."""
    observation = Observation()
    observation.is_answer = True
    observation.id = "chatcmpl-1"
    observation.ascii_chars = len(text)
    observation.has_output = bool(text)
    observation.usage = usage
    for name, value in facts.items():
        setattr(observation, name, value)
    return observation


def used(output, input=1):
    return Usage(model="m", endpoint="chat.completions", input_tokens=input, output_tokens=output)


def end(planned, ended, seen=None, *, operation=None, request_id=None, is_unlimited=False, attempts=1):
    return ending(
        planned,
        ended,
        seen,
        hold_id="h1",
        operation=operation,
        is_unlimited=is_unlimited,
        request_id=request_id,
        attempts=attempts,
    )


def told(step):
    """A step in a few words: ("settle", 40, "reported") or ("release", "unknown", "unknown")."""
    if isinstance(step, Settle):
        return "settle", step.amount, step.basis
    assert isinstance(step, Release)
    return "release", step.reason, step.sent


# The endings, row by row.

SOME = "x" * 8  # Two tokens.
MUCH = "x" * 400  # A hundred tokens: more than was held for.

REFUSED = ("release", "provider_error", "yes")
BROKEN = ("release", "stream_failed", "yes")

# (how it ended, what was seen), and what it costs at 3 credits a call and at 10 a token: an outcome, or one for each value of a policy.
ENDINGS = {
    "success with usage": ("answered", seen(SOME, used(4)), ("settle", 3, "reported"), ("settle", 40, "reported")),
    "success with usage above the hold": (
        "answered",
        seen(MUCH, used(9)),
        ("settle", 3, "reported"),
        ("settle", 90, "reported"),
    ),
    "success without usage": ("answered", seen(SOME), ("settle", 3, "held"), ("settle", 20, "estimated")),
    "a long success without usage": ("answered", seen(MUCH), ("settle", 3, "held"), ("settle", 60, "estimated")),
    "usage 0 beside output": (
        "answered",
        seen(SOME, used(0, 0)),
        ("settle", 3, "reported"),
        ("settle", 20, "estimated"),
    ),
    "output 0 beside output": (
        "answered",
        seen(SOME, used(0, 5)),
        ("settle", 3, "reported"),
        ("settle", 20, "estimated"),
    ),
    "usage that lacks the tokens": (
        "answered",
        seen(SOME, Usage(model="m", seconds=2.0)),
        ("settle", 3, "reported"),
        ("settle", 20, "estimated"),
    ),
    "an answer that could not be read": ("answered", None, ("settle", 3, "held"), ("settle", 0, "estimated")),
    "a provider's error after all retries": ("refused", None, REFUSED, REFUSED),
    'status "failed"': ("answered", seen(SOME, used(4), failed=True), REFUSED, REFUSED),
    "a 200 that is no answer": ("answered", seen(is_answer=False, id=None), REFUSED, REFUSED),
    "not sent": ("not_sent", None, ("release", "not_sent", "no"), ("release", "not_sent", "no")),
    "no answer": (
        "unknown",
        None,
        {"on_unknown": {"release": ("release", "unknown", "unknown"), "charge": ("settle", 3, "held")}},
        {"on_unknown": {"release": ("release", "unknown", "unknown"), "charge": ("settle", 60, "held")}},
    ),
    "the consumer stops early": (
        "stopped",
        seen(SOME),
        ("settle", 3, "held"),
        {
            "on_abort": {
                "observed": ("settle", 20, "observed"),
                "hold": ("settle", 60, "held"),
                "drain": ("settle", 60, "held"),
            }
        },
    ),
    "the consumer stops late": (
        "stopped",
        seen(MUCH),
        ("settle", 3, "held"),
        {
            "on_abort": {
                "observed": ("settle", 60, "observed"),
                "hold": ("settle", 60, "held"),
                "drain": ("settle", 60, "held"),
            }
        },
    ),
    "stopped after the usage came": (
        "stopped",
        seen(SOME, used(4)),
        ("settle", 3, "reported"),
        ("settle", 40, "reported"),
    ),
    "a stream never read": (
        "stopped",
        seen(is_answer=False, id=None),
        ("settle", 3, "held"),
        {
            "on_abort": {
                "observed": ("settle", 0, "observed"),
                "hold": ("settle", 60, "held"),
                "drain": ("settle", 60, "held"),
            }
        },
    ),
    "a drain that did not reach the usage": ("held", seen(SOME), ("settle", 3, "held"), ("settle", 60, "held")),
    "a drain that reached the usage": (
        "held",
        seen(SOME, used(4)),
        ("settle", 3, "reported"),
        ("settle", 40, "reported"),
    ),
    "the provider breaks off": (
        "broken",
        seen(SOME),
        {"on_failure": {"release": BROKEN, "observed": ("settle", 3, "held")}},
        {"on_failure": {"release": BROKEN, "observed": ("settle", 20, "observed")}},
    ),
    "an error event ends the stream": (
        "answered",
        seen(SOME, error=True),
        {"on_failure": {"release": BROKEN, "observed": ("settle", 3, "held")}},
        {"on_failure": {"release": BROKEN, "observed": ("settle", 20, "observed")}},
    ),
}

POLICIES = [
    Policies(on_unknown, on_failure, on_abort)
    for on_unknown, on_failure, on_abort in product(
        ("release", "charge"), ("release", "observed"), ("observed", "hold", "drain")
    )
]


def under(policies, outcome):
    if isinstance(outcome, tuple):
        return outcome
    ((policy, by_value),) = outcome.items()
    return by_value[getattr(policies, policy)]


@pytest.mark.parametrize("policies", POLICIES, ids=lambda policies: "-".join(policies[:3]))
@pytest.mark.parametrize("row", ENDINGS)
def test_endings(row, policies):
    """Each ending costs what the table says, under each policy, at a per-call price and at a token price; no other policy matters."""
    ended, observation, per_call_outcome, token_outcome = ENDINGS[row]

    assert under(policies, per_call_outcome) == told(end(planned(pricing=THREE, policies=policies), ended, observation))
    assert under(policies, token_outcome) == told(end(planned(pricing=TOKENS, policies=policies), ended, observation))


@given(
    st.sampled_from(["answered", "stopped", "held", "broken", "unknown"]),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.none() | st.builds(used, st.integers(0, 10_000), st.integers(0, 10_000)),
    st.sampled_from(POLICIES),
)
def test_only_the_truth_exceeds_the_hold(ended, ascii_chars, other_chars, usage, policies):
    """What was not reported by the provider is never charged above the hold."""
    observation = seen("x", usage, ascii_chars=ascii_chars, other_chars=other_chars)
    step = end(planned(pricing=TOKENS, policies=policies), ended, observation)

    assert isinstance(step, Release) or step.basis == "reported" or step.amount <= 60


@pytest.mark.parametrize("ended", ["answered", "stopped", "held"])
def test_price_fails_after_the_answer(ended):
    """A pricing that fails after the answer charges what was held: the answer was given."""

    def price(usage):
        return 7 if usage.output_tokens == 6 else 1 // 0

    assert ("settle", 7, "held") == told(end(planned(pricing=price), ended, seen(SOME, used(4))))


@pytest.mark.parametrize("bad", [-1, 1.5, True, None, 2**60])
def test_price_is_no_amount_after_the_answer(bad):
    """A price that is no amount, too, charges what was held."""

    def price(usage):
        return 7 if usage.output_tokens == 6 else bad

    assert ("settle", 7, "held") == told(end(planned(pricing=price), "answered", seen(SOME, used(4))))


# Names.


@pytest.mark.parametrize(
    ("result_id", "request_id", "expected"),
    [
        ("resp_1", "req_1", "gen_resp_1"),
        (None, "req_1", "gen_req_1"),
        ("", "req_1", "gen_req_1"),
        (None, None, "hold_h1"),
        ("", "", "hold_h1"),
        ("x" * 200, None, "gen_" + "x" * 200),
    ],
)
def test_transaction_id(result_id, request_id, expected):
    """The result's id names the event, else the request's, else the hold's."""
    assert expected == transaction_id(result_id, request_id, "h1")


@pytest.mark.parametrize("wild", ["x" * 201, "a b", "a\0b", "é", "\ud800", "x" * 100_000, "a\nb"])
def test_wild_ids(wild):
    """An id that fits no key is hashed: always the same, never cut to another's."""
    named = transaction_id(wild, None, "h1")

    assert named == transaction_id(wild, None, "h2")
    assert named != transaction_id(wild + "x", None, "h1")
    assert len(named) <= 80
    assert named.startswith("gen_")
    assert named.isascii()


def test_operation():
    """An operation's number names the event, whatever the provider called the result."""
    step = end(planned(amount=1), "answered", seen(SOME, used(4)), operation="order_7.2", request_id="req_1")

    assert ("order_7.2", True) == (step.transaction_id, step.is_explicit)


def test_unknown_is_named_after_the_hold():
    """Nobody has an answer to a lost call, so its charge is named after the hold."""
    step = end(planned(amount=1, policies=Policies(on_unknown="charge")), "unknown", None, request_id="req_1")

    assert ("hold_h1", None, False) == (step.transaction_id, step.request_id, step.is_explicit)


def test_settle_carries_all():
    """The event tells the whole story: who, what it used, how often it was tried, what the application noted."""
    call = planned(amount=3, properties={"a": 1}, price_slug="slug", meter="m")
    step = end(call, "answered", seen(SOME, used(4), created=7), request_id="r" * 300, attempts=3, is_unlimited=True)

    assert ("h1", "ada", "m", 3, used(4), "r" * 255, 3, "call", {"a": 1}, "slug", True) == (
        step.hold_id,
        step.customer,
        step.meter,
        step.amount,
        step.usage,
        step.request_id,
        step.attempts,
        step.kind,
        step.properties,
        step.price_slug,
        step.is_unlimited,
    )


def test_fingerprint():
    """A replay from a cache has the same fingerprint, another answer under the same id has another; without an id there is none."""
    call = planned(amount=1)
    first = end(call, "answered", seen(SOME, used(4), created=7)).fingerprint

    assert first is not None
    assert first == end(call, "answered", seen(SOME, used(4), created=7)).fingerprint
    assert first != end(call, "answered", seen(SOME, used(5), created=7)).fingerprint
    assert first != end(call, "answered", seen(SOME, used(4), created=8)).fingerprint
    assert None is end(call, "answered", seen(SOME, used(4), created=7, id=None)).fingerprint


# What is needed before.


def test_no_customer():
    """Without a customer nothing is planned."""
    with pytest.raises(CustomerRequiredError, match=r"chat\.completions"):
        planned_for(resolve([]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1),
        ({"amount": 0}, 0),
        ({"amount": 7}, 7),
        ({"pricing": THREE}, 3),
        ({"pricing": TOKENS}, 60),
        ({"pricing": TOKENS, "estimate": lambda request: 11}, 11),
        ({"pricing": lambda usage: usage.output_tokens}, 6),
        ({"amount": 7, "estimate": lambda request: 11}, 11),
    ],
)
def test_hold(given, expected):
    """What is held: one credit, the amount, the pricing's bound, or what the estimate says."""
    assert expected == planned(**given).amount


def test_estimate_sees_the_request():
    """An estimate is given the door, the model, the body and whether it streams."""
    asked = []
    planned(pricing=TOKENS, estimate=lambda request: asked.append(request) or 1, stream=True)

    assert [Request("chat.completions", "m", BODY, True)] == asked


def test_covered_calls_hold_nothing():
    """A call that a charge pays for holds 0, whatever an estimate would say."""
    payer = Payer("ada", None, 0, None, lambda request: 99, None, None, None, None, parent="h0")

    assert 0 == planned_for(payer).amount


def raising(error):
    def fail(given):
        raise error

    return fail


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"pricing": raising(KeyError("m"))}, PriceUnknownError),
        ({"pricing": raising(PriceUnknownError("no such model"))}, PriceUnknownError),
        ({"pricing": lambda usage: -1}, ConfigurationError),
        ({"pricing": lambda usage: 0.5}, ConfigurationError),
        ({"pricing": TOKENS, "estimate": raising(ZeroDivisionError())}, PriceUnknownError),
        ({"pricing": TOKENS, "estimate": lambda request: "many"}, ConfigurationError),
    ],
)
def test_no_price(given, error):
    """A price that is unknown or no amount is refused before the call, never taken for 0."""
    with pytest.raises(error):
        planned(**given)


@pytest.mark.parametrize(
    ("url", "is_priced"),
    [
        ("/audio/speech", False),
        ("/moderations", False),
        ("/vector_stores/x1/search", False),
        ("/images/variations", False),
        ("/embeddings", True),
        ("/responses", True),
        ("/images/generations", True),
    ],
)
def test_doors_without_tokens(url, is_priced):
    """A token price on a door that reports no tokens is refused before the call; a per-call price never is."""
    door = find("POST", url)
    assert planned(door, {}, pricing=THREE).amount == 3

    if is_priced:
        assert planned(door, {}, pricing=TOKENS)
    else:
        with pytest.raises(PriceUnknownError, match=door.name):
            planned(door, {}, pricing=TOKENS)


ASKED = {"include_usage": True}


@pytest.mark.parametrize(
    ("path", "pricing", "stream", "reads_raw", "options", "expected"),
    [
        ("/chat/completions", TOKENS, True, False, None, ({"stream_options": ASKED}, True)),
        ("/completions", TOKENS, True, False, None, ({"stream_options": ASKED}, True)),
        (
            "/chat/completions",
            TOKENS,
            True,
            False,
            {"include_usage": False, "x": 1},
            ({"stream_options": {"x": 1, **ASKED}}, True),
        ),
        ("/chat/completions", TOKENS, True, False, ASKED, ({}, False)),
        ("/chat/completions", TOKENS, True, True, None, ({}, False)),
        ("/chat/completions", TOKENS, False, False, None, ({}, False)),
        ("/chat/completions", THREE, True, False, None, ({}, False)),
        ("/responses", TOKENS, True, False, None, ({}, False)),
    ],
)
def test_include_usage(path, pricing, stream, reads_raw, options, expected):
    """Usage is asked for where a token price needs it and the caller did not ask, never where the caller reads the bytes."""
    body = BODY if options is None else {**BODY, "stream_options": options}
    call = planned(DOORS[path], body, stream=stream, reads_raw=reads_raw, pricing=pricing)

    assert expected == (dict(call.add_to_body), call.hides_usage)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/chat/completions", {}, {"max_completion_tokens": 50}),
        ("/responses", {}, {"max_output_tokens": 50}),
        ("/completions", {}, {"max_tokens": 50}),
        ("/chat/completions", {"max_tokens": 9}, {}),
        ("/responses", {"max_output_tokens": 9}, {}),
        ("/embeddings", {}, {}),
    ],
)
def test_cap_output(path, body, expected):
    """With `cap_output` the provider is sent the limit that was held for, where the caller set none."""
    capped = per_token(input=0, output=1, cap_output=True)
    policies = Policies(default_max_output_tokens=50)

    assert expected == dict(planned(DOORS[path], body, pricing=capped, policies=policies).add_to_body)
    assert {} == dict(planned(DOORS[path], body, pricing=TOKENS, policies=policies).add_to_body)


def test_place_step():
    """The hold knows everything that its end will need."""
    call = planned_for(
        Payer("ada", "m", 4, None, None, "slug", "order_7", "scope", {"a": 1}, parent="h0"),
        policies=Policies(on_unknown="charge", on_repeat="free"),
    )

    assert Place(
        "h1",
        "ada",
        "m",
        4,
        "owner",
        9.0,
        99.0,
        "charge",
        "order_7",
        "scope",
        "free",
        "h0",
        "chat.completions",
        "m",
        "slug",
        {"a": 1},
        5,
    ) == place_step(call, "h1", "owner", lease=9.0, max_call=99.0, max_holds=5)


@pytest.mark.parametrize(
    ("on_abort", "pricing", "expected"),
    [("drain", TOKENS, True), ("drain", THREE, False), ("observed", TOKENS, False), ("hold", TOKENS, False)],
)
def test_drains(on_abort, pricing, expected):
    """An early stop is read on only where the policy asks for it and the usage would change the price."""
    assert expected == wants_drain(planned(pricing=pricing, policies=Policies(on_abort=on_abort)))
