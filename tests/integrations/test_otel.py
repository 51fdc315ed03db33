"""OpenTelemetry: what is reported is what the ledger has, and nothing that a customer or a provider has said."""

from __future__ import annotations

import asyncio
import gc
import time

import openai
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from metered_ai import Billing, ConfigurationError, InsufficientCreditsError, connect, per_token
from metered_ai.integrations.otel import instrument
from metered_ai.taps import LiveCall
from tests.delivery.tab import Tab

PROMPT, ANSWER, KEY = "the prompt is a secret", "the answer is a secret", "sk-the-key-is-a-secret"
ASK = {"model": "gpt-5-mini", "input": PROMPT}


class Telemetry:
    """What an application's own providers would have exported."""

    def __init__(self):
        self._reader = InMemoryMetricReader()
        self._exporter = InMemorySpanExporter()
        self.meter_provider = MeterProvider([self._reader])
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def providers(self):
        return {"meter_provider": self.meter_provider, "tracer_provider": self.tracer_provider}

    @property
    def spans(self):
        return list(self._exporter.get_finished_spans())

    def points(self):
        data = self._reader.get_metrics_data()
        return [
            (metric.name, dict(point.attributes), point)
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        ]

    def values(self, *names):
        """Sums over all attributes, by metric."""
        sums = dict.fromkeys(names, 0)
        for name, _, point in self.points():
            if name in sums:
                sums[name] += point.value
        return sums


@pytest.fixture
def telemetry(shop):
    telemetry = Telemetry()
    instrument(shop.billing, **telemetry.providers)
    return telemetry


ALL = [
    "metered_ai.calls.refused",
    "metered_ai.calls.settled",
    "metered_ai.calls.released",
    "metered_ai.calls.in_doubt",
    "metered_ai.credits.charged",
    "metered_ai.holds.in_flight",
    "metered_ai.debt",
]


def test_metrics(telemetry, shop):
    """Every end of a call is counted once: settled, refused, released, in doubt; and the credits are those of the ledger."""
    shop.grant("ada", 3)
    client = shop.client(customer="ada")
    client.responses.create(**ASK)
    with client.responses.create(**ASK, stream=True) as stream:
        next(iter(stream))
        assert 1 == telemetry.values("metered_ai.holds.in_flight")["metered_ai.holds.in_flight"]
    shop.provider.answer(status=500)
    with pytest.raises(openai.InternalServerError):
        client.responses.create(**ASK)
    shop.provider.answer(reset=True)
    with pytest.raises(openai.APIConnectionError):
        client.responses.create(**ASK)
    client.responses.create(**ASK)
    with pytest.raises(InsufficientCreditsError):
        client.responses.create(**ASK)
    shop.billing.flush()

    assert {
        "metered_ai.calls.refused": 1,
        "metered_ai.calls.settled": 3,
        "metered_ai.calls.released": 2,
        "metered_ai.calls.in_doubt": 1,
        "metered_ai.credits.charged": 3,
        "metered_ai.holds.in_flight": 0,
        "metered_ai.debt": 0,
    } == telemetry.values(*ALL)
    assert 3 == sum(event.amount for event in shop.events())
    steps = {
        attributes["metered_ai.step"]: point.count
        for name, attributes, point in telemetry.points()
        if name == "metered_ai.ledger.duration" and "error.type" not in attributes
    }
    assert {"addgrant": 1, "place": 5, "settle": 3, "release": 2} == steps


def test_debt(telemetry, shop):
    """Debt appears when a call costs more than its hold and the balance, and goes when it is paid."""
    shop.grant("ada", 5)
    client = shop.client(customer="ada", pricing=per_token(input=0, output=1)).with_billing(estimate=lambda _: 5)
    shop.provider.answer(output_tokens=12)
    client.responses.create(**ASK)

    assert 7 == shop.balance("ada").debt == telemetry.values("metered_ai.debt")["metered_ai.debt"]
    shop.grant("ada", 10)
    assert 0 == telemetry.values("metered_ai.debt")["metered_ai.debt"]


def test_async(telemetry, shop):
    """Ten async calls at once, two of them cancelled, leave no hold in flight and a span each."""
    shop.grant("ada", 20)

    async def main():
        async with shop.async_client(customer="ada") as client:
            calls = [asyncio.ensure_future(client.responses.create(**ASK)) for _ in range(10)]
            await asyncio.gather(*calls[:8])
            for call in calls[8:]:
                call.cancel()
            return await asyncio.gather(*calls[8:], return_exceptions=True)

    asyncio.run(main())
    shop.billing.flush()
    values = telemetry.values(*ALL)

    assert (0, len(shop.events())) == (values["metered_ai.holds.in_flight"], values["metered_ai.calls.settled"])
    assert 10 == len(telemetry.spans)


