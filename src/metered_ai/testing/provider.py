"""
A provider for tests: a real HTTP server on loopback that speaks the OpenAI API and misbehaves on demand.

```python
with FakeProvider() as provider:
    client = OpenAI(base_url=provider.base_url, api_key="none")
    provider.answer(status=429, times=3)        # the next three requests; after them, good answers again
    provider.answer(usage="never", cut_after=5)
    …
    provider.requests[0].body                   # what reached the wire
    provider.issued                             # what was generated, and what it cost
```

`python -m metered_ai.testing.provider --log FILE` runs it as a process of its own, which outlives a client that is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from email import message_from_bytes
from email.message import Message
from http.client import responses
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import parse_qsl

from .answers import Answer, Received, Spoken, UsageReport, speak
from .process import ServerProcess, ready

__all__ = ["Answer", "FakeProvider", "Issued", "ProviderProcess", "Received", "UsageReport"]


@dataclass(frozen=True, slots=True)
class Issued:
    """An answer that a provider would bill. `id` is None where the endpoint's answers have none."""

    index: int
    path: str
    id: str | None
    request_id: str
    input_tokens: int
    output_tokens: int


class FakeProvider:
    """
    An OpenAI-compatible server on loopback, in a thread of this process.

    Every request is answered by the first scripted `Answer` that fits it, else by `default`. Answers keep connections alive, as
    a real server's do. With `log`, each generation is written there as a line of JSON and synced to disk before the first
    byte of its answer leaves, so that the file knows of every answer anybody can have seen.
    """

    def __init__(
        self, *, default: Answer | None = None, port: int = 0, log: str | os.PathLike[str] | None = None
    ) -> None:
        self.default = Answer() if default is None else default
        self.requests: list[Received] = []
        self.issued: list[Issued] = []
        self.completed: list[int] = []
        """The index of each request whose answer was sent to its end."""
        self._script: deque[tuple[str | None, Answer]] = deque()
        self._changed = threading.Condition()
        self._token = secrets.token_hex(4)
        self._log = None if log is None else Path(log).open("ab", buffering=0)  # noqa: SIM115 - `close` closes it.
        self._log_lock = threading.Lock()
        self._closing = threading.Event()
        self._process = os.getpid()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.url: str = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        """The server's root; Azure's `azure_endpoint`."""
        self.base_url: str = f"{self.url}/v1"
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(
        self, answer: Answer | None = None, /, *, times: int = 1, path: str | None = None, **fields: Any
    ) -> None:
        """
        Script the answer to the next request, or the next `times` ones; with `path`, the next ones to that path ("/responses").

        `fields` are those of `Answer`; a misspelled one is a TypeError.
        """
        scripted = replace(Answer() if answer is None else answer, **fields)
        with self._changed:
            self._script.extend((path, scripted) for _ in range(times))

    def wait_for_requests(self, count: int, timeout: float = 10.0) -> None:
        """Wait until `count` requests have arrived since the start; TimeoutError if they do not."""
        self._wait_until(lambda: len(self.requests) >= count, timeout, f"{count} requests")

    def wait_for_completed(self, count: int, timeout: float = 10.0) -> None:
        """Wait until `count` answers have been sent to their end; TimeoutError if they are not."""
        self._wait_until(lambda: len(self.completed) >= count, timeout, f"{count} completed answers")

    def close(self) -> None:
        """Close every connection and end every thread, also those that stall. In a forked child this does nothing."""
        if os.getpid() != self._process or self._closing.is_set():
            return
        self._closing.set()
        # Wakes the thread that waits for a connection, and below those that wait for a client; some are gone already.
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), timeout=1.0).close()
        with self._changed:
            connections = tuple(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in tuple(self._threads):
            # One that is just being started sees that we are closing.
            if thread.is_alive():
                thread.join(timeout=5.0)
        self._listener.close()
        if self._log is not None:
            self._log.close()

    def _wait_until(self, holds: Callable[[], bool], timeout: float, what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(holds, timeout):
                raise TimeoutError(f"{what} did not come within {timeout} s; {len(self.requests)} requests arrived")

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="fake-provider", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with self._changed:
                self._connections.add(connection)
            if self._closing.is_set():
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as reader:
                while (message := _read(reader)) is not None:
                    self._reply(connection, self._receive(*message))
        except OSError:
            # A client that goes away in mid-answer is an everyday event for a server.
            return
        finally:
            with self._changed:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())

    def _receive(self, method: str, url: str, headers: Mapping[str, str], content: bytes) -> tuple[Received, Answer]:
        path = _PREFIX.sub("", url.partition("?")[0]).rstrip("/") or "/"
        with self._changed:
            request = Received(
                index=len(self.requests),
                method=method,
                path=path,
                url=url,
                headers={name: "***" if name in _SECRETS else value for name, value in headers.items()},
                body=_parse(headers.get("content-type", ""), content),
                content=content,
            )
            self.requests.append(request)
            at = next((at for at, (want, _) in enumerate(self._script) if want in (None, path)), None)
            answer = self.default if at is None else self._script[at][1]
            if at is not None:
                del self._script[at]
            self._changed.notify_all()
        return request, answer

    def _reply(self, connection: socket.socket, exchange: tuple[Received, Answer]) -> None:
        request, answer = exchange
        if answer.gate is not None:
            self._wait(answer.gate)
        if answer.pause:
            time.sleep(answer.pause)
        if answer.reset:
            # Closing with a linger time of zero sends a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionResetError

        number = f"{self._token}{request.index:06d}"
        spoken = speak(request, answer, number)
        headers: dict[str, str | None] = {"x-request-id": f"req_{number}", **answer.headers}
        if spoken.is_generation:
            self._issue(request, spoken, headers["x-request-id"] or "")
        with_body = request.method != "HEAD" and answer.status not in (204, 304)
        try:
            _send(connection, answer, spoken, headers, self._parts(answer, spoken) if with_body else iter(()))
        except _HangUpError:
            # Closing alone would not do: a process that was forked in between holds a copy of the socket.
            connection.shutdown(socket.SHUT_RDWR)
            raise

        with self._changed:
            self.completed.append(request.index)
            self._changed.notify_all()
        if request.headers.get("connection", "").lower() == "close":
            raise _HangUpError

    def _issue(self, request: Received, spoken: Spoken, request_id: str) -> None:
        issued = Issued(request.index, request.path, spoken.id, request_id, spoken.input_tokens, spoken.output_tokens)
        if self._log is not None:
            with self._log_lock:
                self._log.write(json.dumps(asdict(issued)).encode() + b"\n")
                os.fsync(self._log.fileno())
        with self._changed:
            self.issued.append(issued)

    def _parts(self, answer: Answer, spoken: Spoken) -> Iterator[bytes]:
        """The body in the pieces in which it is sent, with the pauses, stalls and cuts that were asked for."""
        if spoken.events is None:
            yield spoken.body
            return
        # The end of the stream is a place to stall or cut, too.
        for at, event in enumerate([*spoken.events, b""]):
            if at == answer.stall_after:
                self._wait(answer.resume)
            if at == answer.cut_after:
                raise _HangUpError
            if at and answer.pause:
                time.sleep(answer.pause)
            yield event

    def _wait(self, event: threading.Event | None) -> None:
        while event is None or not event.wait(0.02):
            if self._closing.wait(0.02):
                raise _HangUpError


class ProviderProcess(ServerProcess):
    """
    A `FakeProvider` in a process of its own, for tests that kill the client's.

    It answers every request well, each piece `pause` seconds late, and writes to `log` as `FakeProvider` does.
    """

    def __init__(self, *, log: str | os.PathLike[str] | None = None, pause: float = 0.0) -> None:
        options = [] if log is None else ["--log", os.fspath(log)]
        super().__init__(__name__, [*options, "--pause", str(pause)])


class _HangUpError(ConnectionError):
    """The connection is to be closed, whatever was promised on it."""


_SECRETS = frozenset({"authorization", "api-key", "cookie"})
_PREFIX = re.compile(r"^(?:/openai)?(?:/v1|/deployments/[^/]+)?(?=/|$)")


def _read(reader: BinaryIO) -> tuple[str, str, dict[str, str], bytes] | None:
    """The next request on a connection, or None when the client has closed it."""
    line = reader.readline(65536)
    if not line:
        return None
    method, url, _ = line.decode("latin-1").split(" ", 2)
    headers: dict[str, str] = {}
    while (line := reader.readline(65536)) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return method, url, headers, b"".join(_dechunk(reader))
    return method, url, headers, reader.read(int(headers.get("content-length", 0)))


def _dechunk(reader: BinaryIO) -> Iterator[bytes]:
    while size := int(reader.readline(100).partition(b";")[0], 16):
        yield reader.read(size)
        reader.readline(2)
    reader.readline(2)


def _parse(content_type: str, content: bytes) -> dict[str, Any]:
    """A request's fields, whether they came as JSON or as a form; {} if they are neither."""
    if content_type.startswith("multipart/form-data"):
        form = message_from_bytes(f"content-type: {content_type}\r\n\r\n".encode() + content)
        parts = [part for part in form.get_payload() if isinstance(part, Message) and part.get_filename() is None]
        return {str(part.get_param("name", header="content-disposition")): _text(part) for part in parts}
    if content_type.startswith("application/x-www-form-urlencoded"):
        return dict(parse_qsl(content.decode()))
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    return payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""


def _send(
    connection: socket.socket, answer: Answer, spoken: Spoken, headers: Mapping[str, str | None], parts: Iterator[bytes]
) -> None:
    # With an `Answer.cut_bytes` the length that was announced is never reached.
    squeeze = zlib.compressobj(wbits=31) if answer.gzip else None
    is_stream = spoken.events is not None
    body = spoken.body if squeeze is None or is_stream else squeeze.compress(spoken.body) + squeeze.flush()
    fields: dict[str, str | None] = {
        "content-type": spoken.content_type,
        "content-encoding": "gzip" if answer.gzip else None,
        **({"transfer-encoding": "chunked"} if is_stream else {"content-length": str(len(body))}),
        **{name.lower(): value for name, value in headers.items()},
    }
    lines = [
        f"HTTP/1.1 {answer.status} {responses.get(answer.status, 'Unknown')}",
        *(f"{name}: {value}" for name, value in fields.items() if value is not None),
    ]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    left = answer.cut_bytes
    if not is_stream:
        for _ in parts:
            connection.sendall(head + body[:left])
            if left is not None:
                raise _HangUpError
            return
        connection.sendall(head)
        return

    connection.sendall(head)
    for part in parts:
        data = part if squeeze is None else squeeze.compress(part) + squeeze.flush(zlib.Z_SYNC_FLUSH)
        piece = data[:left]
        if piece:
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        if left is not None:
            left -= len(piece)
            if left <= 0:
                raise _HangUpError
    last = b"" if squeeze is None else squeeze.flush()
    connection.sendall((b"%x\r\n%b\r\n" % (len(last), last) if last else b"") + b"0\r\n\r\n")


def main() -> None:
    """Run a provider until the process that started this one ends."""
    parser = argparse.ArgumentParser(
        prog="python -m metered_ai.testing.provider", description="A fake OpenAI provider on loopback."
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--log", help="append each answer issued to this file, synced, before it is sent")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each piece of an answer")
    options = parser.parse_args()
    with FakeProvider(default=Answer(pause=options.pause), port=options.port, log=options.log) as provider:
        ready(provider.base_url)


if __name__ == "__main__":
    main()
