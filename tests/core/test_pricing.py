from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metered_ai.core.endpoints import DOORS
from metered_ai.core.observe import Observation
from metered_ai.core.pricing import (
    AUDIO_TOKENS,
    CONTEXT_TOKENS,
    FILE_TOKENS,
    IMAGE_OUTPUT_TOKENS,
    IMAGE_TOKENS,
    REFERENCE_TOKENS,
    TOOL_TOKENS,
    as_pricing,
    bound_usage,
    capped_body,
    estimated_usage,
    per_call,
    per_token,
)
from metered_ai.errors import PriceUnknownError
from metered_ai.records import MAX_AMOUNT, Request, Usage

CHAT = DOORS["/chat/completions"]
COMPLETIONS = DOORS["/completions"]
RESPONSES = DOORS["/responses"]
EMBEDDINGS = DOORS["/embeddings"]
IMAGES = DOORS["/images/generations"]
EDITS = DOORS["/images/edits"]
SPEECH = DOORS["/audio/speech"]
TRANSCRIPTIONS = DOORS["/audio/transcriptions"]
RUNS = DOORS["/threads/{}/runs"]

METERED = [door for door in DOORS.values() if door.access == "metered"]
TOKENS = per_token(input=1, output=1)


def ask(door, **body):
    return Request(door.name, "m", body, False)


def bound(door, **body):
    return bound_usage(door, ask(door, **body), 1000)


def estimate(door, seen=None, **body):
    return estimated_usage(door, ask(door, **body), seen)


def saw(**fields):
    seen = Observation()
    for name, value in fields.items():
        setattr(seen, name, value)
    return seen


def user(*content):
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


# ---- prices ----


@pytest.mark.parametrize("amount", [0, 1, 7, MAX_AMOUNT])
def test_per_call(amount):
    """A call costs its price, whatever it used, at every door."""
    pricing = per_call(amount)

    assert (True, False, f"per_call({amount})") == (pricing.is_fixed, pricing.cap_output, repr(pricing))
    assert amount == pricing.hold(Usage()) == pricing.charge(Usage(input_tokens=10**6))
    assert all(pricing.can_price(door) for door in METERED)
    assert pricing.can_charge(Usage())
    assert 1 == per_call().charge(Usage())


@pytest.mark.parametrize("bad", [-1, 1.0, True, "1", None, Decimal(1), MAX_AMOUNT + 1])
def test_bad_amounts(bad):
    """What is no whole number of credits is refused where it is given, by name."""
    with pytest.raises(ValueError, match="amount"):
        per_call(bad)


def test_per_token():
    """Every part of a usage has its rate; cached and cache-writing input and reasoning are parts of the whole."""
    pricing = per_token(input=10, cached_input=1, cache_write=12, output=100, reasoning=50, audio=1000)
    usage = Usage(
        input_tokens=20,
        cached_input_tokens=8,
        cache_write_tokens=4,
        output_tokens=9,
        reasoning_tokens=5,
        audio_tokens=2,
    )

    assert 8 * 10 + 8 * 1 + 4 * 12 + 4 * 100 + 5 * 50 + 2 * 1000 == pricing.charge(usage)
    assert 20 * 12 + 9 * 100 + 2 * 1000 == pricing.hold(usage)
    assert (False, False) == (pricing.is_fixed, pricing.cap_output)
    assert per_token(input=1, output=2, cap_output=True).cap_output


def test_defaults():
    """Cached and cache-writing input cost as input, reasoning as output, and audio nothing extra."""
    usage = Usage(
        input_tokens=20,
        cached_input_tokens=8,
        cache_write_tokens=4,
        output_tokens=9,
        reasoning_tokens=5,
        audio_tokens=2,
    )

    assert 20 * 3 + 9 * 7 == per_token(input=3, output=7).charge(usage)


