"""What is too long to be kept: only its two ends are, and they are read for an id and a usage."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from ..records import Request
from .endpoints import Door
from .observe import SHAPES, Counts, Observation, load, tokens_of, usage_of

__all__ = ["KEEP", "LIMIT", "Clip", "ends_of", "read_ends"]

LIMIT = 256 * 1024
"""The longest body or line, in bytes, that is kept and parsed whole. Of a longer one only the two ends are read."""

KEEP = 64 * 1024
"""How many bytes of each end."""

_PIECE = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"|[{}\[\],:]|[^\s{}\[\],:"]+')
_USAGE = re.compile(rb'"(usage|svg_usage)"\s*:\s*(?=\{)')


def ends_of(head: bytes, tail: bytes) -> dict[str, Any]:
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
                name = load(text)
                key = name if isinstance(name, str) else None
            elif key is not None and len(text) < 1024:
                level = found if len(path) < 2 else found.setdefault(path[1][1] or "", {})
                if isinstance(level, dict):
                    cast("dict[str, Any]", level).setdefault(key, load(text))
    best: dict[str, float] = {}
    for part in (head, tail):
        for match in _USAGE.finditer(part):
            counts, raw = _usage_at(part, match.end())
            name = match[1].decode()
            if counts is not None and counts.total >= best.get(name, 0):
                best[name] = counts.total
                found[name] = raw
    return found


def _usage_at(part: bytes, start: int) -> tuple[Counts | None, object]:
    try:
        raw = json.JSONDecoder().raw_decode(part[start : start + 4096].decode("utf-8", "replace"))[0]
    except (ValueError, RecursionError):
        return None, None
    return tokens_of(raw, needs_output=False), raw


def read_ends(seen: Observation, door: Door, request: Request, head: bytes, tail: bytes | None) -> Observation:
    """An answer by its two ends; without a tail only its beginning is known, and no more is asked of it."""
    body = ends_of(head, tail or b"")
    seen.failed = door.reads == "responses" and body.get("status") in ("failed", "cancelled")
    seen.error = bool(body.get("error"))
    field = f'"{SHAPES.get(door.reads, ("id", object))[0]}"'.encode()
    # Its own field may stand between the two ends, where nobody has looked; then what only an answer has must do.
    tells = body.get("object") == "response" or usage_of(door, body) is not None
    is_whole = tail is None or (tail.rstrip()[-1:] == b"}" and (field in head or field in tail or tells))
    seen.is_answer = is_whole and (not seen.error or seen.failed)
    if seen.is_answer:
        if door.reads in ("embeddings", "images", "search", "grader"):
            body.pop("id", None)
        seen._describe(body)
        seen._report(usage_of(door, body))
        seen.has_output = True
    return seen._finish(door, request)


class Clip:
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
            self.tail = (self.tail + piece[-KEEP:])[-KEEP:]
            return
        self._pieces.append(piece)
        if self.size > LIMIT:
            whole = b"".join(self._pieces)
            self.head, self.tail = whole[:KEEP], whole[-KEEP:]
            self._pieces.clear()

    def whole(self) -> bytes | None:
        """Everything, or None if it was too long to be kept."""
        return b"".join(self._pieces) if self.head is None else None
