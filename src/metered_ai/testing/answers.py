"""What a provider says: the bodies and event streams of the OpenAI endpoints, made from a request and an `Answer`."""

from __future__ import annotations

import base64
import json
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from threading import Event

__all__ = ["Answer", "Received", "Spoken", "UsageReport", "speak"]

Json = dict[str, Any]

UsageReport = Literal["asked", "never", "unasked", "every", "repeated", "zero", "malformed"]
"""
When and how an answer tells its usage; plain answers tell it always unless "never".

"asked": as OpenAI does, on streams only with `include_usage`. "unasked": asked or not, on the last chunk that still has a choice.
"every": on each chunk, growing. "repeated": one usage for each of `n` choices. "zero": zeros beside text. "malformed": no numbers.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """
    How the provider answers one request. The defaults are a good answer, at once.

    What is said:

    - `text`, in a stream word by word; `tool_calls` as (name, arguments) instead of text; `finish` is the finish reason
      ("length" makes a response incomplete, "failed" and "cancelled" make it so).
    - `id` (None: a new one; "" is possible), `model` (None: the request's), `created` (None: now), `extra` fields beside them.
    - `input_tokens`, `output_tokens` (None: the words said), and in `usage` how they are told: a `UsageReport`, or a mapping
      that is sent as it is.

    How it goes wrong:

    - `status` with an OpenAI-like error; `body` instead of the endpoint's own (a text that begins with "<" is sent as HTML, all
      else as JSON, broken or not); `headers` added, or removed by None, such as `{"x-request-id": None}`. The SDK waits half a
      second and more before it tries again; `{"retry-after-ms": "1"}` hurries it.
    - `gate`: the headers wait for this event, for ever if nobody sets it. `reset`: the connection is reset instead of answered.
    - `stall_after` so many events until `resume` is set (None: for ever); `cut_after` so many events, or `cut_bytes` of the body,
      the connection is closed; `error_after` so many events an error event ends the stream; `done=False` leaves out the stream's
      terminal marker.
    - `gzip` compresses. `pause` is a latency in seconds before the headers and before each event, for load tests.
    """

    text: str = "The quick brown fox jumps over the lazy dog."
    tool_calls: Sequence[tuple[str, str]] = ()
    finish: str = "stop"
    id: str | None = None
    model: str | None = None
    created: int | None = None
    extra: Mapping[str, object] = field(default_factory=dict[str, object])
    input_tokens: int = 10
    output_tokens: int | None = None
    usage: UsageReport | Mapping[str, object] = "asked"
    status: int = 200
    body: str | bytes | Mapping[str, object] | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    gate: Event | None = None
    reset: bool = False
    stall_after: int | None = None
    resume: Event | None = None
    cut_after: int | None = None
    cut_bytes: int | None = None
    error_after: int | None = None
    done: bool = True
    gzip: bool = False
    pause: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """
    A request as it reached the provider.

    `path` is without query and without the prefixes of the API ("/v1", Azure's "/openai/deployments/…"); `url` is as sent. The
    names of `headers` are in lower case, credentials read "***". `body` is the JSON, or the text fields of a form.
    """

    index: int
    method: str
    path: str
    url: str
    headers: Mapping[str, str]
    body: Json
    content: bytes


class Spoken(NamedTuple):
    """What is to be sent: one body, or events; and whether that is a generation that somebody could be billed for."""

    content_type: str
    body: bytes
    events: list[bytes] | None = None
    is_generation: bool = False
    id: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


class _Saying(NamedTuple):
    """One answer in the making."""

    request: Received
    answer: Answer
    id: str
    has_id: bool
    created: int
    model: str
    pieces: list[str]

    @property
    def n(self) -> int:
        count = self.request.body.get("n")
        return int(count) if isinstance(count, int | str) and str(count).isdigit() and int(count) else 1

    @property
    def is_stream(self) -> bool:
        return self.request.body.get("stream") in (True, "true")

    @property
    def each(self) -> int:
        """Output tokens of one choice."""
        if self.answer.output_tokens is not None:
            return self.answer.output_tokens // self.n
        return sum(len(_words(arguments)) for _, arguments in self.answer.tool_calls) or len(self.pieces)

    @property
    def output_tokens(self) -> int:
        return self.each * self.n if self.answer.output_tokens is None else self.answer.output_tokens

    def usage(self, shape: _Shape, output_tokens: int | None = None) -> Json:
        """The usage as the answer tells it, under the key "usage"; nothing if it tells none."""
        report = self.answer.usage
        if not isinstance(report, str):
            return {"usage": dict(report)}
        if report == "never":
            return {}
        if report == "malformed":
            return {"usage": {name: ["many", -1, None][at % 3] for at, name in enumerate(shape(0, 0))}}
        if report == "zero":
            return {"usage": shape(0, 0)}
        total = self.each if report == "repeated" else self.output_tokens
        return {"usage": shape(self.answer.input_tokens, total if output_tokens is None else output_tokens)}

    def whole(self, body: Json) -> Spoken:
        return self._spoken("application/json", _dump({**body, **self.answer.extra}), None)

    def text(self, content_type: str, body: bytes) -> Spoken:
        return self._spoken(content_type, body, None)

    def stream(self, events: Sequence[Json], error: Json, *, named: bool = True, done: bool = False) -> Spoken:
        """`named` events carry their type in a line of its own. With `done` the terminal marker is [DONE], else the last event."""
        lines = [_event(event, named=named) for event in events]
        if done:
            lines.append(b"data: [DONE]\n\n")
        if not self.answer.done:
            del lines[-1]
        if self.answer.error_after is not None:
            lines[self.answer.error_after :] = [_event(error, named=named)]
        return self._spoken("text/event-stream; charset=utf-8", b"", lines)

    def _spoken(self, content_type: str, body: bytes, events: list[bytes] | None) -> Spoken:
        told = self.answer.usage
        used = (self.answer.input_tokens, self.output_tokens)
        if not isinstance(told, str):
            used = (_count(told, "prompt_tokens", "input_tokens"), _count(told, "completion_tokens", "output_tokens"))
        return Spoken(content_type, body, events, True, self.id if self.has_id else None, *used)


_Shape = Callable[[int, int], Json]


def speak(request: Received, answer: Answer, fresh: str) -> Spoken:
    """What `answer` says to `request`. `fresh` becomes a new id, behind the kind's own prefix."""
    if answer.body is not None:
        return _literal(answer.body)
    if answer.status >= 300:
        return Spoken("application/json", _dump(_error(f"status {answer.status} was asked for", str(answer.status))))

    _, prefix, say = next(entry for entry in _ENDPOINTS if entry[0].fullmatch(f"{request.method} {request.path}"))
    saying = _Saying(
        request,
        answer,
        f"{prefix}{fresh}" if answer.id is None else answer.id,
        bool(prefix),
        int(time.time()) if answer.created is None else answer.created,
        answer.model or str(request.body.get("model") or "fake-model"),
        _words(answer.text),
    )
    return say(saying)


# How usage is told: the families of the API.


def _completion_usage(given: int, made: int) -> Json:
    return {
        "prompt_tokens": given,
        "completion_tokens": made,
        "total_tokens": given + made,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _response_usage(given: int, made: int) -> Json:
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + made,
    }


def _embedding_usage(given: int, _: int) -> Json:
    return {"prompt_tokens": given, "total_tokens": given}


def _image_usage(given: int, made: int) -> Json:
    details = {"text_tokens": given, "image_tokens": 0}
    return {"input_tokens": given, "input_tokens_details": details, "output_tokens": made, "total_tokens": given + made}


def _audio_usage(given: int, made: int) -> Json:
    details = {"text_tokens": 0, "audio_tokens": given}
    return {
        "type": "tokens",
        "input_tokens": given,
        "input_token_details": details,
        "output_tokens": made,
        "total_tokens": given + made,
    }


# What each endpoint says.


def _chat(saying: _Saying) -> Spoken:
    if saying.is_stream:
        return _chunks(saying, "chat.completion.chunk", _chat_deltas(saying))

    message: Json = {"role": "assistant", "content": saying.answer.text, "refusal": None, "annotations": []}
    if saying.answer.tool_calls:
        message |= {"content": None, "tool_calls": _tool_calls(saying)}
    choices = [
        {"index": at, "message": message, "logprobs": None, "finish_reason": _finish(saying)} for at in range(saying.n)
    ]
    return saying.whole(_head(saying, "chat.completion") | {"choices": choices} | saying.usage(_completion_usage))


def _chat_deltas(saying: _Saying) -> list[Json]:
    deltas: list[Json] = [{"role": "assistant", "content": None if saying.answer.tool_calls else ""}]
    for call in _tool_calls(saying):
        function = call["function"]
        deltas.append({"tool_calls": [{**call, "function": {**function, "arguments": ""}}]})
        deltas += [
            {"tool_calls": [{"index": call["index"], "function": {"arguments": piece}}]}
            for piece in _words(function["arguments"])
        ]
    if not saying.answer.tool_calls:
        deltas += [{"content": piece} for piece in saying.pieces]
    return [{"delta": delta} for delta in [*deltas, {}]]


def _tool_calls(saying: _Saying) -> list[Json]:
    return [
        {
            "index": at,
            "id": f"call_{saying.id}_{at}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for at, (name, arguments) in enumerate(saying.answer.tool_calls)
    ]


def _finish(saying: _Saying) -> str:
    return "tool_calls" if saying.answer.tool_calls and saying.answer.finish == "stop" else saying.answer.finish


def _completion(saying: _Saying) -> Spoken:
    if saying.is_stream:
        return _chunks(saying, "text_completion", [{"text": piece} for piece in [*saying.pieces, ""]])

    choices = [
        {"index": at, "text": saying.answer.text, "logprobs": None, "finish_reason": saying.answer.finish}
        for at in range(saying.n)
    ]
    return saying.whole(_head(saying, "text_completion") | {"choices": choices} | saying.usage(_completion_usage))


def _chunks(saying: _Saying, kind: str, deltas: list[Json]) -> Spoken:
    """Chat and completion streams: a chunk for each delta and choice, then the usage in the way that the answer tells it."""
    report = saying.answer.usage
    options = saying.request.body.get("stream_options")
    asked = isinstance(options, dict) and bool(options.get("include_usage"))
    head: Json = _head(saying, kind) | ({"usage": None} if asked else {}) | dict(saying.answer.extra)

    chunks: list[Json] = []
    for step, delta in enumerate(deltas, 1):
        is_last = step == len(deltas)
        for at in range(saying.n):
            choice = {"index": at, **delta, "logprobs": None, "finish_reason": _finish(saying) if is_last else None}
            chunk = head | {"choices": [choice]}
            if report == "every":
                chunk |= saying.usage(_completion_usage, saying.output_tokens * step // len(deltas))
            chunks.append(chunk)
    if report == "unasked":
        chunks[-1] |= saying.usage(_completion_usage)
    elif asked and report not in ("never", "every"):
        last = head | {"choices": []} | saying.usage(_completion_usage)
        chunks += [last] * (saying.n if report == "repeated" else 1)
    return saying.stream(chunks, _error("The model broke off.", "server_error"), named=False, done=True)


def _head(saying: _Saying, kind: str) -> Json:
    return {"id": saying.id, "object": kind, "created": saying.created, "model": saying.model}


_STATUS = {"length": "incomplete", "failed": "failed", "cancelled": "cancelled"}


def _response(saying: _Saying) -> Spoken:
    status = _STATUS.get(saying.answer.finish, "completed")
    items = [_item(saying, at) for at in range(len(saying.answer.tool_calls) or 1)]
    final = _response_object(saying, status, items) | saying.usage(_response_usage)
    if not saying.is_stream:
        return saying.whole(final)

    started = _response_object(saying, "in_progress", [])
    if saying.answer.usage == "every":
        started |= saying.usage(_response_usage, 0)
    events: list[Json] = [
        {"type": "response.created", "response": started},
        {"type": "response.in_progress", "response": started},
    ]
    for at, item in enumerate(items):
        events += _item_events(saying, at, item)
    events.append({"type": f"response.{status}", "response": final | dict(saying.answer.extra)})
    error: Json = {"type": "error", "code": "server_error", "message": "The model broke off.", "param": None}
    return saying.stream(
        [event | {"sequence_number": at} for at, event in enumerate(events)], error | {"sequence_number": len(events)}
    )


def _response_object(saying: _Saying, status: str, items: list[Json]) -> Json:
    return {
        "id": saying.id,
        "object": "response",
        "created_at": saying.created,
        "status": status,
        "model": saying.model,
        "output": items,
        "error": {"code": "server_error", "message": "The model broke off."} if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
    }


def _item(saying: _Saying, at: int) -> Json:
    if saying.answer.tool_calls:
        name, arguments = saying.answer.tool_calls[at]
        call = {"type": "function_call", "id": f"fc_{saying.id}_{at}", "call_id": f"call_{saying.id}_{at}"}
        return call | {"name": name, "arguments": arguments, "status": "completed"}
    part = {"type": "output_text", "text": saying.answer.text, "annotations": []}
    return {"type": "message", "id": f"msg_{saying.id}", "role": "assistant", "status": "completed", "content": [part]}


def _item_events(saying: _Saying, at: int, item: Json) -> list[Json]:
    place = {"item_id": item["id"], "output_index": at}
    if item["type"] == "function_call":
        opening = item | {"arguments": "", "status": "in_progress"}
        kind = "response.function_call_arguments"
        middle = [place | {"type": f"{kind}.delta", "delta": piece} for piece in _words(item["arguments"])]
        middle.append(place | {"type": f"{kind}.done", "name": item["name"], "arguments": item["arguments"]})
    else:
        opening = item | {"content": [], "status": "in_progress"}
        part = item["content"][0]
        inside = place | {"content_index": 0}
        delta = inside | {"type": "response.output_text.delta", "logprobs": []}
        middle = [
            inside | {"type": "response.content_part.added", "part": part | {"text": ""}},
            *(delta | {"delta": piece} for piece in saying.pieces),
            inside | {"type": "response.output_text.done", "text": saying.answer.text, "logprobs": []},
            inside | {"type": "response.content_part.done", "part": part},
        ]
    return [
        {"type": "response.output_item.added", "output_index": at, "item": opening},
        *middle,
        {"type": "response.output_item.done", "output_index": at, "item": item},
    ]


def _compaction(saying: _Saying) -> Spoken:
    body = {
        "id": saying.id,
        "object": "response.compaction",
        "created_at": saying.created,
        "output": [_item(saying, 0)],
    }
    return saying.whole(body | saying.usage(_response_usage))


def _decision(saying: _Saying) -> Spoken:
    answers = [{"type": "predicate", "name": None, "probability": 0.75}]
    body = {"object": "decision", "created_at": saying.created, "model": saying.model, "answers": answers}
    return saying.whole(body | saying.usage(_response_usage))


def _embeddings(saying: _Saying) -> Spoken:
    given = saying.request.body.get("input")
    count = len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    vector: Any = [0.5, -0.25, 0.125, 0.0]
    if saying.request.body.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack("<4f", *vector)).decode()
    data = [{"object": "embedding", "index": at, "embedding": vector} for at in range(count)]
    return saying.whole({"object": "list", "data": data, "model": saying.model} | saying.usage(_embedding_usage))


# The smallest PNG there is: one black point.
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="


def _images(saying: _Saying) -> Spoken:
    if not saying.is_stream:
        data = [{"b64_json": _PNG} for _ in range(saying.n)]
        return saying.whole({"created": saying.created, "data": data} | saying.usage(_image_usage))

    kind = "image_edit" if saying.request.path.endswith("edits") else "image_generation"
    picture = {"b64_json": _PNG, "created_at": saying.created, "background": "opaque", "output_format": "png"}
    picture |= {"quality": "low", "size": "1024x1024"}
    partials = int(saying.request.body.get("partial_images") or 0)
    events: list[Json] = [
        picture | {"type": f"{kind}.partial_image", "partial_image_index": at} for at in range(partials)
    ]
    events.append(picture | {"type": f"{kind}.completed"} | dict(saying.answer.extra) | saying.usage(_image_usage))
    return saying.stream(events, {"type": "error"} | _error("The model broke off.", "server_error"))


def _variations(saying: _Saying) -> Spoken:
    return saying.whole({"created": saying.created, "data": [{"b64_json": _PNG} for _ in range(saying.n)]})


_SOUND = b"ID3\x04\x00\x00\x00\x00\x00\x00" + bytes(range(256)) * 16


def _speech(saying: _Saying) -> Spoken:
    if saying.request.body.get("stream_format") != "sse":
        return saying.text("audio/mpeg", _SOUND)

    parts = [_SOUND[at : at + 1024] for at in range(0, len(_SOUND), 1024)]
    events: list[Json] = [{"type": "speech.audio.delta", "audio": base64.b64encode(part).decode()} for part in parts]
    events.append({"type": "speech.audio.done"} | saying.usage(_audio_usage))
    return saying.stream(events, {"type": "error"} | _error("The model broke off.", "server_error"), named=False)


def _transcription(saying: _Saying) -> Spoken:
    text = saying.answer.text
    if saying.is_stream:
        events: list[Json] = [{"type": "transcript.text.delta", "delta": piece} for piece in saying.pieces]
        events.append({"type": "transcript.text.done", "text": text} | saying.usage(_audio_usage))
        return saying.stream(events, {"type": "error"} | _error("The model broke off.", "server_error"), named=False)

    form = saying.request.body.get("response_format")
    if form in ("text", "srt", "vtt"):
        return saying.text("text/plain; charset=utf-8", text.encode() + b"\n")
    if form == "verbose_json":
        verbose = {"task": "transcribe", "language": "english", "duration": 2.5, "text": text, "segments": []}
        usage = {} if saying.answer.usage == "never" else {"usage": {"type": "duration", "seconds": 3}}
        return saying.whole(verbose | usage)
    return saying.whole({"text": text} | saying.usage(_audio_usage))


def _translation(saying: _Saying) -> Spoken:
    form = saying.request.body.get("response_format")
    if form in ("text", "srt", "vtt"):
        return saying.text("text/plain; charset=utf-8", saying.answer.text.encode() + b"\n")
    verbose = {"language": "english", "duration": 2.5, "segments": []} if form == "verbose_json" else {}
    return saying.whole({"text": saying.answer.text} | verbose)


_HARMS = (
    "harassment harassment/threatening hate hate/threatening illicit illicit/violent self-harm self-harm/instructions "
    "self-harm/intent sexual sexual/minors violence violence/graphic"
).split()


def _moderation(saying: _Saying) -> Spoken:
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_HARMS, False),
        "category_scores": dict.fromkeys(_HARMS, 0.0),
        "category_applied_input_types": {harm: ["text"] for harm in _HARMS},
    }
    return saying.whole({"id": saying.id, "model": saying.model, "results": [result]})