@pytest.mark.parametrize(
    ("rate", "per", "tokens", "expected"),
    [
        (Decimal("0.1"), 1, 1, 1),
        (Decimal("0.1"), 1, 10, 1),
        (Decimal("0.1"), 1, 11, 2),
        (1, 1000, 1, 1),
        (1, 1000, 1000, 1),
        (1, 1000, 1001, 2),
        (Decimal("2.5"), 1_000_000, 400_000, 1),
        (Decimal("2.5"), 1_000_000, 400_001, 2),
        (Decimal("1E-30"), 1, 1, 1),
        (Decimal("0E-999"), 1, 5, 0),
        (0, 1, 5, 0),
        (MAX_AMOUNT, 1, 5, MAX_AMOUNT),
    ],
)
def test_rounding(rate, per, tokens, expected):
    """A charge is rounded up once, at the end; nothing is left over, nothing is lost, and it fits an amount."""
    assert expected == per_token(input=rate, output=0, per=per).charge(Usage(input_tokens=tokens))
    assert expected == per_token(input=0, output=rate, per=per).charge(Usage(output_tokens=tokens))


@pytest.mark.parametrize(
    "bad",
    [
        0.1,
        1.0,
        -1,
        True,
        "1",
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        Decimal("-0.1"),
        Decimal("1E-31"),
        Decimal("1E+99"),
        [],
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["input", "output", "cached_input", "cache_write", "reasoning", "audio"])
def test_bad_rates(name, bad):
    """A rate that is no exact number from 0 on is refused, and the message names it and its value."""
    with pytest.raises(ValueError, match=name) as caught:
        per_token(**{"input": 1, "output": 1, name: bad})

    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, None])
def test_bad_per(bad):
    """`per` is a whole number from 1 on."""
    with pytest.raises(ValueError, match="per"):
        per_token(input=1, output=1, per=bad)


def test_repr():
    """A token price shows how it was made."""
    shown = repr(per_token(input=Decimal("0.5"), output=2, audio=3, per=1000))

    assert "per_token(input=Decimal('0.5'), output=2, audio=3, per=1000)" == shown


@pytest.mark.parametrize("door", METERED, ids=lambda door: door.name)
def test_can_price(door):
    """A token price serves the doors whose answers report tokens, and no others."""
    without = {
        "audio.speech",
        "audio.translations",
        "images.variations",
        "moderations",
        "vector_stores.search",
        "content_provenance_checks",
    }

    assert (door.name not in without) == TOKENS.can_price(door)


def test_can_charge():
    """Seconds or images alone do not tell a token price what a call cost."""
    assert not TOKENS.can_charge(Usage(seconds=3.0, images=1))
    assert TOKENS.can_charge(Usage(input_tokens=0))
    assert TOKENS.can_charge(Usage(output_tokens=0))


def test_function():
    """Any function from a usage to credits is a pricing, for the hold and for the charge."""
    pricing = as_pricing(lambda usage: (usage.images or 0) * 5)

    assert (10, 5) == (pricing.hold(Usage(images=2)), pricing.charge(Usage(images=1)))
    assert (False, False, True) == (pricing.is_fixed, pricing.cap_output, pricing.can_price(SPEECH))
    assert pricing.can_charge(Usage())
    assert "lambda" in repr(pricing)
    assert TOKENS is as_pricing(TOKENS)


@pytest.mark.parametrize("result", [1.0, -1, None, True, "1", MAX_AMOUNT + 1])
def test_function_results(result):
    """A function that returns no amount is a ValueError, before the call as after it."""
    pricing = as_pricing(lambda _: result)

    with pytest.raises(ValueError, match="price"):
        pricing.hold(Usage())
    with pytest.raises(ValueError, match="price"):
        pricing.charge(Usage())


def test_function_without_a_price():
    """A function's own PriceUnknownError passes through."""

    def unknown(usage):
        raise PriceUnknownError(f"no price for {usage.model}")

    with pytest.raises(PriceUnknownError, match="no price for m"):
        as_pricing(unknown).hold(Usage(model="m"))


