"""An HTTP client for talking to a service: every exchange ends by a deadline, whatever the other side does."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx

from ..errors import ConfigurationError

__all__ = ["Answer", "BoundedClient", "NoAnswerError"]


class NoAnswerError(Exception):
    """
    No answer that could be read: refused, reset, too slow, too large. The message names neither key nor content.

    `is_final`: nor will there ever be one.
    """

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whole and within its bounds."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_json(self) -> bool:
        return "json" in self.headers.get("content-type", "").lower()

    def json(self) -> Any:
        """The body as JSON; ValueError if it is none."""
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


class BoundedClient:
    """
    Sends one request at a time for each caller, over shared connections.

    - `timeout` seconds are the whole of a request: names looked up apart, a peer that drips byte by byte cannot outlast them.
    - Redirects are not followed, proxies of the environment not used, compressed answers not asked for.
    - May be called from any thread. After a fork the child has connections of its own; with a `given` client it raises
      ConfigurationError, as nobody but its owner can replace that one. Of a given client the body is read against the clock;
      the rest keeps to that client's own time-outs, each at most `timeout`.
    """

    def __init__(
        self, base_url: str, headers: Mapping[str, str], timeout: float, given: httpx.Client | None = None
    ) -> None:
        self._base_url = base_url
        self._headers = dict(headers)
        self._timeout = timeout
        self._given = given
        self._home = os.getpid()
        self._own = _Own()
        self._is_closed = False

    def request(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        timeout: float | None = None,
        limit: int = 1 << 20,
    ) -> Answer:
        """The answer, of at most `limit` bytes. Raises NoAnswerError, and ValueError where `body` is no JSON."""
        seconds = self._timeout if timeout is None else max(0.0, min(timeout, self._timeout))
        content = None if body is None else json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        headers = {**self._headers, "accept": "application/json", "accept-encoding": "identity"}
        if content is not None:
            headers["content-type"] = "application/json"

        client = self._client()
        with _until(time.monotonic() + seconds):
            try:
                # The path is quoted already, and stays as it is.
                request = client.build_request(
                    method,
                    httpx.URL(self._base_url + path),
                    content=content,
                    headers=headers,
                    timeout=httpx.Timeout(seconds),
                )
                return _read(client.send(request, stream=True, follow_redirects=False, auth=None), limit)
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                # Without the cause: it carries the request, and that the key.
                raise NoAnswerError(_shown(error)) from None

    def _client(self) -> httpx.Client:
        if self._is_closed:
            raise NoAnswerError("the client is closed", is_final=True)
        if self._given is not None:
            if os.getpid() != self._home:
                raise ConfigurationError(
                    "an http_client of your own cannot be used after a fork; make a new one in the child"
                )
            return self._given
        own = self._own
        if own.pid != os.getpid():
            # The parent's lock may be taken for ever, and its connections are the parent's: left alone, not closed.
            _abandoned.append(own)
            own = self._own = _Own()
        with own.lock:
            if own.client is None:
                own.client = httpx.Client(transport=_Transport(is_secure=self._base_url.startswith("https")))
            return own.client

    def close(self) -> None:
        """Give back our own connections; a given client stays open. Closing twice changes nothing."""
        self._is_closed = True
        own = self._own
        if own.pid != os.getpid():
            return
        with own.lock:
            client, own.client = own.client, None
        if client is not None:
            client.close()


class _Own:
    """The connections of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.client: httpx.Client | None = None


_abandoned: list[_Own] = []


def _shown(error: Exception) -> str:
    # What httpx says may quote what the server sent; the kind of failure says enough.
    return {
        "ConnectTimeout": "no connection in time",
        "ConnectError": "no connection",
        "PoolTimeout": "no free connection in time",
        "ReadTimeout": "no answer in time",
        "WriteTimeout": "the request could not be sent in time",
        "ReadError": "the connection broke",
        "WriteError": "the connection broke",
        "RemoteProtocolError": "the connection broke, or what came is not HTTP",
    }.get(type(error).__name__, f"no answer ({type(error).__name__})")


def _read(response: httpx.Response, limit: int) -> Answer:
    body = bytearray()
    try:
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            # A megabyte of it may hold a thousand.
            raise NoAnswerError("the answer is compressed, which nobody asked for")
        for piece in response.iter_bytes():
            body += piece
            if len(body) > limit:
                raise NoAnswerError(f"the answer is longer than {limit} bytes")
            if _left() <= 0:
                raise NoAnswerError("no answer in time")
    finally:
        response.close()
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()}, bytes(body))


# A time-out of httpx counts from the last byte. So that a drip cannot outlast a request, the clock is asked below it, for each byte
# that is waited for. A request runs in its caller's thread from beginning to end, and so does its clock.

_clock = threading.local()


@contextmanager
def _until(deadline: float) -> Generator[None]:
    _clock.deadline = deadline
    try:
        yield
    finally:
        _clock.deadline = None


def _left() -> float:
    deadline: float | None = getattr(_clock, "deadline", None)
    return 60.0 if deadline is None else deadline - time.monotonic()


class _Transport(httpx.HTTPTransport):
    def __init__(self, *, is_secure: bool) -> None:
        # Reading the certificates takes longer than many a request.
        context = httpx.create_ssl_context() if is_secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        super().__init__(verify=context, trust_env=False)
        # httpx takes no network of ours, its pool does.
        self._pool = httpcore.ConnectionPool(
            ssl_context=context,
            max_connections=100,
            max_keepalive_connections=20,
            keepalive_expiry=5.0,
            network_backend=_Network(),
        )


class _Network(httpcore.NetworkBackend):
    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        # The system would try each address of a name for as long as the whole request may take.
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        for *_, address in found:
            try:
                stream = self._inner.connect_tcp(
                    str(address[0]), port, _at_most(timeout), local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
            else:
                return _Stream(stream)
        raise failed


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _at_most(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # A peer that takes byte by byte is a drip, too.
        for start in range(0, len(buffer), 1 << 16):
            self._inner.write(buffer[start : start + (1 << 16)], _at_most(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, _at_most(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _at_most(timeout: float | None) -> float:
    left = _left()
    if left <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return left if timeout is None else min(timeout, left)
