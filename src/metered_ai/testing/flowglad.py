"""
A Flowglad for tests: a real HTTP server on loopback that answers as the real one was seen to, and misbehaves on demand.

```python
with FakeFlowglad() as flowglad:
    flowglad.add_meter("generations")
    flowglad.add_customer("ada", credits={"generations": 100})
    service = Flowglad(flowglad.key, flowglad.url)
    flowglad.fault(status=429, retry_after=1, times=3)  # the next three requests; after them, good answers again
    …
    flowglad.balance("ada", "generations")              # what is left there, in debt below zero
    flowglad.recorded("ada")                            # the usage events it has
```

`python -m metered_ai.testing.flowglad --customer ada=100` runs it as a process of its own, which outlives a client that is killed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import hmac
import json
import os
import random
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast

from .flowglad_books import FlowgladBooks, Json, Reply, SubscriptionBooks, new_id
from .process import ServerProcess, ready

__all__ = ["Asked", "FakeFlowglad", "Fault", "FlowgladProcess"]

KEY = "sk_test_of_a_fake"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """
    How a request goes wrong.

    - `status` (with `retry_after` and `body`) is answered instead of what Flowglad would say.
    - `garbage`: 200 and a page of HTML. `reset`: the connection is reset. `drip`: the answer comes byte by byte, with so many seconds
      between two, headers included. `cut`: the connection ends in mid-answer.
    - `is_done`: what was asked for is done all the same, before the answer goes wrong. That is how an answer gets lost.
    - `times_done`: it is done so often, as by a proxy that repeats requests.
    - `gate`: the request waits for this event before anything is done; with `is_done` the answer does.
    """

    status: int | None = None
    retry_after: float | None = None
    body: Json | str | None = None
    garbage: bool = False
    reset: bool = False
    cut: bool = False
    drip: float = 0.0
    is_done: bool = False
    times_done: int = 1
    gate: threading.Event | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it arrived, and the status that was answered (None if the answer got lost). `path` is without /api/v1 and query."""

    method: str
    path: str
    target: str
    body: Any
    has_key: bool
    status: int | None


@dataclass
class _Scripted:
    fault: Fault
    path: str | None
    left: int = field(default=1)