def test_span(telemetry, shop):
    """A call's span has the names of the GenAI conventions, the ledger's numbers, and the caller's span as its parent."""
    shop.grant("ada", 1)
    with telemetry.tracer_provider.get_tracer("app").start_as_current_span("request") as parent:
        response = shop.client(customer="ada").responses.create(**ASK, max_output_tokens=50, temperature=0.5)
    span = telemetry.spans[0]
    event = shop.events()[0]

    assert ("chat gpt-5-mini", trace.SpanKind.CLIENT) == (span.name, span.kind)
    assert parent.get_span_context().span_id == span.parent.span_id
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-5-mini",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": response.id,
        "gen_ai.response.model": response.model,
        "gen_ai.usage.input_tokens": event.usage.input_tokens,
        "gen_ai.usage.output_tokens": event.usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.cache_creation.input_tokens": 0,
        "gen_ai.usage.reasoning.output_tokens": 0,
        "openai.api.type": "responses",
        "metered_ai.customer": "ada",
        "metered_ai.meter": "generations",
        "metered_ai.hold.id": event.hold_id,
        "metered_ai.hold.amount": 1,
        "metered_ai.outcome": "settled",
        "metered_ai.amount": 1,
        "metered_ai.basis": "reported",
        "metered_ai.transaction_id": event.transaction_id,
    } == dict(span.attributes)


def test_conventional_names(telemetry, shop):
    """Every `gen_ai.` name is one of the conventions' own, and none that they have replaced."""
    shop.grant("ada", 9)
    client = shop.client(customer="ada")
    client.responses.create(**ASK)
    client.chat.completions.create(model="gpt-5-mini", messages=[{"role": "user", "content": PROMPT}], n=2)
    client.embeddings.create(model="text-embedding-3-small", input=PROMPT)
    list(client.completions.create(model="gpt-3.5-turbo-instruct", prompt=PROMPT, stream=True))
    shop.billing.flush()
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    replaced = {"gen_ai.system", "gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens"}
    used = {name for span in telemetry.spans for name in span.attributes if name.startswith("gen_ai.")}

    assert set() == used - known | used & replaced
    assert [
        "chat gpt-5-mini",
        "chat gpt-5-mini",
        "embeddings text-embedding-3-small",
        "text_completion gpt-3.5-turbo-instruct",
    ] == [span.name for span in telemetry.spans]


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        ({"status": 500}, "InternalServerError", "provider_error"),
        ({"reset": True}, "APIConnectionError", "unknown"),
        ({"status": 429}, "RateLimitError", "provider_error"),
    ],
)
def test_failed(answer, error, reason, telemetry, shop):
    """A call that fails ends its span with what its caller saw raised."""
    shop.grant("ada", 1)
    shop.provider.answer(**answer)
    with pytest.raises(getattr(openai, error)):
        shop.client(customer="ada").responses.create(**ASK)
    span = telemetry.spans[0]

    assert (error, trace.StatusCode.ERROR) == (span.attributes["error.type"], span.status.status_code)
    assert ("released", reason) == (
        span.attributes["metered_ai.outcome"],
        span.attributes["metered_ai.release.reason"],
    )


def test_refused(telemetry, shop):
    """A refused call has a span that says so; nothing of it was sent."""
    with pytest.raises(InsufficientCreditsError):
        shop.client(customer="ada").responses.create(**ASK)
    span = telemetry.spans[0]

    assert ("InsufficientCreditsError", trace.StatusCode.ERROR) == (
        span.attributes["error.type"],
        span.status.status_code,
    )
    assert "metered_ai.outcome" not in span.attributes


@pytest.mark.parametrize("ending", ["closed", "dropped", "exhausted"])
def test_stream(ending, telemetry, shop):
    """A stream's span ends when the stream does, however that is."""
    shop.grant("ada", 1)
    stream = shop.client(customer="ada").responses.create(**ASK, stream=True)
    next(iter(stream))

    assert [] == telemetry.spans
    if ending == "closed":
        stream.close()
    elif ending == "exhausted":
        list(stream)
    del stream
    gc.collect()
    shop.billing.flush()
    assert [True] == [span.attributes["gen_ai.request.stream"] for span in telemetry.spans]
    assert ["settled"] == [span.attributes["metered_ai.outcome"] for span in telemetry.spans]


