"""
Reads what an answer says of itself: its id, its usage, what was generated, how it ended.

Nothing here trusts the answer: a malformed field counts as absent and hostile JSON as no answer, and nothing ever raises. Bytes
are looked at as they pass; only lines that may carry an id, a usage or an end are parsed, and no more than `LIMIT` bytes are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from operator import attrgetter
from typing import Any, NamedTuple, cast

from ..records import MAX_AMOUNT, Request, Usage
from .endpoints import Door

__all__ = [
    "LIMIT",
    "BodyReader",
    "Observation",
    "StreamReader",
    "believable_usage",
    "fingerprint",
    "read_body",
    "usage_is_empty",
]

LIMIT = 256 * 1024
"""The longest body or line, in bytes, that is kept and parsed whole. Of a longer one only the two ends are read."""

_KEEP = 64 * 1024


class _Counts(NamedTuple):
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
        self._counts: _Counts | None = None

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

    def _report(self, counts: _Counts | None) -> None:
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
        counts = counts or _Counts()
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


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _objects(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for item in cast("list[object]", value):
            if isinstance(item, dict):
                yield cast("dict[str, Any]", item)


def _count(value: object) -> int | None:
    if type(value) is int:
        return value if 0 <= value <= MAX_AMOUNT else None
    return _count(int(value)) if type(value) is float and value.is_integer() else None


def _number(value: object) -> int | float | None:
    # A comparison with NaN is false, and so is one with infinity.
    return value if type(value) in (int, float) and 0 <= cast("float", value) <= MAX_AMOUNT else None  # type: ignore[return-value]  # the type is tested


def _identifier(value: object) -> str | None:
    if type(value) is int:
        return str(value) if 0 <= value <= MAX_AMOUNT else None
    return value.strip() or None if isinstance(value, str) and len(value) <= 4096 else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable() else None


def _load(content: bytes | str) -> object:
    """The JSON value in the content, None for what is no JSON or too deep to be an answer."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _nothing(_: str) -> None:
    return None


def _tokens(raw: object, *, needs_output: bool = True) -> _Counts | None:
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
        value if value is None or (type(value) is int and 0 <= value <= MAX_AMOUNT) else _count(value)
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
    return _Counts(read, cached, cache_write, wrote, reasoning, audio)


def _drawn(body: Mapping[str, Any]) -> _Counts | None:
    """What an image cost, with the tokens of the model that wrote an SVG, which are reported beside it."""
    counts = _tokens(body.get("usage"))
    usage = _object(body.get("svg_usage"))
    svg = _tokens(usage)
    if svg is None or counts is None:
        return counts or svg
    reasoning = (counts.reasoning or 0) + (_count(usage.get("reasoning_tokens")) or 0)
    return counts._replace(
        input=(counts.input or 0) + (svg.input or 0),
        output=(counts.output or 0) + (svg.output or 0),
        reasoning=reasoning,
    )


def _heard(body: Mapping[str, Any]) -> _Counts | None:
    """What a transcription cost: tokens, or the seconds of a model that is billed by duration."""
    usage = _object(body.get("usage"))
    counts = _tokens(usage)
    if counts is not None:
        return counts
    seconds = _number(usage.get("seconds", body.get("duration")))
    return None if seconds is None else _Counts(seconds=float(seconds))


def _usage_of(door: Door, body: Mapping[str, Any]) -> _Counts | None:
    reads = door.reads
    if reads == "images":
        return _drawn(body)
    if reads in ("transcription", "translation"):
        return _heard(body)
    if reads == "grader":
        # The grader tells only a total; most of it is what it read.
        total = _count(_object(body.get("metadata")).get("token_usage"))
        return None if total is None else _Counts(input=total, output=0)
    return _tokens(body.get("usage"), needs_output=reads != "embeddings")


# ---- whole bodies ----

