from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from timeit import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai.core.bodies import BodyReader, read_body
from metered_ai.core.endpoints import DOORS
from metered_ai.core.ends import LIMIT
from metered_ai.core.observe import Observation, believable_usage, fingerprint, usage_is_empty
from metered_ai.core.streams import StreamReader
from metered_ai.records import MAX_AMOUNT, Request, Usage

CHAT = DOORS["/chat/completions"]
COMPLETIONS = DOORS["/completions"]
RESPONSES = DOORS["/responses"]
COMPACT = DOORS["/responses/compact"]
EMBEDDINGS = DOORS["/embeddings"]
IMAGES = DOORS["/images/generations"]
SPEECH = DOORS["/audio/speech"]
TRANSCRIPTIONS = DOORS["/audio/transcriptions"]
TRANSLATIONS = DOORS["/audio/translations"]
RUNS = DOORS["/threads/{}/runs"]

METERED = [door for door in DOORS.values() if door.access == "metered"]

FAMILY_A = {
    "prompt_tokens": 20,
    "completion_tokens": 9,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 4, "audio_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 2},
}
FAMILY_B = {
    "input_tokens": 20,
    "output_tokens": 9,
    "total_tokens": 29,
    "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 4},
    "output_tokens_details": {"reasoning_tokens": 5},
}


def ask(door, *, stream=False, **body):
    return Request(door.name, "asked", body, stream)


def used(door, **fields):
    return Usage(**{"model": "served", "endpoint": door.name, **fields})


def read(door, body, content_type="application/json", **asked):
    """The observation of a body, which must not depend on who parsed the JSON, or whether it came in pieces."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = ask(door, **asked)
    seen = read_body(door, request, content, None, content_type)
    if not isinstance(body, bytes):
        assert repr(seen) == repr(read_body(door, request, content, body, content_type))
    reader = BodyReader(door, request)
    for start in range(0, len(content), 7):
        reader.feed(content[start : start + 7])
    assert repr(seen) == repr(reader.observation(content_type))
    return seen


def sse(*events, end="\n"):
    """Events as a server sends them; a string is sent as it is, a pair carries the event's name."""
    lines = []
    for event in events:
        name, data = event if isinstance(event, tuple) else (None, event)
        if name:
            lines.append(f"event: {name}")
        lines.extend((f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}", ""))
    return "".join(line + end for line in lines).encode()


def stream(door, *events, pieces=(), **asked):
    """The reader of a stream, which must not learn more or less when events come one by one than when they come at once."""
    pieces = pieces or [sse(event) for event in events]
    readers = []
    for fed in (pieces, [b"".join(pieces)]):
        reader = StreamReader(door, ask(door, stream=True, **asked), count_text=True, hide_usage=False)
        for piece in fed:
            reader.feed(piece)
        assert reader.flush() == b""
        readers.append((repr(reader.observation()), reader.is_done, reader.is_complete))
    assert readers[0] == readers[1]
    reader = StreamReader(door, ask(door, stream=True, **asked), count_text=True, hide_usage=False)
    for piece in pieces:
        reader.feed(piece)
    return reader


def chunk(content=None, finish=None, **fields):
    delta = {} if content is None else {"content": content}
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "served", "choices": choices} | fields


# ---- whole bodies ----


def test_chat():
    """A chat answer gives its id, its usage with every part, and the text of all choices."""
    choices = [
        {"message": {"content": "Hé", "refusal": None}, "finish_reason": "stop"},
        {
            "message": {
                "content": None,
                "reasoning_content": "abc",
                "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            }
        },
    ]

    seen = read(
        CHAT,
        {"id": "c1", "created": 7, "model": "served", "service_tier": "flex", "choices": choices, "usage": FAMILY_A},
    )

    assert (True, "c1", 7, "served", "flex") == (seen.is_answer, seen.id, seen.created, seen.model, seen.service_tier)
    assert (True, 6, 1, 0) == (seen.has_output, seen.ascii_chars, seen.other_chars, seen.images)
    assert seen.usage == used(
        CHAT,
        service_tier="flex",
        input_tokens=20,
        cached_input_tokens=8,
        cache_write_tokens=4,
        output_tokens=9,
        reasoning_tokens=5,
        audio_tokens=5,
    )


def test_chat_without_usage():
    """No usage is None, never zero; the asked model stands in where none is served."""
    seen = read(CHAT, {"id": "c1", "choices": [{"message": {"content": "Hi"}}], "usage": None})

    assert (True, None, 2) == (seen.is_answer, seen.usage, seen.ascii_chars)
    assert "asked" == read(CHAT, {"choices": [], "usage": FAMILY_A}).usage.model


def test_completion():
    """The older completions are read alike."""
    seen = read(
        COMPLETIONS, {"id": "c1", "model": "served", "choices": [{"text": "Hi"}, {"text": "Ho"}], "usage": FAMILY_A}
    )

    assert (True, "c1", 4, 9) == (seen.is_answer, seen.id, seen.ascii_chars, seen.usage.output_tokens)


def test_response():
    """A response gives its usage, the text of its items and the images that a tool drew."""
    output = [
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "ab"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi", "annotations": []}]},
        {"type": "function_call", "arguments": "{}", "name": "f"},
        {"type": "image_generation_call", "result": "aGk="},
    ]

    seen = read(
        RESPONSES,
        {
            "id": "r1",
            "created_at": 7.5,
            "model": "served",
            "status": "completed",
            "error": None,
            "output": output,
            "usage": FAMILY_B,
        },
    )

    assert (True, False, "r1", 7.5) == (seen.is_answer, seen.failed, seen.id, seen.created)
    assert (6, 1, True) == (seen.ascii_chars, seen.images, seen.has_output)
    assert seen.usage == used(
        RESPONSES,
        input_tokens=20,
        cached_input_tokens=8,
        cache_write_tokens=4,
        output_tokens=9,
        reasoning_tokens=5,
        images=1,
    )


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_failed_response(status):
    """A response that the provider calls failed is one, with its id and what usage it has."""
    seen = read(RESPONSES, {"id": "r1", "status": status, "error": {"code": "x"}, "output": [], "usage": None})

    assert (True, True, "r1", None) == (seen.is_answer, seen.failed, seen.id, seen.usage)


def test_compact_leaves_out_the_user():
    """A compaction repeats the user's messages, which nobody generated."""
    output = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "long question"}]},
        {"type": "compaction", "encrypted_content": "x"},
    ]

    seen = read(COMPACT, {"id": "k1", "created_at": 7, "output": output, "usage": FAMILY_B})

    assert ("k1", 0, True, 9) == (seen.id, seen.ascii_chars, seen.has_output, seen.usage.output_tokens)


