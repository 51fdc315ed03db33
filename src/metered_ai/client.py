"""
The metered clients: true subclasses of the SDK's, sync and async, OpenAI and Azure.

The way of one call: `request()` → who pays → plan → hold → the SDK → `_process_response()` taps the answer → settle or release.
Both overrides run once per logical call, whatever the SDK retries, and every HTTP door of the SDK goes through them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache, cached_property
from inspect import Parameter, Signature, signature
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, cast

from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

from .billing import Billing, shared
from .context import new_scope, who_pays
from .core.endpoints import Door, access, find, refusal
from .core.payer import NOTHING, Terms, terms
from .errors import ConfigurationError, UnmeteredCallError
from .records import Request
from .urls import billing_url

if TYPE_CHECKING:
    from typing import Self, Unpack

    from .core.call import Plan
    from .core.pricing import PricingLike
    from .options import AsyncAzureOpenAIOptions, AsyncOpenAIOptions, AzureOpenAIOptions, OpenAIOptions
    from .taps import LiveCall

__all__ = ["AsyncMeteredAzureOpenAI", "AsyncMeteredOpenAI", "MeteredAzureOpenAI", "MeteredOpenAI"]

DEFAULT_METER = "generations"

_RAW = "X-Stainless-Raw-Response"

_call: ContextVar[LiveCall | None] = ContextVar("metered_ai_call", default=None)
"""Links `request()` with what the SDK calls below it. Free calls set None, so that a nested one never taps its outer call."""

_left_behind: list[object] = []
"""HTTP clients of a parent process: closing them here would close the parent's connections."""


class _Http:
    """The HTTP client that a client and its copies share. After a fork our own is replaced; the user's cannot be."""

    def __init__(self, client: Any, *, is_ours: bool) -> None:
        self.client = client
        self.is_ours = is_ours
        self.pid = os.getpid()

    def renew(self) -> None:
        """Have an HTTP client for this process, which is not the one that made it. ConfigurationError for the user's own one."""
        if not self.is_ours:
            raise ConfigurationError(
                "this client was made before a fork with your http_client, whose connections belong to the parent; "
                "make a client with an http_client of its own in the child"
            )
        old = self.client
        _left_behind.append(old)
        new = type(old)(base_url=old.base_url, timeout=old.timeout)
        new.event_hooks = old.event_hooks
        self.client, self.pid = new, os.getpid()


class _Metering:
    """What a client knows beyond the SDK's: its billing, its default terms, and the terms of the clients it was derived from."""

    __slots__ = ("_billing", "base", "derived", "is_derived", "meter", "unmetered", "url")

    def __init__(
        self,
        billing: Billing | str | None,
        customer: str | None,
        meter: str,
        pricing: PricingLike | None,
        unmetered: str,
    ) -> None:
        if unmetered not in ("refuse", "allow"):
            raise ConfigurationError(f'unmetered is "refuse" or "allow", not {unmetered!r}')
        if billing is not None and not isinstance(billing, Billing | str):
            raise ConfigurationError(f"billing is a Billing or a URL, not {billing!r}")
        self.base = NOTHING if customer is None and pricing is None else terms(customer=customer, pricing=pricing)
        if meter is not DEFAULT_METER:
            terms(meter=meter)
        self.meter = meter
        self.unmetered = unmetered
        self.derived: tuple[Terms, ...] = ()
        self.is_derived = False
        self._billing = billing if isinstance(billing, Billing) else None
        self.url = None if isinstance(billing, Billing) else billing_url(billing)

    @property
    def billing(self) -> Billing:
        if self._billing is None:
            assert self.url is not None
            self._billing = shared(self.url)
        return self._billing

    def derive(self, new: Terms | None, billing: Billing | str | None, unmetered: str | None) -> _Metering:
        derived = _Metering(
            billing if billing is not None else self.billing, None, self.meter, None, unmetered or self.unmetered
        )
        derived.base = self.base
        derived.derived = self.derived if new is None else (new, *self.derived)
        derived.url = self.url if billing is None else derived.url
        derived.is_derived = True
        return derived

    def begin(self, client: Any, options: Any, stream: bool) -> LiveCall | None:
        """Plan a call; None for one that costs nothing. Raises with nothing sent."""
        http = client._http
        if http.pid != os.getpid():
            http.renew()
        client._client = http.client
        url = options.url
        door = find(options.method, url, None if url.startswith("/") else str(client.base_url))
        if door is None or door.access != "metered":
            self._pass(door, options)
            return None
        body: Mapping[str, Any] | None = options.json_data
        if type(body) is not dict or options.extra_json:
            body = _body(options)
        reason = refusal(door, body, stream) if body is not None else "its body cannot be read before it is sent"
        if body is None or reason is not None:
            self._refuse(door, options, cast("str", reason))
            return None

        plan, live_call = _first_needed()
        payer, receipts = who_pays(self.derived, self.base)
        model = body.get("model")
        billing = self._billing or self.billing
        planned = plan(
            door,
            Request(door.name, model if isinstance(model, str) else None, body, stream),
            payer,
            billing.policies,
            self.meter,
            reads_raw=stream and isinstance(options.headers, Mapping) and options.headers.get(_RAW) == "stream",
        )
        return (billing._call_kind or live_call)(billing, planned, receipts)

    def _pass(self, door: Door | None, options: Any) -> None:
        """A call that is not metered: let it go if it is free."""
        if access(door, options.method) != "free":
            unknown = "it is not in the table of endpoints of this release"
            self._refuse(door, options, door.reason if door is not None else unknown)

    def _refuse(self, door: Door | None, options: Any, reason: str) -> None:
        if self.unmetered == "refuse":
            name = door.name if door is not None else f"{options.method.upper()} {options.url.partition('?')[0]}"
            raise UnmeteredCallError(
                f'{name} cannot be metered: {reason}. Nothing was sent; unmetered="allow" lets it pass, unbilled'
            )


