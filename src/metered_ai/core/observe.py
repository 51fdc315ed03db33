"""
Reads what an answer says of itself: its id, its usage, what was generated, how it ended.

Nothing here trusts the answer: a malformed field counts as absent and hostile JSON as no answer, and nothing ever raises. Here are
the fields and how far they are believed; `bodies` reads whole answers, `streams` event streams, `ends` what is too long to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from operator import attrgetter
from typing import Any, NamedTuple, cast

from ..records import MAX_AMOUNT, Request, Usage
from .endpoints import Door

__all__ = ["Observation", "believable_usage", "fingerprint", "usage_is_empty"]


class Counts(NamedTuple):
    input: int | None = None
    cached: int | None = None
    cache_write: int | None = None
    output: int | None = None
    reasoning: int | None = None
    audio: int | None = None
    seconds: float | None = None

    @property
    def total(self) -> float:
        return (self.input or 0) + (self.output or 0) or (self.seconds or 0)


class Observation:
    """
    What was learnt of one answer.

    `is_answer` is False for what is not this door's answer: HTML, an error body, broken JSON. `usage` is None where the provider
    reported none; of several in one stream it is the one with the largest total. `ascii_chars` and `other_chars` count the output
    text that was seen, over all choices; `images` the pictures. `error` tells that an error came in mid-answer, `failed` that the
    provider itself calls the answer failed.
    """

    __slots__ = (
        "_counts",
        "ascii_chars",
        "created",
        "error",
        "failed",
        "has_output",
        "id",
        "images",
        "is_answer",
        "model",
        "other_chars",
        "service_tier",
        "usage",
    )

    def __init__(self) -> None:
        self.is_answer = False
        self.failed = False
        self.error = False
        self.id: str | None = None
        self.created: int | float | None = None
        self.model: str | None = None
        self.service_tier: str | None = None
        self.usage: Usage | None = None
        self.has_output = False
        self.ascii_chars = 0
        self.other_chars = 0
        self.images = 0
        self._counts: Counts | None = None

    def __repr__(self) -> str:
        return f"Observation({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__[1:])})"

    def _describe(self, body: Mapping[str, Any]) -> None:
        """Take over what the object tells of the answer; what came first stays, but the service tier is known best at the end."""
        if self.id is None:
            self.id = _identifier(body.get("id"))
        if self.created is None:
            self.created = _number(body.get("created", body.get("created_at")))
        if self.model is None:
            self.model = _name(body.get("model"))
        tier = body.get("service_tier")
        if tier is not None:
            self.service_tier = _name(tier) or self.service_tier

    def _report(self, counts: Counts | None) -> None:
        if counts is not None and (self._counts is None or counts.total >= self._counts.total):
            self._counts = counts

    def _write(self, text: object) -> None:
        if isinstance(text, str) and text:
            ascii_chars = len(text) if text.isascii() else len(text.encode("ascii", "ignore"))
            self.ascii_chars += ascii_chars
            self.other_chars += len(text) - ascii_chars
            self.has_output = True

    def _finish(self, door: Door, request: Request) -> Observation:
        counts = self._counts
        if counts is None and not self.images:
            return self
        counts = counts or Counts()
        read, cached, cache_write, wrote, reasoning, audio, seconds = counts
        self.usage = Usage(
            self.model or request.model,
            door.name,
            self.service_tier,
            read,
            cached,
            cache_write,
            wrote,
            reasoning,
            audio,
            seconds,
            self.images or None,
        )
        return self


def object_of(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def objects_of(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for item in cast("list[object]", value):
            if isinstance(item, dict):
                yield cast("dict[str, Any]", item)


def count_of(value: object) -> int | None:
    if type(value) is int:
        return value if 0 <= value <= MAX_AMOUNT else None
    return count_of(int(value)) if type(value) is float and value.is_integer() else None


def _number(value: object) -> int | float | None:
    # A comparison with NaN is false, and so is one with infinity.
    return value if type(value) in (int, float) and 0 <= cast("float", value) <= MAX_AMOUNT else None  # type: ignore[return-value]  # the type is tested


def _identifier(value: object) -> str | None:
    if type(value) is int:
        return str(value) if 0 <= value <= MAX_AMOUNT else None
    return value.strip() or None if isinstance(value, str) and len(value) <= 4096 else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable() else None


def load(content: bytes | str) -> object:
    """The JSON value in the content, None for what is no JSON or too deep to be an answer."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _nothing(_: str) -> None:
    return None


