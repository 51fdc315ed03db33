"""
A provider in a process of its own, so that what it costs is not counted: bodies are made beforehand, only ids are patched in.

It prints its port and serves until its standard input ends. The body's `max_completion_tokens` says how many chunks a stream has.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import sys
import threading
from typing import Any

ANSWER = {
    "id": "@",
    "object": "chat.completion",
    "created": 1_760_000_000,
    "model": "gpt-5-mini-2025-08-07",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "The three of them left before dawn, and nobody in the village asked where they were going. "
                * 6,
                "refusal": None,
                "annotations": [],
            },
            "finish_reason": "stop",
            "logprobs": None,
        }
    ],
    "usage": {
        "prompt_tokens": 212,
        "completion_tokens": 131,
        "total_tokens": 343,
        "prompt_tokens_details": {"cached_tokens": 128, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 64,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    },
    "service_tier": "default",
    "system_fingerprint": None,
}

HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 09 Oct 2025 08:00:00 GMT\r\ncontent-type: %s\r\nx-request-id: req_@\r\n"
    b"openai-processing-ms: 321\r\nopenai-version: 2020-10-01\r\n%s\r\n\r\n"
)


def chunk(choices: list[object], **more: object) -> bytes:
    """One event of a stream, as one chunk of the transfer: the SDK sees them one by one, as from a provider that generates."""
    event: dict[str, object] = {
        "id": "@",
        "object": "chat.completion.chunk",
        "created": 1_760_000_000,
        "model": ANSWER["model"],
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": choices,
        **more,
    }
    # Without spaces, as OpenAI writes it.
    data = b"data: %s\n\n" % json.dumps(event, separators=(",", ":")).encode()
    return b"%x\r\n%s\r\n" % (len(data) + len(ID) - 1, data)


ID = b"chatcmpl-0123456789abcdefghijklmnop"


def parts() -> tuple[bytes, bytes, bytes, bytes]:
    """A whole answer; and a stream's beginning, its one chunk of text, and its end."""
    body = json.dumps(ANSWER, separators=(",", ":")).encode()
    whole = HEAD % (b"application/json", b"content-length: %d" % (len(body) + len(ID) - 1)) + body
    begin = HEAD % (b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked") + chunk(
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        usage=None,
        obfuscation="Zq3",
    )
    word = chunk(
        [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
        usage=None,
        obfuscation="tR4u",
    )
    end = (
        chunk([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}], usage=None, obfuscation="x")
        + chunk([], usage=ANSWER["usage"], obfuscation="")
        + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    )
    return whole, begin, word, end


WHOLE, BEGIN, WORD, END = parts()
RUN, COUNT = secrets.token_hex(4), itertools.count()


class Provider(asyncio.Protocol):
    def __init__(self) -> None:
        self.seen = bytearray()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.seen += data
        while (end := self.seen.find(b"\r\n\r\n")) >= 0:
            length = re.search(rb"content-length: (\d+)", self.seen[:end], re.IGNORECASE)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self.seen) < size:
                return
            body = bytes(self.seen[end + 4 : size])
            del self.seen[:size]
            self.transport.write(self.answer(body))

    def answer(self, body: bytes) -> bytes:
        # Ids come in random order, as a provider's may: the ledger's index on them must not profit from their growth.
        name = b"chatcmpl-%s%016x" % (RUN.encode(), next(COUNT) * 0x9E3779B97F4A7C15 % (1 << 64))
        name = name.ljust(len(ID), b"x")
        if b'"stream":true' not in body:
            return WHOLE.replace(b"req_@", b"req_" + name).replace(b"@", name)
        limit = re.search(rb'"max_completion_tokens":(\d+)', body)
        assert limit is not None
        return (BEGIN.replace(b"req_@", b"req_" + name) + WORD * int(limit[1]) + END).replace(b"@", name)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Provider, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    done = asyncio.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(done.set)), daemon=True).start()
    await done.wait()


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())