def test_embeddings():
    """Embeddings report input only, and that is a usage; they have no id."""
    seen = read(
        EMBEDDINGS,
        {
            "id": "x",
            "data": [{"embedding": [0.1]}],
            "model": "served",
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
        },
    )

    assert seen.usage == used(EMBEDDINGS, input_tokens=5, output_tokens=0)
    assert (None, seen.usage) == (seen.id, believable_usage(EMBEDDINGS, seen))


def test_images():
    """Images are counted, and what the model that writes an SVG used is added."""
    usage = {
        "input_tokens": 10,
        "output_tokens": 100,
        "total_tokens": 110,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 10},
    }
    svg = {"input_tokens": 1, "output_tokens": 2, "reasoning_tokens": 1, "total_tokens": 3, "model": "m"}

    plain = read(IMAGES, {"created": 7, "data": [{"b64_json": "x"}, {"url": "y"}], "usage": usage})
    drawn = read(IMAGES, {"created": 7, "data": [{"b64_json": "x"}], "usage": usage, "svg_usage": svg})
    older = read(IMAGES, {"created": 7, "data": [{"url": "x"}] * 3})

    assert (10, 100, 2) == (plain.usage.input_tokens, plain.usage.output_tokens, plain.usage.images)
    assert (11, 102, 1, 1) == (
        drawn.usage.input_tokens,
        drawn.usage.output_tokens,
        drawn.usage.reasoning_tokens,
        drawn.usage.images,
    )
    assert Usage(model="asked", endpoint=IMAGES.name, images=3) == older.usage


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {
                "usage": {
                    "type": "tokens",
                    "input_tokens": 8,
                    "output_tokens": 2,
                    "input_token_details": {"audio_tokens": 7},
                }
            },
            {"input_tokens": 8, "output_tokens": 2, "audio_tokens": 7},
        ),
        ({"usage": {"type": "duration", "seconds": 12.5}}, {"seconds": 12.5}),
        ({"duration": 12.5, "language": "en"}, {"seconds": 12.5}),
        ({}, None),
    ],
)
def test_transcription(body, expected):
    """A transcription reports tokens, or seconds, or nothing."""
    seen = read(TRANSCRIPTIONS, {"text": "Hi"} | body)

    assert (True, 2) == (seen.is_answer, seen.ascii_chars)
    assert seen.usage == (expected and used(TRANSCRIPTIONS, model="asked", **expected))


@pytest.mark.parametrize("kind", ["text", "srt", "vtt"])
def test_transcription_as_text(kind):
    """Plain text is an answer to who asked for it, but not to anybody else."""
    seen = read(TRANSLATIONS, "Hé".encode(), "text/plain; charset=utf-8", response_format=kind)

    assert (True, 1, 1, None) == (seen.is_answer, seen.ascii_chars, seen.other_chars, seen.usage)
    assert not read(TRANSLATIONS, b"<html>", "text/html", response_format=kind).is_answer
    assert not read(TRANSLATIONS, b"busy", "text/plain", response_format="json").is_answer


def test_speech():
    """Sound is an answer without usage; what is no sound is none."""
    seen = read(SPEECH, b"\xff\xfb" * 40, "audio/mpeg")

    assert (True, True, None) == (seen.is_answer, seen.has_output, seen.usage)
    assert not read(SPEECH, b"", "audio/mpeg").is_answer
    assert not read(SPEECH, b"<html>busy</html>", "text/html").is_answer
    assert not read(SPEECH, b'{"error": {"message": "no"}}', "application/json").is_answer