_SHAPES: dict[str, tuple[str, type]] = {
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
        for choice in _objects(body.get("choices")):
            _write_all(seen, choice.get("message") if "message" in choice else choice)
    elif reads in ("responses", "compact"):
        for item in _objects(body.get("output")):
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
        field = _SHAPES.get(reads, ("id", object))[0]
        seen.has_output = bool(body.get(field))


_ANY: tuple[str, type] = ("id", object)
_WITH_STATUS = ("responses", "thread_run")
_USUAL = ("chat", "responses")
_WITHOUT_ID = ("embeddings", "images", "search", "grader")


def _read_json(
    seen: Observation, door: Door, request: Request, body: dict[str, Any], *, count_text: bool = True
) -> Observation:
    reads = door.reads
    field, kind = _SHAPES.get(reads, _ANY)
    has_field = field in body and isinstance(body[field], kind)
    if reads in _WITH_STATUS:
        seen.failed = body.get("status") in ("failed", "cancelled", "expired")
    seen.error = bool(body.get("error"))
    is_answer = has_field or (reads == "responses" and body.get("object") == "response")
    seen.is_answer = is_answer and (not seen.error or seen.failed)
    if not seen.is_answer:
        return seen
    seen._describe(body if reads not in _WITHOUT_ID else {name: value for name, value in body.items() if name != "id"})
    counts = _tokens(body.get("usage")) if reads in _USUAL else _usage_of(door, body)
    if counts is not None:
        seen._counts = counts
    if has_field and (count_text or reads not in ("chat", "completion")):
        _read_output(seen, door, body)
    return seen._finish(door, request)


def _is_plain_text(door: Door, request: Request) -> bool:
    formats = ("text", "srt", "vtt")
    return door.reads in ("transcription", "translation") and request.body.get("response_format") in formats


def _read_bytes(seen: Observation, door: Door, request: Request, head: bytes, content_type: str) -> Observation:
    """A body that is no JSON: sound, or a transcription as plain text."""
    is_page = "html" in content_type or head.lstrip()[:1] == b"<"
    if is_page or not head:
        return seen
    if door.reads == "speech":
        seen.is_answer = seen.has_output = "json" not in content_type
    elif _is_plain_text(door, request):
        seen.is_answer = True
        seen._write(head.decode("utf-8", "replace"))
    return seen


def read_body(
    door: Door, request: Request, content: bytes | None, data: object, content_type: str, *, count_text: bool = True
) -> Observation:
    """
    Read a whole answer: from `data`, the JSON that somebody has parsed already, else from `content`.

    Anything in `data` but a dict means that nobody has. An event stream in a plain body is read as one. Without `count_text` the
    text of a parsed chat answer may be left uncounted: a fixed price does not depend on it.
    """
    seen = Observation()
    if isinstance(data, dict):
        return _read_json(seen, door, request, cast("dict[str, Any]", data), count_text=count_text)
    content_type = content_type.lower()
    if not content:
        return seen
    if "event-stream" in content_type:
        reader = StreamReader(door, request, count_text=True, hide_usage=False)
        reader.feed(content)
        reader.flush()
        return reader.observation()

    if door.reads == "speech" and "json" not in content_type:
        return _read_bytes(seen, door, request, content[:64], content_type)
    if content.lstrip()[:1] == b"{":
        if len(content) > LIMIT and door.reads != "images":
            # Embeddings are megabytes of numbers, and parsing them would take longer than all else.
            _read_ends(seen, door, request, content[:_KEEP], content[-_KEEP:])
            if seen.usage is not None:
                return seen
            seen = Observation()
        body = _load(content)
        if isinstance(body, dict):
            return _read_json(seen, door, request, cast("dict[str, Any]", body))
    return _read_bytes(seen, door, request, content[:LIMIT], content_type)


# ---- what is too long to be kept ----

_PIECE = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"|[{}\[\],:]|[^\s{}\[\],:"]+')
_USAGE = re.compile(rb'"(usage|svg_usage)"\s*:\s*(?=\{)')


