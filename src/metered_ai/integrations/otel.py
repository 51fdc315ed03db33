"""
Metrics and spans for OpenTelemetry (extra `otel`).

```python
instrument(client.billing)  # to the providers that your application has set up
```

Names follow the GenAI semantic conventions (https://github.com/open-telemetry/semantic-conventions-genai); what is ours begins with
`metered_ai.`. No span or metric carries a prompt, an answer or a key, and no metric a customer.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import SpanKind, Status, StatusCode

from .. import taps
from ..core.steps import Place, Record, Release, Revoke, Settle, Settled
from ..errors import BillingUnavailableError, ConfigurationError
from ..records import Hold
from .observed import observe

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider

    from ..billing import Billing
    from ..context import Receipt
    from ..core.call import Ended, Plan
    from ..core.observe import Observation as Seen
    from ..core.steps import Step, StepResult
    from ..ledger import Recovery
    from ..settling import End

__all__ = ["instrument"]

_NAME = "metered_ai"

_OPERATIONS = {
    "chat.completions": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
_API_TYPES = {"chat.completions": "chat_completions", "responses": "responses"}


def instrument(
    billing: Billing,
    *,
    spans: bool = True,
    provider: str = "openai",
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """
    Report what a billing does, from now on: metrics of its ledger in this process, and a span for each metered call.

    `spans=False` leaves spans to another instrumentation of the SDK, so that no call is counted twice. `provider` is what
    `gen_ai.provider.name` says, such as "azure.ai.openai". The providers default to the global ones. ConfigurationError where it was
    switched on before. A billing that is not instrumented pays nothing for it.
    """
    if billing in _instrumented:
        raise ConfigurationError(f"{billing!r} is instrumented already")
    _instrumented.add(billing)
    meters = _Metrics(billing, metrics.get_meter(_NAME, meter_provider=meter_provider))
    observe(billing, meters)
    if spans:
        tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
        billing._call_kind = partial(_TracedCall, tracer, provider)


_instrumented: weakref.WeakSet[Billing] = weakref.WeakSet()


class _Metrics:
    """
    The metrics of one billing in this process.

    Holds and debts are kept by their ids here and counted when they are asked for, so that a hold whose end is told twice, or late, is
    never counted twice.
    """

    def __init__(self, billing: Billing, meter: metrics.Meter) -> None:
        self._billing = weakref.ref(billing)
        self._pid = os.getpid()
        self._holds: dict[str, tuple[str, int]] = {}
        self._in_debt: set[tuple[str, str]] = set()
        self._refused = meter.create_counter(
            "metered_ai.calls.refused", "{call}", "Calls that were refused before anything was sent"
        )
        self._settled = meter.create_counter("metered_ai.calls.settled", "{call}", "Usage events recorded")
        self._credits = meter.create_counter("metered_ai.credits.charged", "{credit}", "Credits charged")
        self._released = meter.create_counter("metered_ai.calls.released", "{call}", "Holds given back")
        self._in_doubt = meter.create_counter(
            "metered_ai.calls.in_doubt", "{call}", "Answers nobody got: the provider may have worked for nothing"
        )
        self._duration = meter.create_histogram(
            "metered_ai.ledger.duration",
            "s",
            "Time from asking the ledger for a step to its answer",
            explicit_bucket_boundaries_advisory=[
                *(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
            ],
        )
        meter.create_observable_up_down_counter(
            "metered_ai.holds.in_flight", [self._count_holds], "{hold}", "Open holds of this process"
        )
        meter.create_observable_up_down_counter(
            "metered_ai.debt", [self._sum_debts], "{credit}", "Debt of accounts that this process took into debt"
        )
        meter.create_observable_gauge(
            "metered_ai.outbox.age", [self._outbox_age], "s", "Age of the oldest usage event not yet delivered"
        )
        meter.create_observable_up_down_counter(
            "metered_ai.spool.waiting", [self._count_waiting], "{settle}", "Settles that wait for the ledger"
        )

    # What is told.

    def stepped(self, step: Step, outcome: StepResult | Exception, seconds: float, /) -> None:
        self._duration.record(seconds, _with_error({"metered_ai.step": type(step).__name__.lower()}, outcome))
        if isinstance(step, Place):
            self._placed(step, outcome)
        elif isinstance(step, Settle):
            self._ended(step, outcome)
        elif isinstance(step, Release):
            if not isinstance(outcome, Exception) and self._here().pop(step.hold_id, None) is not None:
                of = {"metered_ai.meter": step.meter, "metered_ai.release.reason": step.reason}
                self._released.add(1, of)
                if step.sent == "unknown":
                    self._in_doubt.add(1, {"metered_ai.meter": step.meter})
        elif isinstance(step, Record | Revoke) and not isinstance(outcome, Exception):
            self._in_debt.add((step.customer, step.meter))

    def recovered(self, found: Recovery, /) -> None:
        self._released.add(found.released, {"metered_ai.release.reason": "expired"})
        self._in_doubt.add(found.in_doubt)

    def _placed(self, step: Place, outcome: StepResult | Exception) -> None:
        if isinstance(outcome, Hold):
            self._here()[step.hold_id] = step.meter, outcome.amount
        elif isinstance(outcome, Exception):
            self._refused.add(1, _with_error({"metered_ai.meter": step.meter}, outcome))

    def _ended(self, step: Settle, outcome: StepResult | Exception) -> None:
        if not isinstance(outcome, Settled):
            return
        _, held = self._here().pop(step.hold_id, (step.meter, 0))
        event = outcome.event
        of = {"metered_ai.meter": step.meter, "metered_ai.outcome": outcome.outcome, "metered_ai.basis": step.basis}
        self._settled.add(1, of)
        if outcome.outcome in ("settled", "late", "corrected"):
            self._credits.add(event.amount, {"metered_ai.meter": step.meter})
            if event.amount > held:
                # Only then can it have made debt.
                self._in_debt.add((step.customer, step.meter))

    def _here(self) -> dict[str, tuple[str, int]]:
        """The open holds of this process; after a fork the parent's are the parent's."""
        if self._pid != os.getpid():
            self._pid, self._holds, self._in_debt = os.getpid(), {}, set()
        return self._holds

    # What is asked for, by whoever collects.

    def _count_holds(self, _: CallbackOptions) -> Iterable[Observation]:
        return _by_meter([(meter, 1) for meter, _ in list(self._here().values())])

    def _sum_debts(self, _: CallbackOptions) -> Iterable[Observation]:
        billing = self._billing()
        self._here()
        debts: list[tuple[str, int]] = []
        if billing is not None and billing._is_open:
            for customer, meter in list(self._in_debt):
                try:
                    debt = billing.ledger.balance(customer, meter).debt
                except BillingUnavailableError:
                    return []
                if debt:
                    debts.append((meter, debt))
                else:
                    self._in_debt.discard((customer, meter))
        return _by_meter(debts)

    def _outbox_age(self, _: CallbackOptions) -> Iterable[Observation]:
        billing = self._billing()
        # Where a remote service is told of the usage, and nowhere else.
        if billing is None or not billing._is_open or getattr(billing.ledger, "service", None) is None:
            return []
        return [Observation(billing.outbox_summary().oldest or 0.0)]

    def _count_waiting(self, _: CallbackOptions) -> Iterable[Observation]:
        billing = self._billing()
        if billing is None or billing._opened is None:
            return []
        return [Observation(sum(1 for kept in list(billing._opened[1]._kept) if isinstance(kept.end.step, Settle)))]


class _TracedCall(taps.LiveCall):
    """A metered call with a span of its own, from before its hold to its one end."""

    __slots__ = ("_span",)

    def __init__(
        self, tracer: Tracer, provider: str, billing: Billing, plan: Plan, receipts: tuple[Receipt, ...]
    ) -> None:
        super().__init__(billing, plan, receipts)
        door, request = plan.door.name, plan.request
        operation = _OPERATIONS.get(door, door)
        self._span = tracer.start_span(
            f"{operation} {request.model}" if request.model else operation,
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": provider,
                **_asked(request.model, request.stream, request.body),
                **({"openai.api.type": _API_TYPES[door]} if door in _API_TYPES else {}),
                "metered_ai.customer": plan.customer,
                "metered_ai.meter": plan.meter,
                "metered_ai.hold.id": self.hold_id,
                "metered_ai.hold.amount": plan.amount,
            },
        )

    def place(self) -> None:
        try:
            super().place()
        except BaseException as error:
            self._failed(type(error).__qualname__)
            raise

    async def aplace(self) -> None:
        try:
            await super().aplace()
        except BaseException as error:
            self._failed(type(error).__qualname__)
            raise

    def _decide(self, ended: Ended, seen: Seen | None) -> Settle | Release:
        step = super()._decide(ended, seen)
        if self._span.is_recording():
            self._span.set_attributes(_recorded(step) if isinstance(step, Settle) else _given_back(step))
            if seen is not None and seen.id:
                self._span.set_attribute("gen_ai.response.id", seen.id)
        return step

    def end(self, ended: Ended, content_type: str = "") -> End:
        end = super().end(ended, content_type)
        if ended in ("answered", "stopped", "held") and isinstance(end.step, Settle):
            self._span.end()
        else:
            # In the caller's thread that is what its call raises; elsewhere nothing is being raised.
            error = sys.exception()
            self._failed(ended if error is None else type(error).__qualname__)
        return end

    def _failed(self, kind: str) -> None:
        # By its name only: what a provider's error says may quote the prompt.
        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _asked(model: str | None, stream: bool, body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"gen_ai.request.model": model}
    if stream:
        found["gen_ai.request.stream"] = True
    for key, name in _SETTINGS:
        value = body.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.setdefault(key, value)
    return {key: value for key, value in found.items() if value is not None}


_SETTINGS = (
    ("gen_ai.request.max_tokens", "max_output_tokens"),
    ("gen_ai.request.max_tokens", "max_completion_tokens"),
    ("gen_ai.request.max_tokens", "max_tokens"),
    ("gen_ai.request.temperature", "temperature"),
    ("gen_ai.request.top_p", "top_p"),
    ("gen_ai.request.choice.count", "n"),
)


def _recorded(step: Settle) -> dict[str, Any]:
    found: dict[str, Any] = {
        "metered_ai.outcome": "settled",
        "metered_ai.amount": step.amount,
        "metered_ai.basis": step.basis,
        "metered_ai.transaction_id": step.transaction_id,
    }
    usage = step.usage
    if usage is not None:
        found |= {
            "gen_ai.response.model": usage.model,
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_input_tokens,
            "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
        }
    return {key: value for key, value in found.items() if value is not None}


def _given_back(step: Release) -> dict[str, Any]:
    return {"metered_ai.outcome": "released", "metered_ai.release.reason": step.reason}


def _with_error(attributes: dict[str, str], outcome: object) -> dict[str, str]:
    return {**attributes, "error.type": type(outcome).__qualname__} if isinstance(outcome, Exception) else attributes


def _by_meter(counts: list[tuple[str, int]]) -> list[Observation]:
    sums: dict[str, int] = {}
    for meter, count in counts:
        sums[meter] = sums.get(meter, 0) + count
    return [Observation(count, {"metered_ai.meter": meter}) for meter, count in sums.items()]