def test_speech_as_events():
    """Speech that was asked for as an event stream tells its usage in the last event."""
    content = sse(
        {"type": "speech.audio.delta", "audio": "aGk="},
        {"type": "speech.audio.done", "usage": {"input_tokens": 3, "output_tokens": 9, "total_tokens": 12}},
    )

    seen = read(SPEECH, content, "text/event-stream", stream_format="sse")

    assert (True, 3, 9) == (seen.is_answer, seen.usage.input_tokens, seen.usage.output_tokens)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/decisions", {"answers": [{}], "model": "served", "usage": FAMILY_B}, 20),
        ("/moderations", {"id": "m1", "model": "served", "results": [{}]}, None),
        ("/vector_stores/{}/search", {"object": "page", "data": [{"file_id": "f"}]}, None),
        ("/fine_tuning/alpha/graders/run", {"reward": 1.0, "metadata": {"token_usage": 20}}, 20),
        ("/fine_tuning/alpha/graders/run", {"reward": 1.0, "metadata": {"token_usage": None}}, None),
        ("/content_provenance_checks", {"object": "content_provenance_check", "created_at": 7, "results": []}, None),
    ],
)
def test_other_doors(path, body, expected):
    """The remaining doors are read by their own shapes."""
    seen = read(DOORS[path], body)

    assert seen.is_answer
    assert expected == (seen.usage and seen.usage.input_tokens)


@pytest.mark.parametrize("door", METERED, ids=lambda door: door.name)
@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "application/json"),
        (b"<html>502</html>", "text/html"),
        (b"  <!doctype html>", "text/plain"),
        (b'{"error": {"message": "overloaded"}}', "application/json"),
        (b'{"error": "overloaded"}', "application/json"),
        (b'{"detail": "Not Found"}', "application/json"),
        (b'{"id": "c1", "choices": [{"mess', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"choices":' * 100_000, "application/json"),
        (b"null", "application/json"),
        (b"\xff\xfe\x00", "application/json"),
    ],
    ids=range(11),
)
def test_no_answer(door, content, content_type):
    """A page, an error, broken or hostile JSON with status 200 is not this door's answer, and never raises."""
    assert not read_body(door, ask(door), content, None, content_type).is_answer


# ---- usage that cannot be ----

BAD = [None, "9", -1, True, 1.5, float("nan"), float("inf"), MAX_AMOUNT + 1, 10**400, [], {}, [9], {"tokens": 9}]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad)[:20])
def test_malformed_counts(bad):
    """A count that is no whole number counts as absent, and a usage without both counts as none at all."""
    for name in ("prompt_tokens", "completion_tokens"):
        assert read_body(CHAT, ask(CHAT), None, {"choices": [], "usage": FAMILY_A | {name: bad}}, "").usage is None
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        assert (
            read_body(CHAT, ask(CHAT), None, {"choices": [], "usage": FAMILY_A | {name: bad}}, "").usage.output_tokens
            == 9
        )
    details = {"prompt_tokens_details": {"cached_tokens": bad}}

    assert (
        read_body(CHAT, ask(CHAT), None, {"choices": [], "usage": FAMILY_A | details}, "").usage.cached_input_tokens
        is None
    )
    assert read_body(CHAT, ask(CHAT), None, {"choices": [], "usage": bad}, "").usage is None


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "total_tokens": 10,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            5,
        ),
        ({"prompt_tokens": 5, "completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 3}}, 5),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 5,
                "total_tokens": 10,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            5,
        ),
    ],
)
def test_reasoning_left_out(usage, expected):
    """Where a server leaves reasoning out of the output tokens, it is added; where it is in, it is not added twice."""
    usage = read(CHAT, {"choices": [], "usage": usage}).usage

    assert (expected, 3) == (usage.output_tokens, usage.reasoning_tokens)


def test_parts_above_the_whole():
    """More cached tokens than input tokens cannot be; the parts are cut to the whole."""
    details = {"cached_tokens": 90, "cache_write_tokens": 90}
    usage = read(
        CHAT, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": details}}
    ).usage

    assert (5, 5, 0) == (usage.input_tokens, usage.cached_input_tokens, usage.cache_write_tokens)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "id type object status choices output data usage error delta message content response created model text tool_calls"
                " metadata input_tokens output_tokens input_tokens_details".split()
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


@given(st.sampled_from(METERED), json_values)
def test_never_raises(door, value):
    """No JSON makes the readers raise: whole, in pieces or as an event."""
    content = json.dumps(value).encode()
    request = ask(door, stream=True)
    read_body(door, request, content, value, "application/json")
    reader = BodyReader(door, request)
    reader.feed(content)
    reader.observation("application/json", partial=True)

    events = StreamReader(door, request, count_text=True, hide_usage=True)
    events.feed(sse(content.decode(), ("error", content.decode())))
    assert isinstance(events.observation(), Observation)
    fingerprint(events.observation())


