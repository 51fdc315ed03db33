"""
What a call must hold before it is sent, and what it costs after.

The hold of a token price is a bound: text by its UTF-8 bytes, of which no tokenizer makes more tokens, everything else by the
constants below. A charged estimate is never that bound: it is what the text and the media probably were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from math import lcm
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..records import MAX_AMOUNT, Request, Usage
from .checks import check_amount

if TYPE_CHECKING:
    from .endpoints import Door
    from .observe import Observation

__all__ = [
    "AUDIO_TOKENS",
    "CONTEXT_TOKENS",
    "FILE_TOKENS",
    "IMAGE_OUTPUT_TOKENS",
    "IMAGE_TOKENS",
    "REFERENCE_TOKENS",
    "TOOL_TOKENS",
    "Pricing",
    "PricingLike",
    "as_pricing",
    "bound_usage",
    "capped_body",
    "estimated_usage",
    "per_call",
    "per_token",
]

IMAGE_TOKENS = {"low": 256, "high": 4096, "auto": 4096, "original": 16384}
"""Input tokens of one image, by its `detail`; the same whether it is inline, a URL or a file id."""

FILE_TOKENS = 16384
"""Input tokens of one file (a PDF's text and pages) that is given by id, by URL or inline; inline text counts by its bytes instead."""

AUDIO_TOKENS = 18000
"""Input tokens of audio whose length cannot be seen: 30 minutes at 10 tokens a second. Inline audio counts by its size."""

CONTEXT_TOKENS = 16384
"""Input tokens of a conversation that the server holds: `previous_response_id`, `conversation`, a thread."""

REFERENCE_TOKENS = 8192
"""Input tokens of a prompt template or an item that the server holds."""

TOOL_TOKENS = 8192
"""Input tokens that one hosted tool (web or file search, code, an MCP server) may add. Only held, never charged as an estimate."""

IMAGE_OUTPUT_TOKENS = {
    "low": 408,
    "standard": 1584,
    "medium": 1584,
    "high": 6240,
    "hd": 6240,
    "auto": 6240,
    "xhigh": 16384,
    "max": 16384,
}
"""Output tokens of one generated image, by its `quality`. Each partial image adds 100."""

# A second of audio is ten tokens: an MP3 has at least 1,000 bytes for it, uncompressed sound 16,000.
_AUDIO_BYTES = {"wav": 1600, "pcm16": 1600}
_ITEM = 8
_CALL = 64
_MAX_PARTS = 2_000_000

# They steer or label the call and are never shown to the model.
_NOT_TEXT = frozenset(
    {
        "model",
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "service_tier",
        "stream_options",
        "include",
        "encoding_format",
    }
)
_OWN_TOOLS = ("function", "custom")


class Pricing:
    """
    What a call holds before, and costs after, in whole credits of the meter.

    `is_fixed`: the price is known before the call and no usage changes it. `cap_output`: the provider is sent an output limit
    where the caller set none, so that the hold is a true bound. Holds and charges are rounded up once, at their end.
    """

    __slots__ = ()

    is_fixed: bool = False
    cap_output: bool = False

    def can_price(self, door: Door) -> bool:
        """Whether the door's answers can report what this pricing needs."""
        raise NotImplementedError

    def can_charge(self, usage: Usage) -> bool:
        """Whether this usage tells what the pricing needs; if not, an estimate is charged."""
        raise NotImplementedError

    def hold(self, bound: Usage) -> int:
        """The credits that no usage within the bound can exceed."""
        raise NotImplementedError

    def charge(self, usage: Usage) -> int:
        """The credits that this usage costs."""
        raise NotImplementedError


PricingLike = Pricing | Callable[[Usage], int]


class _PerCall(Pricing):
    __slots__ = ("_amount",)

    is_fixed = True

    def __init__(self, amount: int) -> None:
        self._amount = check_amount(amount, "amount")

    def __repr__(self) -> str:
        return f"per_call({self._amount})"

    def can_price(self, door: Door) -> bool:  # noqa: ARG002  every door has calls
        return True

    def can_charge(self, usage: Usage) -> bool:  # noqa: ARG002  no usage changes the price
        return True

    def hold(self, bound: Usage) -> int:  # noqa: ARG002  as above
        return self._amount

    def charge(self, usage: Usage) -> int:  # noqa: ARG002  as above
        return self._amount


class _Rates(NamedTuple):
    input: int
    cached_input: int
    cache_write: int
    output: int
    reasoning: int
    audio: int


class _PerToken(Pricing):
    """Rates as whole numbers over one common divisor: every sum is exact."""

    __slots__ = ("_divisor", "_rates", "_text", "cap_output")

    def __init__(self, rates: Mapping[str, int | Decimal], per: int, cap_output: bool, text: str) -> None:
        ratios = {name: _ratio(rate, name) for name, rate in rates.items()}
        divisor = lcm(*(below for _, below in ratios.values()))
        self._rates = _Rates(**{name: above * (divisor // below) for name, (above, below) in ratios.items()})
        self._divisor = divisor * check_amount(per, "per", minimum=1)
        self._text = text
        self.cap_output = cap_output

    def __repr__(self) -> str:
        return self._text

    def can_price(self, door: Door) -> bool:
        return "input_tokens" in door.reports or "output_tokens" in door.reports

    def can_charge(self, usage: Usage) -> bool:
        return usage.input_tokens is not None or usage.output_tokens is not None

    def hold(self, bound: Usage) -> int:
        rates = self._rates
        dearest_input = max(rates.input, rates.cached_input, rates.cache_write)
        return self._credits(
            (bound.input_tokens or 0) * dearest_input
            + (bound.output_tokens or 0) * max(rates.output, rates.reasoning)
            + (bound.audio_tokens or 0) * rates.audio
        )

    def charge(self, usage: Usage) -> int:
        rates = self._rates
        read, wrote = usage.input_tokens or 0, usage.output_tokens or 0
        # Parts larger than the whole would make the rest negative.
        cached = min(usage.cached_input_tokens or 0, read)
        cache_write = min(usage.cache_write_tokens or 0, read - cached)
        reasoning = min(usage.reasoning_tokens or 0, wrote)
        return self._credits(
            (read - cached - cache_write) * rates.input
            + cached * rates.cached_input
            + cache_write * rates.cache_write
            + (wrote - reasoning) * rates.output
            + reasoning * rates.reasoning
            + (usage.audio_tokens or 0) * rates.audio
        )

    def _credits(self, total: int) -> int:
        return min(-(-total // self._divisor), MAX_AMOUNT)


class _Function(Pricing):
    __slots__ = ("_price",)

    def __init__(self, price: Callable[[Usage], int]) -> None:
        self._price = price

    def __repr__(self) -> str:
        return getattr(self._price, "__qualname__", type(self._price).__qualname__)

    def can_price(self, door: Door) -> bool:  # noqa: ARG002  only the function knows, and says so by PriceUnknownError
        return True

    def can_charge(self, usage: Usage) -> bool:  # noqa: ARG002  as above
        return True

    def hold(self, bound: Usage) -> int:
        return check_amount(self._price(bound), f"the price from {self!r}")

    def charge(self, usage: Usage) -> int:
        return check_amount(self._price(usage), f"the price from {self!r}")


def _ratio(rate: object, name: str) -> tuple[int, int]:
    """The rate as a fraction of whole numbers. ValueError for anything but a plain int or Decimal from 0 on."""
    if type(rate) is int and 0 <= rate <= MAX_AMOUNT:
        return rate, 1
    if isinstance(rate, Decimal) and rate.is_finite() and 0 <= rate <= MAX_AMOUNT:
        if not rate:
            return 0, 1
        # An absurd exponent would make numbers of a million digits.
        if rate.adjusted() >= -30 and len(rate.as_tuple().digits) <= 60:
            return rate.as_integer_ratio()
    raise ValueError(f"the rate {name} must be an int or a Decimal from 0 to {MAX_AMOUNT}, not {rate!r}")


def per_call(amount: int = 1) -> Pricing:
    """A fixed price: every call holds and costs `amount` credits, whatever it uses. 0 is allowed."""
    return _PerCall(amount)


def per_token(
    *,
    input: int | Decimal,
    output: int | Decimal,
    cached_input: int | Decimal | None = None,
    cache_write: int | Decimal | None = None,
    reasoning: int | Decimal | None = None,
    audio: int | Decimal | None = None,
    per: int = 1,
    cap_output: bool = False,
) -> Pricing:
    """
    A price by tokens: each rate is credits per `per` tokens, an int or a Decimal.

    Cached and cache-writing input cost as `input` unless told otherwise, reasoning as `output`. `audio` is an extra for each token
    of audio, on top of its input or output rate. A charge is summed exactly and rounded up once. ValueError for any other rate;
    a float is refused because 0.1 is not a tenth.
    """
    given = {
        "input": input,
        "output": output,
        "cached_input": cached_input,
        "cache_write": cache_write,
        "reasoning": reasoning,
        "audio": audio,
    }
    named = [f"{name}={rate!r}" for name, rate in given.items() if rate is not None]
    rates = {
        "input": input,
        "cached_input": input if cached_input is None else cached_input,
        "cache_write": input if cache_write is None else cache_write,
        "output": output,
        "reasoning": output if reasoning is None else reasoning,
        "audio": 0 if audio is None else audio,
    }
    return _PerToken(rates, per, bool(cap_output), f"per_token({', '.join(named)}, per={per!r})")


def as_pricing(value: PricingLike) -> Pricing:
    """A pricing as it is, or any function from `Usage` to credits as one. ValueError for anything else."""
    given: Any = value
    if isinstance(given, Pricing):
        return given
    if callable(given) and not isinstance(given, type):
        return _Function(cast("Callable[[Usage], int]", given))
    raise ValueError(f"pricing must be per_call(), per_token() or a function from Usage to int, not {value!r}")


# ---- what a request may use ----


class _Load:
    """What a request's body asks the model to read."""

    __slots__ = ("ascii_chars", "audio", "held", "items", "media", "other_chars", "text_bytes", "tokens")

    def __init__(self) -> None:
        self.text_bytes = 0
        self.ascii_chars = 0
        self.other_chars = 0
        self.items = 0
        self.tokens = 0
        self.media = 0
        self.audio = 0
        self.held = 0

    def write(self, text: str) -> None:
        if text.isascii():
            size = len(text)
            self.ascii_chars += size
        else:
            size = len(text.encode("utf-8", "surrogatepass"))
            plain = len(text.encode("ascii", "ignore"))
            self.ascii_chars += plain
            self.other_chars += len(text) - plain
        self.text_bytes += size

    @property
    def bound(self) -> int:
        return self.text_bytes + self.tokens + self.media + self.audio + self.held + self.items * _ITEM + _CALL

    @property
    def estimate(self) -> int:
        return -(-self.ascii_chars // 4) + self.other_chars + self.tokens + self.media + self.audio


def _load(request: Request) -> _Load:
    """Walk the body once, without recursion: a body may be nested deeper than the stack, or contain itself."""
    load = _Load()
    takes_ids = request.endpoint in ("embeddings", "completions")
    unread: list[object] = [{name: value for name, value in request.body.items() if name not in _NOT_TEXT}]
    for _ in range(_MAX_PARTS):
        if not unread:
            break
        value = unread.pop()
        if isinstance(value, str):
            load.write(value)
        elif value is None or isinstance(value, bool):
            load.tokens += value is not None
        elif isinstance(value, int):
            load.tokens += 1 + len(str(min(abs(value), 10**30)))
        elif isinstance(value, float):
            load.tokens += len(repr(value))
        elif isinstance(value, Mapping):
            load.items += 1
            _mapping(load, value, unread)
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = cast("list[object]", value)
            if takes_ids and isinstance(value, (list, tuple)) and parts and type(parts[0]) is int:
                load.tokens += len(parts)
            else:
                load.items += len(parts)
                unread.extend(parts)
        elif isinstance(value, (bytes, bytearray)):
            load.media += min(len(value), FILE_TOKENS)
        elif callable(dump := getattr(value, "model_dump", None)):
            # Messages of earlier answers are often put back as the SDK's own objects.
            dumped = dump()
            if isinstance(dumped, Mapping):
                unread.append(dumped)
    return load


def _mapping(load: _Load, part: Mapping[Any, Any], unread: list[object]) -> None:
    kind = part.get("type")
    for name, value in part.items():
        if value is None:
            continue
        if isinstance(name, str):
            load.write(name)
        if name == "image_url" and isinstance(value, (str, Mapping)):
            detail = part.get("detail") if isinstance(value, str) else value.get("detail")
            load.media += _image(detail)
        elif name == "input_audio" and isinstance(value, Mapping):
            data = value.get("data")
            size = len(data) * 3 // 4 if isinstance(data, str) else 0
            load.audio += size // _AUDIO_BYTES.get(str(value.get("format")), 100) + 1
        elif name == "file_data" and isinstance(value, str):
            _inline(load, value)
        elif name in ("file_id", "file_url") and isinstance(value, str):
            is_image = isinstance(kind, str) and ("image" in kind or "screenshot" in kind)
            load.media += _image(part.get("detail")) if is_image else FILE_TOKENS
        elif name == "result" and kind == "image_generation_call":
            load.media += _image(None)
        elif (name == "id" and kind == "item_reference") or (
            name == "audio" and isinstance(value, Mapping) and "id" in value
        ):
            load.held += REFERENCE_TOKENS
        else:
            unread.append(value)


def _image(detail: object) -> int:
    return IMAGE_TOKENS.get(detail, IMAGE_TOKENS["auto"]) if isinstance(detail, str) else IMAGE_TOKENS["auto"]


def _inline(load: _Load, data: str) -> None:
    """A file in the body, as base64: text by its bytes, anything else by its constant."""
    kind = data[5:64].lower() if data.startswith("data:") else ""
    if kind.startswith("image/"):
        load.media += IMAGE_TOKENS["auto"]
    elif kind.startswith(("text/", "application/json", "application/xml")):
        size = len(data) * 3 // 4
        load.text_bytes += size
        load.ascii_chars += size
    else:
        load.media += FILE_TOKENS


def _limit(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _times(door: Door, body: Mapping[str, Any]) -> int:
    """How many answers the request asks for."""
    n = _limit(body.get("n")) or 1
    if door.reads != "completion":
        return n if door.reads in ("chat", "images") else 1
    prompt = body.get("prompt")
    prompts = 1
    if isinstance(prompt, (list, tuple)) and prompt and not isinstance(prompt[0], int):
        prompts = len(prompt)
    return max(n, _limit(body.get("best_of")) or 1) * prompts


_LIMITS = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completion": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "thread_run": ("max_completion_tokens",),
}


def _output_bound(door: Door, body: Mapping[str, Any], default: int) -> int:
    reads = door.reads
    if reads in ("embeddings", "moderation", "search", "provenance"):
        return 0
    if reads == "images":
        return _drawing(body) * _times(door, body)
    # A server may know only one of the two names of the limit.
    limits = [limit for name in _LIMITS.get(reads, ()) if (limit := _limit(body.get(name)))]
    return (max(limits) if limits else default) * _times(door, body)


def _drawing(body: Mapping[str, Any]) -> int:
    quality = body.get("quality")
    cost = IMAGE_OUTPUT_TOKENS.get(quality) if isinstance(quality, str) else None
    return (cost or IMAGE_OUTPUT_TOKENS["auto"]) + 100 * (_limit(body.get("partial_images")) or 0)


def _tools(body: Mapping[str, Any]) -> int:
    tools = body.get("tools")
    if not isinstance(tools, (list, tuple)):
        return 0
    return sum(isinstance(tool, Mapping) and tool.get("type") not in _OWN_TOOLS for tool in cast("list[object]", tools))


def _held_context(door: Door, body: Mapping[str, Any]) -> int:
    held = 0
    if door.reads == "thread_run":
        held += CONTEXT_TOKENS
    if body.get("previous_response_id") or body.get("conversation"):
        held += CONTEXT_TOKENS
    if door.reads == "responses" and body.get("prompt"):
        held += REFERENCE_TOKENS
    if body.get("web_search_options"):
        held += TOOL_TOKENS
    return held + TOOL_TOKENS * _tools(body)


def _uploads(door: Door) -> tuple[int, int]:
    """Media and audio tokens of what a form carries beside its fields, which cannot be seen here."""
    if door.reads in ("transcription", "translation"):
        return 0, AUDIO_TOKENS
    if door.name in ("images.edits", "images.variations"):
        return IMAGE_TOKENS["high"], 0
    return 0, 0


def _spoken(door: Door, body: Mapping[str, Any]) -> int | None:
    text = body.get("input")
    return len(text) if door.reads == "speech" and isinstance(text, str) else None


def _tier(body: Mapping[str, Any]) -> str | None:
    tier = body.get("service_tier")
    return tier if isinstance(tier, str) else None


def bound_usage(door: Door, request: Request, default_max_output_tokens: int) -> Usage:
    """
    The most that a request may use, as far as it can be known before it is sent: what is held at a token price.

    Text counts one token for each UTF-8 byte, media and context that the server holds by the constants above, the output by the
    request's own limit or else `default_max_output_tokens`, times the answers it asks for. What the body says wrongly counts as
    not said: the provider will refuse it.
    """
    body = request.body
    load = _load(request)
    media, audio = _uploads(door)
    load.media += media
    load.audio += audio
    load.held += _held_context(door, body)

    read = load.bound
    wrote = _output_bound(door, body, default_max_output_tokens)
    if door.reads == "thread_run":
        read = _limit(body.get("max_prompt_tokens")) or read
    elif door.reads == "grader":
        # Its answer tells one total, which is booked as input.
        read, wrote = read + wrote, 0
    elif door.reads == "chat" and isinstance(body.get("prediction"), Mapping):
        # Predicted tokens that are rejected are billed as output.
        wrote += load.text_bytes

    modalities = body.get("modalities")
    speaks = door.reads == "chat" and isinstance(modalities, (list, tuple)) and "audio" in modalities
    is_speech = door.reads == "speech"
    return Usage(
        model=request.model,
        endpoint=door.name,
        service_tier=_tier(body),
        input_tokens=min(read, MAX_AMOUNT),
        output_tokens=None if is_speech else min(wrote, MAX_AMOUNT),
        audio_tokens=min(load.audio + (wrote if speaks else 0), MAX_AMOUNT) or None,
        images=min(_times(door, body), MAX_AMOUNT) if door.reads == "images" else None,
        characters=_spoken(door, body),
    )


def estimated_usage(door: Door, request: Request, seen: Observation | None) -> Usage:
    """
    What a call probably used, where nobody reported it: what is charged as an estimate.

    One token for four ASCII characters and one for each other character, of the request and of the output that was seen; media by
    the constants above; nothing for what the server holds and nobody can see.
    """
    body = request.body
    load = _load(request)
    media, _ = _uploads(door)
    load.media += media
    wrote = images = 0
    if seen is not None:
        wrote = -(-seen.ascii_chars // 4) + seen.other_chars
        images = seen.images
    if door.reads in ("transcription", "translation"):
        # A second of speech is ten tokens of audio and about fifteen letters.
        load.audio += -(-(seen.ascii_chars + seen.other_chars) * 2 // 3) if seen is not None else 0
    elif door.reads == "images":
        wrote = _drawing(body) * images

    is_speech = door.reads == "speech"
    return Usage(
        model=(seen.model if seen is not None else None) or request.model,
        endpoint=door.name,
        service_tier=(seen.service_tier if seen is not None else None) or _tier(body),
        input_tokens=min(load.estimate, MAX_AMOUNT),
        output_tokens=None if is_speech else min(wrote, MAX_AMOUNT),
        audio_tokens=min(load.audio, MAX_AMOUNT) or None,
        images=images if door.reads == "images" else None,
        characters=_spoken(door, body),
    )


def capped_body(door: Door, request: Request, limit: int) -> dict[str, Any]:
    """The fields that make the provider stop at `limit` output tokens; none where the caller set a limit or the door has none."""
    names = _LIMITS.get(door.reads, ())
    if not names or any(request.body.get(name) is not None for name in names):
        return {}
    return {names[0]: limit}