def _ends(head: bytes, tail: bytes) -> dict[str, Any]:
    """
    What the two ends of a long JSON object tell: the simple values of its first two levels, and its usages.

    A quote inside a JSON string is escaped, so `"usage":{` can be found without reading what stands between.
    """
    found: dict[str, Any] = {}
    path: list[tuple[bool, str | None]] = []
    key: str | None = None
    is_value = False
    for piece in _PIECE.finditer(head):
        text = piece[0]
        if text in (b"{", b"["):
            path.append((text == b"{", key if is_value else None))
            key, is_value = None, False
        elif text in (b"}", b"]"):
            if path:
                path.pop()
            key, is_value = None, False
        elif text == b":":
            is_value = True
        elif text == b",":
            key, is_value = None, False
        elif len(path) <= 2 and all(is_object for is_object, _ in path):
            if not is_value:
                name = _load(text)
                key = name if isinstance(name, str) else None
            elif key is not None and len(text) < 1024:
                level = found if len(path) < 2 else found.setdefault(path[1][1] or "", {})
                if isinstance(level, dict):
                    cast("dict[str, Any]", level).setdefault(key, _load(text))
    best: dict[str, float] = {}
    for part in (head, tail):
        for match in _USAGE.finditer(part):
            counts, raw = _usage_at(part, match.end())
            name = match[1].decode()
            if counts is not None and counts.total >= best.get(name, 0):
                best[name] = counts.total
                found[name] = raw
    return found


def _usage_at(part: bytes, start: int) -> tuple[_Counts | None, object]:
    try:
        raw = json.JSONDecoder().raw_decode(part[start : start + 4096].decode("utf-8", "replace"))[0]
    except (ValueError, RecursionError):
        return None, None
    return _tokens(raw, needs_output=False), raw


def _read_ends(seen: Observation, door: Door, request: Request, head: bytes, tail: bytes | None) -> Observation:
    """An answer by its two ends; without a tail only its beginning is known, and no more is asked of it."""
    body = _ends(head, tail or b"")
    seen.failed = door.reads == "responses" and body.get("status") in ("failed", "cancelled")
    seen.error = bool(body.get("error"))
    field = f'"{_SHAPES.get(door.reads, ("id", object))[0]}"'.encode()
    # Its own field may stand between the two ends, where nobody has looked; then what only an answer has must do.
    tells = body.get("object") == "response" or _usage_of(door, body) is not None
    is_whole = tail is None or (tail.rstrip()[-1:] == b"}" and (field in head or field in tail or tells))
    seen.is_answer = is_whole and (not seen.error or seen.failed)
    if seen.is_answer:
        if door.reads in ("embeddings", "images", "search", "grader"):
            body.pop("id", None)
        seen._describe(body)
        seen._report(_usage_of(door, body))
        seen.has_output = True
    return seen._finish(door, request)


class _Clip:
    """Bytes as they come: all of them up to `LIMIT`, then only the two ends."""

    __slots__ = ("_pieces", "head", "size", "tail")

    def __init__(self) -> None:
        self.size = 0
        self.head: bytes | None = None
        self.tail = b""
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.head is not None:
            self.tail = (self.tail + piece[-_KEEP:])[-_KEEP:]
            return
        self._pieces.append(piece)
        if self.size > LIMIT:
            whole = b"".join(self._pieces)
            self.head, self.tail = whole[:_KEEP], whole[-_KEEP:]
            self._pieces.clear()

    def whole(self) -> bytes | None:
        """Everything, or None if it was too long to be kept."""
        return b"".join(self._pieces) if self.head is None else None


class BodyReader:
    """Watches a body that its caller reads piece by piece, and never keeps more than `LIMIT` bytes of it and a piece."""

    def __init__(self, door: Door, request: Request) -> None:
        self._door = door
        self._request = request
        self._clip = _Clip()
        self._images = 0
        self._last = b""
        self._stream: StreamReader | None = None

    def feed(self, chunk: bytes) -> None:
        """Look at the next piece of the body, in order."""
        clip = self._clip
        if self._stream is not None:
            self._stream.feed(chunk)
            clip.size += len(chunk)
            return
        if clip.size < 16 <= clip.size + len(chunk):
            start = (clip.whole() or b"") + chunk
            if start.startswith((b"data:", b"event:", b": ")) and not _is_plain_text(self._door, self._request):
                # An event stream that was not announced as one: speech asked for as such, or `stream` in an extra body.
                self._stream = StreamReader(self._door, self._request, count_text=True, hide_usage=False)
                self._stream.feed(start)
                clip.size += len(chunk)
                return
        if self._door.reads == "images":
            self._images += (self._last + chunk).count(b'"b64_json"')
            self._last = chunk[-9:] if len(chunk) >= 9 else (self._last + chunk)[-9:]
        clip.add(chunk)

    def observation(self, content_type: str, *, partial: bool = False) -> Observation:
        """What was learnt so far. `partial` says that the body is known to have more: then a beginning is an answer, too."""
        clip, door, request = self._clip, self._door, self._request
        content_type = content_type.lower()
        if self._stream is not None:
            self._stream.flush()
            return self._stream.observation()
        whole = clip.whole()
        seen = Observation()
        if whole is not None:
            if not partial:
                return read_body(door, request, whole, None, content_type)
            if whole.lstrip()[:1] != b"{" or door.reads == "speech":
                return read_body(door, request, whole, None, content_type)
            seen = _read_ends(seen, door, request, whole, None)
            _count_text(seen, _TEXTS.get(door.reads, _DELTA), whole, 0, len(whole))
            seen.has_output = seen.has_output and seen.ascii_chars + seen.other_chars > 0
            return seen

        head = clip.head or b""
        if head.lstrip()[:1] == b"{" and not (door.reads == "speech" and "json" not in content_type):
            seen.images = self._images
            return _read_ends(seen, door, request, head, clip.tail)
        return _read_bytes(seen, door, request, head, content_type)