@given(st.sampled_from(METERED), st.binary(max_size=200), st.booleans())
def test_never_raises_on_bytes(door, content, hide):
    """No bytes make the readers raise, and none get lost."""
    reader = StreamReader(door, ask(door, stream=True), count_text=True, hide_usage=hide)

    assert content == reader.feed(content) + reader.flush()
    read_body(door, ask(door), content, None, "")


# ---- streams ----


def test_chat_stream():
    """A chat stream gives its id, its text and, where it is sent, its usage; [DONE] ends it."""
    reader = stream(
        CHAT,
        chunk(""),
        chunk("Hi "),
        chunk('"é\n'),
        chunk("\U0001f600"),
        chunk(finish="stop"),
        chunk(choices=[], usage=FAMILY_A, service_tier="flex"),
        "[DONE]",
    )
    seen = reader.observation()

    assert (True, True, True) == (reader.is_done, reader.is_complete, seen.is_answer)
    assert ("c1", 7, "flex") == (seen.id, seen.created, seen.service_tier)
    assert (5, 2, True) == (seen.ascii_chars, seen.other_chars, seen.has_output)
    assert (20, 9, "served", "flex") == (
        seen.usage.input_tokens,
        seen.usage.output_tokens,
        seen.usage.model,
        seen.usage.service_tier,
    )


def test_chat_stream_without_usage():
    """A server that ignores the wish for usage leaves it unknown; a reason to finish ends the answer even without [DONE]."""
    reader = stream(CHAT, chunk("Hi"), chunk(finish="stop"))

    assert (False, True, None) == (reader.is_done, reader.is_complete, reader.observation().usage)


def test_cut_stream():
    """A stream that stops before any end is not complete."""
    reader = stream(CHAT, chunk("Hi"), chunk(" there"))

    assert (False, False, "c1") == (reader.is_done, reader.is_complete, reader.observation().id)


def test_usage_on_a_chunk_with_choices():
    """Usage counts wherever it stands, also beside a choice."""
    seen = stream(CHAT, chunk("Hi"), chunk("", "stop", usage=FAMILY_A), "[DONE]").observation()

    assert 9 == seen.usage.output_tokens


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_largest_usage(order):
    """Of several usages in one stream the one with the largest total counts."""
    usages = [chunk("x"), *(chunk("x", usage={"prompt_tokens": 5, "completion_tokens": count}) for count in order)]

    assert 3 == stream(CHAT, *usages, chunk(finish="stop"), "[DONE]").observation().usage.output_tokens


def test_first_id():
    """The first id that is not empty counts: the first chunk of some servers has none."""
    first = {"id": "", "object": "", "model": "", "choices": [], "prompt_filter_results": [], "created": 0}

    seen = stream(CHAT, first, chunk("Hi"), chunk("Ho", id="c2"), "[DONE]").observation()

    assert ("c1", "served") == (seen.id, seen.model)