def _search(saying: _Saying) -> Spoken:
    hit: Json = {"file_id": "file_1", "filename": "fox.txt", "score": 0.5, "attributes": {}}
    hit["content"] = [{"type": "text", "text": saying.answer.text}]
    query = saying.request.body.get("query")
    page = {"object": "vector_store.search_results.page", "search_query": query if isinstance(query, list) else [query]}
    return saying.whole(page | {"data": [hit], "has_more": False, "next_page": None})


_GRADER_ERRORS = (
    "formula_parse_error invalid_variable_error model_grader_parse_error model_grader_refusal_error model_grader_server_error "
    "other_error python_grader_runtime_error python_grader_server_error sample_parse_error truncated_observation_error "
    "unresponsive_reward_error"
).split()


def _grader(saying: _Saying) -> Spoken:
    metadata: Json = {
        "name": "grader",
        "type": "string_check",
        "execution_time": 0.1,
        "scores": {},
        "sampled_model_name": None,
    }
    metadata["errors"] = dict.fromkeys(_GRADER_ERRORS, False)
    if saying.answer.usage != "never":
        metadata["token_usage"] = saying.answer.input_tokens + saying.output_tokens
    return saying.whole(
        {"metadata": metadata, "model_grader_token_usage_per_model": {}, "reward": 1.0, "sub_rewards": {}}
    )


