"""Prices in dollars: the rates that the tests compare with are genai-prices' own, so that a new release of it breaks none."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Context, Decimal, localcontext
from fractions import Fraction
from math import ceil

import genai_prices
import pytest
from genai_prices.data_snapshot import DataSnapshot, get_snapshot, set_custom_snapshot
from genai_prices.types import ClauseEquals, ConditionalPrice, ModelInfo, ModelPrice, Provider, Tier, TieredPrices
from genai_prices.types import TimeOfDateConstraint as Daily
from hypothesis import given, settings
from hypothesis import strategies as st

from metered_ai import ConfigurationError, MeteredOpenAI, PriceUnknownError, Request, Usage, connect
from metered_ai.core.endpoints import DOORS
from metered_ai.core.pricing import bound_usage
from metered_ai.prices import per_cost
from metered_ai.records import MAX_AMOUNT

MICRO = per_cost(credits_per_usd=10**6)
FINE = per_cost(credits_per_usd=10**12)


def dollars(model, *, provider="openai", tier=None, **counts):
    """What genai-prices itself calculates."""
    context = {"service_tier": tier} if tier else None
    return genai_prices.calc_price(
        genai_prices.Usage(**counts), model, provider_id=provider, price_context=context
    ).total_price


def made_up(**prices):
    return [ModelInfo("m", ClauseEquals("m"), prices=ModelPrice(**prices))]


def sell(models):
    """A pricing in millionths of a dollar by a provider that sells these models and is the only one."""
    own = Provider("own", "Own", "https://own", models=models)
    set_custom_snapshot(DataSnapshot([own], from_auto_update=False))
    return per_cost(credits_per_usd=10**6, provider="own")


@pytest.fixture
def rates():
    """`sell`, until the test is over."""
    yield sell
    set_custom_snapshot(None)


# ---- charges ----


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-5-mini", "o3", "gpt-4.1-nano", "text-embedding-3-small"])
@pytest.mark.parametrize("read", [0, 1, 1_234, 400_001])
def test_charge(model, read):
    """A charge is what genai-prices calculates, of input, cached input and output, times the credits of a dollar, rounded up."""
    wrote = 0 if "embedding" in model else 567
    usage = Usage(
        model=model, input_tokens=read, cached_input_tokens=read // 3, output_tokens=wrote, reasoning_tokens=9
    )
    cost = dollars(model, input_tokens=read, cache_read_tokens=read // 3, output_tokens=wrote)

    assert ceil(Fraction(cost) * 10**12) == FINE.charge(usage)
    assert ceil(Fraction(cost) * 1000) == per_cost(credits_per_usd=1000).charge(usage)


@pytest.mark.parametrize("size", [1_000, 300_000])
def test_cache_write(size):
    """Input that a cache took up costs what the model asks for that, at the tier of the whole input."""
    pricing = per_cost(credits_per_usd=10**12, provider="anthropic")
    usage = Usage(model="claude-sonnet-4-5", input_tokens=size, cached_input_tokens=200, cache_write_tokens=300)
    cost = dollars(
        "claude-sonnet-4-5",
        provider="anthropic",
        input_tokens=size,
        cache_read_tokens=200,
        cache_write_tokens=300,
    )

    assert ceil(Fraction(cost) * 10**12) == pricing.charge(usage)


@pytest.mark.parametrize("tier", ["flex", "priority", "default", "auto"])
def test_tier(tier):
    """The service tier that answered has its own price."""
    cost = dollars("gpt-5", tier=tier, input_tokens=1000, output_tokens=100)

    assert ceil(cost * 10**6) == MICRO.charge(
        Usage(model="gpt-5", service_tier=tier, input_tokens=1000, output_tokens=100)
    )


def test_audio():
    """Audio costs as audio, on the dearer side where a usage does not tell whether it was heard or spoken."""
    read, heard = {"input_tokens": 100, "input_audio_tokens": 90}, {"output_tokens": 50}
    transcript = Usage(model="gpt-4o-transcribe", input_tokens=100, output_tokens=50, audio_tokens=90)

    assert ceil(dollars("gpt-4o-transcribe", **read, **heard) * 10**6) == MICRO.charge(transcript)

    spoken = dollars("gpt-audio", input_tokens=100, output_tokens=50, input_audio_tokens=40, output_audio_tokens=50)

    assert ceil(spoken * 10**6) == MICRO.charge(replace(transcript, model="gpt-audio"))


def test_pictures():
    """All that an image model writes costs as a picture, and what it reads too, but for a prompt alone."""
    usage = Usage(model="gpt-image-1.5", endpoint="images.generations", input_tokens=100, output_tokens=50)
    drawn = {"output_tokens": 50, "output_image_tokens": 50}

    assert ceil(dollars("gpt-image-1.5", input_tokens=100, **drawn) * 10**6) == MICRO.charge(usage)
    assert ceil(dollars("gpt-image-1.5", input_tokens=100, input_image_tokens=100, **drawn) * 10**6) == MICRO.charge(
        replace(usage, endpoint="images.edits")
    )

    with pytest.raises(PriceUnknownError, match="output_image_mtok, which no usage tells"):
        MICRO.charge(replace(usage, endpoint="responses"))


def test_untold_cached(rates):
    """What of the cached input was audio or a picture is not told either: it costs the dearer rate."""
    plain = {"input_mtok": Decimal(1), "output_mtok": Decimal(1)}
    cached = {**plain, "cache_read_mtok": Decimal("0.5")}
    usage = Usage(model="m", input_tokens=30, cached_input_tokens=10)

    heard = rates(made_up(**plain, input_audio_mtok=Decimal(9)))

    assert 10 + 9 * 20 == heard.charge(replace(usage, audio_tokens=20))
    assert 9 * 30 == heard.charge(replace(usage, audio_tokens=30))

    heard = rates(made_up(**cached, input_audio_mtok=Decimal(9), cache_audio_read_mtok=Decimal(4)))

    assert 9 * 20 + 4 * 5 + 3 == heard.charge(replace(usage, audio_tokens=25))

    seen = rates(made_up(**cached, input_image_mtok=Decimal(9), cache_image_read_mtok=Decimal(4)))

    assert 9 * 20 + 4 * 10 == seen.charge(replace(usage, endpoint="images.edits"))
    assert 20 + 5 == seen.charge(replace(usage, endpoint="images.generations"))

    seen = rates(made_up(**plain, input_image_mtok=Decimal(9)))

    assert 9 * 30 == seen.charge(replace(usage, endpoint="images.edits", cache_write_tokens=10))


def test_rounded_up_once(rates):
    """A charge is rounded up at its end, not part by part: three thirds of a credit are one credit, a little more are two."""
    pricing = rates(made_up(input_mtok=Decimal("0.4"), cache_read_mtok=Decimal("0.3"), output_mtok=Decimal("0.3")))

    assert [1, 2, 1, 0] == [
        pricing.charge(Usage(model="m", input_tokens=read, cached_input_tokens=cached, output_tokens=wrote))
        for read, cached, wrote in [(2, 1, 1), (2, 1, 2), (1, 0, 0), (0, 0, 0)]
    ]


def test_exact(rates):
    """Nothing is lost to floats or to the caller's decimal context, even in the largest numbers."""
    pricing = rates(made_up(input_mtok=Decimal("0.1"), output_mtok=Decimal("0.0000000000000000000000000001")))
    usages = [
        Usage(model="m", input_tokens=read, output_tokens=wrote) for read, wrote in [(30, 0), (30, 1), (2**52, 1)]
    ]
    with localcontext(Context(prec=3, rounding=ROUND_DOWN)):
        charged = [pricing.charge(usage) for usage in usages]

    assert [3, 4, ceil(Fraction(2**52, 10))] == charged

    odd = per_cost(credits_per_usd=Decimal("0.1234567890123456789012345678901234567890"), provider="own")
    exact = Fraction(2**52, 10**7) * Fraction("0.1234567890123456789012345678901234567890")

    assert ceil(exact) == odd.charge(usages[2])
    assert MAX_AMOUNT == per_cost(credits_per_usd=MAX_AMOUNT, provider="own").charge(usages[2])


