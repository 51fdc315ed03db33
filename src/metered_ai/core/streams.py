"""Reads event streams as they pass: only lines that may carry an id, a usage or an end are parsed."""

from __future__ import annotations

import re
from typing import Any, cast

from ..records import Request
from .endpoints import Door
from .ends import KEEP, LIMIT, Clip, ends_of
from .observe import Observation, count_of, load, object_of, objects_of, tokens_of, usage_of

__all__ = ["DELTA", "TEXTS", "StreamReader", "count_strings"]

_STRING = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
DELTA = re.compile(rb'"(delta)' + _STRING)
TEXTS = {
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


def count_strings(seen: Observation, pattern: re.Pattern[bytes], line: bytes, first: int, last: int) -> None:
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
            text = load(b'"' + raw + b'"')
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
        "_counts_text",
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
        self._counts_text = count_text
        self._hide = hide_usage and self._is_chat
        self._text = TEXTS.get(door.reads, DELTA)
        self._seen = Observation()
        self._is_quick = False
        self._clip: Clip | None = None
        self._withheld = b""
        self._drops_blank = False
        self._tail_cr = False
        self._event = b""
        self._many: list[bytes] | None = None
        self._many_size = 0
        self._finished = False
        # The id is taken from the first line that has one; a server that sends none is not asked for ever.
        self._wanted = 32
        self._images_wanted = count_of(request.body.get("n")) or 1

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
                if self._counts_text:
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
        if not self._counts_text:
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
            self._clip = clip = Clip()
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
                if len(line) <= KEEP:
                    self._withheld = line
                else:
                    # Too long for a chunk of usage: what cannot be hidden need not wait.
                    kept.append(line)
                    self._clip = Clip()
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

    def _long_line(self, clip: Clip) -> None:
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

        if self._counts_text and line.find(b"audio.delta", 0, 80) < 0:
            count_strings(seen, self._text, line, first, last)
        if not seen.has_output and _OUTPUT.search(line):
            seen.has_output = True
        if not is_wanted:
            return False

        payload = line[start:]
        if len(payload) > LIMIT:
            return self._take_ends(payload[:KEEP], payload[-KEEP:])
        event = load(payload)
        return isinstance(event, dict) and self._take(cast("dict[str, Any]", event))

    def _take_ends(self, head: bytes, tail: bytes) -> bool:
        """Learn from an event too long to be parsed, whose type may stand behind what makes it long."""
        event = ends_of(head, tail)
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
        seen._report(tokens_of(usage))
        return isinstance(usage, dict) and not event.get("choices")

    def _take_response(self, event: dict[str, Any]) -> None:
        seen = self._seen
        kind = event.get("type")
        if not isinstance(kind, str) or not kind.startswith("response."):
            return
        seen.is_answer = True
        response = object_of(event.get("response")) or event
        if response is not event or "usage" in event:
            seen._describe(response)
            seen._report(tokens_of(response.get("usage") or event.get("usage")))
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
            for item in objects_of(response.get("output")):
                seen.images += item.get("type") == "image_generation_call" and bool(item.get("result"))

    def _take_run(self, event: dict[str, Any]) -> None:
        if event.get("object") != "thread.run":
            return
        seen = self._seen
        seen.is_answer = True
        seen._describe(event)
        seen._report(tokens_of(event.get("usage")))
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
            seen._report(usage_of(self._door, event))
            if self._reads == "images":
                seen.images += 1
                self._finished = True
                self.is_done = seen.images >= self._images_wanted
            elif kind in ("transcript.text.done", "speech.audio.done"):
                self.is_done = True