def _provenance(saying: _Saying) -> Spoken:
    result = {"type": "c2pa", "outcome": "not_detected", "validation_state": "not_present"}
    return saying.whole({"object": "content_provenance_check", "created_at": saying.created, "results": [result]})


def _thread_run(saying: _Saying) -> Spoken:
    run: Json = dict.fromkeys(
        "cancelled_at completed_at expires_at failed_at incomplete_details last_error max_completion_tokens max_prompt_tokens "
        "required_action response_format started_at truncation_strategy usage".split()
    )
    run |= {
        "id": saying.id,
        "object": "thread.run",
        "created_at": saying.created,
        "thread_id": "thread_1",
        "assistant_id": "asst_1",
    }
    run |= {
        "model": saying.model,
        "instructions": "",
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "metadata": {},
    }
    queued: Json = run | {"status": "queued"}
    if not saying.is_stream:
        return saying.whole(queued)

    ended = run | {"status": "completed"} | dict(saying.answer.extra) | saying.usage(_completion_usage)
    events = [{"event": "thread.run.created", "data": queued}, {"event": "thread.run.completed", "data": ended}]
    return saying.stream(
        [*events, {"event": "done", "data": "[DONE]"}], {"event": "error", "data": _error("The model broke off.", "")}
    )


def _models(saying: _Saying) -> Spoken:
    model = {"id": "fake-model", "object": "model", "created": saying.created, "owned_by": "metered_ai"}
    return Spoken("application/json", _dump({"object": "list", "data": [model], "has_more": False}))