def test_parts(rates):
    """Parts larger than the whole count only as far as the whole goes."""
    pricing = rates(
        made_up(input_mtok=Decimal(2), cache_read_mtok=Decimal(1), cache_write_mtok=Decimal(3), output_mtok=Decimal(5))
    )
    usage = Usage(
        model="m", input_tokens=10, cached_input_tokens=20, cache_write_tokens=5, output_tokens=3, audio_tokens=99
    )

    assert 10 + 15 == pricing.charge(replace(usage, reasoning_tokens=7))


def test_by_request(rates):
    """What a model asks for each request is added, to the hold as well."""
    pricing = rates(made_up(input_mtok=Decimal(1), output_mtok=Decimal(1), requests_kcount=Decimal(5)))

    assert (5_002, 5_002) == (
        pricing.charge(Usage(model="m", input_tokens=1, output_tokens=1)),
        pricing.hold(Usage(model="m", input_tokens=1, output_tokens=1)),
    )


# ---- holds ----


OPENAI = [model.id for provider in get_snapshot().providers if provider.id == "openai" for model in provider.models]
COUNTS = st.integers(0, 500_000)


def holds(pricing, bound):
    try:
        return pricing.hold(bound)
    except PriceUnknownError:
        return None


PRICED = [
    (model, endpoint)
    for model in OPENAI
    for endpoint in ("chat.completions", "images.edits", "images.generations")
    if holds(MICRO, Usage(model=model, endpoint=endpoint, input_tokens=9, output_tokens=9)) is not None
]