@cache
def _first_needed() -> tuple[Callable[..., Plan], type[LiveCall]]:
    """What only a metered call needs; importing the library does not load it, and a call does not look it up again."""
    from .core.call import plan
    from .taps import LiveCall

    return plan, LiveCall


def _body(options: Any) -> Mapping[str, Any] | None:
    """The body with `extra_body` merged; None where it is a stream, which only the provider will have read."""
    body = options.json_data
    content = getattr(options, "content", None)
    if body is None and content is not None:
        if not isinstance(content, bytes | bytearray | str):
            return None
        import json

        try:
            body = json.loads(content)
        except ValueError:
            body = None
    if not isinstance(body, Mapping):
        body = {}
    return {**body, **options.extra_json} if options.extra_json else body


def _with_additions(options: Any, added: Mapping[str, Any]) -> Any:
    if not isinstance(options.json_data, Mapping):
        return options
    changed = options.model_copy()
    changed.json_data = {**options.json_data, **added}
    if options.extra_json:
        # extra_body wins on the wire, also over what is added.
        changed.extra_json = {key: value for key, value in options.extra_json.items() if key not in added}
    return changed


class _Shared:
    """What the sync and the async clients have in common: no I/O, no await."""

    _metering: _Metering
    _http: _Http

    if not TYPE_CHECKING:

        def __init__(
            self,
            *,
            billing: Billing | str | None = None,
            customer: str | None = None,
            meter: str = DEFAULT_METER,
            pricing: PricingLike | None = None,
            unmetered: Literal["refuse", "allow"] = "refuse",
            **options: Any,
        ) -> None:
            self._metering = _Metering(billing, customer, meter, pricing, unmetered)
            super().__init__(**options)
            self._http = _Http(self._client, is_ours=options.get("http_client") is None)

        def copy(
            self,
            *,
            billing: Billing | str | None = None,
            customer: str | None = None,
            meter: str | None = None,
            amount: int | None = None,
            pricing: PricingLike | None = None,
            estimate: Callable[[Request], int] | None = None,
            price_slug: str | None = None,
            transaction_id: str | None = None,
            properties: Mapping[str, Any] | None = None,
            unmetered: Literal["refuse", "allow"] | None = None,
            **options: Any,
        ) -> Any:
            given = (customer, meter, amount, pricing, estimate, price_slug, transaction_id, properties)
            new = None
            if any(value is not None for value in given):
                new = terms(
                    customer=customer,
                    meter=meter,
                    amount=amount,
                    pricing=pricing,
                    estimate=estimate,
                    price_slug=price_slug,
                    transaction_id=transaction_id,
                    properties=properties,
                    scope=new_scope(),
                )
            metering = self._metering.derive(new, billing, unmetered)
            # The constructor that the SDK's copy calls must not look for a billing of its own.
            extra = {"billing": metering.billing, **options.pop("_extra_kwargs", {})}
            copied = super().copy(**options, _extra_kwargs=extra)
            if hasattr(self, "_azure_endpoint") and options.get("base_url") is None:
                # Older SDKs forget them in a copy, which then asks for what belongs to no deployment at the wrong address.
                copied._azure_endpoint, copied._azure_deployment = self._azure_endpoint, self._azure_deployment
            copied._metering = metering
            copied._strict_response_validation = self._strict_response_validation
            if options.get("http_client") is None:
                copied._http = self._http
            return copied

        @cached_property
        def responses(self) -> Any:
            return self._shut(super().responses)

        @cached_property
        def realtime(self) -> Any:
            return self._shut(super().realtime)

        if hasattr(OpenAI, "live"):

            @cached_property
            def live(self) -> Any:
                return self._shut(super().live)

        @cached_property
        def beta(self) -> Any:
            beta = super().beta
            for name in ("realtime", "responses"):
                self._shut(getattr(beta, name, None))
            return beta

        @cached_property
        def user_agent(self) -> str:
            # The SDK writes the class's name into it; nothing of ours goes on the wire.
            bare = next(kind for kind in type(self).__mro__ if kind.__module__.partition(".")[0] == "openai")
            return f"{bare.__name__}/Python {self._version}"

        def _shut(self, resource: Any) -> Any:
            # Sockets of older SDKs pass no hook at all, so the way to them is shut on the resource.
            if self._metering.unmetered == "refuse" and hasattr(resource, "connect"):
                resource.connect = _refuse_socket
            return resource

    def with_billing(
        self,
        *,
        customer: str | None = None,
        meter: str | None = None,
        amount: int | None = None,
        pricing: PricingLike | None = None,
        estimate: Callable[[Request], int] | None = None,
        price_slug: str | None = None,
        transaction_id: str | None = None,
        properties: Mapping[str, Any] | None = None,
    ) -> Self:
        """
        A client that bills differently, for one call or many; it shares the connection pool and closes nothing.

        What is not given comes from the nearest `bill_to` block or this client. `amount` is a fixed price in credits per call.
        """
        return cast(
            "Self",
            cast("Any", self).copy(
                customer=customer,
                meter=meter,
                amount=amount,
                pricing=pricing,
                estimate=estimate,
                price_slug=price_slug,
                transaction_id=transaction_id,
                properties=properties,
            ),
        )

    @property
    def billing(self) -> Billing:
        """The billing that this client holds and settles with: grants, balances, usage."""
        return self._metering.billing

    def _check_socket(self, options: Any) -> None:
        if self._metering.unmetered == "refuse" and str(options.url).startswith(("ws:", "wss:")):
            _refuse_socket()