def _anything(saying: _Saying) -> Spoken:
    """All that costs nothing: it fits an object and an empty list."""
    body: Json = {
        "id": saying.id,
        "object": "list",
        "created": saying.created,
        "data": [],
        "has_more": False,
        "status": "completed",
    }
    return Spoken("application/json", _dump(body | dict(saying.answer.extra)))


_ENDPOINTS: list[tuple[re.Pattern[str], str, Callable[[_Saying], Spoken]]] = [
    (re.compile(pattern), prefix, say)
    for pattern, prefix, say in (
        ("POST /chat/completions", "chatcmpl-", _chat),
        ("POST /completions", "cmpl-", _completion),
        ("POST /responses", "resp_", _response),
        ("POST /responses/compact", "resp_", _compaction),
        ("POST /decisions", "", _decision),
        ("POST /embeddings", "", _embeddings),
        ("POST /images/(generations|edits)", "", _images),
        ("POST /images/variations", "", _variations),
        ("POST /audio/speech", "", _speech),
        ("POST /audio/transcriptions", "", _transcription),
        ("POST /audio/translations", "", _translation),
        ("POST /moderations", "modr-", _moderation),
        ("POST /vector_stores/[^/]+/search", "", _search),
        ("POST /fine_tuning/alpha/graders/run", "", _grader),
        ("POST /content_provenance_checks", "", _provenance),
        ("POST /threads/(runs|[^/]+/runs|[^/]+/runs/[^/]+/submit_tool_outputs)", "run_", _thread_run),
        ("GET /models", "", _models),
        (".*", "obj_", _anything),
    )
]


def _literal(body: str | bytes | Mapping[str, object]) -> Spoken:
    if isinstance(body, Mapping):
        return Spoken("application/json", _dump(dict(body)))
    content = body.encode() if isinstance(body, str) else body
    return Spoken("text/html; charset=utf-8" if content.startswith(b"<") else "application/json", content)


def _error(message: str, code: str) -> Json:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*$|\s*\S+", text) or [text][: len(text)]


def _event(event: Json, *, named: bool) -> bytes:
    if "event" in event:
        data = event["data"]
        return f"event: {event['event']}\ndata: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
    name = f"event: {event['type']}\n" if named else ""
    return f"{name}data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()


def _dump(body: Json) -> bytes:
    return json.dumps(body).encode()


def _count(told: Mapping[str, object], *names: str) -> int:
    found = [value for name in names if isinstance(value := told.get(name), int)]
    return found[0] if found else 0