def test_tool_calls_in_a_stream():
    """Arguments of tools count as text, and a call without any is output, too."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    choices = [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]
    more = [
        {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]}, "finish_reason": None}
    ]

    assert stream(CHAT, chunk(choices=choices)).observation().has_output
    assert 3 == stream(CHAT, chunk(choices=choices), chunk(choices=more)).observation().ascii_chars


def test_reasoning_under_two_names():
    """Reasoning that is sent under both of its names is counted once."""
    delta = [{"index": 0, "delta": {"reasoning": "abc", "reasoning_content": "abc"}, "finish_reason": None}]

    assert 3 == stream(CHAT, chunk(choices=delta)).observation().ascii_chars


def test_several_choices_in_a_chunk():
    """Text of every choice counts."""
    choices = [{"index": n, "delta": {"content": "ab"}, "finish_reason": None} for n in range(3)]

    assert 6 == stream(CHAT, chunk(choices=choices)).observation().ascii_chars


def test_text_that_looks_like_usage():
    """What the model writes is never taken for what the server reports."""
    text = '"usage":{"prompt_tokens":1,"completion_tokens":1},"finish_reason":"stop","error":{"x":1}'

    reader = stream(CHAT, chunk("Hi"), chunk(text), chunk("{" + text + "}"), chunk(finish=None))

    assert (None, False, False) == (reader.observation().usage, reader.is_complete, reader.observation().error)
    assert 2 * len(text) + 4 == reader.observation().ascii_chars


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"message": "overloaded"}},
        ("error", {"message": "overloaded"}),
        {"type": "error", "message": "overloaded"},
    ],
)
@pytest.mark.parametrize("door", [CHAT, RESPONSES, IMAGES, RUNS, TRANSCRIPTIONS], ids=lambda door: door.name)
def test_error_in_a_stream(door, event):
    """An error that comes in mid-answer is noticed, and ends nothing well."""
    reader = stream(door, event)

    assert (True, False, False) == (reader.observation().error, reader.observation().is_answer, reader.is_complete)


def choice(**delta):
    return chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}])


@pytest.mark.parametrize(
    ("event", "ascii_chars", "other_chars"),
    [
        (chunk("abc"), 3, 0),
        (chunk("a{b}c"), 5, 0),
        (chunk("a{" + "b" * 20), 22, 0),
        (chunk("é😀"), 0, 2),
        (chunk('"\n'), 2, 0),
        (choice(content="ab", reasoning="cd"), 4, 0),
        (choice(role="assistant", content="ab"), 2, 0),
        (choice(reasoning_content="ab"), 2, 0),
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_deltas(event, is_ascii, ascii_chars, other_chars):
    """The text of a delta is counted right, whatever it holds, and wherever it is cut in two."""
    first = sse(chunk("xx"))
    content = f"data: {json.dumps(event, ensure_ascii=is_ascii, separators=(',', ':'))}\n\n".encode()
    for cut in range(len(content)):
        for hide in (False, True):
            reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=True, hide_usage=hide)
            given_out = [reader.feed(piece) for piece in (first, first, content[:cut], content[cut:], content)]

            assert first * 2 + content * 2 == b"".join(given_out)
            assert (4 + 2 * ascii_chars, 2 * other_chars) == (
                reader.observation().ascii_chars,
                reader.observation().other_chars,
            )


def test_events_in_one_piece():
    """A usage is found although a mere delta follows it in the same piece of bytes."""
    pieces = [sse(chunk("x")), sse(chunk("x")), sse(chunk("x", usage=FAMILY_A), chunk("x"))]

    assert 9 == stream(CHAT, pieces=pieces).observation().usage.output_tokens


def test_output_is_noticed():
    """Output is noticed when it comes, after an empty first delta as well, counted or not."""
    for count_text in (True, False):
        reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=count_text, hide_usage=False)
        reader.feed(sse(chunk("")))
        assert not reader.observation().has_output

        reader.feed(sse(chunk("Hi")))
        assert reader.observation().has_output


def test_late_id():
    """An id that comes only after text was sent is found."""
    assert "c1" == stream(CHAT, chunk("a", id=""), chunk("b", id=""), chunk("c")).observation().id


def test_late_error():
    """An error is noticed after any number of deltas, also where it hides behind a usage that is none."""
    reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=False, hide_usage=False)
    for event in (chunk("x"), chunk("x"), {"usage": None, "error": {"message": "x"}}):
        reader.feed(sse(event))

    assert reader.observation().error


def test_error_beside_a_choice():
    """An error that comes on a chunk with a choice is noticed as well."""
    failing = chunk("", "error", error={"code": 502, "message": "x"})

    assert stream(CHAT, chunk("Hi"), failing).observation().error


def test_response_stream():
    """A response's id comes first, its usage with the terminal event; deltas of every kind count."""
    created = {
        "type": "response.created",
        "response": {"id": "r1", "created_at": 7, "model": "served", "usage": None, "error": None},
    }
    deltas = [
        {"type": "response.output_text.delta", "delta": "Hé", "logprobs": []},
        {"type": "response.function_call_arguments.delta", "delta": "{}"},
        {"type": "response.reasoning_summary_text.delta", "delta": "ab"},
        {"type": "response.audio.delta", "delta": "aGk="},
        {"type": "response.output_text.done", "text": "Hé"},
    ]
    completed = {
        "type": "response.completed",
        "response": {"id": "r1", "status": "completed", "output": [], "usage": FAMILY_B},
    }

    reader = stream(RESPONSES, created, *deltas)
    assert ("r1", False, None) == (reader.observation().id, reader.is_complete, reader.observation().usage)

    reader.feed(sse(("response.completed", completed)))
    seen = reader.observation()
    assert (True, True, False) == (reader.is_done, seen.is_answer, seen.failed)
    assert (5, 1, 20, 9, 5) == (
        seen.ascii_chars,
        seen.other_chars,
        seen.usage.input_tokens,
        seen.usage.output_tokens,
        seen.usage.reasoning_tokens,
    )


@pytest.mark.parametrize(
    ("kind", "failed"),
    [("completed", False), ("incomplete", False), ("failed", True), ("cancelled", True)],
)
def test_response_endings(kind, failed):
    """Each terminal event ends the stream; a failed one may carry a usage."""
    event = {"type": f"response.{kind}", "response": {"id": "r1", "status": kind, "output": [], "usage": FAMILY_B}}

    reader = stream(RESPONSES, {"type": "response.created", "response": {"id": "r1"}}, event)

    assert (True, failed, 9) == (reader.is_done, reader.observation().failed, reader.observation().usage.output_tokens)


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_image_stream(kind):
    """An image stream ends with as many images as were asked for."""
    partial = {"type": f"{kind}.partial_image", "b64_json": "eA==", "partial_image_index": 0, "created_at": 7}
    done = {
        "type": f"{kind}.completed",
        "b64_json": "eA==",
        "created_at": 8,
        "usage": {"input_tokens": 3, "output_tokens": 90},
    }

    reader = stream(IMAGES, partial)
    assert (False, True) == (reader.is_complete, reader.observation().has_output)

    reader = stream(IMAGES, partial, done)
    assert (True, 1, 90) == (
        reader.is_done,
        reader.observation().usage.images,
        reader.observation().usage.output_tokens,
    )

    reader = stream(IMAGES, partial, done, n=2)
    assert (False, True) == (reader.is_done, reader.is_complete)