@pytest.mark.parametrize("bad", [5, None, 1.5, "per_call", int])
def test_bad_pricing(bad):
    """What is no pricing and no function is refused, by its value."""
    with pytest.raises(ValueError, match="pricing must be"):
        as_pricing(bad)


rates = st.integers(0, 10**6) | st.decimals(0, 1000, places=6)
counts = st.integers(0, 10**9)


@st.composite
def usages(draw, most=None):
    """A usage whose parts fit its whole, and that stays within `most`."""
    limits = most or Usage(input_tokens=10**9, output_tokens=10**9, audio_tokens=10**9)
    read = draw(st.integers(0, limits.input_tokens or 0))
    wrote = draw(st.integers(0, limits.output_tokens or 0))
    cached = draw(st.integers(0, read))
    return Usage(
        input_tokens=read,
        cached_input_tokens=cached,
        cache_write_tokens=draw(st.integers(0, read - cached)),
        output_tokens=wrote,
        reasoning_tokens=draw(st.integers(0, wrote)),
        audio_tokens=draw(st.integers(0, limits.audio_tokens or 0)),
    )


pricings = st.builds(
    per_token,
    input=rates,
    output=rates,
    cached_input=st.none() | rates,
    cache_write=st.none() | rates,
    reasoning=st.none() | rates,
    audio=st.none() | rates,
    per=st.sampled_from([1, 3, 1000, 10**6]),
)


@given(pricings, st.data())
def test_hold_covers(pricing, data):
    """A hold is never below the charge of any usage within its bound, and more usage never holds less."""
    most = data.draw(usages())

    assert pricing.charge(data.draw(usages(most))) <= pricing.hold(most)
    assert pricing.hold(data.draw(usages(most))) <= pricing.hold(most)


@given(rates, rates, rates, st.sampled_from([1, 3, 1000]), usages())
def test_exact(read, cached, wrote, per, usage):
    """A charge is the exact sum, rounded up once."""
    plain = usage.input_tokens - usage.cached_input_tokens
    exact = (
        Fraction(read) * plain + Fraction(cached) * usage.cached_input_tokens + Fraction(wrote) * usage.output_tokens
    )

    charged = per_token(input=read, cached_input=cached, cache_write=read, output=wrote, per=per).charge(usage)

    assert ceil(exact / per) == charged


@given(pricings, usages(), counts)
def test_monotone(pricing, usage, more):
    """More output never costs less."""
    longer = Usage(
        **{name: getattr(usage, name) for name in Usage.__slots__} | {"output_tokens": usage.output_tokens + more}
    )

    assert pricing.charge(usage) <= pricing.charge(longer)


# ---- what a request may use ----