def test_no_secrets(telemetry, shop):
    """No span and no metric has a word of a prompt, an answer or a key, however the call ends."""
    shop.grant("ada", 9)
    client = shop.client(customer="ada", api_key=KEY)
    for answer in ({"text": ANSWER}, {"status": 400, "body": {"error": {"message": PROMPT}}}, {"cut_bytes": 30}):
        shop.provider.answer(**answer)
        try:
            client.chat.completions.create(model="gpt-5-mini", messages=[{"role": "user", "content": PROMPT}])
        except openai.OpenAIError:
            continue
    shop.billing.flush()
    told = "".join(span.to_json() for span in telemetry.spans) + repr(telemetry.points())

    assert 3 == len(telemetry.spans)
    assert [] == [secret for secret in (PROMPT, ANSWER, KEY) if secret in told]
    assert [] == [name for name, attributes, _ in telemetry.points() if "ada" in map(str, attributes.values())]


def test_off(shop):
    """Without `instrument` a call is a plain one and nothing stands around the ledger; with `spans=False` no span is made."""
    shop.grant("ada", 2)
    shop.client(customer="ada").responses.create(**ASK)

    assert (None, []) == (shop.billing._call_kind, shop.billing._around)
    assert "MemoryLedger" == type(shop.billing.ledger).__name__

    telemetry = Telemetry()
    instrument(shop.billing, spans=False, **telemetry.providers)
    shop.client(customer="ada").responses.create(**ASK)
    assert ([], 1) == (telemetry.spans, telemetry.values("metered_ai.calls.settled")["metered_ai.calls.settled"])
    assert None is shop.billing._call_kind
    assert LiveCall.__module__ == "metered_ai.taps"


def test_twice(telemetry, shop):
    """Switching it on twice would count everything twice, and is refused."""
    with pytest.raises(ConfigurationError, match="instrumented already"):
        instrument(shop.billing, **telemetry.providers)


def test_before_opening(tmp_path, provider):
    """It may be switched on before the ledger is open, and does not open it."""
    telemetry = Telemetry()
    with connect(f"sqlite:///{tmp_path}/credits.db") as billing:
        instrument(billing, **telemetry.providers)

        assert [] == list(tmp_path.iterdir())
        assert {} == telemetry.values()
        billing.grant("ada", "generations", 1, id="order_1")
        assert 1 == sum(point.count for name, _, point in telemetry.points() if name == "metered_ai.ledger.duration")


def test_orphans(tmp_path):
    """Holds of a process that died are counted where they are resolved, those in doubt as such."""
    from metered_ai.core.steps import Place

    telemetry = Telemetry()
    with connect(f"sqlite:///{tmp_path}/credits.db") as billing:
        billing.grant("ada", "generations", 5, id="order_1")
        # As a process leaves it that was killed: nobody renews it.
        billing.ledger.run(Place("h1", "ada", "generations", 1, "o_dead", lease=0.01))
        instrument(billing, **telemetry.providers)
        time.sleep(0.02)
        found = billing.recover()

        assert (1, 1) == (found.released, found.in_doubt)
        assert {"metered_ai.calls.released": 1, "metered_ai.calls.in_doubt": 1} == telemetry.values(
            "metered_ai.calls.released", "metered_ai.calls.in_doubt"
        )


def test_outbox_age(tmp_path):
    """Where a service is told of the usage, the age of what it has not been told yet is reported; nowhere else."""
    telemetry = Telemetry()
    tab = Tab(credits=5)
    tab.fault = lambda _: "again"
    with Billing(f"sqlite:///{tmp_path}/credits.db", service=tab) as billing:
        instrument(billing, **telemetry.providers)
        billing.record("ada", "generations", transaction_id="export_1")

        assert 0 < telemetry.values("metered_ai.outbox.age")["metered_ai.outbox.age"] < 60
        tab.fault = lambda _: None
        while billing.deliver().waiting:
            pass
        assert 0 == telemetry.values("metered_ai.outbox.age")["metered_ai.outbox.age"]

    alone = Telemetry()
    with Billing(f"sqlite:///{tmp_path}/alone.db") as billing:
        instrument(billing, **alone.providers)
        billing.grant("ada", "generations", 1, id="order_1")

        assert "metered_ai.outbox.age" not in {name for name, _, _ in alone.points()}


def test_broken_telemetry(shop, monkeypatch, caplog):
    """Telemetry that fails costs nobody an answer, nor its billing."""
    from metered_ai.integrations import observed

    class Broken:
        def stepped(self, *_):
            raise RuntimeError(PROMPT)

        recovered = stepped

    shop.grant("ada", 1)
    observed.observe(shop.billing, Broken())
    shop.client(customer="ada").responses.create(**ASK)

    assert [1] == [event.amount for event in shop.events()]
    assert "RuntimeError" in caplog.text
    assert PROMPT not in caplog.text
