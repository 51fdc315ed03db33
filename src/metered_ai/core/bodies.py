"""Reads whole bodies: parsed by somebody already, as bytes, or piece by piece while their caller reads them."""

from __future__ import annotations

from typing import Any, cast

from ..records import Request
from .endpoints import Door
from .ends import KEEP, LIMIT, Clip, read_ends
from .observe import Observation, load, read_json
from .streams import DELTA, TEXTS, StreamReader, count_strings

__all__ = ["LIMIT", "BodyReader", "read_body"]


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
        return read_json(seen, door, request, cast("dict[str, Any]", data), count_text=count_text)
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
            read_ends(seen, door, request, content[:KEEP], content[-KEEP:])
            if seen.usage is not None:
                return seen
            seen = Observation()
        body = load(content)
        if isinstance(body, dict):
            return read_json(seen, door, request, cast("dict[str, Any]", body))
    return _read_bytes(seen, door, request, content[:LIMIT], content_type)


class BodyReader:
    """Watches a body that its caller reads piece by piece, and never keeps more than `LIMIT` bytes of it and a piece."""

    def __init__(self, door: Door, request: Request) -> None:
        self._door = door
        self._request = request
        self._clip = Clip()
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
            seen = read_ends(seen, door, request, whole, None)
            count_strings(seen, TEXTS.get(door.reads, DELTA), whole, 0, len(whole))
            seen.has_output = seen.has_output and seen.ascii_chars + seen.other_chars > 0
            return seen

        head = clip.head or b""
        if head.lstrip()[:1] == b"{" and not (door.reads == "speech" and "json" not in content_type):
            seen.images = self._images
            return read_ends(seen, door, request, head, clip.tail)
        return _read_bytes(seen, door, request, head, content_type)