def tokens_of(raw: object, *, needs_output: bool = True) -> Counts | None:
    """
    The counts in a usage object of any of the SDK's families, None unless it is sound.

    Some servers leave reasoning out of the output tokens; it is added where the total, or the size of the part, gives that away.
    """
    if not isinstance(raw, dict):
        return None
    get = cast("dict[str, Any]", raw).get
    details = get("input_tokens_details") or get("prompt_tokens_details") or get("input_token_details")
    spent = get("output_tokens_details") or get("completion_tokens_details") or get("output_token_details")
    of_input = details.get if isinstance(details, dict) else _nothing
    of_output = spent.get if isinstance(spent, dict) else _nothing
    read, wrote, total, cached, cache_write, heard, reasoning, said = [
        value if value is None or (type(value) is int and 0 <= value <= MAX_AMOUNT) else count_of(value)
        for value in (
            get("input_tokens", get("prompt_tokens")),
            get("output_tokens", get("completion_tokens")),
            get("total_tokens"),
            of_input("cached_tokens"),
            of_input("cache_write_tokens"),
            of_input("audio_tokens"),
            of_output("reasoning_tokens"),
            of_output("audio_tokens"),
        )
    ]
    if not needs_output:
        read = total if read is None else read
        wrote = wrote or 0
    if read is None or wrote is None:
        return None

    if cached is not None:
        cached = min(cached, read)
    if cache_write is not None:
        cache_write = min(cache_write, read - (cached or 0))
    if reasoning and (reasoning > wrote or total == read + wrote + reasoning):
        wrote += reasoning
    audio = None if heard is None and said is None else min((heard or 0) + (said or 0), read + wrote)
    return Counts(read, cached, cache_write, wrote, reasoning, audio)


def _drawn(body: Mapping[str, Any]) -> Counts | None:
    """What an image cost, with the tokens of the model that wrote an SVG, which are reported beside it."""
    counts = tokens_of(body.get("usage"))
    usage = object_of(body.get("svg_usage"))
    svg = tokens_of(usage)
    if svg is None or counts is None:
        return counts or svg
    reasoning = (counts.reasoning or 0) + (count_of(usage.get("reasoning_tokens")) or 0)
    return counts._replace(
        input=(counts.input or 0) + (svg.input or 0),
        output=(counts.output or 0) + (svg.output or 0),
        reasoning=reasoning,
    )


def _heard(body: Mapping[str, Any]) -> Counts | None:
    """What a transcription cost: tokens, or the seconds of a model that is billed by duration."""
    usage = object_of(body.get("usage"))
    counts = tokens_of(usage)
    if counts is not None:
        return counts
    seconds = _number(usage.get("seconds", body.get("duration")))
    return None if seconds is None else Counts(seconds=float(seconds))


def usage_of(door: Door, body: Mapping[str, Any]) -> Counts | None:
    reads = door.reads
    if reads == "images":
        return _drawn(body)
    if reads in ("transcription", "translation"):
        return _heard(body)
    if reads == "grader":
        # The grader tells only a total; most of it is what it read.
        total = count_of(object_of(body.get("metadata")).get("token_usage"))
        return None if total is None else Counts(input=total, output=0)
    return tokens_of(body.get("usage"), needs_output=reads != "embeddings")


# ---- whole bodies ----

SHAPES: dict[str, tuple[str, type]] = {
    "chat": ("choices", list),
    "completion": ("choices", list),
    "responses": ("output", list),
    "compact": ("output", list),
    "decision": ("answers", list),
    "embeddings": ("data", list),
    "images": ("data", list),
    "transcription": ("text", str),
    "translation": ("text", str),
    "moderation": ("results", list),
    "search": ("data", list),
    "grader": ("reward", object),
    "provenance": ("results", list),
    "thread_run": ("status", str),
}
"""The field that tells a door's answer from anything else with status 200."""

_TEXT_FIELDS = (
    "content",
    "text",
    "refusal",
    "arguments",
    "input",
    "code",
    "transcript",
    "summary",
    "reasoning_content",
    "thinking",
)