def test_most_are_priced():
    """Most models of OpenAI can be priced, so that the next test is about something."""
    chat = {model for model, endpoint in PRICED if endpoint == "chat.completions"}

    assert {"gpt-4o", "gpt-5", "gpt-5-mini", "gpt-audio", "o3", "gpt-4.1"} <= chat
    assert ("gpt-image-1", "images.generations") in PRICED


@st.composite
def bounds(draw):
    """A bound, without a model, and a usage within it: whatever was cached, spoken, thought, or served at the standard tier."""
    read, wrote, audio = draw(st.tuples(COUNTS, COUNTS, COUNTS))
    tier = draw(st.sampled_from([None, "auto", "default", "flex", "priority"]))

    def up_to(most):
        return draw(st.none() | st.just(most) | st.integers(0, most))

    usage = Usage(
        service_tier=draw(st.sampled_from([None, "default", tier])),
        input_tokens=up_to(read),
        cached_input_tokens=up_to(read),
        cache_write_tokens=up_to(read),
        output_tokens=up_to(wrote),
        reasoning_tokens=up_to(wrote),
        audio_tokens=up_to(audio),
    )
    return Usage(service_tier=tier, input_tokens=read, output_tokens=wrote, audio_tokens=audio), usage


@settings(max_examples=300)
@given(st.sampled_from(PRICED), bounds())
def test_hold_bounds_charge(priced, bounded):
    """No usage within the bound costs more than the hold, for any model."""
    bound, usage = (replace(usage, model=priced[0], endpoint=priced[1]) for usage in bounded)

    assert FINE.charge(usage) <= FINE.hold(bound)


PRICES = st.integers(0, 20).map(Decimal)
TIERED = PRICES | st.builds(TieredPrices, PRICES, st.lists(st.builds(Tier, COUNTS, PRICES), min_size=1, max_size=2))
SHAPES = [
    "cache_read_mtok cache_write_mtok output_reasoning_mtok requests_kcount",
    "cache_read_mtok input_audio_mtok output_audio_mtok cache_audio_read_mtok",
    "cache_read_mtok input_image_mtok output_image_mtok cache_image_read_mtok",
    "input_audio_mtok input_image_mtok",
]
"""What a model may have rates for together, beside input and output; genai-prices wants every crossing of two rates to have one."""


@settings(max_examples=300)
@given(
    st.sampled_from(SHAPES).flatmap(
        lambda shape: st.fixed_dictionaries(dict.fromkeys(["input_mtok", "output_mtok", *shape.split()], TIERED))
    ),
    st.sampled_from(["images.edits", "images.generations"]),
    bounds(),
)
def test_hold_bounds_charge_at_any_rates(prices, endpoint, bounded):
    """Nor at rates that nobody asks yet: falling with the size, dearer from the cache, cheaper for audio."""
    bound, usage = (replace(usage, model="m", endpoint=endpoint) for usage in bounded)
    try:
        pricing = sell(made_up(**prices))
        held, charged = pricing.hold(bound), pricing.charge(usage)
    finally:
        set_custom_snapshot(None)

    assert 0 <= charged <= held


def test_hold_is_tight():
    """A hold at flat rates is the bound's own cost, at the dearest rate of the input; audio adds what it costs more."""
    flat = dollars("gpt-4o", input_tokens=1000, output_tokens=500)

    assert ceil(flat * 10**6) == MICRO.hold(Usage(model="gpt-4o", input_tokens=1000, output_tokens=500))

    dearer = dollars("gpt-audio", input_tokens=10, output_tokens=10, output_audio_tokens=10)

    assert ceil(dearer * 10**6) == MICRO.hold(
        Usage(model="gpt-audio", input_tokens=10, output_tokens=10, audio_tokens=10)
    )