def test_transcription_stream():
    """A transcription ends with its text and usage."""
    reader = stream(
        TRANSCRIPTIONS,
        {"type": "transcript.text.delta", "delta": "Hi"},
        {
            "type": "transcript.text.done",
            "text": "Hi",
            "usage": {"type": "tokens", "input_tokens": 8, "output_tokens": 2},
        },
    )

    assert (True, 8, 2) == (reader.is_done, reader.observation().usage.input_tokens, reader.observation().ascii_chars)


def test_run_stream():
    """A run of an assistant is named by the run, not by its thread or messages, and ends with the run."""
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    run = {
        "id": "run_1",
        "object": "thread.run",
        "created_at": 7,
        "model": "served",
        "status": "queued",
        "usage": None,
        "last_error": None,
    }
    text = {
        "id": "msg_1",
        "object": "thread.message.delta",
        "delta": {"content": [{"type": "text", "text": {"value": "Hi"}}]},
    }

    reader = stream(
        RUNS,
        ("thread.created", {"id": "thread_1", "object": "thread"}),
        ("thread.run.created", run),
        ("thread.message.delta", text),
    )
    assert ("run_1", False, 2) == (reader.observation().id, reader.is_complete, reader.observation().ascii_chars)

    reader.feed(sse(("thread.run.completed", run | {"status": "completed", "usage": usage}), ("done", "[DONE]")))
    assert (True, 5, False) == (reader.is_done, reader.observation().usage.input_tokens, reader.observation().failed)


@pytest.mark.parametrize("status", [[], {}, None, 9])
def test_run_with_an_odd_status(status):
    """A status that is none ends nothing, and does not raise."""
    reader = stream(RUNS, {"id": "run_1", "object": "thread.run", "status": status})

    assert ("run_1", False) == (reader.observation().id, reader.is_complete)


def test_json_over_several_lines():
    """An event whose JSON stands on several data lines is read as one."""
    lines = json.dumps(chunk("Hi", "stop", usage=FAMILY_A), indent=1).splitlines()
    content = "".join(f"data: {line}\n" for line in lines) + "\n"

    seen = stream(CHAT, pieces=[content.encode()]).observation()

    assert ("c1", 9) == (seen.id, seen.usage.output_tokens)


def test_stream_in_a_plain_body():
    """A server that streams although nobody asked is read as what it sends."""
    content = sse(chunk("Hi"), chunk(finish="stop"), chunk(choices=[], usage=FAMILY_A), "[DONE]")

    seen = read_body(CHAT, ask(CHAT), content, None, "text/event-stream; charset=utf-8")

    assert (True, 9, 2) == (seen.is_answer, seen.usage.output_tokens, seen.ascii_chars)


# ---- bytes, cut anywhere ----

EVENTS = (
    chunk("Hé \U0001f600"),
    chunk("Ho", usage=None),
    chunk("", "stop", usage={"prompt_tokens": 20, "completion_tokens": 1}),
    chunk(choices=[], usage=FAMILY_A),
    "[DONE]",
)


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 1300), max_size=12), st.booleans(), st.booleans())
def test_cuts(end, cuts, hide, is_compact):
    """Where the bytes are cut changes nothing: neither what is learnt nor what the caller sees."""
    separators = (",", ":") if is_compact else (", ", ": ")
    events = [
        json.dumps(event, separators=separators, ensure_ascii=is_compact) if isinstance(event, dict) else event
        for event in EVENTS
    ]
    content = sse(*events, end=end)
    shown = sse(*(event for event in events if '"choices":[]' not in event.replace(" ", "")), end=end)
    points = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    pieces = [content[start:stop] for start, stop in pairwise(points)]

    reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=True, hide_usage=hide)
    given_out = b"".join([reader.feed(piece) for piece in pieces]) + reader.flush()
    seen = reader.observation()

    assert (shown if hide else content) == given_out
    assert (True, "c1", 9) == (reader.is_done, seen.id, seen.usage.output_tokens)
    assert (4, 2) == (seen.ascii_chars, seen.other_chars)


def test_nothing_is_copied():
    """Without hiding, the caller gets the very bytes that came; with it, all but the chunk nobody asked for."""
    pieces = [sse(event) for event in EVENTS]
    plain = StreamReader(CHAT, ask(CHAT, stream=True), count_text=False, hide_usage=False)
    hiding = StreamReader(CHAT, ask(CHAT, stream=True), count_text=False, hide_usage=True)

    assert all(plain.feed(piece) is piece for piece in pieces)
    assert [True, True, True, False, True] == [hiding.feed(piece) is piece for piece in pieces]