# ---- event streams ----

_STRING = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
_DELTA = re.compile(rb'"(delta)' + _STRING)
_TEXTS = {
    "chat": re.compile(rb'"(content|refusal|arguments|input|reasoning_content|reasoning|transcript|text)' + _STRING),
    "completion": re.compile(rb'"(text)' + _STRING),
    "thread_run": re.compile(rb'"(value|arguments|input)' + _STRING),
}
_OUTPUT = re.compile(
    rb'"(?:content|refusal|arguments|input|reasoning_content|reasoning|transcript|text|value|delta)"\s*:\s*"[^"]'
    rb'|"(?:tool_calls|function_call|audio)"\s*:\s*[\[{]|"b64_json"'
)
_TYPE = re.compile(
    rb'"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed|cancelled)|error|transcript\.text\.done|speech\.audio\.done'
    rb'|image_(?:generation|edit)\.completed)"'
)
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_HAS_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_RUN_ENDS = ("completed", "failed", "cancelled", "expired", "incomplete", "requires_action")
_BLANK = (b"\n", b"\r\n", b"\r")


def _count_text(seen: Observation, pattern: re.Pattern[bytes], line: bytes, first: int, last: int) -> None:
    """Count the text in a line without parsing it; only escapes and letters beyond ASCII need a closer look."""
    found = pattern.findall(line, first, last)
    if len(found) > 1:
        # Some servers send the same reasoning under both of its names.
        twins = {raw for name, raw in found if name == b"reasoning_content"}
        found = [(name, raw) for name, raw in found if name != b"reasoning" or raw not in twins]
    for _, raw in found:
        if raw.isascii() and b"\\" not in raw:
            seen.ascii_chars += len(raw)
            seen.has_output = seen.has_output or bool(raw)
        else:
            text = _load(b'"' + raw + b'"')
            seen._write(text if isinstance(text, str) else raw.decode("utf-8", "replace"))


_CHUNK = re.compile(
    rb'"choices":\[\{"index":\d+,"delta":\{"content":"([ !#-\[\]-~]*)"\},(?:"logprobs":null,)?"finish_reason":null\}\]'
    rb'(?:,"usage":null)?(?:,"obfuscation":"\w*")?\}\n\n\Z'
)
"""How a chunk of a chat ends that brings plain text and nothing else, as OpenAI writes nearly all of them."""