def _refuse_socket(*_: object, **__: object) -> None:
    raise UnmeteredCallError(
        "websockets cannot be metered: one connection carries many answers. Nothing was sent; "
        'unmetered="allow" lets it pass, unbilled'
    )


if TYPE_CHECKING:
    # To type checkers a metered client is the SDK's, whose signatures they keep.
    class _SyncMetered(_Shared, OpenAI): ...

    class _AsyncMetered(_Shared, AsyncOpenAI): ...

else:

    class _SyncMetered(_Shared):
        def request(self, cast_to, options, *, stream=False, stream_cls=None):
            call = self._metering.begin(self, options, stream)
            if call is None:
                token = _call.set(None)
                try:
                    return super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
                finally:
                    _call.reset(token)

            token = _call.set(call)
            try:
                call.place()
                if call.plan.add_to_body:
                    options = _with_additions(options, call.plan.add_to_body)
                result = super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
                if call.reader is None:
                    call.finish("answered")
            except BaseException:
                call.finish(call.raised())
                raise
            finally:
                _call.reset(token)
            if call.failed is not None:
                call.check_recorded(result)
            return result

        def _send_request(self, request, **options):
            call = _call.get()
            if call is None:
                return super()._send_request(request, **options)
            call.attempts += 1
            try:
                response = super()._send_request(request, **options)
            except BaseException as error:
                call.not_answered(error)
                raise
            call.reached += 1
            return response

        def _process_response(self, *, response, stream, **options):
            call = _call.get()
            if call is not None:
                call.answered(response, is_stream=stream, is_async=False)
            return super()._process_response(response=response, stream=stream, **options)

        def _prepare_options(self, options):
            self._check_socket(options)
            return super()._prepare_options(options)

        def close(self):
            """Close the HTTP client, and wait for settles if the billing came from a URL. A derived client closes nothing."""
            if self._metering.is_derived:
                return
            super().close()
            if self._metering.url is not None:
                self._metering.billing.flush()

    class _AsyncMetered(_Shared):
        async def request(self, cast_to, options, *, stream=False, stream_cls=None):
            call = self._metering.begin(self, options, stream)
            if call is None:
                token = _call.set(None)
                try:
                    return await super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
                finally:
                    _call.reset(token)

            token = _call.set(call)
            try:
                await call.aplace()
                if call.plan.add_to_body:
                    options = _with_additions(options, call.plan.add_to_body)
                result = await super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
                if call.reader is None:
                    await call.afinish("answered")
            except Exception:
                await call.afinish(call.raised())
                raise
            except BaseException:
                # Cancelled: awaiting would be cancelled again, and the end needs no waiter.
                call.submit(call.raised())
                raise
            finally:
                _call.reset(token)
            if call.failed is not None:
                call.check_recorded(result)
            return result

        async def _send_request(self, request, **options):
            call = _call.get()
            if call is None:
                return await super()._send_request(request, **options)
            call.attempts += 1
            try:
                response = await super()._send_request(request, **options)
            except BaseException as error:
                call.not_answered(error)
                raise
            call.reached += 1
            return response

        # The next two give the SDK's own coroutine: one frame less to go through whenever a call waits.
        def _process_response(self, *, response, stream, **options):
            call = _call.get()
            if call is not None:
                call.answered(response, is_stream=stream, is_async=True)
            return super()._process_response(response=response, stream=stream, **options)

        def _prepare_options(self, options):
            self._check_socket(options)
            return super()._prepare_options(options)

        async def close(self):
            """Close the HTTP client, and wait for settles if the billing came from a URL. A derived client closes nothing."""
            if self._metering.is_derived:
                return
            await super().close()
            if self._metering.url is not None:
                import asyncio

                await asyncio.to_thread(self._metering.billing.flush)