def test_no_line_waits():
    """While hiding, a complete line is never held back; an unfinished one waits, and comes out at the end."""
    reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=False, hide_usage=True)
    line = sse(chunk("Hi"))

    assert line[:-1] == reader.feed(line[:-1])
    assert b"\n" == reader.feed(b"\n" + line[:20])
    assert line[:20] == reader.flush()


@pytest.mark.parametrize(
    ("event", "is_hidden"),
    [
        (chunk(choices=[], usage=FAMILY_A), True),
        ({"id": "c1", "usage": FAMILY_A}, True),
        (chunk("Hi", usage=FAMILY_A), False),
        (chunk(choices=[], usage=None), False),
        (chunk(choices=[], prompt_filter_results=[]), False),
        ({"error": {"message": "x"}, "usage": FAMILY_A}, False),
    ],
)
def test_what_is_hidden(event, is_hidden):
    """Only a chunk without choices that carries a usage is hidden."""
    reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=False, hide_usage=True)
    reader.feed(sse(chunk("Hi")))

    assert is_hidden == (reader.feed(sse(event)) + reader.flush() == b"")


def test_long_lines():
    """A line too long to be kept passes at once and costs no memory, and what its ends tell is learnt."""
    output = [{"type": "image_generation_call", "result": "x" * (3 * LIMIT)}]
    body = {
        "id": "r1",
        "object": "response",
        "status": "completed",
        "model": "served",
        "output": output,
        "usage": FAMILY_B,
    }
    content = sse(
        {"type": "response.created", "response": {"id": "r1"}},
        {"type": "response.completed", "response": body},
        "[DONE]",
    )
    reader = StreamReader(RESPONSES, ask(RESPONSES, stream=True), count_text=False, hide_usage=False)
    pieces = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    del content, body, output

    tracemalloc.start()
    for piece in pieces:
        reader.feed(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (True, 20, 9) == (
        reader.is_done,
        reader.observation().usage.input_tokens,
        reader.observation().usage.output_tokens,
    )
    assert peak < 4 * LIMIT


def test_long_lines_while_hiding():
    """Hiding does not hold back a line that is too long for a usage."""
    reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=True, hide_usage=True)
    content = sse(chunk("Hi"), chunk("y" * 100_000), chunk(choices=[], usage=FAMILY_A), "[DONE]")
    given_out = [reader.feed(content[start : start + 4096]) for start in range(0, len(content), 4096)]

    assert sse(chunk("Hi"), chunk("y" * 100_000), "[DONE]") == b"".join(given_out) + reader.flush()
    assert len(given_out[20]) == 4096
    assert (100_002, 9) == (reader.observation().ascii_chars, reader.observation().usage.output_tokens)


def test_long_body():
    """Of a body too long to be kept, the two ends tell id, model, usage and the number of images."""
    images = {"created": 7, "data": [{"b64_json": "x" * LIMIT}] * 3, "usage": {"input_tokens": 3, "output_tokens": 90}}
    chat = {
        "id": "c1",
        "created": 7,
        "model": "served",
        "choices": [{"message": {"content": "x" * 3 * LIMIT}}],
        "usage": FAMILY_A,
    }

    drawn, said = BodyReader(IMAGES, ask(IMAGES)), BodyReader(CHAT, ask(CHAT))
    for reader, body in ((drawn, images), (said, chat)):
        content = json.dumps(body).encode()
        for start in range(0, len(content), 5000):
            reader.feed(content[start : start + 5000])

    assert (True, 7, 3, 90) == (
        (seen := drawn.observation("application/json")).is_answer,
        seen.created,
        seen.usage.images,
        seen.usage.output_tokens,
    )
    assert (True, "c1", "served", 9) == (
        (seen := said.observation("application/json")).is_answer,
        seen.id,
        seen.model,
        seen.usage.output_tokens,
    )
    assert 9 == read_body(CHAT, ask(CHAT), json.dumps(chat).encode(), None, "application/json").usage.output_tokens


def test_partial_body():
    """A body that its reader left early is an answer, with the id and the text that was read."""
    content = json.dumps(
        {"id": "c1", "model": "served", "choices": [{"message": {"content": "Hello"}}], "usage": FAMILY_A}
    ).encode()
    reader = BodyReader(CHAT, ask(CHAT))
    reader.feed(content[: content.index(b'"usage"')])

    seen = reader.observation("application/json", partial=True)

    assert (True, "c1", 5, None) == (seen.is_answer, seen.id, seen.ascii_chars, seen.usage)
    assert not reader.observation("application/json").is_answer


# ---- judging ----


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(), True),
        (Usage(input_tokens=0, output_tokens=0), True),
        (Usage(images=1), True),
        (Usage(input_tokens=1), False),
        (Usage(output_tokens=1), False),
    ],
)
def test_empty_usage(usage, expected):
    """A usage without tokens is empty."""
    assert expected == usage_is_empty(usage)