class StreamReader:
    """
    Watches an event stream as its bytes pass, cut anywhere.

    `feed` returns what the caller may see: the same object, unless `hide_usage` is set; then the chunk of usage that was asked for
    on the caller's behalf is taken out, and an unfinished line waits for its end. `is_done` tells that the terminal marker was seen.
    """

    __slots__ = (
        "_clip",
        "_count",
        "_door",
        "_drops_blank",
        "_event",
        "_finished",
        "_hide",
        "_images_wanted",
        "_is_chat",
        "_is_quick",
        "_many",
        "_many_size",
        "_reads",
        "_request",
        "_seen",
        "_tail_cr",
        "_text",
        "_wanted",
        "_withheld",
        "is_done",
    )

    def __init__(self, door: Door, request: Request, *, count_text: bool, hide_usage: bool) -> None:
        self.is_done = False
        self._door = door
        self._request = request
        self._reads = door.reads
        self._is_chat = door.reads in ("chat", "completion")
        self._count = count_text
        self._hide = hide_usage and self._is_chat
        self._text = _TEXTS.get(door.reads, _DELTA)
        self._seen = Observation()
        self._is_quick = False
        self._clip: _Clip | None = None
        self._withheld = b""
        self._drops_blank = False
        self._tail_cr = False
        self._event = b""
        self._many: list[bytes] | None = None
        self._many_size = 0
        self._finished = False
        # The id is taken from the first line that has one; a server that sends none is not asked for ever.
        self._wanted = 32
        self._images_wanted = _count(request.body.get("n")) or 1

    @property
    def is_complete(self) -> bool:
        """At a clean end of the bytes: the answer was whole, even if the terminal marker is missing."""
        return self.is_done or self._finished

    def observation(self) -> Observation:
        """What was learnt so far; the same object each time."""
        return self._seen._finish(self._door, self._request)

    def feed(self, chunk: bytes) -> bytes:
        """Look at the next bytes of the stream, in order, and return what the caller may see of them."""
        # Two events have four line ends.
        if self._is_quick and chunk.endswith(b"\n\n") and chunk.count(b"\n") < 4 and self._is_delta(chunk):
            return chunk
        if not chunk:
            return chunk
        shown = self._feed_hiding(chunk) if self._hide else self._feed_lines(chunk)
        pending = self._clip or self._withheld or self._many or self._event or self._drops_blank or self._tail_cr
        # From here on, a whole event that is a mere delta has nothing new to tell but its text.
        self._is_quick = not pending and self._wanted == 0 and self._seen.has_output
        return shown

    def _is_delta(self, chunk: bytes) -> bool:
        """Whether one whole event is a mere delta, as nearly every chunk is; then its text is counted, and that was all."""
        at = kind = 0
        if self._is_chat:
            plain = _CHUNK.search(chunk)
            if plain is not None:
                if self._count:
                    self._seen.ascii_chars += len(plain[1])
                return True
            at = chunk.rfind(b'"finish_reason"')
            if at < 0 or not chunk.startswith(b":null", at + 15):
                return False
            usage = chunk.find(b'"usage"', at)
            if usage >= 0 and not chunk.startswith(b":null", usage + 7):
                return False
        else:
            kind = chunk.find(b'.delta"', 0, 128)
            if kind < 0 or self._reads == "thread_run" or chunk.startswith(b"audio", kind - 5):
                return False
        if not self._count:
            return True

        if self._is_chat:
            start = chunk.rfind(b"{", 0, at) - 8
            lead = b'"delta":{"content":"'
        else:
            start = chunk.find(b'"delta":', kind + 7)
            lead = b'"delta":"'
        end = chunk.find(b'"', start + len(lead))
        if start < 0 or end < 0 or not chunk.startswith(lead, start) or (self._is_chat and chunk[end + 1] != 125):
            return False
        text = chunk[start + len(lead) : end]
        if b"\\" in text or not text.isascii():
            return False
        self._seen.ascii_chars += len(text)
        return True

    def _feed_lines(self, chunk: bytes) -> bytes:
        lines = chunk.splitlines()
        if self._tail_cr and chunk[0] == 10:
            # The second half of a line end that was cut in two.
            del lines[0]
        last = chunk[-1]
        self._tail_cr = last == 13
        if not lines:
            return chunk
        is_whole = last in (10, 13)
        clip = self._clip
        if clip is not None:
            clip.add(lines[0])
            if len(lines) == 1 and not is_whole:
                return chunk
            self._clip = None
            self._long_line(clip)
            del lines[0]
        if not is_whole and lines:
            self._clip = clip = _Clip()
            clip.add(lines.pop())
        for line in lines:
            self._line(line)
        return chunk

    def flush(self) -> bytes:
        """Read what stands in an unfinished last line, and return what was withheld of it."""
        clip, self._clip = self._clip, None
        if clip is not None:
            self._long_line(clip)
            return b""
        withheld, self._withheld = self._withheld, b""
        if withheld and self._line(withheld):
            return b""
        return withheld

    def _feed_hiding(self, chunk: bytes) -> bytes:
        kept: list[bytes] = []
        is_same = not self._withheld
        data = chunk
        if self._tail_cr and chunk[0] == 10:
            data = chunk[1:]
            if self._drops_blank:
                is_same = False
            else:
                kept.append(b"\n")
        self._tail_cr = False
        if self._withheld:
            data = self._withheld + data
            self._withheld = b""

        for line in data.splitlines(True):
            is_whole = line.endswith((b"\n", b"\r"))
            if self._clip is not None:
                kept.append(line)
                self._clip.add(line.rstrip(b"\r\n"))
                if is_whole:
                    clip, self._clip = self._clip, None
                    self._long_line(clip)
            elif not is_whole:
                is_same = False
                if len(line) <= _KEEP:
                    self._withheld = line
                else:
                    # Too long for a chunk of usage: what cannot be hidden need not wait.
                    kept.append(line)
                    self._clip = _Clip()
                    self._clip.add(line)
            elif line in _BLANK:
                self._line(b"")
                if self._drops_blank:
                    is_same = False
                    # A lone CR may turn out to be half of a line end, whose other half must go with it.
                    self._drops_blank = line == b"\r"
                else:
                    kept.append(line)
            elif self._line(line.rstrip(b"\r\n")):
                is_same = False
                self._drops_blank = True
            else:
                self._drops_blank = False
                kept.append(line)
        self._tail_cr = data.endswith(b"\r")
        return chunk if is_same else b"".join(kept)

    def _long_line(self, clip: _Clip) -> None:
        """A line that came in pieces: read it whole if it was kept whole, else by its ends."""
        line = clip.whole()
        if line is not None:
            self._line(line)
            return
        head = clip.head or b""
        if not head.startswith(b"data:"):
            return
        self._seen.has_output = True
        if self._text_matters(head, clip.tail):
            self._take_ends(head[5:], clip.tail)

    def _text_matters(self, head: bytes, tail: bytes) -> bool:
        return bool(
            self._wanted or _TYPE.search(head, 0, 512) or _HAS_USAGE.search(tail) or self._reads == "thread_run"
        )

    def _line(self, line: bytes) -> bool:
        """Read one line without its end; True if it is a chunk of usage that nobody asked for."""
        if line.startswith(b"data:"):
            start = 6 if line[5:6] == b" " else 5
            if self._many is not None:
                self._gather(line[start:])
                return False
            if line[start : start + 1] == b"{" and line[-1] != 125 and line.rstrip()[-1:] != b"}":
                # JSON over several lines: they make one event, which ends at a blank line.
                self._many, self._many_size = [], 0
                self._gather(line[start:])
                return False
            return self._data(line, start)
        if not line:
            self._event = b""
            many, self._many = self._many, None
            if many:
                self._data(b"\n".join(many), 0)
        elif line.startswith(b"event:"):
            self._event = line[6:].strip()
        elif line.startswith(b"\xef\xbb\xbf"):
            return self._line(line[3:])
        return False

    def _gather(self, payload: bytes) -> None:
        if self._many is not None and self._many_size <= LIMIT:
            self._many.append(payload)
            self._many_size += len(payload)

    def _data(self, line: bytes, start: int) -> bool:
        """Read the data of one event; most need a look at a few words and no more."""
        seen = self._seen
        is_wanted = self._wanted > 0
        first, last = 0, len(line)
        if line[-1:] == b"]" and line.endswith(b"[DONE]"):
            self.is_done = True
            return False
        if self._is_chat:
            # A chunk without a reason to finish, or with one, is rare: a usage, an error, an end. All others tell only by their tail.
            at = line.rfind(b'"finish_reason"')
            if at < 0 or b"null" not in line[at + 15 : at + 21]:
                is_wanted = True
                if _FINISH.search(line):
                    self._finished = True
            else:
                first = max(line.find(b'"delta"', 0, at), 0)
                last = at if first else last
                usage = line.find(b'"usage"', at)
                if usage >= 0 and b"null" not in line[usage + 7 : usage + 13]:
                    is_wanted = True
        elif self._reads == "thread_run":
            is_wanted = b'"thread.run"' in line or b'"error"' in line or self._event == b"error"
        elif line.find(b'.delta"', 0, 80) < 0 and (self._event == b"error" or _TYPE.search(line) or b'"error"' in line):
            is_wanted = True

        if self._count and line.find(b"audio.delta", 0, 80) < 0:
            _count_text(seen, self._text, line, first, last)
        if not seen.has_output and _OUTPUT.search(line):
            seen.has_output = True
        if not is_wanted:
            return False

        payload = line[start:]
        if len(payload) > LIMIT:
            return self._take_ends(payload[:_KEEP], payload[-_KEEP:])
        event = _load(payload)
        return isinstance(event, dict) and self._take(cast("dict[str, Any]", event))

    def _take_ends(self, head: bytes, tail: bytes) -> bool:
        """Learn from an event too long to be parsed, whose type may stand behind what makes it long."""
        event = _ends(head, tail)
        if "type" not in event:
            named = _TYPE.search(tail)
            event["type"] = (named[0].split(b'"')[3] if named else self._event).decode("ascii", "replace")
        is_hidden = self._take(event)
        # Nothing but an answer is this long, whatever its ends tell of it.
        self._seen.is_answer = self._seen.is_answer or not self._seen.error
        return is_hidden

    def _take(self, event: dict[str, Any]) -> bool:
        """Learn from a parsed event; True if it is a chunk of usage and nothing else."""
        seen = self._seen
        self._wanted -= self._wanted > 0
        if self._event == b"error" or event.get("type") == "error" or (event.get("error") and "status" not in event):
            seen.error = True
            return False
        if self._is_chat:
            return self._take_chunk(event)
        if self._reads == "thread_run":
            self._take_run(event)
        elif self._reads in ("responses", "compact"):
            self._take_response(event)
        else:
            self._take_typed(event)
        return False

    def _take_chunk(self, event: dict[str, Any]) -> bool:
        seen = self._seen
        seen._describe(event)
        if isinstance(event.get("choices"), list):
            seen.is_answer = True
        if seen.is_answer and seen.id is not None and seen.model is not None:
            self._wanted = 0
        usage = event.get("usage")
        seen._report(_tokens(usage))
        return isinstance(usage, dict) and not event.get("choices")

    def _take_response(self, event: dict[str, Any]) -> None:
        seen = self._seen
        kind = event.get("type")
        if not isinstance(kind, str) or not kind.startswith("response."):
            return
        seen.is_answer = True
        response = _object(event.get("response")) or event
        if response is not event or "usage" in event:
            seen._describe(response)
            seen._report(_tokens(response.get("usage") or event.get("usage")))
        if seen.id is not None:
            self._wanted = 0
        if kind in ("response.completed", "response.incomplete", "response.failed", "response.cancelled"):
            self.is_done = True
            seen.failed = kind in ("response.failed", "response.cancelled") or response.get("status") in (
                "failed",
                "cancelled",
            )
            if response.get("output"):
                seen.has_output = True
            for item in _objects(response.get("output")):
                seen.images += item.get("type") == "image_generation_call" and bool(item.get("result"))

    def _take_run(self, event: dict[str, Any]) -> None:
        if event.get("object") != "thread.run":
            return
        seen = self._seen
        seen.is_answer = True
        seen._describe(event)
        seen._report(_tokens(event.get("usage")))
        if event.get("status") in _RUN_ENDS:
            self._finished = True
            self.is_done = True
            seen.failed = event.get("status") in ("failed", "cancelled", "expired")

    def _take_typed(self, event: dict[str, Any]) -> None:
        seen = self._seen
        kind = event.get("type")
        if not isinstance(kind, str):
            return
        seen.is_answer = True
        self._wanted = 0
        seen._describe({name: value for name, value in event.items() if name != "id"})
        if kind.endswith((".completed", ".done")):
            seen._report(_usage_of(self._door, event))
            if self._reads == "images":
                seen.images += 1
                self._finished = True
                self.is_done = seen.images >= self._images_wanted
            elif kind in ("transcript.text.done", "speech.audio.done"):
                self.is_done = True


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