class FakeFlowglad:
    """
    A Flowglad with one pricing model, in threads of this process. A context manager.

    A repeated transaction id is answered with the first event, whatever is different; client mistakes are 500; nothing is refused for
    lack of credits; a wrong key is a 401 in plain text; an empty transaction id gets the meter's first event; the bulk call is silent
    about what it had. Two events at once on a balance near zero block that meter of that subscription for good, so `pause` seconds are
    spent in recording each. Nothing expires, and no payment is ever made: `subscribe` and `grant` are what it would lead to.
    """

    def __init__(self, *, key: str = KEY, port: int = 0, pause: float = 0.0) -> None:
        self.key = key
        self.webhook_secret = f"whsec_{base64.b64encode(secrets.token_bytes(24)).decode()}"
        """What its webhooks are signed with."""
        self.pause = pause
        self.requests: list[Asked] = []
        self.is_down = False
        """While it is, every connection is reset."""
        self._script: deque[_Scripted] = deque()
        self._random: tuple[random.Random, float] | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._process = os.getpid()
        self._server = _Server(("127.0.0.1", port), self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        """What FLOWGLAD_BASE_URL is to be."""
        self.books = FlowgladBooks(key, self.url, self._work)
        """The state itself, for what the methods here do not tell."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="fake-flowglad", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection and end every thread. In a forked child this does nothing."""
        if os.getpid() != self._process or self._closing.is_set():
            return
        self._closing.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join(timeout=5.0)

    # The operator's side.

    def add_meter(self, slug: str, *, name: str | None = None, aggregation: str = "sum", id: str | None = None) -> str:
        """A new usage meter and its price `{slug}_no_charge`; its id."""
        with self.books.lock:
            return str(self.books.add_meter(slug, name or slug.replace("_", " ").title(), aggregation, id)["id"])

    def add_usage_price(
        self, slug: str, meter: str, unit_price: int, *, is_default: bool = False, id: str | None = None
    ) -> str:
        """A price per unit of a meter, in cents; its id. As default it takes the place of the one that was."""
        with self.books.lock:
            name = slug.replace("_", " ").title()
            return str(self.books.add_usage_price(meter, slug, name, unit_price, is_default=is_default, id=id)["id"])

    def add_plan(
        self,
        slug: str,
        *,
        unit_price: int = 0,
        credits: Mapping[str, int] | None = None,
        features: tuple[str, ...] = (),
        is_default: bool = False,
        kind: str = "subscription",
    ) -> None:
        """A product with one price of the same slug, credits by meter, and toggle features. The default plan is every new customer's."""
        with self.books.lock:
            granted = [
                self.books.add_feature(
                    f"{slug}_{meter}",
                    f"{amount} {meter}",
                    kind="usage_credit_grant",
                    amount=amount,
                    meter_id=self.books.meter(meter)["id"],
                    renewal="once" if kind == "single_payment" else "every_billing_period",
                )
                for meter, amount in (credits or {}).items()
            ]
            toggles = [self.books.add_feature(feature, feature.replace("_", " ").title()) for feature in features]
            name = slug.replace("_", " ").title()
            self.books.add_product(
                slug, name, kind=kind, unit_price=unit_price, features=granted + toggles, is_default=is_default
            )

    def add_customer(
        self,
        customer: str,
        *,
        plan: str | None = None,
        credits: Mapping[str, int] | None = None,
        id: str | None = None,
        subscription_id: str | None = None,
    ) -> str:
        """
        A new customer on the default plan, on `plan`, or, where neither is there, on a plan without anything; their subscription's id.

        `credits` are granted on top.
        """
        with self.books.lock:
            if self.books.model["defaultProduct"] is None and plan is None:
                self.add_plan("empty", is_default=True)
            made = self.books.add_customer(
                customer, customer.title(), f"{new_id('mail')}@example.com", id=id, subscription_id=subscription_id
            )
        if plan is not None:
            self.subscribe(customer, plan)
        for meter, amount in (credits or {}).items():
            self.grant(customer, meter, amount)
        return made.current[-1].id

    def subscribe(self, customer: str, plan: str) -> str:
        """A plan that was paid for, with its credits: a new subscription, whose id is returned. A free one before it ends."""
        with self.books.lock:
            owner = self.books.customers[customer]
            return self.books.subscribe(owner, self.books.product(plan)).id

    def upgrade(self, customer: str, plan: str) -> str:
        """Another plan in place of all that is current: a new subscription with fresh credits. The old balance stays behind."""
        with self.books.lock:
            old = self.books.customers[customer].current
            made = self.subscribe(customer, plan)
            for each in old:
                each.wire |= {"status": "canceled", "replacedBySubscriptionId": made}
            return made

    def cancel(self, customer: str) -> None:
        """End every current subscription: no plan is left."""
        with self.books.lock:
            for each in self.books.customers[customer].current:
                each.wire |= {"status": "canceled", "canceledAt": int(time.time() * 1000)}

    def archive(self, customer: str) -> None:
        """Archive the customer: unknown from now on, and no event is taken for their subscriptions."""
        self.books.answer("POST", f"/api/v1/customers/{customer}/archive", {"authorization": self.key}, b"{}")

    def grant(self, customer: str, meter: str, amount: int) -> None:
        """Credits on the current subscription, as a top-up that was paid for gives them. A debt eats them first."""
        with self.books.lock:
            self.books.grant(self._current(customer), self.books.meter(meter)["id"], amount)

    def block_meter(self, customer: str, meter: str) -> None:
        """From now on no event of the current subscription goes through on this meter, as after two at once that went below zero."""
        with self.books.lock:
            self._current(customer).blocked.add(self.books.meter(meter)["id"])

    def unblock_meter(self, customer: str, meter: str) -> None:
        """Let events through again."""
        with self.books.lock:
            self._current(customer).blocked.discard(self.books.meter(meter)["id"])

    def balance(self, customer: str, meter: str) -> int | None:
        """The balance of the current subscription, below zero in debt; None where the meter was never granted and never used."""
        with self.books.lock:
            return self._current(customer).balances.get(self.books.meter(meter)["id"])

    def is_blocked(self, customer: str, meter: str) -> bool:
        """Whether events of the current subscription are stuck on this meter."""
        with self.books.lock:
            return self.books.meter(meter)["id"] in self._current(customer).blocked

    def subscription_id(self, customer: str) -> str:
        """The id of the current subscription."""
        with self.books.lock:
            return self._current(customer).id

    def recorded(self, customer: str | None = None, meter: str | None = None) -> list[Json]:
        """The usage events it has, oldest first, as it tells them."""
        with self.books.lock:
            owner = None if customer is None else self.books.customers[customer].wire["id"]
            meter_id = None if meter is None else self.books.meter(meter)["id"]
            return [
                dict(each)
                for each in self.books.events
                if owner in (None, each["customerId"]) and meter_id in (None, each["usageMeterId"])
            ]

    def webhook(
        self, kind: str, customer: str, secret: str | None = None, *, at: float | None = None
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a webhook such as subscription.created, signed at a time with `secret`, else `webhook_secret`."""
        with self.books.lock:
            wire = self.books.customers[customer].wire
        noun = kind.partition(".")[0]
        body = json.dumps(
            {
                "type": kind,
                "object": noun,
                "id": new_id(noun),
                "customer": {"id": wire["id"], "externalId": customer},
            }
        ).encode()
        message_id, sent = f"msg_{secrets.token_hex(8)}", str(int(time.time() if at is None else at))
        key = base64.b64decode((secret or self.webhook_secret).removeprefix("whsec_"))
        signature = hmac.new(key, f"{message_id}.{sent}.".encode() + body, hashlib.sha256).digest()
        headers = {
            "svix-id": message_id,
            "svix-timestamp": sent,
            "svix-signature": f"v1,{base64.b64encode(signature).decode()}",
        }
        return body, headers

    def _current(self, customer: str) -> SubscriptionBooks:
        current = self.books.customers[customer].current
        if not current:
            raise LookupError(f"customer {customer!r} has no current subscription")
        return max(current, key=lambda each: cast("int", each.wire["createdAt"]))

    # Going wrong.

    def fault(self, fault: Fault | None = None, /, *, times: int = 1, path: str | None = None, **fields: Any) -> None:
        """
        The next request goes wrong, or the next `times` ones; with `path` those that begin with it ("/usage-events").

        `fields` are those of `Fault`; a misspelled one is a TypeError.
        """
        with self._changed:
            self._script.append(_Scripted(Fault(**fields) if fault is None else fault, path, times))

    def be_faulty(self, rate: float, seed: int) -> None:
        """From now on so many requests of one go wrong by chance: 429, 500, 503, garbage, resets before and after it was done, twice done."""
        self._random = (random.Random(seed), rate) if rate else None  # noqa: S311  a storm that can be repeated

    @contextmanager
    def down(self) -> Generator[None]:
        """Inside, every connection is reset."""
        self.is_down = True
        self._server.hang_up()
        try:
            yield
        finally:
            self.is_down = False

    def wait_for_requests(self, count: int, timeout: float = 10.0, path: str = "") -> None:
        """Wait until `count` requests (to paths that begin so) were answered since the start; TimeoutError if they were not."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.asked(path)) >= count, timeout):
                raise TimeoutError(f"{count} requests did not come within {timeout} s; {len(self.requests)} did")

    def asked(self, path: str = "") -> list[Asked]:
        """The requests to paths that begin so."""
        return [each for each in self.requests if each.path.startswith(path)]

    def _work(self) -> None:
        if self.pause:
            time.sleep(self.pause)

    def _pick(self, path: str) -> Fault:
        with self._changed:
            for scripted in self._script:
                if scripted.path is None or path.startswith(scripted.path):
                    scripted.left -= 1
                    if not scripted.left:
                        self._script.remove(scripted)
                    return scripted.fault
            if self._random is not None:
                chance, rate = self._random
                if chance.random() < rate:
                    return chance.choice(_STORM)
        return _WELL

    def _serve(self, handler: _Handler) -> None:
        length = int(handler.headers.get("content-length") or 0)
        content = handler.rfile.read(length)
        if self.is_down:
            raise _ResetError
        path = handler.path.partition("?")[0].removeprefix("/api/v1")
        fault = self._pick(path)
        if fault.gate is not None and not fault.is_done:
            self._wait(fault.gate)
        reply = self._reply(handler, fault, content)
        self._note(handler, path, content, None if fault.reset or fault.cut else reply.status)
        if fault.gate is not None and fault.is_done:
            self._wait(fault.gate)
        if fault.reset:
            raise _ResetError
        self._send(handler, fault, reply)

    def _reply(self, handler: _Handler, fault: Fault, content: bytes) -> Reply:
        is_instead = fault.status is not None or fault.garbage or fault.reset
        reply = Reply(200, "")
        if fault.is_done or not is_instead:
            headers = {name.lower(): value for name, value in handler.headers.items()}
            for _ in range(fault.times_done):
                reply = self.books.answer(handler.command, handler.path, headers, content)
        if fault.status is not None:
            said = {"error": f"status {fault.status} was asked for", "code": "INTERNAL_SERVER_ERROR"}
            reply = Reply(fault.status, said if fault.body is None else fault.body)
        elif fault.garbage:
            reply = Reply(200, "<html><body>One moment, please.</body></html>")
        return reply

    def _note(self, handler: _Handler, path: str, content: bytes, status: int | None) -> None:
        try:
            body = json.loads(content) if content else None
        except ValueError:
            body = content
        asked = Asked(
            method=handler.command,
            path=path,
            target=handler.path,
            body=body,
            has_key=self.key in handler.headers.get("authorization", ""),
            status=status,
        )
        with self._changed:
            self.requests.append(asked)
            self._changed.notify_all()

    def _send(self, handler: _Handler, fault: Fault, reply: Reply) -> None:
        is_text = isinstance(reply.body, str)
        body = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
        kind = "text/html" if body.startswith(b"<") else "text/plain;charset=UTF-8"
        lines = [
            f"HTTP/1.1 {reply.status} {responses.get(reply.status, 'Unknown')}",
            f"content-type: {kind if is_text else 'application/json'}",
            f"content-length: {len(body)}",
        ]
        if not is_text:
            lines.append(f"x-request-id: {cast('Json', reply.body).get('request_id', secrets.token_hex(4))}")
        if fault.retry_after is not None:
            lines.append(f"retry-after: {fault.retry_after:g}")
        message = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        if fault.cut:
            handler.wfile.write(message[: len(message) - len(body) // 2 - 1])
            raise _ResetError
        if not fault.drip:
            handler.wfile.write(message)
            return
        for at in range(len(message)):
            handler.wfile.write(message[at : at + 1])
            if self._closing.wait(fault.drip):
                raise _ResetError

    def _wait(self, gate: threading.Event) -> None:
        while not gate.wait(0.02):
            if self._closing.is_set():
                raise _ResetError


_WELL = Fault()
_STORM = (
    Fault(status=429, retry_after=0.05),
    Fault(status=500),
    Fault(status=503, is_done=True),
    Fault(garbage=True),
    Fault(garbage=True, is_done=True),
    Fault(reset=True),
    Fault(reset=True, is_done=True),
    Fault(cut=True),
    Fault(times_done=2),
)


class _ResetError(ConnectionError):
    """The connection is to be reset."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        try:
            cast("_Server", self.server).owner._serve(self)
        except _ResetError:
            # Closing with a linger time of zero sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        except OSError:
            # A client that goes away in mid-answer is an everyday event for a server.
            self.close_connection = True

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  the names are http.server's

    def log_message(self, format: str, *args: Any) -> None:
        """A test's output is its own."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], owner: FakeFlowglad) -> None:
        self.owner = owner
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0):
            # An orderly goodbye first would leave nothing to reset.
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no error of ours."""

    def hang_up(self) -> None:
        """End every connection, also those that wait for a next request."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class FlowgladProcess(ServerProcess):
    """
    A `FakeFlowglad` in a process of its own, for tests that kill the client's. It has the meter "generations" and these customers,
    each with so many credits; `faults` of its answers go wrong, the same ones for the same `seed`.
    """

    key = KEY

    def __init__(self, customers: Mapping[str, int], *, faults: float = 0.0, seed: int = 0, pause: float = 0.0) -> None:
        named = [f"--customer={name}={amount}" for name, amount in customers.items()]
        options = [f"--faults={faults}", f"--seed={seed}", f"--pause={pause}"]
        super().__init__(__name__, [*named, *options])


def main() -> None:
    """Run a Flowglad until the process that started this one ends."""
    parser = argparse.ArgumentParser(
        prog="python -m metered_ai.testing.flowglad", description="A fake Flowglad on loopback."
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--customer", action="append", default=[], metavar="ID=CREDITS", help="credits on generations")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that go wrong")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that recording an event takes")
    options = parser.parse_args()
    with FakeFlowglad(port=options.port, pause=options.pause) as flowglad:
        flowglad.add_meter("generations")
        for given in options.customer:
            name, _, amount = given.rpartition("=")
            flowglad.add_customer(name, credits={"generations": int(amount)})
        flowglad.be_faulty(options.faults, options.seed)
        ready(flowglad.url)


if __name__ == "__main__":
    main()