class MeteredOpenAI(_SyncMetered, OpenAI):
    """
    An `openai.OpenAI` that holds the customer's credits before every call that costs, and bills every answer exactly once.

    Takes everything the SDK's client takes, and: `billing` (a `Billing` or a URL; default METERED_AI_BILLING, else a SQLite file),
    `customer` (leave it unset in an app with many tenants), `meter`, `pricing` (default one credit a call), `unmetered`
    ("refuse" or "allow" what cannot be metered). Building it opens nothing.

    Calls raise InsufficientCreditsError, CustomerRequiredError, PriceUnknownError, UnmeteredCallError, AlreadyBilledError or
    BillingUnavailableError before anything is sent; the SDK's own errors pass through untouched.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            billing: Billing | str | None = None,
            customer: str | None = None,
            meter: str = DEFAULT_METER,
            pricing: PricingLike | None = None,
            unmetered: Literal["refuse", "allow"] = "refuse",
            **options: Unpack[OpenAIOptions],
        ) -> None: ...


class AsyncMeteredOpenAI(_AsyncMetered, AsyncOpenAI):
    """The async `MeteredOpenAI`: an `openai.AsyncOpenAI`. The loop never waits for the ledger."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            billing: Billing | str | None = None,
            customer: str | None = None,
            meter: str = DEFAULT_METER,
            pricing: PricingLike | None = None,
            unmetered: Literal["refuse", "allow"] = "refuse",
            **options: Unpack[AsyncOpenAIOptions],
        ) -> None: ...


class MeteredAzureOpenAI(_SyncMetered, AzureOpenAI):
    """`MeteredOpenAI` for Azure: an `openai.AzureOpenAI`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            billing: Billing | str | None = None,
            customer: str | None = None,
            meter: str = DEFAULT_METER,
            pricing: PricingLike | None = None,
            unmetered: Literal["refuse", "allow"] = "refuse",
            **options: Unpack[AzureOpenAIOptions],
        ) -> None: ...


class AsyncMeteredAzureOpenAI(_AsyncMetered, AsyncAzureOpenAI):
    """`AsyncMeteredOpenAI` for Azure: an `openai.AsyncAzureOpenAI`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            billing: Billing | str | None = None,
            customer: str | None = None,
            meter: str = DEFAULT_METER,
            pricing: PricingLike | None = None,
            unmetered: Literal["refuse", "allow"] = "refuse",
            **options: Unpack[AsyncAzureOpenAIOptions],
        ) -> None: ...


def _with_sdk_keywords(ours: Any, theirs: Any) -> Any:
    """A copy of our function that `inspect.signature` shows with the installed SDK's keywords, which it takes as well."""
    shown = FunctionType(ours.__code__, ours.__globals__, ours.__name__, ours.__defaults__, ours.__closure__)
    shown.__kwdefaults__, shown.__doc__ = ours.__kwdefaults__, theirs.__doc__
    keywords = [p for p in signature(ours).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    known = [p for p in signature(theirs).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    shown.__signature__ = Signature([*known, *keywords])  # type: ignore[attr-defined]  # read by inspect
    return shown


if not TYPE_CHECKING:
    for _metered, _bare in (
        (MeteredOpenAI, OpenAI),
        (AsyncMeteredOpenAI, AsyncOpenAI),
        (MeteredAzureOpenAI, AzureOpenAI),
        (AsyncMeteredAzureOpenAI, AsyncAzureOpenAI),
    ):
        _metered.__init__ = _with_sdk_keywords(_Shared.__init__, _bare.__init__)
        # The SDK binds the second name to its own copy, which would build clients without billing.
        _metered.copy = _metered.with_options = _with_sdk_keywords(_Shared.copy, _bare.copy)