@pytest.mark.parametrize(
    ("door", "body", "is_believed"),
    [
        (
            CHAT,
            {"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 0, "completion_tokens": 0}},
            False,
        ),
        (
            CHAT,
            {"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 5, "completion_tokens": 0}},
            False,
        ),
        (
            CHAT,
            {"choices": [{"message": {"content": ""}}], "usage": {"prompt_tokens": 5, "completion_tokens": 0}},
            True,
        ),
        (CHAT, {"choices": [{"message": {"content": "Hi"}}], "usage": FAMILY_A}, True),
        (CHAT, {"choices": [{"message": {"content": "Hi"}}]}, False),
        (EMBEDDINGS, {"data": [{}], "usage": {"prompt_tokens": 5}}, True),
        (EMBEDDINGS, {"data": [{}], "usage": {"prompt_tokens": 0, "total_tokens": 0}}, False),
        (IMAGES, {"data": [{}]}, True),
        (TRANSCRIPTIONS, {"text": "Hi", "duration": 3.0}, True),
    ],
)
def test_believable(door, body, is_believed):
    """Zero beside output is no usage; embeddings write nothing; images and seconds are a usage of their own."""
    seen = read(door, body)

    assert (seen.usage if is_believed else None) == believable_usage(door, seen)


def test_fingerprint():
    """Equal for a replay, different for another answer, None where nothing tells two answers apart."""
    body = {"id": "c1", "created": 7, "model": "served", "choices": [], "usage": FAMILY_A}
    print_of = [
        fingerprint(read(CHAT, body | changed))
        for changed in (
            {},
            {},
            {"created": 8},
            {"model": "other"},
            {"usage": {"prompt_tokens": 1, "completion_tokens": 1}},
            {"usage": None},
        )
    ]

    assert print_of[0] == print_of[1]
    assert 5 == len(set(print_of))
    assert 32 == len(print_of[0])
    assert fingerprint(read(CHAT, {"id": "c1", "created": 0, "choices": []})) is None


def test_speed():
    """Watching a typical chunk costs a few microseconds at most, even on a slow machine."""
    typical = sse(
        json.dumps(chunk(" word", usage=None, service_tier="default", system_fingerprint="fp_1"), separators=(",", ":"))
    )
    reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=True, hide_usage=True)
    reader.feed(typical)

    assert min(repeat(lambda: reader.feed(typical), number=2000, repeat=5)) / 2000 < 20e-6


@pytest.mark.parametrize("size", [4096, LIMIT, 4 * LIMIT])
def test_long_event_type_last(size):
    """An event too long to be parsed is known by a type that stands behind what makes it long."""
    event = {
        "b64_json": "x" * 2 * LIMIT,
        "usage": {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12},
        "type": "image_generation.completed",
    }
    content = b"event: image_generation.completed\n" + sse(event)
    reader = StreamReader(IMAGES, ask(IMAGES, stream=True), count_text=False, hide_usage=False)
    for start in range(0, len(content), size):
        reader.feed(content[start : start + size])
    seen = reader.observation()

    assert (True, True, 1) == (seen.is_answer, reader.is_done, seen.images)
    assert 7 == seen.usage.output_tokens


def test_unannounced_stream():
    """An event stream in a body that nobody announced as one is read as such, however long it is."""
    reader = BodyReader(CHAT, ask(CHAT))
    chunk = {"id": "c1", "created": 7, "model": "m", "choices": [{"delta": {"content": "word " * 50}}]}
    for _ in range(2 * LIMIT // 250):
        reader.feed(sse(chunk))
    reader.feed(sse({**chunk, "choices": [], "usage": FAMILY_A}, "[DONE]"))
    seen = reader.observation("text/event-stream")

    assert (True, "c1", FAMILY_A["completion_tokens"]) == (seen.is_answer, seen.id, seen.usage.output_tokens)


def test_long_echo():
    """A response whose echoed request pushes its output out of both ends is an answer all the same."""
    body = {
        "id": "resp_1",
        "object": "response",
        "status": "completed",
        "instructions": "x" * LIMIT,
        "output": [{"type": "message", "content": []}],
        "tools": [{"name": "y" * LIMIT}],
        "usage": FAMILY_B,
    }
    reader = BodyReader(RESPONSES, ask(RESPONSES))
    reader.feed(json.dumps(body).encode())
    seen = reader.observation("application/json")

    assert (True, "resp_1", FAMILY_B["output_tokens"]) == (seen.is_answer, seen.id, seen.usage.output_tokens)


def test_long_chunk():
    """A chat chunk too long to be parsed is an answer, too."""
    chunk = {"id": "c1", "model": "m", "choices": [{"delta": {"audio": {"data": "x" * 2 * LIMIT}}}]}
    reader = StreamReader(CHAT, ask(CHAT, stream=True), count_text=False, hide_usage=False)
    reader.feed(sse(chunk, "[DONE]"))
    seen = reader.observation()

    assert (True, "c1", True) == (seen.is_answer, seen.id, reader.is_done)
