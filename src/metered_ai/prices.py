"""Prices in dollars, as genai-prices knows them, turned into credits. Needs the extra `prices`; nothing here uses the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Context, Decimal, Inexact, InvalidOperation, localcontext
from typing import TYPE_CHECKING, NamedTuple

from .core.endpoints import Door
from .core.pricing import Pricing
from .errors import ConfigurationError, PriceUnknownError
from .records import MAX_AMOUNT, Usage

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice, TieredPrices

__all__ = ["per_cost"]

# Enough for every price and count there is, whatever the caller's own context; what does not fit raises.
_EXACT = Context(prec=300, traps=[Inexact, InvalidOperation])
_ZERO = Decimal(0)
_LONGEST_CALL = timedelta(hours=2)
_DATE = re.compile(r"-\d{4}-\d{2}-\d{2}$")

# What of a model's prices a usage tells; pictures only at the doors that read or make nothing else.
_TOLD = frozenset(
    {
        "input_mtok",
        "cache_read_mtok",
        "cache_write_mtok",
        "cache_write_5m_mtok",
        "cache_write_1h_mtok",
        "output_mtok",
        "output_reasoning_mtok",
        "input_audio_mtok",
        "cache_audio_read_mtok",
        "output_audio_mtok",
        "requests_kcount",
    }
)
_PICTURES = frozenset({"input_image_mtok", "cache_image_read_mtok", "output_image_mtok"})
# Fees of hosted tools depend on what the model does with them; they are no part of a token price.
_FEES = frozenset(
    {"web_searches_kcount", "storage_searches_kcount", "social_searches_kcount", "code_executions_kcount"}
)


class _Rates(NamedTuple):
    """Dollars for a million tokens, at one size of the input; `call` is for a thousand requests."""

    input: Decimal
    cached: Decimal
    cache_write: Decimal
    output: Decimal
    reasoning: Decimal
    audio_input: Decimal
    audio_cached: Decimal
    audio_output: Decimal
    call: Decimal

    @property
    def audio_extras(self) -> tuple[Decimal, Decimal, Decimal]:
        """What a token costs more for being audio: written, read, read from the cache."""
        return self.audio_output - self.output, self.audio_input - self.input, self.audio_cached - self.cached


class _PerCost(Pricing):
    __slots__ = ("_credits_per_usd", "_provider", "cap_output")

    def __init__(self, credits_per_usd: int | Decimal, provider: str | None, cap_output: bool) -> None:
        self._credits_per_usd = credits_per_usd
        self._provider = provider
        self.cap_output = cap_output

    def __repr__(self) -> str:
        return f"per_cost(credits_per_usd={self._credits_per_usd!r}, provider={self._provider!r})"

    def can_price(self, door: Door) -> bool:
        # A grader tells one total of input and output; decisions have prices of their own, and no rate for their output.
        is_apart = door.reads in ("grader", "decision")
        return not is_apart and ("input_tokens" in door.reports or "output_tokens" in door.reports)

    def can_charge(self, usage: Usage) -> bool:
        return usage.input_tokens is not None or usage.output_tokens is not None

    def hold(self, bound: Usage) -> int:
        read, wrote, audio = bound.input_tokens or 0, bound.output_tokens or 0, bound.audio_tokens or 0
        now = datetime.now(UTC)
        costs: list[Decimal] = []
        with localcontext(_EXACT):
            # A price may change with the hour, and the provider may serve a lower tier than it was asked for.
            for moment in (now, now + _LONGEST_CALL):
                for tier in {None, bound.service_tier}:
                    price = self._price(bound, moment, tier)
                    for size in _sizes(price, read):
                        rates = _rates(price, bound, size)
                        costs.append(
                            size * max(rates.input, rates.cached, rates.cache_write)
                            + wrote * max(rates.output, rates.reasoning)
                            + audio * max(_ZERO, *rates.audio_extras)
                            + rates.call * 1000
                        )
            return self._credits(max(costs))

    def charge(self, usage: Usage) -> int:
        read, wrote = usage.input_tokens or 0, usage.output_tokens or 0
        # Parts larger than the whole would make the rest negative.
        cached = min(usage.cached_input_tokens or 0, read)
        cache_write = min(usage.cache_write_tokens or 0, read - cached)
        reasoning = min(usage.reasoning_tokens or 0, wrote)
        fresh = read - cached - cache_write
        with localcontext(_EXACT):
            rates = _rates(self._price(usage, datetime.now(UTC), usage.service_tier), usage, read)
            cost = (
                fresh * rates.input
                + cached * rates.cached
                + cache_write * rates.cache_write
                + (wrote - reasoning) * rates.output
                + reasoning * rates.reasoning
                + rates.call * 1000
            )
            # A usage tells audio read and written as one number, and not what of it was cached: take the dearest it can have been.
            audio = usage.audio_tokens or 0
            for extra, room in sorted(zip(rates.audio_extras, (wrote - reasoning, fresh, cached), strict=True))[::-1]:
                part = min(audio, room)
                cost += part * extra
                audio -= part
            return self._credits(cost)

    def _credits(self, cost: Decimal) -> int:
        """Credits for so many millionths of a dollar."""
        exact = cost * self._credits_per_usd * Decimal("1e-6")
        return min(int(exact.to_integral_value(ROUND_CEILING)), MAX_AMOUNT)

    def _price(self, usage: Usage, moment: datetime, tier: str | None) -> ModelPrice:
        """What the model costs at that moment and tier. PriceUnknownError if nobody knows, or if it depends on what no usage tells."""
        model = usage.model
        if not model:
            raise PriceUnknownError("no model is named, so nobody knows its price: give the call an amount=")
        price = self._find(model, moment, tier) or self._find(_DATE.sub("", model), moment, tier)
        if price is None:
            raise PriceUnknownError(
                f"genai-prices knows no model {model!r} "
                f"{'by that name' if self._provider is None else f'of provider {self._provider!r}'}: "
                f"give the call an amount= or a pricing of your own"
            )

        told = _TOLD | _FEES | (_PICTURES if _is_drawn(usage) else frozenset())
        untold = sorted({name for name, rate in vars(price).items() if rate is not None} - told)
        if untold:
            raise PriceUnknownError(f"the price of model {model!r} has {', '.join(untold)}, which no usage tells")
        for what, tokens, rate in (
            ("input", usage.input_tokens, price.input_mtok),
            ("output", usage.output_tokens, price.output_mtok),
        ):
            if tokens and rate is None:
                raise PriceUnknownError(f"genai-prices has no price for the {what} of model {model!r}")
        return price

    def _find(self, model: str, moment: datetime, tier: str | None) -> ModelPrice | None:
        from genai_prices import Usage as Counts
        from genai_prices import calc_price

        context = {"service_tier": tier} if tier else None
        try:
            return calc_price(
                Counts(), model, provider_id=self._provider, genai_request_timestamp=moment, price_context=context
            ).model_price
        except LookupError:
            return None


def _sizes(price: ModelPrice, read: int) -> Iterator[int]:
    """The most input that each tier of the price allows, as far as the input can reach: beyond it, every token costs another rate."""
    starts = {tier.start for rate in vars(price).values() for tier in getattr(rate, "tiers", ())}
    yield from (start for start in starts if start < read)
    yield read


def _rates(price: ModelPrice, usage: Usage, size: int) -> _Rates:
    """The rates for an input of this size. What has no rate of its own costs as what it is a part of."""

    def rate(name: str, otherwise: Decimal = _ZERO) -> Decimal:
        given: Decimal | TieredPrices | None = getattr(price, name)
        if given is None:
            return otherwise
        if isinstance(given, Decimal):
            return given
        return next((tier.price for tier in reversed(given.tiers) if size > tier.start), given.base)

    read, wrote = rate("input_mtok"), rate("output_mtok")
    cached = rate("cache_read_mtok", read)
    heard = rate("input_audio_mtok", read)
    heard_cached = rate("cache_audio_read_mtok", cached if price.input_audio_mtok is None else heard)
    rates = _Rates(
        input=read,
        cached=cached,
        cache_write=rate("cache_write_mtok", read),
        output=wrote,
        reasoning=rate("output_reasoning_mtok", wrote),
        audio_input=heard,
        audio_cached=heard_cached,
        audio_output=rate("output_audio_mtok", wrote),
        call=rate("requests_kcount"),
    )
    if not _is_drawn(usage):
        return rates

    # A usage does not tell pictures from text: all of it may have been pictures. Only a prompt has none.
    output = max(wrote, rate("output_image_mtok", wrote))
    rates = rates._replace(output=output, reasoning=output)
    if usage.endpoint == "images.generations":
        return rates
    seen = rate("input_image_mtok", read)
    seen_cached = rate("cache_image_read_mtok", cached if price.input_image_mtok is None else seen)
    return rates._replace(
        input=max(read, seen),
        cached=max(cached, seen_cached),
        cache_write=max(rates.cache_write, seen),
    )


def _is_drawn(usage: Usage) -> bool:
    return usage.endpoint is not None and usage.endpoint.startswith("images.")


def per_cost(*, credits_per_usd: int | Decimal, provider: str | None = "openai", cap_output: bool = False) -> Pricing:
    """
    A price by the provider's own: credits are the dollars that a call costs times `credits_per_usd`, rounded up once.

    Rates, their tiers and dates are those of the installed genai-prices, for the model and service tier that answered; before the
    call, for the requested model, at the dearest rates that may apply. `provider` is one that genai-prices knows; None: by the
    model's name. A dated model without rates of its own costs as the model without the date. Any other unknown model is a
    PriceUnknownError before the call; where only the answer names it, the hold is charged. Fees of hosted tools are not included.

    ValueError for a float (0.1 is not a tenth), for what is not above 0, and for an unknown provider; ConfigurationError without
    genai-prices.
    """
    try:
        from genai_prices.data_snapshot import get_snapshot
    except ImportError as error:
        raise ConfigurationError("per_cost needs genai-prices: pip install 'metered-ai[prices]'") from error

    if not _is_rate(credits_per_usd):
        raise ValueError(f"credits_per_usd must be an int or a Decimal above 0, not {credits_per_usd!r}")
    # The rates are loaded here, so that the first call does not wait for them.
    snapshot = get_snapshot()
    if provider is not None:
        try:
            snapshot.find_provider(None, provider, None)
        except LookupError as error:
            raise ValueError(f"genai-prices knows no provider {provider!r}") from error
    return _PerCost(credits_per_usd, provider, bool(cap_output))


def _is_rate(value: object) -> bool:
    if type(value) is int:
        return 0 < value <= MAX_AMOUNT
    # An absurd exponent would make numbers of a million digits.
    return (
        isinstance(value, Decimal)
        and value.is_finite()
        and 0 < value <= MAX_AMOUNT
        and value.adjusted() >= -30
        and len(value.as_tuple().digits) <= 60
    )