@given(st.text(max_size=200))
@example("\U0001f600" * 200)
def test_text_bound(text):
    """No text has more tokens than the bound: a token is at least one byte. An estimate is never above it."""
    size = len(text.encode("utf-8", "surrogatepass"))
    for door, body in (
        (CHAT, {"messages": user(text)}),
        (CHAT, {"messages": user({"type": "text", "text": text})}),
        (COMPLETIONS, {"prompt": text}),
        (RESPONSES, {"input": "", "instructions": text}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": text}]}]}),
        (EMBEDDINGS, {"input": [text, text]}),
        (CHAT, {"messages": [], "tools": [{"type": "function", "function": {"name": "f", "description": text}}]}),
        (CHAT, {"messages": [], "response_format": {"type": "json_schema", "json_schema": {"schema": {text: {}}}}}),
    ):
        assert size <= bound(door, **body).input_tokens
        assert estimate(door, **body).input_tokens <= bound(door, **body).input_tokens


def test_text_that_looks_like_media():
    """Text that begins like a data URL is still text."""
    text = "data:image/png;base64," + "x" * 50_000

    assert len(text) <= bound(CHAT, messages=user(text)).input_tokens


def test_labels_are_no_text():
    """What only steers or labels a call is not read by the model."""
    plain = bound(CHAT, messages=user("Hi"))

    assert plain == bound(CHAT, messages=user("Hi"), user="u" * 99, metadata={"k": "v" * 99}, model="x" * 99)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": "https://host/x.png"}}, IMAGE_TOKENS["auto"]),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 99_999, "detail": "low"}},
            IMAGE_TOKENS["low"],
        ),
        ({"type": "image_url", "image_url": {"url": "x", "detail": ["bad"]}}, IMAGE_TOKENS["auto"]),
        (
            {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 99_999, "detail": "original"},
            IMAGE_TOKENS["original"],
        ),
        ({"type": "input_image", "file_id": "file_1", "detail": "high"}, IMAGE_TOKENS["high"]),
        ({"type": "input_file", "file_id": "file_1"}, FILE_TOKENS),
        ({"type": "input_file", "file_url": "https://host/x.pdf"}, FILE_TOKENS),
        (
            {"type": "file", "file": {"filename": "x", "file_data": "data:application/pdf;base64," + "A" * 99_999}},
            FILE_TOKENS,
        ),
        ({"type": "input_file", "file_data": "data:text/plain;base64," + "A" * 40_000}, 30_000),
        ({"type": "item_reference", "id": "msg_1"}, REFERENCE_TOKENS),
        ({"type": "image_generation_call", "result": "A" * 99_999}, IMAGE_TOKENS["auto"]),
    ],
)
def test_media(part, expected):
    """Images and files count by their stated constants, never by the length of their base64."""
    nothing = bound(RESPONSES, input=user({"type": "x"})).input_tokens
    something = bound(RESPONSES, input=user(part)).input_tokens

    assert expected <= something - nothing <= expected + 200


@pytest.mark.parametrize(("kind", "expected"), [("wav", 47), ("mp3", 751)])
def test_audio(kind, expected):
    """Audio counts by its size and format, as input and as audio."""
    part = {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": kind}}
    usage = bound(CHAT, messages=user(part))

    assert expected == usage.audio_tokens
    assert usage.audio_tokens < usage.input_tokens < usage.audio_tokens + 400


def test_spoken_answers():
    """Where an answer may be spoken, all of its output may be audio; else none."""
    assert 1000 == bound(CHAT, messages=[], modalities=["text", "audio"]).audio_tokens
    assert bound(CHAT, messages=[], modalities=["text"]).audio_tokens is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"previous_response_id": "r1"}, CONTEXT_TOKENS),
        ({"conversation": {"id": "c1"}}, CONTEXT_TOKENS),
        ({"prompt": {"id": "p1"}}, REFERENCE_TOKENS),
        ({"tools": [{"type": "web_search"}, {"type": "function", "name": "f"}]}, TOOL_TOKENS),
    ],
)
def test_held_by_the_server(body, expected):
    """Context that the server holds is held by its stated constant and never charged as an estimate."""
    nothing = bound(RESPONSES, input="Hi").input_tokens

    assert expected <= bound(RESPONSES, input="Hi", **body).input_tokens - nothing <= expected + 150
    assert estimate(RESPONSES, input="Hi", **body).input_tokens < 30