def test_hold_for_parts(rates):
    """All that is read may come from a cache or go into one, and all that is written may be reasoning."""
    plain = {"input_mtok": Decimal(2), "output_mtok": Decimal(3)}
    bound = Usage(model="m", input_tokens=10, output_tokens=10)

    assert [70, 80, 80, 100] == [
        rates(made_up(**{**plain, name: Decimal(rate)})).hold(bound)
        for name, rate in [
            ("output_reasoning_mtok", 5),
            ("cache_write_mtok", 5),
            ("cache_read_mtok", 5),
            ("output_reasoning_mtok", 8),
        ]
    ]


def test_hold_for_service_tiers():
    """A cheap tier is held for at the standard price too, because the answer may come from there; a dear one at its own."""
    bound = Usage(model="gpt-5", input_tokens=1000, output_tokens=100)
    standard, flex, priority = (MICRO.hold(replace(bound, service_tier=tier)) for tier in (None, "flex", "priority"))

    assert standard == flex == MICRO.charge(bound)
    assert standard < priority == MICRO.charge(replace(bound, service_tier="priority"))


def test_hold_over_tiers(rates):
    """A longer input may cost less in all; the hold is for the dearest length within the bound, and for no tier beyond it."""
    falling = TieredPrices(Decimal(10), [Tier(100, Decimal(1))])
    pricing = rates(made_up(input_mtok=falling, output_mtok=Decimal(0)))

    assert [500, 1000, 1000, 2000] == [
        pricing.hold(Usage(model="m", input_tokens=read)) for read in (50, 100, 101, 2000)
    ]
    assert [1000, 101] == [pricing.charge(Usage(model="m", input_tokens=read)) for read in (100, 101)]


def test_hold_over_hours(rates):
    """Where the price changes with the hour, the hold is enough for a call that ends two hours later."""
    now = datetime.now(UTC)
    soon, later = (now + timedelta(hours=1)).time(), (now + timedelta(hours=3)).time()
    cheap, dear = ModelPrice(input_mtok=Decimal(1)), ModelPrice(input_mtok=Decimal(7))
    pricing = rates(
        [
            ModelInfo(
                "m",
                ClauseEquals("m"),
                prices=[ConditionalPrice(prices=cheap), ConditionalPrice(Daily(soon, later), prices=dear)],
            )
        ]
    )
    usage = Usage(model="m", input_tokens=10)

    assert (10, 70) == (pricing.charge(usage), pricing.hold(usage))


# ---- unknown prices ----


def test_dated():
    """A dated model that has no rates of its own costs as the model without the date; one that has, its own."""
    usages = [
        Usage(model=model, input_tokens=1000) for model in ("gpt-5-mini", "gpt-5-mini-2199-01-31", "gpt-4o-2024-05-13")
    ]
    plain, dated, own = map(MICRO.charge, usages)

    assert plain == dated
    assert ceil(dollars("gpt-4o-2024-05-13", input_tokens=1000) * 10**6) == own
    with pytest.raises(PriceUnknownError):
        MICRO.charge(Usage(model="gpt-2-2199-01-31", input_tokens=1))