def _write_all(seen: Observation, value: object, depth: int = 6) -> None:
    """Count the text of a message or an output item: the fields that hold what was generated, and nothing else."""
    if isinstance(value, list):
        for item in cast("list[object]", value):
            _write_all(seen, item, depth)
    elif isinstance(value, dict):
        item = cast("dict[str, Any]", value)
        for name in _TEXT_FIELDS:
            part = item.get(name)
            if isinstance(part, str):
                seen._write(part)
            elif part and depth:
                _write_all(seen, part, depth - 1)
        if "reasoning_content" not in item:
            seen._write(item.get("reasoning"))
        for name in ("tool_calls", "function_call", "function", "custom", "audio"):
            if item.get(name):
                seen.has_output = True
                if depth:
                    _write_all(seen, item[name], depth - 1)


def _read_output(seen: Observation, door: Door, body: Mapping[str, Any]) -> None:
    reads = door.reads
    if reads in ("chat", "completion"):
        for choice in objects_of(body.get("choices")):
            _write_all(seen, choice.get("message") if "message" in choice else choice)
    elif reads in ("responses", "compact"):
        for item in objects_of(body.get("output")):
            seen.has_output = True
            if item.get("type") == "image_generation_call" and item.get("result"):
                seen.images += 1
            elif item.get("role") != "user":
                _write_all(seen, item)
    elif reads == "images":
        seen.images = len(body["data"])
        seen.has_output = bool(body["data"])
    elif reads in ("transcription", "translation"):
        seen._write(body.get("text"))
    else:
        field = SHAPES.get(reads, ("id", object))[0]
        seen.has_output = bool(body.get(field))


_ANY: tuple[str, type] = ("id", object)
_WITH_STATUS = ("responses", "thread_run")
_USUAL = ("chat", "responses")
_WITHOUT_ID = ("embeddings", "images", "search", "grader")


def read_json(
    seen: Observation, door: Door, request: Request, body: dict[str, Any], *, count_text: bool = True
) -> Observation:
    reads = door.reads
    field, kind = SHAPES.get(reads, _ANY)
    has_field = field in body and isinstance(body[field], kind)
    if reads in _WITH_STATUS:
        seen.failed = body.get("status") in ("failed", "cancelled", "expired")
    seen.error = bool(body.get("error"))
    is_answer = has_field or (reads == "responses" and body.get("object") == "response")
    seen.is_answer = is_answer and (not seen.error or seen.failed)
    if not seen.is_answer:
        return seen
    seen._describe(body if reads not in _WITHOUT_ID else {name: value for name, value in body.items() if name != "id"})
    counts = tokens_of(body.get("usage")) if reads in _USUAL else usage_of(door, body)
    if counts is not None:
        seen._counts = counts
    if has_field and (count_text or reads not in ("chat", "completion")):
        _read_output(seen, door, body)
    return seen._finish(door, request)


# ---- judging ----


def usage_is_empty(usage: Usage) -> bool:
    """True if the usage tells of no token read and none written; None counts as zero."""
    return not usage.input_tokens and not usage.output_tokens


def believable_usage(door: Door, observation: Observation) -> Usage | None:
    """
    The reported usage, None where there is none to believe: no tokens at all, or no output tokens beside output.

    Zero is not free: some servers send zeros with every answer. Doors that write nothing (embeddings) may have no output tokens.
    """
    usage = observation.usage
    if usage is None:
        return None
    if usage.seconds or (usage.images and door.reads == "images" and usage.input_tokens is None):
        return usage
    if usage_is_empty(usage):
        return None
    writes = door.reads in ("chat", "completion", "responses", "compact", "thread_run")
    return None if writes and observation.has_output and not usage.output_tokens else usage


def fingerprint(observation: Observation) -> str | None:
    """
    What tells two answers with one id apart: a hash of created, model and usage; the same for a replay from a cache.

    None where there is nothing to tell them apart by: neither a time of creation nor a usage.
    """
    usage = observation.usage
    if not observation.created and usage is None:
        return None
    counts = None if usage is None else _counts_of(usage)
    # repr escapes lone surrogates. It takes a third of the time of JSON, and BLAKE2 half the time of SHA-256.
    return blake2b(repr((observation.created, observation.model, counts)).encode(), digest_size=16).hexdigest()


_counts_of = attrgetter(*Usage.__slots__)