@pytest.mark.parametrize(
    ("door", "body", "expected"),
    [
        (CHAT, {}, 1000),
        (CHAT, {"max_completion_tokens": 50}, 50),
        (CHAT, {"max_tokens": 60}, 60),
        (CHAT, {"max_tokens": 60, "max_completion_tokens": 50}, 60),
        (CHAT, {"max_tokens": 60, "n": 3}, 180),
        (CHAT, {"n": 3}, 3000),
        (CHAT, {"n": None, "max_tokens": None}, 1000),
        (CHAT, {"n": "3", "max_tokens": "60"}, 1000),
        (CHAT, {"n": -3, "max_tokens": -60}, 1000),
        (CHAT, {"n": True, "max_tokens": True}, 1000),
        (CHAT, {"n": 2.0, "max_tokens": 5.0}, 1000),
        (CHAT, {"max_tokens": 10**400}, MAX_AMOUNT),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5, "n": 2, "best_of": 4}, 20),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5, "n": 4, "best_of": 2}, 20),
        (COMPLETIONS, {"prompt": ["x", "y"], "max_tokens": 5}, 10),
        (COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        (COMPLETIONS, {"prompt": [[1], [2]], "max_tokens": 5}, 10),
        (RESPONSES, {"max_output_tokens": 70, "n": 9}, 70),
        (RESPONSES, {"max_tokens": 70}, 1000),
        (EMBEDDINGS, {"input": "x"}, 0),
        (IMAGES, {}, IMAGE_OUTPUT_TOKENS["auto"]),
        (IMAGES, {"n": 2, "quality": "low"}, 2 * IMAGE_OUTPUT_TOKENS["low"]),
        (IMAGES, {"quality": ["x"], "partial_images": 2}, IMAGE_OUTPUT_TOKENS["auto"] + 200),
        (RUNS, {"max_completion_tokens": 5}, 5),
        (SPEECH, {"input": "x"}, None),
        (DOORS["/decisions"], {}, 1000),
        (DOORS["/fine_tuning/alpha/graders/run"], {}, 0),
    ],
)
def test_output(door, body, expected):
    """The output is bounded by the request's own limit, else by the default, times the answers it asks for; nonsense is not said."""
    assert expected == bound(door, **body).output_tokens


def test_prediction():
    """Predicted output that is rejected is billed as output."""
    usage = bound(CHAT, max_tokens=10, messages=[], prediction={"type": "content", "content": "x" * 500})

    assert usage.output_tokens >= 510


def test_token_ids():
    """Text that comes as token ids counts one token each."""
    assert 3000 <= bound(EMBEDDINGS, input=[100_000] * 3000).input_tokens < 3200
    assert 3000 <= bound(COMPLETIONS, prompt=[[100_000] * 1500] * 2).input_tokens < 3200
    assert 3000 <= estimate(EMBEDDINGS, input=[100_000] * 3000).input_tokens < 3010


def test_other_measures():
    """Characters, images, the tier and the prompt limit come from the request; seconds nobody can know."""
    speech = bound(SPEECH, input="Hé", voice="x")
    images = bound(IMAGES, prompt="x", n=3)

    assert (2, None, None) == (speech.characters, speech.seconds, speech.images)
    assert (3, None) == (images.images, images.characters)
    assert ("m", "chat.completions", "flex") == (
        (usage := bound(CHAT, service_tier="flex")).model,
        usage.endpoint,
        usage.service_tier,
    )
    assert 500 == bound(RUNS, max_prompt_tokens=500).input_tokens
    assert bound(RUNS).input_tokens >= CONTEXT_TOKENS
    assert bound(TRANSCRIPTIONS).audio_tokens == AUDIO_TOKENS
    assert bound(EDITS, prompt="x").input_tokens >= IMAGE_TOKENS["high"]
    assert bound(DOORS["/fine_tuning/alpha/graders/run"]).input_tokens >= 1000


class Message:
    """Stands for an object of the SDK, which knows how to become a mapping."""

    def model_dump(self):
        return {"role": "assistant", "content": "x" * 300}


class Echo:
    def model_dump(self):
        return self