@pytest.mark.parametrize(
    ("usage", "message"),
    [
        (Usage(input_tokens=1), "no model is named"),
        (Usage(model="gpt-2", input_tokens=1), "knows no model 'gpt-2' of provider 'openai'"),
        (Usage(model="text-embedding-3-small", output_tokens=1), "no price for the output of model"),
        (Usage(model="whisper-1", input_tokens=1), "audio_hours.*which no usage tells"),
        (Usage(model="gpt-realtime", input_tokens=1), "input_image_mtok, which no usage tells"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unknown(usage, message):
    """What nobody has a price for, or what depends on more than a usage tells, is an error, never 0."""
    for price in (MICRO.hold, MICRO.charge):
        with pytest.raises(PriceUnknownError, match=message):
            price(usage)


def test_unknown_without_rates(rates):
    """A model that is listed without any rate is unknown; one that costs nothing costs nothing."""
    with pytest.raises(PriceUnknownError, match="no price for the input"):
        rates(made_up()).hold(Usage(model="m", input_tokens=64))

    free = rates(made_up(input_mtok=Decimal(0), output_mtok=Decimal(0)))

    assert 0 == free.hold(Usage(model="m", input_tokens=64, output_tokens=64))


def test_doors():
    """Doors that report no tokens cannot be priced, nor those that have prices of their own."""
    priced = {door.name for door in DOORS.values() if door.access == "metered" and MICRO.can_price(door)}

    assert {"responses", "embeddings", "images.edits", "audio.transcriptions", "threads.runs"} <= priced
    assert set() == priced & {"decisions", "fine_tuning.graders.run", "audio.speech", "moderations"}


@pytest.fixture
def billing():
    with connect("memory://") as billing:
        billing.grant("ada", "generations", 10**9, id="start")
        yield billing


@pytest.fixture
def client(provider, billing):
    with MeteredOpenAI(
        base_url=provider.base_url, api_key="k", max_retries=0, billing=billing, customer="ada", pricing=MICRO
    ) as client:
        yield client


def test_call(client, provider, billing):
    """A call costs what its reported usage does at the provider's prices."""
    provider.answer(input_tokens=1000, output_tokens=100)
    client.responses.create(model="gpt-5-mini", input="Hi")

    cost = dollars("gpt-5-mini", input_tokens=1000, output_tokens=100)

    assert [(ceil(cost * 10**6), "reported")] == [(event.amount, event.basis) for event in billing.usage_events()]


def test_unknown_call(client, provider, billing):
    """An unknown model is refused before the call: nothing is sent, nothing held."""
    with pytest.raises(PriceUnknownError, match="knows no model 'gpt-2' of provider 'openai'"):
        client.responses.create(model="gpt-2", input="Hi")

    assert [] == provider.requests
    assert ([], []) == (list(billing.holds(state="open")), list(billing.usage_events()))


def test_unknown_answer(client, provider, billing):
    """Where a gateway answers by a name that nobody knows, the hold is charged, and the event says so."""
    body = {"model": "gpt-5-mini", "input": "Hi", "max_output_tokens": 100}
    held = MICRO.hold(bound_usage(DOORS["/responses"], Request("responses", "gpt-5-mini", body, False), 4096))
    for usage in ("asked", "never"):
        provider.answer(model="house-blend", usage=usage)
        client.responses.create(**body)

    assert [(held, "held", "house-blend")] * 2 == [
        (event.amount, event.basis, event.usage.model) for event in billing.usage_events()
    ]


def test_estimate(client, provider, billing):
    """An `estimate` stands in for the hold where only the answer names a known model, such as behind a deployment's name."""
    provider.answer(model="gpt-5-mini-2025-08-07", input_tokens=1000, output_tokens=100)
    client.with_billing(pricing=MICRO, estimate=lambda request: 500).responses.create(model="own-name", input="Hi")

    cost = dollars("gpt-5-mini", input_tokens=1000, output_tokens=100)

    assert [ceil(cost * 10**6)] == [event.amount for event in billing.usage_events()]


def test_cap_output(client, provider):
    """`cap_output` sends the limit that the hold is for."""
    capped = per_cost(credits_per_usd=1000, cap_output=True)
    client.with_billing(pricing=capped).responses.create(model="gpt-5-mini", input="Hi")

    assert [4096] == [request.body["max_output_tokens"] for request in provider.requests]


# ---- arguments ----


@pytest.mark.parametrize(
    "value",
    [0.5, 1000.0, 0, -1, True, "1000", None, Decimal(0), Decimal("NaN"), Decimal("1e-99"), Decimal("1e400"), 2**53],
    ids=repr,
)
def test_bad_rate(value):
    """A float is refused, because 0.1 is not a tenth; so is what would make calls free, or is no number."""
    with pytest.raises(ValueError, match="credits_per_usd must be an int or a Decimal above 0, not "):
        per_cost(credits_per_usd=value)


def test_bad_provider():
    """A provider that genai-prices does not know is an error when the pricing is made."""
    with pytest.raises(ValueError, match="knows no provider 'opanai'"):
        per_cost(credits_per_usd=1, provider="opanai")


def test_any_provider():
    """Without a provider the model's name says which."""
    anybody = per_cost(credits_per_usd=10**6, provider=None)
    cost = dollars("claude-sonnet-4-5", provider="anthropic", input_tokens=100)

    assert ceil(cost * 10**6) == anybody.charge(Usage(model="claude-sonnet-4-5", input_tokens=100))
    with pytest.raises(PriceUnknownError, match="knows no model 'house-blend' by that name"):
        anybody.hold(Usage(model="house-blend", input_tokens=1))


def test_repr():
    """A pricing says what it is, for errors."""
    assert "per_cost(credits_per_usd=Decimal('0.5'), provider='azure')" == repr(
        per_cost(credits_per_usd=Decimal("0.5"), provider="azure")
    )


def test_without_genai_prices(monkeypatch):
    """Without genai-prices the module can be imported, and says which extra is missing when it is used."""
    for name in [name for name in sys.modules if name.split(".")[0] == "genai_prices"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "genai_prices", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'metered-ai\[prices\]'"):
        per_cost(credits_per_usd=1)