def test_odd_bodies():
    """Objects of the SDK are read, and nothing that a body can hold hangs or raises."""
    loop = []
    loop.append(loop)
    deep = []
    for _ in range(100_000):
        deep = [deep]

    assert 300 <= bound(CHAT, messages=[Message()]).input_tokens
    assert bound(
        CHAT, messages=[Echo(), object(), b"x", {1: 2}, float("nan"), 10**5000, -(10**5000), "\ud800"], x=deep, y=loop
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "messages input prompt content type text image_url url detail input_audio data format file_data file_id tools n best_of"
                " max_tokens max_output_tokens quality audio id modalities prediction partial_images".split()
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


@given(
    st.sampled_from(METERED),
    st.dictionaries(st.text(max_size=4) | st.sampled_from(["n", "messages", "input", "prompt", "tools"]), json_values),
)
def test_any_body(door, body):
    """Every body has a bound that is a sound usage, and an estimate below it."""
    most, likely = bound(door, **body), estimate(door, **body)

    assert 0 <= likely.input_tokens <= most.input_tokens <= MAX_AMOUNT
    assert TOKENS.charge(likely) <= TOKENS.hold(most) <= MAX_AMOUNT


# ---- estimates ----


@pytest.mark.parametrize(
    ("seen", "wrote"),
    [(None, 0), (saw(ascii_chars=9), 3), (saw(other_chars=5), 5), (saw(ascii_chars=4, other_chars=1), 2)],
)
def test_estimated_output(seen, wrote):
    """One token for four ASCII characters, and one for each other character."""
    assert wrote == estimate(CHAT, seen, messages=[]).output_tokens


def test_estimated_input():
    """The input of an estimate is counted like its output: a quarter of the ASCII characters, all others whole."""
    base = estimate(CHAT, messages=user("")).input_tokens

    assert 100 == estimate(CHAT, messages=user("x" * 400)).input_tokens - base
    assert 400 == estimate(CHAT, messages=user("é" * 400)).input_tokens - base
    assert (
        IMAGE_TOKENS["low"]
        <= estimate(CHAT, messages=user({"image_url": {"url": "x", "detail": "low"}})).input_tokens
        < 300
    )


def test_estimated_rest():
    """An estimate names what was served, counts the images that were seen, and hears from a transcription how long it was."""
    seen = saw(model="served", service_tier="flex", images=2, ascii_chars=30)

    assert ("served", "flex") == ((usage := estimate(CHAT, seen)).model, usage.service_tier)
    assert (2, 2 * IMAGE_OUTPUT_TOKENS["low"]) == (
        (usage := estimate(IMAGES, seen, quality="low")).images,
        usage.output_tokens,
    )
    assert 20 == estimate(TRANSCRIPTIONS, seen).audio_tokens
    assert (2, None) == ((usage := estimate(SPEECH, seen, input="Hi")).characters, usage.output_tokens)


# ---- the limit that is sent ----


@pytest.mark.parametrize(
    ("door", "body", "expected"),
    [
        (CHAT, {}, {"max_completion_tokens": 9}),
        (CHAT, {"max_completion_tokens": None}, {"max_completion_tokens": 9}),
        (CHAT, {"max_tokens": 5}, {}),
        (CHAT, {"max_completion_tokens": 5}, {}),
        (COMPLETIONS, {}, {"max_tokens": 9}),
        (RESPONSES, {}, {"max_output_tokens": 9}),
        (RESPONSES, {"max_output_tokens": 5}, {}),
        (EMBEDDINGS, {}, {}),
        (IMAGES, {}, {}),
    ],
)
def test_capped_body(door, body, expected):
    """The limit goes under the door's own name, and never over the caller's."""
    assert expected == capped_body(door, ask(door, **body), 9)


@pytest.mark.parametrize("door", [CHAT, COMPLETIONS, RESPONSES], ids=lambda door: door.name)
def test_cap_bounds(door):
    """With the limit sent, the hold bounds what the provider may write."""
    body = {"n": 2} | capped_body(door, ask(door), 9)

    assert bound(door, **body).output_tokens == bound_usage(door, ask(door, n=2), 9).output_tokens


def test_long_bodies_are_cheap():
    """A bound reads a body once: a long conversation costs about what it costs to serialise it."""
    body = {"messages": user("x" * 1000) * 1000}
    usage = bound(CHAT, **json.loads(json.dumps(body)))

    assert 10**6 <= usage.input_tokens <= 10**6 + 10**5
